"""Causal attention over a sequence that no rank holds whole: mpirun -np 4 python ring_attention.py"""

import numpy as np
from mpi4py import MPI

import fivedp

comm = MPI.COMM_WORLD
rng = np.random.default_rng(0)  # every rank draws the same q, k, v; a model would compute its own tokens only
batch, tokens, heads, kv_heads, size = 1, 1003, 8, 2, 64
q = rng.standard_normal((batch, tokens, heads, size), dtype=np.float32)
k = rng.standard_normal((batch, tokens, kv_heads, size), dtype=np.float32)
v = rng.standard_normal((batch, tokens, kv_heads, size), dtype=np.float32)

q_local, k_local, v_local = (fivedp.sequence_shard(x, comm, layout="zigzag") for x in (q, k, v))
o_local, lse = fivedp.ring_attention(q_local, k_local, v_local, comm, causal=True, layout="zigzag")
gradients = fivedp.ring_attention_backward(
    np.ones_like(o_local), q_local, k_local, v_local, o_local, lse, comm, causal=True, layout="zigzag"
)

whole, _ = fivedp.ring_attention(q, k, v, MPI.COMM_SELF, causal=True, layout="contiguous")  # the same on one rank
o = fivedp.sequence_gather(o_local, comm, layout="zigzag", root=0)
if o is not None:  # rank 0
    print(f"{comm.size} ranks, {q_local.shape[1]} of {tokens} tokens here")
    print("equal to one rank:", np.allclose(o, whole, atol=1e-5))
    print("gradients:", *(gradient.shape for gradient in gradients))
