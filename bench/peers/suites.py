"""The contests of each suite.

`acceptance` is what fivedp is to reach on the cores of one machine: every spec against NumPy with all cores, against
ScaLAPACK and DTensor in the same layout, more ranks on the same cores, one thread, and the models' decode shapes.
"""

from __future__ import annotations

from pathlib import Path

from contest import Contest, Entry

LINE_SPECS = ("column", "column-gathered", "row", "row-sequence", "sequence-column", "block-rows")
SPECS = (*LINE_SPECS, "summa", "2.5d")
PLACED = (*LINE_SPECS, "summa")  # DTensor has placements for these
SILENT = ("column",)  # specs that send nothing


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    return any(flag in text for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def squares(cores: int, size: int) -> list[Contest]:
    """Every spec on `cores` ranks of one thread, against every peer that has its layout."""
    contests = []
    for spec in SPECS:
        entries = [
            Entry("fivedp", cores, 1, spec),
            Entry("numpy", 1, cores, wanted=0.95),
            Entry("scalapack", cores, 1, wanted=1.5),
        ]
        if spec in PLACED:
            entries.append(Entry("dtensor", cores, 1, spec, wanted=2.0))
        if spec in ("block-rows", "sequence-column", "row"):
            entries.append(Entry("heat", cores, 1, spec))
        contests.append(Contest(f"f32, {spec}, {cores} ranks", size, size, size, "float32", tuple(entries)))
    return contests


def halves(cores: int, size: int) -> list[Contest]:
    """The same in bfloat16, against DTensor and torch.

    Where the CPU has no bfloat16 instructions torch multiplies below 1 GFLOP/s; the squares are small there, so that a
    round ends.
    """
    if not has_bfloat16():
        size = min(size, 512)
    contests = []
    for spec in PLACED:
        wanted = 0.95 if spec in SILENT else 1.2
        entries = (
            Entry("fivedp", cores, 1, spec),
            Entry("dtensor", cores, 1, spec, wanted=wanted),
            Entry("torch", 1, cores),
        )
        contests.append(Contest(f"bf16, {spec}, {cores} ranks", size, size, size, "bfloat16", entries))
    return contests


def crowded(cores: int, size: int) -> list[Contest]:
    """Twice and four times as many ranks as cores; ours on as many ranks as cores is the peer."""
    contests = []
    for factor in (2, 4):
        for spec in ("row", "sequence-column", "block-rows", "summa", "2.5d"):
            entries = [Entry("fivedp", factor * cores, 1, spec), Entry("fivedp", cores, 1, spec, wanted=0.85)]
            if spec == "summa" and factor == 2:
                entries.append(Entry("pylops", factor * cores, 1, wanted=1.0))
            contests.append(
                Contest(
                    f"f32, {spec}, {factor * cores} ranks on {cores} cores", size, size, size, "float32", tuple(entries)
                )
            )
    return contests


def threads(sizes: tuple[int, ...] = (1024, 2048, 4096)) -> list[Contest]:
    """One thread against NumPy's and torch's."""
    contests = []
    own = Entry("fivedp", 1, 1, "column")
    for size in sizes:
        narrow = size if has_bfloat16() else min(size, 512)
        contests += [
            Contest(f"f32, one thread, n = {size}", size, size, size, "float32",
                    (own, Entry("numpy", 1, 1, wanted=0.95), Entry("torch", 1, 1))),
            Contest(f"bf16, one thread, n = {narrow}", narrow, narrow, narrow, "bfloat16",
                    (own, Entry("torch", 1, 1, wanted=0.95))),
        ]  # fmt: skip
    return list(dict.fromkeys(contests))


def suite(name: str, cores: int, size: int) -> list[Contest]:
    """The contests called `name`."""
    parts = {
        "squares": lambda: squares(cores, size),
        "halves": lambda: halves(cores, size),
        "crowded": lambda: crowded(cores, size),
        "threads": threads,
    }
    if name == "acceptance":
        return [contest for part in parts.values() for contest in part()]
    if name == "quick":
        return squares(cores, min(size, 1024))[:3] + threads((512,))
    return parts[name]()


NAMES = ("quick", "squares", "halves", "crowded", "threads", "acceptance")
