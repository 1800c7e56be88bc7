"""The folders of the package: each imports only from those before it, and nothing in a circle.

Files, classes and functions of a size that a reader can hold, and imports that cost no seconds.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nss_prune"
FOLDERS = (
    "errors", "core", "unstructured", "graph", "structures", "surgery", "discovery", "statistics",
    "profiling", "compensation", "allocation", "pruner", "training", "adaptation", "finetuning",
    "integrations", "deeparc", "cli",
)  # fmt: skip
FILE_LINES, CLASS_LINES, FUNCTION_LINES, SIBLINGS = 450, 300, 60, 12
ENTRANCES = ("", "adapters", "divergence", "effects")  # import from anywhere, are imported nowhere


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names below the package that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            yield (node.module or "").partition(".")[2]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE.name:
                    yield alias.name.partition(".")[2]


def test_folders_import_only_from_those_before_them() -> None:
    wrong = []
    for name, tree in modules().items():
        folder = name.split(".")[0]
        if folder in ENTRANCES:
            continue
        allowed = FOLDERS[: FOLDERS.index(folder) + 1]
        wrong += [
            f"{name}: {other}" for other in imports(tree) if other.split(".")[0] not in allowed
        ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: set(imports(tree)) & modules().keys() for name, tree in modules().items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"in a circle, or behind one: {sorted(graph)}"


def too_long(tree: ast.Module, kinds: type | tuple[type, ...], most: int) -> Iterator[str]:
    """Classes or functions of more lines than that, wherever in a module."""
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            lines = node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]
            if lines > most:
                yield f"{node.name} has {lines} lines"  # type: ignore[attr-defined]


def long_file(tree: ast.Module) -> Iterator[str]:
    lines = max((getattr(node, "end_lineno", 0) for node in ast.walk(tree)), default=0)
    if lines > FILE_LINES:
        yield f"{lines} lines"


def long_classes(tree: ast.Module) -> Iterator[str]:
    return too_long(tree, ast.ClassDef, CLASS_LINES)


def long_functions(tree: ast.Module) -> Iterator[str]:
    return too_long(tree, (ast.FunctionDef, ast.AsyncFunctionDef), FUNCTION_LINES)


def many_siblings(tree: ast.Module) -> Iterator[str]:
    siblings = len(set(imports(tree)))
    if siblings > SIBLINGS:
        yield f"imports {siblings} modules of the package"


@pytest.mark.parametrize("excess", [long_file, long_classes, long_functions, many_siblings])
def test_nothing_is_larger_than_a_reader_can_hold(
    excess: Callable[[ast.Module], Iterator[str]],
) -> None:
    found = [
        f"{name}: {what}"
        for name, tree in modules().items()
        if name.split(".")[0] not in ENTRANCES
        for what in excess(tree)
    ]
    assert not found


def test_importing_the_package_imports_nothing_that_takes_long() -> None:
    """torch_pruning imports parts of timm and torchvision itself."""
    code = """if True:
        import sys, torch, torch_pruning
        before = set(sys.modules)
        import nss_prune
        print(*(set(sys.modules) - before))
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    own = {name.split(".")[0] for name in done.stdout.split()}
    assert "nss_prune" in own
    assert not own & {"timm", "captum", "matplotlib", "torchvision", "sklearn", "scipy"}


def test_tests_are_in_the_folders_of_what_they_test() -> None:
    folders = {path.parent.name for path in Path(__file__).parent.glob("*/test_*.py")}
    assert folders <= {*FOLDERS, "benchmarks"}
