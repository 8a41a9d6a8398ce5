"""Waits that end: every wait polls, and finds out why nothing comes.

A wait polls MPI (which also makes it progress), gives the core away, and after some milliseconds looks at three things:
notices on the control communicator, the processes of awaited ranks on this node, and the deadline
(`FIVEDP_TIMEOUT` seconds, 120 unless set). Notices are small messages of one size:

    LEFT      a rank is about to exit                 its peers raise PeerError
    FAILED    a rank raised in the middle of a call   its peers raise PeerError with its words
    WAITING   a rank waits for headers, on a channel  a peer that waits for it on another channel knows that both
    DISAGREE  ... have been called differently        raise LayoutError, and tell the ranks that wait for them

An uncaught exception prints the traceback with the rank's number and aborts the job. On a normal exit the ranks meet in
a barrier; a rank that the others don't join says LEFT and goes. After a call that ended halfway MPI gets 15 seconds to
end.
"""

from __future__ import annotations

import atexit
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn

import numpy as np
from mpi4py import MPI

from fivedp.errors import LayoutError, PeerError

_LEFT, _FAILED, _WAITING, _DISAGREE = 1, 2, 3, 4
_NOTICE = struct.Struct("<iiq")
_NOTICE_BYTES = 2048
_NOTICE_TAG = 7
# A wait shorter than this is ordinary imbalance between ranks, not worth a look at the notices.
_LOOK_AFTER_S = 0.02
_SUSPECT_AFTER_S = 1.0
_FAREWELL_S = 2.0
# What MPI gets to end after a broken call; of many ranks on few cores the ends of interpreter and MPI take a while.
_END_S = 15.0
# A launcher that is told to abort may drop what it has not yet forwarded: the traceback that says why.
_FORWARD_S = 0.3


def timeout_s() -> float:
    """The deadline of a wait in seconds, `FIVEDP_TIMEOUT` or 120."""
    text = os.environ.get("FIVEDP_TIMEOUT", "120")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"FIVEDP_TIMEOUT is {text!r}; expected a positive number of seconds")
    return seconds


class _Idle:
    """What to do between two polls: yield at first, then sleep, longer and longer.

    Where ranks outnumber the cores (`crowded`), a rank that polls for long takes the core from a rank that computes, so
    it sleeps sooner and longer; but what it waits for is often a rank that only needs the core once.
    """

    def __init__(self, crowded: bool = True, longest_s: float = 1e-3) -> None:
        self.yields = 100 if crowded else 400
        self.longest_s = longest_s
        self.pause_s = min(longest_s, 100e-6 if crowded else 20e-6)

    def rest(self) -> None:
        if self.yields:
            self.yields -= 1
            os.sched_yield()
        else:
            time.sleep(self.pause_s)
            self.pause_s = min(self.longest_s, 1.3 * self.pause_s)


def timed_wait(requests: list[MPI.Request], what: str) -> None:
    """Wait for requests that no notice can interrupt, such as those that make communicators, until the deadline."""
    idle, start = _Idle(), time.monotonic()
    while not MPI.Request.Testall(requests):
        idle.rest()
        if time.monotonic() - start > timeout_s():
            raise PeerError(
                f"some rank did not join within {timeout_s():g} s: {what} needs all ranks of the communicator"
            )


