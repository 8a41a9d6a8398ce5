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
def attention_forward(q: Any, k: Any, v: Any, mask: tuple[Any, ...], highest: Any, total: Any, output: Any) -> None: ...
def attention_finish(highest: Any, total: Any, output: Any, out: Any, log_sum: Any) -> None: ...
def attention_delta(d_out: Any, out: Any, delta: Any) -> None: ...
def attention_backward(
    d_out: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: tuple[Any, ...],
    log_sum: Any,
    delta: Any,
    d_q: Any,
    d_k: Any,
    d_v: Any,
) -> None: ...
def routing_forward(
    logits: Any,
    top_k: int,
    rule: tuple[Any, ...],
    chosen: Any,
    given: bool,
    weights: Any,
    log_sum: Any,
    scores: Any,
    choices: Any,
    probabilities: Any,
) -> tuple[int, int, int, int]: ...
def routing_backward(
    d_weights: Any,
    logits: Any,
    rule: tuple[Any, ...],
    chosen: Any,
    kept: Any,
    log_sum: Any,
    balance: Any,
    z_factor: float,
    d_logits: Any,
) -> None: ...
def routing_drop(chosen: Any, capacity: int, before: Any, kept: Any) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...

class SchedulePrices:
    """The bytes of every schedule of a spec; made by `fivedp.layout.plan`, which says what the tables hold."""

    def __init__(
        self,
        needed: Any,
        owned: Any,
        slot_index: Sequence[int],
        tensor_start: Sequence[int],
        nodes: Any,
        total_nodes: Any,
        replicas: int,
        slice_part: Any,
        messages: Any,
    ) -> None: ...
    def price(self, sizes: Sequence[int], itemsizes: tuple[int, int, int, int, int]) -> tuple[list[int], list[int]]: ...
    def cheapest(
        self, sizes: Sequence[int], itemsizes: tuple[int, int, int, int, int]
    ) -> tuple[int, int, int, int]: ...
