"""Generators: where their weights are, what their configuration files say, and loading them.

Weights are named in one of three ways: `digits` (the embedded default, trained on first use; `digits-mae` and
`digits-unclip` likewise), a folder in diffusers' StableDiffusionPipeline layout, or `org/name@revision` on the Hugging
Face hub. Only safetensors are read and no code that comes with weights is ever run. Nothing here imports torch before a
model is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rayexpand.contract.errors import ModelError
from rayexpand.contract.protocols import Progress
from rayexpand.diffusion.process import PUBLISHED, Process, Schedule, Solver
from rayexpand.diffusion.process import schedule as schedule_of
from rayexpand.diffusion.sampling import steps_run
from rayexpand.models import mae_files, prior_files
from rayexpand.models.embedding_files import embedding_path
from rayexpand.models.folders import (
    DIGITS,
    DIGITS_MAE,
    DIGITS_UNCLIP,
    EMBEDDED,
    EMBEDDING_NOISE,
    HUB_NAME,
    INDEX,
    MAE_CONFIG,
    MAE_WEIGHTS,
    NOISE,
    PIXELS,
    UNCLIP_PIXELS,
    VARIANTS,
    WEIGHTS,
    ModelFiles,
    hub_snapshot,
    is_mae,
    no_folder,
)
from rayexpand.models.lora_files import lora_files
from rayexpand.models.prior_config import PriorModel
from rayexpand.models.prior_files import (
    GENERATORS,
    PriorFacts,
    Settings,
    ends_in_noise,
    guidance_of,
    inspect_sources,
    noise_of,
    unusable,
)
from rayexpand.models.single_files import SUFFIX
from rayexpand.models.sources import ADDED, PriorSources, source_problems, sources_hash, staged_sources
from rayexpand.models.tiny.setting import Setting

Prior = TypeVar("Prior", bound=PriorModel)

_HUB_CONFIGS = (INDEX, NOISE, *(f"{part}/config.json" for part in WEIGHTS), EMBEDDING_NOISE, UNCLIP_PIXELS, MAE_CONFIG,
                PIXELS)
_HUB_SMALL = (*_HUB_CONFIGS, *(f"{words}/*.{end}" for words in ("tokenizer", "tokenizer_2") for end in ("json", "txt")))

_TINY_NOISE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
               "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False}
GUIDED_FROM_NOISE = 4  # executed steps below which guidance at a step is worth a word
_TOLD = 5e-4  # the ends of the way are told with three digits, and may be given as they are told


def load_prior(prior: str | PriorModel, *, dtype: str = "auto", device: str = "auto", attention: str = "auto",
               channels_last: bool | str = "auto", compile: bool | str = "auto") -> Any:
    """A generator (StableDiffusionPrior, UnclipPrior or MaePrior), by its weights or with all that the section `prior`
    says of it, in eval mode with frozen weights.

    `dtype` auto is float32 on CPU and bfloat16 on CUDA (images are encoded in float32 always); `device` auto, cpu, cuda
    or cuda:N; `attention` auto (what diffusers chooses), sdpa (fused) or eager (plain matrix products).
    `channels_last` and `compile` (of the repeated blocks of the UNet) auto are on where they pay, on a GPU. Raises
    ModelError.
    """
    model = as_model(prior)
    sources = sources_of(model)
    how: dict[str, Any] = {"device": device, "attention": attention, "vae_dtype": model.vae_dtype}
    if is_mae(sources.weights):
        from rayexpand.models.mae import MaePrior

        mae_files.inspect_mae(sources.weights, model)
        return MaePrior.load(sources.weights, **how)
    facts = inspect_sources(sources, model)
    how |= {"dtype": dtype, "channels_last": channels_last, "compile": compile, "guidance": model.guidance}
    if facts.family == "unclip":
        from rayexpand.models.unclip import UnclipPrior

        return UnclipPrior.load(sources, facts.process, model.loras, model.embeddings, **how)
    from rayexpand.models.latent import StableDiffusionPrior

    return StableDiffusionPrior.load(sources, facts.process, model.loras, model.embeddings, **how)


def as_model(prior: str | PriorModel) -> PriorModel:
    return PriorModel(weights=prior) if isinstance(prior, str) else prior


def inspect_prior(prior: str | PriorModel) -> PriorFacts:
    """Facts from configuration files alone. On the hub only those files are fetched. Raises ModelError."""
    model = as_model(prior)
    if model.weights == DIGITS:
        return facts_to_come(Setting(), model)  # of which every default is the embedded digits'
    if model.weights == DIGITS_UNCLIP:
        return replace(facts_to_come(Setting(), model), family="unclip")
    if model.weights == DIGITS_MAE:
        return _digits_mae_facts(model)
    if is_mae(path := Path(model.weights).expanduser()):
        return mae_files.inspect_mae(path, model, missing_files(path))
    if has_more(model) or _is_staged(model.weights):
        return inspect_sources(sources_of(model), model)
    if (folder := _local_folder(model.weights)) is not None:
        return inspect_sources(PriorSources(folder), model, missing_files(folder))
    snapshot = hub_snapshot(model.weights, _HUB_CONFIGS, complete=_missing_configs)
    return (mae_files.inspect_mae(snapshot, model) if is_mae(snapshot) else
            inspect_sources(PriorSources(snapshot), model))


def missing_files(folder: Path, parts: Sequence[str] | None = None) -> list[str]:
    """What keeps a folder from being loaded, one line per file; `parts`: those of a pipeline whose weights it must
    hold, None for all. Raises ModelError for a folder of another kind."""
    return mae_files.missing_files(folder) if is_mae(folder) else prior_files.missing_files(folder, parts)


def _missing_configs(folder: Path) -> list[str]:
    return (mae_files if is_mae(folder) else prior_files).missing_configs(folder)


def _digits_mae_facts(model: PriorModel) -> PriorFacts:
    if problems := mae_files.named_in_vain(model):
        raise ModelError("\n  ".join([f"{DIGITS_MAE} cannot be used so:", *problems]))
    return PriorFacts(weights=DIGITS_MAE, image_size=16, vae_factor=4, unet_factor=1, latent_channels=64,
                      process=mae_files.NOTHING, train_timesteps=0, family="mae", text_width=0, guidance="none")


def facts_to_come(setting: Setting, model: PriorModel) -> PriorFacts:
    """Facts of a generator that is still to be trained to a setting. `model` says how it will be sampled. Raises
    ModelError."""
    unet, problems = setting.unet, list[str]()
    noise = {**_TINY_NOISE, "prediction_type": unet.prediction_type, "timestep_spacing": unet.spacing,
             "rescale_betas_zero_snr": unet.rescale_betas_zero_snr}
    process = noise_of(Settings(NOISE, noise, problems), model, published=True)
    facts = PriorFacts(weights=model.weights, image_size=setting.size, vae_factor=setting.vae.factor,
                       unet_factor=2 ** (len(unet.channels) - 1), latent_channels=setting.vae.latent_channels,
                       process=process, train_timesteps=1000, text_width=setting.guide.text_width,
                       guidance=guidance_of(model, False, problems), ends_in_noise=ends_in_noise(process, problems))
    if problems:
        raise ModelError("\n  ".join([f"{model.weights} cannot be used so:", *problems]))
    return facts


def check_size(facts: PriorFacts, size: int) -> None:
    """Raises ModelError unless square images of `size` pixels fit autoencoder and UNet, or the patches of a masked
    autoencoder."""
    if facts.family == "mae":
        if size != facts.image_size:
            raise ModelError(f"an image of {size} px does not fit {facts.weights}: each of its tokens stands for a "
                             f"patch of an image of {facts.image_size} px; set image.size to {facts.image_size}, or "
                             "leave it out")
        return
    unit = math.lcm(8, facts.vae_factor * facts.unet_factor)  # 8: what diffusers' own pipelines ask for
    if size < unit or size % unit:
        below, above = max(size // unit * unit, unit), (size // unit + 1) * unit
        near = f"{below} or {above}" if below != above else str(unit)
        raise ModelError(f"an image of {size} px does not fit {facts.weights}: its autoencoder shrinks by "
                         f"{facts.vae_factor} and its UNet by {facts.unet_factor}, so the side must be a multiple of "
                         f"{unit}; set image.size to {near} (trained at {facts.image_size})")


def sampling_problems(facts: PriorFacts, method: Any) -> list[str]:
    """Where a method would not sample a generator as its own files say, or from a grid that begins without noise, one
    line each. What a method does not say (solver, spacing, strength) is ddim, that of the weights, and 1."""
    if other := _other_generator(facts, method):
        return [other]
    steps, solver = getattr(method, "steps", None), solver_of(method)
    if steps is None:
        return []  # it runs no solver
    problems = _guidance_problems(facts, method)
    if (facts.family == "sdxl" and getattr(method, "visual_token", "none") != "none"
            and not getattr(method, "finetuned", True)):
        problems.append(f"method.visual_token: the hidden states that {facts.weights} reads are not those of its last "
                        "layer and not normalised, so an image feature there means nothing to weights as they are; "
                        "set method.finetuned: true with an adapter that was trained so, or visual_token: none")
    if facts.ends_in_noise and facts.process.kind == "epsilon":
        problems.append(f"prior.weights: {facts.weights} leaves no signal at the last timestep "
                        "(rescale_betas_zero_snr, or betas that reach 1), where a noise prediction has no clean image. "
                        "Set prior.process.rescale_betas_zero_snr: false, or use weights that predict v")
    if solver != "ddim" and facts.process.scheduler == "LCMScheduler" and facts.process.kappa == "auto":
        problems.append(f"method.solver: {facts.weights} is a latent consistency model, which begins each step from "
                        f"new noise, and {solver} remembers earlier steps; set method.solver: ddim")
    spacing = facts.process.spacing_of(solver, getattr(method, "spacing", None))
    if facts.process.frame == "edm" and spacing not in ("shipped", "karras", "exponential"):
        problems.append(f"method.spacing: {spacing} spaces timesteps, and {facts.process.scheduler} has noise levels; "
                        "take it out, or use karras or exponential")
    return problems + _guided_problems(facts, method) + (
        _grid_problems(facts, method, steps) if _is_leading(facts.process, spacing) else [])


def _other_generator(facts: PriorFacts, method: Any) -> str:
    """Why a method cannot sample a generator of this kind at all."""
    wanted, found = getattr(method, "generator", "sd"), facts.generator
    if wanted == found:
        return ""
    what = f"{facts.weights} is {GENERATORS[found]}"
    if not hasattr(method, "generator") and getattr(method, "steps", None) is None:
        return (f"prior.weights: {what}, and {method.name} decodes the latents of a latent diffusion model. What this "
                f"one makes of an image by itself is method gif with generator: {found} and guidance: none")
    if not hasattr(method, "generator"):
        return (f"prior.weights: {what}, which follows no prompt, and {method.name} samples by prompts. Use a "
                f"Stable Diffusion model, or method gif with generator: {found}")
    return (f"method.generator: {wanted} is for {GENERATORS[wanted]}, and {what}; set method.generator: {found}, or "
            "name another model in prior.weights")


def _guidance_problems(facts: PriorFacts, method: Any) -> list[str]:
    scale, said = getattr(method, "guidance_scale", None), f"method.guidance_scale: {facts.weights}"
    if scale is None:
        return []
    if facts.guidance == "none":
        return [f"{said} is sampled without guidance (prior.guidance: none), so {scale:g} has no meaning; set it to 1"
                ] if scale not in (0, 1) else []
    if facts.guidance == "embedded":
        problems = [f"{said} takes the scale as an input and was trained on small ones, so {scale:g} is none of them; "
                    "set it to at most 10"] if method.name == "gif" and scale > 10 else []
        if getattr(method, "negative", ""):
            field = "negatives" if hasattr(method, "negatives") else "negative"
            problems.append(f"method.{field}: {facts.weights} takes the scale of guidance as an input and reads no "
                            "negative prompt; take it out")
        return problems
    if facts.turbo and scale != 1:
        return [f"{said} is a turbo by its name, made without guidance, so set it to 1 instead of {scale:g}, or "
                "prior.guidance: none"]
    return [f"{said} is sampled with classifier-free guidance, where 0 leaves the prompt out; a distilled model wants 1"
            ] if scale == 0 else []


def _guided_problems(facts: PriorFacts, method: Any) -> list[str]:
    """Where guidance at a step of the way has no image to work on, or no such step."""
    if not hasattr(method, "guide_step") or getattr(method, "guidance", "") == "random":
        return []
    run = steps_run(method.strength, method.steps)
    if run == 1 and method.strength == 1:
        return ["method.steps: the one step runs from pure noise, so guidance would move noise and no image; run more "
                "steps, or a lower strength"]
    if method.guide_at is None:
        return []
    plan = schedule_of(facts.process, "ddim", method.steps, run, latent=_latent(facts))
    first, last = plan.first.log_snr, plan.points[-2].log_snr
    if not first - _TOLD <= method.guide_at <= last + _TOLD:
        return [f"method.guide_at: {method.guide_at:g} is not on the way that is run, which goes from log(a/s) "
                f"{first:.3f} to {last:.3f} at its last step; choose a value between them"]
    if (left := plan.nearest(method.guide_at)) < method.lookahead:
        return [f"method.guide_at: {left} steps are left at the nearest step, fewer than lookahead {method.lookahead}; "
                "lower one of them"]
    return []


def _latent(facts: PriorFacts) -> tuple[int, int, int]:
    side = facts.image_size // facts.vae_factor
    return facts.latent_channels, side, side


def sampling_notes(facts: PriorFacts, method: Any) -> list[str]:
    """What a user should know of how a generator will be sampled, one line each. It builds the grid, so it imports
    diffusers."""
    steps = getattr(method, "steps", None)
    if steps is None:
        return []
    notes = []
    for strength, run in executed(method):
        plan = plan_of(facts, method, run)
        start = "pure noise" if strength is None else f"strength {strength:g}"
        notes.append(f"{start}: {run} of {steps} steps, from log(a/s) {plan.first.log_snr:+.3f} (label "
                     f"{plan.first.label:g}) on the {plan.spacing} grid of {facts.process.scheduler}")
        if strength is not None and facts.process.scheduler == "LCMScheduler" and run != steps:
            notes.append(f"strength {strength:g} cuts the grid to {run} steps here; the image-to-image pipeline of LCM "
                         f"stretches it and runs all {steps}")
    if hasattr(method, "guide_step") and notes and min(run for _, run in executed(method)) < GUIDED_FROM_NOISE:
        notes.append(f"fewer than {GUIDED_FROM_NOISE} steps are executed; rho, eps and guide_step are published for 50")
    return notes


def executed(method: Any) -> list[tuple[float | None, int]]:
    """(strength, steps that are run) of each kind of row that a method makes; strength None: from pure noise."""
    if starts_from_noise(method):
        return [(None, method.steps)]
    said = getattr(method, "strengths", None) or [getattr(method, "strength", None)]
    return [(one, method.steps if one is None else steps_run(one, method.steps)) for one in dict.fromkeys(said)]


def starts_from_noise(method: Any) -> bool:
    """Whether the seed image is not looked at."""
    variant = str(getattr(method, "variant", ""))
    return variant.endswith("_gen") or getattr(method, "latent_prior", True) is False or (
        getattr(method, "generator", "") == "unclip") or not (
        hasattr(method, "strength") or hasattr(method, "strengths"))


def plan_of(facts: PriorFacts, method: Any, run: int) -> Schedule:
    """The schedule of a method's rows that run so many steps."""
    return schedule_of(facts.process, solver_of(method), method.steps, run,
                       getattr(method, "spacing", None), _latent(facts))


