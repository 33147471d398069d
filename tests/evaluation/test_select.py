"""The verb select, in process: every rule with the numbers of its specification, and what a decision promises."""

from __future__ import annotations

import io
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayexpand.contract.errors import ConfigError, DigestMismatch, Interrupted, UsageError
from rayexpand.contract.rng import PlanRng
from rayexpand.evaluation import select as select_module
from rayexpand.evaluation import select_samples, select_scores
from rayexpand.evaluation.select import load, parse, select
from rayexpand.evaluation.select_rules import REASONS, RULES, Decision, ScoredSamples, rank_in
from rayexpand.evaluation.select_scores import Chunk, ScoreJob, Scorer, contrast, in_process, sample_chunks, scores_of
from rayexpand.runs.config import GuideConfig
from rayexpand.runs.config import parse as parse_run
from rayexpand.runs.run import Run, open_run
from rayexpand.runs.selections import read_selection
from rayexpand.runs.store import Store
from rayexpand.storage.tables import parquet_bytes
from tests.commands import ROOT
from tests.conftest import MakeConfig, complete, hashes
from tests.runfolder import Builder
from tests.tiny import tiny_clip

TENTHS = np.arange(1, 11) / 10


def rows(n: int, label: Any = 0, seed: Any = 0, classes: int = 4, **scores: Any) -> ScoredSamples:
    label_N, seed_N = (np.broadcast_to(one, n).copy() for one in (label, seed))
    of_seed = {int(s): int(c) for s, c in zip(seed_N, label_N, strict=True)}
    seeds_K = np.bincount(list(of_seed.values()), minlength=classes)
    return ScoredSamples([f"s{s}/{i}" for i, s in enumerate(seed_N)], label_N, seed_N, seeds_K,
                         {name: np.asarray(values, np.float64) for name, values in scores.items()})


def decide(given: ScoredSamples, kind: str, **fields: Any) -> Decision:
    return RULES[kind](**fields).decide(given, PlanRng(0, "select"))


def kept(decision: Decision) -> list[int]:
    return np.flatnonzero(decision.code_N == 0).tolist()


# ---------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(("p", "rule", "stays"), [
    (0.26, {}, True), (0.25, {}, False),  # Real-Filtering, 4 classes: more than chance
    (0.25, {"strict": False}, True), (0.25, {"threshold": 0.25}, True),
    (0.25, {"threshold": 0.25, "strict": True}, False),
    (0.0, {"threshold": 0}, True), (1.0, {"threshold": 1.01}, False), (float("nan"), {"threshold": 0}, False)])
def test_confidence_of_one_sample(p: float, rule: dict[str, Any], stays: bool) -> None:
    assert kept(decide(rows(1, clip_confidence=[p]), "clip_confidence", **rule)) == [0] * stays


def test_a_higher_threshold_never_brings_a_sample_back() -> None:
    given = rows(10, clip_confidence=TENTHS)
    chosen = [set(kept(decide(given, "clip_confidence", threshold=t))) for t in np.linspace(0, 1.1, 23)]

    assert len(chosen[0]) == 10
    assert not chosen[-1]
    assert all(a >= b for a, b in pairwise(chosen))


def test_a_wanted_count_is_taken_at_random_or_from_the_most_confident() -> None:
    p = [0.3, 0.5, 0.9, 0.31, 0.6, 0.1, 0.2, 0.24, 0.8, 0.05]
    given = rows(10, label=[0] * 5 + [1] * 5, clip_confidence=p)
    found = decide(given, "clip_confidence", per_class=3)
    many = [decide(rows(10, label=[0] * 5 + [1] * 5, seed=start, clip_confidence=p), "clip_confidence", per_class=3)
            for start in range(20)]

    assert len([i for i in kept(found) if i < 5]) == 3, "all five pass: any three of them"
    assert [i for i in kept(found) if i >= 5] == [6, 7, 8], "one passes: the three most confident"
    assert len({tuple(kept(one)) for one in many}) > 3, "drawn, not the best three"
    assert [REASONS[code] for code in found.code_N[[5, 9]]] == ["below_threshold"] * 2
    assert np.bincount(found.code_N[:5], minlength=5).tolist() == [3, 0, 0, 0, 2]


