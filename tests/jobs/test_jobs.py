"""Every file below jobs/: the loader of its verb takes it, and what the papers published is what it asks for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayexpand import evaluate, select
from rayexpand.config import load, parse, resolved
from rayexpand.core.recipe import make_recipe
from rayexpand.errors import ConfigError
from rayexpand.fit_plan import load_fit
from rayexpand.space import Dimension, n_suggestions, parse_dimension, suggest
from rayexpand.store import open_files
from rayexpand.study import StudyConfig, load_study
from rayexpand.sweep import Sweep, candidate, load_sweep

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "jobs").rglob("*.yaml"))
PAPERS = [path for path in FILES if path.parent.parent.name == "papers"]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT / "jobs"))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where jobs are run from: a sweep names its study from there."""
    monkeypatch.chdir(ROOT)


def _expand(path: Path) -> None:
    config = load(path)
    assert parse(resolved(config)) == config


def _finished(loads: Callable[[str], Any]) -> Callable[[Path], None]:
    """A verb that wants a finished run: nothing else may be missing but what is no part of the repository."""
    def check(path: Path) -> None:
        problems = []
        try:
            loads(str(path))
        except ConfigError as error:
            problems = error.problems
        assert not [one for one in problems if not re.match(r"run: |reference\.path|extractor\.checkpoint", one)]
    return check


def _sweep(path: Path) -> None:
    """Every point of a grid, as the sweep would try it."""
    config = load_sweep(path)
    parsed = [parse_dimension(field, spec) for field, spec in config.space.items()]
    space = tuple(one for one in parsed if isinstance(one, Dimension))
    if config.search != "grid":
        return
    sweep = Sweep(config, open_files(config.folder), dict(config.study), space)  # makes no folder
    total = n_suggestions(space, config.search, config.samples)
    keys = {candidate(sweep, n, suggest(space, config.search, config.seed, n)).key for n in range(total)}
    assert len(keys) == total


VERBS: dict[str, Callable[[Path], object]] = {
    "expand": _expand, "fit": load_fit, "study": load_study, "sweep": _sweep, "evaluate": _finished(evaluate.load),
    "select": _finished(select.load)}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_job_loads(path: Path) -> None:
    VERBS[path.stem.partition("-")[0]](path)


@pytest.mark.parametrize("path", PAPERS, ids=_name)
def test_the_job_of_a_paper_says_what_it_reproduces(path: Path) -> None:
    head = " ".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    assert any(word in head for word in ("Published", "published", "not stated"))
    text = (path.parent / "README.md").read_text()
    numbers = re.findall(r"\b([DG])(\d+)(?:-[DG](\d+))?\b", head)
    for letter, first, last in numbers:
        for number in range(int(first), int(last or first) + 1):
            assert f"| {letter}{number} |" in text, f"{letter}{number} is explained nowhere"
    assert numbers or not path.stem.startswith(("study", "sweep")) or path.stem == "study-selective"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_the_table_of_jobs_names_it(path: Path) -> None:
    rows = re.findall(r"^\| ([\w/{},.*-]+) \|", (ROOT / "jobs/README.md").read_text(), re.MULTILINE)
    assert any(path.relative_to(ROOT / "jobs").match(row) for row in rows)


def _study(name: str) -> tuple[StudyConfig, Callable[[str], Any]]:
    config = load_study(ROOT / "jobs/papers" / name)

    def method(expansion: str) -> Any:
        raw = config.expansions[expansion].config
        assert raw is not None
        return parse({"name": "a", "data": {"source": "digits"}, **raw}).method
    return config, method


@pytest.mark.parametrize(("data", "prompt", "strength", "guide_step"), [
    ("caltech101", "a photo of a {name}.", 0.5, 20), ("cifar100s", "a photo of a {name}.", 0.5, 20),
    ("cars", "a photo of a {name} car.", 0.5, 20), ("imagenette", "a photo of a {name}.", 0.5, 20),
    ("dtd", "{name} texture.", 0.5, 20), ("pathmnist", "a colon pathological image of {name}.", 0.2, 10)])
def test_distdiff_as_published(data: str, prompt: str, strength: float, guide_step: int) -> None:
    config, method = _study(f"distdiff/study-{data}.yaml")
    guided, plain = method("distdiff"), method("sd")

    assert (guided.prompt, guided.strength, guided.guide_step) == (prompt, strength, guide_step)
    assert (guided.ratio, guided.steps, guided.guidance_scale, guided.rho, guided.eps) == (5, 50, 7.5, 10, 0.2)
    assert (guided.lookahead, guided.lambda_c, guided.lambda_g, guided.guidance) == (2, 1, 1, "transform")
    assert all(getattr(plain, field) == getattr(guided, field)
               for field in ("ratio", "prompt", "strength", "steps", "guidance_scale"))
    fitted = config.expansions["distdiff"].fit
    assert fitted is not None
    assert fitted.guide is not None
    assert (fitted.groups, fitted.guide.kind) == (3, "classifier")
    assert make_recipe(config.recipe) == make_recipe(fitted.guide.recipe) == make_recipe({"preset": "distdiff"})
    assert len(config.seeds) == 3


@pytest.mark.parametrize(("data", "strength", "scale", "eps", "ratio", "lr"), [
    ("cifar100s", 0.9, 50, 0.8, 20, 0.1), ("caltech101", 0.9, 5, 4, 20, 0.01), ("cars", 0.9, 50, 0.8, 20, 0.01),
    ("dtd", 0.5, 50, 0.8, 20, 0.01), ("flowers", 0.5, 8, 0.8, 20, 0.1), ("pets", 0.7, 50, 0.8, 30, 0.01),
    ("organsmnist", 0.4, 5, 0.5, 5, 0.1), ("pathmnist", 0.9, 5, 0.1, 5, 0.01), ("breastmnist", 0.9, 5, 0.1, 5, 0.01)])
def test_gif_as_published(data: str, strength: float, scale: float, eps: float, ratio: int, lr: float) -> None:
    config, method = _study(f"gif/study-{data}.yaml")
    guided, plain, recipe = method("gif-sd"), method("sd"), make_recipe(config.recipe)

    assert (guided.strength, guided.guidance_scale, guided.eps, guided.ratio) == (strength, scale, eps, ratio)
    assert (guided.steps, guided.step, guided.rotation, guided.flip) == (50, 0.1, 15, True)
    assert (len(guided.domains), len(guided.adjectives)) == (1 if data.endswith("mnist") else 5, 10)
    assert plain.guidance == "none"
    assert all(getattr(plain, field) == getattr(guided, field) for field in (
        "ratio", "strength", "steps", "guidance_scale", "domains", "adjectives", "rotation", "flip"))
    assert {method(name).ratio for name in ("cutout", "gridmask", "randaugment")} == {ratio}
    assert (recipe.lr, recipe.batch, recipe.epochs, recipe.weight_decay) == (lr, 256, 100, 1e-4)


@pytest.mark.parametrize(("name", "leaf", "values"), [
    ("guide-step", "guide_step", [1, 10, 20, 25]), ("groups", "fit.groups", [2, 3, 4, 5]),
    ("lookahead", "lookahead", [1, 2, 3, 4]), ("rho", "rho", [0.1, 1, 10, 20]),
    ("lambda-g", "lambda_g", [0.1, 0.3, 0.5, 0.7, 0.9, 1, 2])])
def test_the_published_grids(name: str, leaf: str, values: list[float]) -> None:
    ((field, spec),) = load_sweep(f"jobs/papers/distdiff/sweep-{name}.yaml").space.items()
    assert field.endswith(f".{leaf}")
    assert spec == {"choice": values}
