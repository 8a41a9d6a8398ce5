"""What is measured: one module per kernel, in the order of `--help`. A new kernel is a new module and one line here."""

from __future__ import annotations

from fivedp.bench.cases import attention, gemm, moe
from fivedp.bench.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (
    gemm.FAMILY,
    attention.FAMILY,
    moe.FAMILY,
)}  # fmt: skip
