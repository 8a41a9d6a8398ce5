"""Carrying out a schedule on one rank's arrays: post, multiply, send, add, stage by stage.

Everything that depends on sizes alone (slices, peers, which parts make up which panel) is worked out once and kept; a
call walks through lists.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from fivedp.comm.grid import Group
from fivedp.comm.messages import Mailbox, Receipt, Workspace
from fivedp.layout.plan import Plan
from fivedp.layout.schedule import Panel, Schedule
from fivedp.layout.shares import Box, local_slices
from fivedp.ops.contraction import Contraction, Recipe, add_tree

Array = Any
_TAGS = {"A": 2, "B": 3, "C": 4, "replica": 5}


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


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
        self.schedule = Schedule(plan, group.index, single_stage=single_stage)
        brick = plan.brick(group.index)
        spec = plan.family.spec
        self.contraction = Contraction(spec, plan.leaf_borders, {name: brick[name] for name in spec.k})
        self.spans = plan.spans(group.index)
        self.owned = {tensor: plan.owned(tensor, group.index) for tensor in "ABC"}
        self.out_shape = _shape(self.owned["C"])
        self.moves_result = plan.moves("C")
        self.moving = [tensor for tensor in "AB" if plan.moves(tensor)]

    @cached_property
    def _splits_elsewhere(self) -> dict[str, list[bool]]:
        """For A and B, for each panel: whether its parts differ in more than summed indices and must be joined."""
        result = {}
        for tensor, panels in self.schedule.panel_parts.items():
            names = self.plan.family.layouts[tensor].names
            kept = [place for place, name in enumerate(names) if name not in self.plan.family.spec.k]
            result[tensor] = [len({tuple(box[p] for p in kept) for _, box in parts}) > 1 for parts in panels]
        return result

    @cached_property
    def _sends_by_stage(self) -> dict[str, list[list[tuple[int, tuple[slice, ...], int]]]]:
        """For A and B, for each stage: (peer, slices of this rank's share, the stage that reads them last)."""
        result = {}
        for tensor, messages in self.schedule.input_sends.items():
            stages: list[list[tuple[int, tuple[slice, ...], int]]] = [[] for _ in range(self.schedule.n_stages)]
            for message in messages:
                slices = local_slices(message.box, self.owned[tensor])
                stages[message.stage].append((message.peer, slices, message.last))
            result[tensor] = stages
        return result

    @cached_property
    def _panels_by_stage(self) -> dict[str, list[list[int]]]:
        """For A and B, for each stage: the numbers of the panels that are read first in it."""
        result = {}
        for tensor in self.moving:
            stages: list[list[int]] = [[] for _ in range(self.schedule.n_stages)]
            for number, panel in enumerate(self.schedule.tiling.panels[tensor]):
                stages[panel.first].append(number)
            result[tensor] = stages
        return result

    def run(self, a: Array, b: Array, out: Array, alpha: complex, beta: complex, wire: Any, xp: Any, what: str) -> None:
        """Multiply: `out` (this rank's share of C) becomes alpha * A B + beta * C. Collective over the group."""
        if not self.moving and not self.moves_result:
            if self.schedule.tiling.boxes:
                self.contraction.multiply(self._local_recipe, (a,), (b,), out, alpha=alpha, beta=beta)
            return
        mail = Mailbox(self.group, what, xp)
        try:
            _Run(self, a, b, out, alpha, beta, wire, mail, xp).go()
        except BaseException:
            mail.abandon()
            raise

    @cached_property
    def _local_recipe(self) -> Recipe:
        """The one product of a rank that needs nobody else."""
        rank, plan, owned = self.group.index, self.plan, self.owned
        return self.contraction.recipe(
            (owned["A"],), plan.needed("A", rank), (owned["B"],), plan.needed("B", rank), self.spans[0]
        )


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
        self.inputs = {"A": a, "B": b}
        self.out, self.alpha, self.beta = out, alpha, beta
        plan = execution.plan
        # The sum of one rank that needs no other rank's part can be finished where it is made.
        self.finished_at_source = plan.total_nodes == 1 and beta == 0
        self.partial_dtype = out.dtype if self.finished_at_source else wire
        self.panels: dict[tuple[str, int], list[tuple[Box, Array | Receipt]]] = {}
        self.partials: dict[int, Workspace] = {}
        self.results: dict[int, list[tuple[Box, list[tuple[int, Receipt | None]]]]] = {}
        self.replicas: dict[int, list[Receipt]] = {}
        self.progress = None if execution.schedule.n_stages == 1 else mail.progress()

    def go(self) -> None:
        schedule = self.x.schedule
        self._post_inputs(0)
        for stage in range(schedule.n_stages):
            if stage + 1 < schedule.n_stages:
                self._post_inputs(stage + 1)
            if self.x.moves_result:
                self._post_results(stage)
            if stage < len(schedule.tiling.boxes):
                self._multiply(stage)
            if self.x.moves_result and stage > 0:
                self._finish(stage - 1)
        if self.x.moves_result:
            if schedule.n_stages:
                self._finish(schedule.n_stages - 1)
            for stage in list(self.replicas):
                self.mail.wait(self.replicas.pop(stage))
        self.mail.flush()
        for partial in self.partials.values():
            self.mail.give_workspace(partial)

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _post_inputs(self, stage: int) -> None:
        x, mail = self.x, self.mail
        # What was last read two stages ago has been received by now; its buffers come back.
        mail.flush(stage - 2, (_TAGS["A"], _TAGS["B"]))
        for tensor in x.moving:
            own = self.inputs[tensor]
            for number in x._panels_by_stage[tensor][stage]:
                entries: list[tuple[Box, Array | Receipt]] = []
                for source, box in x.schedule.panel_parts[tensor][number]:
                    if source == x.group.index:
                        entries.append((box, own[local_slices(box, x.owned[tensor])]))
                    else:
                        entries.append((box, mail.receive(_shape(box), own.dtype, source, _TAGS[tensor])))
                self.panels[tensor, number] = entries
            for peer, slices, last in x._sends_by_stage[tensor][stage]:
                mail.send(own[slices], peer, _TAGS[tensor], last)

    def _parts(self, tensor: str, stage: int) -> tuple[tuple[Box, ...], Box, list[Array]]:
        """(boxes, panel, arrays): the parts of A or B that the tile of `stage` reads, arrived."""
        x = self.x
        tiling = x.schedule.tiling
        number = tiling.panel_of[tensor][stage]
        panel = tiling.panels[tensor][number]
        if tensor not in x.moving:
            return (x.owned[tensor],), panel.box, [self.inputs[tensor]]
        entries = self.panels[tensor, number]
        waiting = [part for _, part in entries if isinstance(part, Receipt) and part.requests]
        if waiting:
            self.mail.wait(waiting)
        if x._splits_elsewhere[tensor][number]:
            entries = self.panels[tensor, number] = self._join(panel, entries, tensor)
        arrays = [part.array if isinstance(part, Receipt) else part for _, part in entries]
        return tuple(box for box, _ in entries), panel.box, arrays

    def _join(
        self, panel: Panel, entries: list[tuple[Box, Array | Receipt]], tensor: str
    ) -> list[tuple[Box, Array | Receipt]]:
        """Copy the parts of a panel that is cut along more than the summed indices into one array."""
        if len(entries) == 1:
            return entries
        joined = self.xp.empty(_shape(panel.box), dtype=self.inputs[tensor].dtype)
        for box, part in entries:
            joined[local_slices(box, panel.box)] = part.array if isinstance(part, Receipt) else part
            if isinstance(part, Receipt):
                self.mail.release(part)
        return [(panel.box, joined)]

    def _release_panels(self, stage: int) -> None:
        tiling = self.x.schedule.tiling
        for tensor in self.x.moving:
            number = tiling.panel_of[tensor][stage]
            if tiling.panels[tensor][number].last == stage:
                for _, part in self.panels.pop((tensor, number)):
                    if isinstance(part, Receipt):
                        self.mail.release(part)

    # -- tiles and results -----------------------------------------------------------------------------------------

    def _multiply(self, stage: int) -> None:
        x = self.x
        box = x.schedule.tiling.boxes[stage]
        a_boxes, a_panel, a = self._parts("A", stage)
        b_boxes, b_panel, b = self._parts("B", stage)
        recipes = [x.contraction.recipe(a_boxes, a_panel, b_boxes, b_panel, span) for span in x.spans]
        multiply = x.contraction.multiply
        if not x.moves_result:
            target = self.out[local_slices(box, x.owned["C"])]
            multiply(recipes[0], a, b, target, alpha=self.alpha, beta=self.beta, progress=self.progress)
        else:
            partial = self._partial(stage, box)
            alpha = self.alpha if self.finished_at_source else 1.0
            for plane, recipe in zip(partial, recipes, strict=True):
                multiply(recipe, a, b, plane, alpha=alpha, progress=self.progress)
            for message in x.schedule.result_sends[stage]:
                inner = local_slices(message.box, box)
                self.mail.send(partial[(slice(None), *inner)], message.peer, _TAGS["C"], stage)
        self._release_panels(stage)

    def _partial(self, stage: int, box: Box) -> Array:
        """(subtrees, box): where the tile of `stage` goes before it is sent or added."""
        shape = (len(self.x.spans), *_shape(box))
        if self.finished_at_source and self._inside(box):
            return self.out[local_slices(box, self.x.owned["C"])][None]
        workspace = self.partials[stage] = self.mail.workspace(shape, self.partial_dtype)
        return workspace.array

    def _inside(self, box: Box) -> bool:
        return all(o[0] <= i[0] and i[1] <= o[1] for i, o in zip(box, self.x.owned["C"], strict=True))

    def _post_results(self, stage: int) -> None:
        x = self.x
        groups = []
        for messages in x.schedule.result_receives[stage]:
            receipts: list[tuple[int, Receipt | None]] = []
            for message in messages:
                if message.peer == x.group.index:
                    receipts.append((message.peer, None))
                    continue
                planes = len(x.plan.spans(message.peer))
                target = None
                if self.finished_at_source:
                    target = self.out[local_slices(message.box, x.owned["C"])][None]
                shape = (planes, *_shape(message.box))
                receipts.append(
                    (message.peer, self.mail.receive(shape, self.partial_dtype, message.peer, _TAGS["C"], target))
                )
            groups.append((messages[0].box, receipts))
        self.results[stage] = groups

    def _finish(self, stage: int) -> None:
        """Add the partial results of a stage into this rank's share, and hand it on to the replicas."""
        x, mail = self.x, self.mail
        tiles = x.schedule.tiling.boxes
        for box, receipts in self.results.pop(stage):
            mail.wait([receipt for _, receipt in receipts if receipt is not None])
            target = self.out[local_slices(box, x.owned["C"])]
            if self.finished_at_source:
                if receipts[0][1] is None and not self._inside(tiles[stage]):
                    target[...] = self.partials[stage].array[0][local_slices(box, tiles[stage])]
            else:
                self._add(stage, box, receipts, target)
            for _, receipt in receipts:
                if receipt is not None:
                    mail.release(receipt)
        self._exchange_replicas(stage)
        if stage - 1 in self.partials:
            # Slower ranks may still read the tile of this stage; that of the stage before is free.
            mail.flush(stage - 1, (_TAGS["C"],))
            mail.give_workspace(self.partials.pop(stage - 1))

    def _add(self, stage: int, box: Box, receipts: list[tuple[int, Receipt | None]], target: Array) -> None:
        x = self.x
        found = []
        for peer, receipt in receipts:
            if receipt is None:
                planes = self.partials[stage].array[(slice(None), *local_slices(box, x.schedule.tiling.boxes[stage]))]
            else:
                planes = receipt.array
            found += list(zip(x.plan.spans(peer), planes, strict=True))
        found.sort(key=lambda entry: entry[0])
        arrays = [array for _, array in found]
        if arrays[0].dtype.itemsize < 4:  # wire="same": partial results were rounded for the journey
            arrays = [array.astype(np.float32) for array in arrays]
        add_tree(arrays, [span for span, _ in found], target, alpha=self.alpha, beta=self.beta)

    def _exchange_replicas(self, stage: int) -> None:
        x, mail = self.x, self.mail
        if x.plan.slice_index is None:
            return
        for earlier in [s for s in self.replicas if s < stage]:
            mail.wait(self.replicas.pop(earlier))
        owned = x.owned["C"]
        self.replicas[stage] = [
            mail.receive(_shape(m.box), self.out.dtype, m.peer, _TAGS["replica"], self.out[local_slices(m.box, owned)])
            for m in x.schedule.replica_receives[stage]
        ]
        for message in x.schedule.replica_sends[stage]:
            mail.send(self.out[local_slices(message.box, owned)], message.peer, _TAGS["replica"], stage)


def accumulator(dtype: Any) -> np.dtype[Any]:
    """The type in which products of a type are summed: float32 for 16-bit types, else the type itself."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype
