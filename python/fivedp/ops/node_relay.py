"""The messages of a gateway: rows that came to a node once go on to its ranks, and their sums are added for home.

On the way there the gateway receives into its part of the shared window, from where the ranks of its node read what
they need; without a window they get it as messages. On the way back they put up their sums in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fivedp.comm.messages import TAGS, Mailbox, Receipt, Workspace
from fivedp.kernels import experts as kernel
from fivedp.kernels._select import library_of
from fivedp.kernels.experts import Rows
from fivedp.layout.dispatch import SumTable
from fivedp.ops.dispatch_plan import DispatchPlan
from fivedp.ops.plan_tables import send_rows

Array = Any


def add_rows(table: SumTable, arrays: Sequence[Array], n_experts: int, out: Array) -> None:
    """Carry out a table; sums of float64 are rounded for a narrow wire when they are complete."""
    rows = Rows(arrays, table.source, table.index)
    total = library_of(out).empty(out.shape, rows.dtype) if rows.dtype == np.float64 != out.dtype else out
    kernel.combine_rows(rows, table.starts, table.weights, table.experts, n_experts, total)
    if total is not out:
        out[...] = total


class RelayedRows:
    """Rows from other nodes on their way through the gateways of this one, this rank among them.

    Made after the receives of rows that come straight from the ranks of this node, since both have the same tag.
    """

    def __init__(self, mail: Mailbox, plan: DispatchPlan, dtype: Any, tag: int) -> None:
        assert plan.relay is not None
        self.mail, self.plan, self.relay, self._tag = mail, plan, plan.relay, tag
        relay, borders, width = self.relay, self.relay.box_borders, plan.width
        mine = borders[relay.rank]
        space = mail.workspace((mine[-1], width), dtype)
        mail.give_at_end(space)
        self.box = space.array
        self._arriving: list[Receipt] = []
        # Where copies of experts make some rows at home, the others come without gaps, and are put in their places.
        self._spread: list[tuple[Any, Receipt]] = []
        for number, (rank, begin, end) in enumerate(zip(relay.served[relay.rank], mine, mine[1:], strict=False)):
            places = None if relay.arriving is None else relay.arriving[number]
            if places is None or len(places) == end - begin:
                if end > begin:
                    self._arriving.append(
                        mail.receive((end - begin, width), dtype, rank, tag, target=self.box[begin:end])
                    )
            elif len(places):
                self._spread.append((places, mail.receive((len(places), width), dtype, rank, tag)))
        self._passed_on = False
        self._receipts: dict[int, Receipt] = {}
        for mate in relay.mates[::-1]:
            if n := relay.n_needed[mate]:
                self._receipts[mate] = mail.receive_rows(n, (borders[mate][-1], width), dtype, mate, tag)

    def arrays(self) -> tuple[list[Array], Array]:
        """By rank: what it has for this one as a gateway, and if that is its whole box. Passes on its own, once."""
        mail, relay = self.mail, self.relay
        if not self._passed_on:
            self._passed_on = True
            mail.wait([*self._arriving, *(receipt for _, receipt in self._spread)])
            for places, receipt in self._spread:
                self.box[places] = receipt.array
                mail.release(receipt)
            for mate in relay.mates:
                send_rows(mail, self.box, self.plan.tables.passes_on[mate], mate, self._tag)
            mail.wait(list(self._receipts.values()))
        arrays = [mail.xp.empty((0, self.plan.width), self.box.dtype)] * self.plan.group.size
        whole = np.zeros(self.plan.group.size, np.bool_)
        arrays[relay.rank], whole[relay.rank] = self.box, True
        for mate, receipt in self._receipts.items():
            arrays[mate], whole[mate] = receipt.array, receipt.whole
        return arrays, whole

    def release(self) -> None:
        """This rank has read the rows for the last time."""
        for receipt in self._receipts.values():
            self.mail.release(receipt)


class RelayedSums:
    """Sums of other nodes' tokens on their way home: `send` to their gateways, then, as a gateway, `add`.

    Both give the memory of their messages, which are of the tags "B", inside the node, and "replica".
    """

    def __init__(self, mail: Mailbox, plan: DispatchPlan, *, weighted: bool) -> None:
        assert plan.relay is not None
        self.mail, self.plan, self.relay, self.weighted = mail, plan, plan.relay, weighted
        self._receipts = {
            mate: mail.receive((n, plan.width), plan.sums, mate, TAGS["B"])
            for mate in self.relay.mates[::-1]
            if (n := self.relay.n_sums_from(mate))
        }

    def send(self, rows: Array) -> list[Workspace]:
        """Send what this rank has of their tokens, from its (R, H), to the gateways of its node."""
        plan, spaces = self.plan, []
        for mate in self.relay.mates:
            if n := self.relay.n_sums(mate):
                spaces.append(self.mail.workspace((n, plan.width), plan.sums))
                table = plan.tables.sums_through(mate, self.weighted)
                add_rows(table, [rows], plan.cut.n_experts, spaces[-1].array)
                self.mail.send(spaces[-1].array, mate, TAGS["B"], 0)
        return spaces

    def add(self, rows: Array) -> list[Workspace]:
        """Add what this node has of the tokens of the ranks that this one serves, and send it home."""
        mail, plan, relay = self.mail, self.plan, self.relay
        mail.wait(list(self._receipts.values()))
        borders, spaces = relay.sum_borders, []
        if borders[-1]:
            kind = plan.sums if self._receipts else rows.dtype
            arrays = [rows.astype(kind, copy=False)] + [mail.xp.empty((0, plan.width), kind)] * plan.group.size
            for mate, receipt in self._receipts.items():
                arrays[1 + mate] = receipt.array
            spaces.append(mail.private((borders[-1], plan.width), plan.back_dtype))
            home = spaces[-1].array
            add_rows(plan.tables.sums_served(self.weighted), arrays, plan.cut.n_experts, home)
            for rank, begin, end in zip(relay.served[relay.rank], borders, borders[1:], strict=False):
                mail.send(home[begin:end], rank, TAGS["replica"], 0)
        for receipt in self._receipts.values():
            mail.release(receipt)
        return spaces
