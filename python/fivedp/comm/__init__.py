"""Ranks, meshes and messages: everything that touches MPI, and nothing that knows mathematics."""

from __future__ import annotations

import os

# MPICH reads this when it starts: ranks that outnumber the cores must give them away while they wait (an all-reduce
# of 8 ranks on 2 cores is several times faster). It helps where fivedp is imported before mpi4py.MPI; `fivedp run`
# sets it always.
if int(os.environ.get("MPI_LOCALNRANKS", "1")) > len(os.sched_getaffinity(0)):
    os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
