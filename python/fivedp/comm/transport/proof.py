"""Does this MPI take device memory? It is asked first, and not believed: then it is tried, where a crash harms nobody.

A library that was built without CUDA says so, and that ends it. One that claims to take device memory sends some to
itself in a short-lived process (self_send.py): a false claim ends there in a segmentation fault, and here in "no". The
answer is kept in a file, under the versions of library and driver and the settings that decide, so that the trial runs
once and not in every job; ranks of one node that start together wait for one trial.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mpi4py import MPI

from fivedp.comm.launch_check import is_rank_variable
from fivedp.comm.transport.gpu import Gpu

_PROGRAM = Path(__file__).with_name("self_send.py")
_DEADLINE_S = 60.0
_OFF = ("", "0", "false", "no", "off")
# Libraries that take device memory only where they are told to, and by which variable.
_NEEDS = (("CRAY MPICH", "MPICH_GPU_SUPPORT_ENABLED"), ("Intel(R) MPI", "I_MPI_OFFLOAD"), ("MVAPICH2", "MV2_USE_CUDA"))
# Variables that take the ability from libraries that have it, and the values that do.
_FORBIDS = (
    ("MPIR_CVAR_ENABLE_GPU", _OFF[1:]),
    ("OMPI_MCA_opal_cuda_support", _OFF[1:]),
    ("OMPI_MCA_accelerator", ("null", "^cuda")),
)
_DECIDING = (*(name for _, name in _NEEDS), *(name for name, _ in _FORBIDS), "UCX_TLS", "OMPI_MCA_pml")


@dataclass(frozen=True)
class Verdict:
    """Whether MPI takes device memory, and how that is known."""

    works: bool
    why: str
    lasting: bool = True
    """Whether it would be the same the next time."""


_known: dict[str, Verdict] = {}


def library_name() -> str:
    """The first line in which the MPI library speaks of itself."""
    lines = MPI.Get_library_version().strip("\0 \n").splitlines()
    return " ".join(lines[0].split()) if lines else "an MPI without a name"


def query() -> bool | None:
    """What `MPIX_Query_cuda_support` answers; None where the library does not have it.

    mpi4py opens the library in a scope of its own; a handle of its module finds the symbol behind it.
    """
    try:
        return bool(ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return None


def ask(library: str, environ: Mapping[str, str], query: Callable[[], bool | None], forced: bool = False) -> Verdict:
    """What library and settings say, before anything is tried.

    Parameters
    ----------
    library : str
        As `library_name` gives it.
    environ : mapping of str to str
    query : callable
        As the function `query`.
    forced : bool
        Whether the user asks for it: then a library that can't be asked is tried.
    """
    told = False
    for vendor, name in _NEEDS:
        if vendor.lower() in library.lower():
            if environ.get(name, "").lower() in _OFF:
                return Verdict(False, f"{library} takes device memory only where {name}=1 is set")
            told = True
    for name, values in _FORBIDS:
        if environ.get(name, "").lower() in values:
            return Verdict(False, f"{name}={environ[name]} forbids it")
    answer = query()
    if answer is None and not (told or forced):
        return Verdict(False, f"{library} can't be asked: it has no MPIX_Query_cuda_support")
    if answer is False and not told:
        return Verdict(False, f"{library} says that it was built without CUDA")
    return Verdict(True, f"{library} says that it takes device memory")


def prove(library: str, device: int, environ: Mapping[str, str] = os.environ) -> Verdict:
    """Send device memory to oneself in a process of its own."""
    clean = {name: value for name, value in environ.items() if not is_rank_variable(name)}
    command = [sys.executable, str(_PROGRAM), str(device)]
    try:
        done = subprocess.run(
            command, env=clean, stdin=subprocess.DEVNULL, capture_output=True, timeout=_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Verdict(False, f"a trial of {library} did not end within {_DEADLINE_S:g} s", lasting=False)
    except OSError as error:
        return Verdict(False, f"a trial of {library} can't be run: {error.strerror}", lasting=False)
    if done.returncode == 0 and b"proven" in done.stdout.split():
        return Verdict(True, f"{library} was tried with device memory and proven")
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    said = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()
    # A signal is MPI touching what it can't; an exception, such as one of CuPy without memory, may pass.
    lasting = done.returncode < 0 or any(line.startswith("wrong values") for line in said)
    reason = next((line for line in said if line.startswith("wrong values")), said[-1] if said else "")
    return Verdict(False, f"a trial of {library} failed: {ended}{f', {reason}' if reason else ''}", lasting)


def cuda_mpi_verdict(gpu: Gpu, forced: bool = False) -> Verdict:
    """Whether device memory may be handed to MPI: asked, proven, and remembered.

    Parameters
    ----------
    gpu : Gpu
    forced : bool
        As in `ask`.
    """
    library = library_name()
    claim = ask(library, os.environ, query, forced)
    if not claim.works:
        return claim
    name = gpu.runtime.getDeviceProperties(gpu.device)["name"].decode(errors="replace")
    settings = [f"{name}={os.environ[name]}" for name in _DECIDING if name in os.environ]
    key = "; ".join([library, f"driver {gpu.runtime.driverGetVersion()}", name, *settings])
    if key not in _known:
        file = cache_file()
        with _alone(file):
            verdict = _read(file, key) or prove(library, gpu.device)
            if verdict.lasting:
                _write(file, key, verdict)
        _known[key] = verdict
    return _known[key]


# -- the file ----------------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Where verdicts are kept; removing it has them proven anew."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "fivedp", "cuda_mpi.json")


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Be the only process of this user that tries; where files can't be locked, several try."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(file.with_suffix(".lock"), "w"))
            end = time.monotonic() + _DEADLINE_S
            while time.monotonic() < end:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
        yield


def _entries(file: Path) -> dict[str, list[object]]:
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _read(file: Path, key: str) -> Verdict | None:
    entry = _entries(file).get(key)
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], bool):
        return Verdict(entry[0], str(entry[1]))
    return None


def _write(file: Path, key: str, verdict: Verdict) -> None:
    entries = _entries(file) | {key: [verdict.works, verdict.why]}
    with contextlib.suppress(OSError):
        descriptor, draft = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(descriptor, "w") as out:
            json.dump(entries, out, indent=1)
        os.replace(draft, file)  # whole or not at all: other ranks read it
