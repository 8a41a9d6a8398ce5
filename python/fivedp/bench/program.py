"""The command `python -m fivedp.bench`: options, the run, and where its results go.

Every rank measures; rank 0 prints and writes. The exit status is 1 on every rank where any result was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fivedp.bench import agree, ceiling, environment, measure, report
from fivedp.bench.cases import gemm as gemm_cases

DTYPES = tuple(report.SHORT_TYPES)
_BY_SHORT_NAME = {short: name for name, short in report.SHORT_TYPES.items()}


def parser() -> argparse.ArgumentParser:
    """The options."""
    known = ", ".join(s.key for s in gemm_cases.STRATEGIES)
    parser = argparse.ArgumentParser(
        prog="python -m fivedp.bench",
        description="Measure fivedp, check every result, and say what share of the machine it uses. "
        "Start it under mpirun; one rank works too.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"strategies: {known}\nlayers:     {', '.join(gemm_cases.LAYERS)}",
    )
    parser.add_argument("kernel", nargs="?", choices=["gemm"], default="gemm", help="what to measure (default: all)")
    parser.add_argument("--full", action="store_true", help="squares to 4096, layers at their real size, all gradients")
    parser.add_argument("--shape", action="append", help="MxNxK, BxMxNxK, one number, a layer or a model; repeatable")
    parser.add_argument("--spec", action="append", help="a spec or the name of a strategy; repeatable")
    parser.add_argument("--dtype", action="append", type=_dtype, help="f32, f64, bf16, c64, c128; repeatable")
    parser.add_argument("--tokens", type=_positive, help=f"rows of a layer (default {gemm_cases.FULL_TOKENS})")
    parser.add_argument("--backward", action="store_true", help="time the gradients with the product")
    parser.add_argument("--order", choices=["tree", "canonical", "fast"], default="tree", help="order of the sums")
    parser.add_argument("--reference", choices=["torch", "numpy"], help="alternate with it in one process, all cores")
    parser.add_argument("--threads", type=_positive, help="threads of a rank (default: cores / ranks, at least 1)")
    parser.add_argument("--repeats", type=_positive, default=15, help="most samples of a case (default 15)")
    parser.add_argument("--seconds", type=float, help="time for a case after warm-up (default 0.5, with --full 3)")
    parser.add_argument("--seed", type=int, help="of the inputs (default: fresh)")
    parser.add_argument("--json", metavar="F", help="write the result")
    parser.add_argument("--csv", metavar="F", help="write the rows as a spreadsheet")
    return parser


def _dtype(text: str) -> str:
    name = _BY_SHORT_NAME.get(text, text)
    if name not in DTYPES or name == "float16":
        raise argparse.ArgumentTypeError(f"{text!r} is not measured on a CPU; give one of f32, f64, bf16, c64, c128")
    return name


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on every rank of MPI.COMM_WORLD and return the exit status."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    options = _agree_on_options(comm, arguments)
    if isinstance(options, int):
        return options
    try:
        cases = gemm_cases.select(options)
        for file in filter(None, (options.json, options.csv)):
            if not Path(file).resolve().parent.is_dir():
                raise ValueError(f"the folder of {file} does not exist")
    except ValueError as error:
        if comm.rank == 0:
            print(f"fivedp.bench: {error}", file=sys.stderr)
        return 2
    result = measure_all(comm, cases, options)
    if comm.rank == 0:
        if options.json:
            report.write_json(result, options.json)
        if options.csv:
            report.write_csv(result, options.csv)
    return 1 if report.wrong(result) else 0


def _agree_on_options(comm: Any, arguments: Sequence[str] | None) -> argparse.Namespace | int:
    """Options, or the exit status where there is nothing to run; only rank 0 prints help or a complaint."""
    try:
        if comm.rank == 0:
            return parser().parse_args(arguments)
        quiet = parser()
        quiet._print_message = lambda *_: None  # type: ignore[method-assign]
        return quiet.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def measure_all(comm: Any, cases: list[gemm_cases.Case], options: argparse.Namespace) -> report.Result:
    """Measure the ceiling and every case, printing rows as they come. Collective; the same result on every rank."""
    import threadpoolctl

    from fivedp.kernels import gemm

    cores, _ = environment.cores_and_nodes(comm)
    threads = options.threads or max(1, cores // comm.size)
    gemm.set_threads(threads)
    threadpoolctl.threadpool_limits(threads, "blas")
    seed = _seed(comm, options.seed)
    rank0 = comm.rank == 0
    paint, progress = report.Paint(sys.stdout), report.Progress(len(cases) + 1 if rank0 else 0)
    progress.shown &= rank0
    progress.step("ceiling")
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    limits = ceiling.measure(comm, dtypes, threads, seconds=2.5)
    progress.clear()
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    result = report.new(environment.describe(comm, threads), limits, seed, when)
    if rank0:
        print("\n".join([paint.bold("fivedp.bench gemm"), *report.heading(result)]), flush=True)

    bench = measure.Bench(
        comm,
        {name: ceiling.peak(limits, name) for name in dtypes},
        seed,
        repeats=options.repeats,
        seconds=options.seconds or (3.0 if options.full else 0.5),
        order=options.order,
    )
    if options.reference:
        from fivedp.reference import open_reference

        bench.reference, bench.reference_threads = open_reference(options.reference), cores
    strategy = None
    for case in cases:
        progress.step(f"{case.strategy.known_as} {case.shape} {case.dtype}")
        row = measure.run(bench, case)
        result["rows"].append(row)
        progress.clear()
        if not rank0:
            continue
        if case.strategy != strategy:
            strategy = case.strategy
            mesh = f"   {row['mesh']}" if "mesh" in row else ""
            print(f"\n{paint.bold(strategy.known_as)}   {strategy.spec}{mesh}")
            print(paint.dim(report.column_line()))
        print("\n".join(report.row_lines(row, paint)), flush=True)
    if rank0:
        last = report.summary(result)
        print(f"\n{paint.red(last) if report.wrong(result) else last}", flush=True)
    return result


def _seed(comm: Any, given: int | None) -> int:
    """The seed given, or a fresh one that all ranks share; below 2^31, so that it passes through float64 whole."""
    import secrets

    return int(agree.largest(comm, float(secrets.randbelow(2**31) if given is None else given))[0])
