"""Tests under mpirun, started from an ordinary pytest.

Every file under `tests/mpi` becomes one item per rank count (`test_x.py::np3`), and the items of a rank count are one
launch or two: the right mpirun, `python -m pytest` on every rank, a deadline. The rank counts and the deadline are
constants of the file, read without importing it:

    RANKS = (1, 2, 3, 8)     default (1, 2, 3, 4, 8); () means that the file starts its own launches and stays here
    TIMEOUT = 120            seconds for this file in one launch, default 240

A rank takes a second to start, which is more than many files take. Where a launch of several files fails, the files
that it failed in are told so, and each of the others runs again alone.

A launch ends in one of five ways, and never hangs: its own exit status; the deadline; a rank whose process is gone
although its tests are not; ranks that finished their tests and do not end; a launcher that survives its ranks, as
`fivedp run` would end it. In the last four every rank first writes the stacks of its threads (SIGUSR1, faulthandler),
then everything that belongs to the launch is killed.

`run_mpi` is the same launch for a test's own program: a crash, a hang, a benchmark.
"""

from __future__ import annotations

import ast
import atexit
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGUSR1
from types import SimpleNamespace

import pytest

from fivedp.cli.launcher import (
    Launcher,
    LauncherError,
    clean_environment,
    find_launcher,
    plan_launch,
    this_machine,
)
from fivedp.cli.mpi_library import MPILibraryError, find_library
from fivedp.cli.processes import MARK, Survivor, catches, end_launch, marked, new_mark, send

TESTS = Path(__file__).resolve().parent
MPI_TESTS = TESTS / "mpi"
DEFAULT_RANKS = (1, 2, 3, 4, 8)
DEFAULT_TIMEOUT = 240.0
# Every test has a communicator of its own, whose private duplicates end with MPI: MPICH has 2,048 in all.
FILES_OF_A_LAUNCH = 13
RECORDS = "FIVEDP_TEST_RECORDS"  # folder in which the ranks of a launch note where they are
SEED = "FIVEDP_TEST_SEED"
# mpirun itself needs a moment to notice that a rank is gone; after this we end the launch for it.
LOST_RANK_GRACE = 3.0
# It writes to files, which keep it no longer than that.
SURVIVOR_GRACE = 5.0
# Interpreter shutdown and MPI_Finalize of 8 ranks on 2 busy cores.
END_GRACE = 30.0
NOTHING_COLLECTED = 5


@dataclass
class RankRecord:
    """What one rank wrote down about itself."""

    pid: int
    current: str = ""
    left: str = ""
    done: bool = False


@dataclass
class Finished:
    """The end of a launch; attributes as of `subprocess.CompletedProcess`, and why it was ended if it was."""

    args: Sequence[str]
    returncode: int
    stdout: str
    stderr: str
    seconds: float
    ended_because: str = ""
    stacks: dict[int, str] = field(default_factory=dict)
    failures: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    records: dict[int, RankRecord] = field(default_factory=dict)

    @property
    def timed_out(self) -> bool:
        """Whether the deadline ended the launch."""
        return self.ended_because.startswith("deadline")

    @property
    def output(self) -> str:
        """Everything there is to show, in reading order."""
        parts = [self.stdout.rstrip(), self.stderr.rstrip()]
        if self.failures and not self.counts:  # pytest did not come to its own report of them
            parts.append(self.failures.rstrip())
        parts += [f"----- stacks of rank {rank} -----\n{text}" for rank, text in sorted(self.stacks.items())]
        return "\n".join(part for part in parts if part)


@functools.cache
def launcher() -> Launcher:
    """The launcher of this Python's MPI, as `fivedp run` finds it."""
    environ = clean_environment()
    return find_launcher(find_library(environ=environ), environ)


@functools.cache
def bytecode_folder() -> str:
    """A place for the ranks' byte code where the tree is to stay clean of it."""
    folder = tempfile.TemporaryDirectory(prefix="fivedp-bytecode-")
    atexit.register(folder.cleanup)
    return folder.name


def run_mpi(
    n_ranks: int,
    code_or_path: str | Path,
    *,
    args: Sequence[str] = (),
    timeout: float = 60.0,
    env: Mapping[str, str | None] | None = None,
    cwd: str | Path | None = None,
) -> Finished:
    """Run a Python program on `n_ranks` ranks, and come back in any case.

    Parameters
    ----------
    n_ranks : int
    code_or_path : str or Path
        A `Path` is run as a script, a `str` as `python -c`.
    args : sequence of str
        Arguments of the program.
    timeout : float
        Seconds until every process of the launch is killed.
    env : mapping, optional
        Variables to set, or to remove where the value is None.
    cwd : path, optional
        The working directory of the ranks.

    Returns
    -------
    Finished
        `returncode` is the launcher's, `timed_out` tells about the deadline.
    """
    program = [str(code_or_path)] if isinstance(code_or_path, Path) else ["-c", code_or_path]
    return start([sys.executable, *program, *args], n_ranks, timeout=timeout, env=env, cwd=cwd)


