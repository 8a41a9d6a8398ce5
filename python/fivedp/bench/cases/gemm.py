"""The products that are measured: every strategy of `sharded_matmul`, squares and the layers of real models.

A strategy is a spec with the mesh it needs. A layer is a product C (m x n) = A (m x k) B (k x n) of a published
model: m tokens, k features in, n features out. Quick runs shrink a layer to fit and say by how much; `--full` and a
layer asked for by name run at full size. FLOPs are counted as 2 m n k (8 for complex numbers), three times that with
the backward pass.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fivedp.bench import report
from fivedp.bench.family import Column, Family, Row, Table

if TYPE_CHECKING:
    from fivedp.bench.family import Trial
    from fivedp.bench.measure import Bench


@dataclass(frozen=True)
class Strategy:
    """A way to cut a product, the name it is known by, and the axes of the mesh it runs on."""

    key: str
    known_as: str
    spec: str
    axes: tuple[str, ...]

    def mesh_shape(self, ranks: int) -> dict[str, int]:
        """Axis sizes for `ranks` ranks: one line, the near-square grid, or two such grids behind each other.

        Raises
        ------
        ValueError
            Where the strategy needs ranks that are not there, saying how many would do.
        """
        if len(self.axes) == 1:
            return {self.axes[0]: ranks}
        if len(self.axes) == 2:
            small, large = near_square(ranks)
            return dict(zip(self.axes, (small, large), strict=True))
        if ranks % 2:
            raise ValueError(f"{self.known_as} needs an even number of ranks for its 2 layers; {ranks} were started")
        small, large = near_square(ranks // 2)
        return dict(zip(self.axes, (small, large, 2), strict=True))

    @property
    def batched(self) -> bool:
        """Whether the spec carries a batch index."""
        return self.spec.startswith("b")


STRATEGIES = (
    Strategy("column", "column parallel", "m k, k n/tp -> m n/tp", ("tp",)),
    Strategy("column-gathered", "column parallel, gathered", "m k, k n/tp -> m n", ("tp",)),
    Strategy("row", "row parallel", "m k/tp, k/tp n -> m n", ("tp",)),
    Strategy("row-sequence", "row parallel + sequence parallel", "m k/tp, k/tp n -> m/tp n", ("tp",)),
    Strategy("sequence-column", "sequence-parallel column", "m/tp k, k n/tp -> m n/tp", ("tp",)),
    Strategy("block-rows", "1-D block rows", "m/p k, k/p n -> m/p n", ("p",)),
    Strategy("summa", "SUMMA", "m/r k/c, k/r n/c -> m/r n/c", ("r", "c")),
    Strategy("2.5d", "2.5-D", "m/r k/c*d, k/r*d n/c -> m/r n/c", ("r", "c", "d")),
    Strategy("batched", "batched", "b/dp m k, k n/tp -> b/dp m n/tp", ("dp", "tp")),
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One weight of a published model: `features_in` x `features_out`, and the cut usual for it."""

    name: str
    features_in: int
    features_out: int
    strategy: str


def _dense(model: str, hidden: int, key_values: int, inner: int, vocabulary: int) -> list[Layer]:
    return [
        Layer(f"{model}-qkv", hidden, hidden + 2 * key_values, "sequence-column"),
        Layer(f"{model}-attention-output", hidden, hidden, "row-sequence"),
        Layer(f"{model}-up", hidden, inner, "sequence-column"),
        Layer(f"{model}-down", inner, hidden, "row-sequence"),
        Layer(f"{model}-head", hidden, vocabulary, "column"),
    ]


# hidden size, width of keys (and of values), inner size of the MLP, vocabulary: from the published config.json files
LAYERS = {
    layer.name: layer
    for layer in [
        *_dense("gpt2", 768, 768, 3072, 50257),
        *_dense("llama3-8b", 4096, 1024, 14336, 128256),
        *_dense("llama3-70b", 8192, 1024, 28672, 128256),
        *_dense("mixtral-8x7b", 4096, 1024, 14336, 32000),
    ]
}
QUICK_SQUARE, QUICK_TOKENS, QUICK_FEATURES = 1024, 1024, 2048
FULL_SQUARES = (256, 512, 1024, 2048, 4096)
FULL_TOKENS = 2048
BATCH = 4
ORDERS = ("tree", "canonical", "fast")


