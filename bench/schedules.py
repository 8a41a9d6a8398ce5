"""Is the schedule that the planner chooses the fastest one, and how much does choosing gain?

    mpirun -np 8 python bench/schedules.py regret --json F     drawn cases: the chosen schedule against all others
    mpirun -np 8 python bench/schedules.py decode --json F     LLaMA-3 layers, 1 to 32 tokens, against textbook SUMMA

`regret` draws a spec, sizes and a type, runs every candidate once, and alternates the chosen one with the three that
looked fastest. `decode` forces SUMMA with C in place (both inputs travel, as ScaLAPACK's and pylops-mpi's products do)
on the same near-square grid and the same shares: once as a schedule of fivedp's own, which on one node reads shares of
others in place and copies nothing, and once as textbooks have it, with broadcasts. The result of every one is checked
before its time counts.
"""

from __future__ import annotations

import abc
import argparse
import bisect
import datetime
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fivedp.bench.environment import settle

settle()

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from fivedp.bench import agree, environment, measure, operands  # noqa: E402
from fivedp.bench.cases import gemm as cases  # noqa: E402
from fivedp.bench.check import product as check_product  # noqa: E402
from fivedp.bench.pieces import matrix, span  # noqa: E402
from fivedp.bench.trials import gemm as products  # noqa: E402
from fivedp.comm.grid import grid_of, resolve_axes  # noqa: E402
from fivedp.kernels import gemm  # noqa: E402
from fivedp.layout.plan import Plan  # noqa: E402
from fivedp.layout.spec import parse_product  # noqa: E402
from fivedp.ops.execution import Execution  # noqa: E402

COMM = MPI.COMM_WORLD
FINALISTS = 3
MOST_CANDIDATES = 40  # grids of three axes have hundreds; the cheapest in bytes are tried


class Contestant(abc.ABC):
    """A way to compute a product."""

    def __init__(self, product: products.Product) -> None:
        self.product = product

    @abc.abstractmethod
    def run(self) -> None:
        """Multiply."""

    def seconds(self) -> float:
        """Time of one run: that of the slowest rank."""
        COMM.Barrier()
        start = time.perf_counter()
        self.run()
        return agree.largest(COMM, time.perf_counter() - start)[0]

    def right(self, seed: int) -> bool:
        """Whether the product is right."""
        x = self.product
        x.c.fill(np.nan)
        self.run()
        result = matrix(x.c, x.where)
        return not check_product(COMM, x.matrix_a, x.matrix_b, result, seed, x.case.k).wrong


class Scheduled(Contestant):
    """One schedule, made ready once, as the library makes it ready once and keeps it."""

    def __init__(self, product: products.Product, plan: Plan) -> None:
        super().__init__(product)
        grid = grid_of(product.grid.mesh)
        axes = resolve_axes(grid.names, parse_product(product.case.strategy.spec).axes)
        self.execution, self.plan = Execution(plan, grid.group(axes)), plan
        self.wire = operands.accumulator_of(product.c.dtype)

    def run(self) -> None:
        """Multiply."""
        x = self.product
        self.execution.run(x.a, x.b, x.c, 1.0, 0.0, self.wire, np, "ran a schedule")


class Broadcasts(Contestant):
    """SUMMA of van de Geijn and Watts (1997) on r x c ranks, C in place.

    Panels of A are broadcast along the rows of the grid, panels of B along its columns, by MPI_Bcast. k is cut where
    the shares of A or of B are. The local products are fivedp's.
    """

    def __init__(self, product: products.Product, along_row: MPI.Intracomm, along_column: MPI.Intracomm) -> None:
        super().__init__(product)
        self.along_row, self.along_column = along_row, along_column
        grid, k = product.grid, product.case.k
        cuts = {name: [span(k, grid.shape[name], part).start for part in range(grid.shape[name])] for name in "rc"}
        borders = sorted({*cuts["r"], *cuts["c"], k})
        self.panels = []
        for begin, end in itertools.pairwise(borders):
            of_a, of_b = (bisect.bisect_right(cuts[name], begin) - 1 for name in "cr")
            in_a, in_b = (slice(begin - cut, end - cut) for cut in (cuts["c"][of_a], cuts["r"][of_b]))
            self.panels.append((end - begin, of_a, in_a, of_b, in_b))

    def run(self) -> None:
        """Multiply."""
        x = self.product
        rows, columns = x.c.shape
        for number, (depth, of_a, in_a, of_b, in_b) in enumerate(self.panels):
            mine_a, mine_b = of_a == self.along_row.rank, of_b == self.along_column.rank
            a = np.ascontiguousarray(x.a[:, in_a]) if mine_a else np.empty((rows, depth), x.a.dtype)
            b = x.b[in_b] if mine_b else np.empty((depth, columns), x.b.dtype)
            self.along_row.Bcast(a, of_a)
            self.along_column.Bcast(b, of_b)
            gemm.gemm(a, b, x.c, beta=float(number > 0))


def alternate(one: Contestant, others: Sequence[Contestant], rounds: int) -> list[list[float]]:
    """Per other, the ratios of its time over that of `one`, from rounds in which all run."""
    ratios: list[list[float]] = [[] for _ in others]
    for turn in range(rounds):
        if turn % 2:
            times = [other.seconds() for other in others]
            own = one.seconds()
        else:
            own = one.seconds()
            times = [other.seconds() for other in others]
        for found, taken in zip(ratios, times, strict=True):
            found.append(taken / own)
    return ratios


