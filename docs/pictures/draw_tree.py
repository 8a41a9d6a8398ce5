"""Eight virtual shards of k and the tree that adds them: `docs/pictures/tree.svg`.

    python docs/pictures/draw_tree.py [folder]

Below the tree: which shards the ranks compute when k is cut for 1, 2, 4 and 8 ranks, and for 3 under "canonical", and
the partial sums they send. Every bar is a subtree, so every cut adds the same numbers in the same order.
"""

from __future__ import annotations

import sys

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from picture import INK, RANK_COLOURS, folder_of, save

from fivedp.layout.plan import VIRTUAL_SHARDS, leaf_cut, subtrees

CUTS = ((1, "tree"), (2, "tree"), (4, "tree"), (8, "tree"), (3, "canonical"))


def draw_tree(axes: Axes, base: float) -> None:
    """The binary tree over the shards, its root on top."""
    places = [i + 0.5 for i in range(VIRTUAL_SHARDS)]
    height = base
    while len(places) > 1:
        above = [(x + y) / 2 for x, y in zip(places[::2], places[1::2], strict=True)]
        for i, x in enumerate(places):
            axes.plot([x, above[i // 2]], [height, height + 0.75], color=INK, linewidth=1, zorder=1)
        for x in above:
            axes.add_patch(Circle((x, height + 0.75), 0.16, facecolor="white", edgecolor=INK, zorder=2))
            axes.text(x, height + 0.74, "+", ha="center", va="center", fontsize=10, zorder=3)
        places, height = above, height + 0.75
    axes.text(places[0] + 0.3, height, "element of C", ha="left", va="center", fontsize=9)


def main() -> None:
    figure = Figure(figsize=(8, 4.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-2.6, 8.3)
    axes.set_ylim(-3.7, 3.2)
    axes.axis("off")
    draw_tree(axes, 0.3)
    for shard in range(VIRTUAL_SHARDS):
        axes.add_patch(Rectangle((shard + 0.04, -0.1), 0.92, 0.4, facecolor="#f4f4f4", edgecolor=INK, linewidth=0.8))
        axes.text(shard + 0.5, 0.1, f"s{shard}", ha="center", va="center", fontsize=9)
    axes.text(-0.2, 0.1, "shards of k", ha="right", va="center", fontsize=9)
    for line, (parts, order) in enumerate(CUTS):
        y = -0.75 - 0.6 * line
        label = f"{parts} rank{'s' * (parts > 1)}" + (f", {order}" if order != "tree" else "")
        axes.text(-0.2, y + 0.2, label, ha="right", va="center", fontsize=9)
        cut = leaf_cut(parts, order)
        for rank in range(parts):
            for first, count in subtrees(cut.first[rank], cut.first[rank + 1]):
                colour = RANK_COLOURS[rank]
                axes.add_patch(Rectangle((first + 0.04, y), count - 0.08, 0.4, facecolor=colour, edgecolor="none"))
                axes.text(first + count / 2, y + 0.2, f"rank {rank}", ha="center", va="center", fontsize=8)
    save(figure, folder_of(__file__, sys.argv), "tree.svg")


if __name__ == "__main__":
    main()
