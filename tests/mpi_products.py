"""Whole products for the tests under mpirun: operands, meshes, and a judge that knows nothing of fivedp.

Every rank draws the same whole A and B, cuts them with `fivedp.shard`, multiplies, and holds its share of C against
`numpy.einsum` in float64. Operands are small integers where the result must be exact in any order of summation, and
normal numbers where rounding is judged: an element may be wrong by (K + 4) roundings of the accumulator relative to
sum |a||b|, the classical bound of any order of K additions, and by one rounding of the result's type.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from mpi4py import MPI

import fivedp

Array = Any
Option = TypeVar("Option")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
F32, F64, C64, C128 = (np.dtype(t) for t in ("float32", "float64", "complex64", "complex128"))
DTYPES = (F32, F64, BFLOAT16, C64)

# The table of the public contract, and the axes of the mesh that each spec runs on.
CONTRACT: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("m k, k n/tp -> m n/tp", ("tp",)),
    ("m k, k n/tp -> m n", ("tp",)),
    ("m k/tp, k/tp n -> m n", ("tp",)),
    ("m k/tp, k/tp n -> m/tp n", ("tp",)),
    ("m/tp k, k n/tp -> m n/tp", ("tp",)),
    ("m/p k, k/p n -> m/p n", ("p",)),
    ("m/r k/c, k/r n/c -> m/r n/c", ("r", "c")),
    ("m/r k/c*d, k/r*d n/c -> m/r n/c", ("r", "c", "d")),
    ("b/dp m k, k n/tp -> b/dp m n/tp", ("dp", "tp")),
)
# Results transposed, several indices in a role, products of axes in other orders, vectors, operands whole or cut twice.
OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("m k/tp, k/tp n -> n m", ("tp",)),
    ("k/tp m, n k/tp -> n m/tp", ("tp",)),
    ("m/tp k, k n -> n m/tp", ("tp",)),
    ("b s k/tp, k/tp n -> b s n", ("tp",)),
    ("b/tp s k, k n/tp -> b s n/tp", ("tp",)),
    ("b/dp m k, b/dp m n -> k n", ("dp",)),
    ("b/dp m k, b/dp m n -> k/dp n", ("dp",)),
    ("b h s/sp d, b h t/sp d -> b h s/sp t", ("sp",)),
    ("b s/sp h d, h d n/sp -> b s/sp n", ("sp",)),
    ("m k/tp, k/tp -> m", ("tp",)),
    ("k/tp, k/tp n -> n/tp", ("tp",)),
    ("m/r k/c, k/r n/c -> n/c m/r", ("r", "c")),
    ("m/c k/r, k/c n/r -> m/r n/c", ("r", "c")),
    ("m k/r*c, k/c*r n -> m/c*r n", ("r", "c")),
    ("m k/r j/c, j/r k n/c -> m/c n/r", ("r", "c")),
    ("b/dp m k/tp, b/dp k/tp n -> b/dp m/tp n", ("dp", "tp")),
    ("b m/dp k, b/tp k n -> b m n/tp", ("dp", "tp")),
)


# Beyond so many ranks, which two cores let take turns, a spec does not meet every type and option in every run.
EVERYTHING_UP_TO = 4


def in_turn(spec: str, comm: MPI.Intracomm, options: Iterable[Option], turns: int) -> list[Option]:
    """The options that a spec meets: all of them on few ranks, beyond that one of every `turns`.

    Which one differs from spec to spec and with the number of ranks, so that all specs together meet all options.
    """
    if comm.size <= EVERYTHING_UP_TO:
        return list(options)
    first = [text for text, _ in CONTRACT + OTHERS].index(spec) + comm.size
    return [option for number, option in enumerate(options) if (first + number) % turns == 0]


def grids(n_ranks: int, n_axes: int) -> list[tuple[int, ...]]:
    """Every way to write a number of ranks as a product of axis sizes, in order."""
    divisors = [d for d in range(1, n_ranks + 1) if n_ranks % d == 0]
    return [sizes for sizes in itertools.product(divisors, repeat=n_axes) if math.prod(sizes) == n_ranks]


def mesh_of(comm: MPI.Intracomm, axes: tuple[str, ...], sizes: tuple[int, ...]) -> Any:
    """The ranks of `comm` with these axes: the plain communicator, a Cartcomm, or a Mesh."""
    if len(axes) == 1 and sizes[0] == comm.size:
        return comm
    if axes == ("r", "c", "d")[: len(axes)]:
        return comm.Create_cart(sizes, periods=[False] * len(sizes), reorder=False)
    return fivedp.Mesh(comm, **dict(zip(axes, sizes, strict=True)))


def layouts(spec: str) -> tuple[str, str, str]:
    """The texts of the three layouts."""
    operands, result = spec.split("->")
    a, b = operands.split(",")
    return a.strip(), b.strip(), result.strip()


def names(layout: str) -> list[str]:
    """The index names of a layout."""
    return re.sub(r"/[\w*]+", "", layout).split()


def index_names(spec: str) -> list[str]:
    """Every index of a spec once."""
    return list(dict.fromkeys(name for layout in layouts(spec) for name in names(layout)))


def summed(spec: str) -> list[str]:
    """The indices that C lacks."""
    return [name for name in index_names(spec) if name not in names(layouts(spec)[2])]


def draw(shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator, *, exact: bool = False) -> Array:
    """Normal numbers, or small integers whose sums of products are exact in every type."""

    def numbers() -> Array:
        return rng.integers(-4, 5, shape).astype(F64) if exact else rng.standard_normal(shape)

    x = numbers()
    return (x + 1j * numbers() if dtype.kind == "c" else x).astype(dtype)


def operands(
    spec: str, sizes: dict[str, int], dtype: np.dtype[Any], rng: np.random.Generator, *, exact: bool = False
) -> tuple[Array, Array]:
    """Whole A and B."""
    a, b, _ = (tuple(sizes[name] for name in names(layout)) for layout in layouts(spec))
    return draw(a, dtype, rng, exact=exact), draw(b, dtype, rng, exact=exact)


def einsum(spec: str, a: Array, b: Array) -> Array:
    """The product in float64 (or complex128)."""
    letter = {name: chr(ord("a") + i) for i, name in enumerate(index_names(spec))}
    a_text, b_text, c_text = ("".join(letter[name] for name in names(layout)) for layout in layouts(spec))
    wide = C128 if a.dtype.kind == "c" else F64
    return np.einsum(f"{a_text},{b_text}->{c_text}", a.astype(wide), b.astype(wide))


def stored(x: Array, how: str) -> Array:
    """The same array in another place: Fortran order, reversed, strided, or inside a larger one."""
    if how == "F":
        return np.asfortranarray(x)
    if how == "reversed":
        back = (slice(None, None, -1),) * x.ndim
        return np.ascontiguousarray(x[back])[back]
    if how == "strided":
        larger = np.full([2 * n + 3 for n in x.shape], 77, dtype=x.dtype)
        view = larger[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)]
        view[...] = x
        return view
    if how == "inside":
        larger = np.full([n + 5 for n in x.shape], 77, dtype=x.dtype)
        view = larger[tuple(slice(2, 2 + n) for n in x.shape)]
        view[...] = x
        return view
    assert how == "C"
    return x


STORED = ("C", "F", "reversed", "strided", "inside")


def rounding(dtype: np.dtype[Any]) -> float:
    """The largest relative error of one rounding."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of the sum."""
    return F32 if dtype.itemsize == 2 else dtype


