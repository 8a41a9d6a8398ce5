"""A whole mixture-of-experts layer: route, dispatch, the experts' products, combine, and back.

    logits = x router                                     own tokens
    g, u   = x_e w_gate[e], x_e w_up[e]                   rows of this rank's experts, read where they lie
    f      = (silu(g) * u) w_down[e]
    y_t    = sum over the token's experts of weight * f   in the tree of the experts, then shared experts

Between nodes products hide messages: shared experts are computed while rows travel, then rows of those that have come
while others still do; sums go back as soon as they are complete, in the backward while weights' gradients are computed.

Kept for the backward are x, the routing, g and u; nothing of the experts' rows. The gradient of a weight,
<dy_t, f_e(x_t)>, is taken as <dy_t w_down^T, silu(g) u>, two arrays that the backward has anyway (SonicMoE, 2025), so
that the experts' outputs need not be stored, and one number per pair travels home.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from fivedp.comm.mesh import Mesh
from fivedp.comm.messages import TAGS, Mailbox, mailbox
from fivedp.errors import LayoutError, ShapeError
from fivedp.kernels import experts as kernel
from fivedp.kernels._select import library_of, sum_type
from fivedp.kernels.gemm import gemm
from fivedp.layout.hot_experts import ExpertSizes
from fivedp.layout.shares import share
from fivedp.ops.arguments import checked, same_kind
from fivedp.ops.arriving_rows import run_as_rows_come
from fivedp.ops.batch_ranks import BatchRanks
from fivedp.ops.dispatch_plan import DispatchPlan, plan_dispatch, wire_types
from fivedp.ops.expert_copies import CopiedWeights, KeptRows
from fivedp.ops.expert_dispatch import (
    TYPES,
    WIRES,
    Dispatched,
    Returns,
    ScalarsHome,
    agree_along,
    check_routing,
    check_rows,
    check_tensor_axis,
    group_of,
    in_type,
)
from fivedp.ops.routing import Routing, route, route_backward, router_logits
from fivedp.ops.shared_experts import (
    SharedBackward,
    SharedExperts,
    SharedForward,
    SharedState,
    check_shared,
    route_shared,
)
from fivedp.ops.token_sums import over_tokens, sum_along
from fivedp.ops.work_sharing import Item, Job, SharedWork, Work

Array = Any
GATED = ("swiglu",)


@dataclass(frozen=True)
class ExpertLayerState:
    """What the backward of a layer needs of its forward; `routing` also has the losses.

    Attributes
    ----------
    routing : Routing
    plan : DispatchPlan
    x, router, w_up, w_gate, w_down : array
        As given, not copied.
    gate, up : (R, F) or None
        The products before the activation; `gate` only where the activation has one.
    activation : str
    comm : Mesh or MPI.Intracomm
    tensor : str or None
    shared : SharedState or None
    """

    routing: Routing
    plan: DispatchPlan
    x: Array
    router: Array
    w_up: Array
    w_gate: Array | None
    w_down: Array
    gate: Array | None
    up: Array
    activation: str
    comm: Mesh | MPI.Intracomm
    tensor: str | None = None
    shared: SharedState | None = None


@dataclass(frozen=True)
class ExpertGradients:
    """The gradients of a layer, of the shapes and types of what they belong to.

    That of the router is summed over the ranks that share the experts, as each of them has the same router. It is 0
    where the routing was given and knows no logits; whoever made it needs `weights`, that of its weights (T, k). Those
    of shared experts, in `shared`, are summed over the same ranks.
    """

    x: Array
    router: Array
    w_up: Array
    w_gate: Array | None
    w_down: Array
    weights: Array
    shared: SharedExperts | None = None


def expert_layer(
    x: Array,
    router: Array,
    w_up: Array,
    w_gate: Array | None,
    w_down: Array,
    comm: Mesh | MPI.Intracomm,
    *,
    top_k: int = 2,
    activation: str = "swiglu",
    routing: Routing | None = None,
    wire: str = "same",
    keep: bool = False,
    tensor: str | None = None,
    shared: SharedExperts | None = None,
    **route_keywords: Any,
) -> Any:
    """A mixture of experts, each a two-layer perceptron.

    Parameters
    ----------
    x : (T, H)
        This rank's tokens; float32, float64 or bfloat16 (summed in float32). T may differ between ranks and be 0. All
        arrays are NumPy's, or all CuPy's.
    router : (H, E)
        The same on every rank, in the type of x or of sums.
    w_up : (E_local, H, F)
    w_gate : (E_local, H, F) or None
        None for activations without a gate.
    w_down : (E_local, F, H)
        The weights of this rank's experts: the block rule's share of E, which may be none. Any strides.
    comm : Mesh or MPI.Intracomm
        Its ranks own the experts; of a mesh, those of axis ep. Capacity and losses are those of the tokens of all
        ranks, of a mesh those along dp, sp and ep.
    top_k : int
        Experts of a token.
    activation : {"swiglu", "gelu", "gelu_tanh", "relu", "silu"}
        "swiglu" is silu(x w_gate) * (x w_up); the others are of x w_up alone.
    routing : Routing, optional
        Choices made elsewhere (recorded, balanced by force). One that `fivedp.route` made must be of x router, whose
        gradient is then taken; else `router` only says how many experts there are.
    wire : {"same", "bfloat16"}
        As in `expert_dispatch`.
    keep : bool
        Whether to return what the backward needs.
    tensor : str, optional
        An axis of the mesh over which every expert is cut as well: w_up and w_gate have some of its hidden features as
        columns, w_down as rows. Ranks along it give the same tokens and get the same y and gradients of x and of the
        router. A sum over F is then one over these ranks: the bits depend on how many there are, not on those of ep.
    shared : SharedExperts, optional
        Experts that every token passes as well, with the same activation: the same weights on every rank, of `tensor`
        their share of hidden features. What they make of a token is added to the sum of its experts.
    **route_keywords
        Of `fivedp.route`: score, normalize, capacity_factor, bias, groups, ...

    Returns
    -------
    y : (T, H)
        In the type of x. The same bits on any number of ranks that hold the same tokens in the same order.
    state : ExpertLayerState
        Only with `keep`. Its `routing` has the losses, over the tokens of all ranks.

    Raises
    ------
    LayoutError, ShapeError, DTypeError
        On every rank, before any payload moves; also for a logit that is not finite.
    PeerError
        Another rank raised, exited or stayed silent in the middle of the call.

    Notes
    -----
    Collective over all ranks of `comm`. While rows of tokens travel as messages, shared experts are computed, and then
    the rows that have come, where they are enough (`fivedp.ops.arriving_rows`). Ranks of a node that have few rows take
    over products of one that has many (`fivedp.ops.work_sharing`). Over several nodes hot experts are copied where that
    pays (`fivedp.layout.hot_experts`), unless they are cut along `tensor`. Of CuPy arrays each rank computes its own
    rows itself, and the host waits for the device once, for the routing's choice (again for that of shared experts with
    a router).
    """
    name, group, shared_routing, chosen = "expert_layer", group_of(comm), None, None

    def check() -> int:
        nonlocal shared_routing, chosen
        check_tensor_axis(name, comm, tensor)
        n_experts = _check(group.size, group.index, x, router, w_up, w_gate, w_down, activation, wire)
        if routing is not None:
            chosen = check_routing(name, routing, x)
            if routing.n_experts != n_experts:
                raise ShapeError(f"{name}: `routing` has {routing.n_experts} experts and `router` {n_experts}")
            if route_keywords:
                raise LayoutError(f"{name}: routing is given, and so is {next(iter(route_keywords))}; expected either")
        if shared is not None:
            check_shared(name, shared, x, w_gate is not None, activation)
            shared_routing = route_shared(x, shared)
        return n_experts

    found, error = checked(check)
    n_experts = found or 0
    if tensor:  # ranks along it make their routings apart from each other, so they must hear of an error before
        text = f"top_k={top_k}, {activation}, wire={wire}, tensor={tensor}, shared={shared is not None}"
        agree_along(name, comm, tensor, text, x, error)
    alone = not (keep or route_keywords.get("capacity_factor") or route_keywords.get("choice", "token") != "token")
    if error is not None and routing is None and not alone:
        # The others are about to make a routing, perhaps with more ranks than those of this group.
        BatchRanks(name, comm, {"x": x}, "", error)
    if error is None and routing is None:
        logits = router_logits(x, router)
        try:
            # Losses and capacities are those of all ranks' tokens; where neither is asked for, no rank needs another.
            routing = route(logits, top_k, comm=None if alone else comm, **route_keywords)
            chosen = routing.on_host(just_made=True)
        except ValueError as refused:
            if not alone:
                raise
            error = refused
    columns = 0 if error is not None else w_up.shape[2]
    size = "" if tensor else f" of {columns}"
    text = f"{n_experts} experts{size}, top_k={top_k}, {activation}, wire={wire}, tensor={tensor}, keep={keep}"
    if error is None and shared is not None:
        size = "" if tensor else f" {shared.w_up.shape[1]}"
        text += f", shared{size}{'' if shared.router is None else ' with a router'}"
    what, n_tokens = agree_along(name, comm, tensor, text, x, error)
    assert routing is not None
    assert chosen is not None
    y = library_of(x).empty(x.shape, sum_type(x.dtype) if tensor or shared else x.dtype)
    beside: SharedForward | None = None
    with mailbox(group, what, library_of(x)) as mail:
        may_copy = None if tensor or library_of(x) is not np else _sizes(x, w_up, w_gate, wire, keep)
        plan = plan_dispatch(mail.host, chosen, x, n_tokens, wire, sum_type(x.dtype), may_copy)
        weights = {"w_up": w_up, "w_down": w_down} | ({} if w_gate is None else {"w_gate": w_gate})
        work, progress = SharedWork(mail, plan, columns, n_phases=2), mail.progress()
        tokens = work.visible(x)
        travel, returns = Dispatched(mail, plan, tokens, "C"), Returns(mail, plan, weighted=True)
        copied = None if plan.copies is None else CopiedWeights(mail, plan, travel, weights)
        if shared is not None:
            beside = SharedForward(x, shared, shared_routing, activation, progress)
        items = {name: Item.of("expert", weight) for name, weight in weights.items()}
        if keep:
            items |= {name: Item("row", (columns,), x.dtype, kept=True) for name in _products(activation)}
        items["hidden"] = Item("row", (columns,), x.dtype)
        items["out"] = Item("row", (plan.width,), plan.sums)
        work.begin({"x": tokens}, items)

        def hidden(job: Job, tiles: Array | None) -> int:
            a = job.arrays
            return kernel.expert_hidden(
                job.rows["x"], a.get("w_gate"), a["w_up"], job.offsets, a["hidden"],
                gate=a.get("gate"), up=a.get("up"), activation=activation, progress=progress, tiles=tiles,
            )  # fmt: skip

        def down(job: Job, tiles: Array | None) -> int:
            a = job.arrays
            return kernel.grouped_matmul(
                a["hidden"], a["w_down"], job.offsets, a["out"], progress=progress, tiles=tiles
            )

        out = work.result("out")
        run_as_rows_come(work, "x", travel, [hidden, down], lambda sources: returns.send(out, sources))
        if copied is not None:
            for job in work.of_copies({"x": lambda part: in_type(travel.of_copies(part), plan)}, copied.arrays()):
                hidden(job, None)
                down(job, None)
            copied.release()
        travel.release()
        returns.add(out, y)
        kept = {name: work.result(name) for name in _products(activation)} if keep else {}
        work.end()
    if beside is not None:
        y += beside.out
    if tensor:
        y = sum_along(y, tensor, comm)
    y = y.astype(x.dtype, copy=False)
    if not keep:
        return y
    return y, ExpertLayerState(
        routing, plan, x, router, w_up, w_gate, w_down, kept.get("gate"), kept["up"], activation, comm, tensor,
        None if beside is None else beside.state,
    )  # fmt: skip


def _sizes(x: Array, w_up: Array, w_gate: Array | None, wire: str, keep: bool) -> ExpertSizes:
    """What the price of copies needs to know of a layer."""
    there, back = wire_types(x.dtype, wire)
    matrices = 2 if w_gate is None else 3
    return ExpertSizes(
        x.shape[1], w_up.shape[2], matrices, x.dtype.itemsize, there.itemsize, back.itemsize, backward=keep
    )


def _products(activation: str) -> tuple[str, ...]:
    """The products before the activation."""
    return ("gate", "up") if activation in GATED else ("up",)


def expert_layer_backward(
    dy: Array, state: ExpertLayerState, *, d_aux_loss: float = 0.0, d_z_loss: float = 0.0
) -> ExpertGradients:
    """The gradients of `expert_layer`.

    Parameters
    ----------
    dy : (T, H)
        The gradient with respect to y, in the type of x.
    state : ExpertLayerState
        What the forward kept.
    d_aux_loss, d_z_loss : float
        The gradients with respect to the routing's losses: the coefficients with which they enter the whole loss.

    Returns
    -------
    ExpertGradients
        The same bits on any number of ranks that hold the same tokens in the same order: weights' gradients are summed
        by the rows' places in the whole batch, the router's likewise where tokens are cut by the block rule.

    Notes
    -----
    Collective over the ranks of the forward. The tokens travel once more: owners keep no rows.
    """
    name, plan, x = "expert_layer_backward", state.plan, state.x

    def check() -> None:
        same_kind(name, {"x": x, "dy": dy})
        check_rows(name, "dy", dy, x.shape, (x.dtype,))

    _, error = checked(check)
    text = f"{plan.cut.n_experts} experts, tensor={state.tensor}"
    what, _ = agree_along(name, state.comm, state.tensor, text, dy, error)
    dx, shared = plan.xp.empty(x.shape, plan.sums), None
    with mailbox(plan.group, what, plan.xp) as mail:
        gradients, d_weights, beside = _through_experts(mail, dy, state, dx)
    if beside is not None:
        dx += beside.d_x
    if state.tensor:
        dx, d_weights = (sum_along(part, state.tensor, state.comm) for part in (dx, d_weights))
        if beside is not None and beside.d_routing is not None:
            beside.d_routing = sum_along(beside.d_routing, state.tensor, state.comm)
    ranks = state.comm, plan.group, plan.n_tokens
    if state.routing.state is not None:
        d_logits = route_backward(d_weights, state.routing, d_aux_loss=d_aux_loss, d_z_loss=d_z_loss)
        router = state.router.astype(plan.sums, copy=False)
        gemm(d_logits, router.T, dx, beta=1.0)
        d_router = over_tokens(x.astype(plan.sums, copy=False), d_logits, *ranks)
    else:
        d_router = plan.xp.zeros(state.router.shape, plan.sums)
    d_router = d_router.astype(state.router.dtype, copy=False)
    if beside is not None:
        shared = beside.weights(x, dx, *ranks)
    return ExpertGradients(dx.astype(x.dtype, copy=False), d_router, *gradients, d_weights, shared)


def _through_experts(
    mail: Mailbox, dy: Array, state: ExpertLayerState, dx: Array
) -> tuple[tuple[Array, Array | None, Array], Array, SharedBackward | None]:
    """dx of the routed experts; gradients of w_up, w_gate, w_down; of the routing's weights (T, k); shared experts."""
    plan, dtype, columns, activation = state.plan, state.x.dtype, state.up.shape[1], state.activation
    gated = state.w_gate is not None
    work = SharedWork(mail, plan, columns, n_phases=6 if gated else 5)
    x, dy, progress = work.visible(state.x), work.visible(dy), mail.progress()
    weights = {"w_up": state.w_up, "w_down": state.w_down} | ({"w_gate": state.w_gate} if gated else {})
    # Rows of dy first: those of x are not read before the gradients of the weights.
    dy_travel, x_travel = Dispatched(mail, plan, dy, "rows"), Dispatched(mail, plan, x, "C")
    copied = None if plan.copies is None else CopiedWeights(mail, plan, dy_travel, weights)
    returns, scalars = Returns(mail, plan, weighted=False), ScalarsHome(mail, plan, plan.sums)
    inner = ("d_up", "d_gate") if gated else ("d_up",)
    elsewhere = None
    if plan.copies is not None:
        rows_sent = {"x": (plan.width, plan.wire_dtype), "dy": (plan.width, plan.wire_dtype)}
        elsewhere = KeptRows(mail, plan, rows_sent | dict.fromkeys(("hidden", *inner), (columns, dtype)))
    beside = None if state.shared is None else SharedBackward(dy, state.shared, activation, progress)
    items = {name: Item.of("expert", weight) for name, weight in weights.items()}
    items |= {"up": Item.of("row", state.up), "weights": Item.of("row", plan.tables.weights)}
    items |= {"d_hidden": Item("row", (columns,), plan.sums), "d_weights": Item("row", (), plan.sums)}
    items |= {name: Item("row", (columns,), dtype) for name in ("d_up", "hidden")}
    items["rows"] = Item("row", (plan.width,), plan.sums)
    items["d_w_up"] = Item("expert", state.w_up.shape[1:], dtype, kept=True)
    items["d_w_down"] = Item("expert", state.w_down.shape[1:], dtype, kept=True)
    if gated:
        items["gate"] = Item.of("row", state.gate)
        items["d_gate"] = Item("row", (columns,), dtype)
        items["d_w_gate"] = Item("expert", state.w_up.shape[1:], dtype, kept=True)
    work.begin({"x": x, "dy": dy}, items)
    rows, d_pairs = work.result("rows"), work.result("d_weights")

    def d_hidden(job: Job, tiles: Array | None) -> int:
        a = job.arrays
        w_down_t = a["w_down"].transpose(0, 2, 1)
        return kernel.grouped_matmul(
            job.rows["dy"], w_down_t, job.offsets, a["d_hidden"], progress=progress, tiles=tiles
        )

    def activation_gradient(job: Job, tiles: Array | None) -> int:
        a = job.arrays
        return kernel.expert_hidden_backward(
            a["d_hidden"], a.get("gate"), a["up"], a["weights"], d_gate=a.get("d_gate"), d_up=a["d_up"],
            hidden_weighted=a["hidden"], d_weights=a["d_weights"], activation=activation, tiles=tiles,
        )  # fmt: skip

    def d_rows(job: Job, tiles: Array | None) -> int:
        # d_gate w_gate^T + d_up w_up^T as one product over 2 F.
        a = job.arrays
        left = [a[name] for name in (("d_gate", "d_up") if gated else ("d_up",))]
        right = [a[name].transpose(0, 2, 1) for name in (("w_gate", "w_up") if gated else ("w_up",))]
        return kernel.grouped_matmul(left, right, job.offsets, a["rows"], progress=progress, tiles=tiles)

    def outer(name: str, left: str, right: str) -> Work:
        def work(job: Job, tiles: Array | None) -> int:
            a = job.arrays | job.rows  # what others have made stands among the rows
            return kernel.grouped_outer(a[left], a[right], job.offsets, a[name], progress=progress, tiles=tiles)

        return work

    def go_home(sources: list[int]) -> None:
        scalars.send(d_pairs, sources)
        returns.send(rows, sources)

    phases = [d_hidden, activation_gradient, d_rows]
    run_as_rows_come(work, "dy", dy_travel, phases, go_home)
    if copied is not None and elsewhere is not None:
        for job in work.of_copies({"dy": lambda part: in_type(dy_travel.of_copies(part), plan)}, copied.arrays()):
            for phase in phases:
                phase(job, None)
        copied.release()
        elsewhere.send({name: work.rows_of_copies(name) for name in ("hidden", *inner)}, x_travel, dy_travel)
    # An expert's weights need all of its rows, in their order. Meanwhile sums and numbers travel home.
    if elsewhere is None:
        work.own.rows |= {"x": in_type(x_travel.rows(), plan), "dy": in_type(dy_travel.rows(), plan)}
    else:
        elsewhere.complete(work.own, {"x": x_travel, "dy": dy_travel})
    work.run(3, outer("d_w_down", "hidden", "dy"))
    work.run(4, outer("d_w_up", "x", "d_up"))
    if gated:
        work.run(5, outer("d_w_gate", "x", "d_gate"))
    if elsewhere is not None:
        elsewhere.release()
    for travel in (x_travel, dy_travel):
        travel.release()
    d_weights = scalars.table(d_pairs)
    returns.add(rows, dx)
    gradients = work.result("d_w_up"), work.result("d_w_gate") if gated else None, work.result("d_w_down")
    if elsewhere is not None:
        mail.flush(0, (TAGS["A"],))  # rows of copies are sent from the memory that goes back here
    work.end()
    return gradients, d_weights, beside


