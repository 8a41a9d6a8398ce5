"""Tokens to their experts and back: the messages of a mixture of experts.

    dispatch:  pairs (token, expert, weight) to the owner of the expert | rows: a token once per owner
    combine:   an owner adds up what it has of a token, one row per subtree of experts | the token's rank adds the rest

Sums follow the tree of `fivedp.layout.experts`, partial sums travel in the type of sums: the same bits on any number of
ranks, and where their number is a power of two that divides the experts no more rows than a token has owners (for the
deduplicated dispatch see DeepEP, 2025; the fixed tree is what makes it exact). Within a node rows are not copied: they
are read where they lie, in their owner's shared window. The backward of each half has the messages of the other, and
the plan of a dispatch serves them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from mpi4py import MPI

from fivedp.comm.agreement import agreement_of
from fivedp.comm.grid import Group, grid_of, resolve_axes
from fivedp.comm.mesh import TOKEN_AXES, Mesh
from fivedp.comm.messages import TAGS, Mailbox, Receipt, Workspace, mailbox
from fivedp.errors import DTypeError, LayoutError, ShapeError
from fivedp.kernels import experts as kernel
from fivedp.kernels._select import sum_type
from fivedp.kernels.experts import Rows
from fivedp.layout.dispatch import Incoming, Outgoing, SumTable, pair_type
from fivedp.layout.experts import ExpertCut, cut_experts
from fivedp.ops.arguments import ARRAY_NAMES, Arguments, pack, unpack, verdict
from fivedp.ops.matmul import share_cores
from fivedp.ops.routing import Routing

Array = Any
_BF16 = np.dtype(ml_dtypes.bfloat16)
TYPES = (np.dtype(np.float32), np.dtype(np.float64), _BF16)
WIRES = ("same", "bfloat16")
# The first message to an owner has room for so many bytes of pairs, behind the number of pairs that this rank has for
# every owner. Where a rank has few tokens (decoding) that is all of them, and no message is spent on counts.
_FIRST_PAIRS_BYTES = 4080


def group_of(comm: Mesh | MPI.Intracomm) -> Group:
    """The ranks over which experts are cut: axis ep of a mesh, all ranks of a communicator."""
    grid = grid_of(comm)
    return grid.group(("ep",)) if isinstance(comm, Mesh) else grid.everyone()


@dataclass(frozen=True)
class DispatchPlan:
    """What one dispatch decided, for as many exchanges along it as one likes.

    Attributes
    ----------
    group : Group
    cut : ExpertCut
    outgoing : Outgoing
        This rank's tokens.
    incoming : Incoming
        This rank's experts.
    n_tokens : tuple of int
        Of every rank.
    loads : tuple of int
        The rows of every rank's experts.
    width : int
        H, the features of a token.
    slots : tuple of int
        The shape of the routing's tables, (T, k).
    dtype : dtype
        Of the tokens.
    wire : {"same", "bfloat16"}
    """

    group: Group
    cut: ExpertCut
    outgoing: Outgoing
    incoming: Incoming
    n_tokens: tuple[int, ...]
    loads: tuple[int, ...]
    width: int
    slots: tuple[int, ...]
    dtype: np.dtype[Any]
    wire: str

    @property
    def sums(self) -> np.dtype[Any]:
        """The type of sums."""
        return sum_type(self.dtype)

    @property
    def wire_dtype(self) -> np.dtype[Any]:
        """The type of rows on their way to the owners."""
        return _BF16 if self.wire == "bfloat16" else self.dtype

    @property
    def peers(self) -> list[int]:
        """The other members, the next one first."""
        return [(self.group.index + step) % self.group.size for step in range(1, self.group.size)]

    @property
    def n_rows(self) -> int:
        """R: pairs of all ranks whose expert is here."""
        return len(self.incoming.source)

    def bytes_sent(self) -> dict[str, int]:
        """Bytes that this rank sends: "pairs" and "rows" in the dispatch, "returns" in the combine.

        "bound" is the least that the rows of a dispatch can be: each token once to every other rank that has one of its
        experts.
        """
        out, mine = self.outgoing, self.group.index
        rows = sum(len(out.rows[s]) for s in self.peers)
        returns = sum(len(self.incoming.sums(r).starts) - 1 for r in self.peers)
        back = self.wire_dtype if self.wire == "bfloat16" else self.sums
        chosen = self.cut.owner[out.pairs["expert"]].astype(np.int64) + self.group.size * out.pairs["token"]
        distinct = np.unique(chosen[chosen % self.group.size != mine])
        return {
            "pairs": sum(pairs_bytes(len(out.of_owner[s]), self.group.size, self.sums) for s in self.peers),
            "rows": rows * self.width * self.wire_dtype.itemsize,
            "returns": returns * self.width * back.itemsize,
            "bound": len(distinct) * self.width * self.wire_dtype.itemsize,
        }


def _first_bytes(n_owners: int) -> int:
    """Bytes of the first message to an owner."""
    return 8 * n_owners + _FIRST_PAIRS_BYTES


def pairs_bytes(n_pairs: int, n_owners: int, sums: Any) -> int:
    """Bytes of the messages that carry `n_pairs` pairs to one of the owners."""
    item = pair_type(sums).itemsize
    return _first_bytes(n_owners) + max(0, n_pairs - _FIRST_PAIRS_BYTES // item) * item


@dataclass(frozen=True)
class ExpertBatch:
    """The rows of this rank's experts.

    Attributes
    ----------
    tokens : (R, H)
        Ordered by expert of this rank, then by source rank, then by the token's row there.
    counts : (experts of this rank,) int64
        Rows of each.
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
    shapes: list[tuple[int, ...] | None] = [None, None, None]
    dtypes: list[str | None] = [None, None, None]
    if error is None:
        for i, array in enumerate(arrays):
            if array is not None:
                shapes[i], dtypes[i] = tuple(array.shape), str(array.dtype)
    what = f"called {operation} with {text}"
    mine = Arguments(operation, text, tuple(shapes), tuple(dtypes), "numpy", "tree", "sum", 1.0, 0.0, error)
    headers = agreement_of(group).exchange(pack(mine), what)
    verdict(headers, (), *group.numbering)
    everyone = [unpack(row.tobytes()) for row in headers]
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
    if not isinstance(array, np.ndarray):
        raise DTypeError(f"{operation}: `{name}` is a {type(array).__name__}; expected a NumPy array")
    if array.dtype not in types or not array.dtype.isnative:
        expected = " or ".join(str(np.dtype(t)) for t in types)
        raise DTypeError(f"{operation}: `{name}` has dtype {array.dtype}; expected {expected}")
    if array.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, array.shape, strict=True)):
        text = ", ".join("any" if n is None else str(n) for n in shape)
        raise ShapeError(f"{operation}: `{name}` has shape {array.shape}; expected ({text})")


