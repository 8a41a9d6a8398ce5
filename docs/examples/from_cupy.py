import cupy as cp
from mpi4py import MPI

import fivedp

grid = MPI.COMM_WORLD.Create_cart([2, 2])  # four ranks in two rows (axis r) and two columns (axis c)
rng = cp.random.default_rng(0)  # every rank draws the same A and B
a, b = rng.standard_normal((1000, 601)), rng.standard_normal((601, 800))
a_local, b_local = fivedp.shard(a, "m/r k/c", grid), fivedp.shard(b, "k/r n/c", grid)
c_local = fivedp.sharded_matmul(a_local, b_local, "m/r k/c, k/r n/c -> m/r n/c", grid)
c = fivedp.gather(c_local, "m/r n/c", grid, root=0)
if c is not None:  # rank 0
    print(f"shares {a_local.shape} x {b_local.shape} -> {c_local.shape} of {c.shape}")
    print("equal to a @ b:", cp.allclose(c, a @ b))
