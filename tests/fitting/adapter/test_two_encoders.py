"""Fine-tuning of Stable Diffusion XL: class tokens in both text encoders, pooled where the text ends, against diffusers
and by hand; its adapters, visual tokens of two image encoders, and what is refused before anything is made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the customary name)
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rayexpand.artifacts.adapter import ADAPTER, LORA, TOKENS, read_adapter
from rayexpand.artifacts.columns import CLASS_FEATURES, feature_facts, write_class_features, write_image_features
from rayexpand.artifacts.store import read_facts
from rayexpand.contract.class_tokens import add_class_tokens, class_token
from rayexpand.contract.errors import ModelError
from rayexpand.fitting import fit as fits
from rayexpand.fitting.adapter.finetuner import Finetuner, LatentBatch
from rayexpand.fitting.adapter.recipe import make_finetune
from rayexpand.fitting.config import parse_fit, preflight
from rayexpand.models.guides import guide_hash
from rayexpand.models.latent import StableDiffusionPrior
from rayexpand.models.prior import load_prior, prior_hash
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from tests.conftest import complete, hashes
from tests.fitting.adapter.ranks import run_processes
from tests.tiny import tiny_adapter, tiny_clip, tiny_pipeline

torch.set_num_threads(1)
KEYS = ("ant", "bee", "cat", "dog")
N, SIDE, WIDTHS = 4, 32, (16, 32)  # classes, pixels, widths of the two encoders
SHORT = {"steps": 3, "batch": 4, "rank": 2, "lr": 1e-2, "token_lr": 1e-2, "init_token": "digit"}
PROMPT = {"ti": "a {token} shape", "ti_db": "a {token} shape", "db": "a {name}"}
TEXTS = ["a <class_1> shape", "a photo of a <class_3>", "a seven"]


def as_published(folder: Path, base: Path) -> Path:
    """A copy of an SDXL folder whose vocabularies end with the end of text and whose encoders are configured as the
    published ones, eos_token_id 2, so that they pool at the largest id."""
    shutil.copytree(base, folder)
    for end in ("", "_2"):
        file = folder / f"tokenizer{end}"
        own = CLIPTokenizer.from_pretrained(file)
        merges = json.loads((file / "tokenizer.json").read_text())["model"]["merges"]
        specials = ("<|startoftext|>", "<|endoftext|>")
        words = [*(word for word in sorted(own.get_vocab(), key=own.get_vocab().get) if word not in specials),
                 *specials]
        CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[tuple(one) for one in merges],
                      model_max_length=own.model_max_length, pad_token=own.pad_token).save_pretrained(file)
        config = folder / f"text_encoder{end}/config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "bos_token_id": 0, "eos_token_id": 2}))
    return folder


@pytest.fixture(scope="module")
def xl(family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_published(tmp_path_factory.mktemp("xl") / "base", family_folder("sdxl"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Guides whose features are as wide as the hidden states of either encoder."""
    root = tmp_path_factory.mktemp("clips")
    return [tiny_clip(root / str(width), seed=width, features=width) for width in WIDTHS]


@pytest.fixture
def raw(image_folder: Path, tmp_path: Path, xl: Path) -> Callable[..., dict[str, Any]]:
    """A fit file that fine-tunes the tiny SDXL."""
    def make(recipe: dict[str, Any], base: Path = xl, **fields: Any) -> dict[str, Any]:
        adapter = {"recipe": recipe, "checkpoint_every": 2, "log_every": 1, "sheet": None, "tensorboard": False,
                   "resolution": SIDE, "latents": {"dtype": "float32"}, **fields}
        return {"name": "ants", "out": str(tmp_path / "artifacts"), "prior": {"weights": str(base)}, "device": "cpu",
                "data": {"source": "imagefolder", "path": str(image_folder)}, "fit": {"adapter": adapter}}
    return make


def recipe_of(strategy: str, **fields: Any) -> dict[str, Any]:
    return {**SHORT, "strategy": strategy, "prompt": PROMPT[strategy], **fields}


def fit(config: dict[str, Any]) -> dict[str, Path]:
    return fits.fit(parse_fit(config), lambda *_: None)


def tuner_of(prior: StableDiffusionPrior, strategy: str = "ti_db", **fields: Any) -> Finetuner:
    options = {name: fields.pop(name) for name in ("wrap", "world") if name in fields}
    return Finetuner(prior.unet, prior.texts, prior.scheduler, make_finetune(recipe_of(strategy, **fields)), N, 0,
                     vae_factor=prior.vae_factor, **options)


