"""What is said of experts over nodes: rows counted token by token, and copies of experts carried out in numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fivedp
from fivedp import LayoutError, ShapeError
from fivedp.layout.experts import cut_experts
from fivedp.layout.explain_experts import crossing_counts
from fivedp.layout.hot_experts import ExpertSizes, Verdict, may_pay, verdict
from fivedp.layout.nodes import Network, Nodes

SEEDS = st.integers(0, 2**32 - 1)
LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=9)


def choices(rng: np.random.Generator, n_tokens: int, n_experts: int, k: int) -> Any:
    table = np.argsort(rng.random((n_tokens, n_experts)), axis=1)[:, :k].astype(np.int32)
    table[rng.random(table.shape) < 0.1] = -1
    return table


@given(labels=LABELS, seed=SEEDS)
def test_rows_are_counted_once_for_every_pair_rank_and_node(labels: list[int], seed: int) -> None:
    rng, nodes, P = np.random.default_rng(seed), Nodes.named(labels), len(labels)
    n_experts = int(rng.integers(1, 20))
    table = choices(rng, int(rng.integers(0, 40)), n_experts, int(rng.integers(1, n_experts + 1)))
    cut = cut_experts(n_experts, P)
    found = crossing_counts(table, cut, nodes)
    right = np.zeros((3, P, nodes.count), int)
    for rank, tokens in enumerate(np.array_split(np.arange(len(table)), P)):
        for token in tokens:
            owners = [int(cut.owner[expert]) for expert in table[token] if expert >= 0]
            far = [owner for owner in owners if nodes.of[owner] != nodes.of[rank]]
            for way, those in enumerate((far, set(far))):
                for owner in those:
                    right[way, rank, nodes.of[owner]] += 1
            for node in {nodes.of[owner] for owner in far}:
                right[2, rank, node] += 1
    for a, b in zip(found, right, strict=True):
        assert a.tolist() == b.tolist()


def hot_counts(rng: np.random.Generator, ranks: int, n_experts: int) -> Any:
    """(P, E): pairs of every rank with every expert, some experts far more often chosen than others."""
    share = rng.random(n_experts) ** 6 * 10 ** rng.integers(1, 6)
    return (share * rng.random((ranks, n_experts)) / ranks).astype(np.int64)


@pytest.mark.parametrize("backward", [False, True])
@given(labels=LABELS, seed=SEEDS)
def test_copies_of_hot_experts_save_what_they_say(backward: bool, labels: list[int], seed: int) -> None:
    rng, nodes, P = np.random.default_rng(seed), Nodes.named(labels), len(labels)
    n_experts = int(rng.integers(1, 30))
    cut, counts = cut_experts(n_experts, P), hot_counts(rng, P, n_experts)
    H, F, matrices = 64, 96, int(rng.integers(2, 4))
    network = Network(link=10 ** rng.uniform(6, 11), flops=1e9)
    sizes = ExpertSizes(H, F, matrices, itemsize=4, there=2, back=4, backward=backward)
    # Seconds of a row: what its owner must do, and what may be done elsewhere.
    stays, moves = (2 * k * matrices * H * F / 1e9 for k in ((1, 2) if backward else (0, 1)))
    seconds = np.zeros(P)
    for expert, load in enumerate(counts.sum(axis=0).tolist()):
        seconds[cut.owner[expert]] += load * (stays + moves)
    before, links = seconds.max(), np.zeros((2, nodes.count))
    found = verdict(counts, cut, nodes, sizes, network)
    assert len({(copy.expert, copy.helper) for copy in found.tried}) == len(found.tried)
    for copy in found.tried:
        assert cut.owner[copy.expert] == copy.owner
        assert nodes.of[copy.owner] != copy.helper
        assert seconds[copy.owner] == pytest.approx(seconds.max())
        assert copy.rows == sum(n for _, n in copy.at_home)
        weights, kept = matrices * H * F * 4, copy.rows * (2 * H * 2 + matrices * F * 4)
        there, back = (2 * weights, kept) if backward else (weights, 0)
        assert copy.saved == pytest.approx(copy.rows * moves, abs=1e-12)
        assert copy.cost == pytest.approx((there + back) / network.link + 10 * network.hop)
        assert copy.pays or copy is found.tried[-1]
        if not copy.pays:
            continue
        seconds[copy.owner] -= copy.rows * moves
        for rank, n in copy.at_home:
            assert nodes.of[rank] == copy.helper
            assert 0 < n <= counts[rank, copy.expert]
            seconds[rank] += n * moves
            assert seconds[rank] <= seconds[copy.owner] + 1e-9 * before, "the helper became the busier one"
        for sender, receiver, size in (
            (nodes.of[copy.owner], copy.helper, there),
            (copy.helper, nodes.of[copy.owner], back),
        ):
            links[0, sender] += size
            links[1, receiver] += size
    assert found.links.tolist() == links.tolist()
    assert found.saved == pytest.approx(before - seconds.max(), abs=1e-9 * before)
    pay = [copy for copy in found.tried if copy.pays]
    assert found.cost == pytest.approx(links.max() / network.link + 10 * len(pay) * network.hop)
    assert found.taken == (pay if found.saved > found.cost else [])
    # The look before says no only where nothing would be taken.
    assert may_pay(counts, cut, sizes, network) or not pay
    if found.tried and not found.tried[-1].pays:
        return
    # All are even, or no rank of another node may take a whole row from the busiest (from one of them, in a tie).
    if seconds.max() <= 1.1 * seconds.mean() * (1 + 1e-9):
        return
    gone = {(copy.expert, copy.helper) for copy in pay}

    def takes(busy: int, expert: int, node: int) -> float:
        members = nodes.members[node]
        room = [(seconds[busy] - seconds[rank]) / (2 * moves) for rank in members]
        return float(np.minimum(room, counts[members, expert]).clip(min=0).sum())

    left = [
        max(
            (takes(busy, expert, node) for expert in range(*cut.of(busy)) for node in range(nodes.count)
             if node != nodes.of[busy] and (expert, node) not in gone),
            default=0.0,
        )
        for busy in np.flatnonzero(seconds >= seconds.max() * (1 - 1e-9)).tolist()
    ]  # fmt: skip
    assert min(left) < 1 + 1e-6


@given(labels=LABELS, seed=SEEDS)
def test_what_crosses_is_priced_on_the_busiest_link(labels: list[int], seed: int) -> None:
    rng, nodes, P = np.random.default_rng(seed), Nodes.named(labels), len(labels)
    for backward in (False, True):
        sizes = ExpertSizes(5, 7, 3, itemsize=4, there=2, back=8, backward=backward)
        rows, sums = (rng.integers(-50, 50, (P, nodes.count)) for _ in range(2))
        links = rng.integers(0, 9000, (2, nodes.count))
        right = links.copy()
        for rank, node in enumerate(nodes.of):
            for other in range(nodes.count):
                n, m = (int(a[rank, other]) for a in (rows, sums))
                # Rows of x, in the backward of x and dy as well; sums of y, in the backward of dx as well.
                there, back = n * 5 * 2 * (1 + 2 * backward), m * 5 * 8 * (1 + backward)
                right[0, node] += there
                right[1, other] += there
                right[0, other] += back
                right[1, node] += back
        found = Verdict([], 1.0, links, Network(link=1e3)).with_crossing(nodes, sizes, rows, sums)
        assert found.links.tolist() == right.tolist()
        assert found.cost == max(0, right.max()) / 1e3


def test_text_has_the_way_that_a_layer_takes() -> None:
    table = fivedp.routing_workload("uniform", 4096, 256, 8, seed=1).experts

    def taken(**keywords: Any) -> str:
        text = fivedp.explain_experts(table, 256, 16, width=7168, hidden=2048, **keywords)
        return "".join(line for line in text.splitlines() if "taken" in line)

    assert "once per node" in taken(nodes=2)
    assert "once per rank" in taken(nodes=2, link=1000)
    assert "once per rank" in taken(nodes=range(16))
    assert taken() == ""
    hot = fivedp.routing_workload("one_expert", 4096, 8, 1, seed=1).experts
    text = fivedp.explain_experts(hot, 8, 4, width=1024, hidden=2048, nodes=2)
    assert "from rank 0 to node 1: pays" in text
    assert "with the rows and sums that cross: made" in text
    slow = fivedp.explain_experts(hot, 8, 4, width=1024, hidden=2048, nodes=2, link=0.001)
    assert "from rank 0 to node 1: does not pay" in slow
    assert "made" not in slow
    assert "copy" not in fivedp.explain_experts(hot, 8, 4, width=1024, hidden=2048)
    even = np.tile(np.arange(8, dtype=np.int32).reshape(4, 2), (100, 1))
    assert "forward: the ranks are even" in fivedp.explain_experts(even, 8, 4, width=8, hidden=8, nodes=2)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"experts": [1, 2]}, ShapeError, r"experts is int64 of shape \(2,\); expected whole numbers \(T, k\)"),
        ({"experts": [[0.5]]}, ShapeError, "experts is float64"),
        ({"experts": [[8]]}, ShapeError, "experts has numbers beyond -1 to 7"),
        ({"experts": [[-2]]}, ShapeError, "experts has numbers beyond -1 to 7"),
        ({"n_experts": 0}, ShapeError, "those of n_experts=0"),
        ({"ranks": 0}, ShapeError, "ranks is 0; expected 1 or more"),
        ({"width": 0}, ShapeError, "width is 0; expected 1 or more"),
        ({"hidden": -1}, ShapeError, "hidden is -1; expected 1 or more"),
        ({"nodes": 5}, LayoutError, "nodes is 5; expected 1 to 4"),
        ({"nodes": [0, 1]}, LayoutError, "nodes names 2 ranks; expected one for each of 4"),
        ({"wire": "half"}, LayoutError, "wire is 'half'"),
        ({"link": 0}, LayoutError, "link is 0; expected the GB/s"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], kind: type[ValueError], words: str) -> None:
    arguments: dict[str, Any] = {"experts": [[0, 1]], "n_experts": 8, "ranks": 4, "width": 8, "hidden": 8} | change
    experts, n_experts, ranks = (arguments.pop(name) for name in ("experts", "n_experts", "ranks"))
    with pytest.raises(kind, match=words):
        fivedp.explain_experts(experts, n_experts, ranks, **arguments)
