"""The formulas of the reference card of attention: each is evaluated, and compared with what the library does."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fivedp.layout.explain_attention import attention_prices
from mpi_launcher import run_mpi

ROOT = Path(__file__).resolve().parents[2]
CARD = (ROOT / "docs/ring_attention_card.md").read_text()
(DEFINITIONS,) = re.findall(r"```python\n(.*?)```", CARD, re.S)
EXAMPLE = ROOT / "docs/examples/attention_costs.py"
Symbols = dict[str, Any]


def cells(row: str) -> list[str]:
    """The formulas of the row of that name, in backticks after the first cell."""
    (line,) = [line for line in CARD.splitlines() if line.startswith(f"| {row} |")]
    return re.findall(r"`(.+?)`", line.split("|", 2)[2])


def value(formula: str, given: Symbols) -> float:
    """A formula of the card, with the card's own definitions."""
    symbols: Symbols = {"min": min, "max": max, "n_q": 2, "w": 1, **given}
    if "n" in given:
        exec(DEFINITIONS, symbols)
    return float(eval(formula, symbols))


def blocks(mask: str, given: Symbols, u: int = 1) -> Symbols:
    """`given` with the t of a mask and layout; of the ring of a hybrid with u ranks along the heads."""
    return given | {"t": value(cells(mask)[0], given | {"p": given["p"] // u, "n": given["n"] * u}), "u": u}


def numbers(p: int, **given: Any) -> Symbols:
    """Sizes of one case; n tokens on each of p ranks."""
    symbols = {"p": p, "B": 2, "n": 24, "H": 24, "H_kv": 12, "D": 16, "Dv": 8, "e": 4, **given}
    return symbols | {"s": max(4, symbols["e"]), "S": symbols["n"] * p}


def sent(symbols: Symbols, heads: int, **mask: Any) -> tuple[float, float]:
    """What `explain_attention` says that a rank sends, with `heads` ranks along the heads."""
    B, S, H, H_kv, D, Dv, p = (symbols[name] for name in ("B", "S", "H", "H_kv", "D", "Dv", "p"))
    shapes = {"q": (B, S, H, D), "k": (B, S, H_kv, D), "v": (B, S, H_kv, Dv)}
    prices = attention_prices(shapes, p, itemsize=symbols["e"], **mask)
    price = next(price for price in prices if price.heads == heads)
    return price.forward / p, price.backward / p


MASKS: tuple[tuple[str, Symbols], ...] = (
    ("none, any", {"layout": "zigzag"}),
    ("none, any", {"layout": "contiguous"}),
    ("none, any", {"layout": "striped"}),
    ("causal, zigzag", {"layout": "zigzag", "causal": True}),
    ("causal, striped", {"layout": "striped", "causal": True}),
    ("causal, contiguous", {"layout": "contiguous", "causal": True}),
    *(
        ("causal window w, contiguous", {"layout": "contiguous", "causal": True, "window": w})
        for w in (1, 2, 24, 25, 26, 49, 50, 500)
    ),
)


@pytest.mark.parametrize("kv_heads", [12, 24])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("p", range(1, 9))
def test_bytes_of_a_ring(p: int, itemsize: int, kv_heads: int) -> None:
    case = numbers(p, e=itemsize, H_kv=kv_heads)
    for row, mask in MASKS:
        symbols = blocks(row, case | {"w": mask.get("window", 1)})
        wanted = [value(cell, symbols) for cell in cells("bytes: ring")]
        assert sent(symbols, 1, **mask) == pytest.approx(wanted), (row, mask)
    row = "causal documents of T tokens, each on one rank"
    documents = blocks(row, numbers(p, B=1, e=itemsize, H_kv=kv_heads))
    offsets = [12 * i for i in range(2 * p + 1)]  # two on a rank
    wanted = [value(cell, documents) for cell in cells("bytes: ring")]
    assert list(sent(documents, 1, layout="contiguous", causal=True, cu_seqlens=offsets)) == wanted == [0, 0]


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_bytes_of_ulysses_and_hybrid(itemsize: int) -> None:
    for p, kv_heads in itertools.product((1, 2, 3, 4, 6, 12), (12, 24)):
        case = numbers(p, e=itemsize, H_kv=kv_heads)
        assert sent(case, p) == pytest.approx([value(x, case) for x in cells("Ulysses, p divides H_kv")])
        for u in (d for d in range(1, p + 1) if p % d == 0):
            for row, mask in (item for item in MASKS if "striped" not in item[0]):
                symbols = blocks(row, case | {"w": mask.get("window", 1)}, u)
                wanted = [value(cell, symbols) for cell in cells("hybrid, u divides H_kv")]
                assert sent(symbols, u, **mask) == pytest.approx(wanted), (p, kv_heads, u, row, mask)
    for p, kv_heads in ((2, 1), (4, 2), (8, 2), (6, 3), (8, 1)):
        symbols = numbers(p, e=itemsize, H_kv=kv_heads)
        formulas = cells("Ulysses, p > H_kv a multiple of it, H of p")
        assert sent(symbols, p) == pytest.approx([value(x, symbols) for x in formulas]), (p, kv_heads)


def test_where_queries_travel_backward() -> None:
    (rule,) = re.findall(r"queries travel backward where `(.*?)`", CARD)
    found = set()
    for heads, itemsize, v_size in itertools.product((12, 24, 36), (2, 4, 8), (1, 2, 3, 16, 90)):
        symbols = numbers(4, H=heads, e=itemsize, Dv=v_size)
        shapes = {name: (2, 96, heads if name == "q" else 12, v_size if name == "v" else 16) for name in "qkv"}
        (ring,) = [price for price in attention_prices(shapes, 4, itemsize=itemsize) if price.heads == 1]
        assert (ring.travellers == ("queries",)) == bool(value(rule, symbols)), symbols
        if heads == 12:
            assert (ring.travellers == ("queries",)) == (v_size > 2)
        found.add((heads, ring.travellers))
    assert {(24, ("keys",)), (24, ("queries",))} <= found  # large values of 16 bits outweigh two heads to a key head


def test_where_the_ring_sends_less_than_ulysses() -> None:
    (rule,) = re.findall(r"sends less than Ulysses forward.*`(.*?)`", CARD)
    for p, heads, kv_heads in (
        (2, 8, 8),
        (2, 8, 4),
        (4, 8, 4),
        (4, 16, 4),
        (4, 32, 4),
        (8, 32, 4),
        (8, 8, 1),
        (8, 64, 8),
    ):
        for row, mask in (item for item in MASKS if "window" not in item[0]):
            symbols = blocks(row, numbers(p, H=heads, H_kv=kv_heads, D=64, Dv=64))
            less = sent(symbols, 1, **mask)[0] < sent(symbols, p, **mask)[0]
            assert less == bool(value(rule, symbols)), (p, heads, kv_heads, row)


def test_visible_pairs() -> None:
    length, w, part = 60, 7, 12
    i, j = np.mgrid[:length, :length]
    symbols = {"S": length, "S_k": length, "w": w, "T": part}
    for row, seen in (
        ("none, any", np.ones((length, length), bool)),
        ("causal, zigzag", j <= i),
        ("causal, striped", j <= i),
        ("causal, contiguous", j <= i),
        ("causal window w, contiguous", (j <= i) & (i - j < w)),
        ("causal documents of T tokens, each on one rank", (j <= i) & (i // part == j // part)),
    ):
        assert value(cells(row)[1], symbols) == seen.sum(), row


@pytest.mark.parametrize(("n_ranks", "between"), [(2, "one node"), (4, "nodes")])
def test_counted_bytes_and_memory(n_ranks: int, between: str) -> None:
    done = run_mpi(n_ranks, EXAMPLE, timeout=120, env={"FIVEDP_SHARED": "1" if between == "one node" else "0"})
    assert done.returncode == 0, done.output
    printed = done.stdout.splitlines()
    case: Symbols = {name: int(text) for name, text in re.findall(r"(\w+)=(\d+)", printed[0])}
    case["S"] = case["n"] * n_ranks

    def heads_of(name: str) -> Symbols:
        return {"H_kv": case["H"]} if name == "ring, keys for every head" else {}

    counted = {line[:30].strip(): [int(x.replace(",", "")) for x in line[30:].split()] for line in printed[2:]}
    for name, row, mask, u in (
        ("ring, causal zigzag", "bytes: ring", "causal, zigzag", 1),
        ("ring, causal striped", "bytes: ring", "causal, striped", 1),
        ("ring, causal contiguous", "bytes: ring", "causal, contiguous", 1),
        ("ring, window, contiguous", "bytes: ring", "causal window w, contiguous", 1),
        ("ring, keys for every head", "bytes: ring", "causal, zigzag", 1),
        ("ring, canonical order", "ring, canonical order", "none, any", 1),
        ("Ulysses", "Ulysses, p divides H_kv", "none, any", 1),
        ("hybrid, heads 2", "hybrid, u divides H_kv", "causal, zigzag", 2),
        ("decode", "decode, n_q queries", "none, any", 1),
    ):
        if name in counted or not name.startswith("hybrid"):
            symbols = blocks(mask, case | heads_of(name), u)
            assert counted[name][::2] == [int(value(cell, symbols)) for cell in cells(row)], name

    constant = 160 << 10  # headers, masks, Python's own
    for name, kept in (
        ("ring, causal contiguous", "0"),
        ("ring, causal zigzag", "there/2"),
        ("ring, keys for every head", "there/2"),
    ):
        row = "memory: ring, on one node" if between == "one node" else "memory: ring, between nodes"
        symbols = case | heads_of(name)
        for cell, peak in zip(cells(row), counted[name][1::2], strict=True):
            least = value(cell, symbols)
            most = least + (value(kept, symbols) if between == "nodes" else 0)
            assert least <= peak <= 1.01 * most + constant, (name, cell)
    if between == "one node":
        for cell, peak in zip(cells("memory: Ulysses, on one node, about"), counted["Ulysses"][1::2], strict=True):
            assert 0.93 <= peak / value(cell, case) <= 1.05, cell