def check_routing(operation: str, routing: Any, n_tokens: int) -> None:
    """Raise where a routing does not belong to so many tokens, or its tables are none that experts can be found by."""
    if not isinstance(routing, Routing):
        raise DTypeError(f"{operation}: `routing` is a {type(routing).__name__}; expected what fivedp.route gives")
    experts, weights = routing.experts, routing.weights
    check_rows(operation, "routing.experts", experts, (None, None), (np.dtype(np.int32),))
    if len(experts) != n_tokens:
        raise ShapeError(f"{operation}: `routing` is of {len(experts)} tokens and `x` has {n_tokens}")
    if weights.shape != experts.shape:
        raise ShapeError(f"{operation}: `routing` has weights of shape {weights.shape}; expected {experts.shape}")
    # Tables may be recorded elsewhere: what is wrong with them must be known before the first message.
    ordered = np.sort(experts, axis=1)
    for expert in (int(ordered.min(initial=-1)), int(ordered.max(initial=-1))):
        if not -1 <= expert < routing.n_experts:
            raise ShapeError(f"{operation}: `routing` names expert {expert}; expected -1 to {routing.n_experts - 1}")
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise ShapeError(f"{operation}: `routing` names an expert twice for token {int(twice.argmax())}; expected once")


def exchange_pairs(mail: Mailbox, outgoing: Outgoing) -> tuple[list[Array], Array]:
    """The pairs that every member has for this one's experts, and how many any member has for any: (from, to)."""
    group, mine = mail.group, mail.group.index
    dtype, fits = outgoing.pairs.dtype, _FIRST_PAIRS_BYTES // outgoing.pairs.dtype.itemsize
    size, counts_bytes = _first_bytes(group.size), 8 * group.size
    peers = [(mine + step) % group.size for step in range(1, group.size)]
    counts = np.empty((group.size, group.size), np.int64)
    counts[mine] = [len(numbers) for numbers in outgoing.of_owner]
    firsts = {s: mail.receive((size,), np.uint8, s, TAGS["A"]) for s in peers}
    for peer in peers:
        pairs = outgoing.pairs[outgoing.of_owner[peer]]
        first = np.zeros(size, np.uint8)
        first[:counts_bytes] = counts[mine].view(np.uint8)
        head = pairs[:fits].view(np.uint8)
        first[counts_bytes : counts_bytes + len(head)] = head
        mail.send(first, peer, TAGS["A"], 0)
        if len(pairs) > fits:
            mail.send(pairs[fits:], peer, TAGS["B"], 0)
    received: list[Array] = [outgoing.pairs[outgoing.of_owner[mine]]] * group.size
    rests = []
    for source in peers:
        mail.wait([firsts[source]])
        first = firsts[source].array
        counts[source] = first[:counts_bytes].view(np.int64)
        count = int(counts[source, mine])
        received[source] = np.empty(count, dtype)
        head = received[source][:fits]
        head.view(np.uint8)[:] = first[counts_bytes : counts_bytes + head.nbytes]
        mail.release(firsts[source])
        if count > fits:
            rests.append(mail.receive((count - fits,), dtype, source, TAGS["B"], target=received[source][fits:]))
    mail.wait(rests)
    return received, counts


