"""The layers of the code: imports go one way, and files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 400
HTTP_LIBRARIES = {"fastapi", "starlette", "uvicorn", "prometheus_client", "httpx"}
# Which of this project's packages each one may import, itself included.
ALLOWED = {
    "kernels": {"kernels"},
    "model": {"model", "kernels"},
    "service": {"service", "model", "kernels"},
    "training": {"training", "model", "kernels"},
    "cli": {"cli", "service", "training", "model", "kernels"},
    "benchmarks": {"benchmarks", "service", "training", "model", "kernels"},
    "deploy": {"deploy"},
}
# Who may speak HTTP: the service, its command line, and what measures or deploys it.
SPEAK_HTTP = ("service/", "cli/", "benchmarks/", "deploy/")
SOURCES = [file for package in ALLOWED for file in sorted((ROOT / package).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imported_packages(tree: ast.AST) -> set[str]:
    """First component of every import, those inside functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(str(node.module).split(".")[0])
    return found


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def test_every_package_is_looked_at():
    assert {file.relative_to(ROOT).parts[0] for file in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_imports_go_one_way(file):
    package = file.relative_to(ROOT).parts[0]
    wrong = imported_packages(parse(file)) & set(ALLOWED) - ALLOWED[package]
    assert not wrong, f"{package} may not import {sorted(wrong)}"


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_the_model_and_its_training_know_nothing_of_http(file):
    if name(file).startswith(SPEAK_HTTP):
        return
    wrong = imported_packages(parse(file)) & HTTP_LIBRARIES
    assert not wrong, f"imports {sorted(wrong)}"


@pytest.mark.parametrize("file", [*SOURCES, *TESTS], ids=name)
def test_no_search_path_edits(file):
    edits = [
        node.lineno
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Attribute)
        and node.attr == "path"
        and isinstance(node.value, ast.Name)
        and node.value.id == "sys"
    ]
    assert not edits, f"sys.path in line {edits}"


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_no_star_imports_and_no_bare_except(file):
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_source_files_stay_small(file):
    num_lines = len(file.read_text(encoding="utf-8").splitlines())
    assert num_lines < MAX_FILE_LINES, f"{num_lines} lines"