def _check(
    size: int,
    index: int,
    x: Any,
    router: Any,
    w_up: Any,
    w_gate: Any,
    w_down: Any,
    activation: str,
    wire: str,
) -> int:
    """How many experts there are, where this rank's arguments fit together."""
    name = "expert_layer"
    same_kind(name, {"x": x, "router": router, "w_up": w_up, "w_gate": w_gate, "w_down": w_down})
    check_rows(name, "x", x, (None, None), TYPES)
    width = x.shape[1]
    check_rows(name, "router", router, (width, None), (x.dtype, sum_type(x.dtype)))
    n_experts = router.shape[1]
    begin, end = share(n_experts, size, index)
    check_rows(name, "w_up", w_up, (None, width, None), (x.dtype,))
    if len(w_up) != end - begin:
        raise ShapeError(
            f"{name}: `w_up` is of {len(w_up)} experts; the block rule gives this rank {end - begin} of {n_experts}"
        )
    if activation not in kernel.ACTIVATIONS:
        raise LayoutError(f"{name}: activation is {activation!r}; expected one of {', '.join(kernel.ACTIVATIONS)}")
    if (w_gate is not None) != (activation in GATED):
        given = "is None" if w_gate is None else "is given"
        raise LayoutError(f"{name}: activation is {activation!r} and `w_gate` {given}; only swiglu has a gate")
    if w_gate is not None:
        check_rows(name, "w_gate", w_gate, w_up.shape, (x.dtype,))
    check_rows(name, "w_down", w_down, (len(w_up), w_up.shape[2], width), (x.dtype,))
    if wire not in WIRES:
        raise LayoutError(f'{name}: wire is {wire!r}; expected "same" or "bfloat16"')
    return int(n_experts)
