"""What is measured: one module per kernel, each a list of cases and nothing else."""

from __future__ import annotations
