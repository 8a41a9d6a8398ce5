"""The arguments of a call, checked on every rank and agreed between all of them before any payload moves.

Each rank writes its arguments into a header (shapes, types, order, alpha, beta, the spec's text), or the error that it
found. All ranks see all headers, so all come to the same verdict: the global sizes, or the same exception.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fivedp.comm.agreement import HEADER_BYTES, agreement_of
from fivedp.comm.grid import Group
from fivedp.errors import DTypeError, LayoutError, ShapeError
from fivedp.kernels._select import is_cupy
from fivedp.layout.shares import border, part_number
from fivedp.layout.spec import Layout

Array = Any
Found = TypeVar("Found")
MAX_DIMENSIONS = 6
DTYPES = tuple(
    np.dtype(t) for t in (np.float32, np.float64, ml_dtypes.bfloat16, np.float16, np.complex64, np.complex128)
)
ORDERS = ("tree", "canonical", "fast")
WIRES = ("sum", "same")
KINDS = ("numpy", "cupy")
_ERRORS: tuple[type[ValueError], ...] = (LayoutError, ShapeError, DTypeError)
_NO_ARRAY = 255

_FIXED = struct.Struct("<4sBBBBBBBBBBB1x4d18q")
_TEXT_BYTES = HEADER_BYTES - _FIXED.size
_NAMES = ("a", "b", "out")
_ATTENTION_NAMES = ("q", "k", "v")


@dataclass(frozen=True)
class Arguments:
    """What one rank was called with."""

    operation: str
    text: str
    shapes: tuple[tuple[int, ...] | None, ...]
    dtypes: tuple[str | None, ...]
    kind: str
    order: str
    wire: str
    alpha: complex
    beta: complex
    error: ValueError | None = None


OPERATIONS = (
    "sharded_matmul", "gather", "sequence_gather", "ring_attention", "ring_attention_backward", "ulysses_attention",
    "ulysses_attention_backward", "hybrid_attention", "hybrid_attention_backward", "decode_attention",
    "expert_dispatch", "expert_dispatch_backward", "expert_combine", "expert_combine_backward", "expert_layer",
    "expert_layer_backward", "route", "update_bias", "load_report",
)  # fmt: skip
# What the arrays of a header are called, where it is not a, b and out.
ARRAY_NAMES: dict[str, tuple[str, ...]] = {
    "expert_dispatch": ("x",), "expert_dispatch_backward": ("d_tokens",), "expert_combine": ("expert_out",),
    "expert_combine_backward": ("dy", "expert_out"), "expert_layer": ("x",), "expert_layer_backward": ("dy",),
    "route": ("logits", "bias"), "update_bias": ("bias", "counts"), "load_report": ("counts",),
}  # fmt: skip
ARRAY_NAMES |= {name: _ATTENTION_NAMES for name in OPERATIONS if "attention" in name}


def array_kind(array: Array, name: str, operation: str) -> str:
    """ "numpy" or "cupy".

    Raises
    ------
    DTypeError
        Where `array` is neither.
    """
    if isinstance(array, np.ndarray):
        return "numpy"
    if type(array).__module__.partition(".")[0] == "cupy":
        return "cupy"
    raise DTypeError(f"{operation}: `{name}` is a {type(array).__name__}; expected a NumPy or CuPy array")


def same_kind(operation: str, arrays: Mapping[str, Array | None]) -> str:
    """ "numpy" or "cupy", where all arrays (None for one that is not given) are of one kind.

    Raises
    ------
    DTypeError
        Where they are not, or one is neither.
    """
    kinds = {name: array_kind(array, name, operation) for name, array in arrays.items() if array is not None}
    first, kind = next(iter(kinds.items()))
    for name, other in kinds.items():
        if other != kind:
            raise DTypeError(
                f"{operation}: `{first}` is {kind} and `{name}` {other}; all arrays must be NumPy's or all CuPy's"
            )
    return kind


def check_dtype(array: Array, name: str, operation: str) -> str:
    """The name of an array's element type, where it is one that products take."""
    if array.dtype not in DTYPES or not array.dtype.isnative:
        raise DTypeError(
            f"{operation}: `{name}` has dtype {array.dtype}; expected one of {', '.join(str(t) for t in DTYPES)}"
        )
    if array.dtype == np.float16 and isinstance(array, np.ndarray):
        raise DTypeError(f"{operation}: `{name}` has dtype float16, which is for CuPy arrays; use bfloat16 or float32")
    return str(array.dtype)


