"""The tests of transports on a device that all ranks share: the file that runs on a double of CuPy, on CuPy itself."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from fivedp.cli.probes import find_gpus
from mpi_launcher import start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not find_gpus(os.environ), reason="no NVIDIA GPU is visible"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed"),
]
TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4])
def test_transports_on_a_device(n_ranks: int) -> None:
    file = TESTS / "mpi" / "test_transport.py"
    command = [sys.executable, "-m", "pytest", str(file), f"--rootdir={TESTS.parent}", "-q", "-p", "no:cacheprovider"]
    done = start(command, n_ranks, timeout=240, env={"FIVEDP_TEST_CUPY": "1"})
    assert done.returncode == 0, done.output
    assert done.counts.get("passed", 0) > 0
