"""What guidance costs: batched against one image at a time, guided against plain, time, arithmetic and memory.

    python -m tests.benchmarks.guided                                  embedded default, on this CPU
    python -m tests.benchmarks.guided --size sd15 --device cuda        Stable Diffusion 1.5's size with random weights
    python -m tests.benchmarks.guided --size tiny                      the same code in seconds

Run from the root of the repository. All sides of a comparison have the same weights and rows and take turns; figures
are medians of the turns, `cpu` in process-seconds (on a shared machine the steadier ones). `load` is the machine's load
average before and after. Prints one JSON object.
"""

# B rows, C channels, H W pixels

from __future__ import annotations

import argparse
import json
import os
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.protocols import Batch, Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable
from rayexpand.data.seeds import digits_split
from rayexpand.diffusion.prototypes import fit_prototypes
from rayexpand.methods import load_method
from rayexpand.models.folders import quiet_libraries
from rayexpand.models.guides import ClassifierGuide, ClipGuide, load_guide
from rayexpand.models.latent import DTYPES, Parts, StableDiffusionPrior
from rayexpand.models.prior import load_prior
from rayexpand.models.tiny import digits
from tests.methods import references

COPIES, GROUPS = 5, 3
CLASSES = ClassTable.of([str(digit) for digit in range(10)], list(digits.CLASS_NAMES))
PRACTICE = {"omega": 16.0, "convention": "score"}
DISTDIFF = {"guide_step": 7, "rho": 0.5, "eps": 3.0}  # the digits job
GIF = {"domains": ["a photo of a"], "adjectives": [""], "rotation": 0, "flip": False}
PROMPT = {"prompt": "a photo of a {name}"}
ON_DIGITS = {"strength": 0.9, "steps": 10, "guidance_scale": 2.0}


@dataclass(frozen=True)
class Case:
    """Models and settings of one size."""

    tools: Tools  # guide of DistDiff
    gif_tools: Tools
    images: list[np.ndarray]  # uint8 seeds, one of each class
    shared: dict[str, Any]  # of img2img and distdiff
    distdiff: dict[str, Any]
    gif: dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Widths of a pipeline with random weights."""

    side: int
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    classifier: dict[str, Any]
    clip: str | None  # open_clip architecture; None: that of the embedded default
    guide_batch: int  # rows that carry a gradient at once


SHAPES = {
    "sd15": Shape(
        512, {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "attention_head_dim": 8,
              "norm_num_groups": 32, "cross_attention_dim": 768,
              "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
              "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)},
        {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "max_position_embeddings": 77, "hidden_act": "quick_gelu"},
        {"backbone": "resnet50", "size": 224}, "ViT-B-32", 2),
    "tiny": Shape(
        32, {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 4,
             "cross_attention_dim": 16, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 4},
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 16, "hidden_act": "gelu"},
        {"preset": "digits"}, None, 2),
}


# Models --------------------------------------------------------------------------------------------------------------


def embedded(device: str) -> Case:
    """The embedded default with the settings of the digits jobs."""
    digits.ensure()
    prior = load_prior("digits", device=device)
    guide = load_guide("digits", None, CLASSES.name, device=device)
    images, labels = digits_split()["seeds"]
    seeds = [images[np.flatnonzero(labels == label)[0]] for label in range(len(CLASSES))]
    tools = Tools(CLASSES, prior, guide, _prototypes(guide, images[:100], labels[:100]))
    return Case(tools, tools, seeds, {**ON_DIGITS, **PROMPT}, DISTDIFF, {**ON_DIGITS, **GIF})


def random_weights(size: str, device: str, dtype: str) -> Case:
    """Models of a size with random weights and the papers' settings: the arithmetic is that of the real ones."""
    import open_clip
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from rayexpand.classifier.backbones import build_backbone

    shape, where = SHAPES[size], torch.device(device)
    tokenizer = digits.build_tokenizer()
    tokenizer.model_max_length = shape.text["max_position_embeddings"]
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(0)  # initialisers offer nothing else
        levels = len(shape.vae["block_out_channels"])
        unet = UNet2DConditionModel(sample_size=shape.side // 2 ** (levels - 1), in_channels=4, out_channels=4,
                                    **shape.unet).to(DTYPES[dtype])
        vae = AutoencoderKL(latent_channels=4, sample_size=shape.side, **shape.vae,
                            down_block_types=("DownEncoderBlock2D",) * levels,
                            up_block_types=("UpDecoderBlock2D",) * levels)
        text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                                            eos_token_id=tokenizer.eos_token_id,
                                            pad_token_id=tokenizer.pad_token_id, **shape.text)).to(DTYPES[dtype])
        recipe = make_recipe(shape.classifier)
        classifier = ClassifierGuide(build_backbone(recipe, len(CLASSES), 0), recipe, where)
        if shape.clip is None:
            clip = load_guide("digits", None, CLASSES.name, device=device)
        else:
            clip = ClipGuide(open_clip.create_model(shape.clip), open_clip.get_tokenizer(shape.clip),
                             [f"a photo of a {name}" for name in CLASSES.name], where)
    prior = StableDiffusionPrior(Parts(unet, vae, text, tokenizer, digits.build_scheduler("epsilon")), where)
    images = [RowRng(0, "pixels", str(i), 0)("image").integers(0, 256, (shape.side, shape.side, 3), dtype=np.uint8)
              for i in range(len(CLASSES))]
    small = np.stack(images)[:, :64, :64]
    prototypes = _prototypes(classifier, small, np.arange(len(CLASSES)))
    return Case(Tools(CLASSES, prior, classifier, prototypes), Tools(CLASSES, prior, clip), images, {},
                {"guide_batch": shape.guide_batch}, {"chunk": shape.guide_batch})


