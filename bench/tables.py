"""The tables of docs/benchmarks.md, written from the files in bench/results and never by hand.

    python bench/tables.py             rewrite every generated part
    python bench/tables.py --check     exit with status 1 where one is not what its files say

A generated part stands between `<!-- generated: KIND FILE -->` and `<!-- end -->`; everything else is left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "bench" / "results"
PART = re.compile(r"(<!-- generated: (\w+) ([\w.-]+) -->\n).*?(<!-- end -->)", re.S)
Result = dict[str, Any]
NUMBERS = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "complex64": "c64", "complex128": "c128"}


def table(names: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(names), " | ".join("---" for _ in names), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def megabytes(value: float) -> str:
    """`3.15 MB`, `0` for nothing."""
    return f"{value / 1e6:.2f} MB" if value else "0"


def milliseconds(seconds: float) -> str:
    """`1.23 ms`."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def machine(result: Result) -> str:
    """What was measured on what."""
    m, ceiling = result["machine"], result["ceiling"]
    rates = ", ".join(
        f"{NUMBERS[name]} {rate['all'] / 1e9:.0f} GFLOP/s ({rate['one_core'] / 1e9:.0f} on one core)"
        for name, rate in ceiling["flops"].items()
    )
    link = ceiling.get("pingpong")
    busy = f"; load {m['load']} before the start: other programs ran" if (m["load"] or 0) > 0.5 * m["cores"] else ""
    rows = [
        ["date, revision", f"{result['when']}, {m['revision'] or 'installed wheel'}"],
        ["CPU", f"{m['cpu']['model']}, {m['cores']} cores; kernels {m['isa']}; flags {' '.join(m['cpu']['flags'])}"],
        ["ranks", f"{m['ranks']} x {m['threads']} thread(s), {m['nodes']} node(s){busy}"],
        ["MPI", f"{m['mpi']['name']} {m['mpi']['version']}, {m['mpi']['transport']}"],
        ["BLAS under NumPy", "; ".join(f"{b['library']} {b['version']} ({b['core']} kernels)" for b in m["blas"])],
        ["ceiling, arithmetic", rates],
        ["ceiling, memory", f"copy {ceiling['copy'] / 1e9:.1f} GB/s read and written"],
    ]
    if link:
        rows.append(["ceiling, messages", f"{link['bandwidth'] / 1e9:.1f} GB/s, {1e6 * link['latency']:.1f} us"])
    return table(["", ""], rows)


def specs(result: Result) -> str:
    """One line per product of the benchmark."""
    count = result["machine"]["ranks"]
    rows = []
    for r in result["rows"]:
        if r.get("skipped") or r["kernel"] != "gemm":
            continue
        sent = r["bytes"]
        least = "equal" if sent["counted"] == sent["bound"] else megabytes(sent["bound"] / count)
        name = r["label"] + (" (forward + backward)" if r["backward"] else "")
        if r["scaled_by"] != 1:
            name += f" / {r['scaled_by']:g}"
        memory = "?" if r["memory"]["peak"] is None else megabytes(r["memory"]["peak"])
        bits = {True: "same", False: "OTHER", None: "-"}[r["same_bits"]]
        rows.append([
            r["known_as"], name, r["shape"], NUMBERS[r["dtype"]], r["schedule"], milliseconds(r["seconds"]),
            f"{r['gflops']:.1f}", f"{100 * r['share_of_peak']:.0f}%", megabytes(sent["counted"] / count), least,
            f"{r['error']:.1e}" if not r["wrong"] else "WRONG", memory, bits,
        ])  # fmt: skip
    names = ["strategy", "product", "shape", "type", "schedule: moves", "time", "GFLOP/s", "of peak", "sent by a rank",
             "least", "error", "memory", "bits of one rank"]  # fmt: skip
    return table(names, rows)


