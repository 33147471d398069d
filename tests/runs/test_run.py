from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayexpand import api
from rayexpand.artifacts.adapter import read_adapter
from rayexpand.artifacts.columns import write_captions, write_class_features, write_image_features
from rayexpand.contract.errors import (
    ConfigError,
    DamagedFile,
    DigestMismatch,
    EnvironmentFault,
    ModelError,
    OverBudget,
    UsageError,
)
from rayexpand.contract.schema import ClassTable, Receipt
from rayexpand.data.seeds import build_index
from rayexpand.methods import trust
from rayexpand.models.folders import folder_hash
from rayexpand.models.latent import StableDiffusionPrior
from rayexpand.runs import inputs
from rayexpand.runs import inputs as artifacts
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig, parse, semantic
from rayexpand.runs.driving import Here, RunProgress, prior_key
from rayexpand.runs.status import read_status
from rayexpand.runs.store import Tally, Totals, data_name
from rayexpand.runs.tools import load_tools, stack_fingerprint
from rayexpand.runs.verify import verify
from tests.commands import rewrite_json
from tests.conftest import MakeConfig, complete, hashes
from tests.methods.fakes import Fake
from tests.tiny import tiny_adapter, tiny_pipeline


@pytest.fixture
def broken(image_folder: Path, tmp_path: Path) -> Path:
    """The image folder with two images that cannot be read."""
    folder = tmp_path / "broken"
    shutil.copytree(image_folder, folder)
    for name in ("bee/1.png", "bee/2.png"):
        (folder / name).write_bytes(b"")
    return folder