def start(
    command: Sequence[str],
    n_ranks: int,
    *,
    timeout: float,
    env: Mapping[str, str | None] | None = None,
    cwd: str | Path | None = None,
    limits: Mapping[str, float] | None = None,
) -> Finished:
    """Launch `command` on `n_ranks` ranks and watch over it to its end.

    `limits` gives files of tests their own seconds, counted from when a rank comes to them.
    """
    base = clean_environment()
    for name, value in (env or {}).items():
        if value is None:
            base.pop(name, None)
        else:
            base[name] = value
    if base.pop("PYTHONDONTWRITEBYTECODE", None) is not None:
        # Eight ranks would compile pytest's rewritten modules (all of Hypothesis among them) anew: 2 s of each.
        base["PYTHONPYCACHEPREFIX"] = bytecode_folder()
    launch = plan_launch(n_ranks, command, launcher(), this_machine(), environ=base)
    mark = new_mark()
    with tempfile.TemporaryDirectory(prefix="fivedp-launch-") as folder:
        records = Path(folder, "records")
        records.mkdir()
        environment = launch.environment(base) | {MARK: mark, RECORDS: str(records), "PYTHONUNBUFFERED": "1"}
        # Files, not pipes: a pipe held open by a lost rank would keep us waiting for its end.
        with open(Path(folder, "out"), "wb") as out, open(Path(folder, "err"), "wb") as err:
            begin = time.monotonic()
            process = subprocess.Popen(
                launch.argv, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0
            )
            try:
                survivor = Survivor(process.pid, mark, SURVIVOR_GRACE) if launch.may_survive else None
                because = _watch(process, mark, records, timeout, limits or {}, survivor)
                if because:
                    send([pid for pid in marked(mark) if catches(pid, SIGUSR1)], SIGUSR1)
                    time.sleep(0.5)
            finally:
                end_launch(process, mark, grace=1.0)
        return Finished(
            args=launch.argv,
            returncode=process.returncode,
            stdout=Path(folder, "out").read_text(errors="replace"),
            stderr=Path(folder, "err").read_text(errors="replace"),
            seconds=time.monotonic() - begin,
            ended_because=because,
            stacks=_read_stacks(records),
            failures=(records / "failures").read_text() if (records / "failures").is_file() else "",
            counts=_read_counts(records),
            records=read_records(records),
        )


def _watch(
    process: subprocess.Popen[bytes],
    mark: str,
    records: Path,
    timeout: float,
    limits: Mapping[str, float],
    survivor: Survivor | None,
) -> str:
    """Wait for the end of a launch; the reason to end it, or an empty string where it ended by itself."""
    pause, lost_since, done_since = 0.01, 0.0, 0.0
    begin, files = time.monotonic(), set[str]()
    while True:
        try:
            process.wait(pause)
            return ""
        except subprocess.TimeoutExpired:
            pause = min(pause * 1.5, 0.2)
        now = time.monotonic()
        ranks = read_records(records)
        where = "; ".join(f"rank {rank}: {_place(record)}" for rank, record in sorted(ranks.items()))
        here = {record.current.partition("::")[0] for record in ranks.values()} & limits.keys()
        if here and here != files:
            begin, files, timeout = now, here, max(limits[file] for file in here)
        if now > begin + timeout:
            return f"deadline of {timeout:g} s passed; {where or 'no rank had begun its tests'}"
        if survivor is not None and survivor.found():
            return f"all ranks ended {survivor.patience_s:g} s ago, their launcher did not"
        if not ranks:
            continue
        alive = set(marked(mark))
        lost = {rank: record for rank, record in ranks.items() if record.pid not in alive and not record.done}
        lost_since = (lost_since or now) if lost else 0.0
        if lost and now - lost_since > LOST_RANK_GRACE:
            names = ", ".join(f"rank {rank} during {_place(record)}" for rank, record in sorted(lost.items()))
            return f"the process of {names} has ended, the launch has not; {where}"
        all_done = all(record.done for record in ranks.values())
        done_since = (done_since or now) if all_done else 0.0
        if all_done and now - done_since > END_GRACE:
            return f"all ranks finished their tests, but did not end within {END_GRACE:g} s (MPI_Finalize?)"


def _place(record: RankRecord) -> str:
    if record.done:
        return "finished"
    return (record.current or "start") + (f", left {record.left}" if record.left else "")