def starting_points(facts: PriorFacts, method: Any) -> dict[str, float | None]:
    """log(a / s) at the start of each strength of a method that starts from images, by the strength; None where that is
    pure noise."""
    if getattr(method, "steps", None) is None or starts_from_noise(method):
        return {}
    starts = {f"{strength:g}": plan_of(facts, method, run).first.log_snr
              for strength, run in executed(method) if strength is not None}
    return {strength: round(start, 6) if math.isfinite(start) else None for strength, start in starts.items()}


def has_no_grid(facts: PriorFacts, method: Any) -> list[str]:
    """Why the steps of a method cannot be laid on the way of a generator; it imports diffusers."""
    if getattr(method, "steps", None) is None:
        return []
    try:
        for _, run in executed(method):
            plan_of(facts, method, run)
    except (ModelError, ValueError) as error:
        return [f"method.steps: {error}"]
    return []


def sampler_revision(facts: PriorFacts, method: Any) -> int:
    """2 where the solvers here give other last digits than the first ones did, or visit other points. What is as it
    was: noise predictions of Stable Diffusion 1.x and 2.x by first-order steps on the grid that is named or published,
    unless a gradient runs through several of them."""
    if getattr(method, "steps", None) is None:
        return 1
    process, solver, named = facts.process, solver_of(method), getattr(method, "spacing", None)
    as_before = (facts.family == "sd" and process.kind == "epsilon" and solver == "ddim"
                 and process.scheduler in ("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler")
                 and process.fresh_noise(solver) == 0
                 and process.spacing_of(solver, named) == (named or PUBLISHED[solver]))
    deep = getattr(method, "guidance", "") == "transform" and method.lookahead > 1
    return 1 if as_before and not deep else 2


