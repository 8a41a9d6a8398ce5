"""Experts that every token passes, beside the routed ones: values, gradients, bits, odd shares, refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp import DTypeError, LayoutError, ShapeError, SharedExperts
from fivedp.comm.grid import grid_of
from fivedp.kernels.experts import ACTIVATIONS
from fivedp.layout.explain import plan_for
from fivedp.layout.shares import share
from fivedp.ops.token_sums import over_tokens
from mpi_experts import (
    BFLOAT16,
    DTYPES,
    LYING,
    OF_SHARED,
    RESULTS,
    Case,
    assert_same_error,
    cut_tokens,
    draw_case,
    matrices,
    work_is_shared,
)

RANKS = (1, 2, 3, 4, 8)
TIMEOUT = 120
F64 = np.dtype(np.float64)


def judge(case: Case, comm: MPI.Intracomm) -> list[Any] | None:
    """Hold the layer against float64 and against the bits of one rank; the whole results, on rank 0."""
    whole = case.judge(comm)
    if whole is not None:
        case.check_bits(whole)
    return whole


@pytest.mark.parametrize("router", [False, True], ids=["as they are", "with a router"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_is_as_exact_as_a_plain_one_with_the_bits_of_one_rank(
    comm: MPI.Intracomm, seed: int, dtype: Any, router: bool
) -> None:
    rng = np.random.default_rng(seed)
    for activation in ACTIVATIONS:
        judge(draw_case(rng, dtype, comm.size, activation=activation, shared=23, shared_router=router), comm)


@pytest.mark.parametrize("share", ["even", "uneven", "one"])
def test_tokens_in_any_shares(comm: MPI.Intracomm, seed: int, share: str) -> None:
    rng = np.random.default_rng(seed)
    for n_tokens in (0, 1, 7, 40):
        judge(draw_case(rng, np.float32, comm.size, n_tokens=n_tokens, share=share, shared=5, shared_router=True), comm)


def test_any_number_of_hidden_features(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for shared in (0, 1, 64, 301):
        judge(draw_case(rng, np.float32, comm.size, shared=shared, shared_router=shared == 64), comm)


def test_tokens_that_no_other_expert_sees(comm: MPI.Intracomm, seed: int) -> None:
    """A routing of which nothing is left: what remains is the shared perceptron, with its gradients."""
    rng = np.random.default_rng(seed)
    case = draw_case(rng, F64, comm.size, given=True, empty=1.0, shared=9, activation="relu")
    whole = judge(case, comm)
    if whole is not None and case.shared is not None:
        hidden = np.maximum(case.x @ case.shared.w_up, 0)
        np.testing.assert_allclose(whole[0], hidden @ case.shared.w_down, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(whole[RESULTS.index("d_shared_down")], hidden.T @ case.dy, rtol=1e-12, atol=1e-12)


def test_what_they_add_is_their_own(comm: MPI.Intracomm, seed: int) -> None:
    """The layer is the sum of the layer without them and of them alone; gradients of the others do not change."""
    case = draw_case(np.random.default_rng(seed), F64, comm.size, shared=9, shared_router=True)
    both, _ = case.run(comm)
    only, _ = replace(case, w_down=0 * case.w_down).run(comm)
    routed, _ = replace(case, shared=None).run(comm)
    np.testing.assert_allclose(both[0], only[0] + routed[0], rtol=1e-12, atol=1e-12)
    for name, a, b in zip(RESULTS[2:7], both[2:], routed[2:], strict=False):
        assert a.tobytes() == b.tobytes(), name


def test_arrays_may_lie_in_memory_in_any_way(comm: MPI.Intracomm, seed: int) -> None:
    case = draw_case(np.random.default_rng(seed), np.float32, comm.size, shared=11, shared_router=True)
    plain, _ = case.run(comm)
    for kind in LYING:
        case.lies = (kind,) * 6
        for name, a, b in zip(RESULTS, plain, case.run(comm)[0], strict=True):
            assert a.tobytes() == b.tobytes(), (name, kind)


def test_router_may_be_in_the_type_of_sums(comm: MPI.Intracomm, seed: int) -> None:
    case = draw_case(np.random.default_rng(seed), BFLOAT16, comm.size, shared=11, shared_router=True)
    assert case.shared is not None
    case.shared = replace(case.shared, router=case.shared.router.astype(np.float32))
    judge(case, comm)


def test_without_a_backward_the_result_is_the_same(comm: MPI.Intracomm, seed: int) -> None:
    case = draw_case(np.random.default_rng(seed), np.float32, comm.size, shared=11)
    (y, *_), _ = case.run(comm)
    arrays, keywords, _ = case.arguments(comm)
    assert fivedp.expert_layer(*arrays, comm, **keywords).tobytes() == y.tobytes()


def test_narrow_wire(comm: MPI.Intracomm, seed: int) -> None:
    for dtype in DTYPES:
        case = draw_case(np.random.default_rng(seed), dtype, comm.size, wire="bfloat16", share="uneven", shared=7)
        case.judge(comm)


def test_beside_work_that_ranks_share(comm: MPI.Intracomm, seed: int) -> None:
    with work_is_shared():
        for dtype in (np.float32, BFLOAT16):
            case = draw_case(
                np.random.default_rng(seed), dtype, comm.size, n_tokens=90, n_experts=11, given=True, skew=1.5,
                share="uneven", shared=8,
            )  # fmt: skip
            judge(case, comm)


def test_they_send_nothing_but_the_sums_of_their_gradients(comm: MPI.Intracomm, seed: int) -> None:
    n_tokens, width, columns = 8 * comm.size, 12, 7
    case = draw_case(
        np.random.default_rng(seed), np.float32, comm.size, n_tokens=n_tokens, width=width, given=True, shared=columns
    )
    traffic = grid_of(comm).traffic

    def sent(case: Case) -> tuple[int, int]:
        """Bytes of a forward, and of a backward."""
        arrays, keywords, dy = case.arguments(comm)
        traffic.reset()
        _, state = fivedp.expert_layer(*arrays, comm, keep=True, **keywords)
        forward = traffic.bytes_sent
        fivedp.expert_layer_backward(dy, state)
        return forward, traffic.bytes_sent - forward

    with_them, without = sent(case), sent(replace(case, shared=None))
    order = "canonical" if 8 % comm.size else "tree"
    products = [
        plan_for("h t/ep, t/ep e -> h e", [(rows, n_tokens), (n_tokens, n)], {"ep": comm.size}, dtype="float32",
                 order=order)
        for rows, n in ((width, 2 * columns), (columns, width))
    ]  # fmt: skip
    assert with_them[0] == without[0]
    more = comm.allreduce(with_them[1] - without[1])
    assert more == sum(plan.bytes_total for plan in products)


def _moved_loss(case: Case, comm: MPI.Intracomm, place: int, along: Any, step: float) -> float:
    """The loss <dy, y> of all tokens, with one of the shared experts' weights moved."""
    assert case.shared is not None
    moved = matrices(case.shared)
    moved[place] = moved[place] + step * along
    arrays, keywords, dy = replace(case, shared=SharedExperts(*moved)).arguments(comm)
    return float(comm.allreduce(float((dy * fivedp.expert_layer(*arrays, comm, **keywords)).sum())))


