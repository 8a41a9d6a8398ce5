"""What a call sent, and what memory it needed besides its operands.

Bytes are counted by the communication layer. Memory is the peak of the resident set during the first call above what
was resident before it; inputs are resident by then, and the buffers of earlier calls have been dropped. The kernels'
own scratch is kept by its threads and counts where it is first used.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path
from typing import Any


def bytes_sent(mesh: Any) -> int:
    """Payload bytes that this rank has sent over `mesh` so far."""
    from fivedp.comm.grid import grid_of

    return int(grid_of(mesh).traffic.bytes_sent)


class Memory:
    """The peak of this process's memory between `start` and `peak`; Linux only, None elsewhere."""

    def start(self) -> None:
        """Set the peak back to what is resident now."""
        self._known = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._known = True
        self._before = _status("VmRSS")

    def peak(self) -> int | None:
        """Bytes above those at `start`."""
        after = _status("VmHWM")
        if not self._known or after is None or self._before is None:
            return None
        return max(0, after - self._before)


def forget_buffers(mesh: Any) -> None:
    """Drop the buffers that earlier calls left behind, so that the next call's memory is its own."""
    from fivedp.comm.grid import grid_of

    vars(grid_of(mesh)).pop("buffer_pool", None)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory resident, and would hand it out again unseen


def _status(field: str) -> int | None:
    """A line of /proc/self/status in bytes."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M):
            return 1024 * int(found[1])
    return None


def available() -> int | None:
    """Bytes of memory this node can still give."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M):
            return 1024 * int(found[1])
    return None