def solver_of(method: Any) -> Solver:
    found: Solver = getattr(method, "solver", "ddim")
    return found


def _is_leading(process: Process, spacing: str) -> bool:
    own = process.config.get("timestep_spacing", "leading" if process.scheduler in _LEADING else "linspace")
    return spacing == "leading" or (spacing == "shipped" and process.frame == "vp" and own == "leading"
                                    and process.scheduler not in ("LCMScheduler", "TCDScheduler"))


_LEADING = ("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler", "DDPMScheduler", "DDPMParallelScheduler")


def _grid_problems(facts: PriorFacts, method: Any, steps: int) -> list[str]:
    """Whether the leading grid, whose steps begin at the low end of each stretch, begins with noise."""
    from_noise = starts_from_noise(method)
    least, run = min(executed(method), key=lambda one: one[1])
    first = (run - 1) * (facts.train_timesteps // steps) + facts.steps_offset
    grid = f"method.steps: {run} of {steps} steps on the leading grid begin at timestep {first} of " \
           f"{facts.train_timesteps}"
    remedy = "Raise method.steps" + (", or set method.spacing: trailing" if hasattr(method, "spacing") else "")
    if not from_noise:
        return [f"{grid}, where almost no noise is added to an image, whatever its strength ({least:g}). {remedy}"
                ] if run == 1 else []
    return [f"{grid}, where images are expected to be there already, but samples begin as pure noise. {remedy}"
            ] if first <= facts.train_timesteps / 2 + 1 else []


def prior_tokenizer(folder: Path, name: str = "tokenizer") -> Any:
    """A tokenizer of a generator's folder, without loading the generator. Raises ModelError."""
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, subfolder=name, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}/{name} cannot be loaded: {error}. Fetch or save the model again") from error


