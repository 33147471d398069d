"""The section `accept`: what the judge says, which rows are drawn again, and that nothing else changes a sample."""

from __future__ import annotations

import io
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from rayexpand.artifacts.columns import write_image_features
from rayexpand.artifacts.thresholds import LEVELS, Statistics, Thresholds, write_thresholds
from rayexpand.contract.errors import ConfigError
from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable, Reason
from rayexpand.contract.settings import digest
from rayexpand.data.batches import resized
from rayexpand.data.pixels import to_uint8
from rayexpand.data.seeds import SeedReader, build_index
from rayexpand.models.guides import guide_hash, load_guide
from rayexpand.runs import run as runs
from rayexpand.runs.accept import ABOVE, SCORE, TRY, judge
from rayexpand.runs.config import Accept, RunConfig, parse, semantic
from rayexpand.runs.expander import Expander
from rayexpand.runs.plan import Plan, make_plan
from rayexpand.runs.verify import verify
from tests.conftest import Accepting, MakeConfig, ScriptedJudge, attempts, complete, hashes, refused
from tests.methods import fakes
from tests.methods.fakes import batch_of

KEYS = ("ant", "bee", "cat", "dog")
CLASSES = ClassTable.of(KEYS, counts=(5, 5, 5, 5))
GOOD: dict[str, Any] = {"name": "a", "data": {"source": "digits"}, "method": {"name": "img2img"}}


# ---------------------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(("fields", "words"), [
    ({"score": "confidence", "to": "seed"}, "to: has no effect with score confidence"),
    ({"wanted": "safe"}, "wanted: has no effect with score cosine"),
    ({"above": 0.6, "deviations": 1}, "deviations: has no effect with above 0.6"),
    ({"above": 0.6, "quantile": 0.1}, "quantile: has no effect with above 0.6"),
    ({"deviations": 1, "quantile": 0.1}, "deviations: has no effect with a quantile"),
    ({"score": "confidence", "wanted": "safe"}, "above: class is what the images of each class reach"),
    ({"attempts": 0}, "greater than or equal to 1"), ({"exhausted": "drop"}, "'reject' or 'best'"),
    ({"above": "mean"}, "accept.above"), ({"attemps": 2}, "did you mean 'attempts'")])
