"""The sharded product: one line says how A, B and C are cut, and the communication follows.

    agree      every rank sends its header to every other (shapes, types, spec): ops/arguments.py
    plan       the cheapest of all schedules of the spec: layout/plan.py
    carry out  tiles of the brick, panels in, partial sums out: layout/schedule.py, ops/execution.py

The headers are the key of the cache: a call that was seen before goes from the agreement straight to its execution.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from fivedp.comm.agreement import agreement_of
from fivedp.comm.grid import Group, RankGrid, grid_of, resolve_axes
from fivedp.comm.mesh import Mesh
from fivedp.errors import DTypeError, LayoutError, PeerError, ShapeError
from fivedp.kernels import gemm
from fivedp.layout.plan import ItemSizes, Plan, plan_family
from fivedp.layout.spec import ProductSpec, parse_product
from fivedp.ops.arguments import MAX_DIMENSIONS, ORDERS, WIRES, Arguments, array_kind, check_dtype, pack, verdict
from fivedp.ops.execution import Execution, accumulator

Array = Any
Choose = Callable[[list[Plan]], Plan]
# A rank whose spec can't be read does not know who shares the call; it waits this long for the others to notice.
_LONELY_S = 4.0
_MAX_CACHED = 4096


def sharded_matmul(
    a: Array,
    b: Array,
    spec: str,
    mesh: Mesh | MPI.Intracomm,
    *,
    out: Array | None = None,
    alpha: complex = 1.0,
    beta: complex = 0.0,
    order: str = "tree",
    wire: str = "sum",
) -> Array:
    """Multiply two arrays that are cut over the ranks: C = alpha * A B + beta * C.

    Parameters
    ----------
    a, b : array
        This rank's shares of A and B, in the order of the spec's indices, any strides. float32, float64, bfloat16
        (`ml_dtypes.bfloat16`, summed in float32), complex64, complex128; float16 on a GPU.
    spec : str
        The indices of A, B and C, and after a slash the mesh axis that cuts each: "m k/tp, k/tp n -> m n". `x*y` cuts
        over the product of two axes. Shares are contiguous blocks as `numpy.array_split` makes them, and may be empty.
    mesh : Mesh or MPI.Intracomm
        A plain communicator has one axis, for which any name stands; a Cartcomm has r, c (and d).
    out : array, optional
        This rank's share of C, written in place; float32 is allowed for 16-bit operands. It is not read where `beta`
        is 0.
    alpha, beta : number
        Complex for complex arrays only.
    order : {"tree", "canonical", "fast"}
        "tree": the same bits on every number of ranks that divides 8, at no extra byte. "canonical": the same bits on
        every number of ranks. "fast": whatever moves least.
    wire : {"sum", "same"}
        The type in which partial sums travel: that of the sum (float32 for 16-bit types), or that of the operands, for
        half the bytes and without the promise of bits.

    Returns
    -------
    c : array
        This rank's share of C; `out` where it was given.

    Raises
    ------
    LayoutError, ShapeError, DTypeError
        On every rank of the call, before any payload moves: the spec can't be read, names an axis that the mesh lacks,
        or differs between ranks; shares don't fit; types differ or are not supported.
    PeerError
        Another rank raised, exited or stayed silent in the middle of the call.

    Notes
    -----
    Collective over the ranks that share the coordinates of all axes which the spec does not name. `fivedp.explain`
    shows schedules and costs; the algorithm is described in `fivedp.layout.plan`.
    """
    return _matmul(a, b, spec, mesh, out, alpha, beta, order, wire, None)


def sharded_matmul_backward(
    dc: Array, a: Array, b: Array, spec: str, mesh: Mesh | MPI.Intracomm, *, order: str = "tree", wire: str = "sum"
) -> tuple[Array, Array]:
    """The gradients of a sharded product: dA = dC B^H and dB = A^H dC, as two more sharded products.

    Parameters
    ----------
    dc : array
        This rank's share of the gradient with respect to C, laid out as C is, in the type of `a` and `b`. Where C is
        whole over an axis, the ranks along it hold the same dC.
    a, b : array
        The shares of the operands of the product.
    spec, mesh, order, wire
        As in `sharded_matmul`.

    Returns
    -------
    da, db : array
        Laid out as `a` and `b` are.

    Raises
    ------
    LayoutError, ShapeError, DTypeError, PeerError
        As `sharded_matmul` does.

    Notes
    -----
    Collective over the same ranks as the product.
    """
    try:
        spec_a, spec_b = parse_product(spec).backward_texts()
    except LayoutError:
        # The other ranks learn of it as of any wrong argument of a product.
        spec_a = spec_b = spec
    da = sharded_matmul(dc, _conjugate(b), spec_a, mesh, order=order, wire=wire)
    db = sharded_matmul(_conjugate(a), dc, spec_b, mesh, order=order, wire=wire)
    return da, db


def _conjugate(array: Array) -> Array:
    """The complex conjugate; anything that is no complex array as it is, for the product to judge."""
    return array.conj() if getattr(getattr(array, "dtype", None), "kind", "") == "c" else array


def matmul_with(a: Array, b: Array, spec: str, mesh: Mesh | MPI.Intracomm, choose: Choose, **keywords: Any) -> Array:
    """`sharded_matmul` with a schedule of the caller's choice: `choose` picks from all plans, cheapest first.

    For benchmarks and tests that hold the planner's choice against the others. `choose` must pick the same plan on
    every rank. Nothing is cached.
    """
    options: dict[str, Any] = {"out": None, "alpha": 1.0, "beta": 0.0, "order": "tree", "wire": "sum", **keywords}
    return _matmul(a, b, spec, mesh, **options, choose=choose)


def _matmul(
    a: Array,
    b: Array,
    spec: str,
    mesh: Mesh | MPI.Intracomm,
    out: Array | None,
    alpha: complex,
    beta: complex,
    order: str,
    wire: str,
    choose: Choose | None,
) -> Array:
    grid = grid_of(mesh)
    try:
        key = (
            spec, a.shape, b.shape, a.dtype, b.dtype, type(a), type(b),
            None if out is None else (out.shape, out.dtype, type(out), getattr(out.flags, "writeable", True)),
            alpha, beta, order, wire,
        )  # fmt: skip
        call = grid.calls.get(key)
    except (AttributeError, TypeError):
        key, call = None, None
    if call is None:
        share_cores(grid)
        call = _Call(grid, a, b, spec, out, alpha, beta, order, wire)
        if key is not None and call.error is None:
            if len(grid.calls) >= _MAX_CACHED:
                grid.calls.clear()
            grid.calls[key] = call
    if out is not None and call.error is None:
        call = call.with_out(a, b, out)
    execution = call.agree(choose)
    if call.dtype.kind != "c":
        alpha, beta = alpha.real, beta.real  # a complex number without imaginary part is allowed
    target = out
    watchdog = grid.watchdog
    try:
        if out is None or call.out_overlaps:
            target = call.xp.empty(execution.out_shape, dtype=call.dtype if out is None else out.dtype)
            if out is not None and beta != 0:
                target[...] = out
        execution.run(a, b, target, alpha, beta, call.wire_dtype, call.xp, call.what)
    except BaseException as error:
        watchdog.fail(error)
        raise
    if out is None:
        return target
    if call.out_overlaps:
        out[...] = target
    return out


def share_cores(grid: RankGrid) -> None:
    """Give every rank its part of the cores, once per grid, unless someone has set the number of threads."""
    if grid.cache.setdefault("cores_shared", False) or "FIVEDP_NUM_THREADS" in os.environ:
        return
    grid.cache["cores_shared"] = True
    cores = len(os.sched_getaffinity(0))
    if gemm.threads() == cores:
        gemm.set_threads(max(1, cores // grid.on_these_cores))


class _Call:
    """One combination of arguments as this rank sees it: checked, its header packed, its executions kept."""

    def __init__(
        self,
        grid: RankGrid,
        a: Array,
        b: Array,
        spec: str,
        out: Array | None,
        alpha: complex,
        beta: complex,
        order: str,
        wire: str,
    ) -> None:
        self.error: ValueError | None = None
        self.out_overlaps = False
        self.xp: Any = np
        self.executions: dict[bytes, Execution] = {}
        self.group: Group = grid.everyone()
        self.beta = beta
        text, kind = str(spec), "numpy"
        shapes: tuple[tuple[int, ...] | None, ...] = (None, None, None)
        dtypes: tuple[str | None, ...] = (None, None, None)
        try:
            parsed = parse_product(spec)
            text = str(parsed)
            self.parsed: ProductSpec = parsed
            self.axes = _resolve(grid, parsed)
            self.group = grid.group(self.axes)
            kind = _check_arrays(a, b, out, parsed, alpha, beta)
            _check_options(order, wire)
            if kind == "cupy":
                import cupy

                self.xp = cupy
            arrays = (a, b, out)
            shapes = tuple(None if x is None else tuple(x.shape) for x in arrays)
            dtypes = tuple(None if x is None else str(x.dtype) for x in arrays)
            self.dtype, self.order = a.dtype, order
            total = accumulator(a.dtype)
            self.wire_dtype = np.dtype(a.dtype) if wire == "same" else total
            result = (out.dtype if out is not None else a.dtype).itemsize
            whole = result if beta == 0 else self.wire_dtype.itemsize
            self.itemsizes = ItemSizes(a.dtype.itemsize, b.dtype.itemsize, result, self.wire_dtype.itemsize, whole)
        except ValueError as error:
            self.error = error
            order, wire, alpha, beta = "tree", "sum", 1.0, 0.0
        self.what = f'called sharded_matmul with spec "{text}"'
        if self.error is not None:
            self.what = f"raised {type(self.error).__name__}: {self.error}"
        self.header = pack(
            Arguments("sharded_matmul", text, shapes, dtypes, kind, order, wire, alpha, beta, self.error)
        )

    def with_out(self, a: Array, b: Array, out: Array) -> _Call:
        """Note whether `out` shares memory with an operand: its elements would be overwritten before they are read."""
        may_share = np.may_share_memory if self.xp is np else self.xp.may_share_memory
        self.out_overlaps = may_share(out, a) or may_share(out, b)
        return self

    def agree(self, choose: Choose | None) -> Execution:
        """Exchange headers; the execution that they stand for, or the exception that all ranks raise."""
        agreement = agreement_of(self.group)
        try:
            headers = agreement.exchange(self.header, self.what, patience_s=_LONELY_S if self.error else None)
        except (PeerError, LayoutError):
            if self.error is not None:
                raise self.error from None
            raise
        key = headers.tobytes()
        execution = self.executions.get(key) if choose is None else None
        if execution is None:
            execution = self._make(headers, choose)
            if choose is None:
                if len(self.executions) >= _MAX_CACHED:
                    self.executions.clear()
                self.executions[key] = execution
        return execution

    def _make(self, headers: Any, choose: Choose | None) -> Execution:
        group = self.group
        layouts = (self.parsed.a, self.parsed.b) if self.error is None else ()
        if self.error is None and headers[group.index, 11] != 255:
            layouts = (*layouts, self.parsed.c)
        sizes = verdict(headers, layouts, *group.numbering)
        family = plan_family(self.parsed, group.axes, group.sizes, self.order)
        ordered = [sizes[name] for name in family.indices]
        if choose is not None:
            return Execution(choose(family.all_plans(ordered, self.itemsizes)), group)
        return Execution(family.plan(ordered, self.itemsizes), group)


def _resolve(grid: RankGrid, parsed: ProductSpec) -> tuple[str, ...]:
    try:
        return resolve_axes(grid.names, parsed.axes)
    except LayoutError as error:
        raise LayoutError(f'sharded_matmul: spec "{parsed}": {_name_index(parsed, grid.names)}{error}') from None


def _name_index(parsed: ProductSpec, names: tuple[str, ...]) -> str:
    """Which index carries the axis that is unknown, for the message."""
    for layout, tensor in zip((parsed.a, parsed.b, parsed.c), "ABC", strict=True):
        for index in layout.indices:
            if names != ("",) and any(axis not in names for axis in index.axes):
                return f"index {index.name} of {tensor} is cut as {index}: "
    return ""


def _check_options(order: str, wire: str) -> None:
    if order not in ORDERS:
        raise LayoutError(f"sharded_matmul: order is {order!r}; expected one of {', '.join(ORDERS)}")
    if wire not in WIRES:
        raise LayoutError(f"sharded_matmul: wire is {wire!r}; expected one of {', '.join(WIRES)}")


def _check_arrays(a: Array, b: Array, out: Array | None, spec: ProductSpec, alpha: complex, beta: complex) -> str:
    """Check what one rank can know alone; "numpy" or "cupy"."""
    name = "sharded_matmul"
    given = [("a", a, spec.a), ("b", b, spec.b)] + ([("out", out, spec.c)] if out is not None else [])
    kinds = {label: array_kind(array, label, name) for label, array, _ in given}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"`{label}` is {kind}" for label, kind in kinds.items())
        raise DTypeError(f"{name}: {listed}; all arrays must be NumPy's or all CuPy's")
    for label, array, layout in given:
        check_dtype(array, label, name)
        if array.ndim != len(layout.indices):
            raise ShapeError(
                f"{name}: `{label}` has {array.ndim} dimensions, shape {tuple(array.shape)}; "
                f'its layout "{layout}" has {len(layout.indices)}'
            )
        if array.ndim > MAX_DIMENSIONS:
            raise ShapeError(f"{name}: `{label}` has {array.ndim} dimensions; at most {MAX_DIMENSIONS} are supported")
    if a.dtype != b.dtype:
        raise DTypeError(f"{name}: `a` has dtype {a.dtype} and `b` {b.dtype}; they must be the same")
    if out is not None:
        allowed = {a.dtype, accumulator(a.dtype)}
        if out.dtype not in allowed:
            wanted = " or ".join(sorted(map(str, allowed)))
            raise DTypeError(f"{name}: `out` has dtype {out.dtype}; for operands of {a.dtype} it must be {wanted}")
        if isinstance(out, np.ndarray) and not out.flags.writeable:
            raise ShapeError(f"{name}: `out` is read-only; it must be writeable")
    for label, number in (("alpha", alpha), ("beta", beta)):
        if isinstance(number, bool) or not isinstance(number, (int, float, complex, np.number)):
            raise DTypeError(f"{name}: {label} is a {type(number).__name__}; expected a number")
        if isinstance(number, (complex, np.complexfloating)) and number.imag != 0 and a.dtype.kind != "c":
            raise DTypeError(f"{name}: {label} is {number}, but the arrays are {a.dtype}; expected a real number")
    return next(iter(kinds.values()))