def _prototypes(guide: Any, images_BHWC: np.ndarray, labels_B: np.ndarray) -> Any:
    with torch.no_grad():
        f_BD = guide.features(torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2) / 255)
    return fit_prototypes(f_BD.float().cpu().numpy(), labels_B, len(CLASSES), GROUPS, guide_hash="",
                          class_keys=CLASSES.key)


# Measuring -----------------------------------------------------------------------------------------------------------


def batch_of(method: Any, images: list[np.ndarray], rows: int) -> Batch:
    """`rows` rows, COPIES of each seed, the classes in turn."""
    draws, rngs, chosen = [], [], []
    for row in range(rows):
        seed, copy = divmod(row, COPIES)
        label, seed_id = seed % len(images), f"seed-{seed}"
        rngs.append(RowRng(0, method.name, seed_id, copy))
        draws.append(method.draw(seed_id, label, copy, row, CLASSES, rngs[-1]))
        chosen.append(images[label])
    return Batch(tuple(draws), tuple(chosen), tuple(rngs), (False,) * rows)


def take_turns(sides: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds of each side in each turn, after one turn that warms up."""
    spent: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in sides}
    for turn in range(turns + 1):
        for name, call in sides.items():
            _wait()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            _wait()
            if turn:
                spent[name]["wall"].append(time.perf_counter() - wall)
                spent[name]["cpu"].append(time.process_time() - cpu)
    return spent


def ratio(spent: dict[str, dict[str, list[float]]], above: str, below: str, clock: str) -> float:
    """Median over the turns of what `above` took over what `below` took."""
    return round(median(a / b for a, b in zip(spent[above][clock], spent[below][clock], strict=True)), 3)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gflops(call: Callable[[], Any]) -> float:
    """Counted matrix products, convolutions and attention of a call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that live at one time; those of a recomputation too, which hooks
    on saved tensors do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if (key := id(storage)) in self._known:
            return
        self._known.add(key)
        self.now += (size := storage.nbytes())
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(call: Callable[[], Any], tools: Tools) -> int:
    """Most bytes that live at once beside the weights: of the device on a GPU, of torch's tensors on a CPU."""
    if torch.device(tools.prior.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with _Live() as live:
        call()
    return live.peak


# Comparisons ---------------------------------------------------------------------------------------------------------


class _Sampler(references.Sampler):
    """The literal sampler for weights that predict v."""

    def psi(self, z: torch.Tensor, t: int, text: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        v, abar = super().psi(z, t, text, empty), self.abar[t]
        return abar.sqrt().float() * v + (1 - abar).sqrt().float() * z


def literal(case: Case, rows: int, turns: int) -> dict[str, Any]:
    """Images/s of the batched methods over those of a literal loop over single images (GIF: single groups)."""
    distdiff: Any = load_method("distdiff", {**case.shared, **case.distdiff})
    gif: Any = load_method("gif", case.gif)
    of, prior = case.tools.prototypes, case.tools.prior
    batches = {method.name: batch_of(method, case.images, rows) for method in (distdiff, gif)}
    sampler = _Sampler(prior, distdiff.steps, distdiff.guidance_scale)

    def one_by_one() -> list[torch.Tensor]:
        batch = batches["distdiff"]
        return [references.distdiff(
            sampler, case.tools.guide, image, draw.prompt, rng, of.class_KD[draw.target_label],
            of.group_KGD[draw.target_label], executed=draw.steps_run, guide_step=distdiff.guide_step,
            lookahead=distdiff.lookahead, rho=distdiff.rho, eps=distdiff.eps, lambda_g=distdiff.lambda_g).pixels
            for image, draw, rng in zip(batch.images, batch.draws, batch.rngs, strict=True)]

    def group_by_group() -> list[torch.Tensor]:
        batch, made = batches["gif"], []
        for start in range(0, rows, COPIES):
            part = slice(start, start + COPIES)
            made += references.gif(sampler, case.gif_tools.guide, batch.images[start],
                                   [draw.prompt for draw in batch.draws[part]], list(batch.rngs[part]),
                                   executed=batch.draws[start].steps_run, eps=gif.eps, step=gif.step,
                                   lambdas=(gif.lambda_cls, gif.lambda_ent, gif.lambda_div))
        return [one.pixels for one in made]

    found: dict[str, Any] = {}
    sides: dict[str, Callable[[], Any]] = {
        "distdiff": lambda: distdiff.expand(batches["distdiff"], case.tools), "distdiff literal": one_by_one,
        "gif": lambda: gif.expand(batches["gif"], case.gif_tools), "gif literal": group_by_group}
    spent = take_turns(sides, turns)
    for name, singly in (("distdiff", one_by_one), ("gif", group_by_group)):
        found[name] = {"rows": rows, **_rates(spent, name, rows), "literal": _rates(spent, f"{name} literal", rows),
                       "times_faster_wall": ratio(spent, f"{name} literal", name, "wall"),
                       "times_faster_cpu": ratio(spent, f"{name} literal", name, "cpu"),
                       "levels_apart": _levels_apart(sides[name]().images, singly())}
    return found


def _rates(spent: dict[str, dict[str, list[float]]], name: str, rows: int) -> dict[str, float]:
    return {"images_per_second": round(rows / median(spent[name]["wall"]), 2),
            "images_per_cpu_second": round(rows / median(spent[name]["cpu"]), 2)}


def _levels_apart(images: list[np.ndarray], pixels: list[torch.Tensor]) -> dict[str, float]:
    """Largest difference of 8-bit pixels, and the share of images in which any differs by more than one level."""
    apart = [int(np.abs(a.astype(int) - (b[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(int)).max())
             for a, b in zip(images, pixels, strict=True)]
    return {"largest": max(apart), "images_over_1": sum(one > 1 for one in apart) / len(apart)}


def costs(case: Case, rows: int, turns: int) -> dict[str, Any]:
    """Guided methods over plain image-to-image of the same strength and steps: time beside counted arithmetic."""
    sides: dict[str, tuple[Any, Tools]] = {"img2img": (load_method("img2img", case.shared), case.tools)}
    for length in (1, 2):
        sides[f"distdiff L={length}"] = (load_method("distdiff", {**case.shared, **case.distdiff,
                                                                  "lookahead": length}), case.tools)
    sides["distdiff L=2 recomputed"] = (load_method("distdiff", {**case.shared, **case.distdiff, "recompute": True}),
                                        case.tools)
    for every in (1, 5):
        sides[f"practice, every {every}"] = (load_method("practice", {**case.shared, **PRACTICE, "every": every}),
                                             case.tools)
    gif: Any = load_method("gif", case.gif)
    sides["gif"] = (gif, case.gif_tools)
    sides["gif unguided"] = (gif.model_copy(update={"guidance": "none"}), case.gif_tools)
    calls = {name: _call(method, case, tools, rows) for name, (method, tools) in sides.items()}
    spent = take_turns(calls, turns)
    counted = {name: gflops(call) / rows for name, call in calls.items()}
    base = {name: "gif unguided" if name.startswith("gif") else "img2img" for name in calls}
    return {name: {**_rates(spent, name, rows), "gflop_per_image": round(counted[name], 4),
                   "gflops_per_second": round(counted[name] * rows / median(spent[name]["wall"]), 2),
                   "against": base[name], "counted_ratio": round(counted[name] / counted[base[name]], 3),
                   "wall_ratio": ratio(spent, name, base[name], "wall"),
                   "cpu_ratio": ratio(spent, name, base[name], "cpu")} for name in calls}


def _call(method: Any, case: Case, tools: Tools, rows: int) -> Callable[[], Any]:
    batch = batch_of(method, case.images, rows)
    return lambda: method.expand(batch, tools)


def memory(case: Case, rows: int) -> dict[str, int]:
    """Peak bytes of one call of DistDiff for each way to hold the graph, and of plain image-to-image."""
    whole = case.distdiff.get("guide_batch", rows)
    calls = {}
    for size in (whole, max(1, whole // 4)):
        for way in (False, True):
            method = load_method("distdiff", {**case.shared, **case.distdiff, "guide_batch": size, "recompute": way})
            calls[f"{'recomputed' if way else 'kept'}, {size} rows at once"] = _call(method, case, case.tools, rows)
    calls["img2img"] = _call(load_method("img2img", case.shared), case, case.tools, rows)
    return {name: peak_bytes(call, case.tools) for name, call in calls.items()}


def operands(side: int, device: str, dtype: str) -> list[torch.Tensor]:
    """Two square matrices of standard normals. With ones or zeros a GPU switches few transistors, draws less power and
    keeps a higher clock than it does at work, so the ceiling would be one that nothing reaches."""
    drawn = torch.Generator(device).manual_seed(0)
    return [torch.randn(side, side, device=device, dtype=DTYPES[dtype], generator=drawn) for _ in range(2)]


def matmul_ceiling(device: str, dtype: str, seconds: float = 0.5) -> float:
    """TFLOP/s of a large matrix product: the best such a device does with numbers as a network has them."""
    side = 8192 if device == "cuda" else 1024
    a, b = operands(side, device, dtype)
    for _ in range(3):
        a @ b
    _wait()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        a @ b
        _wait()
        done += 1
    return 2 * side**3 * done / (time.perf_counter() - began) / 1e12


def repeats(case: Case, rows: int) -> dict[str, bool]:
    """Whether two calls with the same rows give the same bytes."""
    calls = {"distdiff": _call(load_method("distdiff", {**case.shared, **case.distdiff}), case, case.tools, rows),
             "gif": _call(load_method("gif", case.gif), case, case.gif_tools, rows)}
    return {name: all(np.array_equal(a, b) for a, b in zip(call().images, call().images, strict=True))
            for name, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["digits", *SHAPES], default="digits")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of UNet and text encoder; else bfloat16 on cuda, "
                        "float32 on cpu")
    parser.add_argument("--rows", type=int, help="of a call; else 50 on digits, 10 elsewhere")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    given = parser.parse_args()
    given.rows = given.rows or (50 if given.size == "digits" else 10)
    torch.set_num_threads(given.threads)
    dtype = given.dtype or ("bfloat16" if given.device == "cuda" else "float32")
    case = embedded(given.device) if given.size == "digits" else random_weights(given.size, given.device, dtype)
    before = os.getloadavg()[0]
    found: dict[str, Any] = {"size": given.size, "device": given.device, "dtype": dtype, "threads": given.threads,
                             "rows": given.rows, "turns": given.turns, "torch": torch.__version__}
    if given.size == "digits":
        found["against_literal"] = literal(case, given.rows, given.turns)
    found["costs"] = costs(case, given.rows, given.turns)
    found["peak_bytes"] = memory(case, given.rows)
    found["run_to_run_bitwise"] = repeats(case, given.rows)
    if given.size != "digits":
        ceiling = matmul_ceiling(given.device, dtype)
        found["matmul_tflops"] = round(ceiling, 3)
        found["share_of_matmul"] = {name: round(one["gflops_per_second"] / 1e3 / ceiling, 4)
                                    for name, one in found["costs"].items()}
    if given.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    print(json.dumps({**found, "load": [round(one, 1) for one in (before, os.getloadavg()[0])]}, indent=1))


if __name__ == "__main__":
    main()
