"""Results as a table for people, JSON for machines and CSV for spreadsheets.

A result is a plain dictionary that JSON can say, so what is written is what was measured and a file read back is the
result itself. The tables (each kernel has its own, see `family.py`) keep to 120 columns; colour and progress appear on
a terminal only, and colour never where NO_COLOR is set.
"""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from fivedp.bench.family import Column, Row, Table

SCHEMA = 1
SHORT_TYPES = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16", "complex64": "c64",
               "complex128": "c128"}  # fmt: skip
Result = dict[str, Any]


def new(machine: Mapping[str, Any], ceiling: Mapping[str, Any], seed: int, when: str) -> Result:
    """A result without rows. `when` is the date, `seed` what the inputs were drawn from."""
    return {
        "schema": SCHEMA,
        "kind": "fivedp.bench",
        "when": when,
        "seed": seed,
        "machine": dict(machine),
        "ceiling": dict(ceiling),
        "rows": [],
    }


def write_json(result: Result, file: str | Path) -> None:
    """Write `result`; numbers that JSON cannot say (an error of nan) become null."""
    text = json.dumps(_sayable(result), indent=1, allow_nan=False)
    Path(file).write_text(text + "\n")


def read_json(file: str | Path) -> Result:
    """Read a result back.

    Raises
    ------
    ValueError
        Where the file is no result, or one of a schema this version does not know.
    """
    result = json.loads(Path(file).read_text())
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        found = result.get("schema") if isinstance(result, dict) else type(result).__name__
        raise ValueError(f"{Path(file).name}: schema is {found}, this version reads schema {SCHEMA}")
    return result


def write_csv(result: Result, file: str | Path) -> None:
    """Write one line per row; nested fields are named with dots (`bytes.counted`)."""
    lines = [flatten(row) for row in result["rows"]]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with Path(file).open("w", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(lines)


def flatten(row: Mapping[str, Any], prefix: str = "") -> Row:
    """`{"bytes": {"counted": 1}}` as `{"bytes.counted": 1}`; a list becomes words."""
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def _sayable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _sayable(x) for name, x in value.items()}
    return [_sayable(x) for x in value] if isinstance(value, (list, tuple)) else value


def wrong(result: Result) -> list[Row]:
    """The rows whose result, or whose count of bytes, is wrong."""
    return [row for row in result["rows"] if row.get("wrong")]