def loaded(xl: Path) -> StableDiffusionPrior:
    return load_prior(str(xl), dtype="float32", device="cpu")


def batch(step: int = 0, rows: int = 4, **fields: Any) -> LatentBatch:
    rng = np.random.default_rng(step)
    z0, noise = (torch.from_numpy(x) for x in rng.standard_normal((2, rows, 4, 16, 16), np.float32))
    labels = rng.integers(3, size=rows)  # never the last class
    return LatentBatch(z0, noise, torch.from_numpy(rng.integers(1000, size=rows)),
                       [f"a {class_token(label)} shape" for label in labels], **fields)


class ByHand:
    """The condition and the loss as SDXL's paper and diffusers' training script have them, from transformers' and
    diffusers' own modules."""

    def __init__(self, folder: Path, init: str | None) -> None:
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        self.encoders = [kind.from_pretrained(folder / f"text_encoder{end}").eval()
                         for kind, end in zip(kinds, ("", "_2"), strict=True)]
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / f"tokenizer{end}") for end in ("", "_2")]
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.first, self.side = len(self.tokenizers[0]), SIDE
        if init is None:
            return
        for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True):
            add_class_tokens(tokenizer, N)
            encoder.resize_token_embeddings(self.first + N, mean_resizing=False)
            table = encoder.get_input_embeddings().weight
            with torch.no_grad():
                table[self.first:] = table[tokenizer(init).input_ids[1]]

    @property
    def tables(self) -> list[Tensor]:
        return [encoder.get_input_embeddings().weight for encoder in self.encoders]

    def condition(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        hidden, pooled = [], None
        for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True):
            ids = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
            out = encoder(ids, output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
            ends = [row.index(tokenizer.eos_token_id) for row in ids.tolist()]
            last = out.last_hidden_state[torch.arange(len(ids)), ends]
            pooled = encoder.text_projection(last) if hasattr(encoder, "text_projection") else None
        assert pooled is not None
        return torch.cat(hidden, dim=-1), pooled

    def unet_says(self, z_t: Tensor, t_B: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        side = float(self.side)
        ids = torch.tensor([[side, side, 0, 0, side, side]]).repeat(len(z_t), 1)
        return self.unet(z_t, t_B, tokens, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample

    def loss(self, data: LatentBatch, target: Tensor | None = None) -> Tensor:
        z_t = self.scheduler.add_noise(data.z0_BCHW, data.noise_BCHW, data.t_B)
        out = self.unet_says(z_t, data.t_B, *self.condition(list(data.text)))
        return F.mse_loss(out, data.noise_BCHW if target is None else target)


# -------------------------------------------------------------------------------------------------------- one step


def test_a_step_by_hand(xl: Path) -> None:
    """The loss of a batch and every gradient: rows of the class tokens in both tables, LoRA of one projection."""
    hand, model, data = ByHand(xl, "digit"), tuner_of(loaded(xl), clip=None), batch()
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    weight = hand.unet.get_submodule(layer).weight

    loss = model.update(data)
    expected = hand.loss(data)
    expected.backward()

    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    lora = model.unet.get_submodule(layer)
    assert weight.grad is not None
    torch.testing.assert_close(lora.lora_B["default"].weight.grad, weight.grad @ lora.lora_A["default"].weight.T,
                               rtol=2e-4, atol=1e-7)
    for rows_NE, table in zip(model._tokens.values(), hand.tables, strict=True):
        assert rows_NE.grad is not None
        assert table.grad is not None
        torch.testing.assert_close(rows_NE.grad, table.grad[hand.first:], rtol=2e-4, atol=1e-7)
        assert rows_NE.grad[:3].abs().sum() > 0
        assert not rows_NE.grad[3].any(), "no text of this batch has the last class"


def test_v_prediction_by_hand(xl: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(xl, tmp_path / "v"))
    file = base / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    hand, data = ByHand(base, "digit"), batch()

    loss = tuner_of(loaded(base)).update(data)

    target = hand.scheduler.get_velocity(data.z0_BCHW, data.noise_BCHW, data.t_B)
    assert loss == pytest.approx(float(hand.loss(data, target).detach()), rel=1e-6)


@pytest.mark.parametrize("change", ["pooled", "sizes", "swapped"])
@pytest.mark.fast_cases(1)
def test_the_loss_by_hand_sees_mistakes(xl: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hand, data = ByHand(xl, "digit"), batch()
    with torch.no_grad():
        tokens, pooled = hand.condition(list(data.text))
    mistaken = {"pooled": (tokens, 0 * pooled), "swapped": (tokens.roll(16, -1), pooled), "sizes": (tokens, pooled)}
    monkeypatch.setattr(hand, "condition", lambda texts: mistaken[change])
    hand.side = SIDE if change != "sizes" else 16
    assert abs(tuner_of(loaded(xl)).update(data) - float(hand.loss(data).detach())) > 1e-4


MOVES = {"ti": {"rows_NE"}, "db": {"lora_A", "lora_B"}, "ti_db": {"lora_A", "lora_B", "rows_NE"}}


@pytest.mark.parametrize("strategy", MOVES)
def test_only_what_is_allowed_moves(xl: Path, strategy: str) -> None:
    model = tuner_of(loaded(xl), strategy)
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    texts = [f"a {class_token(label)} shape" for label in range(N)] if strategy != "db" else list(KEYS)

    for step in range(3):
        model.update(batch(step)._replace(text=texts))

    moved = {name for name, p in model.module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if any(kind in name for kind in MOVES[strategy])} == set(model.trainable)
    assert {name.partition(".")[0] for name in moved if "rows_NE" in name} == (
        set() if strategy == "db" else {"text_encoder", "text_encoder_2"})
    assert {name.partition(".")[0] for name in before} == {"unet", "text_encoder", "text_encoder_2"}
    for name, p in model.module.named_parameters():
        assert (p.grad is not None) == (name in model.trainable), name


def test_a_new_adapter_changes_no_bit(xl: Path) -> None:
    hand, model = ByHand(xl, None), tuner_of(loaded(xl))
    z_t, t_B = batch(0, 2).z0_BCHW, torch.tensor([3, 700])
    with torch.no_grad():
        found = model.module(z_t, t_B, model.ids(["a photo of a seven", ""]))
        expected = hand.unet_says(z_t, t_B, *hand.condition(["a photo of a seven", ""]))
    assert torch.equal(found, expected)


def test_a_dropped_row_reads_what_no_text_is_to_the_sampler(xl: Path) -> None:
    """Zeros in hidden states and pooled text; the empty text's states where the folder does not force zeros."""
    for forced in (True, False):
        prior = loaded(xl)
        prior.texts.zero_empty_negative = forced
        model, data = tuner_of(prior, visual_token="instance"), batch()
        seen: list[dict[str, Any]] = []
        model.unet.register_forward_pre_hook(lambda _, args, kwargs, seen=seen: seen.append(kwargs), with_kwargs=True)
        negative = prior.embed([""], [""], 1.0)
        visual = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 48), np.float32))
        dropped = torch.tensor([False, True, False, False])
        with torch.no_grad():
            given = model.module.text(model.ids(data.text))

        model.update(data._replace(visual_BD=visual, dropped_B=dropped))

        (kwargs,) = seen
        text_BTE, pooled_BP = kwargs["encoder_hidden_states"].detach(), kwargs["added_cond_kwargs"]["text_embeds"]
        assert negative.negative_pooled_BP is not None
        assert torch.equal(text_BTE[:, -1][~dropped], visual[~dropped])
        assert torch.equal(text_BTE[:, :-1][~dropped], given.tokens[:, :-1][~dropped])
        torch.testing.assert_close(text_BTE[1], negative.negative_tokens_BTE[0])
        torch.testing.assert_close(pooled_BP.detach()[1], negative.negative_pooled_BP[0])
        assert bool(text_BTE[1].any()) != forced


@pytest.mark.slow
def test_bf16_freezes_small_and_trains_in_fp32(xl: Path) -> None:
    exact, model = tuner_of(loaded(xl), lr=1e-4), tuner_of(loaded(xl), lr=1e-4, precision="bf16")
    losses = [[one.update(batch(step)) for step in range(2)] for one in (exact, model)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert {p.dtype for p in model.trainable.values()} == {torch.float32}
    assert model.encoders[1].model.text_projection.weight.dtype == torch.bfloat16


def _worker(xl: Path, rank: int) -> dict[str, Tensor]:
    model, data = tuner_of(loaded(xl), wrap=DistributedDataParallel, world=2, clip=None), batch()
    model.update(LatentBatch(*(x[2 * rank:2 * rank + 2] for x in data[:4])))
    return {name: p.grad.contiguous() for name, p in model.trainable.items() if p.grad is not None}


@pytest.mark.slow
def test_two_workers_equal_one_process(xl: Path, tmp_path: Path) -> None:
    first, second = run_processes(2, partial(_worker, xl), tmp_path)
    alone = tuner_of(loaded(xl), clip=None)

    alone.update(batch())

    assert first.keys() == alone.trainable.keys()
    for name, parameter in alone.trainable.items():
        assert parameter.grad is not None
        assert torch.equal(first[name], second[name]), name
        assert float((first[name] - parameter.grad).norm()) <= 1e-5 * float(parameter.grad.norm()) + 1e-9, name


def test_a_restored_training_goes_on_bit_for_bit(xl: Path) -> None:
    straight = tuner_of(loaded(xl))
    straight.update(batch(0))
    saved = straight.state()
    loss = straight.update(batch(1))
    resumed = tuner_of(loaded(xl))
    resumed.restore(saved)

    assert resumed.update(batch(1)) == loss
    for name, parameter in straight.trainable.items():
        assert torch.equal(parameter, resumed.trainable[name]), name


# ----------------------------------------------------------------------------------------------------- end of text


def pooled_places(model: Any, run: Callable[[], Any]) -> list[int]:
    """Slots that the text model of an encoder took its pooled output from, by the normalised states it comes from."""
    places: list[int] = []

    def watch(_: Any, args: Any, out: Any) -> None:
        for states_TE, pooled_E in zip(out.last_hidden_state, out.pooler_output, strict=True):
            places.append(int((states_TE == pooled_E).all(dim=-1).nonzero()[0]))

    handle = model.text_model.register_forward_hook(watch)
    run()
    handle.remove()
    return places


def ends_of(tokenizer: CLIPTokenizer, texts: list[str]) -> list[int]:
    return [tokenizer(text).input_ids.index(tokenizer.eos_token_id) for text in texts]


def test_sampling_with_class_tokens_pools_at_the_end_of_the_text(xl: Path, tmp_path: Path) -> None:
    """Without the fix: in the slot of the class token, whose id is the largest of the text."""
    base = loaded(xl)
    prior = base.with_adapter(tiny_adapter(tmp_path / "ti", xl, KEYS, strategy="ti"), base_sha256=None)
    model, tokenizer = prior.text_encoder_2, prior.parts.tokenizer_2
    ends = ends_of(tokenizer, TEXTS)
    assert base.text_encoder_2.text_model.eos_token_id == 2, "as published"

    assert pooled_places(model, lambda: prior.embed(TEXTS, TEXTS, 1.0)) == ends
    model.text_model.eos_token_id = 2
    prior.texts.forget()
    assert pooled_places(model, lambda: prior.embed(TEXTS, TEXTS, 1.0)) == [2, 5, ends[2]], "else the test says nothing"


def test_training_with_class_tokens_pools_at_the_end_of_the_text(xl: Path) -> None:
    model = tuner_of(loaded(xl))
    encoder = model.encoders[1]

    found = pooled_places(encoder.model, lambda: model.module.text(model.ids(TEXTS)))

    assert found == ends_of(encoder.tokenizer, TEXTS)
    encoder.model.text_model.eos_token_id = 2
    assert pooled_places(encoder.model, lambda: model.module.text(model.ids(TEXTS))) != found


NEAR = {"rtol": 2e-5, "atol": 2e-5}  # on some CPUs bits depend on where in memory weights lie


def test_words_of_the_base_are_pooled_as_before(xl: Path, tmp_path: Path) -> None:
    base, texts = loaded(xl), ["a seven", "a photo of a zero", ""]
    prior = base.with_adapter(tiny_adapter(tmp_path / "ti", xl, KEYS, strategy="ti"), base_sha256=None)
    ours, before = (one.embed(texts, texts, 1.0) for one in (prior, base))
    assert ours.pooled_BP is not None
    assert before.pooled_BP is not None
    torch.testing.assert_close(ours.pooled_BP, before.pooled_BP, **NEAR)
    torch.testing.assert_close(ours.tokens_BTE, before.tokens_BTE, **NEAR)


# -------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("strategy", ["ti", "db", "ti_db"])
@pytest.mark.slow
def test_fitted_adapters_reload_to_what_was_trained(raw: Callable[..., Any], xl: Path, strategy: str) -> None:
    """The modules in training and the prior that loads the adapter say the same, and samples differ from those of the
    base."""
    kept: list[Finetuner] = []
    update = Finetuner.update

    def watched(self: Finetuner, data: LatentBatch) -> float:
        kept[:] = [self]
        return update(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finetuner, "update", watched)
        folder = fit(raw(recipe_of(strategy)))["adapter"]
    (model,) = kept
    facts = read_adapter(folder)
    prior = loaded(xl).with_adapter(folder, base_sha256=prior_hash(str(xl)), fuse=False)
    texts = [f"a {class_token(label)} shape" for label in range(N)] if facts.has_tokens else list(KEYS)

    assert facts.words == (len(ByHand(xl, None).tokenizers[0]),) * 2
    assert {one.name for one in folder.iterdir() if one.suffix == ".safetensors"} == {
        LORA: {LORA}, TOKENS: {TOKENS}}.get({"ti": TOKENS, "db": LORA}.get(strategy, ""), {LORA, TOKENS})
    if facts.has_tokens:
        tables = load_file(folder / TOKENS)
        assert {name: tuple(one.shape) for name, one in tables.items()} == {"tokens": (N, 16), "tokens_2": (N, 32)}
        assert all(len({row.numpy().tobytes() for row in one}) == N for one in tables.values()), "each has trained"
    z_t, t_B = batch(0, 1).z0_BCHW, torch.tensor([500.0])
    with torch.no_grad():
        for text in texts:
            cond = prior.embed([text], [text], 1.0)
            states = model.module.text(model.ids([text]))
            torch.testing.assert_close(cond.tokens_BTE, states.tokens, **NEAR)
            assert cond.pooled_BP is not None
            torch.testing.assert_close(cond.pooled_BP, states.pooled, **NEAR)
            at = prior.schedule("ddim", 4).first._replace(label=500.0)
            trained = model.module(z_t, t_B, model.ids([text]))
            torch.testing.assert_close(prior.predict(z_t, at, cond).noise, trained, **NEAR)
        base = loaded(xl)
        assert not torch.allclose(base.predict(z_t, at, base.embed([text], [text], 1.0)).noise, trained, atol=1e-4)


@pytest.mark.slow
def test_the_sheet_shows_what_the_adapter_samples(raw: Callable[..., Any], xl: Path) -> None:
    """Also with a scheduler that adds noise in each step, as many community models ship."""
    base = Path(shutil.copytree(xl, xl.parent / "ancestral"))
    file = base / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "EulerAncestralDiscreteScheduler"}))
    sheet = {"classes": 2, "images": 1, "steps": 3}
    folder = fit(raw(recipe_of("ti_db"), base=base, sheet=sheet))["adapter"]
    assert [one.name for one in sorted((folder / "sheets").iterdir())] == ["step-000002.png", "step-000003.png"]


