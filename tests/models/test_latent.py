import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rayexpand.artifacts.adapter import load_lora, read_adapter, write_adapter
from rayexpand.contract.errors import ModelError
from rayexpand.contract.rng import RowRng
from rayexpand.diffusion import sampling
from rayexpand.models.folders import folder_hash
from rayexpand.models.latent import StableDiffusionPrior
from rayexpand.models.prior import check_size, inspect_prior, load_prior, prior_hash
from rayexpand.models.prior_config import PriorModel
from tests.diffusion.gaussian import point_at
from tests.tiny import tiny_adapter, tiny_pipeline

torch.set_num_threads(1)
PROMPTS = ["a photo of a zero", "a seven", "the digit two", "a kudu"]
NEGATIVES = ["", "blurred", "", "a photo of a one"]


def predict(prior, z, t, cond):
    """Clean latent and noise at a timestep, (2, B, C, H, W)."""
    return torch.stack(prior.predict(z, point_at(prior.scheduler, t), cond))


def normals(*shape: int, key: int = 0) -> torch.Tensor:
    return torch.from_numpy(RowRng(key, "test", "latent", 0).normals("z", shape))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {kind: tiny_pipeline(root / kind, prediction_type=kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture(scope="module")
def priors(folders):
    return {kind: load_prior(str(folder), device="cpu") for kind, folder in folders.items()}


@pytest.fixture
def folder(folders, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(folders["epsilon"], tmp_path / "model"))


@pytest.fixture
def prior(priors):
    return priors["epsilon"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_agrees_with_the_diffusers_pipeline(folders, priors, kind):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    noise = normals(4, 4, 8, 8)
    expected = pipe(PROMPTS, negative_prompt=NEGATIVES, latents=noise, guidance_scale=3.0, num_inference_steps=7,
                    output_type="latent").images

    prior = priors[kind]
    cond = prior.embed(PROMPTS, NEGATIVES, 3.0)
    solver = DDIMScheduler.from_config(prior.scheduler.config, prediction_type="epsilon")  # fed with eps in both cases
    solver.set_timesteps(7)
    z = noise
    for t in solver.timesteps:
        z = solver.step(predict(prior, z, int(t), cond)[1], t, z).prev_sample
    assert torch.allclose(z, expected, atol=1e-5)
    assert torch.allclose(sampling.denoise(prior, noise, prior.schedule("ddim", 7), cond), expected, atol=1e-5)
    assert (expected - noise).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_prediction_is_guided_by_the_textbook_formula(priors, kind):
    prior, z, t, scale = priors[kind], normals(4, 4, 8, 8), 600, 4.0
    cond = prior.embed(PROMPTS, NEGATIVES, scale)
    positive, negative = (prior.unet(z, t, encoder_hidden_states=text).sample
                          for text in (cond.tokens_BTE, cond.negative_tokens_BTE))
    out, abar = negative + scale * (positive - negative), prior.scheduler.alphas_cumprod[t]
    noise = abar.sqrt() * out + (1 - abar).sqrt() * z if kind == "v_prediction" else out
    expected = torch.stack([(z - (1 - abar).sqrt() * noise) / abar.sqrt(), noise])
    assert torch.allclose(predict(prior, z, t, cond), expected, atol=2e-5)
    for made, wanted in zip(predict(prior, z, t, prior.embed(PROMPTS, NEGATIVES, 1.0)), expected, strict=True):
        assert not torch.allclose(made, wanted, atol=1e-3)


@torch.no_grad()
def test_scale_one_leaves_out_the_unconditional_half(prior, monkeypatch):
    sizes = []
    forward = type(prior.unet).forward
    monkeypatch.setattr(type(prior.unet), "forward", lambda self, z, *args, **kwargs: (
        sizes.append(len(z)), forward(self, z, *args, **kwargs))[1])
    z, scales = normals(4, 4, 8, 8), (1.0, 2.0, [1.0, 1.0, 1.0, 2.0])
    cond, guided, mixed = (prior.embed(PROMPTS, NEGATIVES, scale) for scale in scales)
    alone = predict(prior, z, 300, cond)[1]
    for other in (guided, mixed, mixed[:3]):
        predict(prior, z[:len(other)], 300, other)
    assert sizes == [4, 8, 8, 3]
    assert torch.equal(alone, prior.unet(z, torch.full((4,), 300), encoder_hidden_states=cond.tokens_BTE).sample)


@torch.no_grad()
def test_encode_and_decode_are_those_of_the_autoencoder(prior):
    x = torch.from_numpy(RowRng(0, "test", "latent", 0).uniforms("x", (3, 3, 16, 16)))
    noise = normals(3, 4, 8, 8)
    posterior = prior.vae.encode(x * 2 - 1).latent_dist
    scaling = prior.vae.config.scaling_factor
    assert scaling == 0.5
    assert torch.equal(prior.encode(x, None), posterior.mode() * scaling)
    z = prior.encode(x, noise)
    assert torch.equal(z, (posterior.mean + posterior.std * noise) * scaling)
    assert z.shape[1:] == prior.latent_shape(16, 16) == (4, 8, 8)
    assert torch.equal(prior.decode(z), (prior.vae.decode(z / scaling).sample + 1) / 2)
    assert prior.decode(10 * z).max() > 1  # unclamped


@torch.no_grad()
def test_shift_factor_is_undone(folder):
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"shift_factor": 0.7}))
    plain, shifted = normals(1, 4, 8, 8), load_prior(str(folder), device="cpu")
    x = torch.linspace(0, 1, 768).view(1, 3, 16, 16)
    mean = shifted.vae.encode(x * 2 - 1).latent_dist.mean
    assert torch.allclose(shifted.encode(x, None), (mean - 0.7) * 0.5)
    assert torch.allclose(shifted.decode(plain), (shifted.vae.decode(plain / 0.5 + 0.7).sample + 1) / 2)


