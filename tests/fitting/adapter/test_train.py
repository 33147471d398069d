"""Fine-tuning in this process: latents, what every step is fed, and adapters that a kill does not change."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file

from rayexpand.artifacts.columns import write_captions, write_class_features, write_image_features
from rayexpand.artifacts.store import read_facts
from rayexpand.contract.errors import ConfigError, Interrupted, ModelError, RayexpandError, UsageError
from rayexpand.contract.rng import RowRng, generator, row_key
from rayexpand.contract.schema import ClassTable, SeedIndex
from rayexpand.data import pixels, seeds
from rayexpand.data.seeds import DataConfig
from rayexpand.diffusion.sampling import to_tensor
from rayexpand.fitting import fit as fits
from rayexpand.fitting.adapter import fit as artifact
from rayexpand.fitting.adapter import latents
from rayexpand.fitting.adapter import train as finetune_run
from rayexpand.fitting.adapter.config import SheetConfig
from rayexpand.fitting.adapter.finetuner import Finetuner
from rayexpand.fitting.adapter.fit import TUNE_HERE, Data
from rayexpand.fitting.adapter.latents import Latents, Views
from rayexpand.fitting.adapter.loader import LatentLoader, Sources
from rayexpand.fitting.adapter.recipe import FinetuneConfig, make_finetune
from rayexpand.fitting.adapter.sample_grid import draw_sheet
from rayexpand.fitting.config import parse_fit
from rayexpand.fitting.maker import data_facts
from rayexpand.fitting.picture_grid import CELL, GAP, LINE, NAME
from rayexpand.models.prior import load_prior, prior_hash
from tests.commands import rayexpand

torch.set_num_threads(1)
KEYS = ("ant", "bee", "cat", "dog")
SHORT = {"steps": 5, "batch": 4, "lr": 1e-2, "token_lr": 1e-2, "init_token": "digit", "prompt": "a {token} shape"}
PLAIN = {**SHORT, "strategy": "db", "rank": 2, "prompt": "a {name}"}


def fit(raw: dict[str, Any]) -> Path:
    (folder,) = fits.fit(parse_fit(raw), quiet).values()
    return folder


def quiet(task: str, done: int, total: int) -> None:
    """Nothing is shown."""


def content(folder: Path) -> dict[str, bytes]:
    """The weights and the description of what was trained."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*"))
            if one.suffix in (".safetensors", ".json") and one.name != "artifact.json"}


# ------------------------------------------------------------------------------------------------------------ latents


def test_latents_are_the_posteriors_of_keyed_crops_and_their_mirror_images(prior: Path, tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.Philox(key=5))
    wide = rng.integers(0, 256, (20, 48, 3), dtype=np.uint8)
    (tmp_path / "images/ant").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "images/ant/0.png")
    data = DataConfig(source="imagefolder", path=str(tmp_path / "images"))
    views = Views(resolution=16, crops=2, flips=True, batch=3, dtype="float32", seed=9)
    model = load_prior(str(prior), device="cpu")
    part = latents.LatentMaker(seeds.build_index(data), data, model, views)(range(1))

    squares = []
    for crop in range(2):
        square = pixels.prepare(wide, 16, "crop", RowRng(9, f"finetune/{crop}", "ant/0.png", 0))
        squares += [square, square[:, ::-1]]
    assert not np.array_equal(squares[0], squares[2]), "two crops"
    with torch.no_grad():
        found = model.vae.encode(to_tensor([np.ascontiguousarray(one) for one in squares]) * 2 - 1).latent_dist
    np.testing.assert_allclose(part.mean[0], found.mean * 0.5, atol=1e-6)
    np.testing.assert_allclose(part.std[0], found.std * 0.5, atol=1e-6)