class Watchdog:
    """The waits of one grid of ranks, and its notices.

    Parameters
    ----------
    control : MPI.Intracomm
        A communicator that carries nothing but notices.
    pids : list of int
        Process numbers of the ranks on this node; 0 where the process can't be seen.
    crowded : bool
        Whether there are more ranks on this node than cores.
    """

    def __init__(self, control: MPI.Intracomm, pids: list[int], crowded: bool) -> None:
        self.control, self.pids, self._crowded = control, pids, crowded
        self.rank = control.Get_rank()
        self.broken: str | None = None
        self._channel, self._sequence, self._text = 0, 0, ""
        self._members: Sequence[int] = ()
        self._completed: dict[int, int] = {}
        self._left: set[int] = set()
        self._failed: dict[int, tuple[int, int, str]] = {}
        self._waiting: dict[int, tuple[int, int, str]] = {}
        self._outgoing: list[MPI.Request] = []

    # -- a call ----------------------------------------------------------------------------------------------------

    def enter(self, channel: int, members: Sequence[int], text: str) -> None:
        """Begin a collective call of `members` (grid ranks) on `channel`; `text` says what this rank called.

        Raises
        ------
        PeerError
            Where an earlier call on this grid ended with ranks out of step.
        """
        if self.broken is not None:
            raise PeerError(f"this communicator can't be used any more, an earlier call ended halfway: {self.broken}")
        self._channel, self._members, self._text = channel, members, text
        self._sequence = self._completed.get(channel, 0) + 1

    def agreed(self) -> None:
        """All members have entered the call."""
        self._completed[self._channel] = self._sequence

    def fail(self, error: BaseException) -> None:
        """This rank raised in the middle of the call: tell the members, and use this grid no more."""
        if self.broken is None:
            self.broken = f"rank {self.rank}: {type(error).__name__}: {error}"
            if not isinstance(error, (PeerError, LayoutError)):
                self._tell(self._members, _FAILED, self._channel, self._sequence, self.broken)

    # -- waits -----------------------------------------------------------------------------------------------------

    def wait(
        self,
        requests: Sequence[MPI.Request],
        peers: Sequence[int],
        what: str,
        *,
        header: bool = False,
        patience_s: float | None = None,
    ) -> None:
        """Wait for all requests.

        Parameters
        ----------
        requests : sequence of MPI.Request
        peers : sequence of int
            The grid rank at the other end of each request.
        what : str
            What is awaited, for the message of the error.
        header : bool
            True while the members have not yet agreed on the call.
        patience_s : float, optional
            A deadline of its own for this wait, in seconds.

        Raises
        ------
        PeerError
            Where a peer left, failed, died or stayed silent until the deadline.
        LayoutError
            Where a peer waits for this rank in another call.
        """

        def missing() -> list[int]:
            return sorted({peer for request, peer in zip(requests, peers, strict=True) if not request.Test()})

        self.wait_until(lambda: MPI.Request.Testall(requests), missing, what, header=header, patience_s=patience_s)

    def wait_until(
        self,
        done: Callable[[], bool],
        missing: Callable[[], list[int]],
        what: str,
        *,
        header: bool = False,
        patience_s: float | None = None,
        longest_rest_s: float = 1e-3,
    ) -> None:
        """As `wait`, for any condition; `missing` names the grid ranks that it still depends on.

        Where `done` itself moves what is awaited, `longest_rest_s` bounds the time between two of its calls.
        """
        if done():
            return
        idle, start = _Idle(self._crowded, longest_rest_s), time.monotonic()
        look, suspect = start + _LOOK_AFTER_S, start + _SUSPECT_AFTER_S
        patience = timeout_s() if patience_s is None else patience_s
        while not done():
            idle.rest()
            now = time.monotonic()
            if now < look:
                continue
            look = now + _LOOK_AFTER_S
            if now > suspect:
                suspect = now + _SUSPECT_AFTER_S
                self._check_processes(missing(), what)
                if header:
                    self._tell(missing(), _WAITING, self._channel, self._sequence, self._text)
            self._look(missing, what, header)
            if now - start > patience:
                ranks = ", ".join(map(str, missing()))
                self._give_up(f"rank {self.rank} {what} and waited {patience:g} s (FIVEDP_TIMEOUT) for rank {ranks}")

    def _check_processes(self, missing: list[int], what: str) -> None:
        for peer in missing:
            if self.pids[peer] and not _alive(self.pids[peer]):
                self._give_up(f"rank {peer} died while rank {self.rank}, which {what}, waited for it")

    def _look(self, missing: Callable[[], list[int]], what: str, header: bool) -> None:
        self._read_notices()
        if not (self._left or self._failed or self._waiting):
            return
        for peer in self._members:
            if peer in self._failed:
                self._give_up(f"the call ended on {self._failed[peer][2]}")
        for peer in missing():
            if peer in self._left:
                self._give_up(f"rank {peer} exited while rank {self.rank}, which {what}, waited for it")
            if header and peer in self._waiting:
                channel, sequence, text = self._waiting[peer]
                if channel != self._channel and self._completed.get(channel, 0) < sequence:
                    self._disagree(peer, channel, sequence, text)

    def _give_up(self, message: str) -> NoReturn:
        self.broken = message
        raise PeerError(message)

    def _disagree(self, peer: int, channel: int, sequence: int, text: str) -> NoReturn:
        first, second = sorted([(self.rank, self._text), (peer, text)])
        message = f"ranks call differently: rank {first[0]} {first[1]}, but rank {second[0]} {second[1]}"
        self._tell([peer], _DISAGREE, channel, sequence, message)
        self._raise_disagreement(message)

    def _raise_disagreement(self, message: str) -> NoReturn:
        self._tell(self._members, _DISAGREE, self._channel, self._sequence, message)
        self.broken = message
        raise LayoutError(message)

    # -- notices ---------------------------------------------------------------------------------------------------

    def _tell(self, ranks: Sequence[int], kind: int, channel: int, sequence: int, text: str) -> None:
        notice = np.zeros(_NOTICE_BYTES, dtype=np.uint8)
        body = _NOTICE.pack(kind, channel, sequence) + text.encode()[: _NOTICE_BYTES - _NOTICE.size - 4]
        notice[: len(body)] = np.frombuffer(body, dtype=np.uint8)
        self._outgoing = [request for request in self._outgoing if not request.Test()]
        self._outgoing += [self.control.Isend(notice, rank, _NOTICE_TAG) for rank in ranks if rank != self.rank]

    def _read_notices(self) -> None:
        status = MPI.Status()
        while self.control.Iprobe(MPI.ANY_SOURCE, _NOTICE_TAG, status):
            notice = np.empty(_NOTICE_BYTES, dtype=np.uint8)
            source = status.Get_source()
            self.control.Recv(notice, source, _NOTICE_TAG)
            body = notice.tobytes()
            kind, channel, sequence = _NOTICE.unpack_from(body)
            text = body[_NOTICE.size :].rstrip(b"\0").decode(errors="replace")
            if kind == _LEFT:
                self._left.add(source)
            elif kind == _FAILED:
                self._failed[source] = (channel, sequence, text)
            elif kind == _WAITING:
                self._waiting[source] = (channel, sequence, text)
            elif (channel, sequence) == (self._channel, self._sequence):
                self._raise_disagreement(text)

    def farewell(self) -> None:
        """Meet the other ranks before MPI ends; if they don't come, tell them that this rank leaves."""
        if self.broken is None:
            barrier, idle, start = self.control.Ibarrier(), _Idle(), time.monotonic()
            while not barrier.Test() and time.monotonic() - start < _FAREWELL_S:
                idle.rest()
            if barrier.Test():
                return
        everyone = range(self.control.Get_size())
        self._tell(everyone, _LEFT, 0, 0, "")
        start = time.monotonic()
        while not all(request.Test() for request in self._outgoing) and time.monotonic() - start < _FAREWELL_S:
            time.sleep(1e-3)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not yet collected by its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return True