def plan_dispatch(
    mail: Mailbox, routing: Routing, x: Array, n_tokens: Sequence[int], wire: str, sums: Any
) -> DispatchPlan:
    """Tell every owner which pairs are its own. Collective over the mailbox's group."""
    group = mail.group
    cut = cut_experts(routing.n_experts, group.size)
    outgoing = Outgoing(routing.experts, np.asarray(routing.weights, sums), cut, group.index)
    pairs, counts = exchange_pairs(mail, outgoing)
    return DispatchPlan(
        group, cut, outgoing, Incoming(pairs, cut, group.index), tuple(n_tokens), tuple(counts.sum(axis=0).tolist()),
        x.shape[1], tuple(routing.experts.shape), x.dtype, wire,
    )  # fmt: skip


class Dispatched:
    """Rows of everybody's tokens on their way to this rank's experts.

    `rows()` waits for them; `release()` says that they have been read for the last time. Who has work for some of them
    need not wait for all: `near` have theirs where this rank can read them, those of the others come as messages, and
    `arrived()` says whose have.
    """

    def __init__(self, mail: Mailbox, plan: DispatchPlan, x: Array, tag: str) -> None:
        self.mail, self.plan = mail, plan
        self.x = np.ascontiguousarray(x).astype(plan.wire_dtype, copy=False)
        number, incoming = TAGS[tag], plan.incoming
        self._receipts: dict[int, Receipt] = {}
        for source in plan.peers[::-1]:
            whole = (plan.n_tokens[source], plan.width)
            if incoming.n_rows[source]:
                self._receipts[source] = mail.receive_rows(incoming.n_rows[source], whole, self.x.dtype, source, number)
        for peer in plan.peers:
            mail.send_rows(self.x, plan.outgoing.rows[peer], peer, number, 0)
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
        plan, incoming = self.plan, self.plan.incoming
        if part == slice(None):
            self.wait(self._receipts)
        nothing = np.empty((0, plan.width), self.x.dtype)
        arrays = [nothing] * plan.group.size
        whole = np.zeros(plan.group.size, np.bool_)
        arrays[plan.group.index], whole[plan.group.index] = self.x, True
        for source, receipt in self._receipts.items():
            if source not in self._waiting:
                arrays[source], whole[source] = receipt.array, receipt.whole
        senders, token = incoming.source[part], incoming.token[part]
        index = token if whole.all() else np.where(whole[senders], token, incoming.row[part])
        return Rows(arrays, senders, index)

    def release(self) -> None:
        """This rank has read the rows for the last time."""
        for receipt in self._receipts.values():
            self.mail.release(receipt)


class Returns:
    """Sums of the experts' rows on their way back to the tokens: `send` to every other rank, once, then `add`.

    Parameters
    ----------
    weighted : bool
        Whether rows are weighted by the routing as they are added.
    """

    def __init__(self, mail: Mailbox, plan: DispatchPlan, *, weighted: bool) -> None:
        self.mail, self.plan, self.weighted = mail, plan, weighted
        self._wire = _BF16 if plan.wire == "bfloat16" else plan.sums
        self._receipts = {
            s: mail.receive((plan.outgoing.n_returns[s], plan.width), self._wire, s, TAGS["replica"])
            for s in plan.peers[::-1]
            if plan.outgoing.n_returns[s]
        }
        self._spaces: list[Workspace] = []

    def send(self, rows: Array, peers: Iterable[int]) -> None:
        """Add up what these ranks' tokens have here, and send it; their rows are complete, others need not be.

        Parameters
        ----------
        rows : (R, H)
            Of this rank's experts, in the order of the plan, contiguous; of the tokens' type or that of sums.
        """
        for peer in peers:
            table = self.plan.incoming.sums(peer, self.weighted)
            if peer != self.plan.group.index and len(table.starts) > 1:
                space = self.mail.workspace((len(table.starts) - 1, self.plan.width), self._wire)
                _add(table, [rows], self.plan.cut.n_experts, space.array)
                self.mail.send(space.array, peer, TAGS["replica"], 0)
                self._spaces.append(space)

    def add(self, rows: Array, out: Array) -> None:
        """out (T, H): for each of this rank's tokens, the sum of its experts' rows, here and elsewhere."""
        plan, receipts = self.plan, self._receipts
        self.mail.wait(list(receipts.values()))
        # Where rows are of 16 bits they are widened, for partial sums must not be rounded before they are added.
        kind = plan.sums if receipts else rows.dtype
        arrays = [rows.astype(kind, copy=False)] + [np.empty((0, plan.width), kind)] * plan.group.size
        for source, receipt in receipts.items():
            arrays[1 + source] = receipt.array.astype(kind, copy=False)
        table = plan.outgoing.sums(plan.incoming.positions[plan.group.index], self.weighted)
        _add(table, arrays, plan.cut.n_experts, out)
        for receipt in receipts.values():
            self.mail.release(receipt)
        self.mail.flush(0, (TAGS["replica"],))
        for space in self._spaces:
            self.mail.give_workspace(space)


def combine(mail: Mailbox, plan: DispatchPlan, rows: Array, out: Array, *, weighted: bool) -> None:
    """out (T, H): for each of this rank's tokens, the sum of its experts' rows (R, H). Collective over the group."""
    returns = Returns(mail, plan, weighted=weighted)
    returns.send(rows, plan.peers)
    returns.add(rows, out)


def _add(table: SumTable, arrays: Sequence[Array], n_experts: int, out: Array) -> None:
    """Carry out a table; sums of float64 are rounded for a narrow wire when they are complete."""
    rows = Rows(arrays, table.source, table.index)
    total = np.empty(out.shape, rows.dtype) if rows.dtype == np.float64 != out.dtype else out
    kernel.combine_rows(rows, table.starts, table.weights, table.experts, n_experts, total)
    if total is not out:
        out[...] = total


