"""The fine-tuning step: what may move and by how much, workers against one process, checkpoints and adapters."""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the customary name)
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from rayexpand.contract.class_tokens import add_class_tokens, class_token
from rayexpand.contract.errors import ConfigError, ModelError, RayexpandError
from rayexpand.contract.rng import generator, row_key
from rayexpand.fitting.adapter.denoiser import ClassEmbedding, add_lora, init_token_id, insert_rows
from rayexpand.fitting.adapter.finetuner import Finetuner, LatentBatch
from rayexpand.fitting.adapter.recipe import PRESETS, FinetuneConfig, make_finetune
from rayexpand.fitting.adapter.training_draw import draw_visit
from rayexpand.models.texts import Encoder, TextEncoders
from rayexpand.models.tiny import digits
from tests.fitting.adapter.ranks import run_processes

N, WORDS = 10, 573  # classes, and words of the tiny vocabulary
TEXT = "a photo of a {} shape"
SMALL: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 2}
LATENT = (4, 4, 4)


@cache
def parts(prediction: str = "v_prediction") -> tuple[Any, ...]:
    """unet, text_encoder, tokenizer, scheduler, all tiny and random; to be copied."""
    tokenizer = digits.build_tokenizer()
    guide = digits.build_guide(len(tokenizer), generator(row_key(0, "test", "", 0, 0, "guide")))
    unet = digits.build_unet(generator(row_key(0, "test", "", 0, 0, "unet")), **SMALL)
    return unet.eval(), digits.text_encoder_of(guide), tokenizer, digits.build_scheduler(prediction)


def tuner(prediction: str = "v_prediction", seed: int = 0, *, wrap: Any = lambda module: module, world: int = 1,
          **fields: Any) -> Finetuner:
    config = make_finetune({"preset": "tiny", "rank": 4, "targets": "attention", **fields})
    return Finetuner(*trainable(prediction), config, N, seed, wrap=wrap, world=world)


def trainable(prediction: str = "v_prediction") -> tuple[Any, ...]:
    """unet, text encoders and scheduler for one Finetuner."""
    unet, text_encoder, tokenizer, scheduler = copy.deepcopy(parts(prediction))
    return unet, TextEncoders([Encoder(text_encoder, tokenizer)]), scheduler


def batch(step: int, rows: int = 6, labels: Any = None, **fields: Any) -> LatentBatch:
    rng = np.random.default_rng(step)
    z0, noise = (torch.from_numpy(x) for x in rng.standard_normal((2, rows, *LATENT), np.float32))
    labels = rng.integers(N, size=rows) if labels is None else labels
    t_B = torch.from_numpy(rng.integers(1000, size=rows))
    t_B[::2] //= 8  # Min-SNR weighs down timesteps below 147 only
    return LatentBatch(z0, noise, t_B,
                       [TEXT.format(class_token(label)) for label in labels], **fields)


