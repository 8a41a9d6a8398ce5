"""Parts of the transports that need no second rank: the pipeline of staging, what MPI is asked and has to prove."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpu_double
from fivedp.comm.transport import proof
from fivedp.comm.transport.gpu import Gpu
from fivedp.comm.transport.staged import CHUNKS_IN_FLIGHT, StagedLink
from mpi_launcher import Finished, run_mpi

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[Any]:
    module = gpu_double.install(monkeypatch, seed)
    yield module
    module.gpu.running = False


class Request:
    """A message that is done when the test says so."""

    def __init__(self, buffer: Any, log: list[str], name: str) -> None:
        self.buffer, self.done = buffer, False
        log.append(name)

    def Test(self) -> bool:
        return self.done


class Communicator:
    """What a link needs of one, with its messages in hand."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.messages = log, list[Request]()

    def Isend(self, message: list[Any], rank: int, number: int) -> Request:
        assert (rank, number) == (1, 34)
        self.messages.append(Request(message[0], self.log, f"send {len(self.messages)}"))
        return self.messages[-1]

    def Irecv(self, message: list[Any], rank: int, number: int) -> Request:
        assert (rank, number) == (1, 34)
        self.messages.append(Request(message[0], self.log, f"receive {len(self.messages)}"))
        return self.messages[-1]


def pipeline(cupy: Any, n_bytes: int) -> tuple[list[str], Communicator, Any, StagedLink]:
    """(log, communicator, array, link): the log names what was begun, in order."""
    log = list[str]()
    gpu, comm = Gpu(cupy), Communicator(log)
    plain = gpu.copy

    def copy(target: int, source: int, size: int, stream: Any) -> None:
        log.append(f"copy {sum(entry.startswith('copy') for entry in log)}")
        plain(target, source, size, stream)

    gpu.copy = copy  # type: ignore[method-assign]
    return log, comm, cupy.empty(n_bytes, np.uint8), StagedLink(gpu, comm, 1, 1000)  # type: ignore[arg-type]


def settle(cupy: Any, transfer: Any) -> None:
    """Advance until nothing moves and the device has nothing to do."""
    idle = moved = False
    while moved or not idle:
        idle = not any(stream.queue for stream in list(cupy.gpu.streams))
        moved = transfer.advance()


def test_a_chunk_is_copied_while_the_one_before_is_sent(cupy: Any, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, 3500, dtype=np.uint8)
    log, comm, array, link = pipeline(cupy, 3500)
    array[...] = cupy.asarray(data)
    transfer = link.send(link.gpu.memory_of(array), 34)
    settle(cupy, transfer)
    assert CHUNKS_IN_FLIGHT == 2
    assert log == ["copy 0", "copy 1", "send 0", "send 1"]  # chunk 1 is on the host while chunk 0 is not received
    assert not transfer.issued
    comm.messages[0].done = True
    settle(cupy, transfer)
    assert log[4:] == ["copy 2", "send 2"]  # and no buffer more
    for message in comm.messages:
        message.done = True
    settle(cupy, transfer)
    assert transfer.issued
    assert not transfer.done  # the last chunk has not been received
    assert b"".join(bytes(message.buffer) for message in comm.messages) == data.tobytes()
    comm.messages[3].done = True
    settle(cupy, transfer)
    assert transfer.done
    comm.messages.clear()
    del message
    assert cupy.gpu.pinned_in_use == 0


def test_a_chunk_is_received_while_the_one_before_is_copied(cupy: Any, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, 2500, dtype=np.uint8)
    log, comm, array, link = pipeline(cupy, 2500)
    transfer = link.receive(link.gpu.memory_of(array), 34)
    for chunk in range(3):
        settle(cupy, transfer)
        assert not transfer.arrived
        message = comm.messages[chunk]
        message.buffer[:] = data[1000 * chunk : 1000 * chunk + message.buffer.size]
        message.done = True
    settle(cupy, transfer)
    assert log == ["receive 0", "receive 1", "copy 0", "receive 2", "copy 1", "copy 2"]
    assert transfer.done
    stream = cupy.cuda.get_current_stream()
    stream.wait_event(transfer.event)
    assert cupy.asnumpy(array).tobytes() == data.tobytes()


