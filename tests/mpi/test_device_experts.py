"""Experts of CuPy arrays, without a GPU: on a double as asynchronous as a device, whose kernels are the CPU's.

The oracle is the same call on NumPy arrays, to the bit, which other tests hold against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
import gpu_double
from device_kernels import draw, expert_kernels, same_bits
from fivedp import DTypeError, LayoutError, ShapeError
from fivedp.comm.grid import grid_of
from fivedp.ops.shared_experts import SharedExperts
from mpi_experts import BFLOAT16, assert_same_error, draw_case, draw_experts, matrices, on_nodes, results_of, routing_of

RANKS = (1, 2, 3, 4)
TIMEOUT = 240
F32 = np.dtype(np.float32)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[Any]:
    yield from installed(monkeypatch, seed)


def installed(monkeypatch: pytest.MonkeyPatch, seed: int, *, cuda_mpi: bool = False) -> Iterator[Any]:
    module = gpu_double.install(monkeypatch, seed, cuda_mpi=cuda_mpi)
    expert_kernels(module, monkeypatch)
    yield module
    module.gpu.running = False


def there(cupy: Any, array: Any) -> Any:
    """A copy on the device; of a transposed array, a transposed one."""
    if array is None:
        return None
    if array.ndim > 1 and not array.flags.c_contiguous:
        return cupy.asarray(np.ascontiguousarray(array.swapaxes(-1, -2))).swapaxes(-1, -2)
    return cupy.asarray(array)


def judge(cupy: Any, comm: MPI.Intracomm, case: Any) -> tuple[Any, Any]:
    """A layer and its backward on the device, held against those of the host; the states of both."""
    arrays, keywords, dy = case.arguments(comm)
    y, state = fivedp.expert_layer(*arrays, comm, keep=True, **keywords)
    losses = dict(zip(("d_aux_loss", "d_z_loss"), case.losses, strict=True))
    d = fivedp.expert_layer_backward(dy, state, **losses)
    if case.shared is not None:
        keywords["shared"] = SharedExperts(*(there(cupy, a) for a in matrices(keywords["shared"])))
    y_there, state_there = fivedp.expert_layer(*(there(cupy, a) for a in arrays), comm, keep=True, **keywords)
    d_there = fivedp.expert_layer_backward(there(cupy, dy), state_there, **losses)
    same_bits(cupy, [y_there, *results_of(d_there)], [y, *results_of(d)])
    made = state_there.routing
    assert (made.aux_loss, made.z_loss, made.dropped) == (
        state.routing.aux_loss, state.routing.z_loss, state.routing.dropped
    )  # fmt: skip
    return state, state_there


# -- the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["staged", "ipc", "cuda_mpi"])
def test_layer_on_a_device_gives_the_bits_of_the_host(
    comm: MPI.Intracomm, seed: int, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIVEDP_TRANSPORT", transport)
    double = installed(monkeypatch, seed, cuda_mpi=transport == "cuda_mpi")
    cupy = next(double)
    case = draw_case(np.random.default_rng(seed), F32, comm.size, shared=6, shared_router=True, share="uneven")
    case.losses, case.lies = (0.3, 0.2), ("plain", "plain", "transposed", "transposed", "transposed", "plain")
    judge(cupy, comm, case)
    next(double, None)


CASES: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "bfloat16, expert counts no multiple of ranks": lambda rng, n: draw_case(
        rng, BFLOAT16, n, n_experts=7, top_k=3, shared=5
    ),
    "float64, no gate": lambda rng, n: draw_case(rng, np.float64, n, activation="gelu", share="uneven"),
    "fewer experts than ranks": lambda rng, n: draw_case(rng, F32, n, n_experts=2, top_k=1),
    "one rank has all tokens": lambda rng, n: draw_case(rng, F32, n, share="one"),
    "no tokens": lambda rng, n: draw_case(rng, F32, n, n_tokens=0, shared=3),
    "a narrow wire": lambda rng, n: draw_case(rng, F32, n, wire="bfloat16"),
    "a capacity": lambda rng, n: draw_case(rng, F32, n, capacity_factor=0.6, top_k=3),
    "a capacity, by score": lambda rng, n: draw_case(rng, BFLOAT16, n, capacity_factor=0.5, drop="score"),
    "experts choose": lambda rng, n: draw_case(rng, F32, n, choice="expert", score="sigmoid", normalize=False),
    "tables made elsewhere": lambda rng, n: draw_case(rng, F32, n, given=True, empty=0.4, skew=1.0, top_k=3),
}


@pytest.mark.parametrize("name", CASES)
def test_any_layer_gives_the_bits_of_the_host(comm: MPI.Intracomm, seed: int, cupy: Any, name: str) -> None:
    state, _ = judge(cupy, comm, CASES[name](np.random.default_rng(seed), comm.size))
    if "capacity" in name:
        assert comm.allreduce(int(state.routing.dropped)) > 0


def test_all_tokens_to_one_expert(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    case = draw_case(np.random.default_rng(seed), F32, comm.size, n_experts=5, top_k=1, given=True)
    assert case.experts is not None
    case.experts[:] = np.random.default_rng(seed).integers(5)
    judge(cupy, comm, case)


def test_layer_that_nobody_differentiates(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    case = draw_case(np.random.default_rng(seed), F32, comm.size)
    arrays, keywords, _ = case.arguments(comm)
    found = fivedp.expert_layer(*(there(cupy, a) for a in arrays), comm, **keywords)
    same_bits(cupy, [found], [fivedp.expert_layer(*arrays, comm, **keywords)])


def test_layer_on_a_stream_of_the_callers_own(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    with cupy.cuda.Stream(non_blocking=True):
        judge(cupy, comm, draw_case(np.random.default_rng(seed), F32, comm.size, shared=4, share="uneven"))


@pytest.mark.mpi(min_size=2)
def test_experts_that_are_cut_themselves(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    mesh, rng = fivedp.Mesh(comm, tp=comm.size), np.random.default_rng(seed)
    x, router, dy = draw(rng, 6, 8), draw(rng, 8, 4), draw(rng, 6, 8)
    part = np.array_split(np.arange(10), comm.size)[comm.rank]
    w_up, w_gate, w_down = draw(rng, 4, 8, 10)[..., part], draw(rng, 4, 8, 10)[..., part], draw(rng, 4, 10, 8)[:, part]
    arrays = x, router, *map(np.ascontiguousarray, (w_up, w_gate, w_down))
    y, state = fivedp.expert_layer(*arrays, mesh, tensor="tp", keep=True)
    y_there, state_there = fivedp.expert_layer(*map(cupy.asarray, arrays), mesh, tensor="tp", keep=True)
    gradients = fivedp.expert_layer_backward(dy, state)
    found = fivedp.expert_layer_backward(cupy.asarray(dy), state_there)
    same_bits(cupy, [y_there, *results_of(found)], [y, *results_of(gradients)])


@pytest.mark.mpi(min_size=4)
def test_rows_cross_to_a_node_once(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    apart = on_nodes(comm, [0, 0, 1, 1])
    case = draw_case(np.random.default_rng(seed), F32, comm.size, top_k=6)
    _, state = judge(cupy, apart, case)
    assert state.plan.relay is not None


# -- its parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BFLOAT16], ids=str)
def test_dispatch_and_combine_on_a_device(comm: MPI.Intracomm, seed: int, cupy: Any, dtype: Any) -> None:
    rng = np.random.default_rng([seed, comm.rank])
    tokens = 0 if comm.rank == 1 else 9
    x, dy = draw(rng, tokens, 6).astype(dtype), draw(rng, tokens, 6).astype(dtype)
    logits = draw(rng, tokens, 5).astype(dtype)
    routing = fivedp.route(logits, 3, comm=comm)
    routing_there = fivedp.route(cupy.asarray(logits), 3, comm=comm)
    same_bits(cupy, (routing_there.experts, routing_there.weights), (routing.experts, routing.weights))
    assert type(routing_there.counts) is np.ndarray
    batch = fivedp.expert_dispatch(x, routing, comm)
    out, d_tokens = (draw(rng, *batch.tokens.shape).astype(dtype) for _ in range(2))
    traffic = grid_of(comm).traffic
    traffic.reset()
    batch_there = fivedp.expert_dispatch(cupy.asarray(x), routing_there, comm)
    bill = batch_there.plan.bytes_sent()
    assert bill == batch.plan.bytes_sent()
    assert traffic.bytes_sent == bill["pairs"] + bill["rows"], "a row goes once to each of its owners"
    np.testing.assert_array_equal(batch_there.counts, batch.counts)
    out_there, dy_there = cupy.asarray(out), cupy.asarray(dy)
    traffic.reset()
    y_there = fivedp.expert_combine(out_there, batch_there)
    assert traffic.bytes_sent == bill["returns"], "a token comes back once for each of its owners' subtrees"
    same_bits(
        cupy,
        (
            batch_there.tokens, y_there, *fivedp.expert_combine_backward(dy_there, out_there, batch_there),
            fivedp.expert_dispatch_backward(cupy.asarray(d_tokens), batch_there),
        ),
        (
            batch.tokens, fivedp.expert_combine(out, batch), *fivedp.expert_combine_backward(dy, out, batch),
            fivedp.expert_dispatch_backward(d_tokens, batch),
        ),
    )  # fmt: skip


def test_grouped_products_on_a_device(seed: int, cupy: Any) -> None:
    rng, counts = np.random.default_rng(seed), [3, 0, 5]
    x, w, dy = draw(rng, 8, 6), draw(rng, 3, 6, 4), draw(rng, 8, 4)
    x_there, w_there, dy_there = map(cupy.asarray, (x, w, dy))
    same_bits(cupy, [fivedp.grouped_matmul(x_there, w_there, counts)], [fivedp.grouped_matmul(x, w, counts)])
    found = fivedp.grouped_matmul_backward(dy_there, x_there, w_there, counts)
    same_bits(cupy, found, fivedp.grouped_matmul_backward(dy, x, w, counts))


def test_routing_of_a_device_can_be_kept_and_changed(seed: int, cupy: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    logits, d_weights = draw(rng, 12, 6), draw(rng, 12, 2)
    routing, there = (fivedp.route(a, capacity_factor=0.7) for a in (logits, cupy.asarray(logits)))
    assert routing.dropped
    found = fivedp.route_backward(cupy.asarray(d_weights), there, d_aux_loss=0.1, d_z_loss=0.2)
    same_bits(cupy, [found], [fivedp.route_backward(d_weights, routing, d_aux_loss=0.1, d_z_loss=0.2)])
    there.save(tmp_path / "routing.npz")
    loaded = fivedp.Routing.load(tmp_path / "routing.npz")
    assert loaded.experts.tobytes() == routing.experts.tobytes()
    assert loaded.weights.tobytes() == routing.weights.tobytes()
    same_bits(cupy, [fivedp.balanced(there).experts], [fivedp.balanced(routing).experts])


def test_what_was_written_to_a_routing_counts(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    rng = np.random.default_rng([seed, comm.rank])
    x, logits = draw(rng, 7, 4), draw(rng, 7, 5)
    routing, there = (fivedp.route(a, comm=comm) for a in (logits, cupy.asarray(logits)))
    routing.weights[...] *= 3
    there.weights[...] = there.weights * 3
    y = fivedp.expert_combine(*both(fivedp.expert_dispatch(x, routing, comm)))
    same_bits(cupy, [fivedp.expert_combine(*both(fivedp.expert_dispatch(cupy.asarray(x), there, comm)))], [y])


def both(batch: Any) -> tuple[Any, Any]:
    return batch.tokens, batch


# -- waiting -----------------------------------------------------------------------------------------------------------


def test_the_host_waits_for_the_choice_alone(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    """Once in the forward, for an event; never in the backward, and never for a whole stream."""
    case = draw_case(np.random.default_rng(seed), F32, comm.size)
    arrays, keywords, dy = case.arguments(comm)
    arrays, dy = [there(cupy, a) for a in arrays], there(cupy, dy)
    fivedp.expert_layer(*arrays, comm, **keywords)  # settles the transport
    waits = count_waits(cupy)
    _, state = fivedp.expert_layer(*arrays, comm, keep=True, **keywords)
    assert waits == ["event"]
    fivedp.expert_layer_backward(dy, state)
    assert waits == ["event"]
    assert cupy.gpu.counts["synchronizations"] == 0


def count_waits(cupy: Any) -> list[str]:
    waits: list[str] = []
    event = cupy.cuda.Event

    def watched(*arguments: Any, **keywords: Any) -> Any:
        made = event(*arguments, **keywords)
        synchronize = made.synchronize
        made.synchronize = lambda: (waits.append("event"), synchronize())[1]
        return made

    cupy.cuda.Event = watched
    return waits


def test_tables_of_a_plan_are_copied_once(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    rng = np.random.default_rng([seed, comm.rank])
    routing = routing_of(draw_experts(rng, 8, 6, 2), draw(rng, 8, 2), 6)
    batch = fivedp.expert_dispatch(cupy.asarray(draw(rng, 8, 4)), routing, comm)
    rows = batch.tokens
    first = fivedp.expert_combine(rows, batch)
    tables = dict(vars(batch.plan.tables)), dict(batch.plan.tables._sums)
    same_bits(cupy, [fivedp.expert_combine(rows, batch)], [first.get()])
    assert all(vars(batch.plan.tables)[name] is table for name, table in tables[0].items())
    assert all(batch.plan.tables._sums[name] is table for name, table in tables[1].items())


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_arrays_of_two_places_are_refused_on_all_ranks(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    case = draw_case(np.random.default_rng(seed), F32, comm.size)
    arrays, keywords, dy = case.arguments(comm)
    on_device = [there(cupy, a) for a in arrays]
    _, state = fivedp.expert_layer(*on_device, comm, keep=True, **keywords)
    logits = draw(np.random.default_rng(seed), len(arrays[0]), 8)
    routing, batch = fivedp.route(logits), fivedp.expert_dispatch(on_device[0], state.routing, comm)
    ending = "all arrays must be NumPy's or all CuPy's"
    shared = SharedExperts(np.zeros((12, 3), F32), np.zeros((12, 3), F32), np.zeros((3, 12), F32))
    for words, call in {
        "`x` is cupy and `w_down` numpy; ": lambda: fivedp.expert_layer(*on_device[:4], arrays[4], comm),
        "`x` is numpy and `router` cupy; ": lambda: fivedp.expert_layer(arrays[0], *on_device[1:], comm),
        "`x` is cupy and `shared.w_up` numpy; ": lambda: fivedp.expert_layer(*on_device, comm, shared=shared),
        "`x` is cupy and `dy` numpy; ": lambda: fivedp.expert_layer_backward(dy, state),
        "`x` is cupy and `routing.experts` numpy; ": lambda: fivedp.expert_dispatch(on_device[0], routing, comm),
        "`x` is numpy and `routing.experts` cupy; ": lambda: fivedp.expert_dispatch(arrays[0], state.routing, comm),
        "`batch.tokens` is cupy and `expert_out` numpy; ": lambda: fivedp.expert_combine(batch.tokens.get(), batch),
        "`batch.tokens` is cupy and `d_tokens` numpy; ": (
            lambda: fivedp.expert_dispatch_backward(batch.tokens.get(), batch)
        ),
        "`batch.tokens` is cupy and `dy` numpy; ": lambda: fivedp.expert_combine_backward(dy, batch.tokens, batch),
    }.items():
        assert_same_error(comm, call, DTypeError, words + ending)


def test_ranks_of_two_kinds_are_refused_on_all(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    if comm.size == 1:
        return
    case = draw_case(np.random.default_rng(seed), F32, comm.size)
    arrays, _, _ = case.arguments(comm)
    logits = draw(np.random.default_rng(seed), len(arrays[0]), 8)
    if comm.rank == comm.size - 1:
        arrays, logits = [there(cupy, a) for a in arrays], cupy.asarray(logits)
    words = "all ranks must give NumPy arrays or all CuPy arrays"
    assert_same_error(comm, lambda: fivedp.expert_layer(*arrays, comm), DTypeError, words)
    assert_same_error(comm, lambda: fivedp.expert_layer(*arrays, comm, keep=True), DTypeError, words)
    assert_same_error(comm, lambda: fivedp.route(logits, comm=comm), DTypeError, words)
    routing = fivedp.route(logits)
    assert_same_error(comm, lambda: fivedp.expert_dispatch(arrays[0], routing, comm), DTypeError, words)


def test_logits_that_are_not_finite_are_named_on_all_ranks(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    logits = draw(np.random.default_rng([seed, comm.rank]), 5, 4)
    if comm.rank == comm.size - 1:
        logits[3, 2] = np.nan
    words = "row 3 of `logits` has nan for expert 2"
    assert_same_error(comm, lambda: fivedp.route(cupy.asarray(logits), comm=comm), LayoutError, words)


def test_what_belongs_on_the_host_is_asked_for_there(comm: MPI.Intracomm, cupy: Any) -> None:
    x, w, half = cupy.zeros((4, 3), F32), cupy.zeros((1, 3, 2), F32), cupy.zeros((4, 3), np.float16)
    bias, counts, one = np.zeros(3, F32), np.ones(3, np.int64), np.array([4])
    routing = fivedp.route(x)
    unknown = replace(routing, experts=cupy.full((4, 2), 7, np.int32))
    for kind, words, call in (
        (DTypeError, "`bias` is a ndarray; expected a NumPy", lambda: fivedp.route(x, bias=cupy.asarray(bias))),
        (DTypeError, "`bias` is a CuPy array", lambda: fivedp.update_bias(cupy.asarray(bias), counts, comm=comm)),
        (DTypeError, "`counts` is a CuPy array", lambda: fivedp.update_bias(bias, cupy.asarray(counts), comm=comm)),
        (DTypeError, "`counts` is a CuPy array", lambda: fivedp.grouped_matmul(x, w, cupy.asarray(one))),
        (DTypeError, "`x` is cupy and `w` numpy", lambda: fivedp.grouped_matmul(x, w.get(), one)),
        (DTypeError, "`dweights` is numpy and `logits` cupy", lambda: fivedp.route_backward(half.get(), routing)),
        (DTypeError, "`logits` has dtype float16", lambda: fivedp.route(half, comm=comm)),
        (DTypeError, "`x` has dtype float16", lambda: fivedp.expert_dispatch(half, routing, comm)),
        (ShapeError, "is of 4 tokens and `x` has 5", lambda: fivedp.expert_dispatch(cupy.ones((5, 3)), routing, comm)),
        (ShapeError, "names expert 7", lambda: fivedp.expert_dispatch(x, unknown, comm)),
    ):
        assert_same_error(comm, call, kind, words)
