"""Every kind of file that is written, damaged, against every verb that reads it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayexpand import api
from rayexpand.contract.errors import DamagedFile
from rayexpand.fitting import fit as fits
from rayexpand.fitting.config import parse_fit
from rayexpand.reports.sweep import write_sweep_report
from rayexpand.runs import run as runs
from rayexpand.studies.config import parse_study
from rayexpand.studies.expansions import pending_runs
from rayexpand.studies.study import prepare_study
from rayexpand.studies.summary import summary
from rayexpand.studies.sweep.config import parse_sweep
from rayexpand.studies.sweep.search import Search, run_here
from rayexpand.studies.sweep.sweep import open_sweep, sweep_in
from rayexpand.studies.trial import run_trials
from rayexpand.studies.trials import make_trials, pending_trials
from tests.conftest import complete, hashes, small_run
from tests.damage.cases import Case, Outcome, Work, cases, content_of, run_all, run_case, table
from tests.studies.rounds.conftest import finished, union
from tests.studies.rounds.test_learning import digits_loop
from tests.tiny import tiny_clip

Make = Callable[[Path, Path], Work]

SMALL = {"updates": 4, "epochs": 2, "batch": 8, "backbone_args": {"width": 4}}
NOISE = {"name": "classical", "policy": "randaugment", "ratio": 1}


def ignore(task: str, done: int, total: int) -> None:
    """Nothing is shown."""


# ------------------------------------------------------------------------------------------------------------------ run


def run_work(images: Path, place: Path) -> Work:
    """A run with refused rows, a retry, a roll-up, a selection and scores."""
    seeds = Path(shutil.copytree(images, place / "seeds"))
    (seeds / "bee/2.png").write_bytes(b"")
    config = small_run(images, place / "out", "RejectsAndFails", ratio=2, batch=4, shard_images=8,
                       data={"source": "imagefolder", "path": str(seeds)})
    run, _ = complete(config)
    shutil.copy(images / "bee/2.png", seeds / "bee/2.png")
    runs.drive(run, runs.in_process(runs.start(run)), runs.retry_jobs(run), to_the_end=True)
    complete(config)
    api.select({"name": "half", "run": str(run.folder), "rule": {"kind": "random", "share": 0.5, "per": "class"}},
               ray=False)

    def expand(folder: Path) -> Any:
        again, totals = complete(config.model_copy(update={"out": str(folder.parent)}))
        return f"{totals.failed} failed", hashes(again)

    def opened(folder: Path) -> api.RunFolder:
        return api.RunFolder(str(folder))

    def export(folder: Path) -> Any:
        made = opened(folder).export(folder.parent / "export", "imagefolder")
        return Outcome(content_of(folder.parent / "export", "README"), f"{made.pending} rows pending")

    def select(folder: Path) -> Any:
        samples = [(image.numpy().tobytes(), label.tolist(), facts) for image, label, facts in api.dataset(
            str(folder), selection="half")]
        return samples, f"{opened(folder).status().failed} failed"

    def report(folder: Path) -> Any:
        text = Path(opened(folder).report()).read_text()
        opened(folder).card()
        counts = re.findall(r"<td class=\"n\">([\d,]+)</td>", text)
        return Outcome((counts, status(folder)), str(re.findall(r"[-\w/.]+ is (?:gone|damaged)", text)))

    def status(folder: Path) -> Any:
        found = opened(folder).status()
        return found.kept, found.rejected, f"{found.failed} failed", f"{found.pending} pending", found.reasons

    def verify(folder: Path) -> Any:
        found = opened(folder).verify()
        counts = found.to_json()
        del counts["problems"], counts["rebuilt_receipts"]  # of a cache that it has made whole
        return Outcome((f"{counts['pending']} pending, {counts['failed']} failed", counts), str(found.problems))

    def retry(folder: Path) -> Any:
        counts = opened(folder).retry(same_process=True).to_dict()
        return f"{counts['pending']} pending", hashes(opened(folder)._run())

    first = next(iter(hashes(run)))
    return Work("run", Path(run.folder), {
        "run.json": "run.json", "attempts": "attempts/*.json", "plan.json": "plan/*/plan.json",
        "seed index": "plan/*/seeds.parquet", "class table": "plan/*/classes.parquet", "data": "data/*.parquet",
        "refused": "rejected/*.parquet", "receipts": "receipts/*.json", "selection": "selections/*.parquet"}, {
        "status": status, "verify": verify, "expand": expand, "export": export, "dataset": select, "report": report,
        "retry": retry,
        "regen": lambda folder: opened(folder).regen(first)["sample_sha256"]},
        absent={"data": r"[1-9]\d* .*(pending|failed)", "selection": "."})  # which its user may delete


# ---------------------------------------------------------------------------------------------------------------- study


def study_work(images: Path, place: Path) -> Work:
    """A finished study of an arm and the original."""
    raw = {"name": "study", "out": str(place / "studies"), "seeds": [0], "recipe": SMALL,
           "data": {"source": "digits", "per_class": 2}, "test": {"source": "digits", "split": "test", "per_class": 2},
           "expansions": {"noisy": {"method": NOISE}},
           "arms": [{"name": "original"}, {"name": "noisy", "use": "noisy"}]}

    def train(folder: Path) -> Any:
        study = prepare_study(parse_study({**raw, "out": str(folder.parent)}))
        for run in pending_runs(study):
            expander = runs.start(run)
            runs.drive(run, runs.in_process(expander), lambda: runs.pending_jobs(run))  # noqa: B023
            expander.close()
        trials = make_trials(study)
        assert not [problem for _, problem in run_trials(
            study.files, pending_trials(study.trial_folder, trials), study.config.training) if problem]
        return _scores(folder)

    folder = place / "studies/study"
    train(folder)
    return Work("study", folder, {
        "study.json": "study.json", "trials": "trials/*.json", "results": "results/*.json",
        "predictions": "predictions/*.parquet", "lists": "lists/*", "run of a study": "runs/*/run.json",
        "data of a run": "runs/*/data/*.parquet"}, {"train": train, "summary": _scores, "report": _study_page},
        absent={"results": r"'missing': \['"})


def _scores(folder: Path) -> Any:
    found = summary(str(folder))
    arms = [(one["arm"], one["last"], one["seeds"]) for one in found["arms"]]
    return Outcome((arms, found["comparisons"]), f"{found['warnings']} {found['trials']} {found['comparisons']}")


def _study_page(folder: Path) -> Any:
    text = Path(api.StudyFolder(str(folder)).report()).read_text()
    return Outcome(re.findall(r"[\d.]+ ± [\d.]+", text), _scores(folder).said)


# ----------------------------------------------------------------------------------------------------------------- loop


def loop_work(images: Path, place: Path) -> Work:
    """A loop of three rounds whose later ones are dealt by scores."""
    rounds = {"count": 3, "rule": "loss", "scores": {"folds": 2, "recipe": {"preset": "digits", **SMALL}}}
    config = digits_loop(place, rounds=rounds, ratio=3, shard_images=8)

    def expand(folder: Path) -> Any:
        run = config.run.model_copy(update={"out": str(folder.parent)})
        loop, end = finished(config.model_copy(update={"run": run}))
        return end.reason, sorted(union(loop).items())

    def status(folder: Path) -> Any:
        found = api.LoopFolder(str(folder)).status()
        return Outcome((found.stage, found.kept, f"{found.pending} pending"), str(found.problems))

    def verify(folder: Path) -> Any:
        counts = api.LoopFolder(str(folder)).verify().to_json()
        problems = counts.pop("problems")
        del counts["rebuilt_receipts"]
        return Outcome((f"{counts['pending']} pending", counts), str(problems))

    expand(place / "loop")
    return Work("loop", place / "loop", {
        "rounds.json": "rounds.json", "decisions": "decisions/*.json", "copies of rounds": "decisions/*.parquet",
        "scores of seeds": "scores/*.parquet", "run of a round": "rounds/*/run.json",
        "data of a round": "rounds/*/data/*.parquet", "plan of a round": "rounds/*/plan/*/*",
        "folds": "results/*.json"}, {"expand": expand, "status": status, "verify": verify},
        absent={"data of a round": r"[1-9]\d* pending", "decisions": "all rounds are made"})


# ---------------------------------------------------------------------------------------------------------------- sweep


def sweep_work(images: Path, place: Path) -> Work:
    data = {"source": "imagefolder", "path": str(images)}
    names = [f"{name}/{i}.png" for name in ("ant", "bee", "cat", "dog") for i in range(5)]
    for section, wanted in (("data", "0123"), ("test", "4")):
        (place / f"{section}.txt").write_text("".join(f"{name}\n" for name in names if name[-5] in wanted))
    raw = {"name": "sweep", "out": str(place / "sweeps"), "arm": "noisy", "samples": 2, "hold_out": 1,
           "score_on": "validation", "space": {"recipe.lr": {"choice": [0.01, 0.001]}},
           "study": {"data": {**data, "ids": str(place / "data.txt")}, "test": {**data, "ids": str(place / "test.txt")},
                     "subset": {"kind": "per_class", "n": 2}, "seeds": [0], "recipe": SMALL,
                     "expansions": {"noisy": {"method": NOISE}},
                     "arms": [{"name": "original"}, {"name": "noisy", "use": "noisy"}]}}

    def sweep(folder: Path) -> Any:
        run_here(Search(open_sweep(parse_sweep({**raw, "out": str(folder.parent)}))))
        return _sweep_scores(folder)

    sweep(place / "sweeps/sweep")
    return Work("sweep", place / "sweeps/sweep", {
        "sweep.json": "sweep.json", "suggestions": "suggestions/*.json", "sweep trials": "trials/*.json",
        "test.json": "test.json", "ids": "ids/*.txt"}, {"sweep": sweep, "report": _sweep_scores},
        absent={"sweep trials": r"\['[0-9a-f]{8}'"})


def _sweep_scores(folder: Path) -> Any:
    found = write_sweep_report(sweep_in(str(folder)))
    trials = [(one["key"], one["score"], one["values"]) for one in found["trials"]]
    return Outcome((trials, found["best"], found["test_score"]), f"{found['test_note']} {found['without_result']}")


# ------------------------------------------------------------------------------------------------------------------ fit


def fit_work(images: Path, place: Path) -> Work:
    clip = tiny_clip(place / "clip")
    raw = {"name": "ants", "guide": {"weights": str(clip)}, "device": "cpu", "out": str(place / "fits"),
           "data": {"source": "imagefolder", "path": str(images)}}
    kinds: list[dict[str, Any]] = [{"kind": "prototypes", "groups": 2}, {"kind": "class_features"},
                                   {"kind": "image_features"}]

    def fit(folder: Path) -> Any:
        for one in kinds:
            fits.fit(parse_fit({**raw, "out": str(folder), "fit": one}), ignore)
        return content_of(folder, r"artifact\.json|lock")

    fit(place / "fits")
    return Work("fit", place / "fits", {
        "artifact.json": "*-*/artifact.json", "weights": "*-*/*.safetensors", "features.npy": "*-*/features.npy",
        "ids.parquet": "*-*/ids.parquet", "features.json": "*-*/features.json"}, {"fit": fit})


def made(makers: tuple[Make, ...], images: Path, factory: pytest.TempPathFactory) -> dict[str, Work]:
    found = [make(images, factory.mktemp(make.__name__)) for make in makers]
    return {one.name: one for one in found}


def test_no_damage_goes_unnoticed(image_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """200 cases of the whole below."""
    works = made((run_work, fit_work), image_folder, tmp_path_factory)
    counts, wrong = run_all(works, cases(works, 8)[:200], tmp_path)

    assert wrong == []
    assert {"same", "refused", "said"} == {outcome for *_, outcome in counts}


@pytest.mark.slow
def test_no_damage_to_a_loop_goes_unnoticed(image_folder: Path, tmp_path: Path,
                                            tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each damage to each of its kinds of files, for each verb."""
    works = made((loop_work,), image_folder, tmp_path_factory)
    counts, wrong = run_all(works, cases(works, 8), tmp_path)

    assert not wrong, "\n".join(wrong)
    assert {"same", "refused", "said"} == {outcome for *_, outcome in counts}