def drawn(draw: np.random.Generator, ranks: int) -> cases.Case:
    """A spec, a type and sizes of 1e7 to 2e9 operations, from thin to square."""
    while True:
        strategy = cases.STRATEGIES[int(draw.integers(len(cases.STRATEGIES)))]
        if strategy.batched or (len(strategy.axes) == 3 and ranks % 2):
            continue
        m, n, k = (round(2 ** float(draw.uniform(3, 12))) for _ in range(3))
        if 1e7 < 2 * m * n * k < 2e9:
            return cases.Case(strategy, m, n, k, str(draw.choice(["float32", "bfloat16"])))


def regret(count: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """The aim that no other schedule is faster than the chosen one by more than noise."""
    draw = np.random.default_rng(seed)
    bench = measure.Bench(COMM, {}, seed)
    worst: list[tuple[float, str]] = []
    for number in range(count):
        case = drawn(draw, COMM.size)
        product = products.Product(case, bench.grid(case.strategy), seed)
        plans = products.plans(parse_product(case.strategy.spec), case, product.grid, "tree")
        chosen = Scheduled(product, plans[0])
        chosen.run()
        trials = []
        for plan in plans[1:MOST_CANDIDATES]:
            contestant = Scheduled(product, plan)
            contestant.run()
            trials.append((contestant.seconds(), contestant))
        trials.sort(key=lambda trial: trial[0])
        finalists = [contestant for _, contestant in trials[:FINALISTS]]
        ratios = [statistics.median(r) for r in alternate(chosen, finalists, rounds)]
        right = all(c.right(seed) for c in (chosen, *finalists))
        least = min([1.0, *ratios])
        text = f"{case.strategy.key} {case.shape} {case.dtype} {products.describe(plans[0])}"
        worst.append((least if right else 0.0, text))
        if least < 0.95:
            text += f"; faster: {products.describe(finalists[ratios.index(min(ratios))].plan)}"
        say(f"{number + 1:4} {least:.2f} {text}{'' if right else ' WRONG'}")
    shares = sorted(share for share, _ in worst)
    return [
        aim(
            f"cases of {count} in which no schedule is faster by more than 5%",
            sum(s >= 0.95 for s in shares),
            count,
            "",
        ),
        aim("time of the best schedule over that of the chosen, median", statistics.median(shares), 0.95, "", shares),
    ]


def decode(rounds: int, seed: int) -> list[dict[str, Any]]:
    """The aim that thin products move what is small: fewer bytes and less time than textbook SUMMA."""
    bench = measure.Bench(COMM, {}, seed)
    found = []
    summa = cases.strategy("summa")
    coords = bench.grid(summa).coords
    along_row, along_column = COMM.Split(coords["r"], coords["c"]), COMM.Split(coords["c"], coords["r"])
    for name in ("qkv", "attention-output", "up", "down"):
        layer = cases.LAYERS[f"llama3-8b-{name}"]
        for tokens in (1, 8, 32):
            case = cases.Case(summa, tokens, layer.features_out, layer.features_in, "float32", label=layer.name)
            product = products.Product(case, bench.grid(case.strategy), seed)
            plans = products.plans(parse_product(summa.spec), case, product.grid, "tree")
            textbook = next(
                p for p in plans if p.assignment.axes_of("m") == ("r",) and p.assignment.axes_of("n") == ("c",)
            )
            ours, in_place = Scheduled(product, plans[0]), Scheduled(product, textbook)
            broadcasts = Broadcasts(product, along_row, along_column)
            if not all(way.right(seed) for way in (ours, in_place, broadcasts)):
                found.append(aim(f"{layer.name}, {tokens} tokens: WRONG", 0, 1, ""))
                continue
            ratios = alternate(ours, [in_place, broadcasts], rounds)
            fewer = in_place.plan.bytes_total / ours.plan.bytes_total
            title = f"{layer.name}, {tokens} token{'s' * (tokens > 1)}"
            found.append(aim(f"{title}: bytes of SUMMA over ours", fewer, 10, "times"))
            for what, samples in zip(("SUMMA in place", "SUMMA by broadcasts"), ratios, strict=True):
                found.append(aim(f"{title}: time of {what} over ours", statistics.median(samples), 3, "times", samples))
            faster = " and ".join(f"{statistics.median(samples):.1f}" for samples in ratios)
            say(f"{title}: {fewer:.0f} times fewer bytes, {faster} times as fast as SUMMA in place and by broadcasts")
    return found


def aim(title: str, measured: float, wanted: float, unit: str, samples: list[float] | None = None) -> dict[str, Any]:
    """A figure with what was wanted; more is better."""
    record = {"title": title, "measured": measured, "wanted": wanted, "unit": unit, "more_is_better": True}
    return record | ({"spread": [min(samples), max(samples)]} if samples else {})


def say(line: str) -> None:
    """Print on rank 0."""
    if COMM.rank == 0:
        print(line, flush=True)


def main() -> int:
    """Run one of the two studies; exit status 1 where a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["regret", "decode"])
    parser.add_argument("--count", type=int, default=100, help="drawn cases of regret (default 100)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--json", metavar="F")
    options = parser.parse_args()
    given = np.random.default_rng().integers(2**31) if options.seed is None else options.seed
    seed = int(agree.largest(COMM, float(given))[0])
    gemm.set_threads(1)
    say(f"{options.study}, {COMM.size} ranks, seed {seed}")
    studies: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "regret": lambda: regret(options.count, options.rounds, seed),
        "decode": lambda: decode(options.rounds, seed),
    }
    aims = studies[options.study]()
    record = environment.describe(COMM, 1)
    if options.json and COMM.rank == 0:
        when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        result = {"schema": 1, "kind": "fivedp.bench.aims", "when": when, "seed": seed, "machine": record, "aims": aims}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    for a in aims:
        say(f"{a['title']}: {a['measured']:.3g} {a['unit']} (wanted {a['wanted']:g})")
    return int(any("WRONG" in a["title"] or a["measured"] == 0 for a in aims))


if __name__ == "__main__":
    sys.exit(main())
