"""A plan as text: what moves, how many bytes, how that compares with every other schedule and with the bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fivedp.errors import LayoutError, ShapeError
from fivedp.layout.plan import ORDERS, ItemSizes, Plan, plan_family
from fivedp.layout.schedule import Schedule
from fivedp.layout.shares import volume
from fivedp.layout.spec import ProductSpec, parse_product


def explain(
    spec: str,
    shapes: Sequence[Sequence[int]] | Mapping[str, int],
    mesh: object,
    *,
    dtype: Any = "float32",
    order: str = "tree",
    wire: str = "sum",
) -> str:
    """The plan of a sharded product as text: steps, bytes per rank, lower bound, buffer memory.

    Parameters
    ----------
    spec : str
        As in `sharded_matmul`.
    shapes : ((...), (...)) or mapping
        The global shapes of A and B, or the global size of every index: {"m": 4096, "k": 4096, "n": 4096}.
    mesh : Mesh, MPI.Intracomm or mapping
        The ranks; a mapping of axis names to sizes, such as {"tp": 8}, needs no MPI.
    dtype : dtype
        Element type of the operands.
    order, wire : str
        As in `sharded_matmul`.

    Returns
    -------
    text : str

    Raises
    ------
    LayoutError, ShapeError
        Where the spec or the shapes can't be planned.

    Notes
    -----
    Not collective: no rank talks to another.
    """
    plan = plan_for(spec, shapes, mesh, dtype=dtype, order=order, wire=wire)
    return describe(plan)


def plan_for(
    spec: str,
    shapes: Sequence[Sequence[int]] | Mapping[str, int],
    mesh: object,
    *,
    dtype: Any = "float32",
    order: str = "tree",
    wire: str = "sum",
) -> Plan:
    """The plan that `sharded_matmul` would take, as data; arguments as in `explain`."""
    parsed = parse_product(spec)
    axes = _axes(parsed, mesh)
    sizes = _sizes(parsed, shapes)
    if order not in ORDERS:
        raise LayoutError(f"order is {order!r}; expected one of {', '.join(ORDERS)}")
    item = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).itemsize
    partial = 4 if item == 2 and wire == "sum" else item
    family = plan_family(parsed, tuple(axes), tuple(axes.values()), order)
    return family.plan([sizes[name] for name in family.indices], ItemSizes(item, item, item, partial, item))


def _axes(parsed: ProductSpec, mesh: object) -> dict[str, int]:
    if isinstance(mesh, Mapping):
        for axis in parsed.axes:
            if axis not in mesh:
                raise LayoutError(f'spec "{parsed}": axis {axis} is named, but the mesh has {", ".join(mesh)}')
        return {axis: int(size) for axis, size in mesh.items() if axis in parsed.axes}
    describe_axes = getattr(mesh, "shape", None)
    if isinstance(describe_axes, Mapping):
        return _axes(parsed, describe_axes)
    # Layouts know nothing of MPI; a communicator is asked for its size and its Cartesian dimensions by duck typing.
    dims = getattr(mesh, "dims", None)
    if dims is not None and len(dims) > 1:
        return _axes(parsed, dict(zip("rcd", dims, strict=False)))
    if len(parsed.axes) > 1:
        raise LayoutError(f'spec "{parsed}": it names {len(parsed.axes)} axes, but a plain communicator has one')
    size = getattr(mesh, "size", None)
    if not isinstance(size, int):
        raise LayoutError(f"expected a Mesh, a communicator or a mapping of axis sizes, got {type(mesh).__name__}")
    return dict.fromkeys(parsed.axes, size)


def _sizes(parsed: ProductSpec, shapes: Sequence[Sequence[int]] | Mapping[str, int]) -> dict[str, int]:
    if isinstance(shapes, Mapping):
        wanted = parsed.batch + parsed.m + parsed.n + parsed.k
        missing = [name for name in wanted if name not in shapes]
        if missing:
            raise ShapeError(f'spec "{parsed}": no size is given for index {", ".join(missing)}')
        return {name: int(shapes[name]) for name in wanted}
    sizes: dict[str, int] = {}
    for tensor, layout, shape in zip("AB", (parsed.a, parsed.b), shapes, strict=False):
        if len(shape) != len(layout.indices):
            raise ShapeError(
                f'shape {tuple(shape)} of {tensor} has {len(shape)} dimensions; "{layout}" has {len(layout.indices)}'
            )
        for name, size in zip(layout.names, shape, strict=True):
            if sizes.setdefault(name, int(size)) != size:
                raise ShapeError(
                    f'spec "{parsed}": index {name} is {sizes[name]} in A and {size} in B; they must agree'
                )
    return sizes


def bound_elements(m: int, n: int, k: int, n_ranks: int) -> float:
    """The fewest elements a rank must receive for any layout of one copy of A, B and C, whatever the algorithm.

    Al Daas, Ballard, Grigori, Kumar, Rouse, "Tight memory-independent parallel matrix multiplication communication
    lower bounds" (arXiv:2205.13407).
    """
    if min(m, n, k) == 0:
        return 0.0
    low, middle, high = sorted((m, n, k))
    if n_ranks <= high / middle:
        dominant = (high * middle + high * low) / n_ranks + middle * low
    elif n_ranks <= high * middle / low**2:
        dominant = 2 * math.sqrt(high * middle * low * low / n_ranks) + high * middle / n_ranks
    else:
        dominant = 3 * (m * n * k / n_ranks) ** (2 / 3)
    return max(0.0, dominant - (high * middle + high * low + middle * low) / n_ranks)


def steps(plan: Plan) -> list[str]:
    """What each rank does, one line per step, in order."""
    family, assignment = plan.family, plan.assignment
    lines = []
    for tensor, n_bytes in (("A", plan.bytes_a), ("B", plan.bytes_b)):
        layout = family.layouts[tensor]
        if n_bytes:
            needed = " ".join(
                f"{name}/{'*'.join(axes)}" if (axes := assignment.axes_of(name)) else name for name in layout.names
            )
            exact = set(assignment_axes(plan, tensor)) >= set(layout.axes)
            verb = "all-to-all" if exact else "all-gather"
            lines.append(f"{verb} {tensor}: {layout} -> {needed}")
    cut = " ".join(f"{n}/{'*'.join(axes)}" if (axes := assignment.axes_of(n)) else n for n in family.indices)
    lines.append(f"multiply: each rank computes the brick {cut}")
    if plan.bytes_c:
        layout = family.spec.c
        if plan.total_nodes == 1:
            lines.append(
                f"{'all-gather' if set(assignment_axes(plan, 'C')) - set(layout.axes) else 'all-to-all'} C: -> {layout}"
            )
        else:
            whole = plan.slice_index is not None
            verb = f"reduce-scatter along {plan.slice_index}, then all-gather" if whole else "reduce to the owners of"
            lines.append(f"{verb} C: {plan.total_nodes} partial sums in a fixed tree -> {layout}")
    return lines


def assignment_axes(plan: Plan, tensor: str) -> tuple[str, ...]:
    """The axes that cut a tensor in the computation."""
    return tuple(axis for name in plan.family.layouts[tensor].names for axis in plan.assignment.axes_of(name))


def known_as(plan: Plan) -> str:
    """The schedule's name in the literature."""
    a, b, c = (bool(n) for n in (plan.bytes_a, plan.bytes_b, plan.bytes_c))
    many = len([size for size in plan.family.sizes.values() if size > 1]) > 1
    names = {
        (False, False, False): "local",
        (True, False, False): "C and B stationary: all-gather A",
        (False, True, False): "C and A stationary: all-gather B",
        (True, True, False): "C stationary (SUMMA)" if many else "C stationary",
        (False, True, True): "A stationary (SUMMA)" if many else "A stationary",
        (True, False, True): "B stationary (SUMMA)" if many else "B stationary",
        (False, False, True): "partial sums reduced" if plan.total_nodes > 1 else "result gathered",
        (True, True, True): "all three move",
    }
    return names[a, b, c]


