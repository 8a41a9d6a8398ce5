"""The extension with the CUDA kernels, and what its functions take."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

from fivedp.kernels._select import raw

__all__ = ["array_library", "extension", "host_copy", "raw", "stream_of"]


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


def stream_of(array: Any) -> int:
    """The current stream of the array's device; 0 for a NumPy array, which only the emulated GPU takes."""
    if isinstance(array, np.ndarray):
        return 0
    import cupy

    return int(cupy.cuda.get_current_stream(array.device.id).ptr)


def array_library(array: Any) -> Any:
    """The library that makes arrays where `array` is: CuPy, or NumPy for the emulated GPU."""
    if isinstance(array, np.ndarray):
        return np
    import cupy

    return cupy


def host_copy(array: Any) -> Any:
    """A NumPy array with the values of a device array, once the work before it on the current stream is done."""
    return array.copy() if isinstance(array, np.ndarray) else array.get()
