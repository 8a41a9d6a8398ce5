"""The benchmark's check accepts honest rounding and rejects a wrong element, wherever it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fivedp.bench import check, environment, operands
from fivedp.bench.pieces import Matrix
from fivedp.kernels.gemm import gemm

# One rank needs no MPI, and pytest's own process must not load it: Open MPI starts no mpirun from inside itself.
ALONE = SimpleNamespace(rank=0, size=1)
DTYPES = ["float32", "float64", "bfloat16", "complex64"]


def drawn() -> int:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return seed


def product(seed: int, m: int, n: int, k: int, dtype: str) -> tuple[Matrix, Matrix, Matrix]:
    """A, B and an honest C on one rank."""
    kind = operands.dtype_of(dtype)
    a = operands.block(seed, range(m), range(k), kind)
    b = operands.block(seed + 1, range(k), range(n), kind)
    # Not NumPy's: some BLAS add a product of this size in twice as coarse an order as the few rows that are made again.
    c = np.empty((m, n), kind)
    gemm(a, b, c)
    i, j, inner = np.arange(m), np.arange(n), np.arange(k)
    return Matrix(a, i, inner, True, seed), Matrix(b, inner, j, True, seed + 1), Matrix(c, i, j, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(200, 150, 130), (1, 300, 64), (5, 1, 1), (1, 1, 1), (64, 8, 2000)])
def test_an_honest_product_is_accepted(shape: tuple[int, int, int], dtype: str) -> None:
    m, n, k = shape
    a, b, c = product(drawn(), m, n, k, dtype)
    verdict = check.product(ALONE, a, b, c, 3, k)
    assert verdict.wrong == ""


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_is_found_wherever_it_stands(dtype: str) -> None:
    seed = drawn()
    a, b, c = product(seed, 300, 400, 64, dtype)
    draw = np.random.default_rng(seed)
    i, j = int(draw.integers(300)), int(draw.integers(400))
    print(f"element {i}, {j}")
    c.data[i, j] += np.asarray(20, c.data.dtype)  # about four times the typical size of an element
    assert check.product(ALONE, a, b, c, 3, 64).wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_missing_partial_sum_is_found(dtype: str) -> None:
    a, b, c = product(drawn(), 100, 90, 64, dtype)
    wide = operands.accumulator_of(c.data.dtype)
    c.data[:] = (a.data[:, :56].astype(wide) @ b.data[:56].astype(wide)).astype(c.data.dtype)
    assert check.product(ALONE, a, b, c, 3, 64).wrong


def test_a_result_that_is_not_a_number_is_wrong() -> None:
    a, b, c = product(drawn(), 60, 60, 8, "float32")
    c.data[17, 23] = np.nan
    assert check.product(ALONE, a, b, c, 3, 8).wrong


def test_less_precise_sums_are_wrong_although_every_element_is_near() -> None:
    """float32 results rounded to bfloat16 on the way pass no promise of twice the honest error."""
    a, b, c = product(drawn(), 100, 100, 64, "float32")
    c.data[:] = c.data.astype(operands.dtype_of("bfloat16")).astype(np.float32)
    assert "exceeds" in check.product(ALONE, a, b, c, 3, 64).wrong


def in_order(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A product whose every element is summed from the first k to the last, whatever the other elements are."""
    c = np.zeros((x.shape[0], y.shape[1]), x.dtype)
    for column, row in zip(x.T, y, strict=True):
        c += column[:, None] * row[None, :]
    return c


def test_other_bits_are_seen_and_equal_bits_are() -> None:
    a, b, c = product(drawn(), 100, 110, 64, "float32")
    c.data[:] = in_order(a.data, b.data)
    assert check.product(ALONE, a, b, c, 3, 64, in_order).same_bits is True
    other = check.product(ALONE, a, b, c, 3, 64, lambda x, y: in_order(x[:, ::-1], y[::-1]))
    assert other.wrong == ""
    assert other.same_bits is False


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_block_of_an_operand_can_be_made_again(dtype: str) -> None:
    seed = drawn()
    kind = operands.dtype_of(dtype)
    whole = operands.block(seed, range(50), range(70), kind)
    rows, columns = np.array([3, 49, 7]), np.arange(20, 60, 3)
    assert (operands.block(seed, rows, columns, kind) == whole[np.ix_(rows, columns)]).all()
    assert len(np.unique(whole)) > 0.02 * whole.size  # bfloat16 has few values; none of the types repeats one
    assert abs(complex(whole.astype(complex).mean())) < 0.1
    assert 0.9 < float(np.abs(whole.astype(complex).real).max()) <= 1 + 2**-24


def test_float64_sums_round_so_that_their_error_says_something() -> None:
    a, b, c = product(drawn(), 50, 60, 500, "float64")
    verdict = check.product(ALONE, a, b, c, 3, 500)
    assert 1e-17 < verdict.error < 1e-14


def test_different_seeds_make_different_operands() -> None:
    seed = drawn()
    one, two = (operands.block(s, range(40), range(40), np.dtype("float32")) for s in (seed, seed + 1))
    assert abs(float((one * two).mean())) < 0.05


def test_misleading_variables_are_found_and_removed() -> None:
    environ = {
        "OPENBLAS_CORETYPE": "Haswell",
        "NVPL_BLAS_DEBUG_CPU_TYPE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": "x",
    }
    assert environment.clean(environ) == ["NVPL_BLAS_DEBUG_CPU_TYPE", "OPENBLAS_CORETYPE"]
    assert environ == {"OPENBLAS_NUM_THREADS": "1", "PATH": "x"}


def test_a_process_that_loaded_numpy_under_them_starts_again() -> None:
    """The restarted process has NumPy with the BLAS kernels of the machine, and knows what was removed."""
    program = (
        "import sys, numpy; from fivedp.bench.environment import settle, removed_variables; settle(); "
        "import os; print(removed_variables(), 'OPENBLAS_CORETYPE' in os.environ, sys.argv[1:])"
    )
    env = {**os.environ, "OPENBLAS_CORETYPE": "Prescott"}
    env.pop("FIVEDP_BENCH_REMOVED", None)
    done = subprocess.run(
        [sys.executable, "-c", program, "kept"], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    assert "OPENBLAS_CORETYPE" in done.stdout
    assert done.stdout.rstrip().endswith("False ['kept']")
