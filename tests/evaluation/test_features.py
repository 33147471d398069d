"""Extractors and calls: the model's own features, whatever the batch, and refusals in words."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayexpand.contract.errors import ModelError, RowFault
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import Reason
from rayexpand.evaluation.features import (
    ExtractorConfig,
    ImageBatch,
    calls,
    check,
    extractor_hash,
    features,
    load_extractor,
    model_files,
    moved,
    name_of,
)
from tests.tiny import tiny_clip

TIMM = "test_resnet"


def images(n: int, side: int = 16) -> np.ndarray:
    return (RowRng(0, "test", "features", 0).uniforms("x", (n, side, side, 3)) * 256).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> ExtractorConfig:
    return ExtractorConfig(guide=str(tiny_clip(tmp_path_factory.mktemp("tiny") / "clip")), device="cpu")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> ExtractorConfig:
    """A timm model with drawn weights, its classifier of 7 classes in the checkpoint."""
    import timm
    import torch
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("timm") / "model.safetensors"
    model = timm.create_model(TIMM, pretrained=False, num_classes=7)
    rng = RowRng(0, "test", "timm", 0)
    save_file({name: torch.from_numpy(np.abs(rng.normals(name, tuple(value.shape))) * 0.1 + 0.01)
               if value.is_floating_point() else value for name, value in model.state_dict().items()}, file)
    return ExtractorConfig(timm=TIMM, checkpoint=str(file), device="cpu")


def test_features_of_a_guide_are_its_own(guide: ExtractorConfig) -> None:
    import torch

    from rayexpand.models.guides import load_guide

    pixels = images(3)
    expected = load_guide(str(guide.guide), None, ["a"], device="cpu").features(
        torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    extractor = load_extractor(guide)

    assert extractor.size == 16
    assert np.allclose(extractor(pixels), expected.numpy(), atol=1e-6)


def test_features_of_a_backbone_are_before_its_classifier(backbone: ExtractorConfig) -> None:
    import timm
    import torch
    from safetensors.torch import load_file

    extractor = load_extractor(backbone)
    model = timm.create_model(TIMM, pretrained=False, num_classes=7)
    model.load_state_dict(load_file(str(backbone.checkpoint)))
    config = model.pretrained_cfg
    x = torch.from_numpy(images(2, extractor.size)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        h = model.eval().forward_head(model.forward_features((x - mean) / std), pre_logits=True)

    assert np.allclose(extractor(images(2, extractor.size)), h.numpy(), atol=1e-5)
    assert h.std() > 0


def test_positions_of_another_image_size_are_resampled(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    file, larger = tmp_path / "vit.safetensors", timm.create_model("test_vit", img_size=192, num_classes=0)
    save_file({f"module.{name}": one for name, one in larger.state_dict().items()}, file)
    extractor = load_extractor(ExtractorConfig(timm="test_vit", checkpoint=str(file), device="cpu"))
    assert extractor(images(2, extractor.size)).shape == (2, larger.num_features)


def test_calls_have_one_shape_and_leave_out_what_cannot_be_read() -> None:
    pixels = images(5)
    encoded = [png(pixels[0]), b"not an image", *map(png, pixels[1:4]), RowFault(Reason.MISSING, "gone"),
               png(pixels[4]), png(images(1, 4)[0])]
    found = list(calls(encoded, 16, 2, min_side=8))

    assert [(call.x_BHWC.shape, call.rows, call.refused) for call in found] == [
        ((2, 16, 16, 3), 2, 1), ((2, 16, 16, 3), 2, 0), ((2, 16, 16, 3), 1, 2)]
    assert np.array_equal(np.concatenate([call.x_BHWC[:call.rows] for call in found]), pixels)
    assert not found[-1].x_BHWC[1].any(), "a filler is black, not the image of another call"
    assert list(calls([], 16, 2)) == []


def test_images_are_brought_to_size_without_distortion() -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200
    (call,) = calls([png(wide)], 16, 1)

    assert (call.x_BHWC[0, :, 1:-1] == 200).all(), "the middle square"


def test_features_do_not_depend_on_what_else_is_there(guide: ExtractorConfig) -> None:
    extractor, encoded = load_extractor(guide), list(map(png, images(7)))
    together, refused = features(extractor, calls([*encoded, b""], 16, 4))
    again, _ = features(extractor, calls(encoded[:4], 16, 4))

    assert (together.shape, together.dtype, refused) == ((7, 16), np.float32, 1)
    assert np.array_equal(together[:4], again)
    assert features(extractor, [ImageBatch(np.zeros((4, 16, 16, 3), np.uint8), 0, 3)])[0].shape == (0, 0)


@pytest.mark.parametrize("kind", ["guide", "backbone"])
def test_the_hash_is_of_the_content_wherever_it_lies(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    config = request.getfixturevalue(kind)
    for name, file in model_files(config).items():
        shutil.copy(file, tmp_path / name)
    elsewhere = moved(config, tmp_path)

    assert extractor_hash(elsewhere) == extractor_hash(config)
    assert np.array_equal(load_extractor(elsewhere)(images(1, load_extractor(config).size)),
                          load_extractor(config)(images(1, load_extractor(config).size)))
    (weights,) = tmp_path.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert extractor_hash(elsewhere) != extractor_hash(config)


@pytest.mark.parametrize(("fields", "words"), [
    ({"guide": "digits", "timm": "resnet18"}, "keep one of them"),
    ({"checkpoint": "model.safetensors"}, "extractor.checkpoint: has no effect on guide 'digits'"),
    ({"timm": "resnet18"}, "extractor.checkpoint: resnet18 is a model without weights"),
    ({"timm": "resnet18", "checkpoint": "model.pth"}, "pickles can run code"),
    ({"timm": "resnet18", "checkpoint": "/nowhere/model.safetensors"}, "does not exist"),
    ({"timm": "rsnet", "checkpoint": "/nowhere/m.safetensors"}, "'rsnet' is not a timm model"),
    ({"guide": "ViT-B-32"}, "extractor.guide: guide 'ViT-B-32' is an architecture without weights"),
])
def test_mistakes_are_known_without_loading(fields: dict[str, str], words: str) -> None:
    assert any(words in line for line in check(ExtractorConfig(**fields)))


@pytest.mark.parametrize("fields", [{}, {"guide": "digits"}, {"guide": "org/name@main"}])
def test_sound_choices(fields: dict[str, str]) -> None:
    assert check(ExtractorConfig(**fields)) == []


def test_a_checkpoint_of_another_model_is_refused(backbone: ExtractorConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded into test_vit|not a checkpoint of test_vit"):
        load_extractor(backbone.model_copy(update={"timm": "test_vit"}))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(Path(str(backbone.checkpoint)).read_bytes()[:-8])
    (problem,) = check(backbone.model_copy(update={"checkpoint": str(broken)}))
    assert "extractor.checkpoint" in problem
    assert "it is cut off" in problem
    with pytest.raises(ModelError, match="it is cut off"):
        load_extractor(backbone.model_copy(update={"checkpoint": str(broken)}))
    assert name_of(backbone) == f"timm {TIMM}"
