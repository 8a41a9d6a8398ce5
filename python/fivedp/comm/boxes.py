"""A box copied from one host array into another, as NumPy would, at the rate of memory.

A box of a large array is many short rows far apart, and `target[...] = source` waits for each of them. Here rows are
fetched ahead and, in a target larger than the caches, stored past them (`csrc/cpu/copy.hpp`).
"""

from __future__ import annotations

from typing import Any

from fivedp import _cpu

# Shorter rows are left to NumPy, and so are boxes that are copied in less time than a call of our own takes.
_ROW_BYTES, _BOX_BYTES = 256, 64 << 10


def copy_box(target: Any, source: Any, *, for_later: bool = False) -> None:
    """target[...] = source, for NumPy arrays of one shape and type that share no memory.

    Parameters
    ----------
    target, source : array
        Any strides.
    for_later : bool
        Nobody reads `target` soon: where it is large it needs no place in the caches.
    """
    size = target.itemsize
    rows_of_bytes = target.ndim and target.strides[-1] == source.strides[-1] == size
    if target.nbytes >= _BOX_BYTES and rows_of_bytes and target.shape[-1] * size >= _ROW_BYTES:
        _cpu.copy_box(target, source, for_later)
    else:
        target[...] = source
