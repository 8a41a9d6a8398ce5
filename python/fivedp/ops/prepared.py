"""Small calls, made ready down to the MPI requests.

Where every message of a call is small, its cost is Python's: a buffer, a request and an object for each. None of that
depends on the values, so it is made once per execution: persistent requests on fixed buffers, and lists of what is
copied where. A call then copies, starts the requests, multiplies, and starts those of the partial results.

The messages are those of `comm.messages` (same tags, same order, each below the size from which boxes lie in the shared
window), so a rank may take this way whatever the others do. Calls of one grid follow one another, so all of its
executions share one arena of buffers.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from fivedp.comm.grid import Group
from fivedp.comm.messages import TAGS, tag_number
from fivedp.comm.shared_window import MIN_BYTES
from fivedp.layout.shares import Box, local_slices, shape_of
from fivedp.ops.contraction import Recipe

if TYPE_CHECKING:
    from fivedp.ops.execution import Execution, Sum

Array = Any
Slices = tuple[slice, ...]
_ARENA_BYTES = 1 << 20
_LINE = 64


class TooLarge(Exception):
    """The messages or the buffers of a call are not small."""


class _Phase:
    """The messages of one exchange, as persistent requests."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.received: list[tuple[Array, int, int]] = []
        self.sent: list[tuple[Array, int, int]] = []
        self.requests: list[MPI.Prequest] = []
        self.peers: list[int] = []

    def open(self) -> None:
        """Make the requests; no message is added after this."""
        data = self.group.grid.data
        for entries, make in ((self.received, data.Recv_init), (self.sent, data.Send_init)):
            for buffer, rank, tag in entries:
                self.requests.append(make([buffer, MPI.BYTE], rank, tag))
                self.peers.append(rank)

    def receive(self, buffer: Array, peer: int, tag: int) -> None:
        """Add a message from a member; an empty one is not sent."""
        self._add(self.received, buffer, peer, tag)

    def send(self, buffer: Array, peer: int, tag: int) -> None:
        """Add a message to a member."""
        self._add(self.sent, buffer, peer, tag)

    def _add(self, entries: list[tuple[Array, int, int]], buffer: Array, peer: int, tag: int) -> None:
        if buffer.nbytes >= MIN_BYTES:
            raise TooLarge
        if buffer.size:
            entries.append((buffer.reshape(-1).view(np.uint8), self.group.members[peer], tag_number(self.group, tag)))

    def carry_out(self, what: str) -> None:
        """Send and receive everything."""
        if not self.requests:
            return
        grid = self.group.grid
        for buffer, rank, _ in self.sent:
            grid.traffic.count(rank, buffer.nbytes)
        MPI.Prequest.Startall(self.requests)
        grid.watchdog.wait(self.requests, self.peers, what)

    def close(self) -> None:
        """Free the requests, none of which is under way."""
        for request in self.requests:
            request.Free()

    def abandon(self) -> None:
        """The call has failed: take back the receives."""
        for request in self.requests[: len(self.received)]:
            if not request.Test():
                request.Cancel()


