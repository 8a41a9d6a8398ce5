"""The steps of ring attention on four ranks: `docs/pictures/ring.svg`.

    python docs/pictures/draw_ring.py [folder]

For the zigzag and the contiguous layout under a causal mask: who reads whose keys in which step, how much of them is
sent, which pairs the mask leaves, and which keys the state of a rank's queries then holds. Tokens, and the range of a
block that a rank sees, are asked of the library.
"""

from __future__ import annotations

import sys

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle
from picture import INK, RANK_COLOURS, folder_of, save

from fivedp.layout.sequence import Span, Tokens, place, seen_spans, token_indices

RANKS, LENGTH = 4, 48
LAYOUTS = (
    ("zigzag", "later ranks get half of a block, and every square is half work"),
    ("contiguous", "half of the blocks are not sent, and work is uneven"),
)
CELL, STEP_WIDTH, ROW_HEIGHT = 0.98, 1.3, 1.5
UNSENT = "#999999"


def draw_senders(axes: Axes, left: float, top: float, step: int, spans: tuple[tuple[Span, ...], ...]) -> None:
    """The ranks in a circle, an arrow from the owner of a block to each rank that reads it: dashed for half of one."""
    middle, radius = np.array([left + CELL / 2, top - 0.62]), 0.42
    turns = [np.pi * (3 / 4 - rank / 2) for rank in range(RANKS)]
    places = [middle + radius * np.array([np.cos(turn), np.sin(turn)]) for turn in turns]
    for reader in range(RANKS):
        owner = (reader - step) % RANKS
        begin, end = spans[reader][owner]
        if step and begin < end:
            bend = 0.0 if step != 2 else 0.28  # two arrows between opposite ranks
            axes.add_patch(
                FancyArrowPatch(
                    tuple(places[owner]), tuple(places[reader]), connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>",
                    mutation_scale=8, shrinkA=8, shrinkB=8, color=INK, linewidth=1,
                    linestyle="-" if end - begin == LENGTH // RANKS else (0, (2.2, 1.4)),
                )
            )  # fmt: skip
    for rank, at in enumerate(places):
        axes.add_patch(Circle(tuple(at), 0.15, facecolor=RANK_COLOURS[rank], edgecolor="white", linewidth=1, zorder=3))
        axes.text(*at, str(rank), ha="center", va="center_baseline", fontsize=8, zorder=4)


