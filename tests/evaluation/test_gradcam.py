"""Grad-CAM by hand, on networks of ours and of timm, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rayexpand.classifier.backbones import build_backbone
from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import UsageError
from rayexpand.evaluation.gradcam import grad_cam, last_block, weighted_map


class TwoMaps(nn.Module):
    """Logits (3 mean A1 - mean A2, 0) of an image whose first two channels are A1 and A2."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        a_BC = self.maps(x_BCHW[:, :2]).mean(dim=(2, 3))
        return torch.stack([3 * a_BC[:, 0] - a_BC[:, 1], 0 * a_BC[:, 0]], dim=1)


A = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]]])


def test_two_maps_by_hand() -> None:
    g = torch.autograd.grad(TwoMaps()(x := A.clone().requires_grad_())[0, 0], x)[0][:, :2]
    found = grad_cam(TwoMaps(), "maps", A, torch.tensor([0]))

    assert torch.allclose(g.mean(dim=(2, 3)), torch.tensor([[0.75, -0.25]]))
    assert torch.allclose(weighted_map(A[:, :2], g), torch.tensor([[[0.75, 0.0], [0.0, 0.0]]]))
    assert torch.allclose(found.map_Bhw, torch.tensor([[[0.75, 0.0], [0.0, 0.0]]]))
    assert grad_cam(TwoMaps(), "maps", A, torch.tensor([1])).map_Bhw.abs().max() == 0, "a class that nothing speaks for"


@pytest.mark.parametrize(("backbone", "args", "layer"), [
    ("small_resnet", {"width": 4}, "blocks"), ("preact_resnet18", {"width": 8}, "norm"), ("resnet18", {}, "layer4")])
def test_the_last_block_and_rows_that_do_not_depend_on_each_other(backbone: str, args: dict[str, int],
                                                                  layer: str) -> None:
    module = build_backbone(Recipe(backbone=backbone, backbone_args=args), 3, 0)
    x_BCHW = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels_B = torch.tensor([0, 1, 2])
    found = grad_cam(module, layer, x_BCHW, labels_B)

    assert last_block(module, x_BCHW[:1]) == layer
    assert found.map_Bhw.shape[0] == 3
    assert found.map_Bhw.shape[1] > 1
    assert (found.map_Bhw >= 0).all()
    assert torch.allclose(found.logits_BK, module.eval()(x_BCHW), atol=1e-5)
    alone = grad_cam(module, layer, x_BCHW[1:2], labels_B[1:2]).map_Bhw
    assert torch.allclose(found.map_Bhw[1:2], alone, atol=1e-5)


def test_networks_without_such_maps_are_refused() -> None:
    vit = build_backbone(Recipe(backbone="vit_tiny_patch16_224", backbone_args={"img_size": 32}), 3, 0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    with pytest.raises(UsageError, match=r"attention \(Attention\)"):
        last_block(vit, torch.zeros(1, 3, 32, 32))
    with pytest.raises(UsageError, match="no block with positions"):
        last_block(flat, torch.zeros(1, 3, 2, 2))
