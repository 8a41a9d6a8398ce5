"""Pictures of results, drawn from their files only.

python bench/plot.py share result.json --out share.svg        share of the measured peak, by spec or way, and type
python bench/plot.py bytes result.json --out bytes.svg        bytes sent beside the least, by spec
python bench/plot.py ranks r1.json r2.json --out ranks.svg    speed of each spec against the number of ranks
python bench/plot.py peers peers.json --out peers.svg         how many times as fast as each peer, with the spread
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

Result = dict[str, Any]
COLOURS = {
    "float32": "#3465a4",
    "bfloat16": "#c17d11",
    "float64": "#4e9a06",
    "complex64": "#75507b",
    "complex128": "#555753",
}


def measured(result: Result, label: str = "square") -> list[dict[str, Any]]:
    """The forward rows that ran and were right: products with `label`, or what else was measured where none was."""
    rows = [r for r in result["rows"] if not r.get("skipped") and not r["wrong"] and not r["backward"]]
    products = [r for r in rows if r["kernel"] == "gemm"]
    if products or not rows:
        return [r for r in products if r["label"] == label]
    return [r | {"known_as": _name(r)} for r in rows]


def _name(row: dict[str, Any]) -> str:
    """What an attention or a mixture of experts is called in a picture."""
    if "mask" in row:
        return f"{row['label']}, {row['mask']}: {row['known_as']}"
    return f"{row['label']}, {row['workload']}"


def largest(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """For each (known_as, dtype), the row with the most work."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["known_as"], row["dtype"])
        if key not in best or row["flops"] > best[key]["flops"]:
            best[key] = row
    return best


def about(result: Result) -> str:
    """One line on what was measured, for a caption."""
    machine = result["machine"]
    mpi = machine["mpi"]
    return (
        f"{machine['cpu']['model']} ({machine['isa']}), {machine['ranks']} ranks x {machine['threads']} thread(s) on "
        f"{machine['cores']} cores, {mpi['name']} {mpi['version']}, {result['when']}"
    )


def share(results: list[Result]) -> Any:
    """Bars of the share of the measured peak."""
    result = results[0]
    best = largest(measured(result))
    specs = list(dict.fromkeys(name for name, _ in best))
    dtypes = list(dict.fromkeys(dtype for _, dtype in best))
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(specs) * max(1, len(dtypes)) / 1.5 + 1.5))
    height = 0.8 / len(dtypes)
    for i, dtype in enumerate(dtypes):
        places = [s + i * height for s, name in enumerate(specs) if (name, dtype) in best]
        values = [100 * best[name, dtype]["share_of_peak"] for name in specs if (name, dtype) in best]
        ceiling = result["ceiling"]["flops"][dtype]["all"] / 1e9
        axes.barh(places, values, height, color=COLOURS[dtype], label=f"{dtype}, 100% = {ceiling:.0f} GFLOP/s")
    axes.set_yticks([s + 0.4 - height / 2 for s in range(len(specs))], specs)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the measured peak")
    axes.legend(frameon=False)
    axes.set_title(about(result), fontsize=8)
    return figure


def bytes_sent(results: list[Result]) -> Any:
    """Points for bytes counted, ticks for the least."""
    result = results[0]
    best = largest(measured(result))
    names = [f"{name}, {dtype}" for name, dtype in best]
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(names) + 1.5))
    counted = [row["bytes"]["counted"] / result["machine"]["ranks"] / 1e6 for row in best.values()]
    bound = [row["bytes"]["bound"] / result["machine"]["ranks"] / 1e6 for row in best.values()]
    places = range(len(names))
    axes.scatter(bound, places, marker="|", s=220, color="black", label="least")
    axes.scatter(counted, places, color="#3465a4", label="counted")
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.set_xlabel("MB sent by a rank")
    axes.legend(frameon=False)
    axes.set_title(about(result), fontsize=8)
    return figure


def ranks(results: list[Result]) -> Any:
    """Lines of GFLOP/s against ranks, float32: the products that every result has."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    speeds = [
        {(row["known_as"], row["shape"]): row for row in measured(r) if row["dtype"] == "float32"} for r in results
    ]
    common = set.intersection(*(set(rows) for rows in speeds))
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, shape in sorted(common):
        lines[f"{name}, {shape}"] = [
            (r["machine"]["ranks"], rows[name, shape]["gflops"]) for r, rows in zip(results, speeds, strict=True)
        ]
    for name, points in lines.items():
        points.sort()
        axes.plot([p for p, _ in points], [g for _, g in points], marker="o", label=name)
    counts = sorted({r["machine"]["ranks"] for r in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(c) for c in counts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"ranks on {results[0]['machine']['cores']} cores")
    axes.set_ylabel("GFLOP/s, float32")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(about(results[0]), fontsize=8)
    return figure


def peers(results: list[Result]) -> Any:
    """Ratios with their spread, one line per contest and peer; right of 1 we are faster."""
    lines = [
        (f"{contest['title']}: {entry['program']}", entry)
        for result in results
        for contest in result["contests"]
        for entry in contest["entries"]
        if "ratio" in entry
    ]
    figure, axes = plt.subplots(figsize=(8, 0.22 * len(lines) + 1.2))
    for place, (_, entry) in enumerate(lines):
        low, high = entry["spread"]
        axes.plot([low, high], [place, place], color="#888a85", linewidth=1)
        aim = entry["wanted"]
        colour = "#555753" if aim is None else "#4e9a06" if entry["ratio"] >= aim else "#cc0000"
        axes.scatter([entry["ratio"]], [place], color=colour, zorder=2, s=16)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.set_xlabel("times as fast as the peer (green: aim reached, red: short of it)")
    return figure


KINDS = {"share": share, "bytes": bytes_sent, "ranks": ranks, "peers": peers}


def main() -> int:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--out", required=True, help="file to write; its ending says the format")
    options = parser.parse_args()
    results = [json.loads(Path(file).read_text()) for file in options.results]
    figure = KINDS[options.kind](results)
    figure.tight_layout()
    figure.savefig(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
