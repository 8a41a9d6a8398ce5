"""Routing on the GPU gives the CPU's experts, weights, sums and gradients, bit for bit; those are held to float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from device_operands import BF16, bits, draw, guarded

from fivedp.kernels import routing as cpu
from fivedp.kernels.cuda import routing as gpu
from fivedp.kernels.routing import UNITS, Rule

Array = Any
RULES = {
    "softmax": Rule(),
    "raw softmax": Rule(normalize=False, scale=1.5),
    "sigmoid": Rule(sigmoid=True, scale=2.5),
    "raw sigmoid": Rule(sigmoid=True, normalize=False),
}
TYPES = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64), "bfloat16": BF16}
SIZES = [(1, 1, 1), (5, 3, 2), (9, 60, 8), (6, 128, 4), (5, 256, 8), (3, 1024, 16), (2, 40, 32), (0, 4, 2)]


def same(host: Any, routed: gpu.DeviceRouted, expected: cpu.Routed) -> None:
    for found, right in zip(routed[:3], expected[:3], strict=True):
        assert bits(host(found)) == bits(right)
    invalid, unknown, totals, _ = routed.totals.read()
    assert (invalid, unknown) == (-1, -1)
    for name, found, right in zip(totals._fields, totals, expected.totals, strict=True):
        np.testing.assert_array_equal(found, right, err_msg=name)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
def test_experts_weights_and_sums_are_those_of_the_cpu(
    xp: Any, host: Any, seed: int, dtype: str, name: str, tokens: int, experts: int, top_k: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = draw(rng, (tokens, experts), np.float64).astype(TYPES[dtype])
    expected = cpu.forward(logits, top_k, RULES[name])
    same(host, gpu.forward(guarded(xp, logits, 1, 3), top_k, RULES[name]), expected)
    scores, totals = gpu.scores(xp.asarray(logits), RULES[name])
    right, right_totals = cpu.scores(logits, RULES[name])
    assert bits(host(scores)) == bits(right)
    np.testing.assert_array_equal(totals.read()[2].probabilities, right_totals.probabilities)


def test_float16_logits_are_those_of_float32(xp: Any, host: Any, seed: int) -> None:
    logits = draw(np.random.default_rng(seed), (7, 33), np.float16)
    same(host, gpu.forward(xp.asarray(logits), 4, Rule()), cpu.forward(logits.astype(np.float32), 4, Rule()))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("experts", "groups"),
    [(17, (1, 1)), (6, (6, 2)), (60, (4, 3)), (64, (8, 8)), (256, (8, 4)), (51, (3, 2)), (96, (48, 9))],
)
@pytest.mark.parametrize("zero_mask", [False, True])
def test_bias_and_groups(
    xp: Any, host: Any, seed: int, dtype: str, name: str, experts: int, groups: tuple[int, int], zero_mask: bool
) -> None:
    rng = np.random.default_rng(seed)
    bias = 0.3 * rng.standard_normal(experts)
    for rule in (
        replace(RULES[name], bias=bias, groups=groups, zero_mask=zero_mask),
        replace(RULES[name], groups=groups),
    ):
        logits = draw(rng, (13, experts), TYPES[dtype])
        top_k = min(8, experts // groups[0] * groups[1])
        same(host, gpu.forward(xp.asarray(logits), top_k, rule), cpu.forward(logits, top_k, rule))


@pytest.mark.parametrize("dtype", TYPES)
def test_ties_go_to_the_lower_expert_and_minus_zero_is_zero(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-1, 2, (20, 70)).astype(TYPES[dtype])
    logits[rng.random(logits.shape) < 0.3] = -0.0
    for rule in (Rule(), Rule(sigmoid=True, bias=np.zeros(70)), Rule(groups=(7, 2))):
        same(host, gpu.forward(xp.asarray(logits), 9, rule), cpu.forward(logits, 9, rule))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", RULES)
def test_sizes_at_the_end_of_the_type(xp: Any, host: Any, dtype: str, name: str) -> None:
    large = float(np.finfo(dtype).max)
    logits = np.array([[large, -large, 0], [-large] * 3, [large] * 3, [-500, -501, -800], [1e4, -1e4, 3]], dtype)
    same(host, gpu.forward(xp.asarray(logits), 2, RULES[name]), cpu.forward(logits, 2, RULES[name]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_first_row_that_is_not_finite_is_named(xp: Any, seed: int, dtype: str, bad: float) -> None:
    rng = np.random.default_rng(seed)
    logits = draw(rng, (60, 33), TYPES[dtype])
    first = int(rng.integers(0, 58))
    for row, expert in ((first, 32), (first + 1, 0), (59, 5)):
        logits[row, expert] = bad
    assert gpu.forward(xp.asarray(logits), 3, Rule()).totals.read()[0] == first
    assert gpu.scores(xp.asarray(logits), Rule())[1].read()[0] == first


def test_given_experts(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = draw(rng, (12, 20), np.float32)
    chosen = np.argsort(rng.random((12, 20)), axis=1)[:, :5].astype(np.int32)
    chosen[rng.random(chosen.shape) < 0.4] = -1
    chosen[3] = -1
    for rule in RULES.values():
        same(host, gpu.weights(xp.asarray(logits), xp.asarray(chosen), rule), cpu.weights(logits, chosen, rule))
    chosen[7, 2], chosen[9, 0] = 20, -2
    assert gpu.weights(xp.asarray(logits), xp.asarray(chosen), Rule()).totals.read()[:2] == (-1, 7)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
def test_gradients_are_those_of_the_cpu(
    xp: Any, host: Any, seed: int, dtype: str, name: str, tokens: int, experts: int, top_k: int
) -> None:
    rng, kind = np.random.default_rng(seed), TYPES[dtype]
    logits = draw(rng, (tokens, experts), np.float64).astype(kind)
    routed = cpu.forward(logits, top_k, RULES[name])
    kept = np.where(rng.random(routed.experts.shape) < 0.3, -1, routed.experts).astype(np.int32)
    d_weights = rng.standard_normal(kept.shape)
    d_weights[kept < 0] = np.nan  # not read
    for balance, z_factor in ((rng.standard_normal(experts), 0.7), (None, 0.0), (rng.standard_normal(experts), 0.0)):
        common = (RULES[name], routed.experts, kept, routed.log_sum, balance, z_factor)
        right = cpu.backward(d_weights, logits, *common)
        on_device = [array if isinstance(array, Rule | float | None) else xp.asarray(array) for array in common]
        found = gpu.backward(xp.asarray(d_weights), guarded(xp, logits, 1, 2), *on_device)
        assert bits(host(found)) == bits(right)


def test_a_gradient_is_a_difference_quotient(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, step = draw(rng, (3, 11), np.float64), 1e-6
    for rule in RULES.values():
        routed = gpu.forward(xp.asarray(logits), 4, rule)
        d_weights = rng.standard_normal((3, 4))
        found = host(
            gpu.backward(
                xp.asarray(d_weights), xp.asarray(logits), rule, routed.experts, routed.experts, routed.log_sum
            )
        )
        wanted = np.empty_like(logits)
        for place in np.ndindex(logits.shape):
            values = []
            for sign in (1, -1):
                moved = logits.copy()
                moved[place] += sign * step
                values.append((host(gpu.weights(xp.asarray(moved), routed.experts, rule).weights) * d_weights).sum())
            wanted[place] = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(found, wanted, atol=1e-8)


@pytest.mark.parametrize(
    ("tokens", "slots", "experts"), [(0, 2, 3), (5, 1, 1), (300, 4, 7), (2500, 2, 130), (2048, 1, 2)]
)
def test_pairs_beyond_the_capacity_are_dropped(
    xp: Any, host: Any, seed: int, tokens: int, slots: int, experts: int
) -> None:
    rng = np.random.default_rng(seed)
    chosen = rng.integers(-1, experts, (tokens, slots)).astype(np.int32)
    before = rng.integers(0, 5, (slots, experts))
    for capacity in (0, 3, tokens // max(1, experts) + 2, tokens + 5):
        right = cpu.drop_by_position(chosen, before, capacity)
        np.testing.assert_array_equal(host(gpu.drop_by_position(xp.asarray(chosen), before, capacity)), right)


def test_the_public_functions_take_device_arrays(xp: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if xp is np:
        monkeypatch.setattr(cpu, "is_cupy", lambda array: False)
    rng = np.random.default_rng(seed)
    logits = draw(rng, (9, 12), np.float32)
    expected, scores = cpu.forward(logits, 3, Rule()), cpu.scores(logits, Rule())
    if xp is np:
        monkeypatch.setattr(cpu, "is_cupy", lambda array: True)
    device = xp.asarray(logits)
    for found, right in zip(cpu.forward(device, 3, Rule())[:3], expected[:3], strict=True):
        xp.testing.assert_array_equal(found, xp.asarray(right))
    xp.testing.assert_array_equal(cpu.scores(device, Rule())[0], xp.asarray(scores[0]))
    chosen = xp.asarray(expected.experts)
    xp.testing.assert_array_equal(cpu.weights(device, chosen, Rule()).weights, xp.asarray(expected.weights))
    chosen[4, 1] = 12
    with pytest.raises(ValueError, match="row 4 of `experts` has an expert that there is not; -1 to 11 would be right"):
        cpu.weights(device, chosen, Rule())
    assert cpu.backward(xp.ones((9, 3), np.float32), device, Rule(), chosen, chosen, xp.zeros(9, np.float32)).shape == (
        9,
        12,
    )
    assert cpu.drop_by_position(chosen, np.zeros((3, 12), np.int64), 1).shape == (9, 3)


def test_one_unit_is_what_the_totals_say(xp: Any) -> None:
    totals = gpu.forward(xp.zeros((3, 4), np.float32), 1, Rule()).totals.read()[2]
    np.testing.assert_array_equal(totals.probabilities, [3 * UNITS // 4] * 4)


def test_arguments_that_do_not_fit(xp: Any) -> None:
    logits = xp.zeros((4, 8), np.float32)
    for call, words in (
        (lambda: gpu.forward(logits, 9, Rule()), "top_k is 9; 0 to 8 would be right on a GPU"),
        (lambda: gpu.forward(logits, 0, Rule()), "top_k is 0; 1 or more"),
        (lambda: gpu.forward(xp.zeros((1, 1025), np.float32), 1, Rule()), "there are 1025 experts; 1 to 1024"),
        (lambda: gpu.forward(logits, 2, Rule(groups=(3, 1))), "8 experts are in 3 groups; a divisor"),
        (lambda: gpu.forward(logits, 3, Rule(groups=(4, 1))), "1 of 4 groups have 2 experts; no more"),
        (lambda: gpu.forward(logits, 2, Rule(bias=np.zeros(7))), r"bias has shape \(7,\); \(8,\) would be right"),
        (lambda: gpu.drop_by_position(xp.zeros((4, 2), np.int32), np.zeros((3, 5), np.int64), 1), "before has shape"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="logits has type i8"):
        gpu.forward(logits.astype(np.int64), 1, Rule())
