"""A whole mixture of experts over ranks: values, bits, bytes, odd shares, refusals. Drawn cases are in another file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp import DTypeError, LayoutError, ShapeError
from fivedp.comm.grid import grid_of
from fivedp.kernels.experts import ACTIVATIONS
from fivedp.layout.experts import cut_experts
from mpi_experts import (
    BFLOAT16,
    DTYPES,
    LYING,
    Case,
    assert_same_error,
    collected,
    draw_case,
    draw_experts,
    joined,
    results_of,
    routing_of,
    window_from,
    work_is_shared,
)

RANKS = (1, 2, 3, 5, 8)
TIMEOUT = 120


def judge(case: Case, comm: MPI.Intracomm) -> list[Any] | None:
    """Hold the layer against float64 and against the bits of one rank; the whole results, on rank 0."""
    whole = case.judge(comm)
    if whole is not None:
        case.check_bits(whole)
    return whole


# What a test may loop over it does not take as a parameter: on 8 ranks a test costs more than its layer.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_is_as_exact_as_a_plain_one_with_the_bits_of_one_rank(comm: MPI.Intracomm, seed: int, dtype: Any) -> None:
    for activation in ACTIVATIONS:
        judge(draw_case(np.random.default_rng(seed), dtype, comm.size, activation=activation), comm)


@pytest.mark.parametrize("share", ["uneven", "one"])
def test_tokens_in_any_shares(comm: MPI.Intracomm, seed: int, share: str) -> None:
    rng = np.random.default_rng(seed)
    for n_tokens in (0, 1, 7, 40):
        judge(draw_case(rng, np.float32, comm.size, n_tokens=n_tokens, share=share), comm)


def test_any_number_of_experts(comm: MPI.Intracomm, seed: int) -> None:
    """Fewer than ranks, not to be divided by them, all of them chosen."""
    rng = np.random.default_rng(seed)
    for n_experts, top_k in ((1, 1), (2, 1), (3, 3), (5, 2), (8, 8), (13, 4), (60, 7), (64, 6)):
        judge(draw_case(rng, np.float32, comm.size, n_experts=n_experts, top_k=top_k), comm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_routing_with_dropped_pairs(comm: MPI.Intracomm, seed: int, dtype: Any) -> None:
    case = draw_case(
        np.random.default_rng(seed), dtype, comm.size, n_experts=6, top_k=3, given=True, empty=0.5, share="uneven"
    )
    assert case.experts is not None
    case.experts[::5] = -1  # a token that has no expert left
    whole = judge(case, comm)
    if whole is not None:
        assert not whole[0][::5].astype(bool).any()
        assert not whole[1][::5].astype(bool).any()


def test_nothing_is_routed_at_all(comm: MPI.Intracomm, seed: int) -> None:
    case = draw_case(np.random.default_rng(seed), np.float32, comm.size, given=True, empty=1.0)
    whole = case.judge(comm)
    assert whole is None or not any(result.any() for result in whole)


def test_all_tokens_to_one_expert(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, np.float32, comm.size, n_experts=9, top_k=1, given=True)
    assert case.experts is not None
    favourite = int(rng.integers(9))
    case.experts[:] = favourite
    whole = judge(case, comm)
    if whole is not None:
        others = np.arange(9) != favourite
        assert not any(gradient[others].any() for gradient in whole[3:6])


@pytest.mark.parametrize("way", ["shared window", "messages", "as usual"])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_rows_read_in_place_and_rows_sent_have_the_same_bits(
    comm: MPI.Intracomm, seed: int, way: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "messages":
        monkeypatch.setenv("FIVEDP_SHARED", "0")
    apart = comm.Dup()  # a grid of its own, which reads the setting
    assert apart.size == 1 or (grid_of(apart).shared is None) == (way == "messages")
    # As usual: some boxes are large enough for the window, and some are not.
    case = draw_case(
        np.random.default_rng(seed), dtype, comm.size, n_tokens=40 * comm.size, width=640, inner=4, top_k=3
    )
    with window_from(1 if way == "shared window" else 32 << 10):
        judge(case, apart)


def test_narrow_wire(comm: MPI.Intracomm, seed: int) -> None:
    for dtype in DTYPES:
        draw_case(np.random.default_rng(seed), dtype, comm.size, wire="bfloat16", share="uneven").judge(comm)


def test_arrays_may_lie_in_memory_in_any_way(comm: MPI.Intracomm, seed: int) -> None:
    case = draw_case(np.random.default_rng(seed), np.float32, comm.size)
    plain, _ = case.run(comm)
    for kind in LYING:
        case.lies = (kind,) * 6
        for a, b in zip(plain, case.run(comm)[0], strict=True):
            assert a.tobytes() == b.tobytes(), kind


def test_without_a_backward_the_result_is_the_same(comm: MPI.Intracomm, seed: int) -> None:
    case = draw_case(np.random.default_rng(seed), np.float32, comm.size)
    (y, *_), _ = case.run(comm)
    arrays, keywords, _ = case.arguments(comm)
    assert fivedp.expert_layer(*arrays, comm, **keywords).tobytes() == y.tobytes()


def test_router_may_be_in_the_type_of_sums(comm: MPI.Intracomm, seed: int) -> None:
    case = draw_case(np.random.default_rng(seed), BFLOAT16, comm.size)
    case.router = case.router.astype(np.float32)
    judge(case, comm)


@pytest.mark.parametrize("wire", ["same", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.dtype(np.float64), BFLOAT16], ids=str)
def test_bytes_are_those_of_the_plan(comm: MPI.Intracomm, seed: int, dtype: Any, wire: str) -> None:
    n_experts = 8 * comm.size
    case = draw_case(
        np.random.default_rng(seed), dtype, comm.size, n_tokens=60 * comm.size, n_experts=n_experts, top_k=8,
        given=True, empty=0.1, wire=wire,
    )  # fmt: skip
    traffic = grid_of(comm).traffic
    arrays, keywords, dy = case.arguments(comm)
    traffic.reset()
    _, state = fivedp.expert_layer(*arrays, comm, keep=True, **keywords)
    forward = traffic.bytes_sent
    fivedp.expert_layer_backward(dy, state)
    backward = traffic.bytes_sent - forward
    bill = state.plan.bytes_sent()
    assert forward == bill["pairs"] + bill["rows"] + bill["returns"]
    # x and dy travel, and a number for each pair comes home.
    pairs = sum(len(p) for source, p in enumerate(state.plan.incoming.positions) if source != comm.rank)
    assert backward == 2 * bill["rows"] + bill["returns"] + pairs * state.plan.sums.itemsize
    # The least there can be: a token goes once to every other rank that has one of its experts.
    assert case.experts is not None
    owner = case.experts // 8
    owner[case.experts < 0] = -1
    mine = owner[slice(*case.borders[comm.rank : comm.rank + 2])]
    least = sum(len(set(row) - {-1, comm.rank}) for row in mine.tolist())
    itemsize = 2 if wire == "bfloat16" else dtype.itemsize
    assert bill["rows"] == bill["bound"] == least * 12 * itemsize
    if comm.size & (comm.size - 1) == 0:  # and comes back once
        back = 2 if wire == "bfloat16" else state.plan.sums.itemsize
        returns = sum(rank == comm.rank for row in owner.tolist() for rank in set(row)) - sum(
            comm.rank in row for row in mine.tolist()
        )
        assert bill["returns"] == returns * 12 * back


@pytest.mark.parametrize("given", [False, True], ids=["routed here", "routed elsewhere"])
def test_mesh_cuts_experts_over_ep_and_leaves_dp_alone(comm: MPI.Intracomm, seed: int, given: bool) -> None:
    rng = np.random.default_rng(seed)
    for dp in (d for d in range(1, comm.size + 1) if comm.size % d == 0):
        mesh = fivedp.Mesh(comm, dp=dp, ep=-1)
        ep = mesh.axis("ep")
        # Each data-parallel replica has a batch of its own, and the same weights.
        cases = [draw_case(rng, np.float32, ep.size, n_tokens=8 * ep.size + i, given=given) for i in range(dp)]
        case = cases[mesh.coords["dp"]]
        case.router, case.w_up = cases[0].router, cases[0].w_up
        arrays, keywords, dy = case.arguments(ep.comm)
        y, state = fivedp.expert_layer(*arrays, mesh, keep=True, **keywords)
        d = fivedp.expert_layer_backward(dy, state)
        if given:  # losses of a routing are those of the whole mesh
            assert mesh.bytes_sent.keys() <= {"ep"}
        parts = collected([y, *results_of(d)], ep.comm)
        if parts is not None:
            case.check_bits(joined(parts))


@pytest.mark.mpi(min_size=2)
def test_wrong_argument_on_a_mesh(comm: MPI.Intracomm) -> None:
    """A routing with losses is made by all ranks of the mesh, the rest of the layer by those of ep."""
    mesh = fivedp.Mesh(comm, dp=comm.size if comm.size % 2 else 2, ep=-1)
    ep = mesh.axis("ep").size
    case = draw_case(np.random.default_rng(0), np.float32, ep, n_tokens=5 * ep)
    arrays, keywords, _ = case.arguments(mesh.axis("ep").comm)
    if comm.rank == comm.size - 1:
        arrays[0] = arrays[0].astype(np.float64)
    assert_same_error(
        comm, lambda: fivedp.expert_layer(*arrays, mesh, keep=True, **keywords), DTypeError, "`router` has dtype"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"capacity_factor": 0.7},
        {"capacity_factor": 0.9, "drop": "score", "score": "sigmoid"},
        {"normalize": False, "scale": 2.5},
        {"choice": "expert"},
    ],
    ids=str,
)
def test_capacity_and_losses_are_those_of_the_whole_batch(
    comm: MPI.Intracomm, seed: int, options: dict[str, Any]
) -> None:
    case = draw_case(np.random.default_rng(seed), np.float32, comm.size, n_tokens=37, **options)
    case.losses = (0.3, 0.01)
    results, state = case.run(comm)
    losses = (state.routing.aux_loss, state.routing.z_loss)
    dropped = comm.allreduce(int(state.routing.dropped))
    everything = case.collected(results, state, comm, 0) if options.get("choice") != "expert" else None
    if everything is not None:
        case.check_bits(everything[0])
        _, alone = case.run(MPI.COMM_SELF)
        assert losses == (alone.routing.aux_loss, alone.routing.z_loss)
        assert dropped == alone.routing.dropped
        assert bool(dropped) == ("capacity_factor" in options)
    elif options.get("choice") == "expert":  # whose tables have a width of their own on every rank
        parts = collected(results[:-1], comm)
        if parts is not None:
            case.check_bits(joined(parts))


def test_losses_reach_the_router(comm: MPI.Intracomm, seed: int) -> None:
    case = draw_case(np.random.default_rng(seed), np.float64, comm.size)
    case.dy[:] = 0
    (_, dx, d_router, *others), _ = case.run(comm)
    assert not dx.any()
    assert not d_router.any()
    case.losses = (1.0, 1.0)
    (_, dx, d_router, *others), _ = case.run(comm)
    assert d_router.any()
    assert dx.any() or not dx.size
    assert not any(gradient.any() for gradient in others)


def test_work_that_ranks_share_has_the_bits_of_one_rank(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with work_is_shared() as jobs:
        for dtype, activation in ((np.float32, "swiglu"), (np.float64, "gelu"), (BFLOAT16, "swiglu")):
            case = draw_case(
                rng, dtype, comm.size, n_tokens=90, n_experts=11, given=True, skew=1.5, share="uneven",
                activation=activation,
            )  # fmt: skip
            judge(case, comm)
        case = draw_case(rng, np.float32, comm.size, n_tokens=300, n_experts=9, top_k=1, given=True)
        assert case.experts is not None
        case.experts[:] = 4
        whole = case.judge(comm)
        # Every rank had a part in the owner's job, forward and backward.
        here = cut_experts(9, comm.size).owner[4] == comm.rank
        if grid_of(comm).shared is not None:
            assert jobs[-2:] == ([1, 1] if here else [2, 2])
        if whole is not None:
            case.check_bits(whole)


def test_memory_of_shared_work_comes_back_when_the_state_is_gone(comm: MPI.Intracomm, seed: int) -> None:
    case = draw_case(np.random.default_rng(seed), np.float32, comm.size, n_tokens=90, n_experts=11, top_k=1, given=True)
    assert case.experts is not None
    case.experts[:] = 4  # one owner has all the work
    arrays, keywords, dy = case.arguments(comm)
    window = grid_of(comm).shared
    if window is None:
        pytest.skip("ranks share no memory")
    free = list(window._free_large)
    with work_is_shared():
        y, state = fivedp.expert_layer(*arrays, comm, keep=True, **keywords)
        d = fivedp.expert_layer_backward(dy, state)
    kept = np.array([state.up.copy(), d.w_up.copy()], object)
    taken = window._free_large != free
    for _ in range(2):  # what a state keeps is not given to the next call
        with work_is_shared():
            other = fivedp.expert_layer(*arrays, comm, keep=True, **keywords)
        np.testing.assert_array_equal(state.up, kept[0])
        np.testing.assert_array_equal(d.w_up, kept[1])
    del y, state, d, other
    extent = window.take_large(1)  # it looks after what came back when it is asked
    assert extent is not None
    window.give(extent)
    assert window._free_large == free
    assert comm.size == 1 or comm.allreduce(taken, MPI.LOR)


def test_calls_one_after_another_do_not_meet(comm: MPI.Intracomm, seed: int) -> None:
    """Ranks that run ahead: two layers forward, and back in the other order."""
    rng = np.random.default_rng(seed)
    cases = [draw_case(rng, np.float32, comm.size, share="uneven", n_experts=n) for n in (5, 8)]
    expected = [case.run(comm)[0] for case in cases]
    states, found = [], []
    for case in cases:
        arrays, keywords, _ = case.arguments(comm)
        y, state = fivedp.expert_layer(*arrays, comm, keep=True, **keywords)
        states.append(state)
        found.append([y])
    for i in (1, 0):
        d = fivedp.expert_layer_backward(cases[i].arguments(comm)[2], states[i])
        found[i] += results_of(d)
    for results, rights in zip(found, expected, strict=True):
        for a, b in zip(results, rights, strict=True):
            assert a.tobytes() == b.tobytes()


# -- wrong arguments ---------------------------------------------------------------------------------------------------

Change = Callable[[list[Any], dict[str, Any]], None]


def argument(place: int, change: Callable[[Any], Any]) -> Change:
    def apply(arrays: list[Any], keywords: dict[str, Any]) -> None:
        arrays[place] = change(arrays[place])

    return apply


def keyword(**changes: Any) -> Change:
    return lambda arrays, keywords: keywords.update(changes)


def routing(change: Callable[[Any, Any], Any]) -> Change:
    """Give a routing that `change` makes of right tables."""

    def apply(arrays: list[Any], keywords: dict[str, Any]) -> None:
        experts = draw_experts(np.random.default_rng(0), len(arrays[0]), 8, 2)
        keywords["routing"] = change(experts, np.ones(experts.shape, np.float32))

    return apply


def repeated(experts: Any, weights: Any) -> Any:
    experts[-1] = 3
    return routing_of(experts, weights, 8)


FAULTS: dict[str, tuple[Change, type[ValueError], str]] = {
    "list": (argument(0, lambda x: x.tolist()), DTypeError, "`x` is a list; expected a NumPy or CuPy array"),
    "integers": (argument(0, lambda x: x.astype(int)), DTypeError, "`x` has dtype int64; expected float32"),
    "byte order": (argument(0, lambda x: x.astype(">f4")), DTypeError, "`x` has dtype >f4"),
    "one dimension": (argument(0, lambda x: x[0]), ShapeError, r"`x` has shape \(12,\)"),
    "not a number": (
        argument(0, lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x).astype(x.dtype)), LayoutError,
        "row 3 of `logits` has nan for expert 0; expected finite numbers",
    ),
    "more experts for a token than there are": (keyword(top_k=9), ShapeError, "top_k is 9; expected 1 to 8"),
    "score": (keyword(score="cosine"), LayoutError, "score is 'cosine'; expected one of softmax, sigmoid"),
    "width": (argument(0, lambda x: x[:, 1:].copy()), ShapeError, "`router` has shape"),
    "router's type": (argument(1, lambda r: r.astype(np.float64)), DTypeError, "`router` has dtype float64"),
    "an expert too many": (
        argument(2, lambda w: np.concatenate([w, np.ones((1, 12, 10), np.float32)])), ShapeError,
        "`w_up` is of . experts; the block rule gives this rank . of 8",
    ),
    "up's type": (argument(2, lambda w: w.astype(np.float64)), DTypeError, "`w_up` has dtype float64"),
    "no gate": (argument(3, lambda w: None), LayoutError, "`w_gate` is None; only swiglu has a gate"),
    "gate's shape": (argument(3, lambda w: w[..., 1:].copy()), ShapeError, "`w_gate` has shape"),
    "gate that is not used": (keyword(activation="relu"), LayoutError, "activation is 'relu' and `w_gate` is given"),
    "down's shape": (argument(4, lambda w: w[:, 1:].copy()), ShapeError, "`w_down` has shape"),
    "activation": (keyword(activation="swish"), LayoutError, "activation is 'swish'; expected one of swiglu, gelu"),
    "wire": (keyword(wire="half"), LayoutError, "wire is 'half'; expected"),
    "routing of other tokens": (
        routing(lambda e, w: routing_of(np.append(e, e[:1], axis=0), np.append(w, w[:1], axis=0), 8)),
        ShapeError, "`routing` is of . tokens and `x` has .",
    ),
    "routing of other experts": (
        routing(lambda e, w: routing_of(e, w, 9)), ShapeError, "`routing` has 9 experts and `router` 8",
    ),
    "routing is a table": (routing(lambda e, w: e), DTypeError, "`routing` is a ndarray; expected what fivedp.route"),
    "expert that is not there": (
        routing(lambda e, w: routing_of(np.where(e == e[0, 0], 8, e).astype(np.int32), w, 8)), ShapeError,
        "names expert 8",
    ),
    "expert chosen twice": (routing(repeated), ShapeError, "names an expert twice"),
    "fewer weights": (
        routing(lambda e, w: routing_of(e, w[:, :1], 8)), ShapeError, "`routing` has weights of shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", ["everywhere", "on one rank"])
def test_wrong_arguments(comm: MPI.Intracomm, where: str) -> None:
    case = draw_case(np.random.default_rng(0), np.float32, comm.size, n_tokens=5 * comm.size)
    for i, (change, kind, words) in enumerate(FAULTS.values()):
        arrays, keywords, _ = case.arguments(comm)
        keywords["keep"] = i % 2 == 0  # with it ranks meet once more before, to make a routing
        if where == "everywhere" or comm.rank == comm.size - 1:
            change(arrays, keywords)
        assert_same_error(comm, lambda a=arrays, k=keywords: fivedp.expert_layer(*a, comm, **k), kind, words)  # type: ignore[misc]
    judge(case, comm)  # the communicator is as good as before


@pytest.mark.mpi(min_size=2)
def test_calls_that_differ(comm: MPI.Intracomm) -> None:
    case = draw_case(np.random.default_rng(0), np.float32, comm.size, n_tokens=5 * comm.size)
    arrays, keywords, _ = case.arguments(comm)
    odd = keywords | ({"top_k": 1} if comm.rank == comm.size - 1 else {})
    assert_same_error(comm, lambda: fivedp.expert_layer(*arrays, comm, **odd), LayoutError, "the keywords is .*top_k=1")
    wide = [np.concatenate([a, a], axis=axis) for a, axis in zip(arrays, (1, 0, 1, 1, 2), strict=True)]
    mine = wide if comm.rank == comm.size - 1 else arrays
    assert_same_error(
        comm,
        lambda: fivedp.expert_layer(*mine, comm, **keywords),
        ShapeError,
        "`x` has shape .*only the number",
    )
    case.judge(comm)


@pytest.mark.parametrize("where", ["everywhere", "on one rank"])
def test_wrong_gradient(comm: MPI.Intracomm, where: str) -> None:
    case: Case = draw_case(np.random.default_rng(0), np.float32, comm.size, n_tokens=5 * comm.size)
    arrays, keywords, dy = case.arguments(comm)
    _, state = fivedp.expert_layer(*arrays, comm, keep=True, **keywords)
    for wrong, kind, words in (
        (dy[1:], ShapeError, "`dy` has shape"),
        (dy.astype(np.float64), DTypeError, "`dy` has dtype float64; expected float32"),
        (None, DTypeError, "`dy` is a NoneType"),
    ):
        mine = wrong if where == "everywhere" or comm.rank == 0 else dy
        assert_same_error(comm, lambda mine=mine: fivedp.expert_layer_backward(mine, state), kind, words)  # type: ignore[misc]
    fivedp.expert_layer_backward(dy, state)
