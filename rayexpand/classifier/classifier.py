"""Training an image classifier step by step: one optimiser step per global batch, the same for one process or many.

A worker hands in its slice of the global batch (`core.mixing.worker_rows`); with equal slices, the mean of the
workers' gradients that DDP takes is the gradient of the whole batch. Nothing here reads files, draws from a global
generator or knows about workers beyond `wrap`.

    here              meaning, unit
    x_BHWC            uint8 images; the network sees (x / 255 - mean) / std
    y_BK              float32 labels, one-hot or soft; mixing and smoothing happen here
    step              number of the optimiser step, from 0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the customary name)

from rayexpand.classifier.backbones import build_backbone
from rayexpand.classifier.mixing import mixed, smooth
from rayexpand.classifier.recipe import Recipe, drw_is_on, drw_weights, lr_at
from rayexpand.contract.errors import ConfigError, Diverged
from rayexpand.contract.rng import generator, row_key

CHUNK_IMAGES, CHUNK_PIXELS = 256, 2**24  # of one evaluation call, whichever is less


class TrainBatch(NamedTuple):
    """One worker's slice of the global batch of one step."""

    x_BHWC: np.ndarray  # uint8
    y_BK: np.ndarray  # float32
    step: int
    views_BVHWC: np.ndarray | None = None  # uint8; two augmented views of each image, compared with it (recipe.jsd)
    mix_B5: np.ndarray | None = None  # float32; how each image is mixed with its partner (recipe.mix_per image)


class Teacher(NamedTuple):
    """What a classifier also learns from: logits (B, K) for the images of a batch, which it gets in [0, 1] as the
    student sees them, with their share of the loss and the temperature of both softmax functions."""

    logits: Callable[[TrainBatch, Tensor], Tensor]
    weight: float
    temperature: float


class Classifier:
    """A network, its optimiser and the number of the next step.

    `wrap` takes the network on its device and returns what is called in training (DDP goes here); `world` is the number
    of workers. `total_steps` fixes the learning-rate schedule. `class_counts` (K,), real images of each class, is what
    deferred re-weighting weighs by: its loss is divided by the sum of the weights of the labels in the batch of all
    workers, as torch's CrossEntropyLoss does with class numbers, and so also with soft labels, where torch divides by
    the number of images; a label of one class is not to count differently for being written as a vector. `mean`
    averages a tensor over the workers, in place or not. `module` is trained instead of the recipe's backbone. Initial
    weights depend on `seed` only. BatchNorm normalises
    over the slice a worker holds, and dropout and stochastic depth draw masks over it, keyed by (seed, step): with
    these, and only with these, results depend on the number of workers.
    """

    def __init__(self, recipe: Recipe, n_classes: int, seed: int, total_steps: int, *,
                 device: str | torch.device = "cpu", wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
                 world: int = 1, class_counts: np.ndarray | None = None,
                 mean: Callable[[Tensor], Tensor] = lambda value: value, module: nn.Module | None = None,
                 teacher: Teacher | None = None) -> None:
        assert n_classes >= 2
        assert total_steps >= 1
        self.recipe, self.n_classes, self.seed, self.total_steps = recipe, n_classes, seed, total_steps
        self.world, self.step, self._mean_over_workers, self._teacher = world, 0, mean, teacher
        self.device = torch.device(device)
        self._layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.module = (build_backbone(recipe, n_classes, seed) if module is None else module).to(self.device)
        self.module.to(memory_format=self._layout)
        self._wrapped = wrap(self.module)
        self.optimiser = make_optimiser(self.module, recipe)
        counts_K = np.ones(n_classes) if class_counts is None else class_counts
        self._weights_K = torch.tensor(drw_weights(counts_K, recipe.drw), dtype=torch.float32, device=self.device)
        self._mean, self._std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1)
                                 for v in (recipe.mean, recipe.std))

    def update(self, batch: TrainBatch) -> float:
        """One optimiser step; the mean loss of this slice. Raises Diverged where the loss is not finite."""
        assert batch.step == self.step, f"batch of step {batch.step} at step {self.step}"
        assert self.world == 1 or len(batch.x_BHWC) % 2 == 0, "a worker's slice holds pairs"
        loss = self._backward(batch)
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = lr_at(self.recipe, self.step, self.total_steps)
        self.optimiser.step()
        value = float(loss)  # last, because a GPU waits here
        if not math.isfinite(value):
            raise Diverged(f"training diverged: the loss is {value} at step {self.step} of {self.total_steps}. "
                           "Lower recipe.lr, lengthen warmup_epochs, or set clip_norm")
        self.step += 1
        return value

    def _backward(self, batch: TrainBatch) -> Tensor:
        """Leaves the gradient of a batch in the weights, and returns its loss."""
        assert batch.y_BK.shape == (len(batch.x_BHWC), self.n_classes)
        x_BCHW, y_BK = self._images(batch.x_BHWC), torch.from_numpy(batch.y_BK).to(self.device)
        x_BCHW, y_BK = mixed(self.recipe, self.seed, self.step, x_BCHW, y_BK, batch.mix_B5)
        if batch.views_BVHWC is not None:
            x_BCHW = torch.cat([x_BCHW, *(self._images(batch.views_BVHWC[:, view]) for view in (0, 1))])
        is_weighed = drw_is_on(self.recipe, self.step, self.total_steps)
        weight = self._mean_over_workers((y_BK * self._weights_K).sum(dim=1).mean()) if is_weighed else None
        y_BK = smooth(y_BK, self.recipe.smoothing, self.recipe.smoothing_mode)
        self._wrapped.train()
        self.optimiser.zero_grad(set_to_none=True)
        with self._masks(), self._autocast():
            logits_BK = self._wrapped(x_BCHW)
        if weight is not None:  # smoothing has no part in the divisor, as with torch's label_smoothing
            y_BK = y_BK * self._weights_K / weight
        logits_BK, own = logits_BK.float(), slice(len(y_BK))  # views of the same images come behind them
        loss = loss_of(logits_BK[own], y_BK, self.recipe.loss)
        if (teacher := self._teacher) is not None:
            taught_BK = teacher.logits(batch, x_BCHW[own] * self._std + self._mean)
            loss = (1 - teacher.weight) * loss + teacher.weight * distillation(taught_BK, logits_BK[own],
                                                                               teacher.temperature)
        if batch.views_BVHWC is not None:
            loss = loss + self.recipe.jsd * jensen_shannon(*logits_BK.chunk(3))
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def logits(self, x_BHWC: np.ndarray) -> np.ndarray:
        """float32 (B, K) of uint8 images, in evaluation mode."""
        self.module.eval()
        size = min(CHUNK_IMAGES, max(1, CHUNK_PIXELS // max(1, x_BHWC.shape[1] * x_BHWC.shape[2])))
        rows = [np.zeros((0, self.n_classes), np.float32)]
        for start in range(0, len(x_BHWC), size):
            with self._autocast():
                out_BK = self.module(self._images(x_BHWC[start:start + size]))
            rows.append(out_BK.float().cpu().numpy())
        return np.concatenate(rows)

    def state(self) -> dict[str, Any]:
        """Copy of network, optimiser and step: tensors on the CPU and plain values (torch.load with weights_only)."""
        return {"model": _copied(dict(self.module.state_dict())), "optimiser": _copied(self.optimiser.state_dict()),
                "step": self.step}

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state()`, bit for bit on the CPU."""
        self.module.load_state_dict(state["model"])
        self.optimiser.load_state_dict(_copied(state["optimiser"]))
        self.step = int(state["step"])

    def _images(self, x_BHWC: np.ndarray) -> Tensor:
        x_BCHW = torch.from_numpy(np.ascontiguousarray(x_BHWC)).to(self.device).permute(0, 3, 1, 2)
        return x_BCHW.to(torch.float32, memory_format=self._layout).div_(255).sub_(self._mean).div_(self._std)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp and self.device.type == "cuda")

    def _masks(self) -> _Seeded:
        key = row_key(self.seed, "classifier", "", self.step, 0, "masks")
        return _Seeded(int.from_bytes(key[:8], "little"), self.device)


class _Seeded:
    """Seeds a fork of torch's generators: dropout and stochastic depth take no generator of their own."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)


def try_recipe(recipe: Recipe, n_classes: int, seed: int) -> None:
    """One training pass without a step on two random images (one, if that is the batch), and one test pass, each at
    its size, on the CPU. Raises ConfigError with what the network says where it cannot take them, and what
    `build_backbone` raises."""
    classifier = Classifier(recipe, n_classes, seed, 1)
    rng, images = generator(row_key(seed, "classifier", "", 0, 0, "try")), min(2, recipe.batch)
    y_BK = np.eye(n_classes, dtype=np.float32)[:images]
    problems = []
    for name, side in (("size", recipe.size), ("test_size", recipe.test_size or recipe.size)):
        x_BHWC = rng.integers(0, 256, (images, side, side, 3), np.uint8)
        try:
            if name == "size":
                classifier._backward(TrainBatch(x_BHWC, y_BK, 0))
            else:
                classifier.logits(x_BHWC)
        except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"{name}: backbone {recipe.backbone} cannot take {images} images of {side} x {side} pixels "
                            f"in {'training' if name == 'size' else 'tests'} ({_one_line(error)}); {_advice(error)}")
    if problems:
        raise ConfigError("recipe", problems)


def _advice(error: Exception) -> str:
    if "more than 1 value per channel" in str(error):  # torch's batch normalisation
        return ("batch normalisation needs more than one value: raise batch to 2 or more, raise size, or use "
                "backbone_args norm: group where the backbone has it")
    return ("set size and test_size to what it is made for, give backbone_args such as img_size, or take another "
            "backbone")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def loss_of(logits_BK: Tensor, y_BK: Tensor, kind: str) -> Tensor:
    """Mean over the batch of the cross-entropy with soft labels; bce: mean over batch and classes, as timm's."""
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits_BK, y_BK)
    return -(y_BK * F.log_softmax(logits_BK, dim=1)).sum(dim=1).mean()


def jensen_shannon(*logits_BK: Tensor) -> Tensor:
    """Mean over the batch of the Jensen-Shannon divergence of several answers for the same images, in nats (AugMix,
    Hendrycks et al. 2020; the mean answer at least 1e-7, as in its code)."""
    logp_VBK = F.log_softmax(torch.stack(logits_BK), dim=-1)
    mean_BK = logp_VBK.exp().mean(dim=0).clamp(min=1e-7).log()
    return (logp_VBK.exp() * (logp_VBK - mean_BK)).sum(dim=-1).mean()


def distillation(teacher_BK: Tensor, student_BK: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)), mean over the batch (Hinton et al. 2015)."""
    log_t_BK, log_s_BK = (F.log_softmax(one / temperature, dim=1) for one in (teacher_BK, student_BK))
    return temperature**2 * F.kl_div(log_s_BK, log_t_BK, reduction="batchmean", log_target=True)


def make_optimiser(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over the weights of `module`, with weight decay on all or on some of them."""
    tokens: Any = getattr(module, "no_weight_decay", set)  # timm's list of position embeddings and class tokens
    spared: set[str] = set() if recipe.decay_all else {
        *(name for name, p in module.named_parameters() if p.ndim <= 1), *tokens()}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in module.named_parameters() if name not in spared],
         "weight_decay": recipe.weight_decay},
        {"params": [p for name, p in module.named_parameters() if name in spared], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if recipe.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    if recipe.optimiser == "lamb":
        from timm.optim import Lamb

        return Lamb(groups, lr=recipe.lr)  # clips the gradient's norm at 1, timm's default
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.optimiser == "nesterov")


def _copied(value: Any) -> Any:
    """Nested containers with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
