"""Attentions nobody thought of, over 1 to 8 ranks, held against float64: values, gradients, bits, bytes.

A case is a line of numbers; a failing one is printed as `Drawn(...)` and runs again as `@example(case=Drawn(...))`
above the test. Arrays come from its seed. One rank, another each time, gathers the results and judges, for the oracle
costs more than the attention does.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

import attention_operands
import fivedp
from drawn_cases import dealt
from fivedp.comm import shared_window
from fivedp.comm.grid import grid_of
from fivedp.layout.explain_attention import attention_prices
from fivedp.reference import attention_reference as oracle
from mpi_attention import LAYOUTS, RESULTS, RING, ULYSSES, Case, Way, check, collected, dirty_memory, over, shares

RANKS = (1, 2, 3, 4, 5, 6, 7, 8)
TIMEOUT = 400
MIN_BYTES = shared_window.MIN_BYTES
MOST_LOGITS = 40_000  # of a case: 200 x 200 for one head; the oracle stores them some ten times
HIGHEST = 2**31 - 2  # the last position there is

_meshes: dict[int, fivedp.Mesh] = {}


def mesh_of(tp: int) -> fivedp.Mesh:
    """One mesh for each width, for the whole file: making one is collective, and examples are many."""
    if tp not in _meshes:
        _meshes[tp] = fivedp.Mesh(MPI.COMM_WORLD, tp=tp, sp=MPI.COMM_WORLD.size // tp)
    return _meshes[tp]


@dataclass(frozen=True)
class Drawn:
    """An attention in numbers. What does not go together is settled by `build`, so that every draw is a case."""

    seed: int
    dtype: str
    batch: int
    kv_heads: int
    group: int
    size: int
    v_size: int
    queries: int
    keys: int | None
    """How many; None: the tokens of the queries."""
    layout: str
    """One of the three, or "anywhere": positions of queries, and of keys unless they have their own."""
    keys_anywhere: bool
    documents: int
    """How many are packed, 0 for no packing."""
    causal: bool
    window: int | None
    softcap: float | None
    scale: float | None
    slopes: bool
    far: bool
    """Whether the largest position is the largest there is."""
    logits: str
    poison: str
    lies: tuple[str, ...]
    dlse: bool
    order: str
    way: str
    width: int
    """Which divisor of the number of ranks exchanges heads."""
    from_bytes: int
    """From how many bytes on a box is read in the shared window."""


# One draw a field: drawing costs every rank as much as the attention.
ONE_OF = st.sampled_from
# Tiles of the kernel are 16 or 32 query rows and 84 keys, so most blocks are one tile and some are several.
LENGTHS = ONE_OF([0, *range(41), *range(41), *range(41, 200, 4)])
SIZES = ONE_OF([*range(1, 25), 32, 33, 48, 64])
LYING = ("plain", "heads first", "tokens first", "every second token, from the last", "one of three", "gaps")


def drawn(**fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Drawn]:
    """Any case, but for what is fixed."""
    fields: dict[str, st.SearchStrategy[Any]] = {
        "seed": st.integers(0, 2**32 - 1),
        "dtype": ONE_OF(["float32", "float64", "bfloat16"]),
        "batch": st.integers(1, 2),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "size": SIZES,
        "v_size": SIZES,
        "queries": LENGTHS,
        "keys": ONE_OF([*[None] * 120, *range(41), *range(0, 200, 3)]),
        "layout": ONE_OF([*LAYOUTS, *LAYOUTS, "anywhere"]),
        "keys_anywhere": ONE_OF([False, False, False, True]),
        "documents": ONE_OF([0, 0, 1, 3, 6]),
        "causal": st.booleans(),
        "window": ONE_OF([None, None, 1, 2, 5, 20, 60, 2**40]),
        "softcap": ONE_OF([None, None, None, 0.7, 5.0]),
        "scale": ONE_OF([None, None, None, 0.3, -0.5, 0.0]),
        "slopes": st.booleans(),
        "far": ONE_OF([False, False, False, True]),
        "logits": ONE_OF(["usual", "usual", "huge", "rising"]),
        "poison": ONE_OF(["nothing", "nothing", "unseen keys", "a key", "a query"]),
        "lies": ONE_OF(list(itertools.product(LYING, repeat=4))),
        "dlse": st.booleans(),
        "order": ONE_OF(["ring", "ring", "canonical"]),
        "way": ONE_OF(["ring", "ring", "ulysses", "hybrid", "hybrid, axes swapped"]),
        "width": st.integers(0, 3),
        "from_bytes": ONE_OF([MIN_BYTES, 1]),
    }
    return st.builds(Drawn, **(fields | fixed))


def build(drawn: Drawn, ranks: int) -> Case:
    """The case of some numbers; the same on all ranks, for they draw alike."""
    rng = np.random.default_rng(drawn.seed)
    anywhere = drawn.layout == "anywhere"
    packed = drawn.documents > 0 and not anywhere and not drawn.keys_anywhere
    apart = drawn.keys is not None or (drawn.keys_anywhere and not packed)  # the keys are other tokens
    batch, heads = 1 if packed else drawn.batch, drawn.kv_heads * drawn.group
    most = MOST_LOGITS // (batch * heads)
    n_q = min(drawn.queries, math.isqrt(most) if drawn.keys is None else most // max(1, drawn.keys))
    n_k = n_q if drawn.keys is None else drawn.keys
    shapes = [(batch, n_q, heads, drawn.size), (batch, n_k, drawn.kv_heads, drawn.size)]
    shapes += [(batch, n_k, drawn.kv_heads, drawn.v_size), (batch, n_q, heads, drawn.v_size)]
    q, k, v, do = (rng.standard_normal(shape) for shape in shapes)
    if drawn.logits == "huge":  # some reach 1e4
        q *= 1e4 / max(1.0, abs(drawn.size**-0.5 if drawn.scale is None else drawn.scale) * drawn.size**0.5)
    if drawn.logits == "rising":  # the maximum of a row moves with every block
        q, k = abs(q), abs(k) * np.linspace(0, 8, n_k)[:, None, None]
    dtype = np.dtype(drawn.dtype) if drawn.dtype != "bfloat16" else attention_operands.BF16
    dlse = rng.standard_normal((batch, heads, n_q)) * drawn.dlse
    case = Case(
        *(x.astype(dtype) for x in (q, k, v, do)),
        dlse.astype(np.float64 if drawn.dtype == "float64" else np.float32),
    )
    case.keywords = {
        "causal": drawn.causal, "window": drawn.window, "softcap": drawn.softcap, "scale": drawn.scale,
        "order": drawn.order, "layout": "zigzag" if anywhere else drawn.layout,
    }  # fmt: skip
    if drawn.slopes:
        case.keywords["alibi_slopes"] = 2.0 ** -rng.uniform(0, 8, heads)
    if packed:
        case.keywords["cu_seqlens"] = _offsets(rng, n_q, drawn.documents)
        if apart:
            case.keywords["cu_seqlens_k"] = _offsets(rng, n_k, drawn.documents)
    if anywhere:
        case.positions = _positions(rng, n_q, drawn.far)
        case.queries = _owners(rng, n_q, ranks)
        if not apart:
            case.kv_positions = case.positions
    if (anywhere and apart) or (drawn.keys_anywhere and not packed):
        case.kv_positions = _positions(rng, n_k, drawn.far and anywhere)
        case.keys = _owners(rng, n_k, ranks)
    return case


def _offsets(rng: np.random.Generator, length: int, documents: int) -> Any:
    return np.array([0, *np.sort(rng.integers(0, length + 1, documents - 1)), length], np.int32)


def _positions(rng: np.random.Generator, length: int, far: bool) -> Any:
    """Positions without order and with gaps; no two are equal, for the canonical order is that of positions."""
    last = HIGHEST if far else 2 * length + 2
    return (last - rng.permutation(2 * length + 3)[:length]).astype(np.int32)


def _owners(rng: np.random.Generator, length: int, ranks: int) -> list[Any]:
    """Tokens dealt to ranks unevenly; some have none."""
    weights = rng.random(ranks) ** 3
    owner = rng.choice(ranks, length, p=weights / weights.sum())
    return [rng.permutation(np.flatnonzero(owner == rank)) for rank in range(ranks)]


def poisoned(drawn: Drawn, case: Case) -> tuple[Case, Any, Any]:
    """The case with NaN in some queries or keys, and the queries and the keys that know nothing of it."""
    rng = np.random.default_rng(drawn.seed + 1)
    seen = oracle.seen(case.mask())
    n_q, n_k = seen.shape
    queries, keys = np.zeros(n_q, bool), np.zeros(n_k, bool)
    if drawn.poison == "unseen keys":
        keys = ~seen.any(axis=0)
    elif drawn.poison == "a key" and n_k:
        keys[rng.integers(n_k)] = True
    elif drawn.poison == "a query" and n_q:
        queries[rng.integers(n_q)] = True
    rows = seen[:, keys].any(axis=1) | (queries & seen.any(axis=1))
    value = rng.choice([np.nan, np.inf, -np.inf])

    def dirty(x: Any, tokens: Any) -> Any:
        return np.where(tokens[:, None, None], x.dtype.type(value), x)

    q, do, k, v = (dirty(x, t) for x, t in ((case.q, queries), (case.do, queries), (case.k, keys), (case.v, keys)))
    changed = Case(q, k, v, do, case.dlse, case.keywords, case.positions, case.queries, case.kv_positions, case.keys)
    return changed, ~rows, ~seen[rows].any(axis=0)


def lying(x: Any, kind: str) -> Any:
    """(..., S, H, D) of the same values that lies in memory another way."""
    if kind == "heads first":
        return np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2)
    if kind == "tokens first" and x.ndim == 4:
        return np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)
    if kind in ("every second token, from the last", "one of three", "gaps"):
        shape = list(x.shape)
        if kind == "one of three":  # as a projection to q, k and v in one leaves it
            shape.insert(-1, 3)
            index: Any = (..., 1, slice(None))
        else:
            axis = -3 if kind.startswith("every") else -1
            shape[axis] *= 2
            index = (..., slice(None, None, -2), slice(None), slice(None)) if axis == -3 else (..., slice(1, None, 2))
        wide = np.full(shape, np.nan, x.dtype)
        wide[index] = x
        return wide[index]
    return np.ascontiguousarray(x)


def way_of(drawn: Drawn, comm: MPI.Intracomm) -> tuple[Way, int, Any]:
    """The operation, how many ranks exchange heads, and the counter of bytes."""
    if drawn.way == "ring":
        return RING, 1, grid_of(comm).traffic
    if drawn.way == "ulysses":
        return ULYSSES, comm.size, grid_of(comm).traffic
    divisors = [d for d in range(1, comm.size + 1) if comm.size % d == 0]
    tp = divisors[drawn.width % len(divisors)]
    mesh = mesh_of(tp)
    swapped = {"heads": "sp", "ring": "tp"} if drawn.way.endswith("swapped") else {}
    return over(mesh, **swapped), comm.size // tp if swapped else tp, grid_of(mesh).traffic


def run(drawn: Drawn, case: Case, comm: MPI.Intracomm) -> tuple[list[Any], tuple[int, int]]:
    """This rank's results, and the bytes it sent forward and backward."""
    way, _, traffic = way_of(drawn, comm)
    local, dlse, keywords = case.arguments(comm)
    q, k, v, do = (lying(x, kind) for x, kind in zip(local, drawn.lies, strict=True))
    before = [x.tobytes() for x in (q, k, v, do)]
    shared_window.MIN_BYTES = drawn.from_bytes
    try:
        with dirty_memory():
            start = traffic.bytes_sent
            o, lse = way[0](q, k, v, comm, **keywords)
            middle = traffic.bytes_sent
            if drawn.dlse:
                keywords["dlse"] = dlse
            results = [o, lse, *way[1](do, q, k, v, o, lse, comm, **keywords)]
    finally:
        shared_window.MIN_BYTES = MIN_BYTES
    assert [x.tobytes() for x in (q, k, v, do)] == before, "an argument was written to"
    return results, (middle - start, traffic.bytes_sent - middle)


