"""torch on the CPU in the type of the inputs, gradients by its own autograd.

NumPy arrays become tensors without a copy (bfloat16 through its bits), so that a timed call is torch's own time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


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

    def supports(self, dtype: str) -> bool:
        """Types that torch multiplies fast on a CPU."""
        return dtype in ("float32", "float64", "bfloat16", "complex64", "complex128")

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
