"""DistDiff, GIF-SD and entropy guidance once more, one image at a time, straight from their equations and from
the plain libraries.

They share nothing with the package but the random streams: diffusers models, open_clip and torch functions only. Beside
them, models so simple that every number of a guided step can be worked out by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from rayexpand.diffusion.process import Point, Prediction, Schedule, prediction
from tests.diffusion.gaussian import schedule_of


@dataclass
class Made:
    """What a reference made of one image; latents and noises (1, C, ...), pixels (1, 3, H, W)."""

    pixels: torch.Tensor
    latent: torch.Tensor
    e: torch.Tensor
    b: torch.Tensor
    energy: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)


class Sampler:
    """Stable Diffusion on one image: timesteps, guided noise prediction, DDIM, encode and decode."""

    def __init__(self, prior: Any, steps: int, scale: float) -> None:
        self.prior, self.scale = prior, scale
        self.abar = prior.scheduler.alphas_cumprod.double()
        every = 1000 // steps
        self.timesteps = [every * k + 1 for k in reversed(range(steps))]
        self.every = every

    def text(self, prompt: str) -> torch.Tensor:
        tokens = self.prior.tokenizer(prompt, padding="max_length", max_length=self.prior.tokenizer.model_max_length,
                                      truncation=True, return_tensors="pt").input_ids
        return self.prior.text_encoder(tokens).last_hidden_state

    def psi(self, z: torch.Tensor, t: int, text: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        uncond = self.prior.unet(z, t, encoder_hidden_states=empty).sample
        return uncond + self.scale * (self.prior.unet(z, t, encoder_hidden_states=text).sample - uncond)

    def clean(self, z: torch.Tensor, psi: torch.Tensor, t: int) -> torch.Tensor:
        return (z - (1 - self.abar[t]).sqrt().float() * psi) / self.abar[t].sqrt().float()

    def ddim(self, z: torch.Tensor, psi: torch.Tensor, t: int) -> torch.Tensor:
        abar = self.abar[max(t - self.every, 0)]
        return abar.sqrt().float() * self.clean(z, psi, t) + (1 - abar).sqrt().float() * psi

    def encode(self, image: np.ndarray, noise: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        posterior = self.prior.vae.encode(x).latent_dist
        return (posterior.mean + posterior.std * torch.from_numpy(noise)[None]) * self.prior.vae.config.scaling_factor

    def noisy(self, z: torch.Tensor, noise: np.ndarray, t: int) -> torch.Tensor:
        return self.abar[t].sqrt().float() * z + (1 - self.abar[t]).sqrt().float() * torch.from_numpy(noise)[None]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """[-1, 1], unclamped."""
        return self.prior.vae.decode(z / self.prior.vae.config.scaling_factor).sample


def distdiff(sampler: Sampler, guide: Any, image: np.ndarray, prompt: str, rng: Any, class_D: np.ndarray,
             group_GD: np.ndarray, *, executed: int, guide_step: int, lookahead: int, rho: float, eps: float,
             lambda_g: float, unit: bool = False, raw_input: bool = False, direct: bool = False) -> Made:
    """One sample of DistDiff, with an update at the guided timestep and without batches."""
    shape = sampler.prior.latent_shape(*image.shape[:2])
    with torch.no_grad():
        text, empty = sampler.text(prompt), sampler.text("")
        timesteps = sampler.timesteps[-executed:]
        z = sampler.noisy(sampler.encode(image, rng.normals("posterior", shape)), rng.normals("noise", shape),
                          timesteps[0])
    p_c, p_g = torch.from_numpy(class_D), torch.from_numpy(group_GD)
    e = torch.from_numpy(rng.uniforms("e", (shape[0], 1, 1)))[None]
    b = torch.from_numpy(rng.normals("b", (shape[0], 1, 1)))[None]
    guided = sampler.timesteps[-guide_step:][:lookahead]
    first_energy = None

    def energy_of(clean: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate(sampler.decode(clean), guide.size, mode="bicubic", align_corners=False)
        f = guide.model.encode_image(pixels if raw_input else (pixels / 2 + 0.5 - guide.mean) / guide.std)[0]
        f = f / f.norm() if unit else f
        nearest = max(range(len(p_g)), key=lambda g: F.cosine_similarity(f, p_g[g], dim=0).item())
        return torch.dist(f, p_c) + lambda_g * torch.dist(f, p_g[nearest])

    for t in timesteps:
        if direct and t in guided:
            z = z.detach().requires_grad_()
            psi = sampler.psi(z, t, text, empty)
            energy = energy_of(sampler.clean(z, psi, t))
            first_energy = energy if first_energy is None else first_energy
            z = (sampler.ddim(z, psi, t) - rho * torch.autograd.grad(energy, z, retain_graph=True)[0]).detach()
            continue
        if not direct and t == guided[0]:
            e, b = e.requires_grad_(), b.requires_grad_()
            u, total = (1 + e) * z + b, 0
            for s in guided:
                psi = sampler.psi(u, s, text, empty)
                total = total + energy_of(sampler.clean(u, psi, s))
                u = sampler.ddim(u, psi, s)
            first_energy = total / lookahead
            ge, gb = torch.autograd.grad(first_energy, [e, b])
            e, b = (e - rho * ge).detach(), (b - rho * gb).detach()
            u = (1 + e) * z + b
            z = torch.where(u > z + eps, z + eps, torch.where(u < z - eps, z - eps, u))
        with torch.no_grad():
            z = sampler.ddim(z, sampler.psi(z, t, text, empty), t)
    with torch.no_grad():
        return Made(sampler.decode(z) / 2 + 0.5, z, e, b, first_energy.item())


def gif(sampler: Sampler, guide: Any, seed: np.ndarray, prompts: list[str], rngs: list[Any], *, executed: int,
        eps: float, step: float, lambdas: tuple[float, float, float], official_kl: bool = False,
        first_only: bool = False, extra_noise: bool = False, pixel: bool = False) -> list[Made]:
    """One group of copies of GIF-SD without rotation and mirroring: every copy denoised alone, then scored together."""
    shape = sampler.prior.latent_shape(*seed.shape[:2])
    noise_shape = shape if pixel else (shape[0], 1, 1)
    timesteps, latents = sampler.timesteps[-executed:], []
    with torch.no_grad():
        empty = sampler.text("")
        for prompt, rng in zip(prompts, rngs, strict=True):
            text = sampler.text(prompt)
            noised_to = sampler.timesteps[-executed - 1] if extra_noise else timesteps[0]
            z = sampler.noisy(sampler.encode(seed, rng.normals("posterior_copy", shape)), rng.normals("noise", shape),
                              noised_to)
            for t in timesteps:
                z = sampler.ddim(z, sampler.psi(z, t, text, empty), t)
            latents.append(z)
    es = [torch.from_numpy(rng.uniforms("e", noise_shape))[None].requires_grad_() for rng in rngs]
    bs = [torch.from_numpy(rng.normals("b", noise_shape))[None].requires_grad_() for rng in rngs]

    def look(pixels: torch.Tensor) -> torch.Tensor:
        small = F.interpolate(pixels.clamp(0, 1), guide.size, mode="bicubic", antialias=True, align_corners=False)
        return guide.model.encode_image((small - guide.mean) / guide.std)[0]

    def s(f: torch.Tensor) -> torch.Tensor:
        return torch.softmax(guide.scale * guide.texts_KD @ (f / f.norm()), dim=0)

    with torch.no_grad():
        s_seed = s(look(torch.from_numpy(seed.copy()).permute(2, 0, 1)[None] / 255))
    anchor = int(s_seed.argmax())
    features = [look(sampler.decode((1 + e) * z + b) / 2 + 0.5) for z, e, b in zip(latents, es, bs, strict=True)]
    mean = torch.softmax(torch.stack([f / f.norm() for f in features]).mean(0), dim=0)
    total, terms = torch.zeros(()), []
    for k, f in enumerate(features):
        p, q = s(f), torch.softmax(f / f.norm(), dim=0)
        gain = -(p * p.log()).sum() + (s_seed * s_seed.log()).sum()
        kl = (mean * (mean / q).log()).sum() if official_kl else (q * (q / mean).log()).sum()
        own = lambdas[0] * p[anchor] if k == 0 or not first_only else 0.0
        total = total + own + lambdas[1] * gain + lambdas[2] * kl
        terms.append({"class_term": p[anchor].item(), "entropy_gain": gain.item(), "diversity": kl.item()})
    gradients = torch.autograd.grad(total, [*es, *bs])
    made = []
    for k, z in enumerate(latents):
        e = (es[k] + step * gradients[k].sign()).detach()
        b = (bs[k] + step * gradients[len(latents) + k].sign()).detach()
        out = z + torch.clamp((1 + e) * z + b - z, -eps, eps)
        with torch.no_grad():
            made.append(Made(sampler.decode(out) / 2 + 0.5, out, e, b, total.item(), terms[k]))
    return made


def practice(sampler: Sampler, guide: Any, image: np.ndarray, prompt: str, label: int, rng: Any, *, executed: int,
             from_noise: bool, guided: range, omega: float, unit: bool, loss: bool, random: bool) -> Made:
    """One sample under entropy guidance, whose steps `guided` of those that are executed climb."""
    shape, timesteps = sampler.prior.latent_shape(*image.shape[:2]), sampler.timesteps[-executed:]
    z, first = torch.from_numpy(rng.normals("noise", shape))[None], None
    with torch.no_grad():
        text, empty = sampler.text(prompt), sampler.text("")
        if not from_noise:
            z = sampler.noisy(sampler.encode(image, rng.normals("posterior", shape)), rng.normals("noise", shape),
                              timesteps[0])

    def height(pixels: torch.Tensor) -> torch.Tensor:
        f = guide.model.encode_image((pixels - guide.mean) / guide.std)[0]
        p = torch.softmax(guide.scale * guide.texts_KD @ (f / f.norm()), dim=0)
        return -p[label].log() if loss else -(p * p.log()).sum()

    for n, t in enumerate(timesteps):
        if n not in guided:
            with torch.no_grad():
                z = sampler.ddim(z, sampler.psi(z, t, text, empty), t)
            continue
        z = z.detach().requires_grad_()
        psi = sampler.psi(z, t, text, empty)
        h = height(sampler.decode(sampler.clean(z, psi, t)) / 2 + 0.5)
        first = h.item() if first is None else first
        d = g = torch.autograd.grad(h, z, retain_graph=True)[0]
        z, psi = z.detach(), psi.detach()
        if random:
            drawn = torch.from_numpy(rng.normals(f"direction/{len(sampler.timesteps) - executed + n}", shape))[None]
            d = drawn / drawn.norm() * g.norm()
        if unit:
            z = sampler.ddim(z + omega * z.norm() / d.norm() * d, psi, t)
        else:
            z = sampler.ddim(z, psi - omega * (1 - sampler.abar[t]).sqrt().float() * d, t)
    with torch.no_grad():
        return Made(sampler.decode(z) / 2 + 0.5, z, z, z, first or 0.0)


# Models for arithmetic by hand ---------------------------------------------------------------------------------------


@dataclass
class Rows:
    """A condition without content that can be indexed by rows."""

    count: int

    def __getitem__(self, rows: Any) -> Rows:
        return Rows(len(rows))


@dataclass
class ToyPrior:
    """Latents are images; every image has the latent `z0` (or itself), and the noise prediction is slope * z_t."""

    scheduler: Any
    slope: float = 0.0
    z0: torch.Tensor | None = None
    channels: int = 3
    called: list[int] = field(default_factory=list)  # timesteps of predict
    seen: list[torch.Tensor] = field(default_factory=list)  # latents of predict
    space: str = "pixels"
    decode_needs_grad: bool = True

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.channels, height, width

    def schedule(self, solver: Any, steps: int, run: int | None = None, spacing: Any = None,
                 latent: Any = None) -> Schedule:
        return schedule_of(self.scheduler, solver, steps, run, spacing)

    def embed(self, prompts: Any, negatives: Any, guidance: float) -> Rows:
        return Rows(len(prompts))

    def encode(self, x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        return x if self.z0 is None else self.z0.expand(len(x), *self.z0.shape[1:])

    def decode(self, z: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return z

    def predict(self, z_t: torch.Tensor, at: Point, cond: Any) -> Prediction:
        self.called.append(int(at.label))
        self.seen.append(z_t.detach())
        eps = self.slope * torch.sin(z_t) if self.slope else torch.zeros_like(z_t)
        return prediction("epsilon", eps, z_t, at)


class MeanGuide:
    """Features are the mean of each channel after normalisation; logits are the features times `scale`."""

    def __init__(self, channels: int = 3, scale: float = 1.0) -> None:
        self.mean, self.std = torch.zeros(1, channels, 1, 1), torch.ones(1, channels, 1, 1)
        self.scale, self.size, self.calls = scale, (4, 4), 0

    def features(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return ((x - self.mean) / self.std).mean(dim=(2, 3))

    def head(self, h: torch.Tensor) -> torch.Tensor:
        return self.scale * h


class Exploding(MeanGuide):
    """Finite features, one row of which has an infinite gradient."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row

    def features(self, x: torch.Tensor) -> torch.Tensor:
        f = super().features(x)
        if f.requires_grad:
            f.register_hook(lambda g: g.index_fill(0, torch.tensor([self.row]), float("inf")))
        return f


