"""Headers: what every rank of a call was given, known to all of them before the first byte of payload moves.

A call begins with one small message from every member to every other, of fixed size, on persistent requests. Its
content is fixed by the call's arguments, so the headers of all members together are the proof that they agree and also
the key under which the plan of the call is found again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from fivedp.comm.grid import Group

HEADER_BYTES = 768
_TAG = 1


class Agreement:
    """The exchange of headers between the members of a group, ready to be started again for every call."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._mine = np.zeros(HEADER_BYTES, dtype=np.uint8)
        self._all = np.zeros((group.size, HEADER_BYTES), dtype=np.uint8)
        data, tag = group.grid.data, 16 * group.channel + _TAG
        self._requests: list[MPI.Prequest] = []
        self._peers: list[int] = []
        for index, member in enumerate(group.members):
            if index != group.index:
                self._requests += [
                    data.Recv_init(self._all[index], member, tag),
                    data.Send_init(self._mine, member, tag),
                ]
                self._peers += [member, member]

    def exchange(self, header: bytes, text: str, patience_s: float | None = None) -> npt.NDArray[np.uint8]:
        """All members' headers, (members, HEADER_BYTES).

        `text` says what this rank called, for messages of errors; `patience_s` replaces the usual deadline.
        Collective over the group. The result is overwritten by the next exchange.
        """
        group = self.group
        self._mine[:] = np.frombuffer(header, dtype=np.uint8)
        self._all[group.index] = self._mine
        if group.size > 1:
            watchdog = group.grid.watchdog
            watchdog.enter(group.channel, group.members, text)
            try:
                MPI.Prequest.Startall(self._requests)
                watchdog.wait(self._requests, self._peers, text, header=True, patience_s=patience_s)
            except BaseException as error:
                watchdog.fail(error)
                raise
            watchdog.agreed()
        return self._all


def agreement_of(group: Group) -> Agreement:
    """The agreement of a group, made once."""
    agreement = group.cache.get("agreement")
    if not isinstance(agreement, Agreement):
        agreement = group.cache["agreement"] = Agreement(group)
    return agreement
