"""The mpirun that belongs to this Python's MPI, and the environment that its ranks need.

A launcher and a library of different MPIs start n programs that each believe they are alone. So the library is found
first, and the launcher is looked for beside it: same prefix, then Debian's `mpirun.openmpi` and its like, then PATH;
every candidate is asked for its name and version, and a stranger is passed over. What the ranks need besides is set
only where it is needed, and always shown:

    Open MPI   leave to run as root; more ranks than cores, which then yield while they wait
    MPICH      nothing to start; idle ranks give up the processor where there are more of them than cores
    BLAS       variables that choose the kernels of another chip are removed; threads x ranks = cores
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fivedp.cli.mpi_library import NAMES, MPILibrary, find_library, vendor_of
from fivedp.comm.launch_check import is_rank_variable

# They make a BLAS choose the kernels of another chip, or the wrong blocking: never inherited by a rank.
MISLEADING_BLAS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_DEBUG_CPU_TYPE", "NVPL_")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "FIVEDP_NUM_THREADS")
LAUNCHER_NAMES = {
    "openmpi": ("mpirun", "mpiexec", "mpirun.openmpi", "mpiexec.openmpi"),
    "mpich": ("mpirun", "mpiexec", "mpiexec.hydra", "mpirun.mpich", "mpiexec.mpich"),
    "impi": ("mpirun", "mpiexec.hydra", "mpiexec"),
    "unknown": ("mpirun", "mpiexec"),
}
PLACEMENT_OPTIONS = (
    "--host",
    "-host",
    "-H",
    "--hostfile",
    "-hostfile",
    "--machinefile",
    "-machinefile",
    "-f",
    "-hosts",
)
MAPPING_OPTIONS = ("--map-by", "-map-by", "--oversubscribe", "-oversubscribe", "--mca", "--prtemca", "--bind-to")


class LauncherError(RuntimeError):
    """No launcher belongs to this Python's MPI."""


@dataclass(frozen=True)
class Launcher:
    """One `mpirun`, and whose it is."""

    path: Path
    vendor: str
    version: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name and version, as in `MPICH 5.0.2`."""
        return " ".join([NAMES[self.vendor], ".".join(map(str, self.version))]).strip()


@dataclass(frozen=True)
class Machine:
    """What decides about a launch on this node."""

    cores: int  # physical cores this process may use: Open MPI's slots
    cpus: int  # hardware threads this process may use
    root: bool


@dataclass(frozen=True)
class Launch:
    """A command with the changes to the environment it needs.

    Attributes
    ----------
    argv : tuple of str
        Launcher, its options, the command.
    set_variables : dict of str to str
    removed_variables : tuple of str
    may_survive : bool
        Whether this launcher may stay for ever after the ranks of an aborted job, all on this machine, have ended.
    """

    argv: tuple[str, ...]
    set_variables: dict[str, str] = field(default_factory=dict)
    removed_variables: tuple[str, ...] = ()
    may_survive: bool = False

    def environment(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The environment to start `argv` in."""
        kept = {name: value for name, value in environ.items() if name not in self.removed_variables}
        return kept | self.set_variables

    def shown(self) -> str:
        """The same launch as one line for a shell."""
        words: list[str] = []
        if self.set_variables or self.removed_variables:
            words.append("env")
            words += [word for name in self.removed_variables for word in ("-u", name)]
            words += [f"{name}={value}" for name, value in self.set_variables.items()]
        return shlex.join([*words, *self.argv])


def this_machine() -> Machine:
    """Count what this process may use; affinity and cpusets count, the hardware alone does not."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return Machine(cores=len(cores), cpus=len(cpus), root=hasattr(os, "geteuid") and os.geteuid() == 0)


def clean_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environ` without the variables a launcher sets for its ranks and without those that mislead a BLAS."""
    return {
        name: value for name, value in environ.items() if not is_rank_variable(name) and name not in MISLEADING_BLAS
    }


