"""ScaLAPACK's p?gemm through ctypes: Debian's libscalapack-openmpi with the OpenBLAS beside it.

C = A B, column-major and block-cyclic, as ScaLAPACK likes it. Every grid of the ranks (1 x p, p x 1 and the near-square
one) is tried with blocks of 64, 128 and 256 in `prepare`, and the fastest is kept.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from ctypes import byref, c_double, c_float, c_int, c_void_p
from typing import Any

import numpy as np
from worker import ProductPeer, operands, serve

BLOCKS = (64, 128, 256)
ROUTINES = {"float32": ("psgemm_", c_float), "float64": ("pdgemm_", c_double)}


class Scalapack(ProductPeer):
    def __init__(self) -> None:
        ctypes.CDLL("libmpi.so.40", mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(os.environ.get("FIVEDP_SCALAPACK", "libscalapack-openmpi.so.2.2"))
        rank, size = c_int(), c_int()
        self.library.Cblacs_pinfo(byref(rank), byref(size))
        self.rank, self.size = rank.value, size.value
        self.grids: dict[tuple[int, int], int] = {}
        self.tuned: dict[tuple[Any, ...], tuple[tuple[int, int], int]] = {}
        everyone = self._grid(1, self.size)
        self.barrier = lambda: self.library.Cblacs_barrier(everyone, b"All")  # type: ignore[method-assign]

    def _grid(self, rows: int, columns: int) -> int:
        """The BLACS context of a rows x columns grid."""
        if (rows, columns) not in self.grids:
            context = c_int()
            self.library.Cblacs_get(-1, 0, byref(context))
            self.library.Cblacs_gridinit(byref(context), b"Row-major", rows, columns)
            self.grids[rows, columns] = context.value
        return self.grids[rows, columns]

    def _indices(self, size: int, parts: int, part: int) -> Any:
        """Global indices of a block-cyclic dimension on process `part`."""
        everything = np.arange(size)
        return everything[(everything // self.block) % parts == part]

    def _local(self, seed: int, rows: int, columns: int, dtype: str) -> tuple[Any, Any]:
        """This rank's block-cyclic share in column order and its descriptor; zeros where seed is negative."""
        i, j = self._indices(rows, self.rows, self.row), self._indices(columns, self.columns, self.column)
        if seed < 0:
            local = np.zeros((len(i), len(j)), dtype, order="F")
        else:
            local = np.asfortranarray(operands.block(seed, i, j, operands.dtype_of(dtype)))
        descriptor = (c_int * 9)()
        info, zero, lead = c_int(), c_int(0), c_int(max(1, len(i)))
        sizes = [c_int(x) for x in (rows, columns, self.block, self.block)]
        self.library.descinit_(descriptor, *map(byref, sizes), byref(zero), byref(zero), byref(c_int(self.context)),
                               byref(lead), byref(info))  # fmt: skip
        if info.value:
            raise RuntimeError(f"descinit returned {info.value}")
        return local, descriptor

    def _set_up(self, case: dict[str, Any], grid: tuple[int, int], block: int) -> None:
        self.rows, self.columns = grid
        self.block, self.context = block, self._grid(*grid)
        self.row, self.column = divmod(self.rank, self.columns)
        m, n, k = (case[x] for x in "mnk")
        self.shape = (m, n)
        self.a, descriptor_a = self._local(case["seed"], m, k, case["dtype"])
        self.b, descriptor_b = self._local(case["seed"] + 1, k, n, case["dtype"])
        self.c, descriptor_c = self._local(-1, m, n, case["dtype"])
        name, scalar = ROUTINES[case["dtype"]]
        sizes = [byref(c_int(x)) for x in (m, n, k)]
        one, letter = byref(c_int(1)), ctypes.c_char_p(b"N")
        alpha, beta = byref(scalar(1)), byref(scalar(0))
        arrays = [self.a.ctypes.data_as(c_void_p), self.b.ctypes.data_as(c_void_p), self.c.ctypes.data_as(c_void_p)]
        routine = getattr(self.library, name)
        self.call = lambda: routine(letter, letter, *sizes, alpha, arrays[0], one, one, descriptor_a,
                                    arrays[1], one, one, descriptor_b, beta, arrays[2],
                                    one, one, descriptor_c)  # fmt: skip

    def prepare(self, case: dict[str, Any]) -> str | None:
        if case["dtype"] not in ROUTINES:
            return f"ScaLAPACK has no {case['dtype']}"
        small = next(f for f in range(math.isqrt(self.size), 0, -1) if self.size % f == 0)
        grids = sorted({(1, self.size), (self.size, 1), (small, self.size // small)})
        known = (case["m"], case["n"], case["k"], case["dtype"])
        if known in self.tuned:
            self.chosen = self.tuned[known]
            self._set_up(case, *self.chosen)
            return None
        best, self.chosen = math.inf, (grids[0], BLOCKS[0])
        for grid in grids:
            for block in BLOCKS:
                self._set_up(case, grid, block)
                took = math.inf
                for _ in range(2):
                    self.barrier()
                    start = time.perf_counter()
                    self.call()
                    self.barrier()
                    took = min(took, time.perf_counter() - start)
                if self._everyone(took) < best:
                    best, self.chosen = self._everyone(took), (grid, block)
        self.tuned[known] = self.chosen
        self._set_up(case, *self.chosen)
        return None

    def _everyone(self, seconds: float) -> float:
        """The largest time over the ranks, so that all choose alike."""
        value = c_double(seconds)
        self.library.Cdgamx2d(self._grid(1, self.size), b"All", b" ", 1, 1, byref(value), 1, None, None, -1, -1, -1)
        return value.value

    def run(self) -> None:
        self.call()

    def result(self) -> Any:
        return (self.c, self._indices(self.shape[0], self.rows, self.row),
                self._indices(self.shape[1], self.columns, self.column))  # fmt: skip

    def facts(self) -> dict[str, Any]:
        (rows, columns), block = self.chosen
        return {**super().facts(), "grid": f"{rows}x{columns}", "block": block}


if __name__ == "__main__":
    peer = Scalapack()
    serve(peer)
    peer.library.Cblacs_exit(0)
