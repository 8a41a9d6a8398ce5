"""The mixtures of experts that are measured: layers of published models, coarse and fine experts, decoding.

A case is a whole layer (`fivedp.expert_layer`): router, choice, dispatch, experts, combine. Tokens are those of all
ranks together, so a row means the same work on any number of ranks. Features of a model are divided by what makes its
weights fit, and the row says by how much; the number of experts and of choices is never changed. FLOPs are those of
the experts' products, 2 H F a pair of a token and an expert for each of an expert's matrices (three with a gate, else
two), and twice that for the backward, which is timed on its own.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fivedp.bench import report
from fivedp.bench.expert_workload import WORKLOADS
from fivedp.bench.family import Column, Family, Row, Table

if TYPE_CHECKING:
    from fivedp.bench.family import Trial
    from fivedp.bench.measure import Bench

DTYPES = ("float32", "bfloat16", "float64")
STAGES = ("route", "dispatch", "products", "combine", "rest")


@dataclass(frozen=True)
class Strategy:
    """Experts over all ranks, tokens over all ranks."""

    def mesh_shape(self, ranks: int) -> dict[str, int]:
        """One axis of expert parallelism."""
        return {"ep": ranks}


EXPERT_PARALLEL = Strategy()


@dataclass(frozen=True)
class Model:
    """A layer: features of a token (H) and of an expert's middle (F), experts, choices of a token, its router."""

    name: str
    width: int
    hidden: int
    experts: int
    top_k: int
    activation: str = "swiglu"
    score: str = "softmax"
    normalize: bool = True
    tokens: int = 4096

    def divided(self, by: int) -> Model:
        """With features divided; the same experts and choices."""
        return replace(self, width=max(1, self.width // by), hidden=max(1, self.hidden // by))

    @property
    def weight_elements(self) -> int:
        """Elements of all experts' matrices."""
        return (3 if self.activation == "swiglu" else 2) * self.experts * self.width * self.hidden


# The first four from the published config.json files. DeepSeek-V3 limits the choice to groups of experts and has a
# shared expert; neither is part of these rows. The others are what one layer of coarse or fine experts is like.
MODELS = {
    model.name: model
    for model in (
        Model("switch-base", 768, 3072, 64, 1, "relu", normalize=False),
        Model("mixtral-8x7b", 4096, 14336, 8, 2),
        Model("qwen3-30b", 2048, 768, 128, 8),
        Model("deepseek-v3", 7168, 2048, 256, 8, score="sigmoid"),
        Model("coarse", 1024, 2048, 8, 2),
        Model("fine", 1024, 384, 64, 8, tokens=2048),
        Model("very-fine", 1024, 256, 256, 8, tokens=1024),
    )
}
PUBLISHED = ("switch-base", "mixtral-8x7b", "qwen3-30b", "deepseek-v3")
DECODE_TOKENS = (1, 8, 32)
QUICK_TOKENS = 1024
# Weights of a run: a quarter of a second to make on one core, and what a laptop holds beside the rest.
QUICK_ELEMENTS, FULL_ELEMENTS = 10_000_000, 500_000_000


@dataclass(frozen=True)
class Case:
    """One row of the table before it is measured."""

    model: Model
    tokens: int
    dtype: str
    workload: str = "uniform"
    backward: bool = False
    scaled_by: int = 1
    strategy: Strategy = EXPERT_PARALLEL

    @property
    def pairs(self) -> int:
        """Pairs of a token and one of its experts."""
        return self.tokens * self.model.top_k

    @property
    def flops(self) -> int:
        """The experts' products of all pairs."""
        model = self.model
        return (4 if self.backward else 2) * self.pairs * (model.weight_elements // model.experts)

    @property
    def shape(self) -> str:
        """`tokens x H x F x E / k`, as the command line takes it."""
        m = self.model
        return "x".join(map(str, (self.tokens, m.width, m.hidden, m.experts))) + f"/{m.top_k}"

    @property
    def title(self) -> str:
        """For the progress line."""
        stage = "backward" if self.backward else "forward"
        return f"{self.model.name} {self.shape} {self.workload} {report.short(self.dtype)} {stage}"

    def record(self) -> Row:
        """What the row says before anything runs."""
        m = self.model
        return {
            "kernel": "moe",
            "label": m.name,
            "workload": self.workload,
            "shape": self.shape,
            "sizes": {"tokens": self.tokens, "width": m.width, "hidden": m.hidden, "experts": m.experts,
                      "top_k": m.top_k},
            "activation": m.activation,
            "score": m.score,
            "normalize": m.normalize,
            "dtype": self.dtype,
            "backward": self.backward,
            "scaled_by": self.scaled_by,
        }  # fmt: skip

    def memory_needed(self, ranks: int) -> float:
        """Weights, their gradients and one copy for the check; what is kept of every pair. The inputs last a run."""
        m, item = self.model, {"bfloat16": 2, "float64": 8}.get(self.dtype, 4)
        gradients = (m.weight_elements + ranks * m.width * m.experts) * self.backward
        per_pair = self.pairs * (4 * m.hidden + 3 * m.width)
        return float(item * (2 * m.weight_elements + gradients) + 8 * (per_pair + 4 * self.tokens * m.width))

    def open(self, bench: Bench) -> Trial:
        """The layer on this rank. Collective."""
        from fivedp.bench.trials.moe import Experts

        return Experts(self, bench)


def fitted(model: Model, elements: int) -> tuple[Model, int]:
    """The model with its features divided by the least power of two that leaves so many elements of weights.

    A token keeps as many features as there are experts, which the logits need.
    """
    by = 1
    while model.divided(by).weight_elements > elements and model.width // (2 * by) >= model.experts:
        by *= 2
    return model.divided(by), by


def _of(name: str, tokens: int, dtype: str, elements: int, workload: str = "uniform") -> Case:
    model, by = fitted(MODELS[name], elements)
    return Case(model, tokens, dtype, workload, scaled_by=by)


def _both(case: Case) -> list[Case]:
    return [case, replace(case, backward=True)]


def quick(dtypes: list[str], more: list[str]) -> list[Case]:
    """Every model, every workload, coarse and fine in every type, decoding; `more` are types measured once."""
    first, small = dtypes[0], QUICK_ELEMENTS
    cases = [_of("switch-base", QUICK_TOKENS, first, small, workload) for workload in WORKLOADS]
    for name in PUBLISHED[1:]:
        cases += [_of(name, QUICK_TOKENS // 2, first, small)]
    for dtype in dtypes:
        cases += _both(_of("coarse", QUICK_TOKENS, dtype, small))
        cases += _both(_of("fine", QUICK_TOKENS, dtype, small))
    cases += [_of("fine", QUICK_TOKENS // 8, dtype, small // 4) for dtype in more]
    cases += [_of("very-fine", QUICK_TOKENS // 2, first, small)]
    return cases + [_of("coarse", tokens, first, small) for tokens in DECODE_TOKENS]


def full(dtypes: list[str], tokens: int | None) -> list[Case]:
    """Every layer as large as memory lets it be, under every workload, forward and backward; then decoding."""
    cases = []
    for name in MODELS:
        for dtype in dtypes:
            for workload in WORKLOADS:
                cases += _both(_of(name, tokens or MODELS[name].tokens, dtype, FULL_ELEMENTS, workload))
    for name in ("coarse", "very-fine"):
        cases += [_of(name, t, dtype, FULL_ELEMENTS) for t in DECODE_TOKENS for dtype in dtypes]
    return cases


def given(text: str, dtypes: list[str], tokens: int | None, workloads: list[str], divide: int | None) -> list[Case]:
    """The cases of one `--shape`."""
    by, sizes = divide or 1, [tokens] if tokens else None
    if text in MODELS:
        model = MODELS[text]
        if divide is None:
            _, by = fitted(model, FULL_ELEMENTS)
        sizes = sizes or [model.tokens]
    elif text == "decode":
        model, sizes = MODELS["coarse"], sizes or list(DECODE_TOKENS)
    elif re.fullmatch(r"\d+(x\d+){3}/\d+", text):
        count, width, hidden, experts, top_k = (int(x) for x in re.split("[x/]", text))
        if min(width, hidden, experts, top_k) < 1 or top_k > experts:
            raise ValueError(f"--shape {text}: sizes must be at least 1, and a token has at most all experts")
        model, sizes = Model("", width, hidden, experts, top_k), sizes or [count]
    else:
        raise ValueError(
            f"--shape {text!r} is no mixture of experts: give TxHxFxE/k (tokens, features, features of an expert, "
            f"experts, experts of a token), decode, or one of {', '.join(MODELS)}"
        )
    model = model.divided(by)
    if model.width < model.experts:
        raise ValueError(
            f"--shape {text}: {model.width} features (divided by {by}) cannot hold the logits of {model.experts} "
            "experts; give at least as many features as experts"
        )
    cases = [Case(model, t, dtype, w, scaled_by=by) for t in sizes for w in workloads for dtype in dtypes]
    return [x for case in cases for x in _both(case)]


def select(options: Any) -> list[Case]:
    """The cases that the command line asks for."""
    if options.order:
        raise ValueError("--order is not one of moe: its sums have one order on every number of ranks")
    if options.reference == "numpy" and options.kernel == "moe":
        raise ValueError("--reference numpy has no mixture of experts; give torch")
    if options.divide is not None and options.divide < 1:
        raise ValueError(f"--divide is {options.divide}; give at least 1")
    dtypes: list[str] = options.dtype or list(DTYPES[:2])
    if odd := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise ValueError(f"--dtype {report.short(odd[0])} is not one of moe, which has f32, bf16, f64")
    if options.shape:
        workloads = options.workload or ["uniform"]
        cases = [c for text in options.shape for c in given(text, dtypes, options.tokens, workloads, options.divide)]
    elif options.full:
        cases = full(dtypes, options.tokens)
    else:
        cases = quick(dtypes, [] if options.dtype else ["float64"])
        if options.tokens:
            cases = [replace(case, tokens=options.tokens) for case in cases]
    if options.workload:
        cases = [case for case in cases if case.workload in options.workload]
    cases = [case for case in cases if case.backward or not options.backward]
    if not cases:
        raise ValueError("no mixture of experts is of every kind asked for; drop --workload or --backward")
    return cases


def add_options(group: argparse._ArgumentGroup) -> None:
    """The options that this family alone has."""
    group.add_argument("--workload", action="append", choices=WORKLOADS, help="how tokens choose; repeatable")
    group.add_argument("--divide", type=int, help="features of a model by this (default: until its weights fit)")


def _cells(row: Row) -> tuple[str, ...]:
    moved, ranks, stages = row["bytes"], row["ranks"], row["stages"]
    total = sum(stages.values()) or 1.0
    return (
        "backward" if row["backward"] else "forward",
        *report.rate_cells(row),
        "/".join(f"{100 * stages[name] / total:.0f}" for name in STAGES[:-1]),
        report.size(moved["counted"] / ranks),
        "=" if moved["bound"] == moved["counted"] else report.size(moved["bound"] / ranks),
        report.error_cell(row["error"]),
        report.error_cell(row["honest_error"]),
        report.memory_cell(row["memory"]["peak"]),
        f"{row['balance']:.2f}",
    )


def _notes(row: Row) -> list[str]:
    notes, price = [], row.get("canonical_price")
    if price is not None:
        low, high = price["spread"]
        share, sent = round(100 * price["seconds"] / row["seconds"], 1), row["bytes"]["counted"]
        more = f"{100 * price['bytes'] / sent:.1f}% of the bytes" if price["bytes"] else "no bytes"
        notes.append(
            f"canonical order: sums take {price['ratio']:.2f} times ({low:.2f}-{high:.2f}) those of slot order, "
            f"{share + 0.0:.1f}% of the call, {more}"  # no -0.0
        )
    if not row["wrong"] and row["error"] > 2 * row["honest_error"] > 0:
        times = row["error"] / row["honest_error"]
        notes.append(f"error {times:.1f} times the plain one, as sums term by term may have it")
    return notes


def _heading(row: Row) -> tuple[str, str]:
    sizes, by = row["sizes"], row["scaled_by"]
    words = [f"{sizes['tokens']} tokens", f"H {sizes['width']}", f"F {sizes['hidden']}",
             f"{sizes['experts']} experts, top {sizes['top_k']}", row["activation"]]  # fmt: skip
    return row["label"] or "moe", "   ".join(words) + (f"   (features / {by})" if by != 1 else "")


TABLE = Table(
    columns=(
        Column("workload", 10, left=True), Column("type", 4, left=True), Column("pass", 8, left=True),
        *report.RATE_COLUMNS, Column("r/d/p/c in %", 12), Column("sent/rank", 9), Column("least", 7),
        Column("error", 7), Column("plain", 7), Column("memory", 7), Column("load", 4),
    ),
    group=lambda row: (row["label"], row["shape"]),
    heading=_heading,
    name=lambda row: row["workload"],
    cells=_cells,
    notes=_notes,
)  # fmt: skip
FAMILY = Family(
    name="moe",
    known={"layers": (*MODELS, "decode", "or TxHxFxE/k")},
    own_options=("workload", "divide"),
    add_options=add_options,
    select=select,
    table=TABLE,
    quick_seconds=0.1,
)
