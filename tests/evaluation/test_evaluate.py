"""The verb evaluate, in process: which images are compared, what the result says, and mistakes all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from rayexpand.contract.errors import ConfigError, RowFault, UsageError
from rayexpand.data.pixels import decode
from rayexpand.evaluation import sides
from rayexpand.evaluation.evaluate import EvaluateConfig, evaluate, in_process, parse
from rayexpand.evaluation.sides import Side, reference_of, samples_of
from rayexpand.runs.run import Run
from rayexpand.storage.tables import parquet_bytes, read_json
from tests.conftest import MakeConfig, complete
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_clip(tmp_path_factory.mktemp("tiny") / "clip"))


@pytest.fixture
def run(make_config: MakeConfig) -> Run:
    """40 samples of 20 seeds in five data files."""
    return complete(make_config("classical", ratio=2))[0]


def config_of(run: Run, folder: Path, guide: str, **changes: Any) -> EvaluateConfig:
    return parse({"run": str(run.folder), "reference": {"source": "imagefolder", "path": str(folder)}, "batch": 8,
                  "extractor": {"guide": guide, "device": "cpu"}, **changes})


def images_in(side: Side) -> list[bytes | RowFault]:
    return [image for chunk in side.chunks for image in side.read(chunk).images]


def select(run: Run, name: str, keep: dict[str, bool]) -> None:
    run.files.make_folder("selections")
    run.files.replace(f"selections/{name}.parquet", parquet_bytes(
        pa.table({"sample_id": list(keep), "keep": list(keep.values())}), {}))


def rows_of(run: Run) -> list[dict[str, Any]]:
    return [row for receipt in run.store.receipts()
            for row in run.store.data(receipt, ["image", "sample_id", "copy"]).to_pylist()]


def test_the_result_says_what_it_compared(run: Run, image_folder: Path, guide: str) -> None:
    shown: list[tuple[str, int, int]] = []
    result = evaluate(config_of(run, image_folder, guide, name="first"), in_process, lambda *said: shown.append(said))
    file = Path(str(run.folder), "scores/first.json")

    assert read_json(run.files, "scores/first.json") == {key: value for key, value in result.items() if key != "file"}
    assert result["file"] == str(file)
    assert (result["n_samples"], result["n_reference"], result["features"]) == (40, 20, 16)
    assert result["run_digest"] == run.facts["run_digest"]
    assert result["extractor"]["name"] == f"guide {guide}"
    assert len(result["extractor"]["sha256"]) == 64
    assert result["extractor"]["size"] == 16
    assert "fd_clip_infinity" not in result["scores"]
    assert "fd_infinity: 20 images are too few" in result["warnings"][1]
    assert {"fd_clip", "kd_clip", "precision_k3", "coverage_k5", "vendi"} <= result["scores"].keys()
    assert "40 samples against 20" in result["warnings"][0]
    assert result["seconds"].keys() == {"list", "features", "scores"}
    assert shown[-1] == ("features of reference", 20, 20)
    assert evaluate(config_of(run, image_folder, guide), in_process)["scores"] == result["scores"]


def test_a_run_against_its_own_samples_is_at_distance_zero(run: Run, guide: str) -> None:
    config = parse({"run": str(run.folder), "extractor": {"guide": guide, "device": "cpu"}, "reference": {
        "source": "parquet", "path": str(run.folder), "split": "train", "id_column": "sample_id"}})
    found = evaluate(config, in_process)

    assert (found["n_samples"], found["n_reference"], found["warnings"]) == (40, 40, [])
    assert found["scores"]["fd_clip"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["scores"]["mmd2_linear_biased_clip"]["value"] == 0
    assert [found["scores"][name]["value"] for name in ("precision_k3", "recall_k3", "coverage_k5")] == [1, 1, 1]


def test_which_samples_are_compared(run: Run, image_folder: Path, guide: str) -> None:
    rows = rows_of(run)
    select(run, "half", {row["sample_id"]: i % 2 == 0 for i, row in enumerate(rows)})

    def chosen(**changes: Any) -> list[bytes | RowFault]:
        config = config_of(run, image_folder, guide, **changes)
        return images_in(samples_of(run, config.choice, config.selection, config.copies))

    assert chosen() == [row["image"]["bytes"] for row in rows]
    assert chosen(copies=1) == [row["image"]["bytes"] for row in rows if row["copy"] < 1]
    assert chosen(selection="half") == [row["image"]["bytes"] for row in rows[::2]]
    second = [row["image"]["bytes"] for row in rows if row["copy"] == 1]
    some = [one for one in chosen(copies=1.5) if one not in chosen(copies=1)]
    assert 0 < len(some) < len(second)
    assert set(some) < set(second)
    assert chosen(selection="half", copies=1) == [
        row["image"]["bytes"] for i, row in enumerate(rows) if i % 2 == 0 and row["copy"] < 1]


def test_a_smaller_choice_lies_inside_a_larger_one(run: Run, image_folder: Path, guide: str) -> None:
    def chosen(side: Any, images: int, seed: int = 0) -> list[bytes | RowFault]:
        config = config_of(run, image_folder, guide, images=images, seed=seed)
        return images_in(samples_of(run, config.choice) if side is samples_of else
                         reference_of(config.reference, config.choice))

    for side in (samples_of, reference_of):
        few, more = chosen(side, 5), chosen(side, 12)
        assert (len(few), len(more)) == (5, 12)
        assert [image for image in more if image in few] == few, "the same images in the same order"
        assert chosen(side, 5, seed=1) != few
    result = evaluate(config_of(run, image_folder, guide, images=18, metrics=["fd"]), in_process)
    assert (result["n_samples"], result["n_reference"], result["warnings"]) == (18, 18, [])
    assert "only 20 reference images of the 30" in " ".join(
        evaluate(config_of(run, image_folder, guide, images=30), in_process)["warnings"])


def test_chunks_of_seeds_carry_only_the_names_they_need(run: Run, guide: str, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "CHUNK", 3)
    config = parse({"run": str(run.folder), "extractor": {"guide": guide}, "reference": {
        "source": "parquet", "path": str(run.folder), "split": "train", "id_column": "sample_id"}})
    side = reference_of(config.reference, config.choice)

    assert images_in(side) == [row["image"]["bytes"] for row in rows_of(run)]
    assert [chunk.num_rows for chunk in side.chunks] == [3] * 13 + [1]
    assert max(len(json.loads(chunk.schema.metadata[b"files"])) for chunk in side.chunks) <= 2


def test_images_that_cannot_be_read_are_counted(run: Run, guide: str, tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.Philox(key=1))
    for name in ("a", "b"):
        (tmp_path / "real" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"real/{name}/{i}.png")
    (tmp_path / "real/a/3.png").write_bytes(b"broken")
    result = evaluate(config_of(run, tmp_path / "real", guide, metrics=["kd"]), in_process)

    assert (result["n_reference"], result["refused"]) == (19, {"samples": 0, "reference": 1})
    assert "1 of 20 reference images cannot be decoded" in result["warnings"][0]
    assert decode(images_in(samples_of(run, sides.Choice()))[0])[0].shape == (16, 16, 3)


def test_too_few_images(run: Run, image_folder: Path, guide: str) -> None:
    select(run, "none", {row["sample_id"]: False for row in rows_of(run)})
    with pytest.raises(UsageError, match="0 samples to compare"):
        evaluate(config_of(run, image_folder, guide, selection="none"), in_process)


def test_an_unfinished_run_is_said_to_be_so(make_config: MakeConfig, image_folder: Path, guide: str) -> None:
    from rayexpand.runs import run as runs

    run = runs.prepare(make_config("classical", ratio=2))
    expander = runs.start(run)
    for shard in range(3):
        expander(shard)
    expander.close()
    result = evaluate(config_of(run, image_folder, guide, metrics=["kd"]), in_process)

    assert result["n_samples"] == 24
    assert "16 planned samples are not decided yet" in result["warnings"][0]


def test_all_mistakes_at_once(run: Run) -> None:
    with pytest.raises(ConfigError) as raised:
        parse({"run": str(run.folder), "selection": "gone", "copies": 0, "metric": ["fid"], "metrics": ["fad"],
               "reference": {"source": "imagefolder", "path": "/nowhere"},
               "extractor": {"timm": "rsnet", "checkpoint": "x.pth"}}, "job.yaml")
    problems = "\n".join(raised.value.problems)

    for words in ("copies: Input should be greater", "metric: unknown field, did you mean 'metrics'?", "metrics.0: ",
                  "selection: ", "has no selection 'gone'", "reference.path: '/nowhere' does not exist",
                  "extractor.timm: 'rsnet' is not a timm model", "extractor.checkpoint: x.pth is not a safetensors"):
        assert words in problems
    assert len(raised.value.problems) == 7


def test_a_folder_that_is_no_run() -> None:
    with pytest.raises(ConfigError) as raised:
        parse({"run": "/nowhere", "reference": {"source": "digits"}})
    assert "run: /nowhere is not a run folder" in str(raised.value)


def test_the_guide_of_the_run_is_the_default(make_config: MakeConfig, image_folder: Path, guide: str) -> None:
    plain, _ = complete(make_config("classical", ratio=1, data={"source": "digits", "per_class": 1}))
    own, _ = complete(make_config("classical", name="own", ratio=1, sections={"guide": {"weights": guide}}))

    assert parse({"run": str(plain.folder), "reference": {"source": "digits"}}).extractor.guide == "digits"
    assert parse({"run": str(own.folder), "reference": {"source": "digits"}}).extractor.guide == guide


def test_the_embedded_guide_sees_digits_only(run: Run, image_folder: Path) -> None:
    raw = {"run": str(run.folder), "reference": {"source": "imagefolder", "path": str(image_folder)}}
    with pytest.raises(ConfigError, match=r"extractor\.guide: missing; the embedded default has seen digits only"):
        parse(raw)
    assert parse(raw | {"extractor": {"guide": "digits"}}).extractor.guide == "digits"
