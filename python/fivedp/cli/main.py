"""The arguments of `fivedp`.

`run` has two kinds of options before `--`: its own, and the launcher's, which pass through untouched. Without `--` the
first word that is no option begins the command, and launcher options are refused, since nobody can tell their values
from the command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fivedp.cli.launcher import LauncherError, launch_for
from fivedp.cli.mpi_library import MPILibraryError

EPILOG = """\
examples:
  fivedp doctor                                     is this environment fit to run?
  fivedp run -np 8 -- python -m fivedp.bench        8 ranks with the mpirun that belongs to this Python
  fivedp run -np 2 --threads 4 --bind-to none -- python train.py
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `fivedp` command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after `fivedp`; those of this process by default.

    Returns
    -------
    int
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not words:
        parser.print_help()
        return 0
    if words[0] == "run":
        return _run(words[1:])
    options = parser.parse_args(words)
    if options.command == "doctor":
        from fivedp.cli.doctor import doctor

        return doctor(n_ranks=options.n_ranks, as_json=options.json)
    parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fivedp",
        description="Start ranks on plain MPI, and find out why they do not start.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("run", help="start a command on N ranks with the right mpirun", add_help=False)
    doctor = commands.add_parser("doctor", help="examine MPI, launcher, CPU, BLAS and GPU", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="print the facts and findings as JSON")
    doctor.add_argument(
        "-np", "--np", "-n", type=_positive, default=8, dest="n_ranks", metavar="N", help="ranks to plan for (8)"
    )
    return parser


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fivedp run",
        usage="fivedp run -np N [options] [launcher options] -- command ...",
        description="Start a command on N ranks with the mpirun that belongs to this Python's MPI, with what it needs "
        "set, and print the line that does it. Options not listed here are handed to the launcher.",
        allow_abbrev=False,
    )
    parser.add_argument("-np", "-n", "--np", type=_positive, required=True, dest="n_ranks", metavar="N", help="ranks")
    parser.add_argument("--threads", type=_positive, metavar="T", help="threads per rank (processors / ranks)")
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="end every rank after S seconds, status 124")
    parser.add_argument("--dry-run", action="store_true", help="print the line and stop")
    parser.add_argument("--quiet", action="store_true", help="do not print the line")
    return parser


def _run(words: list[str]) -> int:
    parser = _run_parser()
    if "--" in words:
        cut = words.index("--")
        options, launcher_options = parser.parse_known_args(words[:cut])
        command = words[cut + 1 :]
    else:
        cut = _first_operand(words)
        options, launcher_options = parser.parse_known_args(words[:cut])
        command = words[cut:]
        if launcher_options:
            parser.error(f"put -- between {launcher_options[0]} (an option of the launcher) and the command")
    if not command:
        parser.error("no command was given; as in: fivedp run -np 4 -- python -m fivedp.bench")
    try:
        launch = launch_for(options.n_ranks, command, threads=options.threads, launcher_options=launcher_options)
    except (MPILibraryError, LauncherError) as error:
        print(f'fivedp run: {error}\nfivedp run: "fivedp doctor" says more', file=sys.stderr)
        return 1
    if not options.quiet:
        # Standard error, so that the output of the command is all that a pipe sees; a dry run has no other output.
        print(launch.shown(), file=sys.stdout if options.dry_run else sys.stderr, flush=True)
    if options.dry_run:
        return 0
    from fivedp.cli.run import run

    try:
        return run(launch, options.timeout)
    except OSError as error:
        print(f"fivedp run: {launch.argv[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 1


def _first_operand(words: list[str]) -> int:
    position = 0
    while position < len(words) and words[position].startswith("-"):
        takes_value = words[position] in ("-np", "-n", "--np", "--threads", "--timeout")
        position += 2 if takes_value else 1
    return min(position, len(words))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return value
