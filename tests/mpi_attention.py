"""Whole attentions for the tests under mpirun: every rank draws the same q, k, v, and one rank judges all results.

The judge knows nothing of fivedp's placement of tokens: where they are under each layout, and which document and
position they have, is written down here a second time, in other words. Its bound is that of `attention_operands`:
twice the error of a plain computation in the same type on one rank, whatever the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
from mpi4py import MPI

import attention_operands
import fivedp
from fivedp.kernels.attention import Mask
from fivedp.reference import attention_reference

Array = Any
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float64), BFLOAT16)
LAYOUTS = ("zigzag", "striped", "contiguous")
Way = tuple[Callable[..., Any], Callable[..., Any]]
RING: Way = (fivedp.ring_attention, fivedp.ring_attention_backward)
ULYSSES: Way = (fivedp.ulysses_attention, fivedp.ulysses_attention_backward)
RESULTS = ("o", "lse", "dq", "dk", "dv")


def over(mesh: fivedp.Mesh, **axes: str) -> Way:
    """The hybrid on a mesh, called as the ring is called on a communicator."""

    def forward(q: Any, k: Any, v: Any, comm: Any, **keywords: Any) -> Any:
        return fivedp.hybrid_attention(q, k, v, mesh, **axes, **keywords)

    def backward(do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, comm: Any, **keywords: Any) -> Any:
        return fivedp.hybrid_attention_backward(do, q, k, v, o, lse, mesh, **axes, **keywords)

    return forward, backward


def shares(layout: str, length: int, ranks: int) -> list[Array]:
    """The tokens of every rank, as the contract describes the layout."""
    if layout == "striped":
        return [np.arange(length)[rank::ranks] for rank in range(ranks)]
    blocks = np.array_split(np.arange(length), 2 * ranks if layout == "zigzag" else ranks)
    return [np.concatenate([blocks[r], blocks[-1 - r]]) if layout == "zigzag" else blocks[r] for r in range(ranks)]


def placed(length: int, offsets: Any = None) -> tuple[Array, Array]:
    """(position, document) of every token of a sequence, or of the packed documents that begin at `offsets`."""
    lengths = np.diff([0, length] if offsets is None else offsets)
    positions = [np.arange(n) for n in lengths]
    return (
        np.concatenate([np.arange(0), *positions]).astype(np.int32),
        np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
    )


@contextmanager
def dirty_memory() -> Iterator[None]:
    """Fresh arrays of NumPy hold NaN in this block: what is never written shows."""

    def dirty(make: Callable[..., Array]) -> Callable[..., Array]:
        def made(*arguments: Any, **keywords: Any) -> Array:
            x = make(*arguments, **keywords)
            if x.flags.c_contiguous and x.dtype != object:
                x.reshape(-1).view(np.uint8)[...] = 0xFF
            return x

        return made

    with mock.patch.object(np, "empty", dirty(np.empty)), mock.patch.object(np, "empty_like", dirty(np.empty_like)):
        yield


@dataclass
class Case:
    """One attention: whole arrays with a batch, keywords, and where every rank's tokens are.

    `queries` and `keys` are the tokens of every rank where they are placed with `positions` (of which every token has
    one); else the layout places them.
    """

    q: Array
    k: Array
    v: Array
    do: Array
    dlse: Array
    keywords: dict[str, Any] = field(default_factory=dict)
    positions: Array | None = None
    queries: list[Array] | None = None
    kv_positions: Array | None = None
    keys: list[Array] | None = None

    @property
    def packed(self) -> bool:
        return "cu_seqlens" in self.keywords

    def mask(self) -> Mask:
        """The mask of the whole."""
        k = self.keywords
        offsets = k.get("cu_seqlens")
        q_position, q_document = placed(self.q.shape[1], offsets)
        k_position, k_document = placed(self.k.shape[1], k.get("cu_seqlens_k", offsets))
        if self.positions is not None:
            q_position = self.positions
        if self.kv_positions is not None:
            k_position = self.kv_positions
        return Mask(
            q_position, k_position, q_document, k_document,
            scale=self.q.shape[-1] ** -0.5 if k.get("scale") is None else k["scale"],
            causal=k.get("causal", False), window=k.get("window") or 0,
            softcap=k.get("softcap") or 0.0, slopes=k.get("alibi_slopes"),
        )  # fmt: skip

    def tokens(self, ranks: int) -> tuple[list[Array], list[Array]]:
        """The queries and the keys of every rank."""
        layout = self.keywords.get("layout", "zigzag")
        queries = self.queries or shares(layout, self.q.shape[1], ranks)
        # One set of positions is for both.
        return queries, self.keys or self.queries or shares(layout, self.k.shape[1], ranks)

    def arguments(self, comm: MPI.Intracomm) -> tuple[list[Array], Array, dict[str, Any]]:
        """This rank's q, k, v and do; its dlse; all keywords."""
        queries, keys = (tokens[comm.rank] for tokens in self.tokens(comm.size))
        local = [self.q[:, queries], self.k[:, keys], self.v[:, keys], self.do[:, queries]]
        dlse, keywords = self.dlse[..., queries], dict(self.keywords)
        if self.positions is not None:
            keywords["positions"] = self.positions[queries]
        if self.kv_positions is not None and self.kv_positions is not self.positions:
            keywords["kv_positions"] = self.kv_positions[keys]
        if self.packed:
            local, dlse = [x[0] for x in local], dlse[0]
        return local, dlse, keywords

    def run(self, comm: MPI.Intracomm, way: Way = RING, **more: Any) -> list[Array]:
        """o, lse, dq, dk, dv: this rank's."""
        (q, k, v, do), dlse, keywords = self.arguments(comm)
        keywords |= more
        with dirty_memory():
            o, lse = way[0](q, k, v, comm, **keywords)
            return [o, lse, *way[1](do, q, k, v, o, lse, comm, dlse=dlse, **keywords)]

    def alone(self, way: Way = RING, **more: Any) -> list[Array]:
        """The whole results, computed by this rank alone."""
        whole = Case(self.q, self.k, self.v, self.do, self.dlse, self.keywords | {"layout": "contiguous"})
        whole.positions, whole.kv_positions = self.positions, self.kv_positions
        results = whole.run(MPI.COMM_SELF, way, **more)
        return [x[None] for x in results] if self.packed else results

    def joined(self, parts: list[list[Array]]) -> list[Array]:
        """o, lse, dq, dk, dv whole, from those of every rank."""
        queries, keys = self.tokens(len(parts))
        whole = []
        for number, x in enumerate((self.do, self.dlse, self.q, self.k, self.v)):
            like = parts[0][number]
            result = np.empty(x.shape, like.dtype)
            for rank, part in enumerate(parts):
                mine = keys[rank] if number > 2 else queries[rank]
                index = (..., mine) if number == 1 else (slice(None), mine)
                share = part[number][None] if self.packed else part[number]
                assert share.shape == result[index].shape, (RESULTS[number], rank)
                result[index] = share
            whole.append(result)
        return whole

    def exact(self) -> list[Array]:
        """o, lse, dq, dk, dv in float64."""
        o, lse, _ = attention_reference.attention(self.q, self.k, self.v, self.mask())
        backward = attention_reference.attention_backward
        return [o, lse, *backward(self.do, self.q, self.k, self.v, self.mask(), self.dlse)]

    def operands(self) -> attention_operands.Case:
        """As the tests of the kernel have them."""
        return attention_operands.Case(self.q, self.k, self.v, self.do, self.mask())


def collected(mine: Any, comm: MPI.Intracomm, root: int = 0) -> list[Any] | None:
    """Everybody's object on one rank, None on the others.

    As `comm.gather`, but the wait sleeps: where ranks outnumber the cores, one that spins keeps another from coming.
    """
    if comm.rank != root:
        request = comm.isend(mine, root)
        while not request.test()[0]:
            time.sleep(2e-4)
        return None
    everything = []
    for source in range(comm.size):
        while source != root and not comm.iprobe(source):
            time.sleep(2e-4)
        everything.append(mine if source == root else comm.recv(source=source))
    return everything


def judge(case: Case, results: list[Array], comm: MPI.Intracomm) -> None:
    """Hold the results of all ranks against float64, on rank 0."""
    parts = collected(results, comm)
    if parts is not None:
        check(case, case.joined(parts), comm.size)


def check(case: Case, whole: list[Array], ranks: int, rows: Array | None = None, keys: Array | None = None) -> None:
    """Hold whole results against float64; `rows` and `keys` choose the queries and keys that are judged."""
    # A gradient that comes from several ranks is one more sum for each.
    attention_operands.check_step(case.operands(), whole, case.dlse, rows, keys, roundings=ranks - 1)
