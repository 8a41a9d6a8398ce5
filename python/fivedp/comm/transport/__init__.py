"""How arrays get from rank to rank: one file per transport, chosen in one place.

    host.py       NumPy arrays: read in place on one node, else as bytes from where they lie
    cuda_mpi.py   device memory straight into MPI, where the library is proven to take it
    ipc.py        device memory of another process of this node, opened and copied on the device
    staged.py     device memory through pinned host memory, in chunks of which two are under way

An operation sees a `Mailbox` (mail.py) and never asks where an array lies. `messages.py` gives NumPy arrays the host's
mailbox and CuPy arrays that of device.py, which keeps the streams in order; choice.py settles the transport of every
pair of ranks. Nothing here imports CuPy: it comes with the user's arrays.
"""
