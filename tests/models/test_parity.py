"""Every family against the pipeline object of diffusers: the same weights, prompts, image and noise, and the difference
of the images before rounding, in grey levels (1/255). `pytest -s` shows the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from rayexpand.diffusion import sampling
from rayexpand.diffusion.process import CLEAN, Point, Schedule
from rayexpand.models.folders import quiet_libraries
from rayexpand.models.prior import load_prior
from tests.models.families import FAMILIES, LATENT, SIDE

torch.set_num_threads(1)

PROMPTS = ("a photo of a zero", "the digit seven")
NEGATIVES = ("blurred", "a photo of a one")
SHAPE = (2, 4, LATENT, LATENT)
BOUND = 2e-3  # grey levels

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Row:
    """One line of the table. A strength is image to image; `theirs` is a scheduler in place of the shipped one."""

    family: str
    steps: int
    strength: float | None = None
    scale: float = 5.0
    negatives: tuple[str, ...] | None = NEGATIVES
    solver: str = "ddim"
    spacing: str | None = None
    theirs: str | None = None
    changes: tuple[tuple[str, Any], ...] = ()
    their_scale: float | None = None  # where a distilled model is asked in another way
    pipeline: str | None = None  # in place of the one that diffusers chooses
    arguments: tuple[tuple[str, Any], ...] = ()
    stretched: bool = False  # all steps run, from 1000 * strength, as in LCM's own image to image
    our_start: bool = False  # from noise of 1, where the pipeline starts from a little more
    bound: float = BOUND
    prompts: tuple[str, ...] = PROMPTS

    def __str__(self) -> str:
        solver = self.solver + (f" {self.spacing}" if self.spacing else "") + (" stretched" if self.stretched else "")
        task = "text to image" if self.strength is None else f"image to image {self.strength:g}"
        return f"{self.family}, {solver}, {task}, {self.steps} steps, scale {self.scale:g}" + (
            "" if self.negatives else ", no negatives") + (", our start" if self.our_start else "")


def both(family: str, steps: int, strength: float, **more: Any) -> list[Row]:
    return [Row(family, steps, strength, **more), Row(family, steps, None, **more)]


DDIM = {"theirs": "DDIMScheduler"}
DPM = {"solver": "dpmpp_2m", "theirs": "DPMSolverMultistepScheduler"}
UNIPC = {"solver": "unipc", "theirs": "UniPCMultistepScheduler"}
DISTILLED: dict[str, Any] = {"scale": 1.0, "their_scale": 0.0, "negatives": None}
LINSPACE = {"changes": (("timestep_spacing", "linspace"),)}


def curve(name: str) -> dict[str, Any]:
    return {"spacing": name, "changes": ((f"use_{name}_sigmas", True),)}


ROWS: tuple[Row, ...] = (
    *both("sd", 10, 0.5, **DDIM), Row("sd", 10, 0.5, negatives=None, **DDIM),
    Row("sd", 10, 0.7, **DPM, **LINSPACE), Row("sd", 20, **DPM, **LINSPACE),
    Row("sd", 10, 0.7, **UNIPC, **LINSPACE), Row("sd", 20, **UNIPC, **LINSPACE),
    *both("sd2v", 10, 0.5), Row("sd2v", 10, 0.7, **DPM, **LINSPACE), Row("sd2v", 10, 0.7, **UNIPC, **LINSPACE),
    *both("sdzsnr", 10, 1.0),
    Row("sdturbo", 1, **DISTILLED), Row("sdturbo", 2, **DISTILLED), Row("sdturbo", 4, 0.5, **DISTILLED),
    Row("lcm", 4, None, 8.0, None),
    *(Row("lcm", 4, strength, 8.0, None, stretched=True) for strength in (0.6, 0.8, 1.0)),
    Row("lcm", 4, 0.6, 8.0, None, pipeline="StableDiffusionImg2ImgPipeline"),
    *both("sdxl", 10, 0.5), *both("sdxl", 10, 0.5, negatives=None),
    Row("sdxl", 7, 0.6, spacing="linspace", **LINSPACE),
    *(Row("sdxl", 10, 0.5, **curve(name)) for name in ("karras", "exponential", "beta")),
    Row("sdxl", 16, 0.5, **curve("karras"), **DPM),
    Row("sdxl", 16, 0.5, spacing="trailing", changes=(("timestep_spacing", "trailing"),), **DPM),
    Row("sdxlturbo", 1, **DISTILLED), Row("sdxlturbo", 4, **DISTILLED), Row("sdxlturbo", 4, 0.5, **DISTILLED),
    Row("lightning", 4, **DISTILLED), Row("lightning", 4, 0.5, **DISTILLED),
    *both("hyper", 4, 0.5, arguments=(("eta", 0.3),), **DISTILLED),
    *both("cosxl", 10, 0.5),
    Row("playground", 10, 0.5, solver="dpmpp_2m"), Row("playground", 10, 0.5, theirs="EDMEulerScheduler"),
    # Its pipeline starts from noise of sqrt(sigma_max^2 + 1), though sigma_data is 0.5: a factor of 1.00006 too much.
    Row("playground", 10, theirs="EDMEulerScheduler"), Row("playground", 10, solver="dpmpp_2m"),
    Row("playground", 10, theirs="EDMEulerScheduler", our_start=True, bound=0.03),
)

Folders = Callable[[str], Path]


# -------------------------------------------------------------------------------------------------------- what is given


def seeds() -> torch.Tensor:
    """Two images (2, 3, H, W) in [0, 1]."""
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def noises() -> Iterator[torch.Tensor]:
    """What diffusers draws from its generator: posterior noise (image to image), start noise, noise of each step."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(SHAPE, generator=generator)


