"""Marks of synthetic origin: an XMP packet in an encoded image that says by what kind of source it was made.

The property is `DigitalSourceType` of the IPTC Photo Metadata Standard with a value of its vocabulary,
http://cv.iptc.org/newscodes/digitalsourcetype/. The packet is put between the parts of the file, which stay as they
are, so an image decodes to the same pixels as before.

    trainedAlgorithmicMedia               from noise by a trained generator
    compositeWithTrainedAlgorithmicMedia  from a seed image by a trained generator
    algorithmicallyEnhanced               from a seed image without a generator
"""

from __future__ import annotations

import re
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import Start

VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
FROM_NOISE, FROM_IMAGE, ALTERED = ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia",
                                   "algorithmicallyEnhanced")
KINDS = (FROM_NOISE, FROM_IMAGE, ALTERED)
MOST_NAMED = 20  # images without a mark that are named

_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="{}{}"/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_ITXT, _APP1 = b"XML:com.adobe.xmp\0\0\0\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_SAID = re.compile(rb"DigitalSourceType[=>\s\"']+" + re.escape(VOCABULARY).encode() + rb"(\w+)")
_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xDA)})  # JPEG markers without a segment, and the end of the image


def kind_of(start: str, *, generated: bool) -> str:
    """The mark of a sample that starts from `start`; `generated`: by a trained generator."""
    if not generated:
        return ALTERED
    return FROM_NOISE if start == Start.NOISE else FROM_IMAGE


def marked(content: bytes, kind: str) -> bytes:
    """A PNG or JPEG with the mark; it decodes to the same pixels. Raises ValueError for another format."""
    packet = _PACKET.format(VOCABULARY, kind).encode()
    if content.startswith(_PNG):
        end = len(_PNG) + 12 + int.from_bytes(content[8:12], "big")  # of the header
        body = b"iTXt" + _ITXT + packet
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        return content[:end] + chunk + content[end:]
    if content.startswith(_JPEG):
        end = len(_JPEG)
        if content[2:4] == b"\xff\xe0":  # JFIF wants its segment first
            end += 2 + int.from_bytes(content[4:6], "big")
        return content[:end] + b"\xff\xe1" + struct.pack(">H", 2 + len(_APP1) + len(packet)) + _APP1 + packet + \
            content[end:]
    raise ValueError("marks are for PNG and JPEG")


def mark_of(content: bytes) -> str | None:
    """The value of the vocabulary that an image carries, None without one."""
    parts = _png_parts(content) if content.startswith(_PNG) else _jpeg_parts(content)
    for start in (_ITXT, _APP1):
        for part in parts:
            if part.startswith(start) and (found := _SAID.search(part)):
                return found[1].decode()
    return None


def _png_parts(content: bytes) -> list[bytes]:
    parts, at = [], len(_PNG)
    while at + 12 <= len(content):
        size = int.from_bytes(content[at:at + 4], "big")
        if content[at + 4:at + 8] == b"iTXt":
            parts.append(content[at + 8:at + 8 + size])
        at += 12 + size
    return parts


def _jpeg_parts(content: bytes) -> list[bytes]:
    parts, at = [], len(_JPEG)
    while content.startswith(_JPEG) and at + 4 <= len(content) and content[at] == 0xFF \
            and content[at + 1] not in _NO_LENGTH and content[at + 1] != 0xDA:
        size = int.from_bytes(content[at + 2:at + 4], "big")
        if content[at + 1] == 0xE1:
            parts.append(content[at + 4:at + 2 + size])
        at += 2 + size
    return parts


# ----------------------------------------------------------------------------------------------------------- an export


@dataclass
class MarksFound:
    """What the images of an export carry."""

    images: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        return {"images": self.images, "marks": dict(self.kinds), "problems": self.problems}

    def table(self) -> list[tuple[str, str]]:
        return [("images", f"{self.images:,}"), *((kind, f"{count:,}") for kind, count in self.kinds.most_common()),
                ("without a mark", f"{self.images - sum(self.kinds.values()):,}")]


def check_marks(folder: str) -> MarksFound:
    """Looks for the mark in every image of an export, whatever its layout. Raises UsageError for another folder."""
    found, missing = MarksFound(), list[str]()
    for name, content in _images(Path(folder)):
        found.images += 1
        if (kind := mark_of(content)) in KINDS:
            found.kinds[str(kind)] += 1
        else:
            missing.append(name)
    if missing:
        found.problems = [f"{name}: has no mark of synthetic origin" for name in missing[:MOST_NAMED]]
        if len(missing) > MOST_NAMED:
            found.problems.append(f"and {len(missing) - MOST_NAMED:,} more")
        found.problems.append("`rayexpand export` writes the mark into every image; export the run again")
    return found


def _images(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, encoded image) of an export."""
    if (folder / "run.json").exists():
        raise UsageError(f"{folder} is a run folder, whose images carry no mark; give the folder of an export, where "
                         "every image has one")
    tables, tars = sorted(folder.glob("data/train-*.parquet")), sorted(folder.glob("train/*.tar"))
    files = [] if tables or tars else sorted(one for one in folder.glob("train/*/*")
                                             if one.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not (tables or tars or files):
        raise UsageError(f"{folder} is no export: it has neither data/train-*.parquet, nor train/*.tar, nor images in "
                         "train/<class>/; give the folder that `rayexpand export` wrote")
    for path in (*tables, *tars):
        try:
            yield from _of_table(path) if path.suffix == ".parquet" else _of_tar(path)
        except (pa.ArrowException, OSError, tarfile.TarError) as error:
            raise UsageError(f"{path} is damaged, so its marks are not known ({error}); export the run "
                             "again") from error
    for path in files:
        yield str(path.relative_to(folder)), path.read_bytes()


def _of_table(path: Path) -> Iterator[tuple[str, bytes]]:
    for batch in pq.ParquetFile(path).iter_batches(250, columns=["image", "sample_id"]):
        for row in batch.to_pylist():
            yield f"{path.name}: {row['sample_id']}", row["image"]["bytes"]


def _of_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith((".png", ".jpg")) and (stream := tar.extractfile(member)):
                yield f"{path.name}: {member.name}", stream.read()