def describe(plan: Plan) -> str:
    """The text that `explain` returns."""
    family, sizes = plan.family, plan.sizes
    ranks = " x ".join(f"{axis}={size}" for axis, size in family.sizes.items()) or "one rank"
    schedule = Schedule(plan, 0)
    everything = family.all_plans([sizes[n] for n in family.indices], plan.itemsizes)
    product = {role: math.prod(sizes[n] for n in getattr(family.spec, role)) for role in ("batch", "m", "n", "k")}
    bound = bound_elements(product["m"], product["n"], product["k"], family.n_ranks) * product["batch"]
    per_rank = plan.bytes_total / family.n_ranks
    sized = ", ".join(f"{name}={size}" for name, size in sizes.items())
    stages = f"{schedule.n_stages} stage{'s' * (schedule.n_stages != 1)}"
    by_tensor = zip("ABC", (plan.bytes_a, plan.bytes_b, plan.bytes_c), strict=True)
    moved = ", ".join(f"{tensor} {_bytes(n / family.n_ranks)}" for tensor, n in by_tensor)
    least, most = (_bytes(p.bytes_total / family.n_ranks) for p in (everything[0], everything[-1]))
    largest = max(volume(plan.owned(t, 0)) * size for t, size in zip("ABC", plan.itemsizes[:3], strict=True))
    lines = [
        f"{family.spec}   on {ranks}   {sized}",
        f"  schedule    {known_as(plan)}, {stages}, order {family.order}",
        *(f"  step {i + 1}      {text}" for i, text in enumerate(steps(plan))),
        f"  bytes       {_bytes(per_rank)} sent per rank ({moved})",
        f"  least       {least} over {len(everything)} schedules of this spec; the dearest {most}",
        *_canonical_price(plan),
        f"  bound       {_bytes(bound * plan.itemsizes.a)} for any layout of one copy of A, B and C",
        f"  buffers     {_bytes(schedule.buffer_bytes)} of panels on rank 0; its largest share is {_bytes(largest)}",
    ]
    return "\n".join(lines)


def _canonical_price(plan: Plan) -> list[str]:
    """What the same product would send with the same bits on every number of ranks."""
    family = plan.family
    if family.order == "canonical":
        return []
    canonical = plan_family(family.spec, family.axes, tuple(family.sizes.values()), "canonical")
    n_bytes = canonical.plan([plan.sizes[name] for name in canonical.indices], plan.itemsizes).bytes_total
    return [f"  canonical   {_bytes(n_bytes / family.n_ranks)} sent per rank with order=canonical"]


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1024
    raise AssertionError
