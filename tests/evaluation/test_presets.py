"""Known names of distances: for the published content with the published intake, and never otherwise."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.models import Inception3
from typer.testing import CliRunner

from rayexpand.cli.main import app
from rayexpand.contract.errors import ConfigError, ModelError, UsageError
from rayexpand.contract.rng import RowRng
from rayexpand.evaluation import features, presets
from rayexpand.evaluation.evaluate import evaluate, in_process, metric_problems
from rayexpand.evaluation.features import (
    ExtractorConfig,
    check,
    key_by_name,
    key_of,
    load_extractor,
    name_problem,
    with_current_names,
)
from rayexpand.evaluation.inception import inception_2015
from rayexpand.evaluation.presets import PRESETS, RESERVED, convert
from rayexpand.runs.run import Run
from tests.evaluation.test_evaluate import config_of, guide, run  # noqa: F401  (fixtures)
from tests.evaluation.test_features import TIMM, backbone, images  # noqa: F401


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn weights in the layout of the published file."""
    rng, names = RowRng(0, "test", "inception", 0), Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    found = {name: torch.from_numpy(rng.normals(name, tuple(one.shape)) * 0.05 + ("running_var" in name
             or name.endswith("bn.weight"))) if one.is_floating_point() else one for name, one in
             names.state_dict().items()}
    file = tmp_path_factory.mktemp("published") / "inception.pth"
    torch.save({name: one.abs() if "running_var" in name else one for name, one in found.items()}, file)
    return file


