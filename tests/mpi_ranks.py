"""pytest as one rank of a launch: all ranks go from test to test together, or not at all.

After every test the ranks exchange one word each: which test it was, and how it ended. A test that failed anywhere has
failed everywhere, with each rank's traceback printed once by rank 0. The exchange is polled, never waited for blindly:

* a rank that failed gives the others `GRACE` seconds to arrive. Where they do not (they wait inside the test for a
  message that will not come), it reports, asks them for their stacks and aborts the launch;
* a rank that passed waits `PATIENCE` seconds for the slowest;
* ranks that arrive from different tests abort at once.

Hypothesis draws the same examples on all ranks (one seed, no database, no shrinking, no clock), and the verdict on
every single example is shared in the same way, since the rank that fails would otherwise replay it alone.

Each test gets its own duplicate of the world as fixture `comm`: what a failed test left in flight reaches nobody.
"""

from __future__ import annotations

import faulthandler
import functools
import io
import os
import re
import signal
import time
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from _pytest._io import TerminalWriter
from _pytest.runner import runtestprotocol
from mpi4py import MPI

from fivedp.comm.launch_check import check_launch
from mpi_launcher import MPI_TESTS, RECORDS, FailureText

GRACE = float(os.environ.get("FIVEDP_TEST_GRACE", "10"))
PATIENCE = float(os.environ.get("FIVEDP_TEST_PATIENCE", "180"))
OUT_OF_STEP = 70
PASSED, FAILED = 0, 1


class PeerFailure(AssertionError):
    """This rank passed, another failed."""


