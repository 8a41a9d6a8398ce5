"""Carrying out a schedule on one rank's arrays: post, multiply, send, add, stage by stage.

Everything that depends on sizes alone (slices, shapes, peers, the order of sums) is worked out once per stage and kept
in a `_Stage`; a call walks through lists.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fivedp.comm.grid import Group
from fivedp.comm.messages import TAGS, Mailbox, Receipt, Workspace, open_mailbox
from fivedp.layout.plan import Plan
from fivedp.layout.schedule import Message, Schedule
from fivedp.layout.shares import Box, local_slices, shape_of
from fivedp.ops.contraction import Contraction, Recipe, add_tree
from fivedp.ops.prepared import Prepared, TooLarge

Array = Any
Slices = tuple[slice, ...]
Shape = tuple[int, ...]
_INPUT_TAGS = (TAGS["A"], TAGS["B"])
_RESULT_TAGS = (TAGS["C"],)


@dataclass(slots=True)
class _Part:
    """A part of a panel: of this rank's share (`slices`) or on its way from `source`."""

    box: Box
    source: int
    slices: Slices | None


@dataclass(slots=True)
class Sum:
    """A box of this rank's share that a stage finishes: the partial results that are added to it."""

    target: Slices
    own: Slices | None
    """Where the box lies in this rank's own tile; None where it made no part of it."""
    receives: list[tuple[int, Shape]]
    order: list[tuple[int, int]]
    """(sender, plane) of every partial result in the order of the tree; sender -1 is this rank."""
    spans: list[tuple[int, int]]

    def add(self, partials: list[Any], out: Array, alpha: complex, beta: complex) -> None:
        """Add the partial results into the share: one array per sender, and last this rank's own (or None)."""
        arrays = [partials[sender][plane] for sender, plane in self.order]
        if arrays[0].dtype.itemsize < 4:  # wire="same": partial results were rounded for the journey
            arrays = [array.astype(np.float32) for array in arrays]
        add_tree(arrays, self.spans, out[self.target], alpha=alpha, beta=beta)


@dataclass(slots=True)
class _Stage:
    """The work of one stage."""

    panels: list[tuple[str, int, list[_Part]]] = field(default_factory=list)
    sends: list[tuple[str, int, Slices, int]] = field(default_factory=list)
    tile: Box | None = None
    tile_in_share: Slices = ()
    inside: bool = False
    numbers: dict[str, int] = field(default_factory=dict)
    release: list[tuple[str, int]] = field(default_factory=list)
    result_sends: list[tuple[int, Slices]] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    replica_receives: list[tuple[int, Shape, Slices]] = field(default_factory=list)
    replica_sends: list[tuple[int, Slices]] = field(default_factory=list)
    recipes: list[Recipe] | None = None


