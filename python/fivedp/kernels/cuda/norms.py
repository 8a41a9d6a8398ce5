"""RMSNorm and LayerNorm of rows on a GPU, with the sum of a residual before them, and their gradients.

Each call is one pass over memory: with s = x + residual (or x alone), ::

    y = (s - mean) * inverse * gain + bias      inverse = 1 / sqrt(variance + epsilon)

where RMSNorm takes 0 for the mean, so the variance is mean(s^2), and has no bias. All bits are a function of the sizes
and the values: they depend on neither the chip nor the alignment.
"""

from __future__ import annotations

from typing import Any

from fivedp.kernels._select import sum_type
from fivedp.kernels.cuda._extension import empty_like, extension, optional_raw, raw, stream_of

__all__ = ["layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward"]

Array = Any


def rms_norm(
    x: Array,
    gain: Array | None,
    y: Array,
    *,
    inverse: Array | None = None,
    residual: Array | None = None,
    sum: Array | None = None,
    epsilon: float = 1e-6,
) -> None:
    """y = s / sqrt(mean(s^2) + epsilon) * gain, row by row, with s = x + residual.

    Parameters
    ----------
    x : (rows, columns)
        float32, float64, bfloat16 or float16; contiguous along columns, as all arrays are.
    gain : (columns,) or None
        None for ones.
    y : (rows, columns)
        Written; in the type of x, as gain, residual and sum are. May be x where there is no residual.
    inverse : (rows,), optional
        Written for the backward: 1 / sqrt(mean(s^2) + epsilon), in the type of sums: float64 for float64, else float32.
    residual : (rows, columns), optional
        Added to x; the sum is rounded to the arrays' type before its norm is taken.
    sum : (rows, columns)
        Written where there is a residual: s. May be x or residual.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    _forward(False, x, residual, gain, None, sum, y, None, inverse, epsilon)


def layer_norm(
    x: Array,
    gain: Array | None,
    bias: Array | None,
    y: Array,
    *,
    mean: Array | None = None,
    inverse: Array | None = None,
    residual: Array | None = None,
    sum: Array | None = None,
    epsilon: float = 1e-5,
) -> None:
    """y = (s - mean(s)) / sqrt(variance(s) + epsilon) * gain + bias, row by row, with s = x + residual.

    Parameters
    ----------
    bias : (columns,) or None
        None for zeros.
    mean : (rows,), optional
        Written for the backward, as `inverse` is, in the type of sums.
    x, gain, y, inverse, residual, sum
        As in `rms_norm`.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    _forward(True, x, residual, gain, bias, sum, y, mean, inverse, epsilon)


def rms_norm_backward(
    dy: Array,
    x: Array,
    gain: Array | None,
    inverse: Array,
    *,
    dx: Array,
    d_gain: Array | None = None,
    d_sum: Array | None = None,
    workspace: Array | None = None,
) -> None:
    """The gradients of `rms_norm`.

    Parameters
    ----------
    dy, x : (rows, columns)
        x is what the norm was taken of: `sum` where there was a residual.
    gain : (columns,) or None
    inverse : (rows,)
        As the forward wrote it.
    dx : (rows, columns)
        Written; also the gradient of the residual. May be dy or d_sum.
    d_gain : (columns,), optional
        Written, in the type of dy or of sums; summed over the rows in a fixed tree.
    d_sum : (rows, columns), optional
        Added to dx: the gradient that came to the sum on another way.
    workspace : (partials, 1, width), optional
        Room for partial sums, in the type of sums, with the extents of `extension().norm_workspace_shape(dy)`. Taken
        from the array library where it is missing.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    _backward(False, dy, x, gain, None, inverse, d_sum, dx, d_gain, None, workspace)


def layer_norm_backward(
    dy: Array,
    x: Array,
    gain: Array | None,
    mean: Array,
    inverse: Array,
    *,
    dx: Array,
    d_gain: Array | None = None,
    d_bias: Array | None = None,
    d_sum: Array | None = None,
    workspace: Array | None = None,
) -> None:
    """The gradients of `layer_norm`.

    Parameters
    ----------
    mean, inverse : (rows,)
        As the forward wrote them.
    d_gain, d_bias : (columns,), optional
        Written, both in the type of dy or both in that of sums.
    workspace : (partials, 2, width), optional
        The second extent is 1 where d_bias is None.
    dy, x, gain, dx, d_sum
        As in `rms_norm_backward`.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    _backward(True, dy, x, gain, mean, inverse, d_sum, dx, d_gain, d_bias, workspace)


def _forward(
    centered: bool,
    x: Array,
    residual: Array | None,
    gain: Array | None,
    bias: Array | None,
    total: Array | None,
    y: Array,
    mean: Array | None,
    inverse: Array | None,
    epsilon: float,
) -> None:
    extension().norm_forward(
        centered,
        raw(x, "norm: x"),
        optional_raw(residual, "norm: residual"),
        optional_raw(gain, "norm: gain"),
        optional_raw(bias, "norm: bias"),
        optional_raw(total, "norm: sum"),
        raw(y, "norm: y"),
        mean,
        inverse,
        epsilon,
        stream_of(x),
    )


def _backward(
    centered: bool,
    dy: Array,
    x: Array,
    gain: Array | None,
    mean: Array | None,
    inverse: Array,
    d_sum: Array | None,
    dx: Array,
    d_gain: Array | None,
    d_bias: Array | None,
    workspace: Array | None,
) -> None:
    upstream = raw(dy, "norm: dy")
    if workspace is None and (d_gain is not None or d_bias is not None):
        partials, width = extension().norm_workspace_shape(upstream)
        workspace = empty_like(dy, (partials, 1 if d_bias is None else 2, width), sum_type(dy.dtype))
    extension().norm_backward(
        centered,
        upstream,
        raw(x, "norm: x"),
        optional_raw(gain, "norm: gain"),
        mean,
        inverse,
        optional_raw(d_sum, "norm: d_sum"),
        raw(dx, "norm: dx"),
        optional_raw(d_gain, "norm: d_gain"),
        optional_raw(d_bias, "norm: d_bias"),
        workspace,
        stream_of(dy),
    )
