"""Memory that is used again: what a pool keeps, and what comes back from arrays that nobody has any more."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from fivedp.comm.shared_window import SharedWindow, wanted
from fivedp.comm.transport import mail
from fivedp.comm.transport.mail import BufferPool

FLOATS = np.dtype(np.float32)


def address(array: np.ndarray) -> int:
    place: int = array.__array_interface__["data"][0]
    return place


def test_lent_memory_comes_back_when_the_last_view_of_it_is_gone() -> None:
    pool = BufferPool()
    array = pool.lend((1000, 500), FLOATS)
    array[...] = 7
    place, view = address(array), array[3:5, ::2]
    del array
    other = pool.lend((1000, 500), FLOATS)
    other[...] = 8
    assert address(other) != place
    assert (view == 7).all()
    del view
    assert address(pool.lend((1000, 500), FLOATS)) == place


def test_memory_that_comes_back_in_a_cycle_is_found_by_the_next_call() -> None:
    pool = BufferPool()
    array = pool.lend((1 << 20,), FLOATS)
    place, cycle = address(array), [array]
    cycle.append(cycle)  # type: ignore[arg-type]
    del array, cycle
    gc.collect()
    assert address(pool.take((1 << 20,), FLOATS)[0]) == place


def test_few_bytes_are_the_allocators() -> None:
    assert BufferPool().lend((5, 3), FLOATS).flags.owndata


@pytest.mark.parametrize("rows", [1, 900, 5000, 100_000])
def test_a_buffer_fits_calls_of_about_its_size(rows: int, seed: int) -> None:
    pool, draw = BufferPool(), np.random.default_rng(seed)
    places = set()
    for more in draw.integers(0, rows // 16 + 1, 20):
        array, buffer = pool.take((rows + int(more), 16), FLOATS)
        assert array.nbytes <= buffer.size <= array.nbytes * 7 // 6 + 4096
        assert buffer.size <= array.nbytes * 33 // 32 + 4096 or address(array) in places
        places.add(address(array))
        pool.give(buffer)
    assert len(places) <= 5  # sizes that differ by a sixteenth, cut into at least sixty-fourths


def test_what_was_not_used_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "_POOL_BYTES", 10 << 20)
    pool = BufferPool()
    places = {}
    for megabytes in (4, 3, 2):
        array, buffer = pool.take((megabytes << 20,), np.dtype(np.uint8))
        places[megabytes] = address(array)
        pool.give(buffer)
    array, buffer = pool.take((4 << 20,), np.dtype(np.uint8))
    assert address(array) == places[4]
    pool.give(buffer)
    pool.give(pool.take((5 << 20,), np.dtype(np.uint8))[1])  # 14 MB: those of 3 and of 2 go
    kept = sorted(size >> 20 for size, buffers in pool._free.items() for _ in buffers)
    assert kept == [4, 5]
    pool.give(pool.take((11 << 20,), np.dtype(np.uint8))[1])
    assert pool._kept <= 10 << 20


@pytest.mark.skipif(not wanted(), reason="no shared memory")
def test_a_window_takes_back_what_it_lent_when_it_is_asked_and_at_no_other_time() -> None:
    window = SharedWindow(0)
    window.unlink()
    extent = window.take_large(1 << 20)
    assert extent is not None
    array = window.lend(extent, (1 << 18,), FLOATS)
    array[...] = 3
    view = array[5:]
    del array
    assert window.take_large(4096) != extent
    assert (view == 3).all()
    free = list(window._free_large)
    del view
    assert window._free_large == free  # a collection may come in the middle of a search for room
    assert window.take_large(1 << 20) == extent
