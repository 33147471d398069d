"""What was begun with the code of commit c960195 is finished by this code or refused with what to do, and nothing that
was finished is made again.

README.md beside this file says what the folders hold and how they were made. expected.json is what that code gave where
nothing had interrupted it.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexpand.runs.config import parse
from rayexpand.runs.run import open_run
from tests import commands
from tests.compat import drawn, found

FIXTURES = Path(__file__).parent / "c960195"
EXPECTED: dict[str, Any] = json.loads((FIXTURES / "expected.json").read_text())
CLOSE = 1e-3  # of losses, where another machine rounds otherwise

Unpack = Callable[..., Path]
Look = dict[str, tuple[int, str]]


@pytest.fixture
def unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Unpack:
    """Unpacks archives with their YAML files into a folder of this test, where every command then runs."""
    monkeypatch.setattr(commands, "ROOT", tmp_path)

    def unpacked(*archives: str) -> Path:
        for name in archives:
            with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
                archive.extractall(tmp_path, filter="data")
        for file in FIXTURES.glob("*.yaml"):
            shutil.copy(file, tmp_path)
        if (tmp_path / "models/drawn").is_dir():
            drawn.draw_weights(tmp_path / "models/drawn")
        return tmp_path

    return unpacked


def done(*arguments: str) -> dict[str, Any]:
    """What a command says as JSON; it must end well."""
    ended = commands.rayexpand(*arguments, "--json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout)


def look(folder: Path, *patterns: str) -> Look:
    """Time and content of the files that match, by name. A finished file keeps both."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    assert files, f"nothing in {folder} matches {patterns}"
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, found.sha256(file.read_bytes()))
            for file in sorted(files)}


def assert_kept(folder: Path, before: Look) -> None:
    after = {name: (folder / name).stat().st_mtime_ns for name in before if (folder / name).is_file()}
    assert after == {name: modified for name, (modified, _) in before.items()}, "made again, or gone"
    assert {name: found.sha256((folder / name).read_bytes()) for name in before} == {
        name: content for name, (_, content) in before.items()}


@cache
def rounds_alike() -> bool:
    """Whether networks give the same last digits here as where the folders were made."""
    return found.stack() == EXPECTED["stack"]


def assert_complete(folder: Path, name: str, *, by_a_network: bool = False, same_as: str = "") -> None:
    """A run has every planned sample, and each is what it would be if nothing had interrupted the run."""
    expected, now = EXPECTED["runs"][same_as or name], found.run(folder / name)
    sound = done("verify", name, "--pixels")
    assert sound["problems"] == []
    assert (sound["pending"], sound["planned"], sound["kept"]) == (0, expected["planned"], expected["kept"])
    if by_a_network and not rounds_alike():
        now["samples"] = expected["samples"]
    if same_as:
        now["digest"] = expected["digest"]
    assert now == expected


def assert_trial(now: dict[str, Any], expected: dict[str, Any]) -> None:
    """A result is what it would be, to the last digit where this machine rounds as that one."""
    if rounds_alike():
        assert now == expected
        return
    unsure = ("history", "last")
    assert {name: one for name, one in now.items() if name not in unsure} == {
        name: one for name, one in expected.items() if name not in unsure}
    assert [point["loss"] for point in now["history"]] == pytest.approx(
        [point["loss"] for point in expected["history"]], rel=CLOSE)


# ---------------------------------------------------------------------------------------------------------------- runs


def test_half_a_run_is_continued_to_the_samples_it_would_have_had(unpack: Unpack) -> None:
    project = unpack("runs")
    before = look(project, "runs/digits/run.json", "runs/digits/plan/**/*", "runs/digits/data/*")
    assert done("status", "runs/digits")["pending"] == 16

    summary = done("expand", "digits.yaml")

    assert (summary["kept"], summary["pending"], summary["shards"]) == (40, 0, 5)
    assert_complete(project, "runs/digits")
    assert_kept(project, before)
    assert len(list((project / "runs/digits/attempts").iterdir())) == 2


def test_a_run_grows(unpack: Unpack) -> None:
    project = unpack("runs")
    before = look(project, "runs/digits/run.json", "runs/digits/plan/**/*", "runs/digits/data/*")

    summary = done("expand", "digits.yaml", "--set", "grow=true", "--set", "method.ratio=3")

    assert (summary["kept"], summary["pending"]) == (60, 0)
    assert done("verify", "runs/digits")["problems"] == []
    assert_kept(project, before)


def test_a_run_from_the_beginning_has_the_digests_and_samples_it_had(unpack: Unpack) -> None:
    project = unpack("runs")
    shutil.rmtree(project / "runs/digits")
    done("expand", "digits.yaml")
    assert_complete(project, "runs/digits")


