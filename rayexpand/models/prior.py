"""Generators: where their weights are, what their configuration files say, and loading them.

Weights are named in one of three ways: `digits` (the embedded default, trained on first use), a folder in diffusers'
StableDiffusionPipeline layout, or `org/name@revision` on the Hugging Face hub. Only safetensors are read and no code
that comes with weights is ever run. Nothing here imports torch before a model is loaded.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayexpand.contract.errors import ModelError
from rayexpand.contract.protocols import Progress
from rayexpand.diffusion.sampling import DEFAULT_SPACING, steps_run
from rayexpand.models.folders import (
    CONFIGS,
    DIGITS,
    HUB_NAME,
    PICKLES,
    WEIGHTS,
    ModelFiles,
    cache_root,
    folder_hash,
    folder_model,
    hub_snapshot,
    no_folder,
)
from rayexpand.models.prior_files import CONVERT, PriorFacts, inspect_folder, missing_configs, missing_files, unusable

if TYPE_CHECKING:
    from rayexpand.models.latent import StableDiffusionPrior

_HUB_FILES = (*CONFIGS, "tokenizer/*.json", "tokenizer/*.txt", "*/*.safetensors.index.json",
              *(f"{part}/{stem}{end}.safetensors" for part, stem in WEIGHTS.items() for end in ("", "-*-of-*")))


DIGITS_FACTS = PriorFacts(weights=DIGITS, image_size=16, vae_factor=2, unet_factor=2, latent_channels=4,
                          prediction_type="v_prediction", train_timesteps=1000)


def load_prior(weights: str, *, dtype: str = "auto", device: str = "auto", attention: str = "auto",
               channels_last: bool = False, compile: bool = False) -> StableDiffusionPrior:
    """The generator named by `weights`, in eval mode with frozen weights.

    `dtype` auto is float32 on CPU and bfloat16 on CUDA (the autoencoder is float32 always); `device` auto, cpu, cuda
    or cuda:N; `attention` auto (what diffusers chooses), sdpa (fused) or eager (plain matrix products). `compile` is
    for the UNet and pays on a GPU only. Raises ModelError.
    """
    folder = resolve(weights)
    inspect_folder(folder, weights)
    from rayexpand.models.latent import StableDiffusionPrior

    return StableDiffusionPrior.load(folder, dtype=dtype, device=device, attention=attention,
                                     channels_last=channels_last, compile=compile)


def inspect_prior(weights: str) -> PriorFacts:
    """Facts from configuration files alone. On the hub only those files are fetched. Raises ModelError."""
    if weights == DIGITS:
        return DIGITS_FACTS
    folder = _local_folder(weights)
    if folder is None:
        return inspect_folder(hub_snapshot(weights, CONFIGS, complete=missing_configs), weights)
    return inspect_folder(folder, weights, missing_files(folder))


def check_size(facts: PriorFacts, size: int) -> None:
    """Raises ModelError unless square images of `size` pixels fit autoencoder and UNet."""
    unit = math.lcm(8, facts.vae_factor * facts.unet_factor)  # 8: what diffusers' own pipelines ask for
    if size < unit or size % unit:
        below, above = max(size // unit * unit, unit), (size // unit + 1) * unit
        near = f"{below} or {above}" if below != above else str(unit)
        raise ModelError(f"an image of {size} px does not fit {facts.weights}: its autoencoder shrinks by "
                         f"{facts.vae_factor} and its UNet by {facts.unet_factor}, so the side must be a multiple of "
                         f"{unit}; set image.size to {near} (trained at {facts.image_size})")


def sampling_problems(facts: PriorFacts, method: Any) -> list[str]:
    """Where a method would not sample a generator as its own files say, or from a grid that begins without noise, one
    line each. What a method does not say (solver, spacing, strength) is ddim, the default of the solver, and 1."""
    problems = []
    steps, scale = getattr(method, "steps", None), getattr(method, "guidance_scale", None)
    if steps is None:
        return []  # it runs no solver
    if facts.few_step:
        problems.append(f"prior.weights: {facts.weights} was distilled to few steps: {facts.few_step}, which no method "
                        "here follows. Use the model it was distilled from")
    if facts.ends_in_noise:
        problems.append(f"prior.weights: {facts.weights} leaves no signal at the last timestep "
                        "(rescale_betas_zero_snr, or betas that reach 1), where a noise prediction has no clean image; "
                        "use weights trained without it")
    said = getattr(method, "spacing", None)
    spacing = said or DEFAULT_SPACING[getattr(method, "solver", "ddim")]
    if said is None and facts.spacing == "trailing" != spacing:
        remedy = ("set method.spacing: trailing (and for a model distilled to few steps, such as Turbo, "
                  "method.guidance_scale: 1), or the spacing that you mean" if hasattr(method, "spacing")
                  else f"{method.name} has no other grid, so use another model")
        problems.append(f"prior.weights: the scheduler of {facts.weights} has timestep_spacing trailing, and "
                        f"{method.name} would sample on the {spacing} grid; {remedy}")
    if facts.turbo and scale not in (None, 1):
        problems.append(f"method.guidance_scale: {facts.weights} is a turbo by its name, made without guidance, so "
                        f"set method.guidance_scale: 1 instead of {scale:g}")
    return problems + (_grid_problems(facts, method, steps) if spacing == "leading" else [])


def _grid_problems(facts: PriorFacts, method: Any, steps: int) -> list[str]:
    """Whether the leading grid, whose steps begin at the low end of each stretch, begins with noise."""
    from_noise = "real_gen" in (variant := str(getattr(method, "variant", ""))) or "diff_gen" in variant
    strengths = getattr(method, "strengths", None) or [getattr(method, "strength", None)]
    least = min((one for one in strengths if one is not None), default=None)
    run = steps if from_noise or least is None else steps_run(least, steps)
    first = (run - 1) * (facts.train_timesteps // steps) + facts.steps_offset
    grid = f"method.steps: {run} of {steps} steps on the leading grid begin at timestep {first} of " \
           f"{facts.train_timesteps}"
    remedy = "Raise method.steps" + (", or set method.spacing: trailing" if hasattr(method, "spacing") else "")
    if run < steps or (least is not None and not from_noise):
        return [f"{grid}, where almost no noise is added to an image, whatever its strength ({least:g}). {remedy}"
                ] if run == 1 else []
    return [f"{grid}, where images are expected to be there already, but samples begin as pure noise. {remedy}"
            ] if first <= facts.train_timesteps / 2 + 1 else []


def prior_tokenizer(folder: Path) -> Any:
    """The tokenizer of a generator's folder, without loading the generator. Raises ModelError."""
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}/tokenizer cannot be loaded: {error}. Fetch or save the model again") from error


