"""Generators of seed datasets with every kind of bad image, each entry with the outcome it must have."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, features

WIDTH, HEIGHT = 24, 20
CLASSES = ("bad", "healthy", "odd", "sp ace.d dots", "ünïcødé 日本")


def photo(salt: int = 0) -> np.ndarray:
    """uint8 (HEIGHT, WIDTH, 3): a smooth picture that no rotation or flip leaves as it is."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([9 * x, 12 * y, 4 * (x + y) + salt % 60], axis=-1).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(side: int = 20_000) -> bytes:
    """A black 1-bit PNG of side x side pixels in a few kilobytes, made without its pixels."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(1)
    row = bytes(1 + (side + 7) // 8)
    body = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def rotated(kind: str, orientation: int = 6) -> bytes:
    """`photo` stored so that its EXIF orientation makes it upright again."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    options = {"quality": 95} if kind == "JPEG" else {}
    return encoded(Image.fromarray(photo()).transpose(turn), kind, exif=exif, **options)


def odd_images() -> dict[str, tuple[bytes, str]]:
    """Unusual but sound images by file name, with the note `decode` leaves."""
    picture = Image.fromarray(photo())
    gray = picture.convert("L")
    palette = picture.quantize(16)
    frames = [Image.fromarray(255 - photo(salt)) for salt in (20, 40)]
    clear = picture.copy()
    clear.putalpha(gray)
    deep = np.asarray(gray).astype(np.uint16) * 257
    return {
        "cmyk.jpg": (encoded(picture.convert("CMYK"), "JPEG"), "cmyk"),
        "gray16.png": (encoded(deep), "gray16"),
        "gray16.tif": (encoded(deep, "TIFF"), "gray16"),
        "int32.tif": (encoded(deep.astype(np.int32), "TIFF"), "int32"),
        "float.tiff": (encoded((deep / 65535).astype(np.float32), "TIFF"), "float"),
        "float255.tiff": (encoded((deep / 257).astype(np.float32), "TIFF"), "float"),
        "palette.png": (encoded(palette), "palette"),
        "palette_alpha.png": (encoded(palette, transparency=0), "palette_alpha"),
        "gray.jpg": (encoded(gray, "JPEG"), "grayscale"),
        "one_bit.png": (encoded(gray.convert("1")), "grayscale"),
        "rgba.png": (encoded(clear), "alpha"),
        "rgba.webp": (encoded(clear, "WEBP", lossless=True), "alpha"),
        "rgb_key.png": (encoded(picture, transparency=(0, 0, 0)), "alpha"),
        "la.png": (encoded(clear.convert("LA")), "grayscale,alpha"),
        "animated.gif": (encoded(palette, "GIF", save_all=True, append_images=frames), "first_frame,palette"),
        "animated.webp": (encoded(picture, "WEBP", save_all=True, append_images=frames, lossless=True), "first_frame"),
        "animated.png": (encoded(picture, "PNG", save_all=True, append_images=frames), "first_frame"),
        "pages.tif": (encoded(picture, "TIFF", save_all=True, append_images=frames), "first_frame"),
        "turned6.jpg": (rotated("JPEG", 6), "exif_rotated"),
        "turned3.jpg": (rotated("JPEG", 3), "exif_rotated"),
        "turned8.png": (rotated("PNG", 8), "exif_rotated"),
        "turned6.tif": (rotated("TIFF", 6), "exif_rotated"),
        "turned6.webp": (rotated("WEBP", 6), "exif_rotated"),
        **modern_images(),
        "ycbcr.tif": (encoded(picture.convert("YCbCr"), "TIFF"), "ycbcr"),
    }


