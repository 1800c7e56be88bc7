"""The folders of the package: each imports only from those before it, and nothing in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nss_prune"
FOLDERS = (
    "errors", "core", "unstructured", "graph", "structures", "surgery", "discovery", "statistics",
    "profiling", "compensation", "allocation", "pruner", "adaptation", "deeparc", "cli",
)  # fmt: skip
ENTRANCES = ("", "adapters", "divergence", "effects")  # import from anywhere, are imported nowhere


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
