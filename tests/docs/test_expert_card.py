"""The formulas of the reference card of experts: each is evaluated, and compared with what the library does."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import fivedp
from fivedp.kernels._select import sum_type
from fivedp.layout.dispatch import Incoming, Outgoing, owners_to_help
from fivedp.layout.experts import cut_experts, subtrees, uniform_subtrees
from fivedp.layout.hot_experts import ExpertSizes, verdict
from fivedp.layout.nodes import PER_NODE, Network, Nodes, cheapest, row_ways
from fivedp.layout.relay import Relay
from fivedp.layout.shares import share
from fivedp.ops.dispatch_plan import DispatchPlan
from mpi_launcher import run_mpi

ROOT = Path(__file__).resolve().parents[2]
CARD = (ROOT / "docs/expert_parallelism_card.md").read_text()
(DEFINITIONS,) = re.findall(r"```python\n(.*?)```", CARD, re.S)
EXAMPLE = ROOT / "docs/examples/expert_costs.py"
Symbols = dict[str, Any]
Tables = list[npt.NDArray[np.int32]]


def cells(row: str) -> list[str]:
    """The formulas of the row of that name, in backticks after the first cell."""
    (line,) = [line for line in CARD.splitlines() if line.startswith(f"| {row} |")]
    return re.findall(r"`(.+?)`", line.split("|", 2)[2])


def value(formula: str, given: Symbols) -> float:
    """A formula of the card, with the card's own definitions."""
    symbols: Symbols = {"min": min, "max": max, "sum": sum, "comb": comb, "N": 1, **given}
    if "P" in given:
        exec(DEFINITIONS, symbols)
    return float(eval(formula, symbols))


def draw(rng: np.random.Generator, n_tokens: list[int], n_experts: int, k: int) -> Tables:
    """The choices of every rank's tokens: all alike, some slots empty."""
    tables = []
    for n in n_tokens:
        table = np.argsort(rng.random((n, n_experts)), axis=1)[:, :k].astype(np.int32)
        table[rng.random(table.shape) < 0.05] = -1
        tables.append(table)
    return tables


def steps(tables: Tables, symbols: Symbols, me: int) -> dict[str, float]:
    """Bytes of every step that rank `me` sends, by the card, from sets of tokens and experts."""
    E, P = symbols["E"], symbols["P"]
    sent = dict.fromkeys(("pairs", "rows", "returns", "weights", "naive"), 0.0)
    parts = subtrees(E, share(E, P, me))
    for other in set(range(P)) - {me}:
        begin, end = share(E, P, other)
        mine = [{e for e in row if begin <= e < end} for row in tables[me].tolist()]
        theirs: list[list[int]] = tables[other].tolist()
        case = symbols | {
            "n": sum(map(len, mine)),
            "r": sum(map(bool, mine)),
            "b": sum(any(first <= e < last for e in row) for row in theirs for first, last in parts),
        }
        for step in ("pairs", "rows", "returns"):
            sent[step] += value(cells(step)[0], case)
        here = sum(parts[0][0] <= e < parts[-1][1] for row in theirs for e in row) if parts else 0
        sent["weights"] += value(cells("weights' gradients, to the rank that has n pairs here")[0], {**case, "n": here})
        (naive,) = re.findall(r"One row for each pair would be `(.*?)`", CARD)
        sent["naive"] += value(naive, case)
    return sent


