"""Routing on one rank: values against float64, gradients against finite differences, ties, and which bits are fixed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernel_operands import BF16, REAL_TYPES, bits

from fivedp.kernels import gemm
from fivedp.kernels import routing as kernel
from fivedp.kernels.routing import UNITS, Rule
from fivedp.reference import routing_reference as oracle

Array = Any
EXPERTS = (1, 3, 17, 60, 127, 256)
RULES = {
    "softmax": Rule(),
    "raw softmax": Rule(normalize=False, scale=1.5),
    "sigmoid": Rule(sigmoid=True, scale=2.5),
    "raw sigmoid": Rule(sigmoid=True, normalize=False),
}
# A rounding of the type of sums.
ROUNDING = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float64): 2.0**-53, BF16: 2.0**-24}


def draw(rng: np.random.Generator, tokens: int, experts: int, dtype: Any = np.float64, size: float = 2.0) -> Array:
    return (size * rng.standard_normal((tokens, experts))).astype(dtype)


def with_bias(rng: np.random.Generator, rule: Rule, experts: int, groups: tuple[int, int] = (1, 1)) -> Rule:
    return replace(rule, bias=0.3 * rng.standard_normal(experts), groups=groups)


def slots_for(experts: int) -> list[int]:
    return sorted({1, min(2, experts), min(8, experts), max(1, experts - 1), experts})


def relative_bound(logits: Array) -> float:
    """Of a weight, the quotient of two sums of exponentials: twice that of one.

    The rounding of x = z - max is |x| of the result's, exp has 4, a lane of the sum E / 8 at most, its tree and the
    division 8.
    """
    z = logits.astype(np.float64)
    spread = float((z.max(-1) - z.min(-1)).max(initial=0.0)) + float(abs(z).max(initial=0.0))
    return 2 * (spread + 12 + logits.shape[1] / 8) * ROUNDING[logits.dtype]


def key_error(logits: Array, rule: Rule) -> Array:
    """(T,): of a score, and of the sum with its bias."""
    score = oracle.scores(logits, rule)
    largest = 0 if rule.bias is None else abs(score + rule.bias).max(-1)
    return np.asarray(relative_bound(logits) * score.max(-1) + 2 * ROUNDING[logits.dtype] * largest)


def margins(logits: Array, top_k: int, rule: Rule) -> Array:
    """(T,): how near to another outcome the choice of each token is."""
    key = np.sort(oracle.keys(logits, rule), axis=-1)[:, ::-1]
    with np.errstate(invalid="ignore"):
        gaps = key[:, :top_k] - np.pad(key, ((0, 0), (0, 1)), constant_values=-np.inf)[:, 1 : top_k + 1]
    if rule.zero_mask:  # between two masked experts, which are zero exactly, the lower one comes first
        gaps[gaps == 0] = np.inf
    margin = np.nan_to_num(gaps, nan=np.inf).min(-1)
    if rule.groups[0] > 1:
        every = oracle.keys(logits, replace(rule, groups=(rule.groups[0], rule.groups[0])))
        of_group = np.sort(np.sort(every.reshape(len(every), rule.groups[0], -1))[..., -2:].sum(-1))[:, ::-1]
        cut = rule.groups[1]
        if cut < rule.groups[0]:
            margin = np.minimum(margin, of_group[:, cut - 1] - of_group[:, cut])
    return margin


def check(logits: Array, top_k: int, rule: Rule) -> kernel.Routed:
    """All that one call gives, against float64."""
    routed = kernel.forward(logits, top_k, rule)
    bound = relative_bound(logits)
    wanted = oracle.choose(logits, top_k, rule)
    plain = rule.bias is None and rule.groups[0] == 1
    clear = np.ones(len(logits), bool) if plain else margins(logits, top_k, rule) > 4 * key_error(logits, rule)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(routed.experts[clear], wanted[clear])
    np.testing.assert_allclose(routed.weights, oracle.weights(logits, routed.experts, rule), rtol=bound, atol=1e-37)
    lse = oracle.log_sum_exp(logits.astype(np.float64))
    np.testing.assert_allclose(routed.log_sum, lse, atol=2 * bound, rtol=bound)
    for slot in range(top_k):
        np.testing.assert_array_equal(
            routed.totals.choices[slot], np.bincount(routed.experts[:, slot], minlength=logits.shape[1])
        )
    p = oracle.probabilities(logits, rule)
    error = bound * p.sum(0) + len(logits) / UNITS
    assert (abs(routed.totals.probabilities / UNITS - p.sum(0)) <= error).all()
    whole, fraction, beyond = routed.totals.squares.tolist()
    assert beyond == 0
    np.testing.assert_allclose(whole + fraction / UNITS, (lse**2).sum(), rtol=8 * bound, atol=1e-9)
    return routed


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_experts_weights_and_sums(rng: np.random.Generator, dtype: Any, name: str, experts: int) -> None:
    for top_k in slots_for(experts):
        check(draw(rng, 37, experts, np.float32).astype(dtype), top_k, RULES[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=str)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("experts", "groups"), [(17, (1, 1)), (6, (6, 2)), (60, (4, 3)), (64, (8, 8)), (256, (8, 4)), (51, (3, 2))]
)
@pytest.mark.parametrize("zero_mask", [False, True])
def test_bias_and_groups(
    rng: np.random.Generator, dtype: Any, name: str, experts: int, groups: tuple[int, int], zero_mask: bool
) -> None:
    rule = replace(with_bias(rng, RULES[name], experts, groups), zero_mask=zero_mask)
    for top_k in sorted({1, 2, min(8, experts // groups[0] * groups[1])}):
        routed = check(draw(rng, 200, experts, dtype), top_k, rule)
        if not zero_mask:
            reached = [len(set(row // (experts // groups[0]))) for row in routed.experts]
            assert max(reached) <= groups[1]


def test_zero_mask_may_choose_what_is_masked() -> None:
    logits = np.zeros((1, 4))
    rule = Rule(sigmoid=True, bias=np.array([-1.0, -1.0, -2.0, -2.0]), groups=(2, 1), zero_mask=True)
    np.testing.assert_array_equal(kernel.forward(logits, 2, rule).experts, [[2, 3]])
    np.testing.assert_array_equal(kernel.forward(logits, 2, replace(rule, zero_mask=False)).experts, [[0, 1]])


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("experts", EXPERTS)
def test_ties_go_to_the_lower_expert_and_minus_zero_is_zero(rng: np.random.Generator, dtype: Any, experts: int) -> None:
    logits = rng.integers(-1, 2, (50, experts)).astype(dtype)
    logits[rng.random(logits.shape) < 0.3] = -0.0
    for rule in (Rule(), Rule(sigmoid=True), Rule(sigmoid=True, bias=np.zeros(experts))):
        for top_k in slots_for(experts):
            found = kernel.forward(logits, top_k, rule).experts
            np.testing.assert_array_equal(found, oracle.choose(logits, top_k, rule))


def test_tied_groups_go_to_the_lower_one() -> None:
    rule = Rule(groups=(4, 2))
    np.testing.assert_array_equal(kernel.forward(np.ones((3, 12), np.float32), 6, rule).experts, [list(range(6))] * 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_sizes_at_the_end_of_the_type(dtype: Any, name: str) -> None:
    large = float(np.finfo(dtype).max)
    logits = np.array([[large, -large, 0], [-large] * 3, [large] * 3, [-500, -501, -800], [1e4, -1e4, 3]], dtype)
    routed = kernel.forward(logits, 2, RULES[name])
    np.testing.assert_array_equal(routed.experts, oracle.choose(logits, 2, RULES[name]))
    assert np.isfinite(routed.weights).all()
    assert np.isfinite(routed.log_sum).all()
    assert routed.totals.squares[2] == 3
    if name == "softmax":
        np.testing.assert_allclose(routed.weights[3], oracle.softmax(np.array([-500.0, -501.0])), rtol=1e-6)


def test_logits_tell_apart_what_scores_do_not() -> None:
    logits = np.array([[-200.0, 0.0, -150.0, 300.0]], np.float32)
    np.testing.assert_array_equal(kernel.forward(logits, 4, Rule()).experts, [[3, 1, 2, 0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.usefixtures("restore_threads")
def test_the_first_row_that_is_not_finite_is_named(rng: np.random.Generator, dtype: Any, bad: float) -> None:
    gemm.set_threads(3)
    logits = draw(rng, 3000, 33, dtype)
    first = int(rng.integers(0, 2900))
    for row, expert in ((first, 32), (first, 31), (first + 1, 0), (2999, 5)):
        logits[row, expert] = bad
    for _ in range(5):
        with pytest.raises(ValueError, match=rf"row {first} of `logits` has {bad} for expert 31;"):
            kernel.forward(logits, 3, Rule())
    with pytest.raises(ValueError, match=f"row {first} of"):
        kernel.scores(logits, Rule())


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_bits_do_not_depend_on_strides(rng: np.random.Generator, dtype: Any) -> None:
    logits = draw(rng, 20, 19, dtype)
    rule = with_bias(rng, Rule(), 19)
    wide = np.zeros((40, 30), dtype)
    wide[::2, 5:24] = logits
    raw = np.zeros(logits.nbytes + 1, np.uint8)
    unaligned = np.frombuffer(raw.data, dtype, logits.size, offset=1).reshape(logits.shape)
    unaligned[...] = logits
    others = [wide[::2, 5:24], np.asfortranarray(logits), logits[::-1].copy()[::-1], unaligned]
    expected = outputs(logits, 4, rule)
    for other in others:
        assert outputs(other, 4, rule) == expected
    repeated = np.broadcast_to(logits[:1], (5, 19))
    assert bits(kernel.forward(repeated, 4, rule).weights) == 5 * bits(kernel.forward(logits[:1], 4, rule).weights)


def outputs(logits: Array, top_k: int, rule: Rule, seed: int = 0) -> list[bytes]:
    """The bytes of all that forward and backward give."""
    routed = kernel.forward(logits, top_k, rule)
    rng = np.random.default_rng(seed)
    d_weights, balance = rng.standard_normal((10**4, top_k))[: len(logits)], rng.standard_normal(logits.shape[1])
    kept = kernel.drop_by_position(routed.experts, np.zeros_like(routed.totals.choices), max(1, len(logits) // 2))
    d_logits = kernel.backward(d_weights, logits, rule, routed.experts, kept, routed.log_sum, balance, 0.7)
    scores = kernel.scores(logits, rule)[0]
    arrays = (routed.experts, routed.weights, routed.log_sum, *routed.totals, d_logits, scores)
    return [bits(array) for array in arrays]


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.usefixtures("restore_threads")
def test_bits_do_not_depend_on_threads_or_neighbours(rng: np.random.Generator, dtype: Any, name: str) -> None:
    logits = draw(rng, 1100, 96, dtype)
    rule = with_bias(rng, RULES[name], 96, (4, 2))
    found = []
    for threads in (1, 2, 3):
        gemm.set_threads(threads)
        found.append(outputs(logits, 5, rule))
    assert found[0] == found[1] == found[2]
    whole = kernel.forward(logits, 5, rule)
    for rows in (slice(7, 8), slice(0, 500), slice(500, 1100)):
        part = kernel.forward(logits[rows], 5, rule)
        for name_of, x, y in zip(part._fields[:3], part, whole, strict=False):
            assert bits(x) == bits(y[rows]), name_of
    halves = [kernel.forward(logits[rows], 5, rule).totals for rows in (slice(0, 333), slice(333, 1100))]
    for x, y, both in zip(*halves, whole.totals, strict=True):
        np.testing.assert_array_equal(x + y, both)


PROGRAM = """
import hashlib, sys
sys.path[:0] = sys.argv[2:]
import numpy as np
from kernel_operands import REAL_TYPES
from test_routing import RULES, draw, outputs, with_bias
from fivedp.kernels.gemm import isa
rng = np.random.default_rng(int(sys.argv[1]))
print(isa())
for dtype in REAL_TYPES:
    digest = hashlib.sha256()
    for rule in RULES.values():
        for experts, top_k, groups in (
            (1, 1, (1, 1)), (3, 3, (1, 1)), (60, 7, (5, 2)), (127, 20, (1, 1)), (256, 8, (8, 4)),
        ):
            for biased in (with_bias(rng, rule, experts, groups), rule):
                for part in outputs(draw(rng, 40, experts, dtype, 5.0), top_k, biased):
                    digest.update(part)
    print(digest.hexdigest())
