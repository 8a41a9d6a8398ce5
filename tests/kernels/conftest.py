"""Fresh random numbers for every test; the seed is printed with a failure."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fivedp.kernels import gemm as kernel

sys.path.insert(0, str(Path(__file__).resolve().parent))  # kernel_operands


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(64)
    print(f"seed: {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = kernel.threads()
    yield
    kernel.set_threads(before)


@pytest.fixture
def backend_from(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Set FIVEDP_GEMM for one test; it is read once, so the answer is forgotten before and after."""

    def choose(value: str) -> None:
        monkeypatch.setenv("FIVEDP_GEMM", value)
        kernel.gemm_backend.cache_clear()

    yield choose
    monkeypatch.undo()
    kernel.gemm_backend.cache_clear()
