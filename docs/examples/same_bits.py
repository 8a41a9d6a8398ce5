"""One product on any number of ranks: does the result have the same bits?

    mpirun -np 2 python docs/examples/same_bits.py

Every rank draws the same A and B, takes its share of the summed index k, and gets the whole C. The checksum of C's
bytes is printed for the three orders of summation. Run it with 1, 2, 4 and 8 ranks, and with 3.
"""

from __future__ import annotations

import zlib

import numpy as np
from mpi4py import MPI

import fivedp

SPEC = "m k/p, k/p n -> m n"


def main() -> None:
    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200, 5003)).astype(np.float32)
    b = rng.standard_normal((5003, 300)).astype(np.float32)
    a_local, b_local = fivedp.shard(a, "m k/p", comm), fivedp.shard(b, "k/p n", comm)
    checksums = []
    for order in ("tree", "canonical", "fast"):
        c = fivedp.sharded_matmul(a_local, b_local, SPEC, comm, order=order)
        checksums.append(f"{order} {zlib.crc32(c.tobytes()):08x}")
    if comm.Get_rank() == 0:
        print(f"{comm.Get_size()} ranks: ", "  ".join(checksums))


if __name__ == "__main__":
    main()
