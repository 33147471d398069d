"""Which kind a file is, what a machine file adds to it, and the ready files that travel with the package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from rayexpand import api
from rayexpand.api.files import DEVICE, KINDS, _loader, read_job
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.settings import read
from rayexpand.models import prior
from rayexpand.models.tiny import embedded
from rayexpand.runs import run
from tests.commands import ROOT, process, rayexpand

DIGITS = {"name": "x", "data": {"source": "digits", "per_class": 1}, "method": {"name": "classical", "ratio": 1}}
VERBS = {"expand": "expand", "loop": "expand", "study": "train", "sweep": "sweep", "fit": "fit", "pretrain": "fit",
         "select": "select", "evaluate": "evaluate", "audit": "audit", "report": "report"}


def test_the_verb_of_every_ready_file() -> None:
    found = api.job_files()

    assert len(found) == len(list((ROOT / "jobs").rglob("*.yaml"))) > 150
    for name, verb, about in found:
        assert verb == VERBS[name.rpartition("/")[2].split("-")[0]], name
        assert about, f"{name} does not say what it is for"


def test_ready_files_are_shown_and_copied(tmp_path: Path) -> None:
    text = (ROOT / "jobs/digits/expand-img2img.yaml").read_text()

    assert rayexpand("jobs", "show", "digits/expand-img2img").stdout == text
    assert "digits/expand-img2img" in rayexpand("jobs", "ls", "img2img").stdout
    copy = tmp_path / "copy.yaml"
    assert rayexpand("jobs", "cp", "digits/expand-img2img", copy).returncode == 0
    assert copy.read_text() == text
    assert "exists already" in rayexpand("jobs", "cp", "digits/expand-img2img", copy).stderr
    assert "did you mean 'digits/expand-img2img'" in rayexpand("jobs", "show", "digits/expand-img2image").stderr
    assert rayexpand("jobs", "show", "../../pyproject").returncode == 2


@pytest.mark.parametrize("name", ["expand-img2img", "study", "sweep-img2img", "fit-distdiff"])
def test_a_sound_file_has_no_problems_and_all_its_fields(name: str) -> None:
    found = api.validate(ROOT / f"jobs/digits/{name}.yaml")

    assert found.problems == []
    assert found.config["name"]
    assert len(found.config) > len(yaml.safe_load((ROOT / f"jobs/digits/{name}.yaml").read_text()))


@pytest.mark.parametrize(("name", "change", "words"), [
    ("expand-img2img", "method.strenth=1", "did you mean 'strength'"), ("study", "armz=[]", "did you mean 'arms'"),
    ("sweep-img2img", "sampels=3", "did you mean 'samples'"), ("fit-distdiff", "fit.prototyps={}", "prototypes"),
    ("select-random", "rul=1", "did you mean 'rule'"), ("evaluate-img2img", "metrcs=[]", "did you mean 'metrics'")])
def test_a_mistake_in_any_kind_of_file_is_found(name: str, change: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        api.validate(ROOT / f"jobs/digits/{name}.yaml", set=[change])


@pytest.mark.parametrize(("name", "change"), [("study", "test.path"), ("sweep-img2img", "study.test.path"),
                                              ("fit-distdiff", "data.path"), ("expand-img2img", "data.path")])
def test_a_dataset_that_is_not_there_is_a_problem(name: str, change: str) -> None:
    section = change.rpartition(".")[0]
    found = api.validate(ROOT / f"jobs/digits/{name}.yaml",
                         set={section: {"source": "imagefolder", "path": "nowhere"}})

    assert any(f"{section.removeprefix('study.')}.path" in one for one in found.problems)
    assert name == "study" or found.dataset is None or name == "sweep-img2img"


def test_validate_says_what_the_dataset_holds() -> None:
    assert api.validate(DIGITS).dataset == {
        "seeds": 10, "classes": 10, "largest_classes": {str(digit): 1 for digit in range(10)},
        "splits": ["seeds", "test", "pool"]}


@pytest.mark.parametrize("weights", ["digits-mae", "digits-unclip", "somebody/model@main"])
def test_validate_gets_no_weights(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_weights(*_: Any, **more: Any) -> Path:
        raise AssertionError("weights are asked for")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "trained", no_weights)
    monkeypatch.setattr(prior, "sources_of", no_weights)
    monkeypatch.setattr(run, "sources_of", no_weights)
    if "/" in weights:
        facts = prior.inspect_prior("digits")
        monkeypatch.setattr(run, "inspect_prior", lambda model: facts)
    found = api.validate({**DIGITS, "prior": {"weights": weights}, "method": {
        "name": "gif", "generator": weights.partition("-")[2]} if "-" in weights else {"name": "img2img", "ratio": 1}})
    assert any(f"prior.weights: {weights} is not on this machine yet" in one for one in found.notes), found


def test_validate_says_all_mistakes_at_once(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "seeds")
    (tmp_path / "seeds/empty").mkdir()
    problems = api.validate({
        "name": "run", "data": {"source": "imagefolder", "path": str(tmp_path / "seeds")},
        "prior": {"weights": "nowhere/sd15"}, "method": {"name": "img2img", "ratio": 1}}).problems

    assert any("prior.weights" in one for one in problems)
    assert any("empty" in one for one in problems)


def test_an_old_name_of_a_key_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    api.validate({**read(ROOT / "jobs/digits/study.yaml"), "also": {
        "pool": {"data": {"source": "digits", "split": "pool"}}}})

    assert caplog.text.count("now called extra_tests") == 1


def test_a_kind_may_be_said_and_must_be_true(tmp_path: Path) -> None:
    assert read_job({**DIGITS, "kind": "run"}, (), None)[0] == "run"
    assert "kind" not in read_job({**DIGITS, "kind": "run"}, (), None)[1]
    with pytest.raises(ConfigError, match="kind: 'rum' is none; kinds are study"):
        read_job({**DIGITS, "kind": "rum"}, (), None)
    with pytest.raises(ConfigError, match="kind: study needs the section 'arms'"):
        read_job({**DIGITS, "kind": "study"}, (), None)


def test_a_file_of_another_kind_names_its_verb() -> None:
    with pytest.raises(ConfigError, match=r"this is a file for `rayexpand train` \(kind study"):
        api.expand(ROOT / "jobs/digits/study.yaml")


@pytest.mark.parametrize("verb", ["plan", "bench", "fit", "evaluate"])
def test_every_verb_names_itself_and_the_verb_of_a_file_of_another_kind(verb: str) -> None:
    with pytest.raises(ConfigError) as caught:
        getattr(api, verb)("jobs/digits/select-quantile.yaml")
    assert caught.value.problems == [
        "this is a file for `rayexpand select` (kind select, for it has 'rule'), not for `rayexpand " + verb + "`"]


def test_keys_that_tell_kinds_apart_belong_to_one_kind() -> None:
    """Else a file of one kind would be taken for another."""
    from rayexpand.api.files import _loader

    for kind, (key, _) in KINDS.items():
        owners = [other for other in KINDS if key in _loader(other)[0].model_fields]
        assert owners == [kind], key


def test_a_machine_file_overrides_the_job_and_set_overrides_both(tmp_path: Path) -> None:
    (tmp_path / "machine.yaml").write_text("cluster: {actors: 7}\nruntime: {io_threads: 3}\ndevice: cpu\n")
    job: dict[str, Any] = {**DIGITS, "cluster": {"actors": 2, "cpus_per_actor": 2}}
    _, raw, _ = read_job(job, {"runtime.io_threads": 5}, tmp_path / "machine.yaml")

    assert raw["cluster"] == {"actors": 7, "cpus_per_actor": 2}
    assert (raw["runtime"], raw["prior"]) == ({"io_threads": 5}, {"device": "cpu"})
    assert job["cluster"]["actors"] == 2, "the mapping of the caller is not touched"
    done = rayexpand("validate", ROOT / "jobs/digits/study.yaml", "--machine", tmp_path / "machine.yaml", "--json")
    assert (done.returncode, '"device": "cpu"' in done.stdout) == (0, True)


def test_a_machine_file_says_nothing_of_what_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method: a machine file has only cluster, runtime, store, estimate"):
        read_job(DIGITS, (), {"method": {"ratio": 3}})


@pytest.mark.parametrize(("job", "set_", "machine", "says"), [
    ({"kind": ["run"]}, (), None, "kind: \\['run'\\] is none"),
    ({}, ("name=2024-13-45",), None, "name: the value is not YAML"),
    ({}, (), {"cluster": 3}, "cluster: must be a section with fields, got 3"),
    ({"cluster": 3}, (), {"cluster": {"actors": 2}}, "cluster: must be a section with fields, got 3")])
def test_odd_values_are_refused_by_name(job: dict[str, Any], set_: Any, machine: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_job({**DIGITS, **job}, set_, machine)


def test_a_file_without_the_section_that_makes_it_one() -> None:
    with pytest.raises(ConfigError, match="arms: `rayexpand train` needs this section, and it is missing"):
        api.train({"name": "mine", "data": {"source": "digits"}})


def test_a_sweep_over_a_study_of_its_own_file_takes_a_machine(tmp_path: Path) -> None:
    sweep = read(ROOT / "jobs/digits/sweep-img2img.yaml")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"kind": "study", "name": "mine", **sweep["study"]}))
    sweep["study"] = str(tmp_path / "study.yaml")

    assert api.validate(sweep, machine={"device": "cpu"}).problems == []


def test_a_copy_of_a_ready_file_comes_with_those_it_names(tmp_path: Path) -> None:
    done = process("jobs", "cp", "papers/gif/study-pathmnist", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine.yaml").read_text() == api.job_text("papers/gif/study-pathmnist")
    assert (tmp_path / "jobs/papers/pathmnist.csv").read_text() == api.job_text("papers/pathmnist.csv")
    assert len(api.jobs_named_by("papers/gif/sweep-level")) == 1


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_schema_of_every_kind_knows_its_fields(kind: str) -> None:
    found = api.schema(kind)

    assert found["properties"]["kind"] == {"const": kind}
    assert KINDS[kind][0] in found["properties"]


def test_a_first_file_for_a_folder_of_images(image_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    made = rayexpand("init", image_folder, "--to", file, "--ratio", "2")

    assert made.returncode == 0, made.stderr
    assert read(file)["method"] == {"name": "classical", "policy": "randaugment", "ratio": 2.0}
    assert api.validate(file).problems == []
    assert rayexpand("init", image_folder, "--to", file).returncode == 2
    with pytest.raises(UsageError, match="there is no such folder"):
        api.first_file("nowhere")
    with pytest.raises(UsageError):
        api.first_file(str(tmp_path))
    shutil.copytree(image_folder, tmp_path / "photos" / "my birds")
    assert "name: my-birds" in api.first_file(str(tmp_path / "photos" / "my birds"))


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:", "cuda:x", "CPU", 0])
@pytest.mark.parametrize("kind", DEVICE)
def test_a_device_is_one_of_a_closed_set(kind: str, device: str | int) -> None:
    cls, dotted = _loader(kind)[0], DEVICE[kind]
    if kind == "sweep":  # whose study is checked as one
        cls, dotted = _loader("study")[0], DEVICE["study"]
    section, _, leaf = dotted.rpartition(".")
    fields = {section: {leaf: device}} if section else {leaf: device}
    with pytest.raises(ValidationError) as error:
        cls(**fields)
    (found,) = [one["msg"] for one in error.value.errors() if one["loc"] == tuple(dotted.split("."))]
    assert "choose auto, cpu, cuda or cuda:N" in found


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices_that_exist(device: str) -> None:
    assert read_job({**DIGITS, "prior": {"device": device}}, (), None)[1]["prior"]["device"] == device
    assert api.validate({**DIGITS, "prior": {"device": device}}).config["prior"]["device"] == device


def test_attention_is_one_of_a_closed_set() -> None:
    with pytest.raises(ConfigError, match=r"prior\.attention: Input should be 'auto', 'sdpa' or 'eager', got 'flash'"):
        api.validate({**DIGITS, "prior": {"attention": "flash"}})


def test_a_device_that_is_not_there_is_known_to_validate() -> None:
    digits = ROOT / "jobs/digits/expand-img2img.yaml"
    assert "prior.device: device 'cuda:99' is not there" in api.validate(digits, set={"prior.device": "cuda:99"}
                                                                         ).problems[0]
    fit = ROOT / "jobs/digits/fit-distdiff.yaml"
    assert "device: device 'cuda:99' is not there" in api.validate(fit, set={"device": "cuda:99"}).problems[0]
