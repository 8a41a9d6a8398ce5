"""The work of a contest of products: C = A B, checked by Freivalds in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from contest import SIGMAS, WrongResult
from programs import Running
from worker import operands, signs


@dataclass(frozen=True)
class Product:
    """C (m, n) = A (m, k) B (k, n)."""

    m: int
    n: int
    k: int
    dtype: str

    @property
    def flops(self) -> float:
        """2 m n k."""
        return 2 * self.m * self.n * self.k

    @property
    def shape(self) -> str:
        """`512x2048x1024`: m, n, k."""
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def sizes(self) -> dict[str, Any]:
        """m, n and k by name."""
        return {"m": self.m, "n": self.n, "k": self.k}

    def verify(self, program: Running, seed: int) -> dict[str, Any]:
        """Hold the program's C times a vector of signs against A (B x) in float64; nothing to record.

        Raises
        ------
        WrongResult
            Where they differ by more than rounding explains.
        """
        want, allowed = _expected(self, seed)
        got = np.zeros(self.m)
        for part in program.order(do="check", seed=seed, n=self.n):
            got[part["rows"]] += part["values"]
        worst = float(np.abs(got - want).max())
        if not worst <= allowed:
            raise WrongResult(f"Freivalds residual {worst:.3g}, rounding explains {allowed:.3g}")
        return {}


@lru_cache(maxsize=1)
def _expected(work: Product, seed: int) -> tuple[Any, float]:
    """A (B x) and the residual that rounding explains, from the error of a sample multiplied in the same type."""
    dtype = operands.dtype_of(work.dtype)
    x = signs(seed, work.n)
    m, n, k = work.m, work.n, work.k
    y = np.concatenate([operands.block(seed + 1, range(i, min(k, i + 512)), range(n), dtype).astype(np.float64) @ x
                        for i in range(0, k, 512)])  # fmt: skip
    z = np.concatenate([operands.block(seed, range(i, min(m, i + 512)), range(k), dtype).astype(np.float64) @ y
                        for i in range(0, m, 512)])  # fmt: skip
    a = operands.block(seed, range(min(m, 48)), range(k), dtype)
    b = operands.block(seed + 1, range(k), range(min(n, 192)), dtype)
    wide = operands.accumulator_of(dtype)
    error = (a.astype(wide) @ b.astype(wide)).astype(dtype).astype(np.float64) - a.astype(np.float64) @ b.astype(
        np.float64
    )
    own = np.finfo(np.float64).eps * np.sqrt(n * k) * np.sqrt(k)
    return z, float(SIGMAS * (np.sqrt(np.square(error).mean() * n) + own))