@dataclass(frozen=True)
class Case:
    """One row of the table before it is measured."""

    strategy: Strategy
    m: int
    n: int
    k: int
    dtype: str
    batch: int = 1
    label: str = ""
    backward: bool = False
    scaled_by: float = 1.0  # features of the layer divided by this, 1 for the real size
    order: str = "tree"

    @property
    def flops(self) -> int:
        """Operations of the product, and of its two gradients where the case has them."""
        each = 8 if self.dtype.startswith("complex") else 2
        return each * self.batch * self.m * self.n * self.k * (3 if self.backward else 1)

    @property
    def shape(self) -> str:
        """`batch x m x n x k` as the command line takes it."""
        text = f"{self.m}x{self.n}x{self.k}"
        return f"{self.batch}x{text}" if self.strategy.batched else text

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every index that the spec names."""
        sizes = {"m": self.m, "n": self.n, "k": self.k}
        return {"b": self.batch, **sizes} if self.strategy.batched else sizes

    @property
    def title(self) -> str:
        """For the progress line."""
        return f"{self.strategy.known_as} {self.shape} {self.dtype}"

    def record(self) -> Row:
        """What the row says before anything runs."""
        return {
            "kernel": "gemm",
            "label": self.label,
            "strategy": self.strategy.key,
            "known_as": self.strategy.known_as,
            "spec": self.strategy.spec,
            "shape": self.shape,
            "sizes": self.sizes,
            "dtype": self.dtype,
            "backward": self.backward,
            "scaled_by": self.scaled_by,
            "order": self.order,
        }

    def memory_needed(self, ranks: int) -> float:
        """Shares on all ranks, and as much again for panels, partial sums and the check."""
        from fivedp.bench.trials import gemm

        return gemm.memory_needed(self, ranks)

    def open(self, bench: Bench) -> Trial:
        """The product on this rank. Collective."""
        from fivedp.bench.trials.gemm import Product

        return Product(self, bench.grid(self.strategy), bench.seed)


def near_square(ranks: int) -> tuple[int, int]:
    """The two factors of `ranks` nearest to each other, the smaller first."""
    small = next(f for f in range(math.isqrt(ranks), 0, -1) if ranks % f == 0)
    return small, ranks // small


def strategy(text: str) -> Strategy:
    """The strategy that `text` names: its key, what it is known as, or its spec (spaces are free).

    A spec of the user's own is taken as well; its axes are read from it.
    """
    wanted = _squeeze(text)
    for known in STRATEGIES:
        if wanted in (known.key, _squeeze(known.known_as), _squeeze(known.spec)):
            return known
    if "->" not in text:
        raise ValueError(f"--spec {text!r} is no spec and no strategy; known: {', '.join(s.key for s in STRATEGIES)}")
    axes = tuple(dict.fromkeys(re.findall(r"[A-Za-z_]\w*", " ".join(re.findall(r"/([\w*]+)", text)))))
    if not 1 <= len(axes) <= 3:
        raise ValueError(f"--spec {text!r} splits over {len(axes)} axes; the benchmark can set up 1, 2 or 3")
    return Strategy("given", "given", text.strip(), axes)


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def sizes(text: str, tokens: int) -> list[tuple[str, int, int, int, int]]:
    """What `--shape` asks for, as (label, batch, m, n, k): `MxNxK`, `BxMxNxK`, `4096`, a layer, or a model.

    The batch is 0 where none was given: a batched strategy then deals the m rows to a batch of 4.

    Parameters
    ----------
    tokens : int
        Rows m of a layer.
    """
    if re.fullmatch(r"\d+(x\d+)*", text):
        numbers = [int(x) for x in text.split("x")]
        if min(numbers) < 1:
            raise ValueError(f"--shape {text}: every size must be at least 1")
        if len(numbers) == 1:
            numbers *= 3
        if len(numbers) == 3:
            numbers = [0, *numbers]
        if len(numbers) != 4:
            raise ValueError(f"--shape {text}: give MxNxK, BxMxNxK or one number, not {len(numbers)} numbers")
        batch, m, n, k = numbers
        return [("square" if m == n == k else "", batch, m, n, k)]
    found = [layer for name, layer in LAYERS.items() if name == text or name.startswith(text + "-")]
    if not found:
        raise ValueError(f"--shape {text!r} is neither sizes nor a layer; layers: {', '.join(LAYERS)}")
    return [(layer.name, 0, tokens, layer.features_out, layer.features_in) for layer in found]


def quick(dtypes: list[str]) -> list[Case]:
    """Every strategy once per type, the layers of two models at sizes that fit, and three gradients."""
    cases = []
    for known in STRATEGIES:
        rows = QUICK_SQUARE // 2 if known.batched else QUICK_SQUARE
        batch = BATCH if known.batched else 1
        cases += [Case(known, rows, QUICK_SQUARE, QUICK_SQUARE, dtype, batch, label="square") for dtype in dtypes]
    first = dtypes[:1]
    cases += [Case(strategy("summa"), 1001, 997, 1013, dtype, label="nothing divides") for dtype in first]
    for name in ("gpt2-up", "gpt2-down", "llama3-8b-qkv", "llama3-8b-attention-output", "llama3-8b-down"):
        cases += [_scaled(LAYERS[name], dtype) for dtype in first]
    for key in ("sequence-column", "row-sequence", "summa"):
        square = QUICK_SQUARE // 2
        cases += [Case(strategy(key), square, square, square, dtype, label="square", backward=True) for dtype in first]
    return cases


def _scaled(layer: Layer, dtype: str) -> Case:
    """`layer` with both feature sizes divided so that the larger fits a quick run; the shape keeps its proportions."""
    by = max(1.0, max(layer.features_in, layer.features_out) / QUICK_FEATURES)
    features_in, features_out = round(layer.features_in / by), round(layer.features_out / by)
    return Case(
        strategy(layer.strategy), QUICK_TOKENS, features_out, features_in, dtype, label=layer.name, scaled_by=by
    )


def full(dtypes: list[str], tokens: int = FULL_TOKENS) -> list[Case]:
    """Every strategy on squares up to 4096, every layer at its real size, gradients of every strategy."""
    cases = []
    for known in STRATEGIES:
        for square in FULL_SQUARES:
            batch = BATCH if known.batched else 1
            rows = square // BATCH if known.batched else square
            cases += [Case(known, rows, square, square, dtype, batch, label="square") for dtype in dtypes]
        cases += [Case(known, 1024, 1024, 1024, dtype, label="square", backward=True) for dtype in dtypes]
    cases += [Case(strategy("summa"), 1001, 997, 1013, dtype, label="nothing divides") for dtype in dtypes]
    for layer in LAYERS.values():
        known = strategy(layer.strategy)
        cases += [
            Case(known, tokens, layer.features_out, layer.features_in, dtype, label=layer.name) for dtype in dtypes
        ]
    return cases


def select(options: Any) -> list[Case]:
    """The cases that the command line asks for: `options` has full, shape, spec, dtype, tokens, backward and order."""
    order = options.order or ORDERS[0]
    if order not in ORDERS:
        raise ValueError(f"--order {order} is not one of gemm, which has {', '.join(ORDERS)}")
    dtypes: list[str] = options.dtype or ["float32", "bfloat16"]
    tokens = options.tokens or FULL_TOKENS
    specs = [strategy(text) for text in options.spec or []]
    if not options.shape:
        cases = full(dtypes, tokens) if options.full else quick(dtypes)
        if specs:
            own = [s for s in specs if s.key == "given"]
            keys = {s.key for s in specs}
            cases = [c for c in cases if c.strategy.key in keys]
            cases += [
                Case(s, QUICK_SQUARE, QUICK_SQUARE, QUICK_SQUARE, dtype, BATCH if s.batched else 1)
                for s in own
                for dtype in dtypes
            ]
    else:
        cases = []
        for text in options.shape:
            for label, batch, m, n, k in sizes(text, tokens):
                usual = [strategy(LAYERS[label].strategy)] if label in LAYERS else list(STRATEGIES)
                for known in specs or usual:
                    rows, times = m, 1
                    if known.batched:
                        rows, times = (m, batch) if batch else (max(1, m // BATCH), BATCH)
                    cases += [Case(known, rows, n, k, dtype, times, label=label) for dtype in dtypes]
    return [replace(case, backward=case.backward or options.backward, order=order) for case in cases]


def add_options(group: argparse._ArgumentGroup) -> None:
    """The options that gemm alone has."""
    group.add_argument("--spec", action="append", help="a spec or the name of a strategy; repeatable")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row["schedule"],
        *report.rate_cells(row),
        *report.bytes_cells(row),
        report.error_cell(row["error"]),
        report.memory_cell(row["memory"]["peak"]),
        {True: "same", False: "other", None: "-"}[row["same_bits"]],
    )


def _notes(row: Row) -> list[str]:
    notes = ["forward + backward"] if row["backward"] else []
    if row["scaled_by"] != 1:
        notes.append(f"features scaled down {row['scaled_by']:g} times; --shape {row['label']} runs the real size")
    return notes


TABLE = Table(
    columns=(
        Column("product", 27, left=True), Column("type", 4, left=True), Column("schedule", 14, left=True),
        *report.RATE_COLUMNS, Column("sent/rank", 9), Column("least", 8), Column("error", 7), Column("memory", 8),
        Column("bits", 5, left=True),
    ),
    group=lambda row: (row["known_as"], row["spec"]),
    heading=lambda row: (row["known_as"], "   ".join(filter(None, [row["spec"], row.get("mesh")]))),
    name=lambda row: " ".join(filter(None, [row["label"] if row["label"] != "square" else "", row["shape"]])),
    cells=_cells,
    notes=_notes,
)  # fmt: skip
FAMILY = Family(
    name="gemm",
    known={"strategies": tuple(s.key for s in STRATEGIES), "layers": tuple(LAYERS)},
    own_options=("spec",),
    add_options=add_options,
    select=select,
    table=TABLE,
)