@torch.no_grad()
def test_rows_do_not_depend_on_their_batch_mates(prior):
    z, other = normals(4, 4, 8, 8), normals(4, 4, 8, 8, key=1) * 3
    texts, noise = prior.embed(PROMPTS, NEGATIVES, 2.0), normals(4, 4, 8, 8, key=2)
    for row in range(4):
        mixed, prompts, negatives = other.clone(), ["a nine"] * 4, ["noise"] * 4
        mixed[row], prompts[row], negatives[row] = z[row], PROMPTS[row], NEGATIVES[row]
        cond = prior.embed(prompts, negatives, [2.0 if one == row else 3.0 for one in range(4)])
        assert torch.equal(cond[row].tokens_BTE, texts[row].tokens_BTE)
        assert torch.equal(predict(prior, mixed, 500, cond)[:, row], predict(prior, z, 500, texts)[:, row])
        assert torch.equal(prior.decode(mixed)[row], prior.decode(z)[row])
        x, y = prior.decode(z).clamp(0, 1), prior.decode(mixed).clamp(0, 1)
        assert torch.equal(prior.encode(x, noise)[row], prior.encode(y, noise)[row])


@torch.no_grad()
def test_each_row_has_the_scale_of_guidance_it_is_given(prior):
    """As in a batch of its own scale, to rounding: where all are 1 the unconditional half is left out."""
    z, scales = normals(4, 4, 8, 8), (1.0, 3.0, 0.0, 7.5)
    mixed = predict(prior, z, 500, prior.embed(PROMPTS, NEGATIVES, scales))
    for row, scale in enumerate(scales):
        own = predict(prior, z, 500, prior.embed(PROMPTS, NEGATIVES, scale))
        torch.testing.assert_close(mixed[:, row], own[:, row], rtol=1e-5, atol=1e-5)
        others = [one for one in range(4) if one != row]
        assert ((mixed - own)[:, others].abs().amax((0, 2, 3, 4)) > 1e-2).all()


def test_conditioning_is_indexed_by_row(prior):
    cond = prior.embed(PROMPTS, NEGATIVES, [1.0, 2.0, 3.0, 4.0])
    assert len(cond) == 4
    assert cond[2].tokens_BTE.shape == (1, 16, 16)
    picked = cond[[3, 1]]
    assert torch.equal(picked.tokens_BTE, cond.tokens_BTE[[3, 1]])
    assert torch.equal(picked.negative_tokens_BTE, cond.negative_tokens_BTE[[3, 1]])
    assert picked.guidance_B.tolist() == [4, 2]
    assert cond[2].guidance_B.tolist() == [3]
    assert len(cond[1:3]) == 2
    assert not torch.equal(cond.tokens_BTE[0], cond.tokens_BTE[1])


