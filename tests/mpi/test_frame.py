"""The frame that runs the tests under mpirun, tested by tests that must fail.

A frame that lets a failure pass, or hangs on one, makes every other test worthless. Each case here writes a small test
file with a seeded fault into a copy of the frame and runs the whole of it: an ordinary pytest, its launches, their
verdict. The file starts its own launches, so it stays in the ordinary pytest: `RANKS` is empty.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fivedp.cli.processes import MARK
from mpi_launcher import TESTS, clean_environment, constant, run_mpi

RANKS = ()
FRAME = ("conftest.py", "mpi_launcher.py", "mpi_ranks.py")


class Run:
    """One run of the frame over a seeded file."""

    def __init__(self, folder: Path, source: str, *options: str, other: str = "") -> None:
        tests = folder / "tests"
        (tests / "mpi").mkdir(parents=True)
        for name in FRAME:
            shutil.copy(TESTS / name, tests)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (tests / "mpi" / "test_seeded.py").write_text(source)
        if other:
            (tests / "mpi" / "test_another.py").write_text(other)
        environment = clean_environment() | {"FIVEDP_TEST_GRACE": "2", MARK + "_OUTER": str(folder)}
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "tests", "-p", "no:cacheprovider", *options],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        self.seconds = time.monotonic() - begin
        self.status, self.output = done.returncode, done.stdout + done.stderr
        print(self.output)

    def left_behind(self, folder: Path) -> list[str]:
        """Commands of processes that outlived the run."""
        needle = f"{MARK}_OUTER={folder}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if needle in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found


def test_passing_file_runs_once_per_rank_count(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        "RANKS = (1, 3)\n"
        "def test_world(comm):\n"
        "    assert comm.size in (1, 3)\n"
        "def test_sum_of_ranks(comm):\n"
        "    from array import array\n"
        "    total = array('q', [0])\n"
        "    comm.Allreduce(array('q', [comm.rank + 1]), total)\n"
        "    assert total[0] == comm.size * (comm.size + 1) // 2\n",
    )
    assert run.status == 0
    assert "2 passed" in run.output  # two launches
    assert "under mpirun: 4 passed in 2 launches" in run.output


@pytest.mark.parametrize("ci", ["", "true"])
def test_failures_on_one_rank_and_on_all_fail_the_run_and_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ci: str
) -> None:
    monkeypatch.setenv("CI", ci)  # where it is set, pytest does not cut the lines of its summary
    run = Run(
        tmp_path,
        "RANKS = (3,)\n"
        "def test_first(comm):\n"
        "    assert comm.rank != 1, 'fault of one'\n"
        "def test_wrong(comm):\n"
        "    assert comm.size == 0, 'fault of all'\n"
        "def test_next_still_runs(comm):\n"
        "    comm.Barrier()\n",
    )
    assert run.status == 1
    assert "===== rank 1 of 3 =====" in run.output
    assert run.output.count("AssertionError: fault of one") == 1
    assert "===== ranks 0, 1, 2 of 3 =====" in run.output
    assert run.output.count("AssertionError: fault of all") == 1
    assert "2 failed, 1 passed" in run.output


def test_failing_rank_does_not_wait_for_ranks_that_wait_for_it(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        "RANKS = (3,)\n"
        "def test_earlier(comm):\n"
        "    assert comm.rank != 2, 'earlier fault'\n"
        "def test_one_leaves(comm):\n"
        "    if comm.rank == 1:\n"
        "        raise ValueError('seeded fault')\n"
        "    comm.Barrier()  # the others wait here\n",
    )
    assert run.status == 1
    assert run.seconds < 90
    assert "rank 1 of 3 ends the launch" in run.output
    assert "ValueError: seeded fault" in run.output
    assert "earlier fault" in run.output
    # The stacks of the ranks that were stuck, ending in the line where they were.
    for rank in (0, 2):
        assert re.search(rf"stacks of rank {rank} -----\n.*\n.*test_seeded.py\", line 7 in test_one_leaves", run.output)
    assert run.left_behind(tmp_path) == []


def test_hang_is_ended_at_the_deadline(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        "RANKS = (2,)\n"
        "TIMEOUT = 10\n"
        "def test_hang(comm):\n"
        "    if comm.rank == 0:\n"
        "        comm.Recv(bytearray(1), source=1)\n",
    )
    assert run.status == 1
    assert "deadline of 10 s passed" in run.output
    assert re.search(r"stacks of rank 0 -----\n.*\n.*test_seeded.py\", line 5 in test_hang", run.output)
    assert run.seconds < 90
    assert run.left_behind(tmp_path) == []


@pytest.mark.parametrize("status", [0, 3])
def test_rank_that_leaves_is_named(tmp_path: Path, status: int) -> None:
    run = Run(
        tmp_path,
        "import os\n"
        "RANKS = (3,)\n"
        "TIMEOUT = 200\n"
        "def test_leaves(comm):\n"
        "    if comm.rank == 1:\n"
        f"        os._exit({status})\n"
        "    comm.Barrier()\n",
    )
    assert run.status == 1
    assert f"1 (tests/mpi/test_seeded.py::test_leaves, left with os._exit({status}))" in run.output
    assert run.seconds < 90
    assert run.left_behind(tmp_path) == []


def test_killed_rank_is_noticed_before_the_deadline(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        "import os, signal\n"
        "RANKS = (2,)\n"
        "TIMEOUT = 200\n"
        "def test_killed(comm):\n"
        "    if comm.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    comm.Barrier()\n",
    )
    assert run.status == 1
    assert "ended without finishing" in run.output or "has ended" in run.output
    assert run.seconds < 90
    assert run.left_behind(tmp_path) == []


def test_crash_shows_the_stack_of_its_rank(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        "import os, signal\n"
        "RANKS = (2,)\n"
        "def test_crash(comm):\n"
        "    if comm.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    comm.Barrier()\n",
    )
    assert run.status == 1
    assert re.search(r"stacks of rank 1 -----\nFatal Python error: Segmentation fault", run.output)


def test_import_error_fails_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, "RANKS = (2,)\nimport no_such_module_anywhere\ndef test_it(comm):\n    pass\n")
    assert run.status == 1
    assert "No module named 'no_such_module_anywhere'" in run.output


def test_import_error_on_one_rank_fails_the_run(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        "RANKS = (2,)\n"
        "from mpi4py import MPI\n"
        "if MPI.COMM_WORLD.rank == 1:\n"
        "    raise ValueError('seeded fault')\n"
        "def test_it(comm):\n"
        "    comm.Barrier()\n",
    )
    assert run.status == 1
    assert "come from elsewhere" in run.output


def test_hypothesis_draws_the_same_examples_on_all_ranks(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        "from array import array\n"
        "from hypothesis import given, settings, strategies as st\n"
        "RANKS = (3,)\n"
        "seen = []\n"
        "@settings(max_examples=40)\n"
        "@given(n=st.integers(0, 10**6), extra=st.lists(st.integers(0, 9), max_size=4))\n"
        "def test_same(comm, n, extra):\n"
        "    value = n * 10 + sum(extra)\n"
        "    low, high = array('q', [0]), array('q', [0])\n"
        "    from mpi4py import MPI\n"
        "    comm.Allreduce(array('q', [value]), low, MPI.MIN)\n"
        "    comm.Allreduce(array('q', [value]), high, MPI.MAX)\n"
        "    seen.append(value)\n"
        "    assert low[0] == high[0] == value\n"
        "def test_drew_many(comm):\n"
        "    assert len(set(seen)) > 20\n",
    )
    assert run.status == 0


def test_property_that_fails_on_one_rank_keeps_the_ranks_in_step(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        "from hypothesis import given, strategies as st\n"
        "RANKS = (2,)\n"
        "@given(n=st.integers(0, 1000))\n"
        "def test_property(comm, n):\n"
        "    comm.Barrier()\n"
        "    assert n < 100 or comm.rank == 0, 'seeded fault'\n"
        "def test_after(comm):\n"
        "    comm.Barrier()\n",
    )
    assert run.status == 1
    assert "this example failed on rank 1 of 2" in run.output
    assert "Failing test case: test_property(" in run.output
    assert "1 failed, 1 passed" in run.output


def test_seed_is_shared_and_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEDP_TEST_SEED", "123456")
    source = (
        "from array import array\n"
        "RANKS = (2,)\n"
        "def test_seed(comm, seed):\n"
        "    both = array('q', [0, 0])\n"
        "    comm.Allgather(array('q', [seed]), both)\n"
        "    assert both[0] == both[1]\n"
        "    assert False, f'the seed is {seed}'\n"
    )
    first, second = Run(tmp_path / "a", source), Run(tmp_path / "b", source)
    assert "seed: 123456" in first.output
    found = [re.search(r"AssertionError: the seed is (\d+)", run.output) for run in (first, second)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].group(1) == found[1].group(1)


def test_options_select_ranks_and_tests(tmp_path: Path) -> None:
    source = (
        "RANKS = (1, 2, 3)\n"
        "def test_red(comm):\n    assert comm.size == 2\n"
        "def test_green(comm):\n    assert False, 'not selected'\n"
    )
    run = Run(tmp_path, source, "--mpi-ranks", "2,5", "-k", "test_red")
    assert run.status == 0
    assert "under mpirun: 1 passed in 1 launches" in run.output


GOOD = "RANKS = (2, 3)\ndef test_good(comm):\n    comm.Barrier()\n"


def test_files_of_one_number_of_ranks_share_a_launch(tmp_path: Path) -> None:
    run = Run(tmp_path, "RANKS = (1, 2)\ndef test_world(comm):\n    assert comm.size < 3\n", other=GOOD)
    assert run.status == 0
    assert "4 passed" in run.output
    assert "under mpirun: 4 passed in 3 launches" in run.output


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("assert comm.rank == 0, 'seeded fault'", "AssertionError: seeded fault"),
        ("import os; comm.rank == 0 and os._exit(0); comm.Barrier()", "left with os._exit(0)"),
        ("comm.rank == 0 and comm.Recv(bytearray(1), source=1)", "deadline of 10 s passed"),
        ("pass\nimport no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_of_files_that_share_a_launch_only_the_faulty_one_fails(tmp_path: Path, fault: str, told: str) -> None:
    source = f"RANKS = (2,)\nTIMEOUT = 10\ndef test_bad(comm):\n    {fault}\n"
    run = Run(tmp_path, source, "-rA", other=GOOD)
    assert run.status == 1
    assert "1 failed, 2 passed" in run.output
    assert told in run.output
    assert re.search(r"^FAILED tests/mpi/test_seeded.py::np2", run.output, re.MULTILINE)
    assert re.search(r"^PASSED tests/mpi/test_another.py::np2", run.output, re.MULTILINE)
    assert run.left_behind(tmp_path) == []


def test_ranks_and_deadline_are_read_without_importing() -> None:
    source = "raise SystemExit\nRANKS: tuple[int, ...] = (2, 5)\nTIMEOUT = 7.5\n"
    assert constant(source, "RANKS", None) == (2, 5)
    assert constant(source, "TIMEOUT", None) == 7.5
    assert constant(source, "OTHER", "default") == "default"


def test_run_mpi_returns_status_output_and_deadline() -> None:
    code = "from mpi4py import MPI; c = MPI.COMM_WORLD; c.Barrier(); print(f'rank {c.rank} of {c.size}\\n', end='')"
    good = run_mpi(2, code)
    assert good.returncode == 0
    assert sorted(good.stdout.split("\n"))[-2:] == ["rank 0 of 2", "rank 1 of 2"]
    bad = run_mpi(2, "import sys; from mpi4py import MPI; MPI.COMM_WORLD.Barrier(); sys.exit(5)")
    assert bad.returncode != 0
    assert not bad.timed_out
    slow = run_mpi(2, "import time; time.sleep(60)", timeout=2)
    assert slow.timed_out
    assert slow.seconds < 20


def test_run_mpi_passes_variables(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text("import os; print(os.environ.get('FIVEDP_A'), os.environ.get('FIVEDP_B'), os.getcwd())\n")
    os.environ["FIVEDP_B"] = "outer"
    try:
        done = run_mpi(1, script, env={"FIVEDP_A": "set", "FIVEDP_B": None}, cwd=tmp_path)
    finally:
        del os.environ["FIVEDP_B"]
    assert done.stdout.split() == ["set", "None", str(tmp_path)]


def test_a_run_that_stops_early_begins_no_other_launch(tmp_path: Path) -> None:
    source = (
        "import time\n"
        "RANKS = (1, 2)\n"
        "TIMEOUT = 200\n"
        "def test_it(comm):\n"
        "    assert comm.size > 1, 'seeded fault'\n"
        "    time.sleep(150)\n"
    )
    run = Run(tmp_path, source, "-x")
    assert run.status == 1
    assert "AssertionError: seeded fault" in run.output
    assert run.seconds < 90
    assert run.left_behind(tmp_path) == []
