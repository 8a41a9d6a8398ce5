"""Experts over several nodes: rows cross to a node once, sums come back once, with the bits of one rank.

The nodes are the ranks of this machine with a node given for each; the link is so slow that what crosses decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
import mpi_dispatch
from fivedp import LayoutError
from fivedp.comm.grid import grid_of
from fivedp.layout.explain_experts import crossing_counts
from fivedp.layout.nodes import Nodes
from mpi_experts import BFLOAT16, DTYPES, assert_same_error, draw_case, on_nodes, window_from

RANKS = (4, 5, 6, 8)
TIMEOUT = 150
# For each number of ranks, the node of each.
MAPS = {
    4: [(0, 0, 1, 1), (0, 1, 0, 1)],
    5: [(0, 0, 0, 1, 1)],
    6: [(0, 0, 0, 1, 1, 1), (0, 0, 1, 1, 2, 2)],
    8: [(0, 0, 0, 0, 1, 1, 1, 1)],
}


def dense(rng: np.random.Generator, dtype: Any, ranks: int, **fields: Any) -> mpi_dispatch.Case:
    """Tokens that have experts on nearly every rank, on all ranks alike: crossing once per node is cheaper."""
    return mpi_dispatch.draw(
        rng, dtype, ranks, n_experts=4 * ranks, k=2 * ranks, n_tokens=16 * ranks, empty=0.0, share="even", **fields
    )


@pytest.mark.parametrize("way", ["shared window", "messages"])
def test_dispatch_and_combine_have_the_bits_of_one_rank(
    comm: MPI.Intracomm, seed: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "messages":
        monkeypatch.setenv("FIVEDP_SHARED", "0")
    rng = np.random.default_rng(seed)
    for nodes in MAPS[comm.size]:
        apart = on_nodes(comm, nodes)
        assert grid_of(apart).node_of == list(nodes)
        assert (grid_of(apart).shared is None) == (way == "messages")
        for dtype in DTYPES:
            with window_from(1):
                case = dense(rng, dtype, comm.size, widened=bool(rng.integers(2)))
                assert case.run(apart)[1].relay is not None
                case.judge(apart)
        dense(rng, np.float32, comm.size, wire="bfloat16").judge(apart)


def test_any_routing_over_nodes(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    apart = on_nodes(comm, MAPS[comm.size][-1])
    for n_experts, k in ((1, 1), (2, 2), (7, 7), (13, 4), (64, 8)):
        for share in ("uneven", "one"):
            mpi_dispatch.draw(rng, np.float32, comm.size, n_experts=n_experts, k=k, share=share).judge(apart)
    mpi_dispatch.draw(rng, np.float32, comm.size, n_experts=16, skew=3.0, n_tokens=80).judge(apart)
    mpi_dispatch.draw(rng, np.float32, comm.size, empty=1.0).judge(apart)
    # More pairs than the first message holds.
    mpi_dispatch.draw(rng, np.float64, comm.size, n_tokens=1500, width=2, empty=0.0, share="one").judge(apart)


def test_rows_that_cross_nodes_are_the_fewest_there_can_be(comm: MPI.Intracomm, seed: int) -> None:
    for nodes in MAPS[comm.size]:
        apart = on_nodes(comm, nodes)
        case = dense(np.random.default_rng(seed), np.float32, comm.size)
        tokens = slice(*case.borders[comm.rank : comm.rank + 2])
        routing = mpi_dispatch.routing_of(case.experts[tokens], case.weights[tokens], len(case.scale))
        traffic = grid_of(apart).traffic
        traffic.reset()
        batch = fivedp.expert_dispatch(case.x[tokens], routing, apart)
        bill, there = batch.plan.bytes_sent(), traffic.bytes_between_nodes
        assert batch.plan.relay is not None
        assert there == bill["pairs_between"] + bill["rows_between"]
        # A token once to every other node that has any of its experts, counted one by one.
        node_of_expert = np.array(nodes)[batch.plan.cut.owner]
        mine = [set(node_of_expert[row].tolist()) - {nodes[comm.rank]} for row in case.experts[tokens]]
        assert bill["rows_between"] == bill["bound_between"] == sum(map(len, mine)) * case.x[0].nbytes
        traffic.reset()
        fivedp.expert_combine(batch.tokens, batch)
        assert traffic.bytes_between_nodes == bill["returns_between"]
        total, back = (comm.allreduce(bill[name]) for name in ("rows_between", "returns_between"))
        if len(set(nodes)) == 2 and nodes == tuple(sorted(nodes)) and 2 * nodes.count(0) == comm.size:
            assert back == total  # a half of the experts is one subtree
        else:
            assert back >= total
        # The count that prices are made of.
        per_pair, per_rank, per_node = crossing_counts(case.experts, batch.plan.cut, Nodes.named(nodes))
        assert total == per_node.sum() * case.x[0].nbytes
        assert [way.rows for way in batch.plan.ways] == [per_rank.sum(), per_node.sum()]
        assert per_pair.sum() >= per_rank.sum() > per_node.sum()


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_layer_and_its_gradients_have_the_bits_of_one_rank(comm: MPI.Intracomm, seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    for nodes in MAPS[comm.size]:
        apart = on_nodes(comm, nodes)
        for from_bytes, options in ((1, {}), (1 << 40, {"share": "uneven"})):
            case = draw_case(
                rng, dtype, comm.size, n_experts=3 * comm.size + 1, top_k=5, n_tokens=20 * comm.size, **options
            )
            with window_from(from_bytes):
                results, state = case.run(apart)
            assert options or state.plan.relay is not None
            everything = case.collected(results, state, apart, 0)
            if everything is not None:
                case.check(*everything)
                case.check_bits(everything[0])


def test_few_tokens_cost_no_message_more_than_on_one_node(comm: MPI.Intracomm, seed: int) -> None:
    case = dense(np.random.default_rng(seed), np.float32, comm.size)
    apart = on_nodes(comm, MAPS[comm.size][0], "12.5")
    messages, results = [], []
    for ranks in (comm, apart):
        grid_of(ranks).traffic.reset()
        found, plan, _ = case.run(ranks)
        assert plan.relay is None
        messages.append(grid_of(ranks).traffic.messages)
        results.append([a.tobytes() for a in found])
    assert messages[0] == messages[1]
    assert results[0] == results[1]


def test_link_that_is_none(comm: MPI.Intracomm) -> None:
    for rate in ("fast", "-1", "0", "nan"):
        link = rate if comm.rank == comm.size - 1 else "1"
        words = f"FIVEDP_LINK on rank {comm.size - 1} is no rate"
        assert_same_error(comm, lambda link=link: on_nodes(comm, [0] * comm.size, link), LayoutError, words)  # type: ignore[misc]
