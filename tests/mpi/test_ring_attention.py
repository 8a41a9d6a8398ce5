"""Ring attention over ranks: values, bits, bytes and errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.comm.grid import grid_of
from mpi_attention import BFLOAT16, LAYOUTS, Case, draw, judge

RANKS = (1, 2, 3, 5, 8)
TIMEOUT = 300


def plain(rng: np.random.Generator, length: int, dtype: Any = np.float32, **keywords: Any) -> Case:
    q, do = (rng.standard_normal((1, length, 4, 16)).astype(dtype) for _ in range(2))
    k, v = (rng.standard_normal((1, length, 2, 16)).astype(dtype) for _ in range(2))
    return Case(q, k, v, do, np.zeros((1, 4, length), np.float64 if dtype == np.float64 else np.float32), keywords)


def test_every_option_on_drawn_cases(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(15):
        case = draw(rng)
        judge(case, case.run(comm), case.exact())


def test_canonical_order_has_the_bits_of_one_rank(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(6):
        case = draw(rng)
        several = case.run(comm, order="canonical")
        alone = case.run(MPI.COMM_SELF, order="canonical", layout="contiguous")
        judge(case, several, case.exact())
        for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), several, alone, strict=True):
            assert x.tobytes() == y.tobytes(), (name, case.keywords, case.q.shape, case.k.shape)


def test_two_calls_have_the_same_bits(comm: MPI.Intracomm, seed: int) -> None:
    case = plain(np.random.default_rng(seed), 333, causal=True)
    for x, y in zip(case.run(comm), case.run(comm), strict=True):
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("shared", ["shared window", "messages"])
def test_long_blocks_through_window_and_messages(
    comm: MPI.Intracomm, seed: int, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shared == "messages":
        monkeypatch.setenv("FIVEDP_SHARED", "0")
    apart = comm.Dup()  # a grid of its own, which reads the setting
    case = plain(np.random.default_rng(seed), 1500, causal=True, layout="zigzag")
    judge(case, case.run(apart), case.exact())


def test_positions_place_tokens_anywhere(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = 97
    case = plain(rng, length, causal=True, window=30)
    order = rng.permutation(length)
    owner = rng.integers(0, comm.size, length)  # uneven, perhaps nothing
    mine = order[owner == comm.rank]
    o, lse = fivedp.ring_attention(
        case.q[:, mine], case.k[:, mine], case.v[:, mine], comm, causal=True, window=30, positions=mine
    )
    dq, dk, dv = fivedp.ring_attention_backward(
        case.do[:, mine], case.q[:, mine], case.k[:, mine], case.v[:, mine], o, lse, comm,
        causal=True, window=30, positions=mine,
    )  # fmt: skip
    whole = case.exact()
    parts = [whole[0][:, mine], whole[1][..., mine], *(x[:, mine] for x in whole[2:])]
    judge(case, [o, lse, dq, dk, dv], parts)


def test_blocks_that_nobody_sees_are_not_sent(comm: MPI.Intracomm, seed: int) -> None:
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
    assert sent(window) == (p - 1) * size_of
    documents = plain(rng, block * p, layout="contiguous", cu_seqlens=np.arange(p + 1) * block)
    assert sent(documents) == 0


def test_zigzag_gives_every_rank_equally_much_to_do(comm: MPI.Intracomm) -> None:
    length = 2 * comm.size * 24
    mine = fivedp.sequence_shard(np.arange(length), comm, axis=0, layout="zigzag")
    visible = sum(int(i) + 1 for i in mine)
    assert comm.allgather(visible) == [length * (length + 1) // 2 // comm.size] * comm.size


def test_error_does_not_grow_with_the_ranks(comm: MPI.Intracomm, seed: int) -> None:
    for dtype in (np.float32, BFLOAT16):
        case = plain(np.random.default_rng(seed), 700, dtype, causal=True)
        wanted = case.exact()

        def worst(results: list[Any], wanted: list[Any] = wanted) -> list[float]:
            return [math.sqrt(np.mean((x.astype(np.float64) - y) ** 2)) for x, y in zip(results, wanted, strict=True)]

        alone = worst(case.run(MPI.COMM_SELF))
        for x, y in zip(worst(case.run(comm)), alone, strict=True):
            assert x <= 2 * y + 1e-12


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
    # The communicator is as good as before.
    judge_case = plain(np.random.default_rng(0), 40)
    judge(judge_case, judge_case.run(comm), judge_case.exact())
