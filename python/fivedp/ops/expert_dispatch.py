"""Tokens to their experts and back: the messages of a mixture of experts.

    dispatch:  pairs (token, expert, weight) to the owner of the expert | rows: a token once per owner
    combine:   an owner adds up what it has of a token, one row per subtree of experts | the token's rank adds the rest

Sums follow the tree of `fivedp.layout.experts`, partial sums travel in the type of sums: the same bits on any number of
ranks, and where their number is a power of two that divides the experts no more rows than a token has owners (for the
deduplicated dispatch see DeepEP, 2025; the fixed tree is what makes it exact). Within a node rows are not copied: they
are read where they lie, in their owner's shared window. The backward of each half has the messages of the other, and
the plan of a dispatch serves them all.

Rows of CuPy arrays stay on the device: kernels pack them, they travel as messages also within a node, and kernels add
up the sums. Choices, counts and the plan are the host's, which reads experts and weights once per dispatch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from mpi4py import MPI

from fivedp.comm.grid import Group, grid_of, resolve_axes
from fivedp.comm.mesh import TOKEN_AXES, Mesh
from fivedp.comm.messages import TAGS, Mailbox, Receipt, Workspace, mailbox
from fivedp.errors import DTypeError, LayoutError, ShapeError
from fivedp.kernels import experts as kernel
from fivedp.kernels._select import library_of, sum_type
from fivedp.kernels.experts import Rows
from fivedp.ops.arguments import ARRAY_NAMES, Arguments, agree_on, array_kind, checked, same_kind
from fivedp.ops.dispatch_plan import DispatchPlan, plan_dispatch
from fivedp.ops.matmul import share_cores
from fivedp.ops.node_relay import RelayedRows, RelayedSums, add_rows
from fivedp.ops.plan_tables import send_rows
from fivedp.ops.routing import Routing

Array = Any
_BF16 = np.dtype(ml_dtypes.bfloat16)
TYPES = (np.dtype(np.float32), np.dtype(np.float64), _BF16)
WIRES = ("same", "bfloat16")


def group_of(comm: Mesh | MPI.Intracomm) -> Group:
    """The ranks over which experts are cut: axis ep of a mesh, all ranks of a communicator."""
    grid = grid_of(comm)
    return grid.group(("ep",)) if isinstance(comm, Mesh) else grid.everyone()


@dataclass(frozen=True)
class ExpertBatch:
    """The rows of this rank's experts.

    Attributes
    ----------
    tokens : (R, H)
        Ordered by expert of this rank, then by source rank, then by the token's row there.
    counts : (experts of this rank,) int64
        Rows of each; a NumPy array, wherever the tokens are.
    plan : DispatchPlan
    """

    tokens: Array
    counts: Array
    plan: DispatchPlan


# -- what the calls share ----------------------------------------------------------------------------------------------


def agree(
    operation: str,
    group: Group,
    text: str,
    arrays: Sequence[Array | None],
    error: ValueError | None,
) -> tuple[str, list[Arguments]]:
    """What this rank called, for messages, and the arguments of every member; or the exception that all raise.

    `arrays` are up to three, as `ARRAY_NAMES` names them; all but their first dimension must be the same everywhere.
    """
    what, everyone = agree_on(operation, group, text, arrays, error)
    first = everyone[0].shapes
    for rank, other in enumerate(everyone):
        for name, shape, expected in zip(ARRAY_NAMES[operation], other.shapes, first, strict=False):
            if shape is not None and expected is not None and shape[1:] != expected[1:]:
                raise ShapeError(
                    f"{operation}: `{name}` has shape {shape} on rank {rank} and {expected} on rank 0; "
                    "only the number of rows may differ"
                )
    share_cores(group.grid)
    return what, everyone


def agree_along(
    operation: str, comm: Mesh | MPI.Intracomm, tensor: str | None, text: str, x: Array, error: ValueError | None
) -> tuple[str, list[int]]:
    """As `agree`, with the ranks along axis `tensor` as well; and the number of tokens of every member of `group_of`.

    Ranks along `tensor` must have the same number of tokens.
    """
    group = group_of(comm)
    grid = group.grid
    together = group
    if tensor is not None and tensor in grid.names:
        together = grid.group(resolve_axes(grid.names, ("ep", tensor)))
    what, everyone = agree(operation, together, text, (x,), error)
    tokens = {member: shapes[0] for member, other in zip(together.members, everyone, strict=True)
              if (shapes := other.shapes[0]) is not None}  # fmt: skip
    if together is not group:
        place = grid.names.index("ep")
        first: dict[int, int] = {}
        for member, count in tokens.items():
            twin = first.setdefault(grid.coords[member][place], member)
            if count != tokens[twin]:
                raise ShapeError(
                    f"{operation}: `{ARRAY_NAMES[operation][0]}` has {count} rows on rank {member} and "
                    f"{tokens[twin]} on rank {twin}; along {tensor} all ranks hold the same tokens"
                )
    return what, [tokens[member] for member in group.members]


def check_tensor_axis(operation: str, comm: Any, tensor: str | None) -> None:
    """Raise where `tensor` is no axis of a mesh that leaves tokens whole."""
    if tensor is None:
        return
    if not isinstance(comm, Mesh):
        raise LayoutError(
            f"{operation}: tensor is {tensor!r} and the mesh a {type(comm).__name__}; expected a fivedp.Mesh"
        )
    right = [axis for axis in comm.shape if axis not in TOKEN_AXES]
    if tensor not in right:
        raise LayoutError(f"{operation}: tensor is {tensor!r}; expected one of the axes {' and '.join(right)}")


def check_rows(operation: str, name: str, array: Any, shape: tuple[int | None, ...], types: Sequence[Any]) -> None:
    """Raise DTypeError or ShapeError where `array` is not of one of the types or not of this shape (None: any size)."""
    array_kind(array, name, operation)
    if array.dtype not in types or not array.dtype.isnative:
        expected = " or ".join(str(np.dtype(t)) for t in types)
        raise DTypeError(f"{operation}: `{name}` has dtype {array.dtype}; expected {expected}")
    if array.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, array.shape, strict=True)):
        text = ", ".join("any" if n is None else str(n) for n in shape)
        raise ShapeError(f"{operation}: `{name}` has shape {array.shape}; expected ({text})")


def check_routing(operation: str, routing: Any, x: Array) -> Routing:
    """The routing of tokens `x`, on the host.

    Raises where it does not belong to them, or its tables are none that experts can be found by. Tables that were
    loaded or generated are NumPy arrays, and will do for CuPy's tokens as well.
    """
    if not isinstance(routing, Routing):
        raise DTypeError(f"{operation}: `routing` is a {type(routing).__name__}; expected what fivedp.route gives")
    experts, weights = routing.experts, routing.weights
    tables = {"routing.experts": experts, "routing.weights": weights}
    if same_kind(operation, tables) == "cupy" or routing.state is not None:
        same_kind(operation, {"x": x, **tables})
    check_rows(operation, "routing.experts", experts, (None, None), (np.dtype(np.int32),))
    if len(experts) != len(x):
        raise ShapeError(f"{operation}: `routing` is of {len(experts)} tokens and `x` has {len(x)}")
    if weights.shape != experts.shape:
        raise ShapeError(f"{operation}: `routing` has weights of shape {weights.shape}; expected {experts.shape}")
    # Tables may be recorded elsewhere: what is wrong with them must be known before the first message.
    on_host = routing.on_host()
    ordered = np.sort(on_host.experts, axis=1)
    for expert in (int(ordered.min(initial=-1)), int(ordered.max(initial=-1))):
        if not -1 <= expert < routing.n_experts:
            raise ShapeError(f"{operation}: `routing` names expert {expert}; expected -1 to {routing.n_experts - 1}")
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise ShapeError(f"{operation}: `routing` names an expert twice for token {int(twice.argmax())}; expected once")
    return on_host


class Dispatched:
    """Rows of everybody's tokens on their way to this rank's experts.

    `rows()` waits for them; `release()` says that they have been read for the last time. Who has work for some of them
    need not wait for all: `near` have theirs where this rank can read them, those of the others come as messages, and
    `arrived()` says whose have.
    """

    def __init__(self, mail: Mailbox, plan: DispatchPlan, x: Array, tag: str) -> None:
        self.mail, self.plan = mail, plan
        self.x = mail.xp.ascontiguousarray(x).astype(plan.wire_dtype, copy=False)
        self.number, incoming = TAGS[tag], plan.incoming
        number = self.number
        self._receipts: dict[int, Receipt] = {}
        for source in plan.direct_peers[::-1]:
            whole = (plan.n_tokens[source], plan.width)
            if incoming.n_rows[source]:
                self._receipts[source] = mail.receive_rows(incoming.n_rows[source], whole, self.x.dtype, source, number)
        self._relayed = None if plan.relay is None else RelayedRows(mail, plan, self.x.dtype, number)
        for peer in plan.peers:
            send_rows(mail, self.x, plan.tables.rows[peer], peer, number)
        self._waiting = dict(self._receipts)
        self.near = [s for s in range(plan.group.size) if s not in self._receipts or self._receipts[s].note is not None]
        """This rank, those that have no rows, and those whose rows are read in place."""

    def arrived(self, least: int = 0) -> list[int]:
        """The sources whose messages have come since the last call, after waiting until they are `least`."""
        far = {source: receipt for source, receipt in self._waiting.items() if source not in self.near}
        found = self.mail.wait_some(far, least=least)
        for source in found:
            del self._waiting[source]
        return found

    def wait(self, sources: Iterable[int]) -> None:
        """Wait until the rows of some sources can be read."""
        self.mail.wait([self._waiting.pop(source) for source in sources if source in self._waiting])

    def rows(self, part: slice = slice(None)) -> Rows:
        """The rows of this rank's experts, in their order, where they lie; of a part of them those that are here."""
        plan, everything = self.plan, part == slice(None)
        if everything:
            self.wait(self._receipts)
        if plan.on_device:
            boxes = [] if self._relayed is None else self._relayed.arrays()[0]
            return Rows(self._arrays()[0] + boxes, *plan.tables.places)
        return Rows(*self.places(slice(0, plan.incoming.n_own) if everything else part))

    def of_copies(self, part: slice = slice(None)) -> Rows:
        """The rows of copies that this rank uses, or of a part of them: its own tokens."""
        token = self.plan.incoming.token[self.plan.incoming.n_own :][part]
        return Rows([self.x], np.zeros(len(token), np.int32), token)

    def _arrays(self) -> tuple[list[Array], Any]:
        """By rank: what is here of its rows, and if that is its whole array."""
        plan = self.plan
        nothing = plan.xp.empty((0, plan.width), self.x.dtype)
        arrays = [nothing] * plan.group.size
        whole = np.zeros(plan.group.size, np.bool_)
        arrays[plan.group.index], whole[plan.group.index] = self.x, True
        for source, receipt in self._receipts.items():
            if source not in self._waiting:
                arrays[source], whole[source] = receipt.array, receipt.whole
        return arrays, whole

    def places(self, part: slice) -> tuple[list[Array], Any, Any]:
        """Where a part of the rows lies: arrays, and of every row which of them and where in it."""
        plan, incoming = self.plan, self.plan.incoming
        arrays, whole = self._arrays()
        senders, token = incoming.source[part], incoming.token[part]
        index = token if whole.all() else np.where(whole[senders], token, incoming.row[part])
        if self._relayed is None or plan.relay is None:
            return arrays, senders, index
        assert part == slice(0, incoming.n_own), "what comes through gateways comes as a whole"
        boxes, whole = self._relayed.arrays()
        return (arrays + boxes, *plan.relay.places(senders, index, whole, part))

    def release(self) -> None:
        """This rank has read the rows for the last time."""
        for receipt in self._receipts.values():
            self.mail.release(receipt)
        if self._relayed is not None:
            self._relayed.release()


