"""What a mixture of experts moves between nodes, once per pair, rank or node; and what copies of hot experts bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import ml_dtypes  # noqa: F401  (np.dtype knows "bfloat16" by it)
import numpy as np
import numpy.typing as npt

from fivedp.errors import LayoutError, ShapeError
from fivedp.layout.copies import Copies, crossing_change
from fivedp.layout.dispatch import Outgoing
from fivedp.layout.experts import ExpertCut, cut_experts
from fivedp.layout.hot_experts import ExpertSizes, Replica, Verdict, rank_loads, verdict
from fivedp.layout.nodes import PER_NODE, Counts, Network, Nodes, RowWay, cheapest, row_ways
from fivedp.layout.shares import border

# Copies of each direction that have a line of their own.
_SHOWN = 4


def crossing_counts(
    experts: npt.NDArray[np.integer[Any]], cut: ExpertCut, nodes: Nodes
) -> tuple[Counts, Counts, Counts]:
    """(P, N) each: rows from every rank to every other node, once for every pair, rank and node that they are for.

    Parameters
    ----------
    experts : (T, k) int
        The choices of the whole batch, whose tokens are cut over the ranks by the block rule; -1 for none.
    """
    n_ranks = cut.n_ranks
    borders = [border(len(experts), n_ranks, rank) for rank in range(n_ranks + 1)]
    home = np.repeat(np.arange(n_ranks), np.diff(borders))
    token, slot = np.nonzero(experts >= 0)
    owner = cut.owner[experts[token, slot]]
    node_of = np.array(nodes.of)
    far = node_of[owner] != node_of[home[token]]
    token, owner = token[far], owner[far].astype(np.int64)

    def counted(tokens: npt.NDArray[np.int64], to: npt.NDArray[np.int64]) -> Counts:
        found = np.bincount(home[tokens] * nodes.count + to, minlength=n_ranks * nodes.count)
        return found.reshape(n_ranks, nodes.count).astype(np.int64)

    by_rank = np.unique(token * n_ranks + owner)
    by_node = np.unique(token * nodes.count + node_of[owner])
    return (
        counted(token, node_of[owner]),
        counted(by_rank // n_ranks, node_of[by_rank % n_ranks]),
        counted(by_node // nodes.count, by_node % nodes.count),
    )


def explain_experts(
    experts: Any,
    n_experts: int,
    ranks: Any,
    *,
    width: int,
    hidden: int,
    nodes: int | Sequence[object] = 1,
    dtype: Any = np.float32,
    wire: str = "same",
    link: float = 12.5,
) -> str:
    """The price of a layer's rows between nodes, and of copies of its hot experts, as tables.

    Parameters
    ----------
    experts : (T, k) int
        The choices of the whole batch, such as `Routing.experts` on one rank; -1 for none. Tokens are cut over the
        ranks by the block rule.
    n_experts : int
    ranks : int, communicator or Mesh
        How many ranks the experts are cut over, or what they are.
    width, hidden : int
        H and F.
    nodes : int or sequence
        How many nodes the ranks are on, by the block rule, or the node of every rank.
    dtype : dtype
        Of the tokens.
    wire : {"same", "bfloat16"}
        As in `expert_layer`.
    link : float
        GB/s that a node sends or receives, as `FIVEDP_LINK`.

    Returns
    -------
    text : str
        The way that a layer takes is marked, and whether it makes copies: forward alone, or with `keep`, for a backward
        as well. Of gated experts.

    Raises
    ------
    LayoutError, ShapeError
        Where arguments do not fit together.

    Notes
    -----
    Not collective: nothing is sent.
    """
    count = ranks if isinstance(ranks, int) else getattr(ranks, "comm", ranks).Get_size()
    table, on = _checked(experts, n_experts, count, width, hidden, nodes, wire, link)
    kind = np.dtype(dtype)
    sums = np.dtype(np.float64 if kind == np.float64 else np.float32)
    there, back = (2, 2) if wire == "bfloat16" else (kind.itemsize, sums.itemsize)
    cut, network = cut_experts(n_experts, count), Network(link=1e9 * link)
    per_pair, per_rank, per_node = crossing_counts(table, cut, on)
    # One row for each pair goes where the rows of a rank go.
    naive = replace(row_ways(on, per_pair, per_node, width * there, width * back, network)[0], name="once per pair")
    ways = row_ways(on, per_rank, per_node, width * there, width * back, network)
    lines = [
        f"{len(table)} tokens choose {table.shape[1]} of {n_experts} experts, H {width}, F {hidden}, {kind}",
        f"on {count} ranks of {on.count} node{'s' * (on.count > 1)}, {link:g} GB/s between nodes",
        f"  {'rows between nodes':<20}{'rows':>12}{'MB':>12}{'ms':>12}   there and back",
        *(_way_line(way, way is cheapest(ways) and on.count > 1) for way in (naive, *ways)),
    ]
    outgoing = _outgoing(table, cut, np.dtype(sums))
    if cheapest(ways).name == PER_NODE:
        outgoing = [one.through_gateways(on) for one in outgoing]
    counts = np.array([np.bincount(one.pairs["expert"], minlength=n_experts) for one in outgoing])
    loads = rank_loads(counts, cut).astype(int)
    lines.append(f"  {'products':<20}{'rows':>12}{'':>12}{'ms':>12}   forward")
    for node, members in enumerate(on.members):
        rank = max(members, key=lambda rank: loads[rank])
        seconds = loads[rank] * 6 * width * hidden / network.flops
        lines.append(
            f"  {f'node {node}':<20}{loads[rank]:>12}{'':>12}{1e3 * seconds:>12.3f}   rank {rank}, its busiest"
        )
    if on.count > 1:
        lines.append(f"  {'a copy elsewhere':<20}{'rows':>12}{'saved ms':>12}{'costs ms':>12}   of an expert")
        for name, backward in (("forward", False), ("with backward", True)):
            sizes = ExpertSizes(width, hidden, 3, kind.itemsize, there, back, backward)
            lines += _copy_lines(name, copies_priced(outgoing, counts, on, sizes, network))
    return "\n".join(lines)


def _outgoing(table: npt.NDArray[np.integer[Any]], cut: ExpertCut, sums: np.dtype[Any]) -> list[Outgoing]:
    """The pairs of every rank."""
    borders = [border(len(table), cut.n_ranks, rank) for rank in range(cut.n_ranks + 1)]
    parts = [table[begin:end].astype(np.int32) for begin, end in pairwise(borders)]
    return [Outgoing(part, np.zeros(part.shape, sums), cut, rank) for rank, part in enumerate(parts)]


def copies_priced(
    outgoing: Sequence[Outgoing], counts: Counts, nodes: Nodes, sizes: ExpertSizes, network: Network
) -> Verdict:
    """What all ranks of a layer come to: the copies that pay, with all that crosses for them."""
    cut = outgoing[0].cut
    found = verdict(counts, cut, nodes, sizes, network)
    if not found.taken:
        return found
    copies = Copies(cut, nodes, sizes, found.taken)
    changes = np.array([crossing_change(one, one.with_copies(copies), nodes) for one in outgoing])
    return found.with_crossing(nodes, sizes, changes[:, 0], changes[:, 1])


def _way_line(way: RowWay, taken: bool) -> str:
    return f"  {way.name:<20}{way.rows:>12}{way.n_bytes / 1e6:>12.3f}{1e3 * way.seconds:>12.3f}{'   taken' * taken}"


def _copy_lines(name: str, found: Verdict) -> list[str]:
    """Copies one by one, then what those that pay bring together."""
    if not found.tried:
        return [f"  {name}: the ranks are even, or no other node has tokens for the busiest"]
    lines = [_replica_line(f"{name}, {replica.expert}", replica) for replica in found.tried[:_SHOWN]]
    pay = [replica for replica in found.tried if replica.pays]
    if rest := found.tried[_SHOWN:]:
        more = [replica for replica in rest if replica.pays]
        n, saved, cost = (sum(getattr(r, field) for r in more) for field in ("rows", "saved", "cost"))
        lines.append(f"  {f'{name}, {len(more)} more':<20}{n:>12}{1e3 * saved:>12.3f}{1e3 * cost:>12.3f}   that pay")
    if pay:
        n, done = sum(replica.rows for replica in pay), "made" if found.taken else "not made"
        lines.append(
            f"  {f'{name}, all':<20}{n:>12}{1e3 * found.saved:>12.3f}{1e3 * found.cost:>12.3f}"
            f"   with the rows and sums that cross: {done}"
        )
    return lines


def _replica_line(name: str, replica: Replica) -> str:
    return (
        f"  {name:<20}{replica.rows:>12}{1e3 * replica.saved:>12.3f}{1e3 * replica.cost:>12.3f}"
        f"   from rank {replica.owner} to node {replica.helper}: {'pays' if replica.pays else 'does not pay'}"
    )


def _checked(
    experts: Any, n_experts: int, ranks: int, width: int, hidden: int, nodes: Any, wire: str, link: float
) -> tuple[npt.NDArray[np.integer[Any]], Nodes]:
    """The choices and the nodes, where all fits together."""
    name, table = "explain_experts", np.asarray(experts)
    if table.ndim != 2 or table.dtype.kind not in "iu":
        raise ShapeError(f"{name}: experts is {table.dtype} of shape {table.shape}; expected whole numbers (T, k)")
    if n_experts < 1 or (table.size and not -1 <= table.min() <= table.max() < n_experts):
        raise ShapeError(f"{name}: experts has numbers beyond -1 to {n_experts - 1}, those of n_experts={n_experts}")
    for what, number in (("ranks", ranks), ("width", width), ("hidden", hidden)):
        if number < 1:
            raise ShapeError(f"{name}: {what} is {number}; expected 1 or more")
    if wire not in ("same", "bfloat16"):
        raise LayoutError(f'{name}: wire is {wire!r}; expected "same" or "bfloat16"')
    if not link > 0:
        raise LayoutError(f"{name}: link is {link}; expected the GB/s between nodes, more than 0")
    if isinstance(nodes, int):
        if not 1 <= nodes <= ranks:
            raise LayoutError(f"{name}: nodes is {nodes}; expected 1 to {ranks}, the number of ranks")
        borders = [border(ranks, nodes, node) for node in range(nodes + 1)]
        nodes = np.repeat(np.arange(nodes), np.diff(borders)).tolist()
    if len(nodes) != ranks:
        raise LayoutError(f"{name}: nodes names {len(nodes)} ranks; expected one for each of {ranks}")
    return table, Nodes.named(nodes)