def pack(arguments: Arguments) -> bytes:
    """The header of one rank."""
    shapes = [0] * (3 * MAX_DIMENSIONS)
    dims = [_NO_ARRAY] * 3
    for i, shape in enumerate(arguments.shapes):
        if shape is not None:
            dims[i] = len(shape)
            shapes[i * MAX_DIMENSIONS : i * MAX_DIMENSIONS + len(shape)] = shape
    dtypes = [_NO_ARRAY] * 3
    for i, dtype in enumerate(arguments.dtypes):
        if dtype is not None:
            dtypes[i] = DTYPES.index(np.dtype(dtype))
    status, text = 0, arguments.text
    if arguments.error is not None:
        status = 1 + next((i for i, kind in enumerate(_ERRORS) if isinstance(arguments.error, kind)), 0)
        text = str(arguments.error)
    fixed = _FIXED.pack(
        b"5dp1",
        status,
        OPERATIONS.index(arguments.operation),
        ORDERS.index(arguments.order),
        WIRES.index(arguments.wire),
        KINDS.index(arguments.kind),
        *dims,
        *dtypes,
        complex(arguments.alpha).real,
        complex(arguments.alpha).imag,
        complex(arguments.beta).real,
        complex(arguments.beta).imag,
        *shapes,
    )
    return fixed + text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")


def unpack(header: bytes) -> Arguments:
    """The arguments that a header states."""
    _, status, operation, order, wire, kind, *rest = _FIXED.unpack_from(header)
    dims, dtypes, numbers, sizes = rest[:3], rest[3:6], rest[6:10], rest[10:]
    text = header[_FIXED.size :].rstrip(b"\0").decode(errors="replace")
    error = _ERRORS[status - 1](text) if status else None
    return Arguments(
        operation=OPERATIONS[operation],
        text=text,
        shapes=tuple(
            None if n == _NO_ARRAY else tuple(sizes[i * MAX_DIMENSIONS : i * MAX_DIMENSIONS + n])
            for i, n in enumerate(dims)
        ),
        dtypes=tuple(None if n == _NO_ARRAY else str(DTYPES[n]) for n in dtypes),
        kind=KINDS[kind],
        order=ORDERS[order],
        wire=WIRES[wire],
        alpha=complex(numbers[0], numbers[1]),
        beta=complex(numbers[2], numbers[3]),
        error=error,
    )


def checked(check: Callable[[], Found]) -> tuple[Found | None, ValueError | None]:
    """What a check of this rank's arguments gives, or the error that it raised: other ranks must hear of it first."""
    try:
        return check(), None
    except ValueError as error:
        return None, error


def agree_on(
    operation: str, group: Group, text: str, arrays: Sequence[Array | None], error: ValueError | None
) -> tuple[str, list[Arguments]]:
    """What this rank called, for messages, and the arguments of every member; or the exception that all raise.

    For calls whose arrays have no spec: up to three arrays (None for one that is not given), with `text` for all that
    must be the same on every rank. Of integers the type is not compared. Collective over the group.
    """
    shapes: list[tuple[int, ...] | None] = [None] * 3
    dtypes: list[str | None] = [None] * 3
    for i, array in enumerate(arrays if error is None else ()):
        if array is not None:
            shapes[i] = tuple(array.shape)
            dtypes[i] = None if array.dtype.kind in "iu" else str(array.dtype)
    what = f"called {operation} with {text}"
    kind = "cupy" if any(map(is_cupy, arrays)) else "numpy"
    mine = Arguments(operation, text, tuple(shapes), tuple(dtypes), kind, "tree", "sum", 1.0, 0.0, error)
    headers = agreement_of(group).exchange(pack(mine), what)
    verdict(headers, (), *group.numbering)
    return what, [unpack(row.tobytes()) for row in headers]


def verdict(
    headers: npt.NDArray[np.uint8], layouts: Sequence[Layout], axes: dict[str, int], coords: list[dict[str, int]]
) -> dict[str, int]:
    """The global size of every index, or the exception that all ranks raise.

    Parameters
    ----------
    headers : uint8 array, (ranks, HEADER_BYTES)
    layouts : sequence of Layout
        The layouts of the arrays, in the order of the header.
    axes : dict of str to int
        Sizes of the named axes.
    coords : list of dict
        Coordinates of every rank of the group.

    Raises
    ------
    LayoutError, ShapeError, DTypeError
        Where the ranks were called differently, or their shares are not those of one global array.
    """
    same = headers[:, : _FIXED.size - 8 * 3 * MAX_DIMENSIONS]
    shapes_start = _FIXED.size - 8 * 3 * MAX_DIMENSIONS
    text = headers[:, _FIXED.size :]
    if not ((same == same[0]).all() and (text == text[0]).all()) or headers[0, 4]:
        _raise_difference([unpack(row.tobytes()) for row in headers])
    shapes = np.ascontiguousarray(headers[:, shapes_start : _FIXED.size]).view(np.int64)
    sizes: dict[str, int] = {}
    for i, layout in enumerate(layouts):
        for place, index in enumerate(layout.indices):
            lengths = shapes[:, i * MAX_DIMENSIONS + place].tolist()
            numbers = [part_number(index.axes, axes, coord) for coord in coords]
            parts = numbers[0][0]
            total = sum(lengths) * parts // len(lengths)
            expected = [border(total, parts, part + 1) - border(total, parts, part) for _, part in numbers]
            if lengths != expected or sizes.setdefault(index.name, total) != total:
                _raise_shapes(shapes, layouts, axes, coords, unpack(headers[0].tobytes()).operation)
    return sizes


