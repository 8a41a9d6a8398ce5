"""Wrong arguments: the same exception and the same words on every rank, soon, and the communicator still works."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp import DTypeError, LayoutError, ShapeError
from mpi_products import BFLOAT16, C64, F32, F64, mesh_of

RANKS = (1, 2, 3, 8)
TIMEOUT = 150
SPEC = "m k/p, k/p n -> m n"


def error_of(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def assert_same_error(comm: MPI.Intracomm, call: Callable[[], object], kind: type[ValueError], *words: str) -> str:
    """Call on every rank; the exception's text, which every rank raised within 5 seconds."""
    comm.Barrier()
    begin = time.monotonic()
    error = error_of(call)
    seconds = time.monotonic() - begin
    seen = comm.allgather((type(error).__name__, str(error)))
    assert len(set(seen)) == 1, f"ranks raise differently: {seen}"
    assert type(error) is kind, f"{seen[0]}, expected {kind.__name__}"
    for word in words:
        assert re.search(word, str(error)), f"{str(error)!r} lacks {word!r}"
    assert seconds < 5, f"{seen[0]} after {seconds:.1f} s"
    return str(error)


def assert_works(mesh: Any, spec: str = SPEC) -> None:
    """A right call, on the same ranks."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(-3, 4, (5, 11)).astype(F32), rng.integers(-3, 4, (11, 6)).astype(F32)
    a_layout, b_layout = (text.strip() for text in spec.split("->")[0].split(","))
    c = fivedp.sharded_matmul(fivedp.shard(a, a_layout, mesh), fivedp.shard(b, b_layout, mesh), spec, mesh)
    wanted = fivedp.shard(a @ b, spec.split("->")[1].strip(), mesh)
    np.testing.assert_array_equal(c, wanted)


class Right:
    """The arguments of a right call, to be spoiled."""

    def __init__(self, comm: MPI.Intracomm, dtype: Any = F32) -> None:
        self.a = fivedp.shard(np.ones((5, 16), dtype), "m k/p", comm)
        self.b = fivedp.shard(np.ones((16, 6), dtype), "k/p n", comm)
        self.spec, self.comm = SPEC, comm
        self.keywords: dict[str, Any] = {}

    def __call__(self) -> Any:
        return fivedp.sharded_matmul(self.a, self.b, self.spec, self.comm, **self.keywords)


def read_only(shape: tuple[int, ...]) -> Any:
    out = np.zeros(shape, F32)
    out.flags.writeable = False
    return out


def spoil(**changes: Any) -> Callable[[Right], None]:
    def apply(call: Right) -> None:
        for name, value in changes.items():
            if name in ("a", "b", "spec"):
                setattr(call, name, value(getattr(call, name)) if callable(value) else value)
            else:
                call.keywords[name] = value

    return apply


FAULTS: dict[str, tuple[Callable[[Right], None], type[ValueError], str]] = {
    "no product": (spoil(spec="m k/p, k/p n"), LayoutError, "expected two operands and a result"),
    "strange word": (spoil(spec="m k/p, k/p n -> m n!"), LayoutError, '"n!" is no index'),
    "spec is None": (spoil(spec=None), LayoutError, "spec must be a text"),
    "spec is a list": (spoil(spec=["m k/p", "k/p n"]), LayoutError, "spec must be a text"),
    "nothing summed": (spoil(spec="m k/p, k/p n -> m k/p n"), LayoutError, "no index is summed"),
    "index alone": (spoil(spec="m k/p, k/p n -> m"), LayoutError, "index n stands in B only"),
    "two axes": (spoil(spec="m k/p, k/p n -> m/q n"), LayoutError, "axes p and q are named.* plain communicator"),
    "dimensions": (spoil(a=lambda a: a[0]), ShapeError, "`a` has 1 dimensions.*has 2"),
    "no array": (spoil(b=lambda b: b.tolist()), DTypeError, "`b` is a list; expected a NumPy or CuPy array"),
    "integers": (spoil(a=lambda a: a.astype(int)), DTypeError, "`a` has dtype int64; expected one of float32"),
    "float16": (
        spoil(a=lambda a: a.astype(np.float16), b=lambda b: b.astype(np.float16)), DTypeError, "float16.* CuPy",
    ),
    "byte order": (spoil(a=lambda a: a.astype(">f4")), DTypeError, "`a` has dtype >f4"),
    "mixed": (spoil(b=lambda b: b.astype(F64)), DTypeError, "`a` has dtype float32 and `b` float64"),
    "order": (spoil(order="random"), LayoutError, "order is 'random'; expected one of tree"),
    "wire": (spoil(wire="half"), LayoutError, "wire is 'half'; expected one of sum, same"),
    "alpha complex": (spoil(alpha=1 + 2j), DTypeError, r"alpha is \(1\+2j\), but the arrays are float32"),
    "beta text": (spoil(beta="1"), DTypeError, "beta is a str; expected a number"),
    "alpha array": (spoil(alpha=np.ones(2)), DTypeError, "alpha is a ndarray; expected a number"),
    "out type": (spoil(out=np.zeros((5, 6), F64)), DTypeError, "`out` has dtype float64; .* must be float32"),
    "out dimensions": (spoil(out=np.zeros(30, F32)), ShapeError, "`out` has 1 dimensions"),
    "out shape": (spoil(out=np.zeros((5, 7), F32)), ShapeError, "index n is 6 in `b` and 7 in `out`"),
    "out read-only": (spoil(out=read_only((5, 6))), ShapeError, "`out` is read-only"),
    "k differs": (spoil(a=lambda a: np.ones((5, a.shape[1] + 1), F32)), ShapeError, "index k is .* in `a`"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_on_every_rank(comm: MPI.Intracomm, fault: str) -> None:
    change, kind, words = FAULTS[fault]
    assert_works(comm)
    call = Right(comm)
    change(call)
    assert_same_error(comm, call, kind, words)
    assert_same_error(comm, call, kind, words)
    assert_works(comm)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_on_one_rank(comm: MPI.Intracomm, fault: str) -> None:
    if comm.size == 1:
        pytest.skip("another rank is needed")
    change, kind, words = FAULTS[fault]
    odd = comm.size - 1
    for seen in (False, True):
        call = Right(comm)
        if seen:
            call()
            if "out" in _keywords(change):
                # The same call with a right result has been seen before.
                call.keywords["out"] = np.zeros((5, 6), F32)
                call()
        if comm.rank == odd:
            change(call)
        elif "out" in _keywords(change):
            call.keywords["out"] = np.zeros((5, 6), F32)
        text = assert_same_error(comm, call, kind)
        if fault not in ("out shape", "out dimensions", "k differs"):
            assert re.search(words, text), text
        if fault != "k differs":  # which of the shares is wrong depends on what was meant
            assert f"rank {odd}" in text, text
        assert_works(comm)


def _keywords(change: Callable[[Right], None]) -> dict[str, Any]:
    call = object.__new__(Right)
    call.keywords = {}
    try:
        change(call)
    except AttributeError:
        return {}
    return call.keywords


def test_what_differs_between_ranks_is_named(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("another rank is needed")
    odd = comm.size // 2

    def expect(spoiled: Callable[[Right], None], kind: type[ValueError], *words: str) -> None:
        call = Right(comm)
        if comm.rank == odd:
            spoiled(call)
        assert_same_error(comm, call, kind, *words)
        assert_works(comm)

    both = {"a": lambda a: a.astype(BFLOAT16), "b": lambda b: b.astype(BFLOAT16)}
    expect(spoil(**both), DTypeError, "dtype of `a` is ", "bfloat16 on rank", "float32")
    expect(spoil(spec="m k/p, k/p n -> m/p n"), LayoutError, "the spec is ", "-> m/p n", "all ranks must give the same")
    expect(spoil(order="fast"), LayoutError, "order is .*fast.*")
    expect(spoil(wire="same"), LayoutError, "wire is ")
    expect(spoil(alpha=2.0), LayoutError, "alpha is ")
    expect(spoil(beta=2.0), LayoutError, "beta is ")
    expect(spoil(out=np.zeros((5, 6), F32)), DTypeError, "dtype of `out` is ", "None")
    expect(spoil(a=lambda a: np.ones((6, a.shape[1]), F32)), ShapeError, "index m of `a` is", "hold the same share")
    longer = spoil(a=lambda a: np.ones((5, a.shape[1] + 2), F32), b=lambda b: np.ones((b.shape[0] + 2, 6), F32))
    expect(longer, ShapeError, "index k of `a` is", r"the block rule \(numpy.array_split\) gives that rank")
    three = spoil(spec="m k/p, k/p n o -> m n o", b=lambda b: b[..., None])
    expect(three, LayoutError, "the spec is ")
    if comm.size > 2:
        call = Right(comm)
        if comm.rank == odd:
            call.keywords["order"] = "fast"
        text = assert_same_error(comm, call, LayoutError)
        assert f"order is fast on rank {odd} and tree on rank" in text


def test_other_axes_on_one_rank(comm: MPI.Intracomm) -> None:
    if comm.size < 2:
        pytest.skip("another rank is needed")
    # The odd rank talks to a smaller group: the others notice that it waits elsewhere.
    for make in ("Cartcomm", "Mesh"):
        for odd_spec, usual in (
            ("m k/{0}, k/{0} n -> m n", "m/{1} k/{0}, k/{0} n -> m/{1} n"),
            ("m/{1} k/{0}, k/{0} n -> m/{1} n", "m k/{0}, k/{0} n -> m n"),
        ):
            sizes = (2, comm.size // 2) if comm.size in (4, 6, 8) else (1, comm.size)
            axes = ("r", "c") if make == "Cartcomm" else ("dp", "tp")
            mesh = mesh_of(comm, axes, sizes)
            spec = (odd_spec if comm.rank == 0 else usual).format(axes[1], axes[0])
            a, b = np.ones((4, 3), F32), np.ones((3, 5), F32)
            comm.Barrier()
            begin = time.monotonic()
            error = error_of(lambda a=a, b=b, spec=spec, mesh=mesh: fivedp.sharded_matmul(a, b, spec, mesh))
            seen = comm.allgather((type(error).__name__, time.monotonic() - begin, str(error)))
            raised = [entry for entry in seen if entry[0] != "NoneType"]
            if sizes[0] > 1 and sizes[1] > 1:
                # A whole group of the smaller kind may be complete in itself, and passes.
                assert raised, seen
            for name, seconds, text in raised:
                assert name in ("LayoutError", "ShapeError", "PeerError"), seen
                assert seconds < 6, seen
                assert "rank 0" in text or "differ" in text or "rank" in text, seen


def test_unknown_axis_names_the_index_and_the_axes_there_are(comm: MPI.Intracomm) -> None:
    mesh = fivedp.Mesh(comm, tp=-1)
    cart = comm.Create_cart((1, comm.size))
    a, b = np.ones((2, 3), F32), np.ones((3, 4), F32)
    for where, known in ((mesh, "pp, dp, sp, ep, tp"), (cart, "r, c")):
        assert_same_error(
            comm,
            lambda where=where: fivedp.sharded_matmul(a, b, "m k/q, k/q n -> m n", where),
            LayoutError,
            "index k of A is cut as k/q",
            "axis q is named",
            known,
        )
    assert_works(mesh, "m k/tp, k/tp n -> m n")
    assert_works(cart, "m k/c, k/c n -> m n")


def test_spec_that_one_rank_of_a_mesh_cannot_read(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("another rank is needed")
    mesh = fivedp.Mesh(comm, tp=comm.size)
    spec = "m k/tp, k/tp n" if comm.rank == 0 else "m k/tp, k/tp n -> m n"
    a, b = np.ones((2, 3), F32), np.ones((3, 4), F32)
    begin = time.monotonic()
    error = error_of(lambda: fivedp.sharded_matmul(a, b, spec, mesh))
    seen = comm.allgather((type(error).__name__, str(error)))
    assert {name for name, _ in seen} == {"LayoutError"}, seen
    assert all("expected two operands and a result" in text for _, text in seen), seen
    assert time.monotonic() - begin < 6


def test_gradient_of_a_wrong_spec(comm: MPI.Intracomm) -> None:
    call = Right(comm)
    dc = np.ones((5, 6), F32)
    for where in ("every rank", "one rank"):
        if where == "one rank" and comm.size == 1:
            continue
        wrong = comm.rank == 0 or where == "every rank"
        for bad in ("m k/p, k/p n", "m k/p, k/p n -> m n o"):
            spec = bad if wrong else SPEC
            assert_same_error(
                comm, lambda spec=spec: fivedp.sharded_matmul_backward(dc, call.a, call.b, spec, comm), LayoutError
            )
        gradient = dc.astype(F64) if wrong else dc
        assert_same_error(
            comm,
            lambda gradient=gradient: fivedp.sharded_matmul_backward(gradient, call.a, call.b, SPEC, comm),
            DTypeError,
        )
        b = call.b.tolist() if wrong else call.b
        assert_same_error(
            comm, lambda b=b: fivedp.sharded_matmul_backward(dc, call.a, b, SPEC, comm), DTypeError, "is a list"
        )
        assert_works(comm)


def test_numbers_of_every_kind_are_taken(comm: MPI.Intracomm) -> None:
    for dtype, alphas in (
        (F32, (2, 2.0, np.float32(2), np.float64(2), np.int32(2), 2 + 0j, np.complex64(2))),
        (BFLOAT16, (2, np.float32(2), 2 + 0j)),
        (C64, (2, 2.0, 2 + 1j, np.complex128(1j))),
    ):
        for alpha in alphas:
            call = Right(comm, dtype)
            out = np.full((5, 6), 3, dtype)
            call.keywords.update(alpha=alpha, beta=alpha, out=out)
            np.testing.assert_array_equal(call().astype("complex128"), np.full((5, 6), 19 * alpha))


@pytest.mark.parametrize("one", [False, True])
def test_errors_of_gather(comm: MPI.Intracomm, one: bool) -> None:
    if one and comm.size == 1:
        pytest.skip("another rank is needed")
    odd = comm.rank == comm.size - 1 or not one
    x = fivedp.shard(np.ones((17, 3), F32), "m/p n", comm)

    def gather(x: Any, layout: str, root: int | None = None) -> Any:
        return lambda: fivedp.gather(x, layout, comm, root)

    assert_same_error(comm, gather(x, "m/p n/" if odd else "m/p n"), LayoutError, "is no index")
    assert_same_error(comm, gather(x, "m/p n/p" if odd else "m/p n"), LayoutError, "axis p cuts m/p and n/p")
    assert_same_error(comm, gather(x[0] if odd else x, "m/p n"), ShapeError, "1 dimensions")
    assert_same_error(comm, gather(x.astype(int) if odd else x, "m/p n"), DTypeError, "int64")
    assert_same_error(comm, gather(x.tolist() if odd else x, "m/p n"), DTypeError, "is a list")
    assert_same_error(comm, gather(x, "m/p n", 77 if odd else 0), LayoutError, "root is 77")
    if one:
        assert_same_error(comm, gather(x.astype(F64) if odd else x, "m/p n"), DTypeError, "float64", "float32")
        assert_same_error(comm, gather(x, "m/p n", 1 if odd else 0), LayoutError)
        assert_same_error(comm, gather(x[:, :2] if odd else x, "m/p n"), ShapeError, "index n of `a`")
    np.testing.assert_array_equal(fivedp.gather(x, "m/p n", comm), np.ones((17, 3), F32))


def test_gather_where_others_multiply(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        pytest.skip("another rank is needed")
    call = Right(comm)
    if comm.rank == 0:
        assert_same_error(comm, lambda: fivedp.gather(call.a, "m k/p", comm), LayoutError, "the operation is")
    else:
        assert_same_error(comm, call, LayoutError, "the operation is")
    assert_works(comm)
