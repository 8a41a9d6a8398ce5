"""The reader of ptxas's words: a kernel that spills is named, a log without kernels is no success."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "check_spills.py"
KERNEL = """ptxas info    : Compiling entry function '_ZN6fivedp5scaleEPf' for '{chip}'
ptxas info    : Function properties for _ZN6fivedp5scaleEPf
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 2048 bytes smem, 412 bytes cmem[0]
"""


def run(tmp_path: Path, log: str, *options: str) -> tuple[int, str]:
    file = tmp_path / "build.log"
    file.write_text(log)
    done = subprocess.run([sys.executable, SCRIPT, *options, file], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_kernel_that_spills_is_named_with_its_chip(tmp_path: Path) -> None:
    clean = KERNEL.format(chip="sm_80", stack=0, stores=0, loads=0, registers=96)
    log = clean + KERNEL.format(chip="sm_90a", stack=64, stores=48, loads=60, registers=255)
    status, said = run(tmp_path, log)
    assert status == 1
    assert "sm_90a    255 registers   2048 B shared  spills 48 B, reads them 60 B" in said
    assert "sm_80" not in said
    assert said.endswith("2 kernels, 1 spill, 0 whose products do not overlap\n")


def test_products_that_do_not_overlap_are_named(tmp_path: Path) -> None:
    log = (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "non wgmma instructions defining accumulator registers in the function '_ZN6fivedp5scaleEPf'\n"
    )
    status, said = run(tmp_path, log + KERNEL.format(chip="sm_90a", stack=0, stores=0, loads=0, registers=168))
    assert status == 1
    assert "products do not overlap: non wgmma instructions defining accumulator registers\n" in said
    assert said.endswith("1 kernels, 0 spill, 1 whose products do not overlap\n")


@pytest.mark.parametrize("stack", [0, 32])
def test_a_stack_frame_alone_is_no_spill(tmp_path: Path, stack: int) -> None:
    log = KERNEL.format(chip="sm_80", stack=stack, stores=0, loads=0, registers=96)
    assert run(tmp_path, log, "--all")[0] == 0


def test_a_log_without_kernels_is_no_success(tmp_path: Path) -> None:
    status, said = run(tmp_path, "[1/2] Building CXX object\n")
    assert status == 2
    assert "names no kernel" in said
