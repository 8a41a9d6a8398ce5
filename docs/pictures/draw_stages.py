"""The stages of one rank: `docs/pictures/stages.svg`.

    python docs/pictures/draw_stages.py [folder]

Taken from the library's schedules: rank 1 of four, for a product whose A arrives in panels and for one whose partial
sums leave in tiles. A box is what happens in a stage; its width is not time.
"""

from __future__ import annotations

import sys

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from picture import RANK_COLOURS, SHARED, folder_of, save

from fivedp.layout.explain import plan_for
from fivedp.layout.schedule import Schedule

CASES = (
    ("A all-gathered", "m/tp k, k n/tp -> m n/tp", {"m": 2048, "k": 4096, "n": 14336}),
    ("C reduce-scattered", "m k/tp, k/tp n -> m/tp n", {"m": 1024, "k": 4096, "n": 1024}),
)
RANK, RANKS, MOST = 1, {"tp": 4}, 8
LANES = ("receive for the next tile", "multiply", "send partial sums", "add partial sums")


def box(axes: Axes, stage: float, lane: int, top: float, text: str, colour: str) -> None:
    """One thing that happens in a stage."""
    axes.add_patch(Rectangle((stage + 0.04, top - lane - 0.8), 0.92, 0.7, facecolor=colour, edgecolor="white"))
    axes.text(stage + 0.5, top - lane - 0.45, text, ha="center", va="center", fontsize=7)


def draw(axes: Axes, top: float, name: str, spec: str, sizes: dict[str, int]) -> None:
    """The first stages of one schedule."""
    plan = plan_for(spec, sizes, RANKS)
    schedule = Schedule(plan, RANK)
    shown = min(MOST, schedule.n_stages)
    title = f"{name}: {spec}, rank {RANK} of 4, stages 0 to {shown - 1} of {schedule.n_stages}"
    axes.text(-2.6, top + 0.12, title, ha="left", va="bottom", fontsize=9, fontweight="bold")
    used = [1] + ([0] if plan.moves("A") or plan.moves("B") else []) + ([2, 3] if plan.moves("C") else [])
    rows = {lane: place for place, lane in enumerate(sorted(used))}
    for lane, place in rows.items():
        axes.text(-0.1, top - place - 0.45, LANES[lane], ha="right", va="center", fontsize=8)
    for tensor, parts in schedule.panel_parts.items():
        for panel, sources in zip(schedule.tiling.panels[tensor], parts, strict=True):
            others = [source for source, _ in sources if source != RANK]
            if others and panel.first <= shown:
                text = f"{tensor} of rank {others[0]}"
                box(axes, panel.first - 1, rows[0], top, text, RANK_COLOURS[others[0]])
    for stage in range(shown):
        box(axes, stage, rows[1], top, f"tile {stage}", SHARED)
        if 2 in rows:
            peers = sorted({message.peer for message in schedule.result_sends[stage]})
            if peers:
                colour = RANK_COLOURS[peers[0]] if len(peers) == 1 else SHARED
                box(axes, stage + 0.5, rows[2], top, "to rank " + ",".join(map(str, peers)), colour)
            if schedule.result_receives[stage]:
                box(axes, stage + 1, rows[3], top, f"tile {stage} into C", RANK_COLOURS[RANK])


def main() -> None:
    figure = Figure(figsize=(10, 3.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-2.8, MOST + 1.3)
    axes.set_ylim(-6.3, 0.6)
    axes.axis("off")
    draw(axes, 0.0, *CASES[0])
    draw(axes, -3.0, *CASES[1])
    save(figure, folder_of(__file__, sys.argv), "stages.svg")


if __name__ == "__main__":
    main()
