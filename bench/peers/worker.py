"""One rank of a program that is compared: it waits asleep, and times its work when told to.

Every rank of every program connects to one Unix socket and blocks in `recv`, so a program that is not measured takes no
core, whatever its MPI does while waiting. The protocol is one JSON object a line:

    {"do": "prepare", "case": {...}}   make the inputs, run once          -> {"ok": true} or {"missing": why}
    {"do": "time", "repeats": n}       n runs, a barrier before each      -> {"seconds": [...]} of this rank
    {"do": "check", ...}               what the driver's check needs of this rank's part of the result
    {"do": "quit"}

A case is that of the driver's work (`products.py`, `attentions.py`, `mixtures.py`) with "seed", "way" and "keywords";
`way` names a layout in the program's own terms.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
import time
import traceback
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

SOCKET, NAME = "FIVEDP_BENCH_SOCKET", "FIVEDP_BENCH_WORKER"


def load(name: str) -> ModuleType:
    """A module of fivedp's benchmark, taken by file: a peer's environment need not hold fivedp."""
    file = Path(__file__).resolve().parents[2] / "python" / "fivedp" / "bench" / f"{name}.py"
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


operands = load("operands")


def span(size: int, parts: int, part: int) -> tuple[int, int]:
    """Start and stop of block `part`, cut as `numpy.array_split` cuts."""
    base, longer = divmod(size, parts)
    start = part * base + min(part, longer)
    return start, start + base + (part < longer)


def inputs(case: dict[str, Any], rows_a: tuple[int, int], columns_a: tuple[int, int],
           rows_b: tuple[int, int], columns_b: tuple[int, int]) -> tuple[Any, Any]:  # fmt: skip
    """The given blocks of A and B as NumPy arrays."""
    dtype = operands.dtype_of(case["dtype"])
    a = operands.block(case["seed"], range(*rows_a), range(*columns_a), dtype)
    b = operands.block(case["seed"] + 1, range(*rows_b), range(*columns_b), dtype)
    return a, b


def signs(seed: int, n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The vector of Freivalds' check; the same in the driver and in every worker."""
    return np.random.default_rng([seed, 7]).integers(0, 2, n) * 2.0 - 1.0


class Peer(ABC):
    """A program that is compared; `rank` and `size` are set before `serve`."""

    rank, size = 0, 1
    excluded = 0.0  # seconds of the runs so far that are not to count

    @abstractmethod
    def prepare(self, case: dict[str, Any]) -> str | None:
        """Make the inputs of `case`; a text says why this program cannot run it."""

    @abstractmethod
    def run(self) -> None:
        """The work once."""

    def barrier(self) -> None:  # noqa: B027
        """Wait for the other ranks; nothing in a single process."""

    @abstractmethod
    def check(self, order: dict[str, Any]) -> dict[str, Any]:
        """What the driver's work asks for of this rank's part of the result."""

    def facts(self) -> dict[str, Any]:
        """What is used: versions, BLAS core, threads."""
        import threadpoolctl

        return {"blas": [{k: i.get(k) for k in ("internal_api", "version", "architecture", "num_threads")}
                         for i in threadpoolctl.threadpool_info()]}  # fmt: skip


class ProductPeer(Peer):
    """A program that computes C = A B."""

    @abstractmethod
    def result(self) -> tuple[Any, Any, Any] | None:
        """This rank's part of C with its global rows and columns, each (start, stop) or an array of indices.

        None where another rank holds the same part.
        """

    def check(self, order: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of C times signs: {"rows": [...], "values": [...]}."""
        part = self.result()
        if part is None:
            return {"rows": [], "values": []}
        c, rows, columns = part
        rows, columns = (np.arange(*i) if isinstance(i, tuple) else i for i in (rows, columns))
        x = signs(order["seed"], order["n"])[columns]
        c = np.asarray(c)
        values = np.concatenate([c[i : i + 512].astype(np.float64) @ x for i in range(0, len(c), 512)] or [np.zeros(0)])
        return {"rows": rows.tolist(), "values": values.tolist()}


def _answer(peer: Peer, order: dict[str, Any]) -> dict[str, Any]:
    if order["do"] == "prepare":
        why = peer.prepare(order["case"])
        if why:
            return {"missing": why}
        peer.barrier()
        peer.run()
        return {"ok": True}
    if order["do"] == "facts":
        return peer.facts()
    if order["do"] == "time":
        seconds, inner = [], int(order.get("inner", 1))
        for _ in range(order["repeats"]):
            peer.barrier()
            start, excluded = time.perf_counter(), peer.excluded
            for _ in range(inner):
                peer.run()
            seconds.append((time.perf_counter() - start - (peer.excluded - excluded)) / inner)
        return {"seconds": seconds}
    if order["do"] == "check":
        return peer.check(order)
    raise ValueError(f"unknown order {order['do']!r}")


def serve(peer: Peer) -> None:
    """Answer the driver until it says quit or goes away."""
    link = socket.socket(socket.AF_UNIX)
    link.connect(os.environ[SOCKET])
    stream = link.makefile("rw", encoding="utf-8")

    def say(answer: dict[str, Any]) -> None:
        stream.write(json.dumps(answer) + "\n")
        stream.flush()

    say({"worker": os.environ[NAME], "rank": peer.rank, "size": peer.size})
    for line in stream:
        order = json.loads(line)
        if order["do"] == "quit":
            break
        try:
            say(_answer(peer, order))
        except Exception as error:  # the driver must hear of it: it is waiting on this socket
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {error}"})
            break
    sys.stdout.flush()
    link.close()
