"""One rank's part of a product, on arrays of any number of dimensions in any order.

The kernel multiplies (batch, m, k) by (batch, k, n), with operands given as pieces along k. Here the dimensions of a
spec are brought to these four groups: as views where strides allow, else by a loop over the outermost dimension that
does not fold. Nothing is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fivedp.kernels.gemm import gemm, tree_sum
from fivedp.layout.shares import Box, local_slices
from fivedp.layout.spec import ProductSpec

Array = Any
Part = tuple[Box, Array]


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
        tree = spec.tree_indices
        self.k = tree + tuple(name for name in spec.k if name not in tree)
        self.leaf_borders, self.k_ranges = leaf_borders, k_ranges
        self._a_order = [spec.a.names.index(name) for name in spec.batch + spec.m + self.k if name in spec.a.names]
        self._b_order = [spec.b.names.index(name) for name in spec.batch + self.k + spec.n]
        self._c_order = [spec.c.names.index(name) for name in spec.batch + spec.m + spec.n]
        # A result whose last dimension is one of m is computed transposed, so that the kernel writes along rows.
        self.transposed = bool(spec.c.names) and spec.c.names[-1] in spec.m

    def leaves(self, span: tuple[int, int]) -> list[dict[str, tuple[int, int]]]:
        """The ranges of the summed indices in each leaf of a subtree, in order."""
        counts = [len(self.leaf_borders[name]) - 1 for name in self.spec.tree_indices]
        found = []
        for leaf in range(span[0], span[0] + span[1]):
            ranges, rest = dict(self.k_ranges), leaf
            for name, count in reversed(list(zip(self.spec.tree_indices, counts, strict=True))):
                rest, place = divmod(rest, count)
                ranges[name] = (self.leaf_borders[name][place], self.leaf_borders[name][place + 1])
            found.append(ranges)
        return found

    def multiply(
        self,
        a_parts: Sequence[Part],
        b_parts: Sequence[Part],
        c: Array,
        span: tuple[int, int],
        *,
        alpha: complex = 1.0,
        beta: complex = 0.0,
        progress: Callable[[], object] | None = None,
    ) -> None:
        """c = alpha * (sum over the leaves of `span`) + beta * c.

        Parameters
        ----------
        a_parts, b_parts : list of (box, array)
            Parts of the operands, in the order of the spec's dimensions, that differ in summed indices only.
        c : array
            The box of C to write, in the order of the spec's dimensions.
        span : (int, int)
            First leaf and number of leaves.
        """
        spec = self.spec
        leaves = self.leaves(span)
        cuts = [0]
        for leaf in leaves:
            size = 1
            for name in self.k:
                size *= max(0, leaf[name][1] - leaf[name][0])
            cuts.append(cuts[-1] + size)
        a_pieces = [
            view for leaf in self._blocks(leaves) for view in self._pieces(a_parts, spec.a.names, leaf, self._a_order)
        ]
        b_pieces = [
            view for leaf in self._blocks(leaves) for view in self._pieces(b_parts, spec.b.names, leaf, self._b_order)
        ]
        c_view = c.transpose(self._c_order)
        if not a_pieces:  # nothing to sum: K is 0, or this rank's leaves are empty
            c[...] = c * np.asarray(beta, dtype=c.dtype) if beta else 0
            return
        self._run(a_pieces, b_pieces, c_view, cuts, alpha, beta, progress)

    def _blocks(self, leaves: list[dict[str, tuple[int, int]]]) -> list[dict[str, tuple[int, int]]]:
        """Neighbouring leaves as one block where only the first tree index differs: fewer, longer pieces."""
        if len(self.spec.tree_indices) > 1 or not leaves:
            return leaves
        name = self.spec.tree_indices[0]
        return [{**leaves[0], name: (leaves[0][name][0], leaves[-1][name][1])}]

    def _pieces(
        self, parts: Sequence[Part], names: tuple[str, ...], block: dict[str, tuple[int, int]], order: list[int]
    ) -> list[Array]:
        """Views of the parts within a block of the summed indices, k folded to one dimension, in order."""
        found: list[Array] = []
        first = names.index(self.k[0])
        cut_elsewhere = any(len({box[names.index(name)] for box, _ in parts}) > 1 for name in self.k[1:])
        low, high = block[self.k[0]]
        steps = [(i, i + 1) for i in range(low, high)] if cut_elsewhere else [(low, high)]
        for step in steps:
            ranges = {**block, self.k[0]: step}
            chosen = []
            for box, array in parts:
                window = tuple(ranges.get(name, extent) for name, extent in zip(names, box, strict=True))
                inner = _cut_to(window, box, names, self.k)
                if inner is not None:
                    chosen.append((inner, array[local_slices(inner, box)]))
            chosen.sort(key=lambda part: [part[0][names.index(name)] for name in self.k])
            for _, view in chosen:
                found += self._fold_k(view.transpose(order), names, order, first)
        return found

    def _fold_k(self, view: Array, names: tuple[str, ...], order: list[int], first: int) -> list[Array]:
        n_k = len(self.k)
        if n_k == 1:
            return [view]
        start = order.index(first)
        groups = [1] * start + [n_k] + [1] * (view.ndim - start - n_k)
        folded = fold(view, groups)
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
