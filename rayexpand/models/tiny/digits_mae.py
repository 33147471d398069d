"""A masked autoencoder of the digits, for GIF-MAE: `prior.weights: digits-mae`, trained in half a minute.

It differs from He et al. (2022) where digits taught it to (measured): the loss is that of all patches, because under
one of hidden patches alone the visible ones are drawn at 11 dB, and nothing is hidden here when it is used; for the
same reason a quarter of the steps hides nothing.
"""

# B rows, N patches, p pixels of a patch

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from rayexpand.contract.protocols import Progress
from rayexpand.data.seeds import digits_split
from rayexpand.models.folders import PIXELS, cache_root
from rayexpand.models.mae import MaePrior, masked, ordered
from rayexpand.models.tiny import pretrain
from rayexpand.models.tiny.architecture import initialise
from rayexpand.models.tiny.once import trained_once
from rayexpand.storage.checkpoints import Stage

if TYPE_CHECKING:
    from transformers import ViTMAEForPreTraining

RATIOS = (0.0, 0.25, 0.5, 0.75)  # of hidden patches, one drawn for each step
STAGE = "masked autoencoder"


@dataclass(frozen=True, slots=True)
class MaeRecipe:
    """What decides the trained weights; its digest names the cache folder."""

    version: int = 1  # raised when the code below trains something else from the same numbers
    seed: int = 0
    split: int = 0  # of digits_split
    size: int = 16
    patch: int = 4
    width: int = 64
    layers: int = 3
    decoder_layers: int = 2
    heads: int = 4
    steps: int = 1000
    batch: int = 64
    rate: float = 2e-3  # peak of a one-cycle AdamW

    def stream(self, stage: str) -> np.random.Generator:
        return pretrain.stream(self.seed, stage)


RECIPE = MaeRecipe()


def cache_name(recipe: MaeRecipe = RECIPE) -> str:
    """`digits-mae-` and eight hex digits over recipe and the library versions that shape the training."""
    stack = {name: version(name).split("+")[0].split(".")[:2] for name in ("torch", "transformers")}
    text = json.dumps([asdict(recipe), RATIOS, stack], sort_keys=True)
    return f"digits-mae-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def ensure(progress: Progress | None = None, cache: Path | None = None, recipe: MaeRecipe = RECIPE) -> Path:
    """Folder with `mae/` (transformers) and `measured.json`; trained on first use. See digits.ensure."""
    report = progress or (lambda stage, done, total: None)
    return trained_once(cache_root(cache) / cache_name(recipe), lambda folder: train(folder, recipe, report), report)


def train(folder: Path, recipe: MaeRecipe, report: Progress) -> None:
    """Trains the model and writes it to `folder` with what was measured. One thread; global state kept."""
    with pretrain.settled(threads=1):
        data = digits_split(recipe.split)
        model = train_mae(pretrain.to_bytes(data["pool"][0]), recipe, report)
        save(model, folder / "mae")
        measured = measure(model, pretrain.to_bytes(data["test"][0]), recipe)
        (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")


def build(recipe: MaeRecipe = RECIPE) -> ViTMAEForPreTraining:
    """With fresh weights. transformers makes both tables of positions of a model without weights zeros and never trains
    them: here they are filled."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding as positions

    width, inner = recipe.width, 2 * recipe.width
    model = ViTMAEForPreTraining(ViTMAEConfig(
        image_size=recipe.size, patch_size=recipe.patch, num_channels=3, mask_ratio=0.75, norm_pix_loss=False,
        hidden_size=width, num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, intermediate_size=inner,
        decoder_hidden_size=width, decoder_num_hidden_layers=recipe.decoder_layers,
        decoder_num_attention_heads=recipe.heads, decoder_intermediate_size=inner))
    rng = recipe.stream("mae weights")
    initialise(model, rng)
    side, embeddings, decoder = recipe.size // recipe.patch, model.vit.embeddings, model.decoder
    with torch.no_grad():
        for table in (embeddings.position_embeddings, decoder.decoder_pos_embed):
            table.copy_(positions(side, side, width, cls_token=True)[None])
        for token in (embeddings.cls_token, decoder.mask_token):
            token.copy_(0.02 * torch.from_numpy(rng.standard_normal(token.shape, dtype=np.float32)))
    return model


def train_mae(x_n3HW: torch.Tensor, recipe: MaeRecipe, report: Progress) -> ViTMAEForPreTraining:
    """On uint8 images; all patches are redrawn, of which a share was hidden."""
    model, rng = build(recipe), recipe.stream("mae")
    patches = (recipe.size // recipe.patch) ** 2

    def loss() -> torch.Tensor:
        rows = torch.from_numpy(rng.integers(len(x_n3HW), size=recipe.batch))
        x_B3HW = pretrain.to_unit(x_n3HW[rows]) * 2 - 1
        order_BN = torch.from_numpy(rng.random((recipe.batch, patches), dtype=np.float32))
        with masked(model, RATIOS[rng.integers(len(RATIOS))]):
            logits = model(x_B3HW, noise=order_BN).logits
        return F.mse_loss(logits, model.patchify(x_B3HW))

    Stage(STAGE, model, rng, steps=recipe.steps, rate=recipe.rate, decay=0.01, beta=0.95, warm=0.1).run(
        loss, report, None)
    return model.eval().requires_grad_(False)


def save(model: ViTMAEForPreTraining, folder: Path) -> None:
    """The model, and how its pixels are normalised: to [-1, 1]."""
    model.save_pretrained(folder, safe_serialization=True)
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": model.config.image_size,
                                                                        "width": model.config.image_size}}
    (folder / PIXELS).write_text(json.dumps(pixels, indent=1) + "\n")


@torch.no_grad()
def measure(model: ViTMAEForPreTraining, x_n3HW: torch.Tensor, recipe: MaeRecipe) -> dict[str, float]:
    """On uint8 images, dB: nothing hidden, and on hidden patches where three quarters are. The second tells whether
    the model knows where its tokens stand, which the first does not."""
    prior = MaePrior(model, (0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    x = pretrain.to_unit(x_n3HW)
    redrawn = prior.decode(prior.encode(x, None)).clamp(0, 1)
    noise = torch.from_numpy(recipe.stream("mae measured").random(ordered(model, len(x)).shape, dtype=np.float32))
    with masked(model, 0.75):
        out = model(x * 2 - 1, noise=noise)
    error_nN = ((out.logits.clamp(-1, 1) - model.patchify(x * 2 - 1)) / 2).square().mean(2)
    hidden = float((error_nN * out.mask).sum() / out.mask.sum())
    measured = {"psnr_db": pretrain.psnr_of(redrawn, x_n3HW), "hidden_db": float(-10 * np.log10(hidden))}
    return {name: round(value, 4) for name, value in measured.items()}
