"""A masked autoencoder (He et al. 2022) behind the Prior protocol, for GIF-MAE: transformers' ViTMAEForPreTraining.

The latent of an image are its tokens with their channels first, (B, D, T): so that one number for each row and channel,
as GIF draws them, belongs to a channel of all tokens, and not to a token.
"""

# B rows, D channels, T tokens (one of them of the class), N = T - 1 patches

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rayexpand.contract.device import choose_device
from rayexpand.contract.errors import ModelError
from rayexpand.models.folders import MAE, PIXELS, read_json
from rayexpand.models.latent import ATTENTIONS, number_of
from rayexpand.models.part_loading import load_part
from rayexpand.models.prior_files import Settings, pixel_numbers
from rayexpand.models.sources import PartSource

if TYPE_CHECKING:
    from transformers import ViTMAEForPreTraining


class MaePrior:
    """Encoder and decoder, frozen and in eval mode. Gradients flow through `decode` to the latent.

    Nothing is hidden from the encoder, and its patches stay in their order: transformers shuffles them even where it
    hides none, and a decoder that is not told draws another image.
    """

    decode_needs_grad = True

    def __init__(self, model: ViTMAEForPreTraining, mean: Sequence[float], std: Sequence[float], device: torch.device,
                 decoder_dtype: torch.dtype = torch.float32) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.model.decoder.to(decoder_dtype)
        self.device, self.decoder_dtype, config = device, decoder_dtype, model.config
        self.mean, self.std = (torch.tensor(one, device=device).view(1, 3, 1, 1) for one in (mean, std))
        embeddings = model.vit.embeddings
        for table in (embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            if not table.float().std() > 0:
                raise ModelError("a table of positions holds zeros: the model does not know where its tokens stand; "
                                 "fill both before training, and train again")
        self.space = f"mae{config.hidden_size}x{embeddings.position_embeddings.shape[1]}"

    @classmethod
    def load(cls, folder: Path, *, device: str = "auto", attention: str = "auto", vae_dtype: str = "auto") -> MaePrior:
        """From a complete folder (see `load_prior`). The encoder runs in float32; `vae_dtype` is that of the decoder.
        Raises ModelError."""
        where = choose_device(device)
        if attention not in ATTENTIONS:
            raise ModelError(f"attention '{attention}' is unknown; choose one of {', '.join(ATTENTIONS)}")
        mean, std = pixel_numbers(Settings(PIXELS, read_json(folder / PIXELS), []))
        model = load_part(PartSource("", folder, folder), MAE, torch.float32)
        if attention != "auto":
            model.set_attn_implementation(attention)
        return cls(model, mean, std, where, number_of(vae_dtype, where))

    def encode(self, x_BCHW: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1], of the model's own size, to float32 tokens (B, D, T). `noise` has no effect:
        there is no posterior to sample."""
        pixels_BCHW = (x_BCHW.to(self.device, torch.float32) - self.mean) / self.std
        with masked(self.model, 0.0):
            tokens_BTD = self.model.vit(pixels_BCHW, noise=ordered(self.model, len(x_BCHW))).last_hidden_state
        return tokens_BTD.transpose(1, 2)

    def decode(self, z: torch.Tensor, cond: Any = None) -> torch.Tensor:
        """Tokens (B, D, T) to float32 images (B, 3, H, W), about [0, 1], unclamped. `cond` is not used."""
        tokens_BTD = z.to(self.device, self.decoder_dtype).transpose(1, 2)
        in_order = ordered(self.model, len(z)).long()
        patches = self.model.decoder(tokens_BTD, ids_restore=in_order).logits.float()
        return self.model.unpatchify(patches) * self.std + self.mean


@contextmanager
def masked(model: ViTMAEForPreTraining, ratio: float) -> Iterator[None]:
    """The share of patches that is hidden inside, which transformers reads at every call; then as it was."""
    config = model.config
    before, config.mask_ratio = config.mask_ratio, ratio
    try:
        yield
    finally:
        config.mask_ratio = before


def ordered(model: ViTMAEForPreTraining, rows: int) -> torch.Tensor:
    """float32 (B, N): the "noise" by whose size patches are sorted, already sorted."""
    table = model.vit.embeddings.position_embeddings
    return torch.arange(table.shape[1] - 1, dtype=torch.float32, device=table.device).expand(rows, -1)