class Returns:
    """Sums of the experts' rows on their way back to the tokens: `send` to every other rank, once, then `add`.

    Parameters
    ----------
    weighted : bool
        Whether rows are weighted by the routing as they are added.
    """

    def __init__(self, mail: Mailbox, plan: DispatchPlan, *, weighted: bool) -> None:
        self.mail, self.plan, self.weighted = mail, plan, weighted
        self._receipts = {
            s: mail.receive((plan.outgoing.n_returns[s], plan.width), plan.back_dtype, s, TAGS["replica"])
            for s in plan.peers[::-1]
            if plan.outgoing.n_returns[s]
        }
        self._relayed = None if plan.relay is None else RelayedSums(mail, plan, weighted=weighted)
        self._spaces: list[Workspace] = []

    def send(self, rows: Array, peers: Iterable[int]) -> None:
        """Add up what these ranks' tokens have here, and send it; their rows are complete, others need not be.

        Parameters
        ----------
        rows : (R, H)
            Of this rank's experts, in the order of the plan, contiguous; of the tokens' type or that of sums.
        peers : iterable of int
            Where sums go through gateways, all ranks in one call.
        """
        direct = set(self.plan.direct_peers)
        for peer in peers:
            if peer in direct and (n := self.plan.incoming.n_sums[peer]):
                space = self.mail.workspace((n, self.plan.width), self.plan.back_dtype)
                table = self.plan.tables.sums_for(peer, self.weighted)
                add_rows(table, [rows], self.plan.cut.n_experts, space.array)
                self.mail.send(space.array, peer, TAGS["replica"], 0)
                self._spaces.append(space)
        if self._relayed is not None:
            self._spaces += self._relayed.send(rows)

    def add(self, rows: Array, out: Array) -> None:
        """out (T, H): for each of this rank's tokens, the sum of its experts' rows, here and elsewhere."""
        plan, receipts = self.plan, self._receipts
        if self._relayed is not None:
            self._spaces += self._relayed.add(rows)
        self.mail.wait(list(receipts.values()))
        # Where rows are of 16 bits they are widened, for partial sums must not be rounded before they are added.
        kind = plan.sums if receipts else rows.dtype
        arrays = [rows.astype(kind, copy=False)] + [plan.xp.empty((0, plan.width), kind)] * plan.group.size
        for source, receipt in receipts.items():
            arrays[1 + source] = receipt.array.astype(kind, copy=False)
        add_rows(plan.tables.sums_home(self.weighted), arrays, plan.cut.n_experts, out)
        for receipt in receipts.values():
            self.mail.release(receipt)
        self.mail.flush(0, (TAGS["replica"], TAGS["B"]))
        for space in self._spaces:
            self.mail.give_workspace(space)


