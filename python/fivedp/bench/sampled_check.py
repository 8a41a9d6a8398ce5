"""Sampled results beside what is right and what a plain computation gives: the part that checks have in common.

A check computes samples of every result twice, in wider types and plainly in the type of the inputs, and adds up the
squared errors of both over all ranks. An error is wrong beyond a small multiple of the plain one. What else must hold
(sums that gradients conserve) is a number that says how many times as much as rounding explains it is off.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fivedp.bench import agree, operands
from fivedp.bench.check import squares
from fivedp.bench.family import Row

Array = NDArray[Any]


class Arithmetic(NamedTuple):
    """The types of one computation: of sums, and what weights and results are rounded to."""

    sums: np.dtype[Any]
    stored: np.dtype[Any]

    def rounded(self, x: Array) -> Array:
        """`x` as it comes back from memory."""
        return x.astype(self.stored, copy=False).astype(self.sums, copy=False)


def plain(dtype: np.dtype[Any]) -> Arithmetic:
    """In the type of the inputs."""
    return Arithmetic(operands.accumulator_of(dtype), dtype)


def exact(dtype: np.dtype[Any]) -> Arithmetic:
    """Wider than the inputs."""
    wide = np.dtype(np.longdouble) if dtype == np.float64 else np.dtype(np.float64)
    return Arithmetic(wide, wide)


class Error(NamedTuple):
    """Relative root-mean-square error of a result, that of the plain computation, and what is allowed."""

    ours: float
    plain: float
    allowed: float


class SampledCheck(ABC):
    """Errors of one case on this rank, added up over all ranks when they are read.

    Attributes
    ----------
    reason : str
        What the allowed error is, for messages.
    aside : tuple of str
        Results whose errors are judged and reported, but never stand for the whole row.
    extended : bool
        Whether what is right is computed in long double, which has no BLAS: fewer samples then.
    """

    reason: str
    aside: tuple[str, ...] = ()

    def __init__(self, comm: Any, dtype: np.dtype[Any]) -> None:
        self.comm, self.dtype = comm, dtype
        self.exact, self.plain = exact(dtype), plain(dtype)
        self.ways = (self.exact, self.plain)
        self.extended = dtype == np.float64
        self._sums: dict[str, Array] = {}  # by result: squared errors, ours and plain; squared size; samples
        self._residual = 0.0

    @abstractmethod
    def _allowed(self, name: str, plainly: float, samples: float) -> float:
        """The largest relative error of a result that is right, from that of the plain computation."""

    def _expect(self, *names: str) -> None:
        """Results that ranks without samples of them have as well."""
        for name in names:
            self._sums[name] = np.zeros(4)

    def _add(self, name: str, got: Array, truth: Array, honest: Array) -> None:
        """Put samples of a result beside what is right and what a plain computation gives."""
        got, truth, honest = (x.astype(self.exact.sums, copy=False) for x in (got, truth, honest))
        sums = np.array([squares(got - truth), squares(honest - truth), squares(truth), float(truth.size)], np.float64)
        self._sums[name] = self._sums.get(name, 0) + sums

    def _finish(self, results: list[Array]) -> None:
        """Add up over the ranks; what is not a number anywhere is wrong everywhere."""
        sums = np.concatenate(list(self._sums.values()))
        agree.add_up(self.comm, sums)
        finite = all(bool(np.isfinite(x.astype(self.plain.sums, copy=False)).all()) for x in results)
        if not agree.everywhere(self.comm, finite):
            sums[0] = np.nan
        self._sums = dict(zip(self._sums, sums.reshape(-1, 4), strict=True))

    def _spread(self) -> dict[str, float]:
        """By result: the root-mean-square error of an element in the plain computation, after `_finish`."""
        return {name: math.sqrt(x[1] / max(1.0, x[3])) for name, x in self._sums.items()}

    def _errors(self) -> dict[str, Error]:
        """By result."""
        errors = {}
        for name, (wrong, honest, size, samples) in self._sums.items():
            whole = math.sqrt(size) or 1.0
            plainly = math.sqrt(honest) / whole
            errors[name] = Error(math.sqrt(wrong) / whole, plainly, self._allowed(name, plainly, samples))
        return errors

    @property
    def wrong(self) -> str:
        """Why the results are wrong; empty where they are right."""
        for name, error in self._errors().items():
            if not error.ours <= error.allowed:
                return f"error of {name}, {error.ours:.1e}, exceeds {error.allowed:.1e}, {self.reason}"
        if not self._residual <= 1.0:
            return f"sums that gradients conserve differ {self._residual:.3g} times as much as rounding explains"
        return ""

    def found(self) -> Row:
        """Errors by result; on top those of the result that is worst beside a plain computation."""
        errors = self._errors()
        judged = [error for name, error in errors.items() if name not in self.aside]
        worst = max(judged, key=lambda e: math.inf if math.isnan(e.ours) else e.ours / (e.plain or 1.0))
        return {
            "error": worst.ours,
            "honest_error": worst.plain,
            "errors": {name: error.ours for name, error in errors.items()},
            "honest_errors": {name: error.plain for name, error in errors.items()},
            "conservation": self._residual,
        }
