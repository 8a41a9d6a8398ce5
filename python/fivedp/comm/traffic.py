"""Bytes sent by this rank, counted where they are sent, by the mesh axes along which sender and receiver differ."""

from __future__ import annotations

from collections.abc import Sequence


class Traffic:
    """Counters of one grid of ranks; `reset()` sets them to zero.

    Attributes
    ----------
    bytes_by_axis : dict of str to int
        Payload bytes sent, by axis; a message between ranks that differ along several counts under "r*c".
    bytes_between_nodes : int
        Of these, the bytes sent to ranks of other nodes.
    messages : int
        Payload messages sent. Headers that agree on a call are not payload.
    """

    def __init__(
        self, names: Sequence[str], coords: Sequence[tuple[int, ...]], rank: int, node_of: Sequence[int]
    ) -> None:
        self._label = [
            "*".join(name for name, x, y in zip(names, coord, coords[rank], strict=True) if x != y) for coord in coords
        ]
        self._beyond = [node != node_of[rank] for node in node_of]
        self.bytes_by_axis: dict[str, int] = {}
        self.bytes_between_nodes = self.messages = 0

    @property
    def bytes_sent(self) -> int:
        """Payload bytes sent over all axes."""
        return sum(self.bytes_by_axis.values())

    def count(self, peer: int, n_bytes: int) -> None:
        """Note one message of `n_bytes` to rank `peer` of the grid."""
        label = self._label[peer]
        self.bytes_by_axis[label] = self.bytes_by_axis.get(label, 0) + n_bytes
        self.bytes_between_nodes += n_bytes * self._beyond[peer]
        self.messages += 1

    def reset(self) -> None:
        """Set every counter to zero."""
        self.bytes_by_axis.clear()
        self.bytes_between_nodes = self.messages = 0
