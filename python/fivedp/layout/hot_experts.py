"""Whether an expert that very many tokens chose should be computed on a second node as well.

Over nodes every rank computes the rows of its own experts, so all wait for the busiest. Another node can take rows from
it, those of its own tokens, if it has the expert's weights: they cross the link once and lie where all ranks of the
node read them. A rank takes rows of its own tokens only, and none by which it would be busier than the owner is left.
A row's results do not depend on who makes them, so neither do the bits.

The backward is another matter. The gradient of the weights is one sum over an expert's rows, in their order, so its
owner makes all of it, half of the backward's operations; for the rows made elsewhere it is sent x, dy and the arrays of
width F that enter the sum. The weights travel once more, for nothing of them is kept. A forward that is to have a
backward is priced with it.

Each copy is priced by its weights, by what the backward sends for its rows, and by its messages. What it changes beside
that, the counts by expert don't show: a row that is made at home need not cross, if its token has no other expert
there, but it may cut one sum of the owner's into several, on every way home. So where copies pay, every rank counts
what would cross of its own tokens, and with these numbers the busiest link is priced once more
(`Verdict.with_crossing`): rows, sums and weights between nodes are what is said, to the byte. The numbers of pairs, one
each, and the messages of the choice itself are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fivedp.layout.experts import BALANCED, ExpertCut
from fivedp.layout.nodes import Counts, Network, Nodes

# Of one copy, in `Network.hop`: messages to a node and inside it, there and back, and the time in which it is chosen.
_HOPS = 10


@dataclass(frozen=True)
class ExpertSizes:
    """A layer, as far as copies of its experts are concerned; the same on every rank.

    Attributes
    ----------
    width, hidden : int
        H and F.
    matrices : int
        Of an expert: 3 where it is gated, else 2.
    itemsize : int
        Bytes of an element of the weights.
    there, back : int
        Bytes of an element of a row on its way to an owner, and of a sum on its way home.
    backward : bool
        Whether a backward follows.
    """

    width: int
    hidden: int
    matrices: int
    itemsize: int
    there: int
    back: int
    backward: bool = False

    @property
    def operations(self) -> int:
        """Of one row: a product takes 2 H F forward, 4 H F backward."""
        return (6 if self.backward else 2) * self.matrices * self.width * self.hidden

    @property
    def movable(self) -> float:
        """The share of them that another rank can make: all but the gradients of the weights."""
        return 4 / 6 if self.backward else 1.0

    @property
    def weights(self) -> int:
        """Bytes of an expert's weights."""
        return self.matrices * self.width * self.hidden * self.itemsize

    @property
    def kept(self) -> int:
        """Bytes that the backward sends the owner for a row made elsewhere: of x and dy, and of the products."""
        return 2 * self.width * self.there + self.matrices * self.hidden * self.itemsize


@dataclass(frozen=True)
class Replica:
    """An expert of which the ranks of another node compute rows of their own tokens.

    Attributes
    ----------
    expert : int
    owner : int
        The rank that has it.
    helper : int
        The node that gets a copy.
    at_home : tuple of (int, int)
        The helper's ranks that take any, and how many rows.
    saved, cost : float
        Seconds: by which the owner is done earlier, and of what travels for it, with its messages.
    """

    expert: int
    owner: int
    helper: int
    at_home: tuple[tuple[int, int], ...]
    saved: float
    cost: float

    @property
    def rows(self) -> int:
        """That the helper takes."""
        return sum(n for _, n in self.at_home)

    @property
    def pays(self) -> bool:
        """Whether it saves more than it costs."""
        return self.saved > self.cost


@dataclass(frozen=True)
class Verdict:
    """What copies bring, one after another and together.

    Attributes
    ----------
    tried : list of Replica
        The last one may not pay: the best that was left.
    saved : float
        Seconds by which the busiest rank is done earlier, of those that pay.
    links : (2, N) int64
        By how many bytes what every node sends, and what it receives, is changed.
    network : Network
    """

    tried: list[Replica]
    saved: float
    links: Counts
    network: Network

    @property
    def cost(self) -> float:
        """Seconds of the busiest link, and of messages."""
        n_copies = sum(replica.pays for replica in self.tried)
        return max(0, int(self.links.max(initial=0))) / self.network.link + n_copies * _HOPS * self.network.hop

    @property
    def taken(self) -> list[Replica]:
        """The copies that are made: those that pay, where they do so together."""
        return [replica for replica in self.tried if replica.pays] if self.saved > self.cost else []

    def with_crossing(self, nodes: Nodes, sizes: ExpertSizes, rows: Counts, sums: Counts) -> Verdict:
        """The same with what crosses more or less, (P, N) each: of every rank's rows to every node, of sums from it."""
        # The backward has rows of x and of dy, and sums of its own.
        there = rows * sizes.width * sizes.there * (3 if sizes.backward else 1)
        back = sums * sizes.width * sizes.back * (2 if sizes.backward else 1)
        links = self.links.copy()
        for node, members in enumerate(nodes.members):
            links[0, node] += there[members].sum() + back[:, node].sum()
            links[1, node] += there[:, node].sum() + back[members].sum()
        return replace(self, links=links)


