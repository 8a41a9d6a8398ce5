"""Whole mixtures of experts for the tests under mpirun: every rank draws the same batch, and one rank judges.

The bound: with u the rounding of the type of sums, an element may be off by

    2 * (the largest error/size of the plain computation) * size + ULPS * u * size

The plain computation is `experts_reference` in the same types. `size` is what the same formulas make of absolute
values, each function replaced by a bound of itself and of what an error of its argument does: so it is not nought where
an element is nought by chance.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
from mpi4py import MPI

import fivedp
from fivedp.comm import shared_window
from fivedp.comm.grid import Group, grid_of
from fivedp.layout import dispatch as layout_of_dispatch
from fivedp.layout import hot_experts
from fivedp.layout.nodes import Network
from fivedp.ops import arriving_rows, dispatch_plan
from fivedp.ops.dispatch_plan import DispatchPlan
from fivedp.ops.mixture_layer import ExpertGradients, ExpertLayerState
from fivedp.ops.routing import Routing
from fivedp.ops.shared_experts import SharedExperts
from fivedp.ops.work_sharing import SharedWork
from fivedp.reference.experts_reference import Activation, Experts, chosen_softmax, chosen_softmax_backward
from mpi_attention import collected, dirty_memory

Array = Any
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float64), BFLOAT16)
OF_SHARED = ("d_shared_up", "d_shared_gate", "d_shared_down", "d_shared_router")
RESULTS = ("y", "dx", "d_router", "d_w_up", "d_w_gate", "d_w_down", "d_weights", *OF_SHARED)
OVER_TOKENS = ("d_router", *OF_SHARED)
"""Sums over the tokens of all ranks, the same on each."""
ULPS = 16  # a row passes through three products, the activation, its weight and the tree

__all__ = ["collected", "dirty_memory"]


def sums(dtype: Any) -> Any:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def routing_of(experts: Array, weights: Array, n_experts: int) -> Routing:
    """Choices that were made elsewhere."""
    counts = np.bincount(experts[experts >= 0], minlength=n_experts)
    return Routing(experts, weights, counts, 0.0, 0.0, np.int64((experts < 0).sum()), n_experts)


def draw_experts(
    rng: np.random.Generator, n_tokens: int, n_experts: int, k: int, *, empty: float = 0.0, skew: float = 0.0
) -> Array:
    """(T, k) int32: different experts for each token, some slots empty, low experts more often where there is skew."""
    score = rng.gumbel(size=(n_tokens, n_experts)) - skew * np.log1p(np.arange(n_experts))
    experts = np.argsort(-score, axis=1)[:, :k].astype(np.int32)
    experts[rng.random(experts.shape) < empty] = -1
    return experts


def cut_tokens(rng: np.random.Generator, n_tokens: int, ranks: int, how: str) -> list[int]:
    """Where the tokens of every rank begin, and the end: "even" by the block rule, "uneven", or "one" rank has all."""
    if how == "even":
        inner = np.cumsum([len(part) for part in np.array_split(np.arange(n_tokens), ranks)])[:-1].tolist()
    elif how == "uneven":
        inner = sorted(rng.integers(0, n_tokens + 1, ranks - 1).tolist())
    else:
        owner = int(rng.integers(ranks))
        inner = [0] * owner + [n_tokens] * (ranks - 1 - owner)
    return [0, *inner, n_tokens]


def of_rank(n_experts: int, comm: Any) -> slice:
    """The experts of a rank."""
    mine = np.array_split(np.arange(n_experts), comm.size)[comm.rank]
    return slice(int(mine[0]), int(mine[-1]) + 1) if len(mine) else slice(0, 0)


@contextmanager
def window_from(n_bytes: int) -> Iterator[None]:
    """Read boxes of `n_bytes` and more where they lie, on ranks that share memory."""
    with mock.patch.object(shared_window, "MIN_BYTES", n_bytes):
        yield


def on_nodes(comm: MPI.Intracomm, nodes: Sequence[int], link: str = "1e-9") -> MPI.Intracomm:
    """The same ranks, as if each were on the node that is given for it, with a link of so many GB/s between nodes."""
    setting = {"FIVEDP_NODE": f"node {nodes[comm.rank]}", "FIVEDP_LINK": link}
    with mock.patch.dict(os.environ, setting):
        apart = comm.Dup()
        grid_of(apart)  # reads the setting
    return apart


@contextmanager
def copies_pay(wanted: bool = True) -> Iterator[None]:
    """Products are so slow that whatever relieves the busiest rank pays, at any price of the link; or so fast that
    nothing does."""

    def network_of(group: Group) -> Network:
        return Network(link=group.grid.link, flops=1e-9 * group.grid.link if wanted else 1e30)

    with mock.patch.object(dispatch_plan, "network_of", network_of), mock.patch.object(hot_experts, "BALANCED", 1.0):
        yield


def assert_at_the_bound(plan: DispatchPlan) -> None:
    """Rows go to every rank once, or cross to every node once, whichever way the plan took."""
    bill = plan.bytes_sent()
    if plan.relay is None:
        assert bill["rows"] == bill["bound"]
    else:
        assert bill["rows_between"] == bill["bound_between"]


@contextmanager
def taken_apart_from(rows: int) -> Iterator[None]:
    """Multiply rows that have come while others travel, where both are so many for each expert."""
    with mock.patch.object(arriving_rows, "ENOUGH_ROWS", rows):
        yield


@contextmanager
def work_is_shared(wanted: bool = True) -> Iterator[list[int]]:
    """Every owner with more rows than the mean lets the others of its node help, at any price; not on a narrow wire.

    Gives the number of jobs in which this rank took part, of every call.
    """
    jobs: list[int] = []
    if not wanted:
        yield jobs
        return
    end = SharedWork.end

    def counted(self: SharedWork) -> None:
        jobs.append(len(self.jobs))
        end(self)

    with (
        mock.patch.object(layout_of_dispatch, "_FLOPS_PER_COPIED_BYTE", 0),
        mock.patch.object(layout_of_dispatch, "BALANCED", 1.0),
        mock.patch.object(SharedWork, "end", counted),
    ):
        yield jobs


@dataclass
class Case:
    """One layer: whole arrays, and where every rank's tokens begin."""

    x: Array
    dy: Array
    router: Array
    w_up: Array
    w_gate: Array | None
    w_down: Array
    activation: str
    top_k: int
    borders: list[int]
    keywords: dict[str, Any] = field(default_factory=dict)
    experts: Array | None = None
    """With `weights`: the routing's tables, where they are given."""
    weights: Array | None = None
    lies: tuple[str, ...] = ("plain",) * 6
    """How x, router, w_up, w_gate, w_down and dy lie in memory."""
    losses: tuple[float, float] = (0.0, 0.0)
    """The gradients of the balance loss and of the z-loss."""
    shared: SharedExperts | None = None

    @property
    def n_experts(self) -> int:
        return int(self.router.shape[1])

    def arguments(self, comm: MPI.Intracomm) -> tuple[list[Any], dict[str, Any], Array]:
        """This rank's arrays, the keywords, and its dy."""
        tokens = slice(*self.borders[comm.rank : comm.rank + 2]) if comm.size > 1 else slice(None)
        mine = of_rank(self.n_experts, comm)
        gate = None if self.w_gate is None else self.w_gate[mine]
        keywords = {"top_k": self.top_k, "activation": self.activation, **self.keywords}
        if self.shared is not None:
            keywords["shared"] = SharedExperts(
                *(spread(a, kind) for a, kind in zip(matrices(self.shared), self.lies, strict=False))
            )
        if self.experts is not None and self.weights is not None:
            keywords["routing"] = routing_of(self.experts[tokens], self.weights[tokens], self.n_experts)
        arrays = [self.x[tokens], self.router, self.w_up[mine], gate, self.w_down[mine], self.dy[tokens]]
        *arrays, dy = (spread(a, kind) for a, kind in zip(arrays, self.lies, strict=True))
        return arrays, keywords, dy

    def run(self, comm: MPI.Intracomm, **more: Any) -> tuple[list[Any], ExpertLayerState]:
        """This rank's `RESULTS`, and the state that the backward was given."""
        arrays, keywords, dy = self.arguments(comm)
        before = [None if a is None else a.tobytes() for a in (*arrays, dy)]
        with dirty_memory():
            y, state = fivedp.expert_layer(*arrays, comm, keep=True, **keywords, **more)
            d = fivedp.expert_layer_backward(dy, state, d_aux_loss=self.losses[0], d_z_loss=self.losses[1])
        assert [None if a is None else a.tobytes() for a in (*arrays, dy)] == before, "an argument was written to"
        return [y, *results_of(d)], state

    def judge(self, comm: MPI.Intracomm, root: int = 0, **more: Any) -> list[Any] | None:
        """Run on all ranks, and hold the whole against float64 on rank `root`; the whole results there."""
        everything = self.collected(*self.run(comm, **more), comm, root)
        if everything is None:
            return None
        self.check(*everything)
        return everything[0]

    def collected(
        self, results: list[Any], state: ExpertLayerState, comm: MPI.Intracomm, root: int
    ) -> tuple[list[Any], Array, Array] | None:
        """Whole results, and the experts and weights of all tokens, on rank `root`."""
        parts = collected((results, state.routing.experts, state.routing.weights), comm, root)
        if parts is None:
            return None
        experts, weights = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        return joined([part[0] for part in parts]), experts, weights

    def check_bits(self, whole: list[Any]) -> None:
        """Hold whole results against those of this rank alone."""
        alone, _ = self.run(MPI.COMM_SELF)
        even = [len(part) for part in np.array_split(self.x, len(self.borders) - 1)] == np.diff(self.borders).tolist()
        for name, a, b in zip(RESULTS, whole, alone, strict=False):
            # The router's gradient is summed over tokens by their place in the whole only if ranks hold equal shares.
            if a is not None and (name not in OVER_TOKENS or even):
                assert a.tobytes() == b.tobytes(), f"{name} has other bits on one rank"

    def check(self, whole: list[Any], experts: Array, weights: Array) -> None:
        """Hold whole results against float64, for the choices that were made."""
        dtype = self.x.dtype
        right, plain, size = (
            self._results(experts, weights, kind, stored)
            for kind, stored in (("exact", None), ("plain", dtype), ("size", None))
        )
        kink = self.activation == "relu" and self._near_a_kink()
        u = 2.0**-24 if sums(dtype) == np.float32 else 2 * 2.0**-53  # the oracle has an error of its own
        # 16 bits: what is stored between the products, and the result itself.
        rounded = 4.1 * 2.0**-8 if dtype == BFLOAT16 or self.keywords.get("wire") == "bfloat16" else 0.0
        names = RESULTS[: len(right)]
        for name, found, exact, usual, scale in zip(names, whole, right, plain, size, strict=True):
            if exact is None:
                assert found is None
                continue
            wanted = self.router.dtype if name == "d_router" else sums(dtype) if name == "d_weights" else dtype
            if name == "d_shared_router" and self.shared is not None:
                wanted = self.shared.router.dtype
            assert found.dtype == wanted, f"{name} is {found.dtype}"
            if kink and name != "y":
                continue
            assert_as_exact(name, found, usual.astype(dtype), exact, scale, ULPS * u + rounded)

    def _near_a_kink(self) -> bool:
        """Whether rounding may decide which side of the kink of relu a product is on."""
        x = self.x.astype(np.float64)
        for w_up in (self.w_up, None if self.shared is None else self.shared.w_up[None]):
            if w_up is not None and sums(self.x.dtype) == np.float32:
                w = w_up.astype(np.float64)
                product, size = np.einsum("th,ehf->tef", x, w), np.einsum("th,ehf->tef", abs(x), abs(w))
                if (abs(product) <= 1e-5 * size)[size > 0].any():
                    return True
        return False

    def _results(self, experts: Array, weights: Array, kind: str, stored: Any) -> list[Any]:
        """The results in float64, in the type of sums, or of absolute values."""
        dtype = sums(self.x.dtype) if kind == "plain" else np.dtype(np.float64)
        arrays = [self.x, self.dy, self.router, self.w_up, self.w_gate, self.w_down]
        x, dy, router, w_up, w_gate, w_down = (None if a is None else a.astype(dtype) for a in arrays)
        if self.experts is None:
            weights = chosen_softmax(x @ router, experts)
            if kind == "size":  # an error of a logit is a relative one of the weight
                logits = abs(x) @ abs(router)
                largest = np.max(logits, axis=1, keepdims=True, initial=0)
                weights = weights * (1 + 2 * largest)
        activation: Any = self.activation
        if kind == "size":
            arrays = [x, dy, router, w_up, w_gate, w_down]
            x, dy, router, w_up, w_gate, w_down = (None if a is None else abs(a) for a in arrays)
            # |f(z)| <= |z|, |f'| <= 1.2 and |f''| <= 1.2 for all of them, away from the kink of relu.
            activation, weights = Activation(lambda z: 1.2 * z, lambda z: 1.2 * (1 + z)), abs(weights)
        layer = Experts(w_up, w_gate, w_down, activation, dtype=dtype, stored=stored if stored == BFLOAT16 else None)
        y, d = layer(x, experts, weights), layer.backward(dy, x, experts, weights)
        dx, d_router = d.x, np.zeros(router.shape, dtype)
        if self.experts is None:
            if kind == "size":
                d_chosen = weights * (d.weights + (weights * d.weights).sum(axis=1, keepdims=True))
                d_logits = np.zeros((len(x), self.n_experts))
                np.put_along_axis(d_logits, experts, d_chosen, axis=1)
            else:
                d_logits = chosen_softmax_backward(d.weights, weights, experts, self.n_experts)
            dx, d_router = dx + d_logits @ router.T, x.T @ d_logits
        results = [y, dx, d_router, d.w_up, d.w_gate, d.w_down, d.weights]
        if self.shared is None:
            return results
        w = [None if a is None else abs(a.astype(dtype)) if kind == "size" else a.astype(dtype)
             for a in matrices(self.shared)]  # fmt: skip
        *results[:2], more = shared_results(x, dy, w, activation, layer.stored, kind == "size", results[:2])
        return results + more


