"""Attention with heads exchanged for sequence (Ulysses), and that inside a ring.

Ranks that hold parts of a sequence give each other heads: before the exchange a rank has all heads of its tokens, after
it all tokens of its heads, and attention needs nobody else (Jacobs et al., "DeepSpeed Ulysses", 2023). With a second
axis, the tokens of such a group are one block of a ring (Fang and Zhao, "USP", 2024):

    exchange q, k, v over `heads`  |  attention over `ring`  |  exchange o, lse back

Heads are dealt by the block rule, key heads with the query heads that read them. Where there are fewer key heads than
ranks, query heads are dealt, and a key head goes to every rank that reads it; its gradients are added in the order of
ranks. A rank receives (q + k + v + o) S/p (p - 1)/p elements, however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from fivedp.comm.grid import Group, RankGrid, grid_of, resolve_axes
from fivedp.comm.mesh import Mesh
from fivedp.comm.messages import TAGS, Mailbox, mailbox
from fivedp.errors import LayoutError
from fivedp.kernels._select import library_of, sum_type
from fivedp.layout.ring_travel import Visibility
from fivedp.layout.sequence import HeadCut, Indices, Tokens, join, reading_order
from fivedp.ops.attention_arguments import backward_arrays
from fivedp.ops.attention_call import AttentionCall, Part
from fivedp.ops.matmul import share_cores
from fivedp.ops.ring_attention import backward, forward, with_defaults

Array = Any


def ulysses_attention(q: Array, k: Array, v: Array, comm: Mesh | MPI.Intracomm, **keywords: Any) -> Any:
    """Attention with heads exchanged for sequence: every rank computes all tokens of some heads.

    Parameters
    ----------
    q, k, v, comm
        As in `ring_attention`.
    **keywords
        Those of `ring_attention`, with the same defaults. o and lse have the same bits on every number
        of ranks.

    Returns
    -------
    o, lse
        As `ring_attention` gives them.

    Raises
    ------
    LayoutError, ShapeError, DTypeError, PeerError
        As `ring_attention` does.

    Notes
    -----
    Collective over all ranks of `comm`.
    """
    grid = grid_of(comm)
    return _forward("ulysses_attention", _Places.of(grid, grid.names, ()), q, k, v, keywords)


def ulysses_attention_backward(
    do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, comm: Mesh | MPI.Intracomm, **keywords: Any
) -> tuple[Array, Array, Array]:
    """The gradients of `ulysses_attention`: dq, dk, dv.

    Parameters
    ----------
    do, q, k, v, o, lse, comm, **keywords
        As in `ring_attention_backward`, `dlse` among the keywords.

    Notes
    -----
    Collective over all ranks of `comm`.
    """
    grid = grid_of(comm)
    places = _Places.of(grid, grid.names, ())
    return _backward("ulysses_attention_backward", places, do, q, k, v, o, lse, keywords)


def hybrid_attention(
    q: Array, k: Array, v: Array, mesh: Mesh, *, heads: str = "tp", ring: str = "sp", **keywords: Any
) -> Any:
    """Attention over two axes of a mesh: heads exchanged over one, keys in a ring over the other.

    Parameters
    ----------
    q, k, v
        As in `ring_attention`; the sequence is cut over both axes, in the order of `mesh.axis(heads, ring)`.
    mesh : Mesh
    heads, ring : str
        The axis over which heads are exchanged (fast links, for it moves everything once), and that of the ring.
    **keywords
        Those of `ring_attention`, with the same defaults.

    Returns
    -------
    o, lse
        As `ring_attention` gives them.

    Raises
    ------
    LayoutError, ShapeError, DTypeError, PeerError
        As `ring_attention` does; LayoutError also where the axes are the same or not those of the mesh.

    Notes
    -----
    Collective over the ranks that share all other coordinates.
    """
    return _forward("hybrid_attention", _two_axes("hybrid_attention", mesh, heads, ring), q, k, v, keywords)


def hybrid_attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    mesh: Mesh,
    *,
    heads: str = "tp",
    ring: str = "sp",
    **keywords: Any,
) -> tuple[Array, Array, Array]:
    """The gradients of `hybrid_attention`: dq, dk, dv.

    Parameters
    ----------
    do, q, k, v, o, lse, **keywords
        As in `ring_attention_backward`, `dlse` among the keywords.
    mesh, heads, ring
        As in `hybrid_attention`.

    Notes
    -----
    Collective over the ranks that share all other coordinates.
    """
    name = "hybrid_attention_backward"
    return _backward(name, _two_axes(name, mesh, heads, ring), do, q, k, v, o, lse, keywords)


@dataclass
class _Places:
    """The groups of one call, and where their members are in the group of all."""

    everyone: Group
    heads: Group
    ring: Group
    heads_members: list[int]
    """For every member of `heads`, its number in `everyone`."""
    blocks: list[list[int]]
    """For every member of `ring`, the numbers of the ranks whose tokens make its block."""

    @classmethod
    def of(cls, grid: RankGrid, heads_axes: tuple[str, ...], ring_axes: tuple[str, ...]) -> _Places:
        everyone = grid.group(tuple(name for name in grid.names if name in heads_axes + ring_axes))
        heads, ring = grid.group(heads_axes), grid.group(ring_axes)
        place = [grid.names.index(name) for name in ring_axes]

        def along_ring(rank: int) -> tuple[int, ...]:
            return tuple(grid.coords[rank][p] for p in place)

        blocks = [
            [i for i, other in enumerate(everyone.members) if along_ring(other) == along_ring(member)]
            for member in ring.members
        ]
        return cls(everyone, heads, ring, [everyone.members.index(member) for member in heads.members], blocks)


def _two_axes(name: str, mesh: Mesh, heads: str, ring: str) -> _Places:
    if not isinstance(mesh, Mesh):
        raise LayoutError(f"{name}: the mesh is a {type(mesh).__name__}; expected a fivedp.Mesh with two axes")
    if heads == ring:
        raise LayoutError(f"{name}: heads and ring are both {heads!r}; expected two axes of the mesh")
    grid = grid_of(mesh)
    return _Places.of(grid, resolve_axes(grid.names, (heads,)), resolve_axes(grid.names, (ring,)))


class _Exchange:
    """Heads against tokens, between the ranks of one group."""

    def __init__(self, places: _Places, call: AttentionCall) -> None:
        self.places, self.group = places, places.heads
        heads, kv_heads = call.q.shape[2], call.k.shape[2]
        self.ratio = heads // kv_heads
        self.cuts = [HeadCut.of(heads, kv_heads, self.group.size, part) for part in range(self.group.size)]
        self.mine = self.cuts[self.group.index]
        self.replicated = kv_heads < self.group.size
        self.readers = self.mine.readers(self.ratio)
        # Query heads of several groups, of any number each: the key heads are repeated for them.
        self.expanded = self.replicated and len(set(self.readers)) > 1
        members = places.heads_members
        self.queries = _Sorted([call.queries[i] for i in members])
        self.keys = _Sorted([call.keys[i] for i in members])

    def gather(self, mail: Mailbox, x: Array, tokens: _Sorted, of_keys: bool, tag: str, axis: int = 1) -> Array:
        """All tokens of this rank's heads; x has this rank's tokens of all heads (heads along 3 - axis)."""
        head_axis = 3 - axis
        me = self.group.index

        def heads_of(part: int) -> slice:
            cut = self.cuts[part]
            return slice(cut.kv_begin, cut.kv_end) if of_keys else slice(cut.begin, cut.end)

        def cut_heads(part: int) -> Array:
            return x[:, :, heads_of(part)] if head_axis == 2 else x[:, heads_of(part)]

        shape = list(cut_heads(me).shape)
        shapes = [tuple(shape[:axis] + [len(t)] + shape[axis + 1 :]) for t in tokens.parts]
        xp = mail.xp
        whole = xp.empty((*shape[:axis], tokens.count, *shape[axis + 1 :]), x.dtype)

        def put(source: int, part: Array) -> None:
            xp.moveaxis(whole, axis, 0)[xp.asarray(tokens.targets[source])] = xp.moveaxis(part, axis, 0)

        _all_to_all(self.group, mail, [cut_heads(i) for i in range(self.group.size)], shapes, tag, put)
        return whole

    def scatter(self, mail: Mailbox, x: Array, tokens: _Sorted, of_keys: bool, tag: str, axis: int = 1) -> list[Array]:
        """This rank's tokens of every rank's heads; x has all tokens of this rank's heads."""
        head_axis, mine = 3 - axis, len(tokens.parts[self.group.index])
        outgoing = [mail.xp.take(x, mail.xp.asarray(indices), axis=axis) for indices in tokens.targets]
        shapes = []
        for cut in self.cuts:
            shape = list(x.shape)
            shape[axis] = mine
            shape[head_axis] = cut.kv_end - cut.kv_begin if of_keys else cut.end - cut.begin
            shapes.append(tuple(shape))
        parts: list[Array] = [mail.xp.empty(shape, x.dtype) for shape in shapes]

        def put(source: int, part: Array) -> None:
            parts[source][...] = part

        _all_to_all(self.group, mail, outgoing, shapes, tag, put)
        return parts

    def key_gradient(self, call: AttentionCall, mail: Mailbox, d: Array, tag: str) -> Array:
        """This rank's tokens of all key heads; one that several ranks had is a sum over them, rounded once."""
        dtype = call.q.dtype
        parts = self.scatter(mail, d if self.replicated else d.astype(dtype), self.keys, True, tag)
        whole = mail.xp.zeros((*parts[0].shape[:2], call.k.shape[2], d.shape[3]), parts[0].dtype)
        for cut, piece in zip(self.cuts, parts, strict=True):
            whole[:, :, cut.kv_begin : cut.kv_end] += piece
        return whole.astype(dtype, copy=False)

    def part(self, call: AttentionCall, mail: Mailbox) -> Part:
        """The attention over the ring, on this rank's heads."""
        places, options = self.places, call.options
        q = self.gather(mail, call.q, self.queries, False, "A")
        k = self.gather(mail, call.k, self.keys, True, "B")
        v = self.gather(mail, call.v, self.keys, True, "C")
        if self.expanded:
            k, v = k[:, :, self.readers], v[:, :, self.readers]
        blocks = [([call.queries[i] for i in block], [call.keys[i] for i in block]) for block in places.blocks]
        queries = tuple(_Sorted(tokens).whole for tokens, _ in blocks)
        keys = tuple(_Sorted(tokens).whole for _, tokens in blocks)
        slopes = options.alibi_slopes
        return Part(
            call.grid, places.ring, call.what, options, call.packed, q, k, v,
            Visibility(queries, keys, options.causal, options.window or 0),
            None if slopes is None else slopes[self.mine.begin : self.mine.end],
        )  # fmt: skip


