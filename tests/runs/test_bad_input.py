"""Bad input through the whole engine: every seed ends as good images or as refused rows with the right reason."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayexpand.contract.errors import ConfigError, SeedDataError, UsageError
from rayexpand.reports.run import write_report
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig
from rayexpand.runs.store import Totals
from rayexpand.runs.verify import verify
from tests.conftest import MakeConfig, complete, hashes, refused
from tests.corpus import (
    encoded,
    photo,
    spoil,
    write_bad_manifest,
    write_bad_npz,
    write_bad_parquet,
    write_bad_tar,
    write_corpus,
)

COPIES = 2
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def expanded(config: RunConfig, meanwhile: Callable[[], None] = lambda: None) -> tuple[runs.Run, Totals]:
    """A complete run; `meanwhile` happens between its plan and its first shard."""
    run = runs.prepare(config)
    meanwhile()
    expander = runs.start(run)
    try:
        return run, runs.drive(run, runs.in_process(expander), lambda: runs.pending_jobs(run))
    finally:
        expander.close()


def assert_decided(run: runs.Run, totals: Totals, expected: dict[str, str]) -> None:
    """Each copy of each seed is there with its expected outcome, and every count agrees with the rows."""
    want = {f"{seed_id}/{copy}": reason for seed_id, reason in expected.items() for copy in range(COPIES)}
    assert refused(run) == {sample_id: reason for sample_id, reason in want.items() if reason}
    assert sorted(hashes(run)) == sorted(sample_id for sample_id, reason in want.items() if not reason)
    kept = sum(not reason for reason in want.values())
    assert (totals.planned, totals.kept, totals.rejected, totals.failed) == (len(want), kept, 0, len(want) - kept)
    counted: Counter[str] = Counter()
    for receipt in run.store.receipts():
        counted.update(receipt.reasons)
    assert counted == Counter(reason for reason in want.values() if reason)
    findings = verify(run, pixels=True)
    assert findings.problems == []
    assert findings.totals == totals


def column(run: runs.Run, name: str) -> dict[str, Any]:
    """A column of all committed files by sample id."""
    return {row["sample_id"]: row[name] for receipt in run.store.receipts()
            for row in run.store.data(receipt, ["sample_id", name]).to_pylist()}


# --- image folders


@pytest.fixture(scope="module")
def corpus_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[runs.Run, Totals, dict[str, tuple[str, str]]]:
    from rayexpand.runs.config import parse

    folder = tmp_path_factory.mktemp("corpus") / "dataset"
    expected = write_corpus(folder)
    config = parse({"name": "run", "out": str(folder.parent / "out"), "method": {"name": "classical", "ratio": COPIES},
                    "data": {"source": "imagefolder", "path": str(folder), "split": "train"},
                    "sampler": {"batch": 8, "shard_images": 16}, "limits": {"max_failed": 1.0}})
    run, totals = expanded(config, lambda: spoil(folder))
    return run, totals, expected


def test_the_corpus_ends_as_good_images_and_refused_rows(corpus_run: Any) -> None:
    run, totals, expected = corpus_run
    assert run.plan.n_shards > 5
    assert_decided(run, totals, {seed_id: reason for seed_id, (reason, _) in expected.items()})
    assert set(refused(run).values()) == {"decode_error", "too_small", "too_large", "unsupported_mode", "missing",
                                          "unreadable", "unsafe_path"}


def test_notes_say_how_odd_images_were_read(corpus_run: Any) -> None:
    run, _, expected = corpus_run
    notes = column(run, "note")
    assert notes == {f"{seed_id}/{copy}": note for seed_id, (reason, note) in expected.items() if not reason
                     for copy in range(COPIES)}
    assert {"cmyk", "gray16", "exif_rotated", "palette_alpha", "first_frame"} <= set(notes.values())


def test_refused_rows_say_why_and_carry_no_image(corpus_run: Any) -> None:
    run, _, _ = corpus_run
    for receipt in run.store.receipts():
        for row in run.store.refused(receipt).to_pylist():
            assert row["detail"], row["sample_id"]
            assert (row["status"], row["image"], row["sample_sha256"]) == ("failed", None, "")


def test_retry_of_repaired_seeds_makes_them_and_nothing_else(tmp_path: Path, make_config: MakeConfig) -> None:
    for name, content in {"a/good.png": encoded(photo(1)), "a/bad.png": b"", "b/good.png": encoded(photo(2))}.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    run, before = complete(make_config("classical", ratio=COPIES,
                                       data={"source": "imagefolder", "path": str(tmp_path / "set")}))
    old = hashes(run)
    (tmp_path / "set/a/bad.png").write_bytes(encoded(photo(3)))
    expander = runs.start(run)
    try:
        after = runs.drive(run, runs.in_process(expander), runs.retry_jobs(run), to_the_end=True)
    finally:
        expander.close()
    assert (before.kept, before.failed, after.kept, after.failed) == (4, 2, 6, 0)
    assert hashes(run).keys() - old.keys() == {"a/bad.png/0", "a/bad.png/1"}
    assert verify(run, pixels=True).problems == []


# --- odd names


ODD_NAMES = ("sp ace.d dots/ a b .v1.2 .png", "sp ace.d dots/new\nline.png", "sp ace.d dots/back\\slash.png",
             "sp ace.d dots/100%#?&.png", "ünïcødé 日本/ñ🐧.png", "ünïcødé 日本/n\u0303🐧.png")


def test_odd_names_survive_as_ids_and_file_names(corpus_run: Any) -> None:
    run, _, _ = corpus_run
    paths, seed_ids = column(run, "image"), column(run, "seed_id")
    for name in ODD_NAMES:
        assert seed_ids[f"{name}/1"] == name
        assert paths[f"{name}/1"]["path"] == f"{name}/1.png"


def test_samples_with_odd_names_are_made_again_alone(corpus_run: Any) -> None:
    run, _, _ = corpus_run
    reopened, committed = runs.open_run(str(run.folder)), hashes(run)
    expander = runs.start(reopened)
    try:
        for name in ODD_NAMES:
            sample = expander.regenerate(f"{name}/1")
            assert sample.sample_sha256 == committed[f"{name}/1"] == runs.committed_hash(reopened, f"{name}/1")
        bad = expander.regenerate("bad/truncated.jpg/0")
        assert (bad.reason, bad.image) == ("decode_error", None)
    finally:
        expander.close()


def test_the_report_shows_odd_names(corpus_run: Any) -> None:
    run, totals, _ = corpus_run
    page = Path(write_report(str(run.folder))).read_text()
    assert "ünïcødé 日本" in page
    assert "sp ace.d dots" in page
    for reason in set(refused(run).values()):
        assert reason in page
    assert str(totals.failed) in page


# --- other layouts


def data_of(kind: str, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """A bad data set: its `data` section, and the expected reason by seed id."""
    if kind == "parquet":
        expected = write_bad_parquet(folder)
        return {"source": "parquet", "path": str(folder / "rows"), "split": "train", "id_column": "key"}, expected
    classes = str(folder / "set.json")
    if kind == "webdataset":
        return {"source": kind, "path": str(folder / "set"), "classes": classes}, write_bad_tar(folder / "set")
    if kind == "manifest":
        expected = write_bad_manifest(folder / "set")
        return {"source": kind, "path": str(folder / "set/list.csv"), "classes": classes}, expected
    expected = write_bad_npz(folder / "set.npz")
    return {"source": kind, "path": str(folder / "set.npz"), "split": "train", "classes": classes}, expected


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "manifest", "npz"])
def test_every_layout_ends_as_good_images_and_refused_rows(tmp_path: Path, make_config: MakeConfig, kind: str) -> None:
    data, expected = data_of(kind, tmp_path)
    assert "" in expected.values()
    run, totals = complete(make_config("classical", ratio=COPIES, data=data))
    assert_decided(run, totals, expected)
    reopened = runs.open_run(str(run.folder))
    expander = runs.start(reopened)
    try:
        for sample_id, sha256 in list(hashes(run).items())[::5]:
            assert expander.regenerate(sample_id).sample_sha256 == sha256
    finally:
        expander.close()


def test_labels_of_samples_are_those_of_their_seeds(tmp_path: Path, make_config: MakeConfig) -> None:
    data, _ = data_of("webdataset", tmp_path)
    labels = column(complete(make_config("classical", ratio=1, data=data))[0], "label")
    assert labels["train-000000/002/0"] == labels["train-000001/000/0"] == 2
    assert labels["train-000001/mask/0"] == 1


# --- the sampler


def test_nan_constant_and_raising_samples_are_refused_alone(make_config: MakeConfig) -> None:
    good, _ = complete(make_config("Fake", name="good"))
    bad = {"nan": "ant/1.png/0", "constant": "bee/2.png/1", "bad": "cat/4.png/0"}
    run, totals = complete(make_config("Failing", name="bad", **bad))
    assert refused(run) == {bad["nan"]: "nan_latent", bad["constant"]: "constant_image", bad["bad"]: "sampler_error"}
    assert (totals.planned, totals.kept, totals.rejected, totals.failed) == (40, 37, 0, 3)
    assert set(hashes(good)) - set(hashes(run)) == set(bad.values())
    assert verify(run, pixels=True).problems == []


# --- the dataset as a whole


def whole_faults(folder: Path) -> dict[str, tuple[dict[str, str], str]]:
    """`data` sections that cannot work, with what the message must say; those of the second kind show in the listing
    only."""
    write_bad_parquet(folder)
    (folder / "void").mkdir()
    (folder / "list.csv").write_text("file,class\n")
    (folder / "text.npz").write_text("no")
    (folder / "a.tar").write_bytes(b"no tar" * 100)
    return {
        "missing": ({"source": "imagefolder", "path": "none"}, r"none' does not exist"),
        "void": ({"source": "imagefolder", "path": "void"}, "no class folder"),
        "label": ({"source": "parquet", "path": "no_label"}, "did you mean 'labels'"),
        "columns": ({"source": "manifest", "path": "list.csv"}, "no column 'image'"),
        "npz": ({"source": "npz", "path": "text.npz", "split": "train"}, "cannot be read as .npz"),
        "tar": ({"source": "webdataset", "path": "a.tar"}, "is no tar"),
        "classes": ({"source": "imagefolder", "path": "rows", "classes": "none"}, "data.classes")}


@pytest.mark.parametrize("kind", ["missing", "void", "label", "columns", "npz", "tar", "classes"])
def test_dataset_that_cannot_work_ends_with_code_2_and_nothing_created(
        tmp_path: Path, make_config: MakeConfig, kind: str) -> None:
    fields, message = whole_faults(tmp_path)[kind]
    data = {key: str(tmp_path / value) if key in ("path", "classes") else value for key, value in fields.items()}
    with pytest.raises(UsageError, match=message) as caught:
        runs.prepare(make_config("classical", data=data))
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ConfigError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("files", "message"), [
    (None, "has no adapter.json; give the folder of an adapter"),
    ({"adapter.json": b"{"}, "adapter.json cannot be read as JSON"),
    ({"adapter.json": b"[]"}, "adapter.json does not describe an adapter of this version: "),
    ({"learned_embeds.bin": b"\x80\x04."}, "learned_embeds.bin is a pickle, which can run code when opened")])
def test_adapter_that_cannot_work_ends_with_code_2_and_nothing_created(
        tmp_path: Path, make_config: MakeConfig, files: dict[str, bytes] | None, message: str) -> None:
    folder = tmp_path / "adapter"
    for name, content in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        runs.prepare(make_config("diffmix", prompt="a {token}", sections={"artifacts": {"adapter": str(folder)}}))
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["empty class", "cut tar"])
def test_fault_that_only_the_listing_shows_creates_no_run(tmp_path: Path, make_config: MakeConfig, kind: str) -> None:
    if kind == "empty class":
        for name in ("cat", "dog"):
            (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set/cat/0.png").write_bytes(encoded(photo()))
        data = {"source": "imagefolder", "path": str(tmp_path / "set")}
    else:
        write_bad_tar(tmp_path / "set")
        torn = tmp_path / "set/train-000001.tar"
        torn.write_bytes(torn.read_bytes()[:3000])
        data = {"source": "webdataset", "path": str(tmp_path / "set")}
    with pytest.raises(SeedDataError, match=r"'dog'|train-000001\.tar' ends after"):
        runs.prepare(make_config("classical", data=data))
    assert not [*(tmp_path / "out").rglob("*.json"), *(tmp_path / "out").rglob("*.parquet")]


def test_dataset_folder_without_permission(tmp_path: Path, make_config: MakeConfig,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set/a").mkdir(parents=True)
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).startswith(str(tmp_path / "set")):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ConfigError, match=r"set' cannot be read .*correct the path or its permissions") as caught:
        runs.prepare(make_config("classical", data={"source": "imagefolder", "path": str(tmp_path / "set")}))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
