"""How nine specs cut A, B and C on four ranks, and what moves: `docs/pictures/layouts.svg`.

    python docs/pictures/draw_layouts.py [folder]

Shares and bytes are asked of the library, not drawn by hand. A block carries the numbers of the ranks that hold it.
"""

from __future__ import annotations

import math
import sys

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from picture import INK, RANK_COLOURS, SHARED, folder_of, save

from fivedp.layout.explain import plan_for
from fivedp.layout.plan import Plan
from fivedp.layout.shares import Box

SIZE = 64
SPECS: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("m k, k n/tp -> m n/tp", "column parallel", {"tp": 4}),
    ("m k, k n/tp -> m n", "column parallel, gathered", {"tp": 4}),
    ("m k/tp, k/tp n -> m n", "row parallel", {"tp": 4}),
    ("m k/tp, k/tp n -> m/tp n", "row + sequence parallel", {"tp": 4}),
    ("m/tp k, k n/tp -> m n/tp", "sequence-parallel column", {"tp": 4}),
    ("m/p k, k/p n -> m/p n", "1-D block rows", {"p": 4}),
    ("m/r k/c, k/r n/c -> m/r n/c", "SUMMA", {"r": 2, "c": 2}),
    ("m/r k/c*d, k/r*d n/c -> m/r n/c", "2.5-D", {"r": 2, "c": 1, "d": 2}),
    ("b/dp m k, k n/tp -> b/dp m n/tp", "batched", {"dp": 2, "tp": 2}),
)


def draw_matrix(axes: Axes, left: float, top: float, plan: Plan, tensor: str) -> None:
    """One matrix as a unit square; a batch of two stands as two halves, one over the other."""
    holders: dict[Box, list[int]] = {}
    for rank in range(plan.family.n_ranks):
        holders.setdefault(plan.owned(tensor, rank), []).append(rank)
    layout = plan.family.layouts[tensor]
    sizes = [plan.sizes[name] for name in layout.names]
    batches = sizes[0] if len(sizes) == 3 else 1
    for box, ranks in holders.items():
        for batch in range(*box[0]) if len(sizes) == 3 else [0]:
            (y0, y1), (x0, x1) = box[-2:]
            height = 1 / batches
            x, y = left + x0 / sizes[-1], top - batch * height - y1 / sizes[-2] * height
            w, h = (x1 - x0) / sizes[-1], (y1 - y0) / sizes[-2] * height
            colour = RANK_COLOURS[ranks[0]] if len(ranks) == 1 else SHARED
            axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor="white", linewidth=1.5))
            text = " ".join(map(str, ranks))
            size = 9 if min(w, h) > 0.2 and w > 0.1 * len(text) else 7
            axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size)
    axes.add_patch(Rectangle((left, top - 1), 1, 1, fill=False, edgecolor=INK, linewidth=0.8))
    axes.text(left + 0.5, top + 0.08, f"{tensor}: {layout}", ha="center", va="bottom", fontsize=8)


def moved(plan: Plan) -> str:
    """What travels, in elements sent per rank as a fraction of one whole matrix."""
    whole = {t: math.prod(plan.sizes[n] for n in plan.family.layouts[t].names) for t in "ABC"}
    parts = []
    for tensor, n_bytes in zip("ABC", (plan.bytes_a, plan.bytes_b, plan.bytes_c), strict=True):
        if n_bytes:
            parts.append(f"{n_bytes / 4 / plan.family.n_ranks / whole[tensor]:.3g} {tensor}")
    return "each rank sends " + " + ".join(parts) if parts else "nothing moves"


def main() -> None:
    figure = Figure(figsize=(10, 8.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 13.2)
    axes.set_ylim(-1.6, 6.9)
    axes.set_aspect("equal")
    axes.axis("off")
    for number, (spec, name, ranks) in enumerate(SPECS):
        row, column = divmod(number, 3)
        left, top = 0.25 + 4.4 * column, 6.0 - 2.6 * row
        sizes = dict.fromkeys("mkn", SIZE) | {"b": 2}
        plan = plan_for(spec, sizes, ranks)
        axes.text(left, top + 0.5, name, ha="left", va="bottom", fontsize=10, fontweight="bold")
        for place, tensor in enumerate("ABC"):
            draw_matrix(axes, left + 1.32 * place, top, plan, tensor)
        shape = " ".join(f"{axis}={size}" for axis, size in ranks.items())
        axes.text(left, top - 1.12, f"{shape}: {moved(plan)}", ha="left", va="top", fontsize=8)
    save(figure, folder_of(__file__, sys.argv), "layouts.svg")


if __name__ == "__main__":
    main()
