"""A world of one under a launcher of many is refused, and nothing else is."""

from __future__ import annotations

import pytest

from fivedp.comm.launch_check import check_launch, stated_size


@pytest.mark.parametrize(
    ("environ", "size", "variable"),
    [
        ({"PMI_SIZE": "4", "PMI_RANK": "0", "MPI_LOCALNRANKS": "4"}, 4, "PMI_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"}, 8, "OMPI_COMM_WORLD_SIZE"),
        ({"MPI_LOCALNRANKS": "3"}, 3, "MPI_LOCALNRANKS"),
        ({"PMIX_RANK": "5"}, 6, "PMIX_RANK"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16"}, 16, "SLURM_STEP_NUM_TASKS"),
    ],
)
def test_stranger_launcher_is_named(environ: dict[str, str], size: int, variable: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        check_launch(1, environ)
    message = str(caught.value)
    assert variable in message
    assert f"fivedp run -np {size} --" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PMI_SIZE": "1", "PMI_RANK": "0", "MPI_LOCALNRANKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
        # A shell inside an allocation, a batch script and a single task of it: nothing was started yet.
        {"SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"},
        {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"PMI_SIZE": "many"},
        {"PMI_SIZE": ""},
    ],
)
def test_single_process_is_left_alone(environ: dict[str, str]) -> None:
    check_launch(1, environ)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_a_real_world_is_left_alone_whatever_the_launcher_says(world_size: int) -> None:
    check_launch(world_size, {"PMI_SIZE": "64", "OMPI_COMM_WORLD_SIZE": "2"})


def test_the_largest_statement_wins() -> None:
    # Open MPI sets its own variable and PMIx's: the size is known exactly from the first only.
    assert stated_size({"PMIX_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8"}) == (8, "OMPI_COMM_WORLD_SIZE", "Open MPI")
