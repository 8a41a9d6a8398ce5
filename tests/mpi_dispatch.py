"""Dispatch and combine, forward and backward, for the tests under mpirun: one case, its run, and its definition.

The expert between the two is the same on every mesh and has no rounding that depends on anything: it multiplies a row
by a vector of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

import fivedp
from fivedp.comm.grid import grid_of
from mpi_experts import (
    BFLOAT16,
    ULPS,
    assert_as_exact,
    assert_at_the_bound,
    collected,
    cut_tokens,
    dirty_memory,
    draw_experts,
    of_rank,
    routing_of,
    spread,
    sums,
)

Array = Any
RESULTS = ("tokens", "y", "d_expert_out", "d_weights", "dx")


@dataclass
class Case:
    """Whole arrays, and where every rank's tokens begin."""

    x: Array
    dy: Array
    experts: Array
    weights: Array
    scale: Array
    """(E, H): what each expert multiplies a row by."""
    borders: list[int]
    wire: str = "same"
    widened: bool = False
    """Whether rows come back in the type of sums."""

    def run(self, comm: MPI.Intracomm, kind: str = "plain") -> tuple[list[Array], Any, dict[str, int]]:
        """This rank's `RESULTS`, the plan, and the bytes that each call sent; `kind` is how arrays lie in memory."""
        tokens = slice(*self.borders[comm.rank : comm.rank + 2]) if comm.size > 1 else slice(None)
        routing = routing_of(self.experts[tokens], self.weights[tokens], len(self.scale))
        traffic, sent, so_far = grid_of(comm).traffic, {}, 0

        def count(name: str) -> None:
            nonlocal so_far
            sent[name], so_far = traffic.bytes_sent - so_far, traffic.bytes_sent

        with dirty_memory():
            so_far = traffic.bytes_sent
            batch = fivedp.expert_dispatch(spread(self.x[tokens], kind), routing, comm, wire=self.wire)
            count("dispatch")
            scale = np.repeat(self.scale[of_rank(len(self.scale), comm)], batch.counts, axis=0)
            out = batch.tokens * scale
            out = spread(out.astype(sums(out.dtype)) if self.widened else out, kind)
            y = fivedp.expert_combine(out, batch)
            count("combine")
            d_out, d_weights = fivedp.expert_combine_backward(spread(self.dy[tokens], kind), out, batch)
            count("combine backward")
            dx = fivedp.expert_dispatch_backward(spread(d_out * scale, kind), batch)
            count("dispatch backward")
        return [batch.tokens, y, d_out, d_weights, dx], batch.plan, sent

    def rows(self) -> tuple[Array, Array]:
        """(expert, token) of all rows over all ranks: by expert, then by token of the whole batch."""
        token, slot = np.nonzero(self.experts >= 0)
        expert = self.experts[token, slot]
        order = np.lexsort((token, expert))
        return expert[order], token[order]

    def check(self, whole: list[Array]) -> None:
        """Hold whole results against their definition in float64."""
        tokens, y, d_out, d_weights, dx = whole
        dtype, wide = self.x.dtype, np.float64
        expert, token = self.rows()
        wire = BFLOAT16 if self.wire == "bfloat16" else dtype
        assert tokens.tobytes() == self.x[token].astype(wire).astype(dtype).tobytes(), "rows, or their order"
        weight = np.zeros((len(self.x), len(self.scale)))
        there = np.nonzero(self.experts >= 0)
        weight[there[0], self.experts[there]] = self.weights[there]
        scale, dy = self.scale.astype(wide), self.dy.astype(wide)
        out = (tokens * self.scale[expert]).astype(wide)  # rounded as the expert rounds it
        right: list[Array] = [np.zeros(self.x.shape), weight[token, expert][:, None] * dy[token], None, None]
        size = [np.zeros(self.x.shape), abs(right[1]), np.zeros(self.weights.shape), np.zeros(self.x.shape)]
        np.add.at(right[0], token, weight[token, expert][:, None] * out)
        np.add.at(size[0], token, abs(weight[token, expert][:, None] * out))
        slot = np.argmax(self.experts[token] == expert[:, None], axis=1)
        right[2], right[3] = np.zeros(self.weights.shape), np.zeros(self.x.shape)
        right[2][token, slot] = (dy[token] * out).sum(axis=1)
        size[2][token, slot] = abs(dy[token] * out).sum(axis=1)
        np.add.at(right[3], token, right[1] * scale[expert])
        np.add.at(size[3], token, abs(right[1] * scale[expert]))
        # Sums are in any order. In 16 bits dy, the gradient of a row, its product, what comes home and dx are rounded.
        allowance = (ULPS + self.x.shape[1]) * np.finfo(sums(dtype)).eps
        narrow = 5.1 * 2.0**-8 if BFLOAT16 in (dtype, wire) else 0.0
        types = (dtype, dtype, sums(dtype), dtype)
        for name, found, exact, scale_of, kind in zip(
            RESULTS[1:], (y, d_out, d_weights, dx), right, size, types, strict=True
        ):
            assert found.dtype == kind, name
            # Nothing of d_weights is rounded to 16 bits but dy on a narrow wire.
            rounded = narrow if name != "d_weights" or self.wire == "bfloat16" else 0.0
            assert_as_exact(name, found, exact, exact, scale_of, allowance + rounded)

    def judge(self, comm: MPI.Intracomm, root: int = 0, kind: str = "plain") -> None:
        """Run on all ranks, and hold the whole against the definition and the bits of one rank, on rank `root`."""
        results, plan, sent = self.run(comm, kind)
        assert sent == self.bill(plan, comm.rank)
        parts = collected(results, comm, root)
        if parts is None:
            return
        whole = [np.concatenate(shares) for shares in zip(*parts, strict=True)]
        self.check(whole)
        if self.wire == "same":
            for name, a, b in zip(RESULTS, whole, self.run(MPI.COMM_SELF)[0], strict=True):
                assert a.tobytes() == b.tobytes(), f"{name} has other bits on one rank"

    def bill(self, plan: Any, rank: int) -> dict[str, int]:
        """The bytes that each call may send, from the plan."""
        bytes_of = plan.bytes_sent()
        assert_at_the_bound(plan)
        pairs = sum(len(places) for source, places in enumerate(plan.incoming.positions) if source != rank)
        return {
            "dispatch": bytes_of["pairs"] + bytes_of["rows"],
            "combine": bytes_of["returns"],
            "combine backward": bytes_of["rows"] + pairs * plan.sums.itemsize,
            "dispatch backward": bytes_of["returns"],
        }


def draw(
    rng: np.random.Generator, dtype: Any, ranks: int, *, n_tokens: int = 31, width: int = 9, n_experts: int = 8,
    k: int = 3, share: str = "uneven", empty: float = 0.2, skew: float = 0.0, **fields: Any,
) -> Case:  # fmt: skip
    x, dy = (rng.standard_normal((n_tokens, width)).astype(dtype) for _ in range(2))
    return Case(
        x, dy, draw_experts(rng, n_tokens, n_experts, k, empty=empty, skew=skew),
        rng.standard_normal((n_tokens, k)).astype(sums(dtype)),
        rng.standard_normal((n_experts, width)).astype(dtype), cut_tokens(rng, n_tokens, ranks, share), **fields,
    )  # fmt: skip
