"""Headers of an uncompressed tar, by seeking over the content: ustar, GNU and pax long names, links, concatenation.

Python's tarfile stops in silence at a damaged header; here a tar is either read to its end or refused.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = 512  # bytes; headers and content start at multiples of it
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_LONGEST_NAME = 1 << 20  # bytes of one long-name or pax record


class DamagedTar(Exception):
    """Says what is wrong, to follow "the file ..."."""


@dataclass(frozen=True, slots=True)
class Member:
    name: str  # bytes that are not UTF-8 are written \\xff
    block: int  # number of the block its content starts at; its header is the block before
    size: int  # bytes
    is_file: bool  # neither link, folder nor device


def header_size(block: bytes) -> int | None:
    """Content size that a header block states, None where it is no header of a file."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return None
    return info.size if info.isreg() else None


def members(file: IO[bytes]) -> Iterator[Member]:
    """Everything in a tar, in order. The caller may move `file` between members. Raises DamagedTar."""
    position, ended = 0, False
    special: dict[str, str] = {}
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if not header.strip(b"\0"):
            ended = ended or len(header) == BLOCK
            if len(header) < BLOCK:
                break
            position += BLOCK
            continue
        info = _parse(header, position, ended)
        if info is None:
            return
        ended = False
        position += BLOCK
        has_content = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        if info.type in (*_LONG_NAMES, *_PAX, tarfile.XGLTYPE):
            has_content = True
            if info.type != tarfile.XGLTYPE:
                special |= _special(file, info, position)
        else:
            size = int(special.get("size", info.size))
            if info.type == tarfile.GNUTYPE_SPARSE:
                raise DamagedTar(f"has a sparse file, '{info.name}'; write it again without sparse files")
            yield Member(special.get("path", info.name), position // BLOCK, size, info.isreg())
            info.size, special = size, {}
        if has_content:
            position += -(-info.size // BLOCK) * BLOCK
    if not ended:
        raise DamagedTar(f"ends after {position} bytes without the end mark of a tar, so it was cut off")


def _parse(header: bytes, position: int, ended: bool) -> tarfile.TarInfo | None:
    """A header block; None for what lies behind the end mark and is no tar."""
    if position == 0 and header.startswith(_COMPRESSED):
        raise DamagedTar("is compressed, so that single images cannot be read from it; uncompress it")
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
        if info.size < 0:
            raise tarfile.HeaderError("negative size")
    except tarfile.HeaderError as error:
        if ended:
            return None
        what = f"is damaged at byte {position} ({error})" if position else "is no tar"
        raise DamagedTar(what) from error
    return info


def _special(file: IO[bytes], info: tarfile.TarInfo, position: int) -> dict[str, str]:
    """The path and size that a long-name or pax record gives to the member after it."""
    if info.size > _LONGEST_NAME:
        raise DamagedTar(f"is damaged at byte {position} (a name of {info.size} bytes)")
    content = file.read(info.size)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode(errors="backslashreplace")}
    found = {}
    while info.type in _PAX and content.strip(b"\0"):
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise DamagedTar(f"is damaged at byte {position} (a pax record)")
        key, _, value = content[len(length) + 1:int(length) - 1].partition(b"=")
        content = content[int(length):]
        if key == b"path" or (key == b"size" and value.isdigit()):
            found[key.decode()] = value.decode(errors="backslashreplace")
    return found
