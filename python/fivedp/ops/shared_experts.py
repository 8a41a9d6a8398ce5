"""Experts that every token passes, beside those that it is routed to (DeepSeekMoE, 2024, arXiv:2401.06066).

    g, u = x w_gate, x w_up                           own tokens
    z    = (silu(g) * u) w_down                       several are one, side by side in its hidden features
    y   += z                                          DeepSeek-V3
    y   += sigmoid(x router) * z                      Qwen2-MoE

Every rank has these weights whole and uses them for its own tokens, so they need no message: a layer computes them
while the rows of the routed experts travel. What they add to y is added last, in the type of sums. Only their gradients
are sums over the tokens of all ranks, which are taken like that of the router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from fivedp.comm.grid import Group
from fivedp.comm.mesh import Mesh
from fivedp.errors import DTypeError, LayoutError
from fivedp.kernels import experts as kernel
from fivedp.kernels._select import library_of, sum_type
from fivedp.kernels.gemm import gemm
from fivedp.ops.arguments import same_kind
from fivedp.ops.expert_dispatch import check_rows
from fivedp.ops.routing import Routing, route, route_backward, router_logits
from fivedp.ops.token_sums import over_tokens

Array = Any
Progress = Callable[[], object]


@dataclass(frozen=True)
class SharedExperts:
    """The weights of the experts that every token passes, the same on every rank; or their gradients.

    Attributes
    ----------
    w_up : (H, F)
        In the type of the tokens; F is free, and need not be that of the routed experts. Several shared experts stand
        side by side in it.
    w_gate : (H, F) or None
        None for activations without a gate.
    w_down : (F, H)
        Any strides.
    router : (H, 1), optional
        Where given, what they make of a token is multiplied by sigmoid(x router); in the type of x or of sums.
    """

    w_up: Array
    w_gate: Array | None
    w_down: Array
    router: Array | None = None


@dataclass(frozen=True)
class SharedState:
    """What the backward needs: the weights as given, their share of y, and the products before the activation."""

    weights: SharedExperts
    routing: Routing | None
    gate: Array | None
    up: Array


def check_shared(operation: str, shared: Any, x: Array, gated: bool, activation: str) -> None:
    """Raise where shared experts do not fit the tokens `x`."""
    if not isinstance(shared, SharedExperts):
        raise DTypeError(f"{operation}: `shared` is a {type(shared).__name__}; expected fivedp.SharedExperts")
    width, dtype = x.shape[1], x.dtype
    same_kind(operation, {"x": x, **{f"shared.{name}": array for name, array in vars(shared).items()}})
    check_rows(operation, "shared.w_up", shared.w_up, (width, None), (dtype,))
    if (shared.w_gate is not None) != gated:
        given = "is None" if shared.w_gate is None else "is given"
        raise LayoutError(
            f"{operation}: activation is {activation!r} and `shared.w_gate` {given}; only swiglu has a gate"
        )
    if shared.w_gate is not None:
        check_rows(operation, "shared.w_gate", shared.w_gate, shared.w_up.shape, (dtype,))
    check_rows(operation, "shared.w_down", shared.w_down, (shared.w_up.shape[1], width), (dtype,))
    if shared.router is not None:
        check_rows(operation, "shared.router", shared.router, (width, 1), (dtype, sum_type(dtype)))


def route_shared(x: Array, shared: SharedExperts) -> Routing | None:
    """The share of y that they have: with a router, all tokens go to one expert, whose weight is a sigmoid.

    Raises
    ------
    LayoutError
        Where a logit is not finite.
    """
    if shared.router is None:
        return None
    return route(router_logits(x, shared.router), 1, score="sigmoid", normalize=False)


class SharedForward:
    """What shared experts add to y, and what their backward needs.

    Attributes
    ----------
    out : (T, H)
        In the type of sums.
    state : SharedState
    """

    def __init__(
        self, x: Array, shared: SharedExperts, routing: Routing | None, activation: str, progress: Progress
    ) -> None:
        n_tokens, columns, xp = len(x), shared.w_up.shape[1], library_of(x)
        borders = xp.asarray(np.array([0, n_tokens], np.int64))
        hidden, up = (xp.empty((n_tokens, columns), x.dtype) for _ in range(2))
        gate = None if shared.w_gate is None else xp.empty(up.shape, x.dtype)
        kernel.expert_hidden(
            x, _as_group(shared.w_gate), _as_group(shared.w_up), borders, hidden, gate=gate, up=up,
            activation=activation, progress=progress,
        )  # fmt: skip
        self.out = xp.empty(x.shape, sum_type(x.dtype))
        kernel.grouped_matmul(hidden, _as_group(shared.w_down), borders, self.out, progress=progress)
        if routing is not None:
            self.out *= routing.weights
        self.state = SharedState(shared, routing, gate, up)


class SharedBackward:
    """The gradients of shared experts, as far as they are of this rank's tokens; `weights` sums them up.

    Attributes
    ----------
    d_x : (T, H)
        In the type of sums, without the router's part.
    d_routing : (T, 1) or None
        The gradient of the routing's weights. Where hidden features are cut over ranks it is one of their sum's terms,
        like d_x.
    """

    def __init__(self, dy: Array, state: SharedState, activation: str, progress: Progress) -> None:
        w, (n_tokens, columns) = state.weights, state.up.shape
        self.state, self.dy, dtype, sums, xp = state, dy, state.up.dtype, sum_type(state.up.dtype), library_of(dy)
        borders = xp.asarray(np.array([0, n_tokens], np.int64))
        d_hidden = xp.empty((n_tokens, columns), sums)
        kernel.grouped_matmul(dy, _as_group(w.w_down.T), borders, d_hidden, progress=progress)
        # Gradients of both products side by side: those of their weights are then one product.
        self._d_products = xp.empty((n_tokens, columns if w.w_gate is None else 2 * columns), dtype)
        d_up, d_gate = self._d_products[:, :columns], self._d_products[:, columns:]
        self._hidden = xp.empty((n_tokens, columns), dtype)
        share_of_y = state.routing.weights[:, 0] if state.routing else None
        self.d_routing = None if share_of_y is None else xp.empty((n_tokens, 1), sums)
        kernel.expert_hidden_backward(
            d_hidden, state.gate, state.up, share_of_y, d_gate=None if w.w_gate is None else d_gate, d_up=d_up,
            hidden_weighted=self._hidden, d_weights=None if self.d_routing is None else self.d_routing[:, 0],
            activation=activation,
        )  # fmt: skip
        self.d_x = xp.empty(dy.shape, sums)
        inner, back = [d_up], [_as_group(w.w_up.T)]
        if w.w_gate is not None:
            inner, back = [d_gate, d_up], [_as_group(w.w_gate.T), *back]
        kernel.grouped_matmul(inner, back, borders, self.d_x, progress=progress)

    def weights(
        self, x: Array, dx: Array, comm: Mesh | MPI.Intracomm, group: Group, n_tokens: Sequence[int]
    ) -> SharedExperts:
        """The gradients of the weights, over the tokens of all ranks; the router's part of dx is added to it.

        Collective over the group.
        """
        w, columns = self.state.weights, self.state.up.shape[1]
        d_products = over_tokens(x, self._d_products, comm, group, n_tokens)
        d_up, d_gate = d_products[:, :columns], d_products[:, columns:]
        d_down = over_tokens(self._hidden, self.dy, comm, group, n_tokens)
        d_router = None
        if w.router is not None and self.state.routing is not None:
            d_logits = route_backward(self.d_routing, self.state.routing)
            gemm(d_logits, w.router.T.astype(dx.dtype, copy=False), dx, beta=1.0)
            d_router = over_tokens(x.astype(dx.dtype, copy=False), d_logits, comm, group, n_tokens)
            d_router = d_router.astype(w.router.dtype, copy=False)
        return SharedExperts(d_up, None if w.w_gate is None else d_gate, d_down, d_router)


def _as_group(weight: Array | None) -> Array | None:
    """A matrix as those of one expert."""
    return None if weight is None else weight[None]
