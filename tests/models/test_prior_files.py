"""What keeps a folder from being a generator, from its json files and safetensors headers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayexpand import api
from rayexpand.contract.errors import ConfigError, ModelError
from rayexpand.contract.rng import RowRng
from rayexpand.diffusion.process import schedule
from rayexpand.fitting.config import parse_fit
from rayexpand.fitting.config import preflight as preflight_fit
from rayexpand.methods import load_method
from rayexpand.models.folders import folder_hash
from rayexpand.models.prior import inspect_prior, load_prior
from rayexpand.models.prior_config import PriorModel
from rayexpand.models.prior_sampling import plan_of, sampling_problems
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from tests.commands import ROOT
from tests.diffusion.gaussian import schedule_of
from tests.methods.conftest import CLASSES
from tests.tiny import tiny_adapter, tiny_pipeline


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def change(folder: Path, file: str, **fields: Any) -> None:
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({name: one for name, one in (settings | fields).items() if one != "ABSENT"}))


UNET, NOISE = "unet/config.json", "scheduler/scheduler_config.json"
TEXT, VAE = "text_encoder/config.json", "vae/config.json"
WORDS = "tokenizer/tokenizer_config.json"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "add-time": (UNET, {"addition_embed_type": "text_time"}, "addition_embed_type 'text_time'.*SDXL"),
    "class embedding": (UNET, {"class_embed_type": "timestep"}, "class_embed_type 'timestep'.*class"),
    "class labels": (UNET, {"num_class_embeds": 1000}, "num_class_embeds 1000.*class"),
    "image prompts": (UNET, {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type 'ip_image_proj'"),
    "variance": (UNET, {"out_channels": 8}, "out_channels 8"),
    "text of another width": (UNET, {"cross_attention_dim": 1024}, r"cross_attention_dim 1024.*hidden_size 16"),
    "levels are a number": (UNET, {"block_out_channels": 3}, r"unet/config\.json: block_out_channels"),
    "no levels": (VAE, {"block_out_channels": "ABSENT"}, r"vae/config\.json: block_out_channels"),
    "half of the moments of latents": (VAE, {"latents_mean": [0.0] * 4}, "latents_std: expected a number for each"),
    "moments of other latents": (VAE, {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
                                 "latents_mean: expected a number for each of the 4 channels"),
    "zero SNR": (NOISE, {"rescale_betas_zero_snr": True}, "no signal.*rescale_betas_zero_snr"),
    "betas that end at 1": (NOISE, {"beta_end": 1.0, "beta_schedule": "linear", "beta_start": 0.9}, "no signal"),
    "flow": (NOISE, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
    "steps are a word": (NOISE, {"num_train_timesteps": "many"}, r"scheduler_config\.json: num_train_timesteps"),
    "no length": (WORDS, {"model_max_length": "ABSENT"}, r"tokenizer_config\.json: model_max_length"),
    "a length beyond the text encoder": (WORDS, {"model_max_length": 77}, "model_max_length 77.*16"),
    "a vocabulary beyond the text encoder": (TEXT, {"vocab_size": 100}, "573 words.*vocab_size 100"),
}


@pytest.mark.parametrize(("file", "fields", "words"), REFUSED.values(), ids=REFUSED)
def test_facts_that_cannot_be_followed_are_refused(folder: Path, file: str, fields: dict[str, Any],
                                                   words: str) -> None:
    change(folder, file, **fields)
    problems = preflight(folder)
    assert len(problems) == 1, problems
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problems[0])


def run_file(folder: Path, out: Path, **method: Any) -> dict[str, Any]:
    return {"name": "run", "out": str(out), "data": {"source": "digits"}, "prior": {"weights": str(folder)},
            "method": {"name": "img2img", "guidance_scale": 2.0, **method}}


def preflight(folder: Path, **method: Any) -> list[str]:
    return runs.preflight(parse(run_file(folder, folder.parent, **method)))


def test_a_sound_folder_has_no_problem(sound: Path) -> None:
    assert preflight(sound) == []


def test_several_faults_are_said_at_once(folder: Path) -> None:
    change(folder, UNET, class_embed_type="timestep", out_channels=8)
    change(folder, WORDS, model_max_length=77)
    (text,) = preflight(folder)
    for words in ("class_embed_type", "out_channels", "model_max_length"):
        assert words in text


def test_a_missing_tokenizer_configuration_is_found_before_the_run_folder(folder: Path, tmp_path: Path) -> None:
    (folder / WORDS).unlink()
    with pytest.raises(ConfigError, match=r"tokenizer/tokenizer_config\.json is missing"):
        runs.prepare(parse(run_file(folder, tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_broken_prior_is_no_crash(folder: Path) -> None:
    adapter = tiny_adapter(folder.with_name("adapter"), folder, "xyz", strategy="db")
    shutil.rmtree(folder / "tokenizer")
    raw = run_file(folder, folder.parent, name="realfake", visual_token="none", prompt="a {name}")
    problems = runs.preflight(parse({**raw, "artifacts": {"adapter": str(adapter)}}))
    assert "tokenizer/tokenizer.json (or vocab.json and merges.txt) is missing" in "".join(problems)


def test_a_few_step_model_is_not_fine_tuned(folder: Path) -> None:
    change(folder, UNET, time_cond_proj_dim=256)
    raw = {"name": "a", "data": {"source": "digits"}, "prior": {"weights": str(folder)}, "fit": {"adapter": {}}}
    assert "was distilled to few steps" in "".join(preflight_fit(parse_fit(raw)))


def test_json_that_is_nested_too_deeply_is_named(folder: Path) -> None:
    (folder / NOISE).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert "scheduler_config.json cannot be read as JSON" in "".join(preflight(folder))


def test_a_sweep_asks_the_same(folder: Path) -> None:
    content = (folder / HALVES[0]).read_bytes()
    (folder / HALVES[0]).write_bytes(content[:-8])
    found = api.validate(ROOT / "jobs/digits/sweep-img2img.yaml",
                         set={"study.expansions.img2img.prior": {"weights": str(folder)}})
    assert "it is cut off" in "".join(found.problems)


HALVES = ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
          "text_encoder/model.safetensors"]


@pytest.mark.parametrize("name", HALVES)
def test_half_a_file_is_found_by_its_header(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:len(content) // 2])
    for call in (inspect_prior, load_prior):
        with pytest.raises(ModelError, match=rf"{name} cannot be read: it is cut off.*{len(content) // 2:,} bytes"):
            call(str(folder))


def test_weights_of_another_model_are_named_with_both_shapes(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for part, name, end in (("unet", "diffusion_pytorch_model", "conv_in.weight"),
                            ("text_encoder", "model", "token_embedding.weight")):
        file = folder / part / f"{name}.safetensors"
        state = load_file(file)
        state = {key: one[:-1].contiguous() if key.endswith(end) else one for key, one in state.items()}
        save_file(state, file, {"format": "pt"})
    (text,) = preflight(folder)
    assert r"conv_in.weight is [7, 4, 3, 3], and unet/config.json asks for [8, 4] there" in text
    assert "token_embedding.weight is [572, 16], and text_encoder/config.json asks for [573, 16] there" in text


def sharded(folder: Path, part: str = "unet") -> Path:
    """Cuts the weights of a part into two files with an index, as save_pretrained does with a large one."""
    from safetensors.torch import load_file, save_file

    whole = folder / part / "diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    whole.unlink()
    names = sorted(state)
    files = {name: f"diffusion_pytorch_model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / part / file, {"format": "pt"})
    index = folder / part / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def test_shards_are_looked_at_one_by_one(folder: Path) -> None:
    index = sharded(folder)
    assert preflight(folder) == []
    load_prior(str(folder), device="cpu")
    shard = index.with_name("diffusion_pytorch_model-00002-of-00002.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    assert "00002-of-00002.safetensors cannot be read: it is cut off" in preflight(folder)[0]
    shutil.copyfile(shard.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"), shard)
    assert "tensors that its index says are there" in preflight(folder)[0]
    shard.unlink()
    assert "00002-of-00002.safetensors is missing" in preflight(folder)[0]
    for content in ('{"weight_map": [1]}', '{}', '{"weight_map": {"a": "../../x.safetensors"}}'):
        index.write_text(content)
        assert "has no weight_map" in preflight(folder)[0]


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_half_precision_variant_alone_is_loaded(folder: Path, variant: str) -> None:
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    assert preflight(folder) == []
    load_prior(str(folder), device="cpu")


def test_another_variant_is_named(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".non_ema.safetensors"))
    assert "unet holds only diffusion_pytorch_model.non_ema.safetensors" in preflight(folder)[0]


def pipeline(folder: Path, **index: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))


def write(folder: Path, name: str, content: str = "{}") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)


OTHER: dict[str, tuple[Callable[[Path], None], str]] = {
    "SD3": (lambda f: pipeline(f, _class_name="StableDiffusion3Pipeline", transformer=["diffusers",
                               "SD3Transformer2DModel"], vae=["diffusers", "AutoencoderKL"]),
            "is a StableDiffusion3Pipeline: Stable Diffusion 3 is not supported yet.*Stable Diffusion 1.x"),
    "FLUX": (lambda f: pipeline(f, _class_name="FluxPipeline", transformer=["diffusers", "FluxTransformer2DModel"]),
             "is a FluxPipeline: FLUX is not supported yet"),
    "LoRA of diffusers": (lambda f: write(f, "pytorch_lora_weights.safetensors"), "is a LoRA.*not a generator"),
    "LoRA of peft": (lambda f: write(f, "adapter_config.json"), "is a LoRA.*not a generator"),
    "a single file": (lambda f: write(f, "v1-5-pruned.safetensors"), "holds a single-file checkpoint"),
    "one part": (lambda f: write(f, "config.json", '{"_class_name": "UNet2DConditionModel"}'),
                 "is one part of a pipeline, UNet2DConditionModel.*folder above"),
    "transformers": (lambda f: write(f, "config.json", '{"model_type": "clip"}'), "is a transformers model .clip"),
    "a guide": (lambda f: write(f, "open_clip_config.json"), "is a guide.*guide.weights"),
    "a hub cache": (lambda f: write(f, "snapshots/abc/model_index.json"), "is a folder of the Hugging Face cache.*abc"),
    "nothing": (lambda f: f.mkdir(), "is empty"),
}


@pytest.mark.parametrize(("made", "words"), OTHER.values(), ids=OTHER)
def test_a_folder_of_another_kind_is_named_as_what_it_is(tmp_path: Path, made: Callable[[Path], None],
                                                         words: str) -> None:
    made(tmp_path / "other")
    with pytest.raises(ModelError, match=words) as error:
        inspect_prior(str(tmp_path / "other"))
    assert "missing" not in str(error.value)


def test_an_adapter_of_ours_is_named_as_one(sound: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "adapter", sound, "xyz")
    with pytest.raises(ModelError, match=r"is an adapter.*artifacts\.adapter"):
        inspect_prior(str(folder))


@pytest.mark.parametrize("weights", ["https://huggingface.co/acme/tiny", "https://huggingface.co/acme/tiny/tree/v1",
                                     "hf://acme/tiny", "s3://bucket/model"])
def test_a_url_is_named_as_one(weights: str) -> None:
    with pytest.raises(ModelError, match="is a URL") as error:
        inspect_prior(weights)
    assert f"'{weights}'" in str(error.value)
    if "acme" in weights:
        assert "write acme/tiny" in str(error.value)


def test_a_missing_folder_beside_others_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/sd-15").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"there is no folder models/sd15.*did you mean models/sd-15") as error:
        inspect_prior("models/sd15")
    assert "hf download" not in str(error.value)
    monkeypatch.chdir(tmp_path / "models/sd-15")  # where there is no folder `models` either
    with pytest.raises(ModelError, match=r"there is no folder models/sd15 \(seen from .*sd-15\)") as error:
        inspect_prior("models/sd15")
    assert "hf download" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ sampling


FEW_STEP: dict[str, tuple[tuple[str, dict[str, Any]], list[int]]] = {
    "guidance embedding": ((UNET, {"time_cond_proj_dim": 256}), [751, 501, 251, 1]),
    "LCM": ((NOISE, {"_class_name": "LCMScheduler", "original_inference_steps": 50}), [999, 759, 499, 259]),
    "TCD": ((NOISE, {"_class_name": "TCDScheduler", "original_inference_steps": 50}), [999, 759, 499, 259]),
    "Turbo": ((NOISE, {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}),
              [999, 749, 499, 249]),
}


@pytest.mark.parametrize(("changed", "labels"), FEW_STEP.values(), ids=FEW_STEP)
def test_few_step_models_are_sampled_on_the_grid_of_their_files(folder: Path, changed: tuple[str, dict[str, Any]],
                                                                labels: list[int]) -> None:
    change(folder, changed[0], **changed[1])
    fields = {"name": "text2img", "steps": 4, "guidance_scale": 1.0}
    assert preflight(folder, **fields) == []
    points = schedule(inspect_prior(str(folder)).process, "ddim", 4).points
    assert [point.label for point in points[:-1]] == labels


def test_a_network_that_takes_the_scale_is_guided_by_it(folder: Path) -> None:
    change(folder, UNET, time_cond_proj_dim=256)
    assert inspect_prior(str(folder)).guidance == "embedded"
    for guidance in ("cfg", "none"):
        with pytest.raises(ModelError, match=rf"prior.guidance: {guidance} leaves out an input of this network"):
            inspect_prior(PriorModel(weights=str(folder), guidance=guidance))
    assert preflight(folder, name="text2img", steps=4, guidance_scale=8.0) == []
    (problem,) = preflight(folder, name="text2img", steps=4, negative="blurry")
    assert "method.negative" in problem
    (problem,) = sampling_problems(inspect_prior(str(folder)), load_method("gif", {}))
    assert "method.guidance_scale" in problem
    assert "at most 10" in problem


def test_guidance_embedded_needs_a_network_with_that_input(sound: Path) -> None:
    with pytest.raises(ModelError, match=r"prior.guidance: embedded needs .*time_cond_proj_dim.*use cfg or none"):
        inspect_prior(PriorModel(weights=str(sound), guidance="embedded"))


@pytest.mark.parametrize(("name", "least", "most"), [("LCMScheduler", 1, 1), ("TCDScheduler", 0.3, 0.99)])
def test_distilled_steps_take_fresh_noise_but_for_the_last_one(folder: Path, name: str, least: float,
                                                               most: float) -> None:
    change(folder, NOISE, _class_name=name)
    plan = schedule(inspect_prior(str(folder)).process, "ddim", 4)
    assert plan.fresh_steps == (0, 1, 2)
    assert all(least <= one <= most for one in plan.kappa[:3])


def test_a_solver_that_remembers_earlier_steps_is_not_of_consistency_models(folder: Path) -> None:
    change(folder, NOISE, _class_name="LCMScheduler")
    for solver in ("dpmpp_2m", "unipc"):
        (problem,) = preflight(folder, name="text2img", steps=4, guidance_scale=1.0, solver=solver)
        assert "begins each step from new noise" in problem
        assert "set method.solver: ddim" in problem


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_the_grid_that_is_taken_is_the_one_of_the_model(solver: Any) -> None:
    from diffusers import EulerDiscreteScheduler

    turbo = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                   timestep_spacing="trailing")
    turbo.set_timesteps(4)
    for spacing in (None, "trailing"):
        labels = [point.label for point in schedule_of(turbo, solver, 4, spacing=spacing).points[:-1]]
        assert labels == [999, 749, 499, 249] == [int(t) for t in turbo.timesteps]


def test_a_trailing_grid_wins_over_that_of_the_papers_and_a_named_one_over_both(folder: Path) -> None:
    change(folder, NOISE, timestep_spacing="trailing")
    facts = inspect_prior(str(folder))
    for name in ("gif", "distdiff", "img2img"):
        method = load_method(name, {})
        plan = plan_of(facts, method, method.draw("s", 0, 0, 0, CLASSES, RowRng(0, name, "s", 0)).steps_run)
        assert plan.points[0].label == 999
        assert sampling_problems(facts, method) == []
    assert plan_of(facts, load_method("img2img", {"spacing": "leading"}), 25).first.label == 481


def test_turbo_is_sampled_without_guidance(folder: Path) -> None:
    change(folder, NOISE, timestep_spacing="trailing")
    turbo = folder.rename(folder.with_name("sd-turbo"))
    facts = inspect_prior(str(turbo))
    for scale in (7.5, 0.0):
        fields = {"steps": 2, "guidance_scale": scale}
        (problem,) = sampling_problems(facts, load_method("text2img", fields))
        assert "guidance_scale" in problem
        assert "set it to 1" in problem
    assert sampling_problems(facts, load_method("text2img", {**fields, "guidance_scale": 1.0})) == []


@pytest.mark.parametrize(("guidance", "scale", "words"), [
    ("auto", 0.0, "0 leaves the prompt out; a distilled model wants 1"), ("cfg", 0.0, "0 leaves the prompt out"),
    ("auto", 1.0, ""), ("cfg", 7.5, ""), ("none", 0.0, ""), ("none", 1.0, ""),
    ("none", 7.5, "sampled without guidance (prior.guidance: none), so 7.5 has no meaning; set it to 1")])
def test_a_scale_that_means_nothing_is_refused(sound: Path, guidance: str, scale: float, words: str) -> None:
    raw = run_file(sound, sound.parent, guidance_scale=scale)
    problems = runs.preflight(parse({**raw, "prior": {**raw["prior"], "guidance": guidance}}))
    assert len(problems) == bool(words)
    assert words in "".join(problems)


@pytest.mark.parametrize("fields", [{"rescale_betas_zero_snr": True},
                                    {"beta_end": 1.0, "beta_schedule": "linear", "beta_start": 0.9}])
def test_zero_signal_is_refused_of_noise_predictions_and_sampled_of_v(folder: Path, fields: dict[str, Any]) -> None:
    change(folder, NOISE, timestep_spacing="trailing", **fields)
    (problem,) = preflight(folder)
    assert "prior.process.rescale_betas_zero_snr: false" in problem
    change(folder, NOISE, prediction_type="v_prediction")
    assert preflight(folder) == []
    process = inspect_prior(str(folder)).process
    first = schedule(process, "ddim", 4).first
    assert first.a < 1e-3


def test_zero_signal_may_be_overridden(folder: Path) -> None:
    change(folder, NOISE, rescale_betas_zero_snr=True)
    raw = run_file(folder, folder.parent)
    own = {**raw["prior"], "process": {"rescale_betas_zero_snr": False}}
    assert runs.preflight(parse({**raw, "prior": own})) == []


@pytest.mark.parametrize(("method", "words"), [
    ({"name": "img2img", "steps": 1, "strength": 1.0}, "timestep 1 of 1000.*strength"),
    ({"name": "img2img", "steps": 50, "strength": 0.02}, "timestep 1 of 1000"),
    ({"name": "text2img", "steps": 1}, "timestep 1 of 1000.*pure noise"),
    ({"name": "text2img", "steps": 2}, "timestep 501 of 1000.*pure noise"),
    ({"name": "diffmix", "variant": "real_aug", "strengths": [0.1, 0.7], "steps": 10, "solver": "ddim",
      "prompt": "a {name}"}, "timestep 1 of 1000"),
])
def test_a_grid_that_begins_without_noise_is_refused(sound: Path, method: dict[str, Any], words: str) -> None:
    (problem,) = preflight(sound, **method)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problem)


@pytest.mark.parametrize("method", [
    {"name": "img2img", "steps": 1, "strength": 1.0, "spacing": "trailing"}, {"name": "text2img", "steps": 4},
    {"name": "text2img", "steps": 1, "solver": "unipc"}, {"name": "img2img", "steps": 10, "strength": 0.2}])
def test_a_grid_that_begins_with_noise_is_not(sound: Path, method: dict[str, Any]) -> None:
    assert preflight(sound, **method) == []


def test_a_run_that_began_with_such_a_grid_goes_on(sound: Path, tmp_path: Path) -> None:
    config = parse(run_file(sound, tmp_path, name="text2img", steps=1))
    assert runs.preflight(config)
    assert runs.preflight(config, planned=True) == []


def test_nothing_is_loaded(sound: Path) -> None:
    code = ("import sys; from rayexpand.models.prior import inspect_prior\n"
            "inspect_prior(sys.argv[1])\nassert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code, str(sound)], check=True)


def test_the_hash_of_a_sound_folder_is_what_it_was(sound: Path, folder: Path) -> None:
    assert folder_hash(sound) == folder_hash(folder)
    sharded(folder)
    assert folder_hash(sound) != folder_hash(folder)


def test_a_folder_above_a_model_says_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    above = tmp_path / "turbo-lab"
    above.mkdir()
    assert not inspect_prior(str(folder.rename(above / "sd"))).turbo