class Execution:
    """A plan made ready for one rank of one group.

    Parameters
    ----------
    plan : Plan
    group : Group
    single_stage : bool or None
        As in `Schedule`.
    """

    def __init__(self, plan: Plan, group: Group, *, single_stage: bool | None = None) -> None:
        self.plan, self.group = plan, group
        self.schedule = Schedule(plan, group.index, single_stage=single_stage, in_place=group.in_place)
        brick = plan.brick(group.index)
        spec = plan.family.spec
        self.contraction = Contraction(spec, plan.leaf_borders, {name: brick[name] for name in spec.k})
        self.spans = plan.spans(group.index)
        self.owned = {tensor: plan.owned(tensor, group.index) for tensor in "ABC"}
        self.out_shape = shape_of(self.owned["C"])
        self.moves_result = plan.moves("C")
        self.moving = [tensor for tensor in "AB" if plan.moves(tensor)]
        self._prepared: Prepared | None = None
        self._may_be_small = True

    def run(self, a: Array, b: Array, out: Array, alpha: complex, beta: complex, wire: Any, xp: Any, what: str) -> None:
        """Multiply: `out` (this rank's share of C) becomes alpha * A B + beta * C. Collective over the group."""
        if not self.moving and not self.moves_result:
            if self.schedule.tiling.boxes:
                self.contraction.multiply(self._local_recipe, (a,), (b,), out, alpha=alpha, beta=beta)
            return
        if self._prepared is not None:
            self._prepared.run(a, b, out, what)
            return
        self._run_once(a, b, out, alpha, beta, wire, xp, what)
        # What was called once may be called again: then it shall cost less.
        if self._may_be_small:
            self._may_be_small = False
            if xp is np and len(self.stages) == 1:
                with contextlib.suppress(TooLarge):
                    self._prepared = Prepared(self, a, b, out, alpha, beta, wire)

    def _run_once(
        self, a: Array, b: Array, out: Array, alpha: complex, beta: complex, wire: Any, xp: Any, what: str
    ) -> None:
        mail = open_mailbox(self.group, what, xp)
        try:
            _Run(self, a, b, out, alpha, beta, wire, mail, xp).go()
        except BaseException:
            mail.abandon()
            raise

    def finished_at_source(self, beta: complex) -> bool:
        """Whether sums that no other rank adds to are finished where they are made, and travel in the type of C."""
        return self.plan.total_nodes == 1 and beta == 0

    @cached_property
    def _local_recipe(self) -> Recipe:
        """The one product of a rank that needs nobody else."""
        rank, plan, owned = self.group.index, self.plan, self.owned
        return self.contraction.recipe(
            (owned["A"],), plan.needed("A", rank), (owned["B"],), plan.needed("B", rank), self.spans[0]
        )

    @cached_property
    def stages(self) -> list[_Stage]:
        """What this rank does in every stage."""
        schedule, owned, mine = self.schedule, self.owned, self.group.index
        stages = [_Stage() for _ in range(schedule.n_stages)]
        for tensor in self.moving:
            for number, parts in enumerate(schedule.panel_parts[tensor]):
                panel = schedule.tiling.panels[tensor][number]
                entries = [
                    _Part(box, source, local_slices(box, owned[tensor]) if source == mine else None)
                    for source, box in parts
                ]
                stages[panel.first].panels.append((tensor, number, entries))
                stages[panel.last].release.append((tensor, number))
            for message in schedule.input_sends[tensor]:
                slices = local_slices(message.box, owned[tensor])
                stages[message.stage].sends.append((tensor, message.peer, slices, message.last))
        for number, tile in enumerate(schedule.tiling.boxes):
            stage = stages[number]
            stage.tile = tile
            stage.inside = all(o[0] <= t[0] and t[1] <= o[1] for t, o in zip(tile, owned["C"], strict=True))
            stage.tile_in_share = local_slices(tile, owned["C"]) if stage.inside else ()
            stage.numbers = {tensor: schedule.tiling.panel_of[tensor][number] for tensor in "AB"}
            if self.moves_result:
                stage.result_sends = [
                    (message.peer, (slice(None), *local_slices(message.box, tile)))
                    for message in schedule.result_sends[number]
                ]
        if self.moves_result:
            for number, stage in enumerate(stages):
                stage.sums = [self._sum(group, stage.tile) for group in schedule.result_receives[number]]
                stage.replica_receives = [
                    (m.peer, shape_of(m.box), local_slices(m.box, owned["C"]))
                    for m in schedule.replica_receives[number]
                ]
                stage.replica_sends = [
                    (m.peer, local_slices(m.box, owned["C"])) for m in schedule.replica_sends[number]
                ]
        return stages

    def _sum(self, messages: list[Message], tile: Box | None) -> Sum:
        """The partial results that meet in one box of this rank's share, in the order of the tree."""
        box, mine = messages[0].box, self.group.index
        receives: list[tuple[int, Shape]] = []
        found: list[tuple[tuple[int, int], int, int]] = []
        own: Slices | None = None
        for message in messages:
            spans = self.plan.spans(message.peer)
            sender = -1
            if message.peer == mine:
                assert tile is not None
                own = (slice(None), *local_slices(box, tile))
            else:
                sender = len(receives)
                receives.append((message.peer, (len(spans), *shape_of(box))))
            found += [(span, sender, plane) for plane, span in enumerate(spans)]
        found.sort()
        return Sum(
            target=local_slices(box, self.owned["C"]),
            own=own,
            receives=receives,
            order=[(sender, plane) for _, sender, plane in found],
            spans=[span for span, _, _ in found],
        )

    @cached_property
    def must_join(self) -> dict[str, list[bool]]:
        """For A and B, for each panel: whether its parts differ in more than summed indices and must be joined."""
        result = {}
        for tensor, panels in self.schedule.panel_parts.items():
            names = self.plan.family.layouts[tensor].names
            kept = [place for place, name in enumerate(names) if name not in self.plan.family.spec.k]
            result[tensor] = [len({tuple(box[p] for p in kept) for _, box in parts}) > 1 for parts in panels]
        return result


