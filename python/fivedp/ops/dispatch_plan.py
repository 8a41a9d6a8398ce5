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
from fivedp.layout.copies import Copies, crossing_change
from fivedp.layout.dispatch import Incoming, Outgoing, pair_type
from fivedp.layout.experts import ExpertCut, cut_experts
from fivedp.layout.hot_experts import ExpertSizes, Verdict, may_pay, verdict
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
    copies : Copies or None
        Of hot experts on other nodes; None where there are none.
    hot : Verdict or None
        What copies bring; None where it was clear from the counts that they do not pay.
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
    copies: Copies | None = None
    hot: Verdict | None = None

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
        return wire_types(self.dtype, self.wire)[0]

    @property
    def back_dtype(self) -> np.dtype[Any]:
        """The type of sums on their way home."""
        return wire_types(self.dtype, self.wire)[1]

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
        """R: pairs of all ranks whose expert is here, or a copy of it that this rank uses."""
        return len(self.incoming.source)

    def bytes_sent(self) -> dict[str, int]:
        """Bytes that this rank sends: "pairs" and "rows" in the dispatch, "returns" in the combine.

        "bound" is the least that the rows of its tokens can be: each once to every other rank that has one of its
        experts. "pairs_between" and so on are what of it crosses to other nodes; there the bound is each token once to
        every other node that has one of its experts. Where copies of experts are made, a token has an expert where its
        row is computed; "copies" are their weights, in one direction, and "kept" is what the backward sends their
        owners.
        """
        mine, out = self.group.index, self.outgoing
        node, width = self.nodes.of, self.width
        row, back = width * self.wire_dtype.itemsize, width * self.back_dtype.itemsize
        words = _words(self.cut, self.nodes.count)
        pairs = {s: pairs_bytes(out.n_told[s], words, self.sums) for s in self.peers}
        if self.hot is not None:  # what crosses more or less
            pairs = {s: n + 2 * self.nodes.count * 8 for s, n in pairs.items()}
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

        copies, kept = dict.fromkeys(self.peers, 0), dict.fromkeys(self.peers, 0)
        if self.copies is not None:
            sizes = self.copies.sizes
            for _, receiver in self.copies.given(mine):
                copies[receiver] += sizes.weights
            for mate in set(self.nodes.members[node[mine]]) - {mine}:
                copies[mate] += len(self.copies.passed_on(mine, mate)) * sizes.weights
            if sizes.backward:
                kept = {s: self.copies.n_kept(mine, s) * sizes.kept for s in self.peers}

        owner = out.computed_by
        result = {
            "pairs": sum(pairs.values()),
            "rows": sum(rows.values()),
            "returns": sum(returns.values()),
            "copies": sum(copies.values()),
            "kept": sum(kept.values()),
            "bound": distinct(owner, mine) * row,
        }
        kinds = {"pairs": pairs, "rows": rows, "returns": returns, "copies": copies, "kept": kept}
        for name, sent in kinds.items():
            result[f"{name}_between"] = sum(n for s, n in sent.items() if node[s] != node[mine])
        result["bound_between"] = distinct(np.array(node)[owner], node[mine]) * row
        return result


def nodes_of(group: Group) -> Nodes:
    """Where the members of a group are, made once."""
    nodes = group.cache.get("nodes")
    if not isinstance(nodes, Nodes):
        nodes = group.cache["nodes"] = Nodes.named(group.node_of)
    return nodes


def network_of(group: Group) -> Network:
    """What prices are made of, the same on every member."""
    return Network(link=group.grid.link)


def _words(cut: ExpertCut, n_nodes: int) -> int:
    """How many numbers everybody is told: pairs for every owner, or over several nodes for every expert; then rows for
    every node, in either way."""
    return cut.n_experts + 2 * n_nodes if n_nodes > 1 else cut.n_ranks