def test_gradients_are_the_slope_of_the_forward(comm: MPI.Intracomm, seed: int) -> None:
    """Of every weight of shared experts, along a random direction, by central differences."""
    rng = np.random.default_rng(seed)
    for activation in ("swiglu", "gelu"):
        case = draw_case(
            rng, F64, comm.size, shared=6, shared_router=True, activation=activation, share="uneven", given=True
        )
        assert case.shared is not None
        results, _ = case.run(comm)
        gradients = dict(zip(RESULTS, results, strict=True))
        for place, (name, weight) in enumerate(zip(OF_SHARED, matrices(case.shared), strict=True)):
            if weight is None:
                assert gradients[name] is None
                continue
            direction, h = rng.standard_normal(weight.shape), 1e-5
            loss = partial(_moved_loss, case, comm, place, direction)
            slope = float((gradients[name] * direction).sum())
            near, far = ((loss(step) - loss(-step)) / (2 * step) for step in (h, 2 * h))
            # far - near is three times what near leaves out; rounding is some 100 steps of the terms of a sum
            rounding = 100 * 2.2e-16 * (1 + abs(case.dy).sum() * 10) / h
            assert abs(slope - near) <= abs(far - near) + rounding, name
            assert abs(slope) > rounding, "the direction says nothing"


