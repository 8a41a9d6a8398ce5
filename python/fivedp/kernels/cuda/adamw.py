"""AdamW on a GPU in one pass, and the squared norm of gradients for clipping. Nothing waits for a number.

To clip: sum the squared norms of all gradients, over ranks too, and give ``min(1, most / sqrt(total))`` as `scale`,
which stays in device memory. A scale that is not finite makes the step do nothing, as is usual where a gradient in
float16 has overflowed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fivedp.kernels.cuda._extension import empty_like, extension, raw, stream_of

__all__ = ["adamw", "squared_norm"]

Array = Any


def adamw(
    parameter: Array,
    gradient: Array,
    master: Array | None,
    first_moment: Array,
    second_moment: Array,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
    scale: Array | None = None,
    factor: float = 1.0,
    zero_gradient: bool = False,
) -> None:
    """One step of AdamW with decoupled weight decay and bias correction (Loshchilov & Hutter 2019).

    With g = factor * scale * gradient, m and v the moments and t the step::

        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
        w = (1 - learning_rate * weight_decay) w
            - learning_rate * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)

    Parameters
    ----------
    parameter : array
        float32, float64, bfloat16 or float16; contiguous, as all arrays are. Written: w, rounded.
    gradient : array of its shape
        Its type, or float32 for a parameter of 16 bits.
    master : array of its shape, or None
        w in float32 for a parameter of 16 bits; None where the parameter is float32 or float64.
    first_moment, second_moment : arrays of its shape
        m and v, in the type of sums: float64 for float64, else float32. Zeros before the first step.
    step : int
        1 for the first.
    scale : array of one number, optional
        In the type of sums. Where factor * scale is not finite, w, m and v stay as they are.
    factor : float
        Another factor of the gradient, known here.
    zero_gradient : bool
        Also set the gradient to zeros.

    Raises
    ------
    ValueError, TypeError
        Shapes, types or numbers that do not fit together.
    """
    extension().adamw(
        raw(parameter, "adamw: parameter"),
        raw(gradient, "adamw: gradient"),
        master,
        first_moment,
        second_moment,
        scale,
        step,
        learning_rate,
        *betas,
        epsilon,
        weight_decay,
        factor,
        zero_gradient,
        stream_of(parameter),
    )


def squared_norm(x: Array, total: Array, *, add: bool = False, workspace: Array | None = None) -> None:
    """total = the sum of x^2, or total + it where `add` is set; in float64, in an order that is a function of x.size.

    Parameters
    ----------
    x : array
        float32, float64, bfloat16 or float16; contiguous.
    total : float64 (1,)
        Written.
    workspace : float64 (partials,), optional
        Room for ``extension().squared_norm_partials(x.size)`` numbers; taken from the array library where it is
        missing.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    if workspace is None:
        workspace = empty_like(x, (extension().squared_norm_partials(x.size),), np.float64)
    extension().squared_norm(raw(x, "squared_norm: x"), total, workspace, add, stream_of(x))
