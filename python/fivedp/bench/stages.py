"""How long each stage of an operation takes, by watching the functions that the operation calls.

Names of a module are replaced, for a few calls, by functions that take the time; the operation itself is not changed
and runs as it does without. A stage includes its waiting for other ranks, and what no watched function does remains.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Stopwatch:
    """Seconds by stage.

    Attributes
    ----------
    seconds : dict
        What the watched functions took so far; those that are called by others count for the outer one.
    results : dict
        What each watched function returned last, by its name.
    """

    def __init__(self, stages: tuple[str, ...]) -> None:
        self.seconds = dict.fromkeys(stages, 0.0)
        self.results: dict[str, Any] = {}
        self._inside = False

    def watched(self, stage: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts for `stage`."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            outermost, start = not self._inside, time.perf_counter()
            self._inside = True
            try:
                result = self.results[name] = function(*arguments, **keywords)
            finally:
                if outermost:
                    self.seconds[stage] += time.perf_counter() - start
                    self._inside = False
            return result

        return call

    @contextlib.contextmanager
    def watching(self, stages: Mapping[str, tuple[tuple[Any, str], ...]]) -> Iterator[None]:
        """Watch functions, each given as an owner and its attribute, by stage; all are as before at the end."""
        kept = []
        try:
            for stage, functions in stages.items():
                for owner, name in functions:
                    original = getattr(owner, name)
                    kept.append((owner, name, original))
                    setattr(owner, name, self.watched(stage, name, original))
            yield
        finally:
            for owner, name, original in kept:
                setattr(owner, name, original)
