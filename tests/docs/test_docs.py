"""What the documents say: links that resolve, plans that are still those printed, examples that run."""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

import fivedp
from mpi_launcher import run_mpi

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/labs/*.md")])
EXAMPLES = sorted(
    path for path in [*ROOT.glob("docs/examples/*.py"), *ROOT.glob("docs/labs/*.py")] if path.stem != "from_cupy"
)
SESSIONS = [path for path in DOCUMENTS if ">>> " in path.read_text()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_resolve(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def test_documents_print_plans() -> None:
    assert {path.name for path in SESSIONS} >= {
        "sharded_gemm.md",
        "ring_attention.md",
        "expert_parallelism.md",
        "large_scale_experts.md",
    }


@pytest.mark.parametrize("document", SESSIONS, ids=lambda path: path.name)
def test_what_is_printed_is_what_is_printed_today(document: Path) -> None:
    text = re.sub(r"^```.*$", "", document.read_text(), flags=re.M)  # the fence is not of the output
    names = {"fivedp": fivedp, "np": np}
    session = doctest.DocTestParser().get_doctest(text, names, document.name, str(document), 0)
    complaints: list[str] = []
    doctest.DocTestRunner(verbose=False).run(session, out=complaints.append)
    assert not complaints, "".join(complaints)


def test_readme_shows_the_example_that_runs() -> None:
    assert (ROOT / "docs/examples/from_numpy.py").read_text().strip() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("n_ranks", [1, 4])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, n_ranks: int) -> None:
    if example.stem == "from_numpy" and n_ranks != 4:
        pytest.skip("its grid has four ranks")
    done = run_mpi(n_ranks, example, timeout=90)
    assert not done.timed_out, done.output
    if example.stem == "pca_digits" and not importlib.util.find_spec("sklearn"):
        assert done.returncode != 0
        assert "scikit-learn" in done.output
        return
    assert done.returncode == 0, done.output
    if example.stem == "from_numpy":
        assert "equal to a @ b: True" in done.stdout
    if example.stem in ("ring_attention", "expert_layer") and n_ranks == 4:
        assert done.stdout.strip() in (ROOT / "README.md").read_text()
    if example.stem == "expert_nodes" and n_ranks == 4:
        done = run_mpi(8, example, timeout=90)
        chapter = (ROOT / "docs/expert_parallelism.md").read_text()
        parts = [part.strip() for part in done.stdout.split("\n\n")]
        assert len(parts) == 2
        assert all(part and part in chapter for part in parts)
    if example.stem in ("expert_layer", "shared_experts"):
        assert "False" not in done.stdout
    if example.parent.name == "labs":
        shown = example.with_suffix(".md").read_text()
        varying = ("time", f"these {n_ranks} ranks") if n_ranks != 4 else ("time",)
        lines = [line for line in done.stdout.splitlines() if not line.startswith(varying)]
        assert len(lines) > 25
        assert all(line in shown.splitlines() for line in lines)
    if example.stem == "pca_digits":
        errors = [float(text) for text in re.findall(r"variances (\S+),", done.stdout)]
        assert len(errors) == 2
        assert max(errors) < 1e-9
