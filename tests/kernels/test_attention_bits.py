"""The order of every sum of attention is fixed: which bits change with the way of computing, and which don't.

Forward and d_q: a query's sums are those of its key tiles (84 keys) in rising order, whoever computes it. d_k and d_v:
a key's sums are those of the query tiles (64 query rows) in rising order. A cut at a border of tiles changes no bit.
All of this holds for products of pairs of bfloat16 too, for a pair begins at an even place of its tile. But their bits
are those of the instruction, not those of bfloat16 widened.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_operands import BF16, REAL_TYPES, bits

from attention_operands import Case, backward, draw_case, forward, part, pieces, places
from fivedp.kernels import attention as kernel
from fivedp.kernels import gemm
from fivedp.reference import attention_reference as oracle

KEY_TILE = 84
QUERY_TILE = 64  # queries, where the heads that share a key head are 1 or odd

MASKS: dict[str, Any] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 70},
    "curved": {"softcap": 3.0, "slopes": True},
    "documents": {"documents": 3, "order": "random", "window": 150},
}


def all_of(case: Case, q_borders: list[int] | None = None, k_borders: list[int] | None = None) -> list[Any]:
    """out, lse, d_q, d_k, d_v; the cuts concern the gradients."""
    out, lse = forward(case)
    return [out, lse, *backward(case, lse, kernel.delta(case.d_out, out), q_borders, k_borders)]


def rows_of(case: Case, rows: slice) -> Case:
    """Some queries of a case."""
    return replace(case, q=case.q[:, rows], d_out=case.d_out[:, rows], mask=part(case.mask, rows))


def assert_same_bits(found: list[Any], expected: list[Any]) -> None:
    for name, x, y in zip(("out", "lse", "d_q", "d_k", "d_v"), found, expected, strict=False):
        assert bits(x) == bits(y), name


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.usefixtures("restore_threads")
def test_bits_do_not_depend_on_the_number_of_threads(seed: int, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(seed)
    for queries in (1, 300):
        keys = 8000 if queries == 1 else 400
        case = draw_case(rng, dtype, batch=2, kv_heads=3, group=2, queries=queries, keys=keys, **MASKS[kind])
        results = []
        for count in (1, 2, 3):
            gemm.set_threads(count)
            results.append(all_of(case))
        for result in results[1:]:
            assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_a_state_has_the_same_bits_when_keys_come_in_pieces_of_whole_tiles(seed: int, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(seed)
    keys = 500
    case = draw_case(rng, dtype, batch=2, kv_heads=2, group=2, queries=60, keys=keys, size=20, **MASKS[kind])
    states = []
    for cuts in ([], [84], [168, 252], [336], [84, 168, 252, 336, 420], [0, 84, 84]):
        state = kernel.empty_state(case.q, case.v.shape[-1])
        for piece in pieces([0, *cuts, keys]):
            kernel.forward(case.q, case.k[:, piece], case.v[:, piece], part(case.mask, keys=piece), state)
        states.append(bits(state.highest) + bits(state.total) + bits(state.output))
    assert len(set(states)) == 1


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.usefixtures("restore_threads")
def test_blocks_of_one_call_have_the_bits_of_a_call_for_each(seed: int, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(seed)
    gemm.set_threads(2)
    for queries, keys in ((130, 700), (3, 50), (0, 20)):
        case = draw_case(rng, dtype, batch=2, kv_heads=2, group=3, queries=queries, keys=keys, size=20, **MASKS[kind])
        before = rng.integers(0, keys // 2)  # of the keys, that are in the state already
        cuts = [before, *sorted(rng.integers(before, keys + 1, 4).tolist()), keys]
        blocks = [(case.k[:, piece], case.v[:, piece], part(case.mask, keys=piece)) for piece in pieces(cuts)]
        states = []
        for together in (True, False):
            state = kernel.empty_state(case.q, case.v.shape[-1])
            first = slice(0, before)
            kernel.forward(case.q, case.k[:, first], case.v[:, first], part(case.mask, keys=first), state)
            for chain in [blocks] if together else [[block] for block in blocks]:
                kernel.forward_blocks(case.q, chain, state)
            states.append(bits(state.highest) + bits(state.total) + bits(state.output))
        assert states[0] == states[1]


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.usefixtures("restore_threads")
def test_blocks_of_queries_of_one_call_have_the_bits_of_a_call_for_each(seed: int, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(seed)
    gemm.set_threads(2)
    for queries, keys in ((700, 130), (90, 4032 + 90), (50, 3), (20, 0)):  # 4032 keys stay packed
        case = draw_case(rng, dtype, batch=2, kv_heads=2, group=3, queries=queries, keys=keys, size=20, **MASKS[kind])
        out, lse = forward(case)
        delta = kernel.delta(case.d_out, out)
        sums = lse.dtype
        rows = list(pieces([0, *sorted(rng.integers(0, queries + 1, 4).tolist()), queries]))
        results = []
        for together in (True, False):
            d_q = [np.full(case.q[:, piece].shape, 0.5, sums) for piece in rows]
            d_k, d_v = (np.full(x.shape, 0.25, sums) for x in (case.k, case.v))  # added to
            blocks = [
                kernel.Queries(
                    case.d_out[:, piece], case.q[:, piece], part(case.mask, piece),
                    lse[..., piece].copy(), delta[..., piece].copy(), d_q[i],
                )
                for i, piece in enumerate(rows)
            ]  # fmt: skip
            for chain in [blocks] if together else [[block] for block in blocks]:
                kernel.backward_blocks(chain, case.k, case.v, d_k, d_v)
            results.append([bits(x) for x in (*d_q, d_k, d_v)])
        assert results[0] == results[1]


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_gradients_have_the_same_bits_when_keys_come_in_pieces_of_whole_tiles(seed: int, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(seed)
    keys = 400
    case = draw_case(rng, dtype, batch=2, kv_heads=2, group=2, queries=60, keys=keys, size=20, **MASKS[kind])
    whole = all_of(case)
    for cuts in ([84, 336], [168], [0, 252, 252]):
        assert_same_bits(all_of(case, k_borders=[0, *cuts, keys]), whole)
    for cuts in (sorted(rng.integers(0, keys + 1, 3).tolist()), [1, 2, 399]):  # those of the keys in any pieces
        *_, d_k, d_v = all_of(case, k_borders=[0, *cuts, keys])
        assert bits(d_k) == bits(whole[3])
        assert bits(d_v) == bits(whole[4])


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_gradients_have_the_same_bits_for_more_keys_than_stay_packed(seed: int, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(seed)
    keys = 4032 + 90  # those of one group of blocks, and more than a key tile; the queries are two ranges
    case = draw_case(rng, dtype, batch=1, kv_heads=2, group=1, queries=600, keys=keys, size=20, **MASKS[kind])
    whole = all_of(case)
    for step in (4032, 336):  # a group in a call of its own, then each block
        assert_same_bits(all_of(case, k_borders=[0, *range(step, keys, step), keys]), whole)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("group", [1, 3])
def test_gradients_have_the_same_bits_when_queries_come_in_pieces_of_whole_tiles(
    seed: int, dtype: Any, kind: str, group: int
) -> None:
    rng = np.random.default_rng(seed)
    queries = 150
    case = draw_case(rng, dtype, batch=2, kv_heads=2, group=group, queries=queries, keys=170, size=20, **MASKS[kind])
    whole = all_of(case)
    for cuts in ([64], [128], [0, 64, 128, 128]):
        assert_same_bits(all_of(case, q_borders=[0, *cuts, queries]), whole)
    for cuts in (sorted(rng.integers(0, queries + 1, 3).tolist()), [1, 2, 149]):  # those of the queries in any pieces
        assert_same_bits(all_of(case, q_borders=[0, *cuts, queries])[:3], whole)


@pytest.mark.parametrize("group", [1, 3])
def test_so_many_queries_that_a_call_takes_them_in_chunks(seed: int, group: int) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, np.float32, group=group, queries=2500, keys=60, causal=True, order="random")
    whole = all_of(case)
    cuts = sorted((QUERY_TILE * rng.integers(0, 40, 2)).tolist())
    assert_same_bits(all_of(case, q_borders=[0, *cuts, 2500]), whole)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_a_query_has_the_same_bits_alone(seed: int, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, batch=1, kv_heads=2, group=2, queries=100, keys=200, size=20, **MASKS[kind])
    out, lse, d_q, _, _ = all_of(case)
    i = int(rng.integers(100))
    for rows in (slice(i, i + 1), slice(0, 37), slice(37, 100)):
        assert_same_bits(all_of(rows_of(case, rows))[:3], [out[:, rows], lse[..., rows], d_q[:, rows]])


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_a_batch_and_head_has_the_same_bits_alone(seed: int, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, batch=3, kv_heads=2, group=3, queries=70, keys=150, size=20, **MASKS[kind])
    out, lse, d_q, d_k, d_v = all_of(case)
    slopes = case.mask.slopes
    for b in range(3):
        for h in range(2):
            one, heads, head = slice(b, b + 1), slice(3 * h, 3 * h + 3), slice(h, h + 1)
            alone = Case(
                case.q[one, :, heads], case.k[one, :, head], case.v[one, :, head], case.d_out[one, :, heads],
                replace(case.mask, slopes=None if slopes is None else slopes[heads]),
            )  # fmt: skip
            expected = [out[one, :, heads], lse[one, heads], d_q[one, :, heads], d_k[one, :, head], d_v[one, :, head]]
            assert_same_bits(all_of(alone), expected)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_shared_keys_are_as_good_as_repeated_ones(seed: int, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, batch=2, kv_heads=2, group=3, queries=70, keys=150, size=20, **MASKS[kind])
    repeated = replace(case, k=np.repeat(case.k, 3, axis=2), v=np.repeat(case.v, 3, axis=2))
    assert_same_bits(all_of(repeated)[:3], all_of(case)[:3])


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_bits_do_not_depend_on_strides(seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, batch=2, kv_heads=2, group=2, queries=50, keys=120, size=20, causal=True)
    arrays = (case.q, case.k, case.v, case.d_out)
    turned = [np.ascontiguousarray(x.transpose(3, 0, 2, 1)).transpose(1, 3, 2, 0) for x in arrays]
    heads_first = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in arrays]
    for other in (turned, heads_first):
        assert_same_bits(all_of(Case(*other, case.mask)), all_of(case))


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_nan_changes_no_bit_of_the_rows_that_do_not_see_it(seed: int, dtype: Any, where: str) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, group=2, queries=150, keys=150, size=20, causal=True)
    at = int(rng.integers(150))
    x = getattr(case, where).copy()
    x[0, at] = np.nan
    sees = oracle.seen(case.mask)[:, at]
    found = []
    for each in (replace(case, **{where: x}), case):
        out, lse, d_q, _, _ = all_of(each)
        found.append([out[:, ~sees], lse[..., ~sees], d_q[:, ~sees]])
    assert_same_bits(*found)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(REAL_TYPES),
    kind=st.sampled_from(list(MASKS)),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    queries=st.integers(1, 140),
    keys=st.integers(1, 260),
    head_sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_any_cuts_between_tiles_give_the_bits_of_the_plain_call(
    seed: int, dtype: Any, kind: str, heads: tuple[int, int], queries: int, keys: int, head_sizes: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(
        rng, dtype, batch=heads[0], kv_heads=heads[1], queries=queries, keys=keys, size=head_sizes[0],
        v_size=head_sizes[1], **MASKS[kind],
    )  # fmt: skip
    whole = all_of(case)
    q_cuts, k_cuts = (
        sorted(tile * int(rng.integers(n // tile + 1)) for _ in range(2))
        for n, tile in ((queries, QUERY_TILE), (keys, KEY_TILE))
    )
    assert_same_bits(all_of(case, [0, *q_cuts, queries], [0, *k_cuts, keys]), whole)
    assert_same_bits(list(forward(case, [0, *k_cuts, keys])), whole[:2])


PROGRAM = """
import hashlib, sys
sys.path[:0] = sys.argv[2:]
import numpy as np
from attention_operands import backward, draw_case, forward
from kernel_operands import REAL_TYPES, bits
from fivedp.kernels import attention
from fivedp.kernels.gemm import isa
rng = np.random.default_rng(int(sys.argv[1]))
print(isa())
for dtype in REAL_TYPES:
    digest = hashlib.sha256()
    for queries, keys, size, v_size, more in (
        (1, 1, 1, 1, {}), (3, 400, 64, 64, {"causal": True}), (37, 90, 33, 140, {"softcap": 2.0, "window": 60}),
        (65, 337, 7, 5, {"slopes": True, "documents": 3, "order": "random", "causal": True}), (20, 85, 128, 16, {}),
        (50, 100, 16, 17, {"softcap": 30.0, "slopes": True}),
    ):
        case = draw_case(
            rng, dtype, batch=2, kv_heads=2, group=2, queries=queries, keys=keys, size=size, v_size=v_size, **more)
        out, lse = forward(case)
        for x in (out, lse, *backward(case, lse, attention.delta(case.d_out, out))):
            digest.update(bits(x))
    print(digest.hexdigest())
"""


def test_all_supported_sets_give_the_same_bits(seed: int) -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    folders = [here, os.path.dirname(here)]
    found = {}
    for isa in gemm.supported_isas():
        command = [sys.executable, "-c", PROGRAM, str(seed), *folders]
        environment = {**os.environ, "FIVEDP_ISA": isa}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.split()
        assert lines[0] == isa
        found[isa] = lines[1:]
    bf16 = REAL_TYPES.index(BF16)
    assert len({tuple(lines[:bf16] + lines[bf16 + 1 :]) for lines in found.values()}) == 1, found
    # Where pairs are multiplied, bfloat16 has the bits of the instruction.
    assert len({lines[bf16] for isa, lines in found.items() if "bf16" not in isa}) == 1, found


def test_empty_pieces_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, np.float32, queries=10, keys=20)
    whole = all_of(case)
    assert_same_bits(list(forward(case, [0, 0, 20, 20])), whole[:2])
    assert_same_bits(all_of(case, [0, 0, 10, 10], [0, 0, 20, 20]), whole)
    far = replace(case, mask=replace(case.mask, causal=True, q_position=places(10), k_position=places(20, 10)))
    assert not any(d.any() for d in all_of(far)[2:])  # nothing is seen
