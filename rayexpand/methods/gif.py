"""GIF: make copies of a seed, then push each latent to where a guide still sees the seed's class, is less sure of it,
and sees the copies differ (Zhang et al., "Expanding Small-Scale Datasets with Guided Imagination", 2023). No training.

    paper            here            meaning, unit
    K                group_size      copies of a seed that are pushed apart together
    f                z_BCHW          latent of a copy, clean: guidance comes after diffusion
    e, b, eps        e, b, eps       perturbation and box of diffusion/perturb.py
    s, s'            logits          class scores of the seed and of a copy, softmax over the guide's logits
    j                anchor          the class the guide sees in the seed; never its label
    S_inf            class_term + entropy_gain    s'_j + H(s') - H(s)
    S_div            diversity       KL(softmax f'_i || softmax mean f') of guide features of unit length, nats
    S                score           sum over copies of S_inf + S_div; one signed step of e and b up its gradient

What f is and where S is read depends on the generator, and nothing else does:

    GIF-SD      a latent of Stable Diffusion after image to image; each copy has its own prompt, turned seed image,
                posterior sample and noise, as in the released code. S is of the decoded image
    GIF-MAE     tokens of a masked autoencoder, (B, D, T). S is of the decoded image
    GIF-DALLE   the CLIP embedding of the seed, (B, D). S is of f' itself, and no network has a gradient; decoding is a
                whole diffusion

The score joins the copies of a group through their features alone. So a group larger than memory takes three passes:
features of all copies without a graph, the gradient of the score in that (K, D) matrix, then `chunk` rows at a time
once more with a graph to carry it on to e and b. The result is that of one pass.
"""

# B rows, K copies of a group, C latent channels, D features; z_BC is (B, C, ...) with any axes behind

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from rayexpand.contract.prompts import Template, format_prompt, placeholders, prompt_needs
from rayexpand.contract.protocols import Batch, Calls, Expansion, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Draw, SeedIndex, Start
from rayexpand.contract.settings import Later, Section
from rayexpand.diffusion import energy, perturb, sampling
from rayexpand.methods._copies import quota_copies, ratio_copies
from rayexpand.methods._guided import Guided

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DOMAINS = ("an image of", "a real-world photo of", "a cartoon image of", "an oil painting of", "a sketch of")
ADJECTIVES = ("", "colorful", "stylized", "high-contrast", "low-contrast", "posterized", "solarized", "sheared",
              "bright", "dark")
# Defaults of the other generators: the paper's, where it states them (D.1); null where nothing is denoised.
OWN: Mapping[str, Mapping[str, Any]] = {
    "sd": {}, "mae": {"strength": None, "steps": None, "guidance_scale": None, "eps": 5.0},
    "unclip": {"strength": None, "steps": 100, "guidance_scale": 4.0, "eps": 0.1, "diversity_in": "latent"}}
_OF_PROMPTS = ("domains", "adjectives", "subject", "negative", "rotation", "rotation_filter", "flip", "strength",
               "noise_level", "shared_diffusion")
UNUSED: Mapping[str, tuple[str, ...]] = {  # fields without a meaning
    "sd": ("embedding_noise",), "mae": (*_OF_PROMPTS, "steps", "guidance_scale", "embedding_noise"),
    "unclip": (*_OF_PROMPTS, "level", "chunk", "clip_input", "diversity_in")}
WHY = {"sd": "encodes no image embedding", "mae": "draws the seed image again, without prompt and diffusion",
       "unclip": "paints the embedding of the seed image, from noise and without prompt"}
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # mean and deviation of pixels, in the released code


