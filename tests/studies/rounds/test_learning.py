"""Rounds that are dealt, guided or ended by what classifiers make of the samples before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayexpand.contract.errors import ConfigError, DamagedFile, DigestMismatch, UsageError
from rayexpand.runs import run as runs
from rayexpand.runs.allocation import allocated, weights_of
from rayexpand.storage.tables import read_table
from rayexpand.studies.rounds.config import LoopConfig, RoundsConfig
from rayexpand.studies.rounds.decisions import read_dealt, seen_of, unseen
from rayexpand.studies.rounds.learning import Learning
from rayexpand.studies.rounds.loop import drive_loop, open_loop
from rayexpand.studies.rounds.verify import verify_loop
from rayexpand.studies.train import train_with
from tests.conftest import small_run
from tests.studies.rounds.conftest import finished, in_this_process, rounds_of, union
from tests.studies.test_study import SMALL

SCORES = {"folds": 2, "recipe": SMALL}
LOSS = {"count": 2, "rule": "loss", "scores": SCORES, "cap": 7}
LONGER = {"folds": 2, "recipe": {**SMALL, "updates": 40, "batch": 20}}  # enough for seeds to differ
TEST = {"source": "digits", "split": "test", "per_class": 3}


def digits_loop(out: Path, name: str = "loop", method: str = "Fake", rounds: dict[str, Any] = LOSS,
                **fields: Any) -> LoopConfig:
    run = small_run(Path(), out, method, name=name, **{"data": {"source": "digits", "per_class": 2}, "ratio": 6,
                                                       "shard_images": 20, **fields})
    return LoopConfig(run=run, rounds=RoundsConfig(**rounds))


@pytest.fixture(scope="module")
def by_loss(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return finished(digits_loop(tmp_path_factory.mktemp("loss"), rounds={**LOSS, "scores": LONGER}))


def test_round_two_is_dealt_by_the_scores_of_what_round_one_made(by_loss: Any) -> None:
    loop, _ = by_loss
    first, second, _ = loop.chain()
    table = read_table(loop.files, "scores/0002.parquet")

    assert (first.scores, list(second.scores)) == ({}, ["scores/0002.parquet"])
    assert read_dealt(loop.files, first)["copies"].to_pylist() == [3] * 20
    dealt = read_dealt(loop.files, second)
    section = RoundsConfig(**LOSS).allocate
    weight = weights_of(section, loop.index, loop.base_N, loop.rng, table)
    np.testing.assert_allclose(dealt["weight"].to_numpy(), weight)
    np.testing.assert_allclose(weight, 6 * table["loss"].to_numpy())
    copies = allocated(section, loop.index, loop.base_N, weight, loop.rng, 60, np.full(20, 3, np.uint16))
    assert dealt["copies"].to_pylist() == copies.tolist()
    assert copies.sum() == 60
    assert copies.min() < copies.max() == 4, "cap 7, and every seed has three"
    assert json.loads(table.schema.metadata[b"scores"])["seen"] == [vars(one) for one in second.seen]
    assert len(union(loop)) == 120


def test_a_seed_that_cannot_be_read_is_not_scored_and_stops_no_loop(image_folder: Path, tmp_path: Path) -> None:
    """Listing looks at its header alone."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    broken = sorted(images.rglob("*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:-40])
    run = small_run(images, tmp_path / "out", "Fake", name="loop", ratio=6)
    run = run.model_copy(update={"limits": run.limits.model_copy(update={"max_failed": 0.5})})
    loop, end = finished(LoopConfig(run=run, rounds=RoundsConfig(**LOSS)))

    scored = read_table(loop.files, "scores/0002.parquet")["seed_id"].to_pylist()
    lost = [one for one in loop.index.seed_ids if one == str(broken.relative_to(images))]
    assert (end.state, len(lost)) == ("stop", 1)
    assert sorted(scored) == sorted(set(loop.index.seed_ids) - set(lost))


def test_a_round_that_is_decided_is_never_scored_again(by_loss: Any) -> None:
    loop, end = by_loss
    for folder in ("scores", "results", "predictions", "trials", "lists"):
        shutil.move(loop.files.at(folder), loop.files.at(f"{folder}-away"))
    try:
        again = finished(loop.config)
    finally:
        for folder in ("scores", "results", "predictions", "trials", "lists"):
            shutil.rmtree(loop.files.at(folder), ignore_errors=True)
            shutil.move(loop.files.at(f"{folder}-away"), loop.files.at(folder))
    assert again[1] == end


