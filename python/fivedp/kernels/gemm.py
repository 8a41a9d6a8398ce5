"""One rank's product and the sum of partial products, in one fixed order.

C = alpha * A B + beta * C. K is cut into virtual shards (8 by default, by the block rule). A shard is summed in K
blocks of 256 counted from its start, each one chain of fused multiply-adds from +0; the blocks are added in order; the
shards in a binary tree, ((s0+s1)+(s2+s3))+((s4+s5)+(s6+s7)). The order depends on nothing else: not on M, N, strides,
pieces, threads or the instruction set. So partial products over aligned spans of shards, joined by `tree_sum`, have the
same bits as one product over all of K.

For other counts of shards the tree is a binary counter: neighbours of equal size are added as they come, and what is
left at the end is added from the smallest up.

bfloat16 is widened to float32 and summed in float32. On AVX512-BF16 machines pairs of products are added with that
instruction's rounding: the same bits for all tiles, threads and shares there, but not those of other machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fivedp import _cpu
from fivedp.kernels import _array_library
from fivedp.kernels._select import gemm_backend, is_cupy, raw

__all__ = ["gemm", "gemm_backend", "isa", "multiply_adds", "set_threads", "supported_isas", "threads", "tree_sum"]

Array = Any

_F32 = np.dtype(np.float32)
_F64 = np.dtype(np.float64)


def gemm(
    a_pieces: Array | Sequence[Array],
    b_pieces: Array | Sequence[Array],
    c: Array,
    *,
    cuts: Sequence[int] | None = None,
    alpha: float | complex = 1.0,
    beta: float | complex = 0.0,
    progress: Callable[[], object] | None = None,
) -> None:
    """C = alpha * A B + beta * C, written in place.

    Parameters
    ----------
    a_pieces : array or sequence of arrays, each (m, k_i) or (batch, m, k_i)
        A, in pieces along k. Any strides; a piece may be empty.
    b_pieces : array or sequence of arrays, each (k_j, n) or (batch, k_j, n)
        B, in pieces along k, cut like A or otherwise.
    c : array, (m, n) or (batch, m, n)
        Result; float32 or float64 like A and B; float32 or bfloat16 where they are bfloat16. Any strides. Must not
        overlap A or B. Not read where beta is 0.
    cuts : sequence of int, optional
        Borders of the virtual shards, from 0 to k in rising order; repeated borders are empty shards, which add +0.
        Default: those of ``numpy.array_split(range(k), 8)``.
    alpha, beta : float
        Complex where the arrays are.
    progress : callable, optional
        Called from this thread about every 1.5 ms of a long product. What it raises ends the product (C is then
        partly written) and is passed on.

    Raises
    ------
    ValueError
        Shapes or cuts that do not fit together.
    TypeError
        Element types other than those above.
    """
    if type(a_pieces) is np.ndarray and type(b_pieces) is np.ndarray:
        dtype = a_pieces.dtype
        if (dtype is _F32 or dtype is _F64) and gemm_backend() != "blas":
            _cpu.gemm(a_pieces, b_pieces, c, cuts, alpha, beta, progress)  # the checks are there
            return
    a = [a_pieces] if hasattr(a_pieces, "dtype") else list(a_pieces)
    b = [b_pieces] if hasattr(b_pieces, "dtype") else list(b_pieces)
    if is_cupy(c):
        import cupy

        if gemm_backend() == "canonical" and c.dtype.kind != "c":
            from fivedp.kernels.cuda import gemm as on_device

            on_device.gemm(a, b, c, cuts=cuts, alpha=float(alpha.real), beta=float(beta.real))
            return
        _array_library.whole_product(cupy, a, b, c, alpha, beta)
    elif a and getattr(a[0], "dtype", _F32).kind == "c":
        _array_library.shard_product(a, b, c, cuts, alpha, beta)
    elif gemm_backend() == "blas":
        _array_library.whole_product(np, a, b, c, alpha, beta)
    else:
        _cpu.gemm(_raw(a, "gemm: a"), _raw(b, "gemm: b"), raw(c, "gemm: c"), cuts, alpha, beta, progress)


def tree_sum(
    partials: Sequence[Array],
    spans: Sequence[tuple[int, int]],
    out: Array,
    *,
    alpha: float | complex = 1.0,
    beta: float | complex = 0.0,
) -> None:
    """out = alpha * (sum of the partial products, in the tree of one whole product) + beta * out.

    Parameters
    ----------
    partials : sequence of arrays, each (m, n) or (batch, m, n)
        Products over some virtual shards each, as `gemm` gives them with alpha 1 and beta 0; float32, float64 or
        complex. bfloat16 products are kept in float32 until they are summed.
    spans : sequence of (first_shard, n_shards)
        The shards of each partial: aligned subtrees (n_shards a power of two that divides first_shard), sorted,
        without gaps.
    out : array of the partials' shape
        The partials' type, or bfloat16 for float32 partials. Any strides. Not read where beta is 0.
    """
    if not partials:
        raise ValueError("tree_sum: partials is empty; at least one array would be right")
    if is_cupy(out) or getattr(partials[0], "dtype", _F32).kind == "c":
        _check_spans(partials, spans, out)
        if is_cupy(out) and partials[0].dtype in (_F32, _F64):
            from fivedp.kernels.cuda import tree_sum as device

            if device.serves(out) and len(partials) <= device.MAX_PARTIALS:
                device.tree_sum(partials, spans, out, alpha=alpha, beta=beta)  # type: ignore[arg-type]
                return
        total = _array_library.combine([(count, partial) for partial, (_, count) in zip(partials, spans, strict=True)])
        _array_library.finish(total, out, alpha, beta)
        return
    _cpu.tree_sum(partials, spans, raw(out, "tree_sum: out"), alpha, beta)


def threads() -> int:
    """How many threads a large product uses: FIVEDP_NUM_THREADS, else the CPUs this process may run on."""
    return _cpu.threads()


def set_threads(count: int) -> None:
    """Use `count` threads in this process from now on."""
    _cpu.set_threads(count)


def multiply_adds(dtype: Any, rounds: int) -> float:
    """Multiply and add in registers, on all threads: what products are measured against.

    Parameters
    ----------
    dtype : dtype
        float32, float64 or bfloat16.
    rounds : int
        So many times a tile of independent sums is added to.

    Returns
    -------
    float
        Operations done, two for every product that is added, by all threads together.

    Raises
    ------
    TypeError
        For another type.
    """
    return _cpu.multiply_adds(raw(np.empty(0, dtype), "multiply_adds"), rounds)


def isa() -> str:
    """The instruction set in use: the widest supported, or FIVEDP_ISA.

    Raises
    ------
    ValueError
        Where FIVEDP_ISA names one that is not supported here; the message lists those that are.
    """
    return _cpu.isa()


def supported_isas() -> list[str]:
    """The names that FIVEDP_ISA may take on this machine."""
    return _cpu.supported_isas()


def _raw(arrays: Sequence[Array], who: str) -> list[Array]:
    return [raw(array, who) for array in arrays]


def _check_spans(partials: Sequence[Array], spans: Sequence[tuple[int, int]], out: Array) -> None:
    if len(partials) != len(spans):
        raise ValueError(f"tree_sum: there are {len(partials)} partials and {len(spans)} spans; one each is right")
    expected = spans[0][0]
    for partial, (begin, count) in zip(partials, spans, strict=True):
        if begin != expected or count < 1 or count & (count - 1) or begin % count:
            raise ValueError(f"tree_sum: span ({begin}, {count}) is no aligned subtree that begins at shard {expected}")
        if tuple(partial.shape) != tuple(out.shape):
            raise ValueError(f"tree_sum: a partial has shape {tuple(partial.shape)} and out {tuple(out.shape)}")
        expected = begin + count
