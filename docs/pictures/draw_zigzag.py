"""Who computes what of a causal attention on four ranks, and how much: `docs/pictures/zigzag.svg`.

    python docs/pictures/draw_zigzag.py [folder]

The triangle of visible pairs under every layout, coloured by the rank of the query, and each rank's part of all pairs.
The tokens of a rank are asked of the library and the pairs counted.
"""

from __future__ import annotations

import sys

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from picture import INK, RANK_COLOURS, folder_of, save

from fivedp.layout.sequence import token_indices

RANKS, DRAWN, COUNTED = 4, 16, 8192
LAYOUTS = ("contiguous", "striped", "zigzag")
SIDE, BAR = 2.6, 2.6


def draw_triangle(axes: Axes, left: float, top: float, layout: str) -> None:
    """Queries downwards, keys to the right: query i sees keys 0 to i. Beside each query its rank."""
    unit = SIDE / DRAWN
    for rank in range(RANKS):
        for i in token_indices(layout, DRAWN, RANKS, rank).tolist():
            y = top - i * unit
            axes.add_patch(
                Rectangle(
                    (left, y - unit),
                    (i + 1) * unit,
                    unit,
                    facecolor=RANK_COLOURS[rank],
                    edgecolor="white",
                    linewidth=0.4,
                )
            )
            axes.text(left - 0.06, y - unit / 2, str(rank), ha="right", va="center_baseline", fontsize=7)
    corners = [(left, top), (left + SIDE, top), (left + SIDE, top - SIDE), (left, top - SIDE)]
    axes.add_patch(Polygon(corners, closed=True, fill=False, edgecolor=INK, linewidth=0.8))


def draw_bars(axes: Axes, left: float, top: float, layout: str) -> None:
    """The pairs that each rank computes, against an equal part (the line)."""
    pairs = [int((token_indices(layout, COUNTED, RANKS, rank) + 1).sum()) for rank in range(RANKS)]
    whole, widest = sum(pairs), 0.46  # a bar of this part of all pairs is as wide as the triangle
    assert whole == COUNTED * (COUNTED + 1) // 2
    for rank, count in enumerate(pairs):
        y, width = top - 0.36 * rank, BAR * count / whole / widest
        axes.add_patch(Rectangle((left, y - 0.28), width, 0.28, facecolor=RANK_COLOURS[rank], edgecolor="none"))
        axes.text(left - 0.06, y - 0.14, str(rank), ha="right", va="center_baseline", fontsize=8)
        text = f"{100 * count / whole:.2f}%"
        if width > 0.8:
            axes.text(left + 0.08, y - 0.14, text, ha="left", va="center_baseline", fontsize=8)
        else:
            axes.text(left + width + 0.08, y - 0.14, text, ha="left", va="center_baseline", fontsize=8)
    equal = left + BAR / RANKS / widest
    axes.plot([equal, equal], [top + 0.06, top - 0.36 * RANKS + 0.02], color=INK, linewidth=1, linestyle="--")
    busiest = max(pairs) * RANKS / whole
    axes.text(
        left,
        top - 0.36 * RANKS - 0.06,
        f"the busiest rank: {busiest:.2f} of an equal part",
        ha="left",
        va="top",
        fontsize=8,
    )


def main() -> None:
    figure = Figure(figsize=(10, 5.53))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.35, 10.05)
    axes.set_ylim(-5.3, 0.45)
    axes.set_aspect("equal")
    axes.axis("off")
    for number, layout in enumerate(LAYOUTS):
        left = 0.15 + 3.4 * number
        axes.text(left, 0.1, layout, ha="left", va="bottom", fontsize=10, fontweight="bold")
        draw_triangle(axes, left, 0.0, layout)
        text = f"part of all pairs at {COUNTED:,} tokens"
        axes.text(left, -SIDE - 0.34, text, ha="left", va="center", fontsize=8)
        draw_bars(axes, left, -SIDE - 0.58, layout)
    says = "A row is a query, its rank beside it; coloured are the keys that it sees. Dashed: an equal part for each."
    axes.text(-0.1, -5.08, says, ha="left", va="center", fontsize=8)
    save(figure, folder_of(__file__, sys.argv), "zigzag.svg")


if __name__ == "__main__":
    main()
