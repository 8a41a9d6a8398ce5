"""`python -m fivedp.bench` under mpirun: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mpi_launcher import Finished, run_mpi, start

SPECS = 9
# A rank whose product is wrong by a little: the first element of its share of C.
SPOILED = """
import sys
import fivedp
import fivedp.bench.measure as measure
right = fivedp.sharded_matmul
def wrong(a, b, spec, comm, *, out=None, **keywords):
    c = right(a, b, spec, comm, out=out, **keywords)
    if c.size:
        c.reshape(-1)[0] += 1
    return c
fivedp.sharded_matmul = wrong
from fivedp.bench.program import main
sys.exit(main(sys.argv[1:]))
"""


# A rank whose gradient of k is wrong in one element, and a price that is a byte too high for the forward.
SPOILED_ATTENTION = """
import sys
import fivedp
right = fivedp.ring_attention_backward
def wrong(*arrays, **keywords):
    dq, dk, dv = right(*arrays, **keywords)
    if dk.size:
        dk.reshape(-1)[-1] += 16
    return dq, dk, dv
fivedp.ring_attention_backward = wrong
import fivedp.bench.trials.attention as trials
honest = trials.priced
trials.priced = lambda case, ranks: (honest(case, ranks)[0] + (not case.backward), honest(case, ranks)[1])
from fivedp.bench.program import main
sys.exit(main(sys.argv[1:]))
"""


# A rank whose gradient of an expert is wrong in one element, and a plan that is a byte too high for the forward.
SPOILED_MOE = """
import sys
import numpy as np
import fivedp
right = fivedp.expert_layer_backward
def wrong(*arrays, **keywords):
    gradients = right(*arrays, **keywords)
    gradients.w_down.reshape(-1)[np.abs(arrays[1].w_down).argmax()] += 1e6
    return gradients
fivedp.expert_layer_backward = wrong
import fivedp.bench.trials.moe as trials
honest = trials.traffic
def dear(chosen, case, ranks, backward):
    found = honest(chosen, case, ranks, backward)
    return found | {"planned": found["planned"] + (not backward)}
