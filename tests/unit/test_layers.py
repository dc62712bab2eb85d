"""Imports go down only: a room uses those before it in one order, and no other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gateway_slurm"
ORDER = (
    "errors",
    "_util",
    "bounded_json",
    "turns",
    "budget",
    "_jupyter_compat",
    "environment",
    "events",
    "link",
    "slurm",
    "store",
    "addresses",
    "request",
    "config",
    "allocations",
    "kernels",
    "access",
    "service",
    "provisioner",
    "gateway",
    "cli",
)
# Rooms that stand beside the order, and what they may use.
BESIDE = {"testing": {"errors"}}
# Rooms that do not know one another.
PORTS = {"link", "slurm", "store"}


def room_of(parts: tuple[str, ...]) -> str:
    """The room, or the single file at the package root, that a path belongs to."""
    return parts[0].removesuffix(".py")


def imports(path: Path) -> set[tuple[str, str]]:
    """The modules of the package that a file imports, ``TYPE_CHECKING`` blocks included, with the name taken."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
    return {(module, name) for module, name in found if module.split(".")[0] == "gateway_slurm"}


def rooms_used(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    modules = {module if "." in module else f"{module}.{name}" for module, name in imports(path)}
    return {module.split(".")[1] for module in modules if "." in module} - {"__version__"}


def allowed(mine: str) -> set[str]:
    """The rooms that a room may use."""
    if mine in BESIDE:
        return BESIDE[mine]
    below = set(ORDER[: ORDER.index(mine)])
    if mine in PORTS:
        below -= PORTS
    return below | (set(BESIDE) if mine == "cli" else set())


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_imports_go_down_only() -> None:
    """Each file of the package uses its own room and those below it."""
    wrong = set()
    for path in FILES:
        parts = path.relative_to(PACKAGE).parts
        mine = room_of(parts)
        assert mine in ORDER or mine in BESIDE, f"{mine} has no place in the order"
        wrong |= {("/".join(parts), theirs) for theirs in rooms_used(path) - {mine} - allowed(mine)}
    assert wrong == set()


def module_of(path: Path) -> str:
    """The dotted name of a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def graph() -> dict[str, set[str]]:
    """What each module of the package imports, as names of modules."""
    modules = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    found = {}
    for module, path in modules.items():
        named = {f"{base}.{name}" if f"{base}.{name}" in modules else base for base, name in imports(path)}
        found[module] = (named & modules.keys()) - {module}
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The modules that import one another, directly or by others (Tarjan's components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            cut = stack.index(node)
            component = stack[cut:]
            del stack[cut:]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def test_no_modules_import_one_another() -> None:
    """Not in a circle of any length, imports for type checkers included."""
    assert circles(graph()) == []


def test_a_circle_would_be_found() -> None:
    """The search itself: two circles, and a module outside both."""
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e", "a"}, "e": {"d"}, "f": {"a"}}
    assert circles(edges) == [["a", "b", "c"], ["d", "e"]]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_each_room_says_what_it_is_for(path: Path) -> None:
    """In its docstring, in whole sentences."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert len(text.split()) >= 6
    assert text.endswith(".")