def test_a_run_with_failed_rows_and_a_retry_is_continued_and_retried(unpack: Unpack) -> None:
    project = unpack("runs")
    before = look(project, "runs/pictures/run.json", "runs/pictures/plan/**/*", "runs/pictures/data/*",
                  "runs/pictures/rejected/*")
    assert any(name.endswith(".r1.parquet") for name in before)

    summary = done("expand", "pictures.yaml")

    assert (summary["kept"], summary["failed"], summary["pending"]) == (48, 6, 0)
    assert_kept(project, before)
    shutil.copytree(project / "sound", project / "pictures", dirs_exist_ok=True)
    assert done("retry", "runs/pictures")["failed"] == 0
    assert_complete(project, "runs/pictures")
    assert_kept(project, before)


def test_a_run_by_a_generator_is_continued(unpack: Unpack) -> None:
    """By first-order steps from noise predictions, whose arithmetic is as it was."""
    project = unpack("models")
    before = look(project, "runs/img2img/run.json", "runs/img2img/plan/**/*", "runs/img2img/data/*")

    done("expand", "img2img.yaml")

    assert_complete(project, "runs/img2img", by_a_network=True)
    assert_kept(project, before)


def test_a_run_begun_before_is_decoded_in_full_precision_on_any_device(unpack: Unpack) -> None:
    project = unpack("models")
    for name in ("img2img", "distdiff", "diffmix"):
        run = open_run(str(project / "runs" / name))
        assert "log_snr_at_start" not in run.facts
        assert run.config.prior.vae_dtype == "auto"
        assert (run.sampling.prior.vae_dtype, run.sampling.prior.channels_last, run.sampling.prior.compile) == (
            "float32", False, False)
    config = parse({**yaml.safe_load((project / "img2img.yaml").read_text()), "out": str(project / "runs")})
    begun = open_run(str(project / "runs/img2img"))
    assert config.prior.channels_last == "auto", "what a file does not say is decided by the device since"
    assert replace(begun, config=config).sampling.prior.channels_last is False


@pytest.mark.parametrize("name", ["distdiff", "diffmix"])
@pytest.mark.fast_cases(1)
def test_a_run_by_solvers_that_changed_since_is_refused_and_may_be_made_under_another_name(name: str,
                                                                                           unpack: Unpack) -> None:
    """A gradient through two steps and a multistep solver: their latents differ in the last digits, which the few small
    images of these runs do not show."""
    project = unpack("models")
    before = look(project, f"runs/{name}/**/*")

    for command in (f"expand {name}.yaml", f"retry runs/{name}", f"regen runs/{name} digits/1073/0"):
        refused_as_changed(f"runs/{name}", *command.split())
    assert look(project, f"runs/{name}/**/*") == before, "nothing is changed and nothing is added"

    done("expand", f"{name}.yaml", "--set", f"name={name}-anew")
    assert_complete(project, f"runs/{name}-anew", by_a_network=True, same_as=f"runs/{name}")
    facts, old = (json.loads((project / "runs" / one / "run.json").read_text()) for one in (f"{name}-anew", name))
    assert (facts["sampler_revision"], facts["plan_digest"], facts["models"]) == (
        2, old["plan_digest"], old["models"])
    assert facts["run_digest"] != old["run_digest"]


def refused_as_changed(run: str, *arguments: str) -> None:
    ended = commands.rayexpand(*arguments, "--json", *(["--no-ray"] if arguments[0] == "retry" else []))
    assert ended.returncode == 4, ended.stdout + ended.stderr
    said = json.loads(ended.stdout)["error"]
    assert (said["type"], said["exit_code"]) == ("DigestMismatch", 4)
    for words in (run, "begun with revision 1 of the solvers, and this version has 2", "Finish it with rayexpand 0.1.0",
                  "give this run another `name`", "can be read as before"):
        assert words in said["message"]


# ------------------------------------------------------------------------------------------------------------- studies


def test_half_a_study_goes_on_from_its_results_and_its_checkpoint(unpack: Unpack) -> None:
    project = unpack("study")
    before = look(project, "runs/study/results/*", "runs/study/predictions/*", "runs/study/runs/*/data/*",
                  "runs/study/runs/*/run.json")
    assert done_trials(project / "runs/study") == [
        "original-repeated-3x-s0", "original-s0", "original-s1", "randaugment-s0"]

    summary = done("train", "study.yaml", "--no-ray")

    assert summary["failed"] == []
    assert_kept(project, before)
    for name in ("runs/study/runs/randaugment-0", "runs/study/runs/randaugment-1"):
        assert_complete(project, name)
    assert {name: starts(project / name) for name in EXPECTED["trials"] if starts(project / name) != [0]} == {
        "runs/study/results/randaugment-s1.json": [0, 3]}
    for name, expected in EXPECTED["trials"].items():
        assert_trial(found.trial(project / name), expected)


