"""tree_sum on the GPU has the bits of the CPU's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pointwise_operands import BF16, F64, Guarded, draw

from fivedp.kernels import gemm as cpu
from fivedp.kernels.cuda.tree_sum import tree_sum

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
SPANS = [
    [(0, 8)],
    [(0, 4), (4, 4)],
    [(i, 1) for i in range(8)],
    [(i, 1) for i in range(11)],
    [(0, 4), (4, 2), (6, 1), (7, 1)],
    [(0, 2), (2, 1), (3, 1), (4, 4)],
    [(8, 4), (12, 2), (14, 1)],
    [(i, 1) for i in range(63)],
]
SCALES = [(1.0, 0.0), (0.7, 0.0), (1.0, 1.0), (-1.3, 0.3)]


def bits(array: Any) -> Any:
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("types", [(F32, F32), (np.dtype(F64), np.dtype(F64)), (F32, BF16)], ids=str)
@pytest.mark.parametrize("spans", SPANS, ids=lambda spans: f"{len(spans)} from {spans[0]}")
def test_bits_are_those_of_the_cpu(xp: Any, host: Any, seed: int, types: Any, spans: Any) -> None:
    rng = np.random.default_rng(seed)
    dtype, out_type = types
    for number, (alpha, beta) in enumerate(SCALES):
        shape = [(3, 7), (2, 3, 130), (1, 1), (33, 64)][(number + len(spans)) % 4]
        # All aligned and contiguous, or not.
        place: dict[str, int] = [{}, {"offset": 1}, {"gap": 3}][rng.integers(3)]
        partials = [draw(rng, shape, dtype) * 10.0 ** rng.integers(-3, 4) for _ in spans]
        before = draw(rng, shape, out_type) if beta else np.full(shape, np.nan, out_type)
        cpu.tree_sum(partials, spans, right := before.copy(), alpha=alpha, beta=beta)
        out = Guarded(xp, shape, out_type, values=before, **place)
        given = [Guarded(xp, shape, dtype, values=partial, **place).array for partial in partials]
        tree_sum(given, spans, out.array, alpha=alpha, beta=beta)
        np.testing.assert_array_equal(bits(host(out.array)), bits(right))
        out.check(host)


def test_any_strides_and_the_place_of_a_partial(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = (draw(rng, (5, 6, 7), F64) for _ in range(3))
    right = (a + b) + c
    first = xp.asarray(np.ascontiguousarray(a.transpose(2, 0, 1))).transpose(1, 2, 0)
    backward = xp.asarray(b[:, ::-1].copy())[:, ::-1]
    third = xp.asarray(c.copy())
    tree_sum([first, backward, third], [(0, 1), (1, 1), (2, 2)], third)
    np.testing.assert_array_equal(host(third), right)


def test_float16_is_rounded_once(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = draw(rng, (9, 100), F32), draw(rng, (9, 100), F32)
    out = xp.full((9, 100), np.nan, F16)
    tree_sum([xp.asarray(a), xp.asarray(b)], [(0, 4), (4, 4)], out, alpha=0.5)
    np.testing.assert_array_equal(host(out), (np.float32(0.5) * (a + b)).astype(F16))
    tree_sum([xp.zeros((0, 4), F32)], [(0, 8)], xp.zeros((0, 4), F32))


def test_what_is_no_tree_is_refused(xp: Any) -> None:
    x, out = xp.zeros((2, 3), np.float32), xp.zeros((2, 3), np.float32)
    for spans in ([(0, 3), (3, 5)], [(0, 2), (4, 4)], [(4, 4), (0, 4)], [(0, 4), (2, 2)], [(1, 2), (3, 1)]):
        with pytest.raises(ValueError, match="tree_sum: span"):
            tree_sum([x, x], spans, out)
    with pytest.raises(ValueError, match="tree_sum: there are 65 partials; 64 or fewer would be right"):
        tree_sum([x] * 65, [(i, 1) for i in range(65)], out)
    with pytest.raises(TypeError, match="tree_sum: out has type f8 and the partials f4"):
        tree_sum([x], [(0, 8)], xp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"tree_sum: a partial has shape \(2, 3\) and out \(3, 2\)"):
        tree_sum([x], [(0, 8)], xp.zeros((3, 2), np.float32))
