"""RandAugment (Cubuk et al. 2020), AutoAugment's ImageNet policy (Cubuk et al. 2019), AugMix (Hendrycks et al. 2020)
and GridMask from a given generator.

torchvision's own transforms draw from torch's global generator; here the drawing is ours and keyed, and the pixel work
is torchvision's on PIL images, which draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps


def randaugment(image: np.ndarray, rng: np.random.Generator, num_ops: int = 2, bin_: int = 9,
                bins: int = 31, *, spare: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) after `num_ops` operations drawn uniformly, each at bin `bin_` of its range, signs drawn.

    `spare`: an operation that would leave one colour only, as Solarize does with black on white, is left out.
    """
    picture = Image.fromarray(image)
    for op in rng.integers(len(RANDAUGMENT_OPS), size=num_ops):
        picture = _one_op(picture, RANDAUGMENT_OPS[op], bin_, bins, rng, spare)
    return np.array(picture)


def autoaugment(image: np.ndarray, rng: np.random.Generator, *, spare: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) after one of the 25 pairs of operations of the ImageNet policy, drawn uniformly. `spare` as in
    `randaugment`."""
    picture = Image.fromarray(image)
    for op, probability, bin_ in AUTOAUGMENT_IMAGENET[rng.integers(len(AUTOAUGMENT_IMAGENET))]:
        if rng.random() < probability:
            picture = _one_op(picture, op, bin_ or 0, 10, rng, spare)
    return np.array(picture)


def augmix(image: np.ndarray, rng: np.random.Generator, severity: int = 3, width: int = 3) -> np.ndarray:
    """uint8 (H, W, 3): the image mixed with `width` chains of 1 to 3 operations, as AugMix's released code does:
    weights of the chains from Dirichlet(1, ..., 1), share of their mixture from Beta(1, 1). Rounded to levels."""
    weights, m = rng.dirichlet(np.ones(width)), rng.beta(1, 1)
    mixture = np.zeros(image.shape)
    for weight in weights:
        picture = Image.fromarray(image)
        for op in rng.integers(len(AUGMIX_OPS), size=int(rng.integers(1, 4))):
            picture = _augmix_op(picture, AUGMIX_OPS[op], rng.uniform(0.1, severity) / 10, rng.random() < 0.5)
        mixture += weight * np.asarray(picture)
    return np.rint((1 - m) * image + m * mixture).astype(np.uint8)


def _augmix_op(picture: Image.Image, op: str, level: float, is_mirrored: bool) -> Image.Image:
    """`level` is a share of the operation's range; geometry is bilinear on black, a shear about the corner."""
    width, height = picture.size
    sign = -1 if is_mirrored else 1

    def affine(*terms: float) -> Image.Image:
        return picture.transform(picture.size, Image.Transform.AFFINE, terms, Image.Resampling.BILINEAR)

    ops: dict[str, Callable[[], Image.Image]] = {
        "AutoContrast": lambda: ImageOps.autocontrast(picture),
        "Equalize": lambda: ImageOps.equalize(picture),
        "Posterize": lambda: ImageOps.posterize(picture, 4 - int(4 * level)),
        "Rotate": lambda: picture.rotate(sign * int(30 * level), Image.Resampling.BILINEAR),
        "Solarize": lambda: ImageOps.solarize(picture, 256 - int(256 * level)),
        "ShearX": lambda: affine(1, sign * 0.3 * level, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, sign * 0.3 * level, 1, 0),
        "TranslateX": lambda: affine(1, 0, sign * int(width / 3 * level), 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, sign * int(height / 3 * level)),
    }
    return ops[op]()


def gridmask(shape: tuple[int, ...], rng: np.random.Generator, keep: float = 0.6) -> np.ndarray:
    """bool (H, W), True in the holes (Chen et al. 2020, as DistDiff runs it): squares of side d - ceil(keep * d) at
    period d, d uniform on 96..223 of a 224-pixel shorter side, turned."""
    height, width = shape
    low = max(2, round(min(shape) * 96 / 224))
    d = int(rng.integers(low, max(low + 1, min(shape))))
    kept = math.ceil(keep * d)
    phase_y, phase_x = rng.integers(d, size=2)
    angle = math.radians(int(rng.integers(360)))
    y, x = np.mgrid[:height, :width] - np.array([height - 1, width - 1]).reshape(2, 1, 1) / 2
    turned_y, turned_x = math.cos(angle) * y - math.sin(angle) * x, math.sin(angle) * y + math.cos(angle) * x
    return (np.mod(turned_y - phase_y, d) >= kept) & (np.mod(turned_x - phase_x, d) >= kept)


