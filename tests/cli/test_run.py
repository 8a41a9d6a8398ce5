"""A launch that is watched: what ends it, and what does not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fivedp.cli import run as run_module
from fivedp.cli.launcher import Launch
from fivedp.cli.processes import Survivor
from fivedp.cli.run import run

# A launcher (this shell, which becomes `sleep`) that stays after its rank has ended, and one that waits for its rank.
STAYS = "sleep 3 & echo $$ > pid; wait; exec sleep 60"
WAITS = "sleep 3; exit 5"


def launch(script: str, may_survive: bool = True) -> Launch:
    return Launch(argv=("/bin/sh", "-c", script), may_survive=may_survive)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Survivor, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(run_module, "Survivor", lambda pid, mark: Survivor(pid, mark, patience_s=1.0))


def test_launcher_that_survives_its_ranks_is_ended() -> None:
    said: list[str] = []
    begin = time.monotonic()
    assert run(launch(STAYS), timeout=50, say=said.append) == run_module.SURVIVED
    assert time.monotonic() - begin < 20
    assert said == ["fivedp run: all ranks ended 1 s ago, their launcher did not; it is ended"]
    assert not Path(f"/proc/{Path('pid').read_text().strip()}").exists()


def test_launcher_that_waits_for_a_silent_rank_is_left_alone() -> None:
    assert run(launch(WAITS), timeout=50, say=pytest.fail) == 5


def test_launcher_that_has_started_nothing_yet_is_left_alone() -> None:
    survivor = Survivor(os.getpid(), "a mark that no process has", patience_s=0.1)
    for _ in range(5):
        assert not survivor.found()
        time.sleep(0.1)


def test_other_launchers_are_not_judged() -> None:
    said: list[str] = []
    assert run(launch(STAYS, may_survive=False), timeout=6, say=said.append) == run_module.TIMED_OUT
    assert said == ["fivedp run: not done after 6 s; every process of this launch is ended"]