def prior_model(prior: str | PriorModel) -> ModelFiles:
    """The files of a generator."""
    model = as_model(prior)
    return ModelFiles(lambda: sources_of(model).files(), lambda: None if has_more(model) else present(model.weights),
                      lambda folder: sources_hash(staged_sources(folder)))


def sources_of(prior: str | PriorModel, progress: Progress | None = None) -> PriorSources:
    """Where each part of a generator lies, trained or downloaded where needed. Raises ModelError."""
    model = as_model(prior)
    path = Path(model.weights).expanduser()
    if _is_staged(model.weights):
        return staged_sources(path)
    if not has_more(model):
        return PriorSources(resolve(model.weights, progress))
    sources = PriorSources(path if path.exists() else resolve(model.weights, progress), _path(model.config),
                           {name: Path(file).expanduser() for name, file in model.parts.items()}, _path(model.vae),
                           added_files(model))
    if problems := source_problems(sources, model.process.model_dump()):
        raise ModelError("\n".join(problems))
    own = [part for part in sources.classes() if sources.part(part).weights == sources.folder / part]
    if problems := missing_files(sources.folder, own):
        raise unusable(sources.folder, problems)
    return sources


def has_more(model: PriorModel) -> bool:
    """Whether its files are not those of one folder."""
    named = (model.config, model.parts, model.vae, model.loras, model.embeddings)
    return any(named) or Path(model.weights).expanduser().is_file()


