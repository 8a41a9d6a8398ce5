"""Is this attention right? Sampled rows against float64, and sums that no part of a gradient escapes.

*Samples*: some queries of every rank, with the heads of some key heads, are computed again in float64 (long double for
float64 itself) from inputs made from their seeds; so are the gradients of some queries and keys of one key head. The
error is compared with that of a plain computation in the type of the inputs: sums in float32 for 16-bit types, the
weights rounded before the second product as a 16-bit product has them. More than twice that is wrong. A gradient needs
the log-sum-exp and delta of every query of its head: each rank works out a part of the sequence, once for all cases on
the same inputs, so a long sequence costs S^2 D of one head and no S x S memory. *Conservation*: weights of a query sum
to one, so dv sums to the sum of do; and o is linear in v, logits in q and in k, so <do, o> = <v, dv> and <q, dq> = <k,
dk> for every key head, whatever the weights. Each rank adds what it holds, so every element is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fivedp.bench import agree, operands
from fivedp.bench.cases.attention import Case
from fivedp.bench.check import FEW, FREIVALDS_SIGMAS, SLACK, epsilon, pick, squares
from fivedp.bench.family import Row
from fivedp.bench.measure import Bench
from fivedp.bench.sampled_check import Arithmetic, SampledCheck
from fivedp.bench.visibility import Indices, Sight

Array = NDArray[Any]
SAMPLED_ROWS, SAMPLED_HEADS = 12, 3
AT_ONCE = 1 << 20  # logits that are held at a time
TENSORS = {"q": 0, "k": 1, "v": 2, "do": 3}
# Uniform numbers in [-1, 1) would give logits of deviation 1/3 and weights that are nearly equal; times 4 the largest
# logit moves and some keys matter. A power of two is exact in every type.
SHARPER = {"q": 4.0}


@dataclass(frozen=True)
class Shares:
    """Any tokens and heads of the inputs, made from their seed."""

    case: Case
    seed: int

    def make(self, name: str, tokens: Indices, heads: slice) -> Array:
        """(B, len(tokens), heads, D): q and do by query, k and v by key."""
        case, dtype = self.case, operands.dtype_of(self.case.dtype)
        of_keys = name in "kv"
        count, length = (case.kv_heads, case.keys) if of_keys else (case.heads, case.queries)
        begin, end, _ = heads.indices(count)
        rows = (np.arange(case.batch, dtype=np.int64)[:, None] * length + tokens).ravel()
        block = operands.block(self.seed + TENSORS[name], rows, range(begin * case.size, end * case.size), dtype)
        block *= np.asarray(SHARPER.get(name, 1.0), dtype)
        return block.reshape(case.batch, len(tokens), end - begin, case.size)


class Forward(NamedTuple):
    """Of some queries and G heads: o (G, n, D), lse and delta (G, n)."""

    o: Array
    lse: Array
    delta: Array


def attend(q: Array, k: Array, v: Array, do: Array | None, sees: Array, scale: float, how: Arithmetic) -> Forward:
    """Attention of q (G, n, D) to k, v (S, D) of one key head, with all logits stored."""
    q, k, v = (x.astype(how.sums, copy=False) for x in (q, k, v))
    logits = np.where(sees, (q @ k.T) * how.sums.type(scale), -np.inf)
    top = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    safe = np.where(total == 0, 1, total)
    o = how.rounded((how.rounded(weights) @ v) / safe)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    delta = np.zeros_like(lse) if do is None else (do.astype(how.sums, copy=False) * o).sum(axis=-1)
    return Forward(o, lse, delta)


def _derivatives(
    q: Array, k: Array, v: Array, do: Array, lse: Array, delta: Array, sees: Array, scale: float, how: Arithmetic
) -> tuple[Array, Array]:
    """Weights p and derivatives ds of the logits, both (G, n, S) and rounded as a product takes them."""
    q, k, v, do = (x.astype(how.sums, copy=False) for x in (q, k, v, do))
    lse, delta = (x.astype(how.sums, copy=False)[..., None] for x in (lse, delta))
    p = np.where(sees, np.exp((q @ k.T) * how.sums.type(scale) - lse), 0)
    return how.rounded(p), how.rounded(p * (do @ v.T - delta))


class Whole(NamedTuple):
    """Of every query and G heads, exact and plain: lse and delta (G, S); the error of o by element."""

    lse: tuple[Array, Array]
    delta: tuple[Array, Array]
    o_error: float
    delta_size: float


class Check(SampledCheck):
    """Errors of one case on this rank, added up over all ranks when they are read.

    Attributes
    ----------
    rows : (n,) int
        The sampled queries, by their place in this rank's share.
    heads, kv_heads : slice
        One key head and its query heads, among those sampled.
    """

    reason = "twice that of a plain computation"
    aside = ("lse",)

    def __init__(self, bench: Bench, shares: Shares, queries: Indices, keys: Indices) -> None:
        super().__init__(bench.comm, operands.dtype_of(shares.case.dtype))
        self.bench, self.shares, self.case = bench, shares, shares.case
        self.queries, self.keys = queries, keys
        self.sight, self.scale = Sight.of(self.case), self.case.size**-0.5
        draw = np.random.default_rng([shares.seed, self.comm.rank])
        self.rows = pick(len(queries), 4 if self.extended else SAMPLED_ROWS, draw)
        self.columns = pick(len(keys), 4 if self.extended else SAMPLED_ROWS, draw)
        self.batch = shares.seed % self.case.batch
        self.group = self.case.heads // self.case.kv_heads
        self.some = 1 if self.extended else min(SAMPLED_HEADS, -(-self.case.kv_heads // self.comm.size))
        # the ranks go through the key heads in turn; a gradient needs all ranks on the same one
        self.first = (shares.seed + (0 if self.case.backward else self.comm.rank)) % self.case.kv_heads
        self.kv_heads, self.heads = self._heads(self.first)
        self._same_bits: bool | None = None

    def _heads(self, kv_head: int) -> tuple[slice, slice]:
        return slice(kv_head, kv_head + 1), slice(kv_head * self.group, (kv_head + 1) * self.group)

    def note_bits(self, same: bool) -> None:
        """Whether this rank's samples have the bits of one rank. Collective."""
        self._same_bits = agree.everywhere(self.comm, same)

    def _make(self, name: str, tokens: Indices, heads: slice) -> Array:
        """(G, n, D) of the sampled batch for q and do, (n, D) for k and v."""
        x = self.shares.make(name, tokens, heads)[self.batch]
        made: Array = x[:, 0] if name in "kv" else x.transpose(1, 0, 2)
        return made

    def forward(self, o: Array, lse: Array) -> None:
        """Judge o (B, S_local, H, D) and lse (B, H, S_local)."""
        self._expect("o", "lse")
        tokens = self.queries[self.rows]
        if tokens.size:
            low, high = int(self.sight.low[tokens].min()), int(self.sight.high[tokens].max())
            seen = np.arange(low, high + 1, dtype=np.int64)
            sees = self.sight.matrix(tokens, seen)
            for number in range(self.some):
                kv_head, heads = self._heads((self.first + number * self.comm.size) % self.case.kv_heads)
                q, k, v = self._make("q", tokens, heads), self._make("k", seen, kv_head), self._make("v", seen, kv_head)
                truth, honest = (attend(q, k, v, None, sees, self.scale, how) for how in self.ways)
                got = o[self.batch][self.rows][:, heads].transpose(1, 0, 2)
                self._add("o", got, truth.o, honest.o)
                self._add("lse", lse[self.batch][heads][:, self.rows], truth.lse, honest.lse)
        self._finish([o, lse])

    def backward(self, dq: Array, dk: Array, dv: Array) -> None:
        """Judge dq, dk and dv, each (B, S_local, heads, D)."""
        self._expect("dq", "dk", "dv")
        whole = self._whole()
        kv_head, heads = self.kv_heads, self.heads
        tokens = self.queries[self.rows]
        if tokens.size:
            seen = np.arange(int(self.sight.low[tokens].min()), int(self.sight.high[tokens].max()) + 1, dtype=np.int64)
            sees = self.sight.matrix(tokens, seen)
            q, do = (self._make(x, tokens, heads) for x in ("q", "do"))
            k, v = (self._make(x, seen, kv_head) for x in "kv")
            answers = []
            for way, lse, delta in zip(self.ways, whole.lse, whole.delta, strict=True):
                _, ds = _derivatives(q, k, v, do, lse[:, tokens], delta[:, tokens], sees, self.scale, way)
                answers.append(way.rounded((ds @ k.astype(way.sums)) * way.sums.type(self.scale)))
            self._add("dq", dq[self.batch][self.rows][:, heads].transpose(1, 0, 2), answers[0], answers[1])
        tokens = self.keys[self.columns]
        if tokens.size:
            results = self._key_gradients(tokens, whole)
            for name, got, number in (("dk", dk, 0), ("dv", dv, 1)):
                mine = got[self.batch][self.columns][:, kv_head][:, 0]
                self._add(name, mine, results[0][number], results[1][number])
        self._finish([dq, dk, dv])

    def _key_gradients(self, tokens: Indices, whole: Whole) -> list[tuple[Array, Array]]:
        """dk and dv of some keys, exact and plain, from the queries that see them."""
        k, v = (self._make(x, tokens, self.kv_heads) for x in "kv")
        viewers = np.flatnonzero(self.sight.counts(tokens)).astype(np.int64)
        results = []
        for way, lse, delta in zip(self.ways, whole.lse, whole.delta, strict=True):
            dk, dv = np.zeros(k.shape, way.sums), np.zeros(v.shape, way.sums)
            step = max(1, AT_ONCE // (self.group * len(tokens)))
            for part in (viewers[i : i + step] for i in range(0, len(viewers), step)):
                q, do = (self._make(x, part, self.heads) for x in ("q", "do"))
                sees = self.sight.matrix(part, tokens)
                p, ds = _derivatives(q, k, v, do, lse[:, part], delta[:, part], sees, self.scale, way)
                dv += (p.transpose(0, 2, 1) @ do.astype(way.sums)).sum(axis=0)
                dk += (ds.transpose(0, 2, 1) @ q.astype(way.sums)).sum(axis=0)
            results.append((way.rounded(dk * way.sums.type(self.scale)), way.rounded(dv)))
        return results

    def _whole(self) -> Whole:
        """lse and delta of all queries of the sampled head; kept for the next case on the same inputs. Collective."""
        case = self.case
        sizes = (case.batch, case.queries, case.keys, case.heads, case.kv_heads, case.size, case.dtype)
        key = ("whole", case.mask, *sizes)
        if key not in self.bench.kept:
            self.bench.kept[key] = self._work_out()
        whole: Whole = self.bench.kept[key]
        return whole

    def _work_out(self) -> Whole:
        case, p, rank = self.case, self.comm.size, self.comm.rank
        mine = np.array_split(np.arange(case.queries, dtype=np.int64), 8 * p)
        mine = [x for i, x in enumerate(mine) if min(i % (2 * p), 2 * p - 1 - i % (2 * p)) == rank]  # as much for each
        # exact values as a float64 and the rest, so that long double passes through a sum of float64
        found = np.zeros((2, 3, self.group, case.queries))
        error = np.zeros(3)
        k, v = (self._make(x, np.arange(case.keys, dtype=np.int64), self.kv_heads) for x in "kv")
        for block in mine:
            if not block.size:
                continue
            span = int(self.sight.high[block].max()) - int(self.sight.low[block].min()) + 1
            step = max(1, AT_ONCE // (self.group * max(1, span)))
            for part in (block[i : i + step] for i in range(0, len(block), step)):
                low, high = int(self.sight.low[part].min()), int(self.sight.high[part].max())
                sees = self.sight.matrix(part, np.arange(low, high + 1, dtype=np.int64))
                q, do = (self._make(x, part, self.heads) for x in ("q", "do"))
                inputs = (q, k[low : high + 1], v[low : high + 1], do, sees, self.scale)
                truth, honest = attend(*inputs, self.exact), attend(*inputs, self.plain)
                for place, (right, near) in enumerate(((truth.lse, honest.lse), (truth.delta, honest.delta))):
                    found[place, 0][:, part] = right
                    found[place, 1][:, part] = right - found[place, 0][:, part]
                    found[place, 2][:, part] = near
                error += (squares(honest.o - truth.o), float(truth.o.size), squares(truth.delta))
        agree.add_up(self.comm, found)
        agree.add_up(self.comm, error)
        lse, delta = (
            (found[place, 0].astype(self.exact.sums) + found[place, 1], found[place, 2].astype(self.plain.sums))
            for place in range(2)
        )
        count = max(1.0, error[1])
        return Whole(lse, delta, math.sqrt(error[0] / count), math.sqrt(error[2] * case.size / count))

    def conservation(self, o: Array, dq: Array, dk: Array, dv: Array) -> None:
        """Judge the sums that every element of the gradients is part of, after `backward`."""
        case, whole = self.case, self._whole()
        places = {"q": self.queries, "do": self.queries, "k": self.keys, "v": self.keys}
        mine = {name: self.shares.make(name, tokens, slice(None)) for name, tokens in places.items()}

        def by_kv_head(x: Array) -> Array:
            """(kv_heads, elements) in float64."""
            wide = x.astype(np.float64)
            return wide.transpose(2, 0, 1, 3).reshape(case.kv_heads, -1)

        def inner(x: Array, y: Array) -> Array:
            products: Array = (by_kv_head(x) * by_kv_head(y)).sum(axis=1)
            return products

        def total(x: Array) -> Array:
            wide = x.astype(np.float64).sum(axis=(0, 1))
            sums: Array = wide.reshape(case.kv_heads, -1, case.size).sum(axis=1)
            return sums

        differences = np.concatenate([
            inner(mine["do"], o) - inner(mine["v"], dv),
            inner(mine["q"], dq) - inner(mine["k"], dk),
            (total(mine["do"]) - total(dv)).ravel(),
        ])  # fmt: skip
        agree.add_up(self.comm, differences)
        spread = self._spread()
        size = {name: math.sqrt(1 / 3) * SHARPER.get(name, 1.0) for name in TENSORS}
        rows, columns = case.batch * case.queries * self.group, case.batch * case.keys
        # An lse is rounded once for all weights of its row, so their errors add up instead of averaging out.
        own = epsilon(self.plain.sums) * max(1.0, float(np.abs(whole.lse[0]).max(initial=0.0)))
        elements = math.sqrt(case.size)
        allowed = np.concatenate([
            np.full(case.kv_heads, math.sqrt(rows) * (elements * size["do"] * whole.o_error + own * whole.delta_size)
                    + math.sqrt(columns) * elements * size["v"] * spread["dv"]),
            np.full(case.kv_heads, elements * (math.sqrt(rows) * size["q"] * spread["dq"]
                                               + math.sqrt(columns) * size["k"] * spread["dk"])),
            np.full(case.kv_heads * case.size, math.sqrt(columns) * spread["dv"] + math.sqrt(rows) * size["do"] * own),
        ])  # fmt: skip
        floor = epsilon(np.dtype(np.float64)) * rows * case.size  # the sums themselves round
        worst = float((np.abs(differences) / (FREIVALDS_SIGMAS * allowed + floor)).max(initial=0.0))
        self._residual = worst if math.isfinite(worst) else math.inf

    def _allowed(self, name: str, plainly: float, samples: float) -> float:
        # an lse is kept in units of log 2 and rounded again as it leaves them
        floor = epsilon(self.plain.sums) if name == "lse" else epsilon(self.dtype) if samples < FEW else 0.0
        return SLACK * plainly + floor

    @property
    def wrong(self) -> str:
        """Why the results are wrong; empty where they are right."""
        return super().wrong or ("the bits of one rank are promised here, and they differ"
                                 if self._same_bits is False else "")  # fmt: skip

    def found(self) -> Row:
        """As every check, and whether the bits are those of one rank."""
        return super().found() | {"same_bits": self._same_bits}
