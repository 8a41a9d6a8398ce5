"""Arguments that do not fit are refused in a sentence that names the argument, and nothing is written then."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernel_operands import BF16, bits

from attention_operands import draw_case, forward, places
from fivedp import _cpu
from fivedp.kernels import attention as kernel
from fivedp.kernels.attention import Mask, State

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
B, S, KEYS, HEADS, KV_HEADS, SIZE, V_SIZE = 2, 5, 7, 4, 2, 3, 6


def zeros(*shape: int, dtype: Any = F32) -> Any:
    return np.zeros(shape, dtype)


def poison(*shape: int, dtype: Any = F32) -> Any:
    return np.full(shape, 7.0, dtype)


def good() -> dict[str, Any]:
    """Arguments of every function that fit together; what is written holds 7."""
    return {
        "q": zeros(B, S, HEADS, SIZE),
        "k": zeros(B, KEYS, KV_HEADS, SIZE),
        "v": zeros(B, KEYS, KV_HEADS, V_SIZE),
        "d_out": zeros(B, S, HEADS, V_SIZE),
        "mask": Mask(places(S), places(KEYS)),
        "highest": poison(B, HEADS, S),
        "total": poison(B, HEADS, S),
        "output": poison(B, S, HEADS, V_SIZE),
        "lse": zeros(B, HEADS, S),
        "delta": zeros(B, HEADS, S),
        "d_q": poison(B, S, HEADS, SIZE),
        "d_k": poison(B, KEYS, KV_HEADS, SIZE),
        "d_v": poison(B, KEYS, KV_HEADS, V_SIZE),
        "out": poison(B, S, HEADS, V_SIZE),
    }


def call_forward(a: dict[str, Any]) -> None:
    kernel.forward(a["q"], a["k"], a["v"], a["mask"], State(a["highest"], a["total"], a["output"]))


def call_backward(a: dict[str, Any]) -> None:
    names = ("d_out", "q", "k", "v", "mask", "lse", "delta", "d_q", "d_k", "d_v")
    kernel.backward(*[a[name] for name in names])


def call_finish(a: dict[str, Any]) -> None:
    kernel.finish(State(a["highest"], a["total"], a["output"]), a["out"])


def call_delta(a: dict[str, Any]) -> None:
    kernel.delta(a["d_out"], a["out"])


WRITTEN = ["highest", "total", "output", "d_q", "d_k", "d_v", "out"]
CALLS = {"forward": call_forward, "backward": call_backward, "finish": call_finish, "delta": call_delta}


@contextmanager
def refused(a: dict[str, Any], error: type[Exception], words: str) -> Iterator[None]:
    """The block raises this, and leaves what it could have written alone."""
    before = {name: bits(a[name]) for name in WRITTEN}
    with pytest.raises(error, match=words):
        yield
    assert {name: bits(a[name]) for name in WRITTEN} == before


@pytest.mark.parametrize("call", CALLS)
def test_arguments_that_fit_are_taken(call: str) -> None:
    CALLS[call](good())


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("q", zeros(B, S, SIZE), r"q has shape \(2, 5, 3\)"),
        ("k", zeros(B, KEYS, SIZE), r"k has shape \(2, 7, 3\)"),
        ("v", zeros(V_SIZE), r"v has shape \(6\)"),
        ("k", zeros(B + 1, KEYS, KV_HEADS, SIZE), r"k has shape \(3, 7, 2, 3\); \(2, 7, 2, 3\) would be right"),
        ("k", zeros(B, KEYS, KV_HEADS, SIZE + 1), r"k has shape \(2, 7, 2, 4\); \(2, 7, 2, 3\) would be right"),
        ("v", zeros(B + 1, KEYS, KV_HEADS, V_SIZE), r"v has shape \(3, 7, 2, 6\); \(2, 7, 2, 6\) would be right"),
        ("v", zeros(B, KEYS - 1, KV_HEADS, V_SIZE), r"v has shape \(2, 6, 2, 6\)"),
        ("v", zeros(B, KEYS, KV_HEADS + 1, V_SIZE), r"v has shape \(2, 7, 3, 6\)"),
        ("q", zeros(B, S, 5, SIZE), "q has 5 heads and k has 2"),
        ("q", zeros(B, S, HEADS, SIZE, dtype=F64), "k is of another type than q"),
        ("k", zeros(B, KEYS, KV_HEADS, SIZE, dtype=BF16), "k is of another type than q"),
        ("v", zeros(B, KEYS, KV_HEADS, V_SIZE, dtype=F64), "v is of another type than q"),
    ],
)
def test_q_k_and_v_that_do_not_fit_together(call: str, name: str, wrong: Any, words: str) -> None:
    a = good()
    a[name] = wrong
    with refused(a, ValueError, words):
        CALLS[call](a)


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize("heads", [0, 2])
def test_keys_without_heads(call: str, heads: int) -> None:
    a = good() | {"k": zeros(B, KEYS, 0, SIZE), "v": zeros(B, KEYS, 0, V_SIZE), "q": zeros(B, S, heads, SIZE)}
    with refused(a, ValueError, "heads"):
        CALLS[call](a)


def test_queries_without_heads_are_refused_or_nothing_to_do() -> None:
    program = (
        "import numpy as np; from fivedp.kernels import attention as a\n"
        "p = np.arange(4, dtype=np.int32); k = np.ones((1, 4, 2, 8), np.float32); q = k[:, :, :0]\n"
        "try: a.forward(q, k, k, a.Mask(p, p), a.empty_state(q, 8))\n"
        "except ValueError: pass\n"
        "r = np.zeros((1, 0, 4), np.float32)\n"
        "try: a.backward(q, q, k, k, a.Mask(p, p), r, r, np.copy(q), np.copy(k), np.copy(k))\n"
        "except ValueError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr  # not a division by zero


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize(("size", "v_size"), [(0, 6), (3, 0), (1025, 6), (3, 1025)])
def test_head_sizes_out_of_range(call: str, size: int, v_size: int) -> None:
    a = good() | {
        "q": zeros(B, S, HEADS, size), "k": zeros(B, KEYS, KV_HEADS, size),
        "v": zeros(B, KEYS, KV_HEADS, v_size), "d_out": zeros(B, S, HEADS, v_size),
    }  # fmt: skip
    with refused(a, ValueError, f"head sizes are {size} and {v_size}; 1 to 1024"):
        CALLS[call](a)


def test_the_largest_head_sizes_are_taken(seed: int) -> None:
    case = draw_case(np.random.default_rng(seed), F32, queries=2, keys=3, size=1024, v_size=1024)
    assert np.isfinite(forward(case)[0]).all()


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize("wrong", [np.float16, np.int32, np.uint16, np.complex64, ">f4"], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_types_that_are_no_type_of_attention(call: str, name: str, wrong: Any) -> None:
    a = good()
    a[name] = a[name].astype(wrong)
    with refused(a, TypeError, f"attention: {name} is .*float32, float64 or bfloat16"):
        CALLS[call](a)


@pytest.mark.parametrize("call", ["backward", "delta"])
def test_d_out_that_does_not_fit(call: str) -> None:
    for wrong, error, words in (
        (zeros(B, S, V_SIZE), ValueError, r"d_out has shape \(2, 5, 6\)"),
        (zeros(B, S, HEADS, V_SIZE + 1), ValueError, r"d_out has shape \(2, 5, 4, 7\); \(2, 5, 4, 6\) would be right"),
        (zeros(B, S, HEADS, V_SIZE, dtype=F64), ValueError, "d_out is of another type"),
        (zeros(B, S, HEADS, V_SIZE, dtype=np.float16), TypeError, "d_out is float16"),
        (zeros(B, S, HEADS, V_SIZE, dtype=np.uint16), TypeError, "d_out is uint16"),
    ):
        a = good() | {"d_out": wrong}
        with refused(a, error, words):
            CALLS[call](a)


def test_out_that_does_not_fit() -> None:
    for wrong, error, words in (
        (poison(B, S, V_SIZE), ValueError, r"out has shape \(2, 5, 6\)"),
        (poison(B, S, HEADS, V_SIZE, dtype=np.float16), TypeError, "out is float16"),
        (poison(B, S, HEADS, V_SIZE, dtype=np.uint16), TypeError, "out is uint16"),
        (poison(B, S, HEADS, V_SIZE, dtype=">f4"), TypeError, "out is >f4"),
        (poison(B, S, HEADS, 2 * V_SIZE)[..., ::2], ValueError, "last dimension of out is strided"),
        (poison(B, S, HEADS, V_SIZE - 1), ValueError, r"output has shape \(2, 5, 4, 6\); \(2, 5, 4, 5\)"),
        (poison(B, S + 1, HEADS, V_SIZE), ValueError, "highest has shape"),
        (poison(B, S, HEADS, V_SIZE, dtype=F64), ValueError, "highest is not of the type of sums"),
    ):
        a = good() | {"out": wrong}
        with refused(a, error, words):
            call_finish(a)
    with pytest.raises(ValueError, match=r"out has shape \(2, 5, 6\)"):
        _cpu.attention_delta(zeros(B, S, V_SIZE), zeros(B, S, V_SIZE), zeros(B, 1, S))
    with pytest.raises(ValueError, match="out is strided"):
        _cpu.attention_delta(zeros(B, S, 1, 6), zeros(B, S, 1, 12)[..., ::2], zeros(B, 1, S))


SUMS = [
    *[("forward", name) for name in ("highest", "total", "output")],
    *[("finish", name) for name in ("highest", "total", "output")],
    *[("backward", name) for name in ("lse", "delta", "d_q", "d_k", "d_v")],
]


@pytest.mark.parametrize(("call", "name"), SUMS)
def test_arrays_of_sums_that_do_not_fit(call: str, name: str) -> None:
    right, called = good()[name], {"lse": "log_sum"}.get(name, name)
    strided = np.repeat(right, 2, axis=-1)[..., ::2]
    for wrong, error, words in (
        (right[:1].copy(), ValueError, rf"{called} has shape \(1, "),
        (right[None], ValueError, rf"{called} has shape \(1, 2, "),
        (right[..., :-1].copy(), ValueError, f"{called} has shape"),
        (right.astype(F64), ValueError, f"{called} is not of the type of sums"),
        (right.astype(np.int32), TypeError, f"{called} is int32"),
        (right.astype(">f4"), TypeError, f"{called} is >f4"),
        (strided, ValueError, f"{called} is strided"),
        (np.asfortranarray(right), ValueError, f"{called} is strided"),
    ):
        a = good() | {name: wrong}
        with refused(a, error, words):
            CALLS[call](a)


@pytest.mark.parametrize(("dtype", "to"), [(BF16, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize("call", ["forward", "finish", "backward"])
def test_the_type_of_sums_goes_by_the_type_of_q(call: str, dtype: Any, to: Any) -> None:
    narrow = ("q", "k", "v", "d_out", "out")
    a = {name: x.astype(dtype) if name in narrow else x for name, x in good().items()}
    wide = {name: x if name in (*narrow, "mask") else x.astype(to) for name, x in a.items()}
    CALLS[call](wide)
    wrong = {name: x if name in (*narrow, "mask") else x.astype(F32 if to == F64 else F64) for name, x in a.items()}
    with refused(wrong, ValueError, "is not of the type of sums"):
        CALLS[call](wrong)


@pytest.mark.parametrize("value", [zeros(B, HEADS, S + 1), zeros(B, HEADS, S, dtype=F64), zeros(B, HEADS, S).T])
def test_results_of_the_extension_that_do_not_fit(value: Any) -> None:
    a = good()
    with refused(a, ValueError, "log_sum"):
        _cpu.attention_finish(a["highest"], a["total"], a["output"], a["out"], value)
    with refused(a, ValueError, "delta"):
        _cpu.attention_delta(a["d_out"], a["out"], value)


def test_strided_rows_are_refused_by_the_extension_itself() -> None:
    for name in ("q", "k", "v"):
        a = good()
        a[name] = np.repeat(a[name], 2, axis=-1)[..., ::2]
        with refused(a, ValueError, f"last dimension of {name} is strided"):
            extension_forward(a, (a["k"], a["v"], a["mask"]._packed()))
    with refused(a := good(), ValueError, "the mask has 8 entries"):
        extension_forward(a, (a["k"], a["v"], a["mask"]._packed()[:-1]))


def extension_forward(a: dict[str, Any], *blocks: tuple[Any, ...]) -> None:
    _cpu.attention_forward(a["q"], list(blocks), a["highest"], a["total"], a["output"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": 2.0}, "block 1 has other heads, or another mask for the same queries, than block 0"),
        ({"causal": True}, "block 1 has"),
        ({"window": 3}, "block 1 has"),
        ({"softcap": 3.0}, "block 1 has"),
        ({"slopes": [1.0] * HEADS}, "block 1 has"),
        ({"q_position": places(S)}, "block 1 has"),
        ({"q_document": places(S), "k_document": places(KEYS)}, "block 1 has"),
        ({"k_position": places(KEYS + 1)}, "k_position"),
    ],
)
def test_blocks_that_do_not_fit_together(change: dict[str, Any], words: str) -> None:
    a = good()
    mask = replace(a["mask"], **change)
    state = State(a["highest"], a["total"], a["output"])
    with refused(a, ValueError, words):
        kernel.forward_blocks(a["q"], [(a["k"], a["v"], a["mask"]), (a["k"], a["v"], mask)], state)


def test_blocks_of_other_heads_and_no_block_at_all() -> None:
    a = good()
    state = State(a["highest"], a["total"], a["output"])
    fewer = (a["k"][:, :, :1], a["v"][:, :, :1], a["mask"])
    with refused(a, ValueError, "block 1 has other heads"):
        kernel.forward_blocks(a["q"], [(a["k"], a["v"], a["mask"]), fewer], state)
    with refused(a, ValueError, "there is no block of keys"):
        extension_forward(a)


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 2.0},
        {"causal": True},
        {"window": 3},
        {"softcap": 3.0},
        {"slopes": [1.0] * HEADS},
        {"k_position": places(KEYS)},
        {"q_document": places(S), "k_document": places(KEYS)},
    ],
    ids=str,
)
def test_blocks_of_queries_with_another_mask_for_the_same_keys(change: dict[str, Any]) -> None:
    a = good()
    blocks = [
        kernel.Queries(a["d_out"], a["q"], mask, a["lse"], a["delta"], a["d_q"])
        for mask in (a["mask"], replace(a["mask"], **change))
    ]
    with refused(a, ValueError, "block 1 has other heads, or another mask for the same keys, than block 0"):
        kernel.backward_blocks(blocks, a["k"], a["v"], a["d_k"], a["d_v"])


def test_blocks_of_queries_of_other_heads() -> None:
    a = good()
    half = [x[:, :, : HEADS // 2] for x in (a["d_out"], a["q"])]
    sums = [np.ascontiguousarray(x) for x in (a["lse"][:, : HEADS // 2], a["delta"][:, : HEADS // 2])]
    blocks = [
        kernel.Queries(a["d_out"], a["q"], a["mask"], a["lse"], a["delta"], a["d_q"]),
        kernel.Queries(*half, a["mask"], *sums, a["d_q"][:, :, : HEADS // 2].copy()),
    ]
    with refused(a, ValueError, "block 1 has other heads"):
        kernel.backward_blocks(blocks, a["k"], a["v"], a["d_k"], a["d_v"])


def test_no_block_of_queries_at_all() -> None:
    with refused(a := good(), ValueError, "there is no block of queries"):
        kernel.backward_blocks([], a["k"], a["v"], a["d_k"], a["d_v"])


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q_position": None}, ValueError, "positions are missing"),
        ({"k_position": None}, ValueError, "positions are missing"),
        ({"q_document": places(S)}, ValueError, "documents are given for queries or keys only"),
        ({"k_document": places(KEYS)}, ValueError, "documents are given for queries or keys only"),
        ({"window": -1}, ValueError, "window is -1"),
        ({"softcap": -0.5}, ValueError, "softcap is -0.5"),
        ({"softcap": np.nan}, ValueError, "softcap is nan"),
        ({"slopes": [1.0, 0.5]}, ValueError, "2 slopes for 4 heads"),
    ],
    ids=str,
)
def test_masks_that_do_not_fit(call: str, change: dict[str, Any], error: type[Exception], words: str) -> None:
    a = good()
    a["mask"] = replace(a["mask"], **change)
    with refused(a, error, words):
        CALLS[call](a)


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize("name", ["q_position", "k_position", "q_document", "k_document"])
def test_positions_and_documents_that_do_not_fit(call: str, name: str) -> None:
    n = S if name[0] == "q" else KEYS
    for wrong, error, words in (
        (places(n + 1), ValueError, rf"{name} has shape \({n + 1}\); \({n}\) would be right"),
        (places(n)[None], ValueError, f"{name} has shape"),
        (np.arange(n), ValueError, f"{name} is not contiguous int32"),
        (places(n).astype(np.uint32), ValueError, f"{name} is not contiguous int32"),
        (places(n).astype(F32), ValueError, f"{name} is not contiguous int32"),
        (places(2 * n)[::2], ValueError, f"{name} is not contiguous int32"),
        (places(n).tolist(), TypeError, f"{name} is no array"),
    ):
        a = good()
        a["mask"] = replace(a["mask"], **{"q_document": places(S), "k_document": places(KEYS), name: wrong})
        with refused(a, error, words):
            CALLS[call](a)


def test_positions_in_another_byte_order_are_refused() -> None:
    for name in ("q_position", "k_position"):
        a = good()
        a["mask"] = replace(a["mask"], **{name: getattr(a["mask"], name).astype(places(1).dtype.newbyteorder())})
        with refused(a, ValueError, name):
            call_forward(a)


WRITES = [x for x in SUMS if x[0] != "finish" and x[1] not in ("lse", "delta")] + [("finish", "out")]


@pytest.mark.parametrize(("call", "name"), WRITES)
def test_a_read_only_result_is_refused(call: str, name: str) -> None:
    a = good()
    a[name].flags.writeable = False
    with refused(a, ValueError, f"{name}.*read-only"):
        CALLS[call](a)


def test_read_only_inputs_are_taken() -> None:
    a = good()
    for name in ("q", "k", "v", "d_out", "lse", "delta"):
        a[name].flags.writeable = False
    for call in ("forward", "backward", "delta"):
        CALLS[call](a)


def test_two_python_threads_may_attend_at_once(seed: int) -> None:
    case = draw_case(np.random.default_rng(seed), F32, kv_heads=2, group=2, queries=150, keys=300)
    right = bits(forward(case)[0])
    results: list[bytes] = []
    workers = [threading.Thread(target=lambda: results.append(bits(forward(case)[0]))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [right] * 4