def added_files(model: PriorModel) -> dict[str, tuple[Path, ...]]:
    """Files of LoRAs and embeddings by their role. Raises ModelError with all that are none."""
    found, problems = dict[str, tuple[Path, ...]](), []
    roles = {f"{ADDED[0]}{i}": lambda one=one: lora_files(one) for i, one in enumerate(model.loras)}
    roles |= {f"{ADDED[1]}{i}": lambda one=one: [embedding_path(one)] for i, one in enumerate(model.embeddings)}
    for role, files in roles.items():
        try:
            found[role] = tuple(files())
        except ModelError as error:
            problems.append(f"{role}: {error}")
    if problems:
        raise ModelError("\n".join(problems))
    return found


def staged_prior(model: Prior, folder: Path) -> Prior:
    """A generator whose files lie in a folder under the names of their roles."""
    def here(role: str) -> str:
        return str(one if (one := folder / f"{role}{SUFFIX}").is_file() else folder / role)

    lists = {name: tuple(one.model_copy(update={"file": here(f"prior.{name}.{i}")})
                         for i, one in enumerate(getattr(model, name))) for name in ("loras", "embeddings")}
    return model.model_copy(update={"weights": str(folder), "config": None, "parts": {}, "vae": None, **lists})


def _path(said: str | None) -> Path | None:
    return None if said is None else Path(said).expanduser()


