"""What answers for a baseline: frozen CLIP, logistic regression on its features, its tower in training, or CLIP as the
teacher of the study's own classifier.

    h_ND        features of the guide, projected, as it gives them
    texts_KD    mean texts of the classes, of unit length
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the customary name)

from rayexpand.classifier.classifier import Teacher, TrainBatch
from rayexpand.classifier.recipe import Recipe
from rayexpand.classifier.transforms import test_transform
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.schema import ClassTable
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.loader.images import ImageReader
from rayexpand.loader.loader import Loader, TestSet
from rayexpand.models.guides import ClipGuide, load_guide
from rayexpand.studies.baselines import C_OF_CLIP, ONE

CALL = 256  # images of one call
STRENGTHS = np.logspace(-6, 6, 96)  # of C (Radford et al. 2021, appendix A.3)
ITERATIONS = 1000
ABSENT = -1e9  # logit of a class without images


class FrozenClassifier:
    """A guide with a head of its own or one that was fitted, under the name `logits` that classifiers have. `view`: how
    it is shown images; `facts`: what its result says of it."""

    def __init__(self, guide: ClipGuide, head: Callable[[np.ndarray], np.ndarray], facts: dict[str, Any]) -> None:
        self.guide, self.view, self.facts, self._head = guide, view_of(guide), facts, head

    def logits(self, x_BHWC: np.ndarray) -> np.ndarray:
        return self._head(features(self.guide, x_BHWC))


class ClipNetwork(nn.Module):
    """The image tower of a guide in training, with a head that starts as the class texts: its first logits are those of
    zero-shot. Takes images as the recipe normalises them, of any size."""

    def __init__(self, guide: ClipGuide, recipe: Recipe) -> None:
        super().__init__()
        self.visual: nn.Module = guide.model.visual.requires_grad_(True)
        self.head = nn.Parameter(guide.texts_KD.clone())
        self._guide = guide
        self._mean, self._std = (torch.tensor(one, device=guide.device).view(1, 3, 1, 1) for one in (recipe.mean,
                                                                                                     recipe.std))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BD = self._guide.features(x_BCHW * self._std + self._mean)
        return self._guide.scale * F.normalize(h_BD, dim=-1) @ self.head.T


def guide_of(baseline: dict[str, Any], classes: ClassTable, device: str) -> ClipGuide:
    """The guide of a trial's baseline, its class texts those of the templates. Raises ModelError, ConfigError."""
    guide = load_guide(**baseline["guide"], class_names=classes.asked, device=device)
    if not isinstance(guide, ClipGuide) or guide.classes:
        raise ConfigError(baseline["kind"], [f"guide.weights: {baseline['guide']['weights']} is no CLIP model as it "
                                             "was published; name one"])
    if "templates" in baseline:
        guide.texts_KD = torch.from_numpy(class_texts(guide, classes.asked, baseline["templates"])).to(guide.device)
    return guide


def class_texts(guide: ClipGuide, names: Sequence[str], templates: str | Sequence[str]) -> np.ndarray:
    """float32 (K, D): for each class the mean of its texts of unit length, itself of unit length."""
    rows = [guide.texts(_sentences(name, templates)).mean(axis=0) for name in names]
    return np.stack([row / np.linalg.norm(row) for row in rows])


def _sentences(name: str, templates: str | Sequence[str]) -> list[str]:
    if isinstance(templates, str):
        from open_clip import zero_shot_metadata as published

        known = {"simple": published.SIMPLE_IMAGENET_TEMPLATES, "openai": published.OPENAI_IMAGENET_TEMPLATES}
        return [one(name) for one in known[templates]] if templates in known else [ONE.format(name=name)]
    return [one.format(name=name) for one in templates]


def view_of(guide: ClipGuide) -> Recipe:
    """How CLIP is shown an image: the shorter side to its size, the middle square."""
    side = min(guide.size)
    return Recipe(size=side, test_size=side, resize=side, crop="none", filter=guide.filter)


@torch.inference_mode()
def features(guide: ClipGuide, x_BHWC: np.ndarray) -> np.ndarray:
    """float32 (B, D) of uint8 images, as the guide gives them: projected, not normalised (CLIP's own linear probe)."""
    rows = [guide.features(torch.from_numpy(x_BHWC[i:i + CALL]).permute(0, 3, 1, 2) / 255)
            for i in range(0, len(x_BHWC), CALL)]
    return torch.cat(rows).float().cpu().numpy()


