"""The benchmark's case list covers the contract, and its formulas agree with counting."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fivedp.bench import account, measure, pieces
from fivedp.bench.cases import gemm
from fivedp.bench.program import parser
from fivedp.bench.trials import gemm as trials
from fivedp.layout.spec import parse_product

CONTRACT = [
    "m k, k n/tp -> m n/tp",
    "m k, k n/tp -> m n",
    "m k/tp, k/tp n -> m n",
    "m k/tp, k/tp n -> m/tp n",
    "m/tp k, k n/tp -> m n/tp",
    "m/p k, k/p n -> m/p n",
    "m/r k/c, k/r n/c -> m/r n/c",
    "m/r k/c*d, k/r*d n/c -> m/r n/c",
    "b/dp m k, k n/tp -> b/dp m n/tp",
]


def options(*words: str) -> Any:
    return parser().parse_args(words)


@pytest.mark.parametrize("words", [(), ("--full",), ("--shape", "64x64x64")], ids=["quick", "full", "shape"])
def test_every_spec_of_the_contract_is_measured_in_both_types(words: tuple[str, ...]) -> None:
    cases = gemm.select(options(*words))
    for dtype in ("float32", "bfloat16"):
        assert {c.strategy.spec for c in cases if c.dtype == dtype} == set(CONTRACT)


@pytest.mark.parametrize("ranks", range(1, 25))
def test_mesh_uses_every_rank_or_says_what_is_missing(ranks: int) -> None:
    for strategy in gemm.STRATEGIES:
        if len(strategy.axes) == 3 and ranks % 2:
            with pytest.raises(ValueError, match="even number of ranks"):
                strategy.mesh_shape(ranks)
            continue
        shape = strategy.mesh_shape(ranks)
        assert tuple(shape) == strategy.axes
        assert math.prod(shape.values()) == ranks


@pytest.mark.parametrize("ranks", range(1, 65))
def test_near_square_grid_has_no_better_factorisation(ranks: int) -> None:
    small, large = gemm.near_square(ranks)
    assert small * large == ranks
    assert large - small == min(abs(f - ranks // f) for f in range(1, ranks + 1) if ranks % f == 0)


def test_layers_have_the_parameter_counts_of_their_models() -> None:
    """Weights of all layers: GPT-2 124M has 12 blocks and ties its head; LLaMA-3 adds a gate and an embedding."""

    def weights(name: str) -> int:
        return gemm.LAYERS[name].features_in * gemm.LAYERS[name].features_out

    def block(model: str, mlps: int, gated: bool) -> int:
        attention = weights(f"{model}-qkv") + weights(f"{model}-attention-output")
        return attention + mlps * (weights(f"{model}-up") * (2 if gated else 1) + weights(f"{model}-down"))

    gpt2 = 12 * block("gpt2", 1, False) + weights("gpt2-head") + 1024 * 768
    assert gpt2 == pytest.approx(124.4e6, rel=2e-3)  # biases and norms are the difference
    assert 32 * block("llama3-8b", 1, True) + 2 * weights("llama3-8b-head") == pytest.approx(8.03e9, rel=1e-3)
    assert 80 * block("llama3-70b", 1, True) + 2 * weights("llama3-70b-head") == pytest.approx(70.55e9, rel=1e-3)
    assert 32 * block("mixtral-8x7b", 8, True) + 2 * weights("mixtral-8x7b-head") == pytest.approx(46.7e9, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3x5x7", [("", 0, 3, 5, 7)]),
        ("2x3x5x7", [("", 2, 3, 5, 7)]),
        ("96", [("square", 0, 96, 96, 96)]),
        ("llama3-8b-down", [("llama3-8b-down", 0, 17, 4096, 14336)]),
    ],
)
def test_shape_reads_sizes_and_layers(text: str, found: list[Any]) -> None:
    assert gemm.sizes(text, tokens=17) == found


def test_every_strategy_does_the_same_work_on_the_same_shape() -> None:
    cases = gemm.select(options("--shape", "64x48x80", "--dtype", "f32"))
    assert {c.flops for c in cases} == {2 * 64 * 48 * 80}


@pytest.mark.parametrize("text", ["0x3x5", "3x5", "1x2x3x4x5", "llama9", "axb"])
def test_shape_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--shape"):
        gemm.sizes(text, tokens=17)


def test_a_model_by_name_runs_all_its_layers_at_full_size() -> None:
    cases = gemm.select(options("--shape", "llama3-70b", "--tokens", "3", "--dtype", "bf16"))
    assert {c.label.removeprefix("llama3-70b-") for c in cases} == {"qkv", "attention-output", "up", "down", "head"}
    assert {c.m for c in cases} == {3}
    assert {c.scaled_by for c in cases} == {1.0}
    assert {c.dtype for c in cases} == {"bfloat16"}


def test_scaled_layers_keep_their_proportions_and_say_so() -> None:
    for case in gemm.quick(["float32"]):
        if case.label in gemm.LAYERS:
            layer = gemm.LAYERS[case.label]
            assert case.n * layer.features_in == pytest.approx(case.k * layer.features_out, rel=1e-2)
            assert case.scaled_by == pytest.approx(layer.features_in / case.k, rel=1e-2)


def test_flops_are_counted_as_multiplications_and_additions() -> None:
    draw = np.random.default_rng()
    batch, m, n, k = (int(x) for x in draw.integers(1, 9, 4))
    print(f"batch {batch}, m {m}, n {n}, k {k}")
    real = gemm.Case(gemm.strategy("batched"), m, n, k, "float32", batch)
    counted = sum(2 for _ in itertools.product(range(batch), range(m), range(n), range(k)))
    assert real.flops == counted
    # a complex multiplication is 4 and 2, its addition 2; both gradients are products of as many terms
    assert gemm.Case(real.strategy, m, n, k, "complex64", batch).flops == 4 * counted
    assert gemm.Case(real.strategy, m, n, k, "float32", batch, backward=True).flops == 3 * counted


FAMILIAR = {
    # total words over all ranks for p ranks and an m x k by k x n product with n = k = m, f32
    "column": lambda p, n2: 0,
    "column-gathered": lambda p, n2: (p - 1) * n2,
    "row": lambda p, n2: 2 * (p - 1) * n2,
    "row-sequence": lambda p, n2: (p - 1) * n2,
    "sequence-column": lambda p, n2: (p - 1) * n2,
    "block-rows": lambda p, n2: (p - 1) * n2,
}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("key", FAMILIAR)
def test_least_bytes_of_squares_are_those_of_the_literature(key: str, ranks: int) -> None:
    strategy = gemm.strategy(key)
    case = gemm.Case(strategy, 64, 64, 64, "float32")
    assert trials.line_bound(parse_product(strategy.spec), case, ranks) == 4 * FAMILIAR[key](ranks, 64 * 64)


def test_decode_on_block_rows_moves_activations_instead_of_weights() -> None:
    """M = 8, N = 28672, K = 8192, 8 ranks: gathering B costs a thousand times exchanging A and reducing C."""
    strategy = gemm.strategy("block-rows")
    case = gemm.Case(strategy, 8, 28672, 8192, "float32")
    least = trials.line_bound(parse_product(strategy.spec), case, 8)
    exchanged = 4 * (7 * 8 * 8192 // 8 + 7 * 8 * 28672)
    assert least == exchanged
    assert least < 7 * 8192 * 28672 * 4 / 900


def test_sizes_that_do_not_divide_have_no_closed_form() -> None:
    strategy = gemm.strategy("row")
    assert trials.line_bound(parse_product(strategy.spec), gemm.Case(strategy, 64, 64, 65, "float32"), 2) is None


@pytest.mark.parametrize("key", [s.key for s in gemm.STRATEGIES if len(s.axes) == 1])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_planner_reaches_the_closed_form_on_one_axis(key: str, ranks: int, dtype: str) -> None:
    draw = np.random.default_rng()
    seed = int(draw.integers(2**31))
    m, n, k = (24 * int(x) * ranks for x in np.random.default_rng(seed).integers(1, 9, 3))
    print(f"seed {seed}: m {m}, n {n}, k {k}")
    strategy = gemm.strategy(key)
    case = gemm.Case(strategy, m, n, k, dtype)
    grid = pieces.Grid(None, None, strategy.mesh_shape(ranks), {})
    plan = trials.planned(case, grid)
    assert plan.bytes == plan.bound == trials.line_bound(parse_product(strategy.spec), case, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_shares_tile_every_operand_exactly_once(ranks: int) -> None:
    draw = np.random.default_rng()
    sizes = dict(zip("bmnk", (int(x) for x in draw.integers(1, 12, 4)), strict=True))
    print(sizes)
    for strategy in gemm.STRATEGIES:
        try:
            shape = strategy.mesh_shape(ranks)
        except ValueError:
            continue
        for layout in pieces.layouts(strategy.spec):
            rows = sizes.get(layout.names[-2], 1) * (sizes["b"] if len(layout.names) == 3 else 1)
            seen = np.zeros((rows, sizes[layout.names[-1]]), dtype=int)
            for coords in itertools.product(*(range(n) for n in shape.values())):
                where = pieces.place(
                    layout, sizes, pieces.Grid(None, None, shape, dict(zip(shape, coords, strict=True)))
                )
                if where.first_holder:
                    seen[np.ix_(where.rows, where.columns)] += 1
            assert (seen == 1).all(), (strategy.spec, str(layout))


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 13])
def test_span_cuts_as_array_split_does(parts: int) -> None:
    for size in (0, 1, 6, 29):
        expected = [x.tolist() for x in np.array_split(np.arange(size), parts)]
        assert [list(pieces.span(size, parts, i)) for i in range(parts)] == expected


@pytest.mark.parametrize(("room", "fits"), [(10**12, True), (10**6, False), (None, True)])
def test_a_case_larger_than_the_memory_is_not_run(
    monkeypatch: pytest.MonkeyPatch, room: int | None, fits: bool
) -> None:
    monkeypatch.setattr(account, "available", lambda: room)
    bench = measure.Bench(SimpleNamespace(rank=0, size=1), {}, 1)
    why = measure.unfit(bench, gemm.Case(gemm.strategy("row"), 4096, 4096, 4096, "float32"))
    assert (why == "") == fits
    assert fits or "are free" in why