# ------------------------------------------------------------------------------------------------------------ reference


class Theirs:
    """The pipelines of diffusers, loaded once."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self.loaded, self.images = cache(self._load), cache(self._images)

    def _load(self, family: str) -> Any:
        more = {"add_watermarker": False} if FAMILIES[family].xl else {}
        return diffusers.AutoPipelineForText2Image.from_pretrained(self.folders(family), **more)

    def pipeline(self, row: Row) -> Any:
        shipped = self.loaded(row.family)
        kind = type(shipped)
        if row.strength is not None:
            kind = diffusers.AutoPipelineForImage2Image.from_pipe(shipped).__class__
        if row.pipeline:
            kind = getattr(diffusers, row.pipeline)
        parts = {name: part for name, part in shipped.components.items() if name in kind.__init__.__annotations__}
        scheduler = getattr(diffusers, row.theirs) if row.theirs else type(shipped.scheduler)
        parts["scheduler"] = scheduler.from_config(shipped.scheduler.config, **dict(row.changes))
        options = {"add_watermarker": False} if FAMILIES[row.family].xl else {"requires_safety_checker": False}
        made = kind(**parts, **options)
        made.set_progress_bar_config(disable=True)
        return made

    @torch.no_grad()
    def _images(self, row: Row) -> torch.Tensor:
        """(2, 3, H, W) in [0, 1]."""
        given: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "output_type": "pt",
                                 "num_inference_steps": row.steps, **dict(row.arguments),
                                 "guidance_scale": row.scale if row.their_scale is None else row.their_scale}
        if row.negatives is not None:
            given["negative_prompt"] = list(row.negatives)
        if row.strength is not None:
            given |= {"image": seeds(), "strength": row.strength}
        with quiet_libraries():
            images: torch.Tensor = self.pipeline(row)(list(row.prompts), **given).images
        return images


# ----------------------------------------------------------------------------------------------------------------- ours


class Ours:
    """The same from this package, by its public names."""

    def __init__(self, folders: Folders) -> None:
        self.prior = cache(lambda family: load_prior(str(folders(family)), device="cpu"))

    def schedule(self, row: Row) -> Schedule:
        prior = self.prior(row.family)
        run = None if row.strength is None else sampling.steps_run(row.strength, row.steps)
        if row.stretched:
            return _stretched(row)
        return prior.schedule(row.solver, row.steps, run, row.spacing)

    @torch.no_grad()
    def images(self, row: Row, change: Callable[[Any], Any] = lambda cond: cond) -> torch.Tensor:
        """(2, 3, H, W) in [0, 1]. `change` spoils what the network is told of the texts."""
        prior, plan, draws = self.prior(row.family), self.schedule(row), noises()
        cond = change(prior.embed(row.prompts, row.negatives or ("",) * 2, row.scale))
        if row.strength is None:
            z = _start(row, plan.points[0]) * next(draws)
        else:
            z = plan.points[plan.start].mix(prior.encode(seeds(), next(draws)), next(draws))
        return prior.decode(sampling.denoise(prior, z, plan, cond, lambda i: next(draws)), cond).clamp(0, 1)


def _start(row: Row, first: Point) -> float:
    """How much noise the pipeline starts from; ours starts from 1 everywhere. Euler takes s where its grid begins at
    the last timestep, which moves pixels by a tenth of a grey level."""
    noise = FAMILIES[row.family].noise | dict(row.changes)
    if "sigma_data" in noise and not row.our_start:
        return math.sqrt((noise["sigma_max"] ** 2 + 1) / (noise["sigma_max"] ** 2 + noise["sigma_data"] ** 2))
    by_sigma = "DiscreteScheduler" in (row.theirs or FAMILIES[row.family].scheduler)
    return first.s if by_sigma and noise["timestep_spacing"] in ("trailing", "linspace") else 1.0


def _stretched(row: Row) -> Schedule:
    """The grid of LCM's own image to image, on which all steps run from 1000 * strength. Ours cuts the grid instead."""
    with quiet_libraries():
        scheduler = diffusers.LCMScheduler.from_config(dict(FAMILIES[row.family].noise))
    scheduler.set_timesteps(row.steps, original_inference_steps=50, strength=row.strength)
    abar = scheduler.alphas_cumprod.double()
    points = tuple(Point(float(abar[t]) ** 0.5, (1 - float(abar[t])) ** 0.5, float(t)) for t in scheduler.timesteps)
    return Schedule("ddim", "shipped", (*points, CLEAN), 0, (*[1.0] * (row.steps - 1), 0.0))