def read_records(records: Path) -> dict[int, RankRecord]:
    """Read where each rank is, from the lines it appended to its file."""
    found = {}
    for file in records.glob("rank.*"):
        lines = file.read_text(errors="replace").splitlines()
        if lines and lines[0].startswith("pid "):
            record = RankRecord(pid=int(lines[0].split()[1]))
            for line in lines[1:]:
                kind, _, value = line.partition(" ")
                record.current = value if kind == "test" else record.current
                record.left = value if kind == "left" else record.left
                record.done = record.done or kind == "done"
            found[int(file.name.partition(".")[2])] = record
    return found


def _read_stacks(records: Path) -> dict[int, str]:
    """Stacks by rank, without the frames of pytest below the test."""
    found = {}
    for file in records.glob("stacks.*"):
        lines = file.read_text(errors="replace").splitlines()
        kept = [
            line
            for line in lines
            if not re.search(r"/_?pytest/|/pluggy/|<frozen runpy>|mpi_ranks\.py\", line \d+ in py", line)
        ]
        if kept:
            found[int(file.name.partition(".")[2])] = "\n".join(kept)
    return found


def _read_counts(records: Path) -> dict[str, int]:
    file = records / "counts"
    words = file.read_text().split() if file.is_file() else []
    return {name: int(number) for name, number in (word.split("=") for word in words)}


# ---------------------------------------------------------------- the side of the ordinary pytest


def constant(source: str, name: str, default: object) -> object:
    """The value of a module constant, read from the source without running it."""
    for node in ast.parse(source).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)  # type: ignore[union-attr]
    return default


def test_names(source: str) -> list[str]:
    """Names of test functions and classes in a source, for `-k`."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds) and node.name.lower().startswith("test")
    ]


class FailureText:
    """What a failed report shows: all of `text` once, and its first line in the summary.

    A plain string would stand in the summary again, whole, where pytest takes the machine for a CI machine.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.reprcrash = SimpleNamespace(message=text.partition("\n")[0])

    def __str__(self) -> str:
        return self.text

    def toterminal(self, writer: pytest.TerminalReporter) -> None:
        for line in self.text.splitlines():
            writer.line(line)


class RanksFailed(Exception):
    """A launch whose tests failed, or that had to be ended; its text is what the ranks said."""


class RankFile(pytest.File):
    """A file under `tests/mpi`: one launch per rank count."""

    def collect(self) -> Iterator[RankItem]:
        source = self.path.read_text()
        only = self.config.getoption("mpi_ranks")
        ranks = constant(source, "RANKS", DEFAULT_RANKS)
        timeout = float(self.config.getoption("mpi_timeout") or constant(source, "TIMEOUT", DEFAULT_TIMEOUT))  # type: ignore[arg-type]
        names = test_names(source)
        for n_ranks in ranks:  # type: ignore[attr-defined]
            if only is None or n_ranks in only:
                item = RankItem.from_parent(self, name=f"np{n_ranks}", n_ranks=n_ranks, timeout=timeout)
                item.extra_keyword_matches.update(names)
                yield item


class RankItem(pytest.Item):
    """All tests of one file on one number of ranks."""

    def __init__(self, *, n_ranks: int, timeout: float, **keywords: object) -> None:
        super().__init__(**keywords)  # type: ignore[arg-type]
        self.n_ranks, self.timeout = n_ranks, timeout
        self.file = self.nodeid.partition("::")[0]

    def runtest(self) -> None:
        try:
            launcher()
        except (MPILibraryError, LauncherError) as error:
            raise RanksFailed(f"tests/mpi needs a working MPI: {error}") from None
        launch = self.config.stash[LAUNCHES_KEY][self]
        done = launch.finished()
        if launch.fault() and self.file not in launch.faulty_files():
            launch = Launch([self])
            done = launch.finished()
        title = f"{self.n_ranks} ranks, exit status {done.returncode}, {done.seconds:.1f} s"
        if fault := launch.fault():
            raise RanksFailed(f"{title}{fault}\n{done.output}")
        if done.returncode == NOTHING_COLLECTED:
            pytest.skip("no test of this file is selected")
        self.add_report_section("call", f"{self.n_ranks} ranks", done.output)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> FailureText:  # type: ignore[override]
        if isinstance(excinfo.value, RanksFailed):
            return FailureText(str(excinfo.value))
        return FailureText(str(excinfo.getrepr()))

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name} on {self.n_ranks} rank{'s' * (self.n_ranks != 1)}"


