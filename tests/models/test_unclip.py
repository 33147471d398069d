"""A decoder of image embeddings against diffusers' own pipeline; which guide it goes with, and what is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file

from rayexpand.contract.errors import ModelError
from rayexpand.models.folders import folder_hash, loaded_files
from rayexpand.models.guides import load_guide
from rayexpand.models.image_towers import _of_open_clip, _of_transformers, encoder_space, guide_space
from rayexpand.models.prior import inspect_prior, load_prior
from rayexpand.models.unclip import UnclipPrior, Variation
from tests.methods.conftest import CLASSES
from tests.models.gif_priors import header, tiny_unclip, write
from tests.tiny import tiny_clip

torch.set_num_threads(1)
B, D = 4, 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and `guide` whose image tower it has."""
    folder = tmp_path_factory.mktemp("unclip")
    tiny_unclip(folder / "model", tiny_clip(folder / "guide"))
    return folder


@pytest.fixture(scope="module")
def prior(root: Path) -> UnclipPrior:
    return load_prior(str(root / "model"), device="cpu")


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(root / "model", tmp_path / "model"))


def numbers(name: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(name).standard_normal(shape, np.float32))


def variation(prior: UnclipPrior, rows: int = B, scale: float = 2.0, level: int = 0, steps: int = 4) -> Variation:
    return prior.variation(prior.schedule("ddim", steps), numbers(1, rows, 4, 8, 8), numbers(2, rows, D), scale, level)


def change(file: Path, **fields: Any) -> None:
    settings = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: one for name, one in settings.items() if one != "ABSENT"}))


@pytest.mark.parametrize(("scale", "level"), [(2.0, 0), (1.0, 0), (4.0, 300)])
def test_images_are_those_of_diffusers(root: Path, prior: UnclipPrior, scale: float, level: int) -> None:
    from diffusers import StableUnCLIPImg2ImgPipeline

    pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(root / "model")
    pipe.set_progress_bar_config(disable=True)
    how, z = variation(prior, scale=scale, level=level), numbers(3, B, D)
    pipe.noise_image_embeddings = partial(pipe.noise_image_embeddings, noise=how.level_noise_BD)
    expected = pipe(image_embeds=z, prompt=[""] * B, latents=how.noise_BChw, noise_level=level, guidance_scale=scale,
                    num_inference_steps=4, output_type="pt").images
    with torch.no_grad():
        found = prior.decode(z, how).clamp(0, 1)
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    other = prior.decode(z + 1, how).clamp(0, 1)
    assert float((other - found).abs().max()) > 1e-2  # the embedding is heard


def test_an_embedding_is_the_guides_own(root: Path, prior: UnclipPrior) -> None:
    guide = load_guide(str(root / "guide"), None, CLASSES.name, device="cpu")
    x = torch.from_numpy(np.random.default_rng(0).random((B, 3, 16, 16), np.float32))
    with torch.no_grad():
        torch.testing.assert_close(prior.encode(x, None), guide.features(x), atol=1e-5, rtol=0)
        large = torch.from_numpy(np.random.default_rng(0).random((2, 3, 40, 40), np.float32))
        small = F.interpolate(large, (16, 16), mode="bicubic", antialias=True, align_corners=False)
        torch.testing.assert_close(prior.encode(large, None), guide.features(small), atol=1e-5, rtol=0)
    assert prior.space == guide_space(str(root / "guide"), None) == encoder_space(root / "model")
    assert prior.decode_needs_grad is False


def test_rows_do_not_depend_on_their_mates(prior: UnclipPrior) -> None:
    how, z = variation(prior), numbers(3, B, D)
    with torch.no_grad():
        whole = prior.decode(z, how)
        for i in range(B):
            torch.testing.assert_close(prior.decode(z[i:i + 1], how[[i]]), whole[i:i + 1], atol=1e-5, rtol=0)


