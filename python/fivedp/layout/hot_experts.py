"""Whether an expert that very many tokens chose should be computed on a second node as well.

Inside a node the ranks share the rows of a busy owner. Another node can take some of them too, a range of them, if it
has the expert's weights: 3 H F elements over the link, against the time by which the busiest node is relieved. A row's
results do not depend on who makes them, so neither do the bits.

The backward is another matter. The gradient of the weights is one sum over an expert's rows, in their order, so its
owner makes all of it, half of the backward's operations; for the rows of a helper it needs x, dy and the three arrays
of width F that the helper has made. Forward and backward are therefore decided apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fivedp.layout.experts import ExpertCut
from fivedp.layout.nodes import Network, Nodes

# Below this imbalance of nodes their own noise is larger.
_BALANCED = 1.1


@dataclass(frozen=True)
class Replica:
    """An expert of which another node computes some rows.

    Attributes
    ----------
    expert : int
    owner, helper : int
        Nodes.
    rows : int
        That the helper takes.
    saved, cost : float
        Seconds: by which the owner is done earlier, and of what travels for it.
    """

    expert: int
    owner: int
    helper: int
    rows: int
    saved: float
    cost: float

    @property
    def pays(self) -> bool:
        """Whether it saves more than it costs."""
        return self.saved > self.cost


def node_seconds(rows: Sequence[float], nodes: Nodes, flops_per_row: float, network: Network) -> list[float]:
    """How long every node computes its experts' rows, which its ranks share."""
    return [n * flops_per_row / (network.flops * len(members)) for n, members in zip(rows, nodes.members, strict=True)]


def replicas(
    loads: Sequence[int],
    cut: ExpertCut,
    nodes: Nodes,
    width: int,
    hidden: int,
    itemsize: int,
    network: Network,
    *,
    backward: bool = False,
) -> list[Replica]:
    """Which experts the busiest nodes should give rows of to the idlest, one after another as long as it pays.

    Gated experts, without rounding; rows cross to a helper instead of the owner, so they count on neither side of the
    forward.

    Parameters
    ----------
    loads : sequence of int
        Rows of every expert.
    cut : ExpertCut
    nodes : Nodes
        Of the owners.
    width, hidden, itemsize : int
        H, F and the bytes of an element.
    network : Network
    backward : bool
        Whether it is the backward that is priced.

    Returns
    -------
    list of Replica
        The last one may not pay: the best that was left.
    """
    weights = 3 * width * hidden * itemsize
    # What one row costs the node that has it, what of that a helper takes, and what the owner must be sent for it.
    whole = (12 if backward else 6) * width * hidden
    moved = 6 * width * hidden
    sent = (2 * width + 3 * hidden) * itemsize if backward else 0
    node_of = np.array(nodes.of)[cut.owner]
    speeds = [network.flops * len(members) for members in nodes.members]
    rows = np.bincount(node_of, weights=loads, minlength=nodes.count)
    seconds = np.array(node_seconds(rows.tolist(), nodes, whole, network))
    found: list[Replica] = []
    while True:
        busy, idle = int(seconds.argmax()), int(seconds.argmin())
        if seconds[busy] <= _BALANCED * seconds.mean():
            return found
        taken = {replica.expert for replica in found}
        candidates = [e for e in np.flatnonzero(node_of == busy).tolist() if e not in taken and loads[e]]
        if not candidates:
            return found
        expert = max(candidates, key=lambda e: loads[e])
        # So many that both nodes are done together.
        even = (seconds[busy] - seconds[idle]) / (moved / speeds[busy] + moved / speeds[idle])
        n = min(loads[expert], int(even))
        saved, cost = n * moved / speeds[busy], (weights + n * sent) / network.link
        found.append(Replica(expert, busy, idle, n, saved, cost))
        if not found[-1].pays:
            return found
        seconds[busy] -= saved
        seconds[idle] += n * moved / speeds[idle]
