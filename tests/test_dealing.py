"""What the launches leave to each other: drawn cases by time, and options that specs meet in turn on many ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from drawn_cases import cases, dealt
from mpi_launcher import parts
from mpi_products import CONTRACT, EVERYTHING_UP_TO, OTHERS, in_turn

SPECS = [spec for spec, _ in CONTRACT + OTHERS]


def ranks(size: int) -> Any:
    return SimpleNamespace(size=size)


def test_launches_draw_all_cases_together_in_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIVEDP_TEST_CASES", raising=False)
    launches = range(1, 9)
    shares = [dealt(2000, launches, n) for n in launches]
    assert 2000 <= sum(shares) < 2000 + len(shares)
    times = [share * max(2, n) for n, share in zip(launches, shares, strict=True)]
    assert max(times) - min(times) <= max(launches)  # a case more or less
    monkeypatch.setenv("FIVEDP_TEST_CASES", "0.1")
    assert cases(200) == 20
    assert cases(3) == dealt(8, launches, 8) == 5


def test_files_are_dealt_to_as_few_launches_as_can_be() -> None:
    for count in range(60):
        dealt_out = parts(list(range(count)), 13)  # type: ignore[arg-type]
        assert [item for part in dealt_out for item in part] == list(range(count))
        lengths = [len(part) for part in dealt_out]
        assert not lengths or (max(lengths) <= 13 and max(lengths) - min(lengths) <= 1)
        assert len(dealt_out) == -(-count // 13)


@pytest.mark.parametrize("turns", [2, 3])
def test_specs_meet_everything_on_few_ranks_and_together_on_many(turns: int) -> None:
    options = list(range(12))
    for size in range(1, 9):
        met = [in_turn(spec, ranks(size), options, turns) for spec in SPECS]
        if size <= EVERYTHING_UP_TO:
            assert met == [options] * len(SPECS)
        else:
            assert {len(some) for some in met} == {len(options) // turns}
            assert {option for some in met for option in some} == set(options)
    for spec in SPECS:
        on_many = [in_turn(spec, ranks(size), options, turns) for size in range(5, 5 + turns)]
        assert sorted(option for some in on_many for option in some) == options