trials.traffic = dear
from fivedp.bench.program import main
sys.exit(main(sys.argv[1:]))
"""


def bench(ranks: int, *words: str, env: Mapping[str, str | None] | None = None) -> Finished:
    return start([sys.executable, "-m", "fivedp.bench", *words], ranks, timeout=120, env=env)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_spec_runs_checks_out_and_is_written(ranks: int, tmp_path: Path) -> None:
    table, sheet = tmp_path / "r.json", tmp_path / "r.csv"
    done = bench(ranks, "gemm", "--shape", "64x64x64", "--seconds", "0.02", "--json", str(table), "--csv", str(sheet))
    assert done.returncode == 0, done.output
    result = json.loads(table.read_text())
    rows = [row for row in result["rows"] if not row.get("skipped")]
    skipped = [row for row in result["rows"] if row.get("skipped")]
    assert len(rows) + len(skipped) == 2 * SPECS
    assert {row["strategy"] for row in skipped} == ({"2.5d"} if ranks == 1 else set())
    for row in rows:
        assert row["bytes"]["counted"] == row["bytes"]["planned"] == row["bytes"]["bound"], row
        assert row["error"] <= 2 * row["honest_error"]
        assert row["same_bits"] is True
        assert row["seconds"] > 0
    assert result["machine"]["ranks"] == ranks
    with sheet.open() as file:
        assert len(list(csv.DictReader(file))) == 2 * SPECS
    assert done.stdout.count("fivedp.bench gemm") == 1  # rank 0 alone prints
    assert "\x1b" not in done.stdout
    assert "all right" in done.stdout


def test_a_result_names_no_host_and_no_path(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    done = bench(2, "--shape", "16x16x16", "--spec", "row", "--dtype", "f32", "--seconds", "0.01", "--json", str(file))
    assert done.returncode == 0, done.output
    text = file.read_text()
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
    assert str(tmp_path) not in text


def test_a_wrong_product_is_marked_and_ends_with_status_1() -> None:
    words = ("--shape", "40x48x56", "--spec", "row-sequence", "--dtype", "f32", "--seconds", "0.01")
    done = run_mpi(2, SPOILED, args=words, timeout=120)
    assert done.returncode != 0
    assert "WRONG" in done.stdout, done.output
    assert "1 measured, 0 not run, 1 WRONG" in done.stdout


@pytest.mark.parametrize("ranks", [1, 4])
def test_every_way_to_share_a_sequence_runs_checks_out_and_is_written(ranks: int, tmp_path: Path) -> None:
    table, sheet = tmp_path / "r.json", tmp_path / "r.csv"
    masks = ("--mask", "causal", "--mask", "documents", "--documents", "3")
    done = bench(ranks, "attention", "--shape", "1x61x4x2x16", *masks, "--seconds", "0.02", "--repeats", "2",
                 "--dtype", "bf16", "--json", str(table), "--csv", str(sheet))  # fmt: skip
    assert done.returncode == 0, done.output
    result = json.loads(table.read_text())
    rows = [row for row in result["rows"] if not row.get("skipped")]
    assert {row["strategy"] for row in rows} == {"ring", "Ulysses", "decode"} | ({"hybrid"} if ranks == 4 else set())
    for row in rows:
        assert row["bytes"]["counted"] == row["bytes"]["planned"] >= row["bytes"]["bound"], row
        assert row["balance"] >= 1
        assert len(row["pairs"]) == ranks
        assert set(row["errors"]) == ({"dq", "dk", "dv"} if row["backward"] else {"o", "lse"})
        if row["order"] == "canonical":
            assert row["canonical_price"]["ratio"] > 0
            assert row["same_bits"] is (True if row["mask"] == "causal" else None)
    assert done.stdout.count("times the time of order ring") == 4
    assert "all right" in done.stdout
    with sheet.open() as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])


def test_a_wrong_gradient_and_a_wrong_price_of_attention_end_with_status_1() -> None:
    words = ("attention", "--shape", "1x40x2x2x8", "--way", "ring", "--layout", "zigzag", "--order", "ring",
             "--dtype", "f32", "--seconds", "0.01")  # fmt: skip
    done = run_mpi(2, SPOILED_ATTENTION, args=words, timeout=120)
    assert done.returncode != 0
    assert "2 measured, 0 not run, 2 WRONG" in done.stdout, done.output
    # Of 20 tokens each, the later rank sends all, the earlier one the half that is seen; k and v, 2 heads of 8.
    sent = (20 + 10) * 2 * 2 * 8 * 4
    assert f"sent {sent} bytes where {sent + 1} were planned" in done.stdout, done.output


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_layers_of_experts_run_check_out_and_are_written(ranks: int, tmp_path: Path) -> None:
    table, sheet = tmp_path / "r.json", tmp_path / "r.csv"
    done = bench(ranks, "moe", "--shape", "61x32x12x7/3", "--workload", "uniform", "--workload", "zipf", "--workload",
                 "one_expert", "--dtype", "f32", "--dtype", "bf16", "--seconds", "0.02", "--repeats", "2",
                 "--json", str(table), "--csv", str(sheet))  # fmt: skip
    assert done.returncode == 0, done.output
    result = json.loads(table.read_text())
    assert len(result["rows"]) == 3 * 2 * 2
    for row in result["rows"]:
        assert row["bytes"]["counted"] == row["bytes"]["planned"] >= row["bytes"]["bound"], row
        assert row["traffic"]["rows"] == row["traffic"]["deduplicated"] <= row["traffic"]["naive"]
        assert sum(row["pairs"]) == 61 * 3
        assert row["balance"] >= 1
        assert set(row["stages"]) == {"route", "dispatch", "products", "combine", "rest"}
        assert all(seconds > 0 for seconds in row["stages"].values())
        assert row["repeatable"]
        price, returns = row["canonical_price"], row["traffic"]["returns"]
        assert price["ratio"] > 0
        assert price["bytes"] == returns - row["traffic"]["least_returns"]
        # Seven experts are one subtree each on one and two ranks; on three some rank has two.
        assert price["bytes"] == 0 if ranks < 3 else price["bytes"] > 0 or row["workload"] != "uniform"
    assert done.stdout.count("canonical order: sums take") == len(result["rows"])
    assert "all right" in done.stdout
    with sheet.open() as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])


def test_decoding_with_fewer_tokens_than_ranks_runs() -> None:
    done = bench(
        3, "moe", "--shape", "decode", "--divide", "32", "--tokens", "1", "--dtype", "f32", "--seconds", "0.02"
    )
    assert done.returncode == 0, done.output
    assert "2 measured, 0 not run, all right" in done.stdout


def test_a_wrong_gradient_and_a_wrong_plan_of_experts_end_with_status_1() -> None:
    words = ("moe", "--shape", "40x16x8x4/2", "--dtype", "f32", "--seconds", "0.01")
    done = run_mpi(2, SPOILED_MOE, args=words, timeout=120)
    assert done.returncode != 0
    assert "2 measured, 0 not run, 2 WRONG" in done.stdout, done.output
    assert "were planned" in done.stdout, done.output
    assert "conserve" in done.stdout or "error of d_w_down" in done.stdout, done.output


def test_gradients_are_timed_and_checked() -> None:
    done = bench(
        2,
        "--shape",
        "64x48x80",
        "--backward",
        "--dtype",
        "f32",
        "--spec",
        "row",
        "--spec",
        "summa",
        "--seconds",
        "0.02",
    )
    assert done.returncode == 0, done.output
    assert done.stdout.count("forward + backward") == 2


def test_a_spec_that_needs_other_ranks_says_so_and_the_rest_runs() -> None:
    done = bench(3, "--shape", "32x32x32", "--dtype", "f32", "--spec", "2.5d", "--spec", "column", "--seconds", "0.01")
    assert done.returncode == 0, done.output
    assert "needs an even number of ranks" in done.stdout
    assert "1 measured, 1 not run, all right" in done.stdout


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--shape", "llama9"), "neither sizes nor a layer"),
        (("--spec", "diagonal"), "no spec and no strategy"),
        (("--json", "/no/such/folder/r.json"), "does not exist"),
        (("--dtype", "int8"), "not measured"),
    ],
)
def test_a_mistake_on_the_command_line_is_said_once_before_anything_runs(
    words: tuple[str, ...], complaint: str
) -> None:
    done = bench(2, *words)
    assert done.returncode != 0
    assert done.stderr.count(complaint) == 1, done.output
    assert "ceiling" not in done.stdout


def test_help_names_every_strategy_and_layer() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fivedp.bench", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in (
        "gemm",
        "attention",
        "mixtral-8x7b",
        "deepseek-v3",
        "--workload",
        "--layout",
        "--full",
        "--json",
        "--csv",
        "--reference",
        "--dtype",
        "--shape",
        "--spec",
        "2.5d",
        "llama3-70b-qkv",
    ):
        assert word in done.stdout


def test_misleading_variables_do_not_reach_the_measurement() -> None:
    words = ("--shape", "32x32x32", "--spec", "column", "--dtype", "f32", "--seconds", "0.01")
    done = bench(2, *words, env={"OPENBLAS_CORETYPE": "Prescott", "FIVEDP_BENCH_REMOVED": None})
    assert done.returncode == 0, done.output
    assert "removed   OPENBLAS_CORETYPE" in done.stdout or "Prescott" not in done.stdout
    assert "(Prescott)" not in done.stdout
