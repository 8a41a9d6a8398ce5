"""Results survive being written, and the table says what is wrong, in colour only where colour is wanted."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from fivedp.bench import report
from fivedp.bench.cases import FAMILIES

MACHINE = {
    "fivedp": "0", "revision": None, "python": "3", "numpy": "2", "system": "Linux", "isa": "avx2", "gpu": [],
    "cpu": {"model": "a core", "flags": ["fma"], "cores": 2},
    "blas": [{"library": "openblas", "version": "0.3", "core": "Zen", "threads": 1}],
    "mpi": {"name": "MPICH", "version": "5.0", "standard": "4.1", "transport": "shm"},
    "ranks": 2, "threads": 1, "cores": 2, "nodes": 1, "load": 0.1, "removed_variables": [],
}  # fmt: skip
CEILING = {"flops": {"float32": {"one_core": 1e11, "all": 2e11}}, "copy": 1e10,
           "pingpong": {"bandwidth": 5e9, "latency": 1e-6}}  # fmt: skip


def a_row(**changes: Any) -> report.Row:
    row: report.Row = {
        "kernel": "gemm", "label": "square", "strategy": "row", "known_as": "row parallel",
        "spec": "m k/tp, k/tp n -> m n", "shape": "64x64x64", "sizes": {"m": 64, "n": 64, "k": 64}, "dtype": "float32",
        "ranks": 2, "backward": False, "scaled_by": 1.0, "order": "tree", "wrong": "", "mesh": "tp=2",
        "schedule": "k/tp: C",
        "bytes": {"counted": 32768, "planned": 32768, "bound": 32768}, "memory": {"peak": 4096, "panels": 0},
        "seconds": 1e-3, "samples": [1e-3, 2e-3], "flops": 524288, "gflops": 0.52, "share_of_peak": 0.01, "error": 1e-7,
        "honest_error": 1e-7, "freivalds": 0.1, "same_bits": True, "repeatable": True,
    }  # fmt: skip
    return row | changes


def a_result(*rows: report.Row) -> report.Result:
    return report.new(MACHINE, CEILING, 7, "2026-01-01") | {"rows": list(rows)}


def test_json_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    result = a_result(a_row(), a_row(skipped="needs 4 ranks"))
    report.write_json(result, tmp_path / "r.json")
    assert report.read_json(tmp_path / "r.json") == result


def test_an_error_that_is_not_a_number_is_written_as_null(tmp_path: Path) -> None:
    report.write_json(a_result(a_row(error=float("nan"), samples=[float("inf")])), tmp_path / "r.json")
    row = report.read_json(tmp_path / "r.json")["rows"][0]
    assert row["error"] is None
    assert row["samples"] == [None]


@pytest.mark.parametrize("text", ['{"schema": 0}', "{}", "[1]"])
def test_a_file_of_another_schema_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(ValueError, match=r"old\.json: schema is"):
        report.read_json(tmp_path / "old.json")


def test_csv_holds_every_field_of_every_row(tmp_path: Path) -> None:
    result = a_result(a_row(), {"kernel": "gemm", "skipped": "no ranks, no row"})
    report.write_csv(result, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        lines = list(csv.DictReader(file))
    for row, line in zip(result["rows"], lines, strict=True):
        flat = report.flatten(row)
        assert {name: line[name] for name in flat} == {name: str(value) for name, value in flat.items()}
    assert lines[0]["bytes.counted"] == "32768"
    assert lines[0]["samples"] == "0.001 0.002"
    assert lines[1]["seconds"] == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LAUNCHERS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")


def test_colour_and_progress_appear_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    assert "\x1b[" in report.Paint(terminal).red("x")
    progress = report.Progress(3, terminal)
    progress.step("one")
    assert "1/3 one" in terminal.getvalue()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_terminal_that_a_launcher_made_is_none(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    """The parent of this test is no launcher with a terminal of that number, and a StringIO has no number at all."""
    monkeypatch.setenv(launcher, "0")
    assert not report.on_terminal(Terminal())


def test_no_color_is_honoured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert report.Paint(Terminal()).red("x") == "x"


def test_a_file_gets_neither_colour_nor_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = io.StringIO()
    assert report.Paint(file).bold("x") == "x"
    progress = report.Progress(3, file)
    progress.step("one")
    progress.clear()
    assert file.getvalue() == ""


def test_a_wrong_row_is_marked_and_counted() -> None:
    result = a_result(a_row(), a_row(wrong="error 1 exceeds 0"))
    assert report.wrong(result) == [result["rows"][1]]
    text = "\n".join(report.row_lines(result["rows"][1], report.Paint(io.StringIO())))
    assert "WRONG: error 1 exceeds 0" in text
    assert report.summary(result) == "2 measured, 0 not run, 1 WRONG"
    assert report.summary(a_result(a_row())) == "1 measured, 0 not run, all right"


def test_a_busy_machine_and_a_ceiling_that_is_none_are_said() -> None:
    result = a_result(a_row(share_of_peak=1.2))
    assert "busier" in report.summary(result)
    assert "busier" not in report.summary(a_result(a_row(share_of_peak=0.99)))
    assert not [line for line in report.heading(result) if line.startswith("load")]
    result["machine"] = {**MACHINE, "load": 7.5}
    assert [line for line in report.heading(result) if line.startswith("load      7.5")]


def test_table_fits_a_hundred_and_twenty_columns() -> None:
    paint = report.Paint(io.StringIO())
    rows = [
        a_row(label="mixtral-8x7b-attention-output", shape="4x131072x131072x131072", seconds=1234.5, gflops=123456.7,
              schedule="m/r*c n/d k/tp: ABC", bytes={"counted": 123456789012, "planned": 1, "bound": 1}),
        a_row(skipped="2.5-D needs an even number of ranks for its 2 layers; 3 were started"),
    ]  # fmt: skip
    lines = [
        report.column_line(FAMILIES["gemm"].table),
        *report.heading(a_result()),
        *(x for row in rows for x in report.row_lines(row, paint)),
    ]
    assert max(map(len, lines)) <= 120


def test_bytes_that_are_not_the_least_are_shown_beside_the_least() -> None:
    paint = report.Paint(io.StringIO())
    equal = report.row_lines(a_row(), paint)[0]
    assert " = " in equal
    more = report.row_lines(a_row(bytes={"counted": 65536, "planned": 65536, "bound": 32768}), paint)[0]
    assert " = " not in more
    assert "32.8 kB" in more  # counted: 65536 bytes of 2 ranks
    assert "16.4 kB" in more


@pytest.mark.parametrize(
    ("value", "text"), [(2.5e-6, "2.50 us"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (3.0, "3.00 s"), (250.0, "250 s")]
)
def test_seconds_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert report.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (32768, "32.8 kB"), (1.25e6, "1.25 MB")])
def test_sizes_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert report.size(value) == text
