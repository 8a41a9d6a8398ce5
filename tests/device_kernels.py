"""Kernels for the double of CuPy in gpu_double.py: those of the CPU, queued on the current stream.

A kernel reads its operands when the stream comes to it, tables of rows included. So what is tested is everything
between the kernels: that arrays stay on the device, that what travels is waited for. The kernels being the same, so are
the bits of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fivedp.kernels import attention as cpu_attention
from fivedp.kernels import experts as cpu_experts
from fivedp.kernels import gemm as cpu_gemm
from fivedp.kernels import routing as cpu_routing
from fivedp.kernels._select import sum_type
from fivedp.kernels.attention import State
from fivedp.kernels.cuda import activations, attention, experts, gemm, grouped, routing, rows, tree_sum
from fivedp.kernels.cuda.routing import DeviceRouted, DeviceTotals
from fivedp.ops import routing as routing_operation

Array = Any
NO_ROW = np.iinfo(np.int64).max


def draw(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


def same_bits(cupy: Any, device: Iterable[Any], host: Iterable[Any]) -> None:
    for got, want in zip(device, host, strict=True):
        if want is None:
            assert got is None
            continue
        assert type(got) is cupy.ndarray
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert cupy.asnumpy(got).tobytes() == np.ascontiguousarray(want).tobytes()


def attention_kernels(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of the double's device."""

    def launch(work: Any) -> None:
        cupy.gpu.current[-1].enqueue(work)

    def state_of(state: State) -> State:
        return State(state.highest.view_, state.total.view_, state.output.view_)

    def empty_state(q: Any, v_size: int) -> State:
        batch, queries, heads, _ = q.shape
        kind = sum_type(q.dtype)
        highest = cupy.full((batch, heads, queries), -np.inf, kind)
        return State(highest, cupy.zeros(highest.shape, kind), cupy.zeros((batch, queries, heads, v_size), kind))

    def forward(q: Any, k: Any, v: Any, mask: Any, state: State) -> None:
        arrays, target = (q.view_, k.view_, v.view_), state_of(state)
        launch(lambda: cpu_attention.forward(*arrays, mask, target))

    def join(states: list[State]) -> State:
        result, sources = empty_like(states[0]), [state_of(state) for state in states]
        target = state_of(result)

        def work() -> None:
            joined = cpu_attention.join(sources)
            target.highest[...], target.total[...], target.output[...] = joined.highest, joined.total, joined.output

        launch(work)
        return result

    def empty_like(state: State) -> State:
        return State(*(cupy.empty(x.shape, x.dtype) for x in (state.highest, state.total, state.output)))

    def finish(state: State, out: Any) -> Any:
        lse, source, target = cupy.empty(state.highest.shape, state.highest.dtype), state_of(state), out.view_
        rows = lse.view_
        launch(lambda: rows.__setitem__(..., cpu_attention.finish(source, target)))
        return lse

    def delta(d_out: Any, out: Any) -> Any:
        batch, queries, heads, _ = out.shape
        result, arrays = cupy.empty((batch, heads, queries), sum_type(out.dtype)), (d_out.view_, out.view_)
        rows = result.view_
        launch(lambda: rows.__setitem__(..., cpu_attention.delta(*arrays)))
        return result

    def backward(d_out: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any) -> None:
        arrays, others = [x.view_ for x in (d_out, q, k, v)], [x.view_ for x in rest]
        launch(lambda: cpu_attention.backward(*arrays, mask, *others))

    for function in (empty_state, forward, join, finish, delta, backward):
        monkeypatch.setattr(attention, function.__name__, function)


