"""GIF-MAE and GIF-DALLE against literal one-image references, and the switches of GIF that came with them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import ValidationError

from rayexpand.contract.protocols import Batch, Calls, Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import Start
from rayexpand.contract.settings import digest
from rayexpand.diffusion import perturb
from rayexpand.methods import load_method, names
from rayexpand.methods.gif import UNUSED, Gif
from rayexpand.models.guides import load_guide
from rayexpand.models.prior import inspect_prior, load_prior
from rayexpand.models.prior_sampling import sampling_problems
from tests.methods import references
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.methods.references import Watched
from tests.models.gif_priors import tiny_mae, tiny_unclip
from tests.tiny import tiny_clip

torch.set_num_threads(1)
ROWS = [("a", 0, 0), ("b", 1, 1), ("a", 0, 1), ("b", 1, 0), ("a", 0, 2)]
SHORT = {"mae": {"generator": "mae"}, "unclip": {"generator": "unclip", "steps": 4, "guidance_scale": 2.0, "eps": 0.5}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generators")
    tiny_mae(folder / "mae")
    tiny_unclip(folder / "unclip", tiny_clip(folder / "guide"))
    return folder


@pytest.fixture(scope="module")
def of(root: Path) -> Any:
    """Tools of a generator, by its name."""
    guide = load_guide(str(root / "guide"), None, CLASSES.name, device="cpu")
    return cache(lambda kind: Tools(CLASSES, load_prior(str(root / kind), device="cpu"), guide))


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """(z, e, b) of every perturbation that is applied."""
    seen, plain = [], perturb.apply

    def apply(z: torch.Tensor, e: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((z.detach(), e.detach(), b.detach()))
        return plain(z, e, b)

    monkeypatch.setattr(perturb, "apply", apply)
    return seen


class Decoded(Watched):
    """Takes what a decoder of embeddings is told beside them."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        if name not in ("encode", "decode"):
            return found

        def call(x: torch.Tensor, *rest: Any) -> Any:
            out = found(x, *rest)
            self.calls[name] = self.calls.get(name, 0) + 1
            self.graphs[name] = self.graphs.get(name, 0) + x.requires_grad
            if name == "decode":
                self.decoded.append((x.detach(), out.detach()))
            return out

        return call


