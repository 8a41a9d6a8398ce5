"""Imports go down only: users, operations, then layouts, ranks and kernels, which know nothing of each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fivedp

PACKAGE = Path(fivedp.__file__).parent
# What each package may import of fivedp, beside itself. `_cpu` is the extension.
ALLOWED = {
    "errors": set(),
    "layout": {"errors", "_cpu"},
    "comm": {"errors", "_cpu"},
    "kernels": {"_cpu"},
    "reference": {"kernels"},  # what a mask is
    "ops": {"errors", "layout", "comm", "kernels"},
}
# Nobody below imports these.
TOP = {"bench", "cli", "reference"}


def imports(file: Path) -> set[str]:
    """The parts of fivedp that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names = [f"fivedp.{alias.name}" for alias in node.names] if module == "fivedp" else [module]
        found |= {name.split(".")[1] for name in names if name.startswith("fivedp.")}
        if "fivedp" in names:
            found.add("__init__")
    return found


def files(package: str) -> list[Path]:
    one = PACKAGE / f"{package}.py"
    return [one] if one.is_file() else sorted((PACKAGE / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_down_only(package: str) -> None:
    assert files(package)
    for file in files(package):
        beyond = imports(file) - ALLOWED[package] - {package}
        assert not beyond, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(beyond))}"


def test_nothing_stands_on_the_programs() -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part not in TOP:
            assert not imports(file) & TOP, file


def test_layouts_and_kernels_know_nothing_of_mpi() -> None:
    for package in ("layout", "kernels"):
        for file in files(package):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.split(".")[0] == "mpi4py" for name in names), file


def test_no_package_is_forgotten() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert packages <= set(ALLOWED) | TOP