def combine(mail: Mailbox, plan: DispatchPlan, rows: Array, out: Array, *, weighted: bool) -> None:
    """out (T, H): for each of this rank's tokens, the sum of its experts' rows (R, H). Collective over the group."""
    returns = Returns(mail, plan, weighted=weighted)
    returns.send(rows, plan.peers)
    returns.add(rows, out)


def in_type(rows: Rows, plan: DispatchPlan) -> Any:
    """The rows as arithmetic takes them: as they lie, or widened where the wire is narrower than the tokens."""
    if plan.wire_dtype == plan.dtype:
        return rows
    tokens = plan.xp.empty(rows.shape, plan.wire_dtype)
    kernel.gather_rows(rows, tokens)
    return tokens.astype(plan.dtype)


class ScalarsHome:
    """A number for each pair, on its way from the owner of its expert to its token; as `Returns` are."""

    def __init__(self, mail: Mailbox, plan: DispatchPlan, dtype: Any) -> None:
        self.mail, self.plan, outgoing = mail, plan, plan.outgoing
        self._receipts = {
            s: mail.receive((len(outgoing.of_owner[s]),), dtype, s, TAGS["A"])
            for s in plan.peers[::-1]
            if len(outgoing.of_owner[s])
        }

    def send(self, values: Array, peers: Iterable[int]) -> None:
        """Send to these ranks what belongs to their pairs; `values` are (R,), complete where those are."""
        positions = self.plan.tables.positions
        for peer in peers:
            if peer != self.plan.group.index and len(positions[peer]):
                self.mail.send(self.plan.xp.take(values, positions[peer], axis=0), peer, TAGS["A"], 0)

    def table(self, values: Array) -> Array:
        """(T, k): the numbers of all of this rank's pairs, 0 where a slot is empty."""
        xp, tables, mine = self.plan.xp, self.plan.tables, self.plan.group.index
        self.mail.wait(list(self._receipts.values()))
        by_pair = xp.empty(len(self.plan.outgoing.pairs), values.dtype)
        by_pair[tables.of_owner[mine]] = xp.take(values, tables.positions[mine], axis=0)
        for source, receipt in self._receipts.items():
            by_pair[tables.of_owner[source]] = receipt.array
            self.mail.release(receipt)
        table = xp.zeros(self.plan.slots, values.dtype)
        token, slot = tables.slots
        table[token, slot] = by_pair
        return table


