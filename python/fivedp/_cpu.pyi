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
def multiply_adds(like: Any, rounds: int) -> float: ...
def copy_box(target: Any, source: Any, may_stream: bool) -> None: ...
def attention_forward(
    q: Any, blocks: list[tuple[Any, Any, tuple[Any, ...]]], highest: Any, total: Any, output: Any
) -> None: ...
def attention_finish(highest: Any, total: Any, output: Any, out: Any, log_sum: Any) -> None: ...
def attention_delta(d_out: Any, out: Any, delta: Any) -> None: ...
def attention_backward(
    blocks: list[tuple[Any, Any, tuple[Any, ...], Any, Any, Any]], k: Any, v: Any, d_k: Any, d_v: Any
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

class RowTable:
    """Rows that lie anywhere, as checked pointers; made by `fivedp.kernels.experts.Rows`."""

    def __init__(self, arrays: Sequence[Any], source: Any, index: Any) -> None: ...

def grouped_matmul(
    x: Sequence[Any], w: Sequence[Any], offsets: Any, out: Any, progress: Callable[[], object] | None, tiles: Any
) -> int: ...
def grouped_outer(
    x: Any, dy: Any, offsets: Any, out: Any, progress: Callable[[], object] | None, tiles: Any
) -> int: ...
def expert_hidden(
    x: Any,
    w_gate: Any,
    w_up: Any,
    offsets: Any,
    hidden: Any,
    gate: Any,
    up: Any,
    activation: str,
    progress: Callable[[], object] | None,
    tiles: Any,
) -> int: ...
def expert_hidden_backward(
    d_hidden: Any,
    gate: Any,
    up: Any,
    weights: Any,
    d_gate: Any,
    d_up: Any,
    hidden_weighted: Any,
    d_weights: Any,
    activation: str,
    tiles: Any,
) -> int: ...
def combine_rows(rows: RowTable, starts: Any, weights: Any, experts: Any, n_experts: int, out: Any) -> None: ...
def gather_rows(rows: RowTable, out: Any) -> None: ...
def weighted_rows(dy: Any, weights: Any, out: Any) -> None: ...
def row_dots(a: Any, b: Any, out: Any) -> None: ...
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
