"""Tests of the GPU's kernels: on a GPU, under bench/emulated_gpu.sh on the emulated one, elsewhere skipped.

Arrays are made with the fixture `xp`: CuPy, or NumPy for the emulated GPU, which works on the memory of this process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


def _emulated() -> bool:
    try:
        from fivedp import _cuda
    except ImportError:
        return False
    return hasattr(_cuda, "set_seed")


def _why_not() -> str:
    """Why there is no GPU; empty where there is one."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no GPU: {error}"
    try:
        from fivedp import _cuda  # noqa: F401
    except ImportError as error:
        return f"fivedp._cuda was not built: {error}"
    return "" if count else "no GPU"


EMULATED = _emulated()
REASON = "" if EMULATED else _why_not()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if REASON:
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"{REASON}; bench/emulated_gpu.sh runs these without"))


@pytest.fixture
def xp(seed: int) -> Any:
    """The array library of the GPU."""
    if EMULATED:
        from fivedp import _cuda

        _cuda.set_seed(seed)  # another order of the warps in every run
        return np
    import cupy

    return cupy


@pytest.fixture
def host(xp: Any) -> Any:
    """A function from a device array to NumPy's."""
    return (lambda array: np.array(array)) if xp is np else xp.asnumpy


@pytest.fixture
def product_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernel of products that FIVEDP_PRODUCT_KERNEL asks for."""
    from product_operands import select

    from fivedp.kernels.cuda._extension import asked_kernel

    select(monkeypatch, request.param)
    yield request.param
    asked_kernel.cache_clear()
