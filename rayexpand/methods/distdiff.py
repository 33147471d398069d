"""DistDiff: image to image whose latent is moved, at one step of the way, towards prototypes of its class (Zhu et al.,
"Distribution-Aware Data Expansion with Diffusion Models", 2024). No training.

    paper            here            meaning, unit
    s, N             strength, steps share of the schedule that is run; solver steps of the whole schedule
    w                guidance_scale  classifier-free guidance, 1 = none
    M                guide_step      the guided step, counted from the last one (1 is the last; 20 of 50 is t = 381)
    lambda_M         guide_at        the same as log(a / s), for generators with other grids
    L                lookahead       denoising steps rolled out from it, whose energies are averaged
    e, b             e, b            multiplicative noise and bias of a row's latent channels (diffusion/perturb.py)
    eps              eps             radius of the box around z_t, latent units
    rho              rho             length of the one descent step in e and b, per unit of energy
    p_c, p_g         class, group    prototypes (diffusion/prototypes.py), feature units
    D_c + l D_g      energy          lambda_c ||f - p_c|| + lambda_g ||f - p_g||, feature units

Where the paper and its released code differ, the defaults take what makes the equations mean what they say: features
and prototypes in one space, decoded images normalised as the guide expects, one update from an average over the
lookahead, energies summed over rows. The options marked "released code" reproduce that code instead.
"""

# B rows, C latent channels, G groups, D features

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from rayexpand.contract.prompts import Template, format_prompt, prompt_needs
from rayexpand.contract.protocols import Batch, Calls, Cond, Expansion, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Draw, SeedIndex, Start
from rayexpand.contract.settings import Later, Section
from rayexpand.diffusion import energy, perturb, sampling
from rayexpand.methods._copies import quota_copies, ratio_copies
from rayexpand.methods._guided import LOSS_SCALE, Guided, Out, with_graph

if TYPE_CHECKING:
    import torch