def modern_images() -> dict[str, tuple[bytes, str]]:
    """Formats beside the common ones, as far as the installed Pillow has them."""
    picture = Image.fromarray(photo())
    found = {"photo.ppm": (encoded(picture, "PPM"), ""),
             "gray.pgm": (encoded(picture.convert("L"), "PPM"), "grayscale"),
             "photo.pnm": (encoded(picture, "PPM"), ""), "photo.jfif": (encoded(picture, "JPEG", quality=95), ""),
             "photo.jpe": (encoded(picture, "JPEG", quality=95), ""), "photo.tga": (encoded(picture, "TGA"), "")}
    if features.check("jpg_2000"):
        found["photo.jp2"] = (encoded(picture, "JPEG2000"), "")
    if features.check("avif"):
        found["photo.avif"] = (encoded(picture, "AVIF", quality=100), "")
    return found


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Broken images by file name, with the reason `decode` must give."""
    picture = Image.fromarray(photo())

    def two_thirds(content: bytes) -> bytes:
        return content[:len(content) * 2 // 3]

    wild = photo()[:, :, 0].astype(np.float32)
    return {
        "empty.jpg": (b"", "decode_error"),
        "truncated.jpg": (two_thirds(encoded(picture, "JPEG")), "decode_error"),
        "truncated.png": (two_thirds(encoded(picture)), "decode_error"),
        "truncated.webp": (two_thirds(encoded(picture, "WEBP", lossless=True)), "decode_error"),
        "truncated.gif": (two_thirds(encoded(picture.quantize(16), "GIF")), "decode_error"),
        "flipped_bits.png": (encoded(picture)[:60] + b"\xff" * 40 + encoded(picture)[100:], "decode_error"),
        "old.tga": (encoded(picture, "TGA")[:-26], "decode_error"),  # without the footer that says what it is
        "truncated.ppm": (two_thirds(encoded(picture, "PPM")), "decode_error"),
        "text.jpg": (b"not an image, only its name says so\n" * 4, "decode_error"),
        "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n", "decode_error"),
        "one.png": (encoded(photo()[:1, :1]), "too_small"),
        "strip.png": (encoded(photo()[:4]), "too_small"),
        "bomb.png": (bomb(), "too_large"),
        "below_pillows_limit.png": (bomb(10_000), "too_large"),
        "wild_float.tif": (encoded(wild * 1e6, "TIFF"), "unsupported_mode"),
        "nan.tif": (encoded(wild * np.nan, "TIFF"), "unsupported_mode"),
    }


def write_corpus(folder: Path) -> dict[str, tuple[str, str]]:
    """An ImageFolder of CLASSES below `folder`/train; seed id -> (reason or "" for a good image, note).

    Call `spoil` between indexing and reading: two seeds expect it.
    """
    root, outside = folder / "train", folder.parent / f"{folder.name}-outside"
    outside.mkdir(parents=True)
    (outside / "secret.png").write_bytes(encoded(photo()))
    expected: dict[str, tuple[str, str]] = {}

    def put(seed_id: str, content: bytes, reason: str = "", note: str = "") -> None:
        (root / seed_id).parent.mkdir(parents=True, exist_ok=True)
        (root / seed_id).write_bytes(content)
        expected[seed_id] = (reason, note)

    for i, (kind, extension) in enumerate([("PNG", "png"), ("JPEG", "JPG"), ("BMP", "bmp"), ("WEBP", "webp")] * 2):
        put(f"healthy/{i}.{extension}", encoded(photo(i), kind))
    put("healthy/nested/deeper/.../x.png", encoded(photo(8)))
    del expected["healthy/nested/deeper/.../x.png"]  # in a hidden folder
    put("healthy/nested/deeper/x.png", encoded(photo(9)))
    for name, (content, note) in odd_images().items():
        put(f"odd/{name}", content, "", note)
    for name, (content, reason) in bad_images().items():
        put(f"bad/{name}", content, reason)
    for i, name in enumerate(["sp ace.d dots/ a b .v1.2 .png", "sp ace.d dots/..two.png", "sp ace.d dots/new\nline.png",
                              "sp ace.d dots/back\\slash.png", "sp ace.d dots/100%#?&.png",
                              "ünïcødé 日本/ñ🐧.png", "ünïcødé 日本/n\u0303🐧.png"]):
        put(name, encoded(photo(i)))
    del expected["sp ace.d dots/..two.png"]  # a leading dot hides a file
    put("bad/vanishes.png", encoded(photo()), "missing")
    put("bad/becomes_folder.png", encoded(photo()), "unreadable")
    links: list[tuple[str, str | Path, str]] = [("dangling.png", "nowhere.png", "missing"),
                                                ("self.png", "self.png", "missing"),
                                                ("escape.png", outside / "secret.png", ""),
                                                ("loop", folder.parent, "unsafe_path")]
    for name, target, reason in links:
        (root / "bad" / name).symlink_to(target)
        expected[f"bad/{name}"] = (reason, "")
    (root / "bad/escape_folder").symlink_to(outside)
    expected["bad/escape_folder/secret.png"] = ("", "")
    (root / "healthy/nested/up").symlink_to(root / "healthy")  # contains itself: entered once
    (root / "healthy/link.png").symlink_to("0.png")
    expected["healthy/link.png"] = ("", "")
    os.mkfifo(root / "bad/pipe.png")
    expected["bad/pipe.png"] = ("unreadable", "")
    for ignored in ("README.md", ".hidden/0.png", "healthy/.thumb.png", "healthy/notes.txt", "stray.png"):
        (root / ignored).parent.mkdir(exist_ok=True)
        (root / ignored).write_bytes(b"ignored")
    return expected


def spoil(folder: Path) -> None:
    """What happens to the corpus after it was indexed."""
    (folder / "train/bad/vanishes.png").unlink()
    (folder / "train/bad/becomes_folder.png").unlink()
    (folder / "train/bad/becomes_folder.png").mkdir()


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(file: Path, images: Sequence[object], labels: pa.Array, names: list[str] | None = None,
                  row_group_size: int = 3, **columns: list[object]) -> None:
    """A parquet file in Hugging Face layout; a bytes entry of `images` is embedded, a str is a path, None a null."""
    cells = [{"bytes": image, "path": None} if isinstance(image, bytes) else
             {"bytes": None, "path": image} if isinstance(image, str) else None for image in images]
    table = pa.table({"image": pa.array(cells, IMAGE), "label": labels, **columns})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=row_group_size)


def write_bad_parquet(folder: Path) -> dict[str, str]:
    """`folder`/rows: a dataset (id column "key", classes cat, dog) whose every row has an expected reason, by seed id;
    `folder`/no_label: the same kind of data without a label column."""
    good = [encoded(photo(i)) for i in range(6)]
    rows: list[tuple[str | None, object, int | None, str, str]] = [  # key, image, label, seed id, reason
        ("a", good[0], 0, "a", ""),
        ("b", good[1], 1, "b", ""),
        ("a", good[2], 0, "a#3", "duplicate_id"),
        ("a#2", good[3], 1, "a#2", ""),
        ("a", good[4], 0, "a#4", "duplicate_id"),
        ("high", good[0], 2, "high", "bad_label"),
        ("negative", good[0], -1, "negative", "bad_label"),
        ("null", good[0], None, "null", "bad_label"),
        ("no image", None, 0, "no image", "missing"),
        ("parent", "../outside.png", 0, "parent", "unsafe_path"),
        ("inner parent", "pictures/../../outside.png", 0, "inner parent", "unsafe_path"),
        ("absolute", str(folder / "outside.png"), 0, "absolute", "unsafe_path"),
        ("url", "http://localhost/x.png", 0, "url", "unsafe_path"),
        ("link", "pictures/link.png", 0, "link", "unsafe_path"),
        ("below", "pictures/ok: 1.png", 1, "below", ""),
        ("gone", "pictures/gone.png", 1, "gone", "missing"),
        ("empty", b"", 1, "empty", "decode_error"),
        (None, good[5], 1, "train-00000-of-00001/17", ""),
    ]
    keys, images, labels, ids, reasons = map(list, zip(*rows, strict=True))
    write_parquet(folder / "rows/data/train-00000-of-00001.parquet", images, pa.array(labels, pa.int64()),
                  ["cat", "dog"], key=keys)
    (folder / "rows/pictures").mkdir()
    (folder / "rows/pictures/ok: 1.png").write_bytes(good[0])
    (folder / "outside.png").write_bytes(good[0])
    (folder / "rows/pictures/link.png").symlink_to(folder / "outside.png")
    (folder / "no_label").mkdir()
    pq.write_table(pa.table({"image": pa.array([{"bytes": good[0], "path": None}], IMAGE), "labels": [0]}),
                   folder / "no_label/train-00000-of-00001.parquet")
    return dict(zip(ids, reasons, strict=True))


NAMES = {"0": "cat", "1": "dog", "2": "emu"}  # classes of the data sets below, as a mapping file


def write_tar(file: Path, members: Sequence[tuple[str, bytes | str]], kind: int = tarfile.GNU_FORMAT) -> None:
    """A tar of (name, content) members; a str as content makes a symbolic link to it, a name with / at its end a
    folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=kind) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
            elif name.endswith("/"):
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)


