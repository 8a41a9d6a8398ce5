"""The extension with the CUDA kernels, and what its functions take."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

from fivedp.kernels._select import library_of, raw, setting

__all__ = ["asked_kernel", "empty_like", "extension", "library_of", "optional_raw", "raw", "serves", "stream_of"]

# Of the compute capabilities that the kernels are compiled for, in tenths.
OLDEST = 80


@functools.cache
def extension() -> Any:
    """`fivedp._cuda`.

    Raises
    ------
    ImportError
        Where it was not built, or no driver is there; says what to do.
    """
    try:
        return importlib.import_module("fivedp._cuda")
    except ImportError as missing:
        raise ImportError(
            f"fivedp._cuda can't be loaded ({missing}): install fivedp where nvcc is on PATH, "
            "or with --config-settings=cmake.define.FIVEDP_CUDA=ON to see why it is not built"
        ) from missing


@functools.cache
def asked_kernel(what: str) -> str:
    """Which kernels are asked for: FIVEDP_<what>_KERNEL, sm80 (the default) or sm90, read once.

    Raises
    ------
    ValueError
        Where it is neither.
    """
    return setting(f"FIVEDP_{what}_KERNEL", "sm80", "sm90")


def serves(array: Any) -> bool:
    """Whether the kernels are here and run on the device of `array`, whose compute capability is at least 8.0 then."""
    return _is_built() and (isinstance(array, np.ndarray) or int(array.device.compute_capability) >= OLDEST)


@functools.cache
def _is_built() -> bool:
    try:
        extension()
    except ImportError:
        return False
    return True


def stream_of(array: Any) -> int:
    """The current stream of the array's device; 0 for a NumPy array, which only the emulated GPU takes."""
    if isinstance(array, np.ndarray):
        return 0
    import cupy

    return int(cupy.cuda.get_current_stream(array.device.id).ptr)


def optional_raw(array: Any, who: str) -> Any:
    """`raw` of an argument that may be None."""
    return None if array is None else raw(array, who)


def empty_like(array: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array beside `array`, in the memory of its device."""
    return library_of(array).empty(shape, dtype)
