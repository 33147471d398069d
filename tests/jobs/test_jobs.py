"""Every file below jobs/: the loader of its verb takes it, and what the papers published is what it asks for."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayexpand.classifier.recipe import make_recipe
from rayexpand.classifier.seed_mixing import SeedMix
from rayexpand.contract import settings
from rayexpand.contract.errors import ConfigError
from rayexpand.contract.schema import Seed
from rayexpand.data.corruptions.tables import COMMON
from rayexpand.data.seeds import SeedReader, build_index
from rayexpand.evaluation import evaluate, select
from rayexpand.fitting.config import load_fit
from rayexpand.runs.config import load, parse, resolved
from rayexpand.studies import audit
from rayexpand.studies.config import StudyConfig, load_study, run_config
from rayexpand.studies.corrupted_sets import open_corrupted
from rayexpand.studies.pivot_config import PivotConfig, load_pivot
from rayexpand.studies.records import line_of
from rayexpand.studies.rounds.config import LoopConfig, load_loop, loop_preflight
from rayexpand.studies.sweep.config import dimensions_of, load_sweep
from rayexpand.studies.sweep.count import count_of
from rayexpand.studies.sweep.space import n_suggestions, suggest
from tests.commands import ROOT
from tests.data.seeds.test_cifar_c import arrays as cifar_c_arrays

FILES = sorted((ROOT / "jobs").rglob("*.yaml"))
PAPERS = [path for path in FILES if path.parent.parent.name == "papers"]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT / "jobs"))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where jobs are run from: a sweep names its study from there."""
    monkeypatch.chdir(ROOT)


def _expand(config: Any) -> None:
    assert parse(resolved(config)) == config


def _finished(loads: Callable[[str], Any]) -> Callable[[Path], None]:
    """A verb that wants a finished run: nothing else may be missing but what is no part of the repository."""
    def check(path: Path) -> None:
        problems = []
        try:
            loads(str(path))
        except ConfigError as error:
            problems = error.problems
        absent = (r"run: |reference\.path|extractor\.checkpoint|audit\.(run: |copies\.(held_out\.path|extractor)|"
                  r"membership\.((data|test)\.(path|classes)|expansion\.(prior|guide)\.weights|"
                  r"expansion\.fit\.captions\.model))")
        assert not [one for one in problems if not re.match(absent, one)]
    return check


def _sweep(config: Any) -> None:
    """Every point of a grid, as the sweep would try it: each can be, and points with other values are other trials."""
    if config.search == "grid":
        space = dimensions_of(config)
        points = [suggest(space, "grid", 0, number) for number in range(n_suggestions(space, "grid", None))]
        found = count_of(config)
        assert (found.trials, found.refused) == (len({json.dumps(one) for one in points}), ())


def _loop(config: LoopConfig) -> None:
    """Its budget can be dealt, and so can what its head says to set."""
    assert loop_preflight(config) == []


def _report(config: PivotConfig) -> None:
    """Its sources are what the files of jobs/ make, and what figures keep and compare with is in them."""
    made = {one.name: one for path in FILES if _kind(path) in ("study", "sweep") for one in [_opened(path)]}
    arms = {name: _arms(made[folder.removeprefix("runs/")]) for name, folders in config.folders.items()
            for folder in folders[:1]}
    assert {folder for folders in config.folders.values() for folder in folders} <= {f"runs/{name}" for name in made}
    for name, one in config.figures.items():
        sources = [str(source) for source in one.keep.get("source", ())]
        assert {*sources} <= {*config.sources}, name
        known = {arm for source in sources or config.sources for arm in arms[source]}
        against = one.compared_with or {}
        beside = {*arms[str(against["source"])]} if "source" in against else known
        if one.of == "trials":
            assert {str(arm) for arm in one.keep.get("arm", ())} <= known, name
            assert {row for rows in one.ticks.values() for row in rows} <= known | {
                str(use) for source in sources for use in _choices(config, source, made)}, name
            assert {str(value) for field, value in against.items() if field in ("arm", "line")} <= {
                *beside, *(line_of(arm) for arm in beside)}, name


def _arms(made: Any) -> list[str]:
    """Arms of a study as their trials have them, ratios apart; of a sweep the tuned one."""
    if isinstance(made, StudyConfig):
        return [f"{arm.name} {ratio:g}x" if isinstance(arm.ratio, list) else arm.name for arm in made.arms
                for ratio in (arm.ratio if isinstance(arm.ratio, list) else [0])]
    return [made.arm]


def _choices(config: PivotConfig, source: str, made: dict[str, Any]) -> list[Any]:
    sweep = made[config.folders[source][0].removeprefix("runs/")]
    return [value for spec in getattr(sweep, "space", {}).values() for value in spec.get("choice", ())]


