"""Contests: one piece of work, several programs, run in turn.

A contest names the work and its entries; the first is ours. In each round every entry runs once, the order turning from
round to round, so a slow moment of the machine meets all of them. The ratio of a round is the time of the other over
ours: above 1 we are faster. A result is held against float64 before its time counts.
"""

from __future__ import annotations

import re
import statistics
import sys
from dataclasses import dataclass, field
from typing import Any, Protocol

from programs import Missing, Running

SIGMAS = 16.0  # of a plain computation's error: a peer may add in another order, but not be wrong
PATHS = re.compile(r"(?:/[\w.+-]+){2,}")


class Work(Protocol):
    """What all entries of a contest do: a `Product`, an `Attention` or a `Mixture`."""

    @property
    def dtype(self) -> str:
        """The type of the inputs."""

    @property
    def flops(self) -> float:
        """Operations, counted the usual way."""

    @property
    def shape(self) -> str:
        """Its sizes in a word."""

    @property
    def sizes(self) -> dict[str, Any]:
        """What a worker must know to do it, but for the type and the seed."""

    def verify(self, program: Running, seed: int) -> dict[str, Any]:
        """Hold what the program has computed against float64; what is worth recording of it.

        Raises
        ------
        WrongResult
            Where they differ by more than rounding explains.
        """


@dataclass(frozen=True)
class Entry:
    """A program with its ranks, threads and layout (`way`); `wanted` is the least ratio we aim for against it.

    `work` is given where it is another than that of the contest: what we do beside what we do.
    """

    program: str
    ranks: int
    threads: int
    way: str = ""
    wanted: float | None = None
    keywords: tuple[tuple[str, Any], ...] = ()
    work: Work | None = None

    @property
    def text(self) -> str:
        """`dtensor 2x1 row`."""
        extra = " ".join(f"{k}={v}" for k, v in self.keywords)
        other = "" if self.work is None else self.work.shape
        return " ".join(filter(None, [self.program, f"{self.ranks}x{self.threads}", self.way, extra, other]))


@dataclass(frozen=True)
class Contest:
    """A piece of work and its entries, ours first."""

    title: str
    work: Work
    entries: tuple[Entry, ...]
    inner: int = 1

    def case(self, entry: Entry, seed: int) -> dict[str, Any]:
        """What the program of `entry` is told to prepare."""
        work = entry.work or self.work
        return {**work.sizes, "dtype": work.dtype, "seed": seed, "way": entry.way, "keywords": dict(entry.keywords)}


class WrongResult(Exception):
    """What an entry computed is not the result."""


@dataclass
class Arena:
    """The started programs; each is started once and sleeps between its turns."""

    rounds: int = 7
    running: dict[tuple[str, int, int], Running] = field(default_factory=dict)
    missing: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def program(self, entry: Entry) -> Running:
        """The running program of `entry`.

        Raises
        ------
        Missing
            Where it cannot be started; found out once.
        """
        key = (entry.program, entry.ranks, entry.threads)
        if key in self.missing:
            raise Missing(self.missing[key])
        if key not in self.running:
            try:
                self.running[key] = Running(*key)
            except Missing as why:
                self.missing[key] = str(why)
                raise
        return self.running[key]

    def hold(self, contest: Contest, seed: int) -> dict[str, Any]:
        """Run `contest` and return its record: samples, ratios, what could not run."""
        ready: list[tuple[Entry, Running]] = []
        found: list[dict[str, Any]] = []
        work = contest.work
        record: dict[str, Any] = {
            "title": contest.title, "shape": work.shape, "sizes": work.sizes, "dtype": work.dtype, "seed": seed,
            "entries": [], "missing": {}, "wrong": {},
        }  # fmt: skip
        for entry in contest.entries:
            try:
                program = self.program(entry)
                program.order(do="prepare", case=contest.case(entry, seed))
                found.append((entry.work or work).verify(program, seed))
                ready.append((entry, program))
            except Missing as why:
                record["missing"][entry.text] = PATHS.sub("<path>", str(why))  # a result names no path
                if not self._alive(entry):
                    self.drop(entry)
            except WrongResult as why:
                record["wrong"][entry.text] = str(why)
        same = len({id(program) for _, program in ready}) != len(ready)
        times: list[list[float]] = [[] for _ in ready]
        for turn in range(self.rounds):
            order = list(range(len(ready)))
            for i in order[turn % len(order) :] + order[: turn % len(order)] if order else []:
                entry, program = ready[i]
                if same:  # one program does two things: its inputs change between the turns, outside the timer
                    program.order(do="prepare", case=contest.case(entry, seed))
                times[i] += program.seconds(1, contest.inner)
        for (entry, program), seconds, checked in zip(ready, times, found, strict=True):
            flops = (entry.work or work).flops
            line: dict[str, Any] = {
                "entry": entry.text, "program": entry.program, "ranks": entry.ranks, "threads": entry.threads,
                "way": entry.way, "seconds": statistics.median(seconds), "samples": seconds,
                "gflops": flops / statistics.median(seconds) / 1e9, "facts": program.order(do="facts")[0], **checked,
            }  # fmt: skip
            if ready[0][0] is contest.entries[0] and entry is not contest.entries[0]:
                ratios = sorted(theirs / ours for theirs, ours in zip(seconds, times[0], strict=True))
                line |= {"ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]], "wanted": entry.wanted}
                line["needs"] = needs(line, record["entries"][0], work)
            record["entries"].append(line)
        return record

    def _alive(self, entry: Entry) -> bool:
        running = self.running.get((entry.program, entry.ranks, entry.threads))
        return running is None or running.process.poll() is None

    def drop(self, entry: Entry) -> None:
        """Forget a program that ended."""
        self.running.pop((entry.program, entry.ranks, entry.threads)).stop()

    def close(self) -> None:
        """End every program."""
        for running in self.running.values():
            running.stop()
        self.running.clear()


def needs(line: dict[str, Any], ours: dict[str, Any], work: Work) -> float | None:
    """The share of the peak that its aim asks for; None where none is known.

    The peak is that of sums in registers on all our ranks and threads, with our instruction set: beyond 1 we can't go.
    """
    peak = ours["facts"].get("peak", {}).get(work.dtype)
    if line["wanted"] is None or peak is None or not work.flops:
        return None
    return float(line["wanted"] * work.flops / line["seconds"] / peak)


def table(record: dict[str, Any]) -> list[str]:
    """The lines of a contest: entry, rate, ratio with spread, and the aim."""
    lines = [f"{record['title']}   {record['shape']} {record['dtype']}"]
    for line in record["entries"]:
        text = f"  {line['entry']:38} {1e3 * line['seconds']:9.2f} ms {line['gflops']:8.1f} GFLOP/s"
        if "ratio" in line:
            low, high = line["spread"]
            aim = line["wanted"]
            verdict = "" if aim is None else f"  wanted {aim:.2f}: {'reached' if line['ratio'] >= aim else 'SHORT'}"
            if line.get("needs") is not None:
                verdict += f" ({100 * line['needs']:.0f}% of the peak)"
            text += f"  ours is {line['ratio']:.2f}x ({low:.2f}-{high:.2f}){verdict}"
        lines.append(text)
    lines += [f"  {name}: not run, {why}" for name, why in record["missing"].items()]
    lines += [f"  {name}: WRONG RESULT, {why}" for name, why in record["wrong"].items()]
    return lines


def say(lines: list[str]) -> None:
    """Print at once, so that a long suite is readable while it runs."""
    print("\n".join(lines), flush=True)
    sys.stdout.flush()