def test_a_study_that_was_stopped_between_its_expansions_goes_on(unpack: Unpack) -> None:
    project = unpack("study")
    before = look(project, "runs/early/runs/*/data/*", "runs/early/runs/*/run.json")
    assert len(before) == 2

    assert done("train", "study.yaml", "--no-ray", "--set", "name=early")["failed"] == []

    assert_kept(project, before)
    for name in ("randaugment-0", "randaugment-1"):
        assert_complete(project, f"runs/early/runs/{name}", same_as=f"runs/study/runs/{name}")
    for name, expected in EXPECTED["trials"].items():
        assert_trial(found.trial(project / name.replace("/study/", "/early/")), expected)


def done_trials(study: Path) -> list[str]:
    return sorted(file.stem for file in (study / "results").iterdir())


def starts(result: Path) -> list[int]:
    """The steps from which the training of a trial went on."""
    return json.loads(result.read_text())["starts"]


def test_half_a_sweep_goes_on_and_a_finished_one_tries_nothing_again(unpack: Unpack) -> None:
    project = unpack("sweep")
    finished = ("runs/swept/trials/*", "runs/swept/pilots/*/data/*", "runs/swept/test.json",
                "runs/swept/studies/*/results/*", "runs/swept/sweep.json")
    half = tuple(one.replace("swept", "sweep") for one in finished if "test.json" not in one)
    before = look(project, *finished, *half)
    assert len(list((project / "runs/sweep/trials").iterdir())) == 2

    done("sweep", "sweep.yaml", "--no-ray")
    done("sweep", "sweep.yaml", "--no-ray", "--set", "name=swept")

    assert_kept(project, before)
    expected = EXPECTED["sweeps"]["runs/sweep"]
    for name in ("sweep", "swept"):
        now = found.sweep(project / "runs" / name)
        if not rounds_alike():
            now = {"trials": {key: {**one, "curve": expected["trials"][key]["curve"]}
                              for key, one in now["trials"].items()}, "test": expected["test"]}
        assert now == expected
    for name in (one for one in EXPECTED["runs"] if one.startswith("runs/sweep/pilots/")):
        assert_complete(project, name)
    (continued,) = [file for file in (project / "runs/sweep/studies").glob("*/results/*") if starts(file) != [0]
                    and str(file.relative_to(project)) not in before]
    assert starts(continued) == [0, 3]


# --------------------------------------------------------------------------------------------------------------- fits


def test_what_was_fitted_is_found_again(unpack: Unpack) -> None:
    project = unpack("models")
    before = look(project, "artifacts/**/*", "artifacts/.*/**/*")

    guided, tuned = done("fit", "fit-guided.yaml", "--no-ray"), done("fit", "fit-tuned.yaml", "--no-ray")

    assert_kept(project, before)
    for facts in (*guided.values(), *tuned.values()):
        assert facts["digest"] == EXPECTED["artifacts"][Path(facts["folder"]).name]["digest"]
    assert {file.name for file in (project / "artifacts").iterdir() if not file.name.startswith(".")} == {
        *(Path(name).parts[1] for name in before if not Path(name).parts[1].startswith(".")),
        "guided-guide", "guided-prototypes", "tuned-adapter", "heartbeats"}


def test_a_fit_that_has_its_guide_goes_on_with_the_prototypes(unpack: Unpack) -> None:
    project = unpack("models")
    before = look(project, "artifacts/classifier-*/*", "artifacts/prototypes-*/*")

    made = done("fit", "fit-regrouped.yaml", "--no-ray")

    assert_kept(project, before)
    assert_artifact(project, made["guide"])
    assert_artifact(project, made["prototypes"])
    assert not list((project / "artifacts").glob(".prototypes-*.partial-*")), "what was half made is swept away"


def test_a_fine_tuning_goes_on_from_its_checkpoint(unpack: Unpack) -> None:
    project = unpack("models")
    before = look(project, "artifacts/latents-*/*", "artifacts/adapter-*/**/*")

    made = done("fit", "fit-tuned-longer.yaml", "--no-ray")

    assert_kept(project, before)
    assert made["adapter"]["starts"] == [0, 4]
    assert_artifact(project, made["adapter"])
    assert {"step-000002.png", "step-000004.png"} < {file.name for file in (
        project / made["adapter"]["folder"] / "sheets").iterdir()}


def test_a_pretraining_goes_on_from_its_checkpoint(unpack: Unpack) -> None:
    project = unpack("models")
    (steps,) = (project / "artifacts").glob(".prior-*.steps")

    ended = commands.rayexpand("fit", "fit-small.yaml", "--no-ray", "--json", "--log-json")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    made, told = json.loads(ended.stdout), [json.loads(line) for line in ended.stderr.splitlines()]
    assert next(one["done"] for one in told if one["task"] == "guide") == 4, "the steps before were not done again"
    assert steps.name == f".prior-{made['prior']['training_sha256'][:8]}.steps"
    assert not steps.exists(), "another pretraining was done instead"
    assert_artifact(project, made["prior"])


def assert_artifact(project: Path, made: dict[str, Any]) -> None:
    """An artifact has the digest it would have, and its weights where this machine rounds as that one."""
    name = (project / made["folder"]).resolve().name
    now, expected = found.artifact(project / "artifacts" / name), EXPECTED["artifacts"][name]
    assert now["digest"] == made["digest"]
    if not rounds_alike():
        now["weights"] = expected["weights"]
    assert now == expected


# -------------------------------------------------------------------------------------------------- everything opens


OPENED = [  # archives, command, some of what it answers
    ("runs", "status runs/digits", {"planned": 40, "kept": 24, "pending": 16, "shards_done": 3, "attempts": 1}),
    ("runs", "status runs/pictures", {"kept": 33, "failed": 3, "pending": 18, "reasons": {"decode_error": 3}}),
    ("runs", "verify runs/digits --pixels", {"problems": [], "kept": 24, "rebuilt_receipts": 1}),
    ("runs", "verify runs/pictures --pixels", {"problems": [], "kept": 33, "failed": 3}),
    ("runs", "report runs/digits", {"report": "runs/digits/report.html"}),
    ("runs", "report runs/pictures", {"report": "runs/pictures/report.html"}),
    ("runs", "card runs/chosen", {"card": "runs/chosen/README.md"}),
    ("runs", "export runs/digits out", {"count": 24, "pending": 16}),
    ("runs", "export runs/chosen out --layout imagefolder --selection one", {"count": 10, "pending": 0}),
    ("runs", "export runs/chosen out --layout huggingface", {"count": 20, "pending": 0}),
    ("runs", "select select.yaml --no-ray", {"kept": 10, "rejected": 10, "made": False}),
    ("runs models", "select select-sure.yaml --no-ray", {"planned": 20, "made": True}),
    ("runs models", "evaluate evaluate.yaml --no-ray", {"n_samples": 20, "n_reference": 20}),
    ("runs", "regen runs/digits digits/1766/1", {"equal": True}),
    ("runs", "retry runs/digits", {"kept": 24, "pending": 16}),
    ("runs", "retry runs/pictures", {"kept": 33, "failed": 3, "pending": 18}),
    ("runs", "plan digits.yaml", {"problems": []}),
    ("models", "status runs/distdiff", {"kept": 4, "pending": 6}),
    ("models", "verify runs/distdiff --pixels", {"problems": [], "kept": 4, "pending": 6}),
    ("models", "report runs/distdiff --strips 2", {"report": "runs/distdiff/report.html"}),
    ("models", "card runs/distdiff", {"card": "runs/distdiff/README.md"}),
    ("models", "export runs/distdiff out", {"count": 4, "pending": 6}),
    ("models", "status runs/diffmix", {"kept": 4, "pending": 6}),
    ("models", "verify runs/diffmix --pixels", {"problems": [], "kept": 4, "pending": 6}),
    ("models", "report runs/diffmix", {"report": "runs/diffmix/report.html"}),
    ("models", "plan diffmix.yaml", {"problems": []}),
    ("study", "report runs/study", {"report": "runs/study/report.html"}),
    ("study", "status runs/study/runs/randaugment-1", {"kept": 18, "pending": 0}),
    ("sweep", "report runs/sweep", {"report": "runs/sweep/report.html"}),
    ("sweep", "report runs/swept", {"report": "runs/swept/report.html"}),
    ("sweep", "train runs/swept/best.yaml --no-ray", {"failed": []}),
]


@pytest.mark.parametrize(("archives", "command", "answer"), OPENED, ids=[command for _, command, _ in OPENED])
@pytest.mark.fast_cases(12)
def test_every_verb_opens_what_that_code_wrote(archives: str, command: str, answer: dict[str, Any],
                                               unpack: Unpack) -> None:
    project = unpack(*archives.split())
    before = look(project, "runs/**/data/*.parquet", "runs/**/run.json", "runs/**/selections/*")

    said = done(*command.split())

    assert {name: said[name] for name in answer} == answer
    assert_kept(project, before)


def test_every_file_that_code_took_is_valid(unpack: Unpack) -> None:
    unpack("runs", "study", "sweep", "models")
    for file in sorted(FIXTURES.glob("*.yaml")):
        done("validate", file.name)
