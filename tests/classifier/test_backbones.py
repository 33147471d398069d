"""Backbones: known sizes, keyed weights, gradients of slices, checkpoints, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rayexpand.classifier.backbones import build_backbone
from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import ConfigError, ModelError


def recipe(**fields: Any) -> Recipe:
    return Recipe(**{"backbone_args": {"width": 8}, **fields})


@pytest.mark.parametrize(("backbone", "classes", "parameters"), [
    ("preact_resnet18", 10, 11_172_170), ("preact_resnet34", 10, 21_280_330),  # He et al.'s blocks, last norm included
    ("resnet18", 10, 11_173_962), ("resnet18", 100, 11_220_132)])  # the usual CIFAR ResNet-18
def test_known_sizes_with_the_small_stem(backbone: str, classes: int, parameters: int) -> None:
    model: Any = build_backbone(Recipe(backbone=backbone, stem="small"), classes, 0)

    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)  # 1x1 with ImageNet's stem


@pytest.mark.parametrize("fields", [{}, {"backbone": "preact_resnet18"}])
def test_weights_are_a_function_of_the_seed(fields: dict[str, Any]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_backbone(recipe(**fields), 3, 7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # and nobody else's draws move
    torch.manual_seed(2)
    again, other = (build_backbone(recipe(**fields), 3, seed).state_dict() for seed in (7, 8))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("fields", "equal"), [
    ({"backbone_args": {"norm": "group"}}, True),
    ({"backbone": "preact_resnet18", "backbone_args": {"norm": "group", "width": 32}}, True),
    ({"backbone_args": {"norm": "batch"}}, False)])
def test_gradients_of_two_slices_average_to_that_of_the_batch(fields: dict[str, Any], equal: bool) -> None:
    model = build_backbone(Recipe(**fields), 4, 0).double()
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, 16, 16, generator=rng, dtype=torch.float64), torch.arange(8) % 4

    whole = gradient(model, x, y)
    slices = (gradient(model, x[:4], y[:4]) + gradient(model, x[4:], y[4:])) / 2
    assert torch.allclose(slices, whole, atol=1e-6) == equal


def test_vision_transformers_and_stochastic_depth_come_from_timm() -> None:
    tiny = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    model: Any = build_backbone(Recipe(backbone="vit_tiny_patch16_224", backbone_args=tiny, drop_path=0.2), 5, 0)

    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


def test_a_checkpoint_starts_the_network(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    saved = build_backbone(recipe(), 3, 1)
    save_file({k: v for k, v in saved.state_dict().items() if "num_batches" not in k}, path)  # as timm's files

    same = build_backbone(recipe(checkpoint=str(path)), 3, 2).state_dict()
    other = build_backbone(recipe(checkpoint=str(path)), 5, 2).state_dict()
    fresh = build_backbone(recipe(), 5, 2).state_dict()
    for name, value in saved.state_dict().items():
        assert torch.equal(same[name], value)
        assert torch.equal(other[name], fresh[name] if name.startswith("head.") else value)


def test_a_checkpoint_that_does_not_fit_says_where(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(build_backbone(recipe(), 3, 1).state_dict(), path)

    misfits: list[tuple[dict[str, Any], str]] = [
        ({"backbone_args": {"width": 16}}, r"stem.0.weight: shape \(8, 3, 3, 3\) instead of \(16, 3, 3, 3\)"),
        ({"backbone": "preact_resnet18"}, "stem.conv.weight: missing")]
    for fields, says in misfits:
        with pytest.raises(ModelError, match=rf"(?s)does not fit the backbone.*{says}"):
            build_backbone(recipe(**fields, checkpoint=str(path)), 3, 1)
    for name, says in [("weights.pt", "not a .safetensors file"), ("gone.safetensors", "cannot be read"),
                       ("broken.safetensors", "cannot be read")]:
        (tmp_path / "broken.safetensors").write_bytes(b"no")
        with pytest.raises(ModelError, match=says):
            build_backbone(recipe(checkpoint=str(tmp_path / name)), 3, 1)


@pytest.mark.parametrize(("fields", "says"), [
    ({"backbone": "resnet5O"}, "did you mean resnet50"),
    ({"backbone_args": {"width": 12, "norm": "group", "depth": 3}}, "depth: small_resnet takes width and norm only"),
    ({"backbone_args": {"width": 12, "norm": "group"}}, "take a multiple of 8"),
    ({"backbone_args": {"norm": "layer"}}, "expected batch or group"),
    ({"backbone_args": {"width": 0}}, "whole number of channels"),
    ({"drop_path": 0.1}, "drop_path: small_resnet has no"),
    ({"backbone": "resnet18", "backbone_args": {"wings": 2}}, "wings"),
    ({"backbone": "densenet121", "backbone_args": {}, "stem": "small"}, "not for densenet121"),
])
def test_mistakes_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_backbone(Recipe(**fields), 3, 0)


VIT = {"backbone": "test_vit", "backbone_args": {"img_size": 64}}
BEIT = {"backbone": "beit_base_patch16_224",
        "backbone_args": {"img_size": 64, "embed_dim": 12, "depth": 1, "num_heads": 2}}


@pytest.mark.parametrize(("fields", "positions"), [(VIT, "pos_embed"), (BEIT, "relative_position_bias_table")],
                         ids=["absolute positions", "relative positions"])
def test_positions_of_another_image_size_are_resampled(tmp_path: Path, fields: dict[str, Any], positions: str) -> None:
    path = tmp_path / "weights.safetensors"
    args: dict[str, Any] = fields["backbone_args"]
    smaller = {**args, "img_size": 48}
    saved = build_backbone(Recipe(**fields), 3, 1).state_dict()
    for name in (one for one in saved if one.endswith(positions)):
        saved[name] = torch.linspace(0, 1, saved[name].numel()).view_as(saved[name])
    save_file(saved, path)

    found = build_backbone(Recipe(backbone=fields["backbone"], backbone_args=smaller, checkpoint=str(path)), 3, 2)
    state = found.state_dict()
    moved = [name for name in saved if name in state and saved[name].shape != state[name].shape]
    assert moved
    assert all(name.endswith(positions) for name in moved)
    for name in moved:  # smooth numbers stay smooth: resampled, not drawn
        assert state[name].mean() == pytest.approx(float(saved[name].mean()), abs=0.05)
        assert state[name].std() == pytest.approx(float(saved[name].std()), rel=0.2)
    assert all(torch.equal(state[name], saved[name]) for name in saved if name in state and name not in moved)


def test_patches_of_another_size_are_not_resampled(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(build_backbone(Recipe(**VIT), 3, 1).state_dict(), path)
    other = Recipe(backbone="test_vit", backbone_args={"img_size": 64, "patch_size": 8}, checkpoint=str(path))
    with pytest.raises(ModelError, match=r"patch_embed\.proj\.weight: shape"):
        build_backbone(other, 3, 1)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_networks_are_taken_off(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "weights.safetensors"
    saved = build_backbone(recipe(), 3, 1).state_dict()
    save_file({prefix + name: one for name, one in saved.items()}, path)
    found = build_backbone(recipe(checkpoint=str(path)), 3, 2).state_dict()
    assert all(torch.equal(found[name], one) for name, one in saved.items())


def test_another_prefix_is_named_as_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({f"encoder.{name}": one for name, one in build_backbone(recipe(), 3, 1).state_dict().items()}, path)
    with pytest.raises(ModelError, match=r"every name begins with 'encoder\.'; take it off") as error:
        build_backbone(recipe(checkpoint=str(path)), 3, 1)
    assert "set recipe.backbone" not in str(error.value)


@pytest.mark.parametrize(("saved", "wanted"), [(VIT, {"class_token": False, "global_pool": "avg"}), (
    {**VIT, "backbone_args": {**VIT["backbone_args"], "class_token": False, "global_pool": "avg"}}, {})])
def test_positions_of_another_kind_are_a_clear_refusal(tmp_path: Path, saved: dict[str, Any], wanted: dict[str, Any],
                                                       ) -> None:
    """One position more or less, for a class token, is no other image size."""
    path = tmp_path / "weights.safetensors"
    save_file(build_backbone(Recipe(**saved), 3, 1).state_dict(), path)
    fields = {**VIT, "backbone_args": {**VIT["backbone_args"], "img_size": 48, **wanted}}
    with pytest.raises(ModelError, match="does not fit the backbone"):
        build_backbone(Recipe(**fields, checkpoint=str(path)), 3, 1)