def attention(result: Result) -> str:
    """One line per attention of the benchmark."""
    count = result["machine"]["ranks"]
    rows = []
    for r in result["rows"]:
        if r.get("skipped") or r["kernel"] != "attention":
            continue
        sent, sizes, memory, price = r["bytes"], r["sizes"], r["memory"], r.get("canonical_price")
        rows.append([
            r["label"], f"{sizes['queries']} x {sizes['keys']}",
            f"{sizes['heads']}/{sizes['kv_heads']} x {sizes['size']}",
            r["mask"], r["known_as"], NUMBERS[r["dtype"]], "backward" if r["backward"] else "forward",
            milliseconds(r["seconds"]), f"{r['gflops']:.1f}", f"{100 * r['share_of_peak']:.0f}%",
            megabytes(sent["counted"] / count),
            "equal" if sent["counted"] == sent["bound"] else megabytes(sent["bound"] / count),
            f"{r['error']:.1e}" if not r["wrong"] else "WRONG", f"{r['honest_error']:.1e}",
            "?" if memory["peak"] is None else megabytes(memory["peak"]), megabytes(memory["not_stored"]),
            f"{r['balance']:.2f}",
            "" if price is None else f"{price['ratio']:.2f} ({price['spread'][0]:.2f}-{price['spread'][1]:.2f})",
        ])  # fmt: skip
    names = ["model", "queries x keys", "heads/key heads x size", "mask", "way", "type", "pass", "time", "GFLOP/s",
             "of peak", "sent by a rank", "least", "error", "plain", "memory", "S x S not stored", "load",
             "canonical over ring"]  # fmt: skip
    return table(names, rows)


def moe(result: Result) -> str:
    """One line per mixture of experts of the benchmark."""
    count = result["machine"]["ranks"]
    rows = []
    for r in result["rows"]:
        if r.get("skipped") or r["kernel"] != "moe":
            continue
        sent, sizes, memory = r["bytes"], r["sizes"], r["memory"]["peak"]
        total = sum(r["stages"].values()) or 1.0
        rows.append([
            r["label"] + (f" / {r['scaled_by']}" if r["scaled_by"] != 1 else ""),
            f"{sizes['tokens']} x {sizes['width']} x {sizes['hidden']}", f"{sizes['experts']}, top {sizes['top_k']}",
            r["workload"], NUMBERS[r["dtype"]], "backward" if r["backward"] else "forward",
            milliseconds(r["seconds"]), f"{r['gflops']:.1f}", f"{100 * r['share_of_peak']:.0f}%",
            *(f"{100 * r['stages'][name] / total:.0f}%" for name in ("route", "dispatch", "products", "combine")),
            megabytes(sent["counted"] / count),
            "equal" if sent["counted"] == sent["bound"] else megabytes(sent["bound"] / count),
            f"{r['error']:.1e}" if not r["wrong"] else "WRONG", f"{r['honest_error']:.1e}",
            "?" if memory is None else megabytes(memory), f"{r['balance']:.2f}",
        ])  # fmt: skip
    names = ["layer", "tokens x H x F", "experts", "workload", "type", "pass", "time", "GFLOP/s", "of peak",
             "route", "dispatch", "products", "combine", "sent by a rank", "least", "error", "plain", "memory",
             "load"]  # fmt: skip
    return table(names, rows)


def setting(result: Result) -> str:
    """The machine of a contest, and the versions that its programs told."""
    m, contests = result["machine"], result["contests"]
    facts = {e["program"]: e["facts"] for contest in contests for e in contest["entries"]}
    ours = facts.get("fivedp_moe") or facts.get("fivedp_attention") or facts.get("fivedp") or {}
    torch = next((f for f in facts.values() if "torch" in f), None)
    loads = [contest["load"] for contest in contests]
    busy = f"; load {min(loads)} to {max(loads)}: other programs ran" * (max(loads) > 1.5 * result["cores"])
    revisions = dict.fromkeys(contest["revision"] or "installed wheel" for contest in contests)
    rows = [
        ["date, revision", ", ".join([result["when"], *revisions])],
        ["CPU", f"{m['cpu']['model']}, {result['cores']} cores; flags {' '.join(m['cpu']['flags'])}{busy}"],
    ]
    if "mpi" in ours:
        rows.append(["ours", f"kernels {ours['isa']}; {ours['mpi']['name']} {ours['mpi']['version']}"])
    if torch is not None:
        rows.append(["peer", f"torch {torch['torch']}"])
    return table(["", ""], rows)