def weights(model: Finetuner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def tokenizer_of(model: Finetuner) -> CLIPTokenizer:
    return model.encoders[0].tokenizer


def rows(model: Finetuner) -> Tensor:
    return next(p for name, p in model.trainable.items() if name.endswith("rows_NE"))


# ---- what trains ----


@pytest.fixture(scope="module")
def stable_diffusion() -> UNet2DConditionModel:
    """SD 1.5's UNet without numbers."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)


@pytest.mark.parametrize(("rank", "expected", "modules"), [
    (10, 1_992_960, {("attn1", 320): 25_600, ("attn1", 640): 51_200, ("attn1", 1280): 102_400,
                     ("attn2", 320): 34_560, ("attn2", 640): 53_760, ("attn2", 1280): 92_160}),
    (4, 797_184, {("attn1", 320): 10_240, ("attn2", 1280): 36_864})])
def test_lora_of_stable_diffusion(stable_diffusion: UNet2DConditionModel, rank: int, expected: int,
                                  modules: dict[tuple[str, int], int]) -> None:
    unet = stable_diffusion.requires_grad_(False)

    add_lora(unet, FinetuneConfig(rank=rank), 0)

    found = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in found.values()) == expected
    adapted = {name.partition(".lora_")[0] for name in found}
    assert len(adapted) == 128
    assert all(isinstance(unet.get_submodule(name).base_layer, nn.Linear) for name in adapted)
    assert not [name for name in adapted if "conv" in name or "proj_" in name or ".ff." in name]
    attentions = {name.partition(".to_")[0] for name in adapted}
    assert len(attentions) == 32
    sizes = {(name.rpartition(".")[2], unet.get_submodule(name).to_q.in_features):
             sum(p.numel() for key, p in found.items() if key.startswith(name + ".")) for name in attentions}
    assert {key: sizes[key] for key in modules} == modules
    unet.delete_adapters("default")


def test_wider_targets_stay_in_the_attention_blocks(stable_diffusion: UNet2DConditionModel) -> None:
    add_lora(stable_diffusion, FinetuneConfig(targets="attention+ff"), 0)

    adapted = {name.partition(".lora_")[0] for name, p in stable_diffusion.named_parameters() if "lora_" in name}
    assert len(adapted) == 128 + 16 * 4
    assert all(".attentions." in name for name in adapted)
    stable_diffusion.delete_adapters("default")


@pytest.mark.parametrize(("targets", "rank", "numbers", "layers"), [
    ("attention", 8, 30_720, 32), ("attention", 10, 38_400, 32), ("attention+ff", 8, 67_584, 48)])
def test_lora_of_the_tiny_generator(targets: str, rank: int, numbers: int, layers: int) -> None:
    unet = digits.build_unet(generator(row_key(0, "test", "", 0, 0, "unet"))).requires_grad_(False)

    add_lora(unet, FinetuneConfig(targets=targets, rank=rank), 0)

    lora = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert (sum(p.numel() for p in lora.values()), len(lora)) == (numbers, 2 * layers)
    drawn = torch.cat([p.detach().flatten() for name, p in lora.items() if "lora_A" in name])
    assert float(drawn.std()) == pytest.approx(1 / rank, rel=0.05)
    assert all(not p.any() for name, p in lora.items() if "lora_B" in name)


@pytest.mark.parametrize("strategy", ["ti", "db", "ti_db"])
def test_a_new_adapter_changes_no_bit(strategy: str) -> None:
    unet, text_encoder, tokenizer, _ = parts()
    model, ids = tuner(strategy=strategy), digits.tokenize(tokenizer, ["a photo of a seven", ""])
    z_t, t_B = batch(0, 2).z0_BCHW, torch.tensor([3, 700])

    with torch.no_grad():
        found = model.module(z_t, t_B, ids)
        expected = unet(z_t, t_B, encoder_hidden_states=text_encoder(ids)[0]).sample
    assert torch.equal(found, expected)


MOVES = {"ti": {"rows_NE"}, "db": {"lora_A", "lora_B"}, "ti_db": {"lora_A", "lora_B", "rows_NE"}}


@pytest.mark.parametrize("strategy", MOVES)
def test_only_what_is_allowed_moves(strategy: str) -> None:
    model = tuner(strategy=strategy)
    before = weights(model)

    for step in range(3):
        model.update(batch(step))

    moved = {name for name, p in model.module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if any(kind in name for kind in MOVES[strategy])}
    assert moved == set(model.trainable)
    assert (tokenizer_of(model).get_vocab().keys() >= {"<class_9>"}) == (strategy != "db")


def test_full_moves_everything_and_adds_nothing() -> None:
    model = tuner(strategy="full", lr=1e-4)
    before = weights(model)
    assert before.keys() == {f"{prefix}.{name}" for prefix, part in zip(("unet", "text_encoder"), parts(), strict=False)
                             for name, _ in part.named_parameters()}

    model.update(batch(0))

    assert not [name for name, p in model.module.named_parameters() if torch.equal(p, before[name])]
    assert model.trained() == (None, None, None)
    assert len(tokenizer_of(model)) == WORDS


def test_first_step_moves_b_by_its_gradient_and_a_by_decay_alone() -> None:
    model = tuner(lr=1e-3)
    before = weights(model)

    model.update(batch(0))

    after = weights(model)
    lora_a, lora_b = ([name for name in after if kind in name] for kind in ("lora_A", "lora_B"))
    assert all(after[name].any() for name in lora_b)
    for name in lora_a:
        torch.testing.assert_close(after[name], before[name] * (1 - 1e-3 * 1e-2), rtol=1e-6, atol=0)


def test_a_seen_class_moves_by_the_rate_and_the_others_decay() -> None:
    model = tuner(strategy="ti", token_lr=5e-5)
    start = rows(model).detach().clone()

    model.update(batch(0, labels=[5] * 6))

    step = (rows(model).detach() - start * (1 - 5e-7)).abs()
    np.testing.assert_allclose(step[5], 5e-5, rtol=1e-2)
    others = torch.arange(N) != 5
    np.testing.assert_allclose(step[others], 0, atol=1e-8)
    seen = rows(model).detach().clone()
    model.update(batch(1, labels=[2] * 6))
    step = (rows(model).detach() - seen * (1 - 5e-7)).abs()
    assert float(step[5].median()) > 2e-5, "Adam's momentum goes on: its state is dense"
    np.testing.assert_allclose(step[(torch.arange(N) != 5) & (torch.arange(N) != 2)], 0, atol=1e-8)


def test_decay_of_a_whole_training() -> None:
    config = FinetuneConfig()

    assert (1 - config.token_lr * config.weight_decay) ** config.steps == pytest.approx(0.98265, abs=5e-6)


def test_rows_equal_the_whole_table_with_restore() -> None:
    model = tuner(strategy="ti", snr_gamma=5.0, token_lr=1e-3)
    unet, text_encoder, _, scheduler = copy.deepcopy(parts())
    text_encoder.resize_token_embeddings(WORDS + N, mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[WORDS:] = table[model.init_token]
    kept = table[:WORDS].detach().clone()
    optimiser = torch.optim.AdamW([table.requires_grad_(True)], lr=model.config.token_lr, weight_decay=1e-2)

    for step in range(20):
        data = batch(step)
        model.update(data)
        optimiser.zero_grad()
        abar_B = scheduler.alphas_cumprod[data.t_B]
        snr_B = abar_B / (1 - abar_B)
        out = unet(scheduler.add_noise(data.z0_BCHW, data.noise_BCHW, data.t_B), data.t_B,
                   encoder_hidden_states=text_encoder(model.ids(data.text)).last_hidden_state).sample
        error_B = (out - scheduler.get_velocity(data.z0_BCHW, data.noise_BCHW, data.t_B)).square().mean((1, 2, 3))
        (snr_B.clamp(max=5) / (snr_B + 1) * error_B).mean().backward()
        optimiser.step()
        with torch.no_grad():
            table[:WORDS] = kept

    trained, theirs = rows(model).detach(), table.detach()[WORDS:]
    assert float((trained - theirs).abs().max()) < 1e-6  # last bits differ between instruction sets
    assert float((trained - kept[model.init_token]).abs().max()) > 0.01, "they have trained"


def test_tokens_start_from_one_row() -> None:
    model = tuner(init_token="seven")
    row = parts()[1].get_input_embeddings().weight[tokenizer_of(model).convert_tokens_to_ids("seven</w>")]

    assert torch.equal(rows(model), row.expand(N, -1))
    mean = tuner(init_token=None)
    torch.testing.assert_close(rows(mean)[3], parts()[1].get_input_embeddings().weight.mean(0))


@pytest.mark.parametrize(("token", "words"), [(42170, "573 tokens"), ("kudu", "is 4 tokens"), (-1, "id -1")])
def test_unknown_init_tokens(token: int | str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"init_token.*{words}"):
        tuner(init_token=token)


def test_clipping_leaves_tokens_alone() -> None:
    free, clipped = tuner(clip=None), tuner(clip=1e-3)
    rows(clipped).register_hook(lambda grad: 1e6 * grad)

    for step in range(2):
        free.update(batch(step))
        clipped.update(batch(step))
        if step == 0:  # from here on the weights differ
            first = free.losses.grad_norm  # of everything that trains
            unclipped = {name: p.grad.clone() for name, p in free.trainable.items() if p.grad is not None}
            scaled = {name: p.grad.clone() for name, p in clipped.trainable.items() if p.grad is not None}

    norm = torch.stack([grad.norm() for name, grad in unclipped.items() if "lora_" in name]).norm()
    assert norm > 1e-3
    assert first == pytest.approx(float(torch.stack([grad.norm() for grad in unclipped.values()]).norm()), rel=1e-5)
    for name, grad in scaled.items():
        factor = 1e-3 / norm if "lora_" in name else 1e6
        torch.testing.assert_close(grad, unclipped[name] * factor, rtol=1e-4, atol=1e-12)


# ---- the loss ----


@pytest.mark.parametrize(("prediction", "gamma"), [("v_prediction", None), ("epsilon", None), ("epsilon", 5.0)])
def test_a_step_by_hand(prediction: str, gamma: float | None) -> None:
    """A LoRA of one projection is W + B A: the gradient of B is that of W times A's transpose."""
    unet, text_encoder, tokenizer, scheduler = copy.deepcopy(parts(prediction))
    model, data = tuner(prediction, strategy="db", snr_gamma=gamma, clip=None), batch(0)._replace(text=["a seven"] * 6)
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    weight = unet.get_submodule(layer).weight.requires_grad_(True)

    loss = model.update(data)

    out = unet(scheduler.add_noise(data.z0_BCHW, data.noise_BCHW, data.t_B), data.t_B,
               encoder_hidden_states=text_encoder(digits.tokenize(tokenizer, ["a seven"] * 6))[0]).sample
    target = (data.noise_BCHW if prediction == "epsilon"
              else scheduler.get_velocity(data.z0_BCHW, data.noise_BCHW, data.t_B))
    abar_B = scheduler.alphas_cumprod[data.t_B]
    w_B = torch.ones(6) if gamma is None else (gamma * (1 - abar_B) / abar_B).clamp(max=1)
    expected = (w_B * F.mse_loss(out, target, reduction="none").mean((1, 2, 3))).mean()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    lora = model.unet.get_submodule(layer)
    assert weight.grad is not None
    torch.testing.assert_close(lora.lora_B["default"].weight.grad, weight.grad @ lora.lora_A["default"].weight.T,
                               rtol=2e-4, atol=1e-7)


def run(model: Finetuner, steps: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    return [model.update(batch(step)) for step in range(steps)], weights(model)


def test_no_weight_for_the_mmd_term_is_the_plain_loss() -> None:
    plain = run(tuner(snr_gamma=5.0))
    off = run(tuner(snr_gamma=5.0, mmd_gamma=0.0, mmd_reduction="sum", mmd_weighting="min_snr", mmd_scope="per_rank"))
    unlimited, unweighted = (run(tuner("epsilon", snr_gamma=gamma)) for gamma in (1e12, None))

    assert plain[0] == off[0]
    assert_same(plain[1], off[1])
    assert unlimited[0] == unweighted[0]
    assert_same(unlimited[1], unweighted[1])


@pytest.mark.parametrize("fields", [
    {}, {"mmd_reduction": "sum"}, {"mmd_weighting": "min_snr", "snr_gamma": 5.0},
    {"mmd_scope": "per_rank", "mmd_images": 6}])
def test_the_mmd_term_is_added(fields: dict[str, Any]) -> None:
    model = tuner("epsilon", mmd_gamma=0.5, **fields)
    data = batch(3)
    with torch.no_grad():
        abar = model._abar[data.t_B].view(-1, 1, 1, 1)
        e = data.noise_BCHW - model.module(abar.sqrt() * data.z0_BCHW + (1 - abar).sqrt() * data.noise_BCHW, data.t_B,
                                           model.ids(data.text))
        w = (5 * (1 - abar) / abar).clamp(max=1)
        held = w * e if "snr_gamma" in fields else e
        term = (held.sum(0) if "mmd_reduction" in fields else held.mean(0)).square().mean()
        simple = ((w if "snr_gamma" in fields else 1) * e.square()).mean()

    model.update(data)

    assert model.losses[:3] == pytest.approx((float(simple + 0.5 * term), float(simple), float(term)), rel=1e-5)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_share_scales_the_plain_loss(share: float) -> None:
    assert tuner().update(batch(0, share=share)) == pytest.approx(share * tuner().update(batch(0)), rel=1e-6)


def test_accumulated_parts_add_up_to_the_batch() -> None:
    whole, halves = tuner(clip=None, strategy="ti_db"), tuner(clip=None, strategy="ti_db", accumulate=2, batch=6)
    losses = whole.update(batch(0)), halves.update(batch(0))

    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, parameter in whole.trainable.items():
        torch.testing.assert_close(halves.trainable[name].grad, parameter.grad, rtol=1e-4, atol=1e-7)


def test_accumulated_mmd_is_the_mean_over_the_parts() -> None:
    parts_of = tuner(mmd_gamma=0.5, accumulate=2, batch=6)
    data = batch(0)
    halves = [data._replace(z0_BCHW=data.z0_BCHW[k], noise_BCHW=data.noise_BCHW[k], t_B=data.t_B[k], text=data.text[k])
              for k in (slice(3), slice(3, 6))]

    parts_of.update(data)
    terms = []
    for half in halves:
        model = tuner(mmd_gamma=0.5)
        model.update(half)
        terms.append(model.losses.mmd)

    assert parts_of.losses.mmd == pytest.approx(np.mean(terms), rel=1e-5)
    assert parts_of.config.images_per_term == 3


# ---- workers ----

GLOBAL = {"mmd_gamma": 0.5, "clip": None, "snr_gamma": 5.0}
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "ti_db": (GLOBAL, (3, 3)), "unequal": (GLOBAL, (2, 4)), "ti": ({**GLOBAL, "strategy": "ti"}, (3, 3)),
    "sum": ({**GLOBAL, "mmd_reduction": "sum", "mmd_weighting": "min_snr", "strategy": "db"}, (3, 3)),
    "full": ({**GLOBAL, "strategy": "full", "lr": 1e-4}, (3, 3)),
    "accumulate": ({"clip": None, "accumulate": 2, "batch": 8}, (4, 4)),
    "clipped": ({"clip": 0.01}, (3, 3))}


def _piece(data: LatentBatch, start: int, stop: int, share: float) -> LatentBatch:
    return LatentBatch(*(x[start:stop] for x in data[:4]), share=share)


def _trained(model: Finetuner) -> dict[str, Tensor]:
    found = {f"weight {name}": p.detach() for name, p in model.trainable.items()}
    return {**found, **{f"gradient {name}": p.grad for name, p in model.trainable.items() if p.grad is not None},
            "mmd": torch.tensor(model.losses.mmd)}


def _worker(rank: int) -> dict[str, Tensor]:
    found = {}
    for case, (fields, sizes) in CASES.items():
        model = tuner(wrap=DistributedDataParallel, world=2, **fields)
        start = sum(sizes[:rank])
        model.update(_piece(batch(0, sum(sizes)), start, start + sizes[rank], 2 * sizes[rank] / sum(sizes)))
        found.update({f"{case}: {name}": value.contiguous() for name, value in _trained(model).items()})
    return found


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    parts()  # made once, before the fork
    return run_processes(2, _worker, tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_two_workers_equal_one_process(workers: list[dict[str, Tensor]], case: str) -> None:
    fields, sizes = CASES[case]
    alone = tuner(**fields)

    alone.update(batch(0, sum(sizes)))

    expected = _trained(alone)
    for name, value in expected.items():
        first, second = (found[f"{case}: {name}"] for found in workers)
        assert torch.equal(first, second), f"{name} differs between workers"
        if name.startswith("gradient") or name == "mmd":
            assert float((first - value).norm()) <= 1e-5 * float(value.norm()) + 1e-9, name
    if case != "accumulate" and fields.get("mmd_gamma"):
        assert float(expected["mmd"]) > 0


# ---- text and visual token ----


def test_a_dropped_row_reads_the_empty_text_and_no_visual_token() -> None:
    visual = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 32), np.float32))
    dropped = torch.tensor([False, True, False, False, True, False])
    seen: list[Tensor] = []
    model = tuner(visual_token="instance")
    model.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"].detach()), with_kwargs=True)
    data = batch(0, visual_BD=visual, dropped_B=dropped)
    with torch.no_grad():
        given, empty = (model.module.text(model.ids(texts)).tokens for texts in (data.text, [""]))

    model.update(data)

    text_BTE = seen[0]
    assert torch.equal(text_BTE[:, :-1][~dropped], given[:, :-1][~dropped])
    assert torch.equal(text_BTE[:, -1][~dropped], visual[~dropped])
    torch.testing.assert_close(text_BTE[dropped], empty.expand(2, -1, -1))  # Stable Diffusion XL reads zeros there