def test_gradients_reach_the_inputs_and_no_weight(prior):
    z = normals(2, 4, 8, 8).requires_grad_()
    p = predict(prior, z, 400, prior.embed(PROMPTS[:2], NEGATIVES[:2], 2.0))
    for out in (p[0], z - 0.3 * p[1]):
        grad, = torch.autograd.grad(prior.decode(out).square().sum(), z, retain_graph=True)
        assert (grad.abs().amax((1, 2, 3)) > 0).all()
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    grad, = torch.autograd.grad(prior.encode(x, None).sum(), x)
    assert grad.abs().max() > 0
    models = (prior.unet, prior.vae, prior.text_encoder)
    assert not any(p.requires_grad for model in models for p in model.parameters())
    assert not any(module.training for model in models for module in model.modules())


@torch.no_grad()
@pytest.mark.slow
def test_loading_options(folders, prior):
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    cond, z = prior.embed(PROMPTS, NEGATIVES, 2.0), normals(4, 4, 8, 8)
    expected = predict(prior, z, 500, cond)
    assert prior.dtype == torch.float32
    assert not compiled_blocks(prior)  # of itself on a GPU only
    assert not prior.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    kinds = {"sdpa": AttnProcessor2_0, "eager": AttnProcessor}
    for name, kind in kinds.items():
        other = load_prior(str(folders["epsilon"]), device="cpu", attention=name, channels_last=name == "eager")
        assert {type(p) for p in other.unet.attn_processors.values()} == {kind}
        assert torch.allclose(predict(other, z, 500, cond), expected, atol=2e-5)
        weight = other.unet.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == (name == "eager")
    compiled = load_prior(str(folders["epsilon"]), device="cpu", compile=True)
    assert compiled_blocks(compiled) > 1


def compiled_blocks(prior):
    return sum(block._compiled_call_impl is not None for block in prior.unet.modules())


@torch.no_grad()
def test_half_precision_keeps_latents_and_the_autoencoder_in_float32(folders, prior):
    half = load_prior(str(folders["epsilon"]), dtype="bfloat16", device="cpu")
    cond, z = half.embed(PROMPTS, NEGATIVES, 2.0), normals(4, 4, 8, 8)
    assert (half.unet.dtype, half.text_encoder.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {one.dtype for one in half.vae.parameters()} == {torch.float32}
    p, expected = predict(half, z, 500, cond), predict(prior, z, 500, prior.embed(PROMPTS, NEGATIVES, 2.0))
    assert p.dtype == torch.float32
    assert 0 < (p - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.equal(half.decode(z), prior.decode(z))


@torch.no_grad()
def test_the_decoder_alone_may_be_half_precise(folders, prior):
    half = load_prior(PriorModel(weights=str(folders["epsilon"]), vae_dtype="bfloat16"), device="cpu")
    x, z = torch.linspace(0, 1, 768).view(1, 3, 16, 16), normals(4, 4, 8, 8)
    assert {one.dtype for one in half.vae.decoder.parameters()} == {torch.bfloat16}
    assert torch.equal(half.encode(x, normals(1, 4, 8, 8)), prior.encode(x, normals(1, 4, 8, 8)))
    made, expected = half.decode(z), prior.decode(z)
    assert made.dtype == torch.float32
    assert 0 < (made - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_decoder_that_overflows_in_float16_is_refused(folder):
    half = PriorModel(weights=str(folder), vae_dtype="float16")
    with pytest.raises(ModelError, match=r"prior\.vae_dtype: float16 overflows .*force_upcast.*bfloat16"):
        load_prior(half, device="cpu")
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"force_upcast": False}))
    assert load_prior(half, device="cpu").vae.decoder.conv_in.weight.dtype == torch.float16