def prior_model(weights: str) -> ModelFiles:
    """The files of a generator."""
    return replace(folder_model(Path(weights)), find=lambda: folder_model(resolve(weights)).find(),
                   present=lambda: present(weights))


def prior_hash(weights: str, progress: Progress | None = None) -> str:
    """Content hash of the generator's files; trains the embedded default or downloads first where needed."""
    return folder_hash(resolve(weights, progress))


def resolve(weights: str, progress: Progress | None = None) -> Path:
    """Folder with everything needed to load `weights`: trained, downloaded, or as it is. Raises ModelError."""
    if weights == DIGITS:
        from rayexpand.models.tiny import digits

        return digits.ensure(progress) / "pipeline"
    folder = _local_folder(weights)
    if folder is None:
        return hub_snapshot(weights, _HUB_FILES, complete=missing_files)
    if problems := missing_files(folder):
        raise unusable(folder, problems)
    return folder


def present(weights: str) -> Path | None:
    """The folder of `weights` if it is on this machine under a name of its own; nothing is trained or downloaded."""
    if weights == DIGITS:
        from rayexpand.models.tiny import digits

        folder = cache_root() / digits.cache_name() / "pipeline"
    else:
        folder = Path(weights).expanduser()
    return folder if folder.is_dir() else None


# ---------------------------------------------------------------------------------------------------------------- files


def _local_folder(weights: str) -> Path | None:
    """The folder, or None for a name on the hub. Raises ModelError for anything else."""
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        kind = "a pickle, which can run code when opened" if path.suffix in PICKLES else "a single file"
        raise ModelError(f"{path} is {kind}; a folder in diffusers' StableDiffusionPipeline layout is "
                         f"needed: {CONVERT}")
    if HUB_NAME.fullmatch(weights):
        return None
    raise no_folder(weights, "'digits' (the embedded default), a folder in diffusers' StableDiffusionPipeline layout")
