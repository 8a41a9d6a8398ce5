"""Cross-entropy on the GPU, whole and split over ranks, and its gradient, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pointwise_operands import BF16, F64, TYPES, Guarded, error_is_below, smallest, sum_type, unit
from scipy.special import logsumexp

from fivedp.kernels.cuda import cross_entropy as gpu

SHAPES = [(1, 1), (9, 5), (3, 1001), (2, 20011), (0, 8)]


class Case:
    def __init__(self, rng: np.random.Generator, rows: int, classes: int, dtype: Any) -> None:
        self.logits = (4 * rng.standard_normal((rows, classes))).astype(dtype)
        self.labels = rng.integers(0, classes, rows)
        if rows > 2:
            self.labels[1] = gpu.IGNORED
        self.d_loss = rng.standard_normal(rows).astype(sum_type(dtype))
        self.terms = {"label_smoothing": [0.0, 0.1][rng.integers(2)], "z_loss": [0.0, 1e-3][rng.integers(2)]}

    def exact(self) -> tuple[Any, Any, Any]:
        """(loss, log_sum_exp, gradient of the sum of d_loss * loss)."""
        x, rows = self.logits.astype(F64), np.arange(len(self.labels))
        smoothing, z = self.terms["label_smoothing"], self.terms["z_loss"]
        counts = self.labels != gpu.IGNORED
        label = np.where(counts, self.labels, 0)
        total = logsumexp(x, axis=1) if len(x) else np.zeros(0)
        loss = total - (1 - smoothing) * x[rows, label] - smoothing * x.mean(axis=1) + z * total**2
        gradient = np.exp(x - total[:, None]) * (1 + 2 * z * total[:, None]) - smoothing / x.shape[1]
        gradient[rows, label] -= 1 - smoothing
        return counts * loss, total, (counts * self.d_loss.astype(F64))[:, None] * gradient

    def bound(self) -> Any:
        """Of loss and log_sum_exp: chains below 200 sums and a tree; exponents are rounded to 2 + |x - max| units."""
        x = self.logits.astype(F64)
        size = np.log(x.shape[1]) + abs(x).max(axis=1, initial=0) * 4 + 4
        return 250 * unit(sum_type(self.logits.dtype)) * (1 + self.terms["z_loss"] * size) * size


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(xp: Any, host: Any, seed: int, dtype: Any, shape: Any) -> None:
    rng = np.random.default_rng(seed)
    case = Case(rng, *shape, dtype)
    place: dict[str, int] = [{}, {"offset": 1, "gap": 3}, {"gap": 16}][rng.integers(3)]
    sums, labels = sum_type(dtype), xp.asarray(case.labels)
    logits = Guarded(xp, shape, dtype, values=case.logits, **place)
    loss, total = Guarded(xp, (shape[0],), sums), Guarded(xp, (shape[0],), sums)
    gpu.cross_entropy(logits.array, labels, loss.array, total.array, **case.terms)
    right, right_total, gradient = case.exact()
    error_is_below(host(loss.array), right, case.bound())
    error_is_below(host(total.array), right_total, case.bound())
    d_logits = Guarded(xp, shape, dtype, **place)
    d_loss = xp.asarray(case.d_loss)
    gpu.cross_entropy_backward(logits.array, labels, total.array, d_loss, d_logits.array, scale=0.5, **case.terms)
    # exp(x - l) with the absolute error of l, and of the terms' own few roundings.
    size = abs(case.d_loss.astype(F64))[:, None] * (1 + np.exp(case.logits.astype(F64) - right_total[:, None]))
    bound = 2 * (case.bound()[:, None] + 60 * unit(sums)) * size + unit(dtype) * abs(gradient) + smallest(dtype)
    error_is_below(host(d_logits.array), 0.5 * gradient, bound)
    gpu.cross_entropy_backward(logits.array, labels, total.array, d_loss, logits.array, scale=0.5, **case.terms)
    assert host(logits.array).tobytes() == host(d_logits.array).tobytes()
    for guarded in (loss, total, d_logits, logits):
        guarded.check(host)


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_ranks_merge_to_the_whole(xp: Any, host: Any, seed: int, n_ranks: int) -> None:
    rng = np.random.default_rng(seed)
    case = Case(rng, 7, 301, BF16)
    borders, labels = np.linspace(0, 301, n_ranks + 1).astype(int).tolist(), xp.asarray(case.labels)
    partials = xp.full((n_ranks, 4, 7), np.nan, np.float32)
    parts = [xp.asarray(np.ascontiguousarray(case.logits[:, borders[i] : borders[i + 1]])) for i in range(n_ranks)]
    for rank, part in enumerate(parts):
        gpu.cross_entropy_partials(part, labels, partials[rank], first=borders[rank], vocabulary=301)
    loss, total = xp.full(7, np.nan, np.float32), xp.full(7, np.nan, np.float32)
    gpu.cross_entropy_merge(partials, labels, loss, total, vocabulary=301, **case.terms)
    right, right_total, gradient = case.exact()
    error_is_below(host(loss), right, case.bound())
    error_is_below(host(total), right_total, case.bound())
    for rank, part in enumerate(parts):
        gpu.cross_entropy_backward(
            part, labels, total, xp.asarray(case.d_loss), part, first=borders[rank], vocabulary=301, **case.terms
        )
    got = np.concatenate([host(part).astype(F64) for part in parts], axis=1)
    error_is_below(got, gradient, 2.0**-8 * abs(gradient) + 2 * case.bound()[:, None] * abs(case.d_loss)[:, None] * 2)


def test_masked_and_hopeless_rows(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6, 40)).astype(np.float32)
    x[0, 5:] = -np.inf  # masked classes
    x[1] = -np.inf
    x[2, 3] = np.nan
    x[4] += 1e30  # no overflow
    labels = np.array([2, 1, 1, 40, 7, 0])  # 40 is no class
    loss, total = xp.full(6, 7, np.float32), xp.full(6, 7, np.float32)
    gpu.cross_entropy(xp.asarray(x), xp.asarray(labels), loss, total)
    got = host(loss)
    error_is_below(got[[0, 5]], logsumexp(x[[0, 5]].astype(F64), axis=1) - x[[0, 5], [2, 0]], 1e-5)
    assert host(total)[1] == -np.inf
    assert np.isnan(got[[2, 3]]).all()
    assert np.isfinite(got[4])
    d_logits = xp.full(x.shape, 7, np.float32)
    gpu.cross_entropy_backward(xp.asarray(x), xp.asarray(labels), total, None, d_logits)
    assert (host(d_logits)[0, 5:] == 0).all()
    assert np.isnan(host(d_logits)[3]).all()
    assert abs(host(d_logits)[0].sum()) < 1e-5


def test_what_does_not_fit_is_named(xp: Any) -> None:
    x, loss = xp.zeros((2, 3), np.float32), xp.zeros(2, np.float32)
    with pytest.raises(TypeError, match="cross_entropy: labels has type i4; i8 would be right"):
        gpu.cross_entropy(x, xp.zeros(2, np.int32), loss)
    with pytest.raises(ValueError, match="cross_entropy: label_smoothing is 2; 0 to 1 would be right"):
        gpu.cross_entropy(x, xp.zeros(2, np.int64), loss, label_smoothing=2)
    with pytest.raises(ValueError, match="cross_entropy: logits has classes 2 to 5 of a vocabulary of 4"):
        gpu.cross_entropy_partials(x, xp.zeros(2, np.int64), xp.zeros((4, 2), np.float32), first=2, vocabulary=4)
