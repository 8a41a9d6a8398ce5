"""Rows that are multiplied while others travel: the same bits and bytes as when all are waited for, and their order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.comm.grid import grid_of
from fivedp.comm.transport.host import HostMailbox
from fivedp.ops import arriving_rows
from mpi_experts import BFLOAT16, DTYPES, draw_case, taken_apart_from, window_from

RANKS = (1, 2, 3, 4, 8)
TIMEOUT = 120


@contextmanager
def watched(rows: int) -> Iterator[list[list[list[int]]]]:
    """As `taken_apart_from`; gives the batches of each exchange."""
    batches: list[list[list[int]]] = []
    plain = arriving_rows._batches

    def noted(travel: Any) -> Iterator[list[int]]:
        batches.append([])
        for sources in plain(travel):
            batches[-1].append(sources)
            yield sources

    with taken_apart_from(rows), mock.patch.object(arriving_rows, "_batches", noted):
        yield batches


@pytest.mark.parametrize("wire", ["same", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_taken_apart_have_the_bits_of_all_at_once(
    comm: MPI.Intracomm, seed: int, dtype: Any, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIVEDP_SHARED", "0")
    apart = comm.Dup()  # a grid of its own, which reads the setting
    rng = np.random.default_rng(seed)
    for activation, share in (("swiglu", "even"), ("gelu", "uneven")):
        case = draw_case(
            rng, dtype, comm.size, n_tokens=15 * comm.size, n_experts=5, top_k=3, activation=activation, share=share,
            shared=6, wire=wire,
        )  # fmt: skip
        found = []
        for rows in (0, 10**6):
            with watched(rows) as batches:
                whole = case.judge(apart)
                found.append([None if a is None else a.tobytes() for a in case.run(apart)[0]])
            everyone = list(range(comm.size))
            assert all(sorted(itertools.chain(*sources)) == everyone for sources in batches)
            assert len(batches) == 4  # rows of x forward and of dy backward, twice
            if rows:
                assert all(sources == [everyone] for sources in batches)
            elif share == "even" and comm.size in (2, 3):  # where every rank has an expert, and tokens of all of them
                assert all(len(sources) > 1 for sources in batches)
            if whole is not None and wire == "same":
                case.check_bits(whole)
        assert found[0] == found[1]


def test_bytes_are_the_same(comm: MPI.Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEDP_SHARED", "0")
    apart = comm.Dup()
    case = draw_case(np.random.default_rng(seed), np.float32, comm.size, n_tokens=60, given=True)
    traffic, sent = grid_of(apart).traffic, []
    for rows in (0, 10**6):
        traffic.reset()
        with taken_apart_from(rows):
            _, state = case.run(apart)
        sent.append(traffic.bytes_sent)
    bill = state.plan.bytes_sent()
    pairs = sum(len(p) for source, p in enumerate(state.plan.incoming.positions) if source != comm.rank)
    scalars = pairs * state.plan.sums.itemsize
    assert sent == [bill["pairs"] + 3 * bill["rows"] + 2 * bill["returns"] + scalars] * 2


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_some_rows_are_read_in_place_and_some_are_sent(comm: MPI.Intracomm, seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, comm.size, n_tokens=20 * comm.size, top_k=3, share="uneven", shared=5)
    for n_bytes in (1, 12 * 4 * 9, 10**9):  # a box of as many bytes is read in place
        with window_from(n_bytes), taken_apart_from(0):
            whole = case.judge(comm)
        if whole is not None:
            case.check_bits(whole)


@pytest.mark.mpi(min_size=2)
def test_products_begin_before_the_last_rows_are_sent(
    comm: MPI.Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rank sends its rows only when it hears that the others have multiplied theirs."""
    monkeypatch.setenv("FIVEDP_SHARED", "0")
    apart, notices = comm.Dup(), comm.Dup()
    case = draw_case(
        np.random.default_rng(seed), np.float32, comm.size, n_tokens=30 * comm.size, n_experts=comm.size,
        top_k=comm.size,
    )  # fmt: skip
    arrays, keywords, _ = case.arguments(apart)
    right = fivedp.expert_layer(*arrays, apart, **keywords)
    last, heard = comm.size - 1, []
    send_rows, part = HostMailbox.send_rows, fivedp.ops.work_sharing.SharedWork.part

    def late(self: Any, *arguments: Any) -> None:
        if comm.rank == last and not heard:
            heard.extend(notices.recv(source=rank) for rank in range(last))
        send_rows(self, *arguments)

    told: list[int] = []

    def telling(self: Any, *arguments: Any) -> Any:
        if comm.rank != last and not told:
            told.append(1)
            notices.send(comm.rank, last)
        return part(self, *arguments)

    monkeypatch.setattr(HostMailbox, "send_rows", late)
    monkeypatch.setattr(fivedp.ops.work_sharing.SharedWork, "part", telling)
    with taken_apart_from(1):
        y = fivedp.expert_layer(*arrays, apart, **keywords)
    assert y.tobytes() == right.tobytes()
    assert heard == list(range(last)) if comm.rank == last else told


class Travel:
    """Rows of some sources that come in a given order; `arrived` gives the next, and waits in vain for none."""

    def __init__(self, rows: list[int], near: list[int], order: list[int], n_experts: int) -> None:
        source = np.repeat(np.arange(len(rows)), rows)
        incoming = SimpleNamespace(source=source, counts=np.ones(n_experts, np.int64))
        self.plan = SimpleNamespace(incoming=incoming, group=SimpleNamespace(size=len(rows)))
        self.near, self.order, self.waits = near, list(order), 0

    def wait(self, sources: list[int]) -> None:
        assert sources == self.near

    def arrived(self, least: int = 0) -> list[int]:
        """Whoever polls finds nothing, whoever waits finds one."""
        self.waits += least
        return [self.order.pop(0) for _ in range(least)]


def batches(*arguments: Any) -> list[list[int]]:
    return list(arriving_rows._batches(Travel(*arguments)))  # type: ignore[arg-type]


def test_order_of_batches() -> None:
    with taken_apart_from(10):
        # Rank 0 is at home. While nothing has come its own rows are taken, then those of others as they come.
        assert batches([50, 50, 50], [0], [2, 1], 4) == [[0], [2], [1]]
        # Near rows too few for a call of their own are left to the end, or to the first call that is large enough.
        assert batches([5, 50, 50, 50], [0], [2, 1, 3], 4) == [[2], [1], [0, 3]]
        assert batches([20, 30, 60, 60], [0], [1, 2, 3], 4) == [[1, 2], [0, 3]]
        # All at once where parts would be too small, where all is near, and where there are no rows.
        assert batches([20, 15, 4], [0], [2, 1], 4) == [[0, 1, 2]]
        assert batches([500, 500], [0, 1], [], 4) == [[0, 1]]
        assert batches([0, 0], [0, 1], [], 0) == [[0, 1]]
        # A single rank far away sends last: what is near need not wait for it.
        assert batches([100, 100, 100], [0, 1], [2], 4) == [[0, 1], [2]]