# First word of a file's name -> what loads it, and what then holds of what it loads.
VERBS: dict[str, tuple[Callable[[Path], Any], Callable[[Any], None]]] = {
    "expand": (load, _expand), "fit": (load_fit, lambda config: None), "pretrain": (load_fit, lambda config: None),
    "study": (load_study, lambda config: None), "sweep": (load_sweep, _sweep),
    "evaluate": (_finished(evaluate.load), lambda config: None),
    "audit": (_finished(audit.load_audit), lambda config: None),
    "loop": (load_loop, _loop),
    "select": (_finished(select.load), lambda config: None), "report": (load_pivot, _report)}


def _kind(path: Path) -> str:
    return path.stem.partition("-")[0]


@cache
def _opened(path: Path) -> Any:
    """A job as its verb loads it, once for all tests."""
    loads, _ = VERBS[_kind(path)]
    return loads(path)


def _job(name: str) -> Any:
    return _opened(ROOT / "jobs" / name)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_job_loads(path: Path) -> None:
    _, check = VERBS[_kind(path)]
    check(_opened(path))


def test_the_job_of_a_paper_says_what_it_reproduces() -> None:
    problems: list[str] = []
    for path in PAPERS:
        lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
        head = " ".join(line.removeprefix("#").strip() for line in lines)
        if not any(word in head for word in ("Published", "published", "not stated")):
            problems.append(f"{_name(path)}: says nothing of what was published")
        text = (path.parent / "README.md").read_text()
        numbers = re.findall(r"\b([CDFG])(\d+)(?:-[CDFG](\d+))?\b", head)
        for letter, first, last in numbers:
            problems += [f"{_name(path)}: {letter}{number} is explained nowhere"
                         for number in range(int(first), int(last or first) + 1)
                         if f"| {letter}{number} |" not in text]
        if not numbers and path.stem.startswith(("study", "sweep")) and path.stem != "study-selective":
            problems.append(f"{_name(path)}: names no deviation, figure or guess")
    assert PAPERS
    assert problems == []


@pytest.mark.parametrize(("name", "numbers"), [
    ("gif/study-cars", "19.8 25.8 28.4 43.2 51.7 75.7"), ("gif/study-organsmnist", "76.3 78.3 78.9 79.6 78.9 80.7"),
    ("gif/sweep-guide", "79.0 80.7 80.6"), ("gif/study-selective", "1.3 to 1.6"),
    ("diffmix/study-dogs", "87.48 87.59 87.42 87.30 87.40 87.33 87.74 87.89"),
    ("diffmix/study-dogs-vit", "92.06 92.13 92.02 91.91 92.05 92.07 91.99 91.89"),
    ("diffmix/study-cub-lt-10", "58.13 57.62 59.25 61.42 62.27 64.48"),
    ("diffmix/study-flower-lt-50", "90.87 91.43 92.06 91.84 92.96 93.86 8,189"),
    ("diffmix/sweep-gamma-all", "-1.08 +0.25 +0.92 +0.97 +0.50 +0.38"),
    ("realfake/study-celeba", "89.65 86.22 85.60 86.93 76.90 82.55 73.35"),
    ("realfake/fit-celeba", "Smiling Attractive Heavy Makeup"),
    ("realfake/audit-membership-in10", "0.001 0.01 102,488 12,811"), ("realfake/audit-copies-in100", "1,024 DISC"),
    ("realfake/study-in10", "79.4"), ("realfake/study-in100", "62.4"), ("realfake/study-in1k", "54.1 42.9"),
    ("realfake/study-cub", "33.7"), ("realfake/study-cars", "47.1"), ("realfake/study-pets", "75.9"),
    ("realfake/study-eurosat", "94.0"), ("diffmix/study-waterbird", "62.46 60.90 61.83 72.94 70.28"),
    ("distdiff/sweep-guide", "66.71 92.24"), ("distdiff/sweep-direct", "76.77 83.19"),
    ("distdiff/sweep-strength", "figure 7"), ("distdiff/study-caltech101-lecf", "200 5.46 6.25"),
    ("gif/study-as-distdiff", "5.46 ViT-B/32"), ("gif/sweep-terms", "1.4"), ("gif/sweep-level", "figure 6"),
    ("gif/study-cifar100c", "23.6 34.2 42.9 48.2 75.2 55.4 79.4 61.4"),
    ("gif/study-cars-architectures", "18.4 29.6 64.1 32.0 49.2 75.1 26.2 39.7 60.2"),
    ("gif/study-medical-clip", "78.4 67.2 78.9 74.3 60.0 64.9 77.3 60.2 77.4"),
    ("diffcoremix/study-cub", "74.23 74.30 78.12 79.52"), ("diffcoremix/study-cars", "89.06 88.84 91.17 92.71"),
    ("diffcoremix/study-caltech101", "91.47 91.36 92.23 93.72"),
    ("diffcoremix/study-flowers", "66.18 61.05 62.45 56.30 68.73 61.07 69.84 62.58"),
    ("diffcoremix/study-imagenet", "77.03 93.52 76.75 77.08 79.47 96.32 80.48 98.21"),
    ("diffcoremix/study-tiny-imagenet", "56.59 55.97 56.67 65.91 67.81 87.38"),
    ("diffcoremix/study-cifar100", "76.84 75.31 76.80 82.84 83.37 97.62"),
    ("diffcoremix/study-mixing", "85.86 87.68 88.08 88.92 89.50 90.62 91.85 92.74"),
    ("diffcoremix/study-transfer", "78.61 88.26 79.42 90.84 81.57 94.38 82.37 95.10"),
    ("diffcoremix/study-vit", "54.73 67.32 45.31 53.45 51.63 61.13 47.10 48.41 42.65 50.53 37.15 49.90"),
    ("diffcoremix/study-overhead", "68.2 59.3 58.9 1.37 0.54 0.73"),
    ("diffcoremix/study-shares", "10.1 11.1 734 8,144 1,020 714"),
    ("gif/sweep-tuning", "80.8 59.4 79.5 86.9 77.4 80.7")])
