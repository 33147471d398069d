"""Sweeps without Ray: what may be swept, what is tried, what is reused, and what a resumed sweep leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rayexpand.contract.errors import ConfigError, DigestMismatch, Interrupted, UsageError
from rayexpand.reports.sweep import write_sweep_report
from rayexpand.studies.config import load_study
from rayexpand.studies.expansions import pending_runs
from rayexpand.studies.study import prepare_study
from rayexpand.studies.sweep import trial as sweep_trial
from rayexpand.studies.sweep.config import SweepConfig, load_sweep, parse_sweep
from rayexpand.studies.sweep.search import Search, describe, run_here
from rayexpand.studies.sweep.space import Dimension, n_suggestions, parse_dimension, suggest
from rayexpand.studies.sweep.sweep import best_of, candidate, open_sweep, read_results
from rayexpand.studies.trials import make_trials
from tests.commands import rewrite_json

STRENGTH, LR = "expansions.noisy.method.magnitude", "recipe.lr"

Make = Callable[..., SweepConfig]


def _raw(images: Path, out: Path) -> dict[str, Any]:
    """Four classes of five images: one is held out of each class, one trains, the others are not used."""
    data = {"source": "imagefolder", "path": str(images)}
    return {
        "name": "sweep", "out": str(out), "arm": "noisy", "samples": 4, "hold_out": 1, "score_on": "validation",
        "fresh_seeds": 0, "space": {LR: {"choice": [0.01, 0.001]}},
        "study": {
            "data": data, "test": data, "subset": {"kind": "per_class", "n": 2}, "seeds": [0],
            "recipe": {"updates": 4, "epochs": 2, "batch": 8, "backbone_args": {"width": 4}},
            "expansions": {"noisy": {"method": {"name": "classical", "policy": "randaugment", "ratio": 1}}},
            "arms": [{"name": "original"}, {"name": "noisy", "use": "noisy"}]}}


@pytest.fixture
def raw(image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    found = _raw(image_folder, tmp_path / "out")
    ids = tmp_path / "ids"
    ids.mkdir()
    names = [f"{name}/{i}.png" for name in ("ant", "bee", "cat", "dog") for i in range(5)]
    for section, keep in (("data", lambda name: name[-5] != "4"), ("test", lambda name: name[-5] == "4")):
        (ids / f"{section}.txt").write_text("".join(f"{name}\n" for name in names if keep(name)))
        found["study"][section] = {**found["study"][section], "ids": str(ids / f"{section}.txt")}
    return found


@pytest.fixture
def make(raw: dict[str, Any]) -> Make:
    """A sweep with some sections of the mapping replaced."""
    return lambda **sections: parse_sweep({**raw, **sections})


def problems_of(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(raw)
    return caught.value.problems


@pytest.mark.parametrize(("spec", "said"), [
    ({"uniform": [0.9, 0.3]}, "low must be below high"), ({"uniform": [0, 1], "step": 2}, "between 0 and high - low"),
    ({"loguniform": [0, 1]}, "needs low above 0"), ({"randint": [1.5, 3]}, "whole numbers"),
    ({"lograndint": [0, 8]}, "needs low above 0"), ({"lograndint": [1, 8], "step": 2}, "takes no step"),
    ({"choice": [1.0, float("nan")]}, "not finite"), ({"choice": [1, 2], "when": []}, "when: must name fields"),
    ({"choice": [1, 1]}, "given twice"), ({"choice": 3}, "list of two or more"), ({"choice": [2]}, "list of two"),
    ({"uniform": ["a", 1]}, "in numbers"), ({"uniform": [True, 2]}, "in numbers"),
    ({"choice": [1, 2], "step": 1}, "no effect"),
    ({"normal": [0, 1]}, "write one of"), (0.5, "write one of"),
    ({"choice": [1, 2], "grid": [1, 2]}, "write one of")])
def test_a_space_that_cannot_be(spec: Any, said: str) -> None:
    found = parse_dimension("recipe.lr", spec)

    assert isinstance(found, str)
    assert found.startswith("recipe.lr")
    assert said in found


@pytest.mark.parametrize(("spec", "allowed"), [
    ({"choice": [None, [1, 2], "x"]}, lambda v: v in (None, [1, 2], "x")),
    ({"uniform": [0.3, 0.95], "step": 0.1}, lambda v: round(v, 9) in {0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}),
    ({"uniform": [0.1, 0.2]}, lambda v: 0.1 <= v <= 0.2 and len(str(v)) <= 6),
    ({"loguniform": [1e-4, 1e-1]}, lambda v: 1e-4 <= v <= 1e-1),
    ({"randint": [1, 3]}, lambda v: v in (1, 2, 3) and isinstance(v, int)),
    ({"lograndint": [1, 64]}, lambda v: 1 <= v <= 64 and isinstance(v, int)),
    ({"uniform": [1.0, 1.001], "step": 0.0001}, lambda v: v in [float(f"1.000{i}") for i in range(10)] + [1.001]),
    ({"randint": [2, 9], "step": 3}, lambda v: v in (2, 5, 8))])
@pytest.mark.parametrize("search", ["random", "optuna"])
def test_suggestions_lie_in_the_space(spec: Any, allowed: Callable[[Any], bool], search: str) -> None:
    space = [_dimension("a", spec)]
    seen: list[Any] = []
    for number in range(12):
        values = suggest(space, search, 0, number, seen, 3)
        assert allowed(values["a"]), values
        seen.append((values, [(1, number / 12)], ("finished", "stopped", "running")[number % 3]))
    assert len({str(values) for values, *_ in seen}) > 1


def _dimension(field: str, spec: Any) -> Dimension:
    found = parse_dimension(field, spec)
    assert isinstance(found, Dimension), found
    return found


def test_a_suggestion_depends_on_its_number_and_not_on_who_asks() -> None:
    space = [_dimension("a", {"uniform": [0, 1]}), _dimension("b", {"loguniform": [1e-3, 1]})]
    first = [suggest(space, "random", 5, number) for number in range(6)]

    assert [suggest(space, "random", 5, number) for number in (5, 2)] == [first[5], first[2]]
    assert suggest(space[::-1], "random", 5, 3) == first[3], "a field does not move the others"
    assert suggest(space, "random", 6, 3) != first[3]
    seen = [(values, [(1, values["a"])], "finished") for values in first]
    assert suggest(space, "optuna", 5, 6, seen, 6) == suggest(space, "optuna", 5, 6, seen, 6)
    # a sampler that restarts its stream suggests its first values once more
    assert len({str(suggest(space, "optuna", 5, number, [], 99)) for number in range(8)}) == 8


def test_whole_numbers_on_a_log_scale_are_as_often_small_as_large() -> None:
    space = [_dimension("a", {"lograndint": [1, 1023]})]
    found = np.array([suggest(space, "random", 0, number)["a"] for number in range(400)])

    share = np.log(31.5 / 0.5) / np.log(1023.5 / 0.5)  # of the logarithms below 31.5
    assert abs(np.mean(found < 32) - share) < 3 * np.sqrt(share * (1 - share) / 400)


def test_the_order_in_which_trials_ended_decides_nothing(make: Make, raw: dict[str, Any]) -> None:
    values = [0.02 * n + 0.01 for n in range(8)]
    suggested = []
    for order in (range(8), range(7, -1, -1)):
        search = Search(open_sweep(make(search="optuna", samples=20, space={LR: {"uniform": [0.001, 0.2]}})))
        search.results = {str(n): {"number": n, "values": {LR: values[n]}, "state": "finished",
                                   "curve": [{"epoch": 1, "score": 0.5 + (n % 2) / 10}]} for n in order}
        suggested.append(search._suggested(8))
    assert suggested[0] == suggested[1]


def test_optuna_goes_where_scores_are_high() -> None:
    space = [_dimension("a", {"uniform": [0, 1]})]
    seen = [({"a": i / 20}, [(1, -(i / 20 - 0.8) ** 2)], "finished") for i in range(20)]

    found = [suggest(space, "optuna", 0, number, seen, 20)["a"] for number in range(20, 40)]

    assert np.mean(np.abs(np.array(found) - 0.8) < 0.2) > 0.7, "by chance it would be 0.4"


def test_a_grid_tries_every_point_once() -> None:
    space = [_dimension("a", {"choice": [1, 2, 3]}), _dimension("b", {"grid": ["x", "y"]})]
    points = [tuple(suggest(space, "grid", 0, number).values()) for number in range(n_suggestions(space, "grid", None))]

    assert sorted(points) == [(a, b) for a in (1, 2, 3) for b in "xy"]
    mixed = [space[1], _dimension("c", {"uniform": [0, 1]})]
    assert n_suggestions(mixed, "random", 3) == 6
    assert [suggest(mixed, "random", 0, number)["b"] for number in range(6)] == list("xyxyxy")


def test_all_mistakes_are_said_at_once(raw: dict[str, Any]) -> None:
    raw |= {"space": {"recipe.lrr": {"choice": [0.1, 0.2]}, "expansions.nosy.method.magnitude": {"choice": [1, 2]},
                      "expansions.noisy.method.magnitude": {"choice": [3, 99]}, "recipes.lr": {"choice": [1, 2]},
                      "seeds": {"choice": [1, 2]}, "arms.original.real": {"choice": [1, 2]},
                      "expansions.noisy.runtime.io_threads": {"choice": [1, 2]}}}
    found = problems_of(raw)

    assert [line.partition(": ")[0] for line in found] == [f"space.{field}" for field in raw["space"]]
    for line, said in zip(found, ("did you mean 'lr'?", "did you mean 'noisy'?", "magnitude 99 must be below bins 31",
                                  "did you mean 'recipe'?", "could not be compared", "decides nothing",
                                  "decides nothing"), strict=True):
        assert said in line


@pytest.mark.parametrize(("changes", "said"), [
    ({"arm": "noisi"}, "arm: 'noisi' is no arm of the study; did you mean 'noisy'?"),
    ({"hold_out": None}, "score_on: there are no validation images"),
    ({"score_on": "test"}, "hold_out: has no effect"),
    ({"samples": None}, "samples: is required"),
    ({"search": "grid"}, "samples: search grid tries every point once"),
    ({"search": "optuna", "space": {LR: {"grid": [0.1, 0.2]}}}, "write choice instead of grid"),
    ({"search": "grid", "samples": None, "space": {LR: {"uniform": [0.1, 0.2]}}}, "search: a grid needs every field"),
    ({"scheduler": {"asha": {"grace": 2}}}, "none is stopped before 2"),
    ({"scheduler": "asha", "space": {"recipe.epochs": {"choice": [2, 3]}}}, "cannot be swept"),
    ({"scheduler": {"asha": {"graze": 2}}}, "did you mean 'grace'?"), ({"sampels": 3}, "did you mean 'samples'?"),
    ({"search": "bayes"}, "search"), ({"study": 3}, "study: must be a section"), ({"space": 3}, "space: must be"),
    ({"space": {"arms.noisy": {"choice": [1, 2]}}}, "is a whole arm; name one of its fields"),
    ({"space": {"recipe.batch": {"uniform": [2, 8]}}}, "space.recipe.batch: Input should be a valid integer"),
    ({"space": {"arms.noisy.ratio": {"choice": [1, [1, 2]]}}}, "a list of ratios is several arms")])
def test_a_sweep_that_cannot_be(raw: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    assert any(said in line for line in problems_of({**raw, **changes})), problems_of({**raw, **changes})


def test_mistakes_of_the_space_stand_beside_all_others(raw: dict[str, Any]) -> None:
    space = {LR: {"uniform": [0.2, 0.1]}, "recipe.lrr": {"choice": [1, 2]}}
    for changes, said in (({"samples": 0}, "samples: "), ({"samples": None}, "samples: is required")):
        found = problems_of({**raw, "space": space, **changes})
        assert any(line.startswith(said) for line in found)
        assert any("low must be below high" in line for line in found)
    assert any("did you mean 'lr'?" in line for line in found)


def test_mistakes_of_the_study_are_those_of_train(raw: dict[str, Any]) -> None:
    raw["study"]["recipe"]["lrr"] = 1
    raw["study"]["arms"][1]["ratio"] = [1, 2]
    for more in ({"samples": 0}, {"arm": "noisi"}):
        found = problems_of({**raw, **more})
        assert any("study.recipe.lrr: unknown field, did you mean 'lr'?" in line for line in found)
        assert any(line.startswith(next(iter(more))) for line in found), "all at once"
    del raw["study"]["recipe"]["lrr"]
    assert any("several ratios" in line for line in problems_of(raw))
    raw["study"]["expansions"] = {name: {**one, "rounds": {"count": 2}} for name, one in raw["study"][
        "expansions"].items()}
    assert any(".rounds: a sweep makes each expansion in one run" in line for line in problems_of(raw))


def test_the_study_may_be_a_file(raw: dict[str, Any], tmp_path: Path, make: Make) -> None:
    file, study = tmp_path / "sweep.yaml", tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"name": "other", "out": "elsewhere", **raw["study"]}))
    file.write_text(yaml.safe_dump({**raw, "study": str(study)}))

    assert load_sweep(file) == make()
    assert load_sweep(file, ["seed=3"]).seed == 3


def test_what_is_the_same_trial_and_the_same_pilot(make: Make) -> None:
    config = make(space={LR: {"choice": [0.01, 0.001]}, STRENGTH: {"choice": [3, 9]}})
    sweep = open_sweep(config)
    key = {values: candidate(sweep, 0, dict(zip((LR, STRENGTH), values, strict=True))).key
           for values in ((0.01, 3), (0.001, 3), (0.01, 9))}

    assert len(set(key.values())) == 3
    assert candidate(sweep, 7, {STRENGTH: 3, LR: 0.01}).key == key[0.01, 3], "neither number nor order counts"
    pilots = {values: next(iter(sweep_trial._with_pilots(sweep, prepare_study(candidate(sweep, 0, dict(
        zip((LR, STRENGTH), values, strict=True))).study)).expansions.values())).folder for values in key}
    assert pilots[0.01, 3] == pilots[0.001, 3] != pilots[0.01, 9]


def test_held_out_images_train_nobody(make: Make) -> None:
    sweep = open_sweep(make())
    ids = Path(sweep.config.folder) / "ids"
    held, kept = ((ids / f"{name}.txt").read_text().split() for name in ("validation", "data"))

    assert (len(held), len({name[:3] for name in held}), len(kept)) == (4, 4, 12)
    assert not set(held) & set(kept)
    study = candidate(sweep, 0, {LR: 0.01}).study
    assert Path(study.test.ids or "").name == "validation.txt"
    assert Path(study.data.ids or "").name == "data.txt"


def test_a_sweep_and_the_best_once_more(make: Make) -> None:
    config = make(space={LR: {"choice": [0.03, 0.0001]}, STRENGTH: {"choice": [3, 9]}}, search="grid", samples=None)
    search = Search(open_sweep(config))
    test = run_here(search)
    found = write_sweep_report(search.sweep, search.failed)
    folder = Path(config.folder)
    trials = read_results(search.sweep.files)

    assert (len(trials), search.failed) == (4, [])
    assert sorted(one["rows_made"] for one in trials.values()) == [0, 0, 8, 8], "two learning rates share a pilot"
    assert len(list((folder / "pilots").iterdir())) == 2
    best = best_of(trials)
    assert best is not None
    assert best["score"] == max(one["score"] for one in trials.values())
    assert [point["epoch"] for point in best["curve"]] == [1, 2]
    study = next((folder / "studies" / best["key"] / "predictions").iterdir())
    assert _trained(folder / "best.yaml") == (best["scores"], pq.read_table(study))
    assert test is not None
    assert found["test_score"] == test["score"]
    scored = json.loads((folder / f"studies/{best['key']}-test/study.json").read_text())["config"]
    assert Path(scored["test"]["ids"]).name == "test.txt"
    assert {arm.name for arm in load_study(folder / "final.yaml").arms} == {"original", "noisy"}
    page = (folder / "report.html").read_text()
    assert f"{100 * best['score']:.2f} %" in page
    assert page.count("<svg") == 3, "one for each field, and one of both"
    assert "Selection on the test images" not in page


def _trained(file: Path) -> tuple[list[float], pa.Table]:
    """Scores and predictions of a study file trained in a folder of its own, from the expansion on."""
    from rayexpand.studies.trial import run_trial

    study = prepare_study(load_study(file, [f"out={file.parent}/again"]))
    for run in pending_runs(study):
        from rayexpand.runs import run as runs

        expander = runs.start(run)
        runs.drive(run, runs.in_process(expander), lambda run=run: runs.pending_jobs(run))  # type: ignore[misc]
        expander.close()
    trials = make_trials(study)
    scores = [run_trial(study.files, trial, study.config.training)["last"]["top1"] for trial in trials]
    return scores, pq.read_table(study.files.at(f"predictions/{trials[0].name}.parquet"))


@pytest.mark.parametrize("score_on", ["validation", "test"])
@pytest.mark.fast_cases(1)
def test_the_best_is_trained_again_with_fresh_seeds(make: Make, score_on: str) -> None:
    config = make(samples=2, fresh_seeds=2, seeds=[0, 4], score_on=score_on,
                  hold_out=1 if score_on == "validation" else None)
    search = Search(open_sweep(config))
    test = run_here(search)
    found = write_sweep_report(search.sweep)
    page = (Path(config.folder) / "report.html").read_text()

    assert test is not None
    assert test["seeds"] == [5, 6]
    assert len(test["chosen_by"]) == len(test["scores"]) == 2
    assert found["fresh"]["scores"] == test["chosen_by"]
    assert (found["test_score"] is None) == (score_on == "test")
    words = f"rained again with fresh seeds 5, 6: {100 * found['fresh']['spread']['mean']:.2f}"
    assert any(words in line for line in found["words"])
    assert words in page
    said = "winner's inflation: of 2 equal configurations the best looks 0.56 standard errors"
    assert any(said in line for line in found["words"])
    again = Search(open_sweep(make(samples=2, fresh_seeds=2, seeds=[0, 4], score_on=score_on,
                                   hold_out=1 if score_on == "validation" else None)))
    assert again.is_over
    assert not Search(open_sweep(config.model_copy(update={"fresh_seeds": 3}))).is_over, "other seeds are asked for"


def test_a_sweep_of_before_fresh_seeds_goes_on(make: Make) -> None:
    """Neither its digest nor its score on the test images is another one."""
    config = make(samples=1)
    sweep = open_sweep(config)
    run_here(Search(sweep))
    folder = Path(config.folder)
    rewrite_json(folder / "sweep.json", lambda facts: facts["config"].pop("fresh_seeds"), "sweep.json")
    rewrite_json(folder / "test.json", lambda facts: facts.pop("seeds"), "test.json")
    before = (folder / "test.json").read_bytes()

    assert Search(open_sweep(config.model_copy(update={"fresh_seeds": 3}))).is_over
    assert (folder / "test.json").read_bytes() == before


def test_choosing_by_the_test_images_is_said(make: Make) -> None:
    config = make(score_on="test", hold_out=None, samples=1)
    search = Search(open_sweep(config))
    test = run_here(search)
    found = write_sweep_report(search.sweep)

    assert test is None
    assert any("chosen by the test images" in line for line in found["words"])
    assert "Selection on the test images" in (Path(config.folder) / "report.html").read_text()


def test_a_killed_sweep_goes_on(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    space = {LR: {"uniform": [0.001, 0.02]}}
    calm = Search(open_sweep(make(space=space, samples=3, seeds=[0, 1], name="calm")))
    run_here(calm)
    config = make(space=space, samples=3, seeds=[0, 1])
    heard: list[tuple[int, float]] = []

    def dies(self: Search, key: str, epoch: int, score: float, started: float = 0.0) -> None:
        heard.append((epoch, score))
        if len(heard) == 3:  # after the first epoch of the second trial
            raise Interrupted("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Search, "heard", dies)
        with pytest.raises(Interrupted):
            run_here(Search(open_sweep(config)))
    trials = Path(config.folder) / "trials"
    before = {path: path.stat() for path in trials.iterdir()}
    assert len(before) == 1
    updates = _counted(monkeypatch)
    resumed = Search(open_sweep(config))
    assert resumed.decided == 1
    run_here(resumed)

    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in before} \
        == {path: (was.st_mtime_ns, was.st_ino) for path, was in before.items()}
    assert len(updates) == 2 * 2 + 2 * 4 + 2 * 4, "half of the second trial, the third, the best on the test images"
    assert [(one["values"], one["curve"]) for one in resumed.results.values()] \
        == [(one["values"], one["curve"]) for one in calm.results.values()]


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from rayexpand.classifier.classifier import Classifier

    updates: list[int] = []
    update = Classifier.update
    monkeypatch.setattr(Classifier, "update", lambda self, batch: (updates.append(batch.step), update(self, batch))[1])
    return updates


def test_a_stopped_trial_is_over(make: Make) -> None:
    config = make(scheduler="asha", samples=3, space={LR: {"uniform": [0.001, 0.1]}})
    search = Search(open_sweep(config))
    first = search.next()
    assert first is not None
    search.heard(first.key, 1, 0.25, 5.0)
    checkpoint = Path(config.folder) / f"studies/{first.key}/checkpoints/noisy-s0.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    stopped = search.ended(first.key)

    assert stopped is not None
    assert (stopped["state"], stopped["score"], stopped["epochs"], stopped["of_epochs"]) == ("stopped", 0.25, 1, 2)
    assert not checkpoint.exists()
    assert best_of(search.results) is None, "it has no score after the last epoch"
    again = Search(open_sweep(config))
    assert [found.number for found in iter(again.next, None)] == [1, 2]


def test_a_configuration_that_fails_is_tried_again(make: Make) -> None:
    config = make(samples=2, space={LR: {"uniform": [0.001, 0.1]}})
    search = Search(open_sweep(config))
    first = search.next()
    assert first is not None
    assert search.ended(first.key, "more rows failed than allowed") is None

    assert search.failed == [f"{describe(first.values)}: more rows failed than allowed"]
    again = Search(open_sweep(config)).next()
    assert again is not None
    assert again.values == first.values


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_configuration_that_diverges_is_scored_worst_and_not_tried_again(make: Make, raw: dict[str, Any],
                                                                           search: str) -> None:
    raw["study"]["recipe"] |= {"optimiser": "sgd", "updates": 8}
    config = make(samples=6, search=search, space={LR: {"choice": [1e20, 0.01]}})
    ran = Search(open_sweep(config))
    run_here(ran)
    wild, tame = sorted(read_results(ran.sweep.files).values(), key=lambda one: -one["values"][LR])

    assert ran.failed == []
    assert (wild["state"], wild["score"], wild["curve"][-1]) == ("diverged", 0.0, {"epoch": 2, "score": 0.0})
    assert "diverged" in wild["problem"]
    page = Path(write_sweep_report(ran.sweep)["report"]).read_text()
    assert page.count("<td>diverged</td>") == 1
    assert (best_of(ran.results) or {})["key"] == tame["key"]
    again = Search(open_sweep(config))
    assert (list(iter(again.next, None)), again.is_over) == ([], True)


def test_equal_configurations_are_one_trial(make: Make) -> None:
    search = Search(open_sweep(make(samples=12)))
    found = list(iter(search.next, None))

    assert len(found) == 2
    assert len({one.key for one in found}) == 2


def test_another_sweep_in_the_same_folder_is_refused(make: Make) -> None:
    open_sweep(make())
    open_sweep(make(samples=9, cpus_per_trial=0.5, max_concurrent=2))
    with pytest.raises(DigestMismatch, match="metric: 'top1' -> 'top5'"):
        open_sweep(make(metric="top5"))


def test_extra_tests_play_no_part_whatever_their_key_is_called(make: Make, raw: dict[str, Any]) -> None:
    study, more = raw["study"], {"pool": {"data": {"source": "digits", "split": "pool"}}}
    open_sweep(make(study={**study, "also": more}))
    open_sweep(make(study={**study, "extra_tests": more}))


def test_too_few_images_to_hold_out(make: Make) -> None:
    with pytest.raises(UsageError, match="9 images of each class"):
        open_sweep(make(hold_out=9))


@pytest.mark.parametrize("held", [True, False])
def test_a_pilot_whose_lock_is_held_is_made_all_the_same(make: Make, raw: dict[str, Any], held: bool) -> None:
    """An owner that hangs holds its lock for ever; one that died does not."""
    raw["study"]["expansions"]["noisy"]["limits"] = {"first_deadline_s": 0.2}
    sweep = open_sweep(parse_sweep(raw))
    study = sweep_trial._with_pilots(sweep, prepare_study(candidate(sweep, 0, {LR: 0.01}).study))
    pilot: Any = next(iter(study.expansions.values()))
    with sweep_trial._alone(pilot if held else pilot.model_copy(update={"name": "another"})):
        assert sweep_trial._expand(study)[0] == 8


def test_what_is_fitted_is_part_of_a_trial_and_of_its_pilot(raw: dict[str, Any],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    raw["study"]["expansions"]["guided"] = {
        "method": {"name": "distdiff", "ratio": 1, "steps": 4, "strength": 0.5, "guide_step": 2},
        "prior": {"weights": "digits"},
        "fit": {"groups": 1, "guide": {"kind": "random"}}}
    raw["study"]["arms"].append({"name": "guided", "use": "guided"})
    config = parse_sweep({**raw, "arm": "guided", "score_on": "test", "hold_out": None,
                          "space": {"expansions.guided.fit.groups": {"choice": [1, 2]},
                                    "expansions.guided.fit.guide.kind": {"choice": ["random", "classifier"]}}})
    monkeypatch.setattr("rayexpand.runs.run.prior_hash", lambda weights, progress: "prior")
    sweep = open_sweep(config)
    fitted: list[Any] = []

    def pending(study: Any) -> list[Any]:
        fitted.extend(study.config.expansions[name].fit for name, _ in study.expansions)
        return []

    monkeypatch.setattr(sweep_trial, "pending_runs", pending)
    pilots = set()
    for groups, kind in ((1, "random"), (2, "random"), (1, "classifier")):
        found = candidate(sweep, 0, {"expansions.guided.fit.groups": groups, "expansions.guided.fit.guide.kind": kind})
        study = sweep_trial._with_pilots(sweep, prepare_study(found.study))
        pilots |= {one.folder for one in study.expansions.values() if not isinstance(one, str)}
        assert sweep_trial._expand(study)[0] == 0
        wanted = fitted.pop()
        assert wanted.guide is not None
        assert (wanted.groups, wanted.guide.kind) == (groups, kind)

    assert len(pilots) == 3
    assert json.loads((Path(config.folder) / "sweep.json").read_text())["models"] == {"guided": {"prior": "prior"}}
