"""Causal attention over a sequence whose logits nobody could store: its time, its error, its memory in all.

    mpirun -np 8 python bench/long_context.py                  131,072 tokens, 2 heads of 64, float32 and bfloat16
    mpirun -np 8 python bench/long_context.py --tokens 32768 --dtype float32 --json F

Every rank makes its own share of q, k and v, and none holds the whole. Rows from all over the sequence are held
against float64 afterwards. Memory is that of all ranks together, interpreters and libraries included, and its increase
over what the ranks held when everything was imported and the mesh was built. A page that several ranks map, of a shared
window or of a library, is counted once, divided among them: the proportional set size of Linux, sampled while the
attention runs, and the sum over the ranks of each one's highest sample. The resident peaks, which the system keeps
without sampling and which count such a page once for every rank, are printed beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fivedp.bench.environment import settle

settle()

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from attentions import Attention  # noqa: E402
from contest import WrongResult  # noqa: E402
from fivedp_attention import Fivedp  # noqa: E402

import fivedp  # noqa: E402
from fivedp.bench import agree, environment  # noqa: E402
from fivedp.comm.grid import grid_of  # noqa: E402

WANTED_GB, WANTED_ERROR = 2.0, 2.0
INTERVAL = 0.05  # seconds; reading the sums of a process of 100 MB takes about a millisecond


def kilobytes(file: str, field: str) -> int:
    """A line of a file of this process under /proc, in kB."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self", file).read_text(), re.M)
    if found is None:
        raise RuntimeError(f"{file} of this process has no line {field}")
    return int(found[1])


class Memory(threading.Thread):
    """Samples this process's proportional set size until `stop`, and keeps the largest."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        Path("/proc/self/clear_refs").write_text("5")  # the resident peak begins anew
        self.peak = kilobytes("smaps_rollup", "Pss")
        self._ended = threading.Event()

    def run(self) -> None:
        """Sample."""
        while not self._ended.wait(INTERVAL):
            self.peak = max(self.peak, kilobytes("smaps_rollup", "Pss"))

    def stop(self) -> tuple[float, float]:
        """The highest, proportional and resident, in bytes."""
        self._ended.set()
        self.join()
        self.peak = max(self.peak, kilobytes("smaps_rollup", "Pss"))
        return 1024.0 * self.peak, 1024.0 * kilobytes("status", "VmHWM")


def measure(peer: Fivedp, work: Attention, seed: int, before: float) -> tuple[list[dict[str, Any]], str]:
    """The aims of one attention, and what was wrong with it; all ranks held `before` bytes at first. Collective."""
    comm = peer.comm
    memory = Memory()
    comm.Barrier()
    memory.start()
    peer.prepare({**work.sizes, "dtype": work.dtype, "seed": seed, "way": "zigzag", "keywords": {}})
    comm.Barrier()
    start = time.perf_counter()
    peer.run()
    seconds = agree.largest(comm, time.perf_counter() - start)[0]
    peak, resident = agree.total(comm, *memory.stop())
    tokens, heads = work.sample(seed)
    parts = agree.collect(comm, peer.check({"tokens": tokens, "heads": heads}))
    title = f"{work.shape} {work.dtype} on {comm.size} ranks"
    aims = [
        {"title": f"{title}: {name}", "measured": size / 1e9, "wanted": WANTED_GB, "unit": "GB",
         "more_is_better": False, "seconds": seconds, "resident": resident}
        for name, size in (("memory of all ranks", peak), ("increase over imports and mesh", peak - before))
    ]  # fmt: skip
    wrong = ""
    if comm.rank == 0:
        print(f"{title}: {seconds:.1f} s, {work.flops / seconds / 1e9:.0f} GFLOP/s")
        print(f"  memory of all ranks {peak / 1e9:.3f} GB, wanted {WANTED_GB:g}; at first {before / 1e9:.3f}, "
              f"increase {(peak - before) / 1e9:.3f}")  # fmt: skip
        print(f"  resident, shared pages once for every rank: {resident / 1e9:.3f} GB")
        try:
            error = work.judge(parts, seed)["error_over_plain"]
            aims.append({"title": f"{title}: error over that of a plain computation", "measured": error,
                         "wanted": WANTED_ERROR, "unit": "times", "more_is_better": False,
                         "seconds": seconds})  # fmt: skip
            print(f"  {len(tokens)} rows of {len(heads)} heads: error {error:.2f} times that of a plain computation")
        except WrongResult as why:
            wrong = f"{title}: {why}"
            print(f"  WRONG RESULT: {why}")
        sys.stdout.flush()
    done = comm.Ibarrier()  # the others sleep while the first computes the reference: MPI would spin on its cores
    while not done.Test():
        time.sleep(INTERVAL)
    return aims, wrong


def main() -> int:
    """Measure; the exit status is 1 where a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float64"), help="repeatable")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="F")
    options = parser.parse_args()
    peer = Fivedp()
    assert callable(fivedp.ring_attention)  # imports what it needs
    grid_of(peer.comm)
    (before,) = agree.total(peer.comm, 1024.0 * kilobytes("smaps_rollup", "Pss"))
    aims, wrong = [], []
    for dtype in options.dtype or ["float32", "bfloat16"]:
        work = Attention(options.tokens, options.head_size, options.heads, dtype, causal=True)
        found, complaint = measure(peer, work, options.seed, before)
        aims += found
        wrong += [complaint] if complaint else []
    record = environment.describe(peer.comm, 1)
    if options.json and peer.comm.rank == 0:
        when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        result = {"schema": 1, "kind": "fivedp.bench.aims", "when": when, "machine": record, "aims": aims,
                  "wrong": wrong}  # fmt: skip
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    return int(agree.largest(peer.comm, float(bool(wrong)))[0])


if __name__ == "__main__":
    sys.exit(main())
