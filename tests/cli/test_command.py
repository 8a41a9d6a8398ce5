"""The `fivedp` command: help, `run` with its statuses, signals and limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fivedp.cli.launcher import clean_environment
from fivedp.cli.main import main

FIVEDP = [sys.executable, "-m", "fivedp.cli"]


def fivedp(*words: str, env: dict[str, str] | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FIVEDP, *words],
        env=clean_environment() | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def running(pids: list[int]) -> list[int]:
    """Those of `pids` that still run; one that has ended and was not collected by its parent does not."""
    alive = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        alive += [pid] if state != "Z" else []
    return alive


def test_no_arguments_print_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "doctor" in out
    assert "run" in out


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["doctor", "--help"]])
def test_help_everywhere(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert "usage: fivedp" in capsys.readouterr().out


def test_importing_the_command_starts_no_mpi() -> None:
    # Its own diagnosis must work where MPI does not, and Open MPI refuses a launch from within a running MPI.
    code = "import sys, fivedp, fivedp.cli; print(sorted(n for n in sys.modules if n.startswith('mpi4py')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_run_starts_the_ranks_it_was_asked_for() -> None:
    code = "from mpi4py import MPI; c = MPI.COMM_WORLD; c.Barrier(); print(f'rank {c.rank} of {c.size}\\n', end='')"
    done = fivedp("run", "-np", "3", "--", "python", "-c", code)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("rank")]
    assert sorted(lines) == [f"rank {rank} of 3" for rank in range(3)]
    assert " -np 3 " in done.stderr  # the line that does it


def test_run_passes_the_status_on() -> None:
    done = fivedp("run", "-np", "2", "--", "python", "-c", "import sys; sys.exit(7)")
    assert done.returncode == 7
    done = fivedp("run", "-np", "2", "--timeout", "50", "--", "python", "-c", "import sys; sys.exit(7)")
    assert done.returncode == 7


def test_ranks_do_not_inherit_what_misleads_a_blas() -> None:
    code = "import os; print([n for n in os.environ if n.startswith('OPENBLAS_C')], os.environ['OMP_NUM_THREADS'])"
    done = fivedp("run", "-np", "1", "--threads", "3", "--", "python", "-c", code, env={"OPENBLAS_CORETYPE": "Haswell"})
    assert "[] 3" in done.stdout


def test_dry_run_prints_a_line_that_a_shell_can_run() -> None:
    done = fivedp("run", "-np", "2", "--dry-run", "--", "python", "-c", "print('said by a rank')")
    assert done.returncode == 0
    assert done.stderr == ""
    again = subprocess.run(
        done.stdout, shell=True, capture_output=True, text=True, timeout=60, check=False, env=clean_environment()
    )
    assert again.stdout.count("said by a rank") == 2  # a launcher may join the lines of two ranks


def test_time_limit_ends_every_rank(tmp_path: Path) -> None:
    code = f"import os, time; open(r'{tmp_path}/' + str(os.getpid()), 'w').close(); time.sleep(100)"
    begin = time.monotonic()
    done = fivedp("run", "-np", "3", "--timeout", "3", "--", "python", "-c", code)
    assert done.returncode == 124
    assert time.monotonic() - begin < 30
    assert "not done after 3 s" in done.stderr
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 3
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("limit", [[], ["--timeout", "60"]])
def test_signal_reaches_the_ranks(tmp_path: Path, limit: list[str]) -> None:
    code = f"import os, time; open(r'{tmp_path}/' + str(os.getpid()), 'w').close(); time.sleep(100)"
    process = subprocess.Popen(
        [*FIVEDP, "run", "-np", "2", *limit, "--", "python", "-c", code],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        begin = time.monotonic()
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() - begin < 40:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    end = time.monotonic() + 10
    while running(pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not running(pids)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "-np", "2"], "no command was given"),
        (["run", "-np", "2", "--"], "no command was given"),
        (["run", "-np", "0", "--", "true"], "'0' is no positive whole number"),
        (["run", "--", "true"], "required: -np"),
        (["run", "-np", "2", "--map-by", "core", "true"], "put -- between --map-by"),
        (["run", "-np", "2", "--timeout", "soon", "--", "true"], "'soon' is no positive number of seconds"),
        (["no-such-command"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_broken_mpi_is_one_sentence_and_status_one(tmp_path: Path) -> None:
    done = fivedp("run", "-np", "2", "--", "true", env={"MPI4PY_LIBMPI": str(tmp_path / "none.so")})
    assert done.returncode == 1
    assert "loads no MPI library" in done.stderr
    assert "fivedp doctor" in done.stderr
    assert "Traceback" not in done.stderr


def test_command_that_does_not_exist_fails() -> None:
    assert fivedp("run", "-np", "1", "--", "/no/such/program").returncode != 0
