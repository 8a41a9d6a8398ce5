"""Contests: one product, several programs, run in turn.

A contest names a shape, a type and its entries; the first is ours. In each round every entry runs once, the order
turning from round to round, so a slow moment of the machine meets all of them. The ratio of a round is the time of the
other over ours: above 1 we are faster. A result is checked by Freivalds in float64 before its time counts.
"""

from __future__ import annotations

import re
import statistics
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from programs import Missing, Running
from worker import operands, signs

SIGMAS = 16.0
PATHS = re.compile(r"(?:/[\w.+-]+){2,}")


@dataclass(frozen=True)
class Entry:
    """A program with its ranks, threads and layout (`way`); `wanted` is the least ratio we aim for against it."""

    program: str
    ranks: int
    threads: int
    way: str = ""
    wanted: float | None = None
    keywords: tuple[tuple[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """`dtensor 2x1 row`."""
        extra = " ".join(f"{k}={v}" for k, v in self.keywords)
        return " ".join(filter(None, [self.program, f"{self.ranks}x{self.threads}", self.way, extra]))


@dataclass(frozen=True)
class Contest:
    """A product and its entries, ours first."""

    title: str
    m: int
    n: int
    k: int
    dtype: str
    entries: tuple[Entry, ...]
    inner: int = 1

    @property
    def flops(self) -> int:
        """2 m n k."""
        return 2 * self.m * self.n * self.k


class WrongResult(Exception):
    """An entry's product is not the product."""


@dataclass
class Arena:
    """The started programs; each is started once and sleeps between its turns."""

    rounds: int = 7
    running: dict[tuple[str, int, int], Running] = field(default_factory=dict)
    missing: dict[tuple[str, int, int], str] = field(default_factory=dict)
    expected: dict[tuple[Any, ...], Any] = field(default_factory=dict)

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
        record: dict[str, Any] = {
            "title": contest.title, "sizes": {"m": contest.m, "n": contest.n, "k": contest.k}, "dtype": contest.dtype,
            "seed": seed, "entries": [], "missing": {}, "wrong": {},
        }  # fmt: skip
        for entry in contest.entries:
            case = {"m": contest.m, "n": contest.n, "k": contest.k, "dtype": contest.dtype, "seed": seed,
                    "way": entry.way, "keywords": dict(entry.keywords)}  # fmt: skip
            try:
                program = self.program(entry)
                if not any(program is other for _, other in ready):
                    program.order(do="prepare", case=case)
                    self.check(contest, seed, program)
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
                if same:  # one program in two layouts: its inputs change between the turns, outside the timer
                    program.order(do="prepare", case={**_case(contest, seed), "way": entry.way,
                                                      "keywords": dict(entry.keywords)})  # fmt: skip
                times[i] += program.seconds(1, contest.inner)
        for (entry, program), seconds in zip(ready, times, strict=True):
            line: dict[str, Any] = {
                "entry": entry.text, "program": entry.program, "ranks": entry.ranks, "threads": entry.threads,
                "way": entry.way, "seconds": statistics.median(seconds), "samples": seconds,
                "gflops": contest.flops / statistics.median(seconds) / 1e9, "facts": program.order(do="facts")[0],
            }  # fmt: skip
            if ready[0][0] is contest.entries[0] and entry is not contest.entries[0]:
                ratios = sorted(theirs / ours for theirs, ours in zip(seconds, times[0], strict=True))
                line |= {"ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]], "wanted": entry.wanted}
            record["entries"].append(line)
        return record

    def _alive(self, entry: Entry) -> bool:
        running = self.running.get((entry.program, entry.ranks, entry.threads))
        return running is None or running.process.poll() is None

    def drop(self, entry: Entry) -> None:
        """Forget a program that ended."""
        self.running.pop((entry.program, entry.ranks, entry.threads)).stop()

    def check(self, contest: Contest, seed: int, program: Running) -> None:
        """Hold the program's C times a vector of signs against A (B x) in float64.

        Raises
        ------
        WrongResult
            Where they differ by more than rounding explains.
        """
        key = (contest.m, contest.n, contest.k, contest.dtype, seed)
        if key not in self.expected:
            self.expected = {key: _expected(contest, seed)}
        want, allowed = self.expected[key]
        got = np.zeros(contest.m)
        for part in program.order(do="check", seed=seed, n=contest.n):
            got[part["rows"]] += part["values"]
        worst = float(np.abs(got - want).max())
        if not worst <= allowed:
            raise WrongResult(f"Freivalds residual {worst:.3g}, rounding explains {allowed:.3g}")

    def close(self) -> None:
        """End every program."""
        for running in self.running.values():
            running.stop()
        self.running.clear()


def _case(contest: Contest, seed: int) -> dict[str, Any]:
    return {"m": contest.m, "n": contest.n, "k": contest.k, "dtype": contest.dtype, "seed": seed}


def _expected(contest: Contest, seed: int) -> tuple[Any, float]:
    """A (B x) and the residual that rounding explains, from the error of a sample multiplied in the same type."""
    dtype = operands.dtype_of(contest.dtype)
    x = signs(seed, contest.n)
    m, n, k = contest.m, contest.n, contest.k
    y = np.concatenate([operands.block(seed + 1, range(i, min(k, i + 512)), range(n), dtype).astype(np.float64) @ x
                        for i in range(0, k, 512)])  # fmt: skip
    z = np.concatenate([operands.block(seed, range(i, min(m, i + 512)), range(k), dtype).astype(np.float64) @ y
                        for i in range(0, m, 512)])  # fmt: skip
    a = operands.block(seed, range(min(m, 48)), range(k), dtype)
    b = operands.block(seed + 1, range(k), range(min(n, 192)), dtype)
    wide = operands.accumulator_of(dtype)
    error = (a.astype(wide) @ b.astype(wide)).astype(dtype).astype(np.float64) - a.astype(np.float64) @ b.astype(
        np.float64
    )
    own = np.finfo(np.float64).eps * np.sqrt(n * k) * np.sqrt(k)
    return z, float(SIGMAS * (np.sqrt(np.square(error).mean() * n) + own))


def table(record: dict[str, Any]) -> list[str]:
    """The lines of a contest: entry, rate, ratio with spread, and the aim."""
    sizes = record["sizes"]
    lines = [f"{record['title']}   {sizes['m']}x{sizes['n']}x{sizes['k']} {record['dtype']}"]
    for line in record["entries"]:
        text = f"  {line['entry']:38} {1e3 * line['seconds']:9.2f} ms {line['gflops']:8.1f} GFLOP/s"
        if "ratio" in line:
            low, high = line["spread"]
            aim = line["wanted"]
            verdict = "" if aim is None else f"  wanted {aim:.2f}: {'reached' if line['ratio'] >= aim else 'SHORT'}"
            text += f"  ours is {line['ratio']:.2f}x ({low:.2f}-{high:.2f}){verdict}"
        lines.append(text)
    lines += [f"  {name}: not run, {why}" for name, why in record["missing"].items()]
    lines += [f"  {name}: WRONG RESULT, {why}" for name, why in record["wrong"].items()]
    return lines


def say(lines: list[str]) -> None:
    """Print at once, so that a long suite is readable while it runs."""
    print("\n".join(lines), flush=True)
    sys.stdout.flush()
