"""The launcher that belongs to the library is found, strangers are passed over, and what a launch needs is set."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from fivedp.cli.launcher import (
    Launcher,
    LauncherError,
    Machine,
    belongs,
    candidates,
    clean_environment,
    find_launcher,
    plan_launch,
    this_machine,
)
from fivedp.cli.mpi_library import MPILibrary, MPILibraryError, find_library, vendor_of

OPENMPI = Launcher(Path("/opt/x/bin/mpirun"), "openmpi", (5, 0, 11))
OPENMPI_4 = Launcher(Path("/usr/bin/mpirun"), "openmpi", (4, 1, 4))
MPICH = Launcher(Path("/opt/y/bin/mpirun"), "mpich", (5, 0, 2))
SMALL = Machine(cores=2, cpus=2, root=False)
LARGE = Machine(cores=16, cpus=32, root=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to ...", ("openmpi", (5, 0, 11))),
        ("Open MPI v5.0.11, package: Open MPI user@host Distribution, ident: 5.0.11", ("openmpi", (5, 0, 11))),
        ("HYDRA build details:\n    Version:                                 5.0.2\n", ("mpich", (5, 0, 2))),
        ("MPICH Version:      4.0.2\nMPICH Release date: ...", ("mpich", (4, 0, 2))),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18 Build 2026", ("impi", (2021, 18))),
        ("Intel(R) MPI Library 2021.18 for Linux* OS", ("impi", (2021, 18))),
        ("something else 1.2.3", ("unknown", ())),
        ("", ("unknown", ())),
    ],
)
def test_vendor_and_version_are_read(text: str, expected: tuple[str, tuple[int, ...]]) -> None:
    assert vendor_of(text) == expected


def fake_launcher(folder: Path, says: str, name: str = "mpirun") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\necho '{says}'\n")
    file.chmod(0o755)
    return file


def library(prefix: Path, vendor: str, version: tuple[int, ...], folder: str = "lib") -> MPILibrary:
    (prefix / folder).mkdir(parents=True, exist_ok=True)
    file = prefix / folder / ("libmpi.so.40" if vendor == "openmpi" else "libmpi.so.12")
    file.touch()
    return MPILibrary(vendor=vendor, version=version, path=file, mpi4py="4.1.2")


@pytest.mark.parametrize("folder", ["lib", "lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu/openmpi/lib"])
def test_launcher_beside_the_library_is_found(tmp_path: Path, folder: str) -> None:
    wanted = fake_launcher(tmp_path / "mpi" / "bin", "mpirun (Open MPI) 5.0.11")
    loaded = library(tmp_path / "mpi", "openmpi", (5, 0, 11), folder)
    python = tmp_path / "venv" / "bin" / "python"
    found = find_launcher(loaded, {"PATH": str(tmp_path / "none")}, str(python))
    assert found == Launcher(wanted, "openmpi", (5, 0, 11))


def test_stranger_first_on_path_is_passed_over(tmp_path: Path) -> None:
    fake_launcher(tmp_path / "system", "mpirun (Open MPI) 4.1.4")
    wanted = fake_launcher(tmp_path / "module", "HYDRA build details:\n Version: 4.3.1")
    loaded = library(tmp_path / "elsewhere", "mpich", (4, 3, 1))
    path = os.pathsep.join([str(tmp_path / "system"), str(tmp_path / "module")])
    assert find_launcher(loaded, {"PATH": path}, str(tmp_path / "python")).path == wanted


def test_other_name_of_the_right_launcher_is_found(tmp_path: Path) -> None:
    # As Debian has it: one folder, two MPIs, the plain name given to one of them.
    fake_launcher(tmp_path / "bin", "mpirun (Open MPI) 4.1.4")
    wanted = fake_launcher(tmp_path / "bin", "HYDRA build details:\n Version: 4.0.2", "mpiexec.hydra")
    loaded = library(tmp_path, "mpich", (4, 0, 2))
    assert find_launcher(loaded, {"PATH": ""}, str(tmp_path / "python")).path == wanted


def test_only_strangers_is_an_error_that_names_them(tmp_path: Path) -> None:
    stranger = fake_launcher(tmp_path / "system", "mpirun (Open MPI) 4.1.4")
    loaded = library(tmp_path / "elsewhere", "mpich", (5, 0, 2))
    with pytest.raises(LauncherError) as caught:
        find_launcher(loaded, {"PATH": str(tmp_path / "system")}, str(tmp_path / "python"))
    assert f"{stranger} is Open MPI 4.1.4" in str(caught.value)
    assert "MPICH 5.0.2" in str(caught.value)


def test_environment_of_this_python_comes_before_path(tmp_path: Path) -> None:
    venv, system = tmp_path / "venv", tmp_path / "system"
    inside = fake_launcher(venv / "bin", "HYDRA build details:\n Version: 5.0.2")
    fake_launcher(system, "HYDRA build details:\n Version: 4.0.2")
    order = list(candidates(library(venv, "mpich", (5, 0, 2)), str(system), str(venv / "bin" / "python")))
    assert order[0] == inside


def test_major_version_matters_for_open_mpi_only() -> None:
    assert not belongs(OPENMPI_4, MPILibrary("openmpi", (5, 0, 11), None, "4.1.2"))
    assert belongs(OPENMPI, MPILibrary("openmpi", (5, 0, 7), None, "4.1.2"))
    assert belongs(MPICH, MPILibrary("mpich", (4, 3, 0), None, "4.1.2"))
    assert not belongs(Launcher(Path("x"), "unknown", ()), MPILibrary("unknown", (), None, "4.1.2"))


def test_this_python_finds_its_own_launcher() -> None:
    environ = clean_environment()
    loaded = find_library(environ=environ)
    found = find_launcher(loaded, environ)
    assert found.vendor == loaded.vendor
    if loaded.path is not None and Path(sys.prefix) in loaded.path.parents:
        assert Path(sys.prefix) in found.path.parents


def test_missing_library_is_told_in_one_sentence(tmp_path: Path) -> None:
    environ = clean_environment() | {"MPI4PY_LIBMPI": str(tmp_path / "libmpi-none.so")}
    with pytest.raises(MPILibraryError, match="loads no MPI library") as caught:
        find_library(environ=environ)
    assert "\n" not in str(caught.value)


def test_library_that_hangs_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(MPILibraryError, match="did not end within 1 s"):
        find_library(environ=clean_environment() | {"PYTHONPATH": str(tmp_path)}, deadline=1)


def test_crowded_open_mpi_is_allowed_and_yields() -> None:
    launch = plan_launch(8, ["x"], OPENMPI, SMALL, environ={})
    assert launch.set_variables["PRTE_MCA_rmaps_default_mapping_policy"] == ":oversubscribe"
    assert launch.set_variables["OMPI_MCA_mpi_yield_when_idle"] == "true"
    assert "OMPI_ALLOW_RUN_AS_ROOT" not in launch.set_variables
    old = plan_launch(8, ["x"], OPENMPI_4, SMALL, environ={})
    assert old.set_variables["OMPI_MCA_rmaps_base_oversubscribe"] == "true"


def test_crowded_mpich_yields_unless_told_otherwise() -> None:
    name = "MPIR_CVAR_ENABLE_HEAVY_YIELD"
    assert plan_launch(8, ["x"], MPICH, SMALL, environ={}).set_variables[name] == "1"
    assert name not in plan_launch(2, ["x"], MPICH, SMALL, environ={}).set_variables
    chosen = {name: "0"}
    assert plan_launch(8, ["x"], MPICH, SMALL, environ=chosen).environment(chosen)[name] == "0"


def test_roomy_open_mpi_is_left_to_its_defaults() -> None:
    launch = plan_launch(16, ["x"], OPENMPI, LARGE, environ={}, threads=1)
    assert not [name for name in launch.set_variables if "MCA" in name]
    assert "--bind-to" not in launch.argv


def test_threads_are_not_bound_to_one_core() -> None:
    launch = plan_launch(2, ["x"], OPENMPI, LARGE, environ={})
    assert launch.set_variables["OMP_NUM_THREADS"] == "16"
    assert launch.argv[3:5] == ("--bind-to", "none")
    chosen = plan_launch(2, ["x"], OPENMPI, LARGE, environ={}, launcher_options=["--bind-to", "socket"])
    assert chosen.argv[3:5] == ("--bind-to", "socket")
    assert chosen.argv.count("--bind-to") == 1


def test_root_is_allowed_where_open_mpi_would_refuse() -> None:
    launch = plan_launch(1, ["x"], OPENMPI, Machine(2, 2, root=True), environ={})
    assert launch.set_variables["OMPI_ALLOW_RUN_AS_ROOT"] == "1"
    assert launch.set_variables["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    mpich = plan_launch(1, ["x"], MPICH, Machine(2, 2, root=True), environ={})
    assert not [name for name in mpich.set_variables if "ROOT" in name]


def test_hosts_and_allocations_are_not_judged_by_this_machine() -> None:
    for options, environ in ([["--host", "a:4,b:4"], {}], [[], {"SLURM_JOB_ID": "1"}]):
        launch = plan_launch(8, ["x"], OPENMPI, SMALL, environ=environ, launcher_options=options)
        assert "PRTE_MCA_rmaps_default_mapping_policy" not in launch.set_variables
        assert not launch.may_survive


def test_only_open_mpi_on_this_machine_may_survive_its_ranks() -> None:
    assert plan_launch(2, ["x"], OPENMPI, SMALL, environ={}).may_survive
    assert not plan_launch(2, ["x"], MPICH, SMALL, environ={}).may_survive


def test_misleading_variables_go_and_user_settings_stay() -> None:
    environ = {
        "OPENBLAS_CORETYPE": "Haswell",
        "OPENBLAS_L2_SIZE": "512",
        "MKL_DEBUG_CPU_TYPE": "5",
        "OMP_NUM_THREADS": "3",
        "PMI_RANK": "0",
        "OMPI_COMM_WORLD_SIZE": "2",
        "PMIX_MCA_gds": "hash",
        "HOME": "/home/x",
    }
    launch = plan_launch(2, ["x"], MPICH, LARGE, environ=environ)
    left = launch.environment(environ)
    assert left["OMP_NUM_THREADS"] == "3"
    assert left["PMIX_MCA_gds"] == "hash"
    assert left["HOME"] == "/home/x"
    assert not {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_DEBUG_CPU_TYPE", "PMI_RANK"} & left.keys()
    assert "OMPI_COMM_WORLD_SIZE" not in left
    assert clean_environment(environ).keys() == {"OMP_NUM_THREADS", "PMIX_MCA_gds", "HOME"}
    assert (
        plan_launch(2, ["x"], MPICH, LARGE, environ=environ, threads=5).environment(environ)["OMP_NUM_THREADS"] == "5"
    )


def test_shown_line_is_the_launch() -> None:
    launch = plan_launch(3, ["python", "a b.py"], MPICH, SMALL, environ={"OPENBLAS_CORETYPE": "x"})
    words = launch.shown()
    assert words.startswith("env -u OPENBLAS_CORETYPE OMP_NUM_THREADS=1 ")
    assert words.endswith(f"/opt/y/bin/mpirun -np 3 {sys.executable} 'a b.py'")


def test_script_is_run_by_this_python(tmp_path: Path) -> None:
    assert plan_launch(1, ["job.py", "-v"], MPICH, SMALL, environ={}).argv[-3:] == (sys.executable, "job.py", "-v")
    assert plan_launch(1, ["./solver"], MPICH, SMALL, environ={}).argv[-1] == "./solver"


def test_this_machine_counts_what_may_be_used() -> None:
    machine = this_machine()
    assert 1 <= machine.cores <= machine.cpus <= (os.cpu_count() or 1)
    taskset = shutil.which("taskset")
    if taskset is None or machine.cpus < 2 or not hasattr(os, "sched_setaffinity"):
        pytest.skip("one processor, or no way to restrict to it")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert this_machine().cpus == 1
    finally:
        os.sched_setaffinity(0, before)
