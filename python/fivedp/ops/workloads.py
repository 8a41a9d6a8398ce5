"""Routings that no router made: generated to a shape, forced into balance, and the load that a routing is.

A generated choice depends on the seed and the number of the token in the batch alone, so any mesh sees the same batch:
a rank asks for its part with `first_token`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from fivedp.comm.mesh import Mesh
from fivedp.errors import LayoutError, ShapeError
from fivedp.kernels.routing import Integers
from fivedp.layout.shares import border
from fivedp.ops.batch_ranks import BatchRanks
from fivedp.ops.routing import Routing, with_experts

Array = Any
Words = npt.NDArray[np.uint64]
_GOLDEN = 0x9E3779B97F4A7C15
WORKLOADS = ("uniform", "zipf", "one_expert", "half_idle", "balanced")


def routing_workload(
    kind: str, tokens: int, experts: int, top_k: int, seed: int, *, exponent: float = 1.1, first_token: int = 0
) -> Routing:
    """A routing with a given load.

    Parameters
    ----------
    kind : {"uniform", "zipf", "one_expert", "half_idle", "balanced"}
        Experts are drawn without repetition, with the same chance, or with chances 1 / (e + 1)^exponent; every token
        goes to experts 0 .. top_k - 1; only experts of even number get tokens; all experts get the same number.
    tokens : int
        Of this rank.
    experts, top_k : int
    seed : int
    exponent : float
    first_token : int
        The number of this rank's first token in the batch.

    Returns
    -------
    Routing
        Without losses and gradient; a token's weights are random and add up to 1. float32.

    Raises
    ------
    LayoutError, ShapeError
        An unknown kind, or numbers that won't do.
    """
    if kind not in WORKLOADS:
        raise LayoutError(f"routing_workload: kind is {kind!r}; expected one of {', '.join(WORKLOADS)}")
    available = (experts + 1) // 2 if kind == "half_idle" else experts
    if tokens < 0 or not 1 <= top_k <= available:
        raise ShapeError(
            f"routing_workload: {tokens} tokens choose {top_k} of {available} experts; expected 0 or more tokens and "
            "1 or more experts, no more than there are"
        )
    numbers = first_token + np.arange(tokens, dtype=np.int64)
    slots = np.arange(top_k)
    if kind == "balanced":
        chosen = (numbers[:, None] * top_k + slots) % experts
    elif kind == "one_expert":
        chosen = np.broadcast_to(slots, (tokens, top_k))
    else:
        # Exponential waiting times: the first k to arrive are a draw without repetition.
        waits = -np.log(_uniform(seed, numbers, available))
        if kind == "zipf":
            waits *= np.arange(1, experts + 1) ** float(exponent)
        chosen = np.argsort(waits, axis=1, kind="stable")[:, :top_k] * (2 if kind == "half_idle" else 1)
    weights = _uniform(seed + 1, numbers, top_k)
    return _routing(chosen, weights / weights.sum(1, keepdims=True), experts, first_token)


def balanced(routing: Routing) -> Routing:
    """The routing with experts dealt out in turn to the tokens of the batch, and the weights as they were.

    For measuring what imbalance costs. Empty slots stay empty.
    """
    tokens, top_k = routing.experts.shape
    numbers = routing.first_token + np.arange(tokens, dtype=np.int64)
    experts = (numbers[:, None] * top_k + np.arange(top_k)) % routing.n_experts
    return with_experts(routing, np.where(routing.on_host().experts >= 0, experts, -1).astype(np.int32))


@dataclass(frozen=True, eq=False)
class LoadReport:
    """Pairs per expert and per rank.

    Attributes
    ----------
    experts : int64 (E,)
        Pairs of every expert, of the whole batch.
    ranks : int64 (P,)
        Pairs of the experts of every rank.
    expert_ratio, rank_ratio : float
        The largest divided by the mean; 1 where there are no pairs.
    """

    experts: Integers
    ranks: Integers
    expert_ratio: float
    rank_ratio: float

    def __str__(self) -> str:
        lines = [
            f"{self.experts.sum()} pairs, {np.count_nonzero(self.experts == 0)} of {len(self.experts)} experts idle"
        ]
        for name, loads, ratio in (("expert", self.experts, self.expert_ratio), ("rank", self.ranks, self.rank_ratio)):
            lines.append(
                f"  per {name:6}  mean {loads.mean():10.1f}  least {loads.min():8d}  most {loads.max():8d} "
                f"({name} {loads.argmax()})  most / mean {ratio:.2f}"
            )
        return "\n".join(lines)


def load_report(routing: Routing, comm: Mesh | MPI.Intracomm | None = None, *, ranks: int | None = None) -> LoadReport:
    """How evenly a routing loads experts and ranks.

    Parameters
    ----------
    routing : Routing
    comm : Mesh or MPI.Intracomm, optional
        Counts are summed over its ranks.
    ranks : int, optional
        Over how many ranks the experts are cut, by the block rule; those of `comm` where it is None.

    Notes
    -----
    Collective over `comm`.
    """
    error = None
    if ranks is not None and ranks < 1:
        error = LayoutError(f"load_report: ranks is {ranks}; expected 1 or more")
    batch = BatchRanks("load_report", comm, {"counts": routing.counts}, f"ranks={ranks}", error)
    experts: Integers = batch.gather(routing.counts).sum(0)
    parts = ranks or batch.size
    borders = [border(len(experts), parts, part) for part in range(parts + 1)]
    of_rank = np.diff(np.concatenate([[0], np.cumsum(experts)])[borders])
    return LoadReport(experts, of_rank, _ratio(experts), _ratio(of_rank))


def _ratio(loads: Integers) -> float:
    return float(loads.max() * len(loads) / loads.sum()) if loads.sum() else 1.0


def _routing(chosen: Any, weights: Array, n_experts: int, first_token: int) -> Routing:
    experts = np.ascontiguousarray(chosen, np.int32)
    counts = np.bincount(experts.reshape(-1), minlength=n_experts).astype(np.int64, copy=False)
    return Routing(experts, weights.astype(np.float32), counts, 0.0, 0.0, np.int64(0), n_experts, first_token)


def _uniform(seed: int, numbers: Integers, columns: int) -> npt.NDArray[np.float64]:
    """Numbers between 0 and 1, a hash of (seed, token, column) each (splitmix64, Steele et al. 2014)."""
    places: Words = np.arange(columns, dtype=np.uint64)
    start = np.uint64((seed + 1) * _GOLDEN % 2**64)
    words = _mix(_mix(np.uint64(2**20) * numbers.astype(np.uint64)[:, None] + places + start) ^ start)
    return np.asarray(((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53)


def _mix(x: Words) -> Words:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
