"""Is this product right, and are its bits those of one rank?

Two tests against float64, neither of which needs the whole matrix anywhere. *Samples*: rows and columns drawn in
every rank's share are made again from their seeds and multiplied in float64 (long double for float64 itself); the
error must stay within twice that of an honest product of the same type on one rank. *Freivalds* (1979): with a vector
x of random signs, C x must be A (B x) in float64 for every row of C, so no part of the result goes unread; each rank
contributes the shares it holds. *Bits*: the sampled block multiplied by fivedp on one rank must have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivedp.bench import agree, operands
from fivedp.bench.pieces import Matrix

SAMPLED_ROWS, SAMPLED_COLUMNS = 48, 192
SLACK = 2.0  # the project's promise: at most twice the error of an honest computation in the same type
# A residual of Freivalds is a sum of n rounding errors of random sign. The largest of 1e5 normal deviates is about 4.5
# standard deviations and our error may be twice the honest one: 16 leaves room, a wrong element exceeds it by far.
FREIVALDS_SIGMAS = 16.0

FEW = 256  # below so many samples a mean error may differ twofold by luck

OneRank = Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Verdict:
    """What a check found; the same on every rank.

    error, honest : relative root-mean-square error of the result and of the one-rank product, over the samples
    floor : what is allowed besides, where too few elements exist for a mean
    residual : largest Freivalds residual over what rounding explains; wrong above 1
    same_bits : whether the samples have the bits of one rank; None where not asked
    """

    error: float
    honest: float
    residual: float
    floor: float = 0.0
    same_bits: bool | None = None

    @property
    def wrong(self) -> str:
        """Why the result is wrong; empty where it is right."""
        if not self.error <= SLACK * self.honest + self.floor:
            return f"error {self.error:.1e} exceeds {SLACK:g} x {self.honest:.1e}, that of one rank"
        if not self.residual <= 1.0:
            return f"Freivalds residual is {self.residual:.3g} times what rounding explains"
        return ""


def product(
    comm: Any, left: Matrix, right: Matrix, result: Matrix, seed: int, inner: int, one_rank: OneRank | None = None
) -> Verdict:
    """Check that `result` is `left` times `right`. Collective; every rank returns the same verdict.

    Parameters
    ----------
    left, right : Matrix
        Seeded operands, with this rank's shares.
    result : Matrix
        This rank's share of the product.
    inner : int
        Global size of the index summed over.
    one_rank : callable, optional
        Multiplies two matrices on one rank in the same order of sums; its bits are compared.
    """
    draw = np.random.default_rng([seed, comm.rank])
    sample = _sample(left, right, result, inner, draw, one_rank)
    wrong_sq, honest_sq, size_sq, count = agree.total(comm, *sample[:4])
    same = None if one_rank is None else agree.everywhere(comm, sample[4])
    size = math.sqrt(size_sq) or 1.0
    spread = math.sqrt(honest_sq / max(count, 1.0))
    residual = _freivalds(comm, left, right, result, seed, inner, spread)
    floor = epsilon(result.data.dtype) if count < FEW else 0.0
    return Verdict(math.sqrt(wrong_sq) / size, math.sqrt(honest_sq) / size, residual, floor, same)


def _sample(
    left: Matrix, right: Matrix, result: Matrix, inner: int, draw: np.random.Generator, one_rank: OneRank | None
) -> tuple[float, float, float, float, bool]:
    """Squared error, honest squared error, squared size, count and sameness of bits over this rank's samples."""
    dtype = result.data.dtype
    extended = dtype.itemsize // (2 if dtype.kind == "c" else 1) == 8
    exact = (np.clongdouble if dtype.kind == "c" else np.longdouble) if extended else operands.exact_of(dtype)
    most_rows, most_columns = (12, 24) if extended else (SAMPLED_ROWS, SAMPLED_COLUMNS)  # long double has no BLAS
    i, j = pick(len(result.rows), most_rows, draw), pick(len(result.columns), most_columns, draw)
    if not (i.size and j.size):
        return 0.0, 0.0, 0.0, 0.0, True
    a = left.take(result.rows[i], range(inner))
    b = right.take(range(inner), result.columns[j])
    got = result.data[np.ix_(i, j)]
    truth = a.astype(exact) @ b.astype(exact)
    wide = operands.accumulator_of(dtype)
    honest = (a.astype(wide, copy=False) @ b.astype(wide, copy=False)).astype(dtype, copy=False)
    same = True
    if one_rank is not None:
        alone = one_rank(np.ascontiguousarray(a), np.ascontiguousarray(b))
        same = alone.tobytes() == np.ascontiguousarray(got).tobytes()
    return (
        squares(got.astype(exact) - truth),
        squares(honest.astype(exact) - truth),
        squares(truth),
        float(got.size),
        same,
    )


def epsilon(dtype: np.dtype[Any]) -> float:
    """The rounding unit of `dtype`; NumPy does not know that of bfloat16."""
    return 2.0**-8 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def pick(size: int, most: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Up to `most` of `size` positions, the first and the last always among them."""
    if size <= most:
        return np.arange(size)
    inside = draw.choice(np.arange(1, size - 1), most - 2, replace=False)
    return np.sort(np.concatenate(([0], inside, [size - 1])))


def squares(x: NDArray[Any]) -> float:
    """The sum of the squares."""
    return float((np.abs(x) ** 2).sum())


def _freivalds(comm: Any, left: Matrix, right: Matrix, result: Matrix, seed: int, inner: int, spread: float) -> float:
    """The largest |C x - A (B x)| over the rows of C, in units of what rounding explains."""
    (rows,) = agree.largest(comm, float(result.rows.max(initial=-1)))
    (columns,) = agree.largest(comm, float(result.columns.max(initial=-1)))
    n_rows, n_columns = int(rows) + 1, int(columns) + 1
    if not (n_rows and n_columns):
        return 0.0
    signs = np.random.default_rng([seed, 7]).integers(0, 2, n_columns) * 2.0 - 1.0
    exact = operands.exact_of(result.data.dtype)
    middle = _apply(comm, right, signs.astype(exact), inner)
    expected = _apply(comm, left, middle, n_rows)
    got = _apply(comm, result, signs.astype(exact), n_rows)
    worst = float(np.abs(got - expected).max())
    if not math.isfinite(worst):
        return math.inf
    # the vectors themselves round in float64: a few units of the last place of sums of inner * n_columns terms
    own = np.finfo(np.float64).eps * math.sqrt(inner * n_columns) * math.sqrt(inner)
    return worst / (FREIVALDS_SIGMAS * (spread * math.sqrt(n_columns) + own))


def _apply(comm: Any, matrix: Matrix, vector: NDArray[Any], n_rows: int) -> NDArray[Any]:
    """The distributed matrix times a vector that every rank holds; every rank returns the whole result."""
    out = np.zeros(n_rows, vector.dtype)
    if matrix.counts and matrix.data.size:
        part = np.ascontiguousarray(vector[matrix.columns])
        step = max(1, (1 << 20) // max(1, matrix.data.shape[1]))  # rows turned into float64 at a time
        for start in range(0, matrix.data.shape[0], step):
            rows = matrix.data[start : start + step].astype(vector.dtype)
            np.add.at(out, matrix.rows[start : start + step], rows @ part)
    agree.add_up(comm, out)
    return out
