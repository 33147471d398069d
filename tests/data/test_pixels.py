from __future__ import annotations

import os
import signal
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from rayexpand.cli import main as cli
from rayexpand.contract.errors import RowFault, Stopped
from rayexpand.contract.rng import RowRng
from rayexpand.data import pixels
from rayexpand.data.pixels import PILLOW_PIXELS, decode, encode, prepare
from tests.corpus import HEIGHT, WIDTH, bad_images, bomb, encoded, odd_images, photo
from tests.data.seeds.odd import deep_png, deep_tiff

# --- decode


@pytest.mark.parametrize("name", odd_images())
def test_odd_images_show_the_picture(name: str) -> None:
    content, note = odd_images()[name]
    pixels, got = decode(content)
    assert got == note
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    want = photo().astype(int)
    if "gray" in note or note in ("int32", "float"):
        want = np.asarray(Image.fromarray(photo()).convert("L")).astype(int)[:, :, None].repeat(3, 2)
    if name in ("rgba.png", "rgba.webp", "la.png"):  # its own brightness was its alpha
        alpha = np.asarray(Image.fromarray(photo()).convert("L"))[:, :, None] / 255
        want = want * alpha + 255 * (1 - alpha) if name != "la.png" else 255 - (255 - alpha * 255) * alpha
    if name not in ("one_bit.png", "palette_alpha.png"):
        assert np.abs(pixels - want).mean() < (15 if "palette" in note else 3)
    if name in ("gray16.png", "gray16.tif", "int32.tif", "float.tiff", "float255.tiff"):
        np.testing.assert_array_equal(pixels, want)


def deep(values: np.ndarray, kind: str, dtype: type) -> bytes:
    return encoded(Image.fromarray(values.astype(dtype)), kind)


@pytest.mark.parametrize(("kind", "dtype", "name"), [("PNG", np.uint16, "gray16"), ("TIFF", np.uint16, "gray16"),
                                                     ("TIFF", np.int32, "int32")])
