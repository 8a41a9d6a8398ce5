"""The scripts around the benchmark: tables are what the files say, pictures can be drawn, contests are fair."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
RESULTS = sorted((BENCH / "results").glob("*.json"))


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH / "peers"))
    for name in ("FIVEDP_BENCH_PYTHON_NUMPY", "FIVEDP_BENCH_PYTHON_FIVEDP"):
        monkeypatch.delenv(name, raising=False)
    return load(BENCH / "peers" / "contest.py")


def test_tables_of_the_documentation_are_what_the_results_say() -> None:
    tables = load(BENCH / "tables.py")
    text = tables.DOCUMENT.read_text()
    assert tables.PART.search(text), "no generated part was found"
    assert tables.generate(text) == text


def test_a_generated_part_is_written_anew_and_the_rest_is_kept(tmp_path: Path) -> None:
    tables = load(BENCH / "tables.py")
    aims = {"aims": [{"title": "speed", "measured": 2.0, "wanted": 3.0, "unit": "times", "more_is_better": True}]}
    (tmp_path / "r.json").write_text(json.dumps(aims))
    text = "before\n<!-- generated: aims r.json -->\nold\n<!-- end -->\nafter\n"
    new = tables.generate(text, tmp_path)
    assert new.startswith("before\n<!-- generated: aims r.json -->\n| figure |")
    assert new.endswith("<!-- end -->\nafter\n")
    assert "old" not in new
    assert "**2** times" in new
    assert "**short**" in new
    assert tables.generate(new, tmp_path) == new


@pytest.mark.parametrize("file", RESULTS, ids=lambda f: f.stem)
def test_a_kept_result_names_no_host_and_no_path(file: Path) -> None:
    text = file.read_text()
    assert json.loads(text)["schema"] == 1
    assert os.uname().nodename not in text
    assert not re.search(r'"[^"]*(/home|/root|/tmp|/usr|/work)', text)


def test_pictures_are_drawn_from_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = load(BENCH / "plot.py")
    drawn = 0
    for file in RESULTS:
        result = json.loads(file.read_text())
        kinds = {"fivedp.bench": ("share", "bytes", "ranks"), "fivedp.bench.peers": ("peers",)}.get(result["kind"], ())
        for kind in kinds:
            figure = plot.KINDS[kind]([result])
            figure.savefig(tmp_path / "x.svg")
            assert (tmp_path / "x.svg").stat().st_size > 1000
            drawn += 1
    assert drawn or not RESULTS


def test_entries_of_a_contest_take_turns_and_are_checked(peers: Any) -> None:
    one, two = peers.Entry("numpy", 1, 1, wanted=0.1), peers.Entry("numpy", 1, 2, wanted=0.1)
    arena = peers.Arena(rounds=3)
    try:
        record = arena.hold(peers.Contest("two", 65, 70, 75, "float32", (one, two)), seed=5)
        (ours, theirs) = record["entries"]
        assert len(ours["samples"]) == len(theirs["samples"]) == 3
        assert theirs["spread"][0] <= theirs["ratio"] <= theirs["spread"][1]
        assert record["missing"] == record["wrong"] == {}
        lines = "\n".join(peers.table(record))
        assert "wanted 0.10: reached" in lines or "SHORT" in lines
    finally:
        arena.close()


def test_a_wrong_peer_is_named_and_not_timed(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver expects the product of other inputs, as it would after a peer's mistake."""
    right = peers._expected
    monkeypatch.setattr(peers, "_expected", lambda contest, seed: right(contest, seed + 2))
    arena = peers.Arena(rounds=1)
    try:
        record = arena.hold(peers.Contest("one", 40, 50, 60, "float64", (peers.Entry("numpy", 1, 1),)), seed=5)
    finally:
        arena.close()
    assert record["entries"] == []
    assert "Freivalds" in record["wrong"]["numpy 1x1"]


def test_a_missing_program_is_named_with_its_installation(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = sys.modules["programs"]
    absent = programs.Program("heat_matmul.py", "mpirun", "no_such_module_anywhere", "pip install something")
    monkeypatch.setitem(programs.PROGRAMS, "heat", absent)
    arena = peers.Arena(rounds=1)
    record = arena.hold(peers.Contest("none", 8, 8, 8, "float32", (peers.Entry("heat", 2, 1),)), seed=5)
    arena.close()
    assert "pip install something" in record["missing"]["heat 2x1"]


def test_every_suite_puts_fivedp_first_and_gives_all_the_same_cores(peers: Any) -> None:
    suites = load(BENCH / "peers" / "suites.py")
    for name in suites.NAMES:
        for contest in suites.suite(name, 2, 64):
            first, *others = contest.entries
            assert first.program == "fivedp"
            assert others
            crowded = name in ("crowded", "acceptance") and "ranks on" in contest.title
            cores = {e.ranks * e.threads for e in contest.entries}
            assert len(cores) == 1 or crowded, contest.title


def test_programs_start_without_what_misleads_a_blas(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_DEBUG_CPU_TYPE", "NVPL_BLAS_DEBUG_CPU_TYPE"):
        monkeypatch.setenv(name, "1")
    env = sys.modules["programs"].environment(3)
    assert not [n for n in env if n.startswith("NVPL_") or n in sys.modules["programs"].MISLEADING]
    assert env["OPENBLAS_NUM_THREADS"] == env["OMP_NUM_THREADS"] == "3"
