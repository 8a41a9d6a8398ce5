"""The grammar of specs: "m/r k/c, k/r n/c -> m/r n/c".

An index is a word; after a slash stand the mesh axes that cut it, joined by `*`, the first varying slowest.
Two operands and a result make a product. The role of an index follows from where it stands, as in einsum:

    batch in A, B and C      m in A and C      n in B and C      k in A and B (summed)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from fivedp.errors import LayoutError

_INDEX = re.compile(r"([A-Za-z_]\w*)(?:/([A-Za-z_]\w*(?:\*[A-Za-z_]\w*)*))?")


@dataclass(frozen=True)
class Index:
    """One dimension of an array: its name and the mesh axes that cut it (empty: whole on every rank)."""

    name: str
    axes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}/{'*'.join(self.axes)}" if self.axes else self.name


@dataclass(frozen=True)
class Layout:
    """How one array is cut: its indices in the order of its dimensions."""

    indices: tuple[Index, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The index names, one per dimension."""
        return tuple(index.name for index in self.indices)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Every mesh axis that cuts some index, in the order of the text."""
        return tuple(axis for index in self.indices for axis in index.axes)

    def cut_of(self, name: str) -> tuple[str, ...]:
        """The axes that cut index `name`; empty where it is whole or absent."""
        return self._cuts.get(name, ())

    @cached_property
    def _cuts(self) -> dict[str, tuple[str, ...]]:
        return {index.name: index.axes for index in self.indices}

    def __str__(self) -> str:
        return " ".join(map(str, self.indices))


@dataclass(frozen=True)
class ProductSpec:
    """A parsed product. `a`, `b`, `c` are the layouts; `batch`, `m`, `n`, `k` the index names by role."""

    a: Layout
    b: Layout
    c: Layout
    batch: tuple[str, ...]
    m: tuple[str, ...]
    n: tuple[str, ...]
    k: tuple[str, ...]

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Every mesh axis the spec names, each once, in the order of the text."""
        return tuple(dict.fromkeys(self.a.axes + self.b.axes + self.c.axes))

    @cached_property
    def tree_indices(self) -> tuple[str, ...]:
        """The summed indices that carry virtual shards: those with a slash anywhere, else the first."""
        cut = tuple(name for name in self.k if self.a.cut_of(name) or self.b.cut_of(name))
        return cut or self.k[:1]

    def __str__(self) -> str:
        return f"{self.a}, {self.b} -> {self.c}"

    def backward(self) -> tuple[ProductSpec, ProductSpec]:
        """The specs of dA from (dC, B) and of dB from (A, dC): the gradient of a product is two more products."""
        spec_a, spec_b = self.backward_texts()
        return parse_product(spec_a), parse_product(spec_b)

    def backward_texts(self) -> tuple[str, str]:
        """The texts of `backward`; the gradient of a matrix-vector product sums nothing, and is no product."""
        return f"{self.c}, {self.b} -> {self.a}", f"{self.a}, {self.c} -> {self.b}"


def parse_layout(text: str) -> Layout:
    """Read the layout of one array, such as "m/r k/c" or "b/dp*sp m k".

    Raises
    ------
    LayoutError
        Where a word is no index, an index stands twice, or one axis cuts two dimensions.
    """
    if not isinstance(text, str):
        raise LayoutError(f"layout must be a text such as 'm/r k/c', got {type(text).__name__}")
    return _parse_layout(text)


@lru_cache(maxsize=4096)
def _parse_layout(text: str) -> Layout:
    indices = []
    for word in text.split():
        match = _INDEX.fullmatch(word)
        if match is None:
            raise LayoutError(f'layout "{text}": "{word}" is no index; write a name such as k, k/tp or k/c*d')
        indices.append(Index(match[1], tuple(match[2].split("*")) if match[2] else ()))
    layout = Layout(tuple(indices))
    if not indices:
        raise LayoutError(f'layout "{text}": it names no index; write one per dimension, such as "m/r k/c"')
    for name in layout.names:
        if layout.names.count(name) > 1:
            raise LayoutError(f'layout "{text}": index {name} stands twice; every dimension needs its own name')
    for axis in layout.axes:
        if layout.axes.count(axis) > 1:
            cut = " and ".join(str(index) for index in indices if axis in index.axes)
            raise LayoutError(
                f'layout "{text}": axis {axis} cuts {cut}; one axis can cut one dimension of an array once'
            )
    return layout


def parse_product(text: str) -> ProductSpec:
    """Read a product such as "m k/tp, k/tp n -> m n".

    Raises
    ------
    LayoutError
        Where the text is no product of two operands, or an index stands in one array only.
    """
    if not isinstance(text, str):
        raise LayoutError(f"spec must be a text such as 'm k/tp, k/tp n -> m n', got {type(text).__name__}")
    return _parse_product(text)


@lru_cache(maxsize=4096)
def _parse_product(text: str) -> ProductSpec:
    sides = text.split("->")
    operands = sides[0].split(",")
    if len(sides) != 2 or len(operands) != 2:
        raise LayoutError(f'spec "{text}": expected two operands and a result, as in "m k/tp, k/tp n -> m n"')
    try:
        a, b, c = (parse_layout(part) for part in (*operands, sides[1]))
    except LayoutError as error:
        raise LayoutError(f'spec "{text}": {error}') from None

    roles: dict[str, list[str]] = {"batch": [], "m": [], "n": [], "k": []}
    for name in dict.fromkeys(a.names + b.names + c.names):
        places = tuple(name in layout.names for layout in (a, b, c))
        role = {
            (True, True, True): "batch",
            (True, False, True): "m",
            (False, True, True): "n",
            (True, True, False): "k",
        }
        if places not in role:
            only = "ABC"[places.index(True)]
            raise LayoutError(f'spec "{text}": index {name} stands in {only} only; it must stand in two of A, B and C')
        roles[role[places]].append(name)
    if not roles["k"]:
        raise LayoutError(f'spec "{text}": no index is summed; A and B must share one that C does not have')
    return ProductSpec(a, b, c, *(tuple(roles[role]) for role in ("batch", "m", "n", "k")))