def identify(path: Path, environ: Mapping[str, str] | None = None) -> Launcher:
    """Ask a launcher who it is; vendor "unknown" where it does not say."""
    try:
        done = subprocess.run(
            [str(path), "--version"],
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return Launcher(path, "unknown", ())
    return Launcher(path, *vendor_of(done.stdout + done.stderr))


def candidates(library: MPILibrary, path_variable: str, python: str = sys.executable) -> Iterable[Path]:
    """Launchers in the order of trust: beside Python, beside libmpi, beside the compiler, on PATH."""
    folders: list[Path] = [Path(python).absolute().parent]
    if library.path is not None:
        # <prefix>/lib/libmpi.so, <prefix>/lib/<arch>/libmpi.so, <prefix>/lib/<arch>/openmpi/lib/libmpi.so
        for file in dict.fromkeys([library.path, library.path.resolve()]):
            folders += [parent / "bin" for parent in list(file.parents)[1:5]]
        if not str(folders[0]).startswith("/usr") and not _holds(folders[0].parent, library.path):
            folders.append(folders.pop(0))  # the library is elsewhere: so, most likely, is its launcher
    if library.compiler:
        folders.append(Path(library.compiler).parent)
    folders += [Path(entry) for entry in path_variable.split(os.pathsep) if entry]
    seen = set()
    for folder in folders:
        for name in LAUNCHER_NAMES[library.vendor]:
            file = folder / name
            if file not in seen and file.is_file() and os.access(file, os.X_OK):
                seen.add(file)
                yield file


def belongs(launcher: Launcher, library: MPILibrary) -> bool:
    """Whether ranks started by `launcher` and using `library` find each other.

    Same vendor and, for Open MPI, same major version: 4 wires ranks up through ORTE, 5 through PRRTE, and whether one's
    ranks understand the other's launcher depends on the PMIx of both. Hydra's protocol is one for MPICH and Intel MPI
    of all ages, but their launchers pass different defaults.
    """
    if launcher.vendor != library.vendor or launcher.vendor == "unknown":
        return False
    if launcher.vendor == "openmpi":
        return launcher.version[:1] == library.version[:1]
    return True


def find_launcher(
    library: MPILibrary,
    environ: Mapping[str, str] = os.environ,
    python: str = sys.executable,
    identify: Callable[[Path], Launcher] = identify,
) -> Launcher:
    """Find the `mpirun` that belongs to `library`.

    Raises
    ------
    LauncherError
        Naming every launcher that was passed over, and whose it is.
    """
    strangers: list[Launcher] = []
    for path in candidates(library, environ.get("PATH", os.defpath), python):
        launcher = identify(path)
        if belongs(launcher, library):
            return launcher
        strangers.append(launcher)
    others = "; ".join(f"{stranger.path} is {stranger.name}" for stranger in strangers) or "none was found at all"
    raise LauncherError(
        f"no mpirun belongs to {library.name} ({library.path}): {others}; "
        f"install one MPI in this environment (pip install mpich) or load the module mpi4py was built with"
    )


def plan_launch(
    n_ranks: int,
    command: Sequence[str],
    launcher: Launcher,
    machine: Machine,
    *,
    threads: int | None = None,
    launcher_options: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Launch:
    """Decide the command line and the environment of one launch; a pure function of its arguments.

    Parameters
    ----------
    n_ranks : int
    command : sequence of str
        What every rank runs. A bare `python` becomes this interpreter, a bare `x.py` is run by it.
    launcher : Launcher
    machine : Machine
    threads : int, optional
        Threads per rank; `max(1, cpus // n_ranks)` by default. A value in `environ` wins over the default.
    launcher_options : sequence of str
        Handed to the launcher as they are.
    environ : mapping of str to str
    """
    options = list(launcher_options)
    placed = _has(options, PLACEMENT_OPTIONS) or any(name in environ for name in ("SLURM_JOB_ID", "PBS_JOBID"))
    crowded = not placed and n_ranks > machine.cores
    wanted: dict[str, str] = {}

    thread_count = threads if threads is not None else max(1, machine.cpus // n_ranks)
    if threads is not None or (not placed and "OMP_NUM_THREADS" not in environ):
        wanted |= {name: str(thread_count) for name in THREADS if threads is not None or name not in environ}

    if launcher.vendor == "mpich" and crowded:
        # Waiting ranks then sleep a moment instead of spinning: with 8 ranks on 2 cores an all-reduce of 8 bytes takes
        # a sixth of the time, one of 2 MiB a bit more than half.
        wanted["MPIR_CVAR_ENABLE_HEAVY_YIELD"] = environ.get("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
    if launcher.vendor == "openmpi":
        modern = launcher.version[:1] >= (5,)
        if machine.root:
            wanted |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        if crowded and not _has(options, MAPPING_OPTIONS):
            if modern:
                wanted["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
            else:
                wanted["OMPI_MCA_rmaps_base_oversubscribe"] = "true"
        if crowded:
            wanted["OMPI_MCA_mpi_yield_when_idle"] = "true"
        elif thread_count > 1 and not _has(options, ("--bind-to", "-bind-to")):
            # The default binds a rank to one core, and with it all of its threads.
            options += ["--bind-to", "none"]
        if _has(options, PLACEMENT_OPTIONS):
            # Open MPI carries only its own variables to another node.
            options += [word for name in THREADS if name in wanted for word in ("-x", name)]

    changed = {name: value for name, value in wanted.items() if environ.get(name) != value}
    removed = [name for name in environ if name.startswith(MISLEADING_BLAS) or is_rank_variable(name)]
    argv = (str(launcher.path), "-np", str(n_ranks), *options, *_runnable(command))
    return Launch(
        argv=argv,
        set_variables=changed,
        removed_variables=tuple(sorted(removed)),
        may_survive=launcher.vendor == "openmpi" and not placed,
    )


def launch_for(
    n_ranks: int, command: Sequence[str], *, threads: int | None = None, launcher_options: Sequence[str] = ()
) -> Launch:
    """Find library and launcher of this Python, and plan the launch of `command` on `n_ranks` ranks."""
    environ = clean_environment()
    launcher = find_launcher(find_library(environ=environ), environ)
    return plan_launch(n_ranks, command, launcher, this_machine(), threads=threads, launcher_options=launcher_options)


def _runnable(command: Sequence[str]) -> list[str]:
    words = list(command)
    if words and words[0] in ("python", "python3"):
        words[0] = sys.executable
    elif words and words[0].endswith(".py") and shutil.which(words[0]) is None:
        words.insert(0, sys.executable)
    return words


def _has(options: Sequence[str], names: Sequence[str]) -> bool:
    return any(option.split("=", 1)[0] in names for option in options)


def _holds(prefix: Path, file: Path) -> bool:
    return prefix.resolve() in file.resolve().parents