@pytest.mark.parametrize(("given", "outcome"), [
    (lambda folder: {"data/a": 2, "metadata": "run"}, "silently different"), (lambda folder: {"data/a": 1}, "same"),
    (lambda folder: Outcome({"data/a": 2}, "data/train-000000.parquet is damaged"), "said"),
    (lambda folder: 1 / 0, "exit 70"), (lambda folder: refuse("a file of the run"), "does not name"),
    (lambda folder: refuse("data/train-000000.parquet"), "refused")])
def test_the_judge_tells_silence_from_speech(given: Any, outcome: str, tmp_path: Path) -> None:
    """A verb's own output names files too; only what it says of them counts."""
    (tmp_path / "run/data").mkdir(parents=True)
    (tmp_path / "run/data/train-000000.parquet").write_bytes(b"content")
    work = Work("run", tmp_path / "run", {"data": "data/*.parquet"}, {"verb": given}, sound={
        "verb": Outcome({"data/a": 1})})

    assert run_case(work, Case("run", "data", "verb", "flip", 0), tmp_path / "case").startswith(outcome)


def refuse(text: str) -> None:
    raise DamagedFile(text)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_no_damage_of_thousands_goes_unnoticed(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                               tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every kind of file and every verb that reads it, 24 times: each damage three times."""
    works = made((run_work, loop_work, study_work, sweep_work, fit_work), image_folder, tmp_path_factory)
    counts, wrong = run_all(works, cases(works, 24), tmp_path)
    with capsys.disabled():
        print(f"\n{sum(counts.values())} cases\n{table(counts)}", *wrong, sep="\n")
    assert wrong == []
