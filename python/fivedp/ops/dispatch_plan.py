"""What one dispatch decides: which pairs are whose, and on which way rows cross between nodes.

Every rank tells every owner its pairs, in one message as long as they are few. Beside them stand the numbers of pairs
for all owners and, over several nodes, the numbers of rows that would cross on either way. So all ranks know the load
of each, and come to the same choice of the way.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from fivedp.comm.grid import Group
from fivedp.comm.messages import TAGS, Mailbox
from fivedp.kernels._select import library_of, sum_type
from fivedp.layout.dispatch import Incoming, Outgoing, pair_type
from fivedp.layout.experts import ExpertCut, cut_experts
from fivedp.layout.nodes import PER_NODE, Network, Nodes, RowWay, cheapest, row_ways
from fivedp.layout.relay import NEED, Relay
from fivedp.ops.plan_tables import PlanTables
from fivedp.ops.routing import Routing

Array = Any
_BF16 = np.dtype(ml_dtypes.bfloat16)
# The first message to an owner has room for so many bytes of pairs, behind the numbers that everybody is told. Where a
# rank has few tokens (decoding) that is all of them, and no message is spent on counts.
_FIRST_PAIRS_BYTES = 4080


@dataclass(frozen=True)
class DispatchPlan:
    """What one dispatch decided, for as many exchanges along it as one likes.

    Attributes
    ----------
    group : Group
    cut : ExpertCut
    outgoing : Outgoing
        This rank's tokens.
    incoming : Incoming
        This rank's experts.
    n_tokens : tuple of int
        Of every rank.
    loads : tuple of int
        The rows of every rank's experts.
    width : int
        H, the features of a token.
    slots : tuple of int
        The shape of the routing's tables, (T, k).
    dtype : dtype
        Of the tokens.
    wire : {"same", "bfloat16"}
    on_device : bool
        Whether the tokens are CuPy's. The plan itself is always on the host: see `tables`.
    ways : list of RowWay
        The prices of the ways between nodes; none on one node.
    relay : Relay or None
        What this rank does for rows that cross to a node once; None where they go to every rank.
    """

    group: Group
    cut: ExpertCut
    outgoing: Outgoing
    incoming: Incoming
    n_tokens: tuple[int, ...]
    loads: tuple[int, ...]
    width: int
    slots: tuple[int, ...]
    dtype: np.dtype[Any]
    wire: str
    on_device: bool = False
    ways: tuple[RowWay, ...] = ()
    relay: Relay | None = None

    @property
    def xp(self) -> Any:
        """Where the tokens live: numpy or cupy."""
        return sys.modules["cupy"] if self.on_device else np

    @cached_property
    def tables(self) -> PlanTables:
        """What kernels read of it, where they read it."""
        return PlanTables(self.xp, self.outgoing, self.incoming, self.relay)

    @property
    def sums(self) -> np.dtype[Any]:
        """The type of sums."""
        return sum_type(self.dtype)

    @property
    def wire_dtype(self) -> np.dtype[Any]:
        """The type of rows on their way to the owners."""
        return _BF16 if self.wire == "bfloat16" else self.dtype

    @property
    def back_dtype(self) -> np.dtype[Any]:
        """The type of sums on their way home."""
        return _BF16 if self.wire == "bfloat16" else self.sums

    @property
    def peers(self) -> list[int]:
        """The other members, the next one first."""
        return [(self.group.index + step) % self.group.size for step in range(1, self.group.size)]

    @property
    def nodes(self) -> Nodes:
        """Where the members are."""
        return nodes_of(self.group)

    @property
    def direct_peers(self) -> list[int]:
        """The other members that this one sends rows to, and sums, without a gateway."""
        return self.peers if self.relay is None else self.relay.mates

    @property
    def n_rows(self) -> int:
        """R: pairs of all ranks whose expert is here."""
        return len(self.incoming.source)

    def bytes_sent(self) -> dict[str, int]:
        """Bytes that this rank sends: "pairs" and "rows" in the dispatch, "returns" in the combine.

        "bound" is the least that the rows of its tokens can be: each once to every other rank that has one of its
        experts. "pairs_between" and so on are what of it crosses to other nodes; there the bound is each token once to
        every other node that has one of its experts.
        """
        mine, out = self.group.index, self.outgoing
        node, width = self.nodes.of, self.width
        row, back = width * self.wire_dtype.itemsize, width * self.back_dtype.itemsize
        pairs = {s: pairs_bytes(len(out.of_owner[s]), self.group.size, self.sums, self.nodes.count) for s in self.peers}
        rows = {s: len(out.rows[s]) * row for s in self.peers}
        returns = {s: self.incoming.n_sums[s] * back for s in self.direct_peers}
        if self.relay is not None:
            for mate in self.relay.mates:
                pairs[mate] += len(self.relay.needs(mate)) * NEED.itemsize
                rows[mate] += len(self.relay.passes_on[mate]) * row
                returns[mate] += self.relay.n_sums(mate) * width * self.sums.itemsize
            counts = np.diff(self.relay.sum_borders).tolist()
            returns |= {s: n * back for s, n in zip(self.relay.served[mine], counts, strict=True)}

        def distinct(place: Any, here: int) -> int:
            """Tokens times the other places that have any of their experts."""
            far = out.pairs[place != here]
            return len(np.unique(far["token"] * np.int64(self.group.size) + place[place != here]))

        owner = self.cut.owner[out.pairs["expert"]]
        result = {
            "pairs": sum(pairs.values()),
            "rows": sum(rows.values()),
            "returns": sum(returns.values()),
            "bound": distinct(owner, mine) * row,
        }
        for name, sent in (("pairs", pairs), ("rows", rows), ("returns", returns)):
            result[f"{name}_between"] = sum(n for s, n in sent.items() if node[s] != node[mine])
        result["bound_between"] = distinct(np.array(node)[owner], node[mine]) * row
        return result


def nodes_of(group: Group) -> Nodes:
    """Where the members of a group are, made once."""
    nodes = group.cache.get("nodes")
    if not isinstance(nodes, Nodes):
        nodes = group.cache["nodes"] = Nodes.named(group.node_of)
    return nodes


def _words(n_owners: int, n_nodes: int) -> int:
    """How many numbers everybody is told: pairs for every owner; rows for every node, in either way."""
    return n_owners + (2 * n_nodes if n_nodes > 1 else 0)


def _first_bytes(n_owners: int, n_nodes: int) -> int:
    """Bytes of the first message to an owner."""
    return 8 * _words(n_owners, n_nodes) + _FIRST_PAIRS_BYTES


def pairs_bytes(n_pairs: int, n_owners: int, sums: Any, n_nodes: int = 1) -> int:
    """Bytes of the messages that carry `n_pairs` pairs to one of the owners."""
    item = pair_type(sums).itemsize
    return _first_bytes(n_owners, n_nodes) + max(0, n_pairs - _FIRST_PAIRS_BYTES // item) * item


def exchange_pairs(mail: Mailbox, outgoing: Outgoing, words: Array) -> tuple[list[Array], Array]:
    """The pairs that every member has for this one's experts, and the words of every member, (members, n)."""
    group, mine = mail.group, mail.group.index
    dtype, fits = outgoing.pairs.dtype, _FIRST_PAIRS_BYTES // outgoing.pairs.dtype.itemsize
    size, words_bytes = words.nbytes + _FIRST_PAIRS_BYTES, words.nbytes
    peers = [(mine + step) % group.size for step in range(1, group.size)]
    everyone = np.empty((group.size, len(words)), np.int64)
    everyone[mine] = words
    firsts = {s: mail.receive((size,), np.uint8, s, TAGS["A"]) for s in peers}
    for peer in peers:
        pairs = outgoing.pairs_for(peer)
        first = np.zeros(size, np.uint8)
        first[:words_bytes] = words.view(np.uint8)
        head = pairs[:fits].view(np.uint8)
        first[words_bytes : words_bytes + len(head)] = head
        mail.send(first, peer, TAGS["A"], 0)
        if len(pairs) > fits:
            mail.send(pairs[fits:], peer, TAGS["B"], 0)
    received: list[Array] = [outgoing.pairs[outgoing.of_owner[mine]]] * group.size
    rests = []
    for source in peers:
        mail.wait([firsts[source]])
        first = firsts[source].array
        everyone[source] = first[:words_bytes].view(np.int64)
        count = int(everyone[source, mine])
        received[source] = np.empty(count, dtype)
        head = received[source][:fits]
        head.view(np.uint8)[:] = first[words_bytes : words_bytes + head.nbytes]
        mail.release(firsts[source])
        if count > fits:
            rests.append(mail.receive((count - fits,), dtype, source, TAGS["B"], target=received[source][fits:]))
    mail.wait(rests)
    return received, everyone


