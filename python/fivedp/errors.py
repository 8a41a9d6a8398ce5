"""The exceptions that fivedp raises, the same one on every rank of a call.

The first four are errors of the arguments, found before the first message moves; they are `ValueError`s.
`TransportError` is about the way that device arrays take.
`PeerError` says that another rank failed, left or stopped answering while this one waited for it.
"""

from __future__ import annotations


class LayoutError(ValueError):
    """A spec cannot be read or carried out on this mesh."""


class ShapeError(ValueError):
    """An array's shape does not fit the spec, the other arrays or the other ranks."""


class DTypeError(ValueError):
    """Element types differ between arrays or ranks, or are not supported."""


class MeshError(ValueError):
    """The degrees of a mesh do not fit the number of ranks."""


class TransportError(RuntimeError):
    """Device arrays can't be carried as FIVEDP_TRANSPORT asks, or lie on another device than those before them."""


class PeerError(RuntimeError):
    """Another rank raised, exited or stayed silent during a collective call."""
