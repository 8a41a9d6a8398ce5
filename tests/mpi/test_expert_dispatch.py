"""Dispatch and combine over ranks: rows and their order, values, bits of one rank, bytes of the plan, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp import DTypeError, ShapeError
from fivedp.comm.grid import grid_of
from mpi_dispatch import RESULTS, draw
from mpi_experts import DTYPES, LYING, assert_same_error, routing_of, window_from

RANKS = (1, 2, 3, 5, 8)
TIMEOUT = 120


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_sums_and_gradients_on_any_shares(comm: MPI.Intracomm, seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    for n_tokens, share in ((0, "even"), (1, "one"), (31, "even"), (31, "uneven"), (31, "one")):
        for widened in (False, True):
            draw(rng, dtype, comm.size, n_tokens=n_tokens, share=share, widened=widened).judge(comm)


def test_any_number_of_experts(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for n_experts, k in ((1, 1), (2, 2), (3, 2), (7, 7), (13, 4), (60, 5), (64, 8)):
        draw(rng, np.float32, comm.size, n_experts=n_experts, k=k).judge(comm)


def test_skewed_and_empty_routings(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    draw(rng, np.float32, comm.size, empty=1.0).judge(comm)
    draw(rng, np.float32, comm.size, n_experts=16, skew=3.0).judge(comm)
    case = draw(rng, np.float32, comm.size, n_experts=11, k=1, empty=0.0)
    case.experts[:] = rng.integers(11)
    case.judge(comm)


@pytest.mark.parametrize("way", ["shared window", "messages"])
def test_rows_read_in_place_and_rows_sent_have_the_same_bits(
    comm: MPI.Intracomm, seed: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "messages":
        monkeypatch.setenv("FIVEDP_SHARED", "0")
    apart = comm.Dup()  # a grid of its own, which reads the setting
    assert apart.size == 1 or (grid_of(apart).shared is None) == (way == "messages")
    rng = np.random.default_rng(seed)
    with window_from(1):
        for dtype in DTYPES:
            draw(rng, dtype, comm.size, n_tokens=50).judge(apart)


def test_more_pairs_than_the_first_message_holds(comm: MPI.Intracomm, seed: int) -> None:
    for dtype in (np.float32, np.float64):  # whose pairs are of other sizes
        draw(np.random.default_rng(seed), dtype, comm.size, n_tokens=1500, width=2, empty=0.0, share="one").judge(comm)


def test_narrow_wire(comm: MPI.Intracomm, seed: int) -> None:
    for dtype in DTYPES:
        draw(np.random.default_rng(seed), dtype, comm.size, wire="bfloat16").judge(comm)


def test_arrays_may_lie_in_memory_in_any_way(comm: MPI.Intracomm, seed: int) -> None:
    case = draw(np.random.default_rng(seed), np.float32, comm.size)
    plain, *_ = case.run(comm)
    for kind in LYING:
        for name, a, b in zip(RESULTS, plain, case.run(comm, kind)[0], strict=True):
            assert a.tobytes() == b.tobytes(), (name, kind)


def test_a_token_comes_back_once_where_an_owner_is_one_subtree(comm: MPI.Intracomm, seed: int) -> None:
    case = draw(np.random.default_rng(seed), np.float32, comm.size, n_experts=4 * comm.size, k=4, n_tokens=60)
    _, plan, sent = case.run(comm)
    gone, back = comm.allreduce(plan.bytes_sent()["bound"]), comm.allreduce(sent["combine"])
    if comm.size & (comm.size - 1) == 0:
        assert back == gone
    else:
        pairs = int((case.experts >= 0).sum()) * case.x.shape[1] * 4
        assert gone <= back <= pairs


def test_one_plan_serves_several_batches_of_rows(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = draw(rng, np.float32, comm.size)
    tokens = slice(*case.borders[comm.rank : comm.rank + 2])
    routing = routing_of(case.experts[tokens], case.weights[tokens], len(case.scale))
    batches = [fivedp.expert_dispatch(x[tokens], routing, comm) for x in (case.x, case.dy)]
    once = [fivedp.expert_combine(batch.tokens, batch) for batch in batches]
    again = [fivedp.expert_combine(batch.tokens, batches[0]) for batch in batches]
    assert [y.tobytes() for y in once] == [y.tobytes() for y in again]


@pytest.mark.parametrize("where", ["everywhere", "on one rank"])
def test_wrong_arguments(comm: MPI.Intracomm, where: str) -> None:
    case = draw(np.random.default_rng(0), np.float32, comm.size, n_tokens=5 * comm.size, share="even", empty=0.0)
    tokens = slice(*case.borders[comm.rank : comm.rank + 2])
    x, dy, e, w = case.x[tokens], case.dy[tokens], case.experts[tokens].copy(), case.weights[tokens]
    e[:2] = (0, 1, 2), (5, 6, 7)  # the first expert and the last are there
    routing = routing_of(e, w, 8)
    odd = where == "everywhere" or comm.rank == comm.size - 1
    batch = fivedp.expert_dispatch(x, routing, comm)
    rows = batch.tokens

    dispatch: list[tuple[Any, Any, type[ValueError], str]] = [
        (x[0], routing, ShapeError, r"`x` has shape \(9,\); expected \(any, any\)"),
        (x.astype(np.int32), routing, DTypeError, "`x` has dtype int32; expected float32 or float64 or bfloat16"),
        (x[1:], routing, ShapeError, "`routing` is of 5 tokens and `x` has 4"),
        (x, (e, w), DTypeError, "`routing` is a tuple; expected what fivedp.route gives"),
        (x, routing_of(e.astype(np.int64), w, 8), DTypeError, "`routing.experts` has dtype int64; expected int32"),
        (x, routing_of(e - 2, w, 8), ShapeError, "`routing` names expert -2; expected -1 to 7"),
        (x, routing_of(e + 1, w, 8), ShapeError, "`routing` names expert 8; expected -1 to 7"),
        (x, routing_of(np.full_like(e, 3), w, 8), ShapeError, "names an expert twice for token 0; expected once"),
        (x, routing_of(e, w[:, 1:], 8), ShapeError, r"weights of shape \(5, 2\); expected \(5, 3\)"),
    ]
    for wrong, other, kind, words in dispatch:
        mine = (wrong, other) if odd else (x, routing)
        assert_same_error(comm, lambda mine=mine: fivedp.expert_dispatch(*mine, comm), kind, words)  # type: ignore[misc]

    wrong_rows: list[tuple[Any, type[ValueError], str]] = [
        (np.zeros((len(rows) + 1, 9), np.float32), ShapeError, "has shape"),
        (rows.astype(np.float64), DTypeError, "has dtype float64; expected float32"),
        (rows.tolist(), DTypeError, "is a list; expected a NumPy or CuPy array"),
    ]
    for bad, kind, words in wrong_rows:
        mine = bad if odd else rows
        for name, call in (
            ("expert_combine: `expert_out` ", lambda r: fivedp.expert_combine(r, batch)),
            ("expert_combine_backward: `expert_out` ", lambda r: fivedp.expert_combine_backward(dy, r, batch)),
            ("expert_dispatch_backward: `d_tokens` ", lambda r: fivedp.expert_dispatch_backward(r, batch)),
        ):
            assert_same_error(comm, lambda call=call, mine=mine: call(mine), kind, name + words)  # type: ignore[misc]
    mine = dy[1:] if odd else dy
    assert_same_error(comm, lambda: fivedp.expert_combine_backward(mine, rows, batch), ShapeError, "`dy` has shape")
    case.judge(comm)  # the communicator is as good as before
