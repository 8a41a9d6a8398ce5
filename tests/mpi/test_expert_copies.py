"""Copies of hot experts on other nodes: rows made at home, with the bits of one rank and the bytes of the price.

The nodes are the ranks of this machine with a node given for each. Products are priced so slow that copies pay.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
import mpi_dispatch
from fivedp import LayoutError
from fivedp.comm.grid import grid_of
from fivedp.comm.shared_window import SharedWindow
from fivedp.layout import explain_experts
from fivedp.layout.nodes import PER_NODE, PER_RANK, Network, cheapest
from fivedp.ops import dispatch_plan, mixture_layer
from fivedp.ops.expert_copies import CopiedWeights
from mpi_experts import (
    BFLOAT16,
    DTYPES,
    Case,
    assert_at_the_bound,
    assert_same_error,
    copies_pay,
    draw_case,
    on_nodes,
    window_from,
)

RANKS = (1, 3, 4, 5, 6, 8)
TIMEOUT = 200
# For each number of ranks, the node of each.
MAPS = {
    1: [(0,)],
    3: [(0, 0, 1), (0, 1, 2)],
    4: [(0, 0, 1, 1), (0, 1, 0, 1)],
    5: [(0, 0, 0, 1, 1), (0, 1, 1, 1, 0)],
    6: [(0, 0, 0, 1, 1, 1), (0, 0, 1, 1, 2, 2)],
    8: [(0, 0, 0, 0, 1, 1, 1, 1)],
}
# GB/s of a link on which rows go to every rank, and of one on which they cross to a node once.
LINKS = {PER_RANK: "1e6", PER_NODE: "1e-9"}


def skewed(rng: np.random.Generator, dtype: Any, ranks: int, **options: Any) -> Case:
    """Tokens that very often choose the same few experts, all of them on the first ranks or on the last ones."""
    usual: dict[str, Any] = {"n_experts": 3 * ranks + 1, "top_k": 4, "n_tokens": 25 * ranks}
    if "given" not in options:
        usual |= {"given": True, "empty": 0.1, "skew": 1.5}
    case = draw_case(rng, dtype, ranks, **(usual | options))
    if case.experts is not None and rng.integers(2):
        case.experts = np.where(case.experts < 0, -1, case.n_experts - 1 - case.experts).astype(np.int32)
    return case


def judge(case: Case, apart: MPI.Intracomm, copied: bool = True) -> Any:
    """Hold a layer with copies against float64, and its bits against those without copies and of one rank."""
    with copies_pay():
        results, state = case.run(apart)
    if copied:
        assert apart.size == 1 or state.plan.copies is not None
    with copies_pay(False):
        without, plain = case.run(apart)
    assert plain.plan.copies is None
    same = case.keywords.get("wire", "same") == "same"
    if same:
        for a, b in zip(results, without, strict=True):
            assert a is None or a.tobytes() == b.tobytes(), "copies change the bits"
    everything = case.collected(results, state, apart, 0)
    if everything is not None:
        case.check(*everything)
        if same:
            case.check_bits(everything[0])
    return state.plan


@pytest.mark.parametrize("way", ["shared window", "messages"])
@pytest.mark.parametrize("link", LINKS)
def test_layer_and_its_gradients_have_the_bits_of_one_rank(
    comm: MPI.Intracomm, seed: int, way: str, link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "messages":
        monkeypatch.setenv("FIVEDP_SHARED", "0")
    rng, ways = np.random.default_rng(seed), set()
    for nodes in MAPS[comm.size]:
        apart = on_nodes(comm, nodes, LINKS[link])
        for dtype in DTYPES:
            with window_from(1 if rng.integers(2) else 1 << 40):
                plan = judge(skewed(rng, dtype, comm.size, top_k=min(6, 3 * comm.size)), apart)
            ways.add(plan.relay is not None)
    assert (True in ways) == (link == PER_NODE) or comm.size < 4


@pytest.mark.parametrize("link", LINKS)
def test_any_layer(comm: MPI.Intracomm, seed: int, link: str) -> None:
    """No gate, few experts, all of them chosen, tokens on some ranks only, none at all, arrays that lie in any way."""
    rng = np.random.default_rng(seed)
    apart = on_nodes(comm, MAPS[comm.size][-1], LINKS[link])
    cases = [
        skewed(rng, np.float32, comm.size, activation="gelu"),
        skewed(rng, BFLOAT16, comm.size, activation="relu", top_k=2),
        skewed(rng, np.float32, comm.size, given=False),
        skewed(rng, np.float64, comm.size, given=False, shared=5, shared_router=True),
        skewed(rng, np.float32, comm.size, wire="bfloat16"),
        skewed(rng, np.float64, comm.size, wire="bfloat16", activation="silu"),
    ]
    for n_experts, k in ((1, 1), (2, 2), (comm.size - 1 or 1, 1), (7, 7), (64, 8)):
        for share in ("uneven", "one"):
            cases.append(skewed(rng, np.float32, comm.size, n_experts=n_experts, top_k=k, share=share))
    cases += [skewed(rng, np.float32, comm.size, n_tokens=n) for n in (0, 1, 5)]
    for case in cases:
        judge(case, apart, copied=False)
    # Where nearly all is one expert's, and other nodes have tokens, a copy is made for sure.
    case = skewed(rng, np.float32, comm.size, top_k=1, skew=20.0)
    for kind in ("transposed", "backward", "gaps"):
        case.lies = (kind,) * 6
        judge(case, apart)
    # The reference knows no capacity.
    case, found = skewed(rng, np.float32, comm.size, given=False, capacity_factor=0.6), []
    for wanted in (True, False):
        with copies_pay(wanted):
            found.append(case.run(apart)[0])
    assert [a.tobytes() for a in found[0]] == [a.tobytes() for a in found[1]]


def test_weights_are_read_in_place_where_there_is_no_room_for_boxes(
    comm: MPI.Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart, whole = on_nodes(comm, MAPS[comm.size][0], LINKS[PER_NODE]), []
    release = CopiedWeights.release

    def noted(self: CopiedWeights) -> None:
        whole.extend(receipt.whole for receipt in self._receipts.values())
        release(self)

    monkeypatch.setattr(CopiedWeights, "release", noted)
    case = skewed(np.random.default_rng(seed), np.float32, comm.size)
    with window_from(1):
        judge(case, apart)
        monkeypatch.setattr(SharedWindow, "take", lambda self, n_bytes: None)
        judge(case, apart)
    assert all(whole)
    assert comm.allreduce(len(whole)) or comm.size < 4


def test_ranks_must_agree_on_keep(comm: MPI.Intracomm, seed: int) -> None:
    case, last = skewed(np.random.default_rng(seed), np.float32, comm.size), comm.size - 1
    if comm.size > 1:
        arrays, keywords, _ = case.arguments(comm)
        assert_same_error(
            comm, lambda: fivedp.expert_layer(*arrays, comm, keep=comm.rank == last, **keywords), LayoutError, "keep="
        )


def test_without_a_backward_copies_are_priced_for_the_forward_alone(comm: MPI.Intracomm, seed: int) -> None:
    case = skewed(np.random.default_rng(seed), np.float32, comm.size)
    apart = on_nodes(comm, MAPS[comm.size][0], LINKS[PER_NODE])
    arrays, keywords, _ = case.arguments(apart)
    traffic, found = grid_of(apart).traffic, []
    for wanted in (False, True):
        with copies_pay(wanted):
            traffic.reset()
            y = fivedp.expert_layer(*arrays, apart, **keywords)
            found.append((y.tobytes(), traffic.bytes_sent))
    assert found[0][0] == found[1][0]
    assert apart.size == 1 or comm.allreduce(found[0][1] != found[1][1], MPI.LOR)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("wire", ["same", "bfloat16"])
def test_bytes_are_those_of_the_plan_and_of_the_price(comm: MPI.Intracomm, seed: int, link: str, wire: str) -> None:
    rng = np.random.default_rng(seed)
    for nodes in MAPS[comm.size]:
        apart = on_nodes(comm, nodes, LINKS[link])
        traffic, between = grid_of(apart).traffic, []
        activation = ("swiglu", "silu")[int(rng.integers(2))]
        case = skewed(rng, np.float64, comm.size, wire=wire, activation=activation)
        arrays, keywords, dy = case.arguments(apart)
        for wanted in (False, True):
            with copies_pay(wanted):
                traffic.reset()
                _, state = fivedp.expert_layer(*arrays, apart, keep=True, **keywords)
                forward = traffic.bytes_sent, traffic.bytes_between_nodes
                traffic.reset()
                fivedp.expert_layer_backward(dy, state)
                backward = traffic.bytes_sent, traffic.bytes_between_nodes
            plan, bill = state.plan, state.plan.bytes_sent()
            assert_at_the_bound(plan)
            assert (plan.copies is not None) == (wanted and apart.size > 1)
            n_pairs = [len(places) * (source != comm.rank) for source, places in enumerate(plan.incoming.positions)]
            scalars = [sum(n_pairs), sum(n for n, node in zip(n_pairs, nodes, strict=True) if node != nodes[comm.rank])]
            for ending, sent, back, n in zip(("", "_between"), forward, backward, scalars, strict=True):
                rows, returns, copied = (bill[name + ending] for name in ("rows", "returns", "copies"))
                assert sent == bill["pairs" + ending] + rows + returns + copied
                assert back == 2 * rows + returns + copied + n * plan.sums.itemsize + bill["kept" + ending]
            between.append(forward[1] - bill["pairs_between"] + backward[1] - scalars[1] * plan.sums.itemsize)
        if plan.hot is None:
            continue
        # What every node sends more than without copies is what they were priced at, to the byte.
        more = comm.allgather(between[1] - between[0])
        sent_more = [sum(n for n, at in zip(more, nodes, strict=True) if at == node) for node in sorted(set(nodes))]
        assert plan.hot.links[0].tolist() == sent_more
        assert plan.hot.links[0].sum() == plan.hot.links[1].sum()
        network = plan.hot.network
        messages = 10 * network.hop * len([copy for copy in plan.hot.tried if copy.pays])
        assert plan.hot.cost == pytest.approx(max(0, plan.hot.links.max()) / network.link + messages)


def test_copies_are_made_where_they_are_said_to_pay(comm: MPI.Intracomm, seed: int, monkeypatch: Any) -> None:
    """The text and the layer agree, on links from slow to fast."""
    rng = np.random.default_rng(seed)
    nodes, answers = MAPS[comm.size][-1], set()
    slow = partial(Network, flops=1e6)
    monkeypatch.setattr(dispatch_plan, "Network", slow)
    monkeypatch.setattr(explain_experts, "Network", slow)
    case = skewed(rng, np.float32, comm.size)
    assert case.experts is not None
    for link in np.geomspace(1e-6, 1e3, 10).tolist():
        apart = on_nodes(comm, nodes, f"{link!r}")
        arrays, keywords, _ = case.arguments(apart)
        _, state = fivedp.expert_layer(*arrays, apart, keep=True, **keywords)
        text = fivedp.explain_experts(
            case.experts, case.n_experts, apart, width=12, hidden=10, nodes=list(nodes), link=link
        )
        said = [line for line in text.splitlines() if line.startswith("  with backward, all")]
        made = bool(said) and "cross: made" in said[0]
        assert (state.plan.copies is not None) == made
        if made:
            assert int(said[0].split()[3]) == state.plan.copies.at_home.sum()
        answers.add(made)
        way = [line for line in text.splitlines() if "taken" in line]
        assert not way or cheapest(state.plan.ways).name in way[0]
    assert answers == ({True, False} if comm.size > 1 else {False})


def test_on_one_node_there_are_none(comm: MPI.Intracomm, seed: int) -> None:
    case = skewed(np.random.default_rng(seed), np.float32, comm.size)
    traffic, counted = grid_of(comm).traffic, []
    for wanted in (False, True):
        with copies_pay(wanted):
            traffic.reset()
            results, state = case.run(comm)
            counted.append((traffic.messages, traffic.bytes_sent, [a.tobytes() for a in results]))
            assert state.plan.copies is None
            assert state.plan.hot is None
    assert counted[0] == counted[1]


def test_calls_for_experts_of_ones_own_make_none(comm: MPI.Intracomm, seed: int) -> None:
    rng, nodes = np.random.default_rng(seed), MAPS[comm.size][0]
    with copies_pay():
        case = mpi_dispatch.draw(rng, np.float32, comm.size, n_experts=3 * comm.size, k=2, skew=3.0, n_tokens=90)
        case.judge(on_nodes(comm, nodes))


def test_where_none_pays_the_layer_has_the_messages_of_a_plain_one(
    comm: MPI.Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, apart = skewed(np.random.default_rng(seed), np.float32, comm.size), on_nodes(comm, MAPS[comm.size][0])
    counted = []
    monkeypatch.setattr(dispatch_plan, "network_of", lambda group: Network(link=group.grid.link, flops=1e30))
    for may_copy in (True, False):
        if not may_copy:
            monkeypatch.setattr(mixture_layer, "_sizes", lambda *_: None)
        grid_of(apart).traffic.reset()
        _, state = case.run(apart)
        assert state.plan.hot is None
        counted.append((grid_of(apart).traffic.messages, grid_of(apart).traffic.bytes_sent))
    assert counted[0] == counted[1]