def expert_kernels(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing, rows, grouped products, and the products and sums of the router, of the double's device."""

    class QueuedRows:
        """What stands for `CudaRows`: its tables are read when a kernel runs."""

        def __init__(self, arrays: list[Array], source: Array | None, index: Array) -> None:
            for table in (index,) if source is None else (source, index):
                assert table.dtype == np.int32
            assert source is not None or len(arrays) == 1
            assert len({array.dtype for array in arrays}) == 1
            self.views = [host_side(array) for array in arrays]
            self.source = None if source is None else cupy.asarray(source)
            self.index = cupy.asarray(index)
            self.shape = (len(index), int(arrays[0].shape[1]))

        def __len__(self) -> int:
            return self.shape[0]

    def host_side(array: Array) -> Array:
        assert type(array) is cupy.ndarray
        return array.view_

    def later(x: Any) -> Callable[[], Any]:
        """An argument of a kernel as the CPU's takes it, when the stream has come to it."""
        if isinstance(x, QueuedRows):
            views, index = x.views, x.index.view_
            source = None if x.source is None else x.source.view_

            def table() -> cpu_experts.Rows:
                which = np.zeros(len(index), np.int32) if source is None else source.copy()
                return cpu_experts.Rows(views, which, index.copy())

            return table
        if isinstance(x, list | tuple):
            pieces = [later(piece) for piece in x]
            return lambda: [piece() for piece in pieces]
        assert not isinstance(x, np.ndarray), "a kernel was given memory of the host"
        value = x.view_ if type(x) is cupy.ndarray else x
        return lambda: value

    def queued(kernel: Callable[..., Any]) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            positional, named = [later(x) for x in arguments], {name: later(x) for name, x in keywords.items()}
            cupy.gpu.current[-1].enqueue(
                lambda: kernel(*(x() for x in positional), **{name: x() for name, x in named.items()}) and None
            )

        return launch

    monkeypatch.setattr(rows, "CudaRows", QueuedRows)
    for module, names in (
        (experts, ("gather_rows", "weighted_rows", "row_dots", "combine_rows")),
        (grouped, ("grouped_matmul", "grouped_outer", "expert_hidden")),
        (activations, ("expert_hidden_backward",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, queued(getattr(cpu_experts, name)))
    # Products of the router: in the order of the CPU, which CuPy's own would not have.
    monkeypatch.setattr(gemm, "gemm", queued(cpu_gemm.gemm))
    monkeypatch.setattr(tree_sum, "tree_sum", queued(cpu_gemm.tree_sum))
    monkeypatch.setattr(tree_sum, "serves", lambda array: True)
    for module in (cpu_gemm, routing_operation):
        monkeypatch.setattr(module, "gemm_backend", lambda: "canonical")
    _routing_kernels(cupy, monkeypatch, queued)


def _routing_kernels(
    cupy: Any, monkeypatch: pytest.MonkeyPatch, queued: Callable[[Callable[..., Any]], Callable[..., None]]
) -> None:
    head = 5  # the first invalid row, the first unknown expert, the three sums of squares
    monkeypatch.setattr(routing, "extension", lambda: SimpleNamespace(ROUTING_NUMBERS=head))

    def totals_of(logits: Array, top_k: int) -> DeviceTotals:
        return DeviceTotals(cupy.empty(head + (top_k + 1) * logits.shape[1], np.int64), top_k, logits.shape[1])

    def write(numbers: Array, logits: Array, found: Callable[[], Any]) -> Any:
        """Write the sums of what is found, or the first row with a logit that is not finite."""
        invalid = np.flatnonzero(~np.isfinite(logits.astype(np.float64)).all(axis=1))
        numbers[:2] = (*invalid[:1], NO_ROW)[0], NO_ROW
        if invalid.size:
            return None
        result = found()
        totals = result[-1] if len(result) == 2 else result.totals
        numbers[2:] = np.concatenate([totals.squares, totals.choices.reshape(-1), totals.probabilities])
        return result

    def route(logits: Array, experts: Array, rule: Any, kernel: Callable[..., Any]) -> DeviceRouted:
        sums = sum_type(logits.dtype)
        found, log_sum = cupy.empty(experts.shape, sums), cupy.empty(len(logits), sums)
        totals = totals_of(logits, experts.shape[1])

        def work(logits: Array, experts: Array, found: Array, log_sum: Array, numbers: Array) -> None:
            routed = write(numbers, logits, lambda: kernel(logits, experts, rule))
            if routed is not None:
                experts[...], found[...], log_sum[...] = routed.experts, routed.weights, routed.log_sum

        queued(work)(logits, experts, found, log_sum, totals.numbers)
        return DeviceRouted(experts, found, log_sum, totals)

    def forward(logits: Array, top_k: int, rule: Any) -> DeviceRouted:
        experts = cupy.empty((len(logits), top_k), np.int32)
        return route(logits, experts, rule, lambda x, _, rule: cpu_routing.forward(x, top_k, rule))

    def weights(logits: Array, experts: Array, rule: Any) -> DeviceRouted:
        return route(logits, cupy.asarray(experts), rule, cpu_routing.weights)

    def scores(logits: Array, rule: Any) -> tuple[Array, DeviceTotals]:
        found, totals = cupy.empty(logits.shape, sum_type(logits.dtype)), totals_of(logits, 0)

        def work(logits: Array, found: Array, numbers: Array) -> None:
            scored = write(numbers, logits, lambda: cpu_routing.scores(logits, rule))
            if scored is not None:
                found[...] = scored[0]

        queued(work)(logits, found, totals.numbers)
        return found, totals

    def backward(
        d_weights: Array, logits: Array, rule: Any, chosen: Array, kept: Array, log_sum: Array, balance: Array | None,
        z_factor: float,
    ) -> Array:  # fmt: skip
        d_logits = cupy.empty(logits.shape, sum_type(logits.dtype))

        def work(d_logits: Array, *arrays: Array) -> None:
            d_weights, logits, chosen, kept, log_sum = arrays
            d_logits[...] = cpu_routing.backward(
                d_weights, logits, rule, chosen, kept, log_sum, balance, z_factor
            )  # fmt: skip

        queued(work)(d_logits, d_weights, logits, chosen, kept, log_sum)
        return d_logits

    for function in (forward, weights, scores, backward):
        monkeypatch.setattr(routing, function.__name__, function)
