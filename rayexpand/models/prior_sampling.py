"""How a method samples a generator: the steps it runs, where they begin, and what the two cannot do together.

Nothing here reads weights; what builds a grid imports diffusers.
"""

from __future__ import annotations

import math
from typing import Any

from rayexpand.contract.errors import ModelError
from rayexpand.diffusion.process import LEAST_SIGNAL, PUBLISHED, Process, Schedule, Solver
from rayexpand.diffusion.process import schedule as schedule_of
from rayexpand.diffusion.sampling import steps_run
from rayexpand.models.prior_files import GENERATORS, PriorFacts

GUIDED_FROM_NOISE = 4  # executed steps below which guidance at a step is worth a word
_TOLD = 5e-4  # the ends of the way are told with three digits, and may be given as they are told
_LEADING = ("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler", "DDPMScheduler", "DDPMParallelScheduler")


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
    if getattr(method, "omega", 0):
        return _guides_noise_alone(facts, method)
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


def _guides_noise_alone(facts: PriorFacts, method: Any) -> list[str]:
    """Where the only guided step begins in pure noise, which has no image."""
    ((strength, run),) = executed(method)
    if list(method.guided_steps(run)) != [0] or strength not in (None, 1):
        return []
    here, _ = plan_of(facts, method, run).steps[0]
    return [] if here.a**2 >= LEAST_SIGNAL else [
        f"method.every: of the {run} steps that are run only the first is guided, and it begins in pure noise, where "
        "there is no image to guide; run more steps, or set every lower" + (", or from_step: 2" if run > 1 else "")]


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
        getattr(method, "generator", "") == "unclip") or (
        getattr(method, "strength", None) is None and not hasattr(method, "strengths"))


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