# -- the public calls --------------------------------------------------------------------------------------------------


def expert_dispatch(x: Array, routing: Routing, comm: Mesh | MPI.Intracomm, *, wire: str = "same") -> ExpertBatch:
    """Bring every token to the ranks that own its experts.

    Parameters
    ----------
    x : (T, H)
        This rank's tokens, NumPy's or CuPy's; float32, float64 or bfloat16. T may differ between ranks and be 0.
    routing : Routing
        Of these tokens, with tables of their kind; one that was loaded or generated also where tokens are CuPy's.
    comm : Mesh or MPI.Intracomm
        Its ranks own the experts, by the block rule; of a mesh, those of axis ep.
    wire : {"same", "bfloat16"}
        "bfloat16" sends rows in half the bytes and rounds them (all of them, so that the tokens of a batch do not
        depend on the mesh); sums on their way back are then rounded as well, without the promise on bits.

    Returns
    -------
    ExpertBatch
        A token is there once for each of its experts.

    Raises
    ------
    LayoutError, ShapeError, DTypeError
        On every rank, before any payload moves.
    PeerError
        Another rank raised, exited or stayed silent in the middle of the call.

    Notes
    -----
    Collective over all ranks of `comm`. A row is sent once to every rank that has any of its token's experts.
    """
    name, group = "expert_dispatch", group_of(comm)

    def check() -> Routing:
        check_rows(name, "x", x, (None, None), TYPES)
        if wire not in WIRES:
            raise LayoutError(f'{name}: wire is {wire!r}; expected "same" or "bfloat16"')
        return check_routing(name, routing, x)

    chosen, error = checked(check)
    text = f"{getattr(routing, 'n_experts', 0)} experts, wire={wire}"
    what, everyone = agree(name, group, text, (x,), error)
    n_tokens = [shapes[0] for other in everyone if (shapes := other.shapes[0]) is not None]
    assert chosen is not None
    with mailbox(group, what, library_of(x)) as mail:
        plan = plan_dispatch(mail.host, chosen, x, n_tokens, wire, sum_type(x.dtype))
        travel = Dispatched(mail, plan, x, "C")
        tokens = plan.xp.empty((plan.n_rows, plan.width), plan.wire_dtype)
        kernel.gather_rows(travel.rows(), tokens)
        travel.release()
    return ExpertBatch(tokens.astype(x.dtype, copy=False), plan.incoming.counts, plan)


