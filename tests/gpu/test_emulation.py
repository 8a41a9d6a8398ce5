"""The emulated GPU notices what it is there for: each fault shows, and without it the result is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

REVERSE, HALF_BARRIER, COPY, UNWRITTEN = range(4)
N = 256


@pytest.fixture
def fault(xp: Any) -> Any:
    """Runs one of the kernels of csrc/cuda/emulation/faults.cpp."""
    from fivedp import _cuda

    if not hasattr(_cuda, "run_fault"):
        pytest.skip("this is a real GPU")

    def run(which: int, x: Any, faulty: bool) -> Any:
        y = np.full_like(x, np.nan)
        _cuda.run_fault(which, x.ctypes.data, y.ctypes.data, x.size, faulty)
        return y

    return run


@pytest.mark.parametrize("which", [REVERSE, HALF_BARRIER, COPY, UNWRITTEN])
def test_kernels_without_a_fault_are_right(fault: Any, seed: int, which: int) -> None:
    x = np.random.default_rng(seed).standard_normal(N).astype(np.float32)
    np.testing.assert_array_equal(fault(which, x, False), x[::-1] if which == REVERSE else x)


def test_a_missing_barrier_gives_wrong_values(fault: Any, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(N).astype(np.float32)
    assert not np.array_equal(fault(REVERSE, x, True), x[::-1])


def test_a_barrier_that_some_threads_never_reach_is_an_error(fault: Any) -> None:
    with pytest.raises(RuntimeError, match=r"128 threads of a block are at a barrier, 0 .* 128 have left"):
        fault(HALF_BARRIER, np.ones(N, np.float32), True)


def test_a_copy_that_is_not_waited_for_has_not_happened(fault: Any) -> None:
    assert np.isnan(fault(COPY, np.ones(N, np.float32), True)).all()


def test_shared_memory_that_nobody_wrote_is_nan(fault: Any) -> None:
    assert np.isnan(fault(UNWRITTEN, np.ones(N, np.float32), True)).all()