def test_old_checkpoints_with_prefixed_text_weights_load(folder, prior):
    """Stable Diffusion 1.x and 2.x files say `text_model.` before every text weight and carry position ids."""
    from safetensors.torch import load_file, save_file

    file = folder / "text_encoder/model.safetensors"
    state = {f"text_model.{name}": value for name, value in load_file(file).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(state, file, {"format": "pt"})
    old = load_prior(str(folder), device="cpu")
    assert torch.equal(*(one.embed(PROMPTS, NEGATIVES, 1.0).tokens_BTE for one in (old, prior)))


def test_half_precision_files_alone_are_enough(folder, prior):
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert torch.equal(load_prior(str(folder), device="cpu").unet.conv_in.weight, prior.unet.conv_in.weight)


def test_facts_come_from_configuration_files_without_torch(folders):
    facts = inspect_prior(str(folders["v_prediction"]))
    assert (facts.image_size, facts.vae_factor, facts.unet_factor, facts.latent_channels) == (16, 2, 2, 4)
    assert (facts.prediction_type, facts.train_timesteps) == ("v_prediction", 1000)
    code = ("import sys; from rayexpand.models.prior import inspect_prior, check_size\n"
            "for name in sys.argv[1:]: check_size(inspect_prior(name), 16)\n"
            "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code, str(folders["epsilon"]), "digits"], check=True)


@pytest.mark.parametrize("size", [8, 16, 24, 64])
def test_sizes_that_fit(folders, size):
    check_size(inspect_prior(str(folders["epsilon"])), size)


@pytest.mark.parametrize(("size", "near"), [(12, "8 or 16"), (20, "16 or 24"), (4, "8"), (0, "8")])
def test_sizes_that_do_not_fit_name_the_next_ones(folders, size, near):
    with pytest.raises(ModelError, match=rf"{size} px does not fit .* multiple of 8; set image.size to {near} "):
        check_size(inspect_prior(str(folders["epsilon"])), size)


def test_a_four_level_unet_asks_for_multiples_of_64(folder):
    for part, channels in (("unet", [8] * 4), ("vae", [8] * 4)):
        config = json.loads((folder / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config | {"block_out_channels": channels}))
    facts = inspect_prior(str(folder))
    check_size(facts, 512)
    with pytest.raises(ModelError, match="448 or 512"):
        check_size(facts, 504)


def test_everything_missing_is_listed_at_once(folder):
    for name in ("model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors",
                 "tokenizer/tokenizer.json"):
        (folder / name).unlink()
    for call in (inspect_prior, load_prior, prior_hash):
        with pytest.raises(ModelError) as error:
            call(str(folder))
        for name in ("model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors",
                     "tokenizer/tokenizer.json"):
            assert name in str(error.value)
        assert "scheduler" not in str(error.value)


@pytest.mark.parametrize("weights", ["no/such/folder", "./nothing", "C:what"])
def test_a_missing_folder_names_the_path_and_the_choices(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"there is no folder .*'digits'.*org/name@revision"):
        inspect_prior(weights)


def test_pickles_are_refused_by_name(folder, tmp_path):
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    for call in (inspect_prior, load_prior):
        with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model\.bin is a pickle.*safe_serialization=True"):
            call(str(folder))
    file = tmp_path / "v1-5.ckpt"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match=r"v1-5\.ckpt is a pickle"):
        inspect_prior(str(file))


@pytest.mark.parametrize(("file", "change", "message"), [
    ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]},
     "with .*text_encoder_2 CLIPTextModel; .*XL has a second text encoder, CLIPTextModelWithProjection"),
    ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
     r"text_encoder_2/config\.json is missing"),
    ("model_index.json", {"unet": ["diffusers", "FluxTransformer2DModel"]}, "FluxTransformer2DModel"),
    ("unet/config.json", {"in_channels": 9}, "takes 9 channels, as inpainting models.*Use the base model"),
    ("unet/config.json", {"in_channels": 8}, "takes 8 channels, .* InstructPix2Pix.*Use the base model"),
    ("unet/config.json", {"in_channels": 5}, "takes 5 channels but the autoencoder makes 4"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow' is not supported"),
])
def test_other_kinds_of_pipeline_are_refused(folder, file, change, message):
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | change))
    for call in (inspect_prior, load_prior):
        with pytest.raises(ModelError, match=message):
            call(str(folder))


