"""The work of a contest of attention, checked against float64 on sampled rows.

A row of o or dq needs all keys of its head, a row of dk or dv all queries too: two heads and a row of each of 24 parts
of the sequence are sampled, so every rank's share has some. What rounding explains is told by a plain computation of
the same rows in the same type: products in float32 for bfloat16, with weights and results rounded. A key too many or
too few is far beyond that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from attention_peer import inputs, sees
from contest import SIGMAS, WrongResult
from programs import Running
from worker import operands

HEADS, ROWS, CHUNK = 2, 24, 512
Array = Any


@dataclass(frozen=True)
class Attention:
    """One batch element of `heads` heads; the gradients of q, k and v where `backward`, else o."""

    tokens: int
    head_size: int
    heads: int
    dtype: str
    causal: bool = False
    backward: bool = False
    window: int = 0
    documents: tuple[int, ...] = ()

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        total = 0
        edges = self.documents or (0, self.tokens)
        for length in np.diff(edges).tolist():
            reach = min(self.window or length, length)  # a query sees itself and reach - 1 keys before it
            one_way = reach * length - reach * (reach - 1) // 2
            total += one_way if self.causal else 2 * one_way - length
        return total

    @property
    def flops(self) -> float:
        """Two products over the pairs, five in the backward."""
        return 4 * self.pairs * self.heads * self.head_size * (2.5 if self.backward else 1)

    @property
    def shape(self) -> str:
        """`S4096 H8 D128 causal`."""
        words = [f"S{self.tokens}", f"H{self.heads}", f"D{self.head_size}", "causal" if self.causal else "full"]
        words += [f"window {self.window}"] if self.window else []
        words += [f"{len(self.documents) - 1} documents"] if self.documents else []
        return " ".join([*words, *(["backward"] if self.backward else [])])

    @property
    def sizes(self) -> dict[str, Any]:
        """All but the type."""
        return {
            "tokens": self.tokens, "heads": self.heads, "head_size": self.head_size, "causal": self.causal,
            "window": self.window, "documents": list(self.documents), "backward": self.backward,
        }  # fmt: skip

    def verify(self, program: Running, seed: int) -> dict[str, Any]:
        """Hold sampled rows of the result against float64; the error over that of a plain computation.

        Raises
        ------
        WrongResult
            Where they differ by more than rounding explains, or a row is missing.
        """
        tokens, heads = self.sample(seed)
        return self.judge(program.order(do="check", tokens=tokens, heads=heads), seed)

    def sample(self, seed: int) -> tuple[list[int], list[int]]:
        """The tokens, one of each part of the sequence, and the heads that are checked."""
        rng = np.random.default_rng([seed, 11])
        edges = np.linspace(0, self.tokens, min(ROWS, self.tokens) + 1).astype(int)
        tokens = [int(rng.integers(low, high)) for low, high in pairwise(edges)]
        return tokens, sorted(rng.choice(self.heads, min(HEADS, self.heads), replace=False).tolist())

    def judge(self, parts: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        """What `verify` says, from the rows of all ranks."""
        want, plain = _expected(self, seed)
        got = {name: np.full_like(rows, np.nan) for name, rows in want.items()}
        for part in parts:
            for name, found in part.items():
                if found["places"]:
                    got[name][found["places"]] = found["values"]
        ratios = []
        for name, rows in want.items():
            error = np.abs(got[name] - rows)
            # The first keys of a causal sequence sum over far more queries than the last: the worst row sets the bound.
            allowed = SIGMAS * float(root_mean_square(plain[name], (1, 2)).max())
            worst = float(error.max())
            if not worst <= allowed:
                raise WrongResult(f"{name} is off by {worst:.3g}, rounding explains {allowed:.3g}")
            ratios.append(float(root_mean_square(error) / root_mean_square(plain[name])))
        return {"error_over_plain": max(ratios)}


def root_mean_square(x: Array, axis: tuple[int, ...] | None = None) -> Array:
    """Of all elements, or over some axes."""
    return np.sqrt(np.square(x).mean(axis=axis))


@lru_cache(maxsize=1)
def _expected(work: Attention, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """The sampled rows (tokens, heads, head_size) in float64, and the errors of a plain computation of them."""
    tokens, heads = work.sample(seed)
    case = {**work.sizes, "dtype": work.dtype, "seed": seed}
    arrays = inputs(case, np.arange(work.tokens))
    dtype = operands.dtype_of(work.dtype)
    want, plain = (
        [
            sampled_rows(case, {n: x[:, h].astype(kind) for n, x in arrays.items()}, np.array(tokens), narrow)
            for h in heads
        ]
        for kind, narrow in ((np.float64, None), (operands.accumulator_of(dtype), dtype))
    )
    exact = {name: np.stack([rows[name] for rows in want], axis=1) for name in want[0]}
    error = {name: np.stack([rows[name] for rows in plain], axis=1) - exact[name] for name in exact}
    return exact, error


def sampled_rows(case: dict[str, Any], head: dict[str, Array], tokens: Array, narrow: Any) -> dict[str, Array]:
    """o, or dq, dk and dv, of one head at `tokens`, in the type of `head`; weights and results rounded to `narrow`.

    `head` holds q, k, v and for a backward do, (all tokens, head_size) each.
    """
    q, k, v, do = (head.get(name) for name in ("q", "k", "v", "do"))
    scale, places = head["q"].dtype.type(case["head_size"] ** -0.5), np.arange(case["tokens"])

    def rounded(x: Array) -> Array:
        return x if narrow is None else x.astype(narrow).astype(x.dtype)

    def attend(rows: Array) -> tuple[Array, Array]:
        logits = np.where(sees(case, rows, places), scale * (q[rows] @ k.T), -np.inf)
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)
        total = weights.sum(axis=1, keepdims=True)
        return rounded(weights) @ v / total, weights / total

    o, weights = attend(tokens)
    if do is None:
        return {"o": rounded(o)}
    ds = weights * (do[tokens] @ v.T - (do[tokens] * rounded(o)).sum(axis=1, keepdims=True))
    results = {"dq": scale * (rounded(ds) @ k), "dk": np.zeros_like(k[tokens]), "dv": np.zeros_like(v[tokens])}
    for start in range(0, case["tokens"], CHUNK):
        rows = places[start : start + CHUNK]
        o, weights = attend(rows)
        p = weights[:, tokens]
        ds = p * (do[rows] @ v[tokens].T - (do[rows] * rounded(o)).sum(axis=1, keepdims=True))
        results["dk"] += scale * (rounded(ds).T @ q[rows])
        results["dv"] += rounded(p).T @ do[rows]
    return {name: rounded(x) for name, x in results.items()}
