"""What the pictures have in common: colours of ranks, and SVG files that are small and the same on every run.

Text stays text (no glyphs as paths), names of elements come from a fixed salt, and no date is written.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

# Colours that differ in brightness too (after Okabe and Ito), one per rank.
RANK_COLOURS = ("#f0b547", "#7cc4e8", "#5fc09b", "#e58f8f", "#b9a6dd", "#d9d36a", "#8fa7c9", "#d8a0c0")
SHARED = "#e4e4e4"
INK = "#222222"

mpl.use("Agg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fivedp", "font.family": "sans-serif", "text.color": INK})


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write `figure` as `folder/name` on white, for pages of any background."""
    figure.savefig(folder / name, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})


def folder_of(script: str, arguments: list[str]) -> Path:
    """Where a script writes: its own folder, or the one given."""
    return Path(arguments[1]) if len(arguments) > 1 else Path(script).resolve().parent
