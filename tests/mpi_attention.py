"""Whole attentions for the tests under mpirun: every rank draws the same q, k, v and judges against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from mpi4py import MPI

import fivedp
from fivedp.kernels.attention import Mask
from fivedp.layout.sequence import place
from fivedp.reference import attention_reference

Array = Any
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float64), BFLOAT16)
LAYOUTS = ("zigzag", "striped", "contiguous")
Way = tuple[Callable[..., Any], Callable[..., Any]]
RING: Way = (fivedp.ring_attention, fivedp.ring_attention_backward)


@dataclass
class Case:
    """One attention: whole arrays with a batch, and keywords."""

    q: Array
    k: Array
    v: Array
    do: Array
    dlse: Array
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        return "cu_seqlens" in self.keywords

    def mask(self) -> Mask:
        """The mask of the whole."""
        k = self.keywords
        offsets = tuple(k["cu_seqlens"]) if self.packed else None
        queries, keys = (place(np.arange(x.shape[1]), offsets) for x in (self.q, self.k))
        return Mask(
            queries.position, keys.position, queries.document, keys.document,
            scale=k.get("scale") or self.q.shape[-1] ** -0.5,
            causal=k.get("causal", False), window=k.get("window") or 0,
            softcap=k.get("softcap") or 0.0, slopes=k.get("alibi_slopes"),
        )  # fmt: skip

    def run(self, comm: MPI.Intracomm, way: Way = RING, **more: Any) -> list[Array]:
        """o, lse, dq, dk, dv, whole on every rank, from the shares of `comm`."""
        keywords = self.keywords | more
        layout = keywords.get("layout", "zigzag")

        def local(x: Array, axis: int = 1) -> Array:
            share = fivedp.sequence_shard(x, comm, axis=axis, layout=layout)
            return share[0] if self.packed else share

        q, k, v, do, dlse = (*map(local, (self.q, self.k, self.v, self.do)), local(self.dlse, 2))
        results = list(way[0](q, k, v, comm, **keywords))
        results += way[1](do, q, k, v, *results, comm, dlse=dlse, **keywords)
        whole = []
        for number, x in enumerate(results):
            x = x[None] if self.packed else x
            whole.append(fivedp.sequence_gather(x, comm, axis=2 if number == 1 else 1, layout=layout))
        return whole

    def exact(self) -> list[Array]:
        """o, lse, dq, dk, dv in float64."""
        o, lse, _ = attention_reference.attention(self.q, self.k, self.v, self.mask())
        backward = attention_reference.attention_backward
        return [o, lse, *backward(self.do, self.q, self.k, self.v, self.mask(), self.dlse)]


def draw(rng: np.random.Generator, longest: int = 130) -> Case:
    """A case with every option now and then; the same on all ranks, for they draw alike."""
    dtype = DTYPES[int(rng.integers(3))]
    batch, kv_heads, group = int(rng.integers(1, 3)), int(rng.integers(1, 3)), int(rng.integers(1, 4))
    size, v_size = int(rng.integers(1, 40)), int(rng.integers(1, 40))
    queries = int(rng.choice([0, 1, 2, 7, int(rng.integers(1, longest)), longest]))
    keys = queries if rng.random() < 0.6 else int(rng.integers(0, longest))
    keywords: dict[str, Any] = {"layout": LAYOUTS[int(rng.integers(3))], "causal": bool(rng.random() < 0.6)}
    if rng.random() < 0.35:
        batch, keys = 1, queries
        keywords["cu_seqlens"] = np.array([0, *sorted(rng.integers(0, queries + 1, 3)), queries], np.int32)
    for name, value in (("window", int(rng.integers(1, 50))), ("softcap", 5.0), ("scale", 0.3)):
        if rng.random() < 0.3:
            keywords[name] = value
    if rng.random() < 0.25:
        keywords["alibi_slopes"] = rng.random(kv_heads * group)
    shapes = [(batch, queries, kv_heads * group, size), (batch, keys, kv_heads, size), (batch, keys, kv_heads, v_size)]
    shapes.append((*shapes[0][:3], v_size))
    q, k, v, do = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    sums = np.float64 if dtype == np.float64 else np.float32
    return Case(q, k, v, do, rng.standard_normal((batch, kv_heads * group, queries)).astype(sums), keywords)


def judge(case: Case, got: list[Array], wanted: list[Array]) -> None:
    """Every result within a bound of roundings relative to the largest value of its kind; -inf where it should be."""
    sums = 2.3e-16 if case.q.dtype == np.float64 else 1.2e-7
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
        seen = np.isfinite(y)
        assert np.array_equal(np.isneginf(x), ~seen), (name, case.keywords)
        magnitude = max(1.0, float(np.abs(y[seen]).max(initial=0.0)))
        rounding = 2.0**-8 if case.q.dtype == BFLOAT16 and name != "lse" else 0.0
        # The backward of bfloat16 begins with an output that was rounded.
        allowed = (400 * sums + (10 if name in ("dq", "dk") else 1) * rounding) * magnitude
        error = np.abs(x[seen].astype(np.float64) - y[seen]).max(initial=0.0)
        assert error <= allowed, (name, error, allowed, case.q.shape, case.k.shape, case.q.dtype, case.keywords)
