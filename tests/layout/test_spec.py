"""The grammar of specs: what is read, which role an index gets, and what is said about what can't be read."""

from __future__ import annotations

import pytest

from fivedp.errors import LayoutError
from fivedp.layout.spec import Index, parse_layout, parse_product


def test_layout_is_read_index_by_index() -> None:
    layout = parse_layout("  b/dp*sp m  k_1/tp ")
    assert layout.indices == (Index("b", ("dp", "sp")), Index("m", ()), Index("k_1", ("tp",)))
    assert layout.names == ("b", "m", "k_1")
    assert layout.axes == ("dp", "sp", "tp")
    assert layout.cut_of("b") == ("dp", "sp")
    assert layout.cut_of("m") == layout.cut_of("absent") == ()
    assert str(layout) == "b/dp*sp m k_1/tp"
    assert parse_layout(str(layout)) == layout


@pytest.mark.parametrize(
    ("spec", "batch", "m", "n", "k", "tree"),
    [
        ("m k/tp, k/tp n -> m n", "", "m", "n", "k", "k"),
        ("b/dp m k, k n/tp -> b/dp m n/tp", "", "b m", "n", "k", "k"),
        ("b m k, b k n -> b m n", "b", "m", "n", "k", "k"),
        ("b/dp m k, b/dp m n -> k n", "", "k", "n", "b m", "b"),
        ("b h s d, b h t d -> b h s t", "b h", "s", "t", "d", "d"),
        ("s h/tp d, h/tp d n -> s n", "", "s", "n", "h d", "h"),
        ("s h d/tp, h d n -> s n", "", "s", "n", "h d", "d"),
        ("s h/r d, h d/c n -> s n", "", "s", "n", "h d", "h d"),
        ("s h d, h d n -> s n", "", "s", "n", "h d", "h"),
        ("m k, k -> m", "", "m", "", "k", "k"),
        ("k, k n -> n", "", "", "n", "k", "k"),
    ],
)
def test_role_follows_from_where_an_index_stands(spec: str, batch: str, m: str, n: str, k: str, tree: str) -> None:
    product = parse_product(spec)
    found = (product.batch, product.m, product.n, product.k, product.tree_indices)
    assert found == tuple(tuple(names.split()) for names in (batch, m, n, k, tree))
    assert str(product) == spec
    assert parse_product(f" {spec.replace(',', ' ,').replace('->', '  ->')} ") == product


def test_axes_are_listed_once_in_the_order_of_the_text() -> None:
    assert parse_product("m/r k/c*d, k/r*d n/c -> m/r n/c").axes == ("r", "c", "d")
    assert parse_product("m k, k n -> m n").axes == ()


def test_gradient_of_a_product_is_two_products() -> None:
    spec_a, spec_b = parse_product("m/r k/c, k/r n/c -> m/r n/c").backward()
    assert str(spec_a) == "m/r n/c, k/r n/c -> m/r k/c"
    assert str(spec_b) == "m/r k/c, m/r n/c -> k/r n/c"
    assert (spec_a.k, spec_b.k) == (("n",), ("m",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m k/", 'layout "m k/": "k/" is no index; write a name such as k, k/tp or k/c*d'),
        ("m 2k", 'layout "m 2k": "2k" is no index; write a name such as k, k/tp or k/c*d'),
        ("m k/c**d", 'layout "m k/c**d": "k/c**d" is no index; write a name such as k, k/tp or k/c*d'),
        ("m k/c/d", 'layout "m k/c/d": "k/c/d" is no index; write a name such as k, k/tp or k/c*d'),
        ("", 'layout "": it names no index; write one per dimension, such as "m/r k/c"'),
        ("m k m", 'layout "m k m": index m stands twice; every dimension needs its own name'),
        ("m/r k/r", 'layout "m/r k/r": axis r cuts m/r and k/r; one axis can cut one dimension of an array once'),
        ("m/r*r k", 'layout "m/r*r k": axis r cuts m/r*r; one axis can cut one dimension of an array once'),
        (None, "layout must be a text such as 'm/r k/c', got NoneType"),
        (["m"], "layout must be a text such as 'm/r k/c', got list"),
    ],
)
def test_layout_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(LayoutError) as raised:
        parse_layout(text)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "m k, k n",
            'spec "m k, k n": expected two operands and a result, as in "m k/tp, k/tp n -> m n"',
        ),
        ("m k -> m", 'spec "m k -> m": expected two operands and a result, as in "m k/tp, k/tp n -> m n"'),
        (
            "m k, k n, n o -> m o",
            'spec "m k, k n, n o -> m o": expected two operands and a result, as in "m k/tp, k/tp n -> m n"',
        ),
        (
            "m k, k n -> m n -> m",
            'spec "m k, k n -> m n -> m": expected two operands and a result, as in "m k/tp, k/tp n -> m n"',
        ),
        (
            "m k, k n! -> m n",
            'spec "m k, k n! -> m n": layout " k n! ": "n!" is no index; write a name such as k, k/tp or k/c*d',
        ),
        ("m k, k n -> m", 'spec "m k, k n -> m": index n stands in B only; it must stand in two of A, B and C'),
        ("m k j, k n -> m n", 'spec "m k j, k n -> m n": index j stands in A only; it must stand in two of A, B and C'),
        ("m k, k n -> m n o", 'spec "m k, k n -> m n o": index o stands in C only; it must stand in two of A, B and C'),
        ("m, n -> m n", 'spec "m, n -> m n": no index is summed; A and B must share one that C does not have'),
        (b"m k, k n -> m n", "spec must be a text such as 'm k/tp, k/tp n -> m n', got bytes"),
        ({}, "spec must be a text such as 'm k/tp, k/tp n -> m n', got dict"),
    ],
)
def test_product_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(LayoutError) as raised:
        parse_product(text)
    assert str(raised.value) == message
