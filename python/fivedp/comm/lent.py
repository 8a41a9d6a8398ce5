"""Arrays whose memory goes back to its owner when nobody has them any more."""

from __future__ import annotations

import math
import weakref
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Ticket = TypeVar("Ticket")


class _Lent:
    """What arrays on lent memory have as their base, so that it lives as long as any of them or of their views.

    An array made on a buffer would have the whole of it as its base.
    """

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__


def lend(
    memory: npt.NDArray[np.uint8], shape: tuple[int, ...], dtype: np.dtype[Any], returned: list[Ticket], ticket: Ticket
) -> npt.NDArray[Any]:
    """The beginning of `memory` as an array, with what it holds; `ticket` is added to `returned` when it comes back.

    That may be in the middle of anything, for the garbage collector decides it: the owner of the list looks into it
    when it is next asked for memory, and does nothing else with it.
    """
    owner = _Lent(memory)
    weakref.finalize(owner, returned.append, ticket).atexit = False
    return np.asarray(owner)[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
