"""The noise process of a generator: what is noise at a point, what the network says there, where the points lie.

    paper                 here           meaning, unit
    z_t                   z_BCHW         latent at a point, in the frame of unit variance
    sqrt(abar_t), alpha_t a              share of the clean latent in it
    sqrt(1 - abar_t)      s              share of the noise in it; a^2 + s^2 = 1
    t, c_noise(sigma)     label          what the network is told of the point
    sigma                 u = s / a      noise level of the variance-exploding notation
    lambda_t              log_snr        log(a / s)
    k                     kappa          share of fresh noise in the noise of a step, in [0, 1]

One frame serves every family. EDM with sigma_data d is the process of v-prediction on latents divided by d. A rectified
flow y = (1 - sigma) z_0 + sigma noise is divided by r = sqrt((1 - sigma)^2 + sigma^2), which is 1 / (a + s) in this
frame. What differs is the output of the network (`KINDS`), its label, and the factor r on its input.

Points come from the scheduler class that the weights were shipped with, or from the class of the solver where a spacing
is named. Only `timesteps` and `sigmas` of a scheduler are read; its steps are not used.

torch and diffusers are imported where they are used: methods import this module while planning, without either.
"""

# B rows, C latent channels, H W of the latent

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from rayexpand.contract.errors import ModelError

if TYPE_CHECKING:
    import torch

Solver = Literal["ddim", "dpmpp_2m", "unipc"]
Spacing = Literal["shipped", "leading", "trailing", "linspace", "karras", "exponential", "beta"]
Kind = Literal["epsilon", "v_prediction", "minus_v", "sample", "flow"]
Frame = Literal["vp", "edm", "flow"]

# What the released code of the papers ends up with on Stable Diffusion 1.x and 2.x: DistDiff and GIF run DDIM on the
# leading grid, Diff-Mix (DPM-Solver++) and Real-Fake (UniPC) the linspace grid their solver class falls back to.
PUBLISHED: dict[Solver, Spacing] = {"ddim": "leading", "dpmpp_2m": "linspace", "unipc": "linspace"}

LEAST_SIGNAL = 1e-6  # alpha-bar below which a noise prediction has no clean image

_PUBLISHED_WITH = ("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler")
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler",)
_FRESH: dict[str, float | str] = {"EulerAncestralDiscreteScheduler": "ancestral", "LCMScheduler": 1.0,
                                  "TCDScheduler": "tcd"}
# Classes with one point for each step whose own grid is read. Others (Heun, LMS, SDE and PLMS solvers) visit points
# twice or draw noise in between: their betas and spacing are read by the class that is named here.
_GRIDS = {"DDIMScheduler": "DDIMScheduler", "DDIMParallelScheduler": "DDIMScheduler", "PNDMScheduler": "DDIMScheduler",
          "DDIMInverseScheduler": "DDIMScheduler", "DDPMScheduler": "DDIMScheduler",
          "DDPMParallelScheduler": "DDIMScheduler", "LCMScheduler": "LCMScheduler", "TCDScheduler": "TCDScheduler",
          "DPMSolverMultistepScheduler": "DPMSolverMultistepScheduler",
          "UniPCMultistepScheduler": "UniPCMultistepScheduler", "DEISMultistepScheduler": "DEISMultistepScheduler",
          "EDMEulerScheduler": "EDMEulerScheduler",
          "EDMDPMSolverMultistepScheduler": "EDMDPMSolverMultistepScheduler",
          "FlowMatchEulerDiscreteScheduler": "FlowMatchEulerDiscreteScheduler"}
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")  # every noise process of betas states these
_BETAS_OPTIONAL = ("trained_betas", "steps_offset", "rescale_betas_zero_snr")
_NAMED_SIGMAS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}


