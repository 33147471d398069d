"""`fit: {pretrain: ...}`: a generator and its guide as an artifact, and the gate that says when it is the limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rayexpand.artifacts import store
from rayexpand.cli.main import app
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.schema import ClassTable
from rayexpand.data.seeds import build_index, digits_split
from rayexpand.fitting import fit as fits
from rayexpand.fitting import prior_quality
from rayexpand.fitting.config import load_fit, parse_fit
from rayexpand.fitting.picture_grid import CELL, GAP, LINE, NAME
from rayexpand.fitting.pretrain import PretrainFit, read_pictures
from rayexpand.models.folders import folder_hash
from rayexpand.models.guides import guide_hash
from rayexpand.models.prior import inspect_prior
from rayexpand.models.tiny import digits
from rayexpand.models.tiny.setting import Setting, problems
from rayexpand.runs.config import parse
from tests.commands import ROOT
from tests.models.tiny.test_pretrain import TINY

torch.set_num_threads(1)
JOBS = ROOT / "jobs"
COLOURS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cat": (30, 30, 200)}
RECIPE = {"updates": 30, "batch": 8, "crop": "none", "backbone_args": {"width": 4}}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of plain colours, 12 by 9 pixels: six images to train on and four to test on each."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.Generator(np.random.Philox(key=4))
    for part, count in (("train", 6), ("test", 4)):
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                noisy = np.array(colour) + rng.integers(-20, 20, (12, 9, 3))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / part / name / f"{part}{i}.png")
    return root


@pytest.fixture
def raw(colours: Path, tmp_path: Path) -> dict[str, Any]:
    data = {"source": "imagefolder", "path": str(colours)}
    gate = {"test": {**data, "split": "test"}, "recipe": RECIPE, "max_loss": 100}
    return {"name": "colours", "out": str(tmp_path / "artifacts"), "data": {**data, "split": "train"}, "device": "cpu",
            "fit": {"pretrain": {**TINY, "samples": 6, "sample_steps": 2, "checkpoint_steps": 3, "gate": gate}}}


def fit(raw: dict[str, Any], progress: Any = lambda *_: None) -> Path:
    return fits.fit(parse_fit(raw), progress)["prior"]


def gated(raw: dict[str, Any], **gate: Any) -> dict[str, Any]:
    made = raw["fit"]["pretrain"]
    return {**raw, "fit": {"pretrain": {**made, "gate": {**made["gate"], **gate}}}}


def hashes(folder: Path) -> list[str]:
    return [folder_hash(folder / part) for part in ("pipeline", "guide")]


def test_the_gate_passes_and_fails_and_says_so_in_words(raw: dict[str, Any]) -> None:
    """An autoencoder of five steps loses the colours. How much may be lost is no reason to train again."""
    lenient = fit(raw)
    stages: list[str] = []
    strict = fit(gated(raw, max_loss=5), lambda stage, done, total: stages.append(stage))
    passed, failed = (json.loads((folder / "measured.json").read_text()) for folder in (lenient, strict))

    assert strict != lenient
    assert hashes(strict) == hashes(lenient)
    assert not {"guide", "autoencoder", "generator"} & set(stages)
    assert (passed["gate_passed"], failed["gate_passed"]) == (True, False)
    assert passed["verdict"].startswith("gate passed: a classifier of the real images names 100.0 %")
    assert "THE PRIOR IS THE LIMIT" in failed["verdict"]
    assert all(word in failed["verdict"] for word in ("more steps", "more latent channels", "shrink images less"))
    assert failed["points_lost"] == pytest.approx(100 * (1 - failed["accuracy_reconstructed"]), abs=0.01)
    assert failed["accuracy_reconstructed"] <= 0.7
    for key in ("psnr_db", "zero_shot", "samples_named_right", "samples_classified_right", "seconds", "points_lost_se"):
        assert passed[key] == failed[key]
    assert passed["images"] == 12
    assert passed["measured_on"] == "test images"
    assert store.read_facts(strict)["gate_passed"] is False
    facts = inspect_prior(str(lenient / "pipeline"))
    assert (facts.image_size, facts.vae_factor) == (8, 1)
    with Image.open(lenient / "sheet.png") as sheet:
        assert sheet.size == (NAME + 4 * (CELL + GAP), 2 * LINE + GAP + 3 * (CELL + GAP)), "two lines of heads"


def test_points_lost_are_counted_on_pairs() -> None:
    measured = {"accuracy_real": 0.9, "accuracy_reconstructed": 0.893, "points_lost": 0.7, "points_lost_se": 0.2,
                "points_allowed": 0.5, "gate_passed": False}
    assert "90.0 %" in prior_quality.verdict(measured)
    assert "0.7 ± 0.2 points are lost, 0.5 allowed (within two standard errors" in prior_quality.verdict(measured)
    assert "within two" not in prior_quality.verdict({**measured, "points_lost_se": 0.05})
    assert prior_quality.verdict({"psnr_db": 30.0}).startswith("no gate")


@pytest.mark.parametrize(("right", "poor"), [(0.5, True), (0.79, True), (0.81, False)])
def test_samples_that_are_not_recognised_are_told_from_a_poor_autoencoder(right: float, poor: bool) -> None:
    lines = prior_quality.summary({"psnr_db": 30.0, "images": 10, "measured_on": "test images", "zero_shot": 1.0,
                                   "samples": 20, "samples_named_right": right, "seconds": {}})
    assert any("the UNet is not there yet" in line for line in lines) == poor


def test_the_command_prints_numbers_words_and_the_fields_to_set(raw: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "colours.yaml"
    file.write_text(json.dumps(gated(raw, max_loss=0)))
    shown = CliRunner().invoke(app, ["fit", str(file), "--no-ray"])

    assert shown.exit_code == 0, shown.output
    link = f"{raw['out']}/colours-prior"
    assert f"--set prior.weights={link}/pipeline --set guide.weights={link}/guide" in shown.stdout
    assert "THE PRIOR IS THE LIMIT" in shown.stdout
    assert "dB on 12 test images" in shown.stdout
    run = parse({"name": "run", "data": raw["data"], "prior": {"weights": f"{link}/pipeline"},
                 "method": {"name": "img2img", "prompt": "a photo of a {name}"}})
    assert inspect_prior(run.prior.weights).image_size == 8


def test_a_killed_fit_continues_from_its_checkpoints(raw: dict[str, Any], tmp_path: Path) -> None:
    without = {**raw, "fit": {"pretrain": {**raw["fit"]["pretrain"], "gate": None, "samples": 0}}}
    whole = fit({**without, "out": str(tmp_path / "whole")})
    seen: list[tuple[str, int]] = []

    def killed(stage: str, done: int, total: int) -> None:
        seen.append((stage, done))
        if (stage, done) == ("generator", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(without, killed)
    (steps,) = Path(raw["out"]).glob(".prior-*.steps")
    assert {file.name for file in steps.iterdir()} == {
        "guide.safetensors", "autoencoder.safetensors", "generator.safetensors", "position.json"}
    assert not list(Path(raw["out"]).glob("prior-*"))
    seen.clear()
    again = fit(without, lambda stage, done, total: seen.append((stage, done)))

    assert [one for one in seen if one[0] not in ("reading images", "fitting pretrain")] == [
        ("generator", step) for step in (4, 5, 6, 7)]
    assert hashes(again) == hashes(whole)
    assert not steps.exists()
    measured = json.loads((again / "measured.json").read_text())
    assert measured["measured_on"] == "training images"
    assert measured["verdict"].startswith("no gate")


def test_what_else_a_file_makes_uses_the_new_guide(raw: dict[str, Any]) -> None:
    made = {**raw["fit"]["pretrain"], "gate": None, "samples": 0}
    found = fits.fit(parse_fit({**raw, "fit": {"pretrain": made, "prototypes": {"groups": 2}}}), lambda *_: None)
    facts = store.read_facts(found["prototypes"])

    assert facts["made_from"]["guide_sha256"] == guide_hash(str(found["prior"] / "guide"), None)


def test_every_mistake_is_named_at_once(raw: dict[str, Any]) -> None:
    made = {**TINY, "size": 20, "captions": ["a {name}", "an animal"], "unet": {"channels": [20]},
            "gate": {"test": {"source": "npz"}, "recipe": {"size": 16, "checkpoint": "nowhere.safetensors"}}}
    with pytest.raises(ConfigError) as caught:
        fit({**raw, "fit": {"pretrain": made}, "data": {"source": "imagefolder"}})
    for start in ("data.path: missing", "fit.pretrain.size: 20 px", "fit.pretrain.unet.channels: 20",
                  "fit.pretrain.captions: 'a photo of a {name}' is not", "fit.pretrain.captions: 'an animal' names no",
                  "fit.pretrain.gate.test.path: missing", "fit.pretrain.gate.recipe.size: 16 px",
                  "fit.pretrain.gate.recipe.checkpoint: the gate's classifier is trained on these images alone"):
        assert any(line.startswith(start) for line in caught.value.problems), start
    with pytest.raises(ConfigError, match=r"fit\.pretrain\.vae\.latent_chanels: unknown field, did you mean"):
        parse_fit({**raw, "fit": {"pretrain": {"vae": {"latent_chanels": 8}}}})
    with pytest.raises(ConfigError, match="unknown placeholder"):
        parse_fit({**raw, "fit": {"pretrain": {"captions": ["a {kind}"]}}})


def test_test_images_must_be_others_of_the_same_classes(raw: dict[str, Any], image_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"fit\.pretrain\.gate\.test: 18 of its images are training images"):
        fit(gated(raw, test=raw["data"]))
    with pytest.raises(UsageError,
                       match=r"its classes 'ant', 'bee', 'cat', 'dog' are not those of data 'ant', 'bee', 'cat';"):
        fit(gated(raw, test={"source": "imagefolder", "path": str(image_folder)}))


def test_the_digits_job_is_the_embedded_default() -> None:
    """Sizes, steps, rates and captions; that these give its weights is tested with the trainer."""
    config = load_fit(JOBS / "digits/pretrain.yaml")
    made = config.fit.pretrain
    assert made is not None
    assert Setting(**made.model_dump(include=set(Setting.model_fields))) == digits.setting()
    assert config.seed == digits.RECIPE.seed
    assert config.data.split == "pool"
    table = ClassTable.of([str(k) for k in range(10)], digits.CLASS_NAMES)
    assert tuple(tuple(one.format(name=name) for one in made.captions) for name in table.name) == digits.texts()


def test_every_image_of_the_pool_arrives_as_it_is() -> None:
    data = load_fit(JOBS / "digits/pretrain.yaml").data
    found = read_pictures(build_index(data), data, 16, 1, lambda *_: None)
    x_nHWC, labels = digits_split()["pool"]
    np.testing.assert_array_equal(found.x_nHWC, x_nHWC)
    np.testing.assert_array_equal(found.labels, labels)


@pytest.mark.parametrize("name", ["digits/pretrain.yaml", "cifar10/pretrain.yaml"])
def test_jobs_fit_together(name: str) -> None:
    made = load_fit(JOBS / name).fit.pretrain
    assert isinstance(made, PretrainFit)
    assert made.gate is not None
    assert problems(made) == []