def shared_results(
    x: Array, dy: Array, w: list[Array], activation: Any, stored: Any, size: bool, routed: list[Array]
) -> tuple[Array, Array, list[Array]]:
    """y and dx of a layer with shared experts from those of the routed ones, and the gradients `OF_SHARED`."""
    w_up, w_gate, w_down, router = w
    gate = None if w_gate is None else w_gate[None]
    layer = Experts(w_up[None], gate, w_down[None], activation, dtype=x.dtype, stored=stored)
    everyone, weights, slope = np.zeros((len(x), 1), np.int32), np.ones((len(x), 1), x.dtype), None
    if router is not None:
        logits = x @ router
        if size:  # of all the sigmoid and its slope may be, with what an error of the logit does to them
            weights = slope = 1 + logits
        else:
            weights = 1 / (1 + np.exp(-logits))
            slope = weights * (1 - weights)
    d = layer.backward(dy, x, everyone, weights)
    y, dx, d_router = routed[0] + layer(x, everyone, weights), routed[1] + d.x, None
    if slope is not None:
        dx, d_router = dx + (d.weights * slope) @ router.T, x.T @ (d.weights * slope)
    return y, dx, [d.w_up[0], None if d.w_gate is None else d.w_gate[0], d.w_down[0], d_router]


def matrices(shared: SharedExperts) -> list[Any]:
    """The weights of shared experts, or their gradients, in the order of `OF_SHARED`."""
    return [shared.w_up, shared.w_gate, shared.w_down, shared.router]