class RankSide:
    """The pytest plugin of one rank."""

    def __init__(self, config: pytest.Config, seed: int) -> None:
        check_launch(MPI.COMM_WORLD.size)
        self.config = config
        self.control = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.control.rank, self.control.size
        self.in_use: list[MPI.Comm] = []
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.error_stream = os.fdopen(os.dup(2), "w", buffering=1)
        named = os.environ.get(RECORDS)
        self.folder = Path(named) if named is not None and Path(named).is_dir() else None
        self.records = self._open_records()
        self.peers = array("q", [0] * 2 * self.size)
        host = zlib.crc32(MPI.Get_processor_name().encode())
        self.control.Allgather(array("q", [os.getpid(), host]), self.peers)
        self.host = host
        shared = array("q", [seed])
        self.control.Bcast(shared, root=0)
        self.seed = shared[0]

    @staticmethod
    def settle_hypothesis(hypothesis: ModuleType) -> None:
        """Make every rank draw the same examples, whatever the clock says and whichever of them fails."""
        hypothesis.settings.register_profile(
            "ranks",
            deadline=None,
            database=None,
            phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
            suppress_health_check=list(hypothesis.HealthCheck),
            report_multiple_bugs=False,
        )
        hypothesis.settings.load_profile("ranks")

    def _open_records(self) -> io.FileIO | None:
        folder = self.folder
        if folder is None:
            faulthandler.register(signal.SIGUSR1, file=self.error_stream, all_threads=True)
            return None
        self.stack_file = open(folder / f"stacks.{self.rank}", "w")  # noqa: SIM115 - open to the end
        faulthandler.register(signal.SIGUSR1, file=self.stack_file, all_threads=True)
        # One rank's basetemp is removed by the others otherwise.
        self.config.option.basetemp = str(folder / f"tmp.{self.rank}")
        file = io.FileIO(folder / f"rank.{self.rank}", "w")
        file.write(f"pid {os.getpid()}\n".encode())
        return file

    def note(self, line: str) -> None:
        """Write down where this rank is, for the process that watches the launch."""
        if self.records is not None:
            self.records.write(f"{line}\n".encode())

    # ------------------------------------------------------------ meeting the other ranks

    def meet(self, what: str, outcome: int, size: int = 0) -> list[tuple[int, int]]:
        """Exchange (outcome, size) with all ranks, who must come from the same place; does not return otherwise."""
        place = zlib.crc32(what.encode())
        everyone = array("q", [0] * 3 * self.size)
        request = self.control.Iallgather(array("q", [place, outcome, size]), everyone)
        begin, pause = time.monotonic(), 0.0
        limit = GRACE if outcome == FAILED else PATIENCE
        while not request.Test():
            if time.monotonic() - begin > limit:
                self.abort(f"waited {limit:g} s for the other ranks after {what}")
            time.sleep(pause)
            pause = min(pause + 0.0001, 0.005)
        places = everyone[0::3]
        if any(other != place for other in places):
            strangers = [rank for rank in range(self.size) if places[rank] != place]
            self.abort(f"finished {what}, but ranks {strangers} come from elsewhere")
        return list(zip(everyone[1::3], everyone[2::3], strict=True))

    def abort(self, reason: str, text: str = "") -> None:
        """Report, ask the other ranks on this node for their stacks, and end the launch."""
        text = text or self.failure_text
        self.error_stream.write(f"\n===== rank {self.rank} of {self.size} ends the launch: {reason} =====\n{text}\n")
        for rank in range(self.size):
            pid, host = self.peers[2 * rank], self.peers[2 * rank + 1]
            if rank != self.rank and host == self.host:
                try:
                    os.kill(pid, signal.SIGUSR1)
                except OSError:
                    self.error_stream.write(f"(the process of rank {rank} no longer exists)\n")
        time.sleep(1.0)  # their stacks are being written
        MPI.COMM_WORLD.Abort(OUT_OF_STEP)

    failure_text = ""

    def _notice_exit(self) -> None:
        # Nothing else tells afterwards which of the ranks left, and which were ended for it.
        leave, this = os._exit, os.getpid()

        def noted(status: int) -> None:
            if os.getpid() == this:
                self.note(f"left with os._exit({status})")
            leave(status)

        os._exit = noted  # type: ignore[assignment]

    # ------------------------------------------------------------ pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        config = session.config
        if self.folder is not None:
            faulthandler.enable(file=self.stack_file, all_threads=True)  # a crash is told under this rank's name
        self._notice_exit()
        if hasattr(config.option, "with_mpi"):
            config.option.with_mpi = True
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if self.rank > 0 and reporter is not None:
            reporter._tw = TerminalWriter(open(os.devnull, "w"))  # noqa: SIM115 - open to the end

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        # Plain tests would run once per rank, and those that start launches cannot.
        if collection_path.suffix == ".py" and MPI_TESTS not in collection_path.parents:
            return True
        return None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            item.extra_keyword_matches.add(f"np{self.size}")  # `-k np3` selects launches: all tests of this one
            self._share_examples(item)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        names = "\n".join(item.nodeid for item in session.items)
        failed = FAILED if session.testsfailed else PASSED
        results = self.meet(f"collection of {len(session.items)} tests, {zlib.crc32(names.encode())}", failed)
        if len({outcome for outcome, _ in results}) > 1:
            self.abort("some ranks could not import the tests, others could")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        self.note(f"test {item.nodeid}")
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        self.failure_text = ""
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        self._agree(item.nodeid, reports)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _agree(self, name: str, reports: list[pytest.TestReport]) -> None:
        """Make one verdict of all ranks', with every failing rank's text in rank 0's report."""
        bad = [report for report in reports if report.failed]
        self.failure_text = "\n".join(map(_text_of, bad))
        mine = self.failure_text.encode(errors="replace")
        results = self.meet(name, FAILED if bad else PASSED, len(mine))
        if all(outcome == PASSED for outcome, _ in results):
            self.counts["skipped" if any(report.skipped for report in reports) else "passed"] += 1
            while self.in_use:
                self.in_use.pop().Free()
            return
        self.counts["failed"] += 1
        self.in_use.clear()  # freeing is collective, and messages may be under way in it
        sizes = [size for _, size in results]
        everything = bytearray(sum(sizes))
        self.control.Gatherv([mine, MPI.BYTE], [everything, sizes, MPI.BYTE] if self.rank == 0 else None, root=0)
        texts, position = [], 0
        for size in sizes:
            texts.append(everything[position : position + size].decode(errors="replace"))
            position += size
        for report in bad:
            report.outcome, report.longrepr = "passed", None
        verdict = bad[0] if bad else next((r for r in reports if r.when == "call"), reports[0])
        verdict.outcome, verdict.longrepr = "failed", FailureText(_labelled(texts) or "failed on another rank")
        if self.rank == 0 and self.folder is not None:
            # pytest tells at the end, which a later test may prevent.
            with open(self.folder / "failures", "a") as file:
                file.write(f"===== {name} =====\n{verdict.longrepr}\n")
        for report in reports:
            report.sections = []  # they are in the texts

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.rank == 0 and self.folder is not None:
            (self.folder / "counts").write_text(" ".join(f"{name}={number}" for name, number in self.counts.items()))
        self.note("done")

    def _share_examples(self, item: pytest.Item) -> None:
        handle = getattr(getattr(item, "obj", None), "hypothesis", None)
        if handle is not None and not hasattr(handle.inner_test, "shared_by_ranks"):
            handle.inner_test = self._shared(handle.inner_test, item.nodeid)

    def _shared(self, inner: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Wrap a property so that an example that fails on one rank fails on all."""
        n_examples = 0

        @functools.wraps(inner)
        def shared(*arguments: Any, **keywords: Any) -> Any:
            __tracebackhide__ = True
            nonlocal n_examples
            n_examples += 1
            where = f"example {n_examples} of {name}"
            try:
                result = inner(*arguments, **keywords)
            except BaseException as error:
                # Rejected examples (assume, overrun) leave as exceptions of Hypothesis, on all ranks alike.
                control = type(error).__module__.startswith("hypothesis")
                self.failure_text = "" if control else f"{type(error).__name__}: {error}"
                self.meet(where, PASSED if control else FAILED)
                raise
            bad = [rank for rank, (outcome, _) in enumerate(self.meet(where, PASSED)) if outcome == FAILED]
            if bad:
                raise PeerFailure(f"this example failed on {_ranks(bad)} of {self.size}")
            return result

        shared.shared_by_ranks = True  # type: ignore[attr-defined]
        return shared

    @pytest.fixture(name="comm")
    def own_world(self) -> MPI.Intracomm:
        """All ranks of the launch, in a communicator of this test's own."""
        duplicate = MPI.COMM_WORLD.Dup()
        self.in_use.append(duplicate)
        return duplicate


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _labelled(texts: list[str]) -> str:
    """The texts of all ranks, each under its rank; those that differ in addresses only are one."""
    spoken: dict[str, tuple[str, list[int]]] = {}
    for rank, text in enumerate(texts):
        if text:
            spoken.setdefault(re.sub(r"0x[0-9a-f]+", "0x", text), (text, []))[1].append(rank)
    return "\n".join(f"===== {_ranks(ranks)} of {len(texts)} =====\n{text}" for text, ranks in spoken.values())


def _text_of(report: pytest.TestReport) -> str:
    captured = [f"--- {title} ---\n{text}" for title, text in report.sections if text.strip()]
    peer = re.search(r"PeerFailure: (.*)", report.longreprtext)
    if peer:  # the traceback would show this file
        return peer.group(1)
    return "\n".join([f"({report.when}) {report.longreprtext}", *captured])
