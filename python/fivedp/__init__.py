"""fivedp: 5D parallelism for plain MPI, on NumPy and CuPy arrays.

>>> import numpy as np, fivedp
>>> from mpi4py import MPI
>>> a = fivedp.shard(np.ones((6, 4)), "m k/tp", MPI.COMM_WORLD)
>>> b = fivedp.shard(np.ones((4, 5)), "k/tp n", MPI.COMM_WORLD)
>>> c = fivedp.sharded_matmul(a, b, "m k/tp, k/tp n -> m n", MPI.COMM_WORLD)

A name is loaded when it is first used: importing the package starts no MPI, so that `fivedp doctor` and `fivedp run`
work where MPI does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivedp.comm.mesh import Axis, Mesh
    from fivedp.errors import DTypeError, LayoutError, MeshError, PeerError, ShapeError, TransportError
    from fivedp.layout.explain import explain
    from fivedp.layout.explain_attention import explain_attention
    from fivedp.layout.explain_experts import explain_experts
    from fivedp.ops.decode_attention import decode_attention
    from fivedp.ops.expert_dispatch import (
        ExpertBatch,
        expert_combine,
        expert_combine_backward,
        expert_dispatch,
        expert_dispatch_backward,
    )
    from fivedp.ops.grouped_matmul import grouped_matmul, grouped_matmul_backward
    from fivedp.ops.hybrid_attention import (
        hybrid_attention,
        hybrid_attention_backward,
        ulysses_attention,
        ulysses_attention_backward,
    )
    from fivedp.ops.matmul import sharded_matmul, sharded_matmul_backward
    from fivedp.ops.mixture_layer import expert_layer, expert_layer_backward
    from fivedp.ops.ring_attention import ring_attention, ring_attention_backward
    from fivedp.ops.routing import Routing, route, route_backward, update_bias
    from fivedp.ops.sequence import sequence_gather, sequence_shard
    from fivedp.ops.sharding import gather, shard
    from fivedp.ops.shared_experts import SharedExperts
    from fivedp.ops.workloads import balanced, load_report, routing_workload

__version__ = "0.1.0"

_HOMES = {
    "fivedp.comm.mesh": ("Axis", "Mesh"),
    "fivedp.errors": ("DTypeError", "LayoutError", "MeshError", "PeerError", "ShapeError", "TransportError"),
    "fivedp.layout.explain": ("explain",),
    "fivedp.layout.explain_attention": ("explain_attention",),
    "fivedp.layout.explain_experts": ("explain_experts",),
    "fivedp.ops.decode_attention": ("decode_attention",),
    "fivedp.ops.expert_dispatch": (
        "ExpertBatch",
        "expert_combine",
        "expert_combine_backward",
        "expert_dispatch",
        "expert_dispatch_backward",
    ),
    "fivedp.ops.mixture_layer": ("expert_layer", "expert_layer_backward"),
    "fivedp.ops.grouped_matmul": ("grouped_matmul", "grouped_matmul_backward"),
    "fivedp.ops.hybrid_attention": (
        "hybrid_attention",
        "hybrid_attention_backward",
        "ulysses_attention",
        "ulysses_attention_backward",
    ),
    "fivedp.ops.matmul": ("sharded_matmul", "sharded_matmul_backward"),
    "fivedp.ops.ring_attention": ("ring_attention", "ring_attention_backward"),
    "fivedp.ops.routing": ("Routing", "route", "route_backward", "update_bias"),
    "fivedp.ops.sequence": ("sequence_gather", "sequence_shard"),
    "fivedp.ops.sharding": ("gather", "shard"),
    "fivedp.ops.shared_experts": ("SharedExperts",),
    "fivedp.ops.workloads": ("balanced", "load_report", "routing_workload"),
}
_PACKAGES = ("comm", "errors", "kernels", "layout", "ops")
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Axis",
    "DTypeError",
    "ExpertBatch",
    "LayoutError",
    "Mesh",
    "MeshError",
    "PeerError",
    "Routing",
    "ShapeError",
    "SharedExperts",
    "TransportError",
    "__version__",
    "balanced",
    "decode_attention",
    "expert_combine",
    "expert_combine_backward",
    "expert_dispatch",
    "expert_dispatch_backward",
    "expert_layer",
    "expert_layer_backward",
    "explain",
    "explain_attention",
    "explain_experts",
    "gather",
    "grouped_matmul",
    "grouped_matmul_backward",
    "hybrid_attention",
    "hybrid_attention_backward",
    "load_report",
    "ring_attention",
    "ring_attention_backward",
    "route",
    "route_backward",
    "routing_workload",
    "sequence_gather",
    "sequence_shard",
    "shard",
    "sharded_matmul",
    "sharded_matmul_backward",
    "ulysses_attention",
    "ulysses_attention_backward",
    "update_bias",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"fivedp.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fivedp' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