@pytest.mark.parametrize(("scores", "threshold", "dropped"), [
    (TENTHS, 0.19, [0]), (np.arange(1, 21) / 20, 0.145, [0, 1]), (np.full(7, 0.3), 0.3, [])])
def test_quantile_numbers(scores: np.ndarray, threshold: float, dropped: list[int]) -> None:
    found = decide(rows(len(scores), mine=scores), "quantile", score="mine")
    turned = decide(rows(len(scores), mine=-scores), "quantile", score="mine", best="low")

    assert found.facts["threshold"] == pytest.approx(threshold, abs=1e-12)
    assert np.flatnonzero(found.code_N).tolist() == dropped
    assert turned.facts["threshold"] == pytest.approx(-threshold, abs=1e-12)
    assert np.flatnonzero(turned.code_N).tolist() == dropped
    assert np.array_equal(turned.score_N, -scores), "the score is written as it is"


def test_one_quantile_for_all_may_take_a_whole_class_and_one_for_each_does_not() -> None:
    given = rows(20, label=[0] * 2 + [1] * 18, mine=np.arange(20) / 20)

    assert kept(decide(given, "quantile", score="mine")) == list(range(2, 20))
    assert kept(decide(given, "quantile", score="mine", floor=1)) == list(range(1, 20))
    per_class = decide(given, "quantile", score="mine", within="class")
    assert np.flatnonzero(per_class.code_N).tolist() == [0, 2, 3]
    assert per_class.facts["thresholds"] == pytest.approx({"0": 0.005, "1": 0.185})


def test_a_sample_without_a_score_has_no_share_in_the_quantile() -> None:
    given = rows(11, mine=[*TENTHS, np.nan])

    found = decide(given, "quantile", score="mine")
    assert found.facts["threshold"] == pytest.approx(0.19)
    assert REASONS[found.code_N[10]] == "no_score"
    for kind, fields in (("quantile", {"floor": 11}), ("best", {"n": 11})):
        assert kept(decide(given, kind, score="mine", **fields)) == list(range(10)), kind


def test_the_best_of_each_seed_of_each_class_and_of_all() -> None:
    given = rows(8, label=[0, 0, 0, 0, 1, 1, 1, 1], seed=[0, 0, 1, 1, 2, 2, 3, 3], mine=[1, 2, 8, 9, 5, 4, 3, 2])

    assert kept(decide(given, "best", score="mine", n=1, per="seed")) == [1, 3, 4, 6]
    assert kept(decide(given, "best", score="mine", n=2, per="class")) == [2, 3, 4, 5]
    assert kept(decide(given, "best", score="mine", n=3, per="all")) == [2, 3, 4]
    assert kept(decide(given, "best", score="mine", n=1, per="class", best="low")) == [0, 7]
    assert kept(decide(given, "best", score="mine", n=[3, 0, 0, 9])) == [1, 2, 3]
    assert kept(decide(given, "best", score="mine", n=[1, 2, 0, 0])) == [3, 4, 5]
    with pytest.raises(UsageError, match="3 numbers for 4 classes"):
        decide(given, "best", score="mine", n=[1, 2, 3])


def test_equal_scores_are_ordered_by_a_key_and_not_by_place() -> None:
    given = rows(40, seed=np.arange(40), mine=np.ones(40))
    first = kept(decide(given, "best", score="mine", n=10, per="all"))
    turned = ScoredSamples(given.sample_ids[::-1], given.label, given.seed, given.seeds_K, given.scores)

    assert first not in (list(range(10)), list(range(30, 40)))
    assert [39 - i for i in kept(decide(turned, "best", score="mine", n=10, per="all"))] == first[::-1]


