"""Every instruction set that this machine and build have gives the same bits.

bfloat16 products of the *_bf16 sets are theirs alone, as the instruction rounds in its own way: there they are held to
each other. A build with -DFIVEDP_TEST_ISAS=ON adds the AVX-512 tiles, emulated.
"""

from __future__ import annotations

import os
import subprocess
import sys

from fivedp.kernels import gemm as kernel

PROGRAM = """
import hashlib, sys
import ml_dtypes, numpy as np
from fivedp.kernels.gemm import gemm, isa, tree_sum
rng = np.random.default_rng(int(sys.argv[1]))
shapes = [(1, 40, 300), (2, 300, 70), (3, 33, 1100), (8, 130, 513), (17, 19, 23), (30, 67, 600), (45, 9, 2100)]
print(isa())
for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
    digest = hashlib.sha256()
    for m, n, k in shapes:
        a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
        c = rng.standard_normal((m, n)).astype(dtype)
        gemm(a, b, c, alpha=0.7, beta=0.3)
        digest.update(c.tobytes())
        gemm(np.asfortranarray(a), np.asfortranarray(b), c)
        digest.update(c.tobytes())
    if dtype is not ml_dtypes.bfloat16:
        parts = [rng.standard_normal((20, 30)).astype(dtype) for _ in range(3)]
        tree_sum(parts, [(0, 4), (4, 2), (6, 2)], out := np.zeros((20, 30), dtype), alpha=1.5)
        digest.update(out.tobytes())
    print(digest.hexdigest())
"""


def digests(isa: str, seed: int) -> list[str]:
    environment = {**os.environ, "FIVEDP_ISA": isa}
    command = [sys.executable, "-c", PROGRAM, str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert lines[0] == isa
    return lines[1:]


def test_all_supported_sets_agree() -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed:", seed)
    found = {isa: digests(isa, seed) for isa in kernel.supported_isas()}
    assert len({tuple(lines[:2]) for lines in found.values()}) == 1
    widened = {lines[2] for isa, lines in found.items() if "bf16" not in isa}
    assert len(widened) == 1


def test_an_unsupported_set_is_an_error_that_names_the_supported() -> None:
    environment = {**os.environ, "FIVEDP_ISA": "quantum"}
    program = "import fivedp.kernels.gemm as g; g.isa()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "'quantum'" in done.stderr
    for isa in kernel.supported_isas():
        assert isa in done.stderr


def test_the_set_in_use_is_a_supported_one() -> None:
    if os.environ.get("FIVEDP_ISA"):
        assert kernel.isa() == os.environ["FIVEDP_ISA"]
    assert kernel.isa() in kernel.supported_isas()