def expert_combine(expert_out: Array, batch: ExpertBatch) -> Array:
    """Bring the experts' rows home and add those of each token, weighted.

    Parameters
    ----------
    expert_out : (R, H)
        In the order of `batch.tokens`, in their type or in that of sums.
    batch : ExpertBatch

    Returns
    -------
    y : (T, H)
        In the type of the tokens; 0 for a token without experts.

    Raises
    ------
    ShapeError, DTypeError, PeerError
        On every rank.

    Notes
    -----
    Collective over the ranks of the dispatch. A token comes back once from every rank that has any of its experts where
    that rank's experts are one subtree, as on 2^m ranks that divide the experts; else once for each of its subtrees.
    """
    return _bring_home("expert_combine", "expert_out", expert_out, batch, weighted=True)


def expert_combine_backward(dy: Array, expert_out: Array, batch: ExpertBatch) -> tuple[Array, Array]:
    """The gradients of `expert_combine`.

    Parameters
    ----------
    dy : (T, H)
        The gradient with respect to y, in the type of the tokens.
    expert_out : (R, H)
        What the forward was given.
    batch : ExpertBatch

    Returns
    -------
    d_expert_out : (R, H)
        In the type of the tokens.
    d_weights : (T, k)
        The gradient with respect to the routing's weights, in the type of sums; 0 where a slot is empty.

    Notes
    -----
    Collective over the ranks of the dispatch.
    """
    name, plan = "expert_combine_backward", batch.plan

    def check() -> None:
        same_kind(name, {"batch.tokens": batch.tokens, "dy": dy, "expert_out": expert_out})
        check_rows(name, "dy", dy, (plan.outgoing.n_tokens, plan.width), (plan.dtype,))
        check_rows(name, "expert_out", expert_out, (plan.n_rows, plan.width), (plan.dtype, plan.sums))

    _, error = checked(check)
    what, _ = agree(name, plan.group, f"{plan.cut.n_experts} experts", (dy, expert_out), error)
    with mailbox(plan.group, what, plan.xp) as mail:
        travel = Dispatched(mail, plan, dy, "C")
        rows = in_type(travel.rows(), plan)
        d_expert_out = plan.xp.empty((plan.n_rows, plan.width), plan.dtype)
        kernel.weighted_rows(rows, plan.tables.weights, d_expert_out)
        dots = plan.xp.empty(plan.n_rows, plan.sums)
        kernel.row_dots(rows, plan.xp.ascontiguousarray(expert_out), dots)
        travel.release()
        home = ScalarsHome(mail, plan, dots.dtype)
        home.send(dots, plan.peers)
        d_weights = home.table(dots)
    return d_expert_out, d_weights


