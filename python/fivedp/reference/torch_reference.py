"""torch on the CPU in the type of the inputs, gradients by its own autograd.

NumPy arrays become tensors without a copy (bfloat16 through its bits), so that a timed call is torch's own time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fivedp.kernels.attention import Mask
from fivedp.reference.attention_reference import seen


def to_tensor(x: NDArray[Any]) -> torch.Tensor:
    """`x` as a tensor that shares its memory; `ml_dtypes.bfloat16` becomes `torch.bfloat16`."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def to_array(x: torch.Tensor) -> NDArray[Any]:
    """The inverse of `to_tensor`."""
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        bits: NDArray[Any] = x.contiguous().view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    plain: NDArray[Any] = x.numpy()
    return plain


class Torch:
    """Products and their gradients by torch."""

    name = "torch"

    def supports(self, dtype: str, operation: str = "matmul") -> bool:
        """Types that torch multiplies fast on a CPU; complex numbers have no attention."""
        real = dtype in ("float32", "float64", "bfloat16")
        return real or (operation == "matmul" and dtype in ("complex64", "complex128"))

    def set_threads(self, threads: int) -> None:
        """Let torch use `threads` threads from now on."""
        torch.set_num_threads(threads)

    def matmul(self, a: NDArray[Any], b: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """C = A B, into `out` where it is given."""
        if out is None:
            return to_array(torch.matmul(to_tensor(a), to_tensor(b)))
        torch.matmul(to_tensor(a), to_tensor(b), out=to_tensor(out))
        return out

    def matmul_backward(self, dc: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Gradients dA and dB by autograd."""
        leaf_a, leaf_b = to_tensor(a).detach().requires_grad_(), to_tensor(b).detach().requires_grad_()
        da, db = torch.autograd.grad(torch.matmul(leaf_a, leaf_b), (leaf_a, leaf_b), to_tensor(dc))
        return to_array(da), to_array(db)

    def attention(self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: Mask) -> NDArray[Any]:
        """The output by scaled_dot_product_attention; a mask other than causal is given as a matrix."""
        with torch.no_grad():
            out = _attend(to_tensor(q), to_tensor(k), to_tensor(v), _arguments(mask))
        return to_array(out.transpose(1, 2))

    def attention_backward(
        self, do: NDArray[Any], q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: Mask
    ) -> Callable[[], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """A function that computes (dq, dk, dv) by autograd; the forward has been done when this returns."""
        leaves = [to_tensor(x).detach().requires_grad_() for x in (q, k, v)]
        out = _attend(leaves[0], leaves[1], leaves[2], _arguments(mask))
        gradient = to_tensor(do).transpose(1, 2)

        def call() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
            dq, dk, dv = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
            return to_array(dq), to_array(dk), to_array(dv)

        return call

    def experts(
        self, x: NDArray[Any], router: NDArray[Any], w_gate: NDArray[Any] | None, w_up: NDArray[Any],
        w_down: NDArray[Any], *, top_k: int, score: str = "softmax", normalize: bool = True,
    ) -> NDArray[Any]:  # fmt: skip
        """A mixture of experts of tokens x (T, H), as the Mixtral block of Hugging Face has it; relu without a gate."""
        with torch.no_grad():
            tensors = [None if a is None else to_tensor(a) for a in (x, router, w_gate, w_up, w_down)]
            return to_array(_experts(*tensors, top_k=top_k, score=score, normalize=normalize))

    def experts_backward(
        self, dy: NDArray[Any], x: NDArray[Any], router: NDArray[Any], w_gate: NDArray[Any] | None,
        w_up: NDArray[Any], w_down: NDArray[Any], *, top_k: int, score: str = "softmax", normalize: bool = True,
    ) -> Callable[[], tuple[NDArray[Any], ...]]:  # fmt: skip
        """A function that computes the gradients of all five (without the gate's where there is none) by autograd."""
        tensors = [None if a is None else to_tensor(a) for a in (x, router, w_gate, w_up, w_down)]
        given = [None if a is None else a.detach().requires_grad_() for a in tensors]
        y = _experts(*given, top_k=top_k, score=score, normalize=normalize)
        leaves, gradient = [a for a in given if a is not None], to_tensor(dy)
        return lambda: tuple(to_array(g) for g in torch.autograd.grad(y, leaves, gradient, retain_graph=True))


def _experts(
    x: Any, router: Any, w_gate: Any, w_up: Any, w_down: Any, *, top_k: int, score: str, normalize: bool
) -> torch.Tensor:
    """Every expert in turn takes its tokens out, and adds what it makes of them."""
    logits = (x @ router).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    scores = torch.sigmoid(logits) if score == "sigmoid" else torch.softmax(logits, dim=1)
    weights, chosen = torch.topk(scores, top_k, dim=1)
    if normalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    weights, y = weights.to(x.dtype), torch.zeros_like(x)
    for expert in torch.unique(chosen).tolist():
        token, slot = torch.where(chosen == expert)
        rows = x[token]
        up = rows @ w_up[expert]
        hidden = torch.relu(up) if w_gate is None else torch.nn.functional.silu(rows @ w_gate[expert]) * up
        y = y.index_add(0, token, (hidden @ w_down[expert]) * weights[token, slot, None])
    return y


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """(B, H, S, D) from (B, S, H, D): the transposes are views."""
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out: torch.Tensor = attend(q, k, v, enable_gqa=grouped, **arguments)
    return out


def _arguments(mask: Mask) -> dict[str, Any]:
    """What torch calls a mask: the flag for causal queries and keys of the same tokens, else a matrix of truth."""
    if mask.softcap or mask.slopes is not None:
        raise ValueError("reference torch: scaled_dot_product_attention has neither softcap nor ALiBi slopes")
    same = mask.q_position.shape == mask.k_position.shape and bool((mask.q_position == mask.k_position).all())
    rising = same and bool((np.diff(mask.k_position) > 0).all())
    plain = mask.q_document is None and not mask.window
    if plain and (not mask.causal or rising):
        return {"scale": mask.scale, "is_causal": mask.causal}
    visible = seen(mask)
    return {"scale": mask.scale} | ({} if visible.all() else {"attn_mask": torch.from_numpy(visible)})
