"""Bricks of the iteration space on four and eight ranks: `docs/pictures/bricks.svg`.

    python docs/pictures/draw_bricks.py [folder]

A product is a cube of m x n x k multiplications. A schedule assigns each mesh axis to one of the three directions; the
cube falls into one brick per rank. The bricks are asked of the planner: every cube is the cheapest schedule of a spec.
"""

from __future__ import annotations

import sys

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from picture import INK, RANK_COLOURS, folder_of, save

from fivedp.layout.explain import plan_for
from fivedp.layout.plan import Plan

CUBES: tuple[tuple[str, str, dict[str, int], dict[str, int]], ...] = (
    ("column parallel", "m k, k n/tp -> m n/tp", {"m": 64, "k": 64, "n": 64}, {"tp": 4}),
    ("row parallel", "m k/tp, k/tp n -> m n", {"m": 64, "k": 256, "n": 64}, {"tp": 4}),
    ("SUMMA, C stays", "m/r k/c, k/r n/c -> m/r n/c", {"m": 64, "k": 64, "n": 64}, {"r": 2, "c": 2}),
    ("the same spec, B stays", "m/r k/c, k/r n/c -> m/r n/c", {"m": 8, "k": 256, "n": 256}, {"r": 2, "c": 2}),
    ("2.5-D", "m/r k/c*d, k/r*d n/c -> m/r n/c", {"m": 64, "k": 64, "n": 64}, {"r": 2, "c": 2, "d": 2}),
)
# Where the directions m, n and k point on paper; m down, n right, k to the back.
M, N, K = np.array([0.0, -1.0]), np.array([1.0, 0.0]), np.array([0.42, 0.36])


def shade(colour: str, factor: float) -> tuple[float, ...]:
    """The colour, darker."""
    return tuple(factor * int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def draw_cube(axes: Axes, corner: np.ndarray, plan: Plan) -> None:
    """The bricks of all ranks, from the back to the front; only faces that look forward."""
    bricks = []
    for rank in range(plan.family.n_ranks):
        brick = plan.brick(rank)
        bricks.append((rank, [[edge / plan.sizes[name] for edge in brick[name]] for name in ("m", "n", "k")]))
    # Far k first; then low rows before the rows above them, whose top face is seen; left before right.
    bricks.sort(key=lambda entry: (-entry[1][2][0], -entry[1][0][0], entry[1][1][0]))
    for rank, (m, n, k) in bricks:

        def at(i: float, j: float, l: float) -> np.ndarray:  # noqa: E741
            return corner + i * M + j * N + l * K

        faces = (
            ([at(m[0], n[0], k[0]), at(m[0], n[1], k[0]), at(m[0], n[1], k[1]), at(m[0], n[0], k[1])], 1.0),
            ([at(m[0], n[1], k[0]), at(m[1], n[1], k[0]), at(m[1], n[1], k[1]), at(m[0], n[1], k[1])], 0.78),
            ([at(m[0], n[0], k[0]), at(m[0], n[1], k[0]), at(m[1], n[1], k[0]), at(m[1], n[0], k[0])], 0.92),
        )
        for points, factor in faces:
            colour = shade(RANK_COLOURS[rank], factor)
            axes.add_patch(Polygon(points, closed=True, facecolor=colour, edgecolor="white", linewidth=1))
        middle = at(m[0], (n[0] + n[1]) / 2, (k[0] + k[1]) / 2) if m[0] == 0 else None
        front = at((m[0] + m[1]) / 2, (n[0] + n[1]) / 2, k[0]) if k[0] == 0 else None
        place = front if front is not None else middle
        if place is not None:
            axes.text(*place, str(rank), ha="center", va="center", fontsize=8)


def main() -> None:
    figure = Figure(figsize=(10, 2.7))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 10)
    axes.set_ylim(-1.85, 0.85)
    axes.set_aspect("equal")
    axes.axis("off")
    for number, (name, spec, sizes, ranks) in enumerate(CUBES):
        plan = plan_for(spec, sizes, ranks)
        corner = np.array([0.45 + 1.95 * number, 0.0])
        draw_cube(axes, corner, plan)
        axes.text(*(corner + 0.5 * M - 0.08 * N), "m", ha="right", va="center", fontsize=8)
        axes.text(*(corner + 1.06 * M + 0.5 * N), "n", ha="center", va="top", fontsize=8)
        axes.text(*(corner + 0.5 * K - 0.06 * N), "k", ha="right", va="bottom", fontsize=8)
        axes.text(*(corner + [0.6, -1.35]), name, ha="center", va="top", fontsize=9, fontweight="bold")
        axes.text(*(corner + [0.6, -1.57]), f"computes {plan.assignment}", ha="center", va="top", fontsize=7, color=INK)
    save(figure, folder_of(__file__, sys.argv), "bricks.svg")


if __name__ == "__main__":
    main()
