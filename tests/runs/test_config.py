from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rayexpand.contract.errors import ConfigError
from rayexpand.contract.settings import differences, digest
from rayexpand.runs import run as runs
from rayexpand.runs.config import OPERATIONAL, RunConfig, load, parse, semantic
from rayexpand.runs.run import preflight
from tests.commands import ROOT

JOBS = ROOT / "jobs"
GOOD = {"name": "a", "data": {"source": "digits"}, "method": {"name": "img2img"}}


def test_loading_a_job_needs_no_torch() -> None:
    code = ("import sys; from rayexpand.runs.config import load; load('jobs/imagenet/expand-img2img.yaml'); "
            "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules")

    subprocess.run([sys.executable, "-c", code], check=True, cwd=JOBS.parent)


def test_all_mistakes_at_once_with_suggestions(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: 'bad name!'\ndata: {source: digits, per_clas: 2}\nsampler: {batch: 0}\n"
                    "method: {name: img2img, strenght: 0.5, steps: -1}\nsamplr: {}\n")

    with pytest.raises(ConfigError) as raised:
        load(file)

    problems = "\n".join(raised.value.problems)
    assert str(file) in str(raised.value)
    assert len(raised.value.problems) == 6
    for expected in ("name: may hold letters, digits", "data.per_clas: unknown field, did you mean 'per_class'?",
                     "sampler.batch: Input should be greater than or equal to 1, got 0",
                     "method.strenght: unknown field, did you mean 'strength'?", "method.steps: ",
                     "samplr: unknown field, did you mean 'sampler'?"):
        assert expected in problems


@pytest.mark.parametrize(("raw", "words"), [
    ({**GOOD, "method": {"name": "img2imgs"}}, "unknown method 'img2imgs', did you mean 'img2img'?"),
    ({**GOOD, "method": {"name": "no.such.Method"}}, "no.such.Method would import code"),
    ({**GOOD, "method": "text2img"}, "method.name: is missing; write `method: {name: text2img}`"),
    ({**GOOD, "data": "birds"}, "data: must be a section with fields, such as {source: ...}, got 'birds'"),
    ({**GOOD, "sampler": {"batch": 0}, "data": {"source": "imagefolder", "path": "/nowhere"}},
     "'/nowhere' does not"),
    ({k: v for k, v in GOOD.items() if k != "data"}, "data: is required and missing"),
    ({**GOOD, "method": {"name": "img2img", "strength": 0.01}}, "strength"),
    ({**GOOD, "image": {"filter": "bilinear"}}, "image: filter: has no effect on fit crop; take it out, or set fit"),
    ({**GOOD, "method": {"name": "img2img", "prompt": "a {nmae}"}}, "nmae"),
])
def test_wrong_configurations_say_what(raw: dict, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(raw)
    assert words in str(raised.value)


def test_overrides_reach_nested_fields_and_are_typed() -> None:
    config = load(JOBS / "digits/expand-img2img.yaml", ["method.strength=0.25", "data.per_class=null", "seed=9"])

    assert (config.method.strength, config.data.per_class, config.seed) == (0.25, None, 9)


@pytest.mark.parametrize("override", ["method.strength", "=3", "name.first=x"])
def test_a_malformed_override_is_an_error(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load(JOBS / "digits/expand-img2img.yaml", [override])


@pytest.mark.parametrize(("content", "words"), [
    ("[1, 2]", "mapping"), ("a: [", "not YAML"), ("!!python/object:x {}", "YAML"), ("a: 1\na: 2", "a is given twice"),
    ("a:\n\tb: 1", "indent with spaces")])
def test_files_that_are_no_configuration(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)

    with pytest.raises(ConfigError, match=words):
        load(file)


def test_a_missing_file_names_itself() -> None:
    with pytest.raises(ConfigError, match=r"(?s)nowhere\.yaml.*cannot be read"):
        load("nowhere.yaml")


OTHER = {"limits.max_failed": 0.5, "runtime.io_threads": 7, "cluster.actors": 3, "prior.device": "cpu",
         "out": "elsewhere", "estimate.gpus": 9, "store.single_writer": True, "prior.attention": "eager",
         "prior.channels_last": True, "prior.compile": True, "name": "b", "artifacts.prototypes": "elsewhere",
         "grow": True}


def test_operational_fields_leave_the_digest_alone() -> None:
    assert {field.split(".")[0] if field.split(".")[0] in OPERATIONAL else field for field in OTHER} == set(OPERATIONAL)
    base = digest(semantic(parse(GOOD)))
    for field, value in OTHER.items():
        assert digest(semantic(parse(_with(GOOD, field, value)))) == base, field


@pytest.mark.parametrize(("field", "value"), [
    ("seed", 1), ("data.per_class", 1), ("image.size", 24), ("image.fit", "center"), ("prior.weights", "elsewhere"),
    ("prior.dtype", "bfloat16"), ("method.strength", 0.75), ("method.ratio", 2), ("sampler.batch", 2),
    ("sampler.shard_images", 2), ("codec.quality", 50)])
def test_every_other_field_changes_the_digest_and_shows_in_the_difference(field: str, value: object) -> None:
    before, after = semantic(parse(GOOD)), semantic(parse(_with(GOOD, field, value)))

    assert digest(before) != digest(after)
    assert [line.split(":")[0] for line in differences(before, after)] == [field]


def test_how_images_are_squashed_is_part_of_what_a_run_is() -> None:
    before, after = (semantic(parse({**GOOD, "image": {"fit": "squash", **more}})) for more in (
        {}, {"filter": "bilinear"}))
    assert differences(before, after) == ["image.filter: 'bicubic' -> 'bilinear'"]


def _with(raw: dict, field: str, value: object) -> dict:
    section, _, leaf = field.partition(".")
    return {**raw, section: {**raw.get(section, {}), leaf: value} if leaf else value}


@pytest.mark.parametrize(("method", "fields"), [("img2img", ["prior"]), ("gif", ["guide", "prior"])])
def test_the_embedded_models_are_never_meant_for_other_images(image_folder: Path, tmp_path: Path, method: str,
                                                              fields: list[str]) -> None:
    raw = {"name": "x", "out": str(tmp_path), "data": {"source": "imagefolder", "path": str(image_folder)},
           "method": {"name": method}}

    def named(config: RunConfig) -> list[str]:
        return sorted(line.split(".")[0] for line in preflight(config) if "embedded default has seen digits" in line)

    assert named(parse(raw)) == fields
    assert named(parse(raw | {"prior": {"dtype": "float32"}})) == fields
    assert named(parse(raw | {name: {"weights": "digits"} for name in fields})) == []
    assert named(parse(raw | {"data": {"source": "digits"}})) == []
    assert named(parse(raw | {"method": {"name": "classical"}})) == []


def test_a_generator_alone_brings_no_guide(image_folder: Path, tmp_path: Path) -> None:
    config = parse({"name": "x", "out": str(tmp_path), "data": {"source": "imagefolder", "path": str(image_folder)},
                    "method": {"name": "gif"}, "prior": {"weights": "models/sd"}})
    assert any(line.startswith("guide.weights: missing") for line in preflight(config))


def test_a_run_that_began_without_naming_its_models_goes_on(image_folder: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"name": "x", "out": str(tmp_path), "data": {"source": "imagefolder", "path": str(image_folder)},
           "method": {"name": "img2img", "ratio": 1}}
    monkeypatch.setattr(runs, "model_hashes", lambda *_: {"prior": "0" * 64})
    with pytest.raises(ConfigError, match=r"prior\.weights: missing"):
        runs.prepare(parse(raw))
    runs.prepare(parse(raw | {"prior": {"weights": "digits"}}))
    assert runs.prepare(parse(raw)).folder
