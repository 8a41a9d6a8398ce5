"""Benchmarks that check what they time.

`mpirun -np 8 python -m fivedp.bench` measures the ceiling of the machine first, then every strategy of the sharded
product; each row carries its error against float64, the bytes it sent beside the bytes it had to send, and the memory
it took. A wrong row is marked and makes the exit status 1.

    environment.py   what the process may not inherit, and what it really runs on
    ceiling.py       the rates that nothing here can exceed
    cases/           which products, in which layouts
    operands.py      inputs made where they are used, from global indices
    check.py         is this product right, and are its bits those of one rank
    measure.py       one case: time, bytes, memory, verdict
    report.py        table, JSON, CSV
"""

from __future__ import annotations
