"""Attention over a sequence that is cut over the ranks: queries stay, keys and values travel.

In step t rank r computes with the keys of rank r - t, while those of rank r - t - 1 arrive:

    step t:   post keys of t + 1 | add keys of t to the state | next

The kernel's state (largest logit, sum of weights, weighted values) is carried through the steps unnormalised, so
blocks are not merged and nothing is rounded between them; the division comes at the end (Liu, Zaharia and Abbeel, "Ring
attention with blockwise transformers", 2023, with the state of Milakov and Gimelshein, 2018). A block goes straight
from its owner to every rank whose queries see any of it, cut to the range that they see; on one node it is read where
it lies, and the kernel takes all blocks after the first in one call.

In the backward the same pairs of ranks meet in the same steps. Either keys travel again, or queries do with what
belongs to them, in the other direction and to the ranks whose keys they see; `layout.ring_travel` says which, by bytes.
The gradients of what travels go straight home, in the type of sums, and are added there in the order of steps. On one
node the kernel takes the queries of several steps in one call.

With `order="canonical"` every rank gathers all keys and adds them in the order of the sequence; the backward gathers
the queries as well, so that each gradient is one sum in that order. An element then has the same bits on any number of
ranks, for more memory and, in the backward, about twice the arithmetic.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from fivedp.comm.grid import grid_of
from fivedp.comm.mesh import Mesh
from fivedp.comm.messages import TAGS, Mailbox, Workspace, mailbox
from fivedp.kernels import attention as kernel
from fivedp.layout.ring_travel import Travel, backward_travel, forward_travel
from fivedp.layout.sequence import Tokens
from fivedp.ops.attention_arguments import backward_arrays
from fivedp.ops.attention_call import AttentionCall, Part
from fivedp.ops.matmul import share_cores
from fivedp.ops.ring_blocks import Blocks, gather

Array = Any
# Bytes of gradients of other ranks' queries that are computed in one go.
_HELD_GRADIENTS = 8 << 20


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
        This rank's queries, NumPy's or CuPy's; float32, float64 or bfloat16, on a GPU also float16 (both summed in
        float32).
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
    out = call.xp.empty((*call.q.shape[:-1], call.v.shape[-1]), call.q.dtype)
    with mailbox(call.group, call.what, call.xp) as mail:
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
    **keywords: Any,
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
    comm
        As in the forward.
    **keywords
        Those of the forward, with the same defaults; `return_lse` is none of them.

    Returns
    -------
    dq, dk, dv : array
        Of the shapes and the type of q, k and v; summed in float32 (float64) and rounded once.

    Raises
    ------
    LayoutError, ShapeError, DTypeError, PeerError
        As `ring_attention` does.
    TypeError
        A keyword is not known.

    Notes
    -----
    Collective over all ranks of `comm`.
    Keys travel or queries, whichever is fewer bytes: `explain_attention` says which.
    """
    operation = "ring_attention_backward"
    keywords = with_defaults(operation, keywords)
    others = backward_arrays(q, v, do, o, lse, dlse)
    call = AttentionCall(operation, grid_of(comm).everyone(), q, k, v, keywords, others)
    share_cores(call.grid)
    do, lse, delta = call.rows(do, o, lse, dlse)
    with mailbox(call.group, call.what, call.xp) as mail:
        gradients = backward(call.part, mail, do, lse, delta)
    dq, dk, dv = (gradient.astype(q.dtype, copy=False) for gradient in gradients)
    return (dq[0], dk[0], dv[0]) if call.packed else (dq, dk, dv)


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(ring_attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "return_lse"
}


