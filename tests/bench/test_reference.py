"""The references agree with sums written out, and their gradients with finite differences."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fivedp.kernels.attention import Mask
from fivedp.reference import NAMES, open_reference


def reference(name: str) -> Any:
    if name == "torch":
        pytest.importorskip("torch")
    return open_reference(name)


@pytest.fixture
def draw() -> np.random.Generator:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_product_is_the_sum_over_k(name: str, batch: tuple[int, ...], draw: np.random.Generator) -> None:
    a, b = draw.normal(size=(*batch, 4, 5)), draw.normal(size=(5, 6))
    c = reference(name).matmul(a, b)
    written_out = (a[..., :, :, None] * b[None, :, :]).sum(axis=-2)
    np.testing.assert_allclose(c, written_out, rtol=1e-12)
    out = np.empty_like(c)
    assert reference(name).matmul(a, b, out=out) is out
    assert (out == c).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_are_those_of_finite_differences(
    name: str, batch: tuple[int, ...], draw: np.random.Generator
) -> None:
    """The product is linear in each operand, so a central difference is exact but for rounding."""
    a, b, dc = draw.normal(size=(*batch, 3, 4)), draw.normal(size=(4, 5)), draw.normal(size=(*batch, 3, 5))
    gradients = reference(name).matmul_backward(dc, a, b)
    for operand, gradient in zip((a, b), gradients, strict=True):
        assert gradient.shape == operand.shape
        for place in np.ndindex(operand.shape):
            kept = operand[place]
            operand[place] = kept + 1
            more = float((dc * (a @ b)).sum())
            operand[place] = kept - 1
            less = float((dc * (a @ b)).sum())
            operand[place] = kept
            assert gradient[place] == pytest.approx((more - less) / 2, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (True, 7), (False, 7)])
@pytest.mark.parametrize("queries", [40, 3])
def test_attention_of_torch_is_that_of_the_oracle(
    documents: int, causal: bool, window: int, queries: int, draw: np.random.Generator
) -> None:
    """Also where torch is told a flag instead of a matrix, and where queries are the last tokens only."""
    torch, oracle = reference("torch"), reference("float64")
    position = np.arange(40, dtype=np.int32)
    document = (position * documents // 40).astype(np.int32)
    mask = Mask(position[-queries:], position, document[-queries:], document, 0.3, causal, window)
    if documents == 1:
        mask = Mask(position[-queries:], position, scale=0.3, causal=causal, window=window)
    q, do = draw.normal(size=(2, 2, queries, 4, 8))
    k, v = draw.normal(size=(2, 2, 40, 2, 8))
    np.testing.assert_allclose(torch.attention(q, k, v, mask), oracle.attention(q, k, v, mask), atol=1e-12)
    theirs, ours = (x.attention_backward(do, q, k, v, mask)() for x in (torch, oracle))
    for one, other in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize(("gated", "score", "normalize"), [(True, "softmax", True), (True, "sigmoid", True),
                                                          (False, "softmax", False)])  # fmt: skip
def test_experts_of_torch_are_the_dense_sum_and_their_gradients_its_differences(
    gated: bool, score: str, normalize: bool, draw: np.random.Generator
) -> None:
    torch = reference("torch")
    x, router, gate, up, down = (draw.normal(size=shape) for shape in ((9, 4), (4, 5), (5, 4, 3), (5, 4, 3), (5, 3, 4)))
    dy = draw.normal(size=x.shape)
    routing = {"top_k": 2, "score": score, "normalize": normalize}

    def dense(arrays: list[Any]) -> Any:
        x, router, gate, up, down = arrays
        logits = x @ router
        scores = 1 / (1 + np.exp(-logits)) if score == "sigmoid" else np.exp(logits)
        scores = scores if score == "sigmoid" else scores / scores.sum(axis=1, keepdims=True)
        kept = np.where(scores >= np.sort(scores, axis=1)[:, -2:-1], scores, 0)
        kept = kept / kept.sum(axis=1, keepdims=True) if normalize else kept
        hidden = np.einsum("th,ehf->tef", x, up)
        gates = np.einsum("th,ehf->tef", x, gate) if gated else None
        hidden = np.maximum(hidden, 0) if gates is None else gates / (1 + np.exp(-gates)) * hidden
        return np.einsum("te,tef,efh->th", kept, hidden, down)

    arrays = [x, router, gate, up, down]
    given = [x, router, gate if gated else None, up, down]
    np.testing.assert_allclose(torch.experts(*given, **routing), dense(arrays), atol=1e-12)
    gradients = iter(torch.experts_backward(dy, *given, **routing)())
    for array in (a for a, b in zip(arrays, given, strict=True) if b is not None):
        gradient, place = next(gradients), tuple(int(draw.integers(n)) for n in array.shape)
        assert gradient.shape == array.shape
        kept, step, loss = array[place], 1e-6, []
        for moved in (kept + step, kept - step):
            array[place] = moved
            loss.append(float((dy * dense(arrays)).sum()))
        array[place] = kept
        assert gradient[place] == pytest.approx((loss[0] - loss[1]) / (2 * step), rel=1e-5, abs=1e-6)


def test_float64_does_not_round_its_inputs_to_their_type(draw: np.random.Generator) -> None:
    a, b = (draw.normal(size=(40, 40)).astype(ml_dtypes.bfloat16) for _ in range(2))
    exact = a.astype(np.longdouble) @ b.astype(np.longdouble)
    assert np.abs(open_reference("float64").matmul(a, b) - exact).max() < 1e-13


def test_torch_takes_bfloat16_by_its_bits(draw: np.random.Generator) -> None:
    a, b = (draw.normal(size=(16, 16)).astype(ml_dtypes.bfloat16) for _ in range(2))
    c = reference("torch").matmul(a, b)
    assert c.dtype == ml_dtypes.bfloat16
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert np.abs(c.astype(np.float64) - exact).max() <= 2.0**-8 * np.abs(exact).max()


def test_an_unknown_reference_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="choose one of float64, numpy, torch"):
        open_reference("matlab")


def test_types_without_a_fast_product_are_not_offered() -> None:
    assert not open_reference("numpy").supports("bfloat16")
    assert open_reference("float64").supports("bfloat16")
    assert not open_reference("numpy").supports("float32", "attention")
    assert not open_reference("numpy").supports("float32", "moe")