def test_nothing_to_follow_is_zeros_also_in_the_half_that_says_the_level(prior: UnclipPrior,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    told, plain = [], prior.decoder.unet.forward

    def forward(*args: Any, class_labels: torch.Tensor, **more: Any) -> Any:
        told.append(class_labels)
        return plain(*args, class_labels=class_labels, **more)

    monkeypatch.setattr(prior.decoder.unet, "forward", forward)
    z = numbers(3, B, D)
    with torch.no_grad():
        prior.decode(z, variation(prior, steps=1))
        prior.decode(z, variation(prior, scale=1.0, steps=1))
    (guided, plainly) = told
    assert not guided[:B].any()
    assert torch.equal(guided[B:], plainly)
    assert guided.shape == (2 * B, 2 * D)
    assert torch.equal(plainly[0, D:], plainly[1, D:])


def test_noise_of_a_level_leads_away_from_the_embedding(prior: UnclipPrior) -> None:
    """At level 0 there is some already (0.0064 of a deviation), and at 999 little is left."""
    z, noise = numbers(3, B, D), variation(prior).level_noise_BD
    found = [float(F.cosine_similarity(prior.labels(z, noise, torch.full((B,), level))[:, :D], z).mean())
             for level in (0, 100, 500, 999)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.999
    assert found[1] > 0.9
    assert found[3] < 0.5
    clean = (prior.labels(z, noise, torch.zeros(B, dtype=torch.int64))[:, :D] - z) / prior.normalizer.std
    assert 0.004 < float(clean.std()) < 0.009


def test_a_network_without_attention_has_nothing_to_compile(root: Path) -> None:
    assert load_prior(str(root / "model"), device="cpu", compile=True).decoder.options.compile is True


def test_files_that_count(folder: Path) -> None:
    names = loaded_files(folder)
    assert {"image_encoder/model.safetensors", "image_normalizer/diffusion_pytorch_model.safetensors",
            "image_noising_scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json",
            "unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"} <= set(names)
    before = folder_hash(folder)
    mean = load_file(folder / "image_normalizer/diffusion_pytorch_model.safetensors")
    save_file({**mean, "mean": mean["mean"] + 1}, folder / "image_normalizer/diffusion_pytorch_model.safetensors")
    assert folder_hash(folder) != before


def test_facts(root: Path) -> None:
    facts = inspect_prior(str(root / "model"))
    assert (facts.family, facts.generator, facts.image_size, facts.latent_channels) == ("unclip", "unclip", 16, 4)
    assert facts.process.kind == "epsilon"


# The guide that goes with it -----------------------------------------------------------------------------------------


def test_a_space_is_named_alike_in_both_layouts_and_precisions(root: Path, folder: Path) -> None:
    file = folder / "image_encoder/model.safetensors"
    save_file({name: one.half() for name, one in load_file(file).items()},
              folder / "image_encoder/model.fp16.safetensors")
    file.unlink()
    assert encoder_space(folder) == encoder_space(root / "model") == guide_space(str(root / "guide"), None)


def test_another_guide_has_another_space(root: Path, folder: Path, tmp_path: Path) -> None:
    own = encoder_space(root / "model")
    assert guide_space(str(tiny_clip(tmp_path / "other", seed=1)), None) != own
    change(folder / "image_encoder/config.json", hidden_act="quick_gelu")
    assert encoder_space(folder) != own
    for field, value, words in (("pool_type", "avg", "pools its tokens by 'avg'"), ("layers", [1, 1, 1, 1], "plain")):
        copy = Path(shutil.copytree(root / "guide", tmp_path / field))
        settings = json.loads((copy / "open_clip_config.json").read_text())
        settings["model_cfg"]["vision_cfg"][field] = value
        write(copy / "open_clip_config.json", settings)
        with pytest.raises(ModelError, match=words):
            guide_space(str(copy), None)


def test_one_tensor_of_a_block_is_enough_to_tell_two_towers_apart(root: Path, folder: Path) -> None:
    file = folder / "image_encoder/model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.0.mlp.fc1.weight"))
    weights[name][0, 0] += 0.01
    save_file(weights, file)
    assert encoder_space(folder) != encoder_space(root / "model")


