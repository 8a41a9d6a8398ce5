"""Sums over the tokens of all ranks, for gradients of what every rank has whole: a router, shared experts.

Where tokens are cut by the block rule the sum is a sharded product in the order of the tokens, with the same bits on
any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpi4py import MPI

from fivedp.comm.grid import Group
from fivedp.comm.mesh import Mesh
from fivedp.kernels._select import library_of, sum_type
from fivedp.kernels.gemm import gemm
from fivedp.layout.shares import share
from fivedp.ops.matmul import sharded_matmul

Array = Any


def over_tokens(left: Array, right: Array, comm: Mesh | MPI.Intracomm, group: Group, n_tokens: Sequence[int]) -> Array:
    """left^T right, summed over the tokens of all members of a group, on each of them.

    Parameters
    ----------
    left, right : (T, A), (T, B)
        For this rank's tokens, of one type, in which the sum is returned; 16 bits are summed in float32.
    comm : Mesh or MPI.Intracomm
    group : Group
        Of `comm`: all its ranks, or those along some axes.
    n_tokens : sequence of int
        T of every member.
    """
    axes = "*".join(group.axes) or "ep"
    cuts = [share(sum(n_tokens), group.size, rank) for rank in range(group.size)]
    if [end - begin for begin, end in cuts] == list(n_tokens):
        order = "canonical" if 8 % group.size else "tree"
        return sharded_matmul(left.T, right, f"h t/{axes}, t/{axes} e -> h e", comm, order=order)
    # Shares of any other lengths: the ranks' sums are added in a tree over ranks.
    partial = library_of(left).empty((left.shape[1], right.shape[1]), sum_type(left.dtype))
    gemm(left.T, right, partial)
    return sum_along(partial, axes, comm).astype(left.dtype, copy=False)


def sum_along(part: Array, axis: str, comm: Mesh | MPI.Intracomm) -> Array:
    """The sum of the ranks' arrays along an axis, on all of them: a product with a row of ones."""
    one = library_of(part).ones((1, 1), part.dtype)
    whole: Array = sharded_matmul(one, part.reshape(1, -1), f"m k/{axis}, k/{axis} n -> m n", comm)
    return whole.reshape(part.shape)
