"""Deliberate practice: samples that are hard for a classifier, by the gradient of its entropy at the steps of sampling
(Askari-Hemmat et al., "Improving the Scaling Laws of Synthetic Data with Deliberate Practice", 2025). No training.

    paper            here            meaning, unit
    omega            omega           strength: a factor of the gradient (score), or a share of the latent (unit)
    abar_t           a^2             share of signal; sqrt(1 - abar_t) is s of a Point (diffusion/process.py)
    x_0|t            clean           what the network sees in z_t, classifier-free guidance already applied
    f_phi            guide           the classifier of the rounds before, on the decoded clean prediction
    H                h_B             criterion that is climbed: entropy of f_phi, or its loss for the class, nats
    grad H           g_BCHW          gradient of H in z_t, through decoder and network
    eps~             noise           eps - omega sqrt(1 - abar_t) grad H            (score convention)
    z_t              z_BCHW          z_t + omega |z_t| grad H / |grad H|            (unit convention)

The paper prints eps~ with + and without the root, which as a score would lower H. The released code of its predecessor
("Feedback-guided Data Synthesis for Imbalanced Classification", 2023; "predecessor" below) moves the latent and keeps
the noise prediction, which is the unit convention, and the paper's omega fits that one. Norms are those of a row.

Before there is a classifier, the same method runs with omega 0, which is plain sampling and needs no guide: so all
rounds draw from one family of streams. `direction: random` is the control: at each guided step a direction drawn for
the row, as long as the gradient.
"""

# B rows, C latent channels, K classes

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from rayexpand.contract.prompts import Template
from rayexpand.contract.protocols import Batch, Calls, Cond, Expansion, Tools
from rayexpand.contract.settings import Section
from rayexpand.diffusion import energy, sampling
from rayexpand.diffusion.process import LEAST_SIGNAL
from rayexpand.methods._guided import LOSS_SCALE, Guided, with_graph
from rayexpand.methods._on_plain import OnPlain
from rayexpand.methods.img2img import Img2Img
from rayexpand.methods.text2img import Text2Img

if TYPE_CHECKING:
    import torch