@pytest.mark.slow
def test_diffusers_reads_the_lora(raw: Callable[..., Any], xl: Path) -> None:
    folder = fit(raw(recipe_of("db", alpha=6)))["adapter"]
    pipe = StableDiffusionXLPipeline.from_pretrained(xl)
    hand = ByHand(xl, None)
    z, t_B = batch(0, 2).z0_BCHW, torch.tensor([10.0, 800.0])
    with torch.no_grad():
        tokens, pooled = hand.condition(["an ant", "a bee"])
        before = hand.unet_says(z, t_B, tokens, pooled)
        pipe.load_lora_weights(folder)
        hand.unet = pipe.unet
        found = hand.unet_says(z, t_B, tokens, pooled)
        ours = loaded(xl).with_adapter(folder, base_sha256=None, fuse=False).unet
        hand.unet = ours
        assert torch.equal(found, hand.unet_says(z, t_B, tokens, pooled))
    assert float((found - before).abs().max()) > 1e-3


def test_adapters_keep_to_their_kind_of_base(xl: Path, tmp_path: Path) -> None:
    one = tiny_pipeline(tmp_path / "sd")
    adapters = {"two": tiny_adapter(tmp_path / "two", xl, KEYS), "one": tiny_adapter(tmp_path / "one", one, KEYS)}
    words = read_adapter(adapters["two"]).words
    with pytest.raises(ModelError, match=f"has {words[0]} and {words[1]} words, this one predicts epsilon and has 573"):
        load_prior(str(one), device="cpu").with_adapter(adapters["two"], base_sha256=None)
    with pytest.raises(ModelError, match=f"has 573 words, this one predicts epsilon and has {words[0]} and {words[1]}"):
        loaded(xl).with_adapter(adapters["one"], base_sha256=None)
    assert not {"tokenizer_2_length", "encoder_2_sha256"} & json.loads((adapters["one"] / ADAPTER).read_text()).keys()
    raw = json.loads((adapters["two"] / ADAPTER).read_text())
    (adapters["two"] / ADAPTER).write_text(json.dumps({**raw, "tokenizer_2_length": None}))
    with pytest.raises(ModelError, match="one row for each of its 4 classes is needed, under the name tokens"):
        read_adapter(adapters["two"])