def allowed_error(
    spec: str,
    a: Array,
    b: Array,
    out_dtype: np.dtype[Any],
    *,
    alpha: complex = 1.0,
    beta: complex = 0.0,
    before: Array | None = None,
    rounded_partials: int = 0,
) -> Array:
    """How far each element may be from the float64 value, on rank counts and in summation orders of any kind."""
    k = math.prod(dict(zip(names(layouts(spec)[0]), a.shape, strict=True))[name] for name in summed(spec))
    magnitude = abs(alpha) * einsum(spec, abs(a.astype(C128)).real, abs(b.astype(C128)).real)
    if before is not None and beta != 0:
        magnitude = magnitude + abs(beta) * abs(before.astype(C128)).real
    # A complex product is four real ones, and the judge itself rounds in float64.
    factor = (4 if a.dtype.kind == "c" else 1) * (2 if a.dtype in (F64, C128) else 1)
    bound = factor * (k + 4) * rounding(accumulator(a.dtype)) * magnitude
    return bound + (rounding(out_dtype) + rounded_partials * rounding(a.dtype)) * magnitude


def judge(name: str, got: Array, wanted: Array, allowed: Array | float) -> None:
    """Assert that every element is as near to the wanted one as it must be."""
    assert got.shape == wanted.shape, f"{name}: shape {got.shape}, expected {wanted.shape}"
    wide = got.astype(C128)
    error = abs(wide - wanted)
    bad = ~(error <= allowed)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        limit = np.broadcast_to(allowed, error.shape)[place]
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.size} elements are wrong; at {place} got {got[place]}, "
            f"expected {wanted[place]}, error {error[place]:.3g}, allowed {limit:.3g}"
        )


