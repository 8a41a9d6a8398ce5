"""What lies between an expert's products: activations, their gradients, the weights of rows, dot products."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from expert_operands import activation_error, hidden_of, poisoned, rounding, scattered, sum_type
from kernel_operands import BF16, REAL_TYPES, bits, draw

from fivedp.kernels import gemm as kernel
from fivedp.kernels.experts import (
    expert_hidden,
    expert_hidden_backward,
    gather_rows,
    row_dots,
    weighted_rows,
)

ACTIVATIONS = ["swiglu", "gelu", "gelu_tanh", "relu", "silu"]
F64 = np.float64


def activate(gate: Any, up: Any, activation: str) -> Any:
    """hidden of given products, through the kernel: the identity is the weight."""
    rows, f = up.shape
    one = np.eye(f, dtype=up.dtype)[None]
    hidden = poisoned((rows, f), up.dtype)
    offsets = np.array([0, rows], np.int64)
    if gate is None:
        expert_hidden(up, None, one, offsets, hidden, activation=activation)
    else:
        pair = np.hstack([gate, up])
        zero = np.zeros_like(one)
        both = np.concatenate([one, zero], axis=1), np.concatenate([zero, one], axis=1)
        expert_hidden(pair, both[0], both[1], offsets, hidden, activation=activation)
    return hidden


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_right_to_a_few_roundings(rng: np.random.Generator, dtype: Any, activation: str) -> None:
    # From where exp underflows to where everything is saturated, dense around 0.
    width = 60 if dtype == F64 else 12
    x = np.concatenate([rng.uniform(-width, width, 2000), rng.standard_normal(2000), rng.uniform(-1e-3, 1e-3, 96)])
    x = x.reshape(32, 128).astype(dtype)
    gate = x if activation == "swiglu" else None
    up = draw(rng, x.shape, dtype) if activation == "swiglu" else x
    hidden, right = activate(gate, up, activation), hidden_of(activation, gate, up)
    smallest = 1e-290 if dtype == F64 else 1e-36  # times an argument of some size
    allowed = activation_error(activation, gate, up) * rounding(dtype) * abs(right) + smallest
    assert (abs(hidden.astype(F64) - right) <= allowed).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BF16], ids=str)
def test_extreme_arguments(dtype: Any) -> None:
    large = 1e30 if dtype != F64 else 1e300
    x = np.array([[0.0, -0.0, large, -large, np.inf, np.nan, 100, -100, 1000, -1000]]).astype(dtype)
    for activation in ACTIVATIONS[1:]:
        up = x.copy()
        d_up, hidden = poisoned(x.shape, dtype), poisoned(x.shape, dtype)
        ones = np.ones_like(x)
        expert_hidden_backward(
            ones, None, up, None, d_gate=None, d_up=d_up, hidden_weighted=hidden, activation=activation
        )
        numbers = np.nan_to_num(x.astype(F64))  # NaN is 0, infinity very large
        finite, positive, negative = np.isfinite(x), numbers > 1, (numbers < -999)
        assert np.isfinite(hidden[finite]).all(), activation
        assert bits(hidden[positive]) == bits(x[positive])
        assert (hidden[negative] == 0).all()
        assert np.isnan(hidden[np.isnan(x)]).all()
        assert (d_up[finite & positive] == 1).all()
        assert (d_up[negative] == 0).all()
        assert np.isnan(d_up[np.isnan(x)]).all() or activation == "relu"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("f", [1, 7, 64, 301])
def test_gradients_are_those_of_finite_differences(rng: np.random.Generator, activation: str, f: int) -> None:
    rows = 5
    gated = activation == "swiglu"
    gate = draw(rng, (rows, f), F64) if gated else None
    up, d_hidden, weights = draw(rng, (rows, f), F64), draw(rng, (rows, f), F64), draw(rng, (rows,), F64)
    if activation == "relu":
        up += np.sign(up) * 1e-3  # away from the kink
    d_gate = poisoned(up.shape, F64) if gated else None
    d_up, weighted, d_weights = poisoned(up.shape, F64), poisoned(up.shape, F64), poisoned((rows,), F64)
    expert_hidden_backward(
        d_hidden, gate, up, weights, d_gate=d_gate, d_up=d_up, hidden_weighted=weighted, d_weights=d_weights,
        activation=activation,
    )  # fmt: skip
    hidden = hidden_of(activation, gate, up)
    np.testing.assert_allclose(weighted, weights[:, None] * hidden, rtol=1e-14, atol=1e-300)
    terms = d_hidden * hidden
    assert (abs(d_weights - terms.sum(axis=1)) <= (f + 20) * 2.0**-53 * abs(terms).sum(axis=1)).all()
    step = 1e-5

    def slope(name: str) -> Any:
        moved = []
        for sign in (1, -1):
            g = None if gate is None else gate + (sign * step if name == "gate" else 0)
            moved.append(hidden_of(activation, g, up + (sign * step if name == "up" else 0)))
        return weights[:, None] * d_hidden * (moved[0] - moved[1]) / (2 * step)

    # The third derivatives are below 4 for arguments of a few units, the differences lose half of the digits.
    scale = abs(weights[:, None] * d_hidden) * (1 + abs(up))
    assert (abs(d_up - slope("up")) <= 1e-9 * scale).all()
    if gated:
        assert (abs(d_gate - slope("gate")) <= 1e-9 * scale).all()


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wide_d_hidden", [False, True])
def test_shorter_types_follow_float64(
    rng: np.random.Generator, dtype: Any, activation: str, wide_d_hidden: bool
) -> None:
    rows, f = 6, 130
    gate, up = (draw(rng, (rows, f), dtype) for _ in range(2))
    d_hidden = draw(rng, (rows, f), np.float32 if wide_d_hidden else dtype)
    weights = draw(rng, (rows,), np.float32)
    with_gate = activation == "swiglu"
    results: dict[Any, list[Any]] = {}
    for kind, total in ((dtype, np.float32), (F64, F64)):
        d_gate, d_up, weighted = (poisoned((rows, f), kind) for _ in range(3))
        d_weights = poisoned((rows,), total)
        expert_hidden_backward(
            d_hidden.astype(np.float32 if wide_d_hidden and kind != F64 else kind),
            gate.astype(kind) if with_gate else None, up.astype(kind), weights.astype(total),
            d_gate=d_gate if with_gate else None, d_up=d_up, hidden_weighted=weighted, d_weights=d_weights,
            activation=activation,
        )  # fmt: skip
        results[kind] = [d_up, weighted, *([d_gate] if with_gate else [])]
        results[kind].append(d_weights)
    *arrays, d_weights = results[dtype]
    *rights, right_weights = results[F64]
    for array, right in zip(arrays, rights, strict=True):
        # The slope is a sum of terms below 1.2; hidden is rounded twice, once on its own and once weighted.
        scale = abs(weights[:, None]) * np.maximum(abs(d_hidden.astype(F64)), 1) * np.maximum(abs(up.astype(F64)), 1)
        scale = scale * np.maximum(abs(gate.astype(F64)), 1)
        assert (abs(array.astype(F64) - right) <= 16 * 2.0**-24 * scale + 2.01 * rounding(dtype) * abs(right)).all()
    hidden = activate(gate, up, activation) if with_gate else activate(None, up, activation)
    terms = d_hidden.astype(F64) * hidden.astype(F64)
    # Of the hidden values as the forward rounded them.
    assert (abs(d_weights - terms.sum(axis=1)) <= 20 * 2.0**-24 * abs(terms).sum(axis=1)).all()
    assert dtype == BF16 or (abs(d_weights - right_weights) <= 40 * 2.0**-24 * abs(terms).sum(axis=1)).all()


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_gradients_may_replace_what_they_were_computed_from(rng: np.random.Generator, dtype: Any) -> None:
    d_hidden, gate, up = (draw(rng, (9, 77), dtype) for _ in range(3))
    weights = draw(rng, (9,), sum_type(dtype))
    d_gate, d_up, weighted = (poisoned((9, 77), dtype) for _ in range(3))
    expert_hidden_backward(d_hidden, gate, up, weights, d_gate=d_gate, d_up=d_up, hidden_weighted=weighted)
    expert_hidden_backward(d_hidden, gate, up, weights, d_gate=gate, d_up=up, hidden_weighted=d_hidden)
    assert bits(gate) + bits(up) + bits(d_hidden) == bits(d_gate) + bits(d_up) + bits(weighted)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_rows_stand_for_themselves_and_strides_do_not_matter(rng: np.random.Generator, dtype: Any) -> None:
    names = ("d_hidden", "gate", "up", "d_gate", "d_up", "weighted")
    arrays = {name: draw(rng, (8, 90), dtype) for name in names}
    weights, d_weights = draw(rng, (8,), sum_type(dtype)), poisoned((8,), sum_type(dtype))

    def run(a: dict[str, Any], w: Any, dw: Any) -> None:
        expert_hidden_backward(
            a["d_hidden"], a["gate"], a["up"], w, d_gate=a["d_gate"], d_up=a["d_up"], hidden_weighted=a["weighted"],
            d_weights=dw,
        )  # fmt: skip

    run(arrays, weights, d_weights)
    wide = {name: poisoned((16, 95), dtype)[::2, 2:92] for name in names}
    for name in names[:3]:
        wide[name][...] = arrays[name]
    run(wide, weights, again := poisoned((8,), sum_type(dtype)))
    for name in names:
        assert bits(wide[name]) == bits(arrays[name])
    assert bits(again) == bits(d_weights)
    alone = {name: array[3:4].copy() for name, array in arrays.items()}
    run(alone, weights[3:4], one := poisoned((1,), sum_type(dtype)))
    assert bits(one) == bits(d_weights[3:4])
    assert bits(alone["d_gate"]) == bits(arrays["d_gate"][3:4])


def dot_by_definition(a: Any, b: Any, dtype: Any) -> Any:
    """The documented order, in longer floats than the sums: the fused products are then rounded once."""
    wide = np.longdouble if dtype == F64 else F64
    n_sums = 128 // np.dtype(dtype).itemsize
    sums = [dtype(0)] * n_sums
    for j in range(len(a)):
        sums[j % n_sums] = dtype(wide(a[j]) * wide(b[j]) + wide(sums[j % n_sums]))
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [sums[i] + sums[i + half] for i in range(half)]
    return sums[0]


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 200, 1023])
def test_dots_are_summed_in_the_documented_order(rng: np.random.Generator, size: int) -> None:
    a, b = draw(rng, (4, size), BF16), draw(rng, (4, size), BF16)  # products are exact in float32
    row_dots(a, b, out := poisoned((4,), np.float32))
    for i in range(4):
        right = dot_by_definition(a[i].astype(np.float32), b[i].astype(np.float32), np.float32)
        assert bits(out[i]) == bits(np.float32(right))


@pytest.mark.parametrize("types", [("f4", "f4"), ("f8", "f8"), (BF16, BF16), (BF16, "f4"), ("f4", BF16)], ids=str)
@pytest.mark.parametrize("size", [0, 1, 33, 1000])
def test_dots_of_rows(rng: np.random.Generator, types: tuple[Any, Any], size: int) -> None:
    a, b = draw(rng, (7, size), types[0]), draw(rng, (7, size), types[1])
    total = sum_type(types[0])
    row_dots(a, b, out := poisoned((7,), total))
    terms = a.astype(F64) * b.astype(F64)
    allowed = (size / 16 + 8) * rounding(total) * abs(terms).sum(axis=1)
    assert (abs(out - terms.sum(axis=1)) <= allowed).all()
    row_dots(scattered(rng, a), scattered(rng, b), again := poisoned((7,), total))
    assert bits(again) == bits(out)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 33, 500])
def test_weighted_and_gathered_rows(rng: np.random.Generator, dtype: Any, size: int) -> None:
    x, weights = draw(rng, (11, size), dtype), draw(rng, (11,), sum_type(dtype))
    rows = scattered(rng, x)
    gather_rows(rows, out := poisoned(x.shape, dtype))
    assert bits(out) == bits(x)
    right = weights[:, None] * x.astype(sum_type(dtype))
    for result in [dtype] if dtype == F64 else [np.dtype(np.float32), BF16]:
        for given in (rows, x):
            weighted_rows(given, weights, out := poisoned(x.shape, result))
            assert bits(out) == bits(right.astype(result))


def test_any_number_is_rounded_to_bfloat16_to_nearest_even_denormals_too(rng: np.random.Generator) -> None:
    x = rng.integers(0, 1 << 32, (64, 1000), np.uint32)
    x[:8] &= np.uint32(0x807FFFFF)  # denormals and zeros, which the instruction of the CPU would flush
    x[8:12, ::7] = np.uint32(0x7F800001)  # one NaN among other numbers
    x[12:16] &= np.uint32(0xFFFF8000)  # halfway, or exact
    numbers = x.view(np.float32)
    weighted_rows(numbers, np.ones(64, np.float32), out := poisoned(x.shape, BF16))
    is_number = ~np.isnan(numbers)
    with np.errstate(over="ignore"):
        right = numbers[is_number].astype(BF16)
    assert bits(out[is_number]) == bits(right)
    assert np.isnan(out[~is_number].astype(np.float32)).all()


@pytest.mark.usefixtures("restore_threads")
def test_bits_do_not_depend_on_the_number_of_threads(rng: np.random.Generator) -> None:
    d_hidden, gate, up = (draw(rng, (301, 700), np.float32) for _ in range(3))
    weights = draw(rng, (301,), np.float32)
    found = set()
    for count in (1, 2, 3):
        kernel.set_threads(count)
        results = [poisoned(up.shape, np.float32) for _ in range(4)]
        numbers = [poisoned((301,), np.float32) for _ in range(2)]
        expert_hidden_backward(
            d_hidden, gate, up, weights, d_gate=results[0], d_up=results[1], hidden_weighted=results[2],
            d_weights=numbers[0],
        )  # fmt: skip
        weighted_rows(gate, weights, results[3])
        row_dots(gate, up, numbers[1])
        found.add(b"".join(bits(array) for array in results + numbers))
    assert len(found) == 1


PROGRAM = """
import hashlib, sys
import ml_dtypes, numpy as np
from fivedp.kernels.experts import *
from fivedp.kernels.experts import Rows
from fivedp.kernels.gemm import isa
rng = np.random.default_rng(int(sys.argv[1]))
print(isa())
for dtype, total in ((np.float32, np.float32), (np.float64, np.float64), (ml_dtypes.bfloat16, np.float32)):
    digest = hashlib.sha256()
    d, g, u = (4 * rng.standard_normal((6, 219))).astype(dtype), *(4 * rng.standard_normal((2, 6, 219))).astype(dtype)
    w = rng.standard_normal(6).astype(total)
    for activation in ("swiglu", "gelu", "gelu_tanh", "relu", "silu"):
        gate = g if activation == "swiglu" else None
        out = [np.empty_like(u) for _ in range(3)]
        dw, dots = np.empty(6, total), np.empty(6, total)
        expert_hidden_backward(d, gate, u, w, d_gate=None if gate is None else out[0], d_up=out[1],
                               hidden_weighted=out[2], d_weights=dw, activation=activation)
        for array in (out[0] if gate is not None else out[1], *out[1:], dw):
            digest.update(array.tobytes())
    row_dots(d, g, dots)
    weighted_rows(d, w, out[0])
    rows = Rows([d], np.zeros(6, np.int32), np.arange(6, dtype=np.int32))
    experts = np.array([0, 4, 5, 1, 2, 6], np.int32)
    combine_rows(rows, np.array([0, 3, 3, 6]), w, experts, 7, y := np.empty((3, 219), dtype))
    any_bits = rng.integers(0, 1 << 32, (6, 219), np.uint32).view(np.float32)
    weighted_rows(any_bits, np.ones(6, np.float32), rounded := np.empty((6, 219), ml_dtypes.bfloat16))
    for array in (dots, out[0], y, rounded):
        digest.update(array.tobytes())
    print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed:", seed)
    found = set()
    for isa in kernel.supported_isas():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(seed)],
            env={**os.environ, "FIVEDP_ISA": isa}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{isa}: {done.stderr}"
        lines = done.stdout.split()
        assert lines[0] == isa
        found.add(tuple(lines[1:]))
    assert len(found) == 1


