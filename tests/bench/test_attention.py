"""The attention benchmark counts what it says it counts, and finds one wrong element wherever it stands."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fivedp.bench import attention_check, measure, operands, report
from fivedp.bench.cases import FAMILIES, attention
from fivedp.bench.cases.attention import ALL, CAUSAL, DECODE, FULL, LAYOUTS, RING, Case, Mask, Strategy
from fivedp.bench.program import choose, parser
from fivedp.bench.trials.attention import pairs_by_rank, priced
from fivedp.bench.visibility import Sight, held, offsets
from fivedp.kernels import attention as kernel
from fivedp.layout.sequence import token_indices
from fivedp.reference.attention_reference import attention as oracle
from fivedp.reference.attention_reference import attention_backward as oracle_backward
from fivedp.reference.attention_reference import seen

ALONE = SimpleNamespace(rank=0, size=1)
MASKS = [FULL, CAUSAL, Mask(causal=True, window=9), Mask(window=9), Mask(causal=True, documents=5)]


def drawn() -> int:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return seed


def a_case(strategy: Strategy = RING[0], mask: Mask = CAUSAL, dtype: str = "float32", **changes: Any) -> Case:
    sizes = {"batch": 1, "queries": 70, "keys": 70, "heads": 4, "kv_heads": 2, "size": 8} | changes
    return Case(strategy, "", *(sizes[name] for name in ("batch", "queries", "keys", "heads", "kv_heads", "size")),
                dtype, mask, changes.get("backward", False))  # fmt: skip


def kernel_mask(case: Case) -> kernel.Mask:
    """What the library calls the mask of a case."""
    tokens = np.arange(case.keys)
    edges = offsets(case.mask, case.keys)
    document = None if edges is None else (np.searchsorted(edges, tokens, side="right") - 1).astype(np.int32)
    position = tokens if edges is None else tokens - edges[document]
    position = position.astype(np.int32)
    return kernel.Mask(position[-case.queries :], position, document, document, scale=case.size**-0.5,
                       causal=case.mask.causal, window=case.mask.window)  # fmt: skip


def options(*words: str) -> Any:
    return parser().parse_args(words)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_tokens_are_held_where_the_library_puts_them(layout: str, ranks: int) -> None:
    for length in (0, 1, 7, 64):
        for rank in range(ranks):
            assert held(layout, length, ranks, rank).tolist() == token_indices(layout, length, ranks, rank).tolist()


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.text)
def test_sight_is_the_mask_written_out(mask: Mask) -> None:
    case, draw = a_case(mask=mask), np.random.default_rng(drawn())
    visible, sight = seen(kernel_mask(case)), Sight.of(case)
    everything = np.arange(case.keys)
    assert (sight.matrix(everything, everything) == visible).all()
    assert sight.pairs == visible.sum()
    some = np.sort(draw.choice(everything, 11, replace=False))
    assert (sight.seen_by(some) == visible[some].any(axis=0)).all()
    assert (sight.counts(some) == visible[:, some].sum(axis=1)).all()


def test_flops_are_two_products_of_every_visible_pair() -> None:
    case = a_case(mask=Mask(causal=True, window=9))
    counted = sum(
        2 * 2 * case.size
        for _, i, j in itertools.product(range(case.heads), range(case.queries), range(case.keys))
        if 0 <= i - j < 9
    )
    assert case.flops == counted
    assert a_case(mask=case.mask, backward=True).flops == 2.5 * counted


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.text)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_least_bytes_of_a_ring_are_those_of_the_tokens_that_matter(
    layout: str, mask: Mask, backward: bool, kv_heads: int
) -> None:
    ranks, visible = 4, seen(kernel_mask(a_case(mask=mask)))
    case = a_case(Strategy("ring", layout), mask, backward=backward, kv_heads=kv_heads)
    places = [held(layout, case.keys, ranks, rank) for rank in range(ranks)]
    pairs = [
        visible[np.ix_(mine, theirs)] for r, mine in enumerate(places) for s, theirs in enumerate(places) if r != s
    ]
    keys, queries = (sum(int(pair.any(axis=axis).sum()) for pair in pairs) for axis in (0, 1))
    of_a_key = 2 * kv_heads * case.size * (8 if backward else 4)  # k, v and their gradients
    of_a_query = case.heads * (3 * case.size + 2) * 4  # q, do, dq, lse, delta
    planned, least = priced(case, ranks)
    assert least == (min(keys * of_a_key, queries * of_a_query) if backward else keys * of_a_key)
    assert least <= planned
    if mask == FULL:
        of_a_token = of_a_query if backward and kv_heads == 4 else of_a_key
        assert least == planned == (ranks - 1) * case.keys * of_a_token


@pytest.mark.parametrize("strategy", [*ALL, DECODE], ids=lambda s: s.known_as)
@pytest.mark.parametrize("backward", [False, True])
def test_what_is_planned_is_never_below_the_least(strategy: Strategy, backward: bool) -> None:
    for ranks, mask, kv_heads in itertools.product((2, 4, 6, 8), MASKS, (1, 2, 4)):
        if strategy.way == "decode" and (backward or mask.documents):
            continue
        if strategy.way == "hybrid" and ranks == 2:
            continue
        queries = 1 if strategy.way == "decode" else 70
        case = a_case(strategy, mask, "bfloat16", kv_heads=kv_heads, queries=queries, backward=backward)
        planned, least = priced(case, ranks)
        assert 0 <= least <= planned
        if strategy.way == "hybrid" and mask == CAUSAL and kv_heads == 4 and ranks in (4, 8):
            assert least == planned  # a block is the sequence's order, so what is seen of it is one range
        if strategy.way == "Ulysses" and kv_heads == 4 and ranks in (2, 4):
            assert least == planned
    assert priced(a_case(RING[0]), 1) == (0, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_ranks_share_all_pairs_and_zigzag_shares_them_evenly(ranks: int) -> None:
    for strategy, backward in itertools.product((*ALL, DECODE), (False, True)):
        if (strategy.way == "hybrid" and ranks < 4) or (strategy.way == "decode" and backward):
            continue
        queries = 1 if strategy.way == "decode" else 64
        case = a_case(strategy, CAUSAL, queries=queries, keys=64, kv_heads=4, backward=backward)
        loads = pairs_by_rank(case, ranks)
        assert sum(loads) == case.heads * Sight.of(case).pairs
        if strategy == RING[0] and 64 % (2 * ranks) == 0:
            assert len(set(loads)) == 1


def test_a_rank_computes_the_pairs_of_what_stays_with_it() -> None:
    ring = Strategy("ring", "contiguous")
    by_queries = pairs_by_rank(a_case(ring), 4)
    assert by_queries == sorted(by_queries) != by_queries[::-1]
    assert pairs_by_rank(a_case(ring, backward=True), 4) == by_queries  # two heads share keys: these travel
    whole = {"queries": 72, "keys": 72, "kv_heads": 4}
    by_queries = pairs_by_rank(a_case(ring, **whole), 4)
    assert pairs_by_rank(a_case(ring, backward=True, **whole), 4) == by_queries[::-1]


def judged(case: Case, spoil: Any = None) -> attention_check.Check:
    """The check of the oracle's results, rounded to the type, on one rank; `spoil` is called with them."""
    bench = measure.Bench(ALONE, {}, drawn())
    shares = attention_check.Shares(case, bench.seed)
    everything, whole = np.arange(case.keys), slice(None)
    queries = np.arange(case.queries)
    q, k, v, do = (shares.make(x, queries if x in ("q", "do") else everything, whole) for x in ("q", "k", "v", "do"))
    dtype, sums = q.dtype, np.float64 if case.dtype == "float64" else np.float32
    forward = oracle(q, k, v, kernel_mask(case))
    o, lse = forward.out.astype(dtype), forward.lse.astype(sums)
    results = [o, lse]
    if case.backward:
        results = [x.astype(dtype) for x in oracle_backward(do, q, k, v, kernel_mask(case))]
    if spoil is not None:
        spoil(results, np.random.default_rng(bench.seed))
    check = attention_check.Check(bench, shares, queries, everything)
    if case.backward:
        check.backward(*results)
        check.conservation(o, *results)
    else:
        check.forward(*results)
    return check


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.text)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True])
def test_an_honest_attention_is_accepted(mask: Mask, dtype: str, backward: bool) -> None:
    batch = 1 if mask.documents else 2
    check = judged(a_case(mask=mask, dtype=dtype, backward=backward, batch=batch))
    assert check.wrong == ""
    assert check.found()["error"] <= 2 * check.found()["honest_error"]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_element_of_a_gradient_is_found_wherever_it_stands(number: int, dtype: str) -> None:
    def spoil(results: list[Any], draw: np.random.Generator) -> None:
        x = results[number]
        place = tuple(int(draw.integers(n)) for n in x.shape)
        print(f"element {place} of result {number}")
        x[place] += np.asarray(16, x.dtype)

    assert judged(a_case(dtype=dtype, backward=True), spoil).wrong