def test_a_smaller_random_choice_lies_inside_a_larger_one() -> None:
    given = rows(40, label=np.arange(40) % 2, seed=np.arange(40) // 5)
    few, more = (set(kept(decide(given, "random", n=n))) for n in (2, 3))

    assert few < more
    assert np.bincount(given.seed[sorted(more)]).tolist() == [3] * 8
    half = kept(decide(given, "random", share=0.5, per="class"))
    assert np.bincount(given.label[half]).tolist() == [10, 10]
    other = RULES["random"](share=0.5, per="class").decide(given, PlanRng(1, "select"))
    assert kept(other) != half


def test_selective_expansion() -> None:
    """Two seeds of one class; the guide sees class 2 in both, whatever their label is."""
    given = rows(8, label=1, seed=[0] * 4 + [1] * 4, classes=3, anchor=[2] * 8, anchor_entropy=[0.5] * 8,
                 clip_top=[2, 2, 1, 2, 2, 2, 2, 2], clip_entropy=[0.6, 0.5, 0.9, 0.7, 0.9, 0.8, 0.7, 0.4])
    one, two, pooled = (decide(given, "selective", **fields) for fields in (
        {"n": 1}, {"n": 2}, {"n": 2, "pool": "pooled"}))

    assert kept(one) == [0, 4]
    assert kept(two) == [0, 3, 4, 5]
    assert kept(pooled) == [3, 4, 5, 6], "four, by gain"
    assert [REASONS[code] for code in two.code_N] == ["", "below_threshold", "wrong_class", "", "", "", "not_chosen",
                                                      "below_threshold"]
    np.testing.assert_allclose(two.score_N, [0.1, 0, 0.4, 0.2, 0.4, 0.3, 0.2, -0.1], atol=1e-12)


def test_pooled_selection_leaves_seeds_and_classes_out() -> None:
    """Appendix B.1: one ranking of the whole set. Two classes of one seed each; all copies of class 0 gain more."""
    given = rows(6, label=[0, 0, 0, 1, 1, 1], seed=[0, 0, 0, 1, 1, 1], anchor=[0] * 6, anchor_entropy=[0.5] * 6,
                 clip_top=[0] * 6, clip_entropy=[0.9, 0.8, 0.85, 0.6, 0.7, 0.4])
    found = decide(given, "selective", n=1, pool="pooled")

    assert given.seeds_K.sum() == 2
    assert kept(found) == [0, 2]
    assert kept(decide(given, "selective", n=2, pool="pooled")) == [0, 1, 2, 4]
    assert kept(decide(given, "selective", n=1)) == [0, 3]


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_near_copies(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Copies are within 10 degrees. 4 is near 2 only, which went; 5 is near 0 and 4."""
    monkeypatch.setattr("rayexpand.evaluation.select_rules._BLOCK", block)
    angles = np.radians([0, 40, 4, 90, 14, 8, 92])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    given = rows(7, label=[0, 0, 0, 0, 0, 0, 1], seed=[0, 0, 0, 0, 1, 1, 2], features=features)
    limit = float(np.cos(np.radians(10)))

    assert kept(decide(given, "near_copies", threshold=limit)) == [0, 1, 3, 4, 6]
    assert kept(decide(given, "near_copies", threshold=limit, within="seed")) == [0, 1, 3, 4, 6]
    found = decide(given, "near_copies", threshold=limit)
    np.testing.assert_allclose(np.degrees(np.arccos(found.score_N[[1, 2, 4, 5]])), [40, 4, 14, 6], atol=1e-5)
    assert np.isnan(found.score_N[[0, 6]]).all()


def test_places_in_groups() -> None:
    group, key = np.array([1, 0, 1, 1, 0]), np.array([3.0, 1.0, np.nan, 2.0, 0.0])

    assert rank_in(group, key).tolist() == [1, 1, 2, 0, 0]
    assert rank_in(np.zeros(4, int), np.array([1, 0, 1, 0]), np.array([0, 5, -1, 4])).tolist() == [3, 1, 2, 0]


def test_numbers_of_a_guide() -> None:
    found = scores_of(np.log([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]) + 7, np.array([0, 1, 0]))

    np.testing.assert_allclose(found["clip_confidence"], [0.9, 0.4, 0.5])
    np.testing.assert_allclose(found["clip_entropy"], [0.32508, 0.67301, np.log(2)], atol=1e-5)
    assert found["clip_top"].tolist() == [0, 0, 0]
    assert contrast(np.array([27.0]), np.array([26.0]))[0] == pytest.approx(0.7311, abs=5e-5)


# ------------------------------------------------------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_clip(tmp_path_factory.mktemp("tiny") / "clip"))


@pytest.fixture(scope="module")
def original(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples of 20 seeds of four classes in five data files."""
    config = {"name": "run", "out": str(tmp_path_factory.mktemp("original")),
              "method": {"name": "classical", "ratio": 2}, "sampler": {"batch": 8, "shard_images": 8},
              "data": {"source": "imagefolder", "path": str(image_folder)}}
    return Path(str(complete(parse_run(config))[0].folder))


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Run:
    return open_run(str(shutil.copytree(original, tmp_path / "copy/run")))


def job(run: Run, guide: str, **changes: Any) -> Any:
    return parse({"name": "one", "run": str(run.folder), "guide": {"weights": guide}, "device": "cpu", "batch": 7,
                  "rule": {"kind": "clip_confidence"}, **changes})


def lines(found: dict[str, Any]) -> list[dict[str, Any]]:
    return pq.read_table(found["file"]).to_pylist()


def test_a_decision_covers_every_sample_once_in_the_order_of_the_plan(run: Run, guide: str) -> None:
    shown: list[tuple[Any, ...]] = []
    found = select(job(run, guide, rule={"kind": "quantile", "score": "clip_confidence", "drop": 0.25}),
                   on_rows=lambda *said: shown.append(said))
    decided = lines(found)
    p = np.array([line["score"] for line in decided])

    assert [line["sample_id"] for line in decided] == [f"{name}/{i}.png/{copy}" for name in ("ant", "bee", "cat", "dog")
                                                       for i in range(5) for copy in range(2)]
    assert [line["keep"] for line in decided] == (p >= np.quantile(p, 0.25)).tolist()
    assert {line["reason"] for line in decided if not line["keep"]} == {"below_threshold"}
    assert {line["reason"] for line in decided if line["keep"]} == {""}
    assert (found["planned"], found["kept"], found["rejected"], found["failed"]) == (40, 30, 10, 0)
    assert (found["reasons"], found["ratio_before"], found["ratio"]) == ({"below_threshold": 10}, 2.0, 1.5)
    assert found["dropped_by_strength"] == {"0": 0.25}
    lost = Counter(line["sample_id"].partition("/")[0] for line in decided if not line["keep"])
    assert found["dropped_by_class"] == pytest.approx({name: count / 10 for name, count in lost.items()})
    assert [*found["dropped_by_class"].values()] == sorted(found["dropped_by_class"].values(), reverse=True)
    assert found["threshold"] == np.quantile(p, 0.25)
    chosen = read_selection(run, "one")
    assert np.asarray(chosen.keeps([line["sample_id"] for line in decided])).tolist() == [
        line["keep"] for line in decided]
    assert shown[-1] == ("scores by the guide", 40, 40)


def test_confidences_are_those_of_the_guide(run: Run, guide: str) -> None:
    """Against one image at a time, by the guide's own logits."""
    import torch

    from rayexpand.data.pixels import decode
    from rayexpand.models.guides import ClipGuide

    found = lines(select(job(run, guide, prompt="a photo of a {name}.")))
    clip = ClipGuide.load(guide, None, [f"a photo of a {name}." for name in ("ant", "bee", "cat", "dog")], "cpu")
    expected = {}
    for receipt in run.store.receipts():
        for row in run.store.data(receipt).to_pylist():
            x = torch.from_numpy(decode(row["image"]["bytes"])[0]).permute(2, 0, 1)[None] / 255
            with torch.no_grad():
                expected[row["sample_id"]] = float(clip.logits(x).softmax(1)[0, row["label"]])

    assert {line["sample_id"]: line["score"] for line in found} == pytest.approx(expected, rel=1e-4)
    assert len(set(expected.values())) == 40


def test_the_same_command_again_changes_nothing_and_others_are_refused(run: Run, guide: str) -> None:
    first = select(job(run, guide))
    content = Path(first["file"]).read_bytes()
    again = select(job(run, guide))

    assert (first["made"], again["made"]) == (True, False)
    assert {**again, "made": True} == first
    assert Path(first["file"]).read_bytes() == content
    with pytest.raises(DigestMismatch, match=r"rule\.threshold: 'chance' -> 0\.5") as refused:
        select(job(run, guide, rule={"kind": "clip_confidence", "threshold": 0.5}, seed=1))
    assert "seed: 0 -> 1" in str(refused.value)
    with pytest.raises(DigestMismatch, match=r"rule\.kind: 'clip_confidence' -> 'random'"):
        select(job(run, guide, rule={"kind": "random", "n": 1}))
    assert Path(first["file"]).read_bytes() == content


def test_a_threshold_moves_without_the_guide(run: Run, guide: str) -> None:
    def never(job: ScoreJob, chunks: Any) -> Any:
        raise AssertionError(f"{len(chunks)} chunks are scored again")

    first = select(job(run, guide))
    moved = job(run, guide, name="two", rule={"kind": "clip_confidence", "threshold": 0.2})
    found = select(moved, never)

    assert [line["score"] for line in lines(found)] == [line["score"] for line in lines(first)]
    assert found["scored_in"] == first["scored_in"]
    with pytest.raises(AssertionError, match="5 chunks"):
        select(job(run, guide, name="three", prompt="{name}"), never)


def test_a_stopped_command_goes_on_where_it_was(run: Run, guide: str) -> None:
    scored: list[Chunk] = []

    def dies(job: ScoreJob, chunks: Any) -> Any:
        for number, chunk in enumerate(chunks):
            if number == 2:
                raise Interrupted("SIGTERM received")
            scored.append(chunk)
            yield number, Scorer(job)(chunk)

    def watched(job: ScoreJob, chunks: Any) -> Any:
        scored.extend(chunks)
        return in_process(job, chunks)

    with pytest.raises(Interrupted):
        select(job(run, guide), dies)
    assert not list(Path(str(run.folder), "selections").glob("*"))
    found = select(job(run, guide), watched)
    assert scored == sample_chunks(run.store.receipts()), "each chunk once"
    whole = Scorer(_job_of(run, guide))
    expected = np.concatenate([whole(chunk)["clip_confidence"].to_numpy()
                               for chunk in sample_chunks(run.store.receipts())])
    assert np.array_equal([line["score"] for line in lines(found)], expected)


def _job_of(run: Run, guide: str, **changes: Any) -> ScoreJob:
    fields = {"captions": (), "caption_of": (), "features": False, "batch": 7, **changes}
    return ScoreJob(str(run.folder), GuideConfig(weights=guide), "", tuple(f"a photo of a {name}" for name in
               ("ant", "bee", "cat", "dog")), device="cpu", torch_threads=1, io_threads=2, **fields)


def test_part_files_may_be_written_at_any_time(run: Run, guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_scores, "PART_ROWS", 10)
    first = select(job(run, guide))
    parts = list(Path(str(run.folder), first["scored_in"]).iterdir())
    found = select(job(run, guide, name="two"), lambda job, chunks: iter(()))

    assert len(parts) > 1
    assert lines(found) == lines(first)


def test_a_run_that_grew_by_a_retry_is_noticed(tmp_path: Path, make_config: MakeConfig, guide: str,
                                               image_folder: Path) -> None:
    from rayexpand.runs import run as runs

    seeds = Path(shutil.copytree(image_folder, tmp_path / "seeds"))
    (seeds / "bee/1.png").write_bytes(b"broken")
    made, _ = complete(make_config("classical", ratio=2, data={"source": "imagefolder", "path": str(seeds)}))
    before = select(job(made, guide))
    assert [before[name] for name in ("planned", "samples", "failed")] == [40, 38, 2]
    assert before["kept"] + before["rejected"] == 38
    assert "2 planned samples of the run failed" in before["warnings"][-1]
    shutil.copyfile(image_folder / "bee/1.png", seeds / "bee/1.png")
    expander = runs.start(made)
    runs.drive(made, runs.in_process(expander), runs.retry_jobs(made), to_the_end=True)
    expander.close()
    scored: list[Chunk] = []

    def watched(job: ScoreJob, chunks: Any) -> Any:
        scored.extend(chunks)
        return in_process(job, chunks)

    with pytest.raises(UsageError, match=r"says nothing about sample bee/1\.png"):
        read_selection(made, "one").keeps(list(hashes(made)))
    with pytest.raises(DigestMismatch, match="38 samples; it has 40 now"):
        select(job(made, guide))
    after = select(job(made, guide, name="new"), watched)
    assert [chunk.file for chunk in scored] == ["train-000001.r1.parquet"], "only what is new is scored"
    assert (after["kept"] + after["rejected"], after["failed"]) == (40, 0)
    ids = [line["sample_id"] for line in lines(after)]
    assert ids.index("bee/1.png/0") == 12, "in the order of the plan"
    assert {**{line["sample_id"]: line["score"] for line in lines(after)},
            **{line["sample_id"]: line["score"] for line in lines(before)}} == {
                line["sample_id"]: line["score"] for line in lines(after)}


def test_scores_that_the_run_brings(make_config: MakeConfig) -> None:
    made, _ = complete(make_config("Picky", ratio=2, share=0.3))
    found = select(parse({"name": "lucky", "run": str(made.folder), "rule": {
        "kind": "best", "score": "luck", "best": "low", "n": 1, "per": "class"}}))
    luck = {row["sample_id"]: row["scores"][0]["value"] for receipt in made.store.receipts()
            for row in made.store.data(receipt).to_pylist()}

    assert {line["sample_id"]: line["score"] for line in lines(found)} == luck
    best = [min((sample for sample in luck if sample.startswith(name)), key=lambda sample: luck[sample])
            for name in ("ant", "bee", "cat", "dog")]
    assert [line["sample_id"] for line in lines(found) if line["keep"]] == best
    totals = made.totals()
    assert totals.rejected > 0
    assert found["rejected"] == totals.rejected + totals.kept - 4
    assert found["planned"] == found["kept"] + found["rejected"] + found["failed"]
    with pytest.raises(UsageError, match=r"has a score 'lucky'; it has luck"):
        select(parse({"name": "x", "run": str(made.folder), "rule": {"kind": "quantile", "score": "lucky"}}))


def test_selective_expansion_looks_at_the_seeds(run: Run, guide: str) -> None:
    from rayexpand.evaluation.select_scores import seed_chunks

    found = select(job(run, guide, rule={"kind": "selective", "n": 1}))
    scorer = Scorer(_job_of(run, guide))
    seeds = scorer(seed_chunks(run)[0])
    samples = pa.concat_tables([scorer(chunk) for chunk in sample_chunks(run.store.receipts())])
    gain = samples["clip_entropy"].to_numpy() - np.repeat(seeds["clip_entropy"].to_numpy(), 2)
    same = samples["clip_top"].to_numpy() == np.repeat(seeds["clip_top"].to_numpy(), 2)
    passes = ((gain > 0) & same).reshape(20, 2)

    assert seeds.num_rows == 20
    np.testing.assert_array_equal([line["score"] for line in lines(found)], gain)
    keep = np.array([line["keep"] for line in lines(found)]).reshape(20, 2)
    assert 0 < keep.sum() < 20, "the fixture has seeds of both kinds"
    np.testing.assert_array_equal(keep, np.stack([passes[:, 0], passes[:, 1] & ~passes[:, 0]], axis=1))


@pytest.mark.parametrize(("interpolation", "how"), [("bicubic", Image.Resampling.BICUBIC),
                                                    ("bilinear", Image.Resampling.BILINEAR)])
def test_images_are_resized_as_the_guide_says(run: Run, guide: str, tmp_path: Path, interpolation: str,
                                              how: Image.Resampling) -> None:
    folder = shutil.copytree(guide, tmp_path / "guide")
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["preprocess_cfg"]["interpolation"] = interpolation
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    scorer = Scorer(_job_of(run, str(folder)))
    pixels = np.random.Generator(np.random.Philox(key=3)).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    side = scorer._size

    np.testing.assert_array_equal(scorer._pixels(sink.getvalue()), np.asarray(
        Image.fromarray(pixels).resize((side, side), how)))


def test_two_captions_of_the_metaclass(make_config: MakeConfig, guide: str, run: Run) -> None:
    found = select(job(run, guide, rule={"kind": "quantile", "score": "clip_contrast"},
                       captions=["a photo of a {name}", "a photo without a {name} on it"]))
    scorer = Scorer(_job_of(run, guide, caption_of=(0, 1, 2, 3), captions=tuple(
        text.format(name) for name in ("ant", "bee", "cat", "dog")
        for text in ("a photo of a {}", "a photo without a {} on it"))))
    scored = pa.concat_tables([scorer(chunk) for chunk in sample_chunks(run.store.receipts())])
    expected = scored["clip_contrast"].to_numpy()

    np.testing.assert_array_equal([line["score"] for line in lines(found)], expected)
    assert found["kept"] == 36
    turned = select(job(run, guide, name="turned", rule={"kind": "quantile", "score": "clip_contrast"},
                        captions=["a photo without a {name} on it", "a photo of a {name}"]))
    np.testing.assert_allclose([line["score"] for line in lines(turned)], 1 - expected, atol=1e-12)
    with pytest.raises(UsageError, match="metaclass"):
        select(job(run, guide, name="two", rule={"kind": "quantile", "score": "clip_contrast"}))


def test_near_copies_of_a_run(run: Run, guide: str) -> None:
    """Against pairs taken one by one."""
    scorer = Scorer(_job_of(run, guide, features=True))
    table = pa.concat_tables([scorer(chunk) for chunk in sample_chunks(run.store.receipts())])
    features = np.array(table["features"].to_pylist(), np.float32)
    limit = float(np.median((features[:10] @ features[:10].T)[~np.eye(10, dtype=bool)]))
    stays: list[int] = []
    for i in range(40):
        if not [j for j in stays if j // 10 == i // 10 and features[i] @ features[j] > limit]:
            stays.append(i)
    found = select(job(run, guide, rule={"kind": "near_copies", "threshold": limit}))

    assert [i for i, line in enumerate(lines(found)) if line["keep"]] == stays
    assert found["reasons"] == {"near_copy": 40 - len(stays)}
    assert 4 < len(stays) < 36
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


def test_every_mistake_at_once(tmp_path: Path, run: Run) -> None:
    half = Builder(tmp_path / "half").start()
    half.commit(0)
    with pytest.raises(ConfigError) as caught:
        parse({"run": str(tmp_path / "nowhere"), "rule": {"kind": "quantil"}, "batchh": 3, "name": "a/b",
               "guide": {"weights": "no-such-guide"}, "prompt": "{class}"})
    for piece in ("name: may hold letters", "did you mean 'batch'", "did you mean 'quantile'", "is not a run folder",
                  "unknown placeholder {class}"):
        assert piece in str(caught.value), piece
    for rule, piece in (({"kind": "best", "score": "x", "n": 0, "topp": 1}, "rule.topp: unknown field"),
                        ({"kind": "random"}, "needs either n or share"), ({}, "rule.kind: is missing"),
                        ({"kind": "best", "n": 1, "score": "features"}, "has no order"),
                        ({"kind": "best", "n": [1], "score": "x", "per": "seed"}, "n: a list is of classes"),
                        ({"kind": "quantile", "score": "x", "drop": 1}, "rule.drop")):
        with pytest.raises(ConfigError, match=piece):
            parse({"name": "x", "run": str(run.folder), "rule": rule})
    with pytest.raises(ConfigError, match=r"guide\.weights: guide 'no-such-guide'"):
        parse({"name": "x", "run": str(run.folder), "rule": {"kind": "random", "n": 1},
               "guide": {"weights": "no-such-guide"}})


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").rglob("select-*.yaml")),
                         ids=lambda file: file.stem)
def test_files_in_jobs(file: Path, tmp_path: Path, run: Run) -> None:
    load(str(file), [f"run={run.folder}", *(["guide.weights=digits"] if "digits" in file.parts else [])])
    with pytest.raises(ConfigError) as caught:
        load(str(file), [f"run={tmp_path}/none"])
    assert [problem[:4] for problem in caught.value.problems] == ["run:"]


def test_a_run_with_pending_samples_is_refused(make_config: MakeConfig) -> None:
    from rayexpand.runs import run as runs

    made = runs.prepare(make_config("classical", ratio=2))
    expander = runs.start(made)
    expander(0)
    expander.close()

    with pytest.raises(ConfigError, match=r"32 planned samples of .* are not decided yet"):
        parse({"name": "x", "run": str(made.folder), "rule": {"kind": "random", "n": 1}})


def test_a_file_of_that_name_from_elsewhere_is_left_alone(run: Run) -> None:
    run.files.make_folder("selections")
    run.files.replace("selections/one.parquet", parquet_bytes(pa.table({"sample_id": ["a"], "keep": [True]}), {}))

    with pytest.raises(DigestMismatch, match="was not made by"):
        select(parse({"name": "one", "run": str(run.folder), "rule": {"kind": "random", "n": 1}}))


@pytest.mark.slow
def test_a_run_in_an_object_store(object_stores: Any, run: Run, make_config: MakeConfig, guide: str) -> None:
    remote, _ = complete(make_config("classical", ratio=2).model_copy(update={"out": "s3://runs/x", "seed": 0}))
    fields = {"rule": {"kind": "quantile", "score": "clip_confidence"}}
    found, again = select(job(remote, guide, **fields)), select(job(remote, guide, **fields))
    here = select(job(run, guide, **fields))

    assert (found["made"], again["made"], found["file"]) == (True, False, "s3://runs/x/run/selections/one.parquet")
    table = pq.read_table(pa.BufferReader(remote.files.read("selections/one.parquet")))
    assert table.to_pylist() == lines(here)


def test_the_report_counts_it(run: Run) -> None:
    from rayexpand.reports.run import write_report

    folder = str(run.folder)
    assert 'id="selections"' not in Path(write_report(folder)).read_text()
    select(parse({"name": "a-few", "run": folder, "rule": {"kind": "random", "n": 1}}))
    page = Path(write_report(folder)).read_text()
    words = " ".join(page[page.index('id="selections"'):].split("</section>")[0].split())
    for piece in ("a-few", "kind random, n 1, per seed", "20</td>", "2 → 1", "not_chosen</code> 20"):
        assert piece in words, piece


def test_the_file_says_what_it_is(run: Run) -> None:
    found = select(parse({"name": "one", "run": str(run.folder), "rule": {"kind": "random", "n": 1}}))
    facts = json.loads(pq.read_schema(found["file"]).metadata[b"rayexpand"])

    assert {**facts, "file": found["file"], "made": True} == found
    assert pq.read_schema(found["file"]).names == ["sample_id", "keep", "reason", "score"]
    assert facts["settings"] == {"rule": {"kind": "random", "n": 1, "share": None, "per": "seed"}, "seed": 0}
    assert (facts["kept"], facts["ratio"], facts["run_digest"]) == (20, 1.0, run.facts["run_digest"])


def test_the_embedded_guide_judges_digits_only(run: Run) -> None:
    for rule in ({"kind": "clip_confidence"}, {"kind": "best", "n": 1, "score": "clip_confidence"}):
        with pytest.raises(ConfigError, match=r"guide\.weights: missing; the embedded default has seen digits only"):
            parse({"name": "one", "run": str(run.folder), "rule": rule})
    assert parse({"name": "one", "run": str(run.folder), "rule": {"kind": "random", "n": 1}})
    assert parse({"name": "one", "run": str(run.folder), "rule": {"kind": "clip_confidence"},
                  "guide": {"weights": "digits"}})


def test_a_decision_holds_no_table_and_few_ids(run: Run, guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 13 million samples numbers alone are held."""
    wanted = lines(select(job(run, guide)))
    monkeypatch.setattr(select_scores, "PART_ROWS", 8)
    for module in (select_module, select_samples):
        monkeypatch.setattr(module, "LINES", 7)
    held, most, begun = list[weakref.ref[pa.Table]](), [0, 0], Store.data

    def data(store: Store, *given: Any) -> pa.Table:
        most[0] = max(most[0], sum(one() is not None for one in held))
        table = begun(store, *given)
        held.append(weakref.ref(table))
        return table

    def score(job: Any, chunks: Any) -> Iterator[tuple[int, pa.Table]]:
        made = list[weakref.ref[pa.Table]]()
        for number, table in select_scores.in_process(job, chunks):
            made.append(weakref.ref(table))
            yield number, table
            del table
            most[1] = max(most[1], sum(one() is not None for one in made))

    monkeypatch.setattr(Store, "data", data)
    shutil.rmtree(Path(run.folder, "scores"))
    found = select(job(run, guide, name="again"), score)

    assert lines(found) == wanted
    assert len(held) == 5
    assert most[0] <= 1
    assert most[1] <= 2
