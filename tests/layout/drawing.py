"""Random products for the tests of the planner: contract specs and drawn ones, meshes of up to 8 ranks, sizes."""

from __future__ import annotations

import random
from collections.abc import Iterator

from fivedp.layout.plan import ItemSizes, PlanFamily, plan_family
from fivedp.layout.spec import parse_product

CONTRACT = (
    "m k, k n/tp -> m n/tp",
    "m k, k n/tp -> m n",
    "m k/tp, k/tp n -> m n",
    "m k/tp, k/tp n -> m/tp n",
    "m/tp k, k n/tp -> m n/tp",
    "m/p k, k/p n -> m/p n",
    "m/r k/c, k/r n/c -> m/r n/c",
    "m/r k/c*d, k/r*d n/c -> m/r n/c",
    "b/dp m k, k n/tp -> b/dp m n/tp",
)
ITEMS = (
    ItemSizes(4, 4, 4, 4, 4),
    ItemSizes(8, 8, 8, 8, 8),
    ItemSizes(2, 2, 2, 4, 2),
    ItemSizes(2, 2, 4, 4, 4),
    ItemSizes(2, 2, 2, 2, 2),
)


def draw_spec(rng: random.Random, axes: tuple[str, ...]) -> str:
    """A product of three to five indices; every axis cuts at most one index of each array."""
    roles = {
        "k": rng.choice((1, 1, 2)),
        "m": rng.choice((0, 1, 1)),
        "n": rng.choice((1, 1, 2)),
        "b": rng.choice((0, 1)),
    }
    texts = []
    for members in ("bmk", "bkn", "bmn"):
        names = [f"{role}{i}" for role in members for i in range(roles[role])]
        rng.shuffle(names)
        cuts: dict[str, list[str]] = {name: [] for name in names}
        for axis in rng.sample(axes, len(axes)):
            if rng.random() < 0.75:
                cuts[rng.choice(names)].append(axis)
        texts.append(" ".join(f"{name}/{'*'.join(cut)}" if cut else name for name, cut in cuts.items()))
    return f"{texts[0]}, {texts[1]} -> {texts[2]}"


def families(rng: random.Random, number: int) -> Iterator[PlanFamily]:
    """Specs on meshes, in every order of summation."""
    for turn in range(number):
        if turn % 2 == 0:
            text = CONTRACT[turn // 2 % len(CONTRACT)]
        else:
            text = draw_spec(rng, ("x", "y")[: rng.choice((1, 1, 2, 2))])
        spec = parse_product(text)
        while True:
            sizes = tuple(rng.choice((1, 2, 2, 3, 4, 5, 6, 7, 8)) for _ in spec.axes)
            n_ranks = 1
            for size in sizes:
                n_ranks *= size
            if n_ranks <= 8:
                break
        yield plan_family(spec, spec.axes, sizes, rng.choice(("tree", "canonical", "fast")))


def draw_sizes(rng: random.Random, family: PlanFamily, most: int) -> list[int]:
    """A size per index: mostly anything, now and then nothing."""
    return [0 if rng.random() < 0.02 else rng.randint(1, most) for _ in family.indices]
