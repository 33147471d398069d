"""Pickles are data here: what builds anything but plain values is refused, and nothing in it runs."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.data.seeds.pickles import read_plain_pickle

CONTENT = {"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [2, 0, 1], "n": 3, "share": 0.5, "name": "ü",
           "wide": np.array([1, -2, 300], ">i4"), "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3))}


@pytest.mark.parametrize("protocol", range(5))
def test_plain_values_are_what_pickle_reads(protocol: int) -> None:
    found = read_plain_pickle(pickle.dumps(CONTENT, protocol))
    assert found.keys() == CONTENT.keys()
    for name, value in CONTENT.items():
        np.testing.assert_array_equal(found[name], value)


def test_strings_of_python_2() -> None:
    """As CIFAR's batches were written: protocol 2, byte strings, numpy by its old name."""
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02K\x02t"
             b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
             b"\x89U\x04\x00\x7f\x80\xfftb")
    content = b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x01K\x02eu."
    found = read_plain_pickle(content)
    assert found["labels"] == [1, 2]
    assert isinstance(found["data"], np.ndarray)
    assert found["data"].tolist() == [[0, 127], [128, 255]]
    official = pickle.loads(content, encoding="latin1")
    assert official["data"].tolist() == found["data"].tolist()


class _Runs:
    def __init__(self, what: Any, *arguments: Any) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.what, self.arguments


def attacks(mark: Path) -> dict[str, bytes]:
    command = f"touch {mark}"
    return {
        "a command": pickle.dumps({"data": _Runs(os.system, command)}),
        "a builtin": pickle.dumps({"data": _Runs(exec, f"open({str(mark)!r}, 'w')")}),
        "an import": pickle.dumps({"data": _Runs(__import__, "antigravity")}),
        "numpy's own reader": b"\x80\x04}\x8c\x04data\x8c\x05numpy\x8c\x04load\x93\x8c\x01x\x85Rs.",
        "an instance": f"(S'{command}'\nios\nsystem\n.".encode(),
        "an object": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "a class of ours": b"\x80\x02cnumpy\ndtype\n)\x81.",
        "an extension": b"\x80\x02\x82\x01.", "a persistent id": b"Px\n.",
        "a call of a text": b"\x80\x02U\x06systemU\x02ls\x85R.",
        "a state of a text": b"\x80\x02U\x01x}U\x01aK\x01sb.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93."}


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, name: str) -> None:
    content = attacks(tmp_path / "mark")[name]
    with pytest.raises(ValueError, match=r"no pickle of plain values .* nothing in it was run"):
        read_plain_pickle(content)
    assert not (tmp_path / "mark").exists()


def test_the_attacks_would_have_worked(tmp_path: Path) -> None:
    for name in ("a command", "a builtin", "an instance", "an object"):
        mark = tmp_path / name.replace(" ", "")
        pickle.loads(attacks(mark)[name])
        assert mark.exists(), name


@pytest.mark.parametrize("value", [{1, 2}, (1, 2), {"a": 1}, [[1]], np.array([{}], object), complex(1), None.__class__])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"plain values|flat lists"):
        read_plain_pickle(pickle.dumps({"data": value}, 2))


def test_damage_is_refused() -> None:
    whole = pickle.dumps(CONTENT, 2)
    for cut in range(0, len(whole) - 1, 7):
        with pytest.raises(ValueError, match="is no pickle"):
            read_plain_pickle(whole[:cut])


@pytest.mark.parametrize("content", [
    b"", b"\x80\x02K\x01.", b"\x80\x02]K\x01a.", b"\x80\x02}U\x01a" + b"r" + struct.pack("<I", 2**31 - 1) + b"s.",
    b"\x80\x05\x95" + struct.pack("<Q", 2**62) + b"K\x01."])
def test_what_is_no_dict_is_refused_and_asks_for_no_memory(content: bytes) -> None:
    with pytest.raises(ValueError, match="is no pickle"):
        read_plain_pickle(content)


def test_one_text_made_bytes_over_and_over_is_refused() -> None:
    text, times = "a" * 10_000, 100
    call = b"c_codecs\nencode\n(" + b"h\x00X\x06\x00\x00\x00latin1tR"
    content = (b"\x80\x02X" + struct.pack("<I", len(text)) + text.encode() + b"q\x000"
               + b"}(X\x01\x00\x00\x00a](" + call * times + b"eu.")
    with pytest.raises(ValueError, match="become more bytes than it has"):
        read_plain_pickle(content)


def test_a_value_that_is_called_is_named() -> None:
    with pytest.raises(ValueError, match="it calls 'a'"):
        read_plain_pickle(b"\x80\x02X\x01\x00\x00\x00a)R.")


def test_an_array_must_have_the_bytes_of_its_shape() -> None:
    whole = pickle.dumps({"data": np.zeros((3, 4), np.uint8)}, 2)
    assert whole.count(b"K\x03K\x04") == 1
    with pytest.raises(ValueError, match="bytes do not fill its shape"):
        read_plain_pickle(whole.replace(b"K\x03K\x04", b"K\x09K\x04"))