def with_defaults(operation: str, given: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Keywords filled up with the defaults of `ring_attention`, and with `more` for this operation.

    Raises
    ------
    TypeError
        Where one is not known, as Python does.
    """
    known = _DEFAULTS | more
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"{operation}() got an unexpected keyword argument {unknown[0]!r}; it takes {', '.join(known)}")
    return known | given


def forward(part: Part, mail: Mailbox, out: Array) -> Array:
    """Write `out` (this rank's queries); the log-sum-exp of its rows."""
    state = kernel.empty_state(part.q, part.v.shape[-1])
    arrays = {"A": (part.k, 1), "B": (part.v, 1)}
    if part.options.order == "canonical":
        keys, (k, v) = gather(part.group, mail, arrays, part.visibility.keys)
        kernel.forward(part.q, k, v, part.mask(part.queries, keys), state)
        return kernel.finish(state, out)
    travel = forward_travel(part.visibility, part.sizes)
    blocks = Blocks(part.group, mail, arrays, part.visibility.keys, travel.spans, travel.stride)
    blocks.start()
    for sources in blocks.together():
        arrived = []
        for source in sources:
            k, v = blocks.arrived(source)
            arrived.append((k, v, part.mask(part.queries, blocks.tokens(source))))
        kernel.forward_blocks(part.q, arrived, state)
        for source in sources:
            blocks.release(source)
    return kernel.finish(state, out)


def backward(part: Part, mail: Mailbox, do: Array, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    """dq, dk, dv in the type of sums."""
    run = _backward_canonical if part.options.order == "canonical" else _backward_ring
    return run(part, mail, do, lse, delta)


_Block = tuple[Tokens, list[Array], list[Array]]


@dataclass
class _Way:
    """One of the two ways through a backward: what travels, whose gradients come home, and the work on blocks.

    `gradients` are this rank's of what travels, each by the tag under which it comes home and of the shape of the array
    that stands in its place in `arrays`. `add` adds what blocks, each (its tokens, arrays and gradients), and what
    stays contribute to the gradients of both.
    """

    tokens: tuple[Tokens, ...]
    arrays: dict[str, tuple[Array, int]]
    gradients: dict[int, Array]
    add: Callable[[Sequence[_Block]], None]


def _keys_travel(part: Part, do: Array, lse: Array, delta: Array, dq: Array, dk: Array, dv: Array) -> _Way:
    def add(blocks: Sequence[_Block]) -> None:
        for keys, (k, v), (d_k, d_v) in blocks:
            kernel.backward(do, part.q, k, v, part.mask(part.queries, keys), lse, delta, dq, d_k, d_v)

    arrays = {"A": (part.k, 1), "B": (part.v, 1)}
    return _Way(part.visibility.keys, arrays, {TAGS["C"]: dk, TAGS["replica"]: dv}, add)


def _queries_travel(part: Part, do: Array, lse: Array, delta: Array, dq: Array, dk: Array, dv: Array) -> _Way:
    def add(blocks: Sequence[_Block]) -> None:
        with_queries = []
        for queries, (q, d_out, rows), (d_q,) in blocks:
            log_sum, rest = part.xp.ascontiguousarray(rows)  # a range of them that is read in place is not
            with_queries.append(kernel.Queries(d_out, q, part.mask(queries, part.keys), log_sum, rest, d_q))
        kernel.backward_blocks(with_queries, part.k, part.v, dk, dv)

    arrays = {"A": (part.q, 1), "B": (do, 1), "C": (part.xp.stack([lse, delta]), 3)}
    return _Way(part.visibility.queries, arrays, {TAGS["replica"]: dq}, add)


def _backward_ring(part: Part, mail: Mailbox, do: Array, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    mine, sums = part.group.index, lse.dtype
    dq, dk, dv = (part.xp.zeros(x.shape, sums) for x in (part.q, part.k, part.v))
    travel = backward_travel(part.visibility, part.sizes)
    way = (_keys_travel if travel.what == "keys" else _queries_travel)(part, do, lse, delta, dq, dk, dv)
    blocks = Blocks(part.group, mail, way.arrays, way.tokens, travel.spans, travel.stride)
    blocks.start()
    spaces: list[Workspace] = []
    for steps in _steps_together(part, mail, travel):
        # In a step this rank helps `source`, whose block it uses, and `helper` helps this rank. What is awaited in some
        # steps is sent before anything is awaited in them, and all ranks take the same steps together, so no circle of
        # waits can close.
        gifts = []
        for helper in (blocks.user(step) for step in steps if step > 0):
            begin, end = travel.spans[helper][mine]
            for tag, d in way.gradients.items() if begin < end else ():
                helped = d[:, begin:end]
                gifts.append((helped, mail.receive(helped.shape, sums, helper, tag)))
        coming = {step: source for step in steps if (source := blocks.source(step)) in blocks.coming}
        for source in coming.values():
            blocks.expect_next(source)
        if 0 in coming:
            way.add([(blocks.tokens(mine), blocks.arrived(mine), list(way.gradients.values()))])
        elif coming:
            mail.flush(steps[0] - 1, tuple(way.gradients))
            for space in spaces:
                mail.give_workspace(space)
            spaces = _help(way, blocks, coming, mail, sums)
        mail.wait([gift for _, gift in gifts])
        for helped, gift in gifts:
            helped += gift.array
            mail.release(gift)
    mail.flush()
    for space in spaces:
        mail.give_workspace(space)
    return dq, dk, dv


def _help(way: _Way, blocks: Blocks, coming: dict[int, int], mail: Mailbox, sums: Any) -> list[Workspace]:
    """Use the blocks of other ranks, by step, and send their gradients home; the memory that those lie in."""
    used, spaces = [], []
    for source in coming.values():
        block = blocks.arrived(source)
        made = [mail.workspace(x.shape, sums) for x, _ in zip(block, way.gradients, strict=False)]
        for space in made:
            space.array[...] = 0
        spaces += made
        used.append((blocks.tokens(source), block, [space.array for space in made]))
    way.add(used)
    for (step, source), (_, _, gradients) in zip(coming.items(), used, strict=True):
        blocks.release(source)
        for d, tag in zip(gradients, way.gradients, strict=True):
            mail.send(d, source, tag, step)
    return spaces


def _steps_together(part: Part, mail: Mailbox, travel: Travel) -> list[range]:
    """The steps whose blocks are used in one go, the same on all ranks: the first, of this rank's block, alone.

    Where queries travel the kernel brings keys into its order once for all of them. That needs all blocks at once, so
    it is done where they are read in place; their gradients, which are memory of this rank's, are few.
    """
    size, together = part.group.size, 1
    if travel.what == "queries" and part.group.in_place and mail.xp is np:
        longest = max((end - begin for spans in travel.spans for begin, end in spans), default=0)
        together = max(1, min(size - 1, _HELD_GRADIENTS // max(longest * part.sizes.queries_home, 1)))
    return [range(1), *(range(step, min(step + together, size)) for step in range(1, size, together))]


def _backward_canonical(part: Part, mail: Mailbox, do: Array, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    sums, tokens = lse.dtype, part.visibility
    dq, dk, dv = (part.xp.zeros(x.shape, sums) for x in (part.q, part.k, part.v))
    keys, (k, v) = gather(part.group, mail, {"A": (part.k, 1), "B": (part.v, 1)}, tokens.keys)
    no_dk, no_dv = (part.xp.zeros(x.shape, sums) for x in (k, v))
    kernel.backward(do, part.q, k, v, part.mask(part.queries, keys), lse, delta, dq, no_dk, no_dv)
    arrays = {"A": (part.q, 1), "B": (do, 1), "C": (lse, 2), "replica": (delta, 2)}
    queries, (q, do, lse, delta) = gather(part.group, mail, arrays, tokens.queries)
    no_dq = part.xp.zeros(q.shape, sums)
    kernel.backward(do, q, part.k, part.v, part.mask(queries, part.keys), lse, delta, no_dq, dk, dv)
    return dq, dk, dv