@dataclass(frozen=True)
class Fixed:
    """The streams of a row, some of them replaced by a constant or an array."""

    rng: Any
    streams: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rng, name)

    def __call__(self, stream: str) -> Any:
        return self.rng(stream)

    def _given(self, stream: str, shape: tuple[int, ...]) -> np.ndarray:
        values = np.asarray(self.streams[stream], np.float32)
        return np.broadcast_to(values.reshape(values.shape + (1,) * (len(shape) - values.ndim)), shape).copy()

    def normals(self, stream: str, shape: tuple[int, ...]) -> np.ndarray:
        return self._given(stream, shape) if stream in self.streams else self.rng.normals(stream, shape)

    def uniforms(self, stream: str, shape: tuple[int, ...]) -> np.ndarray:
        return self._given(stream, shape) if stream in self.streams else self.rng.uniforms(stream, shape)


class Watched:
    """Any model, with its calls counted and its decoded latents kept."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.calls: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.decoded: list[tuple[torch.Tensor, torch.Tensor]] = []  # (latent, pixels)
        self.graphs: dict[str, int] = {}  # calls whose input carries a graph

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        if name not in ("encode", "decode", "predict", "features"):
            return found

        def call(x: torch.Tensor, *rest: Any) -> Any:
            out = found(x, *rest)
            self.calls[name] = self.calls.get(name, 0) + 1
            self.rows[name] = self.rows.get(name, 0) + len(x)
            self.graphs[name] = self.graphs.get(name, 0) + x.requires_grad
            if name == "decode":
                self.decoded.append((x.detach(), out.detach()))
            return out

        return call


def peak_saved(call: Any, *models: Any) -> int:
    """Largest number of bytes that autograd keeps for backward passes at one time while `call` runs, without those of
    the weights of `models`."""
    weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    now, peak = 0, 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal now, peak
            self.tensor = tensor
            self.nbytes = 0 if tensor.untyped_storage().data_ptr() in weights else tensor.nbytes
            now += self.nbytes
            peak = max(peak, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        call()
    return peak