class Prepared:
    """An execution of one stage on host arrays, with everything but the values in place.

    Parameters
    ----------
    execution : Execution
    a, b, out : array
        Arrays of the shapes and types that every call brings.
    alpha, beta : number
        The same in every call.
    wire : dtype
        In which partial sums travel.

    Raises
    ------
    TooLarge
        Where a message or the buffers together are not small.
    """

    def __init__(
        self, execution: Execution, a: Array, b: Array, out: Array, alpha: complex, beta: complex, wire: Any
    ) -> None:
        self.x, self.alpha, self.beta = execution, alpha, beta
        self.stage = execution.stages[0]
        group = execution.group
        self._arena: npt.NDArray[np.uint8] = group.grid.cache.setdefault("arena", np.empty(_ARENA_BYTES, np.uint8))
        self._used = 0
        self.finished_at_source = execution.finished_at_source(beta)
        self.partial_dtype = np.dtype(out.dtype if self.finished_at_source else wire)
        self.inputs, self.results, self.replicas = self._phases = _Phase(group), _Phase(group), _Phase(group)
        self._prepare_inputs({"A": a, "B": b})
        self._prepare_results()
        self._prepare_replicas(out.dtype)
        self.recipes = self._recipes()
        for phase in self._phases:
            phase.open()

    def __del__(self) -> None:
        if not MPI.Is_finalized():
            for phase in self._phases:
                phase.close()

    def _take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A buffer of the arena."""
        dtype = np.dtype(dtype)
        n_bytes = math.prod(shape) * dtype.itemsize
        start = self._used
        self._used = start + -(-n_bytes // _LINE) * _LINE
        if self._used > _ARENA_BYTES:
            raise TooLarge
        return self._arena[start : start + n_bytes].view(dtype).reshape(shape)

    def _prepare_inputs(self, inputs: dict[str, Array]) -> None:
        x = self.x
        self.packs: list[tuple[bool, Slices, Array]] = []
        """(whether of B, which part of the share, the buffer that is sent)."""
        self.joins: list[tuple[Array, Slices, bool, Array | Slices]] = []
        """(a panel, a place in it, whether of B, what is copied there: a buffer or a part of the share)."""
        self.parts: dict[str, list[Array | Slices]] = {}
        """Of A and B where they move: the buffers, and parts of the share, that the tile reads."""
        self.boxes: dict[str, tuple[Box, ...]] = {}
        for tensor, panel, parts in self.stage.panels:
            dtype, is_b = inputs[tensor].dtype, tensor == "B"
            boxes, found = [], []
            for part in parts:
                boxes.append(part.box)
                if part.slices is not None:
                    found.append(part.slices)
                    continue
                buffer = self._take(shape_of(part.box), dtype)
                self.inputs.receive(buffer, part.source, TAGS[tensor])
                found.append(buffer)
            if len(found) > 1 and x.must_join[tensor][panel]:
                whole = x.schedule.tiling.panels[tensor][panel].box
                joined = self._take(shape_of(whole), dtype)
                self.joins += [
                    (joined, local_slices(box, whole), is_b, part) for box, part in zip(boxes, found, strict=True)
                ]
                boxes, found = [whole], [joined]
            self.boxes[tensor], self.parts[tensor] = tuple(boxes), found
        packed: dict[tuple[str, str], Array] = {}
        for tensor, peer, slices, _ in self.stage.sends:
            key = (tensor, repr(slices))
            if key not in packed:
                packed[key] = self._take(inputs[tensor][slices].shape, inputs[tensor].dtype)
                self.packs.append((tensor == "B", slices, packed[key]))
            self.inputs.send(packed[key], peer, TAGS[tensor])

    def _prepare_results(self) -> None:
        x, stage = self.x, self.stage
        self.partial: Array | None = None
        self.result_packs: list[tuple[Slices, Array]] = []
        self.sums: list[tuple[Sum, list[Array]]] = []
        if not x.moves_result:
            return
        if stage.tile is not None and not (self.finished_at_source and stage.inside):
            self.partial = self._take((len(x.spans), *shape_of(stage.tile)), self.partial_dtype)
        for total in stage.sums:
            arrays = []
            for peer, shape in total.receives:
                arrays.append(self._take(shape, self.partial_dtype))
                self.results.receive(arrays[-1], peer, TAGS["C"])
            self.sums.append((total, arrays))
        for peer, slices in stage.result_sends:
            buffer = self._take((len(x.spans), *_extents(slices[1:])), self.partial_dtype)
            self.result_packs.append((slices, buffer))
            self.results.send(buffer, peer, TAGS["C"])

    def _prepare_replicas(self, dtype: Any) -> None:
        self.replica_packs: list[tuple[Slices, Array]] = []
        self.replica_parts: list[tuple[Slices, Array]] = []
        for peer, shape, slices in self.stage.replica_receives:
            buffer = self._take(shape, dtype)
            self.replicas.receive(buffer, peer, TAGS["replica"])
            self.replica_parts.append((slices, buffer))
        packed: dict[str, Array] = {}
        for peer, slices in self.stage.replica_sends:
            key = repr(slices)
            if key not in packed:
                packed[key] = self._take(_extents(slices), dtype)
                self.replica_packs.append((slices, packed[key]))
            self.replicas.send(packed[key], peer, TAGS["replica"])

    def _recipes(self) -> list[Recipe]:
        x, stage = self.x, self.stage
        if stage.tile is None:
            return []
        a_boxes, b_boxes = (self.boxes.get(tensor, (x.owned[tensor],)) for tensor in "AB")
        a_panel, b_panel = (x.schedule.tiling.panels[tensor][stage.numbers[tensor]].box for tensor in "AB")
        return [x.contraction.recipe(a_boxes, a_panel, b_boxes, b_panel, span) for span in x.spans]

    def run(self, a: Array, b: Array, out: Array, what: str) -> None:
        """`out` (this rank's share of C) becomes alpha * A B + beta * C. Collective over the group."""
        try:
            self._run(a, b, out, what)
        except BaseException:
            for phase in self._phases:
                phase.abandon()
            # MPI may still write into the buffers; a reference that nobody gives back outlives it.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
            raise

    def _run(self, a: Array, b: Array, out: Array, what: str) -> None:
        for is_b, slices, buffer in self.packs:
            buffer[...] = (b if is_b else a)[slices]
        self.inputs.carry_out(what)
        for joined, place, is_b, part in self.joins:
            joined[place] = (b if is_b else a)[part] if type(part) is tuple else part
        if self.stage.tile is not None:
            self._multiply(a, b, out)
        if self.x.moves_result:
            self.results.carry_out(what)
            for total, arrays in self.sums:
                self._finish(total, arrays, out)
            for slices, buffer in self.replica_packs:
                buffer[...] = out[slices]
            self.replicas.carry_out(what)
            for slices, buffer in self.replica_parts:
                out[slices] = buffer

    def _multiply(self, a: Array, b: Array, out: Array) -> None:
        x, alpha = self.x, self.alpha
        a_parts, b_parts = self._operands("A", a), self._operands("B", b)
        if not x.moves_result:
            target = out[self.stage.tile_in_share]
            x.contraction.multiply(self.recipes[0], a_parts, b_parts, target, alpha=alpha, beta=self.beta)
            return
        if not self.finished_at_source:
            alpha = 1.0
        partial = self._tile(out)
        for plane, recipe in zip(partial, self.recipes, strict=True):
            x.contraction.multiply(recipe, a_parts, b_parts, plane, alpha=alpha)
        for slices, buffer in self.result_packs:
            buffer[...] = partial[slices]

    def _operands(self, tensor: str, own: Array) -> list[Array]:
        parts = self.parts.get(tensor)
        if parts is None:
            return [own]
        return [own[part] if type(part) is tuple else part for part in parts]

    def _tile(self, out: Array) -> Array:
        """(subtrees, tile): where this rank's tile is computed."""
        return out[self.stage.tile_in_share][None] if self.partial is None else self.partial

    def _finish(self, total: Sum, arrays: list[Array], out: Array) -> None:
        own = None if total.own is None else self._tile(out)[total.own]
        if not self.finished_at_source:
            total.add([*arrays, own], out, self.alpha, self.beta)
        elif own is None:
            out[total.target] = arrays[0][0]
        elif self.partial is not None:
            out[total.target] = own[0]


def _extents(slices: Slices) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in slices)
