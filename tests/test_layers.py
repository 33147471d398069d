"""Which module may import which. The walk reads every import in the tree, also those inside functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rayexpand"

LOW = {"errors", "rng", "schema"}
METHODS = {"methods", "core", *LOW}
MODELS = {"priors", "guides"}
RUNNING = {"plan", "pixels", "seeds", "files", "store", "config", "blame"}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "rng": set(),
    "schema": {"errors", "rng"},
    "core": {"core", *LOW},
    "pixels": LOW,
    "seeds": {"seeds", "pixels", *LOW},
    "priors": {"priors", "core", "seeds", *LOW},
    "guides": {"core", "guide_files", "priors", *LOW},
    "guide_files": {"core", "priors", *LOW},
    "methods": METHODS,
    "config": {"methods", "seeds", *LOW},
    "files": LOW,
    "buckets": {"files", *LOW},
    "objects": {"buckets", "files", *LOW},
    "store": {"files", "objects", *LOW},
    "blame": {"files", *LOW},
    "plan": {"config", "files", "methods", "seed_columns", "store", *LOW},
    "estimate": {"config", "seeds", "pixels", *LOW},
    "artifacts": {"__init__", "config", "core", "guide_files", "seed_columns", "store", *MODELS, *LOW},
    "seed_columns": LOW,
    "captions": {"config", "priors", "seed_columns", "seeds", *LOW},
    "class_features": {"config", "priors", "seed_columns", "seed_features", *LOW},
    "seed_features": {"pixels", "seeds", *LOW},
    "prompt_lists": {"config", "methods", "priors", *LOW},
    "pretrain": {"artifacts", "config", "core", "methods", "prior_quality", "priors", "seed_features", "seeds",
                 "subsets", *LOW},
    "prior_quality": {"core", "priors", *LOW},
    "finetuning": {"finetuning", "artifacts", "config", "core", "methods", "pixels", "priors", "seed_columns",
                   "seed_features", "seeds", *LOW},
    "fit_plan": {"captions", "class_features", "config", "core", "finetuning", "guide_files", "pretrain",
                 "prompt_lists", "seed_features", "seeds", "store", *LOW},
    "fit": {"artifacts", "captions", "class_features", "config", "core", "finetuning", "fit_plan",
            "guide_files", "ingest", "pretrain", "prompt_lists", "seed_features", "seeds", *MODELS, *LOW},
    "expander": {"__init__", "artifacts", *RUNNING, *MODELS, *METHODS},
    "run": {"artifacts", "expander", "estimate", "__init__", *RUNNING, *MODELS, *METHODS},
    "verify": {"run", "plan", "store", *LOW},
    "status": {"blame", "config", "files", "seeds", "store", *LOW},
    "report": {"card", "config", "pixels", "seeds", "store", "status", *LOW},
    "guided_report": {"expander", "methods", "report", "run", *LOW},
    "card": {"config", "seeds", "store", "status", *LOW},
    "export": {"run", "card", "files", *LOW},
    "evaluation": {"evaluation", "guide_files", "pixels", *MODELS, *LOW},
    "evaluate": {"evaluation", "run", "config", "export", "files", "pixels", "seeds", "store", "__init__", *LOW},
    "select_rules": {"config", *LOW},
    "select_scores": {"config", "evaluation", "guide_files", "guides", "pixels", "run", "seeds", "select_rules",
                      "store", *LOW},
    "select": {"__init__", "config", "files", "guide_files", "guides", "methods", "run", "select_rules",
               "select_scores", "store", *LOW},
    "subsets": {"seeds", *LOW},
    "studylist": {"export", "files", "run", "seeds", "subsets", *LOW},
    "images": {"files", "methods", "pixels", "seeds", "store", "studylist", *LOW},
    "extra_tests": {"config", "evaluation", "seeds", "subsets", *LOW},
    "ingest": {"core", "images", "pixels", "seeds", "studylist", "subsets", *LOW},
    "study_results": {"files", "store", *LOW},
    "study_summary": {"evaluation", "files", "study_results", *LOW},
    "study_figures": set(),
    "jobs": {"config", "evaluate", "fit_plan", "run", "select", "study_config", "sweep", *LOW},
    "study_report": {"core", "status", "store", "study_figures", "study_results", "study_summary", *LOW},
    "on_ray": {"captions", "on_ray", "run", "config", "blame", "files", "store", "expander", "priors", "study",
               "study_config", "training", "core", "evaluation", "evaluate", "artifacts", "finetuning",
               "fit", "guide_files", "guides", "seed_features", "select_scores", "sweep", "sweep_search", "sweep_trial",
               "__init__", *LOW},
    "bench": {"run", "config", "expander", *LOW},
    "study_config": {"artifacts", "run", "config", "core", "extra_tests", "finetuning", "fit_plan", "seeds",
                     "subsets", *LOW},
    "study": {"artifacts", "run", "config", "core", "extra_tests", "files", "fit", "fit_plan", "seeds", "status",
              "store", "study_config", "studylist", "subsets", *LOW},
    "training": {"study", "study_config", "studylist", "ingest", "evaluation", "extra_tests", "core", "files",
                 "priors", "seeds", "store", *LOW},
    "space": LOW,
    "sweep": {"config", "core", "files", "run", "seeds", "space", "store", "study_config", "subsets", *LOW},
    "sweep_trial": {"config", "files", "priors", "run", "seeds", "study", "study_config", "subsets", "sweep",
                    "training", *LOW},
    "sweep_search": {"space", "sweep", "sweep_trial", *LOW},
    "sweep_report": {"study_figures", "sweep", "sweep_search", *LOW},
    "demo": {"artifacts", "methods", "run", "study", "study_config", "training", "seeds", *MODELS, *LOW},
    "progress": {"on_ray", "run", "store"},  # types only
}
TOP = {"cli", "__main__"}  # may import everything
LIGHT = {"errors", "rng", "schema", "pixels", "seeds", "config", "files", "buckets", "objects", "store", "blame",
         "plan", "estimate", "status", "cli"}


def _layer(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def _imports(path: Path) -> set[str]:
    """First names below the package that a module imports, and top-level names of other packages."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names = ([f"rayexpand.{alias.name}" for alias in node.names] if node.module == "rayexpand"
                     else [node.module or ""])
        found |= {".".join(name.split(".")[:2 if name.startswith("rayexpand") else 1]) for name in names}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    layer = _layer(path)
    if layer in TOP:
        return
    inside = {name.removeprefix("rayexpand.") for name in _imports(path) if name.startswith("rayexpand.")}
    inside = {name if (ROOT / name).with_suffix(".py").exists() or (ROOT / name).is_dir() else "__init__"
              for name in inside}

    assert inside <= ALLOWED[layer], f"{layer} may not import {sorted(inside - ALLOWED[layer])}"
    assert "ray" not in _imports(path) or layer == "on_ray", "ray lives in on_ray/"


def test_light_modules_import_without_torch() -> None:
    code = ("import importlib, sys\n"
            "heavy = {'torch', 'diffusers', 'transformers', 'open_clip', 'ray', 'sklearn', 'matplotlib'}\n"
            "for module in sys.argv[1:]:\n"
            "    importlib.import_module(f'rayexpand.{module}')\n"
            "    assert not heavy & set(sys.modules), (module, heavy & set(sys.modules))")

    subprocess.run([sys.executable, "-c", code, *sorted(LIGHT)], check=True)


def test_everything_works_with_ray_blocked(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, sys
sys.modules["ray"] = None
import rayexpand
for module in pkgutil.walk_packages(rayexpand.__path__, "rayexpand."):
    if not module.name.startswith(("rayexpand.on_ray", "rayexpand.__main__")):
        importlib.import_module(module.name)
from rayexpand import run as runs
from rayexpand.config import load
config = load("jobs/digits/expand-classical.yaml", [f"out={sys.argv[1]}", "method.ratio=1"])
run = runs.prepare(config)
expander = runs.start(run)
assert expander(0).kept == 20
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT.parent)
