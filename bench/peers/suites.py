"""The contests of each suite.

`acceptance` is what fivedp is to reach on the cores of one machine: every spec against NumPy with all cores, against
ScaLAPACK and DTensor in the same layout, more ranks on the same cores, and one thread. `attention` is the same for
attention: one thread against torch, ranks against one rank and against torch's ring, more ranks than cores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from attentions import Attention
from contest import Contest, Entry
from products import Product

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
        contests.append(Contest(f"f32, {spec}, {cores} ranks", Product(size, size, size, "float32"), tuple(entries)))
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
        contests.append(Contest(f"bf16, {spec}, {cores} ranks", Product(size, size, size, "bfloat16"), entries))
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
                    f"f32, {spec}, {factor * cores} ranks on {cores} cores",
                    Product(size, size, size, "float32"),
                    tuple(entries),
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
            Contest(f"f32, one thread, n = {size}", Product(size, size, size, "float32"),
                    (own, Entry("numpy", 1, 1, wanted=0.95), Entry("torch", 1, 1))),
            Contest(f"bf16, one thread, n = {narrow}", Product(narrow, narrow, narrow, "bfloat16"),
                    (own, Entry("torch", 1, 1, wanted=0.95))),
        ]  # fmt: skip
    return list(dict.fromkeys(contests))


def attention_shapes(size: int) -> list[tuple[int, int]]:
    """Tokens and head size of what is measured on one thread, the longest of `size` tokens."""
    return [(size // 2, 64), (size, 128)]


def in_words(work: Attention) -> str:
    """`f32 forward, causal`."""
    number = {"float32": "f32", "bfloat16": "bf16"}[work.dtype]
    return f"{number} {'backward' if work.backward else 'forward'}, {'causal' if work.causal else 'full'}"


def attention_threads(size: int) -> list[Contest]:
    """One thread against torch's flash kernel, and against ourselves without a mask.

    Documents are of unequal lengths, 1 to 16 times the shortest: their mask leaves 8% of all pairs. Masks that are not
    just causal are dense for torch, and cost it the same for every kind of mask. Where the CPU has no bfloat16
    instructions torch's backward runs at a quarter of its speed in float32; its longest sequence is half as long there.
    """
    one, contests = ("fivedp_attention", 1, 1), []
    for dtype, forward, backward in (("float32", 1.6, 1.5), ("bfloat16", 2.5, 1.6)):
        for is_backward, wanted in ((False, forward), (True, backward)):
            for tokens, head_size in attention_shapes(size):
                if is_backward and dtype == "bfloat16" and not has_bfloat16():
                    tokens = min(tokens, size // 2)
                for causal in (False, True):
                    work = Attention(tokens, head_size, 8, dtype, causal, is_backward)
                    entries = (Entry(*one), Entry("torch_sdpa", 1, 1, wanted=wanted))
                    contests.append(Contest(f"{in_words(work)}, one thread", work, entries))
    for dtype in ("float32", "bfloat16"):
        causal, full = (Attention(size, 128, 8, dtype, causal) for causal in (True, False))
        entries = (Entry(*one), Entry(*one, wanted=1 / 0.54, work=full))
        contests.append(Contest(f"{in_words(causal)}, one thread, beside full", causal, entries))
    tokens = 2 * size
    lengths = np.random.default_rng(16).permutation(np.arange(1, 17))
    documents = (0, *(np.cumsum(lengths) * tokens // int(lengths.sum())).tolist())
    for title, wanted, work in (
        ("16 documents", 6.0, Attention(tokens, 64, 4, "float32", documents=documents)),
        ("16 documents", 6.0, Attention(tokens, 64, 4, "float32", causal=True, documents=documents)),
        ("window 256", 12.0, Attention(tokens, 64, 4, "float32", causal=True, window=min(256, tokens))),
    ):
        entries = (Entry(*one), Entry("torch_sdpa", 1, 1, wanted=wanted))
        contests.append(Contest(f"{in_words(work)}, {title}, one thread", work, entries))
    return contests


def attention_ranks(cores: int, size: int) -> list[Contest]:
    """As many ranks as cores, against one rank and against torch's ring on gloo: zigzag, forward and backward."""
    contests = []
    for backward in (False, True):
        for causal in (False, True):
            work = Attention(size, 128, 8, "float32", causal, backward)
            entries = (
                Entry("fivedp_attention", cores, 1, "zigzag"),
                Entry("fivedp_attention", 1, 1, wanted=0.92 * cores),
                Entry("torch_ring", cores, 1, wanted=2.2),
            )
            contests.append(Contest(f"{in_words(work)}, {cores} ranks", work, entries))
    return contests


def attention_crowded(cores: int, size: int) -> list[Contest]:
    """Four times as many ranks as cores; ours on as many ranks as cores is the peer."""
    contests = []
    for backward in (False, True):
        for causal in (False, True):
            work = Attention(size, 128, 8, "float32", causal, backward)
            entries = (
                Entry("fivedp_attention", 4 * cores, 1, "zigzag"),
                Entry("fivedp_attention", cores, 1, "zigzag", wanted=0.85),
            )
            contests.append(Contest(f"{in_words(work)}, {4 * cores} ranks on {cores} cores", work, entries))
    return contests


def suite(name: str, cores: int, size: int) -> list[Contest]:
    """The contests called `name`."""
    parts = {
        "squares": lambda: squares(cores, size),
        "halves": lambda: halves(cores, size),
        "crowded": lambda: crowded(cores, size),
        "threads": threads,
    }
    attention = {
        "attention-threads": lambda: attention_threads(size),
        "attention-ranks": lambda: attention_ranks(cores, size),
        "attention-crowded": lambda: attention_crowded(cores, size),
    }
    for whole, its in (("acceptance", parts), ("attention", attention)):
        if name == whole:
            return [contest for part in its.values() for contest in part()]
    if name == "quick":
        return squares(cores, min(size, 1024))[:3] + threads((512,))
    return (parts | attention)[name]()


NAMES = ("quick", "squares", "halves", "crowded", "threads", "acceptance",
         "attention", "attention-threads", "attention-ranks", "attention-crowded")  # fmt: skip
