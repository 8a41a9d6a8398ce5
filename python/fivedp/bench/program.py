"""The command `python -m fivedp.bench`: options, the run, and where its results go.

Every rank measures; rank 0 prints and writes. The exit status is 1 on every rank where any result was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fivedp.bench import agree, ceiling, environment, measure, report
from fivedp.bench.cases import FAMILIES
from fivedp.bench.family import Case, Family

DTYPES = tuple(report.SHORT_TYPES)
Chosen = list[tuple[Family, list[Case]]]
_BY_SHORT_NAME = {short: name for name, short in report.SHORT_TYPES.items()}


def parser() -> argparse.ArgumentParser:
    """The options."""
    lists = [(f"{family.name} {what}", names) for family in FAMILIES.values() for what, names in family.known.items()]
    parser = argparse.ArgumentParser(
        prog="python -m fivedp.bench",
        description="Measure fivedp, check every result, and say what share of the machine it uses. "
        "Start it under mpirun; one rank works too.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            textwrap.fill(f"{what}: {', '.join(names)}", 100, subsequent_indent="    ", break_on_hyphens=False)
            for what, names in lists
        ),
    )
    parser.add_argument(
        "kernel", nargs="?", choices=list(FAMILIES), help="what to measure (default: all that know the options given)"
    )
    parser.add_argument("--full", action="store_true", help="real sizes, every layout and type: many minutes")
    parser.add_argument("--shape", action="append", help="a model, a layer or sizes, see below; repeatable")
    parser.add_argument("--dtype", action="append", type=_dtype, help="f32, f64, bf16; gemm: c64, c128; repeatable")
    parser.add_argument("--tokens", type=_positive, help="rows of a layer, length of a sequence, tokens of all ranks")
    parser.add_argument(
        "--backward", action="store_true", help="gemm: the gradients with the product; others: the gradients only"
    )
    parser.add_argument(
        "--order", choices=["tree", "canonical", "fast", "ring"],
        help="order of the sums; gemm: tree (default), canonical, fast; attention: ring, canonical (default: both)",
    )  # fmt: skip
    parser.add_argument("--reference", choices=["torch", "numpy"], help="alternate with it in one process, all cores")
    parser.add_argument("--threads", type=_positive, help="threads of a rank (default: cores / ranks, at least 1)")
    parser.add_argument("--repeats", type=_positive, default=15, help="most samples of a case (default 15)")
    parser.add_argument("--seconds", type=float, help="time for a case after warm-up (default below 1, with --full 3)")
    parser.add_argument("--seed", type=int, help="of the inputs (default: fresh)")
    parser.add_argument("--json", metavar="F", help="write the result")
    parser.add_argument("--csv", metavar="F", help="write the rows as a spreadsheet")
    for family in FAMILIES.values():
        family.add_options(parser.add_argument_group(f"{family.name} only"))
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
        chosen = choose(options)
        for file in filter(None, (options.json, options.csv)):
            if not Path(file).resolve().parent.is_dir():
                raise ValueError(f"the folder of {file} does not exist")
    except ValueError as error:
        if comm.rank == 0:
            print(f"fivedp.bench: {error}", file=sys.stderr)
        return 2
    result = measure_all(comm, chosen, options)
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


def choose(options: argparse.Namespace) -> Chosen:
    """The families to measure and their cases.

    Raises
    ------
    ValueError
        Where the kernel named does not have what the options ask for, or, where none is named, no kernel does.
    """
    wanted = [FAMILIES[options.kernel]] if options.kernel else list(FAMILIES.values())
    chosen, complaints = [], []
    for family in wanted:
        try:
            for other in FAMILIES.values():
                if other is not family and (given := [x for x in other.own_options if getattr(options, x)]):
                    raise ValueError(f"--{given[0]} belongs to {other.name}, not to {family.name}")
            chosen.append((family, family.select(options)))
        except ValueError as error:
            complaints.append(str(error))
    if not chosen:
        raise ValueError("; ".join(complaints))
    return chosen


def measure_all(comm: Any, chosen: Chosen, options: argparse.Namespace) -> report.Result:
    """Measure the ceiling and every case, printing rows as they come. Collective; the same result on every rank."""
    import threadpoolctl

    from fivedp.kernels import gemm

    cores, _ = environment.cores_and_nodes(comm)
    threads = options.threads or max(1, cores // comm.size)
    gemm.set_threads(threads)
    threadpoolctl.threadpool_limits(threads, "blas")
    seed = _seed(comm, options.seed)
    rank0 = comm.rank == 0
    total = sum(len(cases) for _, cases in chosen)
    paint, progress = report.Paint(sys.stdout), report.Progress(total + 1 if rank0 else 0)
    progress.shown &= rank0
    progress.step("ceiling")
    dtypes = list(dict.fromkeys(case.dtype for _, cases in chosen for case in cases))
    limits = ceiling.measure(comm, dtypes, threads, seconds=2.5)
    progress.clear()
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    result = report.new(environment.describe(comm, threads), limits, seed, when)
    if rank0:
        title = " ".join(["fivedp.bench", *(family.name for family, _ in chosen)])
        print("\n".join([paint.bold(title), *report.heading(result)]), flush=True)

    bench = measure.Bench(comm, {name: ceiling.peak(limits, name) for name in dtypes}, seed, repeats=options.repeats)
    if options.reference:
        from fivedp.reference import open_reference

        bench.reference, bench.reference_threads = open_reference(options.reference), cores
    for family, cases in chosen:
        bench.seconds = options.seconds or (3.0 if options.full else family.quick_seconds)
        group = None
        for case in cases:
            progress.step(f"{family.name}: {case.title}")
            row = measure.run(bench, case)
            result["rows"].append(row)
            progress.clear()
            if not rank0:
                continue
            if family.table.group(row) != group:
                group = family.table.group(row)
                title, rest = family.table.heading(row)
                print(f"\n{paint.bold(title)}   {rest}\n{paint.dim(report.column_line(family.table))}")
            print("\n".join(report.row_lines(row, paint)), flush=True)
    if rank0:
        last = report.summary(result)
        print(f"\n{paint.red(last) if report.wrong(result) else last}", flush=True)
    return result


def _seed(comm: Any, given: int | None) -> int:
    """The seed given, or a fresh one that all ranks share; below 2^31, so that it passes through float64 whole."""
    import secrets

    return int(agree.largest(comm, float(secrets.randbelow(2**31) if given is None else given))[0])