@pytest.mark.parametrize("rounds", [
    {"rule": "confidence"}, {"rule": "entropy", "floor": 0.5}, {"rule": "margin", "share": 0.4},
    {"rule": "slow", "share": 0.4, "per": "all"}, {"rule": "class"}, {"rule": "loss", "permuted": True}])
def test_every_rule_deals_by_the_same_scores(by_loss: Any, rounds: dict[str, Any], tmp_path: Path) -> None:
    """Their scores are those of the loop above: the samples of round 1 are the same."""
    loop, _ = by_loss
    config = digits_loop(tmp_path, rounds={**LOSS, "cap": None, **rounds})
    table = read_table(loop.files, "scores/0002.parquet")

    class Known(Learning):
        def __call__(self, *given: Any) -> Any:
            from rayexpand.studies.rounds.loop import Learned

            return Learned(table, seen=given[-1])

    mine = open_loop(config)
    drive_loop(mine, Known(train_with(lambda *_: None)), in_this_process)
    dealt = read_dealt(mine.files, mine.chain()[1])
    copies = dealt["copies"].to_numpy()
    assert copies.sum() == 60
    assert len(set(dealt["weight"].to_pylist())) > 1
    if rounds["rule"] in ("margin", "slow"):
        assert np.count_nonzero(copies) == (10 if rounds["rule"] == "margin" else 8)
    if rounds.get("permuted"):
        weight = read_dealt(loop.files, loop.chain()[1])["weight"].to_numpy()
        assert sorted(dealt["weight"].to_pylist()) == sorted(weight.tolist())
        assert dealt["weight"].to_pylist() != weight.tolist()


def test_what_a_retry_makes_later_is_counted_as_unseen_and_seen_by_later_decisions(tmp_path: Path) -> None:
    config = digits_loop(tmp_path, method="Failing", nan="train/0000/0", rounds={**LOSS, "count": 3}, ratio=3)
    seeds = open_loop(config).index.seed_ids
    config = digits_loop(tmp_path, method="Failing", nan=f"{seeds[3]}/0", rounds={**LOSS, "count": 3}, ratio=3,
                         name="failing")
    loop, end = finished(config)
    run = rounds_of(loop)[0]
    assert run.totals().failed == 1
    with pytest.MonkeyPatch.context() as patch:
        from tests.methods import fakes

        patch.setattr(fakes.Failing, "expand", fakes.Fake.expand)
        expander = runs.start(run)
        runs.drive(run, runs.in_process(expander), runs.retry_jobs(run), to_the_end=True)
        expander.close()
    assert run.totals().failed == 0
    second = loop.chain()[1]
    assert (second.seen[0].kept, seen_of(run.store).kept, unseen(run.store, second.seen[0])) == (19, 20, 1)
    assert seen_of(run.store, second.seen[0].generations) == second.seen[0]
    assert finished(config)[1] == end, "decisions that are taken stay"


GUIDED = {"count": 2, "guided_from": 2, "guide": SMALL}


def test_guided_rounds_are_made_with_the_classifier_of_the_loop(tmp_path: Path) -> None:
    loop, _ = finished(digits_loop(tmp_path, method="Practised", rounds=GUIDED))
    first, second, _ = loop.chain()
    runs_ = rounds_of(loop)

    assert (first.guide, [one.facts["models"] for one in runs_]) == ({}, [{}, {"guide": second.guide["sha256"]}])
    assert ([one.config.method.omega for one in runs_], first.method["omega"], second.method["omega"]) == (
        [0.0, 4.0], 0.0, 4.0)
    assert second.guide["folder"].startswith("artifacts/classifier-")
    assert runs_[1].config.guide.weights == str(loop.files.at(second.guide["folder"]))
    result = json.loads(Path(loop.files.at("results/r0002-guide.json")).read_text())
    assert (result["real_rows"], result["synthetic_rows"]) == (20, 60)
    plain, _ = finished(digits_loop(tmp_path, "plain", method="Practised", rounds={"count": 2}, omega=0.0))
    mine, others = union(loop), union(plain)
    differ = {one for one in mine if mine[one]["image"] != others[one]["image"]}
    assert differ == {f"{seed}/{copy}" for seed in loop.index.seed_ids for copy in (3, 4, 5)}, "round 1 is unguided"

    folder = Path(loop.files.at(second.guide["folder"]))
    shutil.move(folder, folder.with_name("away"))
    with pytest.raises(UsageError, match=r"is gone, and decisions/0002\.json names it"):
        finished(loop.config)
    shutil.copytree(folder.with_name("away"), folder)
    (folder / "artifact.json").unlink()
    (folder / "guide.json").write_text((folder / "guide.json").read_text() + " ")
    with pytest.raises(DigestMismatch, match="is not the guide"):
        finished(loop.config)