class _Run:
    """One call of an `Execution`: the arrays, the messages under way and the buffers."""

    def __init__(
        self,
        execution: Execution,
        a: Array,
        b: Array,
        out: Array,
        alpha: complex,
        beta: complex,
        wire: Any,
        mail: Mailbox,
        xp: Any,
    ) -> None:
        self.x, self.mail, self.xp = execution, mail, xp
        self.stages = execution.stages
        self.inputs = {"A": a, "B": b}
        self.out, self.alpha, self.beta = out, alpha, beta
        self.finished_at_source = execution.finished_at_source(beta)
        self.partial_dtype = out.dtype if self.finished_at_source else wire
        self.panels: dict[tuple[str, int], list[tuple[Box, Array | Receipt]]] = {}
        self.partials: dict[int, Workspace] = {}
        self.results: dict[int, list[list[Receipt]]] = {}
        self.replicas: dict[int, list[Receipt]] = {}
        self.progress = None if len(self.stages) == 1 else mail.progress()

    def go(self) -> None:
        n_stages, moves_result = len(self.stages), self.x.moves_result
        if n_stages:
            self._post_inputs(0)
        for stage in range(n_stages):
            if stage + 1 < n_stages:
                self._post_inputs(stage + 1)
            if moves_result:
                self._post_results(stage)
            if self.stages[stage].tile is not None:
                self._multiply(stage)
            if moves_result and stage > 0:
                self._finish(stage - 1)
        if moves_result and n_stages:
            self._finish(n_stages - 1)
            for receipts in self.replicas.values():
                self.mail.wait(receipts)
        self.mail.close()
        for workspace in self.partials.values():
            self.mail.give_workspace(workspace)

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _post_inputs(self, number: int) -> None:
        mail, stage = self.mail, self.stages[number]
        if number > 1:
            # What was last read two stages ago has been received by now; its buffers come back.
            mail.flush(number - 2, _INPUT_TAGS)
        for tensor, panel, parts in stage.panels:
            own, tag = self.inputs[tensor], TAGS[tensor]
            self.panels[tensor, panel] = [
                (part.box, mail.receive(shape_of(part.box), own.dtype, part.source, tag))
                if part.slices is None
                else (part.box, own[part.slices])
                for part in parts
            ]
        for tensor, peer, slices, last in stage.sends:
            mail.send(self.inputs[tensor][slices], peer, TAGS[tensor], last)

    def _arrived(self, tensor: str, panel: int) -> tuple[tuple[Box, ...], list[Array]]:
        """(boxes, arrays): the parts of A or B that a tile reads."""
        x = self.x
        if tensor not in x.moving:
            return (x.owned[tensor],), [self.inputs[tensor]]
        entries = self.panels[tensor, panel]
        waiting = [part for _, part in entries if isinstance(part, Receipt) and part.under_way]
        if waiting:
            self.mail.wait(waiting)
        if len(entries) > 1 and x.must_join[tensor][panel]:
            entries = self.panels[tensor, panel] = [self._join(tensor, panel, entries)]
        arrays = [part.array if isinstance(part, Receipt) else part for _, part in entries]
        return tuple(box for box, _ in entries), arrays

    def _join(self, tensor: str, panel: int, entries: list[tuple[Box, Array | Receipt]]) -> tuple[Box, Array]:
        """Copy the parts of a panel that is cut along more than the summed indices into one array."""
        whole = self.x.schedule.tiling.panels[tensor][panel].box
        joined = self.xp.empty(shape_of(whole), dtype=self.inputs[tensor].dtype)
        for box, part in entries:
            joined[local_slices(box, whole)] = part.array if isinstance(part, Receipt) else part
            if isinstance(part, Receipt):
                self.mail.release(part)
        return whole, joined

    # -- tiles and results -----------------------------------------------------------------------------------------

    def _multiply(self, number: int) -> None:
        x, stage = self.x, self.stages[number]
        a_boxes, a = self._arrived("A", stage.numbers["A"])
        b_boxes, b = self._arrived("B", stage.numbers["B"])
        if stage.recipes is None:
            a_panel, b_panel = (x.schedule.tiling.panels[tensor][stage.numbers[tensor]].box for tensor in "AB")
            stage.recipes = [x.contraction.recipe(a_boxes, a_panel, b_boxes, b_panel, span) for span in x.spans]
        multiply, progress = x.contraction.multiply, self.progress
        if not x.moves_result:
            target = self.out[stage.tile_in_share]
            multiply(stage.recipes[0], a, b, target, alpha=self.alpha, beta=self.beta, progress=progress)
        else:
            partial = self._partial(number)
            alpha = self.alpha if self.finished_at_source else 1.0
            for plane, recipe in zip(partial, stage.recipes, strict=True):
                multiply(recipe, a, b, plane, alpha=alpha, progress=progress)
            for peer, slices in stage.result_sends:
                self.mail.send(partial[slices], peer, TAGS["C"], number)
        for tensor, panel in stage.release:
            for _, part in self.panels.pop((tensor, panel)):
                if isinstance(part, Receipt):
                    self.mail.release(part)

    def _partial(self, number: int) -> Array:
        """(subtrees, tile): where a tile goes before it is sent or added."""
        stage = self.stages[number]
        if self.finished_at_source and stage.inside:
            return self.out[stage.tile_in_share][None]
        assert stage.tile is not None
        shape = (len(self.x.spans), *shape_of(stage.tile))
        workspace = self.partials[number] = self.mail.workspace(shape, self.partial_dtype)
        return workspace.array

    def _post_results(self, number: int) -> None:
        mail, dtype, tag = self.mail, self.partial_dtype, TAGS["C"]
        self.results[number] = [
            [
                mail.receive(
                    shape,
                    dtype,
                    peer,
                    tag,
                    self.out[total.target][None] if self.finished_at_source else None,
                    for_later=True,
                )
                for peer, shape in total.receives
            ]
            for total in self.stages[number].sums
        ]

    def _finish(self, number: int) -> None:
        """Add the partial results of a stage into this rank's share, and hand it on to the replicas."""
        mail, stage = self.mail, self.stages[number]
        own = self.partials.get(number)
        for total, receipts in zip(stage.sums, self.results.pop(number), strict=True):
            if receipts:
                mail.wait(receipts)
            mine = own.array[total.own] if own is not None and total.own is not None else None
            if not self.finished_at_source:
                total.add([*(receipt.array for receipt in receipts), mine], self.out, self.alpha, self.beta)
            elif mine is not None:
                self.out[total.target] = mine[0]
            for receipt in receipts:
                mail.release(receipt)
        if stage.replica_receives or stage.replica_sends:
            self._exchange_replicas(number)
        if number:
            # Slower ranks may still read the tile of this stage; that of the stage before is free.
            mail.flush(number - 1, _RESULT_TAGS)
            if number - 1 in self.partials:
                mail.give_workspace(self.partials.pop(number - 1))

    def _exchange_replicas(self, number: int) -> None:
        mail, stage, tag = self.mail, self.stages[number], TAGS["replica"]
        for earlier in [s for s in self.replicas if s < number]:
            mail.wait(self.replicas.pop(earlier))
        self.replicas[number] = [
            mail.receive(shape, self.out.dtype, peer, tag, self.out[slices], for_later=True)
            for peer, shape, slices in stage.replica_receives
        ]
        for peer, slices in stage.replica_sends:
            mail.send(self.out[slices], peer, tag, number)


def accumulator(dtype: Any) -> np.dtype[Any]:
    """The type in which products of a type are summed: float32 for 16-bit types, else the type itself."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype
