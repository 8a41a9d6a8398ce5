"""One module per kernel: a case on this rank, its price in bytes, and what is right."""

from __future__ import annotations
