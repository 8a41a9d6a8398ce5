"""Plain computations that fivedp is compared with, on one process and imported only on request.

Each reference is a class with one method per operation, the same names and arguments in all of them:

    float64   NumPy in float64, the oracle of tests
    numpy     NumPy in the type of the inputs
    torch     torch on the CPU in the type of the inputs

`open_reference("torch").matmul(a, b)` takes and returns NumPy arrays. Nothing here is used by what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from numpy.typing import NDArray

from fivedp.kernels.attention import Mask

NAMES = ("float64", "numpy", "torch")


class Reference(Protocol):
    """What every reference offers."""

    name: str

    def supports(self, dtype: str, operation: str = "matmul") -> bool:
        """Whether "matmul", "attention" or "moe" of this type is worth timing: float16 in NumPy has no BLAS."""
        ...

    def set_threads(self, threads: int) -> None:
        """Use this many threads from now on."""
        ...

    def matmul(self, a: NDArray[Any], b: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """C (..., M, N) = A (..., M, K) times B (..., K, N)."""
        ...

    def matmul_backward(self, dc: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Gradients (dA, dB) of a loss, from dC (..., M, N); dB of an unbatched B is summed over the batch."""
        ...

    def attention(self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: Mask) -> NDArray[Any]:
        """The output (B, S, H, D) of attention of q (B, S, H, D) to k and v (B, S_k, H_kv, D)."""
        ...

    def attention_backward(
        self, do: NDArray[Any], q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: Mask
    ) -> Callable[[], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """A function that computes (dq, dk, dv); what the forward leaves for it is there already where it can be."""
        ...


def open_reference(name: str) -> Reference:
    """The reference called `name`.

    Raises
    ------
    ValueError
        Where there is none of that name.
    ModuleNotFoundError
        Where its library is not installed; says how to install it.
    """
    if name == "float64":
        from fivedp.reference.numpy_reference import Float64

        return Float64()
    if name == "numpy":
        from fivedp.reference.numpy_reference import SameType

        return SameType()
    if name == "torch":
        try:
            from fivedp.reference.torch_reference import Torch
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ModuleNotFoundError("reference torch: torch is not installed; pip install 'fivedp[torch]'") from error
        return Torch()
    raise ValueError(f"reference {name!r} does not exist; choose one of {', '.join(NAMES)}")