# ------------------------------------------------------------------------------------------------ two image encoders


def features(clips: list[Path], **fields: Any) -> dict[str, Any]:
    """Fields of a fit file that make both kinds of features with two guides."""
    made = {"guide_2": {"weights": str(clips[1])}, **fields}
    return {"guide": {"weights": str(clips[0])},
            "fit": {"class_features": {"images": None, **made}, "image_features": made}}


def test_features_of_two_guides_stand_side_by_side(raw: Callable[..., Any], clips: list[Path],
                                                   image_folder: Path) -> None:
    plain = {key: one for key, one in raw({}).items() if key != "prior"}
    of_one = {"fit": {CLASS_FEATURES: {"images": None}}}
    single = [fit({**plain, "guide": {"weights": str(clip)}, **of_one})[CLASS_FEATURES] for clip in clips]
    both = fit({**plain, **features(clips)})
    tables = [load_file(folder / "class_features.safetensors")["features"]
              for folder in (*single, both[CLASS_FEATURES])]

    assert torch.equal(tables[2], torch.cat(tables[:2], dim=1))
    rows = np.load(both["image_features"] / "features.npy")
    assert rows.shape == (20, 48)
    np.testing.assert_allclose(rows.reshape(4, 5, 48).mean(1), tables[2], atol=2e-3)
    hashes = [guide_hash(str(clip), None) for clip in clips]
    for kind, folder in both.items():
        facts, making = feature_facts(folder, kind), read_facts(folder)
        assert [facts["encoder_sha256"], facts["encoder_2_sha256"]] == hashes
        assert [making["made_from"]["guide_sha256"], making["made_from"]["guide_2_sha256"]] == hashes
        assert making["guide_2"]["weights"] == str(clips[1])
    assert feature_facts(single[0], CLASS_FEATURES).keys() == {"kind", "encoder_sha256", "normalised", "classes",
                                                               "images_per_class"}
    assert read_facts(single[0])["made_from"].keys() == {"version", "data", "guide_sha256", "batch", "resize", "images",
                                                         "seed"}, "what was made by one guide keeps its name"


