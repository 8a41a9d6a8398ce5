"""The index arrays of a dispatch where the kernels read them: on a device, or those of the plan themselves.

A plan is made on the host. For CuPy arrays its tables are copied when they are first needed, those of one purpose at
once, and serve every later exchange along the plan: the combine, and both backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any

import numpy as np

from fivedp.comm.messages import Mailbox
from fivedp.kernels import experts as kernel
from fivedp.kernels.device_copies import to_device
from fivedp.kernels.experts import Rows
from fivedp.layout.dispatch import Incoming, Outgoing, SumTable
from fivedp.layout.relay import Relay

Array = Any


class PlanTables:
    """What kernels read of a plan.

    Parameters
    ----------
    xp : module
        numpy or cupy: where the tokens live.
    outgoing : Outgoing
    incoming : Incoming
    relay : Relay or None
    """

    def __init__(self, xp: Any, outgoing: Outgoing, incoming: Incoming, relay: Relay | None) -> None:
        self.xp, self.outgoing, self.incoming, self.relay = xp, outgoing, incoming, relay
        self._sums: dict[Hashable, SumTable] = {}

    # -- rows ------------------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> list[Array]:
        """For each rank, the tokens that go there."""
        return to_device(self.xp, self.outgoing.rows)

    @cached_property
    def passes_on(self) -> dict[int, Array]:
        """As a gateway: the rows of the box that each of the others needs."""
        assert self.relay is not None
        needed = self.relay.passes_on
        return dict(zip(needed, to_device(self.xp, list(needed.values())), strict=True))

    @cached_property
    def places(self) -> tuple[Array, Array]:
        """(source, index): where the rows of this rank's experts are, where all but its own came as messages."""
        incoming = self.incoming
        found = incoming.source, np.where(incoming.source == incoming.rank, incoming.token, incoming.row)
        if self.relay is not None:
            whole = np.zeros(len(incoming.pairs), np.bool_)
            whole[incoming.rank] = True
            found = self.relay.places(*found, whole)
        source, index = to_device(self.xp, found)
        return source, index

    @property
    def offsets(self) -> Array:
        """Borders of the experts among this rank's rows."""
        return self._experts[0]

    @property
    def weights(self) -> Array:
        """Of this rank's rows."""
        return self._experts[1]

    @cached_property
    def _experts(self) -> list[Array]:
        return to_device(self.xp, [self.incoming.offsets, self.incoming.weights])

    # -- pairs -----------------------------------------------------------------------------------------------------

    @cached_property
    def positions(self) -> list[Array]:
        """For each rank, where the rows of its pairs lie."""
        return to_device(self.xp, self.incoming.positions)

    @cached_property
    def of_owner(self) -> list[Array]:
        """For each owner, the numbers of this rank's pairs."""
        return to_device(self.xp, self.outgoing.of_owner)

    @cached_property
    def slots(self) -> list[Array]:
        """(token, slot) of each of this rank's pairs."""
        return to_device(self.xp, [self.outgoing.pairs["token"], self.outgoing.slots])

    # -- sums ------------------------------------------------------------------------------------------------------

    def sums_for(self, rank: int, weighted: bool) -> SumTable:
        """What goes back to the tokens of a rank, as `Incoming.sums`."""
        return self._table(("for", rank, weighted), lambda: self.incoming.sums([rank], weighted))

    def sums_through(self, gateway: int, weighted: bool) -> SumTable:
        """What goes to a gateway, for the tokens of the ranks that it serves."""
        assert self.relay is not None
        served = self.relay.served[gateway]
        return self._table(("through", gateway, weighted), lambda: self.incoming.sums(served, weighted))

    def sums_served(self, weighted: bool) -> SumTable:
        """What this rank sends on as a gateway, as `Relay.sums`."""
        assert self.relay is not None
        relay = self.relay
        return self._table(("served", weighted), lambda: relay.sums(weighted))

    def sums_home(self, weighted: bool) -> SumTable:
        """How this rank's tokens are added up, as `Outgoing.sums`."""
        own = self.incoming.positions[self.incoming.rank]
        return self._table(("home", weighted), lambda: self.outgoing.sums(own, weighted))

    def _table(self, name: Hashable, make: Callable[[], SumTable]) -> SumTable:
        if self.xp is np:
            return make()
        if name not in self._sums:
            table = make()
            arrays: list[Array] = [table.starts, table.source, table.index, table.weights, table.experts]
            self._sums[name] = SumTable(*to_device(self.xp, arrays))
        return self._sums[name]


def send_rows(mail: Mailbox, array: Array, rows: Array, peer: int, tag: int) -> None:
    """Send some rows of an array, which `PlanTables` names; those of a device are packed by a kernel."""
    if mail.xp is np:
        mail.send_rows(array, rows, peer, tag, 0)
    elif len(rows):
        packed = mail.xp.empty((len(rows), array.shape[1]), array.dtype)
        kernel.gather_rows(Rows([array], None, rows), packed)
        mail.send(packed, peer, tag, 0)