def is_blank(image: np.ndarray) -> bool:
    """Whether every pixel of (H, W, 3) is the same."""
    return bool((image == image[0, 0]).all())


def magnitudes(op: str, bins: int, height: int, width: int) -> np.ndarray | None:
    """Range of an operation cut into `bins`, weakest first; None where it has no strength.

    Shears are slopes, translations pixels, rotations degrees, the four enhancements a change of a factor of 1,
    posterize bits kept, solarize a threshold as a share of white.
    """
    share = np.linspace(0.0, 1.0, bins)
    if op == "Posterize":
        return np.rint(8 - 4 * share)
    if op == "Solarize":
        return 1 - share
    top = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 150 / 331 * width, "TranslateY": 150 / 331 * height,
           "Rotate": 30.0, "Brightness": 0.9, "Color": 0.9, "Contrast": 0.9, "Sharpness": 0.9}.get(op)
    return None if top is None else top * share


SIGNED = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
                    "Sharpness"})
RANDAUGMENT_OPS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
                   "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")
# None of them is a type of corruption that robustness is measured by (ImageNet-C).
AUGMIX_OPS = ("AutoContrast", "Equalize", "Posterize", "Rotate", "Solarize", "ShearX", "ShearY", "TranslateX",
              "TranslateY")

# (operation, probability, bin of 10) twice per row: the ImageNet policy of the AutoAugment paper, appendix, in order.
AUTOAUGMENT_IMAGENET: tuple[tuple[tuple[str, float, int | None], tuple[str, float, int | None]], ...] = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.8, None), ("Equalize", 0.6, None)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, None), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, None), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, None)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, None)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, None), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, None)),
    (("Equalize", 0.0, None), ("Equalize", 0.8, None)),
    (("Invert", 0.6, None), ("Equalize", 1.0, None)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, None)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, None)),
    (("Color", 0.4, 0), ("Equalize", 0.6, None)),
    (("Equalize", 0.4, None), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, None)),
    (("Invert", 0.6, None), ("Equalize", 1.0, None)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, None), ("Equalize", 0.6, None)),
)


def _one_op(picture: Image.Image, op: str, bin_: int, bins: int, rng: np.random.Generator,
            spare: bool) -> Image.Image:
    strengths = magnitudes(op, bins, picture.height, picture.width)
    strength = 0.0 if strengths is None else float(strengths[bin_])
    if op in SIGNED and rng.random() < 0.5:
        strength = -strength
    changed = apply_op(picture, op, strength)
    return picture if spare and is_blank(np.asarray(changed)) else changed


def apply_op(picture: Image.Image, op: str, strength: float) -> Image.Image:
    """`picture` after one operation; a signed strength mirrors it. Geometry is nearest-neighbour on black."""
    from torchvision.transforms.v2 import functional

    def affine(translate: list[float], shear: list[float], center: list[float] | None = None) -> Image.Image:
        return functional.affine(picture, angle=0.0, translate=translate, scale=1.0, shear=shear, center=center)

    # torchvision takes a shear as an angle and shears about the centre; the papers give a slope about the corner
    slope = math.degrees(math.atan(strength))
    ops: dict[str, Callable[[], Image.Image]] = {
        "Identity": lambda: picture,
        "ShearX": lambda: affine([0, 0], [slope, 0.0], [0, 0]),
        "ShearY": lambda: affine([0, 0], [0.0, slope], [0, 0]),
        "TranslateX": lambda: affine([int(strength), 0], [0.0, 0.0]),
        "TranslateY": lambda: affine([0, int(strength)], [0.0, 0.0]),
        "Rotate": lambda: functional.rotate(picture, strength),
        "Brightness": lambda: functional.adjust_brightness(picture, 1 + strength),
        "Color": lambda: functional.adjust_saturation(picture, 1 + strength),
        "Contrast": lambda: functional.adjust_contrast(picture, 1 + strength),
        "Sharpness": lambda: functional.adjust_sharpness(picture, 1 + strength),
        "Posterize": lambda: functional.posterize(picture, int(strength)),
        "Solarize": lambda: functional.solarize(picture, 255 * strength),
        "AutoContrast": lambda: functional.autocontrast(picture),
        "Equalize": lambda: functional.equalize(picture),
        "Invert": lambda: functional.invert(picture),
    }
    return ops[op]()
