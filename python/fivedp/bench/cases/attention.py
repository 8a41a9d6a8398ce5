"""The attentions that are measured: heads of published models, every mask, every way to share a sequence.

A way is what moves (ring, Ulysses, hybrid, decode) with a layout of the tokens and an order of the sums. Quick runs
take 1,024 tokens; `--full` and a model asked for by name run 2,048 and more. FLOPs are 4 D for every visible pair of a
query and a key and every head, 2.5 times that for the backward, which is timed on its own.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fivedp.bench import report
from fivedp.bench.family import Column, Family, Row, Table

if TYPE_CHECKING:
    from fivedp.bench.family import Trial
    from fivedp.bench.measure import Bench

DTYPES = ("float32", "bfloat16", "float64")
LAYOUTS = ("zigzag", "striped", "contiguous")
ORDERS = ("ring", "canonical")


@dataclass(frozen=True)
class Strategy:
    """What moves, how tokens are laid out, and the order of sums."""

    way: str
    layout: str = "zigzag"
    order: str = "ring"

    @property
    def known_as(self) -> str:
        """`ring, zigzag`; canonical order is named, the other is not, nor is the usual cut of a cache."""
        if self == DECODE:
            return self.way
        return ", ".join([self.way, "canonical" if self.order == "canonical" else self.layout])

    def mesh_shape(self, ranks: int) -> dict[str, int]:
        """One line of ranks, or sp x tp for the hybrid: heads are exchanged over the larger factor, tp.

        Raises
        ------
        ValueError
            Where the hybrid would have an axis of one rank.
        """
        if self.way != "hybrid":
            return {"p": ranks}
        ring = next((f for f in range(int(ranks**0.5), 1, -1) if ranks % f == 0), 1)
        if ring == 1:
            raise ValueError(f"hybrid needs ranks in two factors above 1, such as 4, 6 or 8; {ranks} were started")
        return {"sp": ring, "tp": ranks // ring}


WAYS = ("ring", "Ulysses", "hybrid", "decode")
RING = tuple(Strategy("ring", layout) for layout in LAYOUTS)
ALL = (*RING, Strategy("ring", order="canonical"), Strategy("Ulysses"), Strategy("hybrid"))
DECODE = Strategy("decode", "contiguous")


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees; documents are of equal length and causal, a window is causal."""

    causal: bool = False
    window: int = 0
    documents: int = 0

    @property
    def text(self) -> str:
        """`causal, window 256`."""
        words = ["causal"] * self.causal + [f"window {self.window}"] * bool(self.window)
        return ", ".join(words + [f"{self.documents} documents"] * bool(self.documents)) or "full"


FULL, CAUSAL = Mask(), Mask(causal=True)
MASKS = ("full", "causal", "window", "documents")


@dataclass(frozen=True)
class Heads:
    """The attention heads of a model, and the mask usual for it."""

    name: str
    heads: int
    kv_heads: int
    size: int
    mask: str = "causal"


# From the published config.json files. Mixtral's predecessor slides a window over 4,096 tokens, the shape is the same.
MODELS = {
    model.name: model
    for model in (
        Heads("gpt2", 12, 12, 64),
        Heads("llama3-8b", 32, 8, 128),
        Heads("mixtral-8x7b", 32, 8, 128, "window"),
        Heads("long", 4, 2, 64),
    )
}
QUICK_TOKENS, FULL_TOKENS, LONG_TOKENS = 1024, 2048, 32768


@dataclass(frozen=True)
class Case:
    """One row of the table before it is measured."""

    strategy: Strategy
    label: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    size: int
    dtype: str
    mask: Mask = CAUSAL
    backward: bool = False

    @property
    def flops(self) -> int:
        """Two products for every visible pair of a query and a key, five in the backward."""
        from fivedp.bench.visibility import Sight

        pairs = self.batch * self.heads * Sight.of(self).pairs
        return 2 * (5 if self.backward else 2) * pairs * self.size

    @property
    def shape(self) -> str:
        """`batch x tokens x heads x key heads x size`, as the command line takes it."""
        return "x".join(map(str, (self.batch, self.keys, self.heads, self.kv_heads, self.size)))

    @property
    def title(self) -> str:
        """For the progress line."""
        return f"{self.strategy.known_as} {self.label} {self.mask.text} {report.short(self.dtype)} {self.stage}"

    @property
    def stage(self) -> str:
        """`forward` or `backward`."""
        return "backward" if self.backward else "forward"

    def record(self) -> Row:
        """What the row says before anything runs."""
        return {
            "kernel": "attention",
            "label": self.label,
            "strategy": self.strategy.way,
            "known_as": self.strategy.known_as,
            "layout": self.strategy.layout,
            "order": self.strategy.order,
            "mask": self.mask.text,
            "shape": self.shape,
            "sizes": {"batch": self.batch, "queries": self.queries, "keys": self.keys, "heads": self.heads,
                      "kv_heads": self.kv_heads, "size": self.size},
            "dtype": self.dtype,
            "backward": self.backward,
        }  # fmt: skip

    def memory_needed(self, ranks: int) -> float:
        """q, k, v, o and their gradients in the type of sums, and whole copies where order is canonical."""
        elements = self.batch * self.size * (self.queries * self.heads + self.keys * self.kv_heads)
        return 8.0 * elements * (6 + (2 * ranks if self.strategy.order == "canonical" else 4))

    def open(self, bench: Bench) -> Trial:
        """The attention on this rank. Collective."""
        from fivedp.bench.trials.attention import Attention

        return Attention(self, bench)


