"""Which MPI library this Python loads, found without initialising it.

mpi4py's wheels choose libmpi at run time: a symbol already in the process, then the environment's own `lib`, then the
user's, then the interpreter's, then the dynamic linker. Following these rules by hand would be wrong as soon as they
change, so a short-lived process imports `mpi4py.MPI` with initialisation switched off and reads its own memory map.
That costs 0.1 s, and a library that hangs or crashes on loading takes only that process with it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PROBE = """
import json, sys
answer = {}
import mpi4py
answer["mpi4py"] = mpi4py.__version__
mpi4py.rc.initialize = False
mpi4py.rc.finalize = False
from mpi4py import MPI
answer["version_text"] = MPI.Get_library_version().strip("\\0 \\n")
answer["build"] = {k: str(v) for k, v in mpi4py.get_config().items()}
paths = []
try:
    with open("/proc/self/maps") as maps:
        paths = sorted({line.split(None, 5)[5].strip() for line in maps if "/lib" in line and ".so" in line})
except OSError:
    pass
answer["paths"] = [p for p in paths if "/libmpi" in p or "/libmpich" in p]
answer["module"] = MPI.__file__
print("\\n" + json.dumps(answer))
"""

VENDORS = ("openmpi", "mpich", "impi")
NAMES = {"openmpi": "Open MPI", "mpich": "MPICH", "impi": "Intel MPI", "unknown": "unknown MPI"}


@dataclass(frozen=True)
class MPILibrary:
    """The MPI that `import mpi4py.MPI` loads in one Python.

    Attributes
    ----------
    vendor : {"openmpi", "mpich", "impi", "unknown"}
    version : tuple of int
        Empty where the library does not state one.
    path : Path or None
        The file of libmpi; None where the system does not tell.
    mpi4py : str
        Version of mpi4py.
    compiler : str or None
        The `mpicc` that mpi4py was built with; None for its wheels.
    """

    vendor: str
    version: tuple[int, ...]
    path: Path | None
    mpi4py: str
    compiler: str | None = None

    @property
    def name(self) -> str:
        """Name and version, as in `Open MPI 5.0.11`."""
        return " ".join([NAMES[self.vendor], ".".join(map(str, self.version))]).strip()


class MPILibraryError(RuntimeError):
    """mpi4py is missing, or loads no MPI."""


def vendor_of(text: str) -> tuple[str, tuple[int, ...]]:
    """Read vendor and version from the text that a library or a launcher prints about itself.

    Returns
    -------
    (vendor, version)
        `("unknown", ())` where nothing is recognised.
    """
    patterns = (
        # Intel's launcher is Hydra and Intel's library is an MPICH: theirs first.
        ("impi", r"Intel\(R\) MPI Library.*?(?:Version|Library)?\s*(\d+(?:\.\d+)+)"),
        ("openmpi", r"Open MPI\)?[^\d\n]*v?(\d+(?:\.\d+)+)"),
        ("mpich", r"(?:MPICH|HYDRA)[^\n]*?Version:?\s*(\d+(?:\.\d+)+)"),
        ("mpich", r"HYDRA build details:\s*Version:\s*(\d+(?:\.\d+)+)"),
    )
    for vendor, pattern in patterns:
        match = re.search(pattern, text, re.IGNORECASE)
        if match:
            return vendor, tuple(int(part) for part in match.group(1).split("."))
    return "unknown", ()


def find_library(
    python: str = sys.executable, environ: Mapping[str, str] | None = None, deadline: float = 20.0
) -> MPILibrary:
    """Ask `python` which MPI its mpi4py loads.

    Parameters
    ----------
    python : str
        The interpreter that the ranks will run.
    environ : mapping, optional
        Its environment; this process's by default. Variables of a launcher should be removed (`clean_environment`).
    deadline : float
        Seconds after which a library that does not load counts as broken.

    Raises
    ------
    MPILibraryError
        Where mpi4py is missing or no MPI library loads.
    """
    try:
        done = subprocess.run(
            [python, "-c", _PROBE],
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MPILibraryError(f"importing mpi4py.MPI in {python} did not end within {deadline:.0f} s") from None
    except OSError as error:
        raise MPILibraryError(f"{python} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        if "No module named 'mpi4py'" in done.stderr:
            raise MPILibraryError(f"mpi4py is not installed in {python}")
        causes = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)] or lines[-1:]
        reason = causes[-1] if causes else f"exit status {done.returncode}"
        raise MPILibraryError(f"mpi4py loads no MPI library in {python}: {reason}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    vendor, version = vendor_of(answer["version_text"])
    return MPILibrary(
        vendor=vendor,
        version=version,
        path=_library_file(answer["paths"]),
        mpi4py=answer["mpi4py"],
        compiler=answer["build"].get("mpicc"),
    )


def _library_file(paths: list[str]) -> Path | None:
    # libmpi itself, not libmpi_cxx, libmpicxx or mpi4py's module beside it.
    exact = [p for p in paths if re.match(r"libmpi(ch)?(_abi)?\.so", Path(p).name)]
    return Path(exact[0]) if exact else None
