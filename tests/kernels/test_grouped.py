"""Products of rows grouped by expert: the bits of one gemm per group, wherever the rows lie."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from expert_operands import POISON, activation_error, hidden_of, offsets_of, poisoned, rounding, scattered
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_operands import BF16, REAL_TYPES, STRIDES, assert_as_exact_as_numpy, bits, cut, draw, with_strides

from fivedp.kernels import gemm as kernel
from fivedp.kernels.experts import Rows, expert_hidden, grouped_matmul, grouped_outer
from fivedp.kernels.gemm import gemm

COUNTS = [
    [5],
    [0],
    [0, 7, 0, 1, 130, 0],
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15],
    [0, 0, 300, 0],
    [3] * 60,
    [129, 257],
]


def matmul_by_gemm(x: Any, w: Any, counts: list[int], dtype: Any) -> Any:
    out = poisoned((sum(counts), w.shape[2]), dtype)
    borders = offsets_of(counts)
    for e in range(len(counts)):
        gemm(x[borders[e] : borders[e + 1]], w[e], out[borders[e] : borders[e + 1]], cuts=(0, x.shape[1]))
    return out


def outer_by_gemm(x: Any, dy: Any, counts: list[int], dtype: Any) -> Any:
    out = poisoned((len(counts), x.shape[1], dy.shape[1]), dtype)
    borders = offsets_of(counts)
    for e in range(len(counts)):
        rows = slice(borders[e], borders[e + 1])
        gemm(x[rows].T, dy[rows], out[e], cuts=(0, counts[e]))
    return out


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("k", "n"), [(300, 150), (33, 7), (1030, 129)])
def test_every_group_has_the_bits_of_gemm(
    rng: np.random.Generator, dtype: Any, counts: list[int], k: int, n: int
) -> None:
    x, w = draw(rng, (sum(counts), k), dtype), draw(rng, (len(counts), k, n), dtype)
    for result in {np.dtype(dtype), np.dtype(np.float32) if dtype == BF16 else np.dtype(dtype)}:
        grouped_matmul(x, w, offsets_of(counts), out := poisoned((len(x), n), result))
        assert bits(out) == bits(matmul_by_gemm(x, w, counts, result))


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_values_are_as_exact_as_numpys(rng: np.random.Generator, dtype: Any) -> None:
    counts, k, n = [4, 0, 100, 17], 500, 70
    borders = offsets_of(counts)
    x, w, dy = (draw(rng, shape, dtype) for shape in ((121, k), (4, k, n), (121, n)))
    grouped_matmul(x, w, borders, y := poisoned((121, n), dtype))
    grouped_outer(x, dy, borders, dw := poisoned((4, k, n), dtype))
    for e in range(4):
        rows = slice(borders[e], borders[e + 1])
        assert_as_exact_as_numpy(y[rows], x[rows], w[e])
        if counts[e]:
            assert_as_exact_as_numpy(dw[e], x[rows].T, dy[rows])


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_rows_that_lie_anywhere_give_the_bits_of_their_copy(
    rng: np.random.Generator, dtype: Any, counts: list[int]
) -> None:
    k, n, rows = 270, 101, sum(counts)
    borders = offsets_of(counts)
    x, w, dy = (draw(rng, shape, dtype) for shape in ((rows, k), (len(counts), k, n), (rows, n)))
    grouped_matmul(x, w, borders, right := poisoned((rows, n), dtype))
    grouped_matmul(scattered(rng, x), w, borders, out := poisoned((rows, n), dtype))
    assert bits(out) == bits(right)
    grouped_outer(x, dy, borders, right := poisoned(w.shape, dtype))
    for left, other in ((scattered(rng, x), dy), (x, scattered(rng, dy)), (scattered(rng, x), scattered(rng, dy))):
        grouped_outer(left, other, borders, out := poisoned(w.shape, dtype))
        assert bits(out) == bits(right)


def test_a_row_may_be_named_more_than_once(rng: np.random.Generator) -> None:
    home, w = draw(rng, (3, 40), np.float32), draw(rng, (2, 40, 50), np.float32)
    index = np.array([2, 2, 0, 1, 2], np.int32)
    grouped_matmul(Rows([home], np.zeros(5, np.int32), index), w, offsets_of([3, 2]), out := poisoned((5, 50), "f4"))
    assert bits(out) == bits(matmul_by_gemm(home[index], w, [3, 2], np.float32))


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("kind", STRIDES)
def test_strides_do_not_matter(rng: np.random.Generator, dtype: Any, kind: str) -> None:
    counts, k, n = [3, 0, 40, 9], 140, 90
    borders = offsets_of(counts)
    x, w, dy = (draw(rng, shape, dtype) for shape in ((52, k), (4, k, n), (52, n)))
    right, outer = matmul_by_gemm(x, w, counts, dtype), outer_by_gemm(x, dy, counts, dtype)
    for left, weights in ((with_strides(rng, x, kind), w), (x, with_strides(rng, w, kind))):
        grouped_matmul(left, weights, borders, out := with_strides(rng, poisoned((52, n), dtype), kind))
        assert bits(out) == bits(right)
    grouped_outer(
        with_strides(rng, x, kind), with_strides(rng, dy, kind), borders,
        out := with_strides(rng, poisoned((4, k, n), dtype), kind),
    )  # fmt: skip
    assert bits(out) == bits(outer)
    transposed = np.ascontiguousarray(w.transpose(0, 2, 1)).transpose(0, 2, 1)
    grouped_matmul(scattered(rng, x), transposed, borders, out := poisoned((52, n), dtype))
    assert bits(out) == bits(right)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_pieces_along_k_are_one_product(rng: np.random.Generator, dtype: Any) -> None:
    counts, f, n = [3, 20, 0, 150], 130, 70
    borders = offsets_of(counts)
    d_gate, d_up = draw(rng, (173, f), dtype), draw(rng, (173, f), dtype)
    w_gate, w_up = draw(rng, (4, n, f), dtype), draw(rng, (4, n, f), dtype)
    turned = [w_gate.transpose(0, 2, 1), w_up.transpose(0, 2, 1)]
    right = matmul_by_gemm(np.hstack([d_gate, d_up]), np.concatenate(turned, axis=1), counts, dtype)
    for x in ([d_gate, d_up], [scattered(rng, d_gate), d_up], cut(rng, np.hstack([d_gate, d_up]), 1, 4)):
        grouped_matmul(x, turned, borders, out := poisoned((173, n), dtype))
        assert bits(out) == bits(right)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("k", "n"), [(70, 90), (5, 150), (150, 3)])
def test_the_outer_product_has_the_bits_of_gemm_over_the_groups_rows(
    rng: np.random.Generator, dtype: Any, counts: list[int], k: int, n: int
) -> None:
    x, dy = draw(rng, (sum(counts), k), dtype), draw(rng, (sum(counts), n), dtype)
    for result in {np.dtype(dtype), np.dtype(np.float32) if dtype == BF16 else np.dtype(dtype)}:
        grouped_outer(x, dy, offsets_of(counts), out := poisoned((len(counts), k, n), result))
        assert bits(out) == bits(outer_by_gemm(x, dy, counts, result))
        for e, count in enumerate(counts):
            if count == 0:
                assert bits(out[e]) == bits(np.zeros((k, n), result))


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("counts", [[400, 0, 3, 90, 1, 8], [0, 700], [9] * 40], ids=str)
@pytest.mark.usefixtures("restore_threads")
def test_bits_do_not_depend_on_the_number_of_threads(rng: np.random.Generator, dtype: Any, counts: list[int]) -> None:
    rows, k, n, borders = sum(counts), 256, 300, offsets_of(counts)
    x, dy = draw(rng, (rows, k), dtype), draw(rng, (rows, n), dtype)
    w_gate, w_up = draw(rng, (len(counts), k, n), dtype), draw(rng, (len(counts), k, n), dtype)
    results = set()
    for count in (1, 2, 3):
        kernel.set_threads(count)
        grouped_matmul(x, w_up, borders, y := poisoned((rows, n), dtype))
        grouped_outer(x, dy, borders, dw := poisoned(w_up.shape, dtype))
        expert_hidden(x, w_gate, w_up, borders, hidden := poisoned((rows, n), dtype))
        results.add(bits(y) + bits(dw) + bits(hidden))
    assert len(results) == 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    k=st.integers(0, 400),
    n=st.integers(0, 150),
    dtype=st.sampled_from(REAL_TYPES),
    kind=st.sampled_from(STRIDES),
)
def test_any_groups_have_the_bits_of_gemm(seed: int, counts: list[int], k: int, n: int, dtype: Any, kind: str) -> None:
    rng = np.random.default_rng(seed)
    borders, rows = offsets_of(counts), sum(counts)
    x, w, dy = (draw(rng, shape, dtype) for shape in ((rows, k), (len(counts), k, n), (rows, n)))
    grouped_matmul(scattered(rng, x), with_strides(rng, w, kind), borders, out := poisoned((rows, n), dtype))
    assert bits(out) == bits(matmul_by_gemm(x, w, counts, dtype))
    grouped_outer(scattered(rng, x), with_strides(rng, dy, kind), borders, out := poisoned(w.shape, dtype))
    assert bits(out) == bits(outer_by_gemm(x, dy, counts, dtype))


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("counts", [[1, 8, 0, 30], [0, 200], [0]], ids=str)
def test_hidden_is_the_activation_of_the_stored_products(
    rng: np.random.Generator, dtype: Any, activation: str, counts: list[int]
) -> None:
    h, f, rows, borders = 90, 301, sum(counts), offsets_of(counts)
    x = draw(rng, (rows, h), dtype)
    w_up = draw(rng, (len(counts), h, f), dtype)
    w_gate = draw(rng, w_up.shape, dtype) if activation == "swiglu" else None
    kept = None if w_gate is None else poisoned((rows, f), dtype)
    up = poisoned((rows, f), dtype)
    expert_hidden(
        scattered(rng, x), w_gate, w_up, borders, hidden := poisoned((rows, f), dtype),
        gate=kept, up=up, activation=activation,
    )  # fmt: skip
    assert bits(up) == bits(matmul_by_gemm(x, w_up, counts, dtype))
    if w_gate is not None:
        assert bits(kept) == bits(matmul_by_gemm(x, w_gate, counts, dtype))
    right = hidden_of(activation, kept, up)
    allowed = activation_error(activation, kept, up) * rounding(dtype) * abs(right) + 1e-36
    assert (abs(hidden.astype(np.float64) - right) <= allowed).all()
    expert_hidden(x, w_gate, w_up, borders, again := poisoned((rows, f), dtype), activation=activation)
    assert bits(again) == bits(hidden)
    wide = poisoned((rows, f + 5), dtype)
    expert_hidden(x, w_gate, w_up, borders, wide[:, :f], activation=activation)
    assert bits(wide[:, :f]) == bits(hidden)
    assert (wide[:, f:] == np.asarray(POISON, dtype)).all()


def test_nothing_is_written_beside_the_result(rng: np.random.Generator) -> None:
    counts = [0, 20, 4]
    x, w = draw(rng, (24, 30), np.float32), draw(rng, (3, 30, 70), np.float32)
    wide = poisoned((26, 75), np.float32)
    grouped_matmul(x, w, offsets_of(counts), wide[1:25, 3:73])
    assert bits(wide[1:25, 3:73]) == bits(matmul_by_gemm(x, w, counts, np.float32))
    wide[1:25, 3:73] = POISON
    assert (wide == np.float32(POISON)).all()


PROGRAM = """
import hashlib, sys
import ml_dtypes, numpy as np
from fivedp.kernels.gemm import gemm, isa
from fivedp.kernels.experts import Rows, expert_hidden, grouped_matmul, grouped_outer
rng = np.random.default_rng(int(sys.argv[1]))
counts = [3, 0, 40, 1, 19]
borders = np.cumsum([0, *counts])
print(isa())
for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
    digest = hashlib.sha256()
    x, dy = rng.standard_normal((63, 301)).astype(dtype), rng.standard_normal((63, 150)).astype(dtype)
    w, v = rng.standard_normal((2, 5, 301, 150)).astype(dtype)
    order = rng.permutation(63).astype(np.int32)
    home, dy_home = np.empty_like(x), np.empty_like(dy)
    home[order], dy_home[order] = x, dy
    rows = Rows([home], np.zeros(63, np.int32), order)
    grouped_matmul(rows, w, borders, y := np.empty((63, 150), dtype))
    grouped_outer(rows, Rows([dy_home], np.zeros(63, np.int32), order), borders, dw := np.empty_like(w))
    expert_hidden(rows, w, v, borders, hidden := np.empty((63, 150), dtype))
    for e in range(5):
        group = slice(borders[e], borders[e + 1])
        gemm(x[group], w[e], c := np.empty((counts[e], 150), dtype), cuts=(0, 301))
        assert c.tobytes() == y[group].tobytes()
        gemm(x[group].T, dy[group], c := np.empty((301, 150), dtype), cuts=(0, counts[e]))
        assert c.tobytes() == dw[e].tobytes()
    for array in (y, dw, hidden):
        digest.update(array.tobytes())
    print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed:", seed)
    found = {}
    for isa in kernel.supported_isas():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(seed)],
            env={**os.environ, "FIVEDP_ISA": isa}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{isa}: {done.stderr}"
        lines = done.stdout.split()
        assert lines[0] == isa
        found[isa] = lines[1:]
    assert len({tuple(lines[:2]) for lines in found.values()}) == 1
    # The pairs of the *_bf16 sets round in their own way.
    assert len({lines[2] for isa, lines in found.items() if "bf16" not in isa}) == 1


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("restore_threads")
def test_progress_is_called_from_this_thread_and_its_exception_passed_on(
    rng: np.random.Generator, threads: int
) -> None:
    kernel.set_threads(threads)
    counts, h, f = [1500, 0, 2500], 700, 600  # long enough for several calls, also of two quick threads
    borders = offsets_of(counts)
    x, w = draw(rng, (4000, h), np.float32), draw(rng, (3, h, f), np.float32)
    dy, y, dw = draw(rng, (4000, f), np.float32), poisoned((4000, f), np.float32), poisoned(w.shape, np.float32)
    calls = {
        "matmul": lambda progress: grouped_matmul(x, w, borders, y, progress=progress),
        "outer": lambda progress: grouped_outer(x, dy, borders, dw, progress=progress),
        "hidden": lambda progress: expert_hidden(x, w, w, borders, y, progress=progress),
    }

    def stop() -> None:
        raise StopHereError("enough")

    for name, call in calls.items():
        seen: list[int] = []
        call(lambda seen=seen: seen.append(threading.get_ident()))
        assert len(seen) >= 2, name
        assert set(seen) == {threading.get_ident()}
        with pytest.raises(StopHereError, match="enough"):
            call(stop)


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


