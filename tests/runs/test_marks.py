"""Marks of synthetic origin: what an image says of itself, without a changed pixel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import Draw, Start, sample_sha256
from rayexpand.data.pixels import decode, encode
from rayexpand.runs.export import Layout, export
from rayexpand.runs.marks import ALTERED, FROM_IMAGE, FROM_NOISE, KINDS, check_marks, kind_of, mark_of, marked
from tests.commands import rayexpand
from tests.conftest import MakeConfig, complete

PIXELS = np.random.Generator(np.random.Philox(key=5)).integers(0, 256, (24, 31, 3), dtype=np.uint8)


@pytest.mark.parametrize("codec", ["png", "jpeg", "jpeg without JFIF"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mark_changes_no_pixel(codec: str, kind: str) -> None:
    content = encode(PIXELS, "png" if codec == "png" else "jpeg", 90)[0]
    if codec.endswith("JFIF"):
        content = content[:2] + content[4 + int.from_bytes(content[4:6], "big"):]
    found = marked(content, kind)

    assert mark_of(content) is None
    assert mark_of(found) == kind
    np.testing.assert_array_equal(decode(found)[0], decode(content)[0])
    with Image.open(io.BytesIO(found)) as image:
        image.verify()
        xmp = image.info["xmp"] if "xmp" in image.info else image.info["XML:com.adobe.xmp"].encode()
    assert b'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/' + kind.encode() in xmp


def test_the_kind_follows_from_how_a_sample_was_made() -> None:
    assert kind_of(Start.NOISE, generated=True) == FROM_NOISE
    assert kind_of(Start.IMAGE, generated=True) == FROM_IMAGE
    assert kind_of(Start.IMAGE, generated=False) == ALTERED
    with pytest.raises(ValueError, match="PNG and JPEG"):
        marked(b"GIF89a", FROM_NOISE)
    assert mark_of(b"GIF89a") is None


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("codec", ["png", "jpeg"])
def test_every_image_of_an_export_is_marked(layout: Any, codec: str, make_config: MakeConfig, tmp_path: Path) -> None:
    run = complete(make_config("Fake", ratio=1, sections={"codec": {"format": codec}}))[0]
    export(str(run.folder), str(tmp_path / "export"), layout)
    found = check_marks(str(tmp_path / "export"))

    assert (found.images, dict(found.kinds), found.problems) == (20, {ALTERED: 20}, [])
    if layout == "huggingface":
        for row in pq.read_table(tmp_path / "export/data").to_pylist():
            draw = Draw(**{name: row[name] for name in Draw.__dataclass_fields__})
            assert sample_sha256(decode(row["image"]["bytes"])[0], draw) == row["sample_sha256"]


def test_verify_marks_names_what_has_none(make_config: MakeConfig, tmp_path: Path) -> None:
    run = complete(make_config("Fake", ratio=1))[0]
    export(str(run.folder), str(tmp_path / "export"), "imagefolder")
    bare = next((tmp_path / "export/train/ant").glob("*.png"))
    bare.write_bytes(encode(PIXELS, "png", 90)[0])
    found = check_marks(str(tmp_path / "export"))

    assert found.problems[0] == f"train/ant/{bare.name}: has no mark of synthetic origin"
    assert dict(found.table())["without a mark"] == "1"
    with pytest.raises(UsageError, match="is a run folder"):
        check_marks(str(run.folder))
    with pytest.raises(UsageError, match="is no export"):
        check_marks(str(tmp_path))
    answer = rayexpand("verify", tmp_path / "export", "--marks")
    assert answer.returncode == 1
    assert "has no mark of synthetic origin" in answer.stdout


@pytest.mark.parametrize("layout", ["webdataset", "huggingface"])
def test_a_damaged_export_is_said_to_be_damaged(layout: Any, make_config: MakeConfig, tmp_path: Path) -> None:
    run = complete(make_config("Fake", ratio=2))[0]
    export(str(run.folder), str(tmp_path / "export"), layout)
    file = next(one for one in (tmp_path / "export").rglob("*") if one.suffix in (".tar", ".parquet"))
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2 + 100])

    with pytest.raises(UsageError, match=f"{file.name} is damaged, so its marks are not known"):
        check_marks(str(tmp_path / "export"))