@pytest.fixture
def known(published: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as if it were the published file."""
    content = hashlib.sha256(published.read_bytes()).hexdigest()
    monkeypatch.setattr(presets, "PRESETS", PRESETS)
    for name in ("inception2015", "inception2015_clean"):
        monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], sha256=content))
    return published


@pytest.fixture
def converted(known: Path, tmp_path: Path) -> Path:
    file = tmp_path / "inception.safetensors"
    convert("inception2015", str(known), str(file))
    return file


def by(file: Path, preset: Any = "inception2015") -> ExtractorConfig:
    return ExtractorConfig(preset=preset, checkpoint=str(file), device="cpu")


@pytest.mark.slow
def test_only_the_published_file_is_converted(published: Path, known: Path, tmp_path: Path) -> None:
    found = convert("inception2015", str(known), str(tmp_path / "a.safetensors"))
    tensors = torch.load(known, weights_only=True)

    assert found["tensors"] == len(tensors) == 566
    assert found["source_sha256"] == PRESETS["inception2015"].sha256
    again = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(again[name], one) for name, one in tensors.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as stream:
        assert stream.metadata() == {name: found[name] for name in ("source_sha256", "tensors_sha256")}
    with pytest.raises(UsageError, match="exists already"):
        convert("inception2015", str(known), str(tmp_path / "a.safetensors"))
    with pytest.raises(ModelError, match="not the published file of dinov2_l14: its sha256 is"):
        convert("dinov2_l14", str(known), str(tmp_path / "b.safetensors"))
    with pytest.raises(ModelError, match=r"does not exist.*fetch it from https://github\.com/mseitzer"):
        convert("inception2015", str(tmp_path / "gone.pth"), str(tmp_path / "b.safetensors"))
    said = CliRunner().invoke(app, ["convert", "inception", str(known), str(tmp_path / "b.safetensors")])
    assert "is no published extractor; choose inception2015" in str(said.exception) + said.output
    shown = CliRunner().invoke(app, ["convert", "inception2015", str(known), str(tmp_path / "c.safetensors")])
    assert shown.exit_code == 0, shown.output
    assert found["tensors_sha256"] in shown.stdout
    assert not [one for one in tmp_path.iterdir() if "partial" in one.name]


def test_the_known_hashes_are_those_that_publishers_state() -> None:
    """The name of one file has eight digits of its sha256, the address of another all 64."""
    assert PRESETS["inception2015"].sha256.startswith("6726825d")
    assert PRESETS["inception2015"].source.endswith("-6726825d.pth")
    assert f"/{PRESETS['clip_l14_336'].sha256}/" in PRESETS["clip_l14_336"].source
    assert all(len(one.sha256) == 64 for one in PRESETS.values())


@pytest.mark.parametrize(("preset", "statistic", "key"), [
    ("inception2015", "fd", "fid"), ("inception2015", "kd", "kid"), ("inception2015_clean", "fd", "fid_clean"),
    ("inception2015_clean", "kd", "kd_inception2015_clean"),
    ("inception2015", "mmd2_rbf10", "mmd2_rbf10_inception2015")])
@pytest.mark.fast_cases(2)
def test_the_published_content_has_the_known_name(converted: Path, preset: str, statistic: str, key: str) -> None:
    assert key_of(statistic, by(converted, preset)) == key
    assert metric_problems(["fid", "kid"], by(converted)) == []


def test_other_content_never_has_it(converted: Path, tmp_path: Path) -> None:
    """Weights without a record, weights that were changed after the conversion, and the file of another publisher."""
    tensors = load_file(converted)
    with safe_open(converted, "pt") as stream:
        record = stream.metadata()
    bare, changed = tmp_path / "bare.safetensors", tmp_path / "changed.safetensors"
    save_file(tensors, bare)
    tensors["fc.bias"][0] += 1
    save_file(tensors, changed, record)

    assert "no record of being made from https://github.com" in str(name_problem(by(bare)))
    assert "not those that were converted; make it again with `rayexpand convert inception2015`" in str(
        name_problem(by(changed)))
    assert "no record of being made from https://dl.fbaipublic" in str(name_problem(by(converted, "dinov2_l14")))
    for file in (bare, changed):
        assert key_of("fd", by(file)) == "fd_inception2015_unverified"
        (problem,) = metric_problems(["fid"], by(file))
        assert "the key is fd_inception2015_unverified; write fd for it" in problem
    (problem,) = metric_problems(["fid"], by(converted, "inception2015_clean"))
    assert "it is for extractor: {preset: inception2015}" in problem
    assert "the key is fid_clean; write fd" in problem


def test_known_names_are_refused_for_a_guide(run: Run, image_folder: Path, guide: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError) as raised:
        config_of(run, image_folder, guide, metrics=["fid", "kid", "cmmd"])
    problems = "\n".join(raised.value.problems)

    for words in ("fid is the name of a published convention: it is for extractor: {preset: inception2015}",
                  "the key is fd_clip; write fd for it", "kd_clip", "mmd2_rbf10_clip",
                  "cmmd compares little more than means, and does not see samples that are few images repeated"):
        assert words in problems
    assert config_of(run, image_folder, guide, metrics=["mmd2_rbf10", "vendi"]).metrics == ["mmd2_rbf10", "vendi"]


def test_no_model_is_called_as_a_published_one() -> None:
    assert key_by_name("fd", "guide models/dinov2") == "fd_dinov2_model"
    assert key_by_name("fd", "guide org/a-guide@main") == "fd_a_guide"
    assert key_by_name("kd", "timm resnet50.a1_in1k") == "kd_resnet50_a1_in1k"
    assert set(RESERVED) == {"fid", "fid_clean", "kid", "fd_dinov2", "cmmd"}


def test_results_of_before_are_shown_with_the_name_of_their_extractor() -> None:
    old = {"extractor": {"name": "guide digits"}, "scores": {
        "fid": {"value": 1.0}, "kid_poly3_unbiased": {"value": 2.0}, "coverage_k5": {"value": 0.5}}}

    assert list(with_current_names(old)["scores"]) == ["fd_digits", "kd_digits", "coverage_k5"]
    new = {**old, "extractor": {"name": "preset inception2015", "unnamed": None}}
    assert list(with_current_names(new)["scores"]) == list(old["scores"])


@pytest.mark.slow
def test_scores_by_the_published_extractor(run: Run, image_folder: Path, converted: Path,  # noqa: F811
                                           guide: str) -> None:  # noqa: F811
    config = config_of(run, image_folder, guide, extractor=by(converted).model_dump(), metrics=["fid", "kd"], images=6,
                       batch=6)
    found = evaluate(config, in_process)

    assert set(found["scores"]) == {"fid", "kd_inception2015"}, "6 images are not the published subsets of 1000"
    assert (found["features"], found["extractor"]["size"], found["extractor"]["unnamed"]) == (2048, 299, None)
    assert found["extractor"]["resize"] == "both sides to size, bilinear as TensorFlow 1, not antialiased"


@pytest.mark.slow
def test_the_network_gets_pixels_as_tensorflow_did(converted: Path) -> None:
    """(x - 128) / 128, averages without the padding, the maximum in the last pooling branch."""
    extractor, pixels = load_extractor(by(converted)), images(2, 299)
    weights = load_file(converted)
    net, other = inception_2015(weights), Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    other.load_state_dict(weights)
    other.fc = torch.nn.Identity()
    x_BCHW = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 128) / 128
    with torch.no_grad():
        expected, plain = net(x_BCHW).numpy(), other(x_BCHW).numpy()

    assert np.allclose(extractor(pixels), expected, rtol=1e-4, atol=1e-4 * expected.std())
    assert np.abs(expected - plain).max() > 0.01 * plain.std(), "torchvision's own network is another one"


def test_the_network_is_that_of_torch_fidelity(converted: Path, published: Path) -> None:
    torch_fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    theirs = torch_fidelity.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(published))
    extractor, pixels = load_extractor(by(converted)), images(2, 200)
    brought = np.stack([extractor.intake(one, 299) for one in pixels])
    (expected,) = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2))

    assert np.allclose(extractor(brought), expected.numpy(), atol=1e-4 * float(expected.std()))


def as_published(monkeypatch: pytest.MonkeyPatch, preset: str, file: Path) -> Path:
    """Converts a file of a publisher, as if it were the known one."""
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(PRESETS, preset, replace(PRESETS[preset], sha256=content))
    convert(preset, str(file), str(file.with_suffix(".safetensors")))
    return file.with_suffix(".safetensors")


def test_dinov2_is_read_as_its_publisher_saved_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network in its place: the token of its training is left out, positions are resampled to 224 pixels, and
    the class token comes out."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    saved = timm.create_model("test_vit", num_classes=0, global_pool="token")
    file = tmp_path / "dinov2.pth"
    torch.save({**saved.state_dict(), "mask_token": torch.zeros(1, 64)}, file)
    monkeypatch.setattr(features, "TIMM_DINOV2", "test_vit")
    extractor = load_extractor(config := by(as_published(monkeypatch, "dinov2_l14", file), "dinov2_l14"))
    larger = timm.create_model("test_vit", num_classes=0, img_size=224).eval()
    larger.load_state_dict(checkpoint_filter_fn(saved.state_dict(), larger))
    mean, std = (torch.tensor(larger.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    pixels = images(2, 224)
    with torch.no_grad():
        expected = larger((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)

    assert extractor.size == 224
    assert np.allclose(extractor(pixels), expected.numpy(), atol=1e-4)
    assert (key_of("fd", config), key_of("kd", config)) == ("fd_dinov2", "kd_dinov2_l14")


def test_clip_is_read_as_openai_saved_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network in its place, with its text, and QuickGELU as OpenAI trained it."""
    import open_clip

    config = {"embed_dim": 32, "quick_gelu": True, "text_cfg": {"width": 64, "heads": 1, "layers": 1},
              "vision_cfg": {"image_size": 28, "layers": 1, "width": 64, "patch_size": 14}}
    (tmp_path / "openai-small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("openai-small").eval().half().float()  # as they are published
    file = tmp_path / "clip.pt"
    torch.save(model.state_dict(), file)
    monkeypatch.setattr(features, "OPEN_CLIP", "openai-small")
    named = by(as_published(monkeypatch, "clip_l14_336", file), "clip_l14_336")
    pixels, texts = images(2, 28), ["a photo of a cat", "a photo of a dog"]
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (model.visual.image_mean, model.visual.image_std))
    with torch.no_grad():
        expected = model.encode_image((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)
        words = model.encode_text(open_clip.get_tokenizer("openai-small")(texts), normalize=True)

    assert np.allclose(load_extractor(named)(pixels), expected.numpy(), atol=1e-4)
    assert np.allclose(features.class_texts(named, ["cat", "dog"]), words.numpy(), atol=1e-5)
    assert (key_of("mmd2_rbf10", named), key_of("fd", named)) == ("cmmd", "fd_clip_l14_336")
    assert metric_problems(["alignment", "cmmd", "vendi"], named) == []


def test_mistakes_of_a_preset(tmp_path: Path) -> None:
    assert check(ExtractorConfig(preset="dinov2_l14")) == [
        "extractor.checkpoint: dinov2_l14 is a model without weights; name its safetensors file"]
    assert check(ExtractorConfig(preset="dinov2_l14", guide="digits")) == [
        "extractor: guide and preset are both given; keep one of them"]
    found = check(ExtractorConfig(preset="dinov2_l14", checkpoint=str(tmp_path / "x.safetensors"), intake={}))
    assert "extractor.intake: dinov2_l14 has its own" in found[0]
    assert "does not exist" in found[1]


def test_free_intake_is_stated_and_used(backbone: ExtractorConfig) -> None:  # noqa: F811
    config = backbone.model_copy(update={"intake": presets.IntakeConfig(resize="squash", filter="tf1_bilinear")})
    extractor = load_extractor(config)

    assert extractor.intake(images(1, 40)[0], extractor.size).dtype == np.float32
    assert key_of("fd", config) == f"fd_{TIMM}"
    assert load_extractor(backbone).intake == presets.IntakeConfig()


def test_alignment_wants_words(backbone: ExtractorConfig, converted: Path) -> None:  # noqa: F811
    for extractor in (backbone, by(converted)):
        (problem,) = metric_problems(["alignment"], extractor)
        assert "reads no text; name a CLIP guide" in problem
    assert metric_problems(["alignment"], ExtractorConfig(guide="digits")) == []