def run(method: Gif, batch: Batch, tools: Tools) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Expansion, and the latents and pixels of its last decode of all rows."""
    prior = Decoded(tools.prior)
    made = method.expand(batch, replace(tools, prior=prior))
    size, last = method.forward_chunk or len(batch), []
    while sum(len(z) for z, _ in last) < len(batch):
        last.insert(0, prior.decoded.pop())
    latent, pixels = (torch.cat(part) for part in zip(*last, strict=True))
    assert size >= len(last[0][0])
    return made, latent[:len(batch)], pixels[:len(batch)]


# Literal references --------------------------------------------------------------------------------------------------


@dataclass
class Made:
    """What a reference made of one image."""

    latent: torch.Tensor
    pixels: torch.Tensor
    e: torch.Tensor
    b: torch.Tensor
    energy: float
    terms: dict[str, float] = field(default_factory=dict)


def literal(kind: str, method: Gif, prior: Any, guide: Any, image: np.ndarray, rngs: list[Any]) -> list[Made]:
    """One group of copies of one seed, one image at a time, straight from algorithm 1, by the plain libraries."""
    seed = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1

    def clip(pixels: torch.Tensor) -> torch.Tensor:
        return guide.model.encode_image(pixels)[0]

    if kind == "mae":
        model, order = prior.model, torch.arange(16)[None]
        model.config.mask_ratio = 0.0
        with torch.no_grad():
            f = model.vit(seed, noise=order.float()).last_hidden_state  # (1, 17, 16): tokens first
        model.config.mask_ratio = 0.75
        shape = (16, 17) if method.level == "pixel" else (16, 1)

        def place(noise: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(noise).T[None].clone()

        def draw(tokens: torch.Tensor) -> torch.Tensor:
            return model.unpatchify(model.decoder(tokens, ids_restore=order).logits)

        def look(tokens: torch.Tensor) -> torch.Tensor:
            pixels = draw(tokens).clamp(-1, 1)
            return clip((pixels + 1) / 2 if method.clip_input == "official" else pixels)
    else:
        with torch.no_grad():
            f = clip(seed)[None]
        shape = (16,)
        place = lambda noise: torch.from_numpy(noise)[None].clone()  # noqa: E731
        look = lambda embedding: embedding[0]  # noqa: E731

    def s(features: torch.Tensor) -> torch.Tensor:
        return torch.softmax(guide.scale * guide.texts_KD @ (features / features.norm()), dim=0)

    with torch.no_grad():
        said = seed / 2 + 0.5
        if method.clip_input == "official":
            said = (said - torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)) / torch.tensor(
                [0.2023, 0.1994, 0.2010]).view(3, 1, 1)
        s_seed = s(clip(said if method.clip_input == "official" else seed))
    anchor = int(s_seed.argmax())
    es = [place(rng.uniforms("e", shape)).requires_grad_() for rng in rngs]
    bs = [place(rng.normals("b", shape)).requires_grad_() for rng in rngs]
    us = [(1 + e) * f + b for e, b in zip(es, bs, strict=True)]
    features = [look(u) for u in us]
    differ = ([u.transpose(1, -1).flatten() if u.ndim == 3 else u[0] for u in us] if method.diversity_in == "latent"
              else [one / one.norm() for one in features])
    mean = torch.softmax(torch.stack(differ).mean(0), dim=0)
    total, terms = torch.zeros(()), []
    for k, (one, d) in enumerate(zip(features, differ, strict=True)):
        p, q = s(one), torch.softmax(d, dim=0)
        gain = -(p * p.log()).sum() + (s_seed * s_seed.log()).sum()
        kl = (mean * (mean / q).log()).sum() if method.kl_direction == "official" else (q * (q / mean).log()).sum()
        own = method.lambda_cls * p[anchor] if k == 0 or method.class_term_on == "all" else 0.0
        total = total + own + method.lambda_ent * gain + method.lambda_div * kl
        terms.append({"class_term": p[anchor].item(), "entropy_gain": gain.item(), "diversity": kl.item()})
    gradients = torch.autograd.grad(total, [*es, *bs])
    made = []
    for k, rng in enumerate(rngs):
        e = (es[k] + method.step * gradients[k].sign()).detach()
        b = (bs[k] + method.step * gradients[len(rngs) + k].sign()).detach()
        out = f + torch.clamp((1 + e) * f + b - f, -method.eps, method.eps)
        with torch.no_grad():
            pixels = draw(out) / 2 + 0.5 if kind == "mae" else painted(prior, method, out, rng)
        made.append(Made(out, pixels, e, b, total.item(), terms[k]))
    return made


def painted(prior: Any, method: Gif, embedding: torch.Tensor, rng: Any) -> torch.Tensor:
    """One image by diffusers' own scheduler and models."""
    from diffusers import DDIMScheduler
    from diffusers.models.embeddings import get_timestep_embedding

    inner, scheduler = prior.decoder, DDIMScheduler.from_config(prior.decoder.scheduler.config)
    scheduler.set_timesteps(method.steps)
    level = torch.tensor([method.embedding_noise])
    scaled = (embedding - prior.normalizer.mean) / prior.normalizer.std
    noisy = prior.noising.add_noise(scaled, torch.from_numpy(rng.normals("level", (16,)))[None], level)
    told = torch.cat([noisy * prior.normalizer.std + prior.normalizer.mean, get_timestep_embedding(
        level, 16, flip_sin_to_cos=True, downscale_freq_shift=0)], dim=1)
    tokens = inner.tokenizer("", padding="max_length", max_length=inner.tokenizer.model_max_length,
                             return_tensors="pt").input_ids
    text, z = inner.text_encoder(tokens).last_hidden_state, torch.from_numpy(rng.normals("noise", (4, 8, 8)))[None]
    for t in scheduler.timesteps:
        nothing, followed = (inner.unet(z, t, encoder_hidden_states=text, class_labels=one).sample
                             for one in (torch.zeros_like(told), told))
        z = scheduler.step(nothing + method.guidance_scale * (followed - nothing), t, z).prev_sample
    return inner.vae.decode(z / inner.vae.config.scaling_factor).sample / 2 + 0.5


SETTINGS = [{}, {"kl_direction": "official"}, {"class_term_on": "first"}, {"lambda_cls": 0.0}, {"group_size": 2},
            {"lambda_cls": 0.0, "lambda_ent": 0.0}, {"forward_chunk": 2}]
OF_IMAGES = [{"chunk": 2}, {"level": "pixel"}, {"diversity_in": "latent"}, {"diversity_in": "latent", "chunk": 2},
             {"diversity_in": "latent", "lambda_cls": 0.0, "lambda_ent": 0.0, "chunk": 2}, {"clip_input": "official"}]