# ---------------------------------------------------------------- what MPI is asked


@pytest.mark.parametrize(
    ("library", "environ", "answer", "works", "why"),
    [
        ("Open MPI v5.0.11", {}, True, True, "says that it takes device memory"),
        ("Open MPI v5.0.11", {}, False, False, "says that it was built without CUDA"),
        ("Open MPI v5.0.11", {"OMPI_MCA_accelerator": "null"}, True, False, "OMPI_MCA_accelerator=null forbids it"),
        ("MPICH Version: 5.0.2", {"MPIR_CVAR_ENABLE_GPU": "0"}, True, False, "MPIR_CVAR_ENABLE_GPU=0 forbids it"),
        ("MPICH Version: 3.2", {}, None, False, "can't be asked: it has no MPIX_Query_cuda_support"),
        ("MPI VERSION : CRAY MPICH version 8.1", {}, None, False, "only where MPICH_GPU_SUPPORT_ENABLED=1 is set"),
        ("CRAY MPICH 8.1", {"MPICH_GPU_SUPPORT_ENABLED": "0"}, True, False, "only where MPICH_GPU_SUPPORT_ENABLED=1"),
        ("CRAY MPICH 8.1", {"MPICH_GPU_SUPPORT_ENABLED": "1"}, None, True, "says that it takes device memory"),
        ("Intel(R) MPI Library 2021.18", {}, True, False, "only where I_MPI_OFFLOAD=1 is set"),
        ("Intel(R) MPI Library 2021.18", {"I_MPI_OFFLOAD": "1"}, True, True, "says that it takes device memory"),
    ],
)
def test_what_library_and_settings_say(
    library: str, environ: dict[str, str], answer: bool | None, works: bool, why: str
) -> None:
    verdict = proof.ask(library, environ, lambda: answer)
    assert verdict.works == works
    assert why in verdict.why


def test_who_insists_has_a_library_tried_that_cannot_be_asked() -> None:
    assert proof.ask("MPICH 3.2", {}, lambda: None, forced=True).works
    assert not proof.ask("MPICH 3.2", {}, lambda: False, forced=True).works


def test_the_library_of_this_environment_answers() -> None:
    assert proof.query() in (True, False)
    assert re.search(r"MPI.*\d", proof.library_name())