_watched: list[Watchdog] = []


def watch_process(watchdog: Watchdog) -> None:
    """From now on, an exit of this process says goodbye on this grid, and an uncaught exception ends the job."""
    if not _watched:
        atexit.register(_say_farewell)
        previous = sys.excepthook

        def abort(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
            if MPI.COMM_WORLD.Get_size() == 1 or MPI.Is_finalized():
                previous(kind, value, trace)
                return
            rank = MPI.COMM_WORLD.Get_rank()
            text = "".join(traceback.format_exception(kind, value, trace))
            sys.stdout.flush()
            sys.stderr.write(f"fivedp: rank {rank} raised, the job ends\n{text}")
            sys.stderr.flush()
            time.sleep(_FORWARD_S)
            MPI.COMM_WORLD.Abort(1)

        sys.excepthook = abort
    _watched.append(watchdog)


def _say_farewell() -> None:
    if not MPI.Is_finalized():
        for watchdog in _watched:
            watchdog.farewell()
        if any(watchdog.broken is not None for watchdog in _watched):
            # A call ended halfway; MPI may wait for ever for the rest of its messages. MPI ends after the interpreter,
            # with its threads and handlers; an alarm of the kernel outlives it. It is counted from here: the farewells
            # end by themselves, and of many grids on busy cores they take as long.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, _END_S)
