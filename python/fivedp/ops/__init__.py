"""The distributed operations: where the arithmetic of one rank and the messages between ranks meet."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivedp.ops.mixture_layer import expert_layer, expert_layer_backward

__all__ = ["expert_layer", "expert_layer_backward"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fivedp.ops' has no attribute {name!r}")
    return getattr(importlib.import_module("fivedp.ops.mixture_layer"), name)
