"""The plan as text: every number in it is the plan's own, or the published bound's."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

import fivedp
from fivedp.errors import LayoutError, ShapeError
from fivedp.layout.explain import bound_elements, plan_for
from fivedp.layout.plan import ItemSizes

SIZES = {"m": 96, "k": 640, "n": 72}
UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def number(text: str, pattern: str) -> float:
    """The bytes that a line of the text states."""
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1]) * UNITS[found[2]]


def test_text_holds_bytes_least_bound_and_buffers() -> None:
    spec, axes = "m k/tp, k/tp n -> m n", {"tp": 4}
    text = fivedp.explain(spec, SIZES, axes)
    plan = plan_for(spec, SIZES, axes)
    everything = plan.family.all_plans([SIZES[n] for n in plan.family.indices], ItemSizes(4, 4, 4, 4, 4))
    value = r"([\d.]+) (B|KiB|MiB|GiB)"
    near = {"rel": 0.01, "abs": 1}
    assert text.startswith(f"{spec}   on tp=4   m=96, n=72, k=640\n")
    assert number(text, rf"bytes +{value} sent per rank") == pytest.approx(plan.bytes_total / 4, **near)
    assert number(text, rf"bytes .*, C {value}\)") == pytest.approx(plan.bytes_c / 4, **near)
    assert number(text, rf"least +{value} over") == pytest.approx(everything[0].bytes_total / 4, **near)
    assert number(text, rf"the dearest {value}") == pytest.approx(everything[-1].bytes_total / 4, **near)
    assert number(text, rf"bound +{value} for any layout") == pytest.approx(4 * bound_elements(96, 72, 640, 4), **near)
    assert number(text, rf"largest share is {value}") == pytest.approx(4 * 96 * 640 / 4, **near)
    assert number(text, rf"buffers +{value} of panels") > 0
    assert f"over {len(everything)} schedules" in text
    assert "order tree" in text


def test_least_never_lies_below_the_bound_of_one_copy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(200):
        m, k, n = (int(size) for size in 8 * rng.integers(1, 60, 3))
        for spec, axes in (
            ("m/p k, k/p n -> m/p n", {"p": int(rng.choice([2, 4, 8]))}),
            ("m/r k/c, k/r n/c -> m/r n/c", {"r": 2, "c": int(rng.choice([2, 4]))}),
            ("m k/p, k/p n -> m/p n", {"p": int(rng.choice([2, 4, 8]))}),
        ):
            ranks = math.prod(axes.values())
            moved = plan_for(spec, {"m": m, "k": k, "n": n}, axes).bytes_total / 4 / ranks
            assert moved >= bound_elements(m, n, k, ranks) * (1 - 1e-12)


def test_bound_is_the_published_one() -> None:
    # Al Daas et al.: 1-D, 2-D and 3-D regimes, at sizes where each formula is a round number.
    assert bound_elements(4096, 64, 64, 4) == 64 * 64 * (1 - 1 / 4)
    n = 512
    assert bound_elements(n, n, n, 8) == pytest.approx(3 * n * n * (8 ** (-2 / 3) - 1 / 8))
    assert bound_elements(n, n, n, 8) == pytest.approx(0.375 * n * n)
    m, k = 1024, 64
    assert bound_elements(m, m, k, 16) == pytest.approx(2 * math.sqrt(m * m * k * k / 16) - 2 * m * k / 16)
    assert bound_elements(7, 5, 3, 1) == 0
    assert bound_elements(0, 5, 3, 4) == 0
    for sizes in ((3, 4, 5), (100, 10, 1), (64, 64, 8)):
        found = {bound_elements(*order, 8) for order in (sizes, sizes[::-1], (sizes[1], sizes[2], sizes[0]))}
        assert max(found) == pytest.approx(min(found))


def test_bound_is_continuous_where_regimes_meet() -> None:
    for high, middle, low in ((1024, 128, 32), (4096, 512, 64)):
        for ranks in (high / middle, high * middle / low**2):
            below, above = (bound_elements(high, middle, low, ranks * f) for f in (1 - 1e-9, 1 + 1e-9))  # type: ignore[arg-type]
            assert below == pytest.approx(above, rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "axes", "sizes", "words"),
    [
        ("m k, k n/tp -> m n/tp", {"tp": 4}, SIZES, "local"),
        ("m/tp k, k n/tp -> m n/tp", {"tp": 4}, {"m": 8, "k": 64, "n": 4096}, "all-gather A"),
        ("m k/tp, k/tp n -> m/tp n", {"tp": 4}, {"m": 16, "k": 9999, "n": 16}, "partial sums in a fixed tree"),
        ("m k, k n/tp -> m n", {"tp": 4}, SIZES, "all-gather C"),
        ("m/r k/c, k/r n/c -> m/r n/c", {"r": 2, "c": 2}, {"m": 512, "k": 64, "n": 512}, "C stationary (SUMMA)"),
        ("m/r k/c, k/r n/c -> m/r n/c", {"r": 2, "c": 2}, {"m": 512, "k": 512, "n": 16}, "A stationary (SUMMA)"),
        ("m/r k/c, k/r n/c -> m/r n/c", {"r": 2, "c": 2}, {"m": 16, "k": 512, "n": 512}, "B stationary (SUMMA)"),
    ],
)
def test_schedule_is_called_by_its_name(spec: str, axes: dict[str, int], sizes: dict[str, int], words: str) -> None:
    assert words in fivedp.explain(spec, sizes, axes)


def test_shapes_and_sizes_say_the_same() -> None:
    spec, axes = "b/dp m k, k n/tp -> b/dp m n/tp", {"dp": 2, "tp": 2}
    by_shape = fivedp.explain(spec, ((6, 5, 4), (4, 3)), axes, dtype="bfloat16")
    assert by_shape == fivedp.explain(spec, {"b": 6, "m": 5, "k": 4, "n": 3}, axes, dtype="bfloat16")
    assert fivedp.explain(spec, ((6, 5, 4), (4, 3)), {"tp": 2, "pp": 3, "dp": 2}, dtype="float64")


def test_halves_travel_as_floats_unless_told_otherwise() -> None:
    arguments = ("m k/p, k/p n -> m/p n", {"m": 64, "k": 9999, "n": 64}, {"p": 4})
    as_sums = plan_for(*arguments, dtype="bfloat16").bytes_total
    assert as_sums == plan_for(*arguments, dtype="float32").bytes_total
    assert as_sums == 2 * plan_for(*arguments, dtype="bfloat16", wire="same").bytes_total


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("m k/q, k/q n -> m n", SIZES, {"tp": 2}), LayoutError, "axis q is named, but the mesh has tp"),
        (("m k/tp, k/tp n -> m n", {"m": 3, "n": 4}, {"tp": 2}), ShapeError, "no size is given for index k"),
        (("m k/tp, k/tp n -> m n", ((3, 4), (5, 6)), {"tp": 2}), ShapeError, "index k is 4 in A and 5 in B"),
        (("m k/tp, k/tp n -> m n", ((3, 4, 5), (4, 6)), {"tp": 2}), ShapeError, r"\(3, 4, 5\) of A has 3 dimensions"),
        (("m k/tp, k/tp n -> m n", SIZES, 8), LayoutError, "mapping of axis sizes, got int"),
        (("m k/tp", SIZES, {"tp": 2}), LayoutError, "expected two operands and a result"),
    ],
)
def test_what_cannot_be_planned(arguments: tuple[object, ...], error: type[ValueError], message: str) -> None:
    with pytest.raises(error, match=message):
        fivedp.explain(*arguments)  # type: ignore[arg-type]


def test_unknown_order() -> None:
    with pytest.raises(LayoutError, match="order is 'random'; expected one of tree, canonical, fast"):
        fivedp.explain("m k, k n -> m n", SIZES, {}, order="random")