def test_a_loop_ends_where_rounds_bring_nothing(tmp_path: Path) -> None:
    rounds = {"count": 4, "scores": SCORES, "stop": {"min_gain": 100.0, "patience": 2}}
    loop, end = finished(digits_loop(tmp_path, rounds=rounds, ratio=4))

    assert (end.round, end.state, end.spent, end.left) == (4, "stop", 60, 20)
    assert end.reason.startswith("no gain: ")
    assert end.reason.endswith("below min_gain 100 for 2 rounds; 20 of 80 samples are not spent")
    assert [one.gain.get("below") for one in loop.chain()] == [None, 0, 1, 2]
    for decision, before in zip(loop.chain()[2:], loop.chain()[1:], strict=False):
        tables = [read_table(loop.files, f"scores/{one.round:04d}.parquet") for one in (before, decision)]
        right = [one["margin"].to_numpy() > 0 for one in tables]
        assert decision.gain["accuracy"] == pytest.approx(100 * right[1].mean())
    assert end.gain["low"] <= end.gain["mean"] <= end.gain["high"] < 100


def test_a_loop_is_compared_on_validation_images_that_it_has_not_seen(tmp_path: Path) -> None:
    rounds = {"count": 3, "validation": TEST, "stop": {"on": "validation", "min_gain": -100.0}, "guide": SMALL}
    loop, end = finished(digits_loop(tmp_path, rounds=rounds, ratio=3))

    assert end.reason == "budget: the last share is spent"
    assert [one.gain.get("images") for one in loop.chain()] == [None, 30, 30, None]
    assert list(loop.chain()[2].scores) == ["scores/0003-validation.parquet"]
    assert verify_loop(loop.config.folder).problems == []
    table = read_table(loop.files, "scores/0003-validation.parquet")
    said = json.loads(Path(loop.files.at("results/r0003-guide.json")).read_text())
    assert (table["margin"].to_numpy() > 0).mean() == pytest.approx(said["last"]["top1"])


@pytest.mark.parametrize(("validation", "said"), [
    ({"source": "digits", "per_class": 5}, "20 of its images are those of run.data"),
    ({"source": "digits", "path": "x"}, "rounds.validation")])
def test_validation_images_that_are_trained_on_are_refused(tmp_path: Path, validation: dict[str, Any],
                                                           said: str) -> None:
    rounds = {"count": 2, "validation": validation, "stop": {"on": "validation"}, "guide": SMALL}
    with pytest.raises((UsageError, ConfigError), match=said):
        open_loop(digits_loop(tmp_path, rounds=rounds))
    assert not (tmp_path / "loop").exists()


def test_what_keeps_classifiers_from_being_trained_is_said_before_the_first_round(tmp_path: Path) -> None:
    wrong = {**SMALL, "backbone_args": {"nothing": 1}}
    with pytest.raises(ConfigError, match="backbone"):
        open_loop(digits_loop(tmp_path, rounds={**LOSS, "scores": {**SCORES, "recipe": wrong}}))
    with pytest.raises(UsageError, match="group"):
        open_loop(digits_loop(tmp_path, rounds={**LOSS, "scores": {**SCORES, "group": str(tmp_path / "no.csv")}}))
    with pytest.raises(UsageError, match="no class has two images"):
        open_loop(digits_loop(tmp_path, data={"source": "digits", "per_class": 1}))
    assert not (tmp_path / "loop").exists()


def test_scores_that_were_changed_are_not_dealt_by(tmp_path: Path) -> None:
    config = digits_loop(tmp_path)
    loop, _ = finished(config)
    place = Path(loop.files.at("scores/0002.parquet"))
    for name in ("decisions/0002.json", "decisions/0003.json"):
        Path(loop.files.at(name)).unlink()
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(bytes(content))
    with pytest.raises(DamagedFile, match=r"scores/0002\.parquet"):
        finished(config)


def test_a_round_may_deal_to_seeds_of_one_fold_alone(tmp_path: Path) -> None:
    rounds = {**LOSS, "count": 3, "shares": [1, 18, 1]}
    loop, _ = finished(digits_loop(tmp_path, rounds=rounds, ratio=1))
    assert [one.planned for one in loop.chain()] == [1, 18, 1, 0]
    assert pa.compute.sum(read_dealt(loop.files, loop.chain()[0])["copies"]).as_py() == 1
