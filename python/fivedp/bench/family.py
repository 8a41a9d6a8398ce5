"""What a kernel must offer to be measured: cases to choose from, a trial of each case, and a table for the rows.

    cases/<kernel>.py    FAMILY: the cases, their options and their table; registered by one line of cases/__init__.py
    trials/<kernel>.py   one case on this rank: its inputs, its call, its price in bytes and the check of its result

`measure.run` does the same with every trial (count, time, compare), `report` prints every row the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fivedp.bench.measure import Bench
    from fivedp.bench.pieces import Grid

Row = dict[str, Any]


class Strategy(Protocol):
    """A way to cut the work, and the mesh it needs."""

    def mesh_shape(self, ranks: int) -> dict[str, int]:
        """Axis sizes for `ranks` ranks; ValueError where it needs others, saying which."""
        ...


class Case(Protocol):
    """One row of the table before it is measured."""

    @property
    def dtype(self) -> str:
        """The type of the inputs."""
        ...

    @property
    def strategy(self) -> Strategy:
        """How the work is cut."""
        ...

    @property
    def flops(self) -> int:
        """Operations of a call on all ranks together."""
        ...

    @property
    def title(self) -> str:
        """A few words for the progress line."""
        ...

    def record(self) -> Row:
        """What the row says before anything runs; `kernel` and `dtype` are among it."""
        ...

    def memory_needed(self, ranks: int) -> float:
        """Bytes that all ranks need together, roughly and rather too many."""
        ...

    def open(self, bench: Bench) -> Trial:
        """The case on this rank. Collective."""
        ...


class Trial(Protocol):
    """A case on this rank, ready to be called.

    Attributes
    ----------
    grid : Grid
        The ranks it runs on; its `mesh` counts the bytes.
    bytes_planned, bytes_bound : int
        What a call is to send and the least that it could, over all ranks.
    """

    grid: Grid
    bytes_planned: int
    bytes_bound: int

    def run(self) -> None:
        """One call. Collective."""
        ...

    def facts(self) -> Row:
        """Further fields of the row, found without being timed; those under "memory" join the peak. Collective."""
        ...

    def bits(self) -> bytes:
        """A digest of all results on this rank."""
        ...

    def bytes_made(self) -> int:
        """Bytes of results that the call itself allocates on this rank: a share, not a cost."""
        ...

    def check(self) -> tuple[str, Row]:
        """Why the results are wrong (empty where they are right), and what the check found. Collective."""
        ...

    def rival(self, reference: Any, threads: int) -> Callable[[], Any] | None:
        """The same work by `reference` on rank 0, ready to be called; None where it has no such thing."""
        ...

    def sibling(self) -> tuple[str, Callable[[], Any]] | None:
        """A call of our own to alternate with, and the field of the row that says how many times its time ours is."""
        ...


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers stand on its right."""

    name: str
    width: int
    left: bool = False


@dataclass(frozen=True)
class Table:
    """How rows of a family are printed.

    Attributes
    ----------
    columns : tuple of Column
        The first holds `name(row)`, the second the type, the others `cells(row)`.
    group : callable
        What rows under one heading have in common.
    heading : callable
        The heading of a group from its first row: what is printed bold, and the rest.
    name, cells, notes : callable
        The text of the first column, of the others, and of the line below the row (a list, which may be empty).
    """

    columns: tuple[Column, ...]
    group: Callable[[Row], Any]
    heading: Callable[[Row], tuple[str, str]]
    name: Callable[[Row], str]
    cells: Callable[[Row], tuple[str, ...]]
    notes: Callable[[Row], list[str]]


@dataclass(frozen=True)
class Family:
    """A kernel that can be measured.

    Attributes
    ----------
    name : str
        As the command line says it, and as rows name it under "kernel".
    known : mapping
        What `--help` lists, by heading.
    own_options : tuple of str
        Options that no other family has, by their names in Python.
    add_options : callable
        Adds them.
    select : callable
        The cases that the command line asks for; ValueError where it asks for what this family does not have.
    quick_seconds : float
        Time for a case after warm-up where nothing else is asked for.
    """

    name: str
    known: Mapping[str, tuple[str, ...]]
    own_options: tuple[str, ...]
    add_options: Callable[[argparse._ArgumentGroup], None]
    select: Callable[[argparse.Namespace], list[Any]]
    table: Table
    quick_seconds: float = 0.5