def test_sections_that_cannot_be_meant(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse({**GOOD, "accept": fields})
    assert words in str(raised.value)


@pytest.mark.parametrize(("fields", "needs"), [
    ({}, {"image_features", "thresholds"}), ({"above": 0.6}, {"image_features"}), ({"to": "class"}, {"thresholds"}),
    ({"to": "class", "above": 0.6}, {"thresholds"}), ({"to": "prompt", "above": 0.2}, set()),
    ({"to": "prompt"}, {"thresholds"}), ({"score": "confidence", "above": 0.5}, set()),
    ({"score": "confidence", "quantile": 0.1}, {"thresholds"})])
def test_a_run_needs_what_its_judge_compares(fields: dict[str, Any], needs: set[str]) -> None:
    config = parse({**GOOD, "accept": fields})
    assert config.needs == {"prior", "judge", *needs}
    assert parse(config.model_dump(mode="json")) == config


def test_a_run_without_a_judge_has_the_digest_it_had() -> None:
    plain, judged = parse(GOOD), parse({**GOOD, "accept": {"above": 0.5}})
    assert "accept" not in plain.model_dump(mode="json")
    assert digest(semantic(parse({**GOOD, "accept": None}))) == digest(semantic(plain)) != digest(semantic(judged))
    others = [{"above": 0.6}, {"above": 0.5, "attempts": 2}, {"above": 0.5, "exhausted": "best"},
              {"above": 0.5, "to": "prompt"}]
    assert len({digest(semantic(parse({**GOOD, "accept": one}))) for one in others} - {digest(semantic(judged))}) == 4


def test_all_problems_at_once(make_config: MakeConfig, judge_folder: Path, tmp_path: Path) -> None:
    def problems(**fields: Any) -> list[str]:
        return runs.preflight(make_config("Groups", ratio=4, sections={"accept": fields}))

    found = problems()
    assert any(one.startswith("artifacts.image_features: accept needs features of each seed image") for one in found)
    assert any(one.startswith("artifacts.thresholds: accept needs scores of the real images") for one in found)
    assert any(one.startswith("accept.guide.weights: missing; the embedded default has seen digits") for one in found)
    assert any(one.startswith("accept.attempts: copies of a seed share a call in tests.methods.fakes.Groups")
               for one in found)
    other = problems(guide={"weights": str(judge_folder)}, score="confidence", wanted="safe", above=0.5, attempts=1)
    assert other == [f"accept.wanted: {judge_folder} has no class 'safe': it is a CLIP guide, which has none of its "
                     "own; correct it, or leave it out for the class of the sample"]
    gone = problems(guide={"weights": str(tmp_path / "gone")}, to="prompt", above=0.5, attempts=1)
    assert len(gone) == 1
    assert gone[0].startswith("accept.guide.weights: ")


@pytest.mark.parametrize(("method", "accept", "refused_"), [
    ({"variant": "real_mix"}, {}, True), ({"variant": "real_gen"}, {"above": 0.6}, True),
    ({"variant": "real_mix", "targets": "balanced"}, {}, True), ({"variant": "real_mix"}, {"to": "class"}, False),
    ({"variant": "real_mix", "targets": "reference"}, {}, False), ({"variant": "real_aug"}, {}, False)])
def test_a_sample_of_another_class_is_not_compared_with_its_seed(method: dict[str, Any], accept: dict[str, Any],
                                                                refused_: bool) -> None:
    config = parse({**GOOD, "method": {"name": "diffmix", "prompt": "a {name}", **method}, "accept": accept})
    found = [one for one in runs.preflight(config) if one.startswith("accept.to: diffmix with targets")]
    assert bool(found) is refused_
    assert all("other classes than their seed images have" in one for one in found)


@pytest.mark.parametrize(("method", "words"), [
    ({"name": "vae"}, "accept.to: vae, as it is set here, has no prompt"),
    ({"name": "classical"}, "accept.to: classical, as it is set here, has no prompt"),
    ({"name": "gif", "generator": "mae"}, "accept.to: gif, as it is set here, has no prompt"),
    ({"name": "vae"}, "accept.attempts: with method.sample: false every attempt"),
    ({"name": "vae", "sample": True}, None)])
def test_what_a_method_cannot_be_judged_by_is_refused(method: dict[str, Any], words: str | None) -> None:
    accept = {"to": "prompt", "above": 0.2} if words else {"to": "class"}
    found = runs.preflight(parse({**GOOD, "method": method, "accept": accept}))
    assert any(one.startswith(words or "accept.attempts") for one in found) is bool(words)


@pytest.mark.parametrize(("score", "above"), [("cosine", math.nan), ("cosine", math.inf), ("cosine", 1.0),
                                              ("cosine", True), ("cosine", -1.5), ("confidence", -0.1)])
def test_a_number_that_nothing_exceeds_or_all_do_is_refused(score: str, above: float) -> None:
    with pytest.raises(ConfigError, match="above: "):
        parse({**GOOD, "accept": {"score": score, "above": above}})


def test_artifacts_of_another_guide_are_refused(make_config: MakeConfig, judge_folder: Path, tmp_path: Path) -> None:
    for name in ("thresholds", "image_features"):
        (tmp_path / name).mkdir()
    write_thresholds(tmp_path / "thresholds", made_thresholds(), guide_sha256="0" * 64, class_keys=KEYS, images=[5] * 4)
    write_image_features(tmp_path / "image_features", ["ant/0.png"], np.ones((1, 16), np.float32),
                         encoder_sha256="0" * 64)
    sections = {"accept": {"guide": {"weights": str(judge_folder)}}, "artifacts": {
        name: str(tmp_path / name) for name in ("thresholds", "image_features")}}
    found = runs.preflight(make_config("Fake", sections=sections))
    assert len([one for one in found if "holds features of guide 000000000000, but accept.guide.weights" in one]) == 2

    write_thresholds(tmp_path / "thresholds", made_thresholds(), guide_sha256=guide_hash(str(judge_folder), None),
                     class_keys=KEYS[::-1], images=[5] * 4)
    found = runs.preflight(make_config("Fake", sections=sections))
    assert any(one.startswith("artifacts.thresholds: ") and "made for other classes" in one for one in found)


# ----------------------------------------------------------------------------------------------------------- the redraw


def plan_of(config: RunConfig) -> Plan:
    return make_plan(build_index(config.data), config)


def test_a_redraw_draws_words_anew_and_keeps_the_rest(make_config: MakeConfig) -> None:
    plan = plan_of(make_config("Worded"))
    for draw in (draw for unit in plan.units(1) for draw in unit):
        again, third = plan.redraw(draw), plan.redraw(plan.redraw(draw))
        assert (again.attempt, third.attempt) == (1, 2)
        assert len({draw.prompt, again.prompt, third.prompt}) == 3
        assert len({draw.negative, again.negative, third.negative}) == 3
        assert replace(again, attempt=0, prompt=draw.prompt, negative=draw.negative) == draw
        assert again == plan.redraw(draw)
        assert plan.rng(again) == RowRng(3, plan.method.name, draw.seed_id, draw.copy, 1)


def test_a_redraw_keeps_the_class_and_a_prompt_about_it(make_config: MakeConfig) -> None:
    plan = plan_of(make_config("MixesWords"))
    draws = [draw for shard in range(plan.n_shards) for unit in plan.units(shard) for draw in unit]
    again = [plan.redraw(draw) for draw in draws]
    assert all(one.target_label == draw.target_label for one, draw in zip(again, draws, strict=True))
    assert all(one.prompt.startswith(KEYS[one.target_label]) for one in again)
    assert 0 < sum(one.prompt == draw.prompt for one, draw in zip(again, draws, strict=True)) < len(draws)


def test_a_redraw_has_the_caption_of_its_seed(make_config: MakeConfig) -> None:
    plan = plan_of(make_config("Worded"))
    captions = [f"the {i} of them" for i in range(len(plan.index))]
    captioned = replace(plan, captions=pa.chunked_array([captions]))
    draw = captioned.units(2)[0][0]
    position = plan.index.seed_ids.index(draw.seed_id)
    assert captioned.redraw(draw).prompt.startswith(f"{captions[position]} ")


# ------------------------------------------------------------------------------------------------------------ the judge


@pytest.fixture(scope="module")
def clip(judge_folder: Path) -> Any:
    return load_guide(str(judge_folder), None, CLASSES.asked, device="cpu")


def made_thresholds() -> Thresholds:
    rng = np.random.default_rng(0)
    of = {name: Statistics(np.array([0.1, 0.2, 0.3, 0.4]), np.full(4, 0.05), np.tile(LEVELS, (4, 1)))
          for name in ("seed", "class", "prompt", "confidence")}
    return Thresholds(rng.standard_normal((4, 16)).astype(np.float32), of)


class Features:
    """Artifact image_features of any seed."""

    def rows(self, seed_ids: list[str]) -> np.ndarray:
        return np.stack([np.zeros(16, np.float32) if one == "filler" else
                         RowRng(0, "test", one, 0).normals("features", (16,)) for one in seed_ids])


def of_call(rows: list[tuple[str, int, int]]) -> tuple[Batch, Expansion]:
    method = fakes.Fake(name="tests.methods.fakes.Fake")
    batch = batch_of(method, CLASSES, rows)
    return batch, method.expand(batch, Tools(CLASSES))


def scores_of(made: Expansion) -> list[float]:
    return list(made.scores[SCORE])


ROWS = [("ant/0.png", 0, 0), ("bee/1.png", 1, 0), ("ant/2.png", 0, 1), ("dog/4.png", 3, 0)]


def test_the_scores_are_those_of_the_equations(clip: Any) -> None:
    """Against torch, image by image."""
    batch, made = of_call(ROWS)
    tools = Tools(CLASSES, judge=clip, image_features=Features(), thresholds=made_thresholds())
    with torch.no_grad():
        f_BD = torch.cat([clip.features(torch.from_numpy(image).permute(2, 0, 1)[None] / 255) for image in made.images])
        p_BK = (clip.scale * torch.nn.functional.normalize(f_BD, dim=-1) @ clip.texts_KD.T).softmax(1)
        tokens = clip._tokenizer([draw.prompt for draw in batch.draws])
        texts_BD = clip.model.encode_text(tokens)
    labels = [row[1] for row in ROWS]

    def cosine(other_BD: Any) -> list[float]:
        return torch.nn.functional.cosine_similarity(f_BD.double(), torch.as_tensor(other_BD).double()).tolist()

    wanted = {"seed": cosine(Features().rows([row[0] for row in ROWS])), "prompt": cosine(texts_BD),
              "class": cosine(made_thresholds().unit_KD[labels]),
              "confidence": [float(p_BK[i, label]) for i, label in enumerate(labels)]}
    for comparison, expected in wanted.items():
        fields = {"score": "confidence"} if comparison == "confidence" else {"to": comparison}
        found = judge(Accept(**fields), batch, made, tools)
        assert scores_of(found) == pytest.approx(expected, abs=1e-5)
        assert found.scores[ABOVE] == pytest.approx([0.1, 0.2, 0.1, 0.4])
        assert [reason is None for reason in found.reasons] == [
            score > above for score, above in zip(expected, found.scores[ABOVE], strict=True)]
        assert found.images == made.images


def test_thresholds_are_a_number_the_mean_less_deviations_or_a_quantile(clip: Any) -> None:
    batch, made = of_call(ROWS)
    tools = Tools(CLASSES, judge=clip, thresholds=made_thresholds())
    for fields, above in (({"above": 0.6}, [0.6] * 4), ({"deviations": 2}, [0.0, 0.1, 0.0, 0.3]),
                          ({"quantile": 0.125}, [0.125] * 4)):
        assert judge(Accept(to="class", **fields), batch, made, tools).scores[ABOVE] == pytest.approx(above)


def test_a_score_at_its_threshold_is_refused(clip: Any) -> None:
    batch, made = of_call(ROWS)
    tools = Tools(CLASSES, judge=clip)
    exact = scores_of(judge(Accept(score="confidence", above=0.0), batch, made, tools))[0]
    for above, reason in ((exact, Reason.BELOW_THRESHOLD), (np.nextafter(exact, 0), None)):
        assert judge(Accept(score="confidence", above=float(above)), batch, made, tools).reasons[0] == reason


def test_two_rows_of_a_class_are_compared_with_their_own_seed(clip: Any) -> None:
    """The same image: the released code would compare both with the first file of the class."""
    batch, made = of_call([("ant/0.png", 0, 0), ("ant/1.png", 0, 0)])
    made.images[1] = made.images[0]
    tools = Tools(CLASSES, judge=clip, image_features=Features())
    first, second = scores_of(judge(Accept(above=0.0), batch, made, tools))
    assert abs(first - second) > 0.05
    between = Accept(above=(first + second) / 2)
    assert sorted(map(str, judge(between, batch, made, tools).reasons)) == ["None", "below_threshold"]


def test_rows_without_an_image_keep_their_reason_and_have_no_score(clip: Any) -> None:
    batch, made = of_call(ROWS)
    made.images[0], made.reasons[0] = None, Reason.NAN_LATENT
    made.images[1] = np.full((16, 16, 3), np.nan, np.float32)
    made.reasons[2] = Reason.SAFETY_FLAGGED
    found = judge(Accept(score="confidence", above=0.9999), batch, made, Tools(CLASSES, judge=clip))
    assert np.isnan(scores_of(found)).tolist() == [True, True, False, False]
    assert found.reasons == [Reason.NAN_LATENT, None, Reason.SAFETY_FLAGGED, Reason.BELOW_THRESHOLD]
    assert found.details[3].startswith("confidence in its class 0.")


def test_the_judge_sees_what_is_kept_brought_to_its_size(clip: Any) -> None:
    batch, made = of_call(ROWS)
    large = np.random.default_rng(1).random((24, 40, 3))
    made.images[0], made.images[1] = large, to_uint8(large)
    cut = resized(made.images[1], (16, 16), "crop")
    made.images[2] = cut
    batch = replace(batch, draws=tuple(replace(draw, target_label=0) for draw in batch.draws))
    found = scores_of(judge(Accept(score="confidence", above=0.0), batch, made, Tools(CLASSES, judge=clip)))
    assert found[0] == found[1] == found[2]


def test_numbers_that_are_not_finite_blame_the_row() -> None:
    class Broken(ScriptedJudge):
        def seen(self, images: Any) -> Any:
            return np.full((len(images), 2), np.nan), np.zeros((len(images), 1))

    batch, made = of_call(ROWS)
    with pytest.raises(AssertionError, match="not finite for a finite image"):
        judge(Accept(to="prompt", above=0.5), batch, made, Tools(CLASSES, judge=Broken()))


def test_a_classifier_of_other_classes_judges(make_config: MakeConfig, tmp_path: Path) -> None:
    """A safety model, say: one class of it counts, whatever class a sample has."""
    from rayexpand.classifier.backbones import build_backbone
    from rayexpand.classifier.recipe import make_recipe
    from rayexpand.models.guide_files import save_classifier

    recipe = make_recipe({"size": 16, "backbone_args": {"width": 4}})
    folder = tmp_path / "safety"
    folder.mkdir()
    save_classifier(folder, build_backbone(recipe, 2, seed=0), recipe, ["unsafe", "safe"])
    accept = {"guide": {"weights": str(folder)}, "score": "confidence", "wanted": "safe", "above": 0.0, "attempts": 1}
    run, totals = complete(make_config("Fake", ratio=1, sections={"accept": accept}))

    guide = load_guide(str(folder), None, (), device="cpu")
    assert (guide.classes, totals.kept) == (("unsafe", "safe"), 20)
    row = run.store.data(next(iter(run.store.receipts()))).to_pylist()[0]
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        _, logits_1K = guide.seen([np.asarray(image)])
    p = np.exp(logits_1K[0]) / np.exp(logits_1K[0]).sum()
    assert {one["name"]: one["value"] for one in row["scores"]}[SCORE] == pytest.approx(p[1], abs=1e-6)
    wrong = make_config("Fake", sections={"accept": {**accept, "wanted": "save"}})
    assert runs.preflight(wrong) == [f"accept.wanted: {folder} has no class 'save', but unsafe, safe; correct it, or "
                                     "leave it out for the class of the sample"]


# ----------------------------------------------------------------------------------------------------------- the engine


class Table(ScriptedJudge):
    """Scores by attempt of pictures by `Numbered`."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores

    def seen(self, images: Any) -> Any:
        score_B = np.array([self.scores[image[0, 0, 1]] for image in images])
        return np.stack([score_B, np.sqrt(1 - score_B**2)], axis=1), np.zeros((len(images), 1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sampler calls of all expanders, in order."""
    found: list[Any] = []
    sample = Expander._sample

    def noting(self: Expander, work: Any, call: Any, alone: Any = None) -> Expansion:
        found.append(call)
        return sample(self, work, call, alone)

    monkeypatch.setattr(Expander, "_sample", noting)
    return found


@pytest.mark.parametrize(("attempts_", "exhausted", "status", "attempt", "tries"), [
    (3, "reject", "kept", 2, 3), (5, "best", "kept", 2, 3), (2, "reject", "exhausted", 1, 2), (2, "best", "kept", 1, 2),
    (1, "reject", "below_threshold", 0, 1), (1, "best", "kept", 0, 1)])
def test_scripted_scores(make_config: MakeConfig, accept: Accepting, monkeypatch: pytest.MonkeyPatch, calls: list[Any],
                         attempts_: int, exhausted: str, status: str, attempt: int, tries: int) -> None:
    """0.1, 0.2, 0.9 against 0.5."""
    monkeypatch.setattr("rayexpand.runs.tools._guide", lambda *given: Table(0.1, 0.2, 0.9))
    config = make_config("Numbered", ratio=1, batch=20, shard_images=20, sections={
        "accept": accept(attempts=attempts_, exhausted=exhausted)})
    run, totals = complete(config)
    (receipt,) = run.store.receipts()

    assert len(calls) == tries
    assert totals.kept + totals.rejected == totals.planned == 20
    table = run.store.data(receipt) if status == "kept" else run.store.refused(receipt)
    rows = table.to_pylist()
    assert len(rows) == 20
    assert {row.get("reason", "kept") for row in rows} == {status}
    assert {row["attempt"] for row in rows} == {attempt}
    expected = {**{f"{TRY}{i}": score for i, score in enumerate((0.1, 0.2, 0.9)[:tries]) if i != attempt},
                SCORE: (0.1, 0.2, 0.9)[attempt], ABOVE: 0.5}
    for row in rows:
        assert {one["name"]: one["value"] for one in row["scores"]} == pytest.approx(expected)
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            assert image.getpixel((0, 0))[1] == attempt, "the image of that attempt"
        assert row.get("detail", "") in ("", "2 attempts; the last: cosine to its prompt 0.2000 is not above 0.5000",
                                         "cosine to its prompt 0.1000 is not above 0.5000")


def test_the_best_of_several_tries_is_the_first_of_the_best(make_config: MakeConfig, accept: Accepting,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayexpand.runs.tools._guide", lambda *given: Table(0.1, 0.4, 0.2, 0.4))
    run, _ = complete(make_config("Numbered", ratio=1, sections={"accept": accept(attempts=4, exhausted="best")}))
    assert set(attempts(run).values()) == {1}
    assert verify(run, pixels=True).problems == []
    assert runs.start(run).regenerate("ant/0.png/0").sample_sha256 == hashes(run)["ant/0.png/0"]


def test_batched_redraws_are_those_of_a_literal_loop(make_config: MakeConfig, judge_folder: Path, clip: Any) -> None:
    """One row at a time, with the real judge, in full calls of fillers."""
    accept = Accept(guide={"weights": str(judge_folder)}, score="confidence", above=0.2502, attempts=4)
    config = make_config("Fake", ratio=6, shard_images=60, sections={"accept": accept.model_dump()})
    run, totals = complete(config)
    plan, tools = run.plan, Tools(run.plan.index.classes, judge=clip)
    reader = SeedReader(plan.index, config.data)
    found: dict[str, tuple[int, str]] = {}
    for shard in range(plan.n_shards):
        for (draw,) in plan.units(shard):
            (seed,) = reader.read([plan.index.seed_ids.index(draw.seed_id)])
            pixels = np.asarray(Image.open(io.BytesIO(seed.image)).convert("RGB"))
            for _ in range(accept.attempts):
                batch = Batch((draw,) * 8, (pixels,) * 8, (plan.rng(draw),) * 8, (False,) * 8)
                made = judge(accept, batch, config.method.expand(batch, tools), tools)
                if made.reasons[0] is None:
                    found[draw.sample_id] = (draw.attempt, made.images[0].tobytes())
                    break
                draw = plan.redraw(draw)
    kept = {row["sample_id"]: (row["attempt"], np.asarray(Image.open(io.BytesIO(
        row["image"]["bytes"]))).tobytes()) for receipt in run.store.receipts()
        for row in run.store.data(receipt).to_pylist()}

    assert kept == found
    assert {attempt for attempt, _ in found.values()} == {0, 1, 2, 3}
    assert totals.rejected == totals.planned - len(found) > 0


def test_the_same_command_again_makes_nothing(make_config: MakeConfig, accept: Accepting, calls: list[Any]) -> None:
    config = make_config("Worded", ratio=2, sections={"accept": accept()})
    run, _ = complete(config)
    made, before = len(calls), (hashes(run), refused(run))
    again, _ = complete(config)
    assert (len(calls), hashes(again), refused(again)) == (made, *before)
    assert len(again.plan.index) == 20, "samples are never taken for real images"


@pytest.mark.parametrize("exhausted", ["reject", "best"])
@pytest.mark.fast_cases(1)
def test_rows_do_not_depend_on_the_batch_the_shards_or_their_order(make_config: MakeConfig, accept: Accepting,
                                                                  exhausted: str) -> None:
    def config(name: str, **sizes: int) -> Any:
        return make_config("Worded", ratio=3, name=name, sections={"accept": accept(exhausted=exhausted)}, **sizes)

    reference, _ = complete(config("reference"))
    expected = hashes(reference), refused(reference), attempts(reference)
    for batch, shard_images in ((1, 8), (3, 60), (8, 20)):
        run, _ = complete(config(f"b{batch}", batch=batch, shard_images=shard_images))
        assert (hashes(run), refused(run), attempts(run)) == expected
    run = runs.prepare(config("other"))
    for shard in reversed(range(run.plan.n_shards)):
        expander = runs.start(run)  # each shard in a fresh one
        expander(shard)
        expander.close()
    assert (hashes(run), refused(run), attempts(run)) == expected
    for sample_id in [*hashes(run)][::9]:
        assert runs.start(run).regenerate(sample_id).sample_sha256 == expected[0][sample_id]


@pytest.mark.parametrize("ratio", [60, pytest.param(500, marks=pytest.mark.study)])
def test_calls_are_full_until_the_tail(make_config: MakeConfig, accept: Accepting, calls: list[Any],
                                       ratio: int) -> None:
    """At acceptance 1/2, in five attempts, 1.94 tries of each row and 3.1 % of rows exhausted; 10,000 rows: within
    0.04 and 0.6 %."""
    run, totals = complete(make_config("Fake", ratio=ratio, batch=64, shard_images=20 * ratio, sections={
        "accept": accept(attempts=5)}))
    filled = [sum(draw is not None for draw in call.slots) for call in calls]
    tries = sum(filled) / totals.planned
    first = next(i for i, count in enumerate(filled) if count < 64)

    assert {len(call.slots) for call in calls} == {64}
    assert len({call.number for call in calls}) == len(calls)
    assert sum(filled[first:]) < 4 * 64, "the tail is short"
    assert sum(filled[:-5]) / (64 * len(filled[:-5])) >= 0.95
    assert tries == pytest.approx(1.9375, abs=3 * 1.2 / totals.planned**0.5)
    assert totals.rejected / totals.planned == pytest.approx(0.031, abs=0.55 / totals.planned**0.5)
    (receipt,) = run.store.receipts()
    assert Counter(attempts(run).values())[0] == pytest.approx(10 * ratio, abs=1.5 * totals.planned**0.5)
    assert receipt.kept + receipt.rejected == totals.planned == 20 * ratio


def test_a_row_that_a_method_rejects_is_drawn_again(make_config: MakeConfig, accept: Accepting) -> None:
    run, totals = complete(make_config("Picky", ratio=4, share=0.5, sections={
        "accept": accept(above=-1.0, attempts=3, exhausted="best")}))
    rows = [row for receipt in run.store.receipts() for row in run.store.data(receipt).to_pylist()]

    assert {row["attempt"] for row in rows} == {0, 1, 2}
    assert all({one["name"] for one in row["scores"]} == {ABOVE, SCORE, "luck"} for row in rows), "no score, no image"
    assert set(refused(run).values()) == {"exhausted"}, "none of its tries can be kept"
    assert totals.rejected == pytest.approx(10, abs=8)


def test_a_failed_row_is_not_drawn_again(make_config: MakeConfig, accept: Accepting) -> None:
    row = "bee/2.png/1"
    run, totals = complete(make_config("Failing", nan=row, sections={"accept": accept(above=-1.0)}))
    assert (refused(run), attempts(run)[row]) == ({row: "nan_latent"}, 0)
    assert totals.kept == totals.planned - 1


def test_a_constant_try_is_not_the_best(make_config: MakeConfig, accept: Accepting,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    class Flat(fakes.Numbered):
        name: str = "tests.methods.fakes.Late"

        def expand(self, batch: Batch, tools: Tools) -> Expansion:
            made = super().expand(batch, tools)
            for i, draw in enumerate(batch.draws):
                if draw.attempt == 1:
                    made.images[i] = np.full((16, 16, 3), 1, np.uint8)
            return made

    monkeypatch.setattr(fakes, "Late", Flat, raising=False)
    monkeypatch.setattr("rayexpand.runs.tools._guide", lambda *given: Table(0.2, 0.4, 0.3))
    run, _ = complete(make_config("Late", ratio=1, sections={"accept": accept(attempts=3, exhausted="best")}))
    assert set(attempts(run).values()) == {2}


def test_bad_redraws_cost_themselves_alone(make_config: MakeConfig, accept: Accepting) -> None:
    sections = {"accept": accept(exhausted="best")}
    clean, _ = complete(make_config("BadRedraws", ratio=3, sections=sections))
    bads = [sample_id for sample_id, attempt in attempts(clean).items() if attempt][:3]
    run, _ = complete(make_config("BadRedraws", ratio=3, bads=bads, name="bad", sections=sections))

    assert refused(run) == dict.fromkeys(bads, "sampler_error")
    assert hashes(run) == {k: v for k, v in hashes(clean).items() if k not in bads}


def test_a_retry_draws_again_what_had_failed(make_config: MakeConfig, accept: Accepting, image_folder: Path,
                                             tmp_path: Path) -> None:
    sections = {"accept": accept()}
    reference, _ = complete(make_config("Fake", ratio=3, sections=sections))
    broken = Path(shutil.copytree(image_folder, tmp_path / "broken"))
    (broken / "bee/2.png").write_bytes(b"")
    run, totals = complete(make_config("Fake", ratio=3, name="retried", sections=sections, data={
        "source": "imagefolder", "path": str(broken)}))
    assert totals.failed == 3
    shutil.copy(image_folder / "bee/2.png", broken / "bee/2.png")
    runs.drive(run, runs.in_process(runs.start(run)), runs.retry_jobs(run), to_the_end=True)
    assert hashes(run) == hashes(reference)
    assert verify(run, pixels=True).problems == []


@pytest.mark.parametrize("first", ["kept", "again"])
def test_a_shard_that_runs_out_of_memory_on_the_way_has_one_shape(make_config: MakeConfig, accept: Accepting,
                                                                  monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Also where all rows so far are to be drawn again, so that none is decided."""
    sizes: list[int] = []

    class Late(fakes.Numbered):
        name: str = "tests.methods.fakes.Late"

        def expand(self, batch: Batch, tools: Tools) -> Expansion:
            sizes.append(len(batch))
            if len(sizes) == 2:
                raise torch.OutOfMemoryError("something else took the memory")
            made = super().expand(batch, tools)
            for image in made.images:
                assert image is not None
                image[1, 1] = len(batch)
            return made

    monkeypatch.setattr(fakes, "Late", Late, raising=False)
    monkeypatch.setattr("rayexpand.runs.tools._guide", lambda *given: Table(0.9 if first == "kept" else 0.1, 0.9))
    run, totals = complete(make_config("Late", ratio=2, batch=8, shard_images=40, sections={"accept": accept()}))

    assert sizes[:2] == [8, 8]
    assert set(sizes[2:]) == {4}
    shapes = {Image.open(io.BytesIO(row["image"]["bytes"])).getpixel((1, 1))[0]
              for receipt in run.store.receipts() for row in run.store.data(receipt).to_pylist()}
    assert (shapes, totals.kept) == ({4}, 40)


class Small(ScriptedJudge):
    """Runs out of memory above four images, and raises at one."""

    def __init__(self, bad: bytes = b"") -> None:
        self.bad = bad

    def seen(self, images: Any) -> Any:
        if len(images) > 4:
            raise torch.OutOfMemoryError("the judge")
        if any(image.tobytes() == self.bad for image in images):
            raise RuntimeError("this image ends the judge")
        return super().seen(images)


def test_faults_of_the_judge_are_those_of_a_call(make_config: MakeConfig, accept: Accepting,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = complete(make_config("Fake", ratio=2, batch=4, sections={"accept": accept()}))
    monkeypatch.setattr("rayexpand.runs.tools._guide", lambda *given: Small())
    run, _ = complete(make_config("Fake", ratio=2, batch=8, name="less", sections={"accept": accept()}))
    assert {tuple(receipt.shape) for receipt in run.store.receipts()} == {(4,)}
    assert (hashes(run), attempts(run)) == (hashes(small), attempts(small))

    row = next(row for receipt in small.store.receipts() for row in small.store.data(receipt).to_pylist()
               if row["attempt"] == 1)
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        bad = np.asarray(image).tobytes()
    monkeypatch.setattr("rayexpand.runs.tools._guide", lambda *given: Small(bad))
    run, _ = complete(make_config("Fake", ratio=2, batch=4, name="bad", sections={"accept": accept()}))
    lost = row["sample_id"]
    assert refused(run)[lost] == "sampler_error"
    assert hashes(run) == {name: value for name, value in hashes(small).items() if name != lost}


def test_the_judge_is_loaded_and_hashed_apart_from_the_guide(make_config: MakeConfig, judge_folder: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    from rayexpand.runs import tools

    loaded: list[str] = []
    plain = tools._guide

    def noting(said: Any, *rest: Any) -> Any:
        loaded.append(said.weights)
        return plain(said, *rest)

    monkeypatch.setattr(tools, "_guide", noting)
    accept = {"guide": {"weights": str(judge_folder)}, "score": "confidence", "above": 0.0, "attempts": 1}
    run, totals = complete(make_config("Fake", ratio=1, sections={"accept": accept}))
    assert run.facts["models"] == {"judge": guide_hash(str(judge_folder), None)}
    assert (loaded, totals.kept) == ([str(judge_folder)], 20)
    opened = runs.open_run(str(run.folder), check_models=True)
    assert opened.config.accept == run.config.accept
