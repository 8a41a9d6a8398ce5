"""The benchmark of experts counts what it says it counts, and finds one wrong element wherever it stands."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.bench import expert_workload, mixture, operands, order_price, report
from fivedp.bench.cases import FAMILIES, moe
from fivedp.bench.cases.moe import Case, Model
from fivedp.bench.mixture import Inputs, Weights
from fivedp.bench.moe_check import Check
from fivedp.bench.program import choose, parser
from fivedp.bench.stages import Stopwatch
from fivedp.bench.trials import moe as moe_trial
from fivedp.bench.trials.moe import pairs_by_rank, traffic
from fivedp.kernels import experts as kernel

ALONE = SimpleNamespace(rank=0, size=1)
SWIGLU = Model("", 24, 10, 6, 3)
MODELS = [SWIGLU, Model("", 24, 10, 6, 2, "relu", normalize=False), Model("", 24, 10, 6, 2, score="sigmoid")]


def drawn() -> int:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return seed


def a_case(model: Model = SWIGLU, tokens: int = 50, dtype: str = "float32", **changes: Any) -> Case:
    return Case(model, tokens, dtype, **changes)


def options(*words: str) -> Any:
    return parser().parse_args(words)


def draws(tokens: int, experts: int) -> Any:
    return operands.block(drawn(), range(tokens), range(experts), np.dtype(np.float32))


@pytest.mark.parametrize("workload", expert_workload.WORKLOADS)
@pytest.mark.parametrize("experts", [1, 2, 7, 256])
def test_logits_are_exact_in_every_type_and_do_not_tie_where_it_matters(workload: str, experts: int) -> None:
    values = expert_workload.logits(workload, draws(40, experts))
    for dtype in ("bfloat16", "float32", "float64"):
        x = np.zeros((40, experts + 3), operands.dtype_of(dtype))
        expert_workload.put_logits(x, values)
        router = expert_workload.router(experts + 3, experts, x.dtype)
        assert (x.astype(np.float32) @ router.astype(np.float32) == values).all()
    top = -np.sort(-values, axis=1)[:, : min(experts, 20)]
    assert (np.diff(top, axis=1) < 0).all()


def test_experts_are_chosen_as_often_as_the_workload_says() -> None:
    tokens, experts = 20000, 8
    for workload in expert_workload.WORKLOADS:
        chosen = expert_workload.choices(expert_workload.logits(workload, draws(tokens, experts)), 2)
        first = np.bincount(chosen[:, 0], minlength=experts) / tokens
        assert np.abs(first - expert_workload.popularity(workload, experts)).max() < 0.02  # 5 deviations
        assert (chosen[:, 0] != chosen[:, 1]).all()
        if workload == "one_expert":
            assert (chosen == [0, 1]).all()
    zipf = expert_workload.popularity("zipf", experts)
    assert zipf[0] / zipf[3] == pytest.approx(4**1.1)
    with pytest.raises(ValueError, match="uniform, zipf, one_expert"):
        expert_workload.popularity("even", 3)


def test_flops_are_the_products_of_every_pair() -> None:
    case = a_case()
    assert case.flops == sum(2 * 24 * 10 for _ in itertools.product(range(50), range(3), ("gate", "up", "down")))
    assert a_case(backward=True).flops == 2 * case.flops
    assert a_case(MODELS[1]).flops == 2 * 24 * 10 * 2 * 50 * 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_least_bytes_are_those_of_a_token_once_to_each_rank_and_back(ranks: int, backward: bool) -> None:
    model = Model("", 24, 10, 13, 4)
    case = a_case(model, 37, "bfloat16", backward=backward)
    chosen = Inputs(case, drawn()).choices(range(37))
    owner = np.concatenate([[r] * len(x) for r, x in enumerate(np.array_split(np.arange(13), ranks))]).astype(int)
    home = np.concatenate([[r] * len(x) for r, x in enumerate(np.array_split(np.arange(37), ranks))]).astype(int)
    rows = sum(len({int(owner[e]) for e in chosen[t]} - {int(home[t])}) for t in range(37))
    pairs = sum(int(owner[e]) != int(home[t]) for t in range(37) for e in chosen[t])
    found = traffic(chosen, case, ranks, backward)
    assert found["rows"] == found["deduplicated"] == rows * 24 * 2
    assert found["naive"] == pairs * 24 * 2 >= found["rows"]
    assert found["bound"] <= found["planned"]
    if backward:
        assert found["scalars"] == 4 * pairs
        assert found["planned"] == 2 * found["rows"] + found["returns"] + found["scalars"] + found["router"]
    else:
        assert found["bound"] == rows * 24 * (2 + 4) + 12 * pairs
        assert found["planned"] == found["pairs"] + found["rows"] + found["returns"]
    assert sum(pairs_by_rank(chosen, 13, ranks)) == 37 * 4
    assert rows == 0 or ranks > 1


def test_an_owner_whose_experts_are_one_subtree_returns_one_row_a_token() -> None:
    case = a_case(Model("", 24, 10, 16, 5), 60)
    chosen = Inputs(case, drawn()).choices(range(60))
    for ranks in (2, 4, 8):
        found = traffic(chosen, case, ranks, False)
        assert found["returns"] == found["rows"] == found["least_returns"]
    found = traffic(chosen, case, 3, False)
    assert found["returns"] > found["rows"] == found["least_returns"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_chain_adds_rows_one_after_another(dtype: type) -> None:
    draw = np.random.default_rng(drawn())
    lengths = np.array([0, 1, 2, 3, 8, 31, 5, 0, *draw.integers(0, 32, 6)])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows, weights = draw.normal(size=(starts[-1], 37)).astype(dtype), draw.normal(size=starts[-1]).astype(dtype)
    expected = np.zeros((len(lengths), 37), dtype)
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        for p in range(begin, end):
            expected[i] = weights[p] * rows[p] if p == begin else expected[i] + weights[p] * rows[p]
    index = np.arange(len(rows), dtype=np.int32)
    experts, number = order_price.chain(starts)
    out = np.full_like(expected, np.nan)
    kernel.combine_rows(kernel.Rows([rows], np.zeros_like(index), index), starts, weights, experts, number, out)
    assert out.tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match="32 rows"):
        order_price.chain(np.array([0, 2, 34]))


def test_the_price_of_an_order_is_measured_on_the_rows_of_the_call_and_changes_none() -> None:
    draw, orders = np.random.default_rng(drawn()), order_price.OrdersInTurns()
    original, starts = kernel.combine_rows, np.array([0, 3, 3, 7])
    experts = np.array([1, 2, 5, 0, 3, 4, 7], np.int32)
    index = np.arange(7, dtype=np.int32)
    rows = kernel.Rows([draw.normal(size=(7, 300)).astype(np.float32)], np.zeros_like(index), index)
    expected, out = np.empty((3, 300), np.float32), np.full((3, 300), np.nan, np.float32)
    kernel.combine_rows(rows, starts, None, experts, 8, expected)
    assert orders.price(ALONE) is None  # nothing was added yet
    with orders.watching():
        kernel.combine_rows(rows, starts, None, experts, 8, out)
    assert kernel.combine_rows is original
    assert out.tobytes() == expected.tobytes()
    assert (orders.canonical > 0).all()
    orders.canonical[:], orders.plain[:] = np.arange(8, 15), 10
    found = orders.price(ALONE)
    assert found is not None
    assert found["ratio"] == pytest.approx(1.1)
    assert found["spread"] == pytest.approx([0.8, 1.4])
    assert found["seconds"] == pytest.approx(1.0)
    long = np.arange(40, dtype=np.int32)  # too many rows for a chain
    rows = kernel.Rows([np.ones((40, 3), np.float32)], np.zeros_like(long), long)
    orders, out = order_price.OrdersInTurns(), np.empty((1, 3), np.float32)
    with orders.watching():
        kernel.combine_rows(rows, np.array([0, 40]), None, long, 40, out)
    assert (out == 40).all()
    assert orders.price(ALONE) is None


def layer(case: Case, seed: int) -> dict[str, Any]:
    """y and all gradients in float64, by definition: every expert for every token, autograd by hand on dense arrays."""
    inputs, model = Inputs(case, seed), case.model
    everything = range(case.tokens)
    x, dy = (inputs.tokens(name, everything).astype(np.float64) for name in ("x", "dy"))
    router = inputs.router().astype(np.float64)
    gated = model.activation == "swiglu"
    w = {n: inputs.weights(n, range(model.experts)).astype(np.float64) for n in ("w_up", "w_down", "w_gate")}
    logits, chosen = x @ router, inputs.choices(everything)
    dense = np.zeros_like(logits)
    np.put_along_axis(dense, chosen.astype(np.int64), 1.0, axis=1)

    def weights_of(z: Any) -> Any:
        scores = 1 / (1 + np.exp(-z)) if model.score == "sigmoid" else np.exp(z) / np.exp(z).sum(1, keepdims=True)
        kept = scores * dense
        return kept / kept.sum(1, keepdims=True) if model.normalize else kept

    up = np.einsum("th,ehf->tef", x, w["w_up"])
    if gated:
        gate = np.einsum("th,ehf->tef", x, w["w_gate"])
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden, by_gate, by_up = gate * sigmoid * up, up * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid
    else:
        hidden, by_up = np.maximum(up, 0), (up > 0).astype(np.float64)
    out = np.einsum("tef,efh->teh", hidden, w["w_down"])
    share = weights_of(logits)
    dots = np.einsum("th,teh->te", dy, out)
    d_logits = np.zeros_like(logits)  # by differences: the derivation in the benchmark is what is judged
    for e, step in itertools.product(range(model.experts), (1e-5, -1e-5)):
        moved = logits.copy()
        moved[:, e] += step
        d_logits[:, e] += (weights_of(moved) * dots).sum(1) / (2 * step)
    d_hidden = share[:, :, None] * np.einsum("th,efh->tef", dy, w["w_down"])
    dx = np.einsum("tef,ehf->th", d_hidden * by_up, w["w_up"]) + d_logits @ router.T
    found = {
        "y": np.einsum("te,teh->th", share, out),
        "d_router": x.T @ d_logits,
        "d_w_up": np.einsum("th,tef->ehf", x, d_hidden * by_up),
        "d_w_down": np.einsum("tef,th->efh", share[:, :, None] * hidden, dy),
        "d_w_gate": None,
    }
    if gated:
        dx += np.einsum("tef,ehf->th", d_hidden * by_gate, w["w_gate"])
        found["d_w_gate"] = np.einsum("th,tef->ehf", x, d_hidden * by_gate)
    return found | {"dx": dx, "dy": dy}


def judged(case: Case, spoil: Any = None) -> Check:
    """The check of the dense results, rounded to the type, on one rank; `spoil` is called with them."""
    seed = drawn()
    inputs, model = Inputs(case, seed), case.model
    dtype = operands.dtype_of(case.dtype)
    results = {name: None if x is None else x.astype(dtype) for name, x in layer(case, seed).items()}
    if spoil is not None:
        spoil(results, np.random.default_rng(seed))
    everything = range(model.experts)
    gate = inputs.weights("w_gate", everything) if model.activation == "swiglu" else None
    weights = Weights(gate, inputs.weights("w_up", everything), inputs.weights("w_down", everything))
    check = Check(ALONE, inputs, range(case.tokens), everything, weights)
    if case.backward:
        gradients = Weights(results["d_w_gate"], results["d_w_up"], results["d_w_down"])
        check.backward(results["dy"], results["y"], results["dx"], results["d_router"], gradients)
    else:
        check.forward(results["y"])
    return check


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{m.activation} {m.score}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True])
def test_an_honest_mixture_is_accepted(model: Model, dtype: str, backward: bool) -> None:
    check = judged(a_case(model, dtype=dtype, backward=backward))
    assert check.wrong == ""
    found = check.found()
    assert 0 < found["error"] <= 2 * found["honest_error"]
    assert found["conservation"] <= 1


@pytest.mark.parametrize("model", [Model("", 32, 16, 8, 2), *MODELS[1:]], ids=lambda m: f"{m.activation} {m.score}")
def test_one_token_is_accepted_however_much_of_its_gradient_cancels(model: Model) -> None:
    """Its two experts may answer so alike that the difference, the gradient of its logits, is little but rounding."""
    case, first = Case(model, 1, "float32", backward=True), drawn()
    grid = SimpleNamespace(mesh=fivedp.Mesh(MPI.COMM_SELF, ep=1))
    for seed in range(first, first + 200):
        bench: Any = SimpleNamespace(comm=MPI.COMM_SELF, kept={}, seed=seed, grid=lambda _: grid)
        layer = moe_trial.Experts(case, bench)
        layer.run()
        assert layer.check()[0] == "", f"seed {seed}"


@pytest.mark.parametrize("name", ["d_w_up", "d_w_down", "d_router"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_element_of_a_gradient_is_found_wherever_it_stands(name: str, dtype: str) -> None:
    def spoil(results: dict[str, Any], draw: np.random.Generator) -> None:
        x = results[name]
        place = tuple(int(draw.integers(n)) for n in x.shape)
        print(f"element {place} of {name}")
        # weights may be nearly zero where it stands, and what they conserve is weighed with them
        x[place] += np.asarray(1e5 if name == "d_router" else 1e7, x.dtype)

    assert judged(a_case(dtype=dtype, backward=True), spoil).wrong


@pytest.mark.parametrize("name", ["d_w_gate", "d_w_up", "d_w_down"])
def test_a_gradient_of_an_expert_without_tokens_is_found(name: str) -> None:
    def spoil(results: dict[str, Any], draw: np.random.Generator) -> None:
        idle = next(g for g in results[name] if not g.any())
        idle[-1, -1] = 1e-3

    assert judged(a_case(tokens=1, backward=True)).wrong == ""
    assert "conserve" in judged(a_case(tokens=1, backward=True), spoil).wrong


@pytest.mark.parametrize("name", ["y", "dx", "d_w_gate", "d_router"])
def test_what_is_not_a_number_is_wrong(name: str) -> None:
    def spoil(results: dict[str, Any], draw: np.random.Generator) -> None:
        results[name].reshape(-1)[-1] = np.nan

    assert judged(a_case(backward=name != "y"), spoil).wrong


def test_a_token_without_one_of_its_experts_is_found() -> None:
    case = a_case(tokens=20)

    def spoil(results: dict[str, Any], draw: np.random.Generator) -> None:
        fewer = a_case(Model("", 24, 10, 6, 2), 20)
        results["y"][...] = layer(fewer, int(draw.bit_generator.seed_seq.entropy))["y"]  # type: ignore[attr-defined]

    assert "error of y" in judged(case, spoil).wrong


def test_gradients_without_the_routers_part_are_found() -> None:
    def spoil(results: dict[str, Any], draw: np.random.Generator) -> None:
        results["dx"][:, : SWIGLU.experts] = 0

    assert "dx, routed" in judged(a_case(backward=True), spoil).wrong


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{m.activation} {m.score}")
def test_gradients_of_logits_are_those_of_differences(model: Model) -> None:
    case, draw = a_case(model, 9, "float64"), np.random.default_rng(drawn())
    logits = Inputs(case, 5).logits(range(9)).astype(np.float64)
    chosen, given = Inputs(case, 5).choices(range(9)), draw.normal(size=(9, model.top_k))
    found = mixture.logit_gradients(logits, chosen, given, case)
    for e in range(model.experts):
        loss = []
        for step in (1e-6, -1e-6):
            moved = logits.copy()
            moved[:, e] += step
            loss.append((mixture.choice_weights(moved, chosen, case) * given).sum(axis=1))
        np.testing.assert_allclose(found[:, e], (loss[0] - loss[1]) / 2e-6, atol=1e-8)


def test_a_stage_has_its_time_and_what_it_calls_inside_is_not_counted_twice() -> None:
    owner = SimpleNamespace(outer=lambda: owner.inner() + 1, inner=lambda: 41)
    kept = owner.outer
    watch = Stopwatch(("a", "b"))
    with watch.watching({"a": ((owner, "outer"),), "b": ((owner, "inner"),)}):
        assert owner.outer() == 42
        assert watch.seconds["a"] > 0
        assert watch.seconds["b"] == 0
        owner.inner()
    assert watch.seconds["b"] > 0
    assert owner.outer is kept
    assert watch.results == {"outer": 42, "inner": 41}


def test_quick_run_covers_every_layer_workload_and_type() -> None:
    cases = moe.select(options("moe"))
    assert {c.model.name for c in cases} == set(moe.MODELS)
    assert {c.dtype for c in cases} == {"float32", "bfloat16", "float64"}
    assert {c.workload for c in cases} == set(expert_workload.WORKLOADS)
    assert {c.tokens for c in cases} >= set(moe.DECODE_TOKENS)
    assert {c.backward for c in cases} == {False, True}
    for case in [*cases, *moe.select(options("moe", "--full"))]:
        real = moe.MODELS[case.model.name]
        assert (case.model.experts, case.model.top_k) == (real.experts, real.top_k)
        assert case.model.width == real.width // case.scaled_by >= real.experts
    assert max(c.model.weight_elements for c in cases) <= 5 * moe.QUICK_ELEMENTS


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--shape", "gpt9"), "no mixture of experts"),
        (("--shape", "8x16x4x4/5"), "at most all experts"),
        (("--shape", "8x4x4x8/2"), "cannot hold the logits"),
        (("--shape", "qwen3-30b", "--divide", "32"), "cannot hold the logits"),
        (("--dtype", "c64"), "f32, bf16, f64"),
        (("--order", "tree"), "one order"),
        (("--spec", "row"), "belongs to gemm"),
        (("--reference", "numpy"), "give torch"),
        (("--divide", "0"), "--divide is 0; give at least 1"),
    ],
)
def test_what_experts_do_not_have_is_refused(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        choose(options("moe", *words))


def test_options_choose_among_the_cases() -> None:
    words = ("--shape", "mixtral-8x7b", "--divide", "8", "--tokens", "96", "--workload", "zipf", "--dtype", "bf16")
    cases = moe.select(options("moe", *words))
    assert {(c.model.width, c.model.hidden, c.tokens, c.workload, c.dtype, c.scaled_by) for c in cases} == {
        (512, 1792, 96, "zipf", "bfloat16", 8)
    }
    assert {c.backward for c in cases} == {False, True}
    assert all(c.backward for c in moe.select(options("moe", "--backward")))
    assert {c.workload for c in moe.select(options("moe", "--workload", "zipf"))} == {"zipf"}
    (case, _) = moe.select(options("moe", "--shape", "7x16x5x3/2", "--dtype", "f64"))
    assert case.shape == "7x16x5x3/2"
    assert [c.tokens for c in moe.select(options("moe", "--shape", "decode", "--dtype", "f32"))] == [1, 1, 8, 8, 32, 32]


def a_row(**changes: Any) -> report.Row:
    row = a_case().record() | {
        "ranks": 2, "wrong": "", "mesh": "ep=2", "bytes": {"counted": 8000, "planned": 8000, "bound": 6000},
        "memory": {"peak": 1000}, "pairs": [80, 70], "balance": 80 / 75, "seconds": 1e-3, "samples": [1e-3],
        "flops": 1, "gflops": 1.0, "share_of_peak": 0.5, "error": 1e-7, "honest_error": 2e-7,
        "errors": {"y": 1e-7}, "honest_errors": {"y": 2e-7}, "conservation": 0.0, "repeatable": True,
        "canonical_price": None,
        "stages": {"route": 0.1, "dispatch": 0.2, "products": 0.4, "combine": 0.2, "rest": 0.1},
    }  # fmt: skip
    return row | changes


def test_a_row_says_what_was_sent_and_where_the_time_went(tmp_path: Path) -> None:
    paint = report.Paint(io.StringIO())
    head = report.column_line(FAMILIES["moe"].table).split()
    assert not {"workload", "pass", "r/d/p/c", "sent/rank", "least", "error", "plain", "memory", "load"} - set(head)
    (line,) = report.row_lines(a_row(), paint)
    assert line.split() == [
        "uniform", "f32", "forward", "1.00", "ms", "1.0", "50%", "10/20/40/20", "4.00", "kB", "3.00", "kB", "1.0e-07",
        "2.0e-07", "1.00", "kB", "1.07",
    ]  # fmt: skip
    price = {"ratio": 1.04, "spread": [0.98, 1.1], "seconds": 2e-6, "bytes": 0}
    assert (
        "sums take 1.04 times (0.98-1.10) those of slot order, 0.2% of the call, no bytes"
        in report.row_lines(a_row(canonical_price=price), paint)[1]
    )
    more = report.row_lines(a_row(canonical_price=price | {"seconds": -1e-9, "bytes": 2000}), paint)[1]
    assert " 0.0% of the call, 25.0% of the bytes" in more
    assert "5.0 times the plain one" in report.row_lines(a_row(error=1e-6), paint)[1]
    assert "WRONG: sent too much" in report.row_lines(a_row(wrong="sent too much"), paint)[-1]
    result = report.new({"ranks": 2}, {}, 1, "2026-01-01") | {"rows": [a_row(), a_row(skipped="no memory")]}
    report.write_json(result, tmp_path / "r.json")
    assert report.read_json(tmp_path / "r.json") == result


def test_the_table_fits_a_hundred_and_twenty_columns() -> None:
    paint = report.Paint(io.StringIO())
    price = {"ratio": 12.34, "spread": [10.12, 15.34], "seconds": 88.8, "bytes": 9 * 10**11}
    wide = a_row(workload="one_expert", backward=True, seconds=123.4, gflops=12345.6, canonical_price=price,
                 bytes={"counted": 10**12, "planned": 9 * 10**11, "bound": 10**11}, memory={"peak": 10**9})  # fmt: skip
    lines = [report.column_line(FAMILIES["moe"].table), *report.row_lines(wide, paint)]
    assert max(map(len, lines)) <= 120