def test_ids_in_place_of_prompts() -> None:
    model, other = tuner(), tuner()
    assert model.update(batch(0)) == other.update(batch(0)._replace(text=other.ids(batch(0).text)))
    assert_same(weights(model), weights(other))


def test_masked_text_encoders_get_the_tokenizers_mask() -> None:
    unet, encoders, scheduler = trainable()
    encoders.encoders[0].model.config.use_attention_mask = True
    model = Finetuner(unet, encoders, scheduler, FinetuneConfig(strategy="db"), N, 0)
    tokenizer = tokenizer_of(model)
    texts = ["a photo of a seven", "", "a three"]
    tokens = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")

    expected = parts()[1](tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state

    torch.testing.assert_close(model.module.text(model.ids(texts)).tokens, expected)


def test_a_visual_token_of_another_width() -> None:
    with pytest.raises(ModelError, match="48 numbers and the text's hidden states 32"):
        tuner(visual_token="instance").update(batch(0, visual_BD=torch.zeros(6, 48)))


def test_long_prompts_are_cut_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = tuner()
        ids = model.ids(["a photo of a kudu kudu kudu kudu kudu", "a seven"])
        model.ids(["a photo of an okapi okapi okapi okapi okapi"])

    assert ids.shape == (2, 16)
    assert len(caplog.records) == 1  # once, not for each
    assert "a photo of a kudu" in caplog.text
    assert "a seven" not in caplog.text


# ---- class tokens ----


@pytest.fixture(scope="module")
def clip_tokenizer() -> CLIPTokenizer:
    """Stable Diffusion 1.5's, from the vocabulary that open_clip carries."""
    theirs = SimpleTokenizer()
    words = [*list(theirs.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]  # open_clip spells the last two otherwise
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=list(theirs.bpe_ranks),
                         model_max_length=77)


def test_clip_vocabulary(clip_tokenizer: CLIPTokenizer) -> None:
    theirs = SimpleTokenizer()
    assert len(clip_tokenizer) == 49_408
    for text in ("a photo of a bird", "photo of Grasshopper Sparrow, best quality 1/2"):
        assert clip_tokenizer(text).input_ids == [49_406, *theirs.encode(text), 49_407]
    assert clip_tokenizer.convert_ids_to_tokens(42_170) == "ktn"  # the start of words, not a word: only its id names it
    assert init_token_id(FinetuneConfig(), clip_tokenizer) == 42_170
    with pytest.raises(ConfigError, match="'ktn' is 2 tokens in this vocabulary"):
        init_token_id(FinetuneConfig(init_token="ktn"), clip_tokenizer)
    assert init_token_id(FinetuneConfig(init_token="bird"), clip_tokenizer) == clip_tokenizer("bird").input_ids[1]

    tokenizer = copy.deepcopy(clip_tokenizer)
    assert add_class_tokens(tokenizer, 200) == 49_408
    ids = tokenizer("a photo of a <class_7> bird").input_ids
    assert ids.count(49_415) == 1
    assert ids == tokenizer("a photo of a <class_7>bird").input_ids
    assert ids == [*clip_tokenizer("a photo of a").input_ids[:-1], 49_415, *clip_tokenizer("bird").input_ids[1:]]
    assert [tokenizer(f"<class_{k}>").input_ids[1:-1] for k in (1, 10, 199)] == [[49_409], [49_418], [49_607]]
    assert tokenizer("<class_1><class_10>").input_ids[1:-1] == [49_409, 49_418]


def test_unregistered_tokens_do_not_collide() -> None:
    tokenizer = copy.deepcopy(parts()[2])
    first = add_class_tokens(tokenizer, 10)

    assert first == WORDS
    assert not {*range(first, first + 10)} & {*tokenizer("<class_10>").input_ids}


def test_tokens_are_added_once_and_all_or_none() -> None:
    tokenizer = copy.deepcopy(parts()[2])
    tokenizer.add_tokens(["<class_3>"])

    with pytest.raises(ModelError, match="already holds 1 of 4 class tokens, such as <class_3>"):
        add_class_tokens(tokenizer, 4)
    assert len(tokenizer) == WORDS + 1


def test_both_places_of_the_embedding_table() -> None:
    """Some text models keep their table one module deeper; `text_model.embeddings` here."""
    config = CLIPTextConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=1, max_position_embeddings=6, eos_token_id=1)
    for model in (CLIPTextModelWithProjection(config).eval(), parts()[1]):
        model = copy.deepcopy(model).requires_grad_(False)
        first = len(model.get_input_embeddings().weight)
        ids = torch.tensor([[0, 5, 7, 1]])
        expected = model(ids).last_hidden_state
        insert_rows(Encoder(model, parts()[2]), first, 2, 7)

        assert torch.equal(model(ids).last_hidden_state, expected)
        assert torch.equal(model(torch.tensor([[0, 5, first + 1, 1]])).last_hidden_state, expected)
        table = model.get_input_embeddings()
        assert isinstance(table, ClassEmbedding)
        assert next(name for name, p in model.named_parameters() if p.requires_grad).endswith("rows_NE")