"""


def test_all_supported_sets_give_the_same_bits(rng: np.random.Generator) -> None:
    seed = int(rng.integers(2**32))
    here = os.path.dirname(os.path.abspath(__file__))
    found = {}
    for isa in gemm.supported_isas():
        command = [sys.executable, "-c", PROGRAM, str(seed), here]
        environment = {**os.environ, "FIVEDP_ISA": isa}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.split()
        assert lines[0] == isa
        found[isa] = tuple(lines[1:])
    assert len(set(found.values())) == 1, found


def difference_quotient(logits: Array, loss: Any, step: float = 1e-3) -> Array:
    """The gradient of `loss` by central differences of fourth order: the error is of step^4, and of 2^-52 / step."""
    gradient = np.empty_like(logits)
    for place in np.ndindex(*logits.shape):
        values = []
        for shift in (-2, -1, 1, 2):
            moved = logits.copy()
            moved[place] += shift * step
            values.append(loss(moved))
        gradient[place] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    return gradient


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 1), (3, 2), (7, 7), (17, 4)])
@pytest.mark.parametrize("d_losses", [(0.0, 0.0), (0.7, 0.0), (0.0, 0.3), (1.1, 0.4)])
def test_gradients_are_those_of_finite_differences(
    rng: np.random.Generator, name: str, experts: int, top_k: int, d_losses: tuple[float, float]
) -> None:
    tokens, rule = 5, with_bias(rng, RULES[name], experts)
    logits = draw(rng, tokens, experts)
    routed = kernel.forward(logits, top_k, rule)
    kept = np.where(rng.random(routed.experts.shape) < 0.3, -1, routed.experts).astype(np.int32)
    d_weights = rng.standard_normal(kept.shape)
    counts, divisor = routed.totals.choices.sum(0), float(top_k * tokens)
    balance = experts * d_losses[0] * counts / (divisor * tokens) if d_losses[0] else None
    found = kernel.backward(
        np.where(kept < 0, np.nan, d_weights), logits, rule, routed.experts, kept, routed.log_sum, balance,
        2 * d_losses[1] / tokens,
    )  # fmt: skip
    u = np.where(kept < 0, 0.0, d_weights)
    loss = lambda z: oracle.smooth_loss(z, rule, routed.experts, u, (counts, divisor, d_losses[0]), d_losses[1])  # noqa: E731
    np.testing.assert_allclose(found, difference_quotient(logits, loss), atol=1e-9)
    if d_losses == (0.0, 0.0) and (rule.normalize or rule.sigmoid):
        outside = np.ones(logits.shape, bool)
        np.put_along_axis(outside, routed.experts, False, axis=1)
        assert not found[outside].any()


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_gradients_of_narrow_types_are_those_of_float64(rng: np.random.Generator, dtype: Any, name: str) -> None:
    logits = draw(rng, 30, 60, np.float32).astype(dtype)
    rule, wide = RULES[name], logits.astype(np.float64)
    routed = kernel.forward(logits, 6, rule)
    d_weights, balance = rng.standard_normal((30, 6)), rng.standard_normal(60)
    found, wanted = (
        kernel.backward(d_weights, z, rule, routed.experts, routed.experts, oracle.log_sum_exp(wide), balance, 0.3)
        for z in (logits, wide)
    )
    # Sums of terms up to the largest of d_weights, balance and 0.3 times log_sum, each with the forward's error.
    assert abs(found - wanted).max() <= 16 * relative_bound(logits)


@pytest.mark.parametrize("name", RULES)
def test_given_experts_and_empty_slots(rng: np.random.Generator, name: str) -> None:
    logits = draw(rng, 9, 12)
    experts = np.argsort(rng.random((9, 12)))[:, :5].astype(np.int32)
    experts[rng.random(experts.shape) < 0.5] = -1
    experts[3] = -1  # a token that no expert has taken
    routed = kernel.weights(logits, experts, RULES[name])
    np.testing.assert_allclose(routed.weights, oracle.weights(logits, experts, RULES[name]), rtol=1e-13)
    assert not routed.weights[experts < 0].any()
    assert routed.totals.choices.sum() == (experts >= 0).sum()
    d_weights = rng.standard_normal(experts.shape)
    found = kernel.backward(d_weights, logits, RULES[name], experts, experts, routed.log_sum)
    loss = lambda z: float((oracle.weights(z, experts, RULES[name]) * d_weights).sum())  # noqa: E731
    np.testing.assert_allclose(found, difference_quotient(logits, loss), atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_scores_of_all_experts(rng: np.random.Generator, name: str) -> None:
    logits = draw(rng, 21, 33)
    found, totals = kernel.scores(logits, RULES[name])
    np.testing.assert_allclose(found, oracle.scores(logits, RULES[name]), rtol=1e-13)
    np.testing.assert_array_equal(totals.probabilities, kernel.forward(logits, 1, RULES[name]).totals.probabilities)


def test_drops_by_position(rng: np.random.Generator) -> None:
    for experts, top_k, tokens in ((1, 1, 9), (4, 2, 50), (7, 7, 20), (5, 2, 0)):
        chosen = np.argsort(rng.random((tokens, experts)))[:, :top_k].astype(np.int32)
        chosen[rng.random(chosen.shape) < 0.1] = -1
        choices = np.stack([np.bincount(chosen[:, j][chosen[:, j] >= 0], minlength=experts) for j in range(top_k)])
        before = np.cumsum(choices, axis=0) - choices
        for capacity in (0, 1, 5, 100):
            found = kernel.drop_by_position(chosen, before, capacity)
            np.testing.assert_array_equal(found, oracle.keep_by_position(chosen, capacity, experts))
        np.testing.assert_array_equal(before, np.cumsum(choices, axis=0) - choices)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_no_tokens(dtype: Any) -> None:
    routed = kernel.forward(np.empty((0, 5), dtype), 2, Rule())
    assert routed.experts.shape == routed.weights.shape == (0, 2)
    assert not any(total.any() for total in routed.totals)
    empty = routed.experts
    assert kernel.backward(np.empty((0, 2)), np.empty((0, 5), dtype), Rule(), empty, empty, routed.log_sum).shape == (
        0,
        5,
    )


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda z: kernel.forward(z, 6, Rule()), ValueError, "top_k is 6; 0 to 5"),
        (lambda z: kernel.forward(z, 0, Rule()), ValueError, "top_k is 0; 1 or more"),
        (lambda z: kernel.forward(z[0], 1, Rule()), ValueError, r"logits has shape \(5,\)"),
        (lambda z: kernel.forward(z.astype(int), 1, Rule()), TypeError, "logits is int64"),
        (lambda z: kernel.forward(z.astype(np.uint16), 1, Rule()), TypeError, "uint16"),
        (lambda z: kernel.forward(z.astype(">f4"), 1, Rule()), TypeError, "byte order"),
        (lambda z: kernel.forward(z, 1, Rule(bias=np.ones(4))), ValueError, r"bias has shape \(4,\); \(5\)"),
        (lambda z: kernel.forward(z, 1, Rule(groups=(2, 1))), ValueError, "5 experts are in 2 groups"),
        (lambda z: kernel.forward(z, 1, Rule(groups=(5, 6))), ValueError, "top_groups is 6; 1 to 5"),
        (lambda z: kernel.forward(z, 3, Rule(groups=(5, 2))), ValueError, "2 of 5 groups have 2 experts"),
        (lambda z: kernel.weights(z, np.full((4, 2), 5), Rule()), ValueError, "chosen has 5; -1 to 4"),
        (lambda z: kernel.weights(z, np.zeros((3, 2)), Rule()), ValueError, "shape"),
        (lambda z: kernel.drop_by_position(np.full((4, 2), 7, np.int32), np.zeros((2, 5)), 1), ValueError, "has 7"),
    ],
)
def test_wrong_arguments(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call(np.ones((4, 5)))