def assert_as_exact(name: str, found: Array, plain: Array, exact: Array, size: Array, allowance: float) -> None:
    """The rule of the head of this file."""
    assert found.shape == exact.shape, f"{name} has shape {found.shape}"
    found, plain = found.astype(np.float64), plain.astype(np.float64)
    assert np.isfinite(found).all(), f"{name} is not finite"
    nought = size == 0
    assert not found[nought].any(), f"{name}: not 0 where nothing is summed"
    if nought.all():
        return
    error, usual = ((abs(x - exact) / np.where(nought, 1, size)).max() for x in (found, plain))
    assert error <= 2 * usual + allowance, f"{name}: {error:.3g}, plain {usual:.3g}, allowance {allowance:.3g}"


def results_of(d: ExpertGradients) -> list[Any]:
    """The gradients among `RESULTS`."""
    shared = [] if d.shared is None else matrices(d.shared)
    return [d.x, d.router, d.w_up, d.w_gate, d.w_down, d.weights, *shared]


def joined(parts: list[list[Any]]) -> list[Any]:
    """Whole results from those of every rank."""
    whole = []
    for name, shares in zip(RESULTS, zip(*parts, strict=True), strict=False):
        if shares[0] is None:
            whole.append(None)
        elif name in OVER_TOKENS:
            assert len({share.tobytes() for share in shares}) == 1, f"ranks have different {name}"
            whole.append(shares[0])
        else:
            whole.append(np.concatenate(shares))
    return whole