def test_a_tokenizer_with_more_words_than_the_text_encoder() -> None:
    unet, encoders, scheduler = trainable()
    encoders.encoders[0].tokenizer.add_tokens(["zebra"])

    with pytest.raises(ModelError, match=r"573 rows and the tokenizer 574"):
        Finetuner(unet, encoders, scheduler, make_finetune({"preset": "tiny"}), N, 0)


# ---- checkpoints and adapters ----


@pytest.mark.parametrize("strategy", ["ti", "ti_db", "full"])
@pytest.mark.fast_cases(1)
def test_a_restored_training_goes_on_bit_for_bit(strategy: str) -> None:
    fields = {"strategy": strategy, "mmd_gamma": 0.05, "lr": 1e-4}
    straight = tuner(**fields)
    for step in range(2):
        straight.update(batch(step))
    saved = save(straight.state())  # safetensors: nothing but tensors, none shared
    losses = [straight.update(batch(step)) for step in (2, 3)]

    resumed = tuner(**fields, seed=99)
    resumed.restore(load(saved))

    assert resumed.step == 2
    assert [resumed.update(batch(step)) for step in (2, 3)] == losses
    assert_same(weights(resumed), weights(straight))
    assert_same(resumed.state(), straight.state())


def test_a_state_is_a_copy() -> None:
    model = tuner()
    model.update(batch(0))
    state, saved = model.state(), save(model.state())
    model.update(batch(1))
    assert save(state) == saved
    model.restore(state)
    model.update(batch(1))
    assert save(state) == saved


