"""Routing over ranks: whatever the cut of the batch, what one rank makes of all of it, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp import DTypeError, LayoutError, ShapeError
from fivedp.comm.grid import grid_of
from fivedp.kernels.routing import Rule
from fivedp.ops.capacity import capacity_of
from fivedp.reference import routing_reference as oracle

RANKS = (1, 2, 3, 5, 8)
TIMEOUT = 150
TYPES = [np.float32, np.float64, ml_dtypes.bfloat16]

RECIPES: dict[str, dict[str, Any]] = {
    "mixtral": {"top_k": 2},
    "deepseek": {"top_k": 4, "score": "sigmoid", "groups": (4, 2), "scale": 2.5, "biased": True},
    "switch": {"top_k": 1, "normalize": False, "capacity_factor": 1.0},
    "gshard": {"top_k": 2, "capacity_factor": 1.2, "definition": "gshard"},
    "position": {"top_k": 5, "capacity_factor": 0.6},
    "by score": {"top_k": 3, "normalize": False, "capacity_factor": 0.7, "drop": "score"},
    "by score, sigmoid": {"top_k": 3, "score": "sigmoid", "capacity_factor": 1.0, "drop": "score"},
    "expert choice": {"top_k": 2, "normalize": False, "capacity_factor": 1.3, "choice": "expert"},
    "expert choice, normalized": {"top_k": 1, "score": "sigmoid", "choice": "expert"},
    "megatron": {"top_k": 2, "capacity_factor": 1.0, "definition": "megatron"},
    "hf": {"top_k": 3, "definition": "hf"},
    "all experts": {"top_k": 12, "capacity_factor": 0.5},
}


def arguments(recipe: str, rng: np.random.Generator, experts: int) -> dict[str, Any]:
    keywords = dict(RECIPES[recipe])
    if keywords.pop("biased", False):
        keywords["bias"] = 0.2 * rng.standard_normal(experts)
    return keywords


def shares(rng: np.random.Generator, tokens: int, parts: int) -> list[slice]:
    """Any cut of the tokens; some ranks may have none."""
    borders = [0, *np.sort(rng.integers(0, tokens + 1, parts - 1)).tolist(), tokens]
    return [slice(borders[i], borders[i + 1]) for i in range(parts)]


def skewed(rng: np.random.Generator, tokens: int, experts: int, dtype: Any) -> Any:
    """Logits that favour some experts, with many equal ones."""
    logits = np.round(rng.standard_normal((tokens, experts)) - 0.2 * np.arange(experts), 1)
    return logits.astype(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_cut_of_the_batch_gives_the_bits_of_one_rank(
    comm: MPI.Intracomm, seed: int, recipe: str, dtype: Any
) -> None:
    for tokens in (0, 1, 150):
        rng = np.random.default_rng([seed, tokens])
        logits, keywords = skewed(rng, tokens, 12, dtype), arguments(recipe, rng, 12)
        mine = shares(rng, tokens, comm.size)[comm.rank]
        local = keywords.get("definition") in ("hf", "megatron")
        found = fivedp.route(logits[mine], comm=comm, **keywords)
        wanted = fivedp.route(logits[mine] if local else logits, **keywords)
        rows = slice(None) if local else mine
        assert found.first_token == mine.start
        width = found.experts.shape[1]  # where experts choose, that of this rank's widest token
        assert not (wanted.experts[rows, width:] >= 0).any()
        np.testing.assert_array_equal(found.experts, wanted.experts[rows, :width])
        assert found.weights.tobytes() == np.ascontiguousarray(wanted.weights[rows, :width]).tobytes()
        assert (found.aux_loss, found.z_loss) == (wanted.aux_loss, wanted.z_loss)
        np.testing.assert_array_equal(found.counts, np.bincount(found.experts[found.experts >= 0], minlength=12))
        if not local:
            assert comm.allreduce(int(found.dropped)) == wanted.dropped
            np.testing.assert_array_equal(comm.allreduce(found.counts), wanted.counts)
        dweights = rng.standard_normal(wanted.experts.shape)
        gradients = [
            fivedp.route_backward(u, routing, d_aux_loss=0.3, d_z_loss=0.1)
            for u, routing in ((dweights[rows, :width], found), (dweights, wanted))
        ]
        assert gradients[0].dtype == logits.dtype
        assert gradients[0].tobytes() == np.ascontiguousarray(gradients[1][rows]).tobytes()


def test_drops_are_those_of_a_walk_over_the_pairs(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for experts, top_k, factor in ((1, 1, 0.5), (6, 2, 1.0), (6, 6, 0.3), (17, 3, 1.25)):
        logits = skewed(rng, 90, experts, np.float32)
        mine = shares(rng, 90, comm.size)[comm.rank]
        capacity = capacity_of(factor, 90, top_k, experts)
        chosen = oracle.choose(logits, top_k, Rule())
        whole = fivedp.route(logits, top_k)
        wanted = {
            "position": oracle.keep_by_position(chosen, capacity, experts),
            "score": oracle.keep_by_score(chosen, whole.weights, capacity, experts),
        }
        for drop, kept in wanted.items():
            found = fivedp.route(logits[mine], top_k, capacity_factor=factor, drop=drop, comm=comm)
            np.testing.assert_array_equal(found.experts, kept[mine])
            assert found.dropped == (kept[mine] != chosen[mine]).sum()
            assert comm.allreduce(found.counts).max(initial=0) <= capacity
            np.testing.assert_array_equal(found.weights, np.where(kept[mine] < 0, 0, whole.weights[mine]))
        taken = fivedp.route(logits[mine], top_k, capacity_factor=factor, choice="expert", comm=comm)
        scores = fivedp.route(logits, experts, normalize=False)
        dense = np.zeros(logits.shape, np.float32)
        np.put_along_axis(dense, scores.experts, scores.weights, axis=1)
        expected = oracle.experts_choose(dense, min(90, capacity))[mine]
        found_set = np.zeros(expected.shape, bool)
        for token, row in enumerate(taken.experts):
            assert (np.diff(row[row >= 0]) > 0).all()
            found_set[token, row[row >= 0]] = True
        np.testing.assert_array_equal(found_set, expected)
        assert taken.experts.shape[1] == expected.sum(1).max(initial=0)


def test_losses_are_those_of_the_whole_batch(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = skewed(rng, 64, 12, np.float64)
    mine = shares(rng, 64, comm.size)[comm.rank]
    for score in ("softmax", "sigmoid"):
        rule = Rule(sigmoid=score == "sigmoid")
        found = fivedp.route(logits[mine], 3, score=score, comm=comm)
        chosen = oracle.choose(logits, 3, rule)
        counts = np.bincount(chosen.reshape(-1), minlength=12)
        assert found.aux_loss == pytest.approx(oracle.balance_loss(logits, counts, 3 * 64, rule), abs=1e-10)
        assert found.z_loss == pytest.approx(oracle.z_loss(logits), rel=1e-10)
        first = fivedp.route(logits[mine], 3, score=score, definition="gshard", comm=comm)
        firsts = np.bincount(chosen[:, 0], minlength=12)
        assert first.aux_loss == pytest.approx(oracle.balance_loss(logits, firsts, 64, rule), abs=1e-10)
        alone = [fivedp.route(logits[mine], 3, score=score, definition=name, comm=comm) for name in ("hf", "megatron")]
        assert alone[0].aux_loss == pytest.approx(3 * alone[1].aux_loss, rel=1e-14)
    even = fivedp.route(np.zeros((mine.stop - mine.start, 12)), 12, comm=comm)
    assert even.aux_loss == pytest.approx(1.0, rel=1e-11)


def test_an_infinite_z_loss_where_logits_are_beyond_all_measure(comm: MPI.Intracomm) -> None:
    logits = np.full((2, 3), 2.0**21 if comm.rank == comm.size - 1 else 1.0, np.float32)
    assert fivedp.route(logits, comm=comm).z_loss == np.inf


def test_bytes_are_counted(comm: MPI.Intracomm) -> None:
    fivedp.route(np.zeros((3, 6)), 2, comm=comm)
    traffic = grid_of(comm).traffic
    traffic.reset()
    fivedp.route(np.zeros((3, 6)), 2, comm=comm)
    assert traffic.bytes_sent == (comm.size - 1) * 8 * (3 * 6 + 3)
    traffic.reset()
    fivedp.route(np.zeros((3, 6)), 2, definition="megatron", comm=comm)
    assert traffic.bytes_sent == 0


def spoiled(value: float) -> Any:
    logits = np.zeros((5, 12), np.float32)
    logits[3, 7] = value
    return logits


GOOD = np.zeros((5, 12), np.float32)
# What one rank is called with, the exception, its words. All but the last kind are wrong on any number of ranks.
FAULTS: dict[str, tuple[Any, dict[str, Any], type[ValueError], str]] = {
    "nan": (spoiled(np.nan), {}, LayoutError, "row 3 of `logits` has nan for expert 7; expected finite numbers"),
    "inf": (spoiled(-np.inf), {}, LayoutError, "row 3 of `logits` has -inf for expert 7"),
    "nan, experts choose": (spoiled(np.nan), {"choice": "expert"}, LayoutError, "row 3 of `logits`"),
    "list": ([[1.0]], {}, DTypeError, "`logits` is a list"),
    "integers": (GOOD.astype(int), {}, DTypeError, "`logits` has dtype int64"),
    "float16": (GOOD.astype(np.float16), {}, DTypeError, "`logits` has dtype float16"),
    "dimensions": (GOOD[None], {}, ShapeError, r"`logits` has shape \(1, 5, 12\)"),
    "no experts": (GOOD[:, :0], {}, ShapeError, r"`logits` has shape \(5, 0\)"),
    "top_k above E": (GOOD, {"top_k": 13}, ShapeError, "top_k is 13; expected 1 to 12"),
    "top_k 0": (GOOD, {"top_k": 0}, LayoutError, "top_k is 0; expected a whole number"),
    "top_k text": (GOOD, {"top_k": "2"}, LayoutError, "top_k is '2'"),
    "score": (GOOD, {"score": "tanh"}, LayoutError, "score is 'tanh'; expected one of softmax, sigmoid"),
    "drop": (GOOD, {"drop": "random"}, LayoutError, "drop is 'random'"),
    "definition": (GOOD, {"definition": "mine"}, LayoutError, "definition is 'mine'"),
    "capacity_factor": (GOOD, {"capacity_factor": 0.0}, LayoutError, "capacity_factor is 0.0; expected a positive"),
    "scale": (GOOD, {"scale": np.nan}, LayoutError, "scale is nan"),
    "bias list": (GOOD, {"bias": [0.0] * 12}, DTypeError, "`bias` is a list"),
    "bias shape": (GOOD, {"bias": np.zeros(11)}, ShapeError, r"`bias` has shape \(11,\); expected \(12,\)"),
    "bias nan": (GOOD, {"bias": np.full(12, np.nan)}, LayoutError, "`bias` is nan for expert 0"),
    "groups": (GOOD, {"groups": (5, 1)}, ShapeError, "12 experts are in 5 groups; expected a divisor"),
    "groups text": (GOOD, {"groups": 4}, LayoutError, "groups is 4; expected"),
    "top_groups": (GOOD, {"groups": (4, 5)}, LayoutError, "no more top_groups than n_groups"),
    "reach": (GOOD, {"groups": (6, 1), "top_k": 3}, ShapeError, "1 of 6 groups have 2 experts"),
    "expert bias": (GOOD, {"choice": "expert", "bias": np.zeros(12)}, LayoutError, "no bias"),
}
DIFFERENCES: dict[str, tuple[Any, dict[str, Any], type[ValueError], str]] = {
    "another top_k": (GOOD, {"top_k": 3}, LayoutError, 'the keywords is "top_k=3.* all ranks must give the same'),
    "another bias": (GOOD, {"bias": np.ones(12)}, LayoutError, "the same keywords"),
    "another dtype": (GOOD.astype(np.float64), {}, DTypeError, "dtype of `logits` is float64"),
    "other experts": (GOOD[:, :11], {}, ShapeError, r"`logits` has shape .*only the number of tokens may differ"),
}


def assert_same_error(comm: MPI.Intracomm, call: Callable[[], object], kind: type[ValueError], words: str) -> str:
    traffic = grid_of(comm).traffic
    traffic.reset()
    with pytest.raises(kind, match=words) as caught:
        call()
    assert traffic.bytes_sent == 0
    texts = comm.allgather(str(caught.value))
    assert len(set(texts)) == 1, texts
    return texts[0]


@pytest.mark.parametrize("fault", [*FAULTS, *DIFFERENCES])
def test_a_fault_on_one_rank_is_the_same_error_on_all(comm: MPI.Intracomm, fault: str) -> None:
    if fault in DIFFERENCES and comm.size == 1:
        pytest.skip("no other rank to differ from")
    logits, keywords, kind, words = (FAULTS | DIFFERENCES)[fault]
    wrong = comm.rank == comm.size - 1
    text = assert_same_error(
        comm, lambda: fivedp.route(logits if wrong else GOOD, comm=comm, **(keywords if wrong else {})), kind, words
    )
    if fault in FAULTS and comm.size > 1:
        assert text.endswith(f"(rank {comm.size - 1})")
    assert fivedp.route(GOOD, comm=comm).aux_loss == pytest.approx(1.0)  # the communicator still works


def test_wrong_arguments_of_a_rank_alone() -> None:
    for fault, (logits, keywords, kind, words) in FAULTS.items():
        with pytest.raises(kind, match=words):
            fivedp.route(logits, **keywords)
        assert fault
    routing = fivedp.route(GOOD)
    with pytest.raises(ShapeError, match=r"`dweights` has shape \(5, 3\)"):
        fivedp.route_backward(np.zeros((5, 3)), routing)
    with pytest.raises(DTypeError, match="`dweights` has dtype int64"):
        fivedp.route_backward(np.zeros((5, 2), int), routing)


def test_capacity_takes_the_factor_as_it_is_written() -> None:
    assert capacity_of(1.1, 10, 1, 11) == 1  # 1.1 in binary is a little more
    assert capacity_of(1.25, 4096, 2, 8) == 1280
    assert capacity_of(1.0, 7, 2, 3) == 5
    assert capacity_of(2.0, 0, 2, 3) == 0


def test_the_bias_follows_the_counts_of_all_ranks(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bias, counts = rng.standard_normal(7), rng.integers(0, 50, (comm.size, 7))
    total = counts.sum(0)
    wanted = bias + 0.01 * np.sign(total.mean() - total)
    found = fivedp.update_bias(bias, counts[comm.rank], rate=0.01, comm=comm)
    np.testing.assert_array_equal(found, wanted)
    even = fivedp.update_bias(bias.astype(np.float32), np.full(7, 3), comm=comm)
    np.testing.assert_array_equal(even, bias.astype(np.float32))
    wrong = np.zeros(6 if comm.rank == comm.size - 1 else 7, int)
    assert_same_error(comm, lambda: fivedp.update_bias(bias, wrong, comm=comm), ShapeError, r"`counts` \(6,\)")
    if comm.size > 1:
        other = bias + (comm.rank == 0)
        assert_same_error(comm, lambda: fivedp.update_bias(other, total, comm=comm), LayoutError, "the same keywords")


def test_the_bias_balances_experts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, bias = rng.standard_normal((512, 8)) + np.linspace(1, -1, 8), np.zeros(8)
    ratios = []
    for _ in range(300):
        routing = fivedp.route(logits, 2, score="sigmoid", bias=bias)
        ratios.append(fivedp.load_report(routing).expert_ratio)
        bias = fivedp.update_bias(bias, routing.counts, rate=0.005)
    assert ratios[0] > 1.5
    assert ratios[-1] < 1.1


@pytest.mark.parametrize("kind", ["uniform", "zipf", "one_expert", "half_idle", "balanced"])
def test_a_workload_is_the_same_batch_on_any_mesh(comm: MPI.Intracomm, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    mine = shares(rng, 400, comm.size)[comm.rank]
    whole = fivedp.routing_workload(kind, 400, 16, 4, seed)
    part = fivedp.routing_workload(kind, mine.stop - mine.start, 16, 4, seed, first_token=mine.start)
    np.testing.assert_array_equal(part.experts, whole.experts[mine])
    np.testing.assert_array_equal(part.weights, whole.weights[mine])
    assert all(len(set(row)) == 4 for row in whole.experts.tolist())
    np.testing.assert_allclose(whole.weights.sum(1), 1, rtol=1e-6)
    report = fivedp.load_report(part, comm)
    np.testing.assert_array_equal(report.experts, whole.counts)
    np.testing.assert_array_equal(report.ranks, [x.sum() for x in np.array_split(whole.counts, comm.size)])
    low, high = {
        "uniform": (1.0, 1.6), "zipf": (2.2, 4.0), "one_expert": (4.0, 4.0), "half_idle": (2.0, 3.0),
        "balanced": (1.0, 1.0),
    }[kind]  # fmt: skip
    assert low <= report.expert_ratio <= high
    assert "1600 pairs" in str(report)
    forced = fivedp.load_report(fivedp.balanced(part), comm)
    np.testing.assert_array_equal(forced.experts, np.full(16, 100))


def test_wrong_workloads_and_reports(comm: MPI.Intracomm) -> None:
    with pytest.raises(LayoutError, match="kind is 'even'; expected one of uniform"):
        fivedp.routing_workload("even", 4, 4, 2, 0)
    for kind, tokens, top_k in (("half_idle", 4, 3), ("zipf", -1, 1), ("uniform", 4, 0), ("balanced", 4, 5)):
        with pytest.raises(ShapeError, match="expected 0 or more tokens"):
            fivedp.routing_workload(kind, tokens, 4, top_k, 0)
    few, many = (fivedp.routing_workload("uniform", 3, experts, 1, 0) for experts in (4, 5))
    assert_same_error(comm, lambda: fivedp.load_report(few, comm, ranks=0), LayoutError, "ranks is 0; expected 1")
    if comm.size > 1:
        odd = many if comm.rank == 1 else few
        assert_same_error(comm, lambda: fivedp.load_report(odd, comm), ShapeError, "`counts` has shape")
    assert fivedp.load_report(fivedp.routing_workload("uniform", 0, 3, 1, 0), comm).expert_ratio == 1.0


def test_a_forced_balance_keeps_weights_and_their_gradient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    routing = fivedp.route(rng.standard_normal((40, 6)), 2, capacity_factor=0.8)
    forced = fivedp.balanced(routing)
    np.testing.assert_array_equal(forced.weights, routing.weights)
    np.testing.assert_array_equal(forced.experts < 0, routing.experts < 0)
    u = rng.standard_normal((40, 2))
    np.testing.assert_array_equal(fivedp.route_backward(u, forced), fivedp.route_backward(u, routing))


def test_a_routing_is_recorded_and_replayed(seed: int, tmp_path: Path) -> None:
    routing = fivedp.route(skewed(np.random.default_rng(seed), 30, 5, np.float32), 2, capacity_factor=0.7)
    routing.save(tmp_path / "step")
    replayed = fivedp.Routing.load(tmp_path / "step")
    for name in ("experts", "weights", "counts"):
        x, y = getattr(replayed, name), getattr(routing, name)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    for name in ("aux_loss", "z_loss", "dropped", "n_experts", "first_token"):
        assert getattr(replayed, name) == getattr(routing, name)
        assert type(getattr(replayed, name)) is type(getattr(routing, name))
    with pytest.raises(LayoutError, match="loaded or generated"):
        fivedp.route_backward(np.zeros((30, 2)), replayed)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(LayoutError, match=r"other\.npz holds no routing"):
        fivedp.Routing.load(tmp_path / "other.npz")