class _Sorted:
    """The tokens of several ranks, joined in the order of the sequence."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self.parts = list(parts)
        joined = join(self.parts)
        order = reading_order(joined)
        self.whole = Tokens(joined.position[order], joined.document[order])
        self.count = len(order)
        inverse = np.empty_like(order)
        inverse[order] = np.arange(self.count)
        ends = np.cumsum([len(part) for part in self.parts])
        self.targets: list[Indices] = np.split(inverse, ends[:-1])
        """For each rank, where its tokens are in the joined sequence."""


def _all_to_all(
    group: Group,
    mail: Mailbox,
    outgoing: list[Array],
    shapes: list[tuple[int, ...]],
    tag: str,
    put: Callable[[int, Array], None],
) -> None:
    """An array to every member and one from every member, handed to `put`; this rank's own goes nowhere."""
    me, number, dtype = group.index, TAGS[tag], outgoing[0].dtype
    peers = [(me + step) % group.size for step in range(1, group.size)]
    receipts = {source: mail.receive(shapes[source], dtype, source, number) for source in reversed(peers)}
    for peer in peers:
        mail.send(mail.xp.ascontiguousarray(outgoing[peer]), peer, number, 0)
    put(me, outgoing[me])
    for source, receipt in receipts.items():
        mail.wait([receipt])
        put(source, receipt.array)
        mail.release(receipt)


def _forward(operation: str, places: _Places, q: Array, k: Array, v: Array, given: dict[str, Any]) -> Any:
    keywords = with_defaults(operation, given, return_lse=True)
    return_lse = keywords.pop("return_lse")
    call = AttentionCall(operation, places.everyone, q, k, v, keywords)
    share_cores(call.grid)
    exchange = _Exchange(places, call)
    with mailbox(exchange.group, call.what, call.xp) as mail:
        part = exchange.part(call, mail)
    inner = call.xp.empty((*part.q.shape[:-1], call.v.shape[-1]), q.dtype)
    if part.q.shape[2]:
        with mailbox(part.group, part.what, call.xp) as mail:
            lse = forward(part, mail, inner)
    else:  # no heads for this rank, nor for any of its ring
        lse = call.xp.empty((part.q.shape[0], 0, part.q.shape[1]), sum_type(q.dtype))
    with mailbox(exchange.group, call.what, call.xp) as mail:
        out = call.xp.concatenate(exchange.scatter(mail, inner, exchange.queries, False, "A"), axis=2)
        lse_out = call.xp.concatenate(exchange.scatter(mail, lse, exchange.queries, False, "B", axis=2), axis=1)
    if call.packed:
        out, lse_out = out[0], lse_out[0]
    return (out, lse_out) if return_lse else out


def _backward(
    operation: str,
    places: _Places,
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    given: dict[str, Any],
) -> tuple[Array, Array, Array]:
    keywords = with_defaults(operation, given, dlse=None)
    dlse = keywords.pop("dlse")
    call = AttentionCall(operation, places.everyone, q, k, v, keywords, backward_arrays(q, v, do, o, lse, dlse))
    share_cores(call.grid)
    do, lse, delta = call.rows(do, o, lse, dlse)
    exchange = _Exchange(places, call)

    queries = exchange.queries
    with mailbox(exchange.group, call.what, call.xp) as mail:
        part = exchange.part(call, mail)
        do_heads = exchange.gather(mail, do, queries, False, "A")
        lse_heads = exchange.gather(mail, lse, queries, False, "B", axis=2)
        delta_heads = exchange.gather(mail, delta, queries, False, "C", axis=2)
    if part.q.shape[2]:
        with mailbox(part.group, part.what, call.xp) as mail:
            dq, dk, dv = backward(part, mail, do_heads, lse_heads, delta_heads)
    else:
        dq, dk, dv = (call.xp.zeros(x.shape, lse.dtype) for x in (part.q, part.k, part.v))
    if exchange.expanded:
        dk, dv = (_unrepeat(d, exchange.readers, exchange.mine.kv_end - exchange.mine.kv_begin) for d in (dk, dv))

    with mailbox(exchange.group, call.what, call.xp) as mail:
        dq = call.xp.concatenate(exchange.scatter(mail, dq.astype(q.dtype), queries, False, "A"), axis=2)
        dk, dv = (exchange.key_gradient(call, mail, d, tag) for d, tag in ((dk, "B"), (dv, "C")))
    return (dq[0], dk[0], dv[0]) if call.packed else (dq, dk, dv)


def _unrepeat(d: Array, readers: list[int], kv_heads: int) -> Array:
    """The gradients of key heads from those of their repetitions."""
    whole = library_of(d).zeros((*d.shape[:2], kv_heads, d.shape[3]), d.dtype)
    for number, reader in enumerate(readers):
        whole[:, :, reader] += d[:, :, number]
    return whole
