"""The Inception network of 2015-12-05, whose pooled features the published FID and KID compare.

It is torchvision's network with 1008 outputs and three changes of the TensorFlow graph: averages in the pooling
branches leave out the zeros of the padding, and the last pooling branch takes the maximum (pytorch-fid and
torch-fidelity make the same changes). Names of tensors are those of torchvision and of the published file.
"""

# B rows, H W pixels, D = 2048 features

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the customary name)
from torchvision.models import inception as tv


class PoolingA(tv.InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), self.branch_pool(_average(x))]


class PoolingC(tv.InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        deep = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                self.branch7x7dbl_5(self.branch7x7dbl_4(deep)), self.branch_pool(_average(x))]


class PoolingE(tv.InceptionE):
    takes_maximum = False

    def _forward(self, x: Tensor) -> list[Tensor]:
        wide, deep = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.takes_maximum else _average(x)
        return [self.branch1x1(x), self.branch3x3_2a(wide), self.branch3x3_2b(wide),
                self.branch3x3dbl_3a(deep), self.branch3x3dbl_3b(deep), self.branch_pool(pooled)]


def inception_2015(weights: Mapping[str, Tensor]) -> torch.nn.Module:
    """Frozen network from (B, 3, 299, 299) images, (x - 128) / 128 of 0..255, to (B, 2048) pooled features.

    Raises RuntimeError for weights of another network.
    """
    model = tv.Inception3(num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=[
        tv.BasicConv2d, PoolingA, tv.InceptionB, PoolingC, tv.InceptionD, PoolingE, tv.InceptionAux])
    model.Mixed_7c.takes_maximum = True
    model.load_state_dict(dict(weights))
    model.fc = torch.nn.Identity()
    return model.eval().requires_grad_(False)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
