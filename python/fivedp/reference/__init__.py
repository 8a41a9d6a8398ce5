"""Plain computations that fivedp is compared with, on one process and imported only on request.

Each reference is a class with one method per operation, the same names and arguments in all of them:

    float64   NumPy in float64, the oracle of tests
    numpy     NumPy in the type of the inputs
    torch     torch on the CPU in the type of the inputs

`open_reference("torch").matmul(a, b)` takes and returns NumPy arrays. Nothing here is used by fivedp itself.
"""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

NAMES = ("float64", "numpy", "torch")


class Reference(Protocol):
    """What every reference offers."""

    name: str

    def supports(self, dtype: str) -> bool:
        """Whether products of this type are worth timing: float16 in NumPy, for one, has no BLAS."""
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
