"""Mixtures of experts nobody thought of, over 1 to 8 ranks, held against float64: values, gradients, bits, bytes.

A case is a line of numbers; a failing one is printed as `Drawn(...)` and runs again as `@example(case=Drawn(...))`
above the test. Arrays come from its seed. One rank, another each time, gathers the results and judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

import fivedp
import mpi_dispatch
from drawn_cases import dealt
from fivedp import SharedExperts
from fivedp.comm import shared_window
from fivedp.comm.grid import grid_of
from fivedp.kernels.experts import ACTIVATIONS
from mpi_experts import (
    LYING,
    Case,
    assert_at_the_bound,
    collected,
    draw_case,
    matrices,
    on_nodes,
    taken_apart_from,
    window_from,
    work_is_shared,
)

RANKS = (1, 2, 3, 4, 5, 6, 7, 8)
TIMEOUT = 400


@dataclass(frozen=True)
class Drawn:
    """A mixture of experts in numbers; every draw is a case."""

    seed: int
    dtype: str
    n_tokens: int
    share: str
    """Who has the tokens: every rank alike, by chance, or one rank all of them."""
    width: int
    inner: int
    n_experts: int
    k: int
    """Of at most all experts."""
    activation: str
    given: bool
    """Whether the routing is given, with `empty` slots and a liking for low experts by `skew`."""
    empty: float
    skew: float
    poison: bool
    """Whether a token without experts is not a number."""
    wire: str
    lies: tuple[str, ...]
    from_bytes: int
    """From how many bytes on a box is read in the shared window."""
    helped: bool
    """Whether ranks share the products of the one that has most, whatever that costs."""
    nodes: str
    """How ranks lie on nodes."""
    apart: bool
    """Whether rows that have come are multiplied while others travel, however few they are."""
    shared: int | None
    """How many hidden features shared experts have, where there are any."""
    shared_router: bool
    options: tuple[tuple[str, Any], ...] = ()
    """Of `route`."""
    losses: tuple[float, float] = (0.0, 0.0)
    """The gradients of the balance loss and of the z-loss."""

    @property
    def top_k(self) -> int:
        return min(self.k, self.n_experts)


# One draw a field: drawing costs every rank as much as the layer.
ONE_OF = st.sampled_from
NODES = {
    "halves": lambda rank, ranks: 2 * rank // ranks,
    "one apart": lambda rank, ranks: int(rank == 0),
    "by turns": lambda rank, ranks: rank % 2,
}
SIZES = ONE_OF([*range(1, 10), *range(1, 10), 16, 17, 24])


def drawn(**fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Drawn]:
    """Any case, but for what is fixed."""
    fields: dict[str, st.SearchStrategy[Any]] = {
        "seed": st.integers(0, 2**32 - 1),
        "dtype": ONE_OF(["float32", "float64", "bfloat16"]),
        "n_tokens": ONE_OF([*range(12), *range(12), *range(12, 50, 3)]),
        "share": ONE_OF(["even", "even", "uneven", "uneven", "one"]),
        "width": SIZES,
        "inner": SIZES,
        "n_experts": ONE_OF([*range(1, 14), 16, 20, 31, 60]),
        "k": ONE_OF([1, 1, 2, 2, 2, 3, 4, 5, 8, 60]),
        "activation": ONE_OF([*ACTIVATIONS, "swiglu", "swiglu"]),
        "given": st.booleans(),
        "empty": ONE_OF([0.0, 0.0, 0.3, 0.8, 1.0]),
        "skew": ONE_OF([0.0, 0.0, 1.1, 10.0]),
        "poison": st.booleans(),
        "wire": ONE_OF(["same", "same", "same", "bfloat16"]),
        "lies": st.tuples(*[ONE_OF(LYING)] * 6),
        "from_bytes": ONE_OF([shared_window.MIN_BYTES, 1]),
        "helped": ONE_OF([False, False, False, False, True]),
        "nodes": ONE_OF(["one", "one", "one", *NODES]),
        "apart": st.booleans(),
        "shared": ONE_OF([None, None, None, 0, 1, 5, 16]),
        "shared_router": st.booleans(),
    }
    return st.builds(Drawn, **(fields | fixed))


@cache
def _on_nodes(number: int, how: str) -> MPI.Intracomm:
    comm = MPI.Comm.f2py(number)
    assert isinstance(comm, MPI.Intracomm)
    return on_nodes(comm, [NODES[how](rank, comm.size) for rank in range(comm.size)])


def placed(comm: MPI.Intracomm, how: str) -> MPI.Intracomm:
    """The ranks on their nodes."""
    return comm if how == "one" or comm.size == 1 else _on_nodes(comm.py2f(), how)


def build(drawn: Drawn, ranks: int) -> Case:
    """The case of some numbers; the same on all ranks, for they draw alike."""
    case = draw_case(
        np.random.default_rng(drawn.seed), np.dtype(drawn.dtype), ranks, n_tokens=drawn.n_tokens, width=drawn.width,
        inner=drawn.inner, n_experts=drawn.n_experts, top_k=drawn.top_k, activation=drawn.activation,
        share=drawn.share, given=drawn.given, empty=drawn.empty, skew=drawn.skew, wire=drawn.wire,
        shared=drawn.shared, shared_router=drawn.shared_router,
    )  # fmt: skip
    case.lies, case.losses = drawn.lies, drawn.losses
    if not drawn.given:
        case.keywords |= drawn.options
    if drawn.poison and case.experts is not None and case.shared is None:
        nowhere = (case.experts < 0).all(axis=1)
        case.x[nowhere] = case.dy[nowhere] = np.nan
    return case


@settings(max_examples=dealt(1200, RANKS, MPI.COMM_WORLD.size))
@given(case=drawn())
def test_drawn_layer_is_as_exact_as_a_plain_one(comm: MPI.Intracomm, case: Drawn) -> None:
    whole, comm = build(case, comm.size), placed(comm, case.nodes)
    traffic = grid_of(comm).traffic
    with window_from(case.from_bytes), work_is_shared(case.helped), taken_apart_from(0 if case.apart else 128):
        start = traffic.bytes_sent
        results, state = whole.run(comm)
        sent = traffic.bytes_sent - start
    # To make a routing, to share work and to sum gradients of shared experts, ranks have messages of their own.
    if case.given and not case.helped and case.shared is None:
        bill = state.plan.bytes_sent()
        pairs = sum(len(places) for r, places in enumerate(state.plan.incoming.positions) if r != comm.rank)
        there_and_back = bill["pairs"] + 3 * bill["rows"] + 2 * bill["returns"] + pairs * state.plan.sums.itemsize
        assert_at_the_bound(state.plan)
        assert sent == there_and_back
    everything = whole.collected(results, state, comm, case.seed % comm.size)
    if everything is not None:
        whole.check(*everything)
        if case.wire == "same":
            whole.check_bits(everything[0])


@settings(max_examples=dealt(640, RANKS, MPI.COMM_WORLD.size))
@given(case=drawn(given=st.just(True)), widened=st.booleans())
def test_drawn_dispatch_is_as_exact_as_its_definition(comm: MPI.Intracomm, case: Drawn, widened: bool) -> None:
    whole = mpi_dispatch.draw(
        np.random.default_rng(case.seed), np.dtype(case.dtype), comm.size, n_tokens=case.n_tokens, width=case.width,
        n_experts=case.n_experts, k=case.top_k, share=case.share, empty=case.empty, skew=case.skew, wire=case.wire,
        widened=widened,
    )  # fmt: skip
    with window_from(case.from_bytes):
        whole.judge(placed(comm, case.nodes), case.seed % comm.size, case.lies[0])


OPTIONS: dict[str, list[Any]] = {
    "score": ["softmax", "softmax", "sigmoid"], "normalize": [True, True, False], "scale": [1.0, 1.0, 2.5],
    "capacity_factor": [None, None, 0.6, 1.5], "drop": ["position", "score"],
}  # fmt: skip


@settings(max_examples=dealt(200, RANKS, MPI.COMM_WORLD.size))
@given(case=drawn(
    dtype=st.just("float64"), wire=st.just("same"), poison=st.just(False), n_tokens=st.integers(0, 9),
    activation=ONE_OF([name for name in ACTIVATIONS if name != "relu"]),
    options=st.tuples(*[st.tuples(st.just(name), ONE_OF(values)) for name, values in OPTIONS.items()]),
    losses=ONE_OF([(0.0, 0.0), (0.5, 0.02)]),
))  # fmt: skip
def test_gradients_are_the_slope_of_the_forward(comm: MPI.Intracomm, case: Drawn) -> None:
    """Along a random direction, by central differences of two steps whose difference bounds what they leave out."""
    whole, comm = build(case, comm.size), placed(comm, case.nodes)
    arrays, keywords, dy = whole.arguments(comm)
    rng, same = np.random.default_rng(case.seed + comm.rank), np.random.default_rng(case.seed)
    # The router is the same on all ranks, and so is what it moves along.
    directions = [
        None if a is None else (same if i == 1 else rng).standard_normal(a.shape) for i, a in enumerate(arrays)
    ]
    weights = [] if whole.shared is None else matrices(keywords.pop("shared"))
    turns = [None if a is None else same.standard_normal(a.shape) for a in weights]
    choices = []

    def moved(values: list[Any], along: list[Any], step: float) -> list[Any]:
        return [a if d is None else a + step * d for a, d in zip(values, along, strict=True)]

    def call(step: float) -> Any:
        shared = SharedExperts(*moved(weights, turns, step)) if weights else None
        return fivedp.expert_layer(*moved(arrays, directions, step), comm, keep=True, shared=shared, **keywords)

    def loss(step: float) -> tuple[float, float]:
        """This rank's part of the loss, and the sum of the sizes of its terms."""
        y, state = call(step)
        choices.append(state.routing.experts)
        losses = np.dot(whole.losses, (state.routing.aux_loss, state.routing.z_loss)) if comm.rank == 0 else 0.0
        return float((dy * y).sum() + losses), float(abs(dy * y).sum() + losses)

    _, state = call(0.0)
    d = fivedp.expert_layer_backward(dy, state, d_aux_loss=whole.losses[0], d_z_loss=whole.losses[1])
    gradients = [d.x, d.router if comm.rank == 0 else 0 * d.router, d.w_up, d.w_gate, d.w_down]
    if d.shared is not None:
        gradients += [None if g is None else g * (comm.rank == 0) for g in matrices(d.shared)]
    terms = [(g * to).reshape(-1) for g, to in zip(gradients, directions + turns, strict=True) if to is not None]
    slope = float(np.concatenate(terms).sum())
    h = 1e-4
    (up, size), (down, _), (up_2, _), (down_2, _) = (loss(step) for step in (h, -h, 2 * h, -2 * h))
    near, far = (up - down) / (2 * h), (up_2 - down_2) / (4 * h)
    # Where a step changes who is chosen, the loss jumps.
    changed = any(np.sort(c).tobytes() != np.sort(state.routing.experts).tobytes() for c in choices)
    everything = collected(np.array([slope, near, far, size, changed]), comm)
    if everything is None:
        return
    slope, near, far, size, changed = sum(everything)
    # far - near is three times the error of near, to the fourth power of h; rounding is some 100 steps of a term, and
    # of the losses one of 2^-40 for every probability.
    steps = 100 * 2.2e-16 * (1 + size) + 2.0**-39 * whole.n_experts * sum(whole.losses)
    assert changed or abs(slope - near) <= abs(far - near) + steps / h
