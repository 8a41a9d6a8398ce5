"""A box copied is NumPy's assignment, byte for byte, and touches nothing beside its target."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from kernel_operands import BF16, STRIDES, bits, with_strides

from fivedp import _cpu
from fivedp.comm.boxes import copy_box
from fivedp.kernels import gemm as kernel

Array = Any
TYPES = [np.dtype(np.float32), np.dtype(np.float64), BF16, np.dtype(np.int32), np.dtype(np.complex128)]


def random_bits(rng: np.random.Generator, shape: Sequence[int], dtype: Any) -> Array:
    """Any bit pattern of the type: NaN with its payload, too."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(bytearray(rng.bytes(count)), dtype).reshape(shape)


def box_of(rng: np.random.Generator, shape: Sequence[int], dtype: Any) -> tuple[Array, tuple[slice, ...]]:
    """A larger array and where in it, at any offset, a box of this shape lies."""
    around = [(int(rng.integers(0, 5)), int(rng.integers(0, 5))) for _ in shape]
    whole = random_bits(rng, [n + low + high for n, (low, high) in zip(shape, around, strict=True)], dtype)
    return whole, tuple(slice(low, low + n) for n, (low, _) in zip(shape, around, strict=True))


def assert_copied(rng: np.random.Generator, shape: Sequence[int], dtype: Any, for_later: bool) -> None:
    whole, place = box_of(rng, shape, dtype)
    source_whole, source_place = box_of(rng, shape, dtype)
    wanted = whole.copy()
    wanted[place] = source_whole[source_place]
    for copy in (_cpu.copy_box, lambda to, source, later: copy_box(to, source, for_later=later)):
        target = whole.copy()
        copy(target[(*place, ...)], source_whole[(*source_place, ...)], for_later)
        assert bits(target) == bits(wanted)


@pytest.mark.parametrize("for_later", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_any_box_of_any_array(dtype: Any, for_later: bool, rng: np.random.Generator) -> None:
    for _ in range(40):
        dimensions = int(rng.integers(0, 5))
        most = {0: 1, 1: 40000, 2: 300, 3: 40, 4: 12}[dimensions]
        assert_copied(rng, rng.integers(0, most + 1, dimensions).tolist(), dtype, for_later)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("shape", [(530, 1027), (3, 300, 700), (1, 1100000), (2, 3, 129, 650)], ids=str)
def test_a_target_larger_than_the_caches(shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> None:
    """Rows that begin anywhere in a line, so lines that are only partly the target's."""
    part = np.prod(shape) * dtype.itemsize
    copies = 1 + int((8 << 20) // part)
    assert_copied(rng, (copies * shape[0], *shape[1:]), dtype, True)


@pytest.mark.parametrize("target_kind", STRIDES)
@pytest.mark.parametrize("source_kind", STRIDES)
def test_any_strides(target_kind: str, source_kind: str, rng: np.random.Generator) -> None:
    for shape in [(70, 260), (3, 64, 130), (1, 1)]:
        source = with_strides(rng, random_bits(rng, shape, np.float32), source_kind)
        target = with_strides(rng, random_bits(rng, shape, np.float32), target_kind)
        for copy in (_cpu.copy_box, lambda to, this, later: copy_box(to, this, for_later=later)):
            target[...] = 0
            copy(target, source, True)
            assert bits(target) == bits(source)


def test_what_does_not_fit_is_an_error_that_says_so(rng: np.random.Generator) -> None:
    box = np.zeros((4, 5), np.float32)
    locked = box.copy()
    locked.flags.writeable = False
    with pytest.raises(ValueError, match=r"dimension 1 is 5 in target and 6 in source"):
        _cpu.copy_box(box, np.zeros((4, 6), np.float32), False)
    with pytest.raises(ValueError, match=r"target has 2 dimensions and source 1"):
        _cpu.copy_box(box, np.zeros(4, np.float32), False)
    with pytest.raises(ValueError, match=r"target is float32 and source float64"):
        _cpu.copy_box(box, np.zeros((4, 5)), False)
    with pytest.raises(ValueError, match=r"target is read-only"):
        _cpu.copy_box(locked, box, False)


@pytest.mark.parametrize("isa", [isa for isa in kernel.supported_isas() if isa != kernel.isa()])
def test_all_of_this_holds_in_other_sets(isa: str) -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", "not other_sets", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "FIVEDP_ISA": isa}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
