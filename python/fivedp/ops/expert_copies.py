"""The messages of copies of hot experts: weights to another node, and in the backward rows back to their owner.

An owner sends the weights once to every node that has a copy, to its gateway there, which takes them into its part of
the shared window; the ranks of the node read them where they lie, or get them as messages where there is no window.
In the backward the weights travel again, and the owner is sent what it needs to sum up their gradient in the order of
all rows: for every row that was made elsewhere x and dy, and the arrays of width F.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fivedp.comm.messages import TAGS, Mailbox, Receipt, Workspace
from fivedp.kernels.experts import Rows
from fivedp.ops.dispatch_plan import DispatchPlan
from fivedp.ops.expert_dispatch import Dispatched, in_type
from fivedp.ops.work_sharing import Job

Array = Any


class CopiedWeights:
    """The weights of copies on their way.

    Between nodes they have the tag "A", and are made before whatever else of the call has it; inside a node they follow
    the rows of `behind`, whose tag they have. `arrays()` waits for them; `release()` says that they have been read for
    the last time.

    Parameters
    ----------
    mail : Mailbox
    plan : DispatchPlan
    behind : Dispatched
    weights : dict of str to (E_local, ., .) arrays
        Of this rank's experts, any strides.
    """

    def __init__(self, mail: Mailbox, plan: DispatchPlan, behind: Dispatched, weights: Mapping[str, Array]) -> None:
        assert plan.copies is not None
        self.mail, self.plan, self.copies, self._tag = mail, plan, plan.copies, behind.number
        self._shapes = {name: w.shape[1:] for name, w in weights.items()}
        size = sum(int(np.prod(shape)) for shape in self._shapes.values())
        copies, mine, dtype = self.copies, plan.group.index, plan.dtype
        self._taken_in, self._used = copies.taken_in(mine), copies.used_by(mine)
        space = self._space((len(self._taken_in), size))
        mail.give_at_end(space)
        self.box = space.array
        self._arriving = [
            mail.receive((size,), dtype, int(copies.cut.owner[expert]), TAGS["A"], target=row)
            for expert, row in zip(self._taken_in, self.box, strict=True)
        ]
        here = plan.nodes.members[plan.nodes.of[mine]]
        self._mates = [mate for mate in here if mate != mine]
        self._receipts: dict[int, Receipt] = {}
        for mate in self._mates:
            if n := len(copies.passed_on(mate, mine)):
                whole = (len(copies.taken_in(mate)), size)
                self._receipts[mate] = mail.receive_rows(n, whole, dtype, mate, self._tag)
        packed: dict[int, Array] = {}
        for expert, receiver in copies.given(mine):
            if expert not in packed:
                space = mail.private((size,), dtype)
                mail.give_at_end(space)
                place, at = expert - copies.cut.borders[mine], 0
                for name, shape in self._shapes.items():
                    n = int(np.prod(shape))
                    space.array[at : at + n].reshape(shape)[...] = weights[name][place]
                    at += n
                packed[expert] = space.array
            mail.send(packed[expert], receiver, TAGS["A"], 0)
        self._passed_on = False

    def _space(self, shape: tuple[int, int]) -> Workspace:
        """Where the ranks of the node reach it: weights may be more than there is room for boxes."""
        window, dtype = self.plan.group.grid.shared, self.plan.dtype
        n_bytes = shape[0] * shape[1] * dtype.itemsize
        extent = window.take_large(n_bytes) if window is not None and n_bytes else None
        if window is None or extent is None:
            return self.mail.private(shape, dtype)
        return Workspace(window.array(extent, shape, dtype), extent=extent)

    def pass_on(self) -> None:
        """Wait for what this rank takes in for its node, and let the others have it; once."""
        if self._passed_on:
            return
        self._passed_on = True
        self.mail.wait(self._arriving)
        for mate in self._mates:
            rows = np.array(self.copies.passed_on(self.plan.group.index, mate), np.int32)
            self.mail.send_rows(self.box, rows, mate, self._tag, 0)

    def arrays(self) -> list[dict[str, Array]]:
        """Of every copy that this rank uses, rising by expert, the weights as those of one expert, (1, ., .)."""
        self.pass_on()
        self.mail.wait(list(self._receipts.values()))
        found = {}
        for mate, receipt in self._receipts.items():
            places = self.copies.passed_on(mate, self.plan.group.index)
            experts = self.copies.taken_in(mate)
            for n, place in enumerate(places):
                found[experts[place]] = receipt.array[place if receipt.whole else n]
        found |= dict(zip(self._taken_in, self.box, strict=True))
        return [self._split(found[expert]) for expert in self._used]

    def _split(self, flat: Array) -> dict[str, Array]:
        arrays, at = {}, 0
        for name, shape in self._shapes.items():
            n = int(np.prod(shape))
            arrays[name] = flat[at : at + n].reshape(1, *shape)
            at += n
        return arrays

    def release(self) -> None:
        """This rank has read them for the last time."""
        for receipt in self._receipts.values():
            self.mail.release(receipt)


class KeptRows:
    """What the gradients of an owner's weights need of rows that were made elsewhere, on its way to the owner.

    Parameters
    ----------
    mail : Mailbox
    plan : DispatchPlan
    kinds : dict of str to (int, dtype)
        The arrays: their width and type. The same on every rank, in the same order.
    """

    def __init__(self, mail: Mailbox, plan: DispatchPlan, kinds: Mapping[str, tuple[int, Any]]) -> None:
        assert plan.copies is not None
        self.mail, self.plan, self.copies, self._kinds = mail, plan, plan.copies, dict(kinds)
        mine = plan.group.index
        self._receipts: dict[int, dict[str, Receipt]] = {}
        for source in plan.peers[::-1]:
            if n := self.copies.n_kept(source, mine):
                self._receipts[source] = {
                    name: mail.receive((n, width), dtype, source, TAGS["A"]) for name, (width, dtype) in kinds.items()
                }

    def send(self, made: Mapping[str, Array], *tokens: Dispatched) -> None:
        """Send this rank's rows of copies to the owners of the experts: of its tokens, and of what it has made."""
        begin, mine = 0, self.plan.group.index
        token = self.plan.incoming.token[self.plan.incoming.n_own :]
        for owner in range(self.plan.group.size):  # experts rise with their owners
            if n := self.copies.n_kept(mine, owner):
                part = slice(begin, begin + n)
                for travel in tokens:
                    self.mail.send_rows(travel.x, token[part], owner, TAGS["A"], 0)
                for array in made.values():
                    self.mail.send(array[part], owner, TAGS["A"], 0)
                begin += n

    def complete(self, job: Job, tokens: Mapping[str, Dispatched]) -> None:
        """Give this rank's job all rows of its experts in their order, those that were made elsewhere among them."""
        plan, order = self.plan, self.plan.incoming.in_order()
        self.mail.wait([receipt for receipts in self._receipts.values() for receipt in receipts.values()])
        of_array = np.zeros(1 + plan.group.size, np.int32)
        made = order.source == 0
        for name in self._kinds:
            if name in tokens:
                tokens[name].rows()  # waits for them
                arrays, source, index = tokens[name].places(slice(0, plan.incoming.n_own))
            else:
                arrays = [job.arrays[name]]
                source, index = np.zeros(plan.incoming.n_own, np.int32), np.arange(plan.incoming.n_own, dtype=np.int32)
            for place, rank in enumerate(self._receipts):
                of_array[1 + rank] = len(arrays) + place
            arrays = arrays + [receipts[name].array for receipts in self._receipts.values()]
            sources, indices = of_array[order.source], order.index.copy()
            sources[made], indices[made] = source[order.index[made]], index[order.index[made]]
            rows = Rows(arrays, sources, indices)
            job.rows[name] = in_type(rows, plan) if name in tokens else rows
        job.offsets = order.offsets

    def release(self) -> None:
        """This rank has read them for the last time."""
        for receipts in self._receipts.values():
            for receipt in receipts.values():
                self.mail.release(receipt)
