"""Attention over a sequence that is cut over the ranks: queries stay, keys and values travel.

In step t a rank computes with the keys of rank r - t, while those of rank r - t - 1 arrive:

    step t:   post keys of t + 1 | add keys of t to the state | next

The kernel's state (largest logit, sum of weights, weighted values) is carried through the steps unnormalised, so
blocks are not merged and nothing is rounded between them; the division comes at the end (Liu, Zaharia and Abbeel, "Ring
attention with blockwise transformers", 2023, with the state of Milakov and Gimelshein, 2018). A block goes straight
from its owner to every rank whose queries see any of it, cut to the range that they see; on one node it is read where
it lies. In the backward the gradients of that range go straight home, in the type of sums, and are added there in the
order of steps.

With `order="canonical"` every rank gathers all keys and adds them in the order of the sequence; the backward gathers
the queries as well, so that each gradient is one sum in that order. An element then has the same bits on any number of
ranks, for more memory and, in the backward, about twice the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from fivedp.comm.grid import grid_of
from fivedp.comm.mesh import Mesh
from fivedp.comm.messages import TAGS, Mailbox, Receipt, Workspace, mailbox
from fivedp.kernels import attention as kernel
from fivedp.layout.sequence import Span, Tokens, join, reading_order
from fivedp.ops.attention_call import AttentionCall, Part, backward_arrays
from fivedp.ops.matmul import share_cores

Array = Any
# The gradients of k and v on their way home.
_HOME = (TAGS["C"], TAGS["replica"])


def ring_attention(
    q: Array,
    k: Array,
    v: Array,
    comm: Mesh | MPI.Intracomm,
    *,
    causal: bool = False,
    layout: str = "zigzag",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: Any = None,
    cu_seqlens_k: Any = None,
    positions: Any = None,
    kv_positions: Any = None,
    alibi_slopes: Any = None,
    order: str = "ring",
    return_lse: bool = True,
) -> Any:
    """Attention of queries to the keys of all ranks.

    Parameters
    ----------
    q : (B, S_local, H, D), or (T_local, H, D) with `cu_seqlens`
        This rank's queries; float32, float64 or bfloat16 (summed in float32).
    k : (B, S_local, H_kv, D)
    v : (B, S_local, H_kv, Dv)
        This rank's keys and values; H is a multiple of H_kv. Their number of tokens may differ from that of q.
    comm : Mesh or MPI.Intracomm
        Its ranks hold the sequence.
    causal : bool
        Query i sees keys j <= i, by global position.
    layout : {"zigzag", "striped", "contiguous"}
        Which tokens a rank holds: see `fivedp.layout.sequence`; `sequence_shard` cuts an array so.
    scale : float, optional
        Of the logits, 1/sqrt(D) where it is None.
    window : int, optional
        Query i sees keys with i - j < window (causal) or |i - j| < window.
    softcap : float, optional
        A logit x becomes softcap * tanh(x / softcap).
    cu_seqlens, cu_seqlens_k : (documents + 1,) int, optional
        Offsets of packed documents in the whole sequence; tokens see only their own document. Those of the keys where
        they differ.
    positions, kv_positions : (S_local,) int, optional
        This rank's global positions, for any placement of tokens; `layout` then does not matter.
    alibi_slopes : (H,) float, optional
        A logit loses slope * |i - j|.
    order : {"ring", "canonical"}
        "ring": fastest. "canonical": the same bits on every number of ranks.
    return_lse : bool
        Whether the log-sum-exp is returned as well.

    Returns
    -------
    o : (B, S_local, H, Dv)
        In the type of q. Rows that see no key are 0.
    lse : (B, H, S_local)
        The log of the sum of exp(logit) of each row, in float32 (float64 for float64); -inf for rows that see no key.
        (H, T_local) with `cu_seqlens`.

    Raises
    ------
    LayoutError, ShapeError, DTypeError
        On every rank, before any payload moves.
    PeerError
        Another rank raised, exited or stayed silent in the middle of the call.

    Notes
    -----
    Collective over all ranks of `comm`.
    """
    keywords = {
        "causal": causal, "layout": layout, "scale": scale, "window": window, "softcap": softcap,
        "cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "positions": positions, "kv_positions": kv_positions,
        "alibi_slopes": alibi_slopes, "order": order,
    }  # fmt: skip
    call = AttentionCall("ring_attention", grid_of(comm).everyone(), q, k, v, keywords)
    share_cores(call.grid)
    out = np.empty((*call.q.shape[:-1], call.v.shape[-1]), call.q.dtype)
    with mailbox(call.group, call.what, np) as mail:
        lse = forward(call.part, mail, out)
    if call.packed:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def ring_attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    comm: Mesh | MPI.Intracomm,
    *,
    dlse: Array | None = None,
    causal: bool = False,
    layout: str = "zigzag",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: Any = None,
    cu_seqlens_k: Any = None,
    positions: Any = None,
    kv_positions: Any = None,
    alibi_slopes: Any = None,
    order: str = "ring",
) -> tuple[Array, Array, Array]:
    """The gradients of `ring_attention`.

    Parameters
    ----------
    do : (B, S_local, H, Dv)
        The gradient with respect to o, in the type of q.
    q, k, v, o, lse
        What the forward was given and gave.
    dlse : (B, H, S_local), optional
        The gradient with respect to lse.
    comm, causal, layout, scale, window, softcap, cu_seqlens, cu_seqlens_k, positions, kv_positions, alibi_slopes, order
        As in the forward.

    Returns
    -------
    dq, dk, dv : array
        Of the shapes and the type of q, k and v; summed in float32 (float64) and rounded once.

    Raises
    ------
    LayoutError, ShapeError, DTypeError, PeerError
        As `ring_attention` does.

    Notes
    -----
    Collective over all ranks of `comm`.
    """
    keywords = {
        "causal": causal, "layout": layout, "scale": scale, "window": window, "softcap": softcap,
        "cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "positions": positions, "kv_positions": kv_positions,
        "alibi_slopes": alibi_slopes, "order": order,
    }  # fmt: skip
    others = backward_arrays(q, v, do, o, lse, dlse)
    call = AttentionCall("ring_attention_backward", grid_of(comm).everyone(), q, k, v, keywords, others)
    share_cores(call.grid)
    do, lse, delta = call.rows(do, o, lse, dlse)
    with mailbox(call.group, call.what, np) as mail:
        gradients = backward(call.part, mail, do, lse, delta)
    dq, dk, dv = (gradient.astype(q.dtype, copy=False) for gradient in gradients)
    return (dq[0], dk[0], dv[0]) if call.packed else (dq, dk, dv)


class _Travel:
    """Arrays of every rank's block on their way to the ranks that need them: (tag, array of this rank) each.

    `spans[r][s]` is the range of the tokens of member s that member r needs, (0, 0) for none.
    """

    def __init__(
        self,
        part: Part,
        mail: Mailbox,
        arrays: dict[str, Array],
        axes: dict[str, int],
        spans: Sequence[Sequence[Span]],
    ) -> None:
        self.part, self.mail, self.arrays, self.axes, self.spans = part, mail, arrays, axes, spans
        self._under_way: dict[int, list[Receipt]] = {}

    def send(self) -> None:
        """Send every other rank what it needs of this rank's block, the next one first."""
        group = self.part.group
        peers = [(group.index + step) % group.size for step in range(1, group.size)]
        needed = {peer: span for peer in peers if (span := self.spans[peer][group.index]) != (0, 0)}
        if len(set(needed.values())) > 1:  # ranges of one copy
            self.arrays = {tag: self.mail.place(array) for tag, array in self.arrays.items()}
        for peer, span in needed.items():
            for tag, array in self.arrays.items():
                self.mail.send(self._range(tag, array, span), peer, TAGS[tag], 0)

    def _range(self, tag: str, array: Array, span: Span) -> Array:
        return array[(slice(None),) * self.axes[tag] + (slice(*span),)]

    def expect(self, source: int) -> None:
        """Post the receives of what this rank needs of a rank's block."""
        receipts = []
        begin, end = self.spans[self.part.group.index][source]
        for tag, array in self.arrays.items():
            shape = list(array.shape)
            shape[self.axes[tag]] = end - begin
            receipts.append(self.mail.receive(tuple(shape), array.dtype, source, TAGS[tag]))
        self._under_way[source] = receipts

    def block(self, source: int) -> list[Array]:
        """What this rank needs of the arrays of a rank's block (of its own, all); it has arrived when this returns."""
        if source == self.part.group.index:
            return list(self.arrays.values())
        self.mail.wait(self._under_way[source])
        return [receipt.array for receipt in self._under_way[source]]

    def release(self, source: int) -> None:
        """This rank has read the block for the last time."""
        for receipt in self._under_way.pop(source, []):
            self.mail.release(receipt)


def _keys_on_their_way(part: Part, mail: Mailbox) -> tuple[_Travel, list[int]]:
    """Send what others see of this rank's keys; the ranks whose keys it sees, itself first, then backwards round."""
    travel = _Travel(part, mail, {"A": part.k, "B": part.v}, {"A": 1, "B": 1}, part.spans)
    travel.send()
    mine, size = part.group.index, part.group.size
    steps = [s for step in range(size) if part.spans[mine][s := (mine - step) % size] != (0, 0)]
    if steps and steps[0] != mine:
        travel.expect(steps[0])
    return travel, steps


def forward(part: Part, mail: Mailbox, out: Array) -> Array:
    """Write `out` (this rank's queries); the log-sum-exp of its rows."""
    mine = part.group.index
    state = kernel.empty_state(part.q, part.v.shape[-1])
    if part.options.order == "canonical":
        keys, (k, v) = _gather(part, mail, {"A": (part.k, 1), "B": (part.v, 1)}, part.keys)
        kernel.forward(part.q, k, v, part.mask(part.queries[mine], keys), state)
        return kernel.finish(state, out)
    travel, steps = _keys_on_their_way(part, mail)
    for step, source in enumerate(steps):
        if step + 1 < len(steps):
            travel.expect(steps[step + 1])
        k, v = travel.block(source)
        kernel.forward(part.q, k, v, part.mask(part.queries[mine], part.seen_keys(source)), state)
        travel.release(source)
    return kernel.finish(state, out)


def backward(part: Part, mail: Mailbox, do: Array, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    """dq, dk, dv in the type of sums."""
    run = _backward_canonical if part.options.order == "canonical" else _backward_ring
    return run(part, mail, do, lse, delta)


def _backward_ring(part: Part, mail: Mailbox, do: Array, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    mine, size, sums = part.group.index, part.group.size, lse.dtype
    dq, dk, dv = (np.zeros(x.shape, sums) for x in (part.q, part.k, part.v))
    travel, coming = _keys_on_their_way(part, mail)
    spaces: list[Workspace] = []
    for step in range(size):
        # At distance `step`, this rank helps `source`, and `helper` helps this rank. What is awaited at a distance is
        # sent before anything is awaited at that distance, so no circle of waits can close.
        source, helper = (mine - step) % size, (mine + step) % size
        begin, end = part.spans[helper][mine] if step else (0, 0)
        helped = [d[:, begin:end] for d in (dk, dv) if begin < end]
        gifts = [mail.receive(d.shape, sums, helper, tag) for d, tag in zip(helped, _HOME, strict=False)]
        if source in coming:
            place = coming.index(source)
            if place + 1 < len(coming):
                travel.expect(coming[place + 1])
            k, v = travel.block(source)
            mask = part.mask(part.queries[mine], part.seen_keys(source))
            if source == mine:
                kernel.backward(do, part.q, k, v, mask, lse, delta, dq, dk, dv)
            else:
                mail.flush(step - 1, _HOME)
                for space in spaces:
                    mail.give_workspace(space)
                spaces = [mail.workspace(x.shape, sums) for x in (k, v)]
                for space in spaces:
                    space.array[...] = 0
                kernel.backward(do, part.q, k, v, mask, lse, delta, dq, spaces[0].array, spaces[1].array)
                travel.release(source)
                for space, tag in zip(spaces, _HOME, strict=True):
                    mail.send(space.array, source, tag, step)
        if gifts:
            mail.wait(gifts)
            for d, gift in zip(helped, gifts, strict=True):
                d += gift.array
                mail.release(gift)
    mail.flush()
    for space in spaces:
        mail.give_workspace(space)
    return dq, dk, dv


def _backward_canonical(part: Part, mail: Mailbox, do: Array, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    mine, sums = part.group.index, lse.dtype
    dq, dk, dv = (np.zeros(x.shape, sums) for x in (part.q, part.k, part.v))
    keys, (k, v) = _gather(part, mail, {"A": (part.k, 1), "B": (part.v, 1)}, part.keys)
    no_dk, no_dv = (np.zeros(x.shape, sums) for x in (k, v))
    kernel.backward(do, part.q, k, v, part.mask(part.queries[mine], keys), lse, delta, dq, no_dk, no_dv)
    queries, (q, do, lse, delta) = _gather(
        part, mail, {"A": (part.q, 1), "B": (do, 1), "C": (lse, 2), "replica": (delta, 2)}, part.queries
    )
    no_dq = np.zeros(q.shape, sums)
    kernel.backward(do, q, part.k, part.v, part.mask(queries, part.keys[mine]), lse, delta, no_dq, dk, dv)
    return dq, dk, dv


def _gather(
    part: Part, mail: Mailbox, arrays: dict[str, tuple[Array, int]], tokens: tuple[Tokens, ...]
) -> tuple[Tokens, list[Array]]:
    """The tokens of all ranks in the order of the sequence, and arrays with an element per token: (array, axis)."""
    everyone = range(part.group.size)
    everything = [[(0, len(t)) for t in tokens]] * part.group.size
    travel = _Travel(part, mail, {tag: array for tag, (array, _) in arrays.items()},
                     {tag: axis for tag, (_, axis) in arrays.items()}, everything)  # fmt: skip
    travel.send()
    for source in everyone:
        if source != part.group.index:
            travel.expect(source)
    blocks = [travel.block(source) for source in everyone]
    joined = join(tokens)
    order = reading_order(joined)
    whole = [
        np.take(np.concatenate(parts, axis=axis), order, axis=axis)
        for parts, (_, axis) in zip(zip(*blocks, strict=True), arrays.values(), strict=True)
    ]
    for source in everyone:
        travel.release(source)
    return Tokens(joined.position[order], joined.document[order]), whole
