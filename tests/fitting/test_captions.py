"""Captions from columns, files and tiny random models of all three kinds, and `fit` around them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rayexpand.artifacts import store
from rayexpand.artifacts.columns import read_captions
from rayexpand.contract.errors import ConfigError, ModelError, SeedDataError, UsageError
from rayexpand.contract.schema import SeedIndex
from rayexpand.data import batches, seeds
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.fitting.captions import (
    CaptionBlock,
    Captioner,
    CaptionsFit,
    check_captioner,
    check_captions,
    listed_captions,
    make_captions,
)
from rayexpand.fitting.config import parse_fit
from rayexpand.fitting.fit import captions_here, fit
from tests.captioners import tiny_captioner
from tests.live import Live

torch.set_num_threads(1)


def quiet(*said: object) -> None:
    """Nothing is shown."""


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_captioner(tmp_path_factory.mktemp("captioner") / "opt", "blip-2-opt")


@pytest.fixture(scope="module", params=["blip", "blip-2-opt", "blip-2-t5"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_captioner(tmp_path_factory.mktemp("captioner") / request.param, request.param)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.Generator(np.random.Philox(key=5))
    return [rng.integers(0, 256, (16 + i, 20, 3), dtype=np.uint8) // (1 + i) + 30 * i for i in range(count)]


# --------------------------------------------------------------------------------------------------- columns and files


def parquet_data(folder: Path) -> DataConfig:
    """Two files, several row groups; the text of row 3 of a file is null."""
    for part in range(2):
        texts = [f"text {part}/{i}" if i != 3 else None for i in range(5)]
        table = pa.table({"image": [{"bytes": b"x", "path": None}] * 5, "label": [i % 2 for i in range(5)],
                          "text": texts, "size": list(range(5))})
        pq.write_table(table, folder / f"train-0{part}.parquet", row_group_size=2)
    return DataConfig(source="parquet", path=str(folder))


def manifest_data(folder: Path, kind: str, **fields: Any) -> DataConfig:
    names = ["file_name", "label", "text", "split", "key"]
    rows = [[f"{'ab'[i % 2]}/{i}.png", "ab"[i % 2], f" text\n{i}" if i != 3 else "", "train" if i < 5 else "test",
             f"k{i}"] for i in range(7)]
    path = folder / f"list.{kind}"
    if kind == "csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([names, *rows])
    else:
        pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), path)
    return DataConfig(source="manifest", path=str(path), split="train", **fields)


def of_column(data: DataConfig, column: str = "text") -> dict[str, str]:
    index = seeds.build_index(data)
    made = CaptionsFit(column=column)
    assert check_captions(made, data) == []
    return dict(zip(index.seed_ids, listed_captions(made, data, index) or [], strict=True))


def test_a_column_of_parquet_files_follows_the_rows(tmp_path: Path) -> None:
    found = of_column(data := parquet_data(tmp_path))
    assert found == {f"train-0{part}/{i}": f"text {part}/{i}" if i != 3 else "" for part in range(2) for i in range(5)}
    (tmp_path / "ids.txt").write_text("train-01/4\ntrain-00/2\n")
    assert of_column(data.model_copy(update={"ids": str(tmp_path / "ids.txt")})) == {
        "train-00/2": "text 0/2", "train-01/4": "text 1/4"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_of_a_manifest_follows_its_rows(tmp_path: Path, kind: str) -> None:
    paths = {f"{'ab'[i % 2]}/{i}.png": f"text {i}" if i != 3 else "" for i in range(5)}
    assert of_column(manifest_data(tmp_path, kind)) == paths
    assert of_column(manifest_data(tmp_path, kind, id_column="key")) == {f"k{i}": text
                                                                        for i, text in enumerate(paths.values())}
    assert of_column(manifest_data(tmp_path, kind), "file_name") == {path: path for path in paths}, "used twice"


def test_an_image_that_is_listed_again_has_its_own_caption(tmp_path: Path) -> None:
    data = manifest_data(tmp_path, "csv", repeats={"b/1.png": 2})
    listed = {"a/0.png": "text 0", "b/1.png": "text 1", "b/1.png~2": "text 1", "a/2.png": "text 2", "b/3.png": "",
              "a/4.png": "text 4"}
    assert of_column(data) == listed

    index, file = seeds.build_index(data), tmp_path / "captions.json"
    file.write_text(json.dumps({seed_id: text for seed_id, text in listed.items() if "~" not in seed_id}))
    found = listed_captions(CaptionsFit(file=str(file)), data, index)
    assert found == [listed[seed_id] for seed_id in index.seed_ids]


@pytest.mark.parametrize(("column", "message"), [
    ("txt", r"no column 'txt' in .*, which has 'image', 'label', 'text'"), ("size", "'size' is int64, and has to")])
def test_a_column_that_is_not_there_or_no_text_is_refused(tmp_path: Path, column: str, message: str) -> None:
    data = parquet_data(tmp_path)
    problems = check_captions(CaptionsFit(column=column), data)
    assert len(problems) == 1
    with pytest.raises(SeedDataError, match=message):
        listed_captions(CaptionsFit(column=column), data, seeds.build_index(data))
    assert check_captions(CaptionsFit(column="text"), DataConfig(source="digits")) == [
        "column: data.source 'digits' has no columns; use source parquet or manifest, or give texts in a file by seed "
        "id"]


@pytest.fixture
def folder_index(image_folder: Path) -> SeedIndex:
    return seeds.build_index(DataConfig(source="imagefolder", path=str(image_folder)))


def of_file(index: SeedIndex, file: Path, content: Any) -> list[str]:
    file.write_text(json.dumps(content))
    return listed_captions(CaptionsFit(file=str(file)), DataConfig(source="digits"), index) or []


def test_a_file_by_seed_or_by_class_and_file_name(folder_index: SeedIndex, tmp_path: Path) -> None:
    ids = folder_index.seed_ids
    assert of_file(folder_index, tmp_path / "a.json", {ids[2]: " two\nlines ", "gone": "x"}) == [
        "", "", "two lines", *[""] * 17]
    by_class = {"bee": {"4.png": "a bee"}, "cat": {"cat/0.png": "a cat"}, "wasp": {"0.png": "x"}}
    found = of_file(folder_index, tmp_path / "b.json", by_class)
    assert {ids[i]: text for i, text in enumerate(found) if text} == {"bee/4.png": "a bee", "cat/0.png": "a cat"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/dog.json").write_text(json.dumps({"1.png": "a dog"}))
    made = CaptionsFit(file=str(tmp_path / "folder"))
    found = listed_captions(made, DataConfig(source="digits"), folder_index) or []
    assert {ids[i]: text for i, text in enumerate(found) if text} == {"dog/1.png": "a dog"}


@pytest.mark.parametrize(("content", "error", "message"), [
    ({"0.png": "x"}, UsageError, "no caption for any of the 20 seeds. Its keys look like '0.png', the dataset's seed "
     "ids like 'ant/0.png' and its class keys like 'ant'"), (["x"], SeedDataError, "is no JSON object of texts"),
    ({"ant": {"0.png": 3}}, SeedDataError, "is no JSON object of texts"),
    ({}, UsageError, "no caption for any")])
def test_a_file_that_does_not_fit_is_refused(folder_index: SeedIndex, tmp_path: Path, content: Any,
                                             error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        of_file(folder_index, tmp_path / "a.json", content)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(SeedDataError, match="cannot be read as JSON"):
        listed_captions(CaptionsFit(file=str(tmp_path / "a.json")), DataConfig(source="digits"), folder_index)


@pytest.mark.parametrize(("fields", "message"), [
    ({}, "exactly one of column, file and model, got none"), ({"column": "a", "model": "b"}, "got column, model"),
    ({"file": "a", "beams": 2, "prompt": "x"}, "prompt, beams have no effect without model")])
def test_one_source_with_what_belongs_to_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_fit({"name": "x", "data": {"source": "digits"}, "fit": {"captions": fields}})


def test_missing_captions_are_counted_and_named(folder_index: SeedIndex, tmp_path: Path) -> None:
    blocks = [CaptionBlock(np.array([3, 4]), [" a\n bee ", ""], {"ant/0.png": "decode_error"}),
              CaptionBlock(np.array([1]), ["an ant"], {})]
    facts = make_captions(tmp_path, blocks, folder_index, quiet)
    found = read_captions(tmp_path)

    assert found["seed_id"].to_pylist() == folder_index.seed_ids
    assert found["caption"].to_pylist()[:5] == ["", "an ant", "", "a bee", ""]
    assert (facts["captions"], facts["blank"], facts["refused"]) == (2, 18, 1)
    assert facts["blank_examples"][:3] == ["ant/0.png", "ant/2.png", "ant/4.png"]
    with pytest.raises(UsageError, match="all 20 captions are empty, such as that of seed 'ant/0"):
        make_captions(tmp_path, [], folder_index, quiet)


# --------------------------------------------------------------------------------------------------------------- models


def test_a_caption_is_the_likeliest_text_of_its_image_alone(model: Path) -> None:
    """As transformers writes it for one image, in calls of any filling, whatever torch's random state."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    made = CaptionsFit(model=str(model), batch=4, max_new_tokens=5)
    captioner, images = Captioner(made, "cpu"), pictures(6)
    ready = [captioner.prepared(image) for image in images]
    torch.manual_seed(1)
    found = captioner(ready[:4]) + captioner(ready[4:])
    processor = AutoProcessor.from_pretrained(model, local_files_only=True)
    plain = AutoModelForImageTextToText.from_pretrained(model, local_files_only=True).eval()
    text = {} if model.name == "blip" else {"text": [""]}
    for image, caption in zip(images, found, strict=True):
        with torch.no_grad():
            ids = plain.generate(**processor(images=[image], return_tensors="pt", **text), max_new_tokens=5)
        assert caption == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert len(set(found)) > 1, "the image decides"
    assert captioner([ready[4]]) == [found[4]]
    assert captioner([]) == []