def in_type(rows: Rows, plan: DispatchPlan) -> Any:
    """The rows as arithmetic takes them: as they lie, or widened where the wire is narrower than the tokens."""
    if plan.wire_dtype == plan.dtype:
        return rows
    tokens = np.empty(rows.shape, plan.wire_dtype)
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
        positions = self.plan.incoming.positions
        for peer in peers:
            if peer != self.plan.group.index and len(positions[peer]):
                self.mail.send(values[positions[peer]], peer, TAGS["A"], 0)

    def table(self, values: Array) -> Array:
        """(T, k): the numbers of all of this rank's pairs, 0 where a slot is empty."""
        plan, outgoing, mine = self.plan, self.plan.outgoing, self.plan.group.index
        self.mail.wait(list(self._receipts.values()))
        by_pair = np.empty(len(outgoing.pairs), values.dtype)
        by_pair[outgoing.of_owner[mine]] = values[plan.incoming.positions[mine]]
        for source, receipt in self._receipts.items():
            by_pair[outgoing.of_owner[source]] = receipt.array
            self.mail.release(receipt)
        table = np.zeros(plan.slots, values.dtype)
        table[outgoing.pairs["token"], outgoing.slots] = by_pair
        return table


# -- the public calls --------------------------------------------------------------------------------------------------


def expert_dispatch(x: Array, routing: Routing, comm: Mesh | MPI.Intracomm, *, wire: str = "same") -> ExpertBatch:
    """Bring every token to the ranks that own its experts.

    Parameters
    ----------
    x : (T, H)
        This rank's tokens; float32, float64 or bfloat16. T may differ between ranks and be 0.
    routing : Routing
        Of these tokens.
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
    name, group, error = "expert_dispatch", group_of(comm), None
    try:
        check_rows(name, "x", x, (None, None), TYPES)
        check_routing(name, routing, len(x))
        if wire not in WIRES:
            raise LayoutError(f'{name}: wire is {wire!r}; expected "same" or "bfloat16"')
    except ValueError as found:
        error = found
    text = f"{getattr(routing, 'n_experts', 0)} experts, wire={wire}"
    what, everyone = agree(name, group, text, (x,), error)
    n_tokens = [shapes[0] for other in everyone if (shapes := other.shapes[0]) is not None]
    with mailbox(group, what, np) as mail:
        plan = plan_dispatch(mail, routing, x, n_tokens, wire, sum_type(x.dtype))
        travel = Dispatched(mail, plan, x, "C")
        tokens = np.empty((plan.n_rows, plan.width), plan.wire_dtype)
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
    error = None
    try:
        check_rows(name, "dy", dy, (plan.outgoing.n_tokens, plan.width), (plan.dtype,))
        check_rows(name, "expert_out", expert_out, (plan.n_rows, plan.width), (plan.dtype, plan.sums))
    except ValueError as found:
        error = found
    what, _ = agree(name, plan.group, f"{plan.cut.n_experts} experts", (dy, expert_out), error)
    with mailbox(plan.group, what, np) as mail:
        travel = Dispatched(mail, plan, dy, "C")
        rows = in_type(travel.rows(), plan)
        d_expert_out = np.empty((plan.n_rows, plan.width), plan.dtype)
        kernel.weighted_rows(rows, plan.incoming.weights, d_expert_out)
        dots = np.empty(plan.n_rows, plan.sums)
        kernel.row_dots(rows, np.ascontiguousarray(expert_out), dots)
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
    plan, error = batch.plan, None
    try:
        check_rows(operation, name, rows, (plan.n_rows, plan.width), (plan.dtype, plan.sums))
    except ValueError as found:
        error = found
    what, _ = agree(operation, plan.group, f"{plan.cut.n_experts} experts", (rows,), error)
    out = np.empty((plan.outgoing.n_tokens, plan.width), plan.dtype)
    with mailbox(plan.group, what, np) as mail:
        combine(mail, plan, np.ascontiguousarray(rows), out, weighted=weighted)
    return out