def write_bad_tar(folder: Path) -> dict[str, str]:
    """Two tar shards in `folder` and the mapping `folder`.json; expected reason by seed id."""
    good = [encoded(photo(i)) for i in range(6)]
    long, odd = "long/" * 30 + "name", "ünïcødé 日本/ñ🐧"
    first: list[tuple[str, bytes | str]] = [
        ("README.md", b"ignored"), ("folder/", b""), (".hidden.png", good[0]), ("no_suffix", b"ignored"),
        ("000.png", good[0]), ("000.cls", b"0"),
        ("./001.JPG", encoded(photo(1), "JPEG")), ("./001.json", b'{"label": 1, "caption": "a dog"}'),
        ("002.txt", b"a caption"), ("002.cls", b" 2\n"), ("002.webp", encoded(photo(2), "WEBP")),
        ("no label.png", good[3]), ("no image.cls", b"0"),
        ("no image.txt", b"a caption"), ("caption only.txt", b"ignored"),
        ("../evil.png", good[0]), ("../evil.cls", b"0"),
        ("/etc/evil.png", good[0]), ("/etc/evil.cls", b"0"),
        ("inner/../../evil.png", good[0]), ("inner/../../evil.cls", b"0"),
        ("C:\\evil.png", good[0]), ("C:\\evil.cls", b"0"),
        ("000.png", good[4]), ("000.cls", b"1"),
        ("split.png", good[5]), ("between.png", good[1]), ("between.cls", b"1"), ("split.cls", b"1"),
        ("again.png", good[0]), ("again.png", good[1]), ("again.cls", b"0"),
        ("high.png", good[0]), ("high.cls", b"3"), ("minus.png", good[0]), ("minus.cls", b"-1"),
        ("word.png", good[0]), ("word.cls", b"cat"), ("none.png", good[0]), ("none.cls", b""),
        ("true.png", good[0]), ("true.json", b'{"label": true}'), ("list.png", good[0]), ("list.json", b"[1]"),
        ("torn.png", good[0]), ("torn.json", b'{"label": 1'), ("binary.png", good[0]), ("binary.cls", b"\xff\xfe"),
        ("empty.png", b""), ("empty.cls", b"0"), ("half.png", good[0][:len(good[0]) * 2 // 3]), ("half.cls", b"0"),
        ("link.png", "/etc/passwd"), ("link.cls", b"0")]
    second: list[tuple[str, bytes | str]] = [
        ("000.png", good[2]), ("000.cls", b"2"),
        ("mask.seg.png", good[1]), ("mask.jpg", encoded(photo(3), "JPEG")), ("mask.cls", b"1"),
        ("only.image.png", good[1]), ("only.cls", b"1"),
        (f"{odd}.png", good[4]), (f"{odd}.cls", b"0"), ("sp ace. dots.png", good[5]), ("sp ace.cls", b"1"),
        (f"{long}.png", good[3]), (f"{long}.cls", b"0")]
    write_tar(folder / "train-000000.tar", first, tarfile.PAX_FORMAT)
    write_tar(folder / "train-000001.tar", second, tarfile.GNU_FORMAT)
    folder.with_suffix(".json").write_text(json.dumps(NAMES))
    expected = {
        "000": "", "001": "", "002": "", "no label": "bad_label", "no image": "missing", "../evil": "unsafe_path",
        "/etc/evil": "unsafe_path", "inner/../../evil": "unsafe_path", "C:\\evil": "unsafe_path",
        "000#2": "duplicate_id", "split": "bad_label", "between": "", "split#2": "duplicate_id", "again": "bad_label",
        "again#2": "duplicate_id", "high": "bad_label", "minus": "bad_label", "word": "bad_label",
        "none": "bad_label", "true": "bad_label", "list": "bad_label", "torn": "bad_label", "binary": "bad_label",
        "empty": "decode_error", "half": "decode_error", "link": "unreadable"}
    return {f"train-000000/{key}": reason for key, reason in expected.items()} | {
        f"train-000001/{key}": "" for key in ("000", "mask", "only", odd, "sp ace", long)}


def write_bad_manifest(folder: Path) -> dict[str, str]:
    """`folder`/list.csv beside its images, and the mapping `folder`.json; expected reason by seed id."""
    good = [encoded(photo(i)) for i in range(4)]
    for name, content in {"a/0.png": good[0], "a/1, ü.png": good[1], "b c/2.v1.png": good[2], "b c/3.png": good[3],
                          "b c/empty.png": b"", "../outside.png": good[0]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "a/link.png").symlink_to(folder.parent / "outside.png")
    rows = [("a/0.png", "0", ""), ('"a/1, ü.png"', "1", ""), ("b c/2.v1.png", "2", ""),
            (f"{folder}/b c/3.png", " 1 ", ""), ("a/../a/0.png", "0", ""), ("a/0.png", "0", "duplicate_id"),
            ("b c/empty.png", "0", "decode_error"), ("gone.png", "1", "missing"), ("a", "1", "unreadable"),
            ("../outside.png", "0", "unsafe_path"), ("a/../../outside.png", "0", "unsafe_path"),
            (f"{folder.parent}/outside.png", "0", "unsafe_path"), ("https://localhost/x.png", "0", "unsafe_path"),
            ("a/link.png", "0", "unsafe_path"), ("x.png", "9", "bad_label"), ("y.png", "cat", "bad_label"),
            ("z.png", "", "bad_label"), ("", "0", "missing"), ("short.png", None, "bad_label")]
    lines = [path if label is None else f"{path},{label}" for path, label, _ in rows]
    (folder / "list.csv").write_text("\ufeff" + "\r\n".join(["path,label", *lines]) + "\r\n", encoding="utf-8")
    folder.with_suffix(".json").write_text(json.dumps(NAMES))
    ids = [path.strip('"') for path, _, _ in rows]
    ids[5], ids[17] = "a/0.png#2", "list/17"
    return dict(zip(ids, [reason for _, _, reason in rows], strict=True))


def write_bad_npz(file: Path) -> dict[str, str]:
    """`file` with the split train, 7 grey images of 3 classes with two bad labels; expected reason by seed id."""
    images = np.stack([photo(10 * i)[:, :, i % 3] for i in range(7)])
    labels = np.array([[0], [1], [2], [-1], [0], [7], [1]])
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, train_images=images, train_labels=labels, val_images=images[:3], val_labels=labels[:3])
    file.with_suffix(".json").write_text(json.dumps(NAMES))
    return {f"{file.stem}/train/{row}": "bad_label" if row in (3, 5) else "" for row in range(7)}
