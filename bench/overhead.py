"""What a small call costs above its arithmetic and its messages.

    mpirun -np 2 python bench/overhead.py --json F

A 64 x 64 product is called many times. On one rank the kernel called directly is subtracted; on several, also the
messages it sends, replayed with mpi4py's own buffer calls: one header to every other rank, and the payload of the
schedule. The figures are medians over bundles of calls, in microseconds; calls and replays alternate.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fivedp.bench.environment import settle

settle()

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

import fivedp  # noqa: E402
from fivedp.bench import agree, environment, measure  # noqa: E402
from fivedp.bench.cases import gemm as cases  # noqa: E402
from fivedp.bench.trials import gemm as products  # noqa: E402
from fivedp.kernels import gemm  # noqa: E402
from fivedp.layout.spec import parse_product  # noqa: E402

COMM = MPI.COMM_WORLD
SIZE, BUNDLE, WANTED_US = 64, 300, 50.0


def bundle(call: Callable[[], Any]) -> float:
    """Microseconds of one call, over a bundle; the slowest rank's."""
    COMM.Barrier()
    start = time.perf_counter()
    for _ in range(BUNDLE):
        call()
    return 1e6 * agree.largest(COMM, time.perf_counter() - start)[0] / BUNDLE


def replay(payload: int) -> Callable[[], None]:
    """Header exchange between all ranks, then `payload` bytes to each other rank, with plain mpi4py."""
    others = [r for r in range(COMM.size) if r != COMM.rank]
    header, headers = np.zeros(512, np.uint8), np.zeros((COMM.size, 512), np.uint8)
    data, inbox = np.zeros(payload, np.uint8), np.zeros((COMM.size, payload), np.uint8)

    def exchange(out: Any, into: Any) -> None:
        requests = [COMM.Irecv(into[r], source=r) for r in others] + [COMM.Isend(out, dest=r) for r in others]
        MPI.Request.Waitall(requests)

    def call() -> None:
        if others:
            exchange(header, headers)
            if payload:
                exchange(data, inbox)

    return call


def main() -> int:
    """Measure the specs of one axis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="F")
    options = parser.parse_args()
    gemm.set_threads(1)
    bench = measure.Bench(COMM, {}, 1)
    aims = []
    for key in ("column", "row", "row-sequence", "sequence-column"):
        case = cases.Case(cases.strategy(key), SIZE, SIZE, SIZE, "float32")
        product = products.Product(case, bench.grid(case.strategy), 1)
        plan = product.plan
        others = max(1, COMM.size * (COMM.size - 1))
        messages = replay(plan.bytes // others)
        brick = products.plans(parse_product(case.strategy.spec), case, product.grid, "tree")[0].brick(COMM.rank)
        rows, columns, inner = (brick[name][1] - brick[name][0] for name in "mnk")
        local_a, local_b = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
        local_c = np.zeros((rows, columns), np.float32)
        spec, mesh = case.strategy.spec, product.grid.mesh
        calls: list[Callable[[], Any]] = [
            lambda: fivedp.sharded_matmul(product.a, product.b, spec, mesh, out=product.c),  # noqa: B023
            messages,
            lambda: gemm.gemm(local_a, local_b, local_c),  # noqa: B023
        ]
        for call in calls:
            bundle(call)
        times = [[bundle(call) for call in calls] for _ in range(options.rounds)]
        above = [whole - sent - product_alone for whole, sent, product_alone in times]
        whole, sent, alone = (statistics.median(column) for column in zip(*times, strict=True))
        title = f"{SIZE}^3 on {COMM.size} rank{'s' * (COMM.size > 1)}, {case.strategy.known_as}"
        aims.append({"title": f"{title}: above its messages and its kernel", "measured": statistics.median(above),
                     "spread": [min(above), max(above)], "wanted": WANTED_US, "unit": "us", "more_is_better": False,
                     "whole": whole, "messages": sent, "kernel": alone})  # fmt: skip
        if COMM.rank == 0:
            print(f"{title}: {whole:.1f} us, messages {sent:.1f}, kernel {alone:.1f}: {aims[-1]['measured']:.1f} above")
    record = environment.describe(COMM, 1)
    if options.json and COMM.rank == 0:
        when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        result = {"schema": 1, "kind": "fivedp.bench.aims", "when": when, "machine": record, "aims": aims}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
