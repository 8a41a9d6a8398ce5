"""The contests of each suite.

`acceptance` is what fivedp is to reach on the cores of one machine: every spec against NumPy with all cores, against
ScaLAPACK and DTensor in the same layout, more ranks on the same cores, and one thread. `attention` is the same for
attention: one thread against torch, ranks against one rank and against torch's ring, more ranks than cores. `moe` are
layers of experts: against torch on gloo, NumPy with `Alltoallv` and torch in one process, and under skew against our
own balanced time.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from attentions import Attention
from contest import Contest, Entry
from mixtures import Mixture
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
            *(Contest(f"{short}, one thread, n = {size}", Product(size, size, size, dtype),
                      (own, Entry("numpy", 1, 1, wanted=0.95), Entry("torch", 1, 1)))
              for short, dtype in (("f32", "float32"), ("f64", "float64"))),
            Contest(f"bf16, one thread, n = {narrow}", Product(narrow, narrow, narrow, "bfloat16"),
                    (own, Entry("torch", 1, 1, wanted=1.0))),
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


def moe_layer(name: str, cores: int, size: int, dtype: str, **more: Any) -> Mixture:
    """The coarse or the fine layer, with 2048 or 1024 tokens a rank where `size` is 4096.

    Where the CPU has no bfloat16 instructions torch multiplies it below 1 GFLOP/s: features and tokens are quarters
    there, so that a round ends.
    """
    tokens, width, hidden, experts, top_k = {
        "coarse": (size // 2, 1024, 2048, 8, 2),
        "fine": (size // 4, 1024, 384, 64, 8),
    }[name]
    by = max(1, 4096 // size)
    if dtype == "bfloat16" and not has_bfloat16():
        by, tokens = 4 * by, max(1, tokens // 4)
    width, hidden = max(experts, width // by), max(1, hidden // by)
    return Mixture(cores * tokens, width, hidden, experts, top_k, dtype, **more)


def moe_entries(cores: int, wanted: float, work: Mixture) -> tuple[Entry, ...]:
    """Ours and every peer that can do it; the aim is against the better of torch's two, so against both."""
    entries = [
        Entry("fivedp_moe", cores, 1),
        Entry("torch_moe", cores, 1, "naive", wanted=wanted),
        Entry("torch_moe", cores, 1, "deduplicated", wanted=wanted),
    ]
    if work.dtype == "float32" and not work.backward:
        entries.append(Entry("numpy_moe", cores, 1))
    return (*entries, Entry("torch_experts", 1, cores))


def moe_title(work: Mixture) -> str:
    """`f32 forward`."""
    number = {"float32": "f32", "bfloat16": "bf16"}[work.dtype]
    return f"{number} {'forward + backward' if work.backward else 'forward'}"


def moe_layers(cores: int, size: int) -> list[Contest]:
    """Coarse and fine experts; what lies outside the products of the coarse ones."""
    contests = []
    aims = {
        ("coarse", "float32"): (2.0, 1.8), ("coarse", "bfloat16"): (1.15, 1.15),
        ("fine", "float32"): (2.5, 2.5), ("fine", "bfloat16"): (1.5, 1.5),
    }  # fmt: skip
    for (name, dtype), wanted in aims.items():
        for backward in (False, True):
            work = moe_layer(name, cores, size, dtype, backward=backward)
            entries = moe_entries(cores, wanted[backward], work)
            contests.append(Contest(f"{moe_title(work)}, {name}, {cores} ranks", work, entries))
    for dtype in ("float32", "bfloat16"):
        work = moe_layer("coarse", cores, size, dtype, outside=True)
        entries = moe_entries(cores, 4.0, work)[:-1]
        contests.append(Contest(f"{moe_title(work)}, coarse, outside the products, {cores} ranks", work, entries))
    return contests


def moe_decode(cores: int, size: int) -> list[Contest]:
    """1, 8 and 32 tokens a rank."""
    contests = []
    for tokens in (1, 8, 32):
        work = replace(moe_layer("coarse", cores, size, "float32"), tokens=tokens * cores)
        title = f"f32 decode, coarse, {tokens} tokens a rank, {cores} ranks"
        contests.append(Contest(title, work, moe_entries(cores, 5.0, work), inner=5))
    return contests


def moe_skew(cores: int, size: int) -> list[Contest]:
    """Ours when all tokens choose one expert, or by Zipf's law, beside ours when they choose evenly.

    One expert takes all rows: one choice a token, and as many tokens as there would be choices.
    """
    contests, program = [], ("fivedp_moe", cores, 1)
    coarse, fine = (moe_layer(name, cores, size, "float32") for name in ("coarse", "fine"))
    single = replace(coarse, tokens=coarse.tokens * coarse.top_k, top_k=1)
    for name, layer, skewed, most in (
        ("coarse", single, "one_expert", 1.3), ("coarse", coarse, "zipf", 1.15), ("fine", fine, "zipf", 1.15),
    ):  # fmt: skip
        for backward in (False, True):
            even = replace(layer, backward=backward)
            work = replace(even, workload=skewed)
            entries = (Entry(*program), Entry(*program, wanted=1 / most, work=even))
            contests.append(
                Contest(f"{moe_title(work)}, {name}, {skewed}, beside uniform, {cores} ranks", work, entries)
            )
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
    moe = {
        "moe-layers": lambda: moe_layers(cores, size),
        "moe-decode": lambda: moe_decode(cores, size),
        "moe-skew": lambda: moe_skew(cores, size),
    }
    for whole, its in (("acceptance", parts), ("attention", attention), ("moe", moe)):
        if name == whole:
            return [contest for part in its.values() for contest in part()]
    if name == "quick":
        return squares(cores, min(size, 1024))[:3] + threads((512,))
    return (parts | attention | moe)[name]()


NAMES = ("quick", "squares", "halves", "crowded", "threads", "acceptance",
         "attention", "attention-threads", "attention-ranks", "attention-crowded",
         "moe", "moe-layers", "moe-decode", "moe-skew")  # fmt: skip
