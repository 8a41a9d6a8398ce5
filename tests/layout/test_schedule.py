"""What a schedule sends is what its plan says, what the others expect, and everything that is needed, once."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from fivedp.layout import schedule as module
from fivedp.layout.plan import Plan
from fivedp.layout.schedule import Schedule
from fivedp.layout.shares import Box, intersect, volume
from layout.drawing import ITEMS, draw_sizes, families


def plans(seed: int, number: int, most: int) -> list[Plan]:
    """Cheapest plans, and any others of the same specs."""
    rng = random.Random(seed)
    found = []
    for family in families(rng, number):
        sizes, item = draw_sizes(rng, family, most), rng.choice(ITEMS)
        found += [family.plan(sizes, item), rng.choice(family.all_plans(sizes, item))]
    return found


def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("SINGLE_STAGE_BYTES", 0), ("SINGLE_STAGE_BYTES_IN_PLACE", 0),
        ("MIN_ROWS", 2), ("MAX_ROWS", 4), ("MIN_COLUMNS", 2), ("MAX_COLUMNS", 5),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


_made: dict[str, list[tuple[Plan, list[Schedule]]]] = {}


@pytest.fixture(params=["one stage", "many stages"])
def schedules(
    request: pytest.FixtureRequest, seed: int, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Plan, list[Schedule]]]:
    """Plans with the schedules of all ranks; drawn once for all tests."""
    staged = request.param == "many stages"
    if request.param not in _made:
        if staged:
            tiny_tiles(monkeypatch)
        _made[request.param] = [
            (plan, [Schedule(plan, rank, single_stage=not staged) for rank in range(plan.family.n_ranks)])
            for plan in plans(seed, 120, 16)
        ]
    stages = [ranks[0].n_stages for _, ranks in _made[request.param]]
    assert max(stages) > 4 if staged else max(stages) <= 1
    return _made[request.param]


def disjoint(boxes: list[Box]) -> bool:
    return all(intersect(x, y) is None for x, y in itertools.combinations(boxes, 2))


def title(plan: Plan) -> str:
    family = plan.family
    return f"{family.spec} {family.sizes} {plan.sizes} {family.order} {plan.assignment} slices of {plan.slice_index}"


def test_messages_add_up_to_the_bytes_of_the_plan(schedules: list[tuple[Plan, list[Schedule]]]) -> None:
    for plan, ranks in schedules:
        partial = plan.itemsizes.whole if plan.total_nodes == 1 else plan.itemsizes.partial
        sent = {"A": 0, "B": 0, "C": 0}
        for rank, schedule in enumerate(ranks):
            for tensor, size in (("A", plan.itemsizes.a), ("B", plan.itemsizes.b)):
                sent[tensor] += sum(volume(m.box) for m in schedule.input_sends.get(tensor, [])) * size
            for message in itertools.chain(*schedule.result_sends):
                sent["C"] += volume(message.box) * len(plan.spans(rank)) * partial
            sent["C"] += sum(volume(m.box) for m in itertools.chain(*schedule.replica_sends)) * plan.itemsizes.c
        assert (sent["A"], sent["B"], sent["C"]) == (plan.bytes_a, plan.bytes_b, plan.bytes_c), title(plan)


def test_what_one_rank_sends_another_expects(schedules: list[tuple[Plan, list[Schedule]]]) -> None:
    for plan, ranks in schedules:
        sent: Counter[tuple[object, ...]] = Counter()
        expected: Counter[tuple[object, ...]] = Counter()
        for rank, schedule in enumerate(ranks):
            for tensor, messages in schedule.input_sends.items():
                sent.update((tensor, m.stage, rank, m.peer, m.box) for m in messages)
            for tensor, panels in schedule.panel_parts.items():
                for panel, parts in zip(schedule.tiling.panels[tensor], panels, strict=True):
                    expected.update((tensor, panel.first, peer, rank, box) for peer, box in parts if peer != rank)
            for m in itertools.chain(*schedule.result_sends):
                sent["C", m.stage, rank, m.peer, m.box] += 1
            for m in itertools.chain(*itertools.chain(*schedule.result_receives)):
                expected["C", m.stage, m.peer, rank, m.box] += m.peer != rank
            for m in itertools.chain(*schedule.replica_sends):
                sent["replica", m.stage, rank, m.peer, m.box] += 1
            for m in itertools.chain(*schedule.replica_receives):
                expected["replica", m.stage, m.peer, rank, m.box] += 1
        assert +sent == +expected, title(plan)
        assert all(number == 1 for number in (+sent).values()), title(plan)


def test_messages_of_a_pair_are_posted_in_one_order(schedules: list[tuple[Plan, list[Schedule]]]) -> None:
    # MPI matches messages of one tag between two ranks by their order alone.
    for plan, ranks in schedules:
        for (source, sender), (peer, receiver) in itertools.permutations(enumerate(ranks), 2):
            for tensor in sender.input_sends:
                sent = [m.box for m in sender.input_sends[tensor] if m.peer == peer]
                panels = sorted(
                    zip(receiver.tiling.panels[tensor], receiver.panel_parts[tensor], strict=True),
                    key=lambda entry: entry[0].first,
                )
                assert sent == [box for _, parts in panels for s, box in parts if s == source], title(plan)
            results = [m.box for m in itertools.chain(*sender.result_sends) if m.peer == peer]
            groups = itertools.chain(*itertools.chain(*receiver.result_receives))
            assert results == [m.box for m in groups if m.peer == source], title(plan)


def test_every_panel_is_covered_once_by_its_owners(schedules: list[tuple[Plan, list[Schedule]]]) -> None:
    for plan, ranks in schedules:
        for rank, schedule in enumerate(ranks):
            for tensor, panels in schedule.panel_parts.items():
                for panel, parts in zip(schedule.tiling.panels[tensor], panels, strict=True):
                    boxes = [box for _, box in parts]
                    assert disjoint(boxes), title(plan)
                    assert sum(map(volume, boxes)) == volume(panel.box), title(plan)
                    for source, box in parts:
                        assert intersect(box, plan.owned(tensor, source)) == box, title(plan)
            for tensor in "AB":
                needed = plan.needed(tensor, rank)
                for panel in schedule.tiling.panels[tensor]:
                    assert intersect(panel.box, needed) in (panel.box, None), title(plan)


def test_tiles_cut_the_brick_without_gap_or_overlap(schedules: list[tuple[Plan, list[Schedule]]]) -> None:
    for plan, ranks in schedules:
        for rank, schedule in enumerate(ranks):
            boxes = schedule.tiling.boxes
            assert disjoint(boxes), title(plan)
            assert sum(map(volume, boxes)) == volume(plan.needed("C", rank)), title(plan)
            names = {tensor: plan.family.layouts[tensor].names for tensor in "ABC"}
            for stage, tile in enumerate(boxes):
                ranges = plan.brick(rank) | dict(zip(names["C"], tile, strict=True))
                for tensor in "AB":
                    panel = schedule.tiling.panels[tensor][schedule.tiling.panel_of[tensor][stage]]
                    assert panel.box == tuple(ranges[name] for name in names[tensor]), title(plan)
                    assert panel.first <= stage <= panel.last, title(plan)


def test_every_element_of_the_result_gets_all_of_its_partial_sums(
    schedules: list[tuple[Plan, list[Schedule]]],
) -> None:
    for plan, ranks in schedules:
        for rank, schedule in enumerate(ranks):
            mine = plan.reduced(rank)
            groups = list(itertools.chain(*schedule.result_receives))
            assert disjoint([group[0].box for group in groups]), title(plan)
            assert sum(volume(group[0].box) for group in groups) == volume(mine), title(plan)
            for group in groups:
                spans = sorted(span for m in group for span in plan.spans(m.peer))
                # In order, without gap: the leaves of the whole tree.
                assert spans[0][0] == 0, title(plan)
                assert all(x[0] + x[1] == y[0] for x, y in itertools.pairwise(spans)), title(plan)
                assert len(spans) == plan.total_nodes, title(plan)
            received = [m.box for m in itertools.chain(*schedule.replica_receives)]
            whole = plan.owned("C", rank)
            if plan.slice_index is not None:
                assert disjoint(received), title(plan)
                assert volume(mine) + sum(map(volume, received)) == volume(whole), title(plan)
            else:
                assert mine == whole


def test_stages_overlap_within_the_memory_budget(schedules: list[tuple[Plan, list[Schedule]]]) -> None:
    for plan, ranks in schedules:
        for schedule in ranks:
            assert (schedule.buffer_bytes > 0) == bool(_own_traffic(plan, schedule)), title(plan)


def _own_traffic(plan: Plan, schedule: Schedule) -> int:
    """What passes through this rank's buffers: messages, and partial results that wait to be added."""
    inputs = [m for messages in schedule.input_sends.values() for m in messages]
    parts = [
        box for panels in schedule.panel_parts.values() for parts in panels for s, box in parts if s != schedule.rank
    ]
    results = sum(map(volume, schedule.tiling.boxes)) if plan.moves("C") else 0
    received = [m for m in itertools.chain(*itertools.chain(*schedule.result_receives)) if m.peer != schedule.rank]
    return len(inputs) + len(parts) + results + (len(received) if plan.moves("C") else 0)