def test_a_block_of_keys_that_was_forgotten_is_found() -> None:
    case = a_case(keys=70, queries=70)

    def spoil(results: list[Any], draw: np.random.Generator) -> None:
        fewer = a_case(mask=Mask(causal=True, window=35))
        shares = attention_check.Shares(case, int(draw.bit_generator.seed_seq.entropy))  # type: ignore[attr-defined]
        everything = np.arange(70)
        q, k, v = (shares.make(x, everything, slice(None)) for x in "qkv")
        results[0][...] = oracle(q, k, v, kernel_mask(fewer)).out

    assert "exceeds" in judged(case, spoil).wrong


def test_an_output_that_is_not_a_number_is_wrong() -> None:
    def spoil(results: list[Any], draw: np.random.Generator) -> None:
        results[0][0, 33, 1, 5] = np.nan

    assert judged(a_case(), spoil).wrong


def test_any_part_of_the_inputs_can_be_made_again() -> None:
    shares = attention_check.Shares(a_case(batch=2, dtype="bfloat16"), drawn())
    whole = shares.make("k", np.arange(70), slice(None))
    assert whole.shape == (2, 70, 2, 8)
    assert whole.dtype == operands.dtype_of("bfloat16")
    part = shares.make("k", np.array([3, 69]), slice(1, 2))
    assert (part == whole[:, [3, 69], 1:2]).all()
    assert (shares.make("q", np.arange(70), slice(None))[:, :, :2] != whole).any()


