"""Drawn routings: any cut of any batch gives the bits of one rank, and the drops of a walk over its pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

import fivedp
from drawn_cases import cases
from fivedp.kernels.routing import Rule
from fivedp.ops.capacity import capacity_of
from fivedp.reference import routing_reference as oracle

RANKS = (1, 3, 4)
TIMEOUT = 200


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Keywords of `route`, with the number of experts."""
    n_groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    top_groups = draw(st.integers(1, n_groups))
    experts = n_groups * size
    choice = draw(st.sampled_from(["token", "token", "expert"]))
    grouped = choice == "token" and draw(st.booleans())
    return {
        "experts": experts,
        "top_k": draw(st.integers(1, top_groups * size if grouped else experts)),
        "score": draw(st.sampled_from(["softmax", "sigmoid"])),
        "normalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
        "groups": (n_groups, top_groups) if grouped else None,
        "biased": choice == "token" and draw(st.booleans()),
        "capacity_factor": draw(st.none() | st.sampled_from([0.1, 0.5, 1.0, 1.25])),
        "drop": draw(st.sampled_from(["position", "score"])),
        "choice": choice,
    }


@settings(max_examples=cases(120))
@given(
    call=calls(),
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 60),
    dtype=st.sampled_from([np.float32, np.float64]),
    empty=st.booleans(),
)
def test_any_cut_of_any_batch(
    comm: MPI.Intracomm, call: dict[str, Any], seed: int, tokens: int, dtype: Any, empty: bool
) -> None:
    rng = np.random.default_rng(seed)
    keywords = dict(call)
    experts, biased = keywords.pop("experts"), keywords.pop("biased")
    logits = np.round(rng.standard_normal((tokens, experts)), 1).astype(dtype)
    if biased:
        keywords["bias"] = np.round(rng.standard_normal(experts), 1)
    borders = [0, *np.sort(rng.integers(0, tokens + 1, comm.size - 1)).tolist(), tokens]
    if empty:  # all tokens on one rank
        full = int(rng.integers(comm.size))
        borders = [0 if rank <= full else tokens for rank in range(comm.size + 1)]
    mine = slice(borders[comm.rank], borders[comm.rank + 1])
    found, whole = fivedp.route(logits[mine], comm=comm, **keywords), fivedp.route(logits, **keywords)
    width = found.experts.shape[1]
    np.testing.assert_array_equal(found.experts, whole.experts[mine, :width])
    assert found.weights.tobytes() == np.ascontiguousarray(whole.weights[mine, :width]).tobytes()
    assert (found.aux_loss, found.z_loss) == (whole.aux_loss, whole.z_loss)
    np.testing.assert_array_equal(comm.allreduce(found.counts), whole.counts)
    u = rng.standard_normal(whole.experts.shape)
    gradients = [
        fivedp.route_backward(part, routing, d_aux_loss=0.5, d_z_loss=0.5)
        for part, routing in ((u[mine, :width], found), (u, whole))
    ]
    assert gradients[0].tobytes() == np.ascontiguousarray(gradients[1][mine]).tobytes()
    if keywords["choice"] == "token" and keywords["capacity_factor"] is not None:
        free = fivedp.route(logits, **(keywords | {"capacity_factor": None}))
        capacity = capacity_of(keywords["capacity_factor"], tokens, keywords["top_k"], experts)
        if keywords["drop"] == "position":
            wanted = oracle.keep_by_position(free.experts, capacity, experts)
        else:
            wanted = oracle.keep_by_score(free.experts, free.weights, capacity, experts)
        np.testing.assert_array_equal(whole.experts, wanted)
    if not keywords.get("groups") and not biased and keywords["capacity_factor"] is None and call["choice"] == "token":
        np.testing.assert_array_equal(whole.experts, oracle.choose(logits, keywords["top_k"], Rule()))