@pytest.mark.parametrize("visual_token", [pytest.param("class_mean", marks=pytest.mark.slow), "instance"])
@pytest.mark.slow
def test_realfake_on_two_encoders(visual_token: str, raw: Callable[..., Any], clips: list[Path], xl: Path,
                                  image_folder: Path, tmp_path: Path) -> None:
    """Features, adapter and samples from one fit file and one run, with the encoders' hashes in the adapter."""
    kind = {"class_mean": "class_features", "instance": "image_features"}[visual_token]
    recipe = {**recipe_of("db"), "visual_token": visual_token, "mmd_gamma": 0.05, "snr_gamma": 5.0, "caption_drop": 0.2}
    plain = raw(recipe)
    made = fit({**plain, **features(clips), "fit": {kind: features(clips)["fit"][kind], **plain["fit"]}})
    facts = read_adapter(made["adapter"])
    run, totals = complete(parse({**run_of(xl, image_folder, tmp_path), "artifacts": {
        "adapter": str(made["adapter"]), kind: str(made[kind])}, "method": {
            "name": "realfake", "visual_token": visual_token, "prompt": "a {name}", "steps": 3, "ratio": 1}}))

    assert (facts.encoder_sha256, facts.encoder_2_sha256) == tuple(guide_hash(str(clip), None) for clip in clips)
    assert (totals.kept, len(set(hashes(run).values()))) == (20, 20)
    other = tmp_path / "other"
    other.mkdir()
    write_class_features(other, np.ones((4, 48), np.float32), class_keys=KEYS, encoder_sha256=facts.encoder_sha256,
                         images_per_class=None, encoder_2_sha256="f" * 64)
    if visual_token == "class_mean":
        (problem,) = runs.preflight(parse({**run_of(xl, image_folder, tmp_path), "artifacts": {
            "adapter": str(made["adapter"]), kind: str(other)}, "method": {
                "name": "realfake", "prompt": "a {name}", "steps": 3}}))
        assert "visual tokens of image encoder" in problem
        assert "and ffffffffffff; make these with the same guide.weights and guide_2.weights" in problem


