"""Principal components of scikit-learn's handwritten digits, with the pictures spread over the ranks.

    mpirun -np 4 python docs/examples/pca_digits.py
    mpirun -np 4 python docs/examples/pca_digits.py --draw docs/pictures/digits.svg

1797 pictures of 8 x 8 pixels are a matrix X (n, d) with n = 1797 and d = 64. Every rank holds some rows: "n/p d".
All sums over pictures are products whose summed index is n, so one line each says what is computed and the messages
follow. Two roads lead to the same components:

    covariance      C = X^T X / (n - 1), d x d and small; its eigenvectors are the components
    random range    X^T X is never formed: a few products with thin matrices find the space of the largest components
                    (Halko, Martinsson, Tropp 2011, arXiv:0909.4061, with subspace iteration)

Both are compared with scikit-learn on rank 0. Any number of ranks will do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

import fivedp

Array = NDArray[np.float64]
N_COMPONENTS = 10
# A dozen colours that can be told apart, one per digit.
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#555555", "#bcbd22", "#17becf")


def centre(x: Array, n_rows: int, comm: MPI.Intracomm) -> Array:
    """This rank's rows (n_local, d) less the mean of all rows."""
    weights = np.full(len(x), 1 / n_rows)
    mean = fivedp.sharded_matmul(weights, x, "n/p, n/p d -> d", comm)  # a sum over all ranks
    return x - mean


def by_covariance(x: Array, n_rows: int, n_components: int, comm: MPI.Intracomm) -> tuple[Array, Array]:
    """Components (d, c) and the variance along each, largest first; the same on every rank."""
    # X^T X: the two summed indices lie on the ranks, the result is whole everywhere (an all-reduce of d x d).
    covariance = fivedp.sharded_matmul(x, x, "n/p d, n/p e -> d e", comm, alpha=1 / (n_rows - 1))
    variances, vectors = np.linalg.eigh(covariance)  # 64 x 64: every rank does it alone
    largest = np.argsort(variances)[::-1][:n_components]
    return vectors[:, largest], variances[largest]


def by_random_range(
    x: Array, n_rows: int, n_components: int, comm: MPI.Intracomm, *, extra: int = 10, rounds: int = 12
) -> tuple[Array, Array]:
    """The same by products with thin matrices; for a large d, where d x d is too much."""
    rng = np.random.default_rng(0)  # the same directions on every rank
    basis = rng.standard_normal((x.shape[1], n_components + extra))
    for _ in range(rounds):
        basis, _ = np.linalg.qr(basis)
        images = fivedp.sharded_matmul(x, basis, "n/p d, d c -> n/p c", comm)  # no message at all
        basis = fivedp.sharded_matmul(x, images, "n/p d, n/p c -> d c", comm)  # a sum over the ranks
    basis, _ = np.linalg.qr(basis)
    images = fivedp.sharded_matmul(x, basis, "n/p d, d c -> n/p c", comm)
    inner = fivedp.sharded_matmul(images, images, "n/p c, n/p e -> c e", comm, alpha=1 / (n_rows - 1))
    variances, vectors = np.linalg.eigh(inner)
    largest = np.argsort(variances)[::-1][:n_components]
    return basis @ vectors[:, largest], variances[largest]


def draw(points: Array, digits: NDArray[np.int64], path: Path) -> None:
    """An SVG of the first two components, one colour per digit; whole pixels keep the file small."""
    low, high = points.min(axis=0), points.max(axis=0)
    places = np.rint(20 + 440 * (points - low) / (high - low)).astype(int)
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 540 480" font-family="sans-serif" font-size="14">']
    lines.append('<rect width="540" height="480" fill="white"/>')
    for digit, colour in enumerate(COLOURS):
        dots = "".join(f"M{u} {480 - v}h0" for u, v in places[digits == digit])
        lines.append(f'<path d="{dots}" stroke="{colour}" stroke-width="5" stroke-linecap="round" opacity=".6"/>')
        lines.append(f'<text x="500" y="{40 + 24 * digit}" fill="{colour}" font-weight="bold">{digit}</text>')
    path.write_text("\n".join([*lines, "</svg>", ""]))


def main() -> int:
    parser = argparse.ArgumentParser(description="PCA of handwritten digits over MPI ranks.")
    parser.add_argument("--draw", type=Path, metavar="FILE.svg", help="draw the first two components")
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    try:
        from sklearn.datasets import load_digits
        from sklearn.decomposition import PCA
    except ModuleNotFoundError:
        if comm.Get_rank() == 0:
            print("this example needs scikit-learn for its pictures: pip install scikit-learn", file=sys.stderr)
        return 2

    pictures, digits = load_digits(return_X_y=True)
    n_rows = len(pictures)
    x = centre(fivedp.shard(pictures, "n/p d", comm), n_rows, comm)
    results = {
        "covariance": by_covariance(x, n_rows, N_COMPONENTS, comm),
        "random range": by_random_range(x, n_rows, N_COMPONENTS, comm),
    }
    projections = {}
    for name, (components, _) in results.items():
        points = fivedp.sharded_matmul(x, components, "n/p d, d c -> n/p c", comm)  # every rank its own rows
        projections[name] = fivedp.gather(points, "n/p c", comm, root=0)
    # The variance of each pixel: d stands in both operands and in the result, so it is a batch index.
    by_pixel = fivedp.sharded_matmul(x, x, "n/p d, n/p d -> d", comm, alpha=1 / (n_rows - 1))
    if comm.Get_rank() != 0:
        return 0

    right = PCA(N_COMPONENTS, svd_solver="full").fit(pictures)
    print(f"{comm.Get_size()} ranks, {n_rows} pictures, rank 0 holds {len(x)}")
    share = results["covariance"][1] / by_pixel.sum()
    print("share of the variance:", " ".join(f"{100 * s:.1f}%" for s in share[:5]), f"... {100 * share.sum():.1f}%")
    for name, (components, variances) in results.items():
        signs = np.sign(np.sum(components * right.components_.T, axis=0))  # the sign of a component is free
        expected = right.transform(pictures)
        errors = {
            "variances": np.max(np.abs(variances / right.explained_variance_ - 1)),
            "components": np.max(np.abs(components * signs - right.components_.T)),
            "projections": np.max(np.abs(projections[name] * signs - expected)) / np.max(np.abs(expected)),
        }
        print(f"{name:12} against scikit-learn:", ", ".join(f"{what} {e:.1e}" for what, e in errors.items()))
    if options.draw:
        draw(projections["covariance"][:, :2], digits, options.draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
