"""What a benchmark process may not inherit, and what it really runs on.

A shell may export variables that make the BLAS under NumPy choose the kernels of another chip: a baseline measured so
is a baseline invented. `settle` removes them and, where NumPy has been loaded already, starts the process again; MPI
allows that after `MPI_Finalize` (checked with the MPICH and Open MPI wheels), and nothing has been sent by then.
`describe` records what is used in the end: libraries, threads, instruction set, transport. It names no host and no
path.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

MISLEADING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_DEBUG_CPU_TYPE")
MISLEADING_PREFIXES = ("NVPL_",)
REMOVED = "FIVEDP_BENCH_REMOVED"  # carries the names over the restart, for the record
# What a choice of kernel could depend on; the whole flag line of /proc/cpuinfo would drown it.
TELLING_FLAGS = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
                 "avx512_fp16", "amx_bf16", "amx_tile", "asimd", "asimdhp", "bf16", "sve", "sve2")  # fmt: skip


def misleading_variables(environ: MutableMapping[str, str] | None = None) -> list[str]:
    """Names of the variables set in `environ` that would falsify a baseline."""
    names = os.environ if environ is None else environ
    return sorted(n for n in names if n in MISLEADING or n.startswith(MISLEADING_PREFIXES))


def clean(environ: MutableMapping[str, str] | None = None) -> list[str]:
    """Remove the misleading variables from `environ` (this process by default) and return their names."""
    target = os.environ if environ is None else environ
    names = misleading_variables(target)
    for name in names:
        del target[name]
    return names


def settle() -> None:
    """Drop misleading variables; start the process again where NumPy was loaded under them.

    Call before the first message. Every rank of a launch inherits the same variables, so every rank restarts.
    """
    names = clean()
    if not names:
        return
    os.environ[REMOVED] = " ".join(names)
    if "numpy" not in sys.modules and "torch" not in sys.modules:
        return
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def removed_variables() -> list[str]:
    """Names that `settle` removed from this process, also before a restart."""
    return os.environ.get(REMOVED, "").split()


def affinity() -> set[int]:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def cpu() -> dict[str, Any]:
    """Model name, telling flags and core count of the CPU."""
    model, flags = platform.machine(), set()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if found := re.search(r"^(?:model name|CPU part)\s*:\s*(.+)$", text, re.M):
            model = found[1].strip()
        if found := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M):
            flags = set(found[1].split())
    return {"model": model, "flags": [f for f in TELLING_FLAGS if f in flags], "cores": os.cpu_count() or 1}


def blas() -> list[dict[str, Any]]:
    """Each BLAS in this process: its library, version, kernels chosen and threads."""
    import threadpoolctl

    return [
        {
            "library": info["internal_api"],
            "version": info.get("version"),
            "core": info.get("architecture"),
            "threads": info["num_threads"],
        }
        for info in threadpoolctl.threadpool_info()
        if info.get("user_api") == "blas"
    ]


def mpi() -> dict[str, Any]:
    """Name, version and transport of the MPI library in this process."""
    from mpi4py import MPI

    text = MPI.Get_library_version().replace("\x00", "")
    name, version = MPI.get_vendor()
    transport = ""
    if found := re.search(r"^MPICH Device:\s*(\S+)", text, re.M):
        transport = found[1]
    chosen = [
        v for v in ("OMPI_MCA_btl", "OMPI_MCA_pml", "UCX_TLS", "FI_PROVIDER", "MPIR_CVAR_CH4_NETMOD") if v in os.environ
    ]
    if chosen:
        transport = " ".join([transport, *(f"{v}={os.environ[v]}" for v in chosen)]).strip()
    return {
        "name": name,
        "version": ".".join(map(str, version)),
        "standard": ".".join(map(str, MPI.Get_version())),
        "transport": transport or "chosen by the library",
    }


def cores_and_nodes(comm: Any) -> tuple[int, int]:
    """Cores that the ranks of `comm` may use together, and the nodes they live on. Collective."""
    from mpi4py import MPI

    from fivedp.bench import agree

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    mine: set[int] = set()
    for other in agree.collect(node, sorted(affinity())):
        mine.update(other)
    first = node.rank == 0
    node.Free()
    cores, nodes = agree.total(comm, float(len(mine)) if first else 0.0, float(first))
    return int(cores), int(nodes)


def revision() -> str | None:
    """The git revision of the source this package runs from, `+` where it was edited; None for an installed wheel."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()

    try:
        # A repository that merely contains this folder (an environment inside a checkout) says nothing about the wheel.
        if not git("ls-files", "--", "environment.py"):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe(comm: Any, threads: int) -> dict[str, Any]:
    """The record of a run: everything a reader needs to know what was measured. Collective; the same on every rank."""
    import numpy as np

    import fivedp
    from fivedp.bench import agree

    cores, nodes = cores_and_nodes(comm)
    record = {
        "fivedp": getattr(fivedp, "__version__", None),
        "revision": revision() if comm.rank == 0 else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu(),
        "isa": _isa(),
        "gpu": [],
        "blas": blas(),
        "mpi": mpi(),
        "ranks": comm.size,
        "threads": threads,
        "cores": cores,
        "nodes": nodes,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "removed_variables": removed_variables(),
    }
    shared: dict[str, Any] = agree.collect(comm, record)[0]
    return shared


def _isa() -> str:
    """The instruction set that fivedp's kernels use."""
    from fivedp.kernels import gemm

    return str(gemm.isa())