def test_jobs_quote_what_the_papers_print(name: str, numbers: str) -> None:
    text = (ROOT / f"jobs/papers/{name}.yaml").read_text()

    assert [one for one in numbers.split() if one not in text] == []


def test_every_row_of_gifs_first_table_is_quoted() -> None:
    """Each method that is no arm here, with its average over the six natural and over the three medical sets."""
    text = (ROOT / "jobs/papers/gif/README.md").read_text()
    rows = {cells[0]: [float(cell) for cell in cells[1:]] for line in text.splitlines()
            if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 12
            and re.fullmatch(r"[\d.]+", cells[1])}

    assert set(rows) == {"CLIP, zero-shot", "distillation of CLIP", "MAE", "DALL-E2", "GIF-MAE", "GIF-DALLE"}
    for row in rows.values():
        assert row[6] == pytest.approx(sum(row[:6]) / 6, abs=0.051)
        assert row[10] == pytest.approx(sum(row[7:10]) / 3, abs=0.051)


def test_averages_of_quoted_tables_are_those_of_the_papers() -> None:
    """GIF, table 1: the columns above a line of averages give it, to the digit that is printed."""
    rows = {cells[0]: [float(cell) for cell in cells[1:]] for line in
            (ROOT / "jobs/papers/gif/README.md").read_text().splitlines()
            if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 7
            and re.fullmatch(r"[\d.]+", cells[1])}
    natural = ("Caltech-101", "Cars", "Flowers", "DTD", "CIFAR100-S", "Pets")
    for of, names in (("six natural", natural), ("three medical", ("PathMNIST", "BreastMNIST", "OrganSMNIST"))):
        found = [sum(rows[name][k] for name in names) / len(names) for k in range(6)]
        assert rows[f"average of the {of} sets"] == pytest.approx(found, abs=0.051)


def test_classifiers_start_from_weights_that_see_their_own_normalisation() -> None:
    """Every study whose checkpoint is called after weights of timm."""
    from timm.models import get_pretrained_cfg

    checked = set()
    for path in [one for one in PAPERS if one.name.startswith("study")]:
        study: StudyConfig = _opened(path)
        for arm in study.arms:
            made = make_recipe({**study.recipe, **arm.recipe})
            weights = Path(made.checkpoint or "").name.removesuffix(".safetensors")
            if "." in weights and (theirs := get_pretrained_cfg(weights)):
                assert (made.mean, made.std) == (tuple(theirs.mean), tuple(theirs.std)), f"{_name(path)}: {arm.name}"
                checked.add(weights)
    assert {"resnet50.tv_in1k", "vit_base_patch16_384.augreg_in21k_ft_in1k",
            "vit_base_patch32_clip_224.laion2b"} <= checked