def expert_dispatch_backward(d_tokens: Array, batch: ExpertBatch) -> Array:
    """The gradient of `expert_dispatch`: a token's is the sum of its rows'.

    Parameters
    ----------
    d_tokens : (R, H)
        In the order of `batch.tokens`, in their type or in that of sums.
    batch : ExpertBatch

    Returns
    -------
    dx : (T, H)
        In the type of the tokens.

    Notes
    -----
    Collective over the ranks of the dispatch.
    """
    return _bring_home("expert_dispatch_backward", "d_tokens", d_tokens, batch, weighted=False)


def _bring_home(operation: str, name: str, rows: Array, batch: ExpertBatch, *, weighted: bool) -> Array:
    plan = batch.plan

    def check() -> None:
        same_kind(operation, {"batch.tokens": batch.tokens, name: rows})
        check_rows(operation, name, rows, (plan.n_rows, plan.width), (plan.dtype, plan.sums))

    _, error = checked(check)
    what, _ = agree(operation, plan.group, f"{plan.cut.n_experts} experts", (rows,), error)
    out = plan.xp.empty((plan.outgoing.n_tokens, plan.width), plan.dtype)
    with mailbox(plan.group, what, plan.xp) as mail:
        combine(mail, plan, plan.xp.ascontiguousarray(rows), out, weighted=weighted)
    return out