def plans(tables: Tables, E: int, H: int, dtype: Any, wire: str, nodes: Nodes | None = None) -> list[DispatchPlan]:
    """What every rank would decide, without messages; over nodes, that rows cross once per node."""
    P, sums = len(tables), sum_type(dtype)
    cut = cut_experts(E, P)
    outgoing = [Outgoing(t, np.ones(t.shape, sums), cut, rank) for rank, t in enumerate(tables)]
    if nodes is not None:
        outgoing = [out.through_gateways(nodes) for out in outgoing]
    incoming = [Incoming([out.pairs_for(rank) for out in outgoing], cut, rank) for rank in range(P)]
    relays: list[Relay | None] = [None] * P
    if nodes is not None:
        crossing = np.array(
            [[sum(len(out.rows[rank]) for rank in members) for members in nodes.members] for out in outgoing]
        )
        at_work = [Relay(nodes, each, crossing) for each in incoming]
        for rank, relay in enumerate(at_work):
            relay.hear({mate: at_work[mate].needs(rank) for mate in nodes.members[nodes.of[rank]]})
        relays = [*at_work]
    found = []
    for rank in range(P):
        group: Any = SimpleNamespace(size=P, index=rank, node_of=nodes.of if nodes else (0,) * P, cache={})
        shape = tables[rank].shape
        n_tokens = tuple(map(len, tables))
        plan = DispatchPlan(group, cut, outgoing[rank], incoming[rank], n_tokens, (), H, shape, dtype, wire)
        found.append(replace(plan, relay=relays[rank]))
    return found


