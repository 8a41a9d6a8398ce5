"""The tree in which a token's experts are summed: `docs/pictures/combine_tree.svg`.

    python docs/pictures/draw_combine_tree.py [folder]

Above: the tree over eight experts and what is left of it for one token's five. Below: for 1, 2, 4 and 3 ranks, whose
the experts are, which subtrees are added there, and how many rows come back. Cuts and subtrees are asked of the
library.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from picture import INK, RANK_COLOURS, folder_of, save

from fivedp.layout.experts import cut_experts, middle, subtrees

EXPERTS = 8
CHOSEN = (0, 3, 4, 5, 7)
RANKS = (1, 2, 4, 3)
STEP = 0.62  # height of a level of the tree
PALE = "#c4c4c4"


class Node(NamedTuple):
    """A subtree's place, and how many of the chosen experts are in it."""

    x: float
    y: float
    chosen: int


def draw_node(axes: Axes, base: float, begin: int, end: int) -> Node:
    """The tree over [begin, end): black where a sum passes, a plus where two meet."""
    if end - begin == 1:
        return Node(begin + 0.5, base, int(begin in CHOSEN))
    half = middle(begin, end)
    children = [draw_node(axes, base, begin, half), draw_node(axes, base, half, end)]
    chosen = sum(child.chosen for child in children)
    node = Node(sum(child.x for child in children) / 2, max(child.y for child in children) + STEP, chosen)
    for child in sorted(children, key=lambda child: child.chosen):
        axes.plot(
            [child.x, node.x], [child.y, node.y], linewidth=1.4 if child.chosen else 0.8,
            color=INK if child.chosen else PALE, zorder=1 + bool(child.chosen),
        )  # fmt: skip
    if all(child.chosen for child in children):
        axes.add_patch(Circle((node.x, node.y), 0.15, facecolor="white", edgecolor=INK, zorder=3))
        axes.text(node.x, node.y - 0.01, "+", ha="center", va="center", fontsize=10, zorder=4)
    return node


def expression(begin: int, end: int) -> str:
    """The sum over [begin, end) with its brackets; empty where the token has no expert there."""
    if end - begin == 1:
        return f"f{begin}" if begin in CHOSEN else ""
    half = middle(begin, end)
    parts = [part for part in (expression(begin, half), expression(half, end)) if part]
    return " + ".join(f"({part})" if "+" in part and len(parts) == 2 else part for part in parts)


def draw_cut(axes: Axes, top: float, n_ranks: int) -> None:
    """Experts by owner, and the subtrees in which an owner adds."""
    cut = cut_experts(EXPERTS, n_ranks)
    axes.text(-0.2, top - 0.2, f"{n_ranks} rank{'s' * (n_ranks > 1)}", ha="right", va="center", fontsize=9)
    back = 0
    for rank in range(n_ranks):
        for begin, end in subtrees(EXPERTS, cut.of(rank)):
            mine = expression(begin, end)
            colour = RANK_COLOURS[rank]
            axes.add_patch(
                Rectangle(
                    (begin + 0.04, top - 0.4), end - begin - 0.08, 0.4, edgecolor=colour, linewidth=1,
                    facecolor=colour if mine else "white",
                )
            )  # fmt: skip
            text = f"rank {rank}: {mine or 'nothing'}" if end - begin > 1 else f"{rank}: {mine or '–'}"
            axes.text((begin + end) / 2, top - 0.21, text, ha="center", va="center", fontsize=8)
            back += bool(mine) and rank > 0
    axes.text(EXPERTS + 0.2, top - 0.2, f"{back}", ha="left", va="center", fontsize=9)


def main() -> None:
    figure = Figure(figsize=(8.6, 4.95))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-1.35, 9.95)
    axes.set_ylim(-3.85, 2.75)
    axes.axis("off")
    root = draw_node(axes, 0.3, 0, EXPERTS)
    axes.plot([root.x, root.x], [root.y + 0.15, root.y + 0.4], color=INK, linewidth=1.4, zorder=1)
    axes.text(
        root.x + 0.15, root.y + 0.36, f"y of the token: {expression(0, EXPERTS)}", ha="left", va="center", fontsize=9
    )
    for expert in range(EXPERTS):
        chosen = expert in CHOSEN
        axes.add_patch(
            Rectangle(
                (expert + 0.1, -0.1), 0.8, 0.4, zorder=3, linewidth=1.2 if chosen else 0.8,
                facecolor="white" if chosen else "#f4f4f4", edgecolor=INK if chosen else PALE,
            )
        )  # fmt: skip
        colour = INK if chosen else "#888888"
        axes.text(expert + 0.5, 0.09, f"e{expert}", ha="center", va="center", fontsize=9, color=colour, zorder=4)
    axes.text(-0.2, 0.1, "experts", ha="right", va="center", fontsize=9)
    axes.text(EXPERTS + 0.2, -0.5, "rows to rank 0", ha="left", va="center", fontsize=8)
    for line, n_ranks in enumerate(RANKS):
        draw_cut(axes, -0.72 - 0.6 * line, n_ranks)
    says = (
        "The token is at home on rank 0 and has experts 0, 3, 4, 5 and 7; fe is what expert e makes of it, weighted. A "
        "bar is a\nsubtree: its owner adds what is in it and sends one row. Rank 0 adds the rest of the tree, so every "
        "line gives the same\nbits. Of three ranks, rank 1 sends two rows, for the tree does not add f3 to f4."
    )
    axes.text(-1.2, -3.4, says, ha="left", va="center", fontsize=8, linespacing=1.4)
    save(figure, folder_of(__file__, sys.argv), "combine_tree.svg")


if __name__ == "__main__":
    main()
