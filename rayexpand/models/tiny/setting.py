"""What a small generator and its guide are trained to be: sizes, steps, rates. The defaults are the embedded digits'.

No torch here, so that a file can be checked before anything heavy is imported.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from rayexpand.contract.settings import Later, Section

GROUPS = 8  # of every group normalisation: autoencoder and UNet channels are multiples of it
HEAD = 16  # channels of one attention head of UNet and text tower
UNIT = 8  # pixels; diffusers' own pipelines take multiples of it


class GuideSetting(Section):
    """A CLIP model: a vision transformer and a text tower, which becomes the generator's text encoder."""

    width: int = Field(64, ge=16, description="of the vision transformer")
    layers: int = Field(3, ge=1)
    patch: int = Field(4, ge=1, description="side in pixels of a patch; divides the image size")
    head_width: int = Field(16, ge=4)
    embed: int = Field(32, ge=4, description="features of image and text")
    text_width: int = Field(32, ge=HEAD, description="of the text tower, and of what the UNet attends to")
    text_layers: int = Field(2, ge=1)
    steps: int = Field(300, ge=1)
    batch: int = Field(64, ge=2)
    rate: float = Field(2e-3, gt=0, description="peak of a one-cycle AdamW")


class VaeSetting(Section):
    """An autoencoder. Each channel count but the last is followed by a halving: two halve once, three twice."""

    channels: tuple[int, ...] = Field((16, 32), min_length=1)
    latent_channels: int = Field(4, ge=1)
    steps: int = Field(300, ge=1)
    batch: int = Field(32, ge=2)
    rate: float = Field(4e-3, gt=0, description="peak of a one-cycle AdamW")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.channels) - 1)


class UnetSetting(Section):
    """The generator's UNet, on latents. Its channels halve the latent as those of the autoencoder halve the image."""

    channels: tuple[int, ...] = Field((32, 64), min_length=1)
    attention: tuple[int, ...] = Field((1,), description="levels that attend to the text, 0 the finest; the middle "
                                       "always does. On the finest they cost most and help least (measured)")
    layers: int = Field(1, ge=1, description="residual blocks of a level")
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"
    rescale_betas_zero_snr: Annotated[bool, Later(False)] = Field(
        False, description="noise that leaves no signal at the last timestep (Lin et al. 2024), so that samples begin "
        "where the training ended")
    spacing: Annotated[Literal["leading", "trailing"], Later("leading")] = Field(
        "leading", description="where the steps of a sampler lie: trailing begins at the last timestep, as few steps "
        "and rescale_betas_zero_snr want")
    steps: int = Field(400, ge=1)
    batch: int = Field(32, ge=1)
    rate: float = Field(2e-3, gt=0, description="peak of a one-cycle AdamW")
    ema: float = Field(0.995, ge=0, lt=1, description="share of the moving average that a step keeps; its weights are "
                       "the result")
    caption_drop: float = Field(0.1, ge=0, le=1, description="share of images shown with the empty text, which "
                                "classifier-free guidance needs")


class Setting(Section):
    """Everything that decides trained weights beside the images, their captions and the seed."""

    size: int = Field(16, ge=8, le=256, description="side in pixels of the square images")
    context: int = Field(16, ge=4, description="tokens of one text")
    augment: Literal["drawings", "photos", "none"] = Field("drawings", description=(
        "drawings: the guide sees them turned and shifted a little, the autoencoder turned, mirrored and in other "
        "colours; photos: mirrored, shifted, in other light, and mirrored before the generator; none: as they are"))
    guide: GuideSetting = GuideSetting()
    vae: VaeSetting = VaeSetting()
    unet: UnetSetting = UnetSetting()
    samples: int = Field(200, ge=0, description="generated to measure; 0: none")
    sample_steps: int = Field(10, ge=1, description="solver steps of each")
    guidance_scale: float = Field(2.0, ge=1, description="classifier-free guidance of the samples")


def problems(setting: Setting) -> list[str]:
    """What does not fit together, one line each: `field: what, why, next step`."""
    guide, vae, unet = setting.guide, setting.vae, setting.unet
    found = []
    unit = math.lcm(UNIT, vae.factor * 2 ** (len(unet.channels) - 1))
    if setting.size % unit:
        found.append(f"size: {setting.size} px is no multiple of {unit}, by which autoencoder and UNet shrink an image "
                     f"(at least {UNIT}); take such a multiple, or fewer vae.channels or unet.channels")
    if setting.size % guide.patch:
        found.append(f"guide.patch: {guide.patch} px does not divide size {setting.size}; take a divisor such as "
                     f"{math.gcd(guide.patch, setting.size)}")
    if guide.width % guide.head_width:
        found.append(f"guide.head_width: {guide.head_width} does not divide guide.width {guide.width}; change one")
    if guide.text_width % HEAD:
        found.append(f"guide.text_width: {guide.text_width} is no multiple of {HEAD}, the width of a head")
    for name, channels, unit in (("vae", vae.channels, GROUPS), ("unet", unet.channels, HEAD)):
        if bad := [one for one in channels if one < unit or one % unit]:
            found.append(f"{name}.channels: {', '.join(map(str, bad))} is no positive multiple of {unit}")
    if bad := [level for level in unet.attention if not 0 <= level < len(unet.channels)]:
        found.append(f"unet.attention: there is no level {', '.join(map(str, bad))}; levels of {len(unet.channels)} "
                     f"unet.channels are 0 to {len(unet.channels) - 1}")
    if unet.rescale_betas_zero_snr and unet.prediction_type == "epsilon":
        found.append("unet.prediction_type: epsilon says nothing of the image where no signal is left, at the last "
                     "timestep of rescale_betas_zero_snr; take v_prediction")
    for name, batch in (("guide", guide.batch), ("vae", vae.batch)):
        if setting.augment != "none" and batch % 2:
            found.append(f"{name}.batch: {batch} is odd; half of a batch is augmented, so take an even number")
    return found
