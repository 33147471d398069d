"""The embedded default: a Stable-Diffusion-shaped generator and an open_clip guide, trained here in about a minute.

Nothing is downloaded. `ensure` trains both once on the `pool` part of scikit-learn's digits and keeps them in the
user's cache folder. The order matters and was measured: the CLIP guide first, its text tower copied into the
generator and frozen, then the VAE, then the UNet. A text encoder trained together with the UNet left 85 % of the
samples unreadable; trained first, at most 4 % were.
"""

# B rows, T tokens, E text embedding, D guide embedding; x_B3HW images in [0, 1], z_BCHW latents

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from filelock import FileLock, Timeout

from rayexpand.errors import ModelError
from rayexpand.priors import Progress, quiet_libraries
from rayexpand.rng import generator, row_key
from rayexpand.seeds import digits_split

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from open_clip import CLIP
    from transformers import CLIPTextModel, CLIPTokenizer

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT = "a photo of a {}"
CAPTIONS = (PROMPT, "a {}", "the digit {}", "a photo of the digit {}", "a drawing of a {}", "a handwritten {} shape")
CONTEXT = 16  # tokens of one text
EOS = 1  # never 2: CLIPTextModel reads 2 as "pool at the largest id", which breaks once tokens are added
SPECIALS = ("<|startoftext|>", "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the trained weights; its digest names the cache folder. Rates are the peaks of a one-cycle AdamW."""

    version: int = 1  # raised when the code below trains something else from the same numbers
    seed: int = 0
    split: int = 0  # of digits_split
    guide_steps: int = 300
    guide_batch: int = 64
    guide_rate: float = 2e-3
    vae_steps: int = 300
    vae_batch: int = 32
    vae_rate: float = 4e-3
    unet_steps: int = 400
    unet_batch: int = 32
    unet_rate: float = 2e-3
    caption_drop: float = 0.1
    ema: float = 0.995
    measured_samples: int = 200  # generated to measure; 0 skips the measurement of samples
    measured_steps: int = 10

    def stream(self, stage: str) -> np.random.Generator:
        return generator(row_key(self.seed, "digits", stage, 0, 0, "training"))


RECIPE = Recipe()


def cache_root(cache: Path | None = None) -> Path:
    """`cache`, else $RAYEXPAND_CACHE, else the user's cache folder of this package."""
    from platformdirs import user_cache_path

    return cache or Path(os.environ.get("RAYEXPAND_CACHE") or user_cache_path("rayexpand"))


def cache_name(recipe: Recipe = RECIPE) -> str:
    """`digits-` and eight hex digits over recipe, captions and the library versions that shape the training."""
    stack = {name: version(name).split("+")[0].split(".")[:2] for name in ("torch", "diffusers", "open_clip_torch")}
    text = json.dumps([asdict(recipe), CAPTIONS, CLASS_NAMES, stack], sort_keys=True)
    return f"digits-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def ensure(progress: Progress | None = None, cache: Path | None = None, recipe: Recipe = RECIPE) -> Path:
    """Folder with `pipeline/` (diffusers), `guide/` (open_clip) and `measured.json`; trained on first use.

    Of many processes that ask at once one trains and the others wait. The folder appears by one rename, so a killed
    training leaves nothing that looks finished. `progress(stage, done, total)` is called as training proceeds, with
    total 0 while waiting. Raises ModelError when the cache cannot be written.
    """
    report = progress or (lambda stage, done, total: None)
    root = cache_root(cache)
    folder = root / cache_name(recipe)
    if folder.is_dir():
        return folder
    _prepare(root)
    with _locked(root / f"{folder.name}.lock", report):
        if folder.is_dir():
            return folder
        for stale in root.glob(f"{folder.name}.partial-*"):
            shutil.rmtree(stale)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=root))
        train(partial, recipe, report)
        os.rename(partial, folder)
    return folder