# Refused -------------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no embedding": ("unet/config.json", {"class_embed_type": None}, "class_embed_type None.*paint without it"),
    "a timestep": ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
    "another width": ("unet/config.json", {"projection_class_embeddings_input_dim": 64}, "64 is not 2 x projection"),
    "another encoder": ("image_encoder/config.json", {"projection_dim": 32}, "embedding_dim 16 is not projection_dim"),
    "no noise": ("image_noising_scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"},
                 "EDMEulerScheduler cannot add noise"),
    "no pixels": ("feature_extractor/preprocessor_config.json", {"image_std": "ABSENT"}, "image_std: expected"),
    "Karlo": ("model_index.json", {"_class_name": "UnCLIPImageVariationPipeline"}, "this is Karlo.*Use Stable unCLIP"),
    "from texts": ("model_index.json", {"_class_name": "StableUnCLIPPipeline"}, "without an image encoder"),
    "without an encoder": ("model_index.json", {"image_encoder": [None, None]}, "is a StableUnCLIPImg2ImgPipeline wi")}


@pytest.mark.parametrize(("file", "fields", "words"), REFUSED.values(), ids=REFUSED)
def test_facts_that_cannot_be_followed_are_refused(folder: Path, file: str, fields: dict[str, Any],
                                                   words: str) -> None:
    change(folder / file, **fields)
    with pytest.raises(ModelError, match=words):
        inspect_prior(str(folder))


@pytest.mark.parametrize("part", ["image_encoder", "image_normalizer", "image_noising_scheduler", "feature_extractor"])
def test_a_part_that_is_not_there_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(ModelError, match=rf"{part}/\w+\.json is missing"):
        inspect_prior(str(folder))


def test_weights_of_another_decoder_are_named(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["class_embedding.linear_1.weight"] = torch.zeros(32, 2048)
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"class_embedding\.linear_1\.weight is \[32, 2048\].*\[32, 32\]"):
        inspect_prior(str(folder))


# Published -----------------------------------------------------------------------------------------------------------