def frozen(baseline: dict[str, Any], loader: Loader, device: str) -> FrozenClassifier:
    """What answers for clip_zero_shot or clip_linear; the latter is fitted here."""
    guide = guide_of(baseline, loader.rows.classes, device)
    if baseline["kind"] == "clip_zero_shot":
        return FrozenClassifier(guide, lambda h_BD: guide.head(torch.from_numpy(h_BD).to(guide.device)).cpu().numpy(),
                                {"templates": baseline["templates"]})
    h_ND = np.concatenate([features(guide, x_BHWC) for x_BHWC in _views(loader, guide)])
    validation = _validation(baseline, guide)
    C, weight_KD, bias_K = fit_linear(h_ND, loader.targets(np.arange(len(h_ND))), baseline["C"],
                                      validation)
    how = "given" if baseline["C"] is not None else "CLIP's usual value" if validation is None else "validation images"
    return FrozenClassifier(guide, lambda h_BD: h_BD @ weight_KD.T + bias_K,
                            {"C": C, "C_by": how, "features": "projected, not normalised"})


def fit_linear(h_ND: np.ndarray, y_NK: np.ndarray, C: float | None,
               validation: tuple[np.ndarray, np.ndarray] | None) -> tuple[float, np.ndarray, np.ndarray]:
    """(C, weights (K, D), biases (K,)) of multinomial logistic regression with an L2 penalty. A row with a soft label
    counts for each of its classes by its share. Without C, of 96 the smallest that is best on the validation rows
    (features, labels), each fit starting from the one before."""
    from sklearn.linear_model import LogisticRegression

    rows, labels = np.nonzero(y_NK)

    def fit(model: LogisticRegression) -> LogisticRegression:
        return model.fit(h_ND[rows], labels, sample_weight=y_NK[rows, labels])

    if len(np.unique(labels)) < 2:
        raise UsageError("clip_linear: the training images are of one class, so there is nothing to tell apart")
    if C is None and validation is not None:
        model, best = LogisticRegression(max_iter=ITERATIONS, warm_start=True), (-1.0, C_OF_CLIP)
        for strength in STRENGTHS:
            right = float((fit(model.set_params(C=strength)).predict(validation[0]) == validation[1]).mean())
            best = max(best, (right, float(strength)), key=lambda one: one[0])
        C = best[1]
    model = fit(LogisticRegression(C=C_OF_CLIP if C is None else C, max_iter=ITERATIONS))
    weight_KD, bias_K = np.zeros((y_NK.shape[1], h_ND.shape[1])), np.full(y_NK.shape[1], ABSENT)
    two = len(model.classes_) == 2  # of which scikit-learn keeps the difference
    weight_KD[model.classes_] = np.concatenate([-model.coef_, model.coef_]) / 2 if two else model.coef_
    bias_K[model.classes_] = np.concatenate([-model.intercept_, model.intercept_]) / 2 if two else model.intercept_
    return float(model.C), weight_KD, bias_K


def _validation(baseline: dict[str, Any], guide: ClipGuide) -> tuple[np.ndarray, np.ndarray] | None:
    if baseline["C"] is not None or baseline["validation"] is None:
        return None
    data = DataConfig(**baseline["validation"])
    batches = [*TestSet(build_index(data), data, view_of(guide), 0, 1, CALL, section="validation").batches()]
    return (np.concatenate([features(guide, one.x_BHWC) for one in batches]),
            np.concatenate([one.labels for one in batches]))


def _views(loader: Loader, guide: ClipGuide) -> Iterator[np.ndarray]:
    """uint8 (B, size, size, 3): all images of a training set, in its order, as a guide is shown them."""
    reader, view, count = ImageReader(loader.rows, loader.cache_bytes), view_of(guide), len(loader.rows)
    for start in range(0, count, CALL):
        decoded = reader.decoded(np.arange(start, min(start + CALL, count)))
        yield np.stack([test_transform(image, view) for image in decoded])


def teacher(baseline: dict[str, Any], loader: Loader, device: str, rank: int = 0, world: int = 1) -> Teacher:
    """CLIP as a teacher of the images of each batch, as the student sees them or, with view seed, whole."""
    guide = guide_of(baseline, loader.rows.classes, device)
    whole_NK = _whole_logits(guide, loader) if baseline["view"] == "seed" else None

    @torch.no_grad()
    def logits(batch: TrainBatch, x_BCHW: Tensor) -> Tensor:
        if whole_NK is None:
            return guide.logits(x_BCHW)
        epoch, within = divmod(batch.step, loader.epoch_steps)
        return whole_NK[torch.from_numpy(loader.slots(epoch, rank, world).items[within])].to(x_BCHW.device)

    return Teacher(logits, baseline["weight"], baseline["temperature"])


@torch.no_grad()
def _whole_logits(guide: ClipGuide, loader: Loader) -> Tensor:
    return torch.cat([guide.logits(torch.from_numpy(x_BHWC).permute(0, 3, 1, 2) / 255).cpu()
                      for x_BHWC in _views(loader, guide)])
