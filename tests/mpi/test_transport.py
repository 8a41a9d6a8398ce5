"""Device arrays from rank to rank, over every transport: values, order, streams, memory, errors.

Runs on a double of CuPy (gpu_double.py), whose device does things late; with FIVEDP_TEST_CUPY=1 on CuPy itself, where
tests/gpu/test_transport.py starts it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import fivedp
import gpu_double
from fivedp import TransportError
from fivedp.comm.grid import Group, grid_of
from fivedp.comm.messages import TAGS, mailbox, open_mailbox
from fivedp.comm.transport import choice, cuda_mpi, ipc, proof, staged
from fivedp.comm.transport.gpu import Gpu

RANKS = (1, 2, 3, 4)
TRANSPORTS = ("staged", "ipc", "cuda_mpi")
REAL = os.environ.get("FIVEDP_TEST_CUPY") == "1"
DTYPES = [np.dtype(t) for t in (np.float32, np.uint8, np.complex128, ml_dtypes.bfloat16, np.float16)]
A, B = TAGS["A"], TAGS["B"]
# A number of bytes that divides nothing here, so that chunks end inside elements.
CHUNK = 1003


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[Any]:
    monkeypatch.setenv(choice.CHUNK_VARIABLE, str(CHUNK))
    monkeypatch.setattr(cuda_mpi, "MAX_MESSAGE_BYTES", CHUNK)  # as if every array were above a gibibyte
    if REAL:
        yield pytest.importorskip("cupy")
        return
    module = gpu_double.install(monkeypatch, seed)
    yield module
    module.gpu.running = False


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cupy: Any) -> str:
    name: str = request.param
    if REAL and name == "cuda_mpi" and not proof.cuda_mpi_verdict(Gpu(cupy), forced=True).works:
        pytest.skip("this MPI does not take device memory")
    monkeypatch.setenv(choice.VARIABLE, name)
    return name


double_only = pytest.mark.skipif(REAL, reason="looks into the double of CuPy")


def numbers(shape: tuple[int, ...], dtype: np.dtype[Any], *key: int) -> np.ndarray:
    """The same random bytes on every rank that has the same key; finite values would compare no better."""
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    data = np.random.default_rng(key).integers(0, 256, n_bytes, dtype=np.uint8)
    return data.view(dtype).reshape(shape)


def same(got: Any, wanted: np.ndarray) -> bool:
    """Equal to the bit."""
    return got.shape == wanted.shape and got.dtype == wanted.dtype and got.tobytes() == wanted.tobytes()


def everyone(comm: MPI.Intracomm) -> Group:
    return grid_of(comm).everyone()


def dtypes(cupy: Any) -> list[np.dtype[Any]]:
    """Those that this CuPy copies: bfloat16 came late."""
    usable = []
    for dtype in DTYPES:
        with contextlib.suppress(TypeError, ValueError):
            cupy.asarray(np.zeros(4, dtype))[::2].copy()
            usable.append(dtype)
    return usable


def draw_shape(rng: np.random.Generator) -> tuple[int, ...]:
    """From nothing to some chunks, odd."""
    return tuple(int(n) for n in rng.integers(0, [9, 40, 7][: rng.integers(1, 4)], endpoint=True))


def test_arrays_arrive_to_the_bit(comm: MPI.Intracomm, seed: int, cupy: Any, transport: str) -> None:
    """Several per pair and tag, of all sizes and types, as slices and into slices, written late and read at once."""
    rng, group, types = np.random.default_rng(seed), everyone(comm), dtypes(cupy)
    assert REAL or types == DTYPES
    for call in range(4):
        cases = [
            (draw_shape(rng), types[rng.integers(len(types))], bool(rng.integers(2)), int(rng.integers(3)))
            for _ in range(6)
        ]
        stream = cupy.cuda.Stream(non_blocking=True) if call % 2 else contextlib.nullcontext()
        with stream, mailbox(group, "tests", cupy) as mail:
            receipts = []
            for peer in range(comm.size):
                if peer == comm.rank:
                    continue
                for i, (shape, dtype, _, way) in enumerate(cases):
                    target = None
                    if way:
                        wide = cupy.empty((*shape[:-1], shape[-1] + 3), dtype)
                        target = wide[..., 1 : shape[-1] + 1] if way == 1 else cupy.empty(shape, dtype)
                        target[...] = cupy.asarray(numbers(shape, dtype, 5))  # still under way when it is received
                    receipt = mail.receive(shape, dtype, peer, (A, B)[i % 2], target)
                    receipts.append((receipt, target, numbers(shape, dtype, seed, call, peer, comm.rank, i)))
            for peer in range(comm.size):
                if peer == comm.rank:
                    continue
                for i, (shape, dtype, strided, _) in enumerate(cases):
                    values = numbers(shape, dtype, seed, call, comm.rank, peer, i)
                    whole = cupy.empty((*shape[:-1], 2 * shape[-1]) if strided else shape, dtype)
                    box = whole[..., ::2] if strided else whole
                    box[...] = cupy.asarray(values)
                    mail.send(box, peer, (A, B)[i % 2], 0)
            mail.wait([receipt for receipt, _, _ in receipts])
            copies = [(receipt.array if target is None else target).copy() for receipt, target, _ in receipts]
            for receipt, _, _ in receipts:
                mail.release(receipt)
            found = [cupy.asnumpy(copy) for copy in copies]
        for got, (_, _, wanted) in zip(found, receipts, strict=True):
            assert same(got, wanted)


def test_what_was_sent_may_change_after_a_flush(comm: MPI.Intracomm, seed: int, cupy: Any, transport: str) -> None:
    """A ring in which one buffer serves all stages: kernels write it again and again."""
    group, shape = everyone(comm), (37, 53)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    if comm.size == 1:
        return
    if not REAL:
        cupy.gpu.copy_delay = 0.01  # a kernel of the next stage is done before a copy of this one begins
    with mailbox(group, "tests", cupy) as mail:
        buffer, sums = cupy.empty(shape, np.float32), []
        for stage in range(5):
            receipt = mail.receive(shape, np.float32, left, A)
            if stage:
                mail.flush(stage - 1, (A,))
            buffer[...] = cupy.asarray(np.full(shape, 10 * comm.rank + stage, np.float32))
            mail.send(buffer, right, A, stage)
            mail.wait([receipt])
            sums.append(receipt.array + receipt.array)
            mail.release(receipt)
    for stage, total in enumerate(sums):
        np.testing.assert_array_equal(cupy.asnumpy(total), 2.0 * (10 * left + stage))


def test_rows(comm: MPI.Intracomm, seed: int, cupy: Any, transport: str) -> None:
    group, whole = everyone(comm), (29, 17)
    rows = {(i, j): np.random.default_rng((seed, i, j)).permutation(29)[: 5 * (i + j) % 23].astype(np.int32)
            for i in range(comm.size) for j in range(comm.size)}  # fmt: skip
    peers = [peer for peer in range(comm.size) if peer != comm.rank]
    with mailbox(group, "tests", cupy) as mail:
        receipts = {p: mail.receive_rows(len(rows[p, comm.rank]), whole, np.float32, p, A) for p in peers}
        mine = cupy.asarray(numbers(whole, np.dtype(np.float32), seed, comm.rank))
        for peer in peers:
            mail.send_rows(mine, rows[comm.rank, peer], peer, A, 0)
        mail.wait(list(receipts.values()))
        for peer, receipt in receipts.items():
            assert not receipt.whole
            wanted = numbers(whole, np.dtype(np.float32), seed, peer)[rows[peer, comm.rank]]
            assert same(cupy.asnumpy(receipt.array), wanted)


def test_bytes_are_counted_as_those_of_numpy(comm: MPI.Intracomm, seed: int, cupy: Any, transport: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-3, 4, (12, 12)).astype(np.float32) for _ in range(2))
    spec, layouts = "m k/p, k/p n -> m n", ("m k/p", "k/p n")
    counted = []
    for xp in (np, cupy):
        shares = [fivedp.shard(xp.asarray(x), layout, comm) for x, layout in zip((a, b), layouts, strict=True)]
        traffic = grid_of(comm).traffic
        traffic.reset()
        c = fivedp.sharded_matmul(*shares, spec, comm)
        counted.append((traffic.bytes_sent, traffic.messages))
        np.testing.assert_array_equal(np.asarray(c) if xp is np else cupy.asnumpy(c), a @ b)
    assert counted[0] == counted[1]
    assert counted[0][0] > 0 or comm.size == 1


def exchange(group: Group, cupy: Any, seed: int, shape: tuple[int, ...] = (50, 100)) -> None:
    """A float32 array from everyone to everyone, compared."""
    peers = [peer for peer in range(group.size) if peer != group.index]
    dtype = np.dtype(np.float32)
    with mailbox(group, "tests", cupy) as mail:
        receipts = {peer: mail.receive(shape, dtype, peer, A) for peer in peers}
        mine = cupy.asarray(numbers(shape, dtype, seed, group.index))
        for peer in peers:
            mail.send(mine, peer, A, 0)
        mail.wait(list(receipts.values()))
        for peer, receipt in receipts.items():
            assert same(cupy.asnumpy(receipt.array), numbers(shape, dtype, seed, peer))


def test_a_rank_sends_to_itself(comm: MPI.Intracomm, seed: int, cupy: Any, transport: str) -> None:
    values = numbers((31, 77), np.dtype(np.float32), seed, comm.rank)
    with mailbox(everyone(comm), "tests", cupy) as mail:
        receipt = mail.receive(values.shape, values.dtype, comm.rank, A)
        mail.send(cupy.asarray(values), comm.rank, A, 0)
        mail.wait([receipt])
        assert same(cupy.asnumpy(receipt.array), values)


@double_only
def test_an_array_on_another_device_is_refused(comm: MPI.Intracomm, cupy: Any, monkeypatch: Any) -> None:
    mail = open_mailbox(everyone(comm), "tests", cupy)
    elsewhere = cupy.empty((3, 4), np.float32)
    monkeypatch.setattr(cupy.ndarray, "device", type("Device", (), {"id": 1}))
    with pytest.raises(TransportError, match="lies on device 1, but this rank's first array"):
        mail.send(elsewhere, comm.rank, A, 0)
    with pytest.raises(TransportError, match="all on one device would be right"):
        mail.receive((3, 4), np.float32, comm.rank, A, elsewhere)


@double_only
def test_nothing_is_left_and_nobody_synchronises(comm: MPI.Intracomm, seed: int, cupy: Any, transport: str) -> None:
    group, gpu = everyone(comm), cupy.gpu
    exchange(group, cupy, seed)
    in_use = gpu.heap.in_use
    for step in range(5):
        exchange(group, cupy, seed + step)
    assert gpu.heap.in_use == in_use
    assert gpu.pinned_in_use == 0
    # One stream for each array under way, and one for the greetings, taken again and again.
    assert gpu.counts["streams"] <= 2 * (comm.size - 1) + 1
    # Handles are made and opened once: as many as there are allocations, and events for a message to each other rank
    # and the first greeting.
    allocations = comm.allgather(len(gpu.heap.allocations))
    assert gpu.counts["exported"] <= allocations[comm.rank]
    assert gpu.counts["opened"] <= sum(allocations) - allocations[comm.rank]
    assert gpu.counts["events_opened"] <= (comm.size - 1) * comm.size
    assert (gpu.counts["opened"] > 0) == (transport == "ipc" and comm.size > 1)
    # `asnumpy` of the test itself waits for its stream, once per array; no call of the library does.
    assert gpu.counts["synchronizations"] == 6 * (comm.size - 1)
    comm.Barrier()
    _, handles = choice._device(cupy)
    handles.close()
    assert gpu.counts["closed"] == gpu.counts["opened"]


@double_only
def test_memory_that_was_freed_is_opened_anew(comm: MPI.Intracomm, seed: int, cupy: Any, monkeypatch: Any) -> None:
    """Another allocation at the address of an old one: its handle is another, and so is the mapping."""
    monkeypatch.setenv(choice.VARIABLE, "ipc")
    group, gpu = everyone(comm), cupy.gpu
    for step, n_rows in enumerate((200, 300, 300, 250, 250)):  # at an old address, and across old ones
        exchange(group, cupy, seed + step, (n_rows, 100))
        comm.Barrier()
        cupy.get_default_memory_pool().free_all_blocks()
    if comm.size > 1:
        assert gpu.counts["closed"] > 0


@double_only
def test_memory_without_handles_goes_through_the_host(
    comm: MPI.Intracomm, seed: int, cupy: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv(choice.VARIABLE, "ipc")
    group, shape, dtype = everyone(comm), (50, 100), np.dtype(np.float32)
    exchange(group, cupy, seed)

    def refuse(pointer: int) -> bytes:
        raise gpu_double.CUDARuntimeError(1)

    monkeypatch.setattr(cupy.cuda.runtime, "ipcGetMemHandle", refuse)
    _, handles = choice._device(cupy)
    handles.exports._handles.clear()
    peers = [peer for peer in range(comm.size) if peer != comm.rank]
    with mailbox(group, "tests", cupy) as mail:  # several on one tag: the chunks of one may not meet the other's
        receipts = [(peer, i, mail.receive(shape, dtype, peer, A)) for peer in peers for i in range(3)]
        for peer in peers:
            for i in range(3):
                mail.send(cupy.asarray(numbers(shape, dtype, seed, comm.rank, i)), peer, A, 0)
        for peer, i, receipt in receipts:
            mail.wait([receipt])
            assert same(cupy.asnumpy(receipt.array), numbers(shape, dtype, seed, peer, i))
    assert cupy.gpu.pinned_in_use == 0


# -- the choice --------------------------------------------------------------------------------------------------------


def names(group: Group, cupy: Any) -> list[str]:
    links = choice.links_of(group, "tests", cupy)
    return [link.name for peer, link in enumerate(links.to) if peer != group.index]


@double_only
def test_the_choice_follows_what_is_proven(comm: MPI.Intracomm, seed: int, cupy: Any, monkeypatch: Any) -> None:
    others = comm.size - 1
    group = everyone(comm)
    assert names(group, cupy) == ["cuda_mpi"] * others
    # One rank whose MPI does not take device memory is enough: the others' messages to it would be lost.
    works = comm.rank != 0
    monkeypatch.setattr(choice, "cuda_mpi_verdict", lambda gpu, forced: proof.Verdict(works, f"rank {comm.rank} says"))
    group.cache.clear()
    assert names(group, cupy) == ["ipc"] * others
    # A rank that can't open handles: its pairs go through the host, the others' do not.
    group.cache.clear()
    if comm.rank == 0:
        monkeypatch.setattr(ipc.Imports, "memory", lambda self, note: _refuse(note.memory_handle))
    found = names(group, cupy)
    assert found == (["staged"] * others if comm.rank == 0 else ["staged"] + ["ipc"] * (others - 1))
    links = choice.links_of(group, "tests", cupy)
    if comm.rank == 1:
        assert links.why[0].startswith("no cuda_mpi: rank 0 says; no ipc: a handle can't be opened")
    exchange(group, cupy, seed)


def _refuse(handle: bytes) -> int:
    raise gpu_double.CUDARuntimeError(1)


@double_only
def test_a_handle_of_something_else_is_not_believed(comm: MPI.Intracomm, cupy: Any, monkeypatch: Any) -> None:
    """Two containers whose processes have the same numbers: what opens is not what was meant."""
    monkeypatch.setattr(choice, "cuda_mpi_verdict", lambda gpu, forced: proof.Verdict(False, "no"))
    monkeypatch.setattr(ipc.Imports, "memory", lambda self, note: cupy.asarray(np.zeros(99, np.uint8)).data.ptr)
    group = everyone(comm)
    assert names(group, cupy) == ["staged"] * (comm.size - 1)


@double_only
@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (
            "cuda_mpi",
            "FIVEDP_TRANSPORT=cuda_mpi can't be had on rank 1: no such thing; unset, or staged,",
        ),
        ("ipc", "FIVEDP_TRANSPORT=ipc can't be had between ranks 0 and 1: a handle can't be opened"),
        ("ucx", "FIVEDP_TRANSPORT on rank 1 is no transport; cuda_mpi, ipc, staged, or unset would be right"),
        ("staged", "FIVEDP_TRANSPORT differs between ranks 0 and 1; the same on all would be right"),
        ("chunk", "FIVEDP_STAGING_CHUNK on rank 1 is no positive number of bytes"),
    ],
)
def test_what_cannot_be_had_is_an_error_everywhere(
    comm: MPI.Intracomm, seed: int, cupy: Any, monkeypatch: Any, asked: str, text: str
) -> None:
    mine = comm.rank == 1
    monkeypatch.setattr(choice, "cuda_mpi_verdict", lambda gpu, forced: proof.Verdict(not mine, "no such thing"))
    if asked in ("cuda_mpi", "ipc"):
        monkeypatch.setenv(choice.VARIABLE, asked)
    elif mine:
        monkeypatch.setenv(*((choice.CHUNK_VARIABLE, "-4") if asked == "chunk" else (choice.VARIABLE, asked)))
    if mine:
        monkeypatch.setattr(cupy.cuda.runtime, "ipcOpenMemHandle", _refuse)
    group = everyone(comm)
    with pytest.raises(TransportError) as raised:
        exchange(group, cupy, seed)
    assert text in str(raised.value)
    # Nothing is lost: the next call settles it again.
    monkeypatch.setenv(choice.VARIABLE, "staged")
    monkeypatch.setenv(choice.CHUNK_VARIABLE, "4096")
    exchange(group, cupy, seed)


def test_a_chunk_is_four_mebibytes_unless_told() -> None:
    assert staged.CHUNK_BYTES == 4 << 20
    assert staged.CHUNKS_IN_FLIGHT >= 2