def draw_case(
    rng: np.random.Generator,
    dtype: Any,
    ranks: int,
    *,
    n_tokens: int = 29,
    width: int = 12,
    inner: int = 10,
    n_experts: int = 8,
    top_k: int = 2,
    activation: str = "swiglu",
    share: str = "even",
    given: bool = False,
    empty: float = 0.0,
    skew: float = 0.0,
    shared: int | None = None,
    shared_router: bool = False,
    **keywords: Any,
) -> Case:
    """A layer of normal numbers.

    `given` says that the routing is, with `empty` slots and low experts by `skew`; `shared` is how many hidden features
    shared experts have, where there are any.
    """

    def normal(*shape: int) -> Array:
        return (rng.standard_normal(shape) * max(1, shape[-2]) ** -0.5).astype(dtype)

    case = Case(
        rng.standard_normal((n_tokens, width)).astype(dtype), rng.standard_normal((n_tokens, width)).astype(dtype),
        normal(width, n_experts), normal(n_experts, width, inner),
        normal(n_experts, width, inner) if activation == "swiglu" else None, normal(n_experts, inner, width),
        activation, top_k, cut_tokens(rng, n_tokens, ranks, share), keywords,
    )  # fmt: skip
    if given:
        case.experts = draw_experts(rng, n_tokens, n_experts, top_k, empty=empty, skew=skew)
        case.weights = rng.standard_normal((n_tokens, top_k)).astype(sums(dtype))
    if shared is not None:
        case.shared = SharedExperts(
            normal(width, shared), normal(width, shared) if activation == "swiglu" else None, normal(shared, width),
            normal(width, 1) if shared_router else None,
        )  # fmt: skip
    return case


