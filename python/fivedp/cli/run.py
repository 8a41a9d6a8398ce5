"""`fivedp run`: become the right mpirun, or watch over it.

Without a time limit this process turns into the launcher (exec): status, signals and the terminal are its own, with
nothing in between. With a limit it stays as the parent, passes signals on, and ends the whole launch when time is up.
So it does with a launcher that may survive its ranks, where nobody sits at a terminal to end it.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

from fivedp.cli.launcher import Launch
from fivedp.cli.processes import MARK, Survivor, end_launch, new_mark

TIMED_OUT = 124  # as timeout(1)
SURVIVED = 1
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run(launch: Launch, timeout: float | None = None, say: Callable[[str], None] | None = None) -> int:
    """Carry out a launch.

    Parameters
    ----------
    launch : Launch
    timeout : float, optional
        Seconds after which every process of the launch is ended and 124 is returned.
    say : callable, optional
        Receives the line about a launch that was ended; standard error by default.

    Returns
    -------
    int
        The launcher's exit status; 128 + n where signal n ended it; 1 where its ranks had ended and it had not. Does
        not return where this process turns into the launcher.
    """
    environment = launch.environment()
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if timeout is None and (at_terminal or not launch.may_survive):
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(launch.argv[0], launch.argv, environment)
    mark = new_mark()
    # A group of its own, so that Ctrl-C reaches the launcher once, through us. Then the terminal is not its to read.
    stdin = subprocess.DEVNULL if sys.stdin is None or at_terminal else None
    launcher = subprocess.Popen(launch.argv, env=environment | {MARK: mark}, stdin=stdin, process_group=0)

    def forward(number: int, frame: FrameType | None) -> None:
        launcher.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    tell = say or (lambda line: print(line, file=sys.stderr, flush=True))
    end = math.inf if timeout is None else time.monotonic() + timeout
    survivor = Survivor(launcher.pid, mark)
    try:
        while launcher.poll() is None:
            left = end - time.monotonic()
            if left <= 0:
                tell(f"fivedp run: not done after {timeout:g} s; every process of this launch is ended")
                end_launch(launcher, mark)
                return TIMED_OUT
            if launch.may_survive and survivor.found():
                tell(f"fivedp run: all ranks ended {survivor.patience_s:g} s ago, their launcher did not; it is ended")
                end_launch(launcher, mark)
                return SURVIVED
            try:
                launcher.wait(min(left, 0.5))
            except subprocess.TimeoutExpired:
                continue
        end_launch(launcher, mark, grace=0.0)  # a launcher that was killed leaves its ranks behind
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = launcher.returncode
    return 128 - status if status < 0 else status
