"""Copies of hot experts on other nodes: rows made at home, with the bits of one rank, and the bytes of the plan.

The nodes are the ranks of this machine with a node given for each. Products are priced so slow that copies pay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.comm.grid import grid_of
from mpi_experts import BFLOAT16, DTYPES, Case, assert_at_the_bound, copies_pay, draw_case, on_nodes, window_from

RANKS = (3, 4, 5, 6, 8)
TIMEOUT = 200
# For each number of ranks, the node of each.
MAPS = {
    3: [(0, 0, 1), (0, 1, 2)],
    4: [(0, 0, 1, 1), (0, 1, 0, 1)],
    5: [(0, 0, 0, 1, 1), (0, 1, 1, 1, 0)],
    6: [(0, 0, 0, 1, 1, 1), (0, 0, 1, 1, 2, 2)],
    8: [(0, 0, 0, 0, 1, 1, 1, 1)],
}
# A link on which rows go to every rank, and one on which they cross to a node once.
LINKS = {"once per rank": "1e6", "once per node": "1e-9"}


def skewed(rng: np.random.Generator, dtype: Any, ranks: int, **options: Any) -> Case:
    """Tokens that very often choose the same few experts."""
    return draw_case(
        rng, dtype, ranks, **({"n_experts": 3 * ranks + 1, "top_k": 4, "n_tokens": 25 * ranks, "given": True,
                               "empty": 0.1, "skew": 1.5} | options),
    )  # fmt: skip


def judge(case: Case, apart: MPI.Intracomm, copied: bool = True) -> Any:
    """Hold a layer with copies against float64, and its bits against those without copies and of one rank."""
    with copies_pay():
        results, state = case.run(apart)
    assert not copied or state.plan.copies is not None
    with copies_pay(False):
        without, plain = case.run(apart)
    assert plain.plan.copies is None
    everything = case.collected(results, state, apart, 0)
    if case.keywords.get("wire", "same") == "same":
        for a, b in zip(results, without, strict=True):
            assert a is None or a.tobytes() == b.tobytes(), "copies change the bits"
    if everything is not None:
        case.check(*everything)
        if case.keywords.get("wire", "same") == "same":
            case.check_bits(everything[0])
    return state.plan


@pytest.mark.parametrize("way", ["shared window", "messages"])
@pytest.mark.parametrize("link", LINKS)
def test_layer_and_its_gradients_have_the_bits_of_one_rank(
    comm: MPI.Intracomm, seed: int, way: str, link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "messages":
        monkeypatch.setenv("FIVEDP_SHARED", "0")
    rng = np.random.default_rng(seed)
    for nodes in MAPS[comm.size]:
        apart = on_nodes(comm, nodes, LINKS[link])
        for dtype in DTYPES:
            with window_from(1 if rng.integers(2) else 1 << 40):
                judge(skewed(rng, dtype, comm.size, top_k=6), apart)