class Point(NamedTuple):
    """Where a latent is between its clean image and noise. a^2 + s^2 = 1."""

    a: float
    s: float
    label: float  # in the unit of the network: a timestep, or 0.25 log sigma

    def mix(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """a clean + s noise: the noising formula, and with predictions in place of both a step to this point."""
        return self.a * clean + self.s * noise

    @property
    def log_snr(self) -> float:
        """log(a / s), -inf for pure noise and inf for the clean latent."""
        if self.a == 0 or self.s == 0:
            return -math.inf if self.a == 0 else math.inf
        return math.log(self.a / self.s)

    @property
    def flow_scale(self) -> float:
        """r: what a rectified flow's own latent is at this point, as a multiple of the one here."""
        return 1 / (self.a + self.s)


class Prediction(NamedTuple):
    """What a latent is a mixture of, as the network sees it: (B, C, H, W) each, guidance already applied."""

    clean: torch.Tensor
    noise: torch.Tensor


CLEAN = Point(1.0, 0.0, 0.0)


def prediction(kind: Kind, out: torch.Tensor, z: torch.Tensor, at: Point) -> Prediction:
    """The clean latent and the noise of `z` at a point from the network's output. Differentiable.

    None of them is made from the other where that would divide by zero. Raises ModelError for a noise prediction where
    no signal is left.
    """
    a, s, _ = at
    match kind:
        case "epsilon":
            if a * a < LEAST_SIGNAL:
                raise ModelError(f"no signal is left at label {at.label:g}, so a noise prediction has no clean image "
                                 "there. Use weights that predict v, or set prior.process.rescale_betas_zero_snr: "
                                 "false")
            return Prediction((z - s * out) / a, out)
        case "v_prediction":
            return Prediction(a * z - s * out, s * z + a * out)
        case "minus_v":
            return Prediction(a * z + s * out, s * z - a * out)
        case "sample":
            return Prediction(out, (z - a * out) / s)
        case "flow":
            y, sigma = at.flow_scale * z, at.flow_scale * s
            return Prediction(y - sigma * out, y + (1 - sigma) * out)


@dataclass(frozen=True, slots=True)
class Process:
    """The noise process of the weights, as their scheduler_config.json says. Build it with `process_of`."""

    kind: Kind
    scheduler: str  # class name in diffusers
    config: Mapping[str, Any] = field(hash=False)  # the json, with overrides
    published: bool = False  # whether the grids of the papers are meant where none is named (Stable Diffusion 1.x, 2.x)
    kappa: float | Literal["auto", "ancestral"] = "auto"
    spacing: Spacing | None = None  # for methods that name none
    even_sigmas: bool = False  # whether 1 ... 1/N are shifted, as FLUX does; the scheduler of SD3 chooses its own

    @property
    def frame(self) -> Frame:
        return "edm" if self.scheduler in _EDM else "flow" if self.scheduler in _FLOW else "vp"

    @property
    def sigma_data(self) -> float:
        return float(self.config.get("sigma_data", 0.5)) if self.frame == "edm" else 1.0

    def spacing_of(self, solver: Solver, named: Spacing | None = None) -> Spacing:
        """The spacing a method gets that names `named`."""
        if said := named or self.spacing:
            return said
        as_published = (self.published and self.scheduler in _PUBLISHED_WITH
                        and self.config.get("timestep_spacing", "leading") == "leading")
        return PUBLISHED[solver] if as_published else "shipped"

    def fresh_noise(self, solver: Solver) -> float | str:
        """kappa of each step but the last: a number, `ancestral` or `tcd`. Multistep solvers take none."""
        if solver != "ddim":
            return 0.0
        return _FRESH.get(self.scheduler, 0.0) if self.kappa == "auto" else self.kappa


def process_of(config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, published: bool = False,
               even_sigmas: bool = False) -> Process:
    """From the content of scheduler_config.json and `prior.process`. Raises ModelError for what is no noise process."""
    said = {name: value for name, value in (overrides or {}).items() if value is not None}
    kappa, spacing = said.pop("kappa", "auto"), said.pop("spacing", None)
    merged, name = {**config, **said}, str(config.get("_class_name"))
    kind = str(merged.get("prediction_type", "epsilon"))
    if name in _EDM and kind == "epsilon":
        kind = "minus_v"
    if name in _FLOW:
        kind = "flow"
    if kind not in ("epsilon", "v_prediction", "minus_v", "sample", "flow"):
        raise ModelError(f"scheduler/scheduler_config.json: prediction_type '{kind}' is not known; set "
                         "prior.process.prediction_type to epsilon, v_prediction or sample")
    return Process(kind, name, merged, published, kappa, spacing, even_sigmas)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The points that a solver visits, N steps between N + 1 of them. Build it with `schedule`."""

    solver: Solver
    spacing: Spacing
    points: tuple[Point, ...]  # from the noisiest one to the end
    start: int  # index into `points` of the first executed step
    kappa: tuple[float, ...]  # of each of the N steps

    @property
    def steps(self) -> list[tuple[Point, Point]]:
        """(here, there) of every executed step."""
        return list(zip(self.points[self.start:-1], self.points[self.start + 1:], strict=True))

    @property
    def first(self) -> Point:
        """The point an image is noised to."""
        return self.points[self.start]

    @property
    def fresh_steps(self) -> tuple[int, ...]:
        """Numbers, in the whole grid, of the executed steps that take fresh noise."""
        return tuple(i for i in range(self.start, len(self.kappa)) if self.kappa[i])

    def nearest(self, log_snr: float) -> int:
        """How many steps are left at the executed point whose log(a / s) is nearest."""
        left = range(len(self.points) - 1 - self.start, 0, -1)
        return min(left, key=lambda m: abs(_bounded(self.points[len(self.points) - 1 - m].log_snr) - log_snr))


def _bounded(log_snr: float) -> float:
    return min(max(log_snr, -1e3), 1e3)


def schedule(process: Process, solver: Solver, steps: int, run: int | None = None, spacing: Spacing | None = None,
             latent: Sequence[int] | None = None) -> Schedule:
    """`steps` steps whose last `run` are executed (None: all), over a noise process.

    `latent` (C, H, W) is needed where the grid of a flow depends on the size. Raises ModelError for a scheduler without
    a usable noise process, ValueError for more steps than it has timesteps.
    """
    spacing = process.spacing_of(solver, spacing)
    try:
        points = _points(process, solver, steps, spacing, latent)
    except ValueError as error:
        raise ModelError(f"{process.scheduler} gives no {spacing} grid of {steps} steps: {error}") from error
    run = steps if run is None else run
    if not 1 <= run <= len(points) - 1:
        raise ValueError(f"cannot run {run} of {len(points) - 1} steps")
    return Schedule(solver, spacing, points, len(points) - 1 - run, _kappas(process, solver, points))


def _kappas(process: Process, solver: Solver, points: tuple[Point, ...]) -> tuple[float, ...]:
    said = process.fresh_noise(solver)
    if said == "tcd":
        found = _tcd_kappas(process, points)
    else:
        found = [ancestral_kappa(here, there) if said == "ancestral" else float(said)
                 for here, there in itertools.pairwise(points)]
    return (*found[:-1], 0.0)  # the last step ends at the data


def ancestral_kappa(here: Point, there: Point) -> float:
    """sqrt(1 - (u' / u)^2): the share of fresh noise of ancestral sampling, which is DDIM's at eta 1."""
    if here.a == 0:
        return 1.0
    return math.sqrt(max(0.0, 1 - (there.s * here.a / (there.a * here.s)) ** 2))


def _tcd_kappas(process: Process, points: tuple[Point, ...]) -> list[float]:
    """Trajectory consistency distillation (Zheng et al. 2024) steps to (1 - gamma) of the next timestep and takes fresh
    noise from there on; gamma is 0.3 in its scheduler."""
    gamma, scheduler = 0.3, _scheduler(process.scheduler, process.config)
    abar = np.asarray(scheduler.alphas_cumprod, np.float64)
    found = []
    for there in points[1:]:
        between = float(abar[int((1 - gamma) * there.label)])
        found.append(math.sqrt(max(0.0, 1 - there.a**2 / between)) / there.s if there.s else 0.0)
    return found


# --------------------------------------------------------------------------------------------------------------- grids


def _points(process: Process, solver: Solver, steps: int, spacing: Spacing, latent: Sequence[int] | None,
            ) -> tuple[Point, ...]:
    match process.frame:
        case "flow":
            return _flow_points(process, steps, latent)
        case "edm":
            return _edm_points(process, steps, spacing)
        case "vp":
            return _vp_points(process, solver, steps, spacing)


def _vp_points(process: Process, solver: Solver, steps: int, spacing: Spacing) -> tuple[Point, ...]:
    if spacing == "shipped":
        scheduler = _scheduler(_GRIDS.get(process.scheduler, "EulerDiscreteScheduler"), process.config)
    else:
        scheduler = _solver_scheduler(process, solver, spacing)
    scheduler.set_timesteps(steps)
    labels = [float(t) for t in scheduler.timesteps]
    if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) == len(labels) + 1:
        levels = [_of_u(float(u)) for u in scheduler.sigmas[:-1]]
    else:
        abar = np.asarray(scheduler.alphas_cumprod, np.float64)
        levels = [(float(abar[int(t)]) ** 0.5, (1 - float(abar[int(t)])) ** 0.5) for t in labels]
    return (*(Point(a, s, label) for (a, s), label in zip(levels, labels, strict=True)), _end(process, solver, spacing))


def _of_u(u: float) -> tuple[float, float]:
    a = 1 / math.sqrt(1 + u * u)
    return a, u * a


def _end(process: Process, solver: Solver, spacing: Spacing) -> Point:
    """Behind the last step: the clean latent, or the first timestep where the weights' own scheduler ends there
    (set_alpha_to_one: false of Stable Diffusion)."""
    if spacing != "shipped" and solver != "ddim":
        return CLEAN
    own = _scheduler(process.scheduler, process.config)  # Euler's file may hold set_alpha_to_one too, and ignores it
    abar = float(getattr(own, "final_alpha_cumprod", 1.0))
    if process.scheduler in ("LCMScheduler", "TCDScheduler"):  # whose last step does not ask for it
        abar = 1.0 if process.scheduler == "LCMScheduler" else float(own.alphas_cumprod[0])
    return Point(abar**0.5, (1 - abar) ** 0.5, 0.0)


def _solver_scheduler(process: Process, solver: Solver, spacing: Spacing) -> Any:
    """A diffusers scheduler of the solver's own class on a named grid, with everything pinned that changes numbers."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    shipped = _scheduler(process.scheduler, process.config).config  # with the defaults of the class
    if missing := [key for key in _BETAS if key not in shipped]:
        raise ModelError(f"scheduler/scheduler_config.json: {process.scheduler} has no {', '.join(missing)}, which "
                         f"spacing '{spacing}' needs; set method.spacing: shipped")
    shared = {key: shipped[key] for key in (*_BETAS, *_BETAS_OPTIONAL) if shipped.get(key) is not None}
    shared |= {"prediction_type": "epsilon"}
    curve = _NAMED_SIGMAS.get(spacing)  # between the ends of the weights' own grid
    shared |= {"timestep_spacing": shipped.get("timestep_spacing", "linspace"), curve: True} if curve else {
        "timestep_spacing": spacing}
    if solver == "ddim":
        by_sigma = curve or process.scheduler not in _GRIDS  # linspace of Euler has fractions of timesteps
        return _scheduler("EulerDiscreteScheduler" if by_sigma else "DDIMScheduler", {**shared, "clip_sample": False})
    shared |= {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
    if solver == "dpmpp_2m":
        return DPMSolverMultistepScheduler(**shared, algorithm_type="dpmsolver++", solver_type="midpoint",
                                           euler_at_final=False)
    return UniPCMultistepScheduler(**{k: v for k, v in shared.items() if k != "lower_order_final"},
                                   lower_order_final=True, solver_type="bh2", predict_x0=True)


def _edm_points(process: Process, steps: int, spacing: Spacing) -> tuple[Point, ...]:
    config = dict(process.config)
    if spacing in ("karras", "exponential"):
        config["sigma_schedule"] = spacing
    elif spacing != "shipped":
        raise ModelError(f"spacing '{spacing}' is one of timesteps, and {process.scheduler} has noise levels; choose "
                         "shipped, karras or exponential")
    scheduler = _scheduler("EDMEulerScheduler", config)
    scheduler.set_timesteps(steps)
    levels = [float(sigma) for sigma in scheduler.sigmas[:-1]]
    return (*(Point(*_of_u(sigma / process.sigma_data), float(label))
              for sigma, label in zip(levels, scheduler.timesteps, strict=True)), CLEAN)


def _flow_points(process: Process, steps: int, latent: Sequence[int] | None) -> tuple[Point, ...]:
    scheduler = _scheduler(process.scheduler, process.config)
    options: dict[str, Any] = {"num_inference_steps": steps}
    if process.even_sigmas:
        options = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    if scheduler.config.get("use_dynamic_shifting"):
        if latent is None:
            raise ModelError("the grid of this flow depends on the size of the image; give the latent's shape")
        options["mu"] = _shift_of(scheduler.config, latent)
    scheduler.set_timesteps(**options)
    return (*(Point((1 - sigma) / r, sigma / r, float(label))
              for sigma, label in zip(map(float, scheduler.sigmas[:-1]), scheduler.timesteps, strict=True)
              for r in (math.hypot(1 - sigma, sigma),)), CLEAN)


def _shift_of(config: Mapping[str, Any], latent: Sequence[int]) -> float:
    """mu, linear in the number of tokens of the image, which are patches of 2 x 2."""
    tokens = latent[1] // 2 * (latent[2] // 2)
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(least + (most - least) * (tokens - low) / (high - low))


def _scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A diffusers scheduler of a class by name. Raises ModelError."""
    import diffusers

    made = getattr(diffusers, name, None)
    if made is None:
        raise ModelError(f"scheduler/scheduler_config.json names {name}, which this diffusers does not have")
    known = inspect.signature(made.__init__).parameters  # files hold what other classes read too
    return made.from_config({key: value for key, value in config.items() if key in known})