@pytest.mark.parametrize("fields", [{"rank": 8}, {"strategy": "ti"}, {"targets": "attention+ff"}])
def test_the_state_of_another_training_is_refused(fields: dict[str, Any]) -> None:
    model = tuner(**fields)
    before = weights(model)

    with pytest.raises(ModelError, match="belongs to another training"):
        model.restore(tuner().state())
    assert_same(weights(model), before)


@pytest.mark.parametrize(("targets", "alpha"), [("attention", None), ("attention+ff", None), ("attention", 8.0)])
def test_diffusers_reads_the_adapter_back(targets: str, alpha: float | None) -> None:
    model = tuner(targets=targets, alpha=alpha, lr=1e-2)
    for step in range(2):
        model.update(batch(step))
    lora, tokens_NE = load(save(model.trained().lora)), model.trained().tokens_NE
    unet, text_encoder, tokenizer, scheduler = copy.deepcopy(parts())
    pipe = digits.assemble(digits.build_vae(generator(row_key(0, "test", "", 0, 0, "vae"))), text_encoder, tokenizer,
                           unet, scheduler)

    pipe.load_lora_weights(lora)
    first = add_class_tokens(tokenizer, N)
    text_encoder.resize_token_embeddings(first + N, mean_resizing=False)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight[first:] = tokens_NE
        ids = digits.tokenize(tokenizer, [TEXT.format("<class_3>"), TEXT.format("<class_8>")])
        assert torch.equal(ids, model.ids([TEXT.format("<class_3>"), TEXT.format("<class_8>")]))
        text_BTE = text_encoder(ids).last_hidden_state
        z_t, t_B = batch(0, 2).z0_BCHW, torch.tensor([10, 800])
        found = unet(z_t, t_B, encoder_hidden_states=text_BTE).sample

        assert torch.equal(text_BTE, model.module.text(ids).tokens)
        assert torch.equal(found, model.module(z_t, t_B, ids))
        assert not torch.equal(found, parts()[0](z_t, t_B, encoder_hidden_states=text_BTE).sample)