class Practice(OnPlain, Section):
    """Settings of entropy guidance. Each default names its source."""

    model_config = ConfigDict(validate_default=True)
    PIECES: ClassVar = ("guide_batch",)  # rows at once; halved when memory runs out

    name: Literal["practice"] = "practice"
    ratio: float = Field(5.0, gt=0, le=65535, description="samples for each seed; 2.5 gives half of each class a third "
                         "one (ours, as img2img)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio`")
    prompt: Template = Field("a photo of a {name}.", description="template with {name}, {metaclass}, {noun}, {token}, "
                             "{caption}; may be empty (ours, as img2img)")
    negative: str = Field("", description="negative prompt (predecessor: empty)")
    strength: float | None = Field(None, gt=0, le=1, description="null: from pure noise (paper); else from the seed "
                                   "image, so much of the schedule (ours)")
    steps: int = Field(30, ge=1, le=999, description="solver steps of the whole schedule (predecessor: 30)")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance scale (predecessor: 7.5)")
    solver: sampling.Solver = Field("ddim", description="ddim (ours, as img2img), dpmpp_2m or unipc")
    spacing: sampling.Spacing | None = Field(None, description="where the steps lie; none: as the weights were "
                                             "shipped, or as published: leading for ddim, else linspace, where that "
                                             "is Stable Diffusion 1.x or 2.x")
    omega: float = Field(0.05, ge=0, allow_inf_nan=False, description="strength of guidance; 0: none, and no guide is "
                         "needed (paper: 0.05 on ImageNet-100; score wants other numbers, 4 to 16 on digits)")
    convention: Literal["score", "unit"] = Field(
        "unit", description="score: the noise prediction less omega sqrt(1 - abar) times the gradient; unit: the "
        "latent moves by omega times its own length up the gradient (predecessor)")
    criterion: Literal["entropy", "loss"] = Field(
        "entropy", description="what is climbed. entropy: of the guide's prediction (paper); loss: -ln of the "
        "probability of the class (predecessor)")
    every: int = Field(5, ge=1, description="every so many steps one is guided (predecessor: 5)")
    from_step: int = Field(1, ge=1, description="the first guided step, counted from the first one that is run "
                           "(predecessor: 1)")
    direction: Literal["gradient", "random"] = Field(
        "gradient", description="gradient: the method; random: a direction drawn for each row and step, of the same "
        "length (control)")
    guide_batch: int | None = Field(None, ge=1, description="rows that carry a gradient at once; none: the whole call")
    recompute: bool = Field(False, description="compute UNet and decoder again in the backward pass instead of keeping "
                            "their activations: less memory, more time in guided steps")

    _plain: Text2Img | Img2Img = PrivateAttr()  # the method without guidance

    @field_validator("steps")
    @classmethod
    def _runs_a_step(cls, steps: int, info: ValidationInfo) -> int:
        if info.data.get("strength") is not None:
            sampling.steps_run(info.data["strength"], steps)
        return steps

    @field_validator("from_step")
    @classmethod
    def _is_executed(cls, from_step: int, info: ValidationInfo) -> int:
        if {"strength", "steps"} <= info.data.keys():
            strength, steps = info.data["strength"], info.data["steps"]
            run = steps if strength is None else sampling.steps_run(strength, steps)
            if from_step > run:
                raise ValueError(f"{run} steps are run, so this one never comes; set it to at most {run}")
        return from_step

    @model_validator(mode="after")
    def _without_guidance(self) -> Practice:
        fields = {name: getattr(self, name) for name in ("ratio", "quota", "prompt", "negative", "steps",
                                                         "guidance_scale", "solver", "spacing")}
        self._plain = Text2Img(**fields) if self.strength is None else Img2Img(strength=self.strength, **fields)
        return self

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        import torch

        if not self.omega:
            return self._plain.expand(batch, tools)
        prior, guided = tools.prior, Guided(len(batch))
        schedule = sampling.batch_schedule(prior, batch, self.solver, self.steps, self.spacing)
        step = sampling.stepper(schedule, sampling.fresh_noise(prior, batch))
        guided_steps = self.guided_steps(len(schedule.steps))
        with torch.no_grad():
            cond = sampling.embed_batch(prior, batch, self.guidance_scale)
            z_BCHW = sampling.noise_batch(prior, batch)
            if self.strength is not None:
                z_BCHW = schedule.first.mix(sampling.encode_batch(prior, batch), z_BCHW)
            for i, (here, there) in enumerate(schedule.steps):
                if i in guided_steps and here.a**2 >= LEAST_SIGNAL:
                    z_BCHW, p = self._guided(batch, tools, guided, z_BCHW, here, cond, schedule.start + i)
                else:
                    p = prior.predict(z_BCHW, here, cond)
                z_BCHW = step(z_BCHW, p, here, there)
            x_BCHW = prior.decode(z_BCHW, cond)
            guided.score("entropy_after", sampling.in_chunks(
                lambda rows: energy.entropy(_logits(tools.guide, x_BCHW[rows])), len(batch), self._rows(batch)))
            return guided.expansion(*sampling.to_images(x_BCHW))

    def guided_steps(self, run: int) -> range:
        """Which of `run` steps are guided, from 0. Of these, one from pure noise is passed over: it has no image."""
        return range(self.from_step - 1, run, self.every)

    def _guided(self, batch: Batch, tools: Tools, guided: Guided, z_BCHW: torch.Tensor, here: sampling.Point,
                cond: Cond, number: int) -> tuple[torch.Tensor, sampling.Prediction]:
        """z_t and its prediction after guidance, at the step `number` of the whole grid. What one of z_t, clean and
        noise gains, another of them gains or loses, so that they still mix: z_t = a clean + s noise."""
        import torch

        h_B, g_BCHW, p = self._gradient(batch, tools, z_BCHW, here, cond)
        if f"{self.criterion}_before" not in guided.scores:
            guided.score(f"{self.criterion}_before", h_B)
        d_BCHW = g_BCHW
        if self.direction == "random":
            drawn_BCHW = sampling.noise_batch(tools.prior, batch, f"direction/{number}")
            d_BCHW = drawn_BCHW * (_norm(g_BCHW) / _norm(drawn_BCHW))
        if self.convention == "score":
            p = sampling.Prediction(p.clean + self.omega * here.s**2 / here.a * d_BCHW,
                                    p.noise - self.omega * here.s * d_BCHW)
        else:
            least = torch.finfo(d_BCHW.dtype).tiny  # of a gradient of zeros, which moves nothing
            move_BCHW = self.omega * _norm(z_BCHW) * (d_BCHW / _norm(d_BCHW).clamp_min(least))
            z_BCHW, p = z_BCHW + move_BCHW, sampling.Prediction(p.clean + move_BCHW / here.a, p.noise)
        guided.check(h_B, g_BCHW, p.clean)
        return z_BCHW, p

    def _gradient(self, batch: Batch, tools: Tools, z_BCHW: torch.Tensor, here: sampling.Point, cond: Cond,
                  ) -> tuple[torch.Tensor, torch.Tensor, sampling.Prediction]:
        """(B,) criterion of the clean prediction, its gradient in z_t, and the prediction."""
        import torch

        parts = []
        for rows, kept in sampling.chunks(len(z_BCHW), self._rows(batch)):
            labels = [batch.draws[row].target_label for row in rows]
            found = self._gradient_of(tools, z_BCHW[rows], here, cond[rows], labels)
            parts.append([numbers.detach()[:kept] for numbers in found])
        h_B, g_BCHW, *p_BCHW = (torch.cat(column) for column in zip(*parts, strict=True))
        return h_B, g_BCHW, sampling.Prediction(*p_BCHW)

    def _gradient_of(self, tools: Tools, z_BCHW: torch.Tensor, here: sampling.Point, cond: Cond, labels: Sequence[int],
                     ) -> tuple[torch.Tensor, ...]:
        """The same of rows that carry a gradient at once: criterion, gradient, clean, noise."""
        import torch

        prior, guide = tools.prior, tools.guide
        with torch.enable_grad():
            z_BCHW.requires_grad_()
            p = with_graph(lambda z: prior.predict(z, here, cond), z_BCHW, recompute=self.recompute)
            logits_BK = with_graph(lambda z: _logits(guide, prior.decode(z, cond)), p.clean, recompute=self.recompute)
            h_B = (energy.entropy(logits_BK) if self.criterion == "entropy"
                   else energy.class_loss(logits_BK, torch.tensor(labels, device=logits_BK.device)))
            (g_BCHW,) = torch.autograd.grad(h_B.sum() * LOSS_SCALE, z_BCHW)
        return h_B, g_BCHW / LOSS_SCALE, *p

    def _rows(self, batch: Batch) -> int:
        return min(self.guide_batch or len(batch), len(batch))

    def unguided(self) -> Practice:
        return self.model_copy(update={"omega": 0.0})

    def calls(self, plain: Calls, rows: int) -> Calls:
        if not self.omega:
            return plain
        run = self.steps if self.strength is None else sampling.steps_run(self.strength, self.steps)
        guided = float(len(self.guided_steps(run)))
        plain += Calls(steps_back=guided, decodes=guided, decodes_back=guided)
        return plain + Calls(steps=guided, decodes=guided) if self.recompute else plain

    def needs(self) -> frozenset[str]:
        return self._plain.needs() | ({"guide"} if self.omega else set())


def _logits(guide: Any, x_BCHW: torch.Tensor) -> torch.Tensor:
    """(B, K) of decoded images. Where the guide takes smaller ones, with antialiasing, as it was trained."""
    return guide.head(guide.features(energy.resize(x_BCHW, guide.size, antialias=True)))


def _norm(z_BCHW: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1, 1): length of each row."""
    import torch

    return torch.linalg.vector_norm(z_BCHW, dim=(1, 2, 3), keepdim=True)
