"""Who may import whom: the table of docs/architecture.md, held against every import, also those inside functions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.commands import ROOT

PACKAGE = ROOT / "rayexpand"
FILES = sorted(PACKAGE.rglob("*.py"))
LIGHT = ("contract.settings", "contract.schema", "contract.protocols", "data.pixels", "data.seeds",
         "data.published", "storage.objects", "cli")


@cache
def allowed() -> dict[str, set[str]]:
    """What each package may import, by the table."""
    rows = re.findall(r"^\| \d+ \| `(\w+)` \|[^|]*\|([^|]*)\|$", (ROOT / "docs/architecture.md").read_text(), re.M)
    return {name: set(re.findall(r"`(\w+)`", others)) for name, others in rows}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@cache
def imports(path: Path) -> set[str]:
    """Modules of this package, and top-level names of other packages, that a file imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else str(node.module)
                      for alias in node.names}
    return {name if name.startswith("rayexpand") else name.partition(".")[0] for name in found}


def package_of(module: str) -> str:
    """First name below the root, empty for the root itself."""
    return module.removeprefix("rayexpand").removeprefix(".").partition(".")[0]


def test_a_file_imports_from_the_packages_of_its_row() -> None:
    wrong: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if (own := package_of(name)) in ("", "__main__"):
            continue
        others = {package_of(one) for one in imports(path) if one.startswith("rayexpand")} - {own, ""}
        wrong[name] = others - allowed()[own] | ({"ray"} & imports(path) if own != "on_ray" else set())

    assert len(wrong) > 300
    assert {name: others for name, others in wrong.items() if others} == {}


def test_the_table_names_the_packages_that_exist() -> None:
    there = {package_of(name) for name in MODULES} - {"", "__main__"}

    assert set(allowed()) == there


def test_no_circle_between_files() -> None:
    """The names of the root are those of the API, imported when they are first used, so they tie nothing."""
    graph = {name: {other for other in imports(path) if other in MODULES and other != name}
             for name, path in MODULES.items() if name != "rayexpand"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these files import each other: {' -> '.join(error.args[1])}")


def test_class_names_are_unique() -> None:
    owners: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners.setdefault(node.name, []).append(name)

    assert {name: files for name, files in owners.items() if len(files) > 1} == {}


def test_light_modules_import_without_torch() -> None:
    code = ("import importlib, sys\n"
            "heavy = {'torch', 'diffusers', 'transformers', 'open_clip', 'ray', 'sklearn', 'matplotlib'}\n"
            "for module in sys.argv[1:]:\n"
            "    importlib.import_module(f'rayexpand.{module}')\n"
            "    assert not heavy & set(sys.modules), (module, heavy & set(sys.modules))")

    subprocess.run([sys.executable, "-c", code, *LIGHT], check=True)


@pytest.mark.slow
def test_everything_works_with_ray_blocked(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, sys
sys.modules["ray"] = None
import rayexpand
for module in pkgutil.walk_packages(rayexpand.__path__, "rayexpand."):
    if not module.name.startswith(("rayexpand.on_ray", "rayexpand.__main__")):
        importlib.import_module(module.name)
from rayexpand.runs import run as runs
from rayexpand.runs.config import load
config = load("jobs/digits/expand-classical.yaml", [f"out={sys.argv[1]}", "method.ratio=1"])
run = runs.prepare(config)
expander = runs.start(run)
assert expander(0).kept == 20
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