@pytest.mark.parametrize(("kind", "settings"), [
    *(("mae", one) for one in (*SETTINGS, *OF_IMAGES)),
    *(("unclip", one) for one in (*SETTINGS, {"embedding_noise": 200}))], ids=str)
@pytest.mark.fast_cases(7)
def test_batched_equals_one_image_at_a_time(of: Any, updates: Any, kind: str, settings: dict[str, Any]) -> None:
    method, tools = Gif(**{**SHORT[kind], **settings}), of(kind)
    batch = batch_of(method, CLASSES, ROWS)
    made, latent, pixels = run(method, batch, tools)
    _, e, b = updates[-1]
    pair = method.group_size or 3
    for members in [part for copies in ([0, 2, 4], [3, 1])
                    for part in (copies[start:start + pair] for start in range(0, len(copies), pair))]:
        group = literal(kind, method, tools.prior, tools.guide, batch.images[members[0]],
                        [batch.rngs[i] for i in members])
        for i, one in zip(members, group, strict=True):
            for ours, theirs in ((e, one.e), (b, one.b), (latent, one.latent)):
                torch.testing.assert_close(ours[i:i + 1], theirs.transpose(1, -1) if kind == "mae" else theirs,
                                           atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(pixels[i:i + 1], one.pixels, atol=1e-5, rtol=1e-5)
            for name, value in one.terms.items():
                assert made.scores[f"{name}_before"][i] == pytest.approx(value, abs=1e-5)
        assert sum(made.scores["score_before"][i] for i in members) == pytest.approx(group[0].energy, abs=1e-4)
    assert made.reasons == [None] * 5


@pytest.mark.parametrize("kind", ["mae", "unclip"])
def test_a_step_raises_the_score_of_a_small_step(of: Any, kind: str) -> None:
    method = Gif(**{**SHORT[kind], "eps": float("inf"), "step": 0.002, "measure": True})
    scores = method.expand(batch_of(method, CLASSES, ROWS), of(kind)).scores
    np.testing.assert_allclose(scores["score_random"], scores["score_before"], atol=1e-5)
    assert sum(scores["score_after"]) > sum(scores["score_before"])


def test_chunks_of_one_two_and_all_copies_make_the_same_update(of: Any, updates: Any) -> None:
    outcomes = []
    for chunk in (1, 2, 4, None):
        method = Gif(generator="mae", chunk=chunk, forward_chunk=chunk, diversity_in="latent")
        run(method, batch_of(method, CLASSES, ROWS), of("mae"))
        outcomes.append(updates[-1])
    for found in outcomes[:-1]:
        for ours, theirs in zip(found, outcomes[-1], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_thirty_copies_run_in_the_memory_of_two(of: Any) -> None:
    tools = of("mae")

    def peak(copies: int, chunk: int | None) -> int:
        method = Gif(generator="mae", chunk=chunk, forward_chunk=chunk)
        batch = batch_of(method, CLASSES, [("a", 0, copy) for copy in range(copies)])
        return references.peak_saved(lambda: method.expand(batch, tools), tools.prior.model, tools.guide.model)

    two = peak(2, None)
    assert peak(30, 2) < 1.1 * two
    assert peak(30, None) > 10 * two


def test_thirty_copies_of_an_embedding(of: Any) -> None:
    method = Gif(**{**SHORT["unclip"], "forward_chunk": 4})
    made, latent, pixels = run(method, batch_of(method, CLASSES, [("a", 0, copy) for copy in range(30)]), of("unclip"))
    assert made.reasons == [None] * 30
    assert (len(latent), len(pixels)) == (30, 30)
    assert len({image.tobytes() for image in made.images}) == 30


# Identities ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mae", "unclip"])
def test_without_room_to_move_it_is_the_plain_generator_to_the_bit(of: Any, kind: str) -> None:
    """A reconstruction, or an image variation."""
    tools, batch = of(kind), batch_of(Gif(**SHORT[kind]), CLASSES, ROWS)
    expected = run(Gif(**SHORT[kind], guidance="none"), batch, tools)[2]
    x = torch.from_numpy(np.stack(batch.images)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        z = tools.prior.encode(x, None)
        if kind == "mae":
            torch.testing.assert_close(expected, tools.prior.decode(z), atol=1e-6, rtol=0)
        else:
            each = torch.cat([painted(tools.prior, Gif(**SHORT[kind]), z[i:i + 1], batch.rngs[i]) for i in range(5)])
            torch.testing.assert_close(expected, each, atol=1e-5, rtol=0)
    for guidance in ("guided", "random"):
        still = Gif(**{**SHORT[kind], "eps": 0.0, "guidance": guidance})
        assert torch.equal(run(still, batch, tools)[2], expected)
    random = run(Gif(**SHORT[kind], guidance="random"), batch, tools)[2]
    assert torch.equal(run(Gif(**SHORT[kind], step=0.0), batch, tools)[2], random)
    assert not torch.equal(run(Gif(**SHORT[kind]), batch, tools)[2], random)
    assert not torch.equal(random, expected)
    copies = expected[[0, 2, 4]]
    assert torch.equal(copies, copies[:1].expand_as(copies)) == (kind == "mae")  # a variation has noise of its own


@pytest.mark.parametrize("kind", ["mae", "unclip"])
def test_the_box_is_kept(of: Any, updates: Any, kind: str) -> None:
    method = Gif(**{**SHORT[kind], "eps": 0.05})
    _, latent, _ = run(method, batch_of(method, CLASSES, ROWS), of(kind))
    moved = (latent - updates[-1][0]).abs()
    assert float(moved.max()) <= 0.05 + 1e-6
    assert float((moved > 0.0499).float().mean()) > 0.5


@pytest.mark.parametrize("kind", ["mae", "unclip"])
def test_another_seed_of_the_call_changes_nothing(of: Any, kind: str) -> None:
    method, tools = Gif(**SHORT[kind]), of(kind)
    batch = batch_of(method, CLASSES, ROWS)
    other = batch_of(method, CLASSES, [("a", 0, 0), ("x", 2, 1), ("a", 0, 1), ("x", 2, 0), ("a", 0, 2)])
    ours, theirs = (method.expand(one, tools).images for one in (batch, other))
    for i in (0, 2, 4):
        np.testing.assert_array_equal(ours[i], theirs[i])
    order = [4, 1, 0, 3, 2]
    mixed = Batch(*(tuple(part[i] for i in order) for part in (batch.draws, batch.images, batch.rngs, batch.filler)))
    for image, i in zip(method.expand(mixed, tools).images, order, strict=True):
        np.testing.assert_array_equal(image, ours[i])


@pytest.mark.parametrize(("kind", "settings", "decodes", "guide", "graphs"), [
    ("mae", {}, 2, 2, 1), ("mae", {"guidance": "random"}, 1, 0, 0), ("mae", {"measure": True}, 3, 4, 1),
    ("unclip", {}, 1, 0, 0), ("unclip", {"measure": True}, 1, 0, 0), ("unclip", {"guidance": "none"}, 1, 0, 0)],
    ids=str)
def test_calls_of_one_batch(of: Any, kind: str, settings: dict[str, Any], decodes: int, guide: int,
                            graphs: int) -> None:
    """Guidance in the space of embeddings calls no network at all."""
    tools = of(kind)
    prior, watched = Decoded(tools.prior), Watched(tools.guide)
    method = Gif(**SHORT[kind], **settings)
    method.expand(batch_of(method, CLASSES, ROWS), replace(tools, prior=prior, guide=watched))
    assert (prior.calls["encode"], prior.calls["decode"], watched.calls.get("features", 0)) == (1, decodes, guide)
    assert prior.graphs["decode"] == graphs


def test_what_a_plan_counts() -> None:
    plain = Calls(steps=7.0, decodes=1.0, encodes=0.2)
    assert Gif(generator="unclip").calls(plain, 8) == Calls(steps=7.0, decodes=1.0)
    assert Gif(generator="mae").calls(Calls(decodes=1.0, encodes=0.2), 8) == Calls(decodes=2.0, encodes=0.2,
                                                                                   decodes_back=1.0)
    assert Gif(shared_diffusion=True).calls(plain, 8) == Calls(steps=1.4, decodes=2.0, encodes=0.2, decodes_back=1.0)


# Settings ------------------------------------------------------------------------------------------------------------


def draw(method: Gif, copy: int = 0) -> Any:
    return method.draw("s", 2, copy, 0, CLASSES, RowRng(0, "gif", "s", copy))


def test_defaults_are_the_generators() -> None:
    mae, unclip = Gif(generator="mae"), Gif(generator="unclip")
    assert (mae.eps, mae.steps, mae.strength, mae.guidance_scale, mae.diversity_in) == (5.0, None, None, None, "guide")
    assert (unclip.eps, unclip.steps, unclip.strength, unclip.guidance_scale, unclip.diversity_in) == (
        0.1, 100, None, 4.0, "latent")
    for method, strength, steps in ((mae, 0.0, 0), (unclip, 1.0, 100)):
        found = draw(method)
        assert (found.prompt, found.negative, found.start) == ("", "", Start.IMAGE)
        assert (found.strength, found.steps_run) == (strength, steps)
        assert method.needs() == {"prior", "guide"}
        assert load_method("gif", method.model_dump(exclude={"name"})) == method
        assert not set(method.model_dump()) & set(UNUSED[method.generator])


@pytest.mark.parametrize(("kind", "fields", "words"), [
    ("mae", {"strength": 0.5, "domains": ["a"]}, "domains, strength: no meaning for generator mae"),
    ("mae", {"steps": 20}, "steps: no meaning for generator mae"),
    ("mae", {"guidance_scale": 4}, "guidance_scale: no meaning for generator mae"),
    ("unclip", {"domains": ["a"], "adjectives": ["b"]}, "domains, adjectives: no meaning for generator unclip"),
    ("unclip", {"strength": 0.9}, "strength: no meaning for generator unclip"),
    ("unclip", {"level": "pixel"}, "level: no meaning for generator unclip"),
    ("unclip", {"steps": None}, "steps: null, and generator unclip needs a number"),
    ("sd", {"strength": None}, "strength: null, and generator sd needs a number"),
    ("sd", {"embedding_noise": 3}, "embedding_noise: no meaning for generator sd"),
    ("sd", {"guide_text": "a photo"}, "{name} and no other placeholder must stand in it"),
    ("sd", {"guide_text": "a {noun} {name}"}, "{name} and no other placeholder must stand in it")], ids=str)
def test_fields_without_a_meaning_are_refused(kind: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as error:
        Gif(generator=kind, **fields)
    assert words in str(error.value)


def test_what_began_before_keeps_its_digest() -> None:
    """Of the fields there were, under their first defaults."""
    assert digest(Gif().model_dump(mode="json")) == "da22454d43e076e3c3dee6894a9b8dc4d61e592466c9d5b6474cc9535e653d6a"
    other = Gif(eps=4, strength=0.5, group_size=2)
    assert digest(other.model_dump(mode="json")) == "3271b614aa4f28a582c0e56b9756e522ff2f6e5ec48cb7a94d9d93cbc0f88e10"


def test_a_generator_goes_with_methods_that_can_sample_it(root: Path, tmp_path: Path) -> None:
    mae, unclip = (inspect_prior(str(root / kind)) for kind in ("mae", "unclip"))
    sd = inspect_prior("digits")
    assert sampling_problems(mae, Gif(generator="mae")) == sampling_problems(unclip, Gif(generator="unclip")) == []
    for facts, method, words in (
            (mae, Gif(), "method.generator: sd is for a latent diffusion model"),
            (sd, Gif(generator="mae"), "method.generator: mae is for a masked autoencoder"),
            (unclip, Gif(generator="mae"), "is a decoder of image embeddings (unCLIP); set method.generator: unclip")):
        (problem,) = sampling_problems(facts, method)
        assert words in problem
    for name in set(names()) - {"gif", "classical"}:
        method = load_method(name, {"finetuned": False} if name == "realfake" else {})
        for facts in (mae, unclip):
            (problem,) = sampling_problems(facts, method)
            assert ("guidance: none" if name == "vae" else "which follows no prompt") in problem
            assert name in problem


# Switches of GIF-SD --------------------------------------------------------------------------------------------------

QUICK = {"steps": 10, "strength": 0.3, "guidance_scale": 2.0, "rotation": 0.0, "flip": False}


def test_one_diffusion_for_all_copies_of_a_seed(tools: Tools, updates: Any) -> None:
    method = Gif(**QUICK, shared_diffusion=True)
    drawn = [draw(method, copy).prompt for copy in range(8)]
    assert len(set(drawn)) == 1
    assert drawn[0] == draw(Gif(), 0).prompt
    batch = batch_of(method, CLASSES, ROWS)
    method.expand(batch, tools)
    z, e, _ = updates[-1]
    assert torch.equal(z[[0, 0, 1]], z[[2, 4, 3]])
    assert not torch.equal(z[0], z[1])
    assert not torch.equal(e[0], e[2])
    own = batch_of(Gif(**QUICK), CLASSES, [("a", 0, 0), ("b", 1, 0)])
    Gif(**QUICK).expand(own, tools)
    torch.testing.assert_close(updates[-1][0], z[[0, 3]], atol=1e-5, rtol=1e-5)  # that of the first copy


def test_one_diffusion_costs_one_of_each_seed_and_does_not_depend_on_mates(tools: Tools) -> None:
    rows: list[int] = []

    class Counting(Watched):
        def predict(self, z_BCHW: torch.Tensor, at: Any, cond: Any) -> Any:
            rows.append(len(z_BCHW))
            return self._model.predict(z_BCHW, at, cond)

    method, counting = Gif(**QUICK, shared_diffusion=True), replace(tools, prior=Counting(tools.prior))
    batch = batch_of(method, CLASSES, [("a", 0, copy) for copy in range(5)])
    ours = method.expand(batch, counting).images
    assert set(rows) == {1}
    mates = batch_of(method, CLASSES, [("a", 0, 3), *((f"m{i}", 1, 0) for i in range(4))])
    alone = batch_of(method, CLASSES, [("a", 0, 3), *((f"n{i}", 1, 0) for i in range(4))])
    np.testing.assert_array_equal(method.expand(mates, counting).images[0], method.expand(alone, counting).images[0])
    assert set(rows) == {1}
    assert len(ours) == 5


def test_the_diversity_of_latents_and_the_released_input_of_clip(tools: Tools, updates: Any) -> None:
    """In one call of GIF-SD, by hand; `test_batched_equals_one_image_at_a_time` has both with another generator."""
    method = Gif(**QUICK, diversity_in="latent", clip_input="official", lambda_cls=0.0, lambda_ent=0.0)
    batch = batch_of(method, CLASSES, [("a", 0, 0), ("a", 0, 1)])
    made = method.expand(batch, tools)
    z = updates[-1][0]
    e, b = (torch.from_numpy(noise) for noise in (batch.uniforms("e", (4, 1, 1)), batch.normals("b", (4, 1, 1))))
    u = ((1 + e) * z + b).flatten(1)
    mean = u.mean(0).log_softmax(0)
    expected = (u.softmax(1) * (u.log_softmax(1) - mean)).sum(1)
    np.testing.assert_allclose(made.scores["diversity_before"], expected, rtol=1e-4)
    with torch.no_grad():
        seed = torch.from_numpy(batch.images[0].copy()).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]))
        seen = F.normalize(tools.guide.model.encode_image((seed - mean)[None] / std), dim=1)
        s = (tools.guide.scale * seen @ tools.guide.texts_KD.T).softmax(1)[0]
        x = tools.prior.decode(perturb.apply(z, e, b)).clamp(0, 1)
        seen = F.normalize(tools.guide.model.encode_image(x), dim=1)
        p = (tools.guide.scale * seen @ tools.guide.texts_KD.T).softmax(1)
    np.testing.assert_allclose(made.scores["class_term_before"], p[:, s.argmax()], rtol=1e-3)


@pytest.mark.parametrize("asked", ["a photo of a {name}", "This is a photo of a {name}"])
def test_what_clip_is_asked(root: Path, asked: str) -> None:
    """The texts of the head, by open_clip itself."""
    import open_clip

    guide = load_guide(str(root / "guide"), None, ["rain boot", "cup"], device="cpu", prompt=asked)
    words = open_clip.get_tokenizer(f"local-dir:{root / 'guide'}")([asked.format(name=name) for name in (
        "rain boot", "cup")])
    with torch.no_grad():
        texts = F.normalize(guide.model.encode_text(words), dim=1)
    torch.testing.assert_close(guide.texts_KD, texts, atol=1e-6, rtol=0)
    assert not torch.allclose(texts[0], texts[1], atol=1e-3)


def test_the_text_that_a_run_asks_is_that_of_its_method(root: Path) -> None:
    from rayexpand.runs.config import parse
    from rayexpand.runs.tools import load_tools

    heads = [load_tools(parse({
        "name": "a", "data": {"source": "digits"}, "prior": {"weights": str(root / "mae"), "device": "cpu"},
        "guide": {"weights": str(root / "guide")}, "method": {"name": "gif", "generator": "mae", **asked}}), CLASSES)
        .guide.texts_KD for asked in ({}, {"guide_text": "This is a photo of a {name}"})]
    assert not torch.allclose(*heads, atol=1e-3)
