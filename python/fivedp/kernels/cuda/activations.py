"""What lies between an expert's two products, on a GPU: activations and their gradients, each in one pass."""

from __future__ import annotations

from typing import Any

from fivedp.kernels.cuda._extension import extension, optional_raw, raw, stream_of

__all__ = ["activate", "expert_hidden_backward"]

Array = Any


def activate(gate: Array | None, up: Array, hidden: Array, *, activation: str = "swiglu") -> None:
    """hidden = silu(gate) * up, or an activation of up alone.

    Parameters
    ----------
    gate : (R, F), or None for an activation without gate
    up : (R, F)
        float32, float64, bfloat16 or float16; contiguous along F, any stride between rows.
    hidden : (R, F)
        Written, in the type of up. May be gate or up.
    activation : str
        "swiglu" with a gate; "gelu" (of erf), "gelu_tanh", "relu" or "silu" without.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together; an activation that is not one of these.
    """
    extension().activation_forward(
        optional_raw(gate, "activation: gate"),
        raw(up, "activation: up"),
        raw(hidden, "activation: hidden"),
        activation,
        stream_of(up),
    )


def expert_hidden_backward(
    d_hidden: Array,
    gate: Array | None,
    up: Array,
    weights: Array | None,
    *,
    d_gate: Array | None,
    d_up: Array,
    hidden_weighted: Array | None = None,
    d_weights: Array | None = None,
    activation: str = "swiglu",
) -> None:
    """The backward of an expert's activation and of the combine weight.

    Parameters and meaning are those of `fivedp.kernels.experts.expert_hidden_backward`, for arrays of float32, float64,
    bfloat16 or float16; d_hidden has the type of up, or float32 where that has 16 bits.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together; an unknown activation.

    Notes
    -----
    d_weights is summed in a fixed order, a function of F and the type alone; it is not the order of the CPU.
    """
    extension().expert_hidden_backward(
        raw(d_hidden, "expert_hidden_backward: d_hidden"),
        optional_raw(gate, "expert_hidden_backward: gate"),
        raw(up, "expert_hidden_backward: up"),
        weights,
        optional_raw(d_gate, "expert_hidden_backward: d_gate"),
        raw(d_up, "expert_hidden_backward: d_up"),
        optional_raw(hidden_weighted, "expert_hidden_backward: hidden_weighted"),
        d_weights,
        activation,
        stream_of(up),
    )
