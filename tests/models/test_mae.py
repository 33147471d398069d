"""A masked autoencoder against transformers' own forward pass; the order of its tokens, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayexpand.contract.errors import ModelError
from rayexpand.diffusion import perturb
from rayexpand.methods.gif import Gif
from rayexpand.models.conversion import skeleton
from rayexpand.models.folders import folder_hash, folder_model, loaded_files
from rayexpand.models.mae import MaePrior, masked, ordered
from rayexpand.models.prior import check_size, inspect_prior, load_prior, prior_hash, prior_model
from rayexpand.models.prior_config import PriorModel, ProcessConfig
from rayexpand.models.tiny import digits_mae
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.models.gif_priors import header, tiny_mae, write

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mae(tmp_path_factory.mktemp("mae") / "model")


@pytest.fixture(scope="module")
def prior(sound: Path) -> MaePrior:
    return load_prior(str(sound), device="cpu")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((5, 3, 16, 16), np.float32))


def change(file: Path, **fields: Any) -> None:
    settings = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: one for name, one in settings.items() if one != "ABSENT"}))


def test_it_is_transformers_own_reconstruction_with_nothing_hidden(prior: MaePrior, x: torch.Tensor) -> None:
    model = prior.model
    with torch.no_grad(), masked(model, 0.0):
        expected = model.unpatchify(model(x * 2 - 1, noise=ordered(model, 5)).logits) / 2 + 0.5
        z = prior.encode(x, None)
        torch.testing.assert_close(prior.decode(z), expected, atol=1e-6, rtol=0)
    assert z.shape == (5, 16, 17)
    assert float(z.std()) > 0.1
    assert torch.equal(model.unpatchify(model.patchify(x)), x)


def test_tokens_stay_in_their_order(prior: MaePrior, x: torch.Tensor) -> None:
    """transformers shuffles them where no order is given, even if none is hidden."""
    model = prior.model
    with torch.no_grad(), masked(model, 0.0):
        shuffled = model.vit(x * 2 - 1)
        assert not torch.allclose(shuffled.last_hidden_state.transpose(1, 2), prior.encode(x, None), atol=1e-2)
        back = torch.cat([shuffled.last_hidden_state[:, :1], shuffled.last_hidden_state[:, 1:].gather(
            1, shuffled.ids_restore[..., None].expand(-1, -1, 16))], dim=1)
    torch.testing.assert_close(back.transpose(1, 2), prior.encode(x, None), atol=1e-5, rtol=0)


def test_the_share_that_is_hidden_is_set_inside_alone(prior: MaePrior, x: torch.Tensor) -> None:
    assert prior.model.config.mask_ratio == 0.75
    prior.encode(x, None)
    with pytest.raises(ValueError, match="doesn't match"), torch.no_grad():
        prior.encode(torch.zeros(1, 3, 8, 8), None)
    assert prior.model.config.mask_ratio == 0.75


def test_one_e_and_b_belong_to_a_channel_of_all_tokens(prior: MaePrior, x: torch.Tensor) -> None:
    batch = batch_of(Gif(generator="mae"), CLASSES, [("a", 0, 0), ("a", 0, 1)])
    z = prior.encode(x[:2], None)
    e, b = perturb.draw(batch, z)
    assert e.shape == b.shape == (2, 16, 1)
    slope = perturb.apply(z, e, b) - z
    torch.testing.assert_close(slope, e * z + b)
    assert perturb.draw(batch, z, "pixel")[0].shape == (2, 16, 17)


def test_a_row_does_not_depend_on_its_mates(prior: MaePrior, x: torch.Tensor) -> None:
    with torch.no_grad():
        whole = prior.decode(prior.encode(x, None))
        for i in range(5):
            torch.testing.assert_close(prior.decode(prior.encode(x[i:i + 1], None)), whole[i:i + 1], atol=1e-5, rtol=0)


def test_gradients_reach_the_latent(prior: MaePrior, x: torch.Tensor) -> None:
    z = prior.encode(x, None).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.decode(z).square().sum(), z)
    assert float((gradient == 0).float().mean()) < 0.1
    assert not any(parameter.requires_grad for parameter in prior.model.parameters())


def test_pixels_are_normalised_as_the_folder_says(prior: MaePrior, folder: Path, x: torch.Tensor) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    change(folder / "preprocessor_config.json", image_mean=mean, image_std=std)
    other = load_prior(str(folder), device="cpu")
    m, s = (torch.tensor(one).view(1, 3, 1, 1) for one in (mean, std))
    with torch.no_grad():
        torch.testing.assert_close((other.decode(z := prior.encode(x, None)) - m) / s, prior.decode(z) * 2 - 1,
                                   atol=1e-5, rtol=0)
        torch.testing.assert_close(other.encode((x * 2 - 1) * s + m, None), prior.encode(x, None), atol=1e-4, rtol=0)


def test_the_decoder_alone_runs_in_half_precision(sound: Path, prior: MaePrior, x: torch.Tensor) -> None:
    half = load_prior(PriorModel(weights=str(sound), vae_dtype="bfloat16"), device="cpu")
    with torch.no_grad():
        z = half.encode(x, None)
        assert torch.equal(z, prior.encode(x, None))
        seen = half.decode(z)
        assert seen.dtype == torch.float32
        difference = float((seen - prior.decode(z)).abs().max())
    assert 0 < difference < 0.1


def test_files_that_count(folder: Path, tmp_path: Path) -> None:
    before = folder_hash(folder)
    assert loaded_files(folder) == ["config.json", "preprocessor_config.json", "model.safetensors"]
    (folder / "README.md").write_text("other")
    (folder / "training_args.json").write_text("{}")
    assert prior_hash(str(folder)) == folder_hash(folder) == before
    copy = tmp_path / "node"
    copy.mkdir()
    for name, file in prior_model(str(folder)).find().items():
        shutil.copyfile(file, copy / name)
    assert folder_model(copy).lies_in(copy, before)
    assert inspect_prior(str(copy)).family == "mae"
    change(folder / "preprocessor_config.json", image_mean=[0.4] * 3)
    assert folder_hash(folder) != before


def test_facts_and_sizes(sound: Path) -> None:
    facts = inspect_prior(str(sound))
    assert (facts.family, facts.generator, facts.image_size, facts.vae_factor, facts.latent_channels) == (
        "mae", "mae", 16, 4, 16)
    check_size(facts, 16)
    with pytest.raises(ModelError, match=r"an image of 32 px .*set image\.size to 16"):
        check_size(facts, 32)


# Refused -------------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "patch normalisation": ("config.json", {"norm_pix_loss": True}, "norm_pix_loss.*half of the variety"),
    "a patch that does not divide": ("config.json", {"image_size": 18}, "patch_size 4 does not divide image_size 18"),
    "a width that positions cannot have": ("config.json", {"hidden_size": 18}, "hidden_size 18 is no multiple of 4"),
    "heads": ("config.json", {"num_attention_heads": 3}, "hidden_size 16 .* num_attention_heads 3"),
    "grey": ("config.json", {"num_channels": 1}, "num_channels 1"),
    "another model's weights": ("config.json", {"decoder_hidden_size": 32}, r"decoder_pos_embed is \[1, 17, 16\]"),
    "no mean of pixels": ("preprocessor_config.json", {"image_mean": "ABSENT"}, "image_mean: expected a number"),
    "no deviation": ("preprocessor_config.json", {"image_std": [1, 1, 0]}, "image_std: expected a number")}


@pytest.mark.parametrize(("file", "fields", "words"), REFUSED.values(), ids=REFUSED)
def test_facts_that_cannot_be_followed_are_refused(folder: Path, file: str, fields: dict[str, Any],
                                                   words: str) -> None:
    change(folder / file, **fields)
    for call in (inspect_prior, load_prior):
        with pytest.raises(ModelError, match=words):
            call(str(folder))


def test_positions_that_are_zeros_are_refused_before_anything_is_loaded(folder: Path, prior: MaePrior) -> None:
    """transformers makes such tables for a model that it builds without weights."""
    from transformers import ViTMAEForPreTraining

    fresh = ViTMAEForPreTraining(prior.model.config)
    assert float(fresh.decoder.decoder_pos_embed.std()) == 0.0  # what this is about
    with pytest.raises(ModelError, match="positions holds zeros"):
        MaePrior(fresh, (0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    for name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, name: torch.zeros_like(weights[name])}, folder / "model.safetensors")
        with pytest.raises(ModelError, match=f"{name} holds zeros"):
            inspect_prior(str(folder))
        save_file(weights, folder / "model.safetensors")
    model = digits_mae.build()
    assert min(float(table.std()) for table in (model.vit.embeddings.position_embeddings,
                                                model.decoder.decoder_pos_embed)) > 0.3


def test_files_that_are_missing_cut_or_of_an_encoder_alone(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    weights = load_file(folder / "model.safetensors")
    save_file({name: one for name, one in weights.items() if name.startswith("vit.")}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"decoder_pos_embed is not in the weights.*ViTMAEForPreTraining"):
        inspect_prior(str(folder))
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read: it is cut off"):
        inspect_prior(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError) as error:
        inspect_prior(str(folder))
    assert "pytorch_model.bin is a pickle" in str(error.value)
    assert "preprocessor_config.json is missing; it says how pixels are normalised" in str(error.value)


def test_what_says_how_to_denoise_has_no_meaning(sound: Path) -> None:
    for weights in (str(sound), "digits-mae"):
        for fields in ({"process": ProcessConfig(spacing="trailing")}, {"guidance": "cfg"}):
            with pytest.raises(ModelError, match=r"prior\.(process\.spacing|guidance): has no meaning for a masked"):
                inspect_prior(PriorModel(weights=weights, **fields))


# Published -----------------------------------------------------------------------------------------------------------


LARGE = {  # config.json of facebook/vit-mae-large
    "architectures": ["ViTMAEForPreTraining"], "attention_probs_dropout_prob": 0.0, "decoder_hidden_size": 512,
    "decoder_intermediate_size": 2048, "decoder_num_attention_heads": 16, "decoder_num_hidden_layers": 8,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 1024, "image_size": 224,
    "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-12, "mask_ratio": 0.75,
    "model_type": "vit_mae", "norm_pix_loss": False, "num_attention_heads": 16, "num_channels": 3,
    "num_hidden_layers": 24, "patch_size": 16, "qkv_bias": True}
PUBLISHED = {  # a tensor of each kind, by the names of the files on the hub
    "vit.embeddings.cls_token": (1, 1, 1024), "vit.embeddings.position_embeddings": (1, 197, 1024),
    "vit.embeddings.patch_embeddings.projection.weight": (1024, 3, 16, 16),
    "vit.encoder.layer.23.attention.attention.query.weight": (1024, 1024),
    "vit.encoder.layer.23.attention.output.dense.weight": (1024, 1024),
    "vit.encoder.layer.23.intermediate.dense.weight": (4096, 1024),
    "vit.encoder.layer.23.output.dense.weight": (1024, 4096), "vit.layernorm.weight": (1024,),
    "decoder.mask_token": (1, 1, 512), "decoder.decoder_pos_embed": (1, 197, 512),
    "decoder.decoder_embed.weight": (512, 1024),
    "decoder.decoder_layers.7.attention.attention.query.weight": (512, 512),
    "decoder.decoder_pred.weight": (768, 512)}


def test_vit_mae_large_by_its_configuration_and_header(tmp_path: Path) -> None:
    write(tmp_path / "config.json", LARGE)
    write(tmp_path / "preprocessor_config.json", {"do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
                                                  "image_std": [0.229, 0.224, 0.225]})
    header(tmp_path / "model.safetensors", PUBLISHED, ("vit.embeddings.position_embeddings",))
    with pytest.raises(ModelError, match=r"decoder\.decoder_pos_embed holds zeros"):
        inspect_prior(str(tmp_path))
    header(tmp_path / "model.safetensors", PUBLISHED, ("vit.embeddings.position_embeddings",
                                                       "decoder.decoder_pos_embed"))
    facts = inspect_prior(str(tmp_path))
    tokens = (facts.image_size // facts.vae_factor) ** 2 + 1
    assert (facts.image_size, facts.latent_channels, tokens) == (224, 1024, 197)


def published(name: str) -> str:
    """The name on the hub of a tensor in memory."""
    for ours, theirs in (("vit.layers", "vit.encoder.layer"), ("attention.q_proj", "attention.attention.query"),
                         ("attention.k_proj", "attention.attention.key"), ("mlp.fc1", "intermediate.dense"),
                         ("attention.v_proj", "attention.attention.value"), ("mlp.fc2", "output.dense"),
                         ("attention.o_proj", "attention.output.dense")):
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of no memory."""
    folder = tmp_path_factory.mktemp("large")
    write(folder / "config.json", LARGE)
    return skeleton(folder, "ViTMAEForPreTraining").to("meta")


