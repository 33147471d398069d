"""Files that make one generator together: which of them counts, what does not fit, and one hash over all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayexpand.models.folders import folder_hash
from rayexpand.models.sources import PriorSources, source_notes, source_problems, sources_hash, staged_sources
from tests.models import original_layout as original
from tests.models.conftest import json_files

NOISE = "scheduler/scheduler_config.json"


@pytest.fixture
def sd(single_file: Callable[[str], PriorSources]) -> PriorSources:
    return single_file("sd")


@pytest.fixture
def sdxl(single_file: Callable[[str], PriorSources]) -> PriorSources:
    return single_file("sdxl")


def line(problems: list[str], *words: str) -> None:
    """Asserts that there is one problem and that it holds these words."""
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0]


def noise(sources: PriorSources, to: Path, **fields: Any) -> PriorSources:
    """The same sources, whose scheduler says these fields."""
    config = Path(shutil.copytree(sources.folder, to))
    settings = json.loads((config / NOISE).read_text())
    (config / NOISE).write_text(json.dumps(settings | fields))
    return replace(sources, config=config)


def marked(sources: PriorSources, to: Path, *names: str, **metadata: str) -> PriorSources:
    """The same sources, whose file holds these markers too."""
    numbers = {"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.002}
    tensors = {**load_file(sources.weights), **{name: torch.tensor(numbers.get(name, 0.0)) for name in names}}
    return replace(sources, weights=original.write(to, tensors, **metadata))


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl"])
def test_a_file_over_its_configuration_has_no_problem(single_file: Callable[[str], PriorSources], name: str) -> None:
    assert source_problems(single_file(name)) == []


@pytest.mark.parametrize("name", ["sd", "cosxl"])
def test_a_folder_alone_has_neither_problems_nor_notes(family_folder: Callable[[str], Path], name: str) -> None:
    sources = PriorSources(family_folder(name))
    assert source_problems(sources) == source_notes(sources) == []


def test_the_assumed_prediction_and_what_is_not_read_are_notes(sd: PriorSources) -> None:
    assumed, unread = source_notes(sd)
    assert f"{sd.weights} does not say what its network predicts; epsilon is assumed" in assumed
    assert f"{sd.folder / NOISE} says" in assumed
    assert "1 of the tensors" in unread
    assert "alphas_cumprod" in unread
    assert "v_prediction is assumed, as prior.process.prediction_type says" in source_notes(
        sd, {"prediction_type": "v_prediction"})[0]


# ---------------------------------------------------------------------------------------------------------- the marker


def test_a_marker_against_the_configuration_is_refused_naming_both(sdxl: PriorSources, tmp_path: Path) -> None:
    """The file of the specification: tensors v_pred and ztsnr and metadata v, over a configuration of epsilon."""
    sources = marked(sdxl, tmp_path / "v.safetensors", "v_pred", "ztsnr", **{"modelspec.predict_key": "v"})
    problems = source_problems(sources)
    assert len(problems) == 3
    for problem, marker, field in zip(problems, ("v_pred", "ztsnr", "modelspec.predict_key"),
                                      ("prediction_type", "rescale_betas_zero_snr", "prediction_type"), strict=True):
        assert f"{sources.weights} has {marker}" in problem
        assert f"{sdxl.folder / NOISE} says {field}" in problem
        assert f"Set prior.process.{field}: " in problem
    process = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "spacing": None}
    assert source_problems(sources, process) == []
    right = noise(sources, tmp_path / "v", **process)
    assert source_problems(right) == []
    assert "assumed" not in "".join(source_notes(right))
    line(source_problems(right, {"rescale_betas_zero_snr": False}), "prior.process.rescale_betas_zero_snr says",
         "has ztsnr")


def test_a_noise_prediction_over_a_configuration_of_v_is_refused(sd: PriorSources, tmp_path: Path) -> None:
    sources = marked(sd, tmp_path / "e.safetensors", **{"modelspec.predict_key": "epsilon"})
    line(source_problems(noise(sources, tmp_path / "v", prediction_type="v_prediction")),
         "has modelspec.predict_key, which says prediction_type epsilon", "says prediction_type v_prediction")


def test_cosxl_asks_for_its_scheduler_and_its_range(sdxl: PriorSources, tmp_path: Path) -> None:
    sources = marked(sdxl, tmp_path / "cosxl.safetensors", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
    is_edm, predicts = source_problems(sources)
    assert '"_class_name": "EDMEulerScheduler"' in is_edm
    assert "_class_name EulerDiscreteScheduler, which is no EDM scheduler" in is_edm
    assert "prediction_type v_prediction" in predicts
    edm = {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_min": 0.002, "sigma_data": 1.0}
    line(source_problems(noise(sources, tmp_path / "80", **edm, sigma_max=80.0)), "has edm_vpred.sigma_max, which says "
         "sigma_max 120.0", "says sigma_max 80.0", "Set prior.process.sigma_max: 120.0")
    assert source_problems(noise(sources, tmp_path / "120", **edm, sigma_max=120.0)) == []


def test_playground_asks_for_the_normalised_latents(sdxl: PriorSources, tmp_path: Path,
                                                    family_folder: Callable[[str], Path]) -> None:
    sources = marked(sdxl, tmp_path / "p.safetensors", "edm_mean", "edm_std")
    edm = noise(sources, tmp_path / "edm", _class_name="EDMEulerScheduler", prediction_type="epsilon")
    line(source_problems(edm), "edm_mean", "vae/config.json has no latents_mean", "playground-v2.5")
    assert source_problems(replace(sources, config=json_files(family_folder("playground"), tmp_path / "own"))) == []


def test_a_marker_of_a_unet_that_is_replaced_does_not_count(sd: PriorSources, tmp_path: Path,
                                                            family_folder: Callable[[str], Path]) -> None:
    sources = marked(sd, tmp_path / "v.safetensors", "v_pred")
    other = original.write(tmp_path / "unet.safetensors", original.unet(family_folder("sd")))
    assert source_problems(replace(sources, parts={"unet": other})) == []
    line(source_problems(replace(sd, parts={"unet": marked(PriorSources(other), tmp_path / "u.safetensors",
                                                           "v_pred").weights})), "prior.parts.unet: ", "has v_pred")


# ------------------------------------------------------------------------------------------------------------- absence


@pytest.mark.parametrize(("name", "repository"), [("sd", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
                                                  ("sd2", "stabilityai/stable-diffusion-2-1"),
                                                  ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0")])
def test_without_a_configuration_the_repository_and_the_command_are_named(
        single_file: Callable[[str], PriorSources], name: str, repository: str, tmp_path: Path) -> None:
    file = single_file(name).weights
    line(source_problems(PriorSources(file)), "prior.config: ", f"{file} is Stable Diffusion",
         f'`hf download {repository} --include "*.json" "*.txt" "*.model" --local-dir {repository.split("/")[1]}`')
    line(source_problems(PriorSources(file, tmp_path)), f"prior.config: {tmp_path} holds no model_index.json",
         "hf download")


def test_without_a_configuration_the_unet_alone_asks_for_a_whole_model(family_folder: Callable[[str], Path],
                                                                       tmp_path: Path) -> None:
    file = original.write(tmp_path / "unet.safetensors", original.unet(family_folder("sd")))
    line(source_problems(PriorSources(file)), "the UNet of Stable Diffusion 1.x alone", "prior.parts.unet")


def test_cosxl_without_a_configuration_is_given_its_scheduler(sdxl: PriorSources, tmp_path: Path) -> None:
    sources = marked(sdxl, tmp_path / "c.safetensors", "edm_vpred.sigma_max")
    line(source_problems(replace(sources, config=None)), "hf download", '"sigma_max": 120.0', "EDMEulerScheduler")
    playground = marked(sdxl, tmp_path / "p.safetensors", "edm_mean", "edm_std")
    line(source_problems(replace(playground, config=None)), "hf download playgroundai/playground-v2.5-1024px-aesthetic")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_a_part_that_neither_holds_is_named(sdxl: PriorSources, tmp_path: Path, part: str,
                                            family_folder: Callable[[str], Path]) -> None:
    prefix = {"vae": "first_stage_model.", "text_encoder": "conditioner.embedders.0.",
              "text_encoder_2": "conditioner.embedders.1."}[part]
    less = original.write(tmp_path / "less.safetensors", {
        name: tensor for name, tensor in load_file(sdxl.weights).items() if not name.startswith(prefix)})
    sources = replace(sdxl, weights=less)
    line(source_problems(sources), f"{less} holds no {part}, and neither does {sdxl.folder}",
         f'hf download REPOSITORY --include "{part}/*"')
    config = Path(shutil.copytree(sdxl.folder, tmp_path / "config"))
    shutil.copytree(family_folder("sdxl") / part, config / part, dirs_exist_ok=True)
    whole = replace(sources, config=config)
    assert source_problems(whole) == []
    assert whole.part(part).weights == config / part
    if part == "vae":
        assert source_problems(replace(sources, vae=family_folder("sdxl"))) == []


def test_a_configuration_without_a_part_is_named(sd: PriorSources, tmp_path: Path) -> None:
    config = Path(shutil.copytree(sd.folder, tmp_path / "config"))
    (config / "vae/config.json").unlink()
    line(source_problems(replace(sd, config=config)), "vae/config.json is missing")


# ------------------------------------------------------------------------------------------------------ what goes where


def test_a_file_over_the_configuration_of_another_family_is_refused(sd: PriorSources, sdxl: PriorSources) -> None:
    line(source_problems(PriorSources(sd.weights, sdxl.config)), f"{sd.weights} is Stable Diffusion 1.x, but",
         "unet/config.json is that of Stable Diffusion XL", "stable-diffusion-v1-5")


def test_files_in_the_wrong_place(sd: PriorSources, tmp_path: Path, family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("sd")
    vae = original.write(tmp_path / "vae.safetensors", original.vae(folder, ""))
    line(source_problems(PriorSources(vae, sd.config)), "prior.weights: ", "an autoencoder without a UNet", "prior.vae")
    line(source_problems(PriorSources(folder, vae=original.write(tmp_path / "u.safetensors", original.unet(folder)))),
         "prior.vae: ", "holds no vae")
    line(source_problems(PriorSources(folder, parts={"unet": sd.weights})), "prior.parts.unet: ",
         "holds vae, text_encoder too, which would not be read", "prior.weights")
    line(source_problems(PriorSources(folder, parts={"vae": vae})), "prior.parts.vae: ", "prior.vae")
    line(source_problems(PriorSources(folder, sd.config)), "prior.config: ", "leave prior.config out")
    line(source_problems(PriorSources(sd.weights, vae)), f"prior.config: {vae} is a file")
    line(source_problems(PriorSources(folder, vae=tmp_path / "none")), f"prior.vae: there is no {tmp_path / 'none'}")


def test_all_files_are_asked_at_once(sd: PriorSources, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "b.ckpt").write_bytes(b"PK\x03\x04")
    first, second = source_problems(replace(sd, vae=tmp_path / "b.ckpt", parts={"unet": tmp_path / "a.gguf"}))
    assert "prior.vae: " in first
    assert "pickle" in first
    assert "prior.parts.unet: " in second
    assert "GGUF" in second


def test_an_inpainting_file_is_refused_where_it_is_named(tmp_path: Path, family_folder: Callable[[str], Path]) -> None:
    for name, words in (("inpaint", "9 channels"), ("ip2p", "4 more channels")):
        file = original.write(tmp_path / f"{name}.safetensors", original.sd(family_folder(name)))
        line(source_problems(PriorSources(file, family_folder(name))), f"prior.weights: {file} cannot be used", words)


def test_an_autoencoder_of_another_class_is_refused(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    shutil.copy(family_folder("sd") / "vae/diffusion_pytorch_model.safetensors", tmp_path)
    line(source_problems(PriorSources(family_folder("sd"), vae=tmp_path)),
         f"{tmp_path / 'config.json'}: AutoencoderTiny is not the AutoencoderKL that", "asks for as vae")


def test_the_autoencoder_brings_its_configuration(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    base, other = family_folder("sdxl"), family_folder("playground") / "vae"
    assert PriorSources(base, vae=other).json_file("vae/config.json") == other / "config.json"
    assert PriorSources(base, vae=other.parent).json_file("vae/config.json") == other / "config.json"  # a pipeline
    assert PriorSources(base, vae=other).json_file(NOISE) == base / NOISE
    file = original.write(tmp_path / "vae.safetensors", original.vae(base, ""))
    single = PriorSources(base, vae=file)
    assert single.json_file("vae/config.json") == base / "vae/config.json"
    (note,) = source_notes(single)
    assert note == f"prior.vae: {file} has no configuration; {base / 'vae/config.json'} is taken for it"


# ---------------------------------------------------------------------------------------------------- hash and staging


def test_the_hash_of_a_folder_alone_is_that_of_the_folder(family_folder: Callable[[str], Path]) -> None:
    sources = PriorSources(family_folder("sd"))
    assert sources_hash(sources) == folder_hash(family_folder("sd"))
    assert sources.extra_files() == {}
    assert staged_sources(family_folder("sd")) == sources


def test_every_file_that_is_read_is_in_the_hash_under_its_role(sd: PriorSources, family_folder: Callable[[str], Path],
                                                               tmp_path: Path) -> None:
    unet = original.write(tmp_path / "any name.safetensors", original.unet(family_folder("sd2v")))
    sources = replace(sd, parts={"unet": unet}, vae=family_folder("sdturbo") / "vae")
    files = sources.files()
    assert {name for name in files if not name.startswith("prior.config/")} == {
        "prior.weights.safetensors", "prior.parts.unet.safetensors", "prior.vae/config.json",
        "prior.vae/diffusion_pytorch_model.safetensors"}
    assert {"prior.config/model_index.json", "prior.config/unet/config.json", "prior.config/tokenizer/tokenizer.json",
            "prior.config/text_encoder/config.json", f"prior.config/{NOISE}"} <= set(files)
    assert "prior.config/vae/config.json" not in files  # that of prior.vae counts
    moved = shutil.copy(unet, tmp_path / "moved.safetensors")
    assert sources_hash(replace(sources, parts={"unet": Path(moved)})) == sources_hash(sources)
    hashes = {sources_hash(one) for one in (sources, sd, replace(sd, parts=sources.parts), replace(sd, vae=sources.vae),
                                            replace(sources, config=json_files(family_folder("sd2v"), tmp_path / "c")))}
    assert len(hashes) == 5


def test_a_replaced_part_leaves_no_weights_of_the_folder(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    unet = original.write(tmp_path / "unet.safetensors", original.unet(family_folder("sd")))
    names = set(PriorSources(family_folder("sd"), parts={"unet": unet}).files())
    assert "unet/diffusion_pytorch_model.safetensors" not in names
    assert {"unet/config.json", "vae/diffusion_pytorch_model.safetensors"} <= names


def test_staged_files_are_the_same_sources(sd: PriorSources, family_folder: Callable[[str], Path],
                                           tmp_path: Path) -> None:
    unet = original.write(tmp_path / "unet.safetensors", original.unet(family_folder("sd2v")))
    vae = original.write(tmp_path / "vae.safetensors", original.vae(family_folder("sdturbo"), ""))
    whole = family_folder("sd")
    for number, sources in enumerate((sd, replace(sd, vae=whole / "vae"), replace(sd, parts={"unet": unet}, vae=vae),
                                      PriorSources(whole, parts={"unet": unet}), PriorSources(whole, vae=vae))):
        folder = tmp_path / str(number)
        for name, file in sources.files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / name)
        staged = staged_sources(folder)
        assert source_problems(staged) == []
        assert set(staged.files()) == set(sources.files())
        assert sources_hash(staged) == sources_hash(sources)
