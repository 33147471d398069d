"""Autoencoder only: a seed image is encoded and decoded, and nothing happens between. No UNet call, no prompt.

The control for what the autoencoder of a latent diffusion model alone removes or adds: no sample of that generator from
a seed can be nearer to it, and what `evaluate` finds of these images is the floor of every distance of the generator.

    paper        here      meaning, unit
    mu, sigma    (prior)   mean and standard deviation of the latent of a seed image
    z_0          z_BCHW    mu, or with `sample` mu + sigma * noise of each copy
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Draw, SeedIndex, Start
from rayexpand.contract.settings import Section
from rayexpand.diffusion import sampling
from rayexpand.methods._copies import quota_copies, ratio_copies


class Vae(Section):
    """Settings of vae, all ours."""

    name: Literal["vae"] = "vae"
    ratio: float = Field(1.0, gt=0, le=65535, description="copies of each seed; above 1 only with `sample`, for copies "
                         "of the mean are one image (ours)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio`")
    sample: bool = Field(False, description="decode a latent drawn from the posterior, another for each copy, instead "
                         "of its mean (ours: the mean)")

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        import torch

        prior = tools.prior
        with torch.no_grad():
            z_BCHW = self._encode(prior, batch)
            images, reasons = sampling.to_images(prior.decode(z_BCHW))
        return Expansion(images, reasons)

    def _encode(self, prior: Any, batch: Batch) -> Any:
        if self.sample:  # a stream of the copy: with that of the seed, all copies would be one image
            return prior.encode(sampling.to_tensor(batch.images), sampling.noise_batch(prior, batch, "posterior_copy"))
        return sampling.once_per_seed(batch, lambda x_nCHW, slots: prior.encode(x_nCHW, None))

    def needs(self) -> frozenset[str]:
        return frozenset({"prior"})

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        """Raises UsageError for several copies of the mean."""
        if self.quota is None:
            planned = ratio_copies(index, self.ratio, rng)
        else:
            planned = quota_copies(index, np.full(len(index.classes), self.quota), rng)
        if not self.sample and (most := int(planned.max(initial=0))) > 1:
            field = "ratio" if self.quota is None else "quota"
            raise UsageError(f"method.{field}: a seed would get {most} copies, and they would be one image, for the "
                             f"mean of the posterior is decoded; set method.sample: true, or lower {field} so that no "
                             "seed has more than one")
        return planned

    def no_allocation(self) -> str:
        return "" if self.sample else "decodes the mean (sample: false), so that copies of a seed would be one image"

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        return Draw(sample_id=f"{seed_id}/{copy}", seed_id=seed_id, copy=copy, source_label=label, target_label=label,
                    prompt="", negative="", start=Start.IMAGE, strength=0.0, steps_run=0, attempt=0, row=row,
                    group=copy)

    def group(self, copies: int) -> int:
        return 1

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        return ()

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        return np.eye(n_classes, dtype=np.float32)[target]
