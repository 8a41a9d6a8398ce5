"""Work on rows of device arrays, each in one pass over memory."""

from __future__ import annotations

from typing import Any

from fivedp.kernels.cuda._extension import extension, raw, stream_of

Array = Any


def rms_norm(x: Array, gain: Array | None, y: Array, *, inverse: Array | None = None, epsilon: float = 1e-6) -> None:
    """y = x / sqrt(mean(x^2) + epsilon) * gain, row by row.

    Parameters
    ----------
    x : (rows, columns)
        float32, float64, bfloat16 or float16; contiguous.
    gain : (columns,) or None
        None for ones.
    y : (rows, columns)
        Written; in the type of x, as gain is.
    inverse : (rows,), optional
        Written for the backward: 1 / sqrt(mean(x^2) + epsilon), in the type of sums.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    gain = None if gain is None else raw(gain, "rms_norm: gain")
    extension().rms_norm(raw(x, "rms_norm: x"), gain, raw(y, "rms_norm: y"), inverse, epsilon, stream_of(x))
