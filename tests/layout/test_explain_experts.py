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
from fivedp.layout.hot_experts import replicas
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


@pytest.mark.parametrize("backward", [False, True])
@given(labels=LABELS, seed=SEEDS)
def test_copies_of_hot_experts_save_what_they_say(backward: bool, labels: list[int], seed: int) -> None:
    rng, nodes = np.random.default_rng(seed), Nodes.named(labels)
    n_experts = int(rng.integers(1, 30))
    cut = cut_experts(n_experts, len(labels))
    loads = (rng.random(n_experts) ** 6 * 10 ** rng.integers(1, 6)).astype(int).tolist()
    H, F, e, network = 64, 96, 4, Network(link=10 ** rng.uniform(6, 11), flops=1e9)
    each = 2 * H * F * np.array([1.0, 2.0])  # of a row: what the owner keeps of its work, and what can go elsewhere
    seconds = np.zeros((nodes.count, 2))
    for expert, load in enumerate(loads):
        seconds[nodes.of[cut.owner[expert]]] += load * 1e-9 * 3 * each / [1, 2]
    if not backward:
        seconds[:, 0] = 0
    seconds /= np.array([[len(members)] for members in nodes.members])
    total = seconds.sum(axis=1)
    found = replicas(loads, cut, nodes, H, F, e, network, backward=backward)
    assert len({replica.expert for replica in found}) == len(found)
    for replica in found:
        assert nodes.of[cut.owner[replica.expert]] == replica.owner != replica.helper
        assert total[replica.owner] == pytest.approx(total.max())
        assert 0 <= replica.rows <= loads[replica.expert]
        after = total.copy()
        for node, sign in ((replica.owner, -1), (replica.helper, 1)):
            after[node] += sign * replica.rows * 6 * H * F * 1e-9 / len(nodes.members[node])
        assert replica.saved == pytest.approx(total[replica.owner] - after[replica.owner], abs=1e-12)
        there_and_back = replica.rows * (2 * H + 3 * F) if backward else 0
        assert replica.cost == pytest.approx((3 * H * F + there_and_back) * e / network.link)
        assert replica.pays == (replica.saved > replica.cost)
        assert replica.pays or replica is found[-1]
        assert after[replica.helper] <= after[replica.owner] + 1e-12, "the helper became the busier one"
        total = after
    if found and not found[-1].pays:
        return
    owners = np.array(nodes.of)[cut.owner]
    busiest = {int(owners[e]) for e in range(n_experts) if loads[e] and e not in {r.expert for r in found}}
    highest = {node for node in range(nodes.count) if total[node] >= total.max() * (1 - 1e-9)}
    assert total.max() <= 1.1 * total.mean() + 1e-12 or not highest <= busiest


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
    assert "from node 0 to 1: pays" in text
    slow = fivedp.explain_experts(hot, 8, 4, width=1024, hidden=2048, nodes=2, link=0.001)
    assert "from node 0 to 1: does not pay" in slow


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
