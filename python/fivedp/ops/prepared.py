"""Small calls, made ready down to the MPI requests.

Where every message of a call is small, its cost is Python's: a buffer, a request and an object for each. None of that
depends on the values, so it is made once per execution: persistent requests on fixed buffers, and lists of what is
copied where. A call then copies, starts the requests, multiplies, and starts those of the partial results.

The messages are those of `comm.messages` (same tags, same order, notes of what lies in the shared window), so a rank
may take this way whatever the others do. Calls of one grid follow one another, so all of its executions share one arena
of buffers, which lies in the window where there is one.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from fivedp.comm.grid import Group, RankGrid
from fivedp.comm.messages import OVERFLOW, TAGS, cut, tag_number
from fivedp.comm.shared_window import NOTE_WORDS, SharedWindow
from fivedp.layout.shares import Box, local_slices, shape_of
from fivedp.ops.contraction import Recipe

if TYPE_CHECKING:
    from fivedp.ops.execution import Execution, Sum

Array = Any
Slices = tuple[slice, ...]
Take = Callable[[tuple[int, ...], Any], Array]
_ARENA_BYTES = 4 << 20
# What is not read in place must be less: a message that MPI does not send at once is better sent from where it lies.
_MESSAGE_BYTES = 32 << 10
_LINE = 64


class TooLarge(Exception):
    """The messages or the buffers of a call are not small."""


class _Arena:
    """The buffers of a grid's prepared calls, and the cells that say whether the others have read them.

    What was sent in place may still be read when its call has ended; the next call waits for that before it writes.
    """

    def __init__(self, grid: RankGrid) -> None:
        self.grid, self.window = grid, grid.shared
        extent = None if self.window is None else self.window.take(_ARENA_BYTES)
        self.memory: npt.NDArray[np.uint8] = (
            np.empty(_ARENA_BYTES, np.uint8)
            if extent is None or self.window is None
            else self.window.array(extent, (_ARENA_BYTES,), np.dtype(np.uint8))
        )
        self._cells: list[int] = []
        self._readers: list[int] = []
        """The ranks that set the first of the cells, since the last call."""

    def cell(self, number: int) -> int:
        """The cell for the box that a call sends in place as its `number`-th."""
        assert self.window is not None
        while len(self._cells) <= number:
            cell = self.window.take_cell()
            if cell is None:
                raise TooLarge
            self._cells.append(cell)
        return self._cells[number]

    def settle(self, what: str) -> None:
        """Wait until what the last call sent in place has been read."""
        if not self._readers:
            return
        assert self.window is not None
        read, cells, readers = self.window.my_cells, self._cells[: len(self._readers)], self._readers
        self.grid.watchdog.wait_until(
            lambda: bool(read[cells].all()),
            lambda: sorted({rank for rank, cell in zip(readers, cells, strict=True) if not read[cell]}),
            what,
        )
        self._readers = []

    def expect(self, readers: list[int]) -> None:
        """A call begins that sends boxes in place to these ranks, in this order."""
        if readers:
            assert self.window is not None
            self.window.my_cells[self._cells[: len(readers)]] = 0
            self._readers = readers


def _arena_of(grid: RankGrid) -> _Arena:
    arena = grid.cache.get("arena")
    if not isinstance(arena, _Arena):
        arena = grid.cache["arena"] = _Arena(grid)
    return arena


class _Incoming:
    """What a member sends; `array` can be read when its phase has been carried out."""

    __slots__ = ("array", "cell", "dtype", "note", "number", "peer", "seen", "shape")

    def __init__(self, array: Array, shape: tuple[int, ...], dtype: Any, peer: int, number: int) -> None:
        self.array, self.shape, self.dtype, self.peer, self.number = array, shape, dtype, peer, number
        self.note = np.empty(NOTE_WORDS, np.int64)
        self.seen = b""
        self.cell = -1

    def locate(self, window: SharedWindow) -> bool:
        """Find the array that the note tells of; False where it comes as a message."""
        found = self.note.tobytes()
        if found == self.seen:  # where it lay in the last call
            return True
        self.seen, self.cell = b"", -1
        if SharedWindow.by_message(self.note):
            return False
        self.array = window.noted(self.peer, self.note, self.shape, self.dtype)
        self.seen, self.cell = found, SharedWindow.cell_of(self.note)
        return True


class _Phase:
    """The messages of one exchange, as persistent requests."""

    def __init__(self, group: Group, arena: _Arena, readers: list[int]) -> None:
        self.group, self.arena, self.window = group, arena, arena.window
        self.received: list[tuple[Array, int, int]] = []
        self.sent: list[tuple[Array, int, int]] = []
        self.counted: list[tuple[int, int]] = []
        self.in_place: list[_Incoming] = []
        self.readers = readers
        """The ranks that read boxes of the whole call in place; a cell belongs to each."""
        self.requests: list[MPI.Prequest] = []
        self.peers: list[int] = []

    def open(self) -> None:
        """Make the requests; no message is added after this."""
        data = self.group.grid.data
        for entries, make in ((self.received, data.Recv_init), (self.sent, data.Send_init)):
            for buffer, rank, tag in entries:
                self.requests.append(make([buffer, MPI.BYTE], rank, tag))
                self.peers.append(rank)

    def carries(self, peer: int, n_bytes: int) -> bool:
        """Whether a member reads a box where it lies."""
        return self.window is not None and self.window.carries(self.group.members[peer], n_bytes)

    def receive(self, shape: tuple[int, ...], dtype: Any, peer: int, tag: int, take: Take) -> _Incoming:
        """Add what a member sends; `take` makes a buffer for a message."""
        dtype = np.dtype(dtype)
        n_bytes = math.prod(shape) * dtype.itemsize
        rank, number = self.group.members[peer], tag_number(self.group, tag)
        in_place = self.carries(peer, n_bytes)
        if n_bytes >= _MESSAGE_BYTES and not in_place:
            raise TooLarge
        incoming = _Incoming(None if in_place else take(shape, dtype), shape, dtype, rank, number + OVERFLOW)
        if in_place:
            self.in_place.append(incoming)
            self.received.append((incoming.note.view(np.uint8), rank, number))
        elif n_bytes:
            self.received.append((_flat(incoming.array), rank, number))
        return incoming

    def send(self, box: Array, peer: int, tag: int) -> None:
        """Add a box of the arena for a member: contiguous unless it is read where it lies; an empty one is not sent."""
        if not box.size:
            return
        rank, number = self.group.members[peer], tag_number(self.group, tag)
        self.counted.append((rank, box.nbytes))
        if not self.carries(peer, box.nbytes):
            if box.nbytes >= _MESSAGE_BYTES:
                raise TooLarge
            self.sent.append((_flat(box), rank, number))
            return
        assert self.window is not None
        offset = self.window.offset_of(box)
        if offset is None:
            raise TooLarge
        note = self.window.note(box, offset, self.arena.cell(len(self.readers)))
        self.readers.append(rank)
        self.sent.append((note.view(np.uint8), rank, number))

    def carry_out(self, what: str) -> None:
        """Send and receive everything."""
        if not self.requests:
            return
        grid = self.group.grid
        for rank, n_bytes in self.counted:
            grid.traffic.count(rank, n_bytes)
        MPI.Prequest.Startall(self.requests)
        grid.watchdog.wait(self.requests, self.peers, what)
        if self.in_place:
            assert self.window is not None
            window = self.window
            messages = [incoming for incoming in self.in_place if not incoming.locate(window)]
            if messages:
                self._receive(messages, what)

    def _receive(self, messages: list[_Incoming], what: str) -> None:
        """Receive what the shared memory of its sender had no room for."""
        grid, requests, peers = self.group.grid, [], []
        for incoming in messages:
            incoming.array = np.empty(incoming.shape, incoming.dtype)
            for part in cut(_flat(incoming.array)):
                requests.append(grid.data.Irecv([part, MPI.BYTE], incoming.peer, incoming.number))
                peers.append(incoming.peer)
        grid.watchdog.wait(requests, peers, what)

    def release(self) -> None:
        """This rank has read what was sent to it."""
        for incoming in self.in_place:
            if incoming.cell >= 0:
                assert self.window is not None
                self.window.acknowledge(incoming.peer, incoming.cell)

    def close(self) -> None:
        """Free the requests, none of which is under way."""
        for request in self.requests:
            request.Free()

    def abandon(self) -> None:
        """The call has failed: take back the receives."""
        for request in self.requests[: len(self.received)]:
            if not request.Test():
                request.Cancel()


def _flat(array: Array) -> npt.NDArray[np.uint8]:
    flat: npt.NDArray[np.uint8] = array.reshape(-1).view(np.uint8)
    return flat


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
        self._phases: tuple[_Phase, ...] = ()
        self._arena = _arena_of(group.grid)
        self._used = 0
        self.finished_at_source = execution.finished_at_source(beta)
        self.partial_dtype = np.dtype(out.dtype if self.finished_at_source else wire)
        self.readers: list[int] = []
        self._phases = tuple(_Phase(group, self._arena, self.readers) for _ in range(3))
        self.inputs, self.results, self.replicas = self._phases
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
        if self._used > self._arena.memory.size:
            raise TooLarge
        return self._arena.memory[start : start + n_bytes].view(dtype).reshape(shape)

    def _prepare_inputs(self, inputs: dict[str, Array]) -> None:
        x = self.x
        self.packs: list[tuple[bool, Slices, Array]] = []
        """(whether of B, which part of the share, the buffer that is sent)."""
        self.joins: list[tuple[Array, Slices, bool, _Incoming | Slices]] = []
        """(a panel, a place in it, whether of B, what is copied there: a message or a part of the share)."""
        self.parts: dict[str, list[Array | _Incoming | Slices]] = {}
        """Of A and B where they move: the panels, messages, and parts of the share, that the tile reads."""
        self.boxes: dict[str, tuple[Box, ...]] = {}
        for tensor, panel, parts in self.stage.panels:
            dtype, is_b = inputs[tensor].dtype, tensor == "B"
            boxes: list[Box] = []
            found: list[Any] = []
            for part in parts:
                boxes.append(part.box)
                if part.slices is not None:
                    found.append(part.slices)
                    continue
                found.append(self.inputs.receive(shape_of(part.box), dtype, part.source, TAGS[tensor], self._take))
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
        self.sums: list[tuple[Sum, list[_Incoming]]] = []
        if not x.moves_result:
            return
        if stage.tile is not None and not (self.finished_at_source and stage.inside):
            self.partial = self._take((len(x.spans), *shape_of(stage.tile)), self.partial_dtype)
        for total in stage.sums:
            receive, tag = self.results.receive, TAGS["C"]
            incoming = [receive(shape, self.partial_dtype, peer, tag, self._take) for peer, shape in total.receives]
            self.sums.append((total, incoming))
        packed: dict[str, Array] = {}
        for peer, slices in stage.result_sends:
            box = None if self.partial is None else self.partial[slices]
            if box is None or not self.results.carries(peer, box.nbytes):
                key = repr(slices)
                if key not in packed:
                    packed[key] = self._take((len(x.spans), *_extents(slices[1:])), self.partial_dtype)
                    self.result_packs.append((slices, packed[key]))
                box = packed[key]
            self.results.send(box, peer, TAGS["C"])

    def _prepare_replicas(self, dtype: Any) -> None:
        self.replica_packs: list[tuple[Slices, Array]] = []
        self.replica_parts: list[tuple[Slices, _Incoming]] = []
        for peer, shape, slices in self.stage.replica_receives:
            incoming = self.replicas.receive(shape, dtype, peer, TAGS["replica"], self._take)
            self.replica_parts.append((slices, incoming))
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
        self._arena.settle(what)
        self._arena.expect(self.readers)
        for is_b, slices, buffer in self.packs:
            buffer[...] = (b if is_b else a)[slices]
        self.inputs.carry_out(what)
        for joined, place, is_b, part in self.joins:
            joined[place] = part.array if isinstance(part, _Incoming) else (b if is_b else a)[part]
        if self.stage.tile is not None:
            self._multiply(a, b, out)
        self.inputs.release()
        if self.x.moves_result:
            self.results.carry_out(what)
            for total, partials in self.sums:
                self._finish(total, [partial.array for partial in partials], out)
            self.results.release()
            for slices, buffer in self.replica_packs:
                buffer[...] = out[slices]
            self.replicas.carry_out(what)
            for slices, replica in self.replica_parts:
                out[slices] = replica.array
            self.replicas.release()

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
        return [
            part.array if isinstance(part, _Incoming) else own[part] if isinstance(part, tuple) else part
            for part in parts
        ]

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