def test_a_step_after_sampling_with_the_same_parts() -> None:
    model, other = tuner(), tuner()
    model.unet.requires_grad_(False)  # what a sampler does with the models it is given
    model.encoders[0].model.requires_grad_(False)

    assert model.update(batch(0)) == other.update(batch(0))
    assert_same(weights(model), weights(other))


# ---- randomness, precision, mistakes ----


def test_nothing_is_drawn_from_the_global_generator() -> None:
    parts("v_prediction")  # built, and so drawn, before
    before = torch.get_rng_state()
    model, again, other = tuner(), tuner(), tuner(seed=1)
    assert_same(weights(model), weights(again))
    assert all(not torch.equal(p, other.trainable[name]) for name, p in model.trainable.items() if "lora_A" in name)

    model.update(batch(0))

    assert torch.equal(torch.get_rng_state(), before)


def test_visits() -> None:
    config = FinetuneConfig(caption_drop=0.25)
    visits = [draw_visit(config, 0, f"s{i}", k, (4, 8, 8), 1000) for i in range(100) for k in range(4)]
    again = draw_visit(config, 0, "s0", 1, (4, 8, 8), 1000)

    assert np.array_equal(visits[1].posterior_CHW, again.posterior_CHW)
    assert np.array_equal(visits[1].noise_CHW, again.noise_CHW)
    assert visits[1][2:] == again[2:]
    for field in (0, 1):  # every visit has its own, the posterior's too
        drawn = np.stack([visit[field] for visit in visits])
        assert drawn.dtype == np.float32
        assert len({one.tobytes() for one in drawn}) == 400
        assert (drawn.mean(), drawn.std()) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))
    assert np.mean([visit.t for visit in visits]) == pytest.approx(499.5, abs=60)
    assert 0 <= min(visit.t for visit in visits) < 30
    assert 970 < max(visit.t for visit in visits) <= 999
    assert np.mean([visit.dropped for visit in visits]) == pytest.approx(0.25, abs=0.07)


