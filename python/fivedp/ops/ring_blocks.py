"""Blocks of tokens on their way: of the arrays of every member of a group, the ranges that other members need.

A block goes from its owner straight to every member that needs any of it. The receive of the next block is posted while
the present one is used, so of blocks that come by message no more than two are in memory at a time; on one node a block
is read where it lies, and all blocks are used together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fivedp.comm.grid import Group
from fivedp.comm.messages import TAGS, Mailbox, Receipt
from fivedp.layout.sequence import Span, Tokens, join, reading_order

Array = Any
# Blocks that came by message are held for one call of the kernel up to here: those too small for the shared window.
_HELD_BYTES = 256 << 10


class Blocks:
    """The blocks of all members of a group.

    Parameters
    ----------
    group : Group
    mail : Mailbox
    arrays : dict of str to (array, int)
        By tag, this member's arrays, with the axis along which its tokens lie.
    tokens : sequence of Tokens
        Those of every member.
    spans : sequence of sequences of Span
        `spans[r][s]` is the range of the tokens of member s that member r needs, (0, 0) for none.
    stride : int
        In step t a member uses the block of the member `stride * t` before it.

    Attributes
    ----------
    coming : list of int
        The members of whose blocks this one needs any, itself first, in the order of steps.
    """

    def __init__(
        self,
        group: Group,
        mail: Mailbox,
        arrays: dict[str, tuple[Array, int]],
        tokens: Sequence[Tokens],
        spans: Sequence[Sequence[Span]],
        stride: int = 1,
    ) -> None:
        self.group, self.mail, self.arrays, self.spans, self.stride = group, mail, arrays, spans, stride
        self._tokens = tokens
        sources = [self.source(step) for step in range(group.size)]
        self.coming = [source for source in sources if spans[group.index][source] != (0, 0)]
        self._under_way: dict[int, list[Receipt]] = {}

    def source(self, step: int) -> int:
        """Whose block this member uses in a step."""
        return (self.group.index - self.stride * step) % self.group.size

    def user(self, step: int) -> int:
        """Who uses this member's block in a step."""
        return (self.group.index + self.stride * step) % self.group.size

    def start(self) -> None:
        """Send every other member what it needs of this one's block, in the order of steps; expect the first block."""
        mine = self.group.index
        users = [self.user(step) for step in range(1, self.group.size)]
        needed = {user: span for user in users if (span := self.spans[user][mine]) != (0, 0)}
        if len(set(needed.values())) > 1:  # ranges of one copy
            self.arrays = {tag: (self.mail.place(array), axis) for tag, (array, axis) in self.arrays.items()}
        for user, span in needed.items():
            for tag, (array, axis) in self.arrays.items():
                self.mail.send(array[(slice(None),) * axis + (slice(*span),)], user, TAGS[tag], 0)
        for source in self.coming[:1]:
            self.expect(source)

    def expect(self, source: int) -> None:
        """Post the receives of what this member needs of a block, if they are not posted yet."""
        if source == self.group.index or source in self._under_way:
            return
        receipts = []
        begin, end = self.spans[self.group.index][source]
        for tag, (array, axis) in self.arrays.items():
            shape = (*array.shape[:axis], end - begin, *array.shape[axis + 1 :])
            receipts.append(self.mail.receive(shape, array.dtype, source, TAGS[tag]))
        self._under_way[source] = receipts

    def expect_next(self, source: int) -> None:
        """Post the receives of the block that comes after that of `source`."""
        place = self.coming.index(source)
        for one in self.coming[place + 1 : place + 2]:
            self.expect(one)

    def together(self) -> Iterator[list[int]]:
        """The members of `coming`, in lists of those whose blocks have arrived and are best used in one go.

        This member's own block comes first, while the others arrive. Those that are read in place come together, for
        they take no memory; of blocks that come by message, small ones do.
        """
        mine, held = self.group.index, 0
        together: list[int] = []
        in_place = self.group.in_place and self.mail.xp is np
        for source in self.coming if in_place else []:
            self.expect(source)
        for source in self.coming:
            if not in_place:
                self.expect_next(source)
            self.arrived(source)
            together.append(source)
            held += sum(
                receipt.buffer.size for receipt in self._under_way.get(source, []) if receipt.buffer is not None
            )
            if source == mine or held > _HELD_BYTES or not in_place:
                yield together
                together, held = [], 0
        if together:
            yield together

    def tokens(self, source: int) -> Tokens:
        """Where the tokens are of which `arrived` gives the arrays."""
        tokens = self._tokens[source]
        return tokens if source == self.group.index else tokens.part(self.spans[self.group.index][source])

    def arrived(self, source: int) -> list[Array]:
        """What this member needs of the arrays of a block (of its own, all), which was expected and is waited for."""
        if source == self.group.index:
            return [array for array, _ in self.arrays.values()]
        self.mail.wait(self._under_way[source])
        return [receipt.array for receipt in self._under_way[source]]

    def release(self, source: int) -> None:
        """This member has read the block for the last time."""
        for receipt in self._under_way.pop(source, []):
            self.mail.release(receipt)


def gather(
    group: Group, mail: Mailbox, arrays: dict[str, tuple[Array, int]], tokens: Sequence[Tokens]
) -> tuple[Tokens, list[Array]]:
    """The tokens of all members in the order of the sequence, and their arrays in that order: by tag, (array, axis)."""
    everything = [[(0, len(t)) for t in tokens]] * group.size
    blocks = Blocks(group, mail, arrays, tokens, everything)
    everyone = range(group.size)
    blocks.start()
    for source in everyone:
        blocks.expect(source)
    joined = join(tokens)
    order = reading_order(joined)
    parts = [blocks.arrived(source) for source in everyone]
    xp = mail.xp
    place = xp.asarray(order)
    whole = [
        xp.take(xp.concatenate(pieces, axis=axis), place, axis=axis)
        for pieces, (_, axis) in zip(zip(*parts, strict=True), arrays.values(), strict=True)
    ]
    for source in everyone:
        blocks.release(source)
    return Tokens(joined.position[order], joined.document[order]), whole