def test_deep_grey_is_scaled_by_the_bits_that_are_in_use(kind: str, dtype: type, name: str) -> None:
    gray = np.asarray(Image.fromarray(photo()).convert("L")).astype(int)
    assert gray.max() > 200
    twelve, note = decode(deep(np.rint(gray * 4095 / 255), kind, dtype))
    assert note == f"{name}_12bit"
    np.testing.assert_array_equal(twelve[:, :, 0], gray)
    eight, note = decode(deep(gray, kind, dtype))
    assert note == (name if name == "int32" else "gray16_8bit")
    np.testing.assert_array_equal(eight[:, :, 0], gray)
    healthy, note = decode(deep(gray * 257, kind, dtype))
    assert note == name
    np.testing.assert_array_equal(healthy[:, :, 0], gray)
    dark, note = decode(deep(gray // 20 * 257, "PNG", np.uint16))  # 8 bits made deeper, with no bright pixel
    assert note == "gray16"
    np.testing.assert_array_equal(dark[:, :, 0], gray // 20)
    assert decode(deep(gray * 0, "PNG", np.uint16))[1] == "gray16"


@pytest.mark.parametrize(("kind", "name"), [("rgb.png", "rgb16"), ("rgba.png", "rgb16"), ("la.png", "gray16"),
                                            ("rgb.tif", "rgb16")])
def test_deep_colour_is_scaled_by_the_bits_that_are_in_use(kind: str, name: str) -> None:
    wanted = (np.repeat(photo()[:, :, :1], 3, axis=2) if kind == "la.png" else photo()).astype(int)
    alpha = [np.full((HEIGHT, WIDTH, 1), 65535)] if kind in ("rgba.png", "la.png") else []

    def read(colour: np.ndarray) -> tuple[np.ndarray, str]:
        colour = colour[:, :, :1] if kind == "la.png" else colour
        values = np.concatenate([np.rint(colour), *alpha], axis=2).astype(np.uint16)
        pixels, note = decode(deep_tiff(values) if kind == "rgb.tif" else deep_png(values))
        return pixels, note.removesuffix(",alpha") if alpha else note

    for factor, suffix in ((4095 / 255, "_12bit"), (1, "_8bit"), (257, "")):
        pixels, note = read(wanted * factor)
        assert note == f"{name}{suffix}"
        np.testing.assert_array_equal(pixels, wanted)
    dark, note = read(wanted // 20 * 257)  # 8 bits made deeper, with no bright pixel
    assert note == name
    np.testing.assert_array_equal(dark, wanted // 20)


def test_deep_colour_below_transparency_is_white_where_it_is_clear() -> None:
    values = np.zeros((16, 16, 4), np.uint16)
    values[:8] = (4095, 0, 0, 65535)
    pixels, note = decode(deep_png(values))
    assert (pixels[0, 0].tolist(), pixels[9, 0].tolist(), note) == ([255, 0, 0], [255, 255, 255], "rgb16_12bit,alpha")


def test_a_file_that_says_its_white_is_scaled_by_it() -> None:
    gray = np.asarray(Image.fromarray(photo()).convert("L")).astype(int)
    for white in (4095, 65535):
        values = np.rint(gray / 255 * white / 20).astype(">u2")  # dark: no value tells how many bits there are
        content = b"P5 %d %d %d\n" % (WIDTH, HEIGHT, white) + values.tobytes()
        pixels, note = decode(content)
        assert note == "gray16"
        assert np.abs(pixels[:, :, 0] - gray / 20).max() < 1


def test_transparent_pixels_are_white() -> None:
    clear = Image.new("RGBA", (16, 16), (200, 10, 10, 0))
    assert (decode(encoded(clear))[0] == 255).all()
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30] * 2)
    palette.putpixel((0, 0), 1)
    pixels, note = decode(encoded(palette, transparency=0))
    assert note == "palette_alpha"
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[1, 1].tolist() == [255, 255, 255]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", bad_images())
def test_bad_images_are_refused_with_their_reason(name: str) -> None:
    content, reason = bad_images()[name]
    with pytest.raises(RowFault) as caught:
        decode(content)
    assert caught.value.reason == reason
    assert "0x" not in caught.value.detail  # no addresses: details of equal runs are equal


def test_size_limits_are_those_given() -> None:
    content = encoded(photo())
    decode(content, min_side=HEIGHT, max_pixels=WIDTH * HEIGHT)
    for limits, reason in [({"min_side": HEIGHT + 1}, "too_small"), ({"max_pixels": WIDTH * HEIGHT - 1}, "too_large")]:
        with pytest.raises(RowFault, match=reason):
            decode(content, **limits)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_pillows_own_warning_as_an_error_is_too_large() -> None:
    with pytest.raises(RowFault, match="too_large"):
        decode(bomb(10_000), max_pixels=2 * PILLOW_PIXELS)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 20_000])
def test_a_bomb_is_refused_before_its_pixels_exist(side: int) -> None:
    content = bomb(side)
    peaks, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peaks.append(resident())

    before, watcher = resident(), threading.Thread(target=watch)
    watcher.start()
    tracemalloc.start()
    try:
        with pytest.raises(RowFault, match="too_large"):
            decode(content)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
        done.set()
        watcher.join()
    assert max([resident(), *peaks]) - before < 50e6


def test_long_thin_image_is_prepared_without_enlarging_it_whole() -> None:
    thin = np.zeros((8, 400_000, 3), np.uint8)  # whole at 512 it would have 39 GB
    assert prepare(thin, 512, "crop", RowRng(0, "m", "s", 0)).shape == (512, 512, 3)


def test_decode_is_the_same_from_many_threads() -> None:
    contents = [content for content, _ in odd_images().values()]
    alone = [decode(content) for content in contents]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(5):
            for i, content in enumerate(contents):
                pixels, note = decode(content)
                if note != alone[i][1] or not np.array_equal(pixels, alone[i][0]):
                    wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [
    b"MM\x00*\xff\xff\xff\xff",  # its directory lies nowhere
    b"MM\x00*\x00\x00\x00\x08\x00\x01" + b"\x01\x12\x00\x02\x00\x00\x00\x04top\x00" + bytes(4)])  # orientation "top"
