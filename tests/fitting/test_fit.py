"""Fitting: guides and prototypes as artifacts, found again by what they were made from, and what runs refuse."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from rayexpand.artifacts import KINDS, store
from rayexpand.contract.errors import ConfigError, DamagedFile, DigestMismatch, ModelError, StorageError, UsageError
from rayexpand.data import seeds
from rayexpand.diffusion.prototypes import fit_prototypes, load_prototypes
from rayexpand.fitting import fit as fits
from rayexpand.fitting.config import load_fit, parse_fit, preflight
from rayexpand.fitting.fit import fit_for, with_artifacts
from rayexpand.fitting.guide import GuideFit
from rayexpand.fitting.maker import data_facts
from rayexpand.models.guides import ClassifierGuide, guide_hash, load_guide
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from tests.commands import ROOT
from tests.conftest import MakeConfig
from tests.tiny import tiny_clip, tiny_pipeline

torch.set_num_threads(1)
JOBS = ROOT / "jobs"
KEYS = ("ant", "bee", "cat", "dog")
SMALL = {"backbone_args": {"width": 4}, "updates": 3, "batch": 8}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture
def raw(image_folder: Path, tmp_path: Path, clip: Path) -> dict[str, Any]:
    return {"name": "ants", "out": str(tmp_path / "artifacts"), "guide": {"weights": str(clip)}, "device": "cpu",
            "data": {"source": "imagefolder", "path": str(image_folder)}, "fit": {"kind": "prototypes", "groups": 2}}


def fit(raw: dict[str, Any], **changes: Any) -> dict[str, Path]:
    return fits.fit(parse_fit({**raw, **changes}), quiet)


def quiet(task: str, done: int, total: int) -> None:
    """Nothing is shown."""


def pixels_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    files = sorted(folder.glob("*/*.png"))
    return (np.stack([np.asarray(Image.open(file)) for file in files]),
            np.array([KEYS.index(file.parent.name) for file in files]))


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["prototypes.safetensors", "artifact.json"])
def test_a_damaged_artifact_is_refused_before_anything_is_made(raw: dict[str, Any], name: str, clip: Path, prior: Path,
                                                               image_folder: Path) -> None:
    folder = fit(raw)["prototypes"]
    file = folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedFile, match=rf"{name}: is damaged.*move the folder away: `rayexpand fit` makes"):
        fit(raw)
    config = parse({"name": "x", "out": raw["out"], "data": raw["data"], "guide": {"weights": str(clip)},
                    "prior": {"weights": str(prior)}, "artifacts": {"prototypes": str(folder)},
                    "method": {"name": "distdiff", "prompt": "a photo of a {name}"}})
    with pytest.raises(DamagedFile, match=rf"{name}: is damaged"):
        runs.prepare(config)
    shutil.rmtree(folder)
    assert fit(raw)["prototypes"] == folder


# -------------------------------------------------------------------------------------------------------- prototypes


def test_prototypes_are_those_of_the_guides_features(raw: dict[str, Any], image_folder: Path, clip: Path) -> None:
    folder = fit(raw)["prototypes"]
    found = load_prototypes(folder / "prototypes.safetensors", guide_hash=guide_hash(str(clip), None), class_keys=KEYS)
    images, labels = pixels_of(image_folder)
    with torch.no_grad():
        features = load_guide(str(clip), None, KEYS, device="cpu").features(
            torch.from_numpy(images).permute(0, 3, 1, 2) / 255).numpy()
    expected = fit_prototypes(features, labels, 4, 2, guide_hash="", class_keys=KEYS)

    for name in ("class_KD", "group_KGD", "class_unit_KD", "group_unit_KGD", "count_KG"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-6)
    assert found.count_KG.sum() == 20


def test_images_of_another_size_are_resized_whole_by_pillow(raw: dict[str, Any], tmp_path: Path, clip: Path) -> None:
    rng = np.random.Generator(np.random.Philox(key=3))
    images = {key: Image.fromarray(rng.integers(0, 256, (40, 24, 3), dtype=np.uint8)) for key in KEYS}
    for key, image in images.items():
        (tmp_path / "large" / key).mkdir(parents=True)
        image.save(tmp_path / "large" / key / "0.png")
    folder = fit(raw, data={"source": "imagefolder", "path": str(tmp_path / "large")})["prototypes"]
    found = load_prototypes(folder / "prototypes.safetensors", guide_hash=guide_hash(str(clip), None), class_keys=KEYS)
    small = np.stack([np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)) for image in images.values()])
    with torch.no_grad():
        expected = load_guide(str(clip), None, KEYS, device="cpu").features(
            torch.from_numpy(small).permute(0, 3, 1, 2) / 255)

    np.testing.assert_allclose(found.class_KD, expected.numpy(), atol=1e-5)


def test_unreadable_images_are_left_out_and_named_and_a_class_of_them_is_refused(
        raw: dict[str, Any], image_folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(image_folder, tmp_path / "broken"))
    (broken / "bee/2.png").write_bytes(b"nothing")
    data = {"source": "imagefolder", "path": str(broken)}
    folder = fit(raw, data=data)["prototypes"]
    facts = store.read_facts(folder)
    assert (facts["refused"], list(facts["refused_examples"])) == (1, ["bee/2.png"])
    assert json.loads((folder / "artifact.json").read_text())["made_from"]["data"]["images"] == 20

    for file in (broken / "cat").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UsageError, match="class 'cat' has no image that can be read"):
        fit(raw, data=data, name="cats", out=str(tmp_path / "other"))
    assert list((tmp_path / "other").glob("[!.]*")) == []


def test_calls_of_another_size_change_no_more_than_rounding(raw: dict[str, Any]) -> None:
    made = [fit(raw, fit={"kind": "prototypes", "batch": batch})["prototypes"] for batch in (3, 64)]
    from safetensors.numpy import load_file

    few, many = (load_file(folder / "prototypes.safetensors") for folder in made)
    assert made[0] != made[1]
    np.testing.assert_allclose(few["group_KGD"], many["group_KGD"], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ guides


def test_a_classifier_is_trained_on_the_images_and_knows_their_classes(raw: dict[str, Any]) -> None:
    folder = fit(raw, fit={"kind": "classifier", "recipe": {**SMALL, "updates": 60, "crop": "none"}})["guide"]
    guide = load_guide(str(folder), None, KEYS, device="cpu", class_keys=KEYS)
    images, labels = pixels_of(Path(raw["data"]["path"]))
    about, facts = json.loads((folder / "guide.json").read_text()), store.read_facts(folder)

    assert isinstance(guide, ClassifierGuide)
    assert (guide.zero_shot(images) == labels).mean() > 0.8, "60 steps on 20 images"
    assert about["classes"] == list(KEYS)
    assert about["recipe"]["updates"] == 60
    assert facts["kind"] == "classifier"
    assert facts["cpu_seconds"] > 0
    assert facts["gpu_seconds"] == 0


def test_a_random_guide_has_the_initial_weights_and_a_pretrained_one_those_of_its_file(raw: dict[str, Any],
                                                                                      tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from rayexpand.classifier.backbones import build_backbone
    from rayexpand.classifier.recipe import make_recipe

    recipe = {"backbone_args": {"width": 4}}
    random = fit(raw, fit={"kind": "random", "recipe": recipe}, seed=5)["guide"] / "model.safetensors"
    expected = build_backbone(make_recipe(recipe), 4, seed=5).state_dict()
    assert all(torch.equal(load_file(random)[name], one) for name, one in expected.items())

    given = {"kind": "pretrained", "recipe": {**recipe, "checkpoint": str(random)}}
    folder = fit(raw, fit=given, seed=6)["guide"]
    assert all(torch.equal(load_file(folder / "model.safetensors")[name], one) for name, one in expected.items())
    assert "may have seen other images" in store.read_facts(folder)["note"]


def test_what_tuning_clip_does_not_look_at_is_said(raw: dict[str, Any], clip: Path,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    made = fit(raw, fit={"kind": "clip_head", "recipe": {"updates": 1, "batch": 8, "mixup": 0.2, "amp": True}})["guide"]
    assert store.read_facts(made)["not_applied"] == ["mixup", "amp"]
    assert "mixup, amp of its recipe had no effect" in caplog.text
    with pytest.raises(ConfigError, match=r"recipe\.mix_per: has no effect on kind clip_head"):
        fit(raw, fit={"kind": "clip_head", "recipe": {"mixup": 0.2, "mix_per": "image"}})


def test_the_head_of_clip_starts_at_the_class_texts(raw: dict[str, Any], clip: Path) -> None:
    """With steps too small to move a weight, the logits are the zero-shot logits bit for bit."""
    still = fit(raw, fit={"kind": "clip_head", "recipe": {"updates": 2, "batch": 8, "lr": 1e-30}})["guide"]
    tuned = fit(raw, fit={"kind": "clip_head", "recipe": {"updates": 20, "batch": 8, "lr": 1e-3}})["guide"]
    images, labels = pixels_of(Path(raw["data"]["path"]))
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2) / 255, torch.from_numpy(labels)
    zero_shot, start, end = (load_guide(str(one), None, KEYS, device="cpu", class_keys=KEYS)
                             for one in (clip, still, tuned))
    with torch.no_grad():
        losses = [float(F.cross_entropy(guide.logits(x), y)) for guide in (start, end)]
        assert torch.equal(start.logits(x), zero_shot.logits(x))
        assert torch.equal(start.texts_KD.norm(dim=1).round(decimals=5), torch.ones(4))
        assert losses[1] < losses[0]
        assert not torch.equal(end.features(x), zero_shot.features(x)), "the image tower is tuned too"
    with pytest.raises(ModelError, match="class 0 is 'ant' there and 'wasp' here"):
        load_guide(str(tuned), None, KEYS, class_keys=("wasp", *KEYS[1:]))
    made = fit(raw, fit={"kind": "random", "recipe": SMALL})["guide"]
    with pytest.raises(ConfigError, match="is a classifier; kind clip_head"):
        fit(raw, guide={"weights": str(made)}, fit={"kind": "clip_head"})


# --------------------------------------------------------------------------------------------------------- artifacts


def test_the_same_fit_makes_nothing_the_second_time(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
                                                    tmp_path: Path) -> None:
    both = {"guide": {"recipe": SMALL}, "prototypes": {"groups": 2}}
    first = fit(raw, fit=both)
    elsewhere = fit(raw, fit=both, out=str(tmp_path / "elsewhere"))
    monkeypatch.setattr(store, "_timed", None)

    assert fit(raw, fit=both) == first
    assert [store.read_facts(folder)["digest"][:8] for folder in first.values()] == [
        folder.name[-8:] for folder in first.values()]
    guide = guide_hash(str(first["guide"]), None)
    assert store.read_facts(first["prototypes"])["made_from"]["guide_sha256"] == guide
    assert guide_hash(str(elsewhere["guide"]), None) == guide
    assert (KINDS["prototypes"].sha256(first["prototypes"])
            == KINDS["prototypes"].sha256(elsewhere["prototypes"])), "seconds are no part of it"
    root = Path(raw["out"])
    assert {file.name: file.resolve() for file in root.iterdir() if file.is_symlink()} == {
        "ants-guide": first["guide"], "ants-prototypes": first["prototypes"]}


@pytest.mark.parametrize("change", [{"seed": 1}, {"fit": {"kind": "classifier", "recipe": {**SMALL, "lr": 0.02}}},
                                    {"data": {"per_class": 4}}])
def test_another_configuration_is_another_artifact(raw: dict[str, Any], change: dict[str, Any]) -> None:
    raw["fit"] = {"kind": "classifier", "recipe": SMALL}
    before = fit(raw)["guide"]
    after = fit({**raw, **change, "data": {**raw["data"], **change.get("data", {})}})["guide"]

    assert before != after
    assert (Path(raw["out"]) / "ants-guide").resolve() == after


def test_a_killed_fit_leaves_no_half_artifact(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from rayexpand.artifacts.store import publish
def make(folder):
    (folder / "half").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
publish(sys.argv[1], "thing", {"of": 1}, make)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    assert list(tmp_path.glob(".thing-*.partial-*"))

    folder = store.publish(str(tmp_path), "thing", {"of": 1}, lambda folder: {"made": 2})
    assert store.read_facts(folder)["made"] == 2
    assert not list(tmp_path.glob(".thing-*.partial-*"))


def test_a_folder_that_is_another_artifact_or_cannot_be_written_is_said(tmp_path: Path) -> None:
    folder = store.publish(str(tmp_path), "thing", {"of": 1}, lambda folder: {})
    (folder / "artifact.json").write_text("{}")
    with pytest.raises(StorageError, match="another artifact"):
        store.publish(str(tmp_path), "thing", {"of": 1}, lambda folder: {})
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        store.publish(str(tmp_path / "file"), "thing", {"of": 1}, lambda folder: {})
    (tmp_path / "name").mkdir()
    with pytest.raises(StorageError, match="cannot become a link"):
        store.point(str(tmp_path), "name", folder)
    with pytest.raises(StorageError, match="object store"):
        store.publish("s3://bucket/artifacts", "thing", {}, lambda folder: {})


def test_every_mistake_of_a_fit_is_reported_at_once(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_fit({**raw, "nam": 1, "fit": {"guide": {"kind": "wizard", "recipe": {"preset": "distdif"}},
                                            "prototypes": {"groups": 0, "group": 2}}})
    found = str(error.value)
    for words in ("nam: unknown field, did you mean 'name'?", "fit.guide.kind: Input should be",
                  "did you mean distdiff", "fit.prototypes.groups: Input should be greater",
                  "fit.prototypes.group: unknown field, did you mean 'groups'?"):
        assert words in found

    bad = {**raw, "data": {"source": "imagefolder", "path": "/nowhere"}, "out": "s3://bucket/artifacts",
           "guide": {"weights": "ViT-Z-99"}, "fit": {"guide": {"kind": "clip_head", "recipe": {
               "checkpoint": "x", "augment": "augmix", "jsd": 12}}}}
    with pytest.raises(ConfigError) as error:
        fit(bad)
    for words in ("data.path", "guide.weights: guide 'ViT-Z-99' is neither", "has no effect on kind clip_head",
                  "fit.guide.recipe.jsd: has no effect", "out: s3"):
        assert words in str(error.value)
    with pytest.raises(ConfigError, match="names nothing to make"):
        fit(raw, fit={})
    with pytest.raises(ConfigError, match="kind pretrained takes its weights from"):
        fit(raw, fit={"kind": "pretrained"})


# -------------------------------------------------------------------------------------------------------------- runs


def of(prior: Path, clip: Path, **sections: Any) -> dict[str, Any]:
    return {"prior": {"weights": str(prior), "device": "cpu"}, "guide": {"weights": str(clip)}, **sections}


def test_what_a_run_needs_is_made_and_is_part_of_its_identity(make_config: MakeConfig, prior: Path, clip: Path,
                                                             tmp_path: Path) -> None:
    out = str(tmp_path / "artifacts")
    config = make_config("distdiff", steps=4, guide_step=2, ratio=1, sections=of(prior, clip))
    made = fit_for(config, quiet, GuideFit(recipe=SMALL), out=out)
    config = with_artifacts(config, made)
    run = runs.prepare(config)
    models = run.facts["models"]

    assert set(made) == {"guide", "prototypes"}
    assert models["guide"] == guide_hash(str(made["guide"]), None)
    assert models["prototypes"] == KINDS["prototypes"].sha256(made["prototypes"])
    tools = runs.start(run).loaded()
    assert isinstance(tools.guide, ClassifierGuide)
    assert tools.prototypes.count_KG.sum() == 20

    moved = Path(shutil.copytree(made["prototypes"], tmp_path / "moved"))
    assert runs.prepare(with_artifacts(config, {"prototypes": moved})).facts == run.facts, "the path does not count"
    other = fit_for(config, quiet, out=out, groups=2)
    assert set(other) == {"prototypes"}
    with pytest.raises(DigestMismatch, match=r"models\.prototypes"):
        runs.prepare(with_artifacts(config, other))
    assert fit_for(make_config("classical"), quiet, out=out) == {}
    assert set(fit_for(make_config("gif", steps=4, sections=of(prior, clip)), quiet, out=out)) == set()


def test_a_fit_takes_no_embedded_guide_for_other_images(raw: dict[str, Any]) -> None:
    without = {key: value for key, value in raw.items() if key != "guide"} | {"fit": {"prototypes": {"groups": 2}}}
    assert [line.partition(";")[0] for line in preflight(parse_fit(without)) if "embedded" in line] == [
        "guide.weights: missing"]
    assert not any("embedded" in line for line in preflight(parse_fit({**without, "guide": {"weights": "digits"}})))


def test_validate_refuses_everything_at_once(make_config: MakeConfig, prior: Path, clip: Path, tmp_path: Path,
                                             image_folder: Path) -> None:
    config = make_config("distdiff", steps=4, guide_step=2, sections=of(prior, clip))
    found = runs.preflight(config)
    assert len(found) == 1
    assert "artifacts.prototypes: distdiff needs prototypes" in found[0]
    assert "`rayexpand fit` and this same file" in found[0]

    out = str(tmp_path / "artifacts")
    guide = fit_for(config, quiet, GuideFit(recipe=SMALL), out=out)["guide"]
    by_clip = fit_for(config, quiet, out=out)["prototypes"]
    assert runs.preflight(with_artifacts(config, {"prototypes": by_clip})) == []
    others = Path(shutil.copytree(image_folder, tmp_path / "others"))
    (others / "bee").rename(others / "bumblebee")
    bad = parse({**json.loads(config.model_dump_json()), "image": {"size": 20}, "guide": {"weights": str(guide)},
                 "artifacts": {"prototypes": str(by_clip)}, "data": {"source": "imagefolder", "path": str(others)}})
    found = runs.preflight(bad)
    for words in ("image.size", "holds features of guide", "guide.weights: guide",
                  "class 1 is 'bee' there and 'bumblebee' here",
                  f"artifacts.prototypes: {by_clip} was made for other classes"):
        assert any(words in line for line in found), words
    assert len(found) == 4
    assert len(runs.preflight(bad, with_classes=False)) == 2
    with pytest.raises(ConfigError, match="other classes"):
        runs.prepare(bad.model_copy(update={"image": config.image, "guide": config.guide}))

    gone = with_artifacts(config, {"prototypes": tmp_path / "gone"})
    assert "has no prototypes.safetensors" in runs.preflight(gone)[0]
    headless = Path(shutil.copytree(clip, tmp_path / "headless"))
    for file in headless.glob("*token*"):
        file.unlink()
    headless_run = make_config("gif", steps=4, sections=of(prior, headless))
    assert "tokenizer.json is missing" in runs.preflight(headless_run)[0]


def test_prototypes_of_another_guide_are_refused_at_load_too(make_config: MakeConfig, prior: Path, clip: Path,
                                                             tmp_path: Path) -> None:
    config = make_config("distdiff", steps=4, guide_step=2, sections=of(prior, clip))
    folder = fit_for(config, quiet, out=str(tmp_path / "artifacts"))["prototypes"]
    (folder / "artifact.json").unlink()  # without it, validate cannot know
    other = tiny_clip(tmp_path / "other", seed=4)
    config = with_artifacts(make_config("distdiff", steps=4, guide_step=2, sections=of(prior, other)),
                            {"prototypes": folder})

    assert runs.preflight(config) == []
    with pytest.raises(ModelError, match="features of two guides cannot be compared"):
        runs.prepare(config)


def test_the_verb_takes_a_file_of_its_own_or_that_of_a_run(raw: dict[str, Any], prior: Path, clip: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml
    from typer.testing import CliRunner

    from rayexpand.cli.main import app

    monkeypatch.chdir(tmp_path)
    own, run = tmp_path / "fit.yaml", tmp_path / "run.yaml"
    own.write_text(yaml.safe_dump(raw))
    run.write_text(yaml.safe_dump({"name": "ants", "data": raw["data"], **of(prior, clip),
                                   "method": {"name": "distdiff", "steps": 4, "guide_step": 2}}))
    made = json.loads(CliRunner().invoke(app, ["fit", str(own), "--no-ray", "--json"]).stdout)
    assert Path(made["prototypes"]["folder"]).is_dir()
    assert made["prototypes"]["made_from"]["groups"] == 2
    shown = CliRunner().invoke(app, ["fit", str(run), "--no-ray"]).stdout
    assert "--set artifacts.prototypes=artifacts/ants-prototypes" in shown
    assert (tmp_path / "artifacts/ants-prototypes/prototypes.safetensors").is_file()
    CliRunner().invoke(app, ["fit", str(run), "--no-ray", "--out", "elsewhere"])
    assert (tmp_path / "elsewhere/ants-prototypes").is_dir()
    refused = CliRunner().invoke(app, ["fit", str(run), "--set", "method={name: classical}"])
    assert isinstance(refused.exception, UsageError)
    assert "needs neither guide nor prototypes" in str(refused.exception)


@pytest.mark.parametrize("job", sorted(JOBS.rglob("fit-*.yaml")), ids=lambda path: str(path.relative_to(JOBS)))
def test_every_fit_job_loads(job: Path) -> None:
    config = load_fit(job)

    assert parse_fit(config.model_dump(mode="json")) == config


def test_the_data_of_an_artifact_counts_by_its_ids(raw: dict[str, Any]) -> None:
    config = parse_fit(raw)
    index = seeds.build_index(config.data)
    table = index.table.slice(0, 19)
    facts = data_facts(config, index)

    assert facts["classes"] == list(KEYS)
    assert facts["ids_sha256"] != data_facts(config, type(index)(table, index.classes))["ids_sha256"]
