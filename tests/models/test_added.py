"""LoRAs and words in a job file: they change the samples, belong to the content hash, travel in one folder, and are
refused before there is a run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayexpand.contract.errors import ConfigError, ModelError
from rayexpand.models.prior import load_prior, prior_hash, prior_model, sources_of, staged_prior
from rayexpand.models.prior_config import PriorModel
from rayexpand.runs.config import parse, semantic
from rayexpand.runs.cut_prompts import cut_prompts
from rayexpand.runs.run import prepare, weight_problems_of

Folders = Callable[[str], Path]
TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def lora(family_folder: Folders, tmp_path: Path) -> Path:
    """Rank 2 on one projection of the UNet and one of the second text encoder, in kohya's layout."""
    unet = load_file(family_folder("sdxl") / "unet/diffusion_pytorch_model.safetensors")
    texts = load_file(family_folder("sdxl") / "text_encoder_2/model.safetensors")
    draw, tensors = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    attention = next(name for name in texts if name.endswith("layers.0.self_attn.q_proj.weight"))
    of_texts = "text_model.encoder.layers.0.self_attn.q_proj"
    for key, weight in ((f"lora_unet_{TO_Q}", unet[f"{TO_Q}.weight"]), (f"lora_te2_{of_texts}", texts[attention])):
        key = key.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=draw)
        tensors[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=draw)
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.fixture
def word(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(1)
    save_file({"clip_l": torch.randn(2, 16, generator=draw), "clip_g": torch.randn(2, 32, generator=draw)},
              tmp_path / "word.safetensors")
    return tmp_path / "word.safetensors"


def job(out: Path, prior: dict[str, Any], prompt: str = "a photo of a {name}") -> Any:
    return parse({"name": "run", "out": str(out), "data": {"source": "digits", "per_class": 1}, "prior": prior,
                  "method": {"name": "img2img", "guidance_scale": 2.0, "steps": 4, "ratio": 1, "prompt": prompt},
                  "sampler": {"batch": 4}, "image": {"size": 32}})


def test_they_change_the_samples_and_the_hash(family_folder: Folders, lora: Path, word: Path) -> None:
    base = {"weights": str(family_folder("sdxl"))}
    plain = PriorModel(**base)
    styled = PriorModel(**base, loras=[{"file": str(lora), "scale": 0.5}])
    worded = PriorModel(**base, embeddings=[{"file": str(word), "token": "<w>"}])
    assert len({prior_hash(one) for one in (plain, styled, worded)}) == 3
    z_BCHW = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = {}
    for name, one in {"plain": plain, "styled": styled, "worded": worded}.items():
        prior = load_prior(one, device="cpu")
        at = prior.schedule("ddim", 4).first
        seen[name] = {text: prior.predict(z_BCHW, at, prior.embed([text], [""], 3.0)).clean
                      for text in ("a zero", "a zero <w>")}
    assert not torch.equal(seen["plain"]["a zero"], seen["styled"]["a zero"])
    near = {"rtol": 1e-4, "atol": 1e-4}  # on some CPUs bits depend on where in memory weights lie
    torch.testing.assert_close(seen["plain"]["a zero"], seen["worded"]["a zero"], **near)
    assert not torch.allclose(seen["plain"]["a zero"], seen["styled"]["a zero"], **near)
    assert not torch.equal(seen["plain"]["a zero <w>"], seen["worded"]["a zero <w>"])


def test_the_weights_are_the_truth(family_folder: Folders, lora: Path) -> None:
    tensors = load_file(lora)
    key = f"lora_unet_{TO_Q}".replace(".", "_")
    change = 0.5 * 0.5 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    base, made = (load_prior(PriorModel(weights=str(family_folder("sdxl")), loras=loras), device="cpu").unet
                  for loras in ((), ({"file": str(lora), "scale": 0.5},)))
    torch.testing.assert_close(made.get_submodule(TO_Q).weight, base.get_submodule(TO_Q).weight + change)


def test_all_of_it_is_one_folder_on_a_node(family_folder: Folders, lora: Path, word: Path, tmp_path: Path) -> None:
    """What `expand` on Ray does: the files under their roles, the same hash, the same numbers."""
    model = PriorModel(weights=str(family_folder("sdxl")), loras=[{"file": str(lora)}],
                       embeddings=[{"file": str(word), "token": "<w>"}])
    files, node = prior_model(model).find(), tmp_path / "node"
    for name, file in files.items():
        (node / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, node / name)
    assert {"prior.loras.0.safetensors", "prior.embeddings.0.safetensors"} <= set(files)
    assert prior_model(model).hash(node) == prior_hash(model)
    there = staged_prior(model, node)
    assert sources_of(there).folder == node
    z_BCHW = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    for one in (model, there):
        prior = load_prior(one, device="cpu")
        seen.append(prior.predict(z_BCHW, prior.schedule("ddim", 4).first, prior.embed(["a <w>"], [""], 3.0)).clean)
    assert torch.equal(*seen)


def test_what_does_not_fit_is_refused_at_once(family_folder: Folders, lora: Path, word: Path, tmp_path: Path) -> None:
    config = job(tmp_path / "out", {"weights": str(family_folder("sd")), "loras": [{"file": str(lora)}],
                                    "embeddings": [{"file": str(word), "token": "zero"}]})
    lines = weight_problems_of(config)
    assert any(line.startswith("prior.loras.0: ") for line in lines)
    assert any(line.startswith("prior.embeddings.0: ") for line in lines)
    with pytest.raises(ConfigError):
        prepare(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match=r"prior\.loras\.0: there is no file"):
        sources_of(PriorModel(weights=str(family_folder("sd")), loras=[{"file": str(tmp_path / "gone.safetensors")}]))


def test_a_digest_without_them_is_the_old_one(family_folder: Folders, lora: Path, tmp_path: Path) -> None:
    plain = semantic(job(tmp_path, {"weights": str(family_folder("sd"))}))["prior"]
    assert not {"loras", "embeddings", "config", "parts", "vae", "process", "guidance", "vae_dtype"} & plain.keys()
    assert "loras" in semantic(job(tmp_path, {"weights": "x/y", "loras": [{"file": str(lora)}]}))["prior"]


def test_words_of_several_vectors_count_as_several_tokens(family_folder: Folders, word: Path, tmp_path: Path) -> None:
    """16 tokens: a text of 13 words and a word of two vectors, with start and end, is cut."""
    text = "a " * 13 + "<w>"
    config = job(tmp_path / "out", {"weights": str(family_folder("sdxl")),
                                    "embeddings": [{"file": str(word), "token": "<w>"}]}, text)
    run = prepare(config)
    found = cut_prompts(run.plan, config, family_folder("sdxl"))
    assert found is not None
    assert (found.longest, found.tokens) == (17, 16)
    assert run.facts["cut_prompts"]["cut"] == 10
