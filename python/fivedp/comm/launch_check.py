"""Every rank believes it is alone: the commonest accident of a first run, caught by its traces.

A launcher tells its processes how many were started through the environment. Where it belongs to another MPI than the
one this Python loads, nobody reads those variables, and each of the n processes becomes rank 0 of 1: n correct-looking
runs of the wrong program. A pure function of the world size and the environment; it needs no MPI.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# Variables in which a launcher states the number of processes it started, and whose they are.
STATED_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "PMI_SIZE": "MPICH (Hydra) or Intel MPI",
    "MPI_LOCALNRANKS": "MPICH (Hydra) or Intel MPI",
    "MV2_COMM_WORLD_SIZE": "MVAPICH",
    "PALS_SIZE": "HPE PALS",
}
# A process with one of these was started by `srun` as a task of a step; `SLURM_NTASKS` alone is only the allocation.
SLURM_STEP = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
# Set by a launcher for its ranks: a launch from within a rank must not inherit them.
RANK_VARIABLES = (
    "PMI_", "PMIX_", "PMI2_", "OMPI_COMM_WORLD_", "OMPI_UNIVERSE_SIZE", "OMPI_WORLD_", "OMPI_APP_CTX", "OMPI_NUM_APP",
    "OMPI_FIRST_RANKS", "OMPI_FILE_LOCATION", "OMPI_MCA_ess", "OMPI_MCA_orte", "OMPI_MCA_pmix", "OMPI_MCA_num_procs",
    "OMPI_MCA_initial_wdir", "OMPI_MCA_PREFIXES", "OMPI_MCA_cpu_type", "OMPI_LIBDIR_LOC", "OMPI_COMMAND", "OMPI_ARGV",
    "OMPI_TOOL_NAME", "OMPI_VERSION", "OPAL_PREFIX", "PRTE_LAUNCHED", "PRTE_SHARED_FS", "PRTE_PREFIX",
    "MPI_LOCALNRANKS", "MPI_LOCALRANKID", "HYDI_", "HYDRA_CONTROL",
)  # fmt: skip


def stated_size(environ: Mapping[str, str] = os.environ) -> tuple[int, str, str] | None:
    """Find how many processes the launcher says it started.

    Parameters
    ----------
    environ : mapping of str to str
        The environment of this process.

    Returns
    -------
    (size, variable, launcher), or None
        The largest number found, the variable that states it and the launcher that sets it; None where no launcher's
        variable is present. A PMIx rank above 0 proves at least rank + 1 processes.
    """
    found: list[tuple[int, str, str]] = []
    for name, launcher in STATED_SIZES.items():
        size = _number(environ.get(name))
        if size is not None:
            found.append((size, name, launcher))
    rank = _number(environ.get("PMIX_RANK"))
    if rank is not None and rank > 0:
        found.append((rank + 1, "PMIX_RANK", "a PMIx launcher (Open MPI, PRRTE or srun)"))
    step = _slurm_step_size(environ)
    if step is not None:
        found.append(step)
    return max(found, key=lambda entry: entry[0]) if found else None


def is_rank_variable(name: str) -> bool:
    """Whether a launcher sets `name` for its ranks; `PMIX_MCA_*` are settings of the user."""
    return name.startswith(RANK_VARIABLES) and not name.startswith("PMIX_MCA_")


def check_launch(world_size: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raise where this process is alone although its launcher started more.

    Parameters
    ----------
    world_size : int
        The size of `MPI.COMM_WORLD` as this process sees it.
    environ : mapping of str to str
        The environment of this process.

    Raises
    ------
    RuntimeError
        Where `world_size` is 1 and the environment says that more than one process was started.

    Notes
    -----
    Not collective: the processes cannot reach each other, each has to find out alone.
    """
    if world_size != 1:
        return
    stated = stated_size(environ)
    if stated is None or stated[0] <= 1:
        return
    size, variable, launcher = stated
    raise RuntimeError(
        f"this process is alone in its MPI world, but {variable} says that {size} or more were started: the launcher "
        f"({launcher}) belongs to another MPI than the one this Python loads; start with "
        f'"fivedp run -np {size} -- ...", which finds the right launcher, or see "fivedp doctor"'
    )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None


def _slurm_step_size(environ: Mapping[str, str]) -> tuple[int, str, str] | None:
    # A batch script runs as step "batch" with SLURM_PROCID=0, and everything it starts inherits both.
    if not all(name in environ for name in SLURM_STEP):
        return None
    size = _number(environ["SLURM_STEP_NUM_TASKS"])
    return None if size is None else (size, "SLURM_STEP_NUM_TASKS", "srun")