@torch.no_grad()
def test_weights_that_predict_the_clean_latent_are_sampled(folder, prior):
    settings = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(settings | {"prediction_type": "sample"}))
    z, cond, at = normals(4, 4, 8, 8), prior.embed(PROMPTS, NEGATIVES, 2.0), point_at(prior.scheduler, 500)
    clean, noise = load_prior(str(folder), device="cpu").predict(z, at, cond)
    assert torch.equal(clean, prior.predict(z, at, cond).noise)  # the same output, read another way
    torch.testing.assert_close(at.mix(clean, noise), z)


def test_damaged_files_are_named(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("conv_in.weight")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensor of the unet .* conv_in\.weight"):
        load_prior(str(folder))
    file.write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model\.safetensors cannot be read"):
        load_prior(str(folder))
    (folder / "unet/config.json").write_text("{")
    with pytest.raises(ModelError, match=r"unet/config\.json cannot be read as JSON"):
        inspect_prior(str(folder))


@pytest.mark.parametrize(("option", "message"), [
    ({"dtype": "float8"}, "dtype 'float8'.*float32"), ({"attention": "flash"}, "attention 'flash'.*sdpa"),
    ({"device": "tpu9"}, "device 'tpu9' is unknown"), ({"device": "cuda:99"}, "torch sees"),
])
def test_options_that_do_not_exist(folders, option, message):
    with pytest.raises(ModelError, match=message):
        load_prior(str(folders["epsilon"]), **option)


def test_hash_covers_what_is_loaded_and_nothing_else(folder):
    before = folder_hash(folder)
    assert before == prior_hash(str(folder))
    (folder / "README.md").write_text("hello")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_bytes(b"1")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"1")
    assert folder_hash(folder) == before
    seen = {before}
    for name in ("unet/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/tokenizer.json",
                 "text_encoder/model.safetensors", "scheduler/scheduler_config.json", "model_index.json"):
        with open(folder / name, "ab") as stream:
            stream.write(b" ")
        seen.add(folder_hash(folder))
    assert len(seen) == 7


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_cached_hub_model_loads_offline_under_its_commit(offline_hub, folder, prior):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = offline_hub / "models--acme--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit)
    shutil.copytree(folder, cached / "snapshots" / commit)
    for name in ("acme/tiny", "acme/tiny@main", f"acme/tiny@{commit}"):
        assert inspect_prior(name).weights == f"acme/tiny@{commit}"
        assert prior_hash(name) == folder_hash(folder)
    loaded = load_prior("acme/tiny@main", device="cpu")
    assert isinstance(loaded, StableDiffusionPrior)
    assert torch.equal(loaded.unet.conv_in.weight, prior.unet.conv_in.weight)

    (cached / "snapshots" / commit / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert inspect_prior("acme/tiny").image_size == 16  # configuration files are enough for facts
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model\.\w+ is missing\n.*hf download acme/tiny "):
        load_prior("acme/tiny@main")


def test_a_hub_model_that_is_not_cached_says_how_to_fetch_it(offline_hub):
    for call in (inspect_prior, load_prior, prior_hash):
        with pytest.raises(ModelError, match=r"acme/none@v2 .*hf download acme/none --revision v2.*local folder"):
            call("acme/none@v2")


def test_weights_are_the_same_in_every_build(folders, tmp_path):
    assert folder_hash(tiny_pipeline(tmp_path / "again")) == folder_hash(folders["epsilon"])
    assert folder_hash(tiny_pipeline(tmp_path / "other", seed=1)) != folder_hash(folders["epsilon"])
    assert np.isfinite([p.abs().max() for p in load_prior(str(folders["epsilon"])).unet.parameters()]).all()


# ------------------------------------------------------------------------------------------------------------ adapters


TOKENS = ["a photo of a <class_0>", "a <class_2> seven", "a zero", "<class_1>"]


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """By strategy; `new` is a LoRA that has not been trained yet."""
    root = tmp_path_factory.mktemp("adapters")
    made = {one: tiny_adapter(root / one, folders["epsilon"], "xyz", strategy=one) for one in ("ti", "db", "ti_db")}
    return made | {"new": tiny_adapter(root / "new", folders["epsilon"], "xyz", strategy="db", size=0.0)}


def adapted(prior, folder, **options):
    return prior.with_adapter(folder, base_sha256=None, **options)


@torch.no_grad()
def predicted(prior, prompts=PROMPTS):
    return predict(prior, normals(4, 4, 8, 8), 500, prior.embed(prompts, NEGATIVES, 2.0))


def test_fused_and_unfused_are_one_model_at_every_scale(prior, adapters):
    at = {(scale, fuse): predicted(adapted(prior, adapters["db"], scale=scale, fuse=fuse))
          for scale in (0.0, 0.5, 1.0) for fuse in (True, False)}
    for scale in (0.0, 0.5, 1.0):
        assert torch.allclose(at[scale, True], at[scale, False], atol=2e-5)
    moved = (at[1.0, True] - at[0.5, True]).abs().max()
    assert moved > 0.02, "fused at 1 is another sampler than fused at 0.5"
    assert torch.equal(at[0.0, True], predicted(prior))
    assert torch.equal(at[0.0, False], predicted(prior))


def test_a_lora_that_was_not_trained_changes_no_bit(prior, adapters):
    for fuse in (True, False):
        assert torch.equal(predicted(adapted(prior, adapters["new"], fuse=fuse)), predicted(prior))


def test_weights_are_fused_in_float32_and_then_rounded(folders, adapters):
    """Adding in bfloat16 rounds base and sum: other weights."""
    half = load_prior(str(folders["epsilon"]), dtype="bfloat16", device="cpu")
    made = adapted(half, adapters["db"], scale=0.5)
    state, exact = load_lora(adapters["db"]), load_prior(str(folders["epsilon"]), device="cpu").unet
    twice_rounded = 0
    for module in {name.rpartition(".lora_")[0].removeprefix("unet.") for name in state}:
        down, up = (state[f"unet.{module}.lora_{side}.weight"] for side in "AB")
        change = 0.5 * (4.0 / 2) * (up @ down)
        weight = made.unet.get_submodule(module).weight
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, (exact.get_submodule(module).weight + change).bfloat16())
        twice_rounded += int((weight != half.unet.get_submodule(module).weight + change.bfloat16()).sum())
    assert twice_rounded > 20
    unfused = adapted(half, adapters["db"], fuse=False)
    assert {one.dtype for one in unfused.unet.parameters()} == {torch.bfloat16}
    assert torch.equal(half.unet.conv_in.weight, exact.conv_in.weight.bfloat16())