def priced(drawn: Drawn, case: Case) -> bool:
    """Whether explain_attention knows the bytes of such a call."""
    placed = case.positions is not None or case.kv_positions is not None or "cu_seqlens_k" in case.keywords
    return not placed and drawn.order == "ring" and not drawn.way.endswith("swapped")


def check_bytes(drawn: Drawn, case: Case, sent: tuple[int, int], ranks: int, width: int) -> None:
    shapes = {name: getattr(case, name).shape for name in "qkv"}
    options = {name: case.keywords.get(name) for name in ("causal", "window", "layout", "cu_seqlens")}
    prices = attention_prices(shapes, ranks, itemsize=case.q.dtype.itemsize, **options)
    price = next(price for price in prices if price.heads == width)
    assert sent == (price.forward, price.backward)


def check_bits(drawn: Drawn, case: Case, whole: list[Any], rows: Any, keys: Any) -> None:
    """Canonical order has the bits of one rank; heads exchanged alone have them forward in any order."""
    names = RESULTS if drawn.way == "ring" else RESULTS[:2]
    for name, x, y in zip(names, whole, case.alone(order="canonical"), strict=False):
        chosen = (..., rows) if name == "lse" else (slice(None), keys if name in ("dk", "dv") else rows)
        assert x[chosen].tobytes() == y[chosen].tobytes(), f"{name} has other bits on one rank"