def test_unreadable_images_are_left_out_and_named(raw: Callable[..., Any], image_folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(image_folder, tmp_path / "broken"))
    (broken / "bee/2.png").write_bytes(b"nothing")
    config = {**raw({**SHORT, "strategy": "ti", "steps": 1}), "data": {"source": "imagefolder", "path": str(broken)}}
    folder = fit(config)
    (made,) = (tmp_path / "artifacts").glob("latents-*")
    facts, kept = read_facts(made), Latents(made)

    assert (facts["images"], facts["refused"], facts["views"]) == (19, 1, 2)
    assert facts["refused_examples"]["bee/2.png"].startswith("decode_error")
    assert len(kept) == 19
    assert "bee/2.png" not in kept.seed_ids.to_pylist()
    assert [read_facts(folder)[name] for name in ("images", "refused", "blank_captions")] == [19, 1, 0]
    assert "bee/2.png" in read_facts(folder)["refused_examples"]

    for file in broken.glob("*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(ModelError, match="none of 20 images can be used"):
        fit({**config, "seed": 1})


def test_parts_that_were_made_survive_a_kill(raw: Callable[..., Any], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "PART_SEEDS", 6)
    config, made, real = raw({**SHORT, "strategy": "ti", "steps": 1}), [], latents.LatentMaker.__call__

    def stop_at_third(self: Any, rows: range) -> Any:
        made.append(rows.start)
        if made == [0, 6, 12]:
            raise Interrupted("stopped")
        return real(self, rows)

    monkeypatch.setattr(latents.LatentMaker, "__call__", stop_at_third)
    with pytest.raises(Interrupted):
        fit(config)
    fit(config)
    (folder,) = (tmp_path / "artifacts").glob("latents-*")
    kept = Latents(folder)

    assert made == [0, 6, 12, 12, 18]
    assert kept.seed_ids.to_pylist() == [f"{key}/{i}.png" for key in KEYS for i in range(5)]
    assert not list((tmp_path / "artifacts").glob(".latents-*.work"))
    monkeypatch.setattr(latents, "PART_SEEDS", 2048)
    fit({**config, "out": str(tmp_path / "whole")})
    (whole,) = (tmp_path / "whole").glob("latents-*")
    for item in range(20):
        assert np.array_equal(kept.posterior(item, 1), Latents(whole).posterior(item, 1))


# --------------------------------------------------------------------------------------------------------------- feed


def feed_of(folder: Path, counts: tuple[int, ...] = (5, 5), captions: list[str] | None = None,
            features: Path | None = None, flips: bool = False, **recipe: Any) -> LatentLoader:
    """A feed over made-up latents: item i has mean i in its view 0 and i + 0.5 in view 1, deviation 0.1."""
    labels = np.repeat(np.arange(len(counts)), counts)
    n = len(labels)
    table = pa.table({"seed_id": [f"s{i}" for i in range(n)], "label": pa.array(labels, pa.int32())})
    classes = ClassTable.of([f"k{i}" for i in range(len(counts))], [f"kind_{i}" for i in range(len(counts))])
    views = Views(16, 1, flips, 1, "float32", 0)
    mean = (np.arange(n)[:, None] + 0.5 * np.arange(views.count))[:, :, None, None, None] * np.ones(
        (1, 1, 4, 2, 2), np.float32)
    folder.mkdir(exist_ok=True)
    latents.write_part(folder, latents.LatentPart(0, np.arange(n), mean.astype(np.float32),
                                                  np.full_like(mean, 0.1, np.float32), {}))
    latents.finish(folder, SeedIndex(table, classes), views, [range(n)])
    if captions is not None:
        write_captions(folder, [f"s{i}" for i in range(n)], captions)
    config = make_finetune({**SHORT, **recipe})
    return LatentLoader(Sources(str(folder), str(folder) if captions else None, str(features) if features else None),
                        config, classes, 3, 1000)


def test_every_pass_shows_every_image_once_and_workers_share_a_batch(tmp_path: Path) -> None:
    feed = feed_of(tmp_path / "l", (5, 6), batch=4)
    stream = np.concatenate([feed.items(step) for step in range(11)])  # 44 = 4 passes over 11 images
    whole = [feed.visits(step) for step in range(6)]
    halves = [list(feed_of(tmp_path / "l", (5, 6), batch=4).batches(0, 6, rank, 2)) for rank in range(2)]

    for epoch in range(4):
        assert sorted(stream[epoch * 11:(epoch + 1) * 11]) == list(range(11))
    assert not np.array_equal(stream[:11], stream[11:22])
    for step, one in enumerate(whole):
        for name in ("z0_BCHW", "noise_BCHW", "t_B", "dropped_B", "texts"):
            joined = np.concatenate([getattr(halves[rank][step], name) for rank in range(2)])
            assert np.array_equal(joined, getattr(one, name)), name
    alone = feed_of(tmp_path / "l", (5, 6), batch=4).visits(5)
    assert np.array_equal(alone.z0_BCHW, whole[5].z0_BCHW), "a step does not depend on those before it"


def test_each_visit_has_draws_of_its_own(tmp_path: Path) -> None:
    feed = feed_of(tmp_path / "l", (1,), batch=2, steps=1)
    visits = feed.visits(0)
    expected = [0.1 * generator(row_key(3, "finetune", "s0", place, 0, "latent")).standard_normal((4, 2, 2), np.float32)
                for place in range(2)]

    np.testing.assert_allclose(visits.z0_BCHW, expected, atol=1e-7)
    assert not np.array_equal(visits.z0_BCHW[0], visits.z0_BCHW[1])
    assert not np.array_equal(visits.noise_BCHW[0], visits.noise_BCHW[1])


def test_views_timesteps_and_drops_are_spread(tmp_path: Path) -> None:
    feed = feed_of(tmp_path / "l", (8,), flips=True, batch=400, caption_drop=0.25)
    visits = feed.visits(0)
    view = np.round(visits.z0_BCHW.mean((1, 2, 3)) * 2) % 2

    assert 0.4 < view.mean() < 0.6
    assert 0.18 < visits.dropped_B.mean() < 0.32
    assert visits.t_B.min() < 30
    assert visits.t_B.max() > 970


def test_a_long_tail_is_balanced_by_drawing(tmp_path: Path) -> None:
    counts = (90, 9, 1)
    feed = feed_of(tmp_path / "l", counts, balance="inverse", batch=100)
    labels = np.repeat(np.arange(3), counts)
    drawn = np.bincount(np.concatenate([labels[feed.items(step)] for step in range(60)]), minlength=3) / 6000

    np.testing.assert_allclose(drawn, 1 / 3, atol=0.03)


def test_texts_visual_tokens_and_captions(tmp_path: Path) -> None:
    plain = feed_of(tmp_path / "l", (2, 2), strategy="db", prompt="a {name}", batch=4)
    captions = ["red", "", "blue", "green"]
    told = feed_of(tmp_path / "c", (2, 2), captions, strategy="db", prompt="{name}, {caption}", batch=3)
    write_class_features(tmp_path, np.array([[1, 2], [3, 4]], np.float32), class_keys=["k0", "k1"], encoder_sha256="e",
                         images_per_class=None)
    by_class = feed_of(tmp_path / "l", (2, 2), features=tmp_path, visual_token="class_mean", batch=4).visits(0)

    assert set(plain.visits(0).texts) == {"a kind 0", "a kind 1"}
    assert set(told.visits(0).texts) == {"kind 0, red", "kind 1, blue", "kind 1, green"}
    assert told.rows.tolist() == [0, 2, 3]
    assert by_class.visual_BD is not None
    assert by_class.visual_BD.tolist() == [[1, 2] if "<class_0>" in text else [3, 4] for text in by_class.texts]
    write_captions(tmp_path / "c", ["s0", "s1"], ["a", "b"])
    with pytest.raises(UsageError, match="no captions of 2 of 4 seeds, such as 's2'"):
        LatentLoader(Sources(str(tmp_path / "c"), str(tmp_path / "c")), told.recipe,
                     ClassTable.of(["k0", "k1"]), 0, 1000)


# ----------------------------------------------------------------------------------------------------------- training


def visual(tmp_path: Path, mode: str) -> dict[str, Any]:
    """Recipe and section fields of Real-Fake in small: DB, MMD, Min-SNR, captions, a visual token."""
    rng = np.random.Generator(np.random.Philox(key=2))
    folder, ids = tmp_path / mode, [f"{key}/{i}.png" for key in KEYS for i in range(5)]
    folder.mkdir(exist_ok=True)
    write_captions(folder, ids, [f"number {i}" for i in range(20)])
    if mode == "class_mean":
        write_class_features(folder, rng.standard_normal((4, 16), dtype=np.float32), class_keys=KEYS,
                             encoder_sha256="e", images_per_class=None)
    else:
        write_image_features(folder, ids, rng.standard_normal((20, 16), dtype=np.float32), encoder_sha256="e")
    recipe = {**PLAIN, "prompt": "photo of {name}, {caption}", "mmd_gamma": 0.05, "snr_gamma": 5.0,
              "visual_token": mode, "caption_drop": 0.2}
    return {"recipe": recipe, "captions": str(folder), "features": str(folder)}


SHEET = {"classes": 1, "images": 1, "steps": 1}
CASES = {"bf16": {"recipe": {**SHORT, "rank": 2, "precision": "bf16"}, "sheet": SHEET},
         "ti_db": {"recipe": {**SHORT, "rank": 2, "accumulate": 2}},
         "realfake": "class_mean", "full": {"recipe": {**PLAIN, "strategy": "full", "rank": 1}}}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.fast_cases(1)
def test_a_killed_fine_tuning_goes_on_to_the_same_bytes(case: str, raw: Callable[..., Any], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    fields = CASES[case] if isinstance(CASES[case], dict) else visual(tmp_path, str(CASES[case]))
    whole = fit({**raw(**fields), "out": str(tmp_path / "whole")})  # type: ignore[arg-type]
    update = Finetuner.update

    def stop_at_three(self: Finetuner, batch: Any) -> float:
        if self.step == 3:
            raise Interrupted("stopped")
        return update(self, batch)

    config = raw(**fields)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "update", stop_at_three)
        with pytest.raises(Interrupted):
            fit(config)
    (work,) = Path(config["out"]).glob(".*[!s]-*.work")
    assert (work / "finetune.safetensors").is_file()
    folder = fit(config)
    facts, undisturbed = read_facts(folder), read_facts(whole)

    assert content(folder) == content(whole)
    assert (facts["starts"], undisturbed["starts"]) == ([0, 2], [0])
    assert facts["curve"] == undisturbed["curve"]
    assert [point["step"] for point in facts["curve"]] == [2, 4, 5]
    assert not work.exists()
    assert fit(config) == folder, "made once"


def test_an_adapter_samples_what_the_last_sheet_shows(raw: Callable[..., Any], prior: Path) -> None:
    """Written, read and fused, the adapter draws what the models in training drew, also with alpha / rank of 3."""
    sheet = SheetConfig(classes=3, images=2, steps=2)
    config = raw({**SHORT, "rank": 2, "alpha": 6}, sheet=sheet.model_dump())
    folder = fit(config)
    loaded = load_prior(str(prior), device="cpu").with_adapter(folder, base_sha256=prior_hash(str(prior)))
    (made,) = Path(config["out"]).glob("latents-*")
    recipe = FinetuneConfig(**{**SHORT, "rank": 2})
    feed = LatentLoader(Sources(str(made)), recipe, ClassTable.of(KEYS), 0, 1000)

    class Loaded:
        """What a sheet asks of a Finetuner, answered by the loaded adapter."""

        step = 5

    drawn = np.asarray(draw_sheet(sheet, loaded, Loaded, feed, 0), int)  # type: ignore[arg-type]
    sheets = [np.asarray(Image.open(file), int) for file in sorted((folder / "sheets").iterdir())]

    assert [file.name for file in sorted((folder / "sheets").iterdir())] == [
        "step-000002.png", "step-000004.png", "step-000005.png"]
    step, top, left = CELL + GAP, 2 * LINE + GAP, NAME
    assert drawn.shape == (top + 3 * step, left + 2 * step, 3)
    assert np.abs(drawn - sheets[-1]).max() <= 1
    assert np.abs(drawn[top:, left:] - sheets[0][top:, left:]).max() > 1, "another step, another picture"
    first, right, below = (drawn[y:y + CELL, x:x + CELL] for y, x in (
        (top, left), (top, left + step), (top + step, left)))
    assert np.abs(first - right).max() > 1, "another column, another noise"
    assert np.abs(first - below).max() > 1, "another row, another class"
    assert drawn[top:, :left].min() < 64, "the name of a row"


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars of TensorBoard files: name -> step -> value; a later file holds over an earlier one from its start."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.iterdir()):
        stream = file.read_bytes()
        while stream:
            (size,) = struct.unpack("<Q", stream[:8])
            event, stream = Event.FromString(stream[12:12 + size]), stream[16 + size:]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_curves_are_tensorboard_events_and_part_of_the_facts(raw: Callable[..., Any]) -> None:
    folder = fit(raw({**SHORT, "strategy": "ti", "mmd_gamma": 0.05}, tensorboard=True))
    curve, shown = read_facts(folder)["curve"], events(folder / "tensorboard")

    for name in ("loss", "l_simple", "l_mmd"):
        assert shown[name] == pytest.approx({point["step"]: point[name] for point in curve}, rel=1e-6)
    assert set(shown) == {"loss", "l_simple", "l_mmd", "grad_norm", "lr", "token_lr", "images_per_second"}
    assert all(value > 0 for value in shown["grad_norm"].values())
    assert shown["token_lr"][5] == pytest.approx(1e-2)
    assert curve[0]["loss"] == pytest.approx(curve[0]["l_simple"] + 0.05 * curve[0]["l_mmd"])


def job_of(raw: dict[str, Any], spreads: bool = False) -> finetune_run.TuneJob:
    config = parse_fit(raw)
    index = seeds.build_index(config.data)
    assert config.fit.adapter is not None
    return artifact.prepare_job(
        config.fit.adapter, Data(config.data, index, data_facts(config, index)), out=config.out,
        weights=config.prior.weights, seed=config.seed, device="cpu", runtime=config.runtime, here={},
        progress=quiet, engine=replace(TUNE_HERE, spreads=spreads))[0]


def test_a_warning_saves_a_checkpoint(raw: Callable[..., Any]) -> None:
    tuning = finetune_run.open_tuning(job_of(raw(SHORT, checkpoint_every=100)))
    saved: list[int] = []
    finetune_run.tune(tuning, tuning.feed.batches(0, SHORT["steps"]), save=lambda: saved.append(tuning.tuner.step),
                      warned=lambda: tuning.tuner.step == 3)

    assert saved == [3, 5]


def test_what_decides_the_numbers_decides_the_digest(raw: Callable[..., Any]) -> None:
    def digest(recipe: dict[str, Any] | None = None, spreads: bool = False, **fields: Any) -> str:
        return job_of(raw({**SHORT, **(recipe or {})}, **fields), spreads).digest

    same = digest()
    how = {"checkpoint_every": 1, "log_every": 1, "loaders": 3, "cpus_per_worker": 2, "tensorboard": True}
    assert digest(workers=2, **how) == digest(spreads=True, workers=1) == digest(spreads=True, workers=0) == same
    others = [digest({"token_lr": 2e-2}), digest(flips=False), digest(crops=2), digest(latents={"batch": 2}),
              digest(spreads=True, workers=2)]
    assert len({same, *others}) == 6


def test_full_is_a_pipeline_of_its_own(raw: Callable[..., Any], prior: Path) -> None:
    config = raw({**PLAIN, "strategy": "full", "steps": 1})
    folder = fit(config)
    model = load_prior(str(folder), device="cpu")
    (made,) = Path(config["out"]).glob("ants-generator")
    base = load_file(prior / "text_encoder/model.safetensors")
    own = load_file(folder / "text_encoder/model.safetensors")

    assert made.resolve() == folder.resolve()
    assert prior_hash(str(folder)) != prior_hash(str(prior))
    assert model.embed(["a cat"], [""], 1.0).tokens_BTE.shape == (1, 16, 16)
    assert all(not np.array_equal(base[name], own[name]) for name in base if "token_embedding" not in name)
    assert load_file(folder / "vae/diffusion_pytorch_model.safetensors").keys() == load_file(
        prior / "vae/diffusion_pytorch_model.safetensors").keys()


def test_training_that_diverges_is_refused_and_leaves_no_adapter(raw: Callable[..., Any]) -> None:
    config = raw({**SHORT, "lr": 1e30, "token_lr": 1e30, "rank": 2})
    with pytest.raises(RayexpandError, match="diverged"):
        fit(config)
    assert not list(Path(config["out"]).glob("adapter-*"))


def test_a_checkpoint_of_another_fine_tuning_is_refused(raw: Callable[..., Any],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    config = raw({**SHORT, "strategy": "ti"})
    with monkeypatch.context() as patch:
        patch.setattr(finetune_run, "write_trained", lambda *_: (_ for _ in ()).throw(Interrupted("stop")))
        with pytest.raises(Interrupted):
            fit(config)
    (work,) = Path(config["out"]).glob(".adapter-*.work")
    other = raw({**SHORT, "rank": 2})
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "artifact_digest", lambda kind, made_from: work.name.partition("-")[2][:8])
        with pytest.raises(ModelError, match="belongs to another training"):
            fit(other)


def test_the_verb_prints_the_field_to_set_and_sends_a_run_back(raw: Callable[..., Any], tmp_path: Path) -> None:
    config = raw({**SHORT, "strategy": "ti", "steps": 1})
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    made = rayexpand("fit", tmp_path / "fit.yaml", "--no-ray")
    run = {"name": "run", "data": config["data"], "prior": config["prior"],
           "method": {"name": "text2img", "prompt": "a {token}"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    sent_back = rayexpand("fit", tmp_path / "run.yaml", "--no-ray")

    assert made.returncode == 0
    assert f"in a run: --set artifacts.adapter={config['out']}/ants-adapter" in made.stdout
    assert (Path(config["out"]) / "ants-adapter/adapter.json").is_file()
    assert sent_back.returncode == 2
    assert "a run does not say how to train one" in sent_back.stderr


# ---------------------------------------------------------------------------------------------------------- preflight


@pytest.mark.parametrize(("fields", "said"), [
    ({"recipe": {"rnk": 4}}, "rnk: unknown field, did you mean 'rank'?"),
    ({"recipe": {"preset": "difmix"}}, "preset 'difmix' is unknown"),
    ({"recipe": {**SHORT, "batch": 6, "accumulate": 4}}, "batch 6 cannot be computed in 4 equal parts"),
    ({"recipe": SHORT, "checkpoints": 3}, "fit.adapter.checkpoints: unknown field"),
    ({"recipe": SHORT, "sheet": {"solver": "euler"}}, "fit.adapter.sheet.solver"),
])
def test_mistakes_of_the_section(fields: dict[str, Any], said: str, raw: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fit(raw(**fields))
    assert said in str(caught.value)


def test_everything_wrong_is_said_at_once(raw: Callable[..., Any], tmp_path: Path) -> None:
    recipe = {"strategy": "ti_db", "prompt": "a {token} {metaclass}, {caption}", "init_token": 42170, "batch": 6,
              "visual_token": "instance", "precision": "fp16"}
    config = raw(recipe, resolution=20, workers=4, features=str(tmp_path / "none"), sheet={"steps": 2000})
    with pytest.raises(ConfigError) as caught:
        fits.fit(parse_fit({**config, "data": {"source": "digits", "path": "nowhere"}}), quiet)
    problems = caught.value.problems
    with pytest.raises(ConfigError) as caught:
        fits.fit(parse_fit(config), quiet)

    assert [problem.partition(": ")[0] for problem in problems] == [
        "data.path", "fit.adapter.captions", "fit.adapter.features", "fit.adapter.recipe.precision",
        "fit.adapter.resolution", "fit.adapter.recipe.init_token", "fit.adapter.sheet.steps"]
    assert "set fit.adapter.resolution to 16 or 24" in problems[4]
    assert "42170 is no id of this generator's vocabulary" in problems[5]
    assert caught.value.problems[-1].startswith("fit.adapter.recipe.prompt: 'a {token} {metaclass}, {caption}' asks "
                                                "for {metaclass}, which 4 of 4 classes do not have, such as 'ant'")


def test_a_batch_is_shared_by_workers_only_where_there_are_any(raw: Callable[..., Any]) -> None:
    from rayexpand.fitting.config import preflight

    config = parse_fit(raw({**SHORT, "batch": 6, "accumulate": 2}, workers=2))
    assert preflight(config, on_ray=False) == []
    made_here = raw({**SHORT, "init_token": "wolf"})
    made_here["fit"]["pretrain"] = {"size": 16}
    assert preflight(parse_fit(made_here)) == [], "a vocabulary that is still to be made"
    (problem,) = preflight(config)
    assert problem == ("fit.adapter.recipe.batch: 6 images cannot be cut into 4 equal slices (2 workers, accumulate "
                       "2); use a multiple of 4")


@pytest.mark.parametrize(("workers", "on_ray", "fits"), [(0, False, True), (8, False, True), (2, True, True),
                                                        (1, True, True), (4, True, False)])
def test_a_term_of_some_images_lies_within_a_worker(raw: Callable[..., Any], workers: int, on_ray: bool,
                                                    fits: bool) -> None:
    from rayexpand.fitting.config import preflight

    recipe = {**SHORT, "batch": 8, "mmd_gamma": 0.1, "mmd_scope": "per_rank", "mmd_images": 4}
    problems = preflight(parse_fit(raw(recipe, workers=workers)), on_ray=on_ray)
    assert problems == ([] if fits else [
        "fit.adapter.recipe.mmd_images: 2 images (8 over 4 workers, accumulate 1) cannot be cut into terms of 4; use "
        "fewer workers, or accumulate less"])


def test_features_and_captions_of_the_same_file_are_used(raw: Callable[..., Any], tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({f"{key}/{i}.png": f"text {i}" for key in KEYS for i in range(5)}))
    config = raw({**PLAIN, "steps": 1, "prompt": "{name}, {caption}"})
    config["fit"]["captions"] = {"file": str(captions)}
    made = fits.fit(parse_fit(config), quiet)

    assert set(made) == {"captions", "adapter"}
    assert "captions" in read_facts(made["adapter"])["made_from"]