def test_noise_offset_shifts_whole_channels() -> None:
    plain, shifted = (draw_visit(FinetuneConfig(noise_offset=offset), 0, "s", 0, (4, 8, 8), 1000)
                      for offset in (0.0, 0.1))

    shift = shifted.noise_CHW - plain.noise_CHW
    assert np.ptp(shift, (1, 2)).max() < 1e-6
    assert 0.01 < np.abs(shift[:, 0, 0]).max() < 0.5
    assert np.array_equal(shifted.posterior_CHW, plain.posterior_CHW)
    assert shifted.t == plain.t


@pytest.mark.parametrize("strategy", ["ti_db", "full"])
def test_bf16_freezes_small_and_trains_in_fp32(strategy: str) -> None:
    exact, model = tuner(strategy=strategy, lr=1e-4), tuner(strategy=strategy, lr=1e-4, precision="bf16")
    losses = [[one.update(batch(step)) for step in range(2)] for one in (exact, model)]

    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert {p.dtype for p in model.trainable.values()} == {torch.float32}
    frozen = {p.dtype for name, p in model.module.named_parameters() if name not in model.trainable}
    assert frozen == ({torch.bfloat16, torch.float32} if strategy == "ti_db" else set())  # fp32: norms and biases
    assert {p.ndim for p in model.module.parameters() if p.dtype == torch.bfloat16} <= {2, 4}


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.02), ("fp16", 5e-3)])
def test_precisions_on_a_gpu(precision: str, tolerance: float) -> None:
    fields = {"mmd_gamma": 0.05, "lr": 1e-4}
    config = make_finetune({"preset": "tiny", "precision": precision, **fields})
    model, resumed = (Finetuner(*trainable(), config, N, seed, device="cuda") for seed in (0, 1))
    exact = tuner(targets="attention+ff", rank=8, **fields)

    losses = [model.update(batch(step)) for step in range(3)]
    resumed.restore(load(save(model.state())))

    assert losses == pytest.approx([exact.update(batch(step)) for step in range(3)], rel=tolerance)
    assert {p.dtype for p in model.trainable.values()} == {torch.float32}
    assert resumed.update(batch(3)) == pytest.approx(model.update(batch(3)), rel=1e-4)
    assert_same({name: value for name, value in resumed.state().items() if name.startswith("scaler")},
                {name: value for name, value in model.state().items() if name.startswith("scaler")})


