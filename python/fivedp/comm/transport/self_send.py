"""Send device memory to oneself through MPI, and look whether it arrives: a program of its own, for it may crash.

python self_send.py DEVICE        prints "proven" and ends with status 0 where all bytes came
"""

from __future__ import annotations

import sys

import cupy
import numpy as np
from mpi4py import MPI

# A few bytes, one more than a page, and enough for the protocol of long messages.
SIZES = (7, 4097, (4 << 20) + 1)


def main() -> int:
    """Try every size; the exit status."""
    cupy.cuda.Device(int(sys.argv[1])).use()
    comm, rng = MPI.COMM_SELF, np.random.default_rng()
    for size in SIZES:
        sent = rng.integers(0, 256, size, dtype=np.uint8)
        source, target = cupy.asarray(sent), cupy.asarray(~sent)
        cupy.cuda.get_current_stream().synchronize()
        ends = [MPI.buffer.fromaddress(int(array.data.ptr), size) for array in (target, source)]
        MPI.Request.Waitall([comm.Irecv([ends[0], MPI.BYTE], 0), comm.Isend([ends[1], MPI.BYTE], 0)])
        if not np.array_equal(cupy.asnumpy(target), sent):
            print(f"wrong values in a message of {size} bytes", flush=True)
            return 1
    print("proven", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