def rank_loads(counts: Counts, cut: ExpertCut) -> npt.NDArray[np.float64]:
    """(P,): the rows of every rank's experts."""
    return np.bincount(cut.owner, weights=counts.sum(axis=0), minlength=cut.n_ranks).astype(np.float64)


def may_pay(counts: Counts, cut: ExpertCut, sizes: ExpertSizes, network: Network) -> bool:
    """Whether the weights of one expert take less than the busiest rank could be relieved of: a look before `verdict`.

    Where this says no, no copy pays.
    """
    loads = rank_loads(counts, cut)
    most, least = float(loads.max(initial=0.0)), float(loads.min(initial=0.0))
    uneven = most > BALANCED * float(loads.mean())
    return (
        uneven
        and (most - least) * sizes.operations / network.flops > sizes.weights / network.link + _HOPS * network.hop
    )


def verdict(counts: Counts, cut: ExpertCut, nodes: Nodes, sizes: ExpertSizes, network: Network) -> Verdict:
    """Which experts the busiest ranks should give rows of to other nodes, one after another as long as it pays.

    Parameters
    ----------
    counts : (P, E) int64
        Pairs of every rank's tokens with every expert.
    cut : ExpertCut
    nodes : Nodes
    sizes : ExpertSizes
    network : Network
    """
    loads = rank_loads(counts, cut)
    before, per_row, share = loads.max(initial=0.0), sizes.operations / network.flops, sizes.movable
    left = counts.copy()  # of every rank and expert, what can still be taken
    node_of = np.array(nodes.of)
    tried: list[Replica] = []
    links = np.zeros((2, nodes.count), np.int64)
    while True:
        busy = int(loads.argmax())
        if loads[busy] <= BALANCED * loads.mean():
            break
        begin, end = cut.of(busy)
        room = np.where(node_of != node_of[busy], (loads[busy] - loads) / (2 * share), 0)
        most = np.minimum(left[:, begin:end], room[:, None])
        gain = np.array([most[members].sum(axis=0) for members in nodes.members])
        if gain.max(initial=0.0) < 1:  # also where it has no experts, and is busy with copies
            break
        node, place = np.unravel_index(int(gain.argmax()), gain.shape)
        expert, members = begin + int(place), nodes.members[node]
        wanted = left[members, expert]
        level = _level(float(loads[busy]), loads[members].tolist(), (share * wanted).tolist())
        n = np.minimum(wanted, np.maximum(0, (level - loads[members]) / share)).astype(np.int64)
        # The weights go to the copy, and once more in the backward; then rows go to the owner.
        out, back = (2 * sizes.weights, int(n.sum()) * sizes.kept) if sizes.backward else (sizes.weights, 0)
        at_home = tuple((rank, k) for rank, k in zip(members, n.tolist(), strict=True) if k)
        saved = share * int(n.sum()) * per_row
        tried.append(
            Replica(expert, busy, int(node), at_home, saved, (out + back) / network.link + _HOPS * network.hop)
        )
        if not tried[-1].pays:
            break
        left[members, expert] = 0
        loads[members] += share * n
        loads[busy] -= share * n.sum()
        for sender, receiver, size in ((node_of[busy], node, out), (node, node_of[busy], back)):
            links[0, sender] += size
            links[1, receiver] += size
    return Verdict(tried, float(before - loads.max(initial=0.0)) * per_row, links, network)


def _level(busy: float, others: Sequence[float], most: Sequence[float]) -> float:
    """The load that is left when a busy rank gives to others what brings none of them above it."""
    low, high = 0.0, busy
    for _ in range(40):
        level = (low + high) / 2
        given = sum(min(m, max(0.0, level - load)) for load, m in zip(others, most, strict=True))
        if busy - given > level:
            low = level
        else:
            high = level
    return low