def test_vit_mae_large_on_no_memory_has_the_published_names_and_shapes(large: Any) -> None:
    assert sum(one.numel() for one in large.parameters()) == 329_541_888
    shapes = {published(name): tuple(one.shape) for name, one in large.state_dict().items()}
    assert {name: shapes.get(name) for name in PUBLISHED} == PUBLISHED


def test_vit_mae_large_by_all_its_names_and_its_tokens(large: Any, tmp_path: Path) -> None:
    """A whole header passes, and one that lacks or changes a tensor does not; 197 tokens of 1024 channels go in."""
    from rayexpand.models.header_check import part_problems
    from rayexpand.models.sources import PartSource

    write(tmp_path / "config.json", LARGE)
    shapes = {published(name): tuple(one.shape) for name, one in large.state_dict().items()}
    part, block = PartSource("", tmp_path, tmp_path), "vit.encoder.layer.23.attention.attention"
    header(tmp_path / "model.safetensors", shapes)
    assert part_problems(part, "ViTMAEForPreTraining") == []
    del shapes[f"{block}.key.bias"]
    header(tmp_path / "model.safetensors", shapes | {f"{block}.query.weight": (1024, 512)})
    lacking, other = part_problems(part, "ViTMAEForPreTraining")
    assert "lacks 1 tensor" in lacking
    assert "vit.layers.23.attention.q_proj.weight is [1024, 512] in place of [1024, 1024]" in other
    with torch.device("meta"), masked(large, 0.0), torch.no_grad():
        seen = large.vit(torch.empty(2, 3, 224, 224), noise=ordered(large, 2))
        assert tuple(seen.last_hidden_state.shape) == (2, 197, 1024)
        drawn = large.decoder(seen.last_hidden_state, ids_restore=ordered(large, 2).long()).logits
        assert tuple(large.unpatchify(drawn).shape) == (2, 3, 224, 224)


def test_a_file_under_the_published_names_loads(prior: MaePrior, folder: Path, x: torch.Tensor) -> None:
    weights = {published(name): one.contiguous() for name, one in prior.model.state_dict().items()}
    assert {"vit.encoder.layer.0.attention.attention.query.weight",
            "decoder.decoder_layers.0.attention.attention.query.weight"} <= weights.keys()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    other = load_prior(str(folder), device="cpu")
    with torch.no_grad():
        assert torch.equal(z := other.encode(x, None), prior.encode(x, None))
        assert torch.equal(other.decode(z), prior.decode(z))