@settings(max_examples=dealt(1680, RANKS, MPI.COMM_WORLD.size))
@given(case=drawn())
def test_drawn_attention_is_as_exact_as_a_plain_one(comm: MPI.Intracomm, case: Drawn) -> None:
    clean = build(case, comm.size)
    dirty, rows, keys = poisoned(case, clean)
    results, sent = run(case, dirty, comm)
    turn = case.seed % comm.size
    everything = collected((results, sent), comm, turn)
    if everything is None:
        return
    whole = clean.joined([part for part, _ in everything])
    check(clean, whole, comm.size, rows, keys)
    _, width, _ = way_of(case, comm)
    if priced(case, clean):
        check_bytes(case, clean, tuple(map(sum, zip(*(sent for _, sent in everything), strict=True))), comm.size, width)
    if case.order == "canonical" or case.way == "ulysses":
        check_bits(case, dirty, whole, rows, keys)


@settings(max_examples=dealt(200, RANKS, MPI.COMM_WORLD.size))
@given(
    case=drawn(
        dtype=st.just("float64"), logits=st.just("usual"), poison=st.just("nothing"), dlse=st.just(True),
        queries=st.integers(0, 40), keys=ONE_OF([*[None] * 40, *range(41)]),
    )
)  # fmt: skip
def test_gradients_are_the_slope_of_the_forward(comm: MPI.Intracomm, case: Drawn) -> None:
    """Along a random direction, by central differences of two steps whose difference bounds what they leave out."""
    whole = build(case, comm.size)
    way, _, _ = way_of(case, comm)
    (q, k, v, do), dlse, keywords = whole.arguments(comm)
    rng = np.random.default_rng(case.seed + comm.rank)
    directions = [rng.standard_normal(x.shape) for x in (q, k, v)]

    def loss(step: float) -> tuple[float, float]:
        """This rank's part of the loss, and the sum of the sizes of its terms."""
        moved = (x + step * d for x, d in zip((q, k, v), directions, strict=True))
        o, lse = way[0](*moved, comm, **keywords)
        terms = np.concatenate([(do * o).reshape(-1), (dlse * np.where(np.isneginf(lse), 0.0, lse)).reshape(-1)])
        return float(terms.sum()), float(abs(terms).sum())

    o, lse = way[0](q, k, v, comm, **keywords)
    gradients = way[1](do, q, k, v, o, lse, comm, dlse=dlse, **keywords)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    h = 1e-4
    (up, size), (down, _), (up_2, _), (down_2, _) = (loss(step) for step in (h, -h, 2 * h, -2 * h))
    near, far = (up - down) / (2 * h), (up_2 - down_2) / (4 * h)
    everything = collected(np.array([slope, near, far, size]), comm)
    if everything is None:
        return
    slope, near, far, size = sum(everything)
    # far - near is three times the error of near, to the fourth power of h; rounding is some 100 steps of a term.
    assert abs(slope - near) <= abs(far - near) + 100 * 2.2e-16 * (1 + size) / h