@pytest.mark.parametrize("wire", ["same", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bytes_of_a_plan(dtype: Any, wire: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    e = np.dtype(dtype).itemsize
    for P, (E, k) in itertools.product((1, 2, 3, 4, 7, 8), ((8, 2), (60, 8), (5, 5), (1, 1))):
        n_tokens = rng.integers(0, 100, P).tolist()
        tables = draw(rng, n_tokens, E, k)
        narrow = wire == "bfloat16"
        symbols = {"P": P, "E": E, "k": k, "H": 24, "e": e, "s": e, "w": 2 if narrow else e, "v": 2 if narrow else e}
        for rank, plan in enumerate(plans(tables, E, 24, np.dtype(dtype), wire)):
            wanted, planned = steps(tables, symbols, rank), plan.bytes_sent()
            for step in ("pairs", "rows", "returns"):
                assert planned[step] == wanted[step], (P, E, k, rank, step)
            assert planned["bound"] == planned["rows"] <= wanted["naive"]


@pytest.mark.parametrize("wire", ["same", "bfloat16"])
def test_bytes_of_a_plan_over_nodes(wire: str, seed: int) -> None:
    rng, H, size, crossed = np.random.default_rng(seed), 24, 2 if wire == "bfloat16" else 4, 0.0
    maps = ((0, 0, 1, 1), (0, 0, 0, 1, 1), (0, 1, 0, 1, 2, 2))
    for node_of, (E, k) in itertools.product(maps, ((8, 2), (60, 8), (5, 5))):
        nodes, P = Nodes(node_of), len(node_of)
        tables = draw(rng, rng.integers(0, 60, P).tolist(), E, k)
        symbols = {"P": P, "N": nodes.count, "E": E, "k": k, "H": H, "e": 4, "s": 4, "w": size, "v": size}
        labels = np.array(node_of)[cut_experts(E, P).owner].tolist()
        of_node: list[list[Any]] = [[] for _ in nodes.members]
        for part in uniform_subtrees(labels):
            of_node[labels[part[0]]].append(part)
        for me, plan in enumerate(plans(tables, E, H, np.dtype(np.float32), wire, nodes)):
            wanted = steps_over_nodes(tables, symbols, me, nodes, of_node)
            planned = plan.bytes_sent()
            assert {name: planned[name] for name in wanted} == wanted, (node_of, E, k, me)
            assert planned["bound_between"] == planned["rows_between"]
            crossed += planned["rows_between"]
    assert crossed


def steps_over_nodes(
    tables: Tables, symbols: Symbols, me: int, nodes: Nodes, of_node: list[list[Any]]
) -> dict[str, float]:
    """Bytes of every step that rank `me` sends, by the card, where rows cross once per node.

    `of_node` has the largest subtrees within the experts of every node.
    """
    E, P, here = symbols["E"], symbols["P"], nodes.of[me]

    def touched(ranks: list[int], parts: list[Any]) -> int:
        """Of the tokens of ranks and of some ranges of experts, those that belong together."""
        return sum(touches(row, part) for s in ranks for row in tables[s] for part in parts)

    def once(step: str, **counts: int) -> float:
        return value(cells(step)[0], symbols | counts)

    mine = share(E, P, me)
    parts = subtrees(E, mine)
    served = nodes.served(me)
    sent = {"pairs": steps(tables, symbols, me)["pairs"], "rows": 0.0, "returns": 0.0}
    for mate in set(nodes.members[here]) - {me}:
        theirs, by_mate = [share(E, P, mate)], nodes.served(mate)
        pairs = sum(mine[0] <= e < mine[1] for s in by_mate for row in tables[s] for e in row)
        sent["pairs"] += once("needs, to a gateway of one's own node", n=pairs)
        sent["rows"] += once("rows", r=touched([me], theirs))
        sent["rows"] += once("rows passed on, to a rank of one's own node", r=touched(served, theirs))
        sent["returns"] += once("returns", b=touched([mate], parts))
        sent["returns"] += once("sums, to a gateway of one's own node", b=touched(by_mate, parts))
    sent["rows_between"] = sent["returns_between"] = 0.0
    for other in set(range(nodes.count)) - {here}:
        theirs = [share(E, P, rank) for rank in nodes.members[other]]
        tokens = sum(any(touches(row, experts) for experts in theirs) for row in tables[me])
        sent["rows_between"] += once("rows, to the gateway of a node", r=tokens)
    for rank in served:
        sent["returns_between"] += once("sums of the node, to a rank served here", b=touched([rank], of_node[here]))
    for way in ("rows", "returns"):
        sent[way] += sent[f"{way}_between"]
    return sent


def touches(row: Any, experts: tuple[int, int]) -> bool:
    """Whether a token has any of a range of experts."""
    return any(experts[0] <= e < experts[1] for e in row)


def test_price_of_the_ways_between_nodes(seed: int) -> None:
    rng, nodes = np.random.default_rng(seed), Nodes((0, 0, 0, 1, 1, 2))
    (rule,) = re.findall(r"Once per node is taken where\n`(.*?)`", CARD)
    (more,) = re.findall(r"shares no memory, `(.*?)` is added", CARD)
    answers = set()
    for _ in range(200):
        H, w, v, in_place = int(rng.integers(1, 9000)), 2, 4, bool(rng.integers(2))
        per_rank = rng.integers(0, 10 ** int(rng.integers(1, 5)), (6, 3))
        for rank, node in enumerate(nodes.of):
            per_rank[rank, node] = 0
        per_node = (per_rank * rng.random(per_rank.shape)).astype(np.int64)
        link = 10 ** rng.uniform(8, 11)
        busiest = []
        for counts in (per_rank, per_node):
            leaving = [counts[members].sum() for members in nodes.members]
            busiest.append(max(*leaving, *counts.sum(axis=0)))
        inside = []
        for gateway, node in enumerate(nodes.of):
            served = nodes.served(gateway)
            i, o = int(per_rank[served, node].sum()), int(per_node[served, node].sum())
            inside.append(((i + o) * v + (0 if in_place else i * w), i, o))
        _, i, o = max(inside)
        symbols = {"a": busiest[0], "b": busiest[1], "i": i, "o": o, "H": H, "w": w, "v": v, "link": link}
        symbols |= {"copy": 2.5e9, "hop": 30e-6}
        right = rule if in_place else f"{rule} + {more}"
        ways = row_ways(nodes, per_rank, per_node, H * w, H * v, Network(link=link), in_place=in_place)
        answer = cheapest(ways).name == PER_NODE
        assert bool(value(right, symbols)) == answer
        answers.add(answer)
    assert answers == {True, False}


def test_price_of_a_copy_of_a_hot_expert(seed: int) -> None:
    rng, nodes = np.random.default_rng(seed), Nodes((0, 0, 1, 1, 1))
    (forward,) = re.findall(r"pays for itself forward where `(.*?)`", CARD)
    (backward,) = re.findall(r"backward as well, where `(.*?)`", CARD)
    copied = "copy of an expert, to the gateway of a node, and to a rank of one's own node that uses it"
    answers = set()
    for _ in range(100):
        H, F, e, w, link = 256, 512, int(rng.choice([2, 4])), 2, 10 ** rng.uniform(6, 10)
        counts = rng.integers(0, 10 ** int(rng.integers(2, 6)), (5, 10))
        for rule, back in ((forward, False), (backward, True)):
            sizes = ExpertSizes(H, F, int(rng.integers(2, 4)), e, there=w, back=4, backward=back)
            symbols: Symbols = {"M": sizes.matrices, "H": H, "F": F, "e": e, "w": w, "link": link, "flops": 100e9}
            symbols["hop"] = 30e-6
            assert sizes.weights == value(cells(copied)[0], symbols)
            assert 7 * sizes.kept == value(cells("rows made here, to their owner, backward")[0], symbols | {"n": 7})
            for copy in verdict(counts, cut_experts(10, 5), nodes, sizes, Network(link=link)).tried:
                assert bool(value(rule, symbols | {"n": copy.rows})) == copy.pays
                answers.add((back, copy.pays))
    assert len(answers) == 4


def test_expected_bytes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    T = 4000
    for P, E, k in ((2, 8, 2), (3, 8, 2), (4, 60, 4), (5, 64, 8)):
        table = np.argsort(rng.random((T, E)), axis=1)[:, :k]
        for rank in range(P):
            begin, end = share(E, P, rank)
            parts = subtrees(E, (begin, end))
            symbols = {"P": P, "E": E, "k": k, "T": T, "s": 4, "m": end - begin}
            inside = (begin <= table) & (table < end)
            returned = sum(int(((a <= table) & (table < b)).any(axis=1).sum()) for a, b in parts)
            for step, found in (("pairs", inside.sum()), ("rows", inside.any(axis=1).sum()), ("returns", returned)):
                wanted = value(cells(step)[1], symbols | {"subtrees": [b - a for a, b in parts]})
                # A count of T draws of at most k (or of its subtrees): its deviation is below k sqrt(T) / 2.
                assert abs(found - wanted) < 5 * k * T**0.5 / 2, (P, E, k, rank, step)


def test_where_an_owner_is_helped(seed: int) -> None:
    rng = np.random.default_rng(seed)
    (rule,) = re.findall(r"backward, where `(.*?)`", CARD, re.S)
    answers = set()
    for _ in range(300):
        P, e = int(rng.integers(2, 9)), int(rng.choice([2, 4, 8]))
        loads = np.round(rng.random(P) ** 4 * 10 ** rng.integers(1, 5, P)).astype(int).tolist()
        experts = rng.integers(0, 40, P).tolist()
        helped = owners_to_help(loads, experts, 64, 96, e)
        for owner, (load, n) in enumerate(zip(loads, experts, strict=True)):
            symbols = {"load": load, "mean": sum(loads) / P, "experts": n, "e": e}
            assert bool(value(rule.replace("\n", " "), symbols)) == (owner in helped)
            answers.add(owner in helped)
    assert answers == {True, False}


@pytest.mark.parametrize(("n_ranks", "between"), [(2, "one node"), (3, "one node"), (4, "nodes")])
def test_counted_bytes_and_memory(n_ranks: int, between: str) -> None:
    done = run_mpi(n_ranks, EXAMPLE, timeout=120, env={"FIVEDP_SHARED": "1" if between == "one node" else "0"})
    assert done.returncode == 0, done.output
    printed = done.stdout.splitlines()
    case: Symbols = {name: int(text) for name, text in re.findall(r"(\w+)=(\d+)", printed[0])}
    assert case["p"] == n_ranks
    P, T, E, k = n_ranks, case["T"], case["E"], case["k"]
    counted = {line[:22].strip(): [int(x.replace(",", "")) for x in line[22:].split()] for line in printed[2:]}

    def choices(kind: str) -> Tables:
        return [fivedp.routing_workload(kind, T, E, k, 1, first_token=rank * T).experts for rank in range(P)]

    case |= {"P": P, "w": case["e"], "v": case["s"]}

    tables, hot = choices("uniform"), choices("one_expert")

    def total(call: str, case: Symbols, tables: Tables = tables) -> float:
        return sum(value(cells(call)[0], steps(tables, case, rank)) for rank in range(P))

    for call in ("dispatch", "combine", "combine, backward", "dispatch, backward", "layer"):
        assert counted[call][0] == total(call, case), call
    assert counted["layer, nothing kept"][0] == total("layer", case)
    assert counted["layer and backward"][0] == total("layer", case) + total("layer, backward", case)
    words = [
        value(cells(f"jobs on the board, {way}, where an owner is helped")[0], case) for way in ("forward", "backward")
    ]
    board = P * (P - 1) * sum(words) if between == "one node" else 0
    wanted = total("layer", case, hot) + total("layer, backward", case, hot) + board
    assert counted["... with hot experts"][0] == wanted
    assert counted["route"][0] == P * (P - 1) * value(cells("route, with a communicator")[0], case)
    narrow = case | {"w": 2, "v": 2}
    for call in ("dispatch", "combine"):
        assert counted[f"{call}, bfloat16"][0] == total(call, narrow), call

    if between == "one node":
        loads = np.bincount(cut_experts(E, P).owner[np.concatenate(tables)].ravel())
        case |= {"R": int(loads.max()), "E_l": E // P}
        for row, call, tables_bytes in (
            ("nothing kept", "layer, nothing kept", 200),
            ("kept", "layer", 200),
            ("kept, with the backward", "layer and backward", 300),
        ):
            least, peak = value(cells(row)[0], case), counted[call][1]
            assert least <= peak <= least + tables_bytes * case["R"] + (160 << 10), call


COUNT_FLOPS = """
import numpy as np
from mpi4py import MPI
import fivedp
from fivedp.kernels import experts as kernel
from fivedp.ops import mixture_layer as layer, routing, token_sums

flops = 0

def counting(call, of):
    def counted(*arguments, **keywords):
        global flops
        flops += of(*arguments)
        return call(*arguments, **keywords)
    return counted

def grouped(x, w, offsets, out):
    return sum(2 * out.shape[0] * out.shape[1] * part.shape[1] for part in (w if isinstance(w, list) else [w]))

kernel.grouped_matmul = counting(kernel.grouped_matmul, grouped)
kernel.grouped_outer = counting(kernel.grouped_outer, lambda x, dy, offsets, out: 2 * len(dy) * out[0].size)
kernel.expert_hidden = counting(
    kernel.expert_hidden,
    lambda x, w_gate, w_up, offsets, hidden: (4 if w_gate is not None else 2) * hidden.size * w_up.shape[1],
)
dense = lambda a, b, *more: 2 * a.shape[0] * a.shape[1] * b.shape[1]
layer.gemm, routing.gemm = counting(layer.gemm, dense), counting(routing.gemm, dense)
token_sums.sharded_matmul = counting(token_sums.sharded_matmul, dense)

T, H, F, E, k = 40, 6, 10, 8, 3
rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape)
for activation, gate in (("swiglu", normal(E, H, F)), ("silu", None)):
    arrays = normal(T, H), normal(H, E), normal(E, H, F), gate, normal(E, F, H)
    flops = 0
    _, state = fivedp.expert_layer(*arrays, MPI.COMM_SELF, top_k=k, activation=activation, keep=True)
    print(flops, end=" ")
    flops = 0
    fivedp.expert_layer_backward(normal(T, H), state)
    print(flops)
"""


def test_counted_operations() -> None:
    done = run_mpi(1, COUNT_FLOPS)
    assert done.returncode == 0, done.output
    case = {"T": 40, "H": 6, "F": 10, "E": 8, "R": 40 * 3}
    for row, line in zip(("experts, gated", "experts, not gated"), done.stdout.splitlines(), strict=True):
        wanted = [value(a, case) + value(b, case) for a, b in zip(cells(row), cells("router"), strict=True)]
        assert [float(x) for x in line.split()] == wanted, row
