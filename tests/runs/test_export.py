from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from rayexpand.contract.errors import StorageError, UsageError
from rayexpand.contract.schema import DRAW_FIELDS, ClassTable, Draw, sample_sha256
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.runs import export as exporting
from rayexpand.runs import run as runs
from rayexpand.runs.export import Layout, class_folders, export
from rayexpand.storage.tables import csv_cell, parquet_bytes
from tests.conftest import MakeConfig, complete, hashes
from tests.data.seeds.outcomes import outcomes

LAYOUTS = get_args(Layout)
KEYS = ("n02/../cat", "Bee", "10", "ant")  # not in sorted order, one unsafe as a folder
PER_CLASS, RATIO = 5, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run of four classes in several shards, where one seed failed at first and a retry made its samples."""
    root = tmp_path_factory.mktemp("export")
    rng = np.random.Generator(np.random.Philox(key=11))
    images = [_png(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(len(KEYS) * PER_CLASS)]
    _seeds(root / "seeds.parquet", [b"broken", *images[1:]])
    config = runs.parse({
        "name": "small", "out": str(root),
        "method": {"name": "tests.methods.fakes.Picky", "ratio": RATIO, "share": 0.0},
        "data": {"source": "parquet", "path": str(root / "seeds.parquet")},
        "sampler": {"batch": 8, "shard_images": 16}, "limits": {"max_failed": 1.0}})
    run, totals = complete(config)
    assert totals.failed == RATIO
    _seeds(root / "seeds.parquet", images)
    expander = runs.start(run)
    totals = runs.drive(run, runs.in_process(expander), runs.retry_jobs(run), to_the_end=True)
    expander.close()
    assert (totals.kept, totals.failed, totals.pending) == (len(images) * RATIO, 0, 0)
    return run


@pytest.fixture(scope="module")
def exports(run: runs.Run, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for layout in LAYOUTS:
        made = export(str(run.folder), str(root / layout), layout, shard_images=17)
        assert (made.count, made.pending) == (60, 0)
        assert made.files == (60 if layout == "imagefolder" else 4)
    return {layout: root / layout for layout in LAYOUTS}


def _png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def _seeds(path: Path, images: list[bytes]) -> None:
    labels = [i // PER_CLASS for i in range(len(images))]
    features = {"image": {"_type": "Image"}, "label": {"names": list(KEYS), "_type": "ClassLabel"}}
    table = pa.table({"image": [{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(images)], "label": labels})
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path.write_bytes(parquet_bytes(table, metadata))


def _hash(image: Any, facts: Mapping[str, Any]) -> str:
    """sample_sha256 from an image as a reader gives it and its provenance as the layout keeps it."""
    fields = {name: facts[name] if facts[name] is not None else "" for name in DRAW_FIELDS}
    return sample_sha256(np.asarray(image), Draw(**fields))


def _labels(run: runs.Run) -> dict[str, int]:
    return {row["sample_id"]: row["label"] for receipt in run.store.receipts()
            for row in run.store.data(receipt, ["sample_id", "label"]).to_pylist()}


def _lines(folder: Path) -> list[dict[str, Any]]:
    with (folder / "train" / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_data_file_that_cannot_be_read_is_named_and_not_the_new_folder(make_config: MakeConfig,
                                                                        tmp_path: Path) -> None:
    run, _ = complete(make_config("Fake"))
    file = Path(run.folder, "data/train-000001.parquet")
    file.unlink()
    file.mkdir()  # as a file that this user may not read, whoever he is
    with pytest.raises(StorageError, match=r"train-000001\.parquet: cannot be read"):
        export(str(run.folder), str(tmp_path / "new"), "imagefolder")
    assert not (tmp_path / "new").exists()


def test_webdataset_reads_it_back(run: runs.Run, exports: Mapping[str, Path]) -> None:
    import webdataset

    folder = exports["webdataset"]
    urls = sorted(str(path) for path in folder.glob("train/*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))

    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(60)]
    assert {s["json"]["sample_id"]: s["cls"] for s in samples} == _labels(run)
    assert {s["json"]["sample_id"]: _hash(s["png"], s["json"]) for s in samples} == hashes(run)
    assert all(s["json"]["class_key"] == KEYS[s["cls"]] and 0 <= s["json"]["scores"]["luck"] < 1 for s in samples)


def test_tar_members(exports: Mapping[str, Path]) -> None:
    index = json.loads((exports["webdataset"] / "index.json").read_text())
    names = []
    for shard in index["shardlist"]:
        path = exports["webdataset"] / shard["url"]
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
        assert (path.stat().st_size, len(members)) == (shard["filesize"], 3 * shard["nsamples"])
        names += [m.name for m in members]

    assert names == [f"{i:09d}.{extension}" for i in range(60) for extension in ("png", "cls", "json")]
    assert [shard["nsamples"] for shard in index["shardlist"]] == [17, 17, 17, 9]
    assert [one["key"] for one in index["classes"]] == list(KEYS)


def test_torchvision_reads_it_back(run: runs.Run, exports: Mapping[str, Path]) -> None:
    from torchvision.datasets import ImageFolder

    folder = exports["imagefolder"] / "train"
    facts = {str(folder / line["file_name"]): line for line in _lines(exports["imagefolder"])}
    found = {}
    dataset = ImageFolder(str(folder))
    for (path, label), (image, _) in zip(dataset.samples, dataset, strict=True):
        line = facts[path]
        assert label == int(line["label"])
        found[line["sample_id"]] = _hash(image, {**line, **{name: int(line[name]) for name in DRAW_FIELDS
                                                            if Draw.__annotations__[name] == "int"},
                                                 "strength": float(line["strength"])})

    assert found == hashes(run)


def test_metadata_has_its_columns_in_order(exports: Mapping[str, Path]) -> None:
    lines = _lines(exports["imagefolder"])

    assert list(lines[0])[:4] == ["file_name", "label", "class_key", "class_name"]
    assert {line["file_name"].split("/")[0]: line["class_key"] for line in lines} == dict(
        zip(["0-n02_.._cat", "1-Bee", "2-10", "3-ant"], KEYS, strict=True))
    assert {"sample_id", "seed_id", "prompt", "strength", "scores", "sample_sha256"} <= lines[0].keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_datasets_reads_it_back(run: runs.Run, exports: Mapping[str, Path], layout: str, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    rows = datasets.load_dataset(str(exports[layout]), split="train", cache_dir=str(tmp_path))
    if layout == "webdataset":
        facts = [{**row["json"], "image": row["png"], "label": row["cls"]} for row in rows]
    else:
        facts = list(rows)
    if layout == "huggingface":
        assert rows.features["label"].names == list(KEYS)

    assert {row["sample_id"]: _hash(row["image"], row) for row in facts} == hashes(run)
    assert {row["sample_id"]: row["label"] for row in facts} == _labels(run)


def test_huggingface_files(exports: Mapping[str, Path]) -> None:
    files = sorted(path.name for path in (exports["huggingface"] / "data").iterdir())
    matter = yaml.safe_load((exports["huggingface"] / "README.md").read_text().split("---\n")[1])

    assert files == [f"train-{i:05d}-of-00004.parquet" for i in range(4)]
    assert matter["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert matter["size_categories"] == ["n<1K"]
    assert pq.read_metadata(exports["huggingface"] / "data" / files[0]).num_rows == 17


@pytest.mark.cluster
def test_ray_data_reads_it_back(run: runs.Run, exports: Mapping[str, Path]) -> None:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    try:
        rows = ray.data.read_parquet(str(exports["huggingface"] / "data")).take_all()
        made = {row["sample_id"]: _hash(Image.open(io.BytesIO(row["image"]["bytes"])), row) for row in rows}
        samples = ray.data.read_webdataset(str(exports["webdataset"] / "train")).take_all()
        images = ray.data.read_images(str(exports["imagefolder"] / "train"), include_paths=True,
                                      file_extensions=["png"]).take_all()
    finally:
        ray.shutdown()
    folder, names = exports["imagefolder"] / "train", {}
    for line in _lines(exports["imagefolder"]):
        names[str(folder / line["file_name"])] = line

    assert made == hashes(run)
    assert {row["sample_id"]: row["label"] for row in rows} == _labels(run)
    assert {row["json"]["sample_id"]: _hash(row["png"], row["json"]) for row in samples} == hashes(run)
    assert {row["json"]["sample_id"]: int(row["cls"]) for row in samples} == _labels(run)
    pixels = {row["sample_id"]: np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).tobytes() for row in rows}
    assert {names[row["path"]]["sample_id"]: row["image"].tobytes() for row in images} == pixels


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_runs_make_equal_exports(run: runs.Run, exports: Mapping[str, Path], layout: Layout,
                                       tmp_path: Path) -> None:
    export(str(run.folder), str(tmp_path / "again"), layout, shard_images=17)

    assert _digest(tmp_path / "again") == _digest(exports[layout])


def _digest(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def test_a_selection_chooses_rows(run: runs.Run, tmp_path: Path) -> None:
    ids = sorted(hashes(run))
    kept = set(ids[::3])
    _select(run, "third", [{"sample_id": i, "keep": i in kept} for i in ids])
    _select(run, "half-known", [{"sample_id": i, "keep": True} for i in ids[:30]])
    _select(run, "twice", [{"sample_id": ids[0], "keep": True}] * 2)
    _select(run, "nothing", [{"sample_id": i, "keep": False} for i in ids])
    made = export(str(run.folder), str(tmp_path / "third"), "huggingface", selection="third")

    found = pq.read_table(tmp_path / "third" / "data")["sample_id"].to_pylist()
    assert (made.count, set(found)) == (20, kept)
    for name, says in {"half-known": "says nothing about sample", "twice": "decides a sample twice",
                       "nothing": "no sample to export in selection", "absent": "half-known, nothing, third",
                       "../run": "has no selection"}.items():
        with pytest.raises(UsageError, match=says):
            export(str(run.folder), str(tmp_path / "none"), "webdataset", selection=name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["third"]


def _select(run: runs.Run, name: str, rows: list[dict[str, Any]]) -> None:
    (Path(run.folder) / "selections").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), Path(run.folder) / "selections" / f"{name}.parquet")


def test_what_is_there_is_never_touched(run: runs.Run, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(UsageError, match="exists already"):
            export(str(run.folder), str(tmp_path / name), "imagefolder")
    export(str(run.folder), str(tmp_path / "empty"), "imagefolder")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert (tmp_path / "empty" / "train" / "metadata.csv").exists()


def test_nobody_sees_half_an_export(run: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "BATCH", 4)

    def full(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        assert not (tmp_path / "out").exists()
        if name == "000000020.cls":
            raise OSError(28, "No space left on device")

    stale = tmp_path / ".out.partial-elsewhere"  # no token of a live process
    stale.mkdir()
    with monkeypatch.context() as broken:
        broken.setattr(exporting, "_member", full)
        with pytest.raises(StorageError, match="No space left"):
            export(str(run.folder), str(tmp_path / "out"), "webdataset")

    assert list(tmp_path.iterdir()) == []
    assert export(str(run.folder), str(tmp_path / "out"), "webdataset").count == 60


def test_a_folder_filled_meanwhile_is_kept(run: runs.Run, tmp_path: Path) -> None:
    def intrude(task: str, done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs.txt").write_text("theirs")

    with pytest.raises(UsageError, match="filled by somebody else"):
        export(str(run.folder), str(tmp_path / "out"), "huggingface", on_rows=intrude)

    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["theirs.txt"]


def test_a_sample_there_twice_stops_the_export(run: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipts = list(run.store.receipts())
    monkeypatch.setattr(exporting, "open_samples", lambda folder: run)
    monkeypatch.setattr(type(run.store), "receipts", lambda store: iter([*receipts, receipts[0]]))
    with pytest.raises(UsageError, match="repeats samples"):
        export(str(run.folder), str(tmp_path / "out"), "huggingface")


def test_an_unfinished_run_says_what_is_pending(make_config: Callable[..., Any], tmp_path: Path) -> None:
    run = runs.prepare(make_config("Fake", ratio=2))
    with pytest.raises(UsageError, match="no sample to export"):
        export(str(run.folder), str(tmp_path / "x"), "webdataset")
    expander = runs.start(run)
    expander(1)
    expander.close()

    made = export(str(run.folder), str(tmp_path / "x"), "webdataset")
    assert (made.count, made.files, made.pending) == (8, 1, 32)


def test_wrong_arguments_are_named(run: runs.Run, tmp_path: Path) -> None:
    for out, layout, fields, says in [("x", "web-dataset", {}, "did you mean 'webdataset'"),
                                      ("x", "mds", {}, "choose one of webdataset, imagefolder, huggingface"),
                                      ("x", "webdataset", {"shard_images": 0}, "shard_images is 0"),
                                      ("s3://bucket/x", "webdataset", {}, "local folder")]:
        with pytest.raises(UsageError, match=says):
            export(str(run.folder), out if "://" in out else str(tmp_path / out), layout, **fields)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not a run folder"):
        export(str(tmp_path), str(tmp_path / "x"), "webdataset")


@pytest.mark.parametrize(("keys", "folders"), [
    (("ant", "bee"), ["ant", "bee"]),
    (("bee", "ant"), ["0-bee", "1-ant"]),
    (("Ant", "ant"), ["0-Ant", "1-ant"]),  # one folder where file names ignore case
    (("a/b", "a:b"), ["0-a_b", "1-a_b"]),
    (("..", ".git"), ["class", "git"]),
    (("-x", "=y"), ["0-x", "1-_y"]),  # nothing that a shell takes for an option, or a spreadsheet for a formula
    (("\u00c5", "\u212b"), ["0-\u00c5", "1-\u212b"]),  # one folder where file names are normalised
    (tuple(f"{i}" for i in range(11)), [f"{i:02d}-{i}" for i in range(11)])])
def test_class_folders_are_safe_unique_and_sorted(keys: tuple[str, ...], folders: list[str]) -> None:
    found = class_folders(ClassTable.of(keys))

    assert found == sorted(found) == folders


def test_names_longer_than_a_file_system_takes(tmp_path: Path) -> None:
    keys = ("\u9d89" * 156, "\u9d89" * 157, "a" * 300)
    folders = class_folders(ClassTable.of(keys))

    assert all(len(name.encode()) <= 143 for name in folders)
    assert len({name.casefold() for name in folders}) == 3
    for name in folders:
        (tmp_path / name).mkdir()


def _complete(tmp_path: Path, images: list[bytes], labels: list[int], names: list[str],
              method: Mapping[str, Any], **sections: Any) -> runs.Run:
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table({"image": [{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(images)], "label": labels})
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    (tmp_path / "seeds.parquet").write_bytes(parquet_bytes(table, metadata))
    data = {"source": "parquet", "path": str(tmp_path / "seeds.parquet"), **sections.pop("data", {})}
    run, totals = complete(runs.parse({"name": "run", "out": str(tmp_path), "method": dict(method), "data": data,
                                       **sections}))
    assert totals.kept == totals.planned
    return run


def _load(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    return datasets.load_dataset(str(folder), split="train", cache_dir=str(cache))


def _noise(count: int, side: int = 16) -> list[bytes]:
    rng = np.random.Generator(np.random.Philox(key=13))
    return [_png(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_and_large_images_in_one_run(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _complete(tmp_path, [*_noise(3, 100), *_noise(2, 32)], [0, 0, 1, 1, 1], ["ant", "bee"],
                    {"name": "classical", "policy": "randaugment", "ratio": 1}, image={"fit": "none"})
    assert {row["image"]["path"][-4:] for receipt in run.store.receipts()
            for row in run.store.data(receipt).to_pylist()} == {".png", ".jpg"}
    export(str(run.folder), str(tmp_path / "out"), layout)

    rows = list(_load(tmp_path / "out", tmp_path / "cache", monkeypatch))
    field = "png" if layout == "webdataset" else "image"
    facts = [{**row.get("json", row), "image": row[field]} for row in rows]
    assert {row["sample_id"]: _hash(row["image"], row) for row in facts} == hashes(run)
    assert ("here all are PNG" in (tmp_path / "out" / "README.md").read_text()) == (layout == "webdataset")


@pytest.mark.parametrize("layout", ["run", *LAYOUTS])
def test_two_classes_of_one_name(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "names.csv").write_text("key,name\nn02012849,crane\nn03126707,crane\nn03710637,maillot\n")
    run = _complete(tmp_path, _noise(6), [0, 0, 1, 1, 2, 2], ["n02012849", "n03126707", "n03710637"],
                    {"name": "tests.methods.fakes.Fake"}, data={"classes": str(tmp_path / "names.csv")})
    folder = Path(run.folder)
    if layout == "run":
        from rayexpand.reports.card import write_card
        write_card(folder)
    else:
        folder = tmp_path / "out"
        export(str(run.folder), str(folder), layout)  # type: ignore[arg-type]

    rows = _load(folder, tmp_path / "cache", monkeypatch)
    assert len(rows) == 12
    if layout in ("run", "huggingface"):
        assert rows.features["label"].names == ["crane (n02012849)", "crane (n03126707)", "maillot"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_labels_travel_with_their_samples(layout: Layout, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    run = _complete(tmp_path, _noise(6), [0, 0, 1, 1, 2, 2], ["ant", "bee", "cat"],
                    {"name": "tests.methods.fakes.Mixes"})
    export(str(run.folder), str(tmp_path / "out"), layout)

    rows = [row.get("json", row) for row in _load(tmp_path / "out", tmp_path / "cache", monkeypatch)]
    for row in rows:
        found = json.loads(row["soft_label"]) if layout == "imagefolder" else row["soft_label"]
        wanted = np.zeros(3)
        wanted[row["target_label"]] += 0.25 ** 0.5
        wanted[row["source_label"]] += 1 - 0.25 ** 0.5
        assert np.allclose(found, wanted)
    assert any(row["target_label"] != row["source_label"] for row in rows)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Labels are mixtures" in text
    assert "soft_label" in text


def test_plain_labels_have_no_further_column(exports: Mapping[str, Path]) -> None:
    assert "soft_label" not in _lines(exports["imagefolder"])[0]
    assert "soft_label" not in pq.read_table(exports["huggingface"] / "data").column_names


@pytest.mark.parametrize("prompt", ["=1+1", "+1", "-1", "@a", "\ta", "'a", "a=b"])
def test_cells_are_no_formulas(prompt: str, tmp_path: Path) -> None:
    run = _complete(tmp_path, _noise(2), [0, 1], [prompt, "bee"], {"name": "tests.methods.fakes.Fake"})
    export(str(run.folder), str(tmp_path / "out"), "imagefolder")

    lines = _lines(tmp_path / "out")
    texts = {line["prompt"] for line in lines}
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for line in lines for cell in line.values())
    assert {text[1:] if text.startswith("'") else text for text in texts} == {prompt, "bee"}
    assert {line["class_key"] for line in lines} == texts
    assert all((tmp_path / "out" / "train" / line["file_name"]).exists() for line in lines)


def test_nothing_of_this_machine_is_published(run: runs.Run, exports: Mapping[str, Path]) -> None:
    for folder in exports.values():
        text = (folder / "README.md").read_text()
        assert str(Path(run.folder).parent) not in text
        assert "path: <path>/seeds.parquet" in text


@pytest.mark.parametrize(("text", "shown"), [
    ("/home/a/birds/", "<path>/birds"), ("~/birds", "<path>/birds"), ("C:\\data\\birds", "<path>/birds"),
    ("file:///home/a/birds", "<path>/birds"), ("zip://train::/home/a/b.zip", "zip://train::<path>/b.zip"),
    ("https://me:secret@host/x?sig=1", "https://host/x"), ("s3://key:secret@bucket/x", "s3://bucket/x"),
    ("abfs://container@account/x", "abfs://container@account/x"),
    ("data/birds", "data/birds"), ("org/name@revision", "org/name@revision"), ("a photo of a {name}",) * 2])
def test_published_texts(text: str, shown: str) -> None:
    config = {"data": {"path": text, "more": [text]}, "cluster": {"address": "head:6379"}}
    wanted = {"data": {"path": shown, "more": [shown]}, "cluster": {"address": "<address>"}}

    assert exporting.published(config) == wanted


def test_jpeg_keeps_its_extension(image_folder: Path, make_config: Callable[..., Any], tmp_path: Path) -> None:
    run, _ = complete(make_config("Fake", ratio=1, sections={"codec": {"format": "jpeg"}}))
    export(str(run.folder), str(tmp_path / "tar"), "webdataset")
    with tarfile.open(tmp_path / "tar" / "train" / "000000.tar") as tar:
        assert tar.getnames()[0] == "000000000.jpg"


ODD_KEYS = ("007", "07", "7", "NA", "nan", "None", "True", "1e3", "1.50", "0x10", "-5", "=1+1", "'a", "a,b", 'say "hi"',
            "日本ü", "e\u0301", "\u00e9", "Cat", "cat", "CON", "a/b", "a:b", "..", "long" * 60, "two  spaces", " cat",
            "line\nbreak", "#", "inf", "12345678901234567890", "null", "1_000", "2020-01-01")


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """Classes whose names readers take for something else, small images beside large ones."""
    root = tmp_path_factory.mktemp("odd")
    images = [image for image, _ in zip(_noise(len(ODD_KEYS), 16), ODD_KEYS, strict=True)]
    images[::5] = _noise(len(images[::5]), 100)
    return _complete(root, images, list(range(len(images))), list(ODD_KEYS),
                     {"name": "classical", "policy": "randaugment", "ratio": 2}, image={"fit": "none"})


def _made(run: runs.Run) -> dict[str, tuple[str, int, str, str]]:
    """Sample id -> hash, label, class key and seed id, as the run has them."""
    return {row["sample_id"]: (row["sample_sha256"], row["label"], run.plan.index.classes.key[row["label"]],
                               row["seed_id"])
            for receipt in run.store.receipts() for row in run.store.data(receipt).to_pylist()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_classes_come_back_from_every_reader(odd_run: runs.Run, layout: Layout, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    export(str(odd_run.folder), str(folder), layout, shard_images=13)
    rows = [{**row.get("json", row), "label": row["cls"] if "json" in row else row["label"],
             "image": row["png"] if "png" in row else row["image"]}
            for row in _load(folder, tmp_path / "cache", monkeypatch)]
    wanted = _made(odd_run)

    def text(cell: Any) -> str:
        return str(cell).removeprefix("'") if layout == "imagefolder" else cell

    found = {text(row["sample_id"]): (_hash(row["image"], {**row, **{name: text(row[name]) for name in row if
                                                                    isinstance(row[name], str)}}),
                                      row["label"], text(row["class_key"]) if "class_key" in row else
                                      ODD_KEYS[row["label"]], text(row["seed_id"])) for row in rows}
    assert found == wanted
    assert len(rows) == 2 * len(ODD_KEYS)
    if layout == "imagefolder":
        from torchvision.datasets import ImageFolder

        keys = {str(folder / "train" / line["file_name"]): line for line in _lines(folder)}
        dataset = ImageFolder(str(folder / "train"))
        assert len(dataset.classes) == len(ODD_KEYS)
        assert {text(keys[path]["sample_id"]): label for path, label in dataset.samples} == {
            name: label for name, (_, label, *_) in wanted.items()}
    elif layout == "webdataset":
        import webdataset

        urls = sorted(str(path) for path in folder.glob("train/*.tar"))
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
        assert {s["json"]["sample_id"]: (_hash(s["png"], s["json"]), s["cls"], s["json"]["class_key"],
                                         s["json"]["seed_id"]) for s in samples} == wanted


@pytest.mark.parametrize("keys", [("007", "07", "7"), ("NA", "null", "nan"), ("true", "FALSE"), ("1.50", "2.0"),
                                  (" 7", "8"), ("1e3", "inf")])
def test_readers_of_csv_make_no_numbers_of_classes(keys: tuple[str, ...], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    run = _complete(tmp_path, _noise(len(keys)), list(range(len(keys))), list(keys),
                    {"name": "tests.methods.fakes.Fake"})
    export(str(run.folder), str(tmp_path / "out"), "imagefolder")
    rows = _load(tmp_path / "out", tmp_path / "cache", monkeypatch)
    assert {row["label"]: str(row["class_key"]).removeprefix("'") for row in rows} == dict(enumerate(keys))


@pytest.mark.parametrize(("text", "cell"), [
    ("7", "7"), ("20", "20"), ("cat", "cat"), ("", ""), ("007", "'007"), ("NA", "'NA"), ("<NA>", "'<NA>"),
    ("0x10", "0x10"), ("None", "'None"), ("none", "none"), ("2020-01-01", "2020-01-01"), ("12345678901234567890",
                                                                                       "'12345678901234567890")])
def test_texts_that_look_like_something_else(text: str, cell: str) -> None:
    assert csv_cell(text) == cell


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_is_a_dataset_to_start_from(odd_run: runs.Run, layout: Layout, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(str(odd_run.folder), str(folder), layout, shard_images=13)
    data = DataConfig(source={"webdataset": "webdataset", "imagefolder": "imagefolder",
                              "huggingface": "parquet"}[layout],  # type: ignore[arg-type]
                      path=str(folder / ("data" if layout == "huggingface" else "train")))
    index = build_index(data)
    assert len(index.classes) == len(ODD_KEYS)
    assert index.classes.count == (2,) * len(ODD_KEYS)
    contents = {digest: label for digest, label, *_ in _made(odd_run).values()}
    assert len(contents) == len(index) == 2 * len(ODD_KEYS)
    assert outcomes(index, data).keys() == set(index.seed_ids)
    assert {reason for reason, _ in outcomes(index, data).values()} == {""}
    if layout == "huggingface":
        assert index.classes.key == odd_run.plan.index.classes.display


@pytest.mark.parametrize("sizes", [[], [0], [5, 512, 513], [0] * 18, [0] * 19, [20_000] * 3])
def test_archives_are_those_of_tarfile(sizes: list[int]) -> None:
    ours, wanted = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=wanted, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, size in enumerate(sizes):
            header = tarfile.TarInfo(f"{number:09d}.json")
            header.size = size
            tar.addfile(header, io.BytesIO(bytes([number]) * size))
            exporting._member(ours, f"{number:09d}.json", bytes([number]) * size)
    exporting._end(ours)

    assert ours.getvalue() == wanted.getvalue()
