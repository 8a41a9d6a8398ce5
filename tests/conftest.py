"""`python -m pytest tests` from an ordinary shell runs everything; files under `tests/mpi` run under mpirun.

In an ordinary shell this pytest starts the launches (`mpi_launcher.py`); under mpirun it is one of the ranks
(`mpi_ranks.py`), also where somebody types `mpirun -np 3 python -m pytest tests/mpi/test_x.py`.

Random inputs are fresh in every run: the seed is in the header, and `FIVEDP_TEST_SEED=<seed>` brings a run back. The
fixture `seed` is that number mixed with the name of the test, the same on all ranks.
"""

from __future__ import annotations

import os
import secrets
import sys
import zlib
from pathlib import Path
from types import ModuleType

# Before NumPy is loaded by anybody: these make OpenBLAS use the kernels of another chip.
_MISLEADING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_DEBUG_CPU_TYPE", "NVPL_")
for _name in [name for name in os.environ if name.startswith(_MISLEADING)]:
    del os.environ[_name]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest  # noqa: E402

from mpi_launcher import COUNTS_KEY, SEED, SEED_KEY, LauncherSide, inside_launch, rank_list  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mpi", "tests under mpirun")
    group.addoption("--mpi-ranks", type=rank_list, default=None, metavar="2,3", help="only these numbers of ranks")
    group.addoption("--mpi-timeout", type=float, default=None, metavar="S", help="seconds for one launch")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Test files of one name may lie in several folders.
    config.option.importmode = "importlib"
    config.addinivalue_line("markers", "mpi(min_size): runs on the ranks of a launch; skipped on fewer than min_size")
    seed = int(os.environ.get(SEED) or secrets.randbelow(2**31))
    settle_hypothesis = _settle_hypothesis
    if inside_launch():
        from mpi_ranks import RankSide

        side = RankSide(config, seed)
        seed, settle_hypothesis = side.seed, side.settle_hypothesis
        config.pluginmanager.register(side, "fivedp-ranks")
    else:
        config.pluginmanager.register(LauncherSide(), "fivedp-launcher")
    config.stash[SEED_KEY] = seed
    config.stash[COUNTS_KEY] = {}
    if not inside_launch() or _draws(config):
        import hypothesis
        import hypothesis.core

        settle_hypothesis(hypothesis)
        if config.getoption("hypothesis_seed", None) is None:
            hypothesis.core.global_force_seed = seed


def _draws(config: pytest.Config) -> bool:
    """Whether a file to run uses Hypothesis, which takes each of many ranks a quarter of a second to load."""
    files = [Path(argument.partition("::")[0]) for argument in config.args]
    return any(not file.is_file() or "hypothesis" in file.read_text() for file in files)


def _settle_hypothesis(hypothesis: ModuleType) -> None:
    # Timings of shared machines say nothing, and examples found yesterday hide what is found today.
    hypothesis.settings.register_profile("fivedp", deadline=None, database=None)
    hypothesis.settings.load_profile("fivedp")


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.stash[SEED_KEY]} (repeat with {SEED}={config.stash[SEED_KEY]})"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for this test: fresh in every run, the same on all ranks, printed where the test fails."""
    value = (request.config.stash[SEED_KEY] ^ zlib.crc32(request.node.nodeid.encode())) & 0x7FFFFFFF
    print(f"seed of this test: {value} (run with {SEED}={request.config.stash[SEED_KEY]})")
    return value