def test_quick_run_covers_every_way_mask_model_and_type() -> None:
    cases = attention.select(options("attention"))
    assert {c.strategy for c in cases} == {*ALL, DECODE}
    assert {c.dtype for c in cases} == {"float32", "bfloat16", "float64"}
    assert {c.label for c in cases} == set(attention.MODELS)
    for has in (lambda m: m.window, lambda m: m.documents, lambda m: m == FULL, lambda m: m == CAUSAL):
        assert any(has(c.mask) for c in cases)
    assert {c.strategy.way for c in cases if c.backward} == {"ring", "Ulysses", "hybrid"}
    assert max(c.keys for c in attention.select(options("attention", "--full"))) == 32768


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--shape", "gpt9"), "no attention"),
        (("--shape", "1x8x3x2x4"), "multiple"),
        (("--dtype", "c64"), "f32, bf16, f64"),
        (("--order", "fast"), "ring, canonical"),
        (("--spec", "row"), "belongs to gemm"),
        (("--way", "decode", "--order", "canonical"), "of every kind"),
        (("--reference", "numpy"), "give torch"),
        (("--window", "0"), "--window is 0; give at least 1"),
        (("--shape", "2x8x2x2x4", "--mask", "documents"), "no batch"),
    ],
)
def test_what_attention_does_not_have_is_refused(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        choose(options("attention", *words))


@pytest.mark.parametrize(
    ("words", "families"),
    [
        ((), ["gemm", "attention", "moe"]),
        (("--shape", "gpt2"), ["gemm", "attention"]),
        (("--spec", "row"), ["gemm"]),
        (("--shape", "64x64x64"), ["gemm"]),
        (("--shape", "1x64x4x2x16"), ["attention"]),
        (("--layout", "striped"), ["attention"]),
        (("--shape", "mixtral-8x7b"), ["gemm", "attention", "moe"]),
        (("--shape", "8x16x4x4/2"), ["moe"]),
        (("--workload", "zipf"), ["moe"]),
        (("--dtype", "c64"), ["gemm"]),
    ],
)
def test_without_a_name_every_kernel_runs_that_knows_the_options(words: tuple[str, ...], families: list[str]) -> None:
    assert [family.name for family, cases in choose(options(*words)) if cases] == families


def test_options_choose_among_the_cases() -> None:
    cases = attention.select(options("attention", "--shape", "llama3-8b", "--layout", "striped", "--tokens", "96",
                                     "--mask", "window", "--window", "5", "--dtype", "bf16"))  # fmt: skip
    assert {(c.strategy.layout, c.keys, c.mask, c.dtype) for c in cases} == {
        ("striped", 96, Mask(causal=True, window=5), "bfloat16")
    }
    assert {c.backward for c in cases} == {False, True}
    assert all(c.backward for c in attention.select(options("attention", "--backward")))


def a_row(**changes: Any) -> report.Row:
    row = a_case().record() | {
        "ranks": 2, "wrong": "", "mesh": "p=2", "bytes": {"counted": 8000, "planned": 8000, "bound": 6000},
        "memory": {"peak": 1000, "not_stored": 39200}, "pairs": [4970, 4970], "balance": 1.0, "seconds": 1e-3,
        "samples": [1e-3], "flops": 1, "gflops": 1.0, "share_of_peak": 0.5, "error": 1e-7, "honest_error": 2e-7,
        "errors": {"o": 1e-7, "lse": 1e-8}, "honest_errors": {"o": 2e-7, "lse": 1e-8},
        "conservation": 0.0, "same_bits": None, "repeatable": True,
    }  # fmt: skip
    return row | changes


def test_a_row_says_what_was_sent_priced_and_needed(tmp_path: Path) -> None:
    paint = report.Paint(io.StringIO())
    head = report.column_line(FAMILIES["attention"].table).split()
    assert not {"way", "pass", "sent/rank", "price", "least", "error", "plain", "memory", "load"} - set(head)
    (line,) = report.row_lines(a_row(), paint)
    assert line.split() == [
        "ring,", "zigzag", "f32", "forward", "1.00", "ms", "1.0", "50%", "4.00", "kB", "=", "3.00", "kB", "1.0e-07",
        "2.0e-07", "1.00", "kB", "39.2", "kB", "1.00",
    ]  # fmt: skip
    more = report.row_lines(a_row(wrong="sent 8000 bytes where 9000 were planned"), paint)
    assert "WRONG: sent 8000 bytes where 9000 were planned" in more[-1]
    canonical = a_row(canonical_price={"ratio": 1.25, "spread": [1.1, 1.5]})
    assert "canonical order takes 1.25 times" in report.row_lines(canonical, paint)[1]
    machine = {"ranks": 2}
    result = report.new(machine, {}, 1, "2026-01-01") | {"rows": [canonical, a_row(skipped="too few ranks")]}
    report.write_json(result, tmp_path / "r.json")
    assert report.read_json(tmp_path / "r.json") == result


def test_the_table_fits_a_hundred_and_twenty_columns() -> None:
    paint = report.Paint(io.StringIO())
    wide = a_row(known_as="ring, contiguous", backward=True, seconds=123.4, gflops=12345.6,
                 bytes={"counted": 10**12, "planned": 9 * 10**11, "bound": 10**11},
                 memory={"peak": 10**9, "not_stored": 10**9})  # fmt: skip
    lines = [report.column_line(FAMILIES["attention"].table), *report.row_lines(wide, paint)]
    assert max(map(len, lines)) <= 120
