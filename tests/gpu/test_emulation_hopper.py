"""The emulated GPU's products of a warpgroup and copies of boxes: right without a fault, and each fault shows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

NO_PHASE, NO_WAIT, NO_PRODUCT_WAIT, OVERWRITTEN, NO_PUBLISH, NO_FENCE, NO_TURN, NOT_SHOWN, LATE_BYTES = range(1, 10)


@pytest.fixture
def product(xp: Any, seed: int) -> Any:
    """(a, b, d) of one product of csrc/cuda/emulation/hopper_faults.cpp."""
    from fivedp import _cuda

    if not hasattr(_cuda, "run_product"):
        pytest.skip("this is a real GPU")
    rng = np.random.default_rng(seed)

    def run(
        n: int = 64, b_is_columns: bool = False, a_in_registers: bool = False, fault: int = 0, bf16: bool = True
    ) -> tuple[Any, Any, Any]:
        a = rng.standard_normal((64, 64)).astype(ml_dtypes.bfloat16 if bf16 else np.float16)
        b = rng.standard_normal((64, n)).astype(a.dtype)
        b = np.ascontiguousarray(b if b_is_columns else b.T)
        d = np.full((64, n), np.nan, np.float32)
        addresses = (a.ctypes.data, b.ctypes.data, d.ctypes.data)
        _cuda.run_product(bf16, *addresses, n, b_is_columns, a_in_registers, fault)
        return a, (b if b_is_columns else b.T), d

    return run


def exact(a: Any, b: Any) -> Any:
    return a.astype(np.float64) @ b.astype(np.float64)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(
    ("n", "b_is_columns", "a_in_registers"),
    [(32, False, False), (64, False, False), (128, False, False), (64, True, False), (128, True, False)]
    + [(64, True, True), (128, True, True)],
)
def test_a_product_is_that_of_float64(
    product: Any, n: int, b_is_columns: bool, a_in_registers: bool, bf16: bool
) -> None:
    a, b, d = product(n, b_is_columns, a_in_registers, bf16=bf16)
    np.testing.assert_allclose(d, exact(a, b), rtol=0, atol=1e-4)


def test_a_phase_that_never_comes_is_an_error(product: Any) -> None:
    with pytest.raises(RuntimeError, match="128 at a phase or a named barrier, 0 have left: they wait for ever"):
        product(fault=NO_PHASE)


def test_a_box_that_is_not_waited_for_is_not_there(product: Any) -> None:
    with pytest.raises(RuntimeError, match=r"was written while a product read it|copies to its shared memory"):
        product(fault=NO_WAIT)


def test_a_product_that_is_not_waited_for_is_nan(product: Any) -> None:
    assert np.isnan(product(fault=NO_PRODUCT_WAIT)[2]).all()


def test_factors_may_not_be_written_over(product: Any) -> None:
    with pytest.raises(RuntimeError, match="shared memory was written while a product read it"):
        product(fault=OVERWRITTEN)


def test_what_threads_write_has_to_be_made_known(product: Any) -> None:
    """The kernel wrote zeros into some rows of `a`; the product has the old ones."""
    a, b, d = product(fault=NO_PUBLISH)
    np.testing.assert_allclose(d, exact(a, b), rtol=0, atol=1e-4)


def test_products_have_to_be_opened(product: Any) -> None:
    with pytest.raises(RuntimeError, match=r"without wgmma\.fence"):
        product(fault=NO_FENCE)


def test_a_named_barrier_waits_for_all(product: Any) -> None:
    with pytest.raises(RuntimeError, match=r"(64|128) at a phase or a named barrier"):
        product(fault=NO_TURN)


def test_a_box_behind_a_flag_needs_its_fence(product: Any) -> None:
    with pytest.raises(RuntimeError, match="show_to_boxes is missing"):
        product(fault=NOT_SHOWN)


def test_bytes_are_expected_before_the_last_arrival(product: Any) -> None:
    with pytest.raises(RuntimeError, match=r"expects bytes at a barrier .* whose phase has all its arrivals"):
        product(fault=LATE_BYTES)