@pytest.mark.parametrize("path", PAPERS, ids=_name)
def test_what_a_head_says_to_set_can_be_set(path: Path) -> None:
    """Each quoted --set alone, as a shell gives it: a field, and a value that is YAML."""
    head = " ".join(line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    for one in re.findall(r'--set "([^"]+)"', head):
        settings.override({}, [one])


def test_the_table_of_jobs_names_every_file() -> None:
    rows = re.findall(r"^\| ([\w/{},.*-]+) \|", (ROOT / "jobs/README.md").read_text(), re.MULTILINE)
    assert [_name(path) for path in FILES
            if not any(path.relative_to(ROOT / "jobs").match(row) for row in rows)] == []


@pytest.mark.parametrize("method", ["diffmix", "realfake"])
def test_what_is_fitted_for_sdxl_is_what_its_run_names(method: str) -> None:
    fit, run = (_job(f"imagenet/{verb}-{method}-sdxl.yaml") for verb in ("fit", "expand"))
    made = {kind for kind, one in fit.fit if one is not None}
    assert run.artifacts == {kind: f"artifacts/{fit.name}-{kind}" for kind in made}
    assert (run.prior.weights, run.image.size, run.data) == (fit.prior.weights, fit.fit.adapter.resolution, fit.data)
    assert run.method.name == method
    assert getattr(run.method, "visual_token", "none") == fit.fit.adapter.finetune.visual_token
    if method == "realfake":  # in the order of the text encoders: ViT-L of OpenAI, ViT-bigG of LAION
        assert [one.weights.split("/")[1] for one in (fit.guide, fit.fit.class_features.guide_2)] == [
            "vit_large_patch14_clip_224.openai@main", "vit_gigantic_patch14_clip_224.laion2b@main"]


@cache
def _study(name: str) -> tuple[StudyConfig, Callable[[str], Any]]:
    config = _job(f"papers/{name}")

    @cache
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
        "ratio", "strength", "steps", "guidance_scale", "rotation", "flip"))
    one = guided.domains if data.endswith("mnist") else ("an image of",)
    assert (plain.domains, plain.adjectives) == ((guided.domains, guided.adjectives) if data == "cifar100s" else
                                                 (one, ("",))), "the released baseline draws prompts on CIFAR only"
    assert {method(name).ratio for name in ("cutout", "gridmask", "randaugment")} == {ratio}
    assert (recipe.lr, recipe.batch, recipe.epochs, recipe.weight_decay) == (lr, 256, 100, 1e-4)


@pytest.mark.parametrize(("data", "ratio"), [
    ("cifar100s", 20), ("caltech101", 20), ("cars", 20), ("dtd", 20), ("flowers", 20), ("pets", 30),
    ("organsmnist", 5), ("pathmnist", 5), ("breastmnist", 5), ("cifar100s-ablations", 5)])
def test_gifs_other_systems_as_published(data: str, ratio: int) -> None:
    config, method = _study(f"gif/study-{data}.yaml")
    mae, dalle = method("gif-mae"), method("gif-dalle")

    assert (mae.generator, mae.eps, mae.ratio, mae.level) == ("mae", 5, ratio, "channel")
    assert (dalle.generator, dalle.steps, dalle.guidance_scale) == ("unclip", 100, 4)
    assert (dalle.eps, dalle.ratio) == (0.1, ratio)
    assert (method("mae").guidance, method("dalle").guidance) == ("random", "none")
    for plain, guided in (("mae", mae), ("dalle", dalle)):
        changed = method(plain).model_dump()
        assert {name: value for name, value in guided.model_dump().items() if changed[name] != value} == {
            "guidance": "guided"}
    if data.endswith("mnist"):
        raw = config.expansions["gif-dalle"].config
        assert raw is not None
        assert raw["prior"]["weights"] == f"artifacts/gif-{data}-dalle-generator"


def test_distdiff_as_its_code_has_it() -> None:
    """Beside the setting of the equations: the same but for what the released code does otherwise."""
    for path in [one for one in PAPERS if one.parent.name == "distdiff" and one.name.startswith("study")]:
        config, method = _study(f"distdiff/{path.name}")
        if "released" not in config.expansions:
            continue
        plain, released = method("distdiff").model_dump(), method("released").model_dump()
        assert {name: value for name, value in released.items() if plain[name] != value} == {
            "proto_space": "official", "guide_input": "raw"}
        assert config.expansions["released"].fit == config.expansions["distdiff"].fit
        assert "DistDiff, released code" in [arm.name for arm in config.arms]


def test_gif_as_its_code_has_it() -> None:
    """Pairs of copies, whose entropy and diversity the released code averages, so 1 / K = 0.5."""
    for path in [one for one in PAPERS if one.parent.name == "gif" and one.name.startswith("study")]:
        config, method = _study(f"gif/{path.name}")
        if "released" not in config.expansions:
            continue
        plain, released = method("gif-sd").model_dump(), method("released").model_dump()
        assert {name: value for name, value in released.items() if plain.get(name) != value} == {
            "group_size": 2, "class_term_on": "first", "kl_direction": "official", "noise_level": "official",
            "lambda_ent": 0.5, "lambda_div": 0.5}
        assert "GIF-SD, released code" in [arm.name for arm in config.arms]


