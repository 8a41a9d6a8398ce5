"""Attention of a few queries to a cache of keys that is cut over the ranks.

Every rank has the queries, adds its own keys to their state, and sends that state (unnormalised, in the type of sums)
to all others: one exchange, whatever the length of the cache (Shyam et al., "Tree attention", 2024, reduce it in
three). All ranks add the states in the order of ranks, so they end with the same bits.
"""

from __future__ import annotations

import math
from typing import Any

from mpi4py import MPI

from fivedp.comm.grid import grid_of
from fivedp.comm.mesh import Mesh
from fivedp.comm.messages import TAGS, Mailbox, mailbox
from fivedp.kernels import attention as kernel
from fivedp.kernels.attention import State
from fivedp.ops.attention_call import AttentionCall, Part
from fivedp.ops.matmul import share_cores
from fivedp.ops.ring_attention import with_defaults

Array = Any


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    comm: Mesh | MPI.Intracomm,
    *,
    positions: Any = None,
    causal: bool = True,
    layout: str = "contiguous",
    kv_positions: Any = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    return_lse: bool = True,
) -> Any:
    """Attention of queries that every rank has to keys that are cut over the ranks.

    Parameters
    ----------
    q : (B, n, H, D)
        The queries, the same on every rank.
    k : (B, S_local, H_kv, D)
    v : (B, S_local, H_kv, Dv)
        This rank's part of the cache; it may be empty.
    comm : Mesh or MPI.Intracomm
        Its ranks hold the cache.
    positions : (n,) int, optional
        Positions of the queries, the same on every rank; the last n of the cache where it is None.
    causal : bool
        Query i sees keys j <= i.
    layout : {"contiguous", "zigzag", "striped"}
        Which part of the cache a rank holds.
    kv_positions : (S_local,) int, optional
        Positions of this rank's keys, for a cache placed otherwise (one that grows on one rank after another, say).
    scale, window, softcap, alibi_slopes, return_lse
        As in `ring_attention`.

    Returns
    -------
    o : (B, n, H, Dv)
    lse : (B, H, n)
        The same on every rank, to the bit.

    Raises
    ------
    LayoutError, ShapeError, DTypeError, PeerError
        As `ring_attention` does.

    Notes
    -----
    Collective over all ranks of `comm`. A rank sends B n H (Dv + 2) sums to every other.
    """
    keywords = with_defaults(
        "decode_attention",
        {"causal": causal, "layout": layout, "scale": scale, "window": window, "softcap": softcap,
         "positions": positions, "kv_positions": kv_positions, "alibi_slopes": alibi_slopes},
    )  # fmt: skip
    call = AttentionCall("decode_attention", grid_of(comm).everyone(), q, k, v, keywords, queries_everywhere=True)
    share_cores(call.grid)
    part = call.part
    state = kernel.empty_state(call.q, call.v.shape[-1])
    kernel.forward(call.q, call.k, call.v, part.mask(part.queries, part.keys), state)
    with mailbox(call.group, call.what, call.xp) as mail:
        states = _exchange(part, mail, state)
    state = kernel.join(states)
    out = call.xp.empty(state.output.shape, q.dtype)
    lse = kernel.finish(state, out)
    return (out, lse) if return_lse else out


def _exchange(part: Part, mail: Mailbox, state: State) -> list[State]:
    """The states of all ranks, each in one message."""
    group = part.group
    xp = part.xp
    mine = xp.concatenate([x.reshape(-1) for x in (state.highest, state.total, state.output)])
    peers = [(group.index + step) % group.size for step in range(1, group.size)]
    receipts = {peer: mail.receive(mine.shape, mine.dtype, peer, TAGS["A"]) for peer in peers}
    for peer in peers:
        mail.send(mine, peer, TAGS["A"], 0)
    mail.wait(list(receipts.values()))
    rows = math.prod(state.highest.shape)
    states = []
    for source in range(group.size):
        flat = mine if source == group.index else receipts[source].array.copy()
        highest, total, output = xp.split(flat, [rows, 2 * rows])
        shape = state.highest.shape
        states.append(State(highest.reshape(shape), total.reshape(shape), output.reshape(state.output.shape)))
    for receipt in receipts.values():
        mail.release(receipt)
    return states