@pytest.fixture
def trial(tmp_path: Path, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose `cupy` the trial imports, and a cache of its own."""
    (tmp_path / "cupy.py").write_text("import gpu_double, sys\nsys.modules['cupy'] = gpu_double.make_module()\n")
    paths = [str(tmp_path), str(TESTS), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proof, "query", lambda: True)
    monkeypatch.setattr(proof, "_known", {})
    for name in proof._DECIDING:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_library_is_tried_once(trial: Path, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = proof.cuda_mpi_verdict(Gpu(cupy))
    assert verdict.works, verdict.why
    assert verdict.why.endswith("was tried with device memory and proven")
    # Neither this process nor the next tries again ...
    monkeypatch.setattr(subprocess, "run", None)
    assert proof.cuda_mpi_verdict(Gpu(cupy)).works
    monkeypatch.setattr(proof, "_known", {})
    assert proof.cuda_mpi_verdict(Gpu(cupy)).works
    # ... unless library, driver or settings have changed.
    monkeypatch.undo()
    text = (trial / "fivedp" / "cuda_mpi.json").read_text()
    assert "driver 13000" in text


@pytest.mark.parametrize(
    ("program", "why", "kept"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "failed: signal 11", True),
        ("print('wrong values in a message of 7 bytes')\nraise SystemExit(1)\n", "exit status 1, wrong values", True),
        ("raise MemoryError('out of memory')\n", "exit status 1, MemoryError: out of memory", False),
        ("import time\ntime.sleep(60)\n", "did not end within 1 s", False),
        ("pass\n", "failed: exit status 0", False),
    ],
)
def test_a_trial_that_fails_is_no(
    trial: Path, cupy: Any, monkeypatch: pytest.MonkeyPatch, program: str, why: str, kept: bool
) -> None:
    (trial / "program.py").write_text(program)
    monkeypatch.setattr(proof, "_PROGRAM", trial / "program.py")
    monkeypatch.setattr(proof, "_DEADLINE_S", 1.0 if "sleep" in program else 30.0)
    verdict = proof.cuda_mpi_verdict(Gpu(cupy))
    assert not verdict.works
    assert why in verdict.why
    assert (trial / "fivedp" / "cuda_mpi.json").exists() == kept


def test_a_cache_that_is_broken_or_out_of_reach_is_done_without(
    trial: Path, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trial / "program.py").write_text("print('proven')\n")
    monkeypatch.setattr(proof, "_PROGRAM", trial / "program.py")
    (trial / "fivedp").mkdir()
    (trial / "fivedp" / "cuda_mpi.json").write_text("[3")
    assert proof.cuda_mpi_verdict(Gpu(cupy)).works
    monkeypatch.setattr(proof, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-such-folder")
    assert proof.cuda_mpi_verdict(Gpu(cupy)).works


# ---------------------------------------------------------------- a rank fails in the middle

FAILING = """
import sys, time
import numpy as np
from mpi4py import MPI
import gpu_double
cupy = sys.modules["cupy"] = gpu_double.make_module()
from fivedp.comm.transport import choice, ipc, proof
ipc.allocation_of = lambda pointer: ipc.Allocation(*cupy.gpu.allocation_of(pointer))
choice.cuda_mpi_verdict = lambda gpu, forced: proof.Verdict(True, "")
import fivedp
from fivedp.ops import execution
comm = MPI.COMM_WORLD
a, b = cupy.asarray(np.ones((90, 8), np.float32)), cupy.asarray(np.ones((8, 90), np.float32))
def multiply():
    return fivedp.sharded_matmul(a, b, "m k/p, k/p n -> m n", comm)
multiply()
def broken(self, *arguments):
    raise MemoryError("seeded fault")
if comm.rank == 1:
    execution._Run._multiply = broken
begin = time.monotonic()
try:
    multiply()
except BaseException as error:
    told = f"{type(error).__name__} after {time.monotonic() - begin:.1f} s: {error}"
    print(f"<{comm.rank}> {told} </{comm.rank}>", flush=True)
"""


@pytest.mark.parametrize("name", ["staged", "ipc", "cuda_mpi"])
def test_a_rank_that_fails_ends_the_call_of_the_others(name: str) -> None:
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
    env = {"FIVEDP_TRANSPORT": name, "FIVEDP_STAGING_CHUNK": "1000", "PYTHONPATH": paths}
    done: Finished = run_mpi(3, FAILING, timeout=60, env=env)
    assert not done.timed_out, done.output
    # The launcher may put what two ranks print at once on one line.
    found = dict(re.findall(r"<(\d)> (.*?) </\1>", done.stdout, re.S))
    assert found["1"].startswith("MemoryError"), done.output
    for rank in "02":
        assert found[rank].startswith("PeerError"), done.output
        assert "rank 1: MemoryError: seeded fault" in found[rank]
        assert float(found[rank].split(" after ")[1].split()[0]) < 5


def test_numpy_users_load_nothing_of_it() -> None:
    program = (
        "import sys, numpy as np, fivedp\nfrom mpi4py import MPI\n"
        "fivedp.sharded_matmul(np.ones((2, 2)), np.ones((2, 2)), 'm k/p, k/p n -> m n', MPI.COMM_WORLD)\n"
        "assert 'cupy' not in sys.modules and 'fivedp.comm.transport.device' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
