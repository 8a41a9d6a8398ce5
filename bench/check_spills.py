"""Fail where the compiler has put registers of a CUDA kernel into memory, or its wgmma wait for each other.

    pip install -v . 2>&1 | tee build.log; python bench/check_spills.py build.log

Reads what `ptxas -v` says of every kernel and chip (the build asks for it). Prints a table of registers and shared
memory; the exit status is 1 where a kernel spills or ptxas says that its wgmma are serialized, 2 where the log names no
kernel at all.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")

_SERIAL = re.compile(r"wgmma\.mma_async instructions are serialized due to (.*) in the function '(\w+)'")


@dataclass
class Kernel:
    """What ptxas says of one kernel on one chip."""

    name: str
    chip: str
    stack: int = 0
    stores: int = 0
    loads: int = 0
    registers: int = 0
    shared: int = 0

    @property
    def spills(self) -> bool:
        """Whether registers went to memory. An array that is indexed at run time has a stack frame without spills."""
        return self.stores + self.loads > 0


def read(lines: list[str]) -> list[Kernel]:
    """The kernels of a build's output, in its order."""
    kernels: list[Kernel] = []
    for line in lines:
        if found := _ENTRY.search(line):
            kernels.append(Kernel(*found.groups()))
        elif kernels and (found := _SPILLS.search(line)):
            # A function that was not inlined has a line of its own before the next entry: the worst counts.
            numbers = [int(number) for number in found.groups()]
            last = kernels[-1]
            last.stack, last.stores, last.loads = (
                max(old, new) for old, new in zip((last.stack, last.stores, last.loads), numbers, strict=True)
            )
        elif kernels and (found := re.search(r"Used (\d+) registers", line)):
            kernels[-1].registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def serialized(lines: list[str]) -> list[tuple[str, str]]:
    """Kernels whose products wait for each other, and why."""
    found = (_SERIAL.search(line) for line in lines)
    return [(match[2], match[1]) for match in found if match]


def readable(names: list[str]) -> list[str]:
    """Names of functions as they were written, where c++filt is there."""
    if not names or shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [
        re.sub(r"\(anonymous namespace\)::|fivedp::|void ", "", line).partition("(")[0] for line in text.split("\n")
    ]


def main() -> int:
    """Read the log, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="the output of the build")
    parser.add_argument("--all", action="store_true", help="print every kernel, not only those that spill")
    options = parser.parse_args()
    lines = options.log.read_text(errors="replace").splitlines()
    kernels, serial = read(lines), serialized(lines)
    if not kernels:
        print(f"{options.log} names no kernel: was the CUDA extension built, with -Xptxas=-v?", file=sys.stderr)
        return 2
    for kernel, name in zip(kernels, readable([kernel.name for kernel in kernels]), strict=False):
        if kernel.spills or options.all:
            said = f"spills {kernel.stores} B, reads them {kernel.loads} B" if kernel.spills else "no spills"
            print(f"{kernel.chip:8} {kernel.registers:4} registers {kernel.shared:6} B shared  {said}  {name}")
    for name, (_, why) in zip(readable([name for name, _ in serial]), serial, strict=False):
        print(f"{name}: products do not overlap: {why}")
    n_spilling = sum(kernel.spills for kernel in kernels)
    print(f"{len(kernels)} kernels, {n_spilling} spill, {len(serial)} whose products do not overlap")
    return 1 if n_spilling or serial else 0


if __name__ == "__main__":
    sys.exit(main())
