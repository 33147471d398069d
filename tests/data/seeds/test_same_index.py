"""Datasets that could be listed with version 0.1 keep their ids, labels, order and classes: runs depend on them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayexpand.data.seeds import DataConfig, build_index
from tests.corpus import encoded, photo, write_parquet, write_tar


def write(folder: Path) -> None:
    image = encoded(photo())
    for name in ("set/train/b/1.png", "set/train/b/0.jpg", "set/train/a/deep/0.png", "set/val/a/0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    (folder / "set/train/a/link.png").symlink_to("deep/0.png")
    (folder / "set/train/a/gone.png").symlink_to("nowhere.png")
    rows = "".join(f"{i}.png,{i},train\n" for i in range(11))
    (folder / "numbers.csv").write_text("path,label,split\na.png,10,train\nb.png, 1 ,train\nc.png,oops,train\n" + rows +
                                        "t.png,0,test\n")
    (folder / "words.csv").write_text("path,label\na.png,emu\nb.png,cat\nb.png,cat\n,cat\nc.png,\n")
    write_tar(folder / "tars/train-0.tar", [("b.png", image), ("b.cls", b"1"), ("a.seg.png", image), ("a.jpg", image),
                                            ("a.json", b'{"label": 0}'), ("c.txt", b"x"), ("b.png", image)])
    write_tar(folder / "tars/val-0.tar", [("a.png", image), ("a.cls", b"0")])
    write_parquet(folder / "rows/train-0.parquet", [image] * 5, pa.array([1, 0, 2, -1, None]), ["cat", "dog", "emu"])
    np.savez(folder / "a.npz", train_images=np.zeros((4, 9, 9), np.uint8), train_labels=np.array([[1], [0], [2], [-1]]))
    (folder / "map.txt").write_text("0 tench, Tinca\n1 kite\n2 emu\n")


@pytest.mark.parametrize(("source", "path", "fields", "digest"), [
    ("digits", None, {}, "62092fe0f28ea470"),
    ("digits", None, {"split": "test", "digits_background": "all"}, "04167849269db81b"),
    ("imagefolder", "set", {"split": "train"}, "a028df0bf8a54275"),
    ("manifest", "numbers.csv", {"split": "train"}, "f0f2f62341947b38"),
    ("manifest", "words.csv", {}, "d29c6557eee5587d"),
    ("webdataset", "tars", {"split": "train"}, "62695617b0cdfb12"), ("parquet", "rows", {}, "77991e183681b710"),
    ("npz", "a.npz", {"split": "train", "classes": "map.txt"}, "d4661ae8ac1928b5")])
def test_the_index_is_what_it_always_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, path: str | None,
                                         fields: dict[str, str], digest: str) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    index = build_index(DataConfig(source=source, path=path, **fields))  # type: ignore[arg-type]
    classes = index.classes
    content = (index.table.to_pydict(), index.table.schema.metadata, classes.key, classes.name, classes.count)
    assert hashlib.sha256(repr(content).encode()).hexdigest()[:16] == digest