def plan_dispatch(
    mail: Mailbox, routing: Routing, x: Array, n_tokens: Sequence[int], wire: str, sums: Any
) -> DispatchPlan:
    """Tell every owner which pairs are its own. Collective over the mailbox's group.

    `mail` and `routing` are those of the host, wherever the tokens `x` are.
    """
    group, on_device = mail.group, library_of(x) is not np
    nodes, mine = nodes_of(group), group.index
    cut = cut_experts(routing.n_experts, group.size)
    outgoing = Outgoing(routing.experts, np.asarray(routing.weights, sums), cut, mine)
    words = [len(numbers) for numbers in outgoing.of_owner]
    if nodes.count == 1:
        pairs, counts = exchange_pairs(mail, outgoing, np.array(words, np.int64))
        return DispatchPlan(
            group, cut, outgoing, Incoming(pairs, cut, mine), tuple(n_tokens), tuple(counts.sum(axis=0).tolist()),
            x.shape[1], tuple(routing.experts.shape), x.dtype, wire, on_device,
        )  # fmt: skip
    through = outgoing.through_gateways(nodes)
    for view in (outgoing, through):
        words += [sum(len(view.rows[rank]) for rank in ranks) for ranks in nodes.members]
    pairs, everyone = exchange_pairs(mail, through, np.array(words, np.int64))
    incoming = Incoming(pairs, cut, mine)
    counts, per_rank, per_node = np.split(everyone, [group.size, group.size + nodes.count], axis=1)
    for ranks, node in zip(nodes.members, range(nodes.count), strict=True):
        per_rank[ranks, node] = per_node[ranks, node] = 0  # what stays on the node crosses to none
    plan = DispatchPlan(
        group, cut, outgoing, incoming, tuple(n_tokens), tuple(counts.sum(axis=0).tolist()),
        x.shape[1], tuple(routing.experts.shape), x.dtype, wire, on_device,
    )  # fmt: skip
    there, back = (x.shape[1] * dtype.itemsize for dtype in (plan.wire_dtype, plan.back_dtype))
    network, in_place = Network(link=group.grid.link), group.grid.shared is not None and not on_device
    ways = row_ways(nodes, per_rank, per_node, there, back, network, in_place=in_place)
    if cheapest(ways).name != PER_NODE:
        return replace(plan, ways=tuple(ways))
    relay = Relay(nodes, incoming, per_node)
    relay.hear(_exchange_needs(mail, relay, counts))
    return replace(plan, outgoing=through, ways=tuple(ways), relay=relay)


def _exchange_needs(mail: Mailbox, relay: Relay, counts: Array) -> dict[int, Array]:
    """What every rank of this node needs of this rank's box."""
    receipts = {}
    for mate in relay.mates[::-1]:
        if n := relay.n_pairs(counts, mate):
            receipts[mate] = mail.receive((n,), NEED, mate, TAGS["A"])
    for mate in relay.mates:
        mail.send(relay.needs(mate), mate, TAGS["A"], 0)
    mail.wait(list(receipts.values()))
    needs = {relay.rank: relay.needs(relay.rank)} | {mate: np.empty(0, NEED) for mate in relay.mates}
    for mate, receipt in receipts.items():
        needs[mate] = receipt.array.copy()
        mail.release(receipt)
    return needs