class DistDiff(Section):
    """Settings of DistDiff. Defaults are those of the paper unless noted."""

    model_config = ConfigDict(validate_default=True)
    PIECES: ClassVar = ("guide_batch",)  # rows at once; halved in this order when memory runs out

    name: Literal["distdiff"] = "distdiff"
    ratio: float = Field(5.0, gt=0, le=65535, description="copies of each seed; 2.5 gives half of each class a third "
                         "copy (paper: 5)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio`")
    prompt: Template = Field("a photo of a {name}.", description="template with {name}, {metaclass}, {noun}; may be "
                             "empty (paper: this one for most datasets)")
    negative: str = Field("", description="negative prompt (released code: empty)")
    strength: float = Field(0.5, gt=0, le=1, description="share of the schedule that is run (paper: 0.5; PathMNIST "
                            "0.2)")
    steps: int = Field(50, ge=1, le=999, description="DDIM steps of the whole schedule (paper: 50)")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance scale (paper: 7.5)")
    guidance: Literal["transform", "direct", "random"] = Field(
        "transform", description="transform: descend in e and b (the method); direct: move the latent itself down the "
        "gradient at each lookahead step (ablation; best rho 10, guide_step 10); random: e and b as drawn (control)")
    guide_at: Annotated[float | None, Later(None)] = Field(
        None, description="log(a / s) of the guided step, in place of guide_step, so that generators with other grids "
        "are guided at the same noise; the nearest step that is run. Step 20 of 50 of Stable Diffusion is at -0.09")
    guide_step: int = Field(20, ge=1, description="M, the guided step counted from the last (paper: 20; PathMNIST 10)")
    lookahead: int = Field(2, ge=1, description="L, steps rolled out from it, energies averaged (table 7: best at 2)")
    rho: float = Field(10.0, ge=0, description="length of the descent step (paper: 10)")
    eps: float = Field(0.2, ge=0, description="radius of the box around the latent (paper: 0.2)")
    lambda_c: float = Field(1.0, ge=0, description="weight of the class prototype; 0 turns it off (released code: 1)")
    lambda_g: float = Field(1.0, ge=0, description="weight of the group prototype; 0 turns it off (released code: 1; "
                            "table 12: best at 0.9)")
    proto_space: Literal["paper", "official", "unit"] = Field(
        "paper", description="paper: features and means as they are; official: prototypes of unit length, features as "
        "they are (released code); unit: both of unit length (rho needs tuning, about times the feature norm)")
    guide_input: Literal["normalised", "raw"] = Field(
        "normalised", description="normalised: pixels as the guide was trained on; raw: decoder output in [-1, 1] "
        "without mean and deviation (released code)")
    guide_batch: int | None = Field(None, ge=1, description="rows that carry a gradient at once; none: the whole call")
    recompute: bool = Field(False, description="compute UNet and decoder again in the backward pass instead of keeping "
                            "their activations: less memory, about a third more time in guided steps")
    measure: bool = Field(False, description="score energy_after and energy_random too, of the latent with the "
                          "update and with the drawn perturbation alone, both projected; costs 2 L more UNet, decoder "
                          "and guide calls without gradient; no effect on direct guidance")

    @field_validator("steps")
    @classmethod
    def _runs_a_step(cls, steps: int, info: ValidationInfo) -> int:
        if "strength" in info.data:
            sampling.steps_run(info.data["strength"], steps)
        return steps

    @field_validator("guide_step")
    @classmethod
    def _is_executed(cls, guide_step: int, info: ValidationInfo) -> int:
        if {"strength", "steps"} <= info.data.keys() and info.data.get("guide_at") is None:
            run = sampling.steps_run(info.data["strength"], info.data["steps"])
            if guide_step > run:
                raise ValueError(f"strength {info.data['strength']:g} of {info.data['steps']} steps executes the last "
                                 f"{run}, so this step never comes; set it to at most {run}, or raise strength")
        return guide_step

    @field_validator("lookahead")
    @classmethod
    def _ends_in_time(cls, lookahead: int, info: ValidationInfo) -> int:
        if lookahead > info.data.get("guide_step", lookahead) and info.data.get("guide_at") is None:
            raise ValueError(f"only {info.data['guide_step']} steps are left at guide_step {info.data['guide_step']}; "
                             "set lookahead to at most that, or raise guide_step")
        return lookahead

    @field_validator("lambda_g")
    @classmethod
    def _has_an_energy(cls, lambda_g: float, info: ValidationInfo) -> float:
        if not lambda_g and not info.data.get("lambda_c", 1.0) and info.data.get("guidance") != "random":
            raise ValueError("lambda_c is 0 too, so there is nothing to descend; set one of them above 0, or guidance: "
                             "random")
        return lambda_g

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        import torch

        prior = tools.prior
        schedule = sampling.batch_schedule(prior, batch, "ddim", self.steps)
        steps, step = schedule.steps, sampling.stepper(schedule, sampling.fresh_noise(prior, batch))
        first = len(steps) - (self.guide_step if self.guide_at is None else schedule.nearest(self.guide_at))
        with torch.no_grad():
            cond = sampling.embed_batch(prior, batch, self.guidance_scale)
            energies = _Energies(self, tools, steps[first : first + self.lookahead], cond,
                                 _prototypes(self, batch, tools))
            guided = Guided(len(batch))
            z_BCHW = schedule.first.mix(sampling.encode_batch(prior, batch), sampling.noise_batch(prior, batch))
            for i, (here, there) in enumerate(steps):
                if self.guidance == "direct" and first <= i < first + self.lookahead:
                    z_BCHW = self._direct_step(energies, guided, step, z_BCHW, here, there)
                    continue
                if i == first and self.guidance != "direct":
                    z_BCHW = self._refine(energies, guided, z_BCHW, batch)
                z_BCHW = step(z_BCHW, prior.predict(z_BCHW, here, cond), here, there)
            return guided.expansion(*sampling.to_images(prior.decode(z_BCHW, cond)))

    def _refine(self, energies: _Energies, guided: Guided, z_BCHW: torch.Tensor, batch: Batch) -> torch.Tensor:
        """z_t after one descent step of e and b, inside the box around z_t."""
        drawn = perturb.draw(batch, z_BCHW)
        moved = drawn if self.guidance == "random" else self._descend(energies, guided, z_BCHW, *drawn)
        u_BCHW = perturb.apply(z_BCHW, *moved)
        refined_BCHW = perturb.project(u_BCHW, z_BCHW, self.eps)
        guided.score("clamp_fraction", perturb.clamp_fraction(u_BCHW, z_BCHW, self.eps))
        guided.score("flip_fraction", perturb.flip_fraction(z_BCHW, drawn, moved))
        if self.measure:
            random_BCHW = perturb.project(perturb.apply(z_BCHW, *drawn), z_BCHW, self.eps)
            guided.score("energy_random", energies.measure(random_BCHW, self._rows(len(batch))))
            guided.score("energy_after", energies.measure(refined_BCHW, self._rows(len(batch))))
        return refined_BCHW

    def _descend(self, energies: _Energies, guided: Guided, z_BCHW: torch.Tensor, e: torch.Tensor,
                 b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """e - rho dE/de, b - rho dE/db, where E is the energy of the latent before it is projected."""
        import torch

        parts = []
        for rows, kept in sampling.chunks(len(z_BCHW), self._rows(len(z_BCHW))):
            with torch.enable_grad():
                leaves = [noise[rows].requires_grad_() for noise in (e, b)]
                energy_B = energies.rollout(perturb.apply(z_BCHW[rows], *leaves), rows)
                gradients = torch.autograd.grad(energy_B.sum() * LOSS_SCALE, leaves)
            moved = [leaf.detach() - self.rho * (g / LOSS_SCALE) for leaf, g in zip(leaves, gradients, strict=True)]
            parts.append([numbers[:kept] for numbers in (energy_B.detach(), *moved)])
        energy_B, e, b = (torch.cat(column) for column in zip(*parts, strict=True))
        guided.score("energy_before", energy_B)
        guided.check(energy_B, e, b)
        return e, b

    def _direct_step(self, energies: _Energies, guided: Guided, step: sampling.Step, z_BCHW: torch.Tensor,
                     here: sampling.Point, there: sampling.Point) -> torch.Tensor:
        """One step from z_t, less rho times the gradient of the energy in z_t."""
        import torch

        parts = []
        for rows, kept in sampling.chunks(len(z_BCHW), self._rows(len(z_BCHW))):
            with torch.enable_grad():
                z_t = z_BCHW[rows].requires_grad_()
                p = energies.predict(z_t, here, rows)
                energy_B = energies.of_clean(p.clean, rows)
                (gradient,) = torch.autograd.grad(energy_B.sum() * LOSS_SCALE, z_t)
            parts.append([numbers.detach()[:kept] for numbers in (energy_B, gradient / LOSS_SCALE, *p)])
        energy_B, gradient_BCHW, *p_BCHW = (torch.cat(column) for column in zip(*parts, strict=True))
        z_BCHW = step(z_BCHW, sampling.Prediction(*p_BCHW), here, there) - self.rho * gradient_BCHW
        if "energy_before" not in guided.scores:
            guided.score("energy_before", energy_B)
        guided.check(energy_B, z_BCHW)
        return z_BCHW

    def _rows(self, batch: int) -> int:
        return min(self.guide_batch or batch, batch)

    def calls(self, plain: Calls, rows: int) -> Calls:
        length = float(self.lookahead)
        rollout, back = Calls(steps=length, decodes=length), Calls(steps_back=length, decodes_back=length)
        if self.guidance == "direct":
            plain += back + Calls(decodes=length)  # its steps are executed steps too
        elif self.guidance == "transform":
            plain += back + rollout
        if self.recompute and self.guidance != "random":
            plain += rollout
        return plain + rollout + rollout if self.measure and self.guidance != "direct" else plain

    def needs(self) -> frozenset[str]:
        scored = self.guidance != "random" or self.measure
        return frozenset({"prior", "guide", "prototypes"} if scored else {"prior"}) | prompt_needs(self.prompt)

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        if self.quota is None:
            return ratio_copies(index, self.ratio, rng)
        return quota_copies(index, np.full(len(index.classes), self.quota), rng)

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        return Draw(sample_id=f"{seed_id}/{copy}", seed_id=seed_id, copy=copy, source_label=label, target_label=label,
                    prompt=format_prompt(self.prompt, label, classes), negative=self.negative, start=Start.IMAGE,
                    strength=self.strength, steps_run=sampling.steps_run(self.strength, self.steps), attempt=0,
                    row=row, group=copy)

    def group(self, copies: int) -> int:
        return 1

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        return (draw.steps_run,)

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        return np.eye(n_classes, dtype=np.float32)[target]


@dataclass(frozen=True, slots=True, eq=False)
class _Prototypes:
    """Prototypes of the class of each row."""

    class_BD: torch.Tensor
    group_BGD: torch.Tensor
    valid_BG: torch.Tensor


def _prototypes(method: DistDiff, batch: Batch, tools: Tools) -> _Prototypes | None:
    """In the space the method wants, on the device of the prior; None where no energy is asked for."""
    import torch

    if "prototypes" not in method.needs():
        return None
    of, labels = tools.prototypes, [draw.target_label for draw in batch.draws]
    arrays = (of.class_KD, of.group_KGD) if method.proto_space == "paper" else (of.class_unit_KD, of.group_unit_KGD)
    device = getattr(tools.prior, "device", "cpu")
    return _Prototypes(*(torch.from_numpy(array[labels]).to(device) for array in (*arrays, of.valid_KG)))


@dataclass(frozen=True, slots=True, eq=False)
class _Energies:
    """Energies of latents of a call: one number per row, differentiable."""

    method: DistDiff
    tools: Tools
    steps: Sequence[tuple[sampling.Point, sampling.Point]]  # the L steps of the rollout, (here, there) each
    cond: Cond
    targets: _Prototypes | None

    def rollout(self, u_BCHW: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """(B,): mean energy of the clean predictions along the L steps from u; the graph runs through all of them."""
        total_B = u_BCHW.new_zeros(len(u_BCHW))
        for here, there in self.steps:
            p = self.predict(u_BCHW, here, rows)
            total_B = total_B + self.of_clean(p.clean, rows)
            u_BCHW = there.mix(*p)
        return total_B / len(self.steps)

    def measure(self, u_BCHW: torch.Tensor, size: int) -> torch.Tensor:
        """(B,): `rollout` of all rows, `size` at a time."""
        return sampling.in_chunks(lambda rows: self.rollout(u_BCHW[rows], rows), len(u_BCHW), size)

    def predict(self, z_BCHW: torch.Tensor, at: sampling.Point, rows: list[int]) -> sampling.Prediction:
        cond = self.cond[rows]
        return self._kept(lambda z: self.tools.prior.predict(z, at, cond), z_BCHW)

    def of_clean(self, z0_BCHW: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """(B,): energy of the decoded clean latents."""
        import torch.nn.functional as F  # noqa: N812

        assert self.targets is not None
        method = self.method
        f_BD = self._kept(lambda z: self._features(self.tools.prior.decode(z, self.cond[rows])), z0_BCHW)
        # released code: features of unit length in direct guidance only
        if method.proto_space == "unit" or (method.proto_space == "official" and method.guidance == "direct"):
            f_BD = F.normalize(f_BD, dim=1)
        of = self.targets
        return energy.prototype_energy(f_BD, of.class_BD[rows], of.group_BGD[rows], of.valid_BG[rows],
                                       method.lambda_c, method.lambda_g)

    def _features(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        guide = self.tools.guide
        if self.method.guide_input == "raw":  # the guide takes off mean and deviation again
            x_BCHW = (2 * x_BCHW - 1) * guide.std + guide.mean
        return guide.features(x_BCHW).float()

    def _kept(self, function: Callable[[torch.Tensor], Out], x: torch.Tensor) -> Out:
        return with_graph(function, x, recompute=self.method.recompute)