@pytest.mark.parametrize("folder", ["distdiff", "gif"])
def test_every_set_has_an_arm_as_the_released_code(folder: str) -> None:
    sets = {"distdiff": "caltech101 cifar100s cars imagenette dtd pathmnist caltech101-ablations", "gif":
            "caltech101 cars cifar100s dtd flowers pets breastmnist organsmnist pathmnist cifar100s-ablations"}[folder]
    assert [name for name in sets.split()
            if "released" not in _job(f"papers/{folder}/study-{name}.yaml").expansions] == []


def test_gif_turns_seeds_as_torchvision() -> None:
    found: dict[str, str] = {}
    for path in [one for one in PAPERS if one.parent.name == "gif" and one.name.startswith("study")]:
        config, method = _study(f"gif/{path.name}")
        found |= {f"{path.stem}: {name}": method(name).rotation_filter for name, one in config.expansions.items()
                  if one.config is not None and method(name).name == "gif" and method(name).generator == "sd"}
    assert len(found) > 20
    assert set(found.values()) == {"nearest"}


def test_a_sweep_runs_as_the_released_code_too() -> None:
    """The line that the folder's page has for it."""
    line = re.search(r"rayexpand (sweep jobs/papers/distdiff/sweep-rho.yaml .*?)\n\n",
                     (ROOT / "jobs/papers/distdiff/README.md").read_text(), re.DOTALL)
    assert line is not None
    words = shlex.split(line[1].replace("\\\n", " "))
    config = load_sweep(words[1], [words[i + 1] for i, word in enumerate(words) if word == "--set"])

    assert config.arm == "DistDiff, released code"
    assert list(config.space) == ["expansions.released.method.rho"]


@pytest.mark.parametrize(("paper", "sets", "space"), [
    ("gif", "caltech101 cars dtd flowers pets", {
        "arms.GIF-SD.use": ["cutout", "gridmask", "randaugment", "sd", "gif-sd", "mae", "gif-mae", "dalle",
                            "gif-dalle"],
        "arms.GIF-SD.ratio": [5, 10, 15, 20]}),
    ("distdiff", "caltech101 cars cifar100s dtd imagenette pathmnist", {
        "expansions.distdiff.method.ratio": [1, 5, 10, 20]})])
def test_sweeps_over_the_number_of_copies_take_every_set(paper: str, sets: str, space: dict[str, list[Any]]) -> None:
    """Figure 4 of GIF and of DistDiff. (GIF on CIFAR100-S: its study has both ratios.)"""
    for data in sets.split():
        config = load_sweep(f"jobs/papers/{paper}/sweep-ratio.yaml", [f"study=jobs/papers/{paper}/study-{data}.yaml"])
        assert config.space == {field: {"choice": values} for field, values in space.items()}
        if paper == "distdiff":
            assert {"AutoAugment", "SD"} <= {arm["name"] for arm in config.study["arms"]}


def test_cifar_c_is_read_as_it_was_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GIF's table 2: the third severity of fifteen corruptions, rows 8 to 11 of 20 here; labels are the numbers of
    the trained classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/cifar100").mkdir(parents=True)
    cifar_c_arrays(tmp_path / "data/CIFAR-100-C")
    names = [f"class {label}" for label in range(8)]
    features = {"fine_label": {"names": names, "_type": "ClassLabel"}, "img": {"_type": "Image"}}
    schema = pa.schema([("img", pa.struct([("bytes", pa.binary())])), ("fine_label", pa.int64())]).with_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(pa.table({"img": [{"bytes": b""}], "fine_label": [0]}, schema), "data/cifar100/train-0.parquet")

    study: StudyConfig = _job("papers/gif/study-cifar100c.yaml")
    shown = open_corrupted("severity3", study.extra_tests["severity3"], build_index(study.data).classes)
    assert study.training.keep == "weights"
    assert shown.cells == tuple((kind, 3) for kind in COMMON)
    assert shown.first.index.labels.tolist() == [7, 3, 0, 3]
    data, opened = shown.listings[COMMON.index("fog")]
    first = SeedReader(opened.index, data).read([1])[0]
    assert isinstance(first, Seed)
    expected = 10 * COMMON.index("fog") + 2 * 2 + 50
    assert np.asarray(Image.open(io.BytesIO(first.image)))[0, 0].tolist() == [expected] * 3


@pytest.mark.parametrize(("name", "leaf", "values"), [
    ("guide-step", "guide_step", [1, 10, 20, 25]), ("groups", "fit.groups", [2, 3, 4, 5]),
    ("lookahead", "lookahead", [1, 2, 3, 4]), ("rho", "rho", [0.1, 1, 10, 20]),
    ("lambda-g", "lambda_g", [0.1, 0.3, 0.5, 0.7, 0.9, 1, 2])])
