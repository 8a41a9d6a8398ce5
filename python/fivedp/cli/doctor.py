"""`fivedp doctor`: one screen that says whether ranks will run here, and what to do where they will not.

The exit status is 1 where a finding is a failure. Colour appears on a terminal only, and never with NO_COLOR.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any, TextIO

from fivedp.cli.launcher import THREADS
from fivedp.cli.probes import Facts, collect
from fivedp.cli.rules import FAIL, OK, WARN, Finding, judge
from fivedp.comm.launch_check import is_rank_variable

COLOURS = {OK: "\033[32m", WARN: "\033[33m", FAIL: "\033[31m"}
PLAIN = "\033[0m"
# The variables a report may carry to somebody else: those that decide about a launch, no others.
TELLING = (
    "FIVEDP_", "OPENBLAS_", "MKL_", "NVPL_", "OMPI_", "PRTE_", "PMIX_", "PMI_", "MPI4PY_", "CUDA_VISIBLE", "SLURM_N",
)  # fmt: skip


def doctor(n_ranks: int = 8, as_json: bool = False, stream: TextIO | None = None, facts: Facts | None = None) -> int:
    """Examine this environment and print what was found.

    Parameters
    ----------
    n_ranks : int
        How many ranks are planned.
    as_json : bool
        Print facts and findings as one JSON object.
    stream : text stream, optional
        Standard output by default.
    facts : Facts, optional
        What to judge; collected here by default.

    Returns
    -------
    int
        1 where a finding is a failure, else 0.
    """
    out = sys.stdout if stream is None else stream
    facts = collect(n_ranks) if facts is None else facts
    findings = judge(facts)
    if as_json:
        print(json.dumps(report(facts, findings), indent=2), file=out)
    else:
        print(screen(facts, findings, coloured=wants_colour(out)), file=out)
    return int(any(finding.level == FAIL for finding in findings))


def wants_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal whose user has not said NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def verdict(findings: list[Finding]) -> str:
    """The worst level among `findings`."""
    levels = {finding.level for finding in findings}
    return FAIL if FAIL in levels else WARN if WARN in levels else OK


def report(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    """Facts and findings in the types of JSON, with no variable of the environment that is nobody's business."""
    plain: dict[str, Any] = dataclasses.asdict(facts)
    plain["environ"] = {
        name: value
        for name, value in sorted(facts.environ.items())
        if name.startswith(TELLING) or name in THREADS or is_rank_variable(name)
    }
    return {
        "verdict": verdict(findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "facts": _plain(plain),
    }


def screen(facts: Facts, findings: list[Finding], coloured: bool = False, width: int | None = None) -> str:
    """The findings as text, one below the other, the fix under what it mends."""
    columns = width or min(120, shutil.get_terminal_size((100, 24)).columns)
    margin = max(len(finding.subject) for finding in findings) + 8
    lines = [f"fivedp doctor: Python {facts.python}, {facts.n_ranks} ranks planned", ""]
    for finding in findings:
        mark = f"{finding.level:<5}"
        if coloured:
            mark = COLOURS[finding.level] + mark + PLAIN
        label = f"{finding.subject:<{margin - 7}}"
        text = _wrapped(_home(finding.text), columns - margin)
        lines.append(f"{mark} {label} {text[0]}")
        lines += [" " * margin + more for more in text[1:]]
        if finding.fix:
            lines += [" " * margin + part for part in _wrapped("fix: " + _home(finding.fix), columns - margin)]
    counts = {level: sum(finding.level == level for finding in findings) for level in (FAIL, WARN)}
    if counts[FAIL]:
        last = f"{counts[FAIL]} to mend before ranks can run" + (f", {counts[WARN]} to look at" if counts[WARN] else "")
    else:
        last = f"ready; {counts[WARN]} to look at" if counts[WARN] else "ready"
    return "\n".join([*lines, "", last])


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 40), break_long_words=False, break_on_hyphens=False) or [""]


def _home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