def _is_staged(weights: str) -> bool:
    path = Path(weights).expanduser()
    return path.is_dir() and staged_sources(path) != PriorSources(path)


def prior_hash(prior: str | PriorModel, progress: Progress | None = None) -> str:
    """Content hash of the generator's files; trains the embedded default or downloads first where needed."""
    return sources_hash(sources_of(prior, progress))


def resolve(weights: str, progress: Progress | None = None) -> Path:
    """Folder with everything needed to load `weights`: trained, downloaded, or as it is. Raises ModelError."""
    if weights in EMBEDDED:
        from rayexpand.models.tiny.embedded import trained

        return trained(weights, progress)
    folder = _local_folder(weights)
    if folder is None:
        return hub_snapshot(weights, _HUB_SMALL, complete=missing_files, more=hub_weights)
    if problems := missing_files(folder):
        raise (mae_files.unusable_mae if is_mae(folder) else unusable)(folder, problems)
    return folder


def present(weights: str) -> Path | None:
    """The folder of `weights` if it is on this machine under a name of its own; nothing is trained or downloaded."""
    if weights in EMBEDDED:
        from rayexpand.models.tiny.embedded import place

        folder = place(weights)
    else:
        folder = Path(weights).expanduser()
    return folder if folder.is_dir() else None


def is_present(model: PriorModel) -> bool:
    """Whether reading its weights trains and downloads nothing."""
    return present(model.weights) is not None or Path(model.weights).expanduser().is_file()


# ---------------------------------------------------------------------------------------------------------------- files


def hub_weights(listing: Collection[str]) -> list[str]:
    """The weight files of a repository that loading reads: of each model the variant that `weight_files` would choose,
    and of nothing else, such as other precisions and single-file copies of all of them."""
    if INDEX not in listing:
        return _variant_files(listing, MAE_WEIGHTS)
    return [name for part, stem in WEIGHTS.items() for name in _variant_files(listing, f"{part}/{stem}")]


def _variant_files(listing: Collection[str], stem: str) -> list[str]:
    for end in (f".{variant}" if variant else "" for variant in VARIANTS):
        if (whole := f"{stem}{end}.safetensors") in listing:
            return [whole]
        if (index := f"{stem}.safetensors.index{end}.json") in listing:
            name, of_variant = re.escape(stem), re.escape(end)
            shard = re.compile(rf"{name}({of_variant}-\d+-of-\d+|-\d+-of-\d+{of_variant})\.safetensors")
            return [index, *filter(shard.fullmatch, listing)]  # what the index names beside them is said to be missing
    return []


def _local_folder(weights: str) -> Path | None:
    """The folder, or None for a name on the hub. Raises ModelError for anything else."""
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    if HUB_NAME.fullmatch(weights):
        return None
    raise no_folder(weights, f"{', '.join(repr(name) for name in EMBEDDED)} (embedded), a folder in diffusers' "
                             "StableDiffusionPipeline layout")