def test_the_base_and_its_words_are_left_as_they_were(prior, adapters):
    before = {name: one.clone() for model in (prior.unet, prior.text_encoder)
              for name, one in model.state_dict().items()}
    words, state = len(prior.tokenizer), torch.random.get_rng_state()
    base = prior.embed(TOKENS, NEGATIVES, 1.0).tokens_BTE
    made = adapted(prior, adapters["ti_db"])
    assert torch.equal(state, torch.random.get_rng_state()), "nothing is drawn from the global generator"
    for model in (prior.unet, prior.text_encoder):
        for name, one in model.state_dict().items():
            assert torch.equal(one, before[name]), name
    assert len(prior.tokenizer) == words
    assert torch.equal(prior.embed(TOKENS, NEGATIVES, 1.0).tokens_BTE, base)
    table = made.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[:words], prior.text_encoder.get_input_embeddings().weight)
    assert len(table) == words + 3
    own = made.embed(TOKENS, NEGATIVES, 1.0).tokens_BTE  # `base` is in the other's cache
    assert torch.equal(own[2], base[2])
    for row in (0, 1, 3):
        assert not torch.equal(own[row], base[row])
    assert torch.equal(*(one.embed(TOKENS, NEGATIVES, 1.0).negative_tokens_BTE for one in (made, prior)))
    assert made.vae is prior.vae
    assert not any(one.requires_grad for model in (made.unet, made.text_encoder) for one in model.parameters())