def repair(broken: Path, image_folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(image_folder / name, broken / name)


def of(folder: Path) -> dict[str, str]:
    return {"source": "imagefolder", "path": str(folder)}


def retried(run: runs.Run) -> tuple[runs.Run, Totals]:
    """What `rayexpand retry` does."""
    again = runs.open_run(str(run.folder), check_models=True)
    expander = runs.start(again)
    try:
        return again, runs.drive(again, runs.in_process(expander), runs.retry_jobs(again), to_the_end=True)
    finally:
        expander.close()


def test_another_configuration_or_model_in_the_folder_is_refused(make_config: MakeConfig,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    complete(make_config("Fake", ratio=2))
    with pytest.raises(DigestMismatch, match=r"seed: 3 -> 4"):
        runs.prepare(make_config("Fake", ratio=2, sections={"seed": 4}))
    monkeypatch.setattr(runs, "model_hashes", lambda *args: {"prior": "other"})
    with pytest.raises(DigestMismatch, match=r"models\.prior"):
        runs.prepare(make_config("Fake", ratio=2))


def test_files_of_another_run_are_never_counted(make_config: MakeConfig) -> None:
    """Its run.json is gone, its data and receipts are still there."""
    run, _ = complete(make_config("Fake", ratio=2))
    Path(run.folder, "run.json").unlink()

    with pytest.raises(DigestMismatch):
        complete(make_config("Fake", ratio=2, sections={"seed": 99}))


def test_a_retry_refuses_other_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    weights = tiny_pipeline(tmp_path / "weights")
    sections = {"prior": {"weights": str(weights)}, "image": {"size": 16}}
    run = runs.prepare(make_config("img2img", ratio=1, steps=4, sections=sections))
    (unet,) = (weights / "unet").glob("*.safetensors")
    unet.write_bytes(unet.read_bytes()[:-1] + b"\x01")

    with pytest.raises(DigestMismatch, match=r"models\.prior"):
        runs.open_run(str(run.folder), check_models=True)
    assert runs.open_run(str(run.folder)).totals().pending == 20, "a status needs no model"


def test_an_empty_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="out"):
        parse({"name": "run", "out": "", "data": {"source": "digits"}, "method": {"name": "classical"}})


def test_a_copy_without_its_empty_folders_can_be_retried(make_config: MakeConfig, broken: Path,
                                                         image_folder: Path) -> None:
    run, _ = complete(make_config("Fake", data=of(broken)))
    repair(broken, image_folder, "bee/1.png", "bee/2.png")
    for name in (".tmp", "blame"):
        Path(run.folder, name).rmdir()

    assert retried(run)[1].kept == 40


def test_a_lost_first_file_of_a_retried_shard_is_noticed(make_config: MakeConfig, broken: Path,
                                                         image_folder: Path) -> None:
    config = make_config("Fake", ratio=3, data=of(broken))
    run, _ = complete(config)
    repair(broken, image_folder, "bee/1.png", "bee/2.png")
    run, totals = retried(run)
    assert totals.kept == 60
    reference = hashes(run)
    shard = next(shard for shard, generation in run.store.committed().items() if generation)
    Path(run.folder, "data", data_name(shard)).unlink()
    with pytest.raises(UsageError, match=rf"Delete what is left of them \(data/train-{shard:06d}"):
        complete(config)
    Path(run.folder, "data", data_name(shard, 1)).unlink()

    assert hashes(complete(config)[0]) == reference


def test_a_lost_middle_generation_is_noticed(make_config: MakeConfig, broken: Path, image_folder: Path) -> None:
    config = make_config("Fake", ratio=2, shard_images=100, data=of(broken))
    run, _ = complete(config)
    for name in ("bee/2.png", "bee/1.png"):
        repair(broken, image_folder, name)
        run, totals = retried(run)
    assert (totals.kept, totals.failed, totals.pending) == (40, 0, 0)
    assert verify(run).problems == []
    Path(run.folder, "data", data_name(0, 1)).unlink()

    with pytest.raises(UsageError, match="an earlier file of 1 retried shard"):
        complete(config)


def test_retries_of_retries_make_only_what_failed_last(make_config: MakeConfig,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> RunConfig:
        return make_config("RejectsAndFails", ratio=2, share=0.3, shard_images=100, name=name)

    reference = hashes(complete(config("clean"))[0])
    one, two = list(reference)[:2]
    monkeypatch.setenv("FAILS", f"{one} {two}")
    run, first = complete(config("run"))
    assert first.failed == 2
    assert first.rejected > 0
    monkeypatch.setenv("FAILS", one)
    run, second = retried(run)
    monkeypatch.setenv("FAILS", "")
    run, third = retried(run)

    assert [receipt.planned for receipt in run.store.receipts()] == [40, 2, 1]
    assert second.failed == 1
    assert (third.failed, third.pending, third.rejected) == (0, 0, first.rejected)
    assert hashes(run) == reference
    assert verify(run, pixels=True).problems == []


def test_rejected_rows_cost_no_budget(make_config: MakeConfig) -> None:
    sections = {"limits": {"max_failed": 0.0}}
    _, totals = complete(make_config("RejectsAndFails", ratio=2, share=0.3, sections=sections))

    assert totals.rejected > 0


def test_the_budget_stops_at_once_and_lets_a_retry_end(make_config: MakeConfig,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "ant/0.png/0 dog/4.png/1")
    config = make_config("RejectsAndFails", ratio=2, share=0.0, sections={"limits": {"max_failed": 0.0}})
    with pytest.raises(OverBudget):
        complete(config)
    assert runs.open_run(config.folder).totals().shards == 1, "stopped right after the shard that broke it"
    loose = runs.open_run(config.folder, ["limits.max_failed=1"])
    runs.drive(loose, runs.in_process(runs.start(loose)), lambda: runs.pending_jobs(loose))
    monkeypatch.setenv("FAILS", "")

    assert retried(loose)[1].failed == 0, "starts over its budget, ends under it"


def test_the_budget_names_reasons_of_failures_only(make_config: MakeConfig) -> None:
    run = runs.prepare(make_config("Picky", ratio=2, share=0.9, sections={"limits": {"max_failed": 0.0}}))
    receipt = runs.start(run)(0)
    assert "wrong_class" in receipt.reasons
    failed = replace(receipt, failed=1, reasons={**receipt.reasons, "sampler_error": 1})

    with pytest.raises(OverBudget, match="sampler_error 1") as caught:
        runs.check_budget(run, Tally(run.plan.planned, [failed]))
    assert "wrong_class" not in str(caught.value)


@pytest.mark.parametrize(("works", "asked"), [(False, 3), (True, 10)])
def test_three_faults_in_a_row_end_a_wave(make_config: MakeConfig, works: bool, asked: int) -> None:
    run = runs.prepare(make_config("Fake"))
    receipt = runs.start(run)(0)
    shards: list[int] = []

    def expander(shard_id: int, generation: int) -> Receipt:
        shards.append(shard_id)
        if works and shard_id % 3 == 2:
            return receipt
        raise EnvironmentFault("the storage hiccups")

    outcomes = list(runs.in_process(expander)([(shard, 0) for shard in range(10)]))  # type: ignore[arg-type]

    assert shards == list(range(asked))
    assert len(outcomes) == asked


def test_totals_hold_what_another_driver_committed(make_config: MakeConfig) -> None:
    run = runs.prepare(make_config("Fake"))
    mine, other = runs.start(run), runs.start(run)

    def wave(jobs: Sequence[runs.Job]) -> Iterator[Receipt | EnvironmentFault]:
        for job in jobs:
            if job == (1, 0):
                other(*job)
                yield EnvironmentFault("the storage hiccups")
            else:
                yield from runs.in_process(mine)([job])

    totals = runs.drive(run, wave, lambda: runs.pending_jobs(run))

    assert totals == run.totals()
    assert totals.pending == 0


# ---------------------------------------------------------------------------------------------------------- generators


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def sampled(make_config: MakeConfig, base: Path) -> Callable[..., RunConfig]:
    """A run by a small generator of Stable Diffusion's kind."""

    def make(method: str = "img2img", prior: dict[str, Any] | None = None, **fields: Any) -> RunConfig:
        return make_config(method, ratio=1, **fields, sections={
            "prior": {"weights": str(base), "device": "cpu", **(prior or {})}})

    return make


@pytest.mark.parametrize(("method", "fields", "starts"), [
    ("img2img", {}, {"0.5": -0.418195}), ("img2img", {"steps": 10, "strength": 0.9}, {"0.9": -1.635969}),
    ("img2img", {"spacing": "trailing"}, {"0.5": -0.478025}), ("text2img", {}, {}),
    ("diffmix", {"variant": "real_mix", "strengths": [0.5, 0.9], "steps": 50, "solver": "ddim", "prompt": "a {name}"},
     {"0.5": -0.418195, "0.9": -2.023187})], ids=str)
def test_the_noise_at_the_start_is_in_run_json(sampled: Callable[..., RunConfig], method: str, fields: dict[str, Any],
                                               starts: dict[str, float]) -> None:
    run = runs.prepare(sampled(method, **fields))
    written = json.loads((run.folder / "run.json").read_text())
    assert written["log_snr_at_start"] == run.facts["log_snr_at_start"] == pytest.approx(starts, abs=2e-6)
    assert run.facts["models"].keys() == {"prior"}, "and it is no model"


def test_a_run_without_a_generator_has_no_noise(make_config: MakeConfig) -> None:
    facts = runs.prepare(make_config("Fake")).facts
    assert not {"log_snr_at_start", "sampler_revision"} & facts.keys()


def test_the_revision_of_the_solvers_is_part_of_what_a_run_is_where_it_is_not_the_first(
        sampled: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.prepare(sampled(name="ddim"))
    second = runs.prepare(sampled(name="multistep", solver="dpmpp_2m"))
    assert "sampler_revision" not in first.facts
    assert second.facts["sampler_revision"] == 2
    monkeypatch.setattr(runs, "sampler_revision", lambda facts, method: 1)
    assert runs.prepare(sampled(name="multistep-1", solver="dpmpp_2m")).facts["run_digest"] != second.facts[
        "run_digest"]
    assert runs.prepare(sampled(name="ddim-1")).facts["run_digest"] == first.facts["run_digest"]


def test_solvers_that_changed_are_refused_only_where_samples_are_made(sampled: Callable[..., RunConfig],
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    half, whole = (sampled(name=name, steps=4) for name in ("half", "whole"))
    run, _ = complete(whole)
    begun = runs.prepare(half)
    expander = runs.start(begun)
    expander(0)
    expander.close()
    monkeypatch.setattr(runs, "sampler_revision", lambda facts, method: 7)
    with pytest.raises(DigestMismatch, match=r"half was begun with revision 1 of the solvers, and this version has 7.*"
                                             r"Finish it with rayexpand \S+, which began it, or give this run another "
                                             r"`name`"):
        runs.prepare(half)
    for config in (half, whole):
        with pytest.raises(DigestMismatch, match="begun with revision 1"):
            runs.open_run(str(config.folder), check_models=True)
    assert runs.open_run(str(begun.folder)).totals().pending > 0
    assert read_status(str(begun.folder)).pending == begun.totals().pending
    assert verify(runs.open_run(str(begun.folder)), pixels=True).problems == []
    assert runs.prepare(whole).totals() == run.totals(), "nothing is left to be made by others"


def begun_before(run: runs.Run, **prior: Any) -> runs.Run:
    """As if the run had begun before decoders had a precision of their own."""
    config = {**run.facts["config"], "prior": {**run.facts["config"]["prior"], "channels_last": False,
                                               "compile": False, **prior}}
    facts = {name: value for name, value in run.facts.items() if name != "log_snr_at_start"}
    return replace(run, facts={**facts, "config": config})


def test_a_run_begun_before_is_decoded_as_it_began(sampled: Callable[..., RunConfig], make_config: MakeConfig,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    new = runs.prepare(sampled())
    assert new.sampling is new.config
    old = begun_before(new, channels_last=True)
    assert old.sampling.prior.model_dump() == {**new.config.prior.model_dump(), "vae_dtype": "float32",
                                               "channels_last": True, "compile": False}
    assert old.sampling.model_copy(update={"prior": new.config.prior}) == new.config, "and all else is as it is said"
    assert prior_key(old) != prior_key(new)
    assert begun_before(runs.prepare(make_config("Fake", name="other"))).sampling.prior.vae_dtype == "auto"

    asked = list[RunConfig]()
    monkeypatch.setattr("rayexpand.runs.driving.load_tools", lambda config, *_, **__: (
        asked.append(config), load_tools(config, ClassTable.of(CLASSES)))[1])
    Here().tools(old)
    runs.expander_of(old, attempt=0).close()
    assert asked == [old.sampling]
    assert runs.expander_of(old, attempt=0).config == old.sampling
    assert asked[0].prior.vae_dtype == "float32"


@pytest.mark.parametrize(("device", "vae_dtype", "decoded"), [
    ("cpu", "auto", None), ("cuda:0", "auto", "bfloat16"), ("cuda:0", "float32", None), ("cpu", "bfloat16", "bfloat16"),
    ("cuda:0", "float16", "float16")])
def test_the_precision_of_the_decoder_is_part_of_the_stack_where_it_is_not_full(
        sampled: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, device: str, vae_dtype: str,
        decoded: str | None) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    config = sampled(prior={"vae_dtype": vae_dtype})
    config = config.model_copy(update={"prior": config.prior.model_copy(update={"device": device})})
    assert stack_fingerprint(config).get("vae_dtype") == decoded


@pytest.mark.parametrize(("compile", "possible", "said"), [
    ("auto", True, "True"), ("auto", False, "False"), (True, False, "True"), (False, True, "False")])
def test_the_stack_says_compiled_where_a_network_is(
        sampled: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, compile: bool | str, possible: bool,
        said: str) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr("rayexpand.models.latent.can_compile", lambda: possible)
    config = sampled(prior={"compile": compile})
    config = config.model_copy(update={"prior": config.prior.model_copy(update={"device": "cuda:0"})})
    assert stack_fingerprint(config)["compile"] == said


# ------------------------------------------------------------------------------------------------------------ adapters

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, another one, and adapters of the first: two with tokens, and a LoRA that was never trained."""
    root = tmp_path_factory.mktemp("models")
    tiny_pipeline(root / "base")
    tiny_pipeline(root / "other", seed=1)
    tiny_adapter(root / "adapter", root / "base", CLASSES)
    tiny_adapter(root / "second", root / "base", CLASSES, seed=1)
    tiny_adapter(root / "new", root / "base", CLASSES, strategy="db", size=0.0)
    return root


@pytest.fixture
def fitted(make_config: MakeConfig, models: Path) -> Callable[..., RunConfig]:
    """A Diff-Aug run with an adapter of `models`."""

    def make(adapter: str | Path | None = "adapter", *, base: str = "base", sections: dict[str, Any] | None = None,
             **fields: Any) -> RunConfig:
        of = {"prior": {"weights": str(models / base), "device": "cpu"}, "image": {"size": 16}}
        if adapter is not None:
            of["artifacts"] = {"adapter": str(models / adapter)}
        return make_config("diffmix", ratio=1, steps=2, strengths=[0.5], sections=of | (sections or {}), **{
            "variant": "diff_aug", "prompt": "a {token}", **fields})

    return make


def test_an_adapter_is_part_of_what_a_run_is_by_its_content(fitted: Callable[..., RunConfig], models: Path,
                                                            tmp_path: Path) -> None:
    run, totals = complete(fitted())
    reference = hashes(run)
    assert totals.kept == 20
    assert run.facts["models"]["adapter"] == folder_hash(models / "adapter")
    assert run.facts["models"]["prior"] == read_adapter(models / "adapter").base_sha256

    moved = shutil.copytree(models / "adapter", tmp_path / "moved")
    assert runs.prepare(fitted(moved)).facts == run.facts, "the path does not count"
    for other in ("second", "new"):
        with pytest.raises(DigestMismatch, match=r"models\.adapter"):
            runs.prepare(fitted(other, prompt="a {name}" if other == "new" else "a {token}"))
    with pytest.raises(DigestMismatch, match=r"prior\.adapter: 'fused' -> 'unfused'"):
        runs.prepare(fitted(sections={"prior": {**fitted().prior.model_dump(), "adapter": "unfused"}}))

    assert "adapter" not in semantic(fitted(None, variant="real_aug", prompt="a {name}"))["prior"], "no mode of nothing"
    expander = runs.start(runs.open_run(str(run.folder), check_models=True))
    assert expander.regenerate("bee/2.png/0").sample_sha256 == reference["bee/2.png/0"]
    expander.close()
    for file in sorted(Path(run.folder, "data").iterdir())[1:]:
        file.unlink()
    assert hashes(complete(fitted(moved))[0]) == reference, "resumed with a copy of the adapter"
    shutil.rmtree(moved)
    assert runs.open_run(str(run.folder)).totals().pending == 0


def test_tokens_and_lora_change_samples_and_an_untrained_lora_none(fitted: Callable[..., RunConfig],
                                                                    image_folder: Path) -> None:
    """Diff-Mix, oracle 17: with an empty LoRA and the same prompt, Diff-Aug is Real-Aug byte for byte."""
    data = {**of(image_folder), "per_class": 1}
    made = {name: hashes(complete(fitted(adapter, name=name, data=data, **fields))[0]) for name, adapter, fields in (
        ("tokens", "adapter", {}), ("others", "second", {}), ("plain", "adapter", {"prompt": "a {name}"}),
        ("empty", "new", {"prompt": "a {name}"}), ("real", None, {"prompt": "a {name}", "variant": "real_aug"}))}
    assert made["empty"] == made["real"]
    assert {len(one) for one in made.values()} == {4}
    for name, other in (("tokens", "others"), ("plain", "real"), ("tokens", "plain")):
        assert not set(made[name].values()) & set(made[other].values())


def test_the_scale_of_a_lora_is_that_of_the_method(fitted: Callable[..., RunConfig],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    with_adapter = StableDiffusionPrior.with_adapter
    monkeypatch.setattr(StableDiffusionPrior, "with_adapter", lambda self, folder, **options: (
        asked.append(options), with_adapter(self, folder, **options))[1])
    config = fitted(sections={"prior": {**fitted().prior.model_dump(), "adapter": "unfused"}})
    load_tools(config, ClassTable.of(CLASSES))
    monkeypatch.setattr(type(config.method), "lora_scale", 0.5, raising=False)
    load_tools(fitted(), ClassTable.of(CLASSES))
    base = folder_hash(config.prior.weights)
    assert asked == [{"scale": 1.0, "fuse": False, "base_sha256": base},
                     {"scale": 0.5, "fuse": True, "base_sha256": base}]


def test_runs_share_a_prior_only_with_the_same_adapter(fitted: Callable[..., RunConfig], make_config: MakeConfig,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def key(name: str, *adapter: Any, **fields: Any) -> str:
        return prior_key(runs.prepare(fitted(*adapter, name=name, **fields)))

    own = key("own")
    assert key("same", "adapter", variant="diff_mix") == own, "another plan, the same models"
    others = {key("second", "second"), key("none", None, variant="real_aug", prompt="a {name}"),
              key("unfused", sections={"prior": {**fitted().prior.model_dump(), "adapter": "unfused"}})}
    assert len(others | {own}) == 4
    run = runs.prepare(fitted(name="own"))
    monkeypatch.setattr(type(run.config.method), "lora_scale", 0.5, raising=False)
    assert prior_key(run) not in others | {own}


def test_what_one_paper_fine_tunes_serves_another_method(make_config: MakeConfig, models: Path, image_folder: Path,
                                                         tmp_path: Path) -> None:
    """img2img asks for no adapter; one that its run names is sampled with, and is part of what the run is."""
    def config(name: str, adapter: Path | None = None, **fields: Any) -> RunConfig:
        named = {} if adapter is None else {"artifacts": {"adapter": str(adapter)}}
        return make_config("img2img", ratio=1, steps=4, name=name, data={**of(image_folder), "per_class": 1}, sections={
            "prior": {"weights": str(models / "base"), "device": "cpu"}, "image": {"size": 16}, **named},
            **{"prompt": "a {name}", **fields})

    lora = tiny_adapter(tmp_path / "lora", models / "base", CLASSES, strategy="db")
    made = {name: complete(config(name, folder))[0] for name, folder in (
        ("plain", None), ("adapted", lora), ("untrained", models / "new"))}
    assert hashes(made["untrained"]) == hashes(made["plain"])
    assert not set(hashes(made["adapted"]).values()) & set(hashes(made["plain"]).values())
    assert made["adapted"].facts["models"]["adapter"] == folder_hash(lora)
    assert made["plain"].facts["models"].keys() == {"prior"}
    with pytest.raises(DigestMismatch, match=r"models\.adapter"):
        runs.prepare(config("adapted"))
    seen = tiny_adapter(tmp_path / "seen", models / "base", CLASSES, strategy="db", visual_token="class_mean")
    (found,) = runs.preflight(config("seen", seen))
    assert "is trained with visual_token class_mean, but img2img reads none; what was not trained" in found
    assert found.endswith("at sampling: fine-tune with none")


@pytest.mark.parametrize(("encoder", "problems"), [("e" * 64, 0), ("f" * 64, 1)])
def test_visual_tokens_come_from_the_encoder_of_the_training(encoder: str, problems: int, make_config: MakeConfig,
                                                             models: Path, tmp_path: Path) -> None:
    keys = ("ant", "bee", "cat", "dog")
    adapter = tiny_adapter(tmp_path / "seen", models / "base", keys, strategy="db", visual_token="class_mean",
                           encoder_sha256="e" * 64)
    (tmp_path / "features").mkdir()
    write_class_features(tmp_path / "features", np.ones((4, 16), np.float32), class_keys=keys, encoder_sha256=encoder,
                         images_per_class=None)
    config = make_config("realfake", ratio=1, prompt="a {name}", sections={
        "prior": {"weights": str(models / "base"), "device": "cpu"}, "image": {"size": 16, "fit": "squash"},
        "artifacts": {"adapter": str(adapter), "class_features": str(tmp_path / "features")}})
    found = runs.preflight(config)
    assert len(found) == problems, found
    assert all("visual tokens of image encoder eeeeeeeeeeee, but artifacts.class_features" in one for one in found)


def test_everything_wrong_with_an_adapter_is_said_at_once(fitted: Callable[..., RunConfig], models: Path,
                                                          tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert runs.preflight(fitted()) == []
    own, there = (folder_hash(models / name)[:12] for name in ("other", "base"))
    seen = tiny_adapter(tmp_path / "seen", models / "base", ("ant", "cat", "bee", "dog"), strategy="db",
                        visual_token="class_mean")
    found = "\n".join(runs.preflight(fitted(seen, base="other")))
    for words in (f"trained on base model {there}, but prior.weights {models / 'other'} is model {own}",
                  "is trained with visual_token class_mean, but diffmix reads none",
                  "the prompt has {token}, but", "(strategy db) has no class tokens; use {name}",
                  "was made for other classes than the dataset has: class 1 is 'cat' there and 'bee' here"):
        assert words in found, words
    assert found.count("artifacts.adapter: ") == 4
    with pytest.raises(ConfigError, match="class 1 is 'cat' there"):
        runs.prepare(fitted(tiny_adapter(tmp_path / "permuted", models / "base", ("ant", "cat", "bee", "dog"))))
    for adapter, words in ((None, "diffmix needs a fine-tuned adapter of its prior and none is named; make them with "
                                  "`rayexpand fit`"), (tmp_path / "gone", "gone has no adapter.json"),
                           (models / "base", "is a complete pipeline, not an adapter; name it in prior.weights")):
        assert words in runs.preflight(fitted(adapter))[0]
    assert not (tmp_path / "out").exists()
    assert not caplog.records
    assert runs.preflight(fitted(prompt="a {name}")) == []
    assert "has class tokens, but no prompt of diffmix has {token}" in caplog.text


@pytest.mark.parametrize(("strategy", "prompt", "problems"), [
    ("ti", "a {name}", 1), ("ti", "a {token}", 0), ("db", "a {name}", 0), ("ti_db", "a {name}", 0)])
def test_tokens_that_no_prompt_has_are_the_model_as_it_is(
        fitted: Callable[..., RunConfig], models: Path, tmp_path: Path, strategy: str, prompt: str,
        problems: int) -> None:
    made = tiny_adapter(tmp_path / "made", models / "base", CLASSES, strategy=strategy)
    found = runs.preflight(fitted(made, prompt=prompt))
    assert len(found) == problems, found
    assert all("samples would be those of the model as it is; write {token} into method.prompt" in one for one in found)


@pytest.mark.parametrize(("kind", "method", "words"), [
    ("adapter", {"name": "diffmix", "variant": "real_mix"}, "diffmix real_mix, which samples from the weights as they "
     "are; take it out, or choose diff_mix"),
    ("adapter", {"name": "realfake", "finetuned": False, "prompt": "a {name}"}, "or set method.finetuned: true"),
    ("adapter", {"name": "classical", "policy": "randaugment"}, "classical, which samples from the weights as they "
     "are; take it out"),
    ("adapter", {"name": "vae"}, "vae, which asks its generator for no text; take it out, or choose a method with a"),
    ("captions", {"name": "img2img"}, "which has no {caption} in its prompt"),
    ("class_features", {"name": "realfake", "finetuned": False, "prompt": "a {name}"}, "visual_token: class_mean"),
    ("image_features", {"name": "img2img"}, "visual_token: instance"),
    ("prototypes", {"name": "classical", "policy": "cutout"}, "compares samples with no prototypes")])
def test_an_artifact_that_is_not_read_is_refused(kind: str, method: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = parse({"name": "a", "out": str(tmp_path), "data": {"source": "digits"}, "method": method,
                    "artifacts": {kind: "artifacts/there"}})
    (found,) = runs.preflight(config)
    assert found.startswith(f"artifacts.{kind}: has no effect on {method['name']}")
    assert words in found


def test_a_base_that_is_not_here_yet_is_compared_when_it_is(fitted: Callable[..., RunConfig], models: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the hub: its hash is known once it has been fetched."""
    monkeypatch.setattr(artifacts, "present", lambda weights: None)
    assert runs.preflight(fitted(base="other")) == []
    with pytest.raises(ModelError, match=r"artifacts\.adapter: .* was trained on base model"):
        runs.prepare(fitted(base="other"))
    assert not Path(fitted().folder, "run.json").exists()


# -------------------------------------------------------------------------------------------- features and captions


trust("tests.runs.test_run.Featured")


class Featured(Fake):
    """Needs what `wants` says."""

    name: str = "tests.runs.test_run.Featured"
    wants: tuple[str, ...] = ()

    def needs(self) -> frozenset[str]:
        return frozenset(self.wants)


def featured(make_config: MakeConfig, folder: Path, seed_ids: Sequence[str], classes: Sequence[str],
             **sections: Any) -> RunConfig:
    """A run with class features, image features and captions made of these."""
    for kind in ("class_features", "image_features", "captions"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    features_nD = np.arange(len(seed_ids) * 4, dtype=np.float32).reshape(-1, 4)
    write_class_features(folder / "class_features", features_nD[:len(classes)], class_keys=classes,
                         encoder_sha256="e", images_per_class=None)
    write_image_features(folder / "image_features", seed_ids, features_nD, encoder_sha256="e")
    write_captions(folder / "captions", seed_ids, ["text"] * len(seed_ids))
    kinds = ("class_features", "image_features", "captions")
    config = make_config("Fake", ratio=1, sections={
        "artifacts": {kind: str(folder / kind) for kind in kinds}, **sections})
    return config.model_copy(update={"method": Featured(ratio=1, wants=kinds)})


def test_features_reach_the_tools_and_their_content_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    ids = build_index(make_config().data).seed_ids
    config = featured(make_config, tmp_path / "made", ids, CLASSES)
    run = runs.prepare(config)
    assert set(run.facts["models"]) == {"class_features", "image_features"}
    tools = load_tools(config, run.plan.index.classes)
    assert tools.class_features.tolist() == np.arange(16).reshape(4, 4).tolist()
    assert tools.image_features.rows([ids[2], "filler"]).tolist() == [[8, 9, 10, 11], [0, 0, 0, 0]]
    shared = Here().tools(run)
    assert shared.class_features.tolist() == tools.class_features.tolist()
    assert shared.prototypes is None

    with open(tmp_path / "made/captions/captions.parquet", "ab") as stream:
        stream.write(b" ")
    with pytest.raises(DigestMismatch, match=r"artifacts\.captions: .* -> "):
        runs.prepare(config)
    shutil.rmtree(tmp_path / "made/captions")
    assert runs.open_run(str(run.folder)).totals().pending == 20, "the plan holds the captions"
    assert runs.prepare(config).plan.captions == run.plan.captions
    with pytest.raises(ConfigError, match=r"artifacts\.captions: there is no folder"):
        runs.prepare(config.model_copy(update={"name": "another"}))


def test_features_of_other_classes_or_seeds_are_refused_before_anything_is_made(make_config: MakeConfig,
                                                                               tmp_path: Path) -> None:
    ids = build_index(make_config().data).seed_ids
    for classes, seed_ids, limit, message in (
            (CLASSES[::-1], ids, 1.0, r"artifacts\.class_features: .*class 0 is 'dog' there and 'ant' here"),
            (CLASSES, ids[:4], 0.5, r"artifacts\.image_features: .* has none of 16 of 20 seeds \(ant/4\.png, "),
    ):
        config = featured(make_config, tmp_path / "made", seed_ids, classes, limits={"max_failed": limit})
        captions = tmp_path / "made/captions"
        write_captions(captions, ids, ["text"] * 20)
        with pytest.raises(ConfigError, match=message):
            runs.prepare(config)
        assert not Path(config.folder, "run.json").exists()
    (tmp_path / "made/image_features/ids.parquet").unlink()
    gone = config.model_copy(update={"artifacts": {
        kind: folder for kind, folder in config.artifacts.items() if kind != "captions"}})
    found = "\n".join(runs.preflight(gone))
    for words in ("artifacts.captions: tests.runs.test_run.Featured needs captions of the seeds and none are named",
                  "has no ids.parquet, so it holds no image features"):
        assert words in found, words


def test_what_a_dataset_holds_is_said_by_plan_run_json_page_and_card(make_config: MakeConfig, image_folder: Path,
                                                                     tmp_path: Path) -> None:
    seeds = Path(shutil.copytree(image_folder, tmp_path / "seeds"))
    (seeds / "ant/notes.txt").write_text("x")
    (seeds / "bee/5.webm").write_bytes(b"x")
    config = make_config("Fake", ratio=1, data=of(seeds))
    wanted = {"seeds": 20, "classes": 4, "largest_classes": dict.fromkeys(("ant", "bee", "cat", "dog"), 5),
              "skipped": {".txt": {"files": 1, "examples": ["ant/notes.txt"]},
                          ".webm": {"files": 1, "examples": ["bee/5.webm"]}}}
    rows = api.plan(config).table()[1]
    assert ("dataset: skipped", ".txt files 1, examples ant/notes.txt, .webm files 1, examples bee/5.webm", "") in rows
    run, _ = complete(config)
    assert {name: run.facts["dataset"][name] for name in wanted} == wanted
    folder = api.RunFolder(str(run.folder))
    for page in (folder.report(), folder.card()):
        assert "ant/notes.txt" in Path(page).read_text()


# ------------------------------------------------------------------------------------------------------------- identity


def reversed_labels(run: runs.Run) -> Path:
    (file,) = Path(run.folder, "plan").glob("*/seeds.parquet")
    table = pq.read_table(file)
    place = table.schema.get_field_index("label")
    pq.write_table(table.set_column(place, table.schema.field(place), table["label"].combine_chunks()[::-1]), file)
    return file


def test_a_changed_plan_is_refused_by_name_and_made_again(make_config: MakeConfig) -> None:
    config = make_config("Fake", ratio=2)
    run, _ = complete(config)
    reference = hashes(run)
    reversed_labels(run)
    for name in ("train-000000.parquet", "train-000003.parquet"):
        Path(run.folder, "data", name).unlink()
    for verb in (verify, lambda one: one.totals()):
        with pytest.raises(DamagedFile, match=r"seeds\.parquet: is damaged. The same job file makes it again"):
            verb(runs.open_run(str(run.folder)))

    assert hashes(complete(config)[0]) == reference


def test_a_changed_plan_of_another_dataset_is_not_made_again(make_config: MakeConfig, broken: Path) -> None:
    config = make_config("Fake", ratio=2, data=of(broken))
    run, _ = complete(config)
    reversed_labels(run)
    (broken / "ant/0.png").unlink()
    with pytest.raises(DamagedFile, match=r"does not give the same plan any more \(it has 19 seeds, the plan was"):
        complete(config)


def test_a_plan_of_an_older_version_is_checked_by_its_digest(make_config: MakeConfig) -> None:
    run, _ = complete(make_config("Fake", ratio=2))
    (file,) = Path(run.folder, "plan").glob("*/plan.json")
    name = f"plan/{file.parent.name}/plan.json"
    rewrite_json(file, lambda counts: counts.pop("files"), name, is_old=True)
    assert runs.open_run(str(run.folder)).plan.planned == 40
    reversed_labels(run)
    with pytest.raises(DamagedFile, match=r"do not hold the plan that run\.json names"):
        runs.open_run(str(run.folder))


@pytest.mark.parametrize(("field", "value"), [("seed", 4), ("method", {"ratio": 3}), ("sampler", {"batch": 9})])
def test_an_edited_run_json_is_refused(make_config: MakeConfig, field: str, value: Any) -> None:
    run, _ = complete(make_config("Fake", ratio=2))
    file = Path(run.folder, "run.json")
    facts = json.loads(file.read_text())
    facts["config"][field] = {**facts["config"][field], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(facts))
    with pytest.raises(DamagedFile, match=r"run\.json: is damaged, was changed by hand"):
        runs.open_run(str(run.folder))


@pytest.mark.parametrize(("field", "value"), [("seed", 4), ("method", {"name": "tests.methods.fakes.Fake", "ratio": 3}),
                                              ("data", {"source": "imagefolder", "path": "/etc"})])
def test_an_edited_run_json_without_its_seal_is_refused(make_config: MakeConfig, field: str, value: Any) -> None:
    run, _ = complete(make_config("Fake", ratio=2))
    file = Path(run.folder, "run.json")
    rewrite_json(file, lambda facts: None, is_old=True)
    assert runs.open_run(str(run.folder)).plan.planned == 40, "one of an older version"
    rewrite_json(file, lambda facts: facts["config"].update({field: value}), is_old=True)
    with pytest.raises(DamagedFile, match=r"run\.json: is damaged, or was changed by hand"):
        runs.open_run(str(run.folder))


@pytest.mark.parametrize("content", ["{}", "[]", "nothing", '{"config": 3}', "[" * 100_000])
def test_a_run_json_that_is_none_is_refused(make_config: MakeConfig, content: str) -> None:
    run, _ = complete(make_config("Fake", ratio=1))
    Path(run.folder, "run.json").write_text(content)
    with pytest.raises(DamagedFile, match=r"run\.json: is damaged"):
        runs.open_run(str(run.folder))


def test_a_shard_overwritten_by_another_is_noticed(make_config: MakeConfig, tmp_path: Path) -> None:
    run, _ = complete(make_config("Fake", ratio=2))
    other, _ = complete(make_config("Fake", ratio=2, name="other", sections={"seed": 9}))
    one, two = (Path(run.folder, "data", data_name(shard)) for shard in (0, 1))
    for source, error in ((two, DamagedFile), (Path(other.folder, "data", data_name(0)), DigestMismatch)):
        one.unlink()
        shutil.copy(source, one)
        (problem,) = verify(run).problems
        assert problem.startswith("data/train-000000.parquet: ")
        for read in (lambda: list(api.RunFolder(str(run.folder)).samples()),
                     lambda: api.RunFolder(str(run.folder)).export(tmp_path / "exported", "imagefolder"),
                     lambda: api.dataset(str(run.folder))):
            with pytest.raises(error, match=r"train-000000"):
                read()


def test_files_that_are_not_ours_are_no_attempts(make_config: MakeConfig) -> None:
    run, _ = complete(make_config("Fake", ratio=1))
    for name in ("notes.json", "0001 copy.json", ".DS_Store"):
        Path(run.folder, "attempts", name).write_text("x")

    assert runs.begin(run) == 2
    assert read_status(str(run.folder)).attempts == 2


@pytest.mark.parametrize("change", ["edited", "gone"])
def test_another_list_of_ids_is_told_as_that_and_not_as_damage(make_config: MakeConfig, image_folder: Path,
                                                              tmp_path: Path, change: str) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("ant/0.png\nbee/0.png\n")
    complete(make_config("Fake", ratio=1, data={**of(image_folder), "ids": str(ids)}))
    ids.write_text("ant/0.png\nbee/1.png\n") if change == "edited" else ids.unlink()
    with pytest.raises(DigestMismatch, match=r"data\.ids"):
        complete(make_config("Fake", ratio=1, data=of(image_folder)))


def test_damaged_refused_rows_heal_with_their_data_file(make_config: MakeConfig) -> None:
    config = make_config("Failing", ratio=2, nan="bee/2.png/1")
    run, _ = complete(config)
    reference = hashes(run)
    (side,) = Path(run.folder, "rejected").iterdir()
    side.write_bytes(side.read_bytes()[:-1])
    (problem,) = verify(run).problems
    named = re.search(r"The file to delete is (data/\S+parquet)", problem)
    assert named
    Path(run.folder, named[1]).unlink()
    run, _ = complete(config)

    assert verify(run).problems == []
    assert hashes(run) == reference


def test_an_emptied_plan_json_is_made_again(make_config: MakeConfig) -> None:
    config = make_config("Fake", ratio=2)
    run, _ = complete(config)
    (file,) = Path(run.folder, "plan").glob("*/plan.json")
    file.write_text("{}")
    with pytest.raises(DamagedFile, match=r"plan that run\.json names"):
        runs.open_run(str(run.folder))
    assert complete(config)[0].plan.planned == 40


def test_a_plan_is_read_once_where_a_run_goes_on(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("Fake", ratio=2)
    complete(config)
    read, reads = runs.read_plan, list[str]()
    monkeypatch.setattr(runs, "read_plan", lambda *given: reads.append(given[2]) or read(*given))
    runs.prepare(config)
    assert len(reads) == 1


def test_a_retry_is_no_measure_of_the_live_rate(make_config: MakeConfig, broken: Path, image_folder: Path) -> None:
    run, _ = complete(make_config("Fake", ratio=3, data=of(broken)))
    repair(broken, image_folder, "bee/1.png", "bee/2.png")
    again = runs.open_run(str(run.folder), check_models=True)
    heard = RunProgress(again, lambda *_: None, retry=True)
    before, told = heard._rate.images_per_second, list[int]()
    expander = runs.start(again)

    def committed(counts: Totals, receipt: Receipt) -> None:
        heard.committed(counts, receipt)
        told.append(receipt.generation)

    runs.drive(again, runs.in_process(expander), runs.retry_jobs(again), to_the_end=True, on_commit=committed)
    expander.close()
    assert set(told) == {1}
    assert heard._rate.images_per_second == before


def test_a_new_run_lists_its_dataset_once(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "changed_seeds", lambda *_: pytest.fail("listed again"))
    assert api.expand(make_config("Fake", ratio=1), same_process=True).status().kept == 20
