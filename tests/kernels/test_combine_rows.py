"""The sum over a token's experts has one tree, over expert ids, whoever computes which part of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expert_operands import poisoned, scattered, sum_type
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_operands import BF16, REAL_TYPES, bits, draw

from fivedp.kernels import gemm as kernel
from fivedp.kernels.experts import Rows, combine_rows

F32 = np.dtype(np.float32)


def tree(leaves: dict[int, Any], begin: int, end: int) -> Any:
    """The sum of the leaves begin <= id < end, by halving; None where there are none."""
    present = [expert for expert in leaves if begin <= expert < end]
    if not present:
        return None
    if end - begin == 1:
        return leaves[begin]
    middle = begin + (end - begin + 1) // 2
    halves = [half for half in (tree(leaves, begin, middle), tree(leaves, middle, end)) if half is not None]
    return halves[0] if len(halves) == 1 else halves[0] + halves[1]


def subsets(rng: np.random.Generator, n_outputs: int, n_experts: int) -> list[Any]:
    sizes = rng.integers(0, min(n_experts, 9) + 1, n_outputs)
    return [np.sort(rng.choice(n_experts, size, replace=False)).astype(np.int32) for size in sizes]


def combined(rows: Rows, chosen: list[Any], weights: Any, n_experts: int, dtype: Any) -> Any:
    starts = np.cumsum([0, *(len(ids) for ids in chosen)]).astype(np.int64)
    experts = np.concatenate([*chosen, np.zeros(0, np.int32)]).astype(np.int32)
    combine_rows(rows, starts, weights, experts, n_experts, out := poisoned((len(chosen), rows.shape[1]), dtype))
    return out


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("n_experts", [1, 2, 3, 7, 8, 60, 127, 128, 256, 1000])
@pytest.mark.parametrize("size", [1, 37, 1500])
def test_the_order_is_the_tree(rng: np.random.Generator, dtype: Any, n_experts: int, size: int) -> None:
    chosen = subsets(rng, 13, n_experts)
    n = sum(len(ids) for ids in chosen)
    x, weights = draw(rng, (n, size), dtype), draw(rng, (n,), sum_type(dtype))
    rows = scattered(rng, x)
    wide = x.astype(sum_type(dtype))
    for given_weights, leaves in ((weights, weights[:, None] * wide), (None, wide)):
        for result in [dtype] if dtype == np.float64 else [F32, BF16]:
            out = combined(rows, chosen, given_weights, n_experts, result)
            at = 0
            for i, ids in enumerate(chosen):
                right = tree({int(e): leaves[at + j] for j, e in enumerate(ids)}, 0, n_experts)
                at += len(ids)
                right = np.zeros(size, result) if right is None else right.astype(result)
                assert bits(out[i]) == bits(right)


def nodes(begin: int, end: int) -> list[tuple[int, int]]:
    """All nodes of the tree over [begin, end)."""
    if end - begin == 1:
        return [(begin, end)]
    middle = begin + (end - begin + 1) // 2
    return [(begin, end), *nodes(begin, middle), *nodes(middle, end)]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_experts=st.integers(1, 70), k=st.integers(1, 12))
def test_partial_sums_may_stand_in_for_their_subtrees(seed: int, n_experts: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 40))
    ids = np.sort(rng.choice(n_experts, min(k, n_experts), replace=False)).astype(np.int32)
    x, weights = draw(rng, (len(ids), size), F32), draw(rng, (len(ids),), F32)
    everything = Rows([x], np.zeros(len(ids), np.int32), np.arange(len(ids), dtype=np.int32))
    whole = combined(everything, [ids], weights, n_experts, F32)

    # Disjoint nodes at random, until all experts are covered.
    cover: list[tuple[int, int]] = []
    candidates = nodes(0, n_experts)
    for index in rng.permutation(len(candidates)):
        begin, end = candidates[index]
        if all(end <= other_begin or begin >= other_end for other_begin, other_end in cover):
            cover.append((begin, end))
    names, parts = [], []
    for begin, end in sorted(cover):
        mine = np.flatnonzero((ids >= begin) & (ids < end)).astype(np.int32)
        if len(mine) == 0:
            continue
        rows = Rows([x], np.zeros(len(mine), np.int32), mine)
        parts.append(combined(rows, [ids[mine]], weights[mine], n_experts, F32)[0])
        names.append(int(rng.integers(begin, end)))
    table = Rows([np.array(parts)], np.zeros(len(parts), np.int32), np.arange(len(parts), dtype=np.int32))
    assert bits(combined(table, [np.array(names, np.int32)], None, n_experts, F32)) == bits(whole)


def test_a_product_is_rounded_before_it_is_added() -> None:
    # (1 + 2^-12)^2 - 1 is 2^-11 + 2^-24 exactly; the rounded product has lost the last term.
    near_one = np.float32(1 + 2.0**-12)
    x = np.array([[-1], [near_one]], np.float32)
    rows = Rows([x], np.zeros(2, np.int32), np.arange(2, dtype=np.int32))
    out = combined(rows, [np.array([0, 1], np.int32)], np.array([1, near_one], np.float32), 2, F32)
    assert out[0, 0] == np.float32(2.0**-11)


def test_outputs_without_rows_are_zero_and_no_rows_at_all_are_fine(rng: np.random.Generator) -> None:
    none = Rows([draw(rng, (3, 20), F32)], np.zeros(0, np.int32), np.zeros(0, np.int32))
    empty = [np.zeros(0, np.int32)] * 4
    assert bits(combined(none, empty, None, 5, F32)) == bits(np.zeros((4, 20), F32))
    assert combined(none, [], None, 5, F32).shape == (0, 20)


@pytest.mark.usefixtures("restore_threads")
def test_bits_do_not_depend_on_the_number_of_threads_or_on_other_outputs(rng: np.random.Generator) -> None:
    chosen = subsets(rng, 400, 64)
    n = sum(len(ids) for ids in chosen)
    x, weights = draw(rng, (n, 600), F32), draw(rng, (n,), F32)
    rows = scattered(rng, x)
    results = []
    for count in (1, 2, 3):
        kernel.set_threads(count)
        results.append(combined(rows, chosen, weights, 64, F32))
    assert len({bits(out) for out in results}) == 1
    begin = sum(len(ids) for ids in chosen[:37])
    mine = slice(begin, begin + len(chosen[37]))
    alone = combined(scattered(rng, x[mine]), [chosen[37]], weights[mine], 64, F32)
    assert bits(alone[0]) == bits(results[0][37])


def test_arguments_that_do_not_fit(rng: np.random.Generator) -> None:
    rows = scattered(rng, draw(rng, (4, 6), F32))
    starts, experts, weights = np.array([0, 2, 4]), np.array([0, 3, 1, 2], np.int32), np.ones(4, np.float32)
    out = np.zeros((2, 6), np.float32)
    combine_rows(rows, starts, weights, experts, 4, out)
    for bad, words in (
        ((rows, np.array([0, 2, 5]), weights, experts, 4, out), "starts goes from 0 to 5; 0 to 4"),
        ((rows, np.array([0, 5, 4]), weights, experts, 4, out), "starts falls from 5 to 4"),
        ((rows, starts, weights, experts, 3, out), r"experts\[1\] is 3; 0 to 2"),
        ((rows, starts, weights, np.array([0, 0, 1, 2], np.int32), 4, out), "strictly rising"),
        (
            (rows, starts, weights, np.array([3, 0, 1, 2], np.int32), 4, out),
            r"experts\[1\] is 0 after 3 within output 0",
        ),
        ((rows, starts, weights, experts[:3], 4, out), "experts has 3 entries and there are 4 rows"),
        ((rows, starts, weights[:3], experts, 4, out), "weights has shape"),
        ((rows, starts, weights, experts, -1, out), "n_experts is -1"),
        ((rows, starts, weights, experts, 4, out[:1]), "out has shape"),
        ((rows, starts, weights, experts, 4, np.zeros((6, 2), np.float32).T), "out is strided"),
    ):
        with pytest.raises(ValueError, match=words):
            combine_rows(*bad)
    for bad, words in (
        ((rows, starts, weights.astype(np.float64), experts, 4, out), "weights is float64; float32"),
        ((rows, starts, weights, experts.astype(np.int64), 4, out), "experts is int64; int32"),
        ((rows, starts, weights, experts, 4, out.astype(np.float64)), "out is float64 beside operands of float32"),
        ((out, starts, weights, experts, 4, out), "rows is a ndarray"),
    ):
        with pytest.raises(TypeError, match=words):
            combine_rows(*bad)
