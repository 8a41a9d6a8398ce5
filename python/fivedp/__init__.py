"""fivedp: 5D parallelism for plain MPI, on NumPy and CuPy arrays.

>>> import numpy as np, fivedp
>>> from mpi4py import MPI
>>> a = fivedp.shard(np.ones((6, 4)), "m k/tp", MPI.COMM_WORLD)
>>> b = fivedp.shard(np.ones((4, 5)), "k/tp n", MPI.COMM_WORLD)
>>> c = fivedp.sharded_matmul(a, b, "m k/tp, k/tp n -> m n", MPI.COMM_WORLD)
"""

from __future__ import annotations

from fivedp.comm.mesh import Axis, Mesh
from fivedp.errors import DTypeError, LayoutError, MeshError, PeerError, ShapeError
from fivedp.layout.explain import explain
from fivedp.ops.matmul import sharded_matmul, sharded_matmul_backward
from fivedp.ops.sharding import gather, shard

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "DTypeError",
    "LayoutError",
    "Mesh",
    "MeshError",
    "PeerError",
    "ShapeError",
    "__version__",
    "explain",
    "gather",
    "shard",
    "sharded_matmul",
    "sharded_matmul_backward",
]
