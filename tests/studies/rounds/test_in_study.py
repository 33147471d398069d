"""Rounds in a study: what stands beside a loop is as many samples, made otherwise."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.runs.run import Run, open_run
from rayexpand.runs.selections import read_selection
from rayexpand.runs.status import class_counts, view_run
from rayexpand.storage.tables import read_json
from rayexpand.studies.config import parse_study
from rayexpand.studies.expansions import pending_loops, pending_runs
from rayexpand.studies.parts import Study, Trial
from rayexpand.studies.plan import plan_study
from rayexpand.studies.rounds.controls import Beside
from rayexpand.studies.rounds.decisions import read_dealt
from rayexpand.studies.rounds.in_study import beside_of, control_runs, pending_controls, prune
from rayexpand.studies.rounds.learning import Learning
from rayexpand.studies.rounds.loop import drive_loop
from rayexpand.studies.status import read_study_status
from rayexpand.studies.study import prepare_study
from rayexpand.studies.train import train_with
from rayexpand.studies.trials import arms_of, make_trials
from rayexpand.studies.verify import verify_study
from tests.methods.fakes import Fake
from tests.studies.rounds.conftest import in_this_process
from tests.studies.test_study import SMALL, raw_study

FAKES = Fake.__module__
SCORES = {"folds": 2, "recipe": SMALL}
SAMPLER = {"batch": 8, "shard_images": 20}
HARD = {"method": {"name": f"{FAKES}.Fake", "ratio": 3}, "sampler": SAMPLER,
           "rounds": {"count": 3, "rule": "margin", "share": 0.4, "scores": SCORES}}
GUIDED = {"method": {"name": f"{FAKES}.Practised", "ratio": 3}, "sampler": SAMPLER,
          "rounds": {"count": 3, "guided_from": 2, "guide": SMALL}}
COUNTS = {"kind": "counts", "counts": [4, 3, 2, 2, 2, 2, 2, 2, 2, 2]}


def raw_rounds(out: Path, **changes: Any) -> dict[str, Any]:
    return raw_study(out, **{
        "subset": COUNTS, "seeds": [0], "expansions": {"hard": HARD, "guided": GUIDED},
        "arms": [{"name": "original"}, {"name": "hard", "use": "hard", "rounds": [1, 3]},
                 {"name": "guided", "use": "guided"}], **changes})


def with_loops(raw: dict[str, Any]) -> Study:
    """The study with its loops made in this process."""
    study = prepare_study(parse_study(raw))
    for loop in pending_loops(study):
        drive_loop(loop, Learning(train_with(lambda *_: None)), in_this_process)
    return study


def made(raw: dict[str, Any]) -> Study:
    """The same with all samples."""
    study = with_loops(raw)
    for run in (*pending_runs(study), *pending_controls(study, arms_of(study.config))):
        in_this_process(run)
    prune(study, arms_of(study.config))
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return made(raw_rounds(tmp_path_factory.mktemp("rounds")))


@pytest.fixture(scope="module")
def trials(study: Study) -> dict[tuple[str, int], Trial]:
    return {(one.arm, one.seed): one for one in make_trials(study)}


def beside(study: Study, name: str, seed: int = 0) -> Beside:
    loop = study.expansions[name, seed]
    assert not isinstance(loop, str)
    return beside_of(study, name, loop)  # type: ignore[arg-type]


def remade(study: Study, called: str) -> list[Run]:
    """The runs of a control for seed 0, in the order of their rounds."""
    return [open_run(str(study.files.at(f"runs/{name}"))) for name in sorted(study.files.list("runs"))
            if re.fullmatch(rf"\w+-0-{called}-\d+", name)]


def test_what_stands_beside_each_loop(trials: dict[tuple[str, int], Trial]) -> None:
    arms = {arm for arm, _ in trials}
    assert arms == {"original", "original repeated 2x", "original repeated 4x", "hard round 1", "hard round 3",
                    "guided", "one-shot equal per class 1x", "one-shot uniform 3x", "one-shot equal per class 3x",
                    "random targets for hard round 3", "one-shot uniform for guided",
                    "one-shot equal per class for guided", "random direction for guided",
                    "over-sampled and pruned for guided"}
    assert trials["guided", 0].rounds["controls"] == {
        "uniform": "one-shot uniform for guided", "classes": "one-shot equal per class for guided",
        "direction": "random direction for guided", "pruned": "over-sampled and pruned for guided"}
    assert trials["hard round 1", 0].rounds["controls"] == {"classes": "one-shot equal per class 1x"}, (
        "round 1 of a rule that reads scores is what the method plans")
    assert trials["random targets for hard round 3", 0].control_of == "hard round 3"
    spent = {one.ratio for (arm, _), one in trials.items() if any(word in arm for word in ("3x", "guided", "round 3"))}
    assert spent == {3.0}


def test_a_curve_over_rounds_is_nested_and_counts_budgets(study: Study, trials: dict[tuple[str, int], Trial]) -> None:
    one, three = trials["hard round 1", 0], trials["hard round 3", 0]
    assert ([Path(run).name for run in three.runs], one.run) == (["0001", "0002", "0003"], three.runs[0])
    facts = three.rounds["loops"][0]
    assert (facts["rounds"], facts["spent"], facts["planned"], facts["stopped"]) == (3, 69, 69, False)
    assert (one.rounds["loops"][0]["spent"], one.rounds["loops"][0]["ended"]) == (23, "")
    assert facts["ended"].startswith("budget")


def test_one_shot_controls_have_as_many_samples_dealt_otherwise(study: Study) -> None:
    hard = beside(study, "hard")
    for used in (1, 2, 3):
        (uniform,), (classes,) = hard.rows("uniform", used), hard.rows("classes", used)
        assert isinstance(uniform.copies, np.ndarray)
        assert isinstance(classes.copies, np.ndarray)
        assert uniform.copies.sum() == classes.copies.sum() == hard.spent(used) == 23 * used
        assert np.ptp(uniform.copies) <= 1
        per_class = np.bincount(hard.loop.index.labels, classes.copies)
        assert np.ptp(per_class) <= 2
    assert open_run(str(uniform.run)).totals().kept == 69
    guided = open_run(str(beside(study, "guided").rows("uniform", None)[0].run))
    assert guided.config.method.omega == 0
    assert "guide" not in guided.facts["models"]


def test_random_targets_keep_the_counts_and_change_who_has_them(study: Study) -> None:
    hard, (second, third) = beside(study, "hard"), remade(study, "random-targets")
    index, first = hard.loop.index, read_dealt(hard.loop.files, hard.decisions[0])["copies"].to_numpy()
    dealt = [read_dealt(hard.loop.files, one)["copies"].to_numpy() for one in hard.decisions[1:]]
    moved = {tuple(pair) for pair in zip(*dealt, strict=True)}
    for run, own in ((second, dealt[0]), (third, dealt[1])):
        assert Counter(run.plan.copies.tolist()) == Counter(own.tolist())
        assert not np.array_equal(run.plan.copies, own)
    assert {tuple(pair) for pair in zip(second.plan.copies, third.plan.copies, strict=True)} == moved, "one permutation"
    np.testing.assert_array_equal(second.plan.first, first)
    np.testing.assert_array_equal(third.plan.first, first + second.plan.copies)
    key = hard.loop.rng.per_seed("permute", index.seed_ids)
    np.testing.assert_array_equal(second.plan.copies[np.argsort(key)], dealt[0])
    assert [one.run for one in hard.rows("targets", 3)][1:] == [str(second.folder), str(third.folder)]
    assert hard.rows("targets", 3)[0].run == hard.rows("", 3)[0].run


def test_random_directions_are_the_guided_rounds_once_more(study: Study) -> None:
    guided = beside(study, "guided")
    for run, own in zip(remade(study, "random-direction"), guided.rows("", None)[1:], strict=True):
        twin = open_run(str(own.run))
        np.testing.assert_array_equal(run.plan.copies, twin.plan.copies)
        np.testing.assert_array_equal(run.plan.first, twin.plan.first)
        assert run.facts["models"]["guide"] == twin.facts["models"]["guide"]
        assert (run.config.method.direction, twin.config.method.direction) == ("random", "gradient")
        assert run.config.method.omega == twin.config.method.omega > 0


def test_pools_are_unguided_and_as_many_of_each_class_stay(study: Study) -> None:
    guided, pools = beside(study, "guided"), remade(study, "pool")
    numbers = set[tuple[int, int]]()
    for pool, own, source in zip(pools, guided.rows("", None)[1:], guided.rows("pruned", None)[1:], strict=True):
        assert (pool.plan.planned, pool.config.method.omega) == (round(2.5 * 23), 0)
        for seed, (first, copies) in enumerate(zip(pool.plan.first, pool.plan.copies, strict=True)):
            fresh = {(seed, copy) for copy in range(first, first + copies)}
            assert not numbers & fresh, "rounds share no sample"
            numbers |= fresh
        assert (source.run, source.selection) == (str(pool.folder), "pruned")
        stays = np.zeros(10, np.int64)
        for receipt in pool.store.receipts():
            table = pool.store.data(receipt, ["sample_id", "label"])
            kept = read_selection(pool, "pruned").keeps(table["sample_id"])
            stays += np.bincount(table["label"].filter(pa.chunked_array([kept])).to_numpy(), minlength=10)
        np.testing.assert_array_equal(stays, class_counts(view_run(str(own.run))))
        assert pc.sum(pa.array(stays)).as_py() == 23


def test_costs_are_those_of_who_needs_them(study: Study, trials: dict[tuple[str, int], Trial]) -> None:
    hard, guided = beside(study, "hard").seconds(None), beside(study, "guided").seconds(None)
    assert hard["scoring"] > 0 == hard["guide"]
    assert guided["guide"] > 0 == guided["scoring"]
    seconds = {arm: one.fitting_seconds for (arm, seed), one in trials.items() if seed == 0}
    assert seconds["hard round 3"] == pytest.approx(hard["scoring"])
    assert seconds["hard round 1"] == seconds["one-shot uniform 3x"] == seconds["random targets for hard round 3"] == 0
    for arm in ("guided", "random direction for guided", "over-sampled and pruned for guided"):
        assert seconds[arm] >= guided["guide"]
    assert seconds["one-shot uniform for guided"] == 0
    pool = sum(open_run(str(run.folder)).totals().kept for run in remade(study, "pool"))
    assert pool == 2 * round(2.5 * 23)
    assert trials["over-sampled and pruned for guided", 0].expansion_seconds > 0


def test_nothing_is_made_twice(study: Study) -> None:
    again = prepare_study(study.config)
    assert not [*pending_loops(again), *pending_controls(again, arms_of(study.config))]
    assert len({made.folder for made, _ in control_runs(again, arms_of(study.config))}) == len(
        control_runs(again, arms_of(study.config)))


def test_status_and_plan_know_loops(study: Study, trials: dict[tuple[str, int], Trial]) -> None:
    status = read_study_status(study.config.folder)
    words = {one.name: one.words for one in status.runs}
    assert words["hard-0, round 2"].startswith("23 of 23 decided")
    assert words["hard-0"].startswith("ended, budget")
    assert all(one.complete for one in status.runs)
    found = plan_study(study.config)
    assert (found.trainings, found.trainings + found.controls) == (4, len(trials))
    assert not [one for one in found.costs.stages if one.stage.name.startswith(("score", "guide"))], "they are done"


def test_the_plan_before_counts_what_is_then_made(tmp_path: Path, study: Study) -> None:
    found = plan_study(study.config.model_copy(update={"out": str(tmp_path)}))
    stages = {one.stage.name: one.stage.what for one in found.costs.stages}
    assert stages["expand hard"] == "69 images"
    assert (stages["expand guided"], stages["expand guided, guided"]) == ("23 images", "46 images")
    assert stages["expand over-sampled and pruned of guided"] == "115 images"
    assert "score seeds for round 3 of hard" in stages
    assert "guide of round 2 of guided" in stages
    assert "guide of round 1 of guided" not in stages
    assert found.trainings + found.controls == 14


def test_verify_repeats_what_controls_are_dealt(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not verify_study(study.config.folder).problems
    was = Beside._permuted

    def otherwise(self: Beside, decisions: Any) -> Any:
        for made, part in was(self, decisions):
            assert part is not None
            part.copies[:] = np.roll(part.copies, 1)
            yield made, part

    monkeypatch.setattr(Beside, "_permuted", otherwise)
    problems = verify_study(study.config.folder).problems
    assert len(problems) == 2
    assert all("random targets of hard-" in line for line in problems)


def test_a_loop_that_stops_is_compared_at_what_it_spent(tmp_path: Path) -> None:
    stop = {"on": "folds", "min_gain": 100.0}
    study = made(raw_rounds(tmp_path, expansions={
        "hard": {**HARD, "rounds": {**HARD["rounds"], "count": 3, "stop": stop}}},
        arms=[{"name": "original"}, {"name": "hard", "use": "hard"}]))
    trials = {one.arm: one for one in make_trials(study)}
    facts = trials["hard"].rounds["loops"][0]
    assert (facts["rounds"], facts["spent"], facts["planned"], facts["stopped"]) == (2, 46, 69, True)
    assert facts["ended"].startswith("no gain")
    controls = trials["hard"].rounds["controls"]
    assert {kind: trials[name].ratio for kind, name in controls.items()} == {
        "uniform": 2.0, "whole": 3.0, "classes": 2.0, "targets": 2.0}


@pytest.mark.slow
def test_what_an_expansion_fits_serves_its_rounds_and_their_controls(tmp_path: Path) -> None:
    method = {"name": "distdiff", "ratio": 2, "prompt": "a photo of a {name}", "strength": 0.5, "steps": 4,
              "guidance_scale": 2.0, "guide_step": 2}
    study = made(raw_rounds(tmp_path, expansions={
        "fitted": {"method": method, "sampler": SAMPLER, "fit": {}, "rounds": {"count": 2, "rule": "equal"}}},
        arms=[{"name": "original"}, {"name": "fitted", "use": "fitted"}]))
    trials = {one.arm: one for one in make_trials(study)}
    assert trials["fitted"].fitting_seconds == trials["one-shot uniform 2x"].fitting_seconds > 0
    artifacts = {open_run(run).config.artifacts["prototypes"] for one in trials.values() for run in (
        one.runs or [one.run]) if run}
    assert len(artifacts) == 1


@pytest.mark.parametrize(("changes", "said"), [
    ({"arms": [{"name": "a", "use": "hard", "rounds": 4}]}, "arms.a.rounds: 4 asked for, and hard has 1 to 3"),
    ({"arms": [{"name": "a", "use": "hard", "rounds": []}]}, "arms.a.rounds: [] must name rounds"),
    ({"arms": [{"name": "a", "use": "hard", "ratio": 2}]}, "arms.a.ratio: hard is made in rounds"),
    ({"arms": [{"name": "a", "use": "hard", "fill": True}]}, "arms.a.fill: is made of one run"),
    ({"arms": [{"name": "a", "use": "flips", "rounds": 1}]}, "arms.a.rounds: flips is not made in rounds"),
    ({"arms": [{"name": "a", "rounds": 1}]}, "arms.a: rounds need `use`"),
    ({"expansions": {"hard": {**HARD, "oversample": 3}}, "arms": [{"name": "a", "use": "hard"}]},
     "expansions.hard.oversample: has no effect without rounds.guided_from"),
    ({"expansions": {"hard": {**HARD, "rounds": {"guided_from": 2}}}, "arms": [{"name": "a", "use": "hard"}]},
     "expansions.hard.rounds.guided_from: "),
    ({"expansions": {"hard": {"run": "runs/x", "rounds": {}}}, "arms": [{"name": "a", "use": "hard"}]},
     "expansions.hard.rounds: has no effect on a run that exists"),
    ({"expansions": {"hard": {**HARD, "rounds": {"rule": "slow"}}}, "arms": [{"name": "a", "use": "hard"}]},
     "expansions.hard.rounds"),
])
def test_mistakes(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    flips = {"flips": {"method": {"name": "classical", "policy": "randaugment", "ratio": 3}}}
    raw = raw_rounds(tmp_path, **{"expansions": {"hard": HARD, **flips}, **changes})
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_study(raw)


@pytest.mark.parametrize(("data", "said"), [
    ({"source": "digits", "split": "test", "per_class": 2}, "test: .* images are validation images of the rounds"),
    ({"source": "digits", "per_class": 9}, r"expansions.hard.rounds.validation: .* are training images of seed 0")])
def test_images_that_stop_a_loop_are_neither_trained_nor_tested_on(tmp_path: Path, data: dict[str, Any],
                                                                    said: str) -> None:
    rounds = {**HARD["rounds"], "stop": {"on": "validation"}, "validation": data}
    raw = raw_rounds(tmp_path, expansions={"hard": {**HARD, "rounds": rounds}},
                     arms=[{"name": "original"}, {"name": "hard", "use": "hard"}])
    with pytest.raises(UsageError, match=said):
        prepare_study(parse_study(raw))


def test_arms_without_controls_make_none(study: Study, tmp_path: Path) -> None:
    config = parse_study(raw_rounds(tmp_path, arms=[{"name": "a", "use": "hard", "control": False}]))
    assert not control_runs(prepare_study(config), arms_of(config))
    written = read_json(study.files, "study.json")
    assert written is None or {Path(one["folder"]).name for one in written["runs"]} >= {"hard-0", "guided-0"}


def test_a_study_without_rounds_is_written_as_before() -> None:
    written = json.dumps(parse_study(raw_study("somewhere")).model_dump(mode="json"))
    assert "rounds" not in written
    assert "oversample" not in written
