"""All processes of one launch, found and ended.

A launcher puts its ranks into process groups of their own, and a rank whose launcher was killed belongs to nobody. What
every process of a launch does keep is its environment: each launch gets a mark there, and `/proc` is searched for it.
Where there is no `/proc` the process group of the launcher has to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

MARK = "FIVEDP_LAUNCH_MARK"
_PROC = Path("/proc")


def new_mark() -> str:
    """A value for the variable `MARK` that no other launch has."""
    return uuid.uuid4().hex


def marked(mark: str) -> list[int]:
    """Process ids of this user whose environment carries `mark`, zombies excepted."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for folder in _PROC.iterdir() if _PROC.is_dir() else ():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # The list of variables ends with a zero byte, as each variable does; a zombie's is empty.
            if needle in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether process `pid` has a handler of its own for signal `number`."""
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def send(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to those of `pids` that still exist."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


class Survivor:
    """Tells of a launcher that waits for nobody: its ranks have come and gone, and it stays.

    Open MPI's does so now and then after a job that was aborted, in a deadlock of its own. A launcher that waits for
    another node has a process there by way of one here (ssh, srun), which carries the mark as well.

    Parameters
    ----------
    launcher : int
        Its process id.
    mark : str
    patience_s : float
        Seconds it gets, after the last other process, to end by itself: it may have output to hand on to a slow reader.
    """

    LOOK_EVERY_S = 1.0

    def __init__(self, launcher: int, mark: str, patience_s: float = 30.0) -> None:
        self._known, self._mark, self.patience_s = {launcher, os.getpid()}, mark, patience_s
        self._began, self._alone_since, self._look = False, 0.0, 0.0

    def found(self) -> bool:
        """Whether it is one by now; to be asked again and again."""
        now = time.monotonic()
        if now >= self._look:
            self._look = now + self.LOOK_EVERY_S
            if any(pid not in self._known for pid in marked(self._mark)):
                self._began, self._alone_since = True, 0.0
            elif self._began:
                self._alone_since = self._alone_since or now
        return self._alone_since > 0 and now - self._alone_since > self.patience_s


def end_launch(launcher: subprocess.Popen[bytes], mark: str, grace: float = 2.0) -> None:
    """End a launch: ask its launcher, wait `grace` seconds, then kill whatever carries the mark.

    Returns when no process of the launch is left.
    """
    seen = {pid for pid in marked(mark) if pid != os.getpid()}
    with _adopting_orphans():
        if launcher.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                launcher.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(grace)
        # A rank may be starting a child just now: look again until nothing is found.
        for _ in range(50):
            left = [pid for pid in marked(mark) if pid != os.getpid()]
            seen.update(left)
            if launcher.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(launcher.pid, signal.SIGKILL)
            send(left, signal.SIGKILL)
            if launcher.poll() is not None and not left:
                break
            time.sleep(0.02)
        launcher.wait()
        for pid in seen - {launcher.pid}:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Be the parent of descendants whose own has ended: process 1 of many containers never collects them."""
    set_child_subreaper = 36
    library = ctypes.CDLL(None)
    supported = sys.platform == "linux" and library.prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        if supported:
            library.prctl(set_child_subreaper, 0, 0, 0, 0)