def _raise_difference(ranks: list[Arguments]) -> NoReturn:
    """Raise for arguments that differ between ranks, or that some rank could not accept."""
    failed = [(rank, x.error) for rank, x in enumerate(ranks) if x.error is not None]
    if failed:
        rank, error = failed[0]
        everyone = len(failed) == len(ranks) and len({str(e) for _, e in failed}) == 1
        raise type(error)(str(error) if everyone else f"{error} (rank {rank})")
    first = ranks[0]
    name = first.operation
    arrays = ARRAY_NAMES.get(name, _NAMES)

    def differs(what: str, of: Callable[[Arguments], Any], kind: type[ValueError], right: str) -> None:
        values = [of(x) for x in ranks]
        if any(value != values[0] for value in values):
            # The odd one out is the rank whose value the fewest share.
            counts = [sum(value == other for other in values) for value in values]
            odd = (
                counts.index(min(counts))
                if min(counts) < max(counts)
                else next(i for i, v in enumerate(values) if v != values[0])
            )
            usual = values[counts.index(max(counts))] if min(counts) < max(counts) else values[0]
            other = values.index(usual)
            raise kind(f"{name}: {what} is {values[odd]} on rank {odd} and {usual} on rank {other}; {right}")

    differs("the operation", lambda x: x.operation, LayoutError, "all ranks must call the same")
    text = "the keywords" if name in ARRAY_NAMES else "the spec"
    differs(text, lambda x: f'"{x.text}"', LayoutError, f"all ranks must give the same {text.removeprefix('the ')}")
    differs("the kind of arrays", lambda x: x.kind, DTypeError, "all ranks must give NumPy arrays or all CuPy arrays")
    for i, array in enumerate(arrays):
        differs(f"the dtype of `{array}`", lambda x, i=i: x.dtypes[i], DTypeError, "it must be the same on all ranks")  # type: ignore[misc]
        differs(
            f"the number of dimensions of `{array}`",
            lambda x, i=i: None if x.shapes[i] is None else len(x.shapes[i]),  # type: ignore[misc]
            ShapeError,
            "it must be the same on all ranks",
        )
    differs("order", lambda x: x.order, LayoutError, "it must be the same on all ranks")
    differs("wire", lambda x: x.wire, LayoutError, "it must be the same on all ranks")
    differs("alpha", lambda x: x.alpha, LayoutError, "it must be the same on all ranks")
    differs("beta", lambda x: x.beta, LayoutError, "it must be the same on all ranks")
    raise LayoutError(f"{name}: the ranks were called with different arguments")


def _raise_shapes(
    shapes: npt.NDArray[np.int64],
    layouts: Sequence[Layout],
    axes: dict[str, int],
    coords: list[dict[str, int]],
    operation: str,
) -> NoReturn:
    """Raise for shares that are not the block rule's, or sizes that differ between arrays."""
    found: dict[str, tuple[int, str, int]] = {}
    for i, layout in enumerate(layouts):
        for place, index in enumerate(layout.indices):
            lengths = shapes[:, i * MAX_DIMENSIONS + place].tolist()
            by_part: dict[int, list[int]] = {}
            for rank, coord in enumerate(coords):
                by_part.setdefault(part_number(index.axes, axes, coord)[1], []).append(rank)
            where = f"{operation}: index {index.name} of `{_NAMES[i]}`"
            for ranks in by_part.values():
                odd = next((r for r in ranks if lengths[r] != lengths[ranks[0]]), None)
                if odd is not None:
                    raise ShapeError(
                        f"{where} is {lengths[ranks[0]]} on rank {ranks[0]} and {lengths[odd]} on rank {odd}; "
                        f"by {index} they hold the same share"
                    )
            parts = len(by_part)
            total = sum(lengths[by_part[part][0]] for part in range(parts))
            for part in range(parts):
                rank = by_part[part][0]
                expected = border(total, parts, part + 1) - border(total, parts, part)
                if lengths[rank] != expected:
                    raise ShapeError(
                        f"{where} is {lengths[rank]} on rank {rank}, a share of {total} over {index}; "
                        f"the block rule (numpy.array_split) gives that rank {expected}"
                    )
            if index.name in found and found[index.name][0] != total:
                other, array, rank = found[index.name]
                raise ShapeError(
                    f"{operation}: index {index.name} is {other} in `{array}` and {total} in `{_NAMES[i]}` "
                    f"(rank {by_part[0][0]}); they must agree"
                )
            found.setdefault(index.name, (total, _NAMES[i], by_part[0][0]))
    raise ShapeError(f"{operation}: the shapes of the shares do not fit the spec")
