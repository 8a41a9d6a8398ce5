"""What the programs that compute attention share: inputs, who sees whom, and the rows that a check asks for.

One batch element. A case is {"tokens", "heads", "head_size", "causal", "window", "documents", "backward", "dtype",
"seed", "way", "keywords"}; documents are offsets that rise from 0 to `tokens`, or none. The time of a backward is that
of the backward alone: its forward belongs to the preparation.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from worker import Peer, operands

Array = Any
# Wider queries spread the logits over several units (their standard deviation is 4/3): under a flat softmax every
# output would be near the mean of the values, whatever was computed.
Q_FACTOR = 4


def inputs(case: dict[str, Any], tokens: Array) -> dict[str, Array]:
    """q, k, v and, for a backward, do: (len(tokens), heads, head_size) each; `tokens` are places in the sequence."""
    dtype, columns = operands.dtype_of(case["dtype"]), range(case["heads"] * case["head_size"])
    names = ("q", "k", "v", "do") if case["backward"] else ("q", "k", "v")
    made = {
        name: operands.block(case["seed"] + number, tokens, columns, dtype).reshape(-1, case["heads"],
                                                                                   case["head_size"])
        for number, name in enumerate(names)
    }  # fmt: skip
    made["q"] *= dtype.type(Q_FACTOR)  # a power of two: exact
    return made


def sees(case: dict[str, Any], queries: Array, keys: Array) -> Array:
    """(queries, keys): whether the query at a place of the sequence sees the key at another."""
    i, j = queries[:, None], keys[None, :]
    result = np.ones((len(queries), len(keys)), bool)
    if case["causal"]:
        result &= j <= i
    if case["window"]:
        result &= (i - j < case["window"]) & (j - i < case["window"])
    if case["documents"]:
        document_of = np.searchsorted(case["documents"], np.arange(case["tokens"]), side="right")
        result &= document_of[i] == document_of[j]
    return result


class AttentionPeer(Peer):
    """A program that computes attention: `prepare` sets `case` and `tokens`, the places that this rank holds."""

    case: dict[str, Any]
    tokens: Array

    @abstractmethod
    def outcome(self) -> dict[str, Array]:
        """o, or dq, dk and dv, of this rank's tokens: (tokens, heads, head_size)."""

    def check(self, order: dict[str, Any]) -> dict[str, Any]:
        """The rows of `order["tokens"]` that this rank holds, of `order["heads"]`, and which of them they are."""
        _, here, there = np.intersect1d(self.tokens, order["tokens"], return_indices=True)
        return {
            name: {
                "places": there.tolist(),
                "values": np.asarray(x)[here][:, order["heads"]].astype(np.float64).tolist(),
            }
            for name, x in self.outcome().items()
        }