def test_the_published_grids(name: str, leaf: str, values: list[float]) -> None:
    ((field, spec),) = _job(f"papers/distdiff/sweep-{name}.yaml").space.items()
    assert field.endswith(f".{leaf}")
    assert spec == {"choice": values}


def test_direct_guidance_has_the_published_grid() -> None:
    space = _job("papers/distdiff/sweep-direct.yaml").space

    assert {field.rpartition(".")[2]: spec["choice"] for field, spec in space.items()} == {
        "rho": [0.1, 1, 10, 20], "guide_step": [1, 10, 20]}


def test_pathmnist_starts_from_clip() -> None:
    study: StudyConfig = _job("papers/distdiff/study-pathmnist.yaml")

    assert [make_recipe({**study.recipe, **arm.recipe}).backbone for arm in study.arms] == [
        *["resnet50"] * 5, *["vit_base_patch32_clip_224"] * 4]


@cache
def _words(*folders: str, **fields: str) -> set[str]:
    """Values of top-level fields of the jobs of some folders, and what their heads put there by --set."""
    found: set[str] = set()
    for path in (path for path in FILES if path.parent.name in folders):
        text, verb = path.read_text(), path.stem.partition("-")[0]
        if verb in fields:
            found |= set(re.findall(rf"(?:^|--set[ \n#]+){fields[verb]}[:=] ?([\w.-]+)", text, re.MULTILINE))
        found |= set(re.findall(r"--set[ \n#]+name=([\w.-]+)", text))
    return found


def test_what_a_job_needs_is_made_by_another() -> None:
    kinds = "generator|adapter|captions|class_features|image_features|prototypes|thresholds|guide"
    missing: list[str] = []
    for path in FILES:
        if not path.stem.startswith(("expand", "select", "study", "sweep", "evaluate")):
            continue
        fits, runs = _words(path.parent.name, fit="name"), _words(path.parent.name, "imagenet", expand="name")
        text = path.read_text()
        missing += [f"{_name(path)}: artifacts of {name}"
                    for name, _ in re.findall(rf"artifacts/([\w.-]+?)-({kinds})\b", text) if name not in fits]
        missing += [f"{_name(path)}: run {name}"
                    for name in re.findall(r"run: runs/([\w.-]+)(?=[,}\s])", text) if name not in runs]
    assert missing == []


@cache
def _selections() -> set[tuple[str, str]]:
    """(run, name) of every decision that a job makes."""
    found = [settings.read(path) for path in FILES if path.stem.startswith("select")]
    return {(one["run"], one["name"]) for one in found}


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.startswith("study")], ids=_name)
def test_every_selection_of_an_arm_is_made_by_a_job(path: Path) -> None:
    """Of a run that is made before. About one the study makes, the study decides too."""
    config = _opened(path)
    for arm in config.arms:
        if arm.selection not in (None, *config.selections):
            run = config.expansions[str(arm.use)].run
            assert run is not None, f"{arm.name}: a selection of a run that the study makes"
            assert (run, arm.selection) in _selections(), f"{arm.name}: no select-*.yaml decides it"


@pytest.mark.parametrize(("data", "r50", "vit"), [
    ("cub", 0.025, 1e-3), ("aircraft", 0.05, 1e-3), ("flowers", 0.05, 5e-4), ("cars", 0.05, 1e-3),
    ("dogs", 0.005, 1e-5)])
def test_diffmix_as_published(data: str, r50: float, vit: float) -> None:
    mix = _job(f"papers/diffmix/expand-{data}.yaml").method
    assert (mix.variant, mix.ratio, mix.strengths, mix.prompt) == (
        "diff_mix", 5, (0.5, 0.7, 0.9), "a photo of a {token} {metaclass}")
    assert (mix.steps, mix.guidance_scale, mix.solver, mix.negative) == (25, 7.5, "dpmpp_2m", "")
    recipe = _job(f"papers/diffmix/fit-{data}.yaml").fit.adapter.finetune  # type: ignore[union-attr]
    assert (recipe.strategy, recipe.rank, recipe.steps, recipe.batch, recipe.lr, recipe.token_lr) == (
        "ti_db", 10, 35_000, 8, 5e-5, 5e-5)
    for net, lr, size in (("", r50, 448), ("-vit", vit, 384)):
        config, method = _study(f"diffmix/study-{data}{net}.yaml")
        trained = make_recipe(config.recipe)
        assert (trained.lr, trained.size, trained.epochs, trained.smoothing_mode) == (lr, size, 120, "others")
        assert {arm.replace for arm in config.arms if arm.use} == {0.1}
        assert {arm.soft_label.get("gamma") for arm in config.arms if arm.use == "diff-mix"} == {0.5}
        assert (method("real-guidance").strength, method("real-guidance").steps) == (0.1, 25)
        assert (method("da-fusion").mode, method("da-fusion").strengths) == ("joint_ti", (1.0, 0.75, 0.5, 0.25))