def _prepare(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        writable = os.access(root, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise ModelError(f"the embedded models are kept in {root}, which cannot be written; set the environment "
                         "variable RAYEXPAND_CACHE to a folder that can")


@contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("waiting for another process that trains the digits models", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def train(folder: Path, recipe: Recipe, report: Progress) -> None:
    """Train guide, VAE and UNet and write them to `folder` with what was measured. One thread; global state kept."""
    with _quiet_single_thread():
        data = digits_split(recipe.split)
        pool, labels = to_tensor(data["pool"][0]), torch.from_numpy(data["pool"][1]).long()
        tokenizer = build_tokenizer()
        guide = train_guide(pool, labels, tokenizer, recipe, report)
        save_guide(guide, tokenizer, folder / "guide")
        text_encoder = text_encoder_of(guide)
        vae = train_vae(pool, recipe, report)
        scheduler = build_scheduler()
        unet = train_unet(pool, labels, vae, caption_table(tokenizer, text_encoder), scheduler, recipe, report)
        pipe = assemble(vae, text_encoder, tokenizer, unet, scheduler)
        pipe.save_pretrained(folder / "pipeline", safe_serialization=True)
        measured = measure(pipe, guide, data["test"], recipe, report)
        (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")


def train_guide(x_B3HW: torch.Tensor, labels: torch.Tensor, tokenizer: CLIPTokenizer, recipe: Recipe,
                report: Progress) -> CLIP:
    """Contrastive training on captions; every pair of one class is a positive, in both directions. Half of each batch
    is augmented: with all of it augmented the untouched test digits are named 3 points worse (measured)."""
    rng = recipe.stream("guide")
    model = build_guide(len(tokenizer), recipe.stream("guide weights"))
    texts_KNT = torch.stack([tokenize(tokenizer, [c.format(name) for c in CAPTIONS]) for name in CLASS_NAMES])
    optimiser, schedule = _adamw(model, recipe.guide_steps, recipe.guide_rate, decay=0.05, beta=0.98, warm=0.1)
    for step in range(recipe.guide_steps):
        rows = torch.from_numpy(rng.integers(len(x_B3HW), size=recipe.guide_batch))
        captions = torch.from_numpy(rng.integers(len(CAPTIONS), size=recipe.guide_batch))
        y = labels[rows]
        half = recipe.guide_batch // 2
        x = torch.cat([x_B3HW[rows[:half]], shift_and_turn(x_B3HW[rows[half:]], rng)]) * 2 - 1
        image_BD = F.normalize(model.encode_image(x), dim=-1)
        text_BD = F.normalize(model.encode_text(texts_KNT[y, captions]), dim=-1)
        logits_BB = model.logit_scale.exp() * image_BD @ text_BD.T
        target_BB = F.normalize((y[:, None] == y[None]).float(), p=1, dim=1)
        loss = (F.cross_entropy(logits_BB, target_BB) + F.cross_entropy(logits_BB.T, target_BB)) / 2
        _descend(model, loss, optimiser, schedule)
        report("guide", step + 1, recipe.guide_steps)
    return model.eval().requires_grad_(False)


def train_vae(x_B3HW: torch.Tensor, recipe: Recipe, report: Progress) -> AutoencoderKL:
    """L1 + 0.5 MSE + KL on half plain, half augmented images: a VAE that has only seen upright digits draws rotated
    ones at 16 dB, and no fine-tuning of the UNet lifts that ceiling (measured)."""
    rng = recipe.stream("vae")
    vae = build_vae(recipe.stream("vae weights"))
    optimiser, schedule = _adamw(vae, recipe.vae_steps, recipe.vae_rate, decay=0.01, beta=0.99, warm=0.1)
    half = recipe.vae_batch // 2
    for step in range(recipe.vae_steps):
        x = x_B3HW[torch.from_numpy(rng.integers(len(x_B3HW), size=recipe.vae_batch))]
        x = torch.cat([x[:half], recolour(turn_and_flip(x[half:], rng), rng)]) * 2 - 1
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * _normals(rng, posterior.mean.shape)
        y = vae.decode(z).sample
        loss = F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x) + 1e-4 * posterior.kl().mean() / x[0, 0].numel()
        _descend(vae, loss, optimiser, schedule)
        report("autoencoder", step + 1, recipe.vae_steps)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        spread = vae.encode(x_B3HW * 2 - 1).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=1 / float(spread))  # latents of about unit variance, as the noise has
    return vae


def train_unet(x_B3HW: torch.Tensor, labels: torch.Tensor, vae: AutoencoderKL, captions_KNTE: torch.Tensor,
               scheduler: DDIMScheduler, recipe: Recipe, report: Progress) -> UNet2DConditionModel:
    """v-prediction on cached posteriors, with caption dropout for guidance; returns the moving average of the weights.

    `captions_KNTE[k, n]` is the text of caption n of class k; class K holds the empty text."""
    rng = recipe.stream("unet")
    unet, average = (build_unet(recipe.stream("unet weights")) for _ in range(2))
    with torch.no_grad():
        posterior = vae.encode(x_B3HW * 2 - 1).latent_dist
    optimiser, schedule = _adamw(unet, recipe.unet_steps, recipe.unet_rate, decay=1e-3, beta=0.99, warm=0.05)
    for step in range(recipe.unet_steps):
        rows = torch.from_numpy(rng.integers(len(x_B3HW), size=recipe.unet_batch))
        mean, std = posterior.mean[rows], posterior.std[rows]
        z_0 = (mean + std * _normals(rng, mean.shape)) * vae.config.scaling_factor
        noise = _normals(rng, mean.shape)
        t_B = torch.from_numpy(rng.integers(scheduler.config.num_train_timesteps, size=recipe.unet_batch))
        dropped = torch.from_numpy(rng.random(recipe.unet_batch) < recipe.caption_drop)
        kinds = torch.from_numpy(rng.integers(captions_KNTE.shape[1], size=recipe.unet_batch))
        text_BTE = captions_KNTE[torch.where(dropped, len(CLASS_NAMES), labels[rows]), kinds]
        v = unet(scheduler.add_noise(z_0, noise, t_B), t_B, encoder_hidden_states=text_BTE).sample
        _descend(unet, F.mse_loss(v, scheduler.get_velocity(z_0, noise, t_B)), optimiser, schedule)
        keep = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - keep)
        report("generator", step + 1, recipe.unet_steps)
    return average.eval().requires_grad_(False)


def _adamw(model: torch.nn.Module, steps: int, rate: float, *, decay: float, beta: float,
           warm: float) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, beta), weight_decay=decay, fused=True)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=warm)