def published(features: int, width: int, layers: int) -> dict[str, dict[str, Any]]:
    """What stable-diffusion-2-1-unclip (1024 features, ViT-H/14) and -small (768, ViT-L/14) say of themselves."""
    return {
        "unet": {"_class_name": "UNet2DConditionModel", "attention_head_dim": [5, 10, 20, 20],
                 "block_out_channels": [320, 640, 1280, 1280], "class_embed_type": "projection",
                 "cross_attention_dim": 1024, "in_channels": 4, "out_channels": 4,
                 "projection_class_embeddings_input_dim": 2 * features, "sample_size": 96,
                 "use_linear_projection": True},
        "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4,
                "sample_size": 768, "scaling_factor": 0.18215},
        "text_encoder": {"architectures": ["CLIPTextModel"], "hidden_size": 1024, "vocab_size": 49408,
                         "max_position_embeddings": 77, "num_hidden_layers": 23},
        "image_encoder": {"architectures": ["CLIPVisionModelWithProjection"], "hidden_size": width,
                          "image_size": 224, "patch_size": 14, "projection_dim": features,
                          "num_hidden_layers": layers, "num_attention_heads": 16, "intermediate_size": 4 * width,
                          "hidden_act": "gelu" if features == 1024 else "quick_gelu"},
        "image_normalizer": {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": features}}


def folder_of(configs: dict[str, dict[str, Any]], folder: Path) -> Path:
    """The json files of a pipeline, and a header of each of its weights."""
    libraries = {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
                 "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
                 "scheduler": ("diffusers", "DDIMScheduler"), "feature_extractor": ("transformers",
                                                                                    "CLIPImageProcessor"),
                 "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
                 "image_normalizer": ("stable_diffusion", "StableUnCLIPImageNormalizer"),
                 "image_noising_scheduler": ("diffusers", "DDPMScheduler")}
    write(folder / "model_index.json", {"_class_name": "StableUnCLIPImg2ImgPipeline", **libraries})
    betas = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    write(folder / "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler", **betas, "steps_offset": 1,
                                                       "set_alpha_to_one": False, "clip_sample": False,
                                                       "prediction_type": "v_prediction"})
    write(folder / "image_noising_scheduler/scheduler_config.json",
          {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000})
    write(folder / "feature_extractor/preprocessor_config.json",
          {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
           "crop_size": 224, "size": 224})
    write(folder / "tokenizer/tokenizer_config.json", {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    write(folder / "tokenizer/vocab.json", {str(i): i for i in range(49408)})
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    for part, config in configs.items():
        write(folder / part / "config.json", config)
        stem = "model" if part.endswith("encoder") else "diffusion_pytorch_model"
        header(folder / part / f"{stem}.safetensors", shapes_of(part, config))
    return folder


def shapes_of(part: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the real classes, on no memory."""
    import diffusers
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        model = {"unet": lambda: diffusers.UNet2DConditionModel(**plain),
                 "vae": lambda: diffusers.AutoencoderKL(**plain),
                 "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**plain)),
                 "image_encoder": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**plain)),
                 "image_normalizer": lambda: StableUnCLIPImageNormalizer(**plain)}[part]()
    return {name: tuple(one.shape) for name, one in model.state_dict().items()}


@pytest.mark.parametrize(("name", "size"), [("ViT-H-14", (1024, 1280, 32)), ("ViT-L-14-quickgelu", (768, 1024, 24))])
def test_published_image_towers_have_the_same_tensors_in_both_layouts(name: str, size: tuple[int, int, int]) -> None:
    """By name and shape, on no memory: the guide that goes with a published decoder is told to be its encoder."""
    import open_clip

    config = published(*size)["image_encoder"]
    clip = open_clip.get_model_config(name)
    with torch.device("meta"):
        tower = open_clip.CustomTextCLIP if clip.get("custom_text") else open_clip.CLIP
        guide = tower(**{key: one for key, one in clip.items() if key != "custom_text"})
    ours, theirs = ({key: np.broadcast_to(np.float16(0), shape) for key, shape in shapes.items()} for shapes in (
        {key: tuple(one.shape) for key, one in guide.state_dict().items()}, shapes_of("image_encoder", config)))
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in theirs) else ""
    found = [[(key, value.shape) for key, value in tensors] for tensors in (
        _of_open_clip(ours.__getitem__, size[2]), _of_transformers(theirs.__getitem__, prefix, size[2]))]
    assert found[0] == found[1]
    assert len(found[0]) == 8 + 12 * size[2]
    vision = clip["vision_cfg"]
    assert vision["width"] // vision.get("head_width", 64) == config["num_attention_heads"]
    assert clip.get("quick_gelu", False) == (config["hidden_act"] == "quick_gelu")
    assert {key for key in ours if key.startswith("visual.")} == {f"visual.{key}" for key in _read(size[2])}


def _read(layers: int) -> set[str]:
    """Every tensor of a tower that is hashed, as open_clip names it."""
    asked: set[str] = set()

    def read(name: str) -> np.ndarray:
        asked.add(name.removeprefix("visual."))
        return np.zeros(1)

    list(_of_open_clip(read, layers))
    return asked


@pytest.mark.parametrize(("features", "width", "layers"), [(1024, 1280, 32), (768, 1024, 24)], ids=["h", "l"])
def test_stable_unclip_by_its_configurations_and_headers(features: int, width: int, layers: int,
                                                         tmp_path: Path) -> None:
    configs = published(features, width, layers)
    folder = folder_of(configs, tmp_path)
    shapes = {part: shapes_of(part, config) for part, config in configs.items()}
    assert shapes["unet"]["class_embedding.linear_1.weight"] == (1280, 2 * features)
    assert shapes["image_normalizer"] == {"mean": (1, features), "std": (1, features)}
    assert shapes["image_encoder"]["visual_projection.weight"] == (features, width)
    facts = inspect_prior(str(folder))
    assert (facts.family, facts.image_size, facts.vae_factor, facts.process.kind) == ("unclip", 768, 8, "v_prediction")
    change(folder / "image_encoder/config.json", projection_dim=512)
    with pytest.raises(ModelError) as error:
        inspect_prior(str(folder))
    for words in ("embedding_dim", "projection_class_embeddings_input_dim", "visual_projection.weight"):
        assert words in str(error.value)