@pytest.mark.parametrize(("shots", "p", "gamma"), [("1", 0.5, 0.1), ("5", 0.3, 0.1), ("10", 0.2, 0.1),
                                                   ("all", 0.1, 0.5)])
def test_diffmix_with_few_shots(shots: str, p: float, gamma: float) -> None:
    config, method = _study(f"diffmix/study-cub-shots-{shots}.yaml")

    assert config.subset.n == (None if shots == "all" else int(shots))
    assert {arm.replace for arm in config.arms if arm.use} == {p}
    assert {arm.soft_label["gamma"] for arm in config.arms if (arm.use or "").endswith("mix")} == {gamma}
    assert [method(name).variant for name in config.expansions] == [
        f"{weights}_{kind}" for weights in ("real", "diff") for kind in ("gen", "aug", "mix")]
    for kind in ("real", "diff"):
        space = _job(f"papers/diffmix/sweep-strength-{kind}-{shots}.yaml").space
        assert space[f"expansions.{kind}-mix.method.strengths"] == {
            "choice": [[0.1], [0.3], [0.5], [0.7], [0.9], [1.0]]}
    if shots in ("5", "all"):
        assert list(_job(f"papers/diffmix/sweep-gamma-{shots}.yaml").space.values()) == [
            {"choice": [1.5, 1.0, 0.5, 0.3, 0.1, 0.0]}, {"choice": [[0.5], [0.7], [0.9]]}]


@pytest.mark.parametrize("data", ["cub", "flower"])
@pytest.mark.parametrize("factor", [100, 50, 10])
def test_diffmix_on_a_long_tail(data: str, factor: int) -> None:
    config, method = _study(f"diffmix/study-{data}-lt-{factor}.yaml")
    mix, arms = method("diff-mix"), {arm.name: arm for arm in config.arms}
    fitted = config.expansions["diff-mix"].fit

    assert config.subset.imbalance_factor == factor
    assert config.frequency == ((5, 20) if data == "cub" else (10, 30))
    assert (mix.ratio, mix.strengths, mix.targets, mix.references) == (10, (0.7,), "balanced", "image_uniform")
    assert (arms["Diff-Mix"].replace, arms["Diff-Mix"].draw, arms["Diff-Mix"].soft_label) == (
        0.3, "inverse_freq", {"gamma": 0.5})
    assert arms["Diff-Mix, fill"].fill
    assert fitted is not None
    assert fitted.adapter is not None
    assert fitted.adapter.finetune.balance == "inverse"


def test_diffmix_on_other_backgrounds() -> None:
    config, _ = _study("diffmix/study-waterbird.yaml")
    mix = next(arm for arm in config.arms if arm.name == "Diff-Mix")

    assert (mix.replace, mix.soft_label, make_recipe(config.recipe).epochs) == (0.1, {"gamma": 0.8}, 128)
    assert (config.extra_tests["waterbird"].restrict, config.extra_tests["waterbird"].groups) == (False,
                                                                                           "data/waterbird/groups.csv")


@pytest.mark.parametrize(("data", "captions", "size", "epochs"), [
    ("in10", True, 224, 200), ("in100", True, 224, 200), ("in1k", True, 224, 300), ("cub", False, 448, 200),
    ("cars", False, 448, 200), ("pets", False, 224, 200), ("eurosat", False, 448, 200), ("celeba", False, 224, 30)])
def test_realfake_as_published(data: str, captions: bool, size: int, epochs: int) -> None:
    fitted = _job(f"papers/realfake/fit-{data}.yaml").fit
    run = _job(f"papers/realfake/expand-{data}.yaml")
    config, _ = _study(f"realfake/study-{data}.yaml")
    recipe, method, trained = fitted.adapter.finetune, run.method, make_recipe(config.recipe)  # type: ignore[union-attr]

    assert (recipe.rank, recipe.lr, recipe.batch, recipe.snr_gamma, recipe.mmd_gamma, recipe.mmd_reduction) == (
        4, 1e-4, 64, 5, 0.05, "mean")
    assert (method.strength, method.steps, method.guidance_scale, method.solver, method.lora_scale) == (
        0.75, 30, 2, "unipc", 0.5)
    assert method.negative == "distorted, unrealistic, blurry, out of frame"
    assert method.visual_token == recipe.visual_token == "class_mean"
    assert method.prompt == recipe.prompt
    assert ("{caption}" in method.prompt) == captions == (fitted.captions is not None)
    assert (run.image.size, run.image.fit) == (512, "squash")
    assert (trained.size, trained.epochs) == (size, epochs)
    assert {(arm.real, arm.replace) for arm in config.arms if arm.use} == {(0, None), (1, None)}
    if data.startswith("in"):
        more = {"in10": [2.5], "in100": [6.5]}.get(data, [])  # where samples alone pass real images
        assert next(arm for arm in config.arms if arm.name == "synthetic").ratio == sorted([1, 2, 5, 10, *more])


