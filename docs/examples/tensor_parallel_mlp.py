"""A transformer's feed-forward layer over tensor-parallel ranks, forward and backward, with its gradient checked.

    mpirun -np 4 python docs/examples/tensor_parallel_mlp.py

    y = gelu(x W1) W2        x (tokens, hidden)   W1 (hidden, inner)   W2 (inner, hidden)

W1 is cut by columns and W2 by rows, so that the inner activations never leave their rank: the first product moves
nothing, the second sums over the ranks (Shoeybi et al. 2019, arXiv:1909.08053). Nobody says "all-reduce" here: it
follows from the specs. The gradients are the specs of the backward products, derived by the library.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import fivedp

Array = NDArray[np.float64]

TOKENS, HIDDEN, INNER = 96, 64, 256  # any number of ranks will do: shares may be uneven
COLUMN = "t h, h f/tp -> t f/tp"
ROW = "t f/tp, f/tp h -> t h"


def gelu(x: Array) -> tuple[Array, Array]:
    """The tanh form of GELU, and its derivative."""
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + t), slope


def forward(x: Array, w1: Array, w2: Array, mesh: fivedp.Mesh) -> tuple[Array, tuple[Array, Array]]:
    """y, whole on every rank, and what the backward pass needs."""
    before = fivedp.sharded_matmul(x, w1, COLUMN, mesh)
    after, slope = gelu(before)
    return fivedp.sharded_matmul(after, w2, ROW, mesh), (after, slope)


def backward(
    dy: Array, x: Array, w1: Array, w2: Array, kept: tuple[Array, Array], mesh: fivedp.Mesh
) -> tuple[Array, Array, Array]:
    """Gradients with respect to x (whole), w1 and w2 (this rank's shares)."""
    after, slope = kept
    d_after, dw2 = fivedp.sharded_matmul_backward(dy, after, w2, ROW, mesh)
    dx, dw1 = fivedp.sharded_matmul_backward(d_after * slope, x, w1, COLUMN, mesh)
    return dx, dw1, dw2


def main() -> None:
    mesh = fivedp.Mesh(tp=-1)  # all ranks
    rng = np.random.default_rng(0)  # the same numbers on every rank
    x = rng.standard_normal((TOKENS, HIDDEN))
    w1 = rng.standard_normal((HIDDEN, INNER)) / np.sqrt(HIDDEN)
    w2 = rng.standard_normal((INNER, HIDDEN)) / np.sqrt(INNER)
    dy = rng.standard_normal((TOKENS, HIDDEN))  # the gradient that arrives from the layer above
    w1_local, w2_local = fivedp.shard(w1, "h f/tp", mesh), fivedp.shard(w2, "f/tp h", mesh)

    y, kept = forward(x, w1_local, w2_local, mesh)
    sent_forward = sum(mesh.bytes_sent.values())
    dx, dw1_local, dw2_local = backward(dy, x, w1_local, w2_local, kept, mesh)
    sent_backward = sum(mesh.bytes_sent.values()) - sent_forward
    sent_forward, sent_backward = mesh.comm.allreduce(sent_forward), mesh.comm.allreduce(sent_backward)
    dw1 = fivedp.gather(dw1_local, "h f/tp", mesh)
    dw2 = fivedp.gather(dw2_local, "f/tp h", mesh)

    # Against the same layer in plain NumPy, and against the slope of the loss sum(dy * y) along a random direction.
    after, slope = gelu(x @ w1)
    d_before = (dy @ w2.T) * slope
    expected = {
        "y": (y, after @ w2),
        "dx": (dx, d_before @ w1.T),
        "dw1": (dw1, x.T @ d_before),
        "dw2": (dw2, after.T @ dy),
    }
    direction = [rng.standard_normal(v.shape) for v in (x, w1, w2)]
    losses = []
    for step in (1e-5, -1e-5):
        moved = [v + step * d for v, d in zip((x, w1, w2), direction, strict=True)]
        losses.append(float(np.sum(dy * (gelu(moved[0] @ moved[1])[0] @ moved[2]))))
    measured = (losses[0] - losses[1]) / 2e-5
    derived = sum(float(np.sum(g * d)) for g, d in zip((dx, dw1, dw2), direction, strict=True))

    # The all-reduce of y over p ranks, once in each direction: 2 (p - 1) copies of it are sent by all ranks together.
    all_reduce = 2 * (mesh.shape["tp"] - 1) * y.nbytes
    if mesh.comm.Get_rank() == 0:
        print(f"{mesh.shape['tp']} ranks, rank 0 holds W1 {w1_local.shape} and W2 {w2_local.shape}")
        print(f"bytes sent: {sent_forward} forward, {sent_backward} backward; an all-reduce of y is {all_reduce}")
        for name, (found, right) in expected.items():
            error = np.max(np.abs(found - right)) / np.max(np.abs(right))
            print(f"{name:4} largest error {error:.1e} of the largest value")
        print(f"slope of the loss: derived and measured differ by {abs(derived / measured - 1):.1e}")


if __name__ == "__main__":
    main()