class Gif(Section):
    """Settings of GIF. Defaults are those of the released code for CIFAR100-S unless noted."""

    model_config = ConfigDict(validate_default=True)
    PIECES: ClassVar = ("chunk", "forward_chunk")  # rows at once; halved in this order when memory runs out

    name: Literal["gif"] = "gif"
    generator: Annotated[Literal["sd", "mae", "unclip"], Later("sd")] = Field(
        "sd", description="what makes images. sd: latent diffusion by prompts (GIF-SD); mae: a masked autoencoder "
        "(GIF-MAE); unclip: a decoder of CLIP's image embeddings (GIF-DALLE)")
    ratio: float = Field(5.0, gt=0, le=65535, description="copies of each seed; 2.5 gives half of each class a third "
                         "copy (released code: 5)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio`")
    domains: tuple[str, ...] = Field(DOMAINS, min_length=1, description="first part of a prompt, one drawn for each "
                                     "copy (appendix D.2)")
    adjectives: tuple[str, ...] = Field(ADJECTIVES, min_length=1, description="second part, one drawn for each copy; "
                                        "may be empty text (appendix D.2)")
    subject: Template = Field("{name}", description="last part: template with {name}, {metaclass}, {noun} (released "
                              "code: the class name)")
    negative: str = Field("", description="negative prompt (released code: empty)")
    rotation: float = Field(15.0, ge=0, le=180, description="largest angle in degrees by which the seed image of a "
                            "copy is turned, corners black (released code: 15)")
    rotation_filter: Annotated[Literal["bilinear", "nearest"], Later("bilinear")] = Field(
        "bilinear", description="how it is turned (released code: nearest, torchvision's default; bilinear is ours)")
    flip: bool = Field(True, description="mirror the seed image of every other copy, by chance (released code); off "
                       "for digits and letters")
    strength: float | None = Field(0.9, gt=0, le=1, description="share of the schedule that is run (released code: "
                                   "0.9; paper: 0.5 to 0.9); null for mae and unclip")
    steps: int | None = Field(50, ge=1, le=999, description="DDIM steps of the whole schedule (released code: 50); 100 "
                              "for unclip (paper), null for mae")
    guidance_scale: float | None = Field(50.0, ge=0, description="classifier-free guidance scale (released code: 50; "
                                         "paper: 5 to 50; 7.5 to 15 saturates less); 4 for unclip (paper), null for "
                                         "mae")
    embedding_noise: Annotated[int, Later(0)] = Field(
        0, ge=0, le=999, description="timestep of the noise that unclip gets in each embedding (ours: 0, the least)")
    shared_diffusion: Annotated[bool, Later(False)] = Field(
        False, description="one prompt, turn and diffusion for all copies of a seed, which then differ by e and b "
        "alone (paper); off: each its own (released code), which varies more and costs a diffusion for each copy")
    noise_level: Literal["first_step", "official"] = Field(
        "first_step", description="first_step: noise to the timestep of the first executed step; official: one grid "
        "point more than is then taken away (released code)")
    guidance: Literal["guided", "random", "none"] = Field(
        "guided", description="guided: the method; random: e and b as drawn; none: diffusion alone (unguided twin)")
    group_size: int | None = Field(None, ge=2, description="copies of a seed in one group; a shorter tail joins the "
                                   "last group; none: all of them (paper; released code: 2)")
    level: perturb.Level = Field("channel", description="channel: one e and b per latent channel; pixel: per element "
                                 "(ablation of the paper)")
    eps: float = Field(0.8, ge=0, description="radius of the box around the latent (released code: 0.8); 5 for mae "
                       "(ours, not stated), 0.1 for unclip (paper)")
    step: float = Field(0.1, ge=0, description="length of the one signed step of e and b (released code: 0.1)")
    lambda_cls: float = Field(1.0, description="weight of the class term; 0 turns it off (paper: 1)")
    lambda_ent: float = Field(1.0, description="weight of the entropy gain; 0 turns it off (paper: 1)")
    diversity_in: Annotated[Literal["guide", "latent"], Later("guide")] = Field(
        "guide", description="what differs. guide: features of the guide, of unit length (released code); latent: the "
        "perturbed latent itself (paper), as for unclip, where it is the embedding")
    lambda_div: float = Field(1.0, description="weight of the diversity; 0 turns it off (paper: 1)")
    kl_direction: Literal["paper", "official"] = Field(
        "paper", description="paper: KL(copy || mean); official: KL(mean || copy) (released code)")
    guide_text: Annotated[Template, Later("a photo of a {name}")] = Field(
        "a photo of a {name}", description="what CLIP is asked of each class: template with {name} (released code: "
        "This is a photo of a {name})")
    clip_input: Annotated[Literal["own", "official"], Later("own")] = Field(
        "own", description="own: pixels are normalised as the guide was trained; official: copies are not, and the "
        "seed is by CIFAR's mean and deviation (released code)")
    class_term_on: Literal["all", "first"] = Field("all", description="copies that get the class term: all (paper) or "
                                                   "the first of each group (released code)")
    chunk: int | None = Field(None, ge=1, description="rows that carry a gradient at once; none: the whole call")
    forward_chunk: int | None = Field(None, ge=1, description="rows that are denoised and decoded at once without a "
                                      "gradient; none: the whole call")
    measure: bool = Field(False, description="score the images with the update (after) and with the drawn perturbation "
                          "alone (random) too, both projected; costs 1 more decode and 2 guide calls")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_its_generator(cls, value: Any) -> Any:
        return {**OWN.get(str(value.get("generator")), {}), **value} if isinstance(value, Mapping) else value

    @field_validator("steps")
    @classmethod
    def _runs_a_step(cls, steps: int | None, info: ValidationInfo) -> int | None:
        if steps is not None and info.data.get("strength") is not None:
            sampling.steps_run(info.data["strength"], steps)
        return steps

    @field_validator("noise_level")
    @classmethod
    def _has_a_point_before(cls, noise_level: str, info: ValidationInfo) -> str:
        strength, steps = info.data.get("strength"), info.data.get("steps")
        if noise_level == "official" and strength and steps and sampling.steps_run(strength, steps) == steps:
            raise ValueError(f"strength {strength:g} runs all {steps} steps, and the schedule has no point before the "
                             "first; lower strength, or use first_step")
        return noise_level

    @field_validator("lambda_div")
    @classmethod
    def _has_a_score(cls, lambda_div: float, info: ValidationInfo) -> float:
        others = [info.data.get(name, 1.0) for name in ("lambda_cls", "lambda_ent")]
        if not lambda_div and not any(others) and info.data.get("guidance") == "guided":
            raise ValueError("lambda_cls and lambda_ent are 0 too, so there is nothing to climb; set one of them, or "
                             "guidance: random")
        return lambda_div

    @field_validator("guide_text")
    @classmethod
    def _asks_of_a_name(cls, text: str) -> str:
        if placeholders(text) != {"name"}:
            raise ValueError(f"{text!r}: {{name}} and no other placeholder must stand in it, since a guide is asked "
                             "the same for every image")
        return text

    @model_serializer(mode="wrap")
    def _without_later(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields without a meaning are not written either."""
        written = super()._without_later(handler)
        return {name: value for name, value in written.items() if name not in UNUSED[self.generator]}

    @model_validator(mode="after")
    def _fits_its_generator(self) -> Gif:
        default = {name: field.default for name, field in type(self).model_fields.items()} | dict(OWN[self.generator])
        if unused := [name for name in UNUSED[self.generator] if getattr(self, name) != default[name]]:
            raise ValueError(f"{', '.join(unused)}: no meaning for generator {self.generator}, which "
                             f"{WHY[self.generator]}; take {'it' if len(unused) == 1 else 'them'} out")
        if absent := [name for name in ("strength", "steps", "guidance_scale")
                      if getattr(self, name) is None and default[name] is not None]:
            raise ValueError(f"{', '.join(absent)}: null, and generator {self.generator} needs a number; take "
                             f"{'it' if len(absent) == 1 else 'them'} out, or give one")
        return self

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        import torch

        guided = Guided(len(batch))
        with torch.no_grad():
            z_BC = self._start(batch, tools)
            decode = self._decoder(batch, tools)
            if self.guidance == "none":
                return guided.expansion(*sampling.to_images(decode(z_BC)))
            score = _Score(self, batch, tools, z_BC) if "guide" in self.needs() else None
            drawn = perturb.draw(batch, z_BC, self.level)
            moved = self._climb(score, guided, z_BC, *drawn) if score and self.guidance == "guided" else drawn
            u_BC = perturb.apply(z_BC, *moved)
            near_BC = perturb.project(u_BC, z_BC, self.eps)
            x_BCHW = decode(near_BC)
            guided.score("clamp_fraction", perturb.clamp_fraction(u_BC, z_BC, self.eps))
            guided.score("flip_fraction", perturb.flip_fraction(z_BC, drawn, moved))
            if score and self.measure:
                random_BC = perturb.project(perturb.apply(z_BC, *drawn), z_BC, self.eps)
                by_image = tools.prior.decode_needs_grad
                score.record(guided, "random", self._looked_at(score, decode(random_BC)) if by_image else random_BC,
                             random_BC)
                score.record(guided, "after", self._looked_at(score, x_BCHW) if by_image else near_BC, near_BC)
            return guided.expansion(*sampling.to_images(x_BCHW))

    def _start(self, batch: Batch, tools: Tools) -> torch.Tensor:
        """(B, C, ...): f of all copies."""
        if self.generator == "sd":
            return self._shared(batch, tools) if self.shared_diffusion else self._diffuse(batch, tools)
        return sampling.once_per_seed(batch, lambda x_nCHW, _: tools.prior.encode(x_nCHW, None))

    def _decoder(self, batch: Batch, tools: Tools) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes images of latents of all rows, as many at once as `forward_chunk` says."""
        prior = tools.prior
        if self.generator != "unclip":
            return lambda z_BC: self._forward(lambda rows: prior.decode(z_BC[rows]), len(batch))
        how = self._variation(batch, prior)
        return lambda z_BC: self._forward(lambda rows: prior.decode(z_BC[rows], how[rows]), len(batch))

    def _variation(self, batch: Batch, prior: Any) -> Any:
        """How embeddings become images: the diffusion of each row begins with noise of its own."""
        import torch

        schedule = sampling.batch_schedule(prior, batch, "ddim", self.steps or 1)
        level_noise_BD = torch.from_numpy(batch.normals("level", (prior.features,)))
        return prior.variation(schedule, sampling.noise_batch(prior, batch), level_noise_BD, self.guidance_scale,
                               self.embedding_noise, sampling.fresh_noise(prior, batch))

    def _shared(self, batch: Batch, tools: Tools) -> torch.Tensor:
        """Latents of a diffusion for each seed, by the streams of its first copy. As many seeds at once as a whole call
        has, whatever this one has: numbers may depend on the shape."""
        keys = [(rng.run_seed, rng.seed_id, image.tobytes())
                for rng, image in zip(batch.rngs, batch.images, strict=True)]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        slots = list(first.values())
        heads = Batch(tuple(batch.draws[i] for i in slots), tuple(batch.images[i] for i in slots),
                      tuple(replace(batch.rngs[i], copy=0) for i in slots), (False,) * len(slots))
        size = min(self.forward_chunk or len(batch), max(1, len(batch) // self._each()))
        place = {key: n for n, key in enumerate(first)}
        return self._diffuse(heads, tools, size)[[place[key] for key in keys]]

    def _each(self) -> int:
        """About how many copies of a seed a call has."""
        return math.ceil(self.ratio) if self.quota is None else self.group_size or 1

    def _diffuse(self, batch: Batch, tools: Tools, size: int | None = None) -> torch.Tensor:
        """Clean latents of all rows, `size` at once, by plain image to image."""
        prior = tools.prior
        assert self.steps is not None, "only an autoencoder has no steps"
        assert self.guidance_scale is not None, "only an autoencoder has no guidance"
        schedule = sampling.batch_schedule(prior, batch, "ddim", self.steps)
        start = schedule.points[schedule.start - (1 if self.noise_level == "official" else 0)]
        cond = sampling.embed_batch(prior, batch, self.guidance_scale)
        x_BCHW = sampling.to_tensor([self._turned(image, rng("aug"))
                                     for image, rng in zip(batch.images, batch.rngs, strict=True)])
        posterior_BCHW, noise_BCHW = (sampling.noise_batch(prior, batch, s) for s in ("posterior_copy", "noise"))

        def latents(rows: list[int]) -> torch.Tensor:
            z0_BCHW = prior.encode(x_BCHW[rows], posterior_BCHW[rows])
            z_BCHW = start.mix(z0_BCHW, noise_BCHW[rows])
            return sampling.denoise(prior, z_BCHW, schedule, cond[rows], sampling.fresh_noise(prior, batch, rows))

        return self._forward(latents, len(batch), size)

    def _turned(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 (H, W, 3): the seed image as this copy starts from it."""
        angle, mirrored = rng.uniform(-self.rotation, self.rotation), rng.random() < 0.5
        if self.rotation:
            image = np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling[self.rotation_filter.upper()]))
        return np.ascontiguousarray(image[:, ::-1]) if self.flip and mirrored else image

    def _climb(self, score: _Score, guided: Guided, z_BC: torch.Tensor, e: torch.Tensor,
               b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """e + step sign(dS/de), b + step sign(dS/db), where S is the score before the latent is projected.

        The sign and not the gradient: the released code's way of "arg max", blind to the scale of S.
        """
        import torch

        rows = len(z_BC)
        size = min(self.chunk or rows, rows) if score.tools.prior.decode_needs_grad else rows

        def features(rows: list[int], e: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return score.features(perturb.apply(z_BC[rows], e, b))

        leaves = [noise.detach().clone().requires_grad_() for noise in (e, b)]
        if size == rows:
            with torch.enable_grad():
                f_BD = features(list(range(rows)), *leaves)
                gradients = torch.autograd.grad(self._total(score, f_BD, z_BC, leaves), leaves)
        else:
            f_BD = sampling.in_chunks(lambda chosen: features(chosen, e[chosen], b[chosen]), rows, size)
            with torch.enable_grad():
                g_BD, *direct = torch.autograd.grad(
                    self._total(score, f_BD.requires_grad_(), z_BC, leaves),
                    [f_BD, *(leaves if self.diversity_in == "latent" else [])])
            gradients = _carried(features, g_BD, (e, b), size)
            if direct:
                gradients = tuple(through + more for through, more in zip(gradients, direct, strict=True))
        score.record(guided, "before", f_BD.detach(), perturb.apply(z_BC, e, b))
        guided.check(f_BD.detach().sum(1), *gradients)
        return e + self.step * gradients[0].sign(), b + self.step * gradients[1].sign()

    def _total(self, score: _Score, f_BD: torch.Tensor, z_BC: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
        """S of all rows, which e and b reach through the features, and directly where the latent itself counts."""
        u_BC = perturb.apply(z_BC, *leaves) if self.diversity_in == "latent" else f_BD
        return score.total(f_BD, u_BC).sum()

    def _looked_at(self, score: _Score, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self._forward(lambda rows: score.look(x_BCHW[rows]), len(x_BCHW))

    def _forward(self, function: Callable[[list[int]], torch.Tensor], rows: int,
                 size: int | None = None) -> torch.Tensor:
        return sampling.in_chunks(function, rows, size or min(self.forward_chunk or rows, rows))

    def calls(self, plain: Calls, rows: int) -> Calls:
        if self.generator == "unclip":  # whose image encoder counts as little as a guide
            return replace(plain, encodes=0.0)
        if self.generator == "sd":  # each copy is turned by itself
            each = self._each() if self.shared_diffusion else 1
            plain = replace(plain, encodes=1.0 / each, steps=plain.steps / each)
        if self.guidance == "guided":
            passes = 2.0 if self.chunk is not None and self.chunk < rows else 1.0
            plain += Calls(decodes=passes, decodes_back=1)
        return plain + Calls(decodes=1) if self.measure and self.guidance != "none" else plain

    def needs(self) -> frozenset[str]:
        scored = self.guidance == "guided" or (self.guidance == "random" and self.measure)
        read = prompt_needs(self.subject) if self.generator == "sd" else frozenset[str]()
        return frozenset({"prior", "guide"} if scored else {"prior"}) | read

    def no_growth(self, before: Gif) -> str:
        differs = self.generator == "sd" and self.shared_diffusion and self._each() != before._each()
        return (f"with shared_diffusion a call diffuses one latent of {before._each()} samples, and would one of "
                f"{self._each()}: latents may depend on how many there are" if differs else "")

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        if self.quota is None:
            return ratio_copies(index, self.ratio, rng)
        return quota_copies(index, np.full(len(index.classes), self.quota), rng)

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        strength = 0.0 if self.steps is None else self.strength or 1.0  # unclip begins with noise alone
        return Draw(sample_id=f"{seed_id}/{copy}", seed_id=seed_id, copy=copy, source_label=label, target_label=label,
                    prompt=self._prompt(label, classes, rng), negative=self.negative, start=Start.IMAGE,
                    strength=strength, steps_run=sampling.steps_run(strength, self.steps) if self.steps else 0,
                    attempt=0, row=row, group=copy // self.group_size if self.group_size else 0)

    def _prompt(self, label: int, classes: ClassTable, rng: RowRng) -> str:
        if self.generator != "sd":
            return ""
        chosen = (replace(rng, copy=0) if self.shared_diffusion else rng)("prompt")
        words = [parts[chosen.integers(len(parts))] for parts in (self.domains, self.adjectives)]
        words.append(format_prompt(self.subject, label, classes))
        return " ".join(" ".join(words).split())

    def group(self, copies: int) -> int:
        return min(self.group_size or copies, copies)

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        return (draw.steps_run,)

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        return np.eye(n_classes, dtype=np.float32)[target]


class _Score:
    """The score of the copies of a call, one number per row; rows of one (seed_id, group) are scored together."""

    def __init__(self, method: Gif, batch: Batch, tools: Tools, z_BC: torch.Tensor) -> None:
        """`z_BC`: f of all copies."""
        self.method, self.tools = method, tools
        self.groups = _groups(batch)
        if any(len(group) == 1 for group in self.groups) and method.lambda_div:
            _warn_of_single_copies()
        self.seed_logits_BK = (
            sampling.once_per_seed(batch, lambda x_nCHW, _: tools.guide.head(self.look(x_nCHW, seed=True)))
            if tools.prior.decode_needs_grad else tools.guide.head(z_BC))
        self.anchor_B = self.seed_logits_BK.argmax(dim=1)

    def features(self, u_BC: torch.Tensor) -> torch.Tensor:
        """(B, D) guide features of latents: of their images, or the latents themselves where they are features."""
        prior = self.tools.prior
        return self.look(prior.decode(u_BC)) if prior.decode_needs_grad else u_BC

    def look(self, x_BCHW: torch.Tensor, *, seed: bool = False) -> torch.Tensor:
        """(B, D) guide features of images, about [0, 1]. With antialiasing, as CLIP's own preprocessing has it."""
        guide = self.tools.guide
        x_BCHW = energy.resize(x_BCHW.float().clamp(0, 1), guide.size, antialias=True)
        if self.method.clip_input == "official":  # what the guide takes off again
            mean, std = (x_BCHW.new_tensor(one).view(1, 3, 1, 1) for one in CIFAR)
            x_BCHW = ((x_BCHW - mean) / std if seed else x_BCHW) * guide.std + guide.mean
        return guide.features(x_BCHW).float()

    def total(self, f_BD: torch.Tensor, u_BC: torch.Tensor) -> torch.Tensor:
        """(B,): the weighted terms of each row, of guide features and latents."""
        class_B, entropy_B, diversity_B = self.terms(f_BD, u_BC)
        if self.method.class_term_on == "first":
            firsts = {group[0] for group in self.groups}
            class_B = class_B * class_B.new_tensor([float(i in firsts) for i in range(len(f_BD))])
        return (self.method.lambda_cls * class_B + self.method.lambda_ent * entropy_B
                + self.method.lambda_div * diversity_B)

    def terms(self, f_BD: torch.Tensor, u_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Class term, entropy gain and diversity of each row, (B,) each."""
        logits_BK = self.tools.guide.head(f_BD)
        return (energy.class_term(logits_BK, self.anchor_B), energy.entropy_gain(logits_BK, self.seed_logits_BK),
                self._diversity(f_BD, u_BC))

    def _diversity(self, f_BD: torch.Tensor, u_BC: torch.Tensor) -> torch.Tensor:
        """0 for a copy alone in its group. A copy that is not finite leaves the mean of the others."""
        import torch
        import torch.nn.functional as F  # noqa: N812

        told_BD = F.normalize(f_BD, dim=1) if self.method.diversity_in == "guide" else u_BC.flatten(1)
        finite = torch.isfinite(f_BD.detach()).all(1).tolist()
        diversity_B = f_BD.new_zeros(len(f_BD))
        for group in self.groups:
            members = [i for i in group if finite[i]]
            if len(members) > 1:
                kl_K = energy.kl_diversity(told_BD[members], reverse=self.method.kl_direction == "official")
                diversity_B = diversity_B.index_put((torch.tensor(members, device=f_BD.device),), kl_K)
        return diversity_B

    def record(self, guided: Guided, when: str, f_BD: torch.Tensor, u_BC: torch.Tensor) -> None:
        """Scores of rows before or after the update: the total, its terms, and whether the anchor is still on top."""
        kept_B = (self.tools.guide.head(f_BD).argmax(dim=1) == self.anchor_B).float()
        names = ("class_term", "entropy_gain", "diversity")
        for name, values_B in zip(names, self.terms(f_BD, u_BC), strict=True):
            guided.score(f"{name}_{when}", values_B)
        guided.score(f"score_{when}", self.total(f_BD, u_BC))
        guided.score(f"retained_{when}", kept_B)


def _carried(features: Callable[..., torch.Tensor], g_BD: torch.Tensor, noises: tuple[torch.Tensor, ...],
             size: int) -> tuple[torch.Tensor, ...]:
    """Gradients in `noises` from the gradient in the features, `size` rows at a time."""
    import torch

    parts = []
    for rows, kept in sampling.chunks(len(g_BD), size):
        with torch.enable_grad():
            leaves = [noise[rows].requires_grad_() for noise in noises]
            gradients = torch.autograd.grad(features(rows, *leaves), leaves, g_BD[rows])
        parts.append([gradient[:kept] for gradient in gradients])
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _groups(batch: Batch) -> list[list[int]]:
    """Slots of each (seed_id, group), by copy, wherever they stand in the batch."""
    found: dict[tuple[str, int], list[int]] = {}
    for i, draw in enumerate(batch.draws):
        found.setdefault((draw.seed_id, draw.group), []).append(i)
    return [sorted(slots, key=lambda i: batch.draws[i].copy) for slots in found.values()]


@functools.cache
def _warn_of_single_copies() -> None:
    log.warning("some seeds have one copy only: their diversity is 0, and GIF pushes them by class and entropy alone; "
                "raise method.ratio to 2 or more")
