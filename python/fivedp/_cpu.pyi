"""Local arithmetic on the CPU; see fivedp.kernels."""

from collections.abc import Callable, Sequence
from typing import Any

def gemm(
    a_pieces: Any,
    b_pieces: Any,
    c: Any,
    cuts: Sequence[int] | None,
    alpha: complex,
    beta: complex,
    progress: Callable[[], object] | None,
) -> None: ...
def tree_sum(
    partials: Sequence[Any], spans: Sequence[tuple[int, int]], out: Any, alpha: complex, beta: complex
) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
