"""Arguments that do not fit are refused in a sentence; progress is called, and what it raises is passed on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_operands import bits, draw

from fivedp.kernels import gemm as kernel
from fivedp.kernels.gemm import gemm

F32 = np.float32


def zeros(*shape: int, dtype: Any = F32) -> Any:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("a", "b", "c", "words"),
    [
        (zeros(2, 3), zeros(4, 5), zeros(2, 5), "k is 3 in a and 4 in b"),
        (zeros(2, 3), zeros(3, 5), zeros(2, 4), "c has shape"),
        (zeros(2, 3), zeros(3, 5), zeros(1, 2, 5), "c has 3 dimensions"),
        (zeros(6, 2, 3), zeros(3, 5), zeros(2, 5), "c has 2 dimensions"),
        (zeros(6, 2, 3), zeros(3, 5), zeros(7, 2, 5), "batch of 6"),
        (zeros(3), zeros(3, 5), zeros(2, 5), "a has 1 dimensions"),
        ([zeros(2, 3), zeros(3, 1)], zeros(4, 5), zeros(2, 5), "pieces may differ along k only"),
        ([], zeros(4, 5), zeros(2, 5), "no pieces"),
    ],
)
def test_shapes_that_do_not_fit(a: Any, b: Any, c: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gemm(a, b, c)


@pytest.mark.parametrize("cuts", [[0], [], [0, 2], [1, 3], [0, 2, 1, 3], [0, -1, 3], [0, 4, 3]], ids=str)
def test_cuts_that_are_no_borders(cuts: list[int]) -> None:
    for dtype in (np.float32, np.complex64):
        with pytest.raises(ValueError, match="cuts"):
            gemm(zeros(2, 3, dtype=dtype), zeros(3, 2, dtype=dtype), zeros(2, 2, dtype=dtype), cuts=cuts)


def test_types_that_do_not_fit() -> None:
    a, b, c = zeros(2, 3), zeros(3, 5), zeros(2, 5)
    for wrong in (np.float16, np.int32, np.uint16, ">f4"):
        with pytest.raises(TypeError, match="would be right"):
            gemm(a.astype(wrong), b.astype(wrong), c)
    with pytest.raises(TypeError, match="float32"):
        gemm(a, b.astype(np.float64), c)
    with pytest.raises(TypeError, match="float64"):
        gemm(a, b, c.astype(np.float64))
    with pytest.raises(TypeError):
        gemm(a, b, "c")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="NumPy array"):
        gemm([[1.0, 2.0, 3.0]], b, c)


def test_a_read_only_result_is_refused() -> None:
    c = zeros(2, 5)
    c.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        gemm(zeros(2, 3), zeros(3, 5), c)


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(900, 900, 900), (4, 60000, 900)], ids=["tiles", "stream"])
@pytest.mark.usefixtures("restore_threads")
def test_progress_is_called_from_this_thread_and_its_exception_passed_on(
    rng: np.random.Generator, threads: int, shape: tuple[int, int, int]
) -> None:
    kernel.set_threads(threads)
    m, n, k = shape
    a, b = draw(rng, (m, k), F32), draw(rng, (k, n), F32)
    gemm(a, b, plain := zeros(m, n))
    calls: list[tuple[int, float]] = []
    gemm(a, b, c := zeros(m, n), progress=lambda: calls.append((threading.get_ident(), time.perf_counter())))
    assert bits(c) == bits(plain)
    assert len(calls) >= 2
    assert {ident for ident, _ in calls} == {threading.get_ident()}

    def stop() -> None:
        raise StopHereError("enough")

    began = time.perf_counter()
    with pytest.raises(StopHereError, match="enough"):
        gemm(a, b, zeros(m, n), progress=stop)
    stopped = time.perf_counter() - began
    began = time.perf_counter()
    gemm(a, b, c)  # the pool is whole afterwards
    assert bits(c) == bits(plain)
    assert stopped < 2 * (time.perf_counter() - began) + 0.1


def test_two_python_threads_may_multiply_at_once(rng: np.random.Generator) -> None:
    a, b = draw(rng, (400, 500), F32), draw(rng, (500, 450), F32)
    gemm(a, b, right := zeros(400, 450))
    results = [zeros(400, 450) for _ in range(6)]
    workers = [threading.Thread(target=gemm, args=(a, b, c)) for c in results]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {bits(c) for c in results} == {bits(right)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_multiplies() -> None:
    program = (
        "import os, numpy as np\n"
        "from fivedp.kernels.gemm import gemm, set_threads\n"
        "set_threads(2)\n"
        "a = np.ones((300, 300), np.float32); c = np.zeros((300, 300), np.float32)\n"
        "gemm(a, a, c)\n"
        "pid = os.fork()\n"
        "c[:] = 0; gemm(a, a, c); right = bool((c == 300).all())\n"
        "if pid == 0: os._exit(0 if right else 1)\n"
        "status = os.waitpid(pid, 0)[1]\n"
        "raise SystemExit(0 if right and status == 0 else 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_threads_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        kernel.set_threads(0)


def test_an_unknown_backend_is_refused(backend_from: Callable[[str], None]) -> None:
    backend_from("magic")
    with pytest.raises(ValueError, match="'fivedp', 'blas' or 'canonical'"):
        kernel.gemm_backend()