def _mask(name: str, tokens: int, window: int | None, documents: int | None) -> Mask:
    """The mask called `name`; a window is an eighth of the tokens and documents are 8 where nothing else is said."""
    return {
        "full": FULL,
        "causal": CAUSAL,
        "window": Mask(causal=True, window=window or max(1, tokens // 8)),
        "documents": Mask(causal=True, documents=documents or 8),
    }[name]


def _of(model: str, strategy: Strategy, dtype: str, tokens: int, mask: Mask, backward: bool = False) -> Case:
    m = MODELS[model]
    queries = 1 if strategy.way == "decode" else tokens
    return Case(strategy, model, 1, queries, tokens, m.heads, m.kv_heads, m.size, dtype, mask, backward)


def _both(case: Case) -> list[Case]:
    """The forward, and the backward where there is one."""
    return [case] if case.strategy.way == "decode" else [case, replace(case, backward=True)]


def quick(dtypes: list[str], more: list[str]) -> list[Case]:
    """Every way on GPT-2, every mask, the models' heads, one long sequence; `more` are types measured once."""
    tokens, first = QUICK_TOKENS, dtypes[0]
    zigzag, contiguous = RING[0], RING[2]
    cases = [_of("gpt2", s, first, tokens, CAUSAL) for s in ALL]
    cases += [_of("gpt2", zigzag, dtype, tokens, CAUSAL) for dtype in [*dtypes[1:], *more]]
    cases += [_of("gpt2", zigzag, first, tokens, FULL)]
    cases += [_of("llama3-8b", zigzag, dtype, tokens, CAUSAL) for dtype in dtypes]
    cases += [_of("llama3-8b", contiguous, first, 2 * tokens, Mask(causal=True, documents=16))]
    cases += [_of("mixtral-8x7b", contiguous, first, tokens, Mask(causal=True, window=tokens // 8))]
    both = [x for case in cases for x in _both(case)]
    both += [_of("llama3-8b", DECODE, dtype, 8 * tokens, CAUSAL) for dtype in dtypes]
    return both + [_of("long", zigzag, first, 4 * tokens, CAUSAL)]


def full(dtypes: list[str], tokens: int, window: int | None, documents: int | None) -> list[Case]:
    """Every model under every mask, in all ways where it is causal, in the layouts that matter elsewhere; then long."""
    cases = []
    for model in ("gpt2", "llama3-8b", "mixtral-8x7b"):
        for name in MASKS:
            mask = _mask(name, tokens, window, documents)
            ways = ALL if name == "causal" else RING if name in ("full", MODELS[model].mask) else RING[2:]
            cases += [_of(model, s, dtype, tokens, mask) for s in ways for dtype in dtypes]
        cases += [_of(model, DECODE, dtype, 16 * tokens, CAUSAL) for dtype in dtypes]
    long = [RING[0], Strategy("Ulysses")]
    cases += [_of("long", s, dtype, LONG_TOKENS, CAUSAL) for s in long for dtype in dtypes]
    return [x for case in cases for x in _both(case)]


def given(text: str, strategies: list[Strategy], dtypes: list[str], options: Any) -> list[Case]:
    """The cases of one `--shape`."""
    if text in MODELS:
        model = MODELS[text]
        batch, label = 1, text
        tokens = options.tokens or (LONG_TOKENS if text == "long" else FULL_TOKENS)
    elif re.fullmatch(r"\d+(x\d+){4}", text):
        batch, tokens, heads, kv_heads, size = (int(x) for x in text.split("x"))
        if min(batch, tokens, heads, kv_heads, size) < 1 or heads % kv_heads:
            raise ValueError(f"--shape {text}: sizes must be at least 1, and the heads a multiple of the key heads")
        model, label = Heads("", heads, kv_heads, size), ""
    else:
        raise ValueError(
            f"--shape {text!r} is no attention: give BxSxHxH_kvxD (batch, tokens, heads, key heads, size) or one of "
            f"{', '.join(MODELS)}"
        )
    cases = []
    for name in options.mask or [model.mask]:
        mask = _mask(name, tokens, options.window, options.documents)
        if mask.documents and batch > 1:
            raise ValueError(f"--shape {text}: packed documents have no batch; give 1x{text.partition('x')[2]}")
        for strategy in strategies:
            if strategy.way == "decode" and mask.documents:
                continue
            queries = 1 if strategy.way == "decode" else tokens
            sizes = (batch, queries, tokens, model.heads, model.kv_heads, model.size)
            cases += [Case(strategy, label, *sizes, dtype, mask) for dtype in dtypes]
    return [x for case in cases for x in _both(case)]


def select(options: Any) -> list[Case]:
    """The cases that the command line asks for."""
    if options.order and options.order not in ORDERS:
        raise ValueError(f"--order {options.order} is not one of attention, which has {', '.join(ORDERS)}")
    for name in ("window", "documents"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}; give at least 1")
    if options.reference == "numpy" and options.kernel == "attention":
        raise ValueError("--reference numpy has no attention; give torch")
    dtypes: list[str] = options.dtype or list(DTYPES[:2])
    if odd := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise ValueError(f"--dtype {report.short(odd[0])} is not one of attention, which has f32, bf16, f64")

    def wanted(strategy: Strategy) -> bool:
        return (
            (not options.way or strategy.way in options.way)
            and (not options.layout or strategy.layout in options.layout)
            and (not options.order or strategy.order == options.order)
        )

    tokens = options.tokens or FULL_TOKENS
    if options.shape:
        layouts = options.layout or [None]
        known = [s if layout is None else replace(s, layout=layout) for s in (*ALL, DECODE) for layout in layouts]
        strategies = [s for s in dict.fromkeys(known) if wanted(s)]
        cases = [case for text in options.shape for case in given(text, strategies, dtypes, options)]
    elif options.full:
        cases = full(dtypes, tokens, options.window, options.documents)
    else:
        cases = quick(dtypes, [] if options.dtype else ["float64"])
    cases = [case for case in cases if wanted(case.strategy) and (case.backward or not options.backward)]
    if options.mask:
        kinds = {"window": lambda m: m.window, "documents": lambda m: m.documents}
        kinds |= {"full": lambda m: m == FULL, "causal": lambda m: m == CAUSAL}
        cases = [case for case in cases if any(kinds[name](case.mask) for name in options.mask)]
    if not cases:
        raise ValueError("no attention is of every kind asked for; drop one of --way, --layout, --mask, --order")
    return cases


def add_options(group: argparse._ArgumentGroup) -> None:
    """The options that attention alone has."""
    group.add_argument("--way", action="append", choices=WAYS, help="what moves; repeatable")
    group.add_argument("--layout", action="append", choices=LAYOUTS, help="which tokens a rank holds; repeatable")
    group.add_argument("--mask", action="append", choices=MASKS, help="which keys a query sees; repeatable")
    group.add_argument("--window", type=int, help="keys that a query sees under --mask window (default: an eighth)")
    group.add_argument("--documents", type=int, help="documents of --mask documents (default 8)")


def _cells(row: Row) -> tuple[str, ...]:
    moved, ranks = row["bytes"], row["ranks"]
    same = moved["counted"] == moved["planned"]
    return (
        "backward" if row["backward"] else "forward",
        *report.rate_cells(row),
        report.size(moved["counted"] / ranks),
        "=" if same else report.size(moved["planned"] / ranks),
        "=" if moved["bound"] == moved["counted"] else report.size(moved["bound"] / ranks),
        report.error_cell(row["error"]),
        report.error_cell(row["honest_error"]),
        report.memory_cell(row["memory"]["peak"]),
        report.size(row["memory"]["not_stored"]),
        f"{row['balance']:.2f}",
    )


def _notes(row: Row) -> list[str]:
    price = row.get("canonical_price")
    if price is None:
        return []
    low, high = price["spread"]
    return [f"canonical order takes {price['ratio']:.2f} times the time of order ring ({low:.2f}-{high:.2f})"]


def _heading(row: Row) -> tuple[str, str]:
    sizes = row["sizes"]
    q = ", ".join(str(sizes[name]) for name in ("batch", "queries", "heads", "size"))
    k = ", ".join(str(sizes[name]) for name in ("batch", "keys", "kv_heads", "size"))
    return row["label"] or "attention", f"{row['mask']}   q ({q})   k, v ({k})"


TABLE = Table(
    columns=(
        Column("way", 16, left=True), Column("type", 4, left=True), Column("pass", 8, left=True),
        *report.RATE_COLUMNS, Column("sent/rank", 9), Column("price", 7), Column("least", 7), Column("error", 7),
        Column("plain", 7), Column("memory", 7), Column("S x S", 7), Column("load", 4),
    ),
    group=lambda row: (row["label"], row["mask"], tuple(row["sizes"].values())),
    heading=_heading,
    name=lambda row: row["known_as"],
    cells=_cells,
    notes=_notes,
)  # fmt: skip
FAMILY = Family(
    name="attention",
    known={"models": (*MODELS, "or BxSxHxH_kvxD")},
    own_options=("way", "layout", "mask", "window", "documents"),
    add_options=add_options,
    select=select,
    table=TABLE,
    quick_seconds=0.2,
)
