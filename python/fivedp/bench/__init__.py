"""Benchmarks that check what they time.

`mpirun -np 8 python -m fivedp.bench` measures the ceiling of the machine first, then every strategy of the sharded
product and every way to share a sequence; each row carries its error against float64, the bytes it sent beside the
bytes it had to send, and the memory it took. A wrong row is marked and makes the exit status 1.

    environment.py       what the process may not inherit, and what it really runs on
    ceiling.py           the rates that shares are quoted of
    family.py            what a kernel must offer to be measured
    cases/               which products and attentions, and the table of each kernel
    trials/              one case on this rank: its call, its price in bytes, what is right
    operands.py          inputs made where they are used, from global indices
    pieces.py            which part of a matrix a rank holds; visibility.py: which tokens, and who sees them
    check.py             is this product right, and are its bits those of one rank
    sampled_check.py     samples beside what is right and what a plain computation gives
    attention_check.py   is this attention right
    measure.py           one case: time, bytes, memory, verdict; account.py: how bytes and memory are counted
    report.py            table, JSON, CSV
"""

from __future__ import annotations
