"""Encoded images and pixels: decode a seed by fixed rules, cut it to the size a sampler sees, encode a sample."""

from __future__ import annotations

import io
import sys
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from rayexpand.contract.errors import RowFault
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import Reason

PILLOW_PIXELS = 89_478_485  # Pillow warns above this and refuses above twice this
LOSSLESS_SIDE = 64  # pixels; the automatic codec is lossless up to here

# Nothing else is ever opened: some of Pillow's other readers start external programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_TGA_END = b"TRUEVISION-XFILE.\0"  # without it anything may look like a TGA


def decode(image: bytes, *, min_side: int = 8, max_pixels: int = PILLOW_PIXELS) -> tuple[np.ndarray, str]:
    """Encoded image to upright uint8 (H, W, 3) RGB and a note on what was odd about it, "" or words joined by commas:
    first_frame exif_rotated gray16 gray16_12bit gray16_8bit rgb16 rgb16_12bit rgb16_8bit int32 int32_12bit float
    palette palette_alpha alpha grayscale cmyk, or another mode's name.

    Transparent pixels lie on white; sizes are judged from the header, before pixels are decoded. Safe to call from
    many threads. Raises RowFault: decode_error, too_small, too_large, unsupported_mode.
    """
    try:
        with _opened(image) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise RowFault(Reason.TOO_LARGE, f"{width} x {height} pixels, more than max_pixels {max_pixels}")
            if min(width, height) < min_side:
                raise RowFault(Reason.TOO_SMALL, f"{width} x {height} pixels, a side below min_side {min_side}")
            notes = ["first_frame"] if getattr(opened, "is_animated", False) else []
            raw = _raw_mode(opened)
            upright = _upright(opened, notes)
            if raw in _LOW_BYTES:
                upright = _deep_colour(upright, raw, image, notes)
            return _rgb(upright, notes, white_known=opened.format == "PPM"), ",".join(notes)
    except (RowFault, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowFault(Reason.TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:
        known = f"{', '.join(_FORMATS)}, or TGA with a footer"
        raise RowFault(Reason.DECODE_ERROR, f"these {len(image)} bytes are no {known}") from error
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise RowFault(Reason.DECODE_ERROR, f"{type(error).__name__}: {error}") from error


def header_size(image: bytes) -> tuple[int, int]:
    """Height and width of an encoded image by its header, before it is turned upright; (0, 0) where it says none."""
    try:
        with _opened(image) as opened:
            return opened.height, opened.width
    except Exception:  # what is wrong with it, `decode` says
        return 0, 0


def _opened(image: bytes) -> Image.Image:
    return Image.open(io.BytesIO(image), formats=("TGA",) if image.endswith(_TGA_END) else _FORMATS)


_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}


def _upright(opened: Image.Image, notes: list[str]) -> Image.Image:
    turned_by_pillow = opened.format == "TIFF" and _orientation(opened) in _TURNS  # during load, unlike other formats
    opened.load()
    turn = _TURNS.get(_orientation(opened))
    if turned_by_pillow or turn is not None:
        notes.append("exif_rotated")
    return opened if turn is None else opened.transpose(turn)


def _orientation(opened: Image.Image) -> int:
    try:
        return int(opened.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF must not cost a sound image
        return 1


# How the file stores colours of 16 bits, of which Pillow keeps the high byte -> what makes it keep the low one instead
# (or, for grey with alpha, all four bytes of a pixel).
_LOW_BYTES = {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA", "RGBX")
              for order, other in ("BL", "LB", ("N", "B" if sys.byteorder == "little" else "L"))} | {"LA;16B": "RGBA"}


def _raw_mode(opened: Image.Image) -> str:
    """How the file stores its pixels; "" where that is not known."""
    args = next((tile[3] for tile in getattr(opened, "tile", ())), "")
    raw = args[0] if isinstance(args, tuple) and args else args
    return raw if isinstance(raw, str) else ""


def _deep_colour(high: Image.Image, raw: str, content: bytes, notes: list[str]) -> Image.Image:
    """The image with colours scaled by the bits in use, as `_to_8_bits` does; as Pillow has it where these are 16."""
    name = "gray16" if raw == "LA;16B" else "rgb16"
    values_HWC = np.asarray(high).astype(np.uint16) << 8
    if values_HWC[:, :, :3].max() > 4095:
        notes.append(name)
        return high
    with Image.open(io.BytesIO(content), formats=(str(high.format),) if high.format else _FORMATS) as again:
        again.tile = [tile._replace(args=_renamed(tile.args, _LOW_BYTES[raw])) for tile in again.tile]
        low_HWC = np.asarray(_upright(again, []))
    if raw == "LA;16B":
        values_HWC = (low_HWC[:, :, [0, 0, 0, 2]].astype(np.uint16) << 8) | low_HWC[:, :, [1, 1, 1, 3]]
    else:
        values_HWC |= low_HWC
    colour_HWC, note = _to_8_bits(values_HWC[:, :, :3], white_known=False)
    notes.append(note.replace("gray16", name))
    return Image.fromarray(np.concatenate([colour_HWC, np.asarray(high)[:, :, 3:]], axis=2))


def _renamed(args: Any, raw: str) -> Any:
    return (raw, *args[1:]) if isinstance(args, tuple) else raw


def _rgb(image: Image.Image, notes: list[str], *, white_known: bool) -> np.ndarray:
    mode = image.mode
    if mode.startswith(("I", "F")):
        gray, note = _to_8_bits(np.asarray(image), white_known)
        notes.append(note)
        return np.repeat(gray[:, :, None], 3, axis=2)
    note = {"1": "grayscale", "L": "grayscale", "LA": "grayscale", "La": "grayscale", "RGB": "", "RGBA": "", "RGBa": "",
            "P": "palette", "PA": "palette"}.get(mode, mode.lower())
    try:
        if image.has_transparency_data:
            note = {"palette": "palette_alpha", "grayscale": "grayscale,alpha"}.get(note, "alpha")
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except ValueError as error:
        raise RowFault(Reason.UNSUPPORTED_MODE, f"mode {mode} does not convert to RGB ({error})") from error
    notes.extend(filter(None, [note]))
    return pixels


def _to_8_bits(values: np.ndarray, white_known: bool) -> tuple[np.ndarray, str]:
    """uint8 of deep values, in their shape. Integers count as 8 bits where none exceeds 255, as 12 where none exceeds
    4095 (what cameras and scanners put into files of 16), else as 16; as 16 also where the file says so (`white_known`,
    ppm) or where all are multiples of 257, which is 8 bits made deeper. Floats in [0, 1] times 255, in [0, 255] as they
    are. Raises RowFault(unsupported_mode) otherwise."""
    low, high = values.min(), values.max()
    whole = values.dtype.kind in "iu"
    if not (low >= 0 and high <= (65535 if whole else 255)):  # NaN fails too
        raise RowFault(Reason.UNSUPPORTED_MODE, f"grey values from {low} to {high} have no known white")
    if whole:
        note = "gray16" if values.dtype.itemsize == 2 or white_known else "int32"
        if white_known or high > 4095 or (note == "gray16" and not (values % 257).any()):
            scale = 1 / 257
        elif high > 255:
            scale, note = 255 / 4095, f"{note}_12bit"
        else:
            scale, note = 1.0, note if note == "int32" else "gray16_8bit"
    else:
        scale, note = (255.0 if high <= 1 else 1.0), "float"
    return np.rint(values.astype(np.float32) * np.float32(scale)).astype(np.uint8), note


def prepare(image: np.ndarray, size: int | None, fit: Literal["crop", "center", "squash", "none"], rng: RowRng,
            squashed_by: Literal["bicubic", "bilinear"] = "bicubic",
            cut_by: Literal["bicubic", "bilinear"] = "bilinear") -> np.ndarray:
    """uint8 (H, W, 3) to uint8 (size, size, 3); as is for size None or fit "none".

    "crop" brings the shorter side to `size` (`cut_by`, antialiased) and takes a square at random along the longer one,
    the same for all copies of a seed (as in DistDiff's released code); "center" takes the middle one;
    "squash" ignores the aspect ratio (`squashed_by`, antialiased).
    """
    height, width = image.shape[:2]
    if size is None or fit == "none" or (height == width == size):
        return image
    picture = Image.fromarray(image)
    if fit == "squash":
        return np.array(picture.resize((size, size), Image.Resampling[squashed_by.upper()]))
    short = min(height, width)
    tall, wide = size * height // short, size * width // short
    where = (0.5, 0.5) if fit == "center" else tuple(float(u) for u in rng.uniforms("crop", (2,)))
    top, left = (int(u * (side - size + 1)) for u, side in zip(where, (tall, wide), strict=True))
    # The square is cut from the unscaled image: equal pixels, and a long thin image needs no huge enlargement.
    x, y = width / wide, height / tall
    box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    return np.array(picture.resize((size, size), Image.Resampling[cut_by.upper()], box=box))


def to_uint8(image: np.ndarray) -> np.ndarray | None:
    """A sample as it is kept: uint8 as it is, floats in [0, 1] rounded; None where one is not finite."""
    if image.dtype == np.uint8:
        return image
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8) if np.isfinite(image).all() else None


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) to uint8 (height, width, 3), bilinear and antialiased, whatever that does to the aspect."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def encode(image: np.ndarray, codec: Literal["auto", "png", "jpeg"], quality: int) -> tuple[bytes, str, np.ndarray]:
    """(encoded bytes, extension, pixels a reader will decode) of a uint8 (H, W, 3) image.

    "auto" is png up to 64 pixels a side and jpeg without chroma subsampling above.
    """
    sink = io.BytesIO()
    if codec == "png" or (codec == "auto" and max(image.shape[:2]) <= LOSSLESS_SIDE):
        Image.fromarray(image).save(sink, "PNG", compress_level=3)
        return sink.getvalue(), "png", image
    Image.fromarray(image).save(sink, "JPEG", quality=quality, subsampling=0)
    with Image.open(sink) as decoded:
        return sink.getvalue(), "jpg", np.asarray(decoded)