def test_what_an_adapter_does_not_train_is_shared(prior, adapters):
    tokens, lora = adapted(prior, adapters["ti"]), adapted(prior, adapters["db"])
    assert tokens.unet is prior.unet
    assert lora.text_encoder is prior.text_encoder
    assert lora.unet is not prior.unet
    assert lora.texts is not prior.texts
    assert not torch.equal(predicted(tokens, TOKENS), predicted(prior, TOKENS))
    assert not torch.equal(predicted(lora), predicted(prior))


@torch.no_grad()
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.fast_cases(1)
def test_loading_options_hold_for_the_adapted_unet(folders, prior, adapters, fuse):
    from diffusers.models.attention_processor import AttnProcessor

    expected = predicted(adapted(prior, adapters["ti_db"], fuse=fuse), TOKENS)
    other = load_prior(str(folders["epsilon"]), device="cpu", attention="eager", channels_last=True)
    made = adapted(other, adapters["ti_db"], fuse=fuse)
    assert {type(p) for p in made.unet.attn_processors.values()} == {AttnProcessor}
    assert made.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(predicted(made, TOKENS), expected, atol=2e-5)
    compiled = adapted(load_prior(str(folders["epsilon"]), device="cpu", compile=True), adapters["db"], fuse=fuse)
    assert compiled_blocks(compiled) > 1


def test_an_adapter_of_another_model_is_refused(folders, priors, prior, adapters, tmp_path):
    own = prior_hash(str(folders["epsilon"]))
    assert prior.with_adapter(adapters["db"], base_sha256=own).adapter == read_adapter(adapters["db"])
    with pytest.raises(ModelError, match=rf"trained on base model {own[:12]}, but prior\.weights is model {'f' * 12}"):
        prior.with_adapter(adapters["db"], base_sha256="f" * 64)
    with pytest.raises(ModelError, match="has an adapter already"):
        adapted(adapted(prior, adapters["ti"]), adapters["db"])
    with pytest.raises(ModelError, match=r"predicts epsilon and has .* this one predicts v_prediction"):
        adapted(priors["v_prediction"], adapters["db"])
    words = tiny_adapter(tmp_path / "words", folders["epsilon"], "xyz", tokenizer_length=49_408)
    with pytest.raises(ModelError, match="has 49408 words, this one predicts epsilon and has"):
        adapted(prior, words)


@pytest.mark.parametrize(("wrong", "message"), [
    ("width", r"tokens of width 8, but this text encoder embeds words in 16"),
    ("shape", r"adapts .*attn1.* of shape \(2, 5\), but this UNet has weights of shape \(16, 16\)"),
    ("layer", "but this UNet has no such layer"),
])
def test_shapes_that_do_not_fit_are_named(prior, adapters, tmp_path, wrong, message):
    facts, lora, tokens = read_adapter(adapters["ti_db"]), load_lora(adapters["ti_db"]), torch.ones(3, 16)
    down = next(key for key in lora if "attn1.to_q.lora_A" in key)
    if wrong == "width":
        tokens = tokens[:, :8]
    elif wrong == "shape":
        lora[down] = lora[down][:, :5]
    else:
        lora = {key.replace("attn1", "attn9"): one for key, one in lora.items()}
    write_adapter(tmp_path / "x", facts, lora, tokens)
    with pytest.raises(ModelError, match=message):
        adapted(prior, tmp_path / "x")


@torch.no_grad()
def test_the_visual_token_reaches_the_unet_and_not_the_text_cache(prior):
    cond, v = prior.embed(PROMPTS, NEGATIVES, 2.0), normals(4, 16)
    z, kept = normals(4, 4, 8, 8), cond.tokens_BTE.clone()
    made = predict(prior, z, 500, cond.with_last_slot(v))
    assert not torch.allclose(made, predict(prior, z, 500, cond), atol=1e-3)
    assert torch.equal(prior.embed(PROMPTS, NEGATIVES, 2.0).tokens_BTE, kept)
    order = [2, 0, 3, 1]
    assert torch.allclose(predict(prior, z[order], 500, cond[order].with_last_slot(v[order])), made[:, order],
                          atol=2e-5)
