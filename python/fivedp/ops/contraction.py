"""One rank's part of a product, on arrays of any number of dimensions in any order.

The kernel multiplies (batch, m, k) by (batch, k, n), with operands given as pieces along k. Here the dimensions of a
spec are brought to these four groups: as views where strides allow, else by a loop over the outermost dimension that
does not fold. Nothing is copied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fivedp.kernels.gemm import gemm, tree_sum
from fivedp.layout.shares import Box, local_slices
from fivedp.layout.spec import ProductSpec

Array = Any
Step = tuple[int, tuple[slice, ...] | None]


def fold(view: Array, groups: Sequence[int]) -> Array | None:
    """View dimensions as groups of `groups[i]` neighbouring dimensions each; None where that would need a copy."""
    if all(group == 1 for group in groups):
        return view
    shape, place = [], 0
    for group in groups:
        dims = list(zip(view.shape[place : place + group], view.strides[place : place + group], strict=True))
        place += group
        size = 1
        for n, _ in dims:
            size *= n
        shape.append(size)
        dims = [(n, s) for n, s in dims if n != 1]
        if size and any(outer[1] != inner[0] * inner[1] for outer, inner in itertools.pairwise(dims)):
            return None
    return view.reshape(shape)


class Recipe(NamedTuple):
    """Which views of which parts make up the operands of one product, and where its virtual shards end."""

    a: list[Step]
    b: list[Step]
    cuts: list[int]


class Contraction:
    """The arithmetic of one spec on one rank.

    Parameters
    ----------
    spec : ProductSpec
    leaf_borders : dict of str to list of int
        For each summed index that carries virtual shards: the global positions of their borders.
    k_ranges : dict of str to (int, int)
        The range of each summed index that this rank computes.
    """

    def __init__(
        self, spec: ProductSpec, leaf_borders: dict[str, list[int]], k_ranges: dict[str, tuple[int, int]]
    ) -> None:
        self.spec = spec
        self.tree = spec.tree_indices
        self.k = self.tree + tuple(name for name in spec.k if name not in self.tree)
        self.leaf_borders, self.k_ranges = leaf_borders, k_ranges
        self._a_order = _order(spec.a.names, spec.batch + spec.m + self.k)
        self._b_order = _order(spec.b.names, spec.batch + self.k + spec.n)
        self._c_order = _order(spec.c.names, spec.batch + spec.m + spec.n)
        # A result whose last dimension is one of m is computed transposed, so that the kernel writes along rows.
        self.transposed = bool(spec.c.names) and spec.c.names[-1] in spec.m
        self.plain = (len(spec.batch), len(spec.m), len(spec.n), len(self.k)) == (0, 1, 1, 1)
        self._recipes: dict[object, Recipe] = {}

    def recipe(
        self, a_boxes: tuple[Box, ...], a_panel: Box, b_boxes: tuple[Box, ...], b_panel: Box, span: tuple[int, int]
    ) -> Recipe:
        """What to multiply for the leaves of `span`; worked out once for given boxes.

        Parameters
        ----------
        a_boxes, b_boxes : tuple of Box
            The boxes of the arrays at hand, in the order of the spec's dimensions.
        a_panel, b_panel : Box
            The boxes to read; within them the arrays may differ in summed indices only.
        span : (int, int)
            First leaf and number of leaves.
        """
        key = (a_boxes, a_panel, b_boxes, b_panel, span)
        recipe = self._recipes.get(key)
        if recipe is None:
            leaves = self._leaves(span)
            cuts = [0]
            for leaf in leaves:
                cuts.append(cuts[-1] + math.prod(max(0, leaf[name][1] - leaf[name][0]) for name in self.k))
            blocks = self._blocks(leaves)
            a_steps = [step for block in blocks for step in self._steps(a_boxes, a_panel, self.spec.a.names, block)]
            b_steps = [step for block in blocks for step in self._steps(b_boxes, b_panel, self.spec.b.names, block)]
            recipe = self._recipes[key] = Recipe(a_steps, b_steps, cuts)
        return recipe

    def _leaves(self, span: tuple[int, int]) -> list[dict[str, tuple[int, int]]]:
        """The ranges of the summed indices in each leaf of a subtree, in order."""
        counts = [len(self.leaf_borders[name]) - 1 for name in self.tree]
        found = []
        for leaf in range(span[0], span[0] + span[1]):
            ranges, rest = dict(self.k_ranges), leaf
            for name, count in reversed(list(zip(self.tree, counts, strict=True))):
                rest, place = divmod(rest, count)
                ranges[name] = (self.leaf_borders[name][place], self.leaf_borders[name][place + 1])
            found.append(ranges)
        return found

    def _blocks(self, leaves: list[dict[str, tuple[int, int]]]) -> list[dict[str, tuple[int, int]]]:
        """Neighbouring leaves as one block where only the first tree index differs: fewer, longer pieces."""
        if len(self.tree) > 1 or not leaves:
            return leaves
        name = self.tree[0]
        return [{**leaves[0], name: (leaves[0][name][0], leaves[-1][name][1])}]

    def _steps(
        self, boxes: Sequence[Box], panel: Box, names: tuple[str, ...], block: dict[str, tuple[int, int]]
    ) -> list[Step]:
        """(array, slices) of every piece of a block of the summed indices, in the order of the sum."""
        found: list[Step] = []
        # Arrays that differ in an inner summed index take turns at every position of the indices outside it.
        differ = [len({box[names.index(name)] for box in boxes}) > 1 for name in self.k]
        outer = self.k[: max((place for place, different in enumerate(differ) if different), default=0)]
        for position in itertools.product(*(range(*block[name]) for name in outer)):
            ranges = {**block, **{name: (i, i + 1) for name, i in zip(outer, position, strict=True)}}
            window = tuple(ranges.get(name, extent) for name, extent in zip(names, panel, strict=True))
            chosen = []
            for number, box in enumerate(boxes):
                inner = _cut_to(window, box, names, self.k)
                if inner is not None:
                    chosen.append((inner, number, None if inner == box else local_slices(inner, box)))
            chosen.sort(key=lambda part: [part[0][names.index(name)] for name in self.k])
            found += [(number, slices) for _, number, slices in chosen]
        return found

    def multiply(
        self,
        recipe: Recipe,
        a_arrays: Sequence[Array],
        b_arrays: Sequence[Array],
        c: Array,
        *,
        alpha: complex = 1.0,
        beta: complex = 0.0,
        progress: Callable[[], object] | None = None,
    ) -> None:
        """c = alpha * (sum over the recipe's leaves) + beta * c.

        Parameters
        ----------
        a_arrays, b_arrays : sequence of array
            The arrays of the recipe's boxes.
        c : array
            The box of C to write, in the order of the spec's dimensions.
        """
        if not recipe.a:  # nothing to sum: K is 0, or this rank's leaves are empty
            c[...] = c * c.dtype.type(beta) if beta else 0
            return
        a = [a_arrays[number] if slices is None else a_arrays[number][slices] for number, slices in recipe.a]
        b = [b_arrays[number] if slices is None else b_arrays[number][slices] for number, slices in recipe.b]
        if self._a_order is not None:
            a = [view.transpose(self._a_order) for view in a]
        if self._b_order is not None:
            b = [view.transpose(self._b_order) for view in b]
        if self._c_order is not None:
            c = c.transpose(self._c_order)
        if self.plain:
            if self.transposed:
                a, b, c = [view.T for view in b], [view.T for view in a], c.T
            gemm(a, b, c, cuts=recipe.cuts, alpha=alpha, beta=beta, progress=progress)
            return
        if len(self.k) > 1:
            n_batch, n_m = len(self.spec.batch), len(self.spec.m)
            a = [piece for view in a for piece in self._fold_k(view, n_batch + n_m)]
            b = [piece for view in b for piece in self._fold_k(view, n_batch)]
        self._run(a, b, c, recipe.cuts, alpha, beta, progress)

    def _fold_k(self, view: Array, start: int) -> list[Array]:
        """Pieces of a view whose summed dimensions begin at `start`, each with one summed dimension."""
        n_k = len(self.k)
        folded = fold(view, [1] * start + [n_k] + [1] * (view.ndim - start - n_k))
        if folded is not None:
            return [folded]
        # The outermost summed dimension does not fold into the others: one piece for each of its positions.
        pieces = [view]
        for _ in range(n_k - 1):
            pieces = [piece[(slice(None),) * start + (i,)] for piece in pieces for i in range(piece.shape[start])]
        return pieces

    def _run(
        self,
        a: list[Array],
        b: list[Array],
        c: Array,
        cuts: list[int],
        alpha: complex,
        beta: complex,
        progress: Callable[[], object] | None,
    ) -> None:
        n_batch, n_m, n_n = len(self.spec.batch), len(self.spec.m), len(self.spec.n)
        a_folded: list[Any] = [fold_or_insert(view, [n_batch, n_m, 1]) for view in a]
        b_folded: list[Any] = [fold_or_insert(view, [n_batch, 1, n_n]) for view in b]
        c_folded: Any = fold_or_insert(c, [n_batch, n_m, n_n])
        if any(view is None for view in (*a_folded, *b_folded, c_folded)):
            self._loop(a, b, c, cuts, alpha, beta, progress)
            return
        if n_batch == 0:
            a_folded, b_folded, c_folded = [v[0] for v in a_folded], [v[0] for v in b_folded], c_folded[0]
        if self.transposed:
            a_folded, b_folded = [v.swapaxes(-1, -2) for v in b_folded], [v.swapaxes(-1, -2) for v in a_folded]
            c_folded = c_folded.swapaxes(-1, -2)
        gemm(a_folded, b_folded, c_folded, cuts=cuts, alpha=alpha, beta=beta, progress=progress)

    def _loop(
        self,
        a: list[Array],
        b: list[Array],
        c: Array,
        cuts: list[int],
        alpha: complex,
        beta: complex,
        progress: Callable[[], object] | None,
    ) -> None:
        """Take the outermost dimension of the first group that has several, and multiply for each of its positions."""
        spec = self.spec
        groups = [("batch", spec.batch), ("m", spec.m), ("n", spec.n)]
        role, name = next((role, names[0]) for role, names in groups if len(names) > 1)
        smaller = Contraction(_without(spec, name), self.leaf_borders, self.k_ranges)
        smaller.transposed = self.transposed
        place_c = {"batch": 0, "m": len(spec.batch), "n": len(spec.batch) + len(spec.m)}[role]
        for i in range(c.shape[place_c]):
            a_i = [v[(slice(None),) * place_c + (i,)] for v in a] if role != "n" else a
            place_b = {"batch": 0, "n": len(spec.batch) + 1}.get(role)
            b_i = [v[(slice(None),) * place_b + (i,)] for v in b] if place_b is not None else b
            smaller._run(a_i, b_i, c[(slice(None),) * place_c + (i,)], cuts, alpha, beta, progress)


def _order(names: tuple[str, ...], wanted: tuple[str, ...]) -> list[int] | None:
    """The permutation that brings dimensions `names` into the order `wanted`; None where they are in it."""
    order = [names.index(name) for name in wanted if name in names]
    return None if order == list(range(len(order))) else order


def _without(spec: ProductSpec, name: str) -> ProductSpec:
    """The spec whose role tuples lack `name`; only their lengths are used from here on."""
    drop = {role: tuple(n for n in getattr(spec, role) if n != name) for role in ("batch", "m", "n")}
    return ProductSpec(spec.a, spec.b, spec.c, drop["batch"], drop["m"], drop["n"], spec.k)


def _cut_to(window: Box, box: Box, names: tuple[str, ...], k: tuple[str, ...]) -> Box | None:
    """`window` cut to `box`; None where nothing of the summed indices is left (other dimensions may be empty)."""
    cut = tuple((max(w[0], x[0]), min(w[1], x[1])) for w, x in zip(window, box, strict=True))
    return cut if all(cut[names.index(name)][0] < cut[names.index(name)][1] for name in k) else None


def fold_or_insert(view: Array, groups: Sequence[int]) -> Array | None:
    """`fold`, with a dimension of size 1 inserted for every group that has no dimension."""
    place = 0
    for group in groups:
        if group == 0:
            view = view[(slice(None),) * place + (None,)]
            place += 1
        else:
            place += group
    return fold(view, [group or 1 for group in groups])


def add_tree(
    partials: list[Array], spans: list[tuple[int, int]], out: Array, *, alpha: complex = 1.0, beta: complex = 0.0
) -> None:
    """`kernels.gemm.tree_sum` on arrays of any number of dimensions."""
    if out.ndim > 3:
        for i in range(out.shape[0]):
            add_tree([partial[i] for partial in partials], spans, out[i], alpha=alpha, beta=beta)
    elif out.ndim < 2:
        shape = (1,) * (2 - out.ndim)
        new = (None,) * len(shape)
        tree_sum([partial[new] for partial in partials], spans, out[new], alpha=alpha, beta=beta)
    else:
        tree_sum(partials, spans, out, alpha=alpha, beta=beta)