def _descend(model: torch.nn.Module, loss: torch.Tensor, optimiser: torch.optim.Optimizer,
             schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    schedule.step()


@contextmanager
def _quiet_single_thread() -> Iterator[None]:
    """One thread: two cost twice the CPU for the same speed at this size, and results differ between counts.
    Denormal numbers are flushed, as they cost time. Library progress bars are silenced."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        # fork_rng: constructors draw throw-away weights from the global generator
        with quiet_libraries(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, H, W, 3) to float32 (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous()


def _normals(rng: np.random.Generator, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def _uniforms(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.random(shape, dtype=np.float32))


def shift_and_turn(x_B3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Turn by up to 15 degrees, scale by up to 15 %, shift by up to 2 pixels of 16."""
    angle, size, dx, dy = (_uniforms(rng, 4, len(x_B3HW)) * 2 - 1) * torch.tensor([[0.26], [0.15], [0.25], [0.25]])
    cos, sin = torch.cos(angle) * (1 + size), torch.sin(angle) * (1 + size)
    theta = torch.stack([torch.stack([cos, -sin, dx], -1), torch.stack([sin, cos, dy], -1)], 1)
    grid = F.affine_grid(theta, list(x_B3HW.shape), align_corners=False)
    return F.grid_sample(x_B3HW, grid, align_corners=False)


def turn_and_flip(x_B3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Turn each row by a random multiple of 90 degrees and mirror half of the rows."""
    turns, flips = rng.integers(4, size=len(x_B3HW)), rng.random(len(x_B3HW)) < 0.5
    rows = [torch.rot90(x, int(k), (1, 2)) for x, k in zip(x_B3HW, turns, strict=True)]
    return torch.stack([x.flip(2) if flip else x for x, flip in zip(rows, flips, strict=True)])


def recolour(x_B3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """30 % of rows stay grey, 25 % are inverted, 45 % get a random ink and a random paper colour."""
    kind = _uniforms(rng, len(x_B3HW), 1, 1, 1)
    ink, paper = _uniforms(rng, 2, len(x_B3HW), 3, 1, 1)
    coloured = paper + x_B3HW * (ink - paper)
    return torch.where(kind < 0.3, x_B3HW, torch.where(kind < 0.55, 1 - x_B3HW, coloured))


def build_tokenizer() -> CLIPTokenizer:
    """CLIP byte-pair tokenizer in which every caption word is one token; other words fall back to bytes, never to
    an unknown token. It lowercases text and added tokens alike: an added token must be given in lowercase."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    ranks: dict[tuple[str, str], int] = {}  # of the merges, in the order they are learned
    for word in sorted({word for caption in CAPTIONS for word in caption.format("").split()} | set(CLASS_NAMES)):
        pieces = _merged([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces[:2] = [pieces[0] + pieces[1]]
    vocabulary = [*SPECIALS, *letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in ranks)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=list(ranks),
                         model_max_length=CONTEXT)


def _merged(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """What the merges so far make of a word: the lowest rank goes first, so earlier words can cut into later ones."""
    while known := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        i = min(known)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """int64 (B, CONTEXT) token ids."""
    return tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt").input_ids


def initialise(model: torch.nn.Module, rng: np.random.Generator, gain: float = 3**-0.5) -> None:
    """Redraw every parameter from `rng`: normal weights of standard deviation gain / sqrt(fan in) (torch's own default
    is 1 / sqrt(3 fan in)), text embeddings 0.02, norms 1, biases 0. Parameters without a dimension keep their value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith(("weight", "bias")):
                parameter.fill_(float(name.endswith("weight")))
            elif parameter.ndim:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else len(parameter)
                std = 0.02 if name.startswith(("token_embedding", "positional_embedding")) else gain * fan_in**-0.5
                parameter.copy_(_normals(rng, parameter.shape) * std)


def guide_config(vocabulary: int) -> dict[str, Any]:
    """open_clip's model configuration. Vision pools at the class token, so that the tower has an exact counterpart in
    CLIPVisionModel; text pools at the end token by id and not at the largest id, which breaks with added tokens."""
    return {"embed_dim": 32,
            "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 64, "layers": 3, "head_width": 16,
                           "pool_type": "tok"},
            "text_cfg": {"context_length": CONTEXT, "vocab_size": vocabulary, "width": 32, "heads": 2, "layers": 2,
                         "mlp_ratio": 2.0, "hf_tokenizer_name": "local", "pool_type": "eos", "eos_id": EOS,
                         "pad_id": EOS}}


def build_guide(vocabulary: int, rng: np.random.Generator, config: dict[str, Any] | None = None) -> CLIP:
    from open_clip import CLIP

    model = CLIP(**(config or guide_config(vocabulary)))
    initialise(model, rng, gain=0.7)
    return model


def build_vae(rng: np.random.Generator, **changes: Any) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    shape: dict[str, Any] = {
        "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16,
        "latent_channels": 4, "mid_block_add_attention": False}
    vae = AutoencoderKL(in_channels=3, out_channels=3, **{**shape, **changes})
    initialise(vae, rng)
    return vae


def build_unet(rng: np.random.Generator, **changes: Any) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    shape: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32, "norm_num_groups": 8,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4)}
    unet = UNet2DConditionModel(**{**shape, **changes})
    initialise(unet, rng)
    return unet


def build_scheduler(prediction_type: str = "v_prediction") -> DDIMScheduler:
    from diffusers import DDIMScheduler

    return DDIMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)


def text_encoder_of(guide: CLIP) -> CLIPTextModel:
    """The guide's text tower as a CLIPTextModel with the same hidden states, to the bit. Frozen."""
    from transformers import CLIPTextConfig, CLIPTextModel

    first = guide.transformer.resblocks[0]
    config = CLIPTextConfig(
        vocab_size=guide.vocab_size, hidden_size=guide.token_embedding.embedding_dim, hidden_act="gelu",
        intermediate_size=first.mlp.c_fc.out_features, num_hidden_layers=len(guide.transformer.resblocks),
        num_attention_heads=first.attn.num_heads, max_position_embeddings=guide.context_length,
        projection_dim=guide.text_projection.shape[1], bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS)
    model = CLIPTextModel(config)
    state = {"embeddings.token_embedding.weight": guide.token_embedding.weight,
             "embeddings.position_embedding.weight": guide.positional_embedding}
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}
    for i, block in enumerate(guide.transformer.resblocks):
        for kind in ("weight", "bias"):
            query, key, value = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            state |= {f"encoder.layers.{i}.self_attn.{n}_proj.{kind}": part
                      for n, part in (("q", query), ("k", key), ("v", value))}
            state |= {f"encoder.layers.{i}.{theirs}.{kind}": block.get_parameter(f"{ours}.{kind}")
                      for ours, theirs in names.items()}
    state |= {f"final_layer_norm.{kind}": guide.ln_final.get_parameter(kind) for kind in ("weight", "bias")}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def caption_table(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> torch.Tensor:
    """float32 (K + 1, N, T, E): hidden states of N captions of each class, then the empty text N times."""
    texts = [[caption.format(name) for caption in CAPTIONS] for name in CLASS_NAMES] + [[""] * len(CAPTIONS)]
    with torch.no_grad():
        return torch.stack([text_encoder(tokenize(tokenizer, row))[0] for row in texts])


def assemble(vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel,
             scheduler: DDIMScheduler) -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
                                   scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_guide(guide: CLIP, tokenizer: CLIPTokenizer, folder: Path, config: dict[str, Any] | None = None) -> None:
    """Write open_clip's local-dir layout: configuration, safetensors, tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model_config = config or guide_config(len(tokenizer))
    size = model_config["vision_cfg"]["image_size"]
    preprocess = {"size": [size, size], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                  "resize_mode": "squash"}
    settings = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    save_file({name: t.contiguous() for name, t in guide.state_dict().items()},
              folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)


def measure(pipe: StableDiffusionPipeline, guide: CLIP, test: tuple[np.ndarray, np.ndarray], recipe: Recipe,
            report: Progress) -> dict[str, float]:
    """Quality on the `test` part: shares in [0, 1], PSNR in dB."""
    x_B3HW = to_tensor(test[0])
    with torch.no_grad():
        texts_KD = guide.encode_text(tokenize(pipe.tokenizer, [PROMPT.format(n) for n in CLASS_NAMES]), normalize=True)
        measured = {"zero_shot": _share_named(guide, texts_KD, x_B3HW, test[1]),
                    "psnr_upright_db": _psnr(pipe.vae, x_B3HW),
                    "psnr_rotated_db": _psnr(pipe.vae, torch.rot90(x_B3HW, 1, (2, 3)))}
        if recipe.measured_samples:
            wanted = np.arange(recipe.measured_samples) % len(CLASS_NAMES)
            samples = _sample(pipe, [PROMPT.format(CLASS_NAMES[k]) for k in wanted], recipe, report)
            measured["samples_named_right"] = _share_named(guide, texts_KD, samples, wanted)
    return {name: round(value, 4) for name, value in measured.items()}


def _share_named(guide: CLIP, texts_KD: torch.Tensor, x_B3HW: torch.Tensor, labels: np.ndarray) -> float:
    named = (guide.encode_image(x_B3HW * 2 - 1) @ texts_KD.T).argmax(1)
    return float((named == torch.from_numpy(labels)).float().mean())


def _psnr(vae: AutoencoderKL, x_B3HW: torch.Tensor) -> float:
    """Mean over images of the PSNR of the reconstruction from the posterior mean."""
    y = vae.decode(vae.encode(x_B3HW * 2 - 1).latent_dist.mean).sample
    error_B = ((y / 2 + 0.5).clamp(0, 1) - x_B3HW).square().mean((1, 2, 3))
    return float((-10 * error_B.log10()).mean())


def _sample(pipe: StableDiffusionPipeline, prompts: list[str], recipe: Recipe, report: Progress,
            batch: int = 64) -> torch.Tensor:
    """float32 (n, 3, H, W): text to image at guidance scale 2 by diffusers' own pipeline."""
    rng = recipe.stream("samples")
    rows = []
    for first in range(0, len(prompts), batch):
        texts = prompts[first : first + batch]
        noise = _normals(rng, torch.Size((len(texts), 4, 8, 8)))
        rows.append(pipe(texts, latents=noise, guidance_scale=2.0, num_inference_steps=recipe.measured_steps, height=16,
                         width=16, output_type="pt").images)
        report("measuring", min(first + batch, len(prompts)), len(prompts))
    return torch.cat(rows)