def test_the_prompt_and_beams_change_the_text_but_the_prompt_is_no_part_of_it(model: Path) -> None:
    """Nothing is drawn, even where the model's own settings ask for it."""
    captioner = Captioner(CaptionsFit(model=str(model), batch=6, max_new_tokens=5), "cpu")
    ready = [captioner.prepared(image) for image in pictures(6)]
    plain = captioner(ready)
    asked = Captioner(CaptionsFit(model=str(model), batch=6, max_new_tokens=5, beams=3, prompt="a photo of"), "cpu")
    first = asked(ready)
    for module in asked._model.modules():
        if hasattr(module, "generation_config"):
            module.generation_config.do_sample = True
            module.generation_config.temperature = 9.0

    assert asked(ready) == first != plain
    assert not any(text.startswith("a photo of") for text in first)


def test_folders_that_cannot_be_used(tmp_path: Path, opt: Path) -> None:
    assert "nothing is downloaded" in check_captioner(str(tmp_path / "gone"))[0]
    copy = Path(shutil.copytree(opt, tmp_path / "copy"))
    assert check_captioner(str(copy)) == []
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-8])
    assert "model.safetensors cannot be read: it is cut off" in check_captioner(str(copy))[0]
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    (copy / "processor_config.json").unlink()
    problems = check_captioner(str(copy))
    assert ["preprocessor_config.json is missing" in problems[0], "is a pickle" in problems[1]] == [True, True]
    other = Path(shutil.copytree(opt, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(ConfigError, match=r"fit\.captions\.model: .* kind 't5'; captions are written by"):
        fit(parse_fit({"name": "d", "out": str(tmp_path), "data": {"source": "digits"},
                       "fit": {"captions": {"model": str(other)}}}), quiet)
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").write_text("no")
    with pytest.raises(ModelError, match="cannot be read: it is cut off"):
        Captioner(CaptionsFit(model=str(other)), "cpu")


# ------------------------------------------------------------------------------------------------------------------ fit


def test_fit_makes_an_artifact_of_every_seed_once(tmp_path: Path, image_folder: Path, opt: Path) -> None:
    broken = Path(shutil.copytree(image_folder, tmp_path / "broken"))
    (broken / "bee/2.png").write_bytes(b"nothing")
    raw = {"name": "ants", "out": str(tmp_path / "out"), "device": "cpu",
           "data": {"source": "imagefolder", "path": str(broken)},
           "fit": {"kind": "captions", "model": str(opt), "batch": 3, "max_new_tokens": 4}}
    made = fit(parse_fit(raw), quiet)["captions"]
    written = (made / "captions.parquet").stat().st_mtime_ns
    moved = Path(shutil.copytree(opt, tmp_path / "moved"))

    assert fit(parse_fit({**raw, "fit": {**raw["fit"], "model": str(moved)}}), quiet)["captions"] == made  # type: ignore[dict-item]
    assert (made / "captions.parquet").stat().st_mtime_ns == written
    assert (tmp_path / "out/ants-captions").resolve() == made
    facts = store.read_facts(made)
    assert (facts["refused"], list(facts["refused_examples"]), facts["device"]) == (1, ["bee/2.png"], "cpu")
    found = dict(zip(*(read_captions(made)[name].to_pylist() for name in ("seed_id", "caption")), strict=True))
    captioner = Captioner(CaptionsFit(model=str(opt), batch=3, max_new_tokens=4), "cpu")
    for seed_id in ("ant/0.png", "bee/3.png", "dog/4.png"):
        image = captioner.prepared(np.array(Image.open(broken / seed_id)))
        assert found[seed_id] == " ".join(captioner([image])[0].split())
    assert (len(found), found["bee/2.png"]) == (20, "")


def test_images_of_a_call_are_prepared_one_after_the_other(image_folder: Path, opt: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    live = Live()
    monkeypatch.setattr(batches, "decode", live.decode)
    config = parse_fit({"name": "ants", "device": "cpu", "data": {"source": "imagefolder", "path": str(image_folder)},
                        "fit": {"kind": "captions", "model": str(opt), "batch": 8, "max_new_tokens": 2}})
    found = list(captions_here(config, "", build_index(config.data), {}))  # type: ignore[arg-type]

    assert sum(len(block.captions) for block in found) == 20
    assert 0 < live.peak <= 2 * 16 * 16 * 3


def test_captions_of_a_file_are_another_artifact_when_their_words_change(tmp_path: Path, image_folder: Path) -> None:
    raw = {"name": "ants", "out": str(tmp_path / "out"), "data": {"source": "imagefolder", "path": str(image_folder)},
           "fit": {"captions": {"file": str(tmp_path / "a.json")}}}
    made = []
    for text in ("an ant", "an ant", "a bee"):
        (tmp_path / "a.json").write_text(json.dumps({"ant": {"0.png": text}}))
        made.append(fit(parse_fit(raw), quiet)["captions"])
    assert made[0] == made[1] != made[2]
    assert store.read_facts(made[2])["blank"] == 19