def test_fp16_needs_cuda() -> None:
    with pytest.raises(ConfigError, match="precision: fp16 needs CUDA"):
        tuner(precision="fp16")


def test_divergence_is_said() -> None:
    data = batch(0)
    with pytest.raises(RayexpandError, match=r"the loss is nan at step 0 of 400"):
        tuner().update(data._replace(noise_BCHW=data.noise_BCHW * float("nan")))


def test_a_gradient_that_is_not_finite_is_divergence_too() -> None:
    model = tuner(strategy="ti", targets="attention")
    rows(model).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RayexpandError, match=r"the gradient's norm is (inf|nan) at step 0 of 400"):
        model.update(batch(0))
    assert np.isfinite(model.losses.total)


@pytest.mark.parametrize("scheduler", [
    DDIMScheduler(prediction_type="sample"),
    type("Flow", (), {"config": {"prediction_type": "epsilon"}})()])
def test_schedulers_that_cannot_train(scheduler: Any) -> None:
    unet, encoders, _ = trainable()
    with pytest.raises(ModelError, match="cannot be fine-tuned"):
        Finetuner(unet, encoders, scheduler, FinetuneConfig(), N, 0)


def test_artifacts_made_before_terms_had_a_number_keep_their_names() -> None:
    official = make_finetune({"preset": "realfake_official"})
    before = {name: one for name, one in official.model_dump(mode="json").items() if name != "mmd_images"}

    assert official.identity(world=8) == before
    assert official.identity(world=1) == {**before, "mmd_images": 8}
    assert official.model_copy(update={"mmd_images": 64}).identity(world=1) == before
    assert "mmd_images" not in make_finetune({}).identity(world=1)


def test_presets() -> None:
    assert {name: make_finetune({"preset": name}).template for name in PRESETS} == {
        "diffmix": "a photo of a {token} {metaclass}", "realfake": "photo of {name}, {caption}",
        "realfake_official": "photo of {name}, {caption}", "tiny": "a photo of a {token} {metaclass}"}
    assert make_finetune({}) == make_finetune({"preset": "diffmix"}) == FinetuneConfig()
    # the code's coefficient as a mean over 8 images, in Real-Fake's specification 0.192
    official = make_finetune({"preset": "realfake_official"})
    assert official.mmd_gamma * official.images_per_term ** 2 == pytest.approx(0.192)
    assert make_finetune({"preset": "realfake"}).images_per_term == 64
    assert make_finetune({"strategy": "db"}).template == "a photo of a {name}"


@pytest.mark.parametrize(("fields", "words"), [
    ({"preset": "diffmx"}, "preset 'diffmx' is unknown; known: diffmix"),
    ({"mmd_weighting": "min_snr"}, "needs snr_gamma"),
    ({"mmd_gamma": 0.1, "mmd_scope": "per_rank"}, "per_rank needs mmd_images, the images of one term"),
    ({"mmd_gamma": 0.1, "mmd_images": 4}, "mmd_images has no effect without mmd_gamma and mmd_scope per_rank"),
    ({"mmd_scope": "per_rank", "mmd_images": 4}, "mmd_images has no effect without mmd_gamma"),
    ({"batch": 8, "accumulate": 3}, "batch 8 cannot be computed in 3 equal parts"),
    ({"prompt": "a photo of a {name}"}, "lacks {token}, which strategy ti_db trains"),
    ({"strategy": "db", "prompt": "a {token}"}, "strategy db has no class tokens"),
    ({"strategy": "full", "prompt": "a {token}"}, "strategy full has no class tokens"),
    ({"prompt": "{token} {species}"}, "unknown placeholder {species}"),
    ({"prompt": "{token"}, "cannot be read"), ({"betas": (0.9, 1.0)}, r"betas \[0.9, 1.0\] must lie"),
    ({"prompt": "{token!r} bird"}, "formats {token}; placeholders take no"),
    ({"prompt": "a {token:>5}"}, "formats {token}; placeholders take no"),
    *(({name: value}, f"(?s){name}.*finite") for name, value in (
        ("lr", float("inf")), ("token_lr", float("nan")), ("clip", float("inf")), ("weight_decay", float("nan")),
        ("snr_gamma", float("inf")), ("mmd_gamma", float("nan")))),
    ({"lr": 0}, "lr"), ({"learning_rate": 1e-4}, "learning_rate")])
def test_mistakes(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("{", r"\{").replace("}", r"\}")):
        make_finetune(fields)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)lacks \{token\}.*needs snr_gamma"):
        FinetuneConfig(prompt="a bird", mmd_weighting="min_snr")