def spread(array: Array, kind: str) -> Array:
    """An array of the same values that lies in memory another way."""
    if array is None or kind == "plain":
        return array
    if kind == "transposed":
        return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)
    if kind == "backward":  # every second row, from the last
        wide = np.full((*array.shape[:-2], 2 * array.shape[-2], array.shape[-1]), np.nan, array.dtype)
        wide[..., ::-2, :] = array
        return wide[..., ::-2, :]
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)  # "gaps"
    wide[..., 1::2] = array
    return wide[..., 1::2]


LYING = ("plain", "transposed", "backward", "gaps")


def assert_same_error(comm: MPI.Intracomm, call: Callable[[], object], kind: type[ValueError], words: str) -> None:
    """Call on every rank: all raise the same exception, within 5 seconds."""
    comm.Barrier()
    begin = time.monotonic()
    error: BaseException | None = None
    try:
        call()
    except Exception as raised:
        error = raised
    seconds = time.monotonic() - begin
    seen = comm.allgather((type(error).__name__, str(error)))
    assert len(set(seen)) == 1, f"ranks raise differently: {seen}"
    assert type(error) is kind, f"{seen[0]}, expected {kind.__name__}"
    assert re.search(words, str(error)), f"{str(error)!r} lacks {words!r}"
    assert seconds < 5, f"{seen[0]} after {seconds:.1f} s"