def borders(*values: int) -> Any:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("x", "w", "offsets", "out", "words"),
    [
        (zeros(4, 3), zeros(2, 5, 6), borders(0, 1, 4), zeros(4, 6), "K is 3 in x and 5 in w"),
        (zeros(4, 3), zeros(2, 3, 6), borders(0, 4), zeros(4, 6), "offsets has 2 entries and w is of 2 experts"),
        (zeros(4, 3), zeros(2, 3, 6), borders(0, 1, 3), zeros(4, 6), "offsets goes from 0 to 3; 0 to 4"),
        (zeros(4, 3), zeros(2, 3, 6), borders(1, 1, 4), zeros(4, 6), "offsets goes from 1"),
        (zeros(4, 3), zeros(3, 3, 6), borders(0, 3, 2, 4), zeros(4, 6), "offsets falls from 3 to 2 at entry 1"),
        (zeros(4, 3), zeros(2, 3, 6), borders(), zeros(4, 6), "offsets is empty"),
        (zeros(4, 3), zeros(2, 3, 6), borders(0, 1, 4), zeros(4, 5), "out has shape"),
        (zeros(4, 3), zeros(2, 3, 6), borders(0, 1, 4), zeros(4), "out has shape"),
        (zeros(4), zeros(2, 3, 6), borders(0, 1, 4), zeros(4, 6), "x has shape"),
        (zeros(4, 3), zeros(3, 6), borders(0, 1, 4), zeros(4, 6), "w has shape"),
        ([], zeros(2, 3, 6), borders(0, 1, 4), zeros(4, 6), "x has no pieces"),
        ([zeros(4, 1), zeros(5, 2)], zeros(2, 3, 6), borders(0, 1, 4), zeros(4, 6), "pieces may differ along K only"),
        (zeros(4, 3), [zeros(2, 2, 6), zeros(2, 1, 5)], borders(0, 1, 4), zeros(4, 6), "differ along K only"),
        (zeros(4, 3), zeros(2, 3, 6), zeros(1, 3, dtype=np.int64), zeros(4, 6), "offsets has shape"),
    ],
)
def test_shapes_that_do_not_fit(x: Any, w: Any, offsets: Any, out: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        grouped_matmul(x, w, offsets, out)


def test_types_that_do_not_fit() -> None:
    x, w, offsets, out = zeros(4, 3), zeros(2, 3, 6), borders(0, 1, 4), zeros(4, 6)
    for wrong in (np.float16, np.int32, np.uint16, ">f4"):
        with pytest.raises(TypeError, match="would be right"):
            grouped_matmul(x.astype(wrong), w, offsets, out)
    with pytest.raises(TypeError, match="w is float64; float32"):
        grouped_matmul(x, w.astype(np.float64), offsets, out)
    with pytest.raises(TypeError, match="out is bfloat16"):
        grouped_matmul(x, w, offsets, out.astype(ml_dtypes.bfloat16))
    with pytest.raises(TypeError, match="offsets is int32; int64"):
        grouped_matmul(x, w, offsets.astype(np.int32), out)
    with pytest.raises(TypeError, match="NumPy array"):
        grouped_matmul(x, w, [0, 1, 4], out)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="NumPy array"):
        grouped_matmul("x", w, offsets, out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        grouped_matmul(x, w, offsets, out)


def test_outer_arguments_that_do_not_fit() -> None:
    x, dy, offsets, out = zeros(4, 3), zeros(4, 6), borders(0, 1, 4), zeros(2, 3, 6)
    with pytest.raises(ValueError, match="x has 4 rows and dy 5"):
        grouped_outer(x, zeros(5, 6), offsets, out)
    with pytest.raises(ValueError, match="out has shape"):
        grouped_outer(x, dy, offsets, zeros(2, 6, 3))
    with pytest.raises(ValueError, match="one entry more"):
        grouped_outer(x, dy, offsets, zeros(3, 3, 6))
    with pytest.raises(TypeError, match="dy is float64"):
        grouped_outer(x, dy.astype(np.float64), offsets, out)


def test_hidden_arguments_that_do_not_fit() -> None:
    x, w, offsets, hidden = zeros(4, 3), zeros(2, 3, 6), borders(0, 1, 4), zeros(4, 6)
    with pytest.raises(ValueError, match="'swiglu' and w_gate is None"):
        expert_hidden(x, None, w, offsets, hidden)
    with pytest.raises(ValueError, match="'relu', which has no gate"):
        expert_hidden(x, w, w, offsets, hidden, activation="relu")
    with pytest.raises(ValueError, match="activation is 'sin'; swiglu, gelu"):
        expert_hidden(x, w, w, offsets, hidden, activation="sin")
    with pytest.raises(ValueError, match="w_gate has shape"):
        expert_hidden(x, zeros(2, 3, 5), w, offsets, hidden)
    with pytest.raises(ValueError, match="gate is an array and w_gate is None"):
        expert_hidden(x, None, w, offsets, hidden, gate=hidden, activation="relu")
    with pytest.raises(ValueError, match="hidden has shape"):
        expert_hidden(x, w, w, offsets, zeros(4, 5))
    with pytest.raises(ValueError, match="up is strided"):
        expert_hidden(x, w, w, offsets, hidden, up=zeros(6, 4).T)
    with pytest.raises(TypeError, match="gate is float64; float32"):
        expert_hidden(x, w, w, offsets, hidden, gate=zeros(4, 6, dtype=np.float64))


def int32(*values: int) -> Any:
    return np.array(values, np.int32)


def test_rows_that_do_not_exist_are_named() -> None:
    arrays = [zeros(3, 4), zeros(2, 4)]
    assert Rows(arrays, int32(0, 1, 1), int32(2, 0, 1)).shape == (3, 4)
    assert len(Rows([zeros(0, 4)], int32(), int32())) == 0
    for source, index, words in (
        (int32(0, 2), int32(0, 0), r"source\[1\] is 2; 0 to 1"),
        (int32(0, -1), int32(0, 0), r"source\[1\] is -1"),
        (int32(0, 1), int32(0, 2), r"index\[1\] is 2 and array 1 has 2 rows"),
        (int32(0), int32(-1), r"index\[0\] is -1"),
        (int32(0, 1), int32(0), "source has 2 entries and index 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Rows(arrays, source, index)
    with pytest.raises(ValueError, match="arrays is empty"):
        Rows([], int32(), int32())
    with pytest.raises(ValueError, match="array 1 has 5 columns"):
        Rows([zeros(3, 4), zeros(3, 5)], int32(), int32())
    with pytest.raises(ValueError, match="strided along its columns"):
        Rows([zeros(4, 3).T], int32(0), int32(0))
    with pytest.raises(ValueError, match="array 0 has shape"):
        Rows([zeros(4)], int32(0), int32(0))
    with pytest.raises(TypeError, match="float32 and float64"):
        Rows([zeros(3, 4), zeros(3, 4, dtype=np.float64)], int32(), int32())
    with pytest.raises(TypeError, match="source is int64; int32"):
        Rows(arrays, np.zeros(1, np.int64), int32(0))  # type: ignore[arg-type]


def test_rows_keep_their_arrays_alive(rng: np.random.Generator) -> None:
    x, w = draw(rng, (50, 60), np.float64), draw(rng, (1, 60, 20), np.float64)
    rows = Rows([x.copy()], np.zeros(50, np.int32), np.arange(50, dtype=np.int32))
    draw(rng, (50, 60), np.float64)  # would take the place of a copy that was given up
    grouped_matmul(rows, w, offsets_of([50]), out := poisoned((50, 20), np.float64))
    assert bits(out) == bits(matmul_by_gemm(x, w, [50], np.float64))
