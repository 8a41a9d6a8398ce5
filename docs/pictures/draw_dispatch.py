"""Tokens of four ranks on their way to eight experts: `docs/pictures/dispatch.svg`.

    python docs/pictures/draw_dispatch.py [folder]

Left the tokens with the experts that they chose, in the middle the rows that an owner needs, each token once, right the
rows by expert and source. Which rows go where, and their order, are asked of the library.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from picture import INK, RANK_COLOURS, folder_of, save

from fivedp.layout.dispatch import Incoming, Outgoing
from fivedp.layout.experts import cut_experts

RANKS, EXPERTS = 4, 8
# Of every rank's three tokens, the two experts.
CHOICES = np.array(
    [
        [[0, 6], [4, 5], [2, 7]],
        [[2, 3], [0, 4], [5, 7]],
        [[1, 4], [3, 6], [0, 5]],
        [[1, 7], [2, 4], [6, 7]],
    ],
    np.int32,
)
SHOWN = (0, 1)  # rank and row of the token that is followed
NAMES = "abcdefghijkl"
BOX, GAP, PITCH = 0.5, 0.08, 1.55
LEFT, MIDDLE, RIGHT = 0.0, 5.0, 9.3


def draw_token(axes: Axes, x: float, y: float, rank: int, row: int) -> None:
    """A token in the colour of its rank."""
    shown = (rank, row) == SHOWN
    axes.add_patch(
        Rectangle(
            (x, y), BOX, BOX, facecolor=RANK_COLOURS[rank], edgecolor=INK if shown else "white",
            linewidth=1.6 if shown else 0.5, zorder=3,
        )
    )  # fmt: skip
    name = NAMES[rank * CHOICES.shape[1] + row]
    weight = "bold" if shown else "normal"
    axes.text(x + BOX / 2, y + BOX / 2, name, ha="center", va="center_baseline", fontsize=9, zorder=4, weight=weight)


def draw_ways(axes: Axes, needs: list[list[list[int]]]) -> None:
    """An arrow from every rank to every owner that needs any of its tokens: `needs[owner][source]` are rows."""
    begin, end = LEFT + 3 * 0.8 + 0.05, MIDDLE - 0.1
    ports = [0.08 + (BOX - 0.16) * i / (RANKS - 1) for i in range(RANKS)]
    for owner in range(RANKS):
        for source in (s for s in range(RANKS) if s != owner and needs[owner][s]):
            shown = source == SHOWN[0] and SHOWN[1] in needs[owner][source]
            start = (begin, -source * PITCH + ports[RANKS - 1 - owner])
            axes.add_patch(
                FancyArrowPatch(
                    start, (end, -owner * PITCH + ports[RANKS - 1 - source]), arrowstyle="-|>", mutation_scale=8,
                    shrinkA=0, shrinkB=0, color=INK if shown else RANK_COLOURS[source], zorder=2 if shown else 1,
                    linewidth=1.6 if shown else 1.1,
                )
            )  # fmt: skip


def draw_home(axes: Axes, rank: int, y: float) -> None:
    """A rank's tokens with their choices."""
    for row, experts in enumerate(CHOICES[rank]):
        x = LEFT + row * 0.8
        draw_token(axes, x, y, rank, row)
        text = ", ".join(map(str, experts))
        axes.text(x + BOX / 2, y + BOX + 0.09, text, ha="center", va="bottom", fontsize=7.5)


def draw_readers(axes: Axes, arrived: float, rows: list[float], y: float) -> None:
    """From the one row that arrived to every row of the table that names it."""
    low = y - 0.22
    axes.plot([arrived, arrived, max(rows)], [y, low, low], color=INK, linewidth=1.2, zorder=1)
    for x in rows:
        axes.add_patch(
            FancyArrowPatch((x, low), (x, y), arrowstyle="-|>", mutation_scale=8, shrinkA=0, shrinkB=0, color=INK)
        )


def main() -> None:
    figure = Figure(figsize=(10, 4.93))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-1.05, 13.75)
    axes.set_ylim(-5.95, 1.25)
    axes.axis("off")
    cut = cut_experts(EXPERTS, RANKS)
    outgoing = [Outgoing(CHOICES[rank], np.ones(CHOICES[rank].shape, np.float32), cut, rank) for rank in range(RANKS)]
    for x, text in (
        (LEFT, "tokens and their experts"),
        (MIDDLE, "what an owner needs: once"),
        (RIGHT, "its rows: by expert, source, token"),
    ):
        axes.text(x, 1.0, text, ha="left", va="center", fontsize=9, fontweight="bold")
    for rank in range(RANKS):
        y = -rank * PITCH
        axes.text(-0.2, y + BOX / 2, f"rank {rank}", ha="right", va="center", fontsize=9)
        draw_home(axes, rank, y)
    draw_ways(axes, [[out.rows[owner].tolist() for out in outgoing] for owner in range(RANKS)])
    for owner in range(RANKS):
        y, x = -owner * PITCH, MIDDLE
        for source in range(RANKS):
            for row in outgoing[source].rows[owner].tolist():
                draw_token(axes, x, y, source, row)
                if (source, row) == SHOWN:
                    arrived = x + BOX / 2
                x += BOX + GAP
        incoming = Incoming([out.pairs[out.of_owner[owner]] for out in outgoing], cut, owner)
        x, first, readers = RIGHT, cut.of(owner)[0], list[float]()
        for local, (begin, end) in enumerate(itertools.pairwise(incoming.offsets.tolist())):
            axes.text(x, y + BOX + 0.09, f"expert {first + local}", ha="left", va="bottom", fontsize=7.5)
            for source, row in zip(incoming.source[begin:end], incoming.token[begin:end], strict=True):
                draw_token(axes, x, y, int(source), int(row))
                if (source, row) == SHOWN:
                    readers.append(x + BOX / 2)
                x += BOX + GAP
            x += 0.3
        if readers:
            draw_readers(axes, arrived, readers, y)
    says = (
        "Token b chose experts 4 and 5, both of rank 2: it goes there once, and both experts read the one row. "
        "Tokens d and l need no other rank.\nThe right column is not a copy but a table of where rows lie, "
        "through which the product reads them: on one node, in the memory of their own rank."
    )
    axes.text(-0.95, -5.5, says, ha="left", va="center", fontsize=8, linespacing=1.4)
    save(figure, folder_of(__file__, sys.argv), "dispatch.svg")


if __name__ == "__main__":
    main()