def same_bits(x: Array, y: Array) -> bool:
    """Whether two arrays agree in every bit."""
    return x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()


def total(comm: MPI.Intracomm, number: int) -> int:
    """The sum over all ranks."""
    return int(comm.allreduce(number))


def sizes_of(spec: str, rng: np.random.Generator, low: int, high: int) -> dict[str, int]:
    """A size from low to high - 1 for every index."""
    return {name: int(rng.integers(low, high)) for name in index_names(spec)}


def check(
    mesh: Any,
    spec: str,
    sizes: dict[str, int],
    dtype: np.dtype[Any],
    rng: np.random.Generator,
    *,
    exact: bool = False,
    how: tuple[str, str, str] = ("C", "C", "C"),
    alpha: complex = 1.0,
    beta: complex = 0.0,
    out: np.dtype[Any] | None = None,
    **options: Any,
) -> Any:
    """One product from whole operands to a judged share, which is returned."""
    a, b = operands(spec, sizes, dtype, rng, exact=exact)
    a_layout, b_layout, c_layout = layouts(spec)
    a_local = stored(fivedp.shard(a, a_layout, mesh), how[0])
    b_local = stored(fivedp.shard(b, b_layout, mesh), how[1])
    copies = a_local.copy(), b_local.copy()
    wanted = alpha * einsum(spec, a, b)
    before = draw(wanted.shape, out or dtype, rng, exact=exact)
    share = None
    if out is not None:
        share = stored(fivedp.shard(before, c_layout, mesh), how[2])
        if beta == 0:
            share[...] = np.nan
        wanted = wanted + beta * before.astype(wanted.dtype) if beta != 0 else wanted
    got = fivedp.sharded_matmul(a_local, b_local, spec, mesh, out=share, alpha=alpha, beta=beta, **options)
    title = f'"{spec}" {sizes} {dtype} {how} alpha={alpha} beta={beta} out={out} {options}'
    assert got.dtype == (out or dtype), title
    assert out is None or got is share, title
    assert same_bits(a_local, copies[0]), f"{title}: a was written"
    assert same_bits(b_local, copies[1]), f"{title}: b was written"
    if exact:
        wanted = fivedp.shard(wanted.astype(out or dtype).astype(wanted.dtype), c_layout, mesh)
        judge(title, got, wanted, 0.0)
    else:
        ranks = mesh.size if isinstance(mesh, MPI.Comm) else mesh.comm.size
        allowed = allowed_error(
            spec, a, b, out or dtype, alpha=alpha, beta=beta, before=before,
            rounded_partials=2 * ranks if options.get("wire") == "same" else 0,
        )  # fmt: skip
        judge(title, got, fivedp.shard(wanted, c_layout, mesh), fivedp.shard(allowed, c_layout, mesh))
    return got


def meshes(comm: MPI.Intracomm, axes: tuple[str, ...], limit: int) -> list[Any]:
    """The ranks in up to `limit` grids, those first where the axes are as equal as they can be."""
    return [mesh_of(comm, axes, s) for s in sorted(grids(comm.size, len(axes)), key=lambda s: (max(s), s))[:limit]]