def test_damaged_exif_does_not_cost_the_image(exif: bytes) -> None:
    assert decode(encoded(photo(), "JPEG", exif=b"Exif\x00\x00" + exif))[1] == ""


# --- prepare


def test_prepare_crop_equals_scaling_the_whole_image_and_cutting() -> None:
    image, size = np.random.Generator(np.random.Philox(key=5)).integers(0, 256, (40, 90, 3), np.uint8), 32
    rng = RowRng(7, "m", "seed", 3)
    got = prepare(image, size, "crop", rng)
    wide = 90 * size // 40
    whole = np.asarray(Image.fromarray(image).resize((wide, size), Image.Resampling.BILINEAR)).astype(int)
    left = int(float(rng.uniforms("crop", (2,))[1]) * (wide - size + 1))
    assert left > 0
    assert np.abs(got - whole[:, left:left + size]).max() <= 1
    middle = prepare(image, size, "center", rng)
    assert np.abs(middle - whole[:, 20:20 + size]).max() <= 1


def test_prepare_crop_belongs_to_the_seed_and_covers_the_image() -> None:
    ramp = np.zeros((16, 64, 3), np.uint8) + np.arange(64, dtype=np.uint8)[None, :, None]
    crops = {copy: prepare(ramp, 16, "crop", RowRng(0, "m", "s", copy)) for copy in range(3)}
    assert all(np.array_equal(crop, crops[0]) for crop in crops.values())
    lefts = {int(prepare(ramp, 16, "crop", RowRng(0, "m", f"s{i}", 0))[0, 0, 0]) for i in range(600)}
    assert lefts == set(range(49))
    tall = prepare(ramp.transpose(1, 0, 2), 16, "center", RowRng(0, "m", "s", 0))
    assert tall[0, 0, 0] == 24


def test_prepare_squash_none_and_size_none() -> None:
    image, rng = photo(), RowRng(0, "m", "s", 0)
    assert prepare(image, None, "crop", rng) is image
    assert prepare(image, 8, "none", rng) is image
    want = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(prepare(image, 16, "squash", rng), want)
    flat = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(prepare(image, 16, "squash", rng, "bilinear"), flat)
    assert not np.array_equal(flat, want)
    assert prepare(image[:10], 32, "crop", rng).shape == (32, 32, 3)


# --- encode


def test_codec_by_size() -> None:
    rng = np.random.Generator(np.random.Philox(key=1))
    small, large = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (64, 65))
    assert encode(small, "auto", 95)[1] == "png"
    content, extension, decoded = encode(large, "auto", 95)
    assert extension == "jpg"
    assert not (decoded == large).all()
    np.testing.assert_array_equal(decode(content)[0], decoded)
    np.testing.assert_array_equal(decode(encode(large, "png", 95)[0])[0], large)


@pytest.mark.parametrize("place", ["_upright", "_orientation", "_raw_mode"])
def test_a_stop_inside_a_decode_is_no_fault_of_the_image(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal comes at any place, also where every exception of Pillow is turned into a fault of the image."""
    def stopped(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    image = encoded(photo(), "PNG")
    monkeypatch.setattr(Image.Image if place == "_orientation" else pixels,
                        "getexif" if place == "_orientation" else place, stopped)
    before = signal.signal(signal.SIGTERM, cli._stopped)
    try:
        with pytest.raises(Stopped, match="SIGTERM received"):
            decode(image)
    finally:
        signal.signal(signal.SIGTERM, before)
