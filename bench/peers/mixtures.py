"""The work of a contest of mixtures of experts, checked against a dense float64 computation of what is sampled.

A row of y or dx needs the experts of its token, a column of an expert's gradients all tokens of the expert: a token of
each of 16 parts of the batch is sampled, and two hidden units of two experts, so every rank's share has some. What
rounding explains is told by a plain computation of the same in the same type: products in float32 for bfloat16, with
the products before the activation, the hidden units and the results rounded. An expert too many or too few is far
beyond that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from contest import SIGMAS, WrongResult
from moe_peer import expert_weights, logits, token_inputs, workload
from programs import Running
from worker import operands

TOKENS, EXPERTS, UNITS = 16, 2, 2
Array = Any


@dataclass(frozen=True)
class Mixture:
    """A layer of SwiGLU experts with softmax routing; `tokens` are those of all ranks.

    `backward` is the forward with all gradients; `outside` is the forward without the time of the experts' products.
    """

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    dtype: str
    workload: str = "uniform"
    backward: bool = False
    outside: bool = False

    @property
    def flops(self) -> float:
        """The three products of every pair of a token and an expert, and their gradients; none outside them."""
        pairs = self.tokens * self.top_k
        return 0 if self.outside else 6 * pairs * self.width * self.hidden * (3 if self.backward else 1)

    @property
    def shape(self) -> str:
        """`T4096 H1024 F2048 E8 k2 zipf`."""
        words = [f"T{self.tokens}", f"H{self.width}", f"F{self.hidden}", f"E{self.experts}", f"k{self.top_k}"]
        words += [self.workload] if self.workload != "uniform" else []
        return " ".join([*words, *["outside"] * self.outside, *["backward"] * self.backward])

    @property
    def sizes(self) -> dict[str, Any]:
        """All but the type."""
        return {
            "tokens": self.tokens, "width": self.width, "hidden": self.hidden, "experts": self.experts,
            "top_k": self.top_k, "workload": self.workload, "backward": self.backward, "outside": self.outside,
        }  # fmt: skip

    def verify(self, program: Running, seed: int) -> dict[str, Any]:
        """Hold sampled rows and columns against float64; the error over that of a plain computation.

        Raises
        ------
        WrongResult
            Where they differ by more than rounding explains, or something is missing.
        """
        tokens, units = self.sample(seed)
        return self.judge(program.order(do="check", tokens=tokens, units=units), seed)

    def sample(self, seed: int) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens, one of each part of the batch, and the hidden units (expert, unit) that are checked."""
        rng = np.random.default_rng([seed, 13])
        edges = np.linspace(0, self.tokens, min(TOKENS, self.tokens) + 1).astype(int)
        tokens = [int(rng.integers(low, high)) for low, high in pairwise(edges)]
        experts = rng.choice(self.experts, min(EXPERTS, self.experts), replace=False).tolist()
        hidden = rng.choice(self.hidden, min(UNITS, self.hidden), replace=False).tolist()
        return tokens, [(e, u) for e in experts for u in hidden] if self.backward else []

    def judge(self, parts: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        """What `verify` says, from the answers of all ranks."""
        want, plain = _expected(replace(self, outside=False), seed)
        ratios = []
        for name, rows in want.items():
            got = np.full_like(rows, np.nan)
            for part in parts:
                if part.get(name, {"places": []})["places"]:
                    got[part[name]["places"]] = part[name]["values"]
            error = np.abs(got - rows)
            # Gradients that pass the router are far larger for some tokens than for others: the worst row sets the
            # bound. A program may round partial results, or sum in an order of its own: a unit of the type a row.
            unit = 2.0**-8 if self.dtype == "bfloat16" else np.finfo(self.dtype).eps
            # What passes the router lies in a few features of a row, so its error is far above the row's mean: four
            # times the plain computation's largest error is allowed too.
            largest = np.abs(plain[name]).max() * 4 / SIGMAS
            spreads = (by_row(plain[name]).max(), largest, unit * by_row(rows).max(), np.finfo(np.float32).tiny)
            allowed, worst = SIGMAS * float(max(spreads)), float(error.max())
            if not worst <= allowed:
                raise WrongResult(f"{name} is off by {worst:.3g}, rounding explains {allowed:.3g}")
            ratios.append(root_mean_square(error) / (root_mean_square(plain[name]) or 1.0))
        return {"error_over_plain": max(ratios)}


def root_mean_square(x: Array) -> float:
    """Of all elements."""
    return float(np.sqrt(np.square(x).mean()))


def by_row(x: Array) -> Array:
    """The root mean square of each row."""
    return np.sqrt(np.square(x).mean(axis=1))


@lru_cache(maxsize=2)
def _expected(work: Mixture, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """What is sampled in float64, by name, and the errors of a plain computation of it."""
    case = {**work.sizes, "dtype": work.dtype, "seed": seed}
    dtype = operands.dtype_of(work.dtype)
    exact = _computed(work, case, np.dtype(np.float64), None)
    plain = _computed(work, case, operands.accumulator_of(dtype), dtype)
    return exact, {name: plain[name].astype(np.float64) - exact[name] for name in exact}


def _computed(work: Mixture, case: dict[str, Any], kind: Any, narrow: Any) -> dict[str, Array]:
    """y and dx of the sampled tokens, d_gate, d_up and d_down of the sampled units, in type `kind`."""
    tokens, units = work.sample(case["seed"])
    layer = Layer(work, case, kind, narrow)
    y, dx = layer.rows(np.array(tokens))
    if not work.backward:
        return {"y": y}
    columns = [layer.columns(expert, unit) for expert, unit in units]
    names = ("d_gate", "d_up", "d_down")
    return {"y": y, "dx": dx, **{name: np.stack([c[i] for c in columns]) for i, name in enumerate(names)}}


class Layer:
    """The layer written out in one type; what a program stores is rounded to `narrow`."""

    def __init__(self, work: Mixture, case: dict[str, Any], kind: Any, narrow: Any) -> None:
        self.work, self.case, self.kind, self.narrow = work, case, kind, narrow

    def rounded(self, x: Array) -> Array:
        return x if self.narrow is None else x.astype(self.narrow).astype(self.kind)

    def routed(self, tokens: Array) -> tuple[Array, Array]:
        """The experts of some tokens and their weights, (n, k) each."""
        values = logits(self.case, tokens).astype(self.kind)
        chosen = workload.choices(values, self.work.top_k)
        risen = np.exp(np.take_along_axis(values, chosen.astype(np.int64), axis=1) - values.max(axis=1, keepdims=True))
        return chosen, risen / risen.sum(axis=1, keepdims=True)

    def arrays(self, tokens: Array) -> tuple[Array, Array]:
        """x and dy, zero without a backward."""
        made = token_inputs(self.case, tokens)
        x = made["x"].astype(self.kind)
        return x, made["dy"].astype(self.kind) if "dy" in made else np.zeros_like(x)

    def passed(self, x: Array, gate: Array, up: Array) -> tuple[Array, Array, Array]:
        """The hidden units of rows x, and their derivatives by gate and by up."""
        g, u = self.rounded(x @ gate), self.rounded(x @ up)
        sigmoid = 1 / (1 + np.exp(-g))
        return self.rounded(g * sigmoid * u), u * sigmoid * (1 + g * (1 - sigmoid)), g * sigmoid

    def rows(self, tokens: Array) -> tuple[Array, Array]:
        """y and dx of some tokens."""
        chosen, weights = self.routed(tokens)
        x, dy = self.arrays(tokens)
        y, dx, dots = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
        for expert in np.unique(chosen).tolist():
            token, slot = np.nonzero(chosen == expert)
            gate, up, down = (w[0].astype(self.kind) for w in expert_weights(self.case, range(expert, expert + 1)))
            hidden, by_gate, by_up = self.passed(x[token], gate, up)
            share = weights[token, slot, None]
            y[token] += share * (hidden @ down)
            d_hidden = dy[token] @ down.T
            dots[token, slot] = (d_hidden * hidden).sum(axis=1)
            d_hidden = share * d_hidden
            dx[token] += self.rounded(d_hidden * by_gate) @ gate.T + self.rounded(d_hidden * by_up) @ up.T
        # softmax over the chosen: what is common to all of them changes nothing
        inner = weights * (dots - (weights * dots).sum(axis=1, keepdims=True))
        d_logits = np.zeros((len(tokens), self.work.experts), self.kind)
        np.put_along_axis(d_logits, chosen.astype(np.int64), inner, axis=1)
        dx[:, : self.work.experts] += self.kind.type(workload.factor(self.work.experts)) * d_logits
        return self.rounded(y), self.rounded(dx)

    def columns(self, expert: int, unit: int) -> tuple[Array, Array, Array]:
        """d_gate and d_up (H) and d_down (H) of one hidden unit of an expert, over all tokens that chose it."""
        chosen, weights = self.routed(np.arange(self.work.tokens))
        token, slot = np.nonzero(chosen == expert)
        x, dy = self.arrays(token)
        gate, up, down = (w[0].astype(self.kind) for w in expert_weights(self.case, range(expert, expert + 1)))
        share = weights[token, slot]
        hidden, by_gate, by_up = self.passed(x, gate[:, unit], up[:, unit])
        d_hidden = share * (dy @ down[unit])
        found = (self.rounded(d_hidden * by_gate) @ x, self.rounded(d_hidden * by_up) @ x,
                 self.rounded(share * hidden) @ dy)  # fmt: skip
        return tuple(self.rounded(a) for a in found)  # type: ignore[return-value]