def peers(result: Result) -> str:
    """One line per contest and peer, with the aim where there is one, and the errors where they were measured."""
    return beside(result, "GFLOP/s", lambda entry: f"{entry['gflops']:.0f}")


def times(result: Result) -> str:
    """The same with times, for work that is not counted in operations."""
    return beside(result, "time", lambda entry: milliseconds(entry["seconds"]))


def beside(result: Result, unit: str, said: Callable[[Any], str]) -> str:
    """The contests of a result; `said` tells the speed of an entry."""
    rows = []
    names = ["what", "shape", "peer", f"ours, {unit}", f"peer, {unit}", "ours is ... times as fast", "wanted"]
    entries = [entry for contest in result["contests"] for entry in contest["entries"]]
    if errors := any("error_over_plain" in entry for entry in entries):
        names.append("error over plain: ours, peer")
    for contest in result["contests"]:
        sizes = contest["sizes"]
        shape = contest.get("shape") or f"{sizes['m']}x{sizes['n']}x{sizes['k']}"
        ours, *others = contest["entries"] or [None]
        for entry in others:
            if "ratio" not in entry:
                continue
            low, high = entry["spread"]
            aim = entry["wanted"]
            verdict = "" if aim is None else f"{aim:.2f}: " + ("reached" if entry["ratio"] >= aim else "**short**")
            if entry.get("needs") is not None:
                verdict += f", {100 * entry['needs']:.0f}% of the peak"
            row = [contest["title"], shape, entry["entry"], said(ours), said(entry),
                   f"**{entry['ratio']:.2f}** ({low:.2f}-{high:.2f})", verdict]  # fmt: skip
            if errors:
                row.append(f"{ours['error_over_plain']:.2g}, {entry['error_over_plain']:.2g}")
            rows.append(row)
        for names_of, what in ((contest["missing"], "not run"), (contest["wrong"], "wrong result")):
            rows += [[contest["title"], shape, name, "", "", what, *[""] * (len(names) - 6)] for name in names_of]
    return table(names, rows)


def aims(result: Result) -> str:
    """Figures measured inside one program: what was wanted, what was found."""
    rows = []
    for aim in result["aims"]:
        low, high = aim.get("spread") or (None, None)
        spread = f" ({low:.3g}-{high:.3g})" if low is not None else ""
        reached = aim["measured"] >= aim["wanted"] if aim["more_is_better"] else aim["measured"] <= aim["wanted"]
        sign = ">=" if aim["more_is_better"] else "<="
        verdict = "reached" if reached else "**short**"
        rows.append(
            [aim["title"], f"**{aim['measured']:.3g}**{spread} {aim['unit']}", f"{sign} {aim['wanted']:g}: {verdict}"]
        )
    return table(["figure", "measured", "wanted"], rows)


KINDS: dict[str, Callable[[Result], str]] = {
    "machine": machine,
    "specs": specs,
    "attention": attention,
    "moe": moe,
    "setting": setting,
    "peers": peers,
    "times": times,
    "aims": aims,
}


def generate(text: str, results: Path = RESULTS) -> str:
    """`text` with every generated part written anew."""

    def part(match: re.Match[str]) -> str:
        begin, kind, file, end = match.groups()
        return f"{begin}{KINDS[kind](json.loads((results / file).read_text()))}{end}"

    return PART.sub(part, text)


def main() -> int:
    """Rewrite or check the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 where something would change")
    options = parser.parse_args()
    old = DOCUMENT.read_text()
    new = generate(old)
    if options.check:
        if old != new:
            print(f"{DOCUMENT.name} is not what bench/results says; run python bench/tables.py", file=sys.stderr)
        return int(old != new)
    DOCUMENT.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