@settings(max_examples=dealt(200, RANKS, MPI.COMM_WORLD.size))
@given(
    case=drawn(
        queries=st.integers(0, 5), keys=LENGTHS, documents=st.just(0), order=st.just("ring"), way=st.just("ring"),
    )
)  # fmt: skip
def test_drawn_decode_is_as_exact_as_a_plain_one(comm: MPI.Intracomm, case: Drawn) -> None:
    whole = build(case, comm.size)
    n_q, n_k = whole.q.shape[1], whole.k.shape[1]
    if whole.positions is None:
        if whole.kv_positions is None and n_q <= n_k:
            given_positions, whole.positions = None, np.arange(n_k - n_q, n_k, dtype=np.int32)
        else:
            given_positions = whole.positions = np.arange(n_q, dtype=np.int32)
    else:
        given_positions = whole.positions
    dirty, rows, _ = poisoned(case, whole)
    keys = (whole.keys or shares(whole.keywords["layout"], n_k, comm.size))[comm.rank]
    keywords = {name: value for name, value in whole.keywords.items() if name != "order"}
    if whole.kv_positions is not None:
        keywords["kv_positions"] = whole.kv_positions[keys]
    arrays = (dirty.q, dirty.k[:, keys], dirty.v[:, keys])
    q, k, v = (lying(x, kind) for x, kind in zip(arrays, case.lies, strict=False))
    traffic = grid_of(comm).traffic
    start = traffic.bytes_sent
    with dirty_memory():
        o, lse = fivedp.decode_attention(q, k, v, comm, positions=given_positions, **keywords)
    assert traffic.bytes_sent - start == (comm.size - 1) * (whole.do.size + 2 * lse.size) * lse.itemsize
    everything = collected((o.tobytes(), lse.tobytes()), comm, case.seed % comm.size)
    if everything is None:
        return
    assert len(set(everything)) == 1, "ranks have other bits"
    # A state of each rank is scaled and added.
    attention_operands.check_step(whole.operands(), [o, lse], whole.dlse, rows, roundings=2 * comm.size)
