"""Payload between the members of a group: boxes of arrays, sent without blocking and counted.

Here a mailbox is chosen by where the arrays live, and nowhere else: NumPy's have that of `transport/host.py`, CuPy's
that of `transport/device.py`, whose transport is settled for every pair of ranks at the first call of a group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from fivedp.comm.grid import Group
from fivedp.comm.transport.host import HostMailbox
from fivedp.comm.transport.mail import (
    MAX_MESSAGE_BYTES,
    OVERFLOW,
    TAGS,
    Array,
    Buffer,
    BufferPool,
    Mailbox,
    Receipt,
    Workspace,
    cut,
    tag_number,
)

__all__ = [
    "MAX_MESSAGE_BYTES", "OVERFLOW", "TAGS", "Array", "Buffer", "BufferPool", "Mailbox", "Receipt", "Workspace", "cut",
    "mailbox", "open_mailbox", "tag_number",
]  # fmt: skip


def open_mailbox(group: Group, what: str, xp: Any) -> Mailbox:
    """The mailbox of one call.

    Parameters
    ----------
    group : Group
    what : str
        The call, for messages of errors.
    xp : module
        numpy or cupy: where the arrays live; the same on all members.

    Raises
    ------
    TransportError
        On every member, where FIVEDP_TRANSPORT asks for what can't be had.

    Notes
    -----
    Collective over the group where arrays are CuPy's and the group has sent none yet.
    """
    if xp is np:
        return HostMailbox(group, what)
    from fivedp.comm.transport.device import DeviceMailbox

    return DeviceMailbox(group, what, xp)


@contextlib.contextmanager
def mailbox(group: Group, what: str, xp: Any) -> Iterator[Mailbox]:
    """A mailbox whose messages have all been received when the block ends; where it fails, the other ranks are told."""
    mail = open_mailbox(group, what, xp)
    try:
        yield mail
        mail.close()
    except BaseException as failure:
        mail.abandon()
        group.grid.watchdog.fail(failure)
        raise