def draw_pairs(axes: Axes, left: float, top: float, queries: Tokens, keys: Tokens, span: Span, source: int) -> None:
    """A square of pairs, queries downwards and keys to the right; filled where the query sees the key, dotted where
    the keys are not sent."""
    height, width = CELL / len(queries), CELL / len(keys)
    runs: list[list[int]] = []  # first key, end, first query, end: rows that see the same keys are one box
    for row, query in enumerate(queries.position):
        seen = np.concatenate([[0], keys.position <= query, [0]]).astype(np.int8)
        for begin, end in np.flatnonzero(np.diff(seen)).reshape(-1, 2).tolist():
            if runs and runs[-1][:2] == [begin, end] and runs[-1][3] == row:
                runs[-1][3] += 1
            else:
                runs.append([begin, end, row, row + 1])
    boxes = []
    for begin, end, first, last in runs:
        x0, x1, y0, y1 = left + begin * width, left + end * width, top - first * height, top - last * height
        boxes.append([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    colour = RANK_COLOURS[source]
    axes.add_collection(PolyCollection(boxes, facecolor=colour, edgecolor=colour, linewidth=0.4))
    begin, end = left + span[0] * width, left + span[1] * width
    draw_unsent(axes, left, begin, top)
    draw_unsent(axes, end, left + CELL, top)
    axes.add_patch(Rectangle((begin, top - CELL), end - begin, CELL, fill=False, edgecolor=INK, linewidth=0.8))
    axes.text(left + 0.06, top - CELL + 0.06, f"block {source}", ha="left", va="bottom", fontsize=6.5)


def draw_unsent(axes: Axes, begin: float, end: float, top: float) -> None:
    """Keys that are not sent."""
    if begin < end:
        axes.add_patch(
            Rectangle(
                (begin, top - CELL), end - begin, CELL, fill=False, edgecolor=UNSENT, linewidth=0.8, linestyle=":"
            )
        )
        axes.text((begin + end) / 2, top - CELL / 2, "not\nsent", ha="center", va="center", fontsize=8, color="#666666")


def draw_state(axes: Axes, left: float, top: float, held: dict[int, Span]) -> None:
    """A slot for the keys of every rank, filled as far as the state holds them."""
    width = CELL / RANKS
    for rank in range(RANKS):
        slot = (left + rank * width, top - 0.17)
        if rank in held:
            begin, end = (left + (rank + x * RANKS / LENGTH) * width for x in held[rank])
            colour, middle = RANK_COLOURS[rank], (begin + end) / 2
            axes.add_patch(Rectangle((begin, slot[1]), end - begin, 0.17, facecolor=colour, edgecolor="none"))
        axes.add_patch(Rectangle(slot, width, 0.17, fill=False, edgecolor=INK, linewidth=0.5))
        if rank in held:
            axes.text(middle, top - 0.085, str(rank), ha="center", va="center_baseline", fontsize=6.5)


def draw_layout(axes: Axes, left: float, layout: str, says: str) -> None:
    """All steps of all ranks under one layout."""
    tokens = tuple(place(token_indices(layout, LENGTH, RANKS, rank), None) for rank in range(RANKS))
    spans = seen_spans(tokens, tokens, causal=True, window=0)
    axes.text(left, 0.5, f"{layout}, causal", ha="left", va="bottom", fontsize=10, fontweight="bold")
    axes.text(left, 0.42, says, ha="left", va="top", fontsize=8)
    for step in range(RANKS):
        x = left + step * STEP_WIDTH
        axes.text(x + CELL / 2, 0.0, f"step {step}", ha="center", va="bottom", fontsize=9)
        draw_senders(axes, x, 0.05, step, spans)
    for rank in range(RANKS):
        top, held = -1.35 - ROW_HEIGHT * rank, dict[int, Span]()
        for step in range(RANKS):
            x, source = left + step * STEP_WIDTH, (rank - step) % RANKS
            span = spans[rank][source]
            if span == (0, 0):
                draw_unsent(axes, x, x + CELL, top)
                continue
            held[source] = span
            draw_pairs(axes, x, top, tokens[rank], tokens[source], span, source)
            draw_state(axes, x, top - CELL - 0.08, held)


def main() -> None:
    figure = Figure(figsize=(10, 7.15))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-1.15, 11.1)
    axes.set_ylim(-7.8, 0.95)
    axes.set_aspect("equal")
    axes.axis("off")
    for number, (layout, says) in enumerate(LAYOUTS):
        draw_layout(axes, 0.25 + 5.75 * number, layout, says)
    axes.text(-1.0, -0.57, "owner to\nreader", ha="left", va="center", fontsize=8)
    for rank in range(RANKS):
        top = -1.35 - ROW_HEIGHT * rank
        axes.text(-1.0, top - CELL / 2, f"queries\nof rank {rank}", ha="left", va="center", fontsize=8)
        axes.text(-1.0, top - CELL - 0.16, "keys in (m, l, O)", ha="left", va="center", fontsize=8)
    says = (
        "A square is the pairs of a step, queries downwards and keys to the right; filled where they are computed.\n"
        "An arrow is a block from its owner to a reader, dashed where it is half a block: read in place on one node, a "
        "message between nodes."
    )
    axes.text(-1.0, -7.45, says, ha="left", va="center", fontsize=8, linespacing=1.4)
    save(figure, folder_of(__file__, sys.argv), "ring.svg")


if __name__ == "__main__":
    main()