def on_terminal(stream: TextIO) -> bool:
    """Whether somebody watches `stream`.

    Open MPI gives every rank a terminal of its own, also where mpirun's output goes to a file, so under a launcher the
    launcher is asked: its stream of the same number must be a terminal.
    """
    if not stream.isatty():
        return False
    if not any(name in os.environ for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")):
        return True
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/{stream.fileno()}").startswith(("/dev/pts/", "/dev/tty"))
    except (OSError, ValueError):
        return False


class Paint:
    """Bold, red and dim where the stream is a terminal and NO_COLOR is not set; plain text elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self.terminal = on_terminal(stream)
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def _wrap(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text

    def bold(self, text: str) -> str:
        """For headings."""
        return self._wrap("1", text)

    def red(self, text: str) -> str:
        """For what is wrong."""
        return self._wrap("1;31", text)

    def dim(self, text: str) -> str:
        """For units and notes."""
        return self._wrap("2", text)


def seconds(value: float) -> str:
    """`12.3 ms`."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{_three(value * factor)} {unit}"
    return f"{_three(value)} s"


def size(value: float) -> str:
    """`1.25 MB`, by powers of 1000."""
    for limit, unit in ((1e3, "B"), (1e6, "kB"), (1e9, "MB"), (1e12, "GB")):
        if value < limit:
            return f"{value / limit * 1e3:.0f} B" if unit == "B" else f"{_three(value / limit * 1e3)} {unit}"
    return f"{_three(value / 1e12)} TB"


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def short(dtype: str) -> str:
    """`f32` for `float32`."""
    return SHORT_TYPES.get(dtype, dtype)


def heading(result: Result) -> list[str]:
    """The lines above the table: ranks, machine, libraries, ceiling."""
    machine, ceiling = result["machine"], result["ceiling"]
    libraries = ", ".join(f"{b['library']} {b['version'] or '?'} ({b['core']})" for b in machine["blas"])
    across = f"{_plural(machine['cores'], 'core')}, {_plural(machine['nodes'], 'node')}"
    mpi = f"{machine['mpi']['name']} {machine['mpi']['version']} ({machine['mpi']['transport']})"
    lines = [
        f"ranks     {machine['ranks']} x {_plural(machine['threads'], 'thread')} on {across}   seed {result['seed']}",
        f"machine   {machine['cpu']['model']}, {machine['isa']}   MPI {mpi}",
        f"libraries fivedp {machine['fivedp'] or '-'} ({machine['revision'] or 'no revision'})   "
        f"NumPy {machine['numpy']}, {libraries or 'no BLAS found'}",
    ]
    if machine["removed_variables"]:
        lines.append(f"removed   {', '.join(machine['removed_variables'])} (would have falsified a baseline)")
    if (machine["load"] or 0) > 0.5 * machine["cores"]:
        lines.append(f"load      {machine['load']} before the start: other programs run here, so rates mean little")
    flops = "   ".join(
        f"{short(name)} {rate['all'] / 1e9:.0f} GFLOP/s ({rate['one_core'] / 1e9:.0f} a core)"
        for name, rate in ceiling["flops"].items()
    )
    lines.append(f"ceiling   {flops}")
    if links := ceiling.get("pingpong"):
        lines.append(
            f"          copy {ceiling['copy'] / 1e9:.1f} GB/s   "
            f"MPI {links['bandwidth'] / 1e9:.1f} GB/s, {seconds(links['latency'])}"
        )
    else:
        lines.append(f"          copy {ceiling['copy'] / 1e9:.1f} GB/s")
    return lines


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# Columns and cells that every kernel's table has.
RATE_COLUMNS = (Column("time", 8), Column("GFLOP/s", 7), Column("of peak", 7))


def rate_cells(row: Row) -> tuple[str, str, str]:
    """Time, rate and share of the ceiling."""
    return seconds(row["seconds"]), f"{row['gflops']:.1f}", f"{100 * row['share_of_peak']:.0f}%"


def bytes_cells(row: Row) -> tuple[str, str]:
    """Bytes that a rank sends on average, and the least; `=` where counted, planned and least are equal."""
    moved, ranks = row["bytes"], row["ranks"]
    equal = moved["counted"] == moved["planned"] == moved["bound"]
    return size(moved["counted"] / ranks), "=" if equal else size(moved["bound"] / ranks)


def error_cell(error: float | None) -> str:
    """A relative error; a result read from a file says None for one that is not a number."""
    return f"{error:.1e}" if error is not None else "nan"


def memory_cell(peak: int | None) -> str:
    """A peak of memory, unknown where the system does not tell it."""
    return "?" if peak is None else size(peak)


def table_of(row: Row) -> Table:
    """The table that a row belongs to."""
    from fivedp.bench.cases import FAMILIES  # they are written with the cells above

    return FAMILIES[row["kernel"]].table


def column_line(table: Table) -> str:
    """The names of the columns, aligned as the rows are."""
    return "  " + _align(table, [column.name for column in table.columns])


def _align(table: Table, cells: Iterable[str]) -> str:
    fields = zip(cells, table.columns, strict=True)
    return " ".join(x[: c.width].ljust(c.width) if c.left else x.rjust(c.width) for x, c in fields).rstrip()


def row_lines(row: Row, paint: Paint) -> list[str]:
    """One row of the table, and the lines below it that say what is wrong or worth knowing."""
    table = table_of(row)
    name, width = table.name(row), table.columns[0].width
    if row.get("skipped"):
        return [paint.dim(f"  {name:{width}} {short(row['dtype']):4} not run: {row['skipped']}")]
    *head, name = [name] if len(name) <= width else name.rsplit(" ", 1)
    lines = [*(f"  {line}" for line in head), "  " + _align(table, (name, short(row["dtype"]), *table.cells(row)))]
    notes = table.notes(row)
    if row.get("reference"):
        reference = row["reference"]
        notes.append(
            f"{reference['ratio']:.2f}x the speed of {reference['name']} "
            f"({reference['spread'][0]:.2f}-{reference['spread'][1]:.2f}), one process with as many threads as cores"
        )
    if notes:
        lines.append(paint.dim(f"    {'; '.join(notes)}"))
    if row["wrong"]:
        lines[-1 - bool(notes)] = paint.red(lines[-1 - bool(notes)])
        lines.append(paint.red(f"    WRONG: {row['wrong']}"))
    return lines


def summary(result: Result) -> str:
    """The last line: how many rows, how many wrong, and whether the ceiling was none."""
    rows, bad = result["rows"], wrong(result)
    skipped = sum(bool(row.get("skipped")) for row in rows)
    text = f"{len(rows) - skipped} measured, {skipped} not run, "
    text += f"{len(bad)} WRONG" if bad else "all right"
    if any(row.get("share_of_peak", 0) > 1 for row in rows):
        text += "; shares above 100%: the ceiling was measured while the machine was busier than later"
    return text


class Progress:
    """A line that says which case runs, on a terminal only, gone when the row is printed."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.total, self.done = total, 0
        self.shown = on_terminal(self.stream)

    def step(self, text: str) -> None:
        """Name the case that starts now."""
        self.done += 1
        if self.shown:
            bar = "#" * (20 * self.done // max(1, self.total))
            self.stream.write(f"\r\x1b[K[{bar:20}] {self.done}/{self.total} {text[:60]}")
            self.stream.flush()

    def clear(self) -> None:
        """Remove the line."""
        if self.shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