def test_arguments_that_do_not_fit(rng: np.random.Generator) -> None:
    a = np.zeros((4, 6), np.float32)
    w = np.zeros(4, np.float32)

    def backward(d_hidden: Any = a, gate: Any = a, up: Any = a, weights: Any = w, **outputs: Any) -> None:
        given = {"d_gate": a.copy(), "d_up": a.copy(), **outputs}
        expert_hidden_backward(d_hidden, gate, up, weights, **given)

    backward()
    with pytest.raises(ValueError, match=r"d_hidden has shape \(3, 6\); \(4, 6\)"):
        backward(d_hidden=a[:3])
    with pytest.raises(ValueError, match="'swiglu' and gate is None"):
        backward(gate=None)
    with pytest.raises(ValueError, match="d_gate is given without gate"):
        backward(gate=None, activation="silu")
    with pytest.raises(ValueError, match="gate is given without d_gate"):
        backward(d_gate=None)
    with pytest.raises(ValueError, match="weights has shape"):
        backward(weights=w[:3])
    with pytest.raises(ValueError, match="d_weights is strided"):
        backward(d_weights=np.zeros(8, np.float32)[::2])
    with pytest.raises(ValueError, match="d_up is strided"):
        backward(d_up=np.zeros((6, 4), np.float32).T)
    with pytest.raises(ValueError, match="activation is 'sin'"):
        backward(activation="sin")
    with pytest.raises(TypeError, match="weights is float64; float32"):
        backward(weights=w.astype(F64))
    with pytest.raises(TypeError, match="hidden_weighted is float64; float32"):
        backward(hidden_weighted=a.astype(F64))
    with pytest.raises(TypeError, match="d_hidden is bfloat16 beside operands of float32"):
        backward(d_hidden=a.astype(BF16))
    frozen = a.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="d_up is read-only"):
        backward(d_up=frozen)
    rows = scattered(rng, a)
    with pytest.raises(ValueError, match="out has shape"):
        gather_rows(rows, np.zeros((5, 6), np.float32))
    with pytest.raises(TypeError, match="out is float64; float32"):
        gather_rows(rows, np.zeros((4, 6)))
    with pytest.raises(TypeError, match="rows is a ndarray; fivedp"):
        gather_rows(a, a)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="out is float64 beside operands of float32"):
        weighted_rows(rows, w, np.zeros((4, 6)))
    with pytest.raises(ValueError, match="weights has shape"):
        weighted_rows(rows, w[:2], a)
    with pytest.raises(TypeError, match="both float64 or neither"):
        row_dots(a, a.astype(F64), w)
    with pytest.raises(ValueError, match="b has shape"):
        row_dots(a, a[:, :5], w)
    with pytest.raises(TypeError, match="weights is bfloat16; float32"):
        weighted_rows(rows, w.astype(ml_dtypes.bfloat16).view(np.uint16), a)
