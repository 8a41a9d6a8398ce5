"""fivedp beside other programs, alternating in one run.

    python bench/peers/compare.py --suite acceptance --json bench/results/<date>-<machine>-peers.json
    python bench/peers/compare.py --suite attention --json bench/results/<date>-<machine>-attention.json
    python bench/peers/compare.py --suite moe --json bench/results/<date>-<machine>-moe.json

Every program is started once, checks its result and then sleeps until its turn; at least seven rounds are run, and the
median of the ratios with its spread is reported. A program that is missing is named with the command that installs it;
`FIVEDP_BENCH_PYTHON_<NAME>` gives a program an environment of its own (heat 1.8 needs an older torch, for example).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from contest import Arena, Contest, say, table
from suites import NAMES, suite
from worker import load

SCHEMA = 1


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=NAMES, help="which contests (default quick); repeatable")
    parser.add_argument("--only", help="keep contests whose title and shape contain this")
    parser.add_argument("--without", action="append", default=[], help="leave a program out; repeatable")
    parser.add_argument(
        "--size",
        type=int,
        default=4096,
        help="of the squares, tokens of attention, of moe half as many a rank (default 4096)",
    )
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="ranks x threads")
    parser.add_argument("--rounds", type=int, default=7, help="of every contest (default 7)")
    parser.add_argument("--json", metavar="F", help="write the result, after every contest")
    parser.add_argument("--add", action="store_true", help="keep the other contests that F holds")
    return parser


def leave_out(contest: Contest, programs: list[str]) -> Contest:
    """`contest` without the entries of `programs`."""
    return replace(contest, entries=tuple(e for e in contest.entries if e.program not in programs))


def machine() -> dict[str, Any]:
    """What the driver knows of the machine; what a program uses of it is in that program's facts."""
    environment = load("environment")
    return {"cpu": environment.cpu(), "revision": environment.revision(), "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}"}  # fmt: skip


def main() -> int:
    """Hold the contests; the exit status is 1 where our own result was wrong or could not run."""
    options = parser().parse_args()
    contests = [c for name in options.suite or ["quick"] for c in suite(name, options.cores, options.size)]
    contests = [leave_out(c, options.without) for c in contests if (options.only or "") in f"{c.title} {c.work.shape}"]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "fivedp.bench.peers",
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cores": options.cores,
        "load": round(os.getloadavg()[0], 1),
        "machine": machine(),
        "contests": [],
    }
    if options.add and options.json and Path(options.json).exists():
        again = {(c.title, c.work.shape) for c in contests}
        held = json.loads(Path(options.json).read_text())["contests"]
        result["contests"] = [record for record in held if (record["title"], record.get("shape")) not in again]
    arena = Arena(rounds=options.rounds)
    say([f"{result['machine']['cpu']['model']}, {options.cores} of {result['machine']['cpu']['cores']} cores, "
         f"revision {result['machine']['revision']}, load {result['load']}"])  # fmt: skip
    failed = False
    try:
        for contest in contests:
            record = {"load": round(os.getloadavg()[0], 1), "revision": result["machine"]["revision"]}
            record |= arena.hold(contest, secrets.randbelow(2**31))
            result["contests"].append(record)
            say(table(record))
            failed |= contest.entries[0].text in (*record["missing"], *record["wrong"])
            if options.json:
                Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    finally:
        arena.close()
    aims = [line for record in result["contests"] for line in record["entries"] if line.get("wanted")]
    say([f"{sum(a['ratio'] >= a['wanted'] for a in aims)} of {len(aims)} aims reached"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