def run_of(xl: Path, image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {"name": "run", "out": str(tmp_path / "runs"), "prior": {"weights": str(xl), "device": "cpu"},
            "data": {"source": "imagefolder", "path": str(image_folder)}, "image": {"size": SIDE, "fit": "squash"},
            "sampler": {"batch": 4, "shard_images": 20}}


@pytest.mark.parametrize("strategy", [pytest.param("ti", marks=pytest.mark.slow), "ti_db"])
def test_diffmix_on_two_encoders(strategy: str, raw: Callable[..., Any], xl: Path, image_folder: Path,
                                 tmp_path: Path) -> None:
    adapter = fit(raw(recipe_of(strategy)))["adapter"]
    method = {"name": "diffmix", "variant": "diff_mix", "prompt": "a {token} shape", "steps": 4, "ratio": 1,
              "guidance_scale": 3}
    run, totals = complete(parse({**run_of(xl, image_folder, tmp_path), "artifacts": {"adapter": str(adapter)},
                                  "method": method}))
    assert (totals.kept, len(set(hashes(run).values()))) == (20, 20)


# --------------------------------------------------------------------------------------------------------- refusals


def change(folder: Path, to: Path, file: str, **fields: Any) -> Path:
    made = Path(shutil.copytree(folder, to))
    (made / file).write_text(json.dumps({**json.loads((made / file).read_text()), **fields}))
    return made


REFUSED = {
    "every weight": ("sdxl", {"strategy": "full", "prompt": "a {name}"}, "full trains every weight .* use db or ti_db"),
    "noise levels": ("cosxl", {}, r"noise levels \(EDMEulerScheduler\), and training here draws timesteps"),
    "few steps": ("hyper", {}, r"distilled to few steps \(scheduler.*TCDScheduler"),
    "turbo": ("sdxlturbo", {}, r"distilled to few steps \(turbo, by its name\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_generators_that_are_not_trained_here(case: str, raw: Callable[..., Any],
                                              family_folder: Callable[[str], Path]) -> None:
    family, fields, words = REFUSED[case]
    problems = preflight(parse_fit(raw({**recipe_of("ti_db"), **fields}, base=family_folder(family))))
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("\n".join(problems))
    assert len(problems) == 1
    assert not Path(raw({})["out"]).exists()


def test_a_prediction_of_the_clean_image_is_not_trained(raw: Callable[..., Any], xl: Path, tmp_path: Path) -> None:
    base = change(xl, tmp_path / "base", "scheduler/scheduler_config.json", prediction_type="sample")
    (problem,) = preflight(parse_fit(raw(recipe_of("db"), base=base)))
    assert "predicts sample, and the loss here is that of epsilon or v_prediction" in problem


def test_tokenizers_of_different_lengths_are_of_two_models(raw: Callable[..., Any], xl: Path, tmp_path: Path) -> None:
    base = change(xl, tmp_path / "base", "tokenizer_2/tokenizer_config.json", model_max_length=12)
    (problem,) = preflight(parse_fit(raw(recipe_of("db"), base=base)))
    assert "tokenizer_2/tokenizer_config.json: model_max_length 12 is not that of the first, 16" in problem


def test_both_tokenizers_take_the_class_tokens(raw: Callable[..., Any], xl: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(xl, tmp_path / "base"))
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer_2")
    tokenizer.add_tokens(["<class_0>"])
    tokenizer.save_pretrained(base / "tokenizer_2")
    (problem,) = preflight(parse_fit(raw(recipe_of("ti"), base=base)))
    assert "already holds 1 of 1 class tokens" in problem
    assert preflight(parse_fit(raw(recipe_of("db"), base=base))) == []


def test_features_of_another_width_are_refused_before_a_folder_is_made(raw: Callable[..., Any], clips: list[Path],
                                                                       xl: Path, image_folder: Path,
                                                                       tmp_path: Path) -> None:
    """By fit, of a folder and of guides in the same file, and by a run; both widths and the way out are named."""
    recipe = {**recipe_of("db"), "visual_token": "class_mean"}
    words = "features of 16 numbers, but the hidden states of the generator's texts have 48"
    narrow, folder = raw(recipe), tmp_path / "narrow"
    folder.mkdir()
    write_class_features(folder, np.ones((4, 16), np.float32), class_keys=KEYS, encoder_sha256="e",
                         images_per_class=None)
    write_image_features(folder, ["a"], np.ones((1, 16), np.float32), encoder_sha256="e")
    of_guides = {**narrow, "guide": {"weights": str(clips[0])}, "fit": {CLASS_FEATURES: {}, **narrow["fit"]}}
    of_folder = raw(recipe, features=str(folder))
    for config, field in ((of_guides, "fit.class_features holds "), (of_folder, f"fit.adapter.features: {folder} ")):
        (problem,) = preflight(parse_fit(config))
        assert problem.startswith(field)
        assert words in problem
        assert "guide and guide_2 side by side" in problem
    right = {**of_guides, "fit": {CLASS_FEATURES: {"guide_2": {"weights": str(clips[1])}}, **narrow["fit"]}}
    assert preflight(parse_fit(right)) == []
    for kind, visual_token in (("class_features", "class_mean"), ("image_features", "instance")):
        adapter = tiny_adapter(tmp_path / kind, xl, KEYS, strategy="db", visual_token=visual_token, encoder_sha256="e")
        run = parse({**run_of(xl, image_folder, tmp_path), "artifacts": {"adapter": str(adapter), kind: str(folder)},
                     "method": {"name": "realfake", "visual_token": visual_token, "prompt": "a {name}"}})
        (problem,) = runs.preflight(run)
        assert problem.startswith(f"artifacts.{kind}: {folder} holds ")
        assert words in problem
    judged = parse({**run_of(xl, image_folder, tmp_path), "artifacts": {"image_features": str(folder)},
                    "method": {"name": "diffcoremix", "prompt": "a {name}", "contexts": []},
                    "accept": {"guide": {"weights": str(clips[0])}, "above": 0.5}})
    assert [one for one in runs.preflight(judged) if words in one] == [], "a judge compares them, no text encoder does"
    assert not (tmp_path / "artifacts").exists()
    assert not (tmp_path / "runs").exists()


def test_a_width_that_is_known_late_is_refused_before_latents_are_made(raw: Callable[..., Any], clips: list[Path],
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """As with guides of the hub, whose files come only when features are made."""
    monkeypatch.setattr("rayexpand.fitting.class_features.features_of", lambda *_: None)
    config = raw({**recipe_of("db"), "visual_token": "class_mean"})
    with pytest.raises(ModelError, match=r"fit\.adapter\.features: .* holds features of 16 numbers"):
        fit({**config, "guide": {"weights": str(clips[0])}, "fit": {CLASS_FEATURES: {}, **config["fit"]}})
    assert not list(Path(config["out"]).glob("*latents*"))


def test_a_second_guide_is_checked_as_the_first(raw: Callable[..., Any], clips: list[Path], tmp_path: Path) -> None:
    plain = {key: one for key, one in raw({}).items() if key != "prior"}
    config = {**plain, **features(clips)}
    config["fit"]["class_features"]["guide_2"] = {"weights": str(tmp_path / "nowhere")}
    config["fit"]["image_features"]["guide_2"] = {}
    problems = "\n".join(preflight(parse_fit(config)))
    assert "fit.class_features.guide_2.weights: guide '" in problems
    assert "fit.image_features.guide_2.weights: missing; the embedded default has seen digits only" in problems


def test_a_visual_token_means_nothing_to_weights_as_they_are(xl: Path, image_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    write_class_features(folder, np.ones((4, 48), np.float32), class_keys=KEYS, encoder_sha256="e",
                         images_per_class=None)
    run = run_of(xl, image_folder, tmp_path)
    method = {"name": "realfake", "finetuned": False, "visual_token": "class_mean", "prompt": "a {name}"}
    (problem,) = runs.preflight(parse({**run, "artifacts": {"class_features": str(folder)}, "method": method}))
    assert "method.visual_token: the hidden states" in problem
    assert "set method.finetuned: true" in problem
    assert runs.preflight(parse({**run, "method": {**method, "visual_token": "none"}})) == []
