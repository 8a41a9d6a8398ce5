"""Ring attention over ranks: bits, bytes, growth of the error, refusals. Drawn cases are in another file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.comm import shared_window
from fivedp.comm.grid import grid_of
from fivedp.kernels import attention as kernel
from fivedp.ops import ring_attention, ring_blocks
from fivedp.reference import attention_reference
from mpi_attention import BFLOAT16, DTYPES, LAYOUTS, RESULTS, Case, collected, dirty_memory, judge

RANKS = (1, 2, 3, 5, 8)
TIMEOUT = 300


# Of four query heads; in the backward of the same tokens, fewer bytes travel with keys, or with queries.
KV_HEADS = {"keys": 2, "queries": 4}
either_travels = pytest.mark.parametrize("travels", list(KV_HEADS))


def plain(
    rng: np.random.Generator, length: int, dtype: Any = np.float32, size: int = 16, kv_heads: int = 2, **keywords: Any
) -> Case:
    q, do = (rng.standard_normal((1, length, 4, size)).astype(dtype) for _ in range(2))
    k, v = (rng.standard_normal((1, length, kv_heads, size)).astype(dtype) for _ in range(2))
    return Case(q, k, v, do, np.zeros((1, 4, length), np.float64 if dtype == np.float64 else np.float32), keywords)


@either_travels
def test_two_calls_have_the_same_bits(comm: MPI.Intracomm, seed: int, travels: str) -> None:
    case = plain(np.random.default_rng(seed), 333, kv_heads=KV_HEADS[travels], causal=True)
    for x, y in zip(case.run(comm), case.run(comm), strict=True):
        assert x.tobytes() == y.tobytes()


@either_travels
@pytest.mark.parametrize("shared", ["shared window", "window without room", "messages"])
def test_long_blocks_through_window_and_messages(
    comm: MPI.Intracomm, seed: int, shared: str, travels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shared == "messages":
        monkeypatch.setenv("FIVEDP_SHARED", "0")
    apart = comm.Dup()  # a grid of its own, which reads the setting
    window = grid_of(apart).shared
    if shared == "window without room" and window is not None and comm.rank % 2:
        monkeypatch.setattr(window, "take", lambda n_bytes: None)
    monkeypatch.setattr(ring_blocks, "_HELD_BYTES", 0)
    counts: list[int] = []
    backward_counts: list[int] = []
    add, add_backward = kernel.forward_blocks, kernel.backward_blocks

    def counted(q: Any, blocks: Any, state: Any) -> None:
        counts.append(len(blocks))
        add(q, blocks, state)

    def counted_backward(blocks: Any, *keys: Any) -> None:
        backward_counts.append(len(blocks))
        add_backward(blocks, *keys)

    monkeypatch.setattr(kernel, "forward_blocks", counted)
    monkeypatch.setattr(kernel, "backward_blocks", counted_backward)
    rng, kv_heads = np.random.default_rng(seed), KV_HEADS[travels]
    case = plain(rng, 100 * comm.size, size=128, kv_heads=kv_heads, causal=True, layout="zigzag")
    assert case.k.nbytes // comm.size // 2 >= shared_window.MIN_BYTES  # half is what the mask leaves of some
    monkeypatch.setattr(ring_attention, "_HELD_GRADIENTS", 2 * case.q.nbytes // comm.size)
    results = case.run(apart)
    # This rank's own block, then what is read in place together; what comes by message is the last of its list.
    by_message = [window is None or (shared == "window without room" and rank % 2 == 1) for rank in range(comm.size)]
    lists: list[list[int]] = [[]]
    for step in range(comm.size):
        source = (comm.rank - step) % comm.size
        lists[-1].append(source)
        if step == 0 or by_message[source]:
            lists.append([])
    assert counts == [len(sources) for sources in lists if sources]
    # Queries that travel are used two blocks at a time on one node, keys and what travels between nodes one by one.
    together = 1 if travels == "keys" or shared == "messages" else 2
    assert backward_counts == [1, *(min(together, comm.size - step) for step in range(1, comm.size, together))]
    judge(case, results, apart)


def test_keys_that_nobody_sees_are_not_sent(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, block = comm.size, 32
    traffic = grid_of(comm).traffic
    size_of = 2 * block * 2 * 16 * 4  # k and v: tokens, heads, head size, float32

    def sent(case: Case) -> int:
        local = [fivedp.sequence_shard(x, comm, layout=case.keywords["layout"]) for x in (case.q, case.k, case.v)]
        if case.packed:
            local = [x[0] for x in local]
        traffic.reset()
        fivedp.ring_attention(*local, comm, **case.keywords)
        return int(comm.allreduce(traffic.bytes_sent))

    full = plain(rng, block * p, layout="contiguous")
    assert sent(full) == p * (p - 1) * size_of
    causal = plain(rng, block * p, layout="contiguous", causal=True)
    assert sent(causal) == p * (p - 1) // 2 * size_of
    window = plain(rng, block * p, layout="contiguous", causal=True, window=block)
    assert sent(window) == (p - 1) * size_of // block * (block - 1)  # all but the first key of the block before
    zigzag = plain(rng, block * p, layout="zigzag", causal=True)
    assert sent(zigzag) == p * (p - 1) // 2 * (size_of + size_of // 2)  # halves to later ranks
    documents = plain(rng, block * p, layout="contiguous", cu_seqlens=np.arange(p + 1) * block)
    assert sent(documents) == 0


def backward_cases(rng: np.random.Generator, ranks: int, kv_heads: int) -> Iterator[tuple[str, Case]]:
    """Every mask and placement whose ranges differ, with a gradient of lse."""
    n = 12 * ranks
    offsets = np.array([0, n // 3, n // 3, n - 5, n])
    cases = {
        "full, striped": plain(rng, n + 1, kv_heads=kv_heads, layout="striped"),
        "causal, zigzag": plain(rng, n + 3, kv_heads=kv_heads, causal=True),
        "causal, contiguous": plain(rng, n, np.float64, kv_heads=kv_heads, causal=True, layout="contiguous"),
        "window": plain(rng, n, kv_heads=kv_heads, causal=True, window=7, layout="contiguous"),
        "window, both ways": plain(rng, n, BFLOAT16, kv_heads=kv_heads, window=5),
        "documents": plain(rng, n, kv_heads=kv_heads, causal=True, cu_seqlens=offsets),
        "ranks without tokens": plain(rng, ranks // 2 + 1, kv_heads=kv_heads, layout="contiguous"),
        "positions": plain(rng, n, kv_heads=kv_heads, causal=True),
        "values of another size": plain(rng, n, kv_heads=kv_heads),
    }
    placed = cases["positions"]
    placed.positions = placed.kv_positions = rng.permutation(2 * n)[:n].astype(np.int32)
    owner = rng.integers(1 if ranks > 2 else 0, ranks, n)  # rank 0 of three has none
    placed.queries = [np.flatnonzero(owner == rank) for rank in range(ranks)]
    other = cases["values of another size"]
    other.v, other.do = (np.ascontiguousarray(x[..., :9]) for x in (other.v, other.do))
    for name, case in cases.items():
        case.dlse = rng.standard_normal(case.dlse.shape).astype(case.dlse.dtype)
        yield name, case


def ranges(case: Case, ranks: int) -> tuple[int, int]:
    """The keys that other ranks see, and the queries that see keys of other ranks, in ranges of their shares."""
    seen, (queries, keys) = attention_reference.seen(case.mask()), case.tokens(ranks)
    counts = [0, 0]
    for r, mine in enumerate(queries):
        for s, theirs in enumerate(keys):
            for axis in (0, 1):
                numbers = np.flatnonzero(seen[np.ix_(mine, theirs)].any(axis=axis))
                if r != s and len(numbers):
                    counts[axis] += int(numbers[-1] - numbers[0]) + 1
    return counts[0], counts[1]


@either_travels
def test_gradients_and_bytes_of_a_backward(comm: MPI.Intracomm, seed: int, travels: str) -> None:
    traffic = grid_of(comm).traffic
    ways = set()
    for name, case in backward_cases(np.random.default_rng(seed), comm.size, KV_HEADS[travels]):
        print(name)
        (q, k, v, do), dlse, keywords = case.arguments(comm)
        with dirty_memory():
            o, lse = fivedp.ring_attention(q, k, v, comm, **keywords)
            start = traffic.bytes_sent
            gradients = fivedp.ring_attention_backward(do, q, k, v, o, lse, comm, dlse=dlse, **keywords)
            sent = comm.allreduce(traffic.bytes_sent - start)
        judge(case, [o, lse, *gradients], comm)
        # positions are told first
        told = 4 * (comm.size - 1) * case.q.shape[1] if case.positions is not None else 0
        b, s, heads, size, v_size = q.itemsize, lse.itemsize, q.shape[-2], q.shape[-1], v.shape[-1]
        n_keys, n_queries = ranges(case, comm.size)
        with_keys = n_keys * k.shape[-2] * (size + v_size) * (b + s)
        with_queries = n_queries * heads * ((size + v_size) * b + 2 * s + size * s)
        assert sent - told in (with_keys, with_queries), name
        if name in ("full, striped", "causal, contiguous", "window", "documents", "values of another size"):
            assert sent - told == min(with_keys, with_queries), name
        if with_keys != with_queries:
            ways.add("keys" if sent - told == with_keys else "queries")
    assert comm.size == 1 or travels in ways


@pytest.mark.mpi(min_size=2)
def test_few_queries_travel_to_many_keys(comm: MPI.Intracomm, seed: int) -> None:
    """Though four query heads share a key head: the bytes of all tokens count, not those of one."""
    rng, p = np.random.default_rng(seed), comm.size
    case = plain(rng, 40 * p, kv_heads=1)
    case.q, case.do, case.dlse = case.q[:, : 4 * p], case.do[:, : 4 * p], case.dlse[..., : 4 * p]
    (q, k, v, do), _, keywords = case.arguments(comm)
    o, lse = fivedp.ring_attention(q, k, v, comm, **keywords)
    traffic = grid_of(comm).traffic
    traffic.reset()
    gradients = fivedp.ring_attention_backward(do, q, k, v, o, lse, comm, **keywords)
    assert comm.allreduce(traffic.bytes_sent) == p * (p - 1) * (3 * q.nbytes + 2 * lse.nbytes)  # q, do, dq; lse, delta
    judge(case, [o, lse, *gradients], comm)


def test_zigzag_gives_every_rank_equally_much_to_do(comm: MPI.Intracomm) -> None:
    length = 2 * comm.size * 24
    mine = fivedp.sequence_shard(np.arange(length), comm, axis=0, layout="zigzag")
    visible = sum(int(i) + 1 for i in mine)
    assert comm.allgather(visible) == [length * (length + 1) // 2 // comm.size] * comm.size


@pytest.mark.parametrize(("order", "travels"), [("ring", "keys"), ("ring", "queries"), ("canonical", "keys")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_does_not_grow_with_the_ranks(
    comm: MPI.Intracomm, seed: int, dtype: Any, order: str, travels: str
) -> None:
    case = plain(np.random.default_rng(seed), 700, dtype, kv_heads=KV_HEADS[travels], causal=True, order=order)
    parts = collected(case.run(comm), comm)
    if parts is None:
        return
    alone, several = case.alone(), case.joined(parts)
    # Float64 is held against itself: its error on one rank is that of the oracle, which is as large.
    for name, x, y, exact in zip(RESULTS, several, alone, case.exact(), strict=True):
        errors = [math.sqrt(np.mean((result.astype(np.float64) - exact) ** 2)) for result in (x, y)]
        print(f"{name}: {errors[0]:.3g} on {comm.size} ranks, {errors[1]:.3g} on one")
        # In 16 bits the rounding at the end outweighs all sums, and is the same on one rank: a second one would show.
        assert errors[0] <= (1.1 if dtype == BFLOAT16 and name != "lse" else 2) * errors[1], name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gathered_shards_are_the_whole(comm: MPI.Intracomm, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    for length in (0, 1, comm.size, 5 * comm.size + 3):
        x = rng.standard_normal((2, length, 3)).astype(np.float32)
        share = fivedp.sequence_shard(x, comm, layout=layout)
        assert comm.allreduce(share.shape[1]) == length
        assert np.array_equal(fivedp.sequence_gather(share, comm, layout=layout), x)
        at_last = fivedp.sequence_gather(share, comm, axis=-2, layout=layout, root=comm.size - 1)
        assert (at_last is None) == (comm.rank != comm.size - 1)


def wrong_calls() -> list[tuple[type[Exception], str, dict[str, Any]]]:
    """(error, text in it, what one rank gives otherwise)."""
    x = np.ones((1, 8, 2, 4), np.float32)
    return [
        (fivedp.DTypeError, "`k` float64", {"k": x.astype(np.float64)}),
        (fivedp.DTypeError, "complex64", {"q": x.astype(np.complex64)}),
        (fivedp.DTypeError, "list", {"v": x.tolist()}),
        (fivedp.ShapeError, "(B, S_local, H, D)", {"q": x[0]}),
        (fivedp.ShapeError, "head size", {"q": x[..., :3]}),
        (fivedp.ShapeError, "multiple", {"q": np.ones((1, 8, 3, 4), np.float32)}),
        (fivedp.ShapeError, "all but the last", {"v": x[:, :7]}),
        (fivedp.ShapeError, "tokens on rank", {"k": x[:, :5], "v": x[:, :5]}),
        (fivedp.LayoutError, "layout is 'round'", {"layout": "round"}),
        (fivedp.LayoutError, "order is 'best'", {"order": "best"}),
        (fivedp.LayoutError, "window is 0", {"window": 0}),
        (fivedp.LayoutError, "softcap is -1", {"softcap": -1.0}),
        (fivedp.LayoutError, "the same keywords", {"causal": True}),
        (fivedp.ShapeError, "expected integers", {"positions": np.zeros(8)}),
        (fivedp.ShapeError, "1 alibi_slopes for 2 heads", {"alibi_slopes": [1.0]}),
        (fivedp.ShapeError, "rise from 0", {"cu_seqlens": [1, 8]}),
    ]


def test_wrong_arguments_of_one_rank_raise_on_all(comm: MPI.Intracomm) -> None:
    x = np.ones((1, 8, 2, 4), np.float32)
    odd = comm.size - 1
    for error, text, otherwise in wrong_calls():
        given: dict[str, Any] = {"q": x, "k": x, "v": x, "layout": "contiguous"}
        if comm.size == 1 and text in ("the same keywords", "tokens on rank"):
            continue  # alone there is nobody to differ from
        if comm.rank == odd:
            given |= otherwise
        with pytest.raises(error) as caught:
            fivedp.ring_attention(given.pop("q"), given.pop("k"), given.pop("v"), comm, **given)
        assert text in str(caught.value), caught.value
        assert len(set(comm.allgather(str(caught.value)))) == 1
    for unknown in ("windows", "return_lse"):  # the gradients have no log-sum-exp to return
        with pytest.raises(TypeError, match=f"'{unknown}'.*causal, layout"):
            fivedp.ring_attention_backward(x, x, x, x, x, x[..., 0], comm, **{unknown: True})
    # The communicator is as good as before.
    judge_case = plain(np.random.default_rng(0), 40)
    judge(judge_case, judge_case.run(comm), comm)
