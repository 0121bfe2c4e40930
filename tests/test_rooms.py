"""The directions of imports between the rooms, the absence of circles, and which rooms come without torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

BELOW = {  # room: what it may import beside itself
    "tunewright": set(),
    "datagen": {"tunewright"},
    "trainer": {"tunewright"},
    "launch": {"tunewright", "trainer"},
    "deliver": {"tunewright", "trainer"},
}
# They tie rooms together, and nothing imports them.
FRONT_DOORS = {"tunewright.api", "tunewright.launch.cli", "tunewright.launch.demo"}
WITHOUT_TORCH = ("tunewright", "datagen", "launch")
PROCESSES = {"__main__"}  # what only a process of its own runs


def _modules() -> dict[str, Path]:
    """Return {module: file} of the product."""
    found = {}
    for room in BELOW:
        for file in sorted((REPOSITORY / room).rglob("*.py")):
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            parts = parts if room == "tunewright" else ("tunewright", *parts)
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = _modules()


def _room(module: str) -> str:
    second = module.split(".")[1] if "." in module else "tunewright"
    return second if second in BELOW else "tunewright"


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield the product's modules that a tree imports, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for item in node.names:
                inner = f"{node.module}.{item.name}"
                yield inner if inner in MODULES else node.module


EDGES = {
    module: {
        name for name in _imports(ast.parse(file.read_text(encoding="utf-8"))) if name in MODULES and name != module
    }
    for module, file in MODULES.items()
}


def test_imports_go_down() -> None:
    wrong = []
    for module, imported in EDGES.items():
        room = _room(module)
        for other in sorted(imported):
            if other in FRONT_DOORS and module not in FRONT_DOORS and module != "tunewright":
                wrong.append(f"{module} imports {other}, a front door: it ties rooms together, and nothing imports it.")
            elif module not in FRONT_DOORS and _room(other) not in BELOW[room] | {room}:
                allowed = " and ".join(sorted(BELOW[room] | {room}))
                wrong.append(
                    f"{module} imports {other}, and {room}/ may import {allowed} alone: move what both need down, or "
                    f"have it passed in (docs/architecture.md)."
                )
    assert not wrong, "\n".join(wrong)


def test_no_imports_go_in_a_circle() -> None:
    try:
        TopologicalSorter(EDGES).prepare()
    except CycleError as error:
        pytest.fail(f"Move what these need of each other into a module of its own: {' -> '.join(error.args[1])}.")


def test_no_two_modules_share_a_name() -> None:
    names: dict[str, list[str]] = {}
    for module in MODULES:
        name = module.rpartition(".")[2]
        if MODULES[module].name not in ("__init__.py", "__main__.py", "cli.py"):
            names.setdefault(name, []).append(module)
    twice = [" and ".join(modules) for modules in names.values() if len(modules) > 1]
    assert not twice, f"One name means one thing in all rooms; rename one of each: {'; '.join(twice)}."


def test_every_package_is_installed() -> None:
    """A folder that pyproject.toml does not list is missing from the wheel, and nowhere else."""
    listed = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    missing = [module for module, file in MODULES.items() if file.name == "__init__.py" and f'"{module}"' not in listed]
    assert not missing, f"pyproject.toml, [tool.setuptools] packages: add {', '.join(missing)}."


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_a_room_comes_without_torch(room: str) -> None:
    """The command line answers at once, and data can be made where torch is not installed."""
    modules = [module for module in MODULES if _room(module) == room and module.rpartition(".")[2] not in PROCESSES]
    told = subprocess.run(
        [sys.executable, "-c", LOOK, *modules], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert told.returncode == 0, told.stderr
    assert not told.stdout, f"Import torch in the function that needs it, not at the top:\n{told.stdout}"


LOOK = """
import sys
from importlib import import_module
for module in sys.argv[1:]:
    import_module(module)
    if "torch" in sys.modules:
        print(f"{module} imports torch")
        break
"""
