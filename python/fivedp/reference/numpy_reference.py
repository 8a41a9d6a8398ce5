"""NumPy references: float64 as the oracle, and the type of the inputs as the honest competitor.

The oracle turns its inputs into float64 (complex128) first, so its error is about 1e-16 of the sum of absolute products
and may be taken as nothing beside that of any 16- or 32-bit computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivedp.kernels.attention import Mask
from fivedp.reference import attention_reference

Gradients = tuple[NDArray[Any], NDArray[Any]]


def _exact(x: NDArray[Any]) -> NDArray[Any]:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64, copy=False)


def _gradients(dc: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> Gradients:
    """dA = dC B^H and dB = A^H dC; where B has no batch, the batch of the others is one long row index."""
    da = dc @ np.conj(np.swapaxes(b, -1, -2))
    if b.ndim == 2:
        a, dc = a.reshape(-1, a.shape[-1]), dc.reshape(-1, dc.shape[-1])
    return da, np.conj(np.swapaxes(a, -1, -2)) @ dc


class Float64:
    """Products in float64, whatever the inputs are; results stay float64 (complex128)."""

    name = "float64"

    def supports(self, dtype: str, operation: str = "matmul") -> bool:
        """All types are."""
        return True

    def set_threads(self, threads: int) -> None:
        """Let BLAS use `threads` threads from now on."""
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads, "blas")

    def matmul(self, a: NDArray[Any], b: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """C = A B in float64, into `out` where it is given."""
        return np.matmul(_exact(a), _exact(b), out=out)

    def matmul_backward(self, dc: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> Gradients:
        """Gradients dA and dB in float64."""
        return _gradients(_exact(dc), _exact(a), _exact(b))

    def attention(self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: Mask) -> NDArray[Any]:
        """The output in float64, with all logits stored."""
        return attention_reference.attention(q, k, v, mask).out

    def attention_backward(
        self, do: NDArray[Any], q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: Mask
    ) -> Callable[[], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """A function that computes (dq, dk, dv) in float64, its forward included."""
        return lambda: attention_reference.attention_backward(do, q, k, v, mask)


class SameType(Float64):
    """Products in the type of the inputs: OpenBLAS for 32- and 64-bit types."""

    name = "numpy"

    def supports(self, dtype: str, operation: str = "matmul") -> bool:
        """Types that BLAS has; NumPy multiplies others element by element. Its only attention is the oracle's."""
        return operation == "matmul" and dtype in ("float32", "float64", "complex64", "complex128")

    def matmul(self, a: NDArray[Any], b: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """C = A B, into `out` where it is given."""
        return np.matmul(a, b, out=out)

    def matmul_backward(self, dc: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> Gradients:
        """Gradients dA and dB."""
        return _gradients(dc, a, b)