@pytest.mark.parametrize("share", ["even", "uneven", "one"])
def test_sums_of_16_bits_are_rounded_once(comm: MPI.Intracomm, seed: int, share: str) -> None:
    rng, n_tokens = np.random.default_rng(seed), 50
    left, right = rng.standard_normal((n_tokens, 7)).astype(BFLOAT16), rng.standard_normal((n_tokens, 5))
    right = (right + 3 * (left[:, :1] > 0)).astype(BFLOAT16)  # sums that are large beside their terms
    borders = cut_tokens(rng, n_tokens, comm.size, share)
    mine = slice(*borders[comm.rank : comm.rank + 2])
    found = over_tokens(left[mine], right[mine], comm, grid_of(comm).everyone(), np.diff(borders).tolist())
    wide_left, wide_right = (a.astype(np.float64) for a in (left, right))
    exact, size = wide_left.T @ wide_right, abs(wide_left).T @ abs(wide_right)
    assert found.dtype == BFLOAT16
    # Half a step of numbers of 8 bits, and what a sum of so many terms in float32 may be off.
    assert (abs(found.astype(np.float64) - exact) <= 2.0**-8 * abs(exact) + (n_tokens + 1) * 2.0**-24 * size).all()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("gated", [True, False])
def test_hidden_features_cut_over_a_second_axis(comm: MPI.Intracomm, seed: int, gated: bool) -> None:
    if comm.size % 2:
        pytest.skip("an even number of ranks is cut in two")
    rng = np.random.default_rng(seed)
    case = draw_case(
        rng, F64, 1, n_tokens=37, shared=15, shared_router=True, activation="swiglu" if gated else "gelu", inner=9
    )
    whole = dict(zip(RESULTS, case.run(MPI.COMM_SELF)[0], strict=True))
    mesh = fivedp.Mesh(comm, ep=comm.size // 2, tp=2)
    ep, tp = mesh.axis("ep"), mesh.axis("tp")
    tokens, experts = (slice(*share(n, ep.size, ep.rank)) for n in (37, case.n_experts))
    inner, columns = (slice(*share(n, 2, tp.rank)) for n in (9, 15))
    assert case.shared is not None
    w = case.shared
    gate = None if case.w_gate is None else case.w_gate[experts, :, inner]
    shared = SharedExperts(
        w.w_up[:, columns], None if w.w_gate is None else w.w_gate[:, columns], w.w_down[columns], w.router
    )
    y, state = fivedp.expert_layer(
        case.x[tokens], case.router, case.w_up[experts, :, inner], gate, case.w_down[experts, inner], mesh,
        activation=case.activation, tensor="tp", keep=True, shared=shared,
    )  # fmt: skip
    d = fivedp.expert_layer_backward(case.dy[tokens], state)
    assert d.shared is not None
    pairs = [
        (y, whole["y"][tokens]), (d.x, whole["dx"][tokens]), (d.shared.w_up, whole["d_shared_up"][:, columns]),
        (d.shared.w_down, whole["d_shared_down"][columns]), (d.shared.router, whole["d_shared_router"]),
    ]  # fmt: skip
    if gated:
        pairs.append((d.shared.w_gate, whole["d_shared_gate"][:, columns]))
    for found, right in pairs:
        np.testing.assert_allclose(found, right, rtol=1e-11, atol=1e-11)
    same = tp.comm.allgather((y.tobytes(), d.x.tobytes(), d.shared.router.tobytes()))
    assert same[0] == same[1]


@pytest.mark.mpi(min_size=2)
def test_data_parallel_ranks_have_gradients_of_their_own(comm: MPI.Intracomm, seed: int) -> None:
    if comm.size % 2:
        pytest.skip("an even number of ranks is cut in two")
    rng = np.random.default_rng(seed)
    mesh = fivedp.Mesh(comm, dp=2, ep=-1)
    ep = mesh.axis("ep")
    cases = [draw_case(rng, np.float32, ep.size, n_tokens=5 * ep.size + i, shared=7) for i in range(2)]
    case = cases[mesh.coords["dp"]]
    results, _ = case.run(ep.comm)
    arrays, keywords, dy = case.arguments(ep.comm)
    _, state = fivedp.expert_layer(*arrays, mesh, keep=True, **keywords)
    d = fivedp.expert_layer_backward(dy, state)
    assert d.shared is not None
    for name, found in zip(OF_SHARED, matrices(d.shared), strict=True):
        right = results[RESULTS.index(name)]
        assert (found is None) == (right is None)
        assert found is None or found.tobytes() == right.tobytes(), name


# -- wrong arguments ---------------------------------------------------------------------------------------------------

FAULTS: list[tuple[dict[str, Any], type[ValueError], str]] = [
    ({"shared": (1, 2, 3)}, DTypeError, "`shared` is a tuple; expected fivedp.SharedExperts"),
    ({"w_up": lambda w: w.tolist()}, DTypeError, "`shared.w_up` is a list"),
    ({"w_up": lambda w: w.astype(np.float64)}, DTypeError, "`shared.w_up` has dtype float64; expected float32"),
    ({"w_up": lambda w: w[None]}, ShapeError, r"`shared.w_up` has shape \(1, 12, 7\); expected \(12, any\)"),
    ({"w_up": lambda w: w[1:]}, ShapeError, r"`shared.w_up` has shape \(11, 7\)"),
    ({"w_gate": lambda w: None}, LayoutError, "activation is 'swiglu' and `shared.w_gate` is None; only swiglu has"),
    ({"w_gate": lambda w: w[:, 1:]}, ShapeError, r"`shared.w_gate` has shape \(12, 6\); expected \(12, 7\)"),
    ({"w_down": lambda w: w.T}, ShapeError, r"`shared.w_down` has shape \(12, 7\); expected \(7, 12\)"),
    ({"router": lambda w: w[:, 0]}, ShapeError, r"`shared.router` has shape \(12,\); expected \(12, 1\)"),
    ({"router": lambda w: w.astype(np.float64)}, DTypeError, "`shared.router` has dtype float64; expected float32"),
    ({"router": lambda w: np.inf * w}, LayoutError, "row 0 of `logits` has (-?inf|nan) for expert 0"),
]


@pytest.mark.parametrize("where", ["everywhere", "on one rank"])
def test_wrong_arguments(comm: MPI.Intracomm, where: str) -> None:
    case = draw_case(
        np.random.default_rng(0), np.float32, comm.size, n_tokens=5 * comm.size, shared=7, shared_router=True
    )
    for i, (changes, kind, words) in enumerate(FAULTS):
        arrays, keywords, _ = case.arguments(comm)
        keywords["keep"] = i % 2 == 0  # with it ranks meet once more before, to make a routing
        if where == "everywhere" or comm.rank == comm.size - 1:
            for name, change in changes.items():
                right = keywords["shared"]
                wrong = change if name == "shared" else replace(right, **{name: change(getattr(right, name))})
                keywords["shared"] = wrong
        assert_same_error(comm, lambda a=arrays, k=keywords: fivedp.expert_layer(*a, comm, **k), kind, words)  # type: ignore[misc]
    judge(case, comm)  # the communicator is as good as before


@pytest.mark.mpi(min_size=2)
def test_calls_that_differ(comm: MPI.Intracomm) -> None:
    case = draw_case(
        np.random.default_rng(0), np.float32, comm.size, n_tokens=5 * comm.size, shared=7, shared_router=True
    )
    arrays, keywords, _ = case.arguments(comm)
    right, odd = keywords["shared"], comm.rank == comm.size - 1
    narrower = SharedExperts(right.w_up[:, 1:], right.w_gate[:, 1:], right.w_down[1:], right.router)
    for wrong, words in (
        (None, "the keywords is .*"),
        (replace(right, router=None), "the keywords is .*shared 7"),
        (narrower, "the keywords is .*shared 6 with a router"),
    ):
        mine = keywords | {"shared": wrong if odd else right}
        assert_same_error(comm, lambda k=mine: fivedp.expert_layer(*arrays, comm, **k), LayoutError, words)  # type: ignore[misc]
    judge(case, comm)


def test_gate_that_is_not_used(comm: MPI.Intracomm) -> None:
    case = draw_case(np.random.default_rng(0), np.float32, comm.size, activation="gelu", shared=7)
    arrays, keywords, _ = case.arguments(comm)
    shared = keywords["shared"]
    keywords["shared"] = replace(shared, w_gate=shared.w_up)
    assert_same_error(
        comm, lambda: fivedp.expert_layer(*arrays, comm, **keywords), LayoutError,
        "activation is 'gelu' and `shared.w_gate` is given; only swiglu has a gate",
    )  # fmt: skip