def test_realfake_as_its_code_has_it() -> None:
    made = _job("papers/realfake/fit-in10-official.yaml").fit.adapter
    method = _job("papers/realfake/expand-in10-official.yaml").method
    assert made is not None
    recipe = made.finetune

    assert (recipe.visual_token, recipe.mmd_gamma, recipe.mmd_reduction, recipe.mmd_weighting, recipe.mmd_scope) == (
        "instance", 0.003, "sum", "min_snr", "per_rank")
    assert (method.visual_token, method.negative) == (
        "instance", "distorted, unrealistic, blurry, out of frame, cropped, deformed")
    assert method.prompt == "photo of {name}, {caption}, best quality"


@pytest.mark.parametrize("data", ["in10", "in100"])
def test_the_ten_rows_of_the_modules(data: str) -> None:
    """(latent prior, fine-tuned, visual guidance, which adapter) of each arm, in the order of the table."""
    config, method = _study(f"realfake/study-{data}-modules.yaml")
    rows = []
    for arm in config.arms[1:]:
        made, raw = method(str(arm.use)), config.expansions[str(arm.use)].config
        assert raw is not None
        adapter = raw["artifacts"].get("adapter", "").removeprefix(f"artifacts/realfake-{data}").removesuffix("adapter")
        rows.append((made.latent_prior, made.finetuned, made.visual_token != "none", adapter.strip("-")))
        assert arm.real == 0

    parts = [(False, False, ""), (True, False, "ft"), (True, True, "vg"), (True, False, "dm"), (True, True, "")]
    assert rows == [(latent, *part) for latent in (False, True) for part in parts]


@pytest.mark.parametrize(("name", "classes"), [("imagenet10", 10), ("imagenet100", 100)])
def test_the_classes_of_the_smaller_imagenets(name: str, classes: int) -> None:
    found = (ROOT / f"jobs/papers/realfake/{name}.txt").read_text().split()

    assert len(set(found)) == len(found) == classes
    assert all(re.fullmatch(r"n\d{8}", one) for one in found)


@pytest.mark.parametrize(("data", "preset", "noun"), [
    ("cub", "fine-grained", ", a bird"), ("cars", "fine-grained", ", a car"), ("caltech101", "fine-grained", ""),
    ("flowers", "scarcity", ", a flower"), ("tiny-imagenet", "tiny-imagenet", ""), ("cifar100", "cifar100", "")])
def test_diffcoremix_as_published(data: str, preset: str, noun: str) -> None:
    config, _ = _study(f"diffcoremix/study-{data}.yaml")
    made = run_config(config, "diffcoremix", config.expansions["diffcoremix"], 0, config.data)
    method, accept = made.method, made.accept

    assert (method.ratio, method.guidance_scale, method.prompt) == (1, 12, f"a {{name}}{noun}, {{context}}")
    assert (made.prior.weights, made.image.size) == ("models/cosxl", 512)
    assert accept is not None
    assert (accept.comparison, accept.above, accept.attempts, accept.exhausted) == ("seed", "class", 5, "best")
    assert make_recipe(config.recipe) == make_recipe({"preset": f"diffcoremix/{preset}"})
    mixed = next(arm for arm in config.arms if arm.name == "DiffCoRe-Mix")
    assert (mixed.ratio, mixed.mix, mixed.replace) == ([0.5, 1], SeedMix(), None)
    if "released" in config.expansions:
        judge = run_config(config, "released", config.expansions["released"], 0, config.data).accept
        assert judge is not None
        assert (judge.above, judge.attempts, judge.exhausted) == (0.6, 1, "reject")


def test_the_rows_of_diffcoremixs_table_of_parts() -> None:
    """(generated images, pixel, patch) of each arm, in the order of the table."""
    config, _ = _study("diffcoremix/study-mixing.yaml")
    rows = [(arm.use is not None, bool(arm.mix and arm.mix.pixel), bool(arm.mix and arm.mix.pixel < 1))
            for arm in config.arms[:7]]

    assert rows == [(False, False, False), (True, False, False), (False, True, False), (False, False, True),
                    (True, True, False), (True, False, True), (True, True, True)]
    assert {arm.mix.partner for arm in config.arms if arm.mix and arm.use is None} == {"class"}
