"""NumPy and mpi4py: rows sorted by expert, `Alltoallv` there and back, one expert at a time; forward only."""

from __future__ import annotations

from typing import Any

import numpy as np
from moe_peer import MoePeer
from mpi4py import MPI
from worker import serve, span


class Numpy(MoePeer):
    def __init__(self) -> None:
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size

    def barrier(self) -> None:
        self.comm.Barrier()

    def prepare(self, case: dict[str, Any]) -> str | None:
        if case["backward"]:
            return "forward only"
        if case["dtype"] not in ("float32", "float64"):
            return f"NumPy has no fast product of {case['dtype']}"
        inputs, self.router, self.weights = self.take(case)
        self.x = inputs["x"]
        self.edges = [span(case["experts"], self.size, rank)[0] for rank in range(self.size)]
        return None

    def _exchanged(self, rows: Any, sent: Any, received: Any) -> Any:
        out = np.empty((int(received.sum()), *rows.shape[1:]), rows.dtype)
        width = rows[:1].size if len(rows) else out[:1].size
        self.comm.Alltoallv([rows, sent * width], [out, received * width])
        return out

    def run(self) -> None:
        k, n_experts = self.case["top_k"], self.case["experts"]
        values = self.x @ self.router
        risen = np.exp(values - values.max(axis=1, keepdims=True))
        scores = risen / risen.sum(axis=1, keepdims=True)
        experts = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        weights = np.take_along_axis(scores, experts, axis=1)
        weights /= weights.sum(axis=1, keepdims=True)

        order = np.argsort(experts.ravel(), kind="stable")
        token = order // k
        counts = np.bincount(experts.ravel(), minlength=n_experts)
        theirs = np.empty((self.size, len(self.experts)), counts.dtype)
        lengths = np.diff([*self.edges, n_experts])
        self.comm.Alltoallv([counts, lengths], [theirs, np.full(self.size, len(self.experts))])
        sent = np.add.reduceat(counts, self.edges)
        received = theirs.sum(axis=1)
        rows = self._exchanged(self.x[token], sent, received)

        local = np.repeat(np.tile(np.arange(len(self.experts)), self.size), theirs.ravel())
        by_expert = np.argsort(local, kind="stable")
        rows, made, end = rows[by_expert], np.empty_like(rows), 0
        gate, up, down = self.weights
        with self.products():
            for expert, count in enumerate(theirs.sum(axis=0)):
                begin, end = end, end + count
                part = rows[begin:end]
                z = part @ gate[expert]
                made[by_expert[begin:end]] = (z / (1 + np.exp(-z)) * (part @ up[expert])) @ down[expert]
        back = self._exchanged(made, received, sent)
        self.y = np.zeros_like(self.x)
        np.add.at(self.y, token, back * weights.ravel()[order, None])

    def outcome(self) -> dict[str, Any]:
        return {"y": self.y}


if __name__ == "__main__":
    serve(Numpy())