# --------------------------------------------------------------------------------------------------------------- parity


@dataclass
class Oracle:
    theirs: Theirs
    ours: Ours
    measured: dict[Row, float] = field(default_factory=dict)
    seen: dict[str, list[float]] = field(default_factory=dict)  # what a mistake of ours makes of it

    def __call__(self, row: Row) -> float:
        """The largest difference in grey levels."""
        if row not in self.measured:
            self.measured[row] = levels(self.ours.images(row), self.theirs.images(row))
        return self.measured[row]

    def sees(self, mistake: str, row: Row, made: Row, change: Callable[[Any], Any] = lambda cond: cond) -> float:
        self.seen.setdefault(mistake, []).append(levels(self.ours.images(made, change), self.theirs.images(row)))
        return self.seen[mistake][-1]


def levels(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape == (2, 3, SIDE, SIDE)
    return float((one - other).abs().max()) * 255


@pytest.fixture(scope="module")
def oracle(family_folder: Folders) -> Oracle:
    return Oracle(Theirs(family_folder), Ours(family_folder))


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.fast_cases(6)
def test_images_are_those_of_the_pipeline(oracle: Oracle, row: Row) -> None:
    assert oracle(row) < row.bound


@pytest.mark.parametrize("family", ["lcm", "sdxl", "playground"])
def test_a_row_does_not_depend_on_its_neighbour(oracle: Oracle, family: str) -> None:
    row = next(row for row in ROWS if row.family == family)
    other = replace(row, prompts=(PROMPTS[0], "a kudu"), negatives=row.negatives and (NEGATIVES[0], ""))
    one, two = oracle.ours.images(row), oracle.ours.images(other)
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


@pytest.mark.parametrize("family", ["lcm", "sdxl"])
def test_each_row_has_a_guidance_of_its_own(oracle: Oracle, family: str) -> None:
    row = next(row for row in ROWS if row.family == family)
    low, high = (oracle.ours.images(replace(row, scale=scale)) for scale in (3.0, 7.0))
    mixed = oracle.ours.images(row, lambda cond: replace(cond, guidance_B=torch.tensor([3.0, 7.0])))
    assert torch.equal(mixed, torch.stack([low[0], high[1]]))


@contextmanager
def told(network: torch.nn.Module, change: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """The network is given other arguments."""
    hook = network.register_forward_pre_hook(lambda _, args, kwargs: change(args, kwargs), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def later_label(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (args[0], args[1] + 1), kwargs


def half_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    added = kwargs["added_cond_kwargs"]
    return args, kwargs | {"added_cond_kwargs": added | {"time_ids": added["time_ids"] / 2}}


ONE_OF_EACH = tuple({row.family: row for row in reversed(ROWS)}.values())
GUIDED = [row for row in ONE_OF_EACH if row.scale > 1]
XL = [row for row in ONE_OF_EACH if FAMILIES[row.family].xl]


@pytest.mark.parametrize("row", ONE_OF_EACH, ids=str)
@pytest.mark.fast_cases(4)
def test_swapped_prompts_are_seen(oracle: Oracle, row: Row) -> None:
    assert oracle.sees("swapped prompts", row, replace(row, prompts=PROMPTS[::-1])) > 5


@pytest.mark.parametrize("row", GUIDED, ids=str)
def test_another_guidance_is_seen(oracle: Oracle, row: Row) -> None:
    assert oracle.sees("guidance + 0.5", row, replace(row, scale=row.scale + 0.5)) > 0.5


def test_an_embedded_guidance_of_1_is_seen(oracle: Oracle) -> None:
    row = next(row for row in ROWS if row.family == "lcm")
    assert oracle.sees("embedded guidance of 1", row, replace(row, scale=1.0)) > 2


@pytest.mark.parametrize("row", ONE_OF_EACH, ids=str)
def test_the_next_label_is_seen(oracle: Oracle, row: Row) -> None:
    with told(oracle.ours.prior(row.family).unet, later_label):
        assert oracle.sees("label + 1", row, row) > 0.05


@pytest.mark.parametrize("row", XL, ids=str)
def test_another_size_is_seen(oracle: Oracle, row: Row) -> None:
    with told(oracle.ours.prior(row.family).unet, half_size):
        assert oracle.sees("half the size", row, row) > 2


@pytest.mark.parametrize("row", XL, ids=str)
def test_a_pooled_text_of_zeros_is_seen(oracle: Oracle, row: Row) -> None:
    assert oracle.sees("pooled text of zeros", row, row,
                       lambda cond: replace(cond, pooled_BP=torch.zeros_like(cond.pooled_BP))) > 5


def test_an_empty_negative_that_is_encoded_is_seen(oracle: Oracle) -> None:
    """Where the caller names none, SDXL takes zeros; a pipeline that is given "" encodes it."""
    row = next(row for row in ROWS if row.family == "sdxl" and row.negatives is None)
    assert oracle.sees("encoded empty negative", replace(row, negatives=("", "")), row) > 50


@pytest.mark.slow
def test_the_table(oracle: Oracle) -> None:
    """Shown with -s; the second part holds the mistakes that the tests before it made."""
    measured = {row: oracle(row) for row in ROWS}
    lines = [f"{value:9.1e}  {row}" for row, value in measured.items()]
    mistakes = [f"{min(seen):9.2f} to {max(seen):6.2f}  {name}" for name, seen in oracle.seen.items()]
    print("", "largest difference to diffusers, in 1/255 before rounding", *lines, sep="\n")
    print("the same with a mistake", *mistakes, sep="\n")
    assert max(value for row, value in measured.items() if not row.our_start) < BOUND
    assert {row.family for row in ROWS} == {name for name in FAMILIES if name not in ("ip2p", "inpaint", "refiner")}