class Launch:
    """Files on one number of ranks, run in one launch."""

    def __init__(self, items: list[RankItem]) -> None:
        self.items, self.config, self.n_ranks = items, items[0].config, items[0].n_ranks
        self._finished: Finished | None = None

    def _run(self) -> Finished:
        options = self.config.option
        command = [sys.executable, "-m", "pytest", *(str(item.path) for item in self.items)]
        command += [f"--rootdir={self.config.rootpath}", "-q", "-p", "no:cacheprovider", f"--tb={options.tbstyle}"]
        command += [f"--color={'yes' if self.config.get_terminal_writer().hasmarkup else 'no'}"]
        command += [f"--maxfail={options.maxfail}"] if options.maxfail else []
        command += ["-k", options.keyword] if options.keyword else []
        command += ["-m", options.markexpr] if options.markexpr else []
        limits = {item.file: item.timeout for item in self.items}
        seed = str(self.config.stash[SEED_KEY])
        return start(command, self.n_ranks, timeout=max(limits.values()), limits=limits, env={SEED: seed})

    def finished(self) -> Finished:
        """The end of the launch, which begins now where it has not."""
        if self._finished is None:
            self._finished = self._run()
            total = self.config.stash[COUNTS_KEY]
            total["launches"] = total.get("launches", 0) + 1
            for name, number in self._finished.counts.items():
                total[name] = total.get(name, 0) + number
        return self._finished

    def fault(self) -> str:
        """What is wrong with how it ended; an empty string where nothing is."""
        done, options = self.finished(), self.config.option
        # Hydra takes a rank that leaves with status 0 in the middle of a test for a success, and ends the others.
        unfinished = self._unfinished()
        if done.ended_because:
            return f": {done.ended_because}"
        if unfinished:
            places = ", ".join(f"{rank} ({_place(record)})" for rank, record in unfinished.items())
            return f": ended without finishing: rank {places}"
        if done.returncode == NOTHING_COLLECTED and (options.keyword or options.markexpr):
            return ""
        return " " if done.returncode != 0 else ""

    def _unfinished(self) -> dict[int, RankRecord]:
        records = {rank: self.finished().records.get(rank, RankRecord(0)) for rank in range(self.n_ranks)}
        return {rank: record for rank, record in records.items() if not record.done}

    def faulty_files(self) -> set[str]:
        """The files that a launch failed in; the first where it failed in none, as with ranks that end badly."""
        done = self.finished()
        found = set(re.findall(r"^===== ([^\s:]+)::", done.failures, re.MULTILINE))
        found |= {record.current.partition("::")[0] for record in self._unfinished().values()}
        found |= set(re.findall(r"^(?:\x1b\[\d+m)*ERROR(?:\x1b\[\d+m)* ([^\s:]+)", done.stdout, re.MULTILINE))
        files = {item.file for item in self.items}
        return found & files or {self.items[0].file}


SEED_KEY = pytest.StashKey[int]()
COUNTS_KEY = pytest.StashKey[dict[str, int]]()
LAUNCHES_KEY = pytest.StashKey[dict[RankItem, Launch]]()


def parts(items: list[RankItem], most: int) -> list[list[RankItem]]:
    """`items` in as few runs of at most `most` as can be, of nearly equal length."""
    count = -(-len(items) // most)
    return [items[len(items) * i // count : len(items) * (i + 1) // count] for i in range(count)]


class LauncherSide:
    """The plugin of the ordinary pytest: turns files under `tests/mpi` into launches."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        together = dict[int, list[RankItem]]()
        for item in session.items:
            if isinstance(item, RankItem):
                together.setdefault(item.n_ranks, []).append(item)
        launches = [Launch(part) for items in together.values() for part in parts(items, FILES_OF_A_LAUNCH)]
        session.config.stash[LAUNCHES_KEY] = {item: launch for launch in launches for item in launch.items}

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        # pytest-mpi, outside mpirun, skips whatever has the keyword "mpi", and the folder's name is one.
        manager = session.config.pluginmanager
        for plugin in list(manager.get_plugins()):
            if type(plugin).__name__ == "MPIPlugin":
                manager.unregister(plugin)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makemodule(self, module_path: Path, parent: pytest.Collector) -> RankFile | None:
        if MPI_TESTS not in module_path.parents or constant(module_path.read_text(), "RANKS", None) == ():
            return None
        return RankFile.from_parent(parent, path=module_path)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        total = dict(config.stash[COUNTS_KEY])
        launches = total.pop("launches", 0)
        if launches:
            counts = ", ".join(f"{number} {name}" for name, number in total.items() if number)
            terminalreporter.write_line(f"under mpirun: {counts or 'nothing'} in {launches} launches")


def rank_list(text: str) -> tuple[int, ...]:
    """Parse `--mpi-ranks`."""
    return tuple(int(part) for part in text.split(","))


def inside_launch(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank that some launcher started."""
    return any(name in environ for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID"))
