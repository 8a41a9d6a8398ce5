"""The arguments of a routing: checked on this rank, and turned into the kernel's rule and a text to agree on."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fivedp.errors import DTypeError, LayoutError, ShapeError
from fivedp.kernels.routing import MAX_TOKENS, Rule
from fivedp.ops.arguments import array_kind

Array = Any
SCORES = ("softmax", "sigmoid")
DROPS = ("position", "score")
DEFINITIONS = ("global", "gshard", "megatron", "hf")
CHOICES = ("token", "expert")
GROUP_MASKS = ("strict", "hf")
_TYPES = tuple(np.dtype(t) for t in (np.float32, np.float64, ml_dtypes.bfloat16))


@dataclass(frozen=True)
class Options:
    """The keywords of `route`, the same on every rank."""

    top_k: int
    score: str
    normalize: bool
    capacity_factor: float | None
    bias: Array | None
    groups: tuple[int, int] | None
    group_mask: str
    scale: float
    drop: str
    definition: str
    choice: str

    @property
    def rule(self) -> Rule:
        """What the kernel is told."""
        return Rule(
            self.score == "sigmoid", self.normalize, self.scale, self.bias, self.groups or (1, 1),
            self.group_mask == "hf",
        )  # fmt: skip

    def text(self) -> str:
        """All of it in a line, for the agreement; the bias as a checksum."""
        names = ("top_k", "score", "normalize", "capacity_factor", "groups", "group_mask", "scale", "drop",
                 "definition", "choice")  # fmt: skip
        parts = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None]
        if self.bias is not None:
            parts.append(f"bias=({len(self.bias)} numbers, {zlib.crc32(np.ascontiguousarray(self.bias).tobytes()):x})")
        return " ".join(parts)


def read_options(keywords: dict[str, Any]) -> Options:
    """Options from keywords as users give them.

    Raises
    ------
    LayoutError, DTypeError
        Where one has no meaning.
    """
    allowed = {"score": SCORES, "drop": DROPS, "definition": DEFINITIONS, "choice": CHOICES, "group_mask": GROUP_MASKS}
    for name, values in allowed.items():
        if keywords[name] not in values:
            raise LayoutError(f"route: {name} is {keywords[name]!r}; expected one of {', '.join(values)}")
    top_k, factor, scale = keywords["top_k"], keywords["capacity_factor"], keywords["scale"]
    if not _is_whole(top_k):
        raise LayoutError(f"route: top_k is {top_k!r}; expected a whole number from 1")
    if factor is not None and not (_is_number(factor) and factor > 0):
        raise LayoutError(f"route: capacity_factor is {factor!r}; expected a positive number, or None for no limit")
    if not (_is_number(scale) and scale > 0):
        raise LayoutError(f"route: scale is {scale!r}; expected a positive number")
    groups = keywords["groups"]
    if groups is not None:
        if not (isinstance(groups, (tuple, list)) and len(groups) == 2 and all(_is_whole(n) for n in groups)):
            raise LayoutError(f"route: groups is {groups!r}; expected (n_groups, top_groups), or None")
        groups = (int(groups[0]), int(groups[1]))
        if groups[1] > groups[0]:
            raise LayoutError(f"route: groups is {groups}; expected no more top_groups than n_groups")
    bias = keywords["bias"]
    if bias is not None and not (isinstance(bias, np.ndarray) and bias.dtype.kind == "f"):
        what = f"an array of {bias.dtype}" if isinstance(bias, np.ndarray) else f"a {type(bias).__name__}"
        raise DTypeError(f"route: `bias` is {what}; expected a NumPy array of floats, or None")
    if keywords["choice"] == "expert" and (bias is not None or groups is not None):
        raise LayoutError("route: experts choose by score alone; expected no bias and no groups with choice='expert'")
    return Options(
        int(top_k), keywords["score"], bool(keywords["normalize"]), None if factor is None else float(factor), bias,
        groups, keywords["group_mask"], float(scale), keywords["drop"], keywords["definition"], keywords["choice"],
    )  # fmt: skip


def check_arrays(logits: Array, options: Options) -> None:
    """What one rank can know of its logits without reading them.

    Raises
    ------
    DTypeError, ShapeError
        Where they, or the options for so many experts, won't do.
    """
    array_kind(logits, "logits", "route")
    if logits.dtype not in _TYPES or not logits.dtype.isnative:
        raise DTypeError(f"route: `logits` has dtype {logits.dtype}; expected float32, float64 or bfloat16")
    if logits.ndim != 2 or not logits.shape[1]:
        raise ShapeError(f"route: `logits` has shape {logits.shape}; expected (T_local, E) with an expert or more")
    tokens, n_experts = logits.shape
    if tokens > MAX_TOKENS:
        raise ShapeError(f"route: `logits` has {tokens} tokens; expected at most {MAX_TOKENS} on a rank")
    if options.top_k > n_experts:
        raise ShapeError(f"route: top_k is {options.top_k}; expected 1 to {n_experts}, the number of experts")
    if options.bias is not None:
        if options.bias.shape != (n_experts,):
            raise ShapeError(f"route: `bias` has shape {options.bias.shape}; expected ({n_experts},)")
        largest = np.finfo(np.float64 if logits.dtype == np.float64 else np.float32).max
        if not (abs(options.bias.astype(np.float64)) <= largest).all():
            expert = int(np.flatnonzero(~(abs(options.bias.astype(np.float64)) <= largest))[0])
            raise LayoutError(f"route: `bias` is {options.bias[expert]} for expert {expert}; expected finite numbers")
    if options.groups is not None:
        n_groups, top_groups = options.groups
        if n_experts % n_groups:
            raise ShapeError(f"route: {n_experts} experts are in {n_groups} groups; expected a divisor")
        reach = top_groups * (n_experts // n_groups)
        if options.group_mask == "strict" and options.top_k > reach:
            raise ShapeError(
                f"route: top_k is {options.top_k}, but {top_groups} of {n_groups} groups have {reach} experts; "
                "expected no more"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)
