"""One rank's product on a GPU, in one fixed order.

The meaning is that of `fivedp.kernels.gemm`: K is cut into virtual shards, each summed in rising k, the shards joined
in a fixed binary tree. So an element has the same bits whatever M, N, strides, pieces and the tile it falls in, and
partial products over aligned spans of shards, joined by `tree_sum`, have the bits of one product over all of K. They
are the bits of this kernel, not those of the CPU's: matrix instructions add 16 products at a time.

FIVEDP_PRODUCT_KERNEL=sm90 chooses the kernels with the instructions of compute capability 9.x (H100, H200) for
bfloat16 and float16, here and in `fivedp.kernels.cuda.grouped`; they have not run on a GPU yet. The default, sm80, is
for every chip from 8.0, and serves under sm90 too where the chip is another one, and for float32 and float64. The two
may differ in bits. Nothing else chooses between them, neither sizes nor how arrays lie: ranks with the same setting and
the same kind of chip have the bits of one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fivedp.kernels._array_library import default_cuts
from fivedp.kernels._select import library_of
from fivedp.kernels.cuda._extension import asked_kernel, extension, raw, stream_of

__all__ = ["gemm"]

Array = Any


def gemm(
    a_pieces: Array | Sequence[Array],
    b_pieces: Array | Sequence[Array],
    c: Array,
    *,
    cuts: Sequence[int] | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    ready: Array | None = None,
    panel: int = 0,
    ready_along: str = "k",
) -> str:
    """C = alpha * A B + beta * C, written in place.

    Parameters
    ----------
    a_pieces : array or sequence of arrays, each (m, k_i) or (batch, m, k_i)
        A, in pieces along k; float32, float64, bfloat16 or float16. Any strides: the copies are 16 bytes wide where one
        of the two indices is contiguous and its rows begin at multiples of 16 bytes, element by element elsewhere.
    b_pieces : array or sequence of arrays, each (k_j, n) or (batch, k_j, n)
        B, in pieces along k, cut like A or otherwise. Pieces are read where they lie if they end at a multiple of 128
        bytes of k within a virtual shard, or at its end; others are joined first.
    c : array, (m, n) or (batch, m, n)
        Result, in the type of A or, where that has 16 bits, float32. Any strides. Must not overlap A or B. Not read
        where beta is 0.
    cuts : sequence of int, optional
        Borders of the virtual shards, as in `fivedp.kernels.gemm.gemm`; at most 24 shards.
    alpha, beta : float
    ready : int32 array, optional
        ``ready[i]`` becomes other than 0, by a store with release order, when panel i may be read: the product waits
        for it on the device. What raises the flags must not need the multiprocessors that wait.
    panel : int
        The extent of a panel along k, or along m.
    ready_along : {"k", "m"}

    Returns
    -------
    str
        The kernel that it was, 'sm80' or 'sm90'.

    Raises
    ------
    ValueError
        Shapes or cuts that do not fit together, FIVEDP_PRODUCT_KERNEL.
    TypeError
        Element types other than those above.

    Notes
    -----
    float32 factors are multiplied as two TF32 parts each, to about 2^-21 of each product; a product with an infinite
    factor may be NaN.
    """
    a: list[Array] = [a_pieces] if hasattr(a_pieces, "dtype") else list(a_pieces)
    b: list[Array] = [b_pieces] if hasattr(b_pieces, "dtype") else list(b_pieces)
    if ready_along not in ("k", "m"):
        raise ValueError(f"gemm: ready_along is {ready_along!r}; 'k' or 'm' would be right")
    borders = default_cuts(sum(piece.shape[-1] for piece in a)) if cuts is None else [int(cut) for cut in cuts]
    if len(a) > 1 or len(b) > 1:
        a, b = _readable(a, b, borders)
    xp = library_of(c)
    bits_a, bits_b = [raw(piece, "gemm: a") for piece in a], [raw(piece, "gemm: b") for piece in b]
    batch, m, n = (1, *c.shape)[-3:] if c.ndim in (2, 3) else (0, 0, 0)
    hopper = asked_kernel("PRODUCT") == "sm90"
    n_bytes = extension().gemm_workspace(bits_a[0], batch, m, n, len(borders) - 1, hopper) if a else 0
    workspace = xp.empty(n_bytes, "uint8")
    along_m = ready_along == "m"
    ran: str = extension().gemm(
        bits_a, bits_b, raw(c, "gemm: c"), borders, alpha, beta, ready, panel, along_m, workspace, hopper, stream_of(c)
    )
    return ran


def _readable(a: list[Array], b: list[Array], cuts: Sequence[int]) -> tuple[list[Array], list[Array]]:
    """The pieces, or one joined array, where the kernel could not read them in the order that `cuts` gives."""
    pieces = [piece for piece in (*a, *b) if hasattr(piece, "dtype")]
    depth = 128 // pieces[0].dtype.itemsize if pieces else 1
    begins: dict[str, list[int]] = {"a": [0], "b": [0]}
    for name, arrays, axis in (("a", a, -1), ("b", b, -2)):
        for piece in arrays:
            begins[name].append(begins[name][-1] + piece.shape[axis])
    n_segments = len(cuts) - 1 + len(a) + len(b)
    crowded = n_segments > extension().max_gemm_segments
    joined = []
    for name, arrays, axis in (("a", a, -1), ("b", b, -2)):
        apart = any((at - max(cut for cut in cuts if cut <= at)) % depth for at in begins[name][1:-1])
        if len(arrays) > 1 and (apart or crowded):
            arrays = [library_of(arrays[0]).concatenate(arrays, axis=axis)]
        joined.append(arrays)
    return joined[0], joined[1]