def pairs_bytes(n_pairs: int, n_words: int, sums: Any) -> int:
    """Bytes of the messages that carry `n_pairs` pairs to one of the owners, behind numbers that everybody is told."""
    item = pair_type(sums).itemsize
    return 8 * n_words + _FIRST_PAIRS_BYTES + max(0, n_pairs - _FIRST_PAIRS_BYTES // item) * item


def exchange_pairs(mail: Mailbox, outgoing: Outgoing, words: Array, mine_of: slice) -> tuple[list[Array], Array]:
    """The pairs that every member has for this one's experts, and the words of every member, (members, n).

    The sum of the words `mine_of` is how many pairs there are for this member.
    """
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
        count = int(everyone[source, mine_of].sum())
        received[source] = np.empty(count, dtype)
        head = received[source][:fits]
        head.view(np.uint8)[:] = first[words_bytes : words_bytes + head.nbytes]
        mail.release(firsts[source])
        if count > fits:
            rests.append(mail.receive((count - fits,), dtype, source, TAGS["B"], target=received[source][fits:]))
    mail.wait(rests)
    return received, everyone


def plan_dispatch(
    mail: Mailbox,
    routing: Routing,
    x: Array,
    n_tokens: Sequence[int],
    wire: str,
    sums: Any,
    may_copy: ExpertSizes | None = None,
) -> DispatchPlan:
    """Tell every owner which pairs are its own. Collective over the mailbox's group.

    `mail` and `routing` are those of the host, wherever the tokens `x` are. `may_copy` has the sizes of a layer
    whose experts may be copied.
    """
    group, on_device = mail.group, library_of(x) is not np
    nodes, mine = nodes_of(group), group.index
    cut = cut_experts(routing.n_experts, group.size)
    outgoing = Outgoing(routing.experts, np.asarray(routing.weights, sums), cut, mine)

    def planned(pairs: list[Array], loads: Array, **more: Any) -> DispatchPlan:
        out, copies = more.pop("outgoing", outgoing), more.get("copies")
        return DispatchPlan(
            group, cut, out, Incoming(pairs, cut, mine, copies), tuple(n_tokens), tuple(loads.tolist()), x.shape[1],
            tuple(routing.experts.shape), x.dtype, wire, on_device, **more,
        )  # fmt: skip

    if nodes.count == 1:
        words = np.array(outgoing.n_told, np.int64)
        pairs, counts = exchange_pairs(mail, outgoing, words, slice(mine, mine + 1))
        return planned(pairs, counts.sum(axis=0))
    through = outgoing.through_gateways(nodes)
    crossing = [sum(len(v.rows[rank]) for rank in ranks) for v in (outgoing, through) for ranks in nodes.members]
    by_expert = np.bincount(outgoing.pairs["expert"], minlength=cut.n_experts)
    words = np.array([*by_expert, *crossing], np.int64)
    pairs, everyone = exchange_pairs(mail, through, words, slice(*cut.of(mine)))
    by_expert, per_rank, per_node = np.split(everyone, [cut.n_experts, cut.n_experts + nodes.count], axis=1)
    counts = np.add.reduceat(np.pad(by_expert, ((0, 0), (0, 1))), cut.borders[:-1], axis=1)
    counts[:, np.diff(cut.borders) == 0] = 0
    for ranks, node in zip(nodes.members, range(nodes.count), strict=True):
        per_rank[ranks, node] = per_node[ranks, node] = 0  # what stays on the node crosses to none
    network = network_of(group)
    there, back = (x.shape[1] * dtype.itemsize for dtype in (wire_types(x.dtype, wire)))
    in_place = group.grid.shared is not None and not on_device
    ways = tuple(row_ways(nodes, per_rank, per_node, there, back, network, in_place=in_place))
    once_per_node = cheapest(ways).name == PER_NODE
    leading = through if once_per_node else outgoing
    copies, hot = None, None
    if may_copy is not None and may_pay(by_expert, cut, may_copy, network):
        copies, hot = _copies(mail, leading, verdict(by_expert, cut, nodes, may_copy, network), nodes, may_copy)
    if copies is not None:
        leading = leading.with_copies(copies)
        pairs[mine] = leading.pairs[leading.of_owner[mine]]
    plan = planned(pairs, counts.sum(axis=0), outgoing=leading, ways=ways, copies=copies, hot=hot)
    if not once_per_node:
        return plan
    relay = Relay(nodes, plan.incoming, per_node)
    relay.hear(_exchange_needs(mail, relay, counts))
    return replace(plan, relay=relay)


def _copies(
    mail: Mailbox, outgoing: Outgoing, found: Verdict, nodes: Nodes, sizes: ExpertSizes
) -> tuple[Copies | None, Verdict | None]:
    """The copies that pay, when every rank has said what crosses more or less for them."""
    if not found.taken:
        return None, None
    copies, group = Copies(outgoing.cut, nodes, sizes, found.taken), mail.group
    words = crossing_change(outgoing, outgoing.with_copies(copies), nodes)
    everyone = np.empty((group.size, *words.shape), np.int64)
    everyone[group.index] = words
    peers = [(group.index + step) % group.size for step in range(1, group.size)]
    receipts = {peer: mail.receive(words.shape, np.int64, peer, TAGS["A"]) for peer in peers[::-1]}
    for peer in peers:
        mail.send(words, peer, TAGS["A"], 0)
    mail.wait(list(receipts.values()))
    for peer, receipt in receipts.items():
        everyone[peer] = receipt.array
        mail.release(receipt)
    found = found.with_crossing(nodes, sizes, everyone[:, 0], everyone[:, 1])
    return copies if found.taken else None, found


def wire_types(dtype: Any, wire: str) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Of rows on their way to the owners, and of sums on their way home."""
    return (_BF16, _BF16) if wire == "bfloat16" else (dtype, sum_type(dtype))


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
