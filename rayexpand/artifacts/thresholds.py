"""Thresholds: what real images of each class reach where the judge of a run scores them, as a folder.

    thresholds.safetensors    unit_KD: mean of the unit features of each class, float32; and for each comparison, such
                              as seed: seed/mean, seed/deviation (K,), seed/quantiles (K, 101), float64
    thresholds.json           guide, classes, images of each class, and classes whose numbers are means over the others

    comparison    of real images of one class
    seed          cosine of two of them                        (DiffCoRe-Mix, equation 5, over unordered pairs)
    class         cosine of each and the mean of the others    (ours)
    prompt        cosine of each and the text that a CLIP guide is asked of the class
    confidence    probability of the class
"""

# K classes, D features

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.artifacts.kinds import ArtifactKind, RunInputs
from rayexpand.contract.errors import ModelError, looked_at
from rayexpand.contract.protocols import Method

FILE, ABOUT = "thresholds.safetensors", "thresholds.json"
LEVELS = np.linspace(0, 1, 101)  # of the quantiles that are kept

_AGAIN = "make them again with `rayexpand fit`, kind thresholds"


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Of the scores of real images, float64."""

    mean_K: np.ndarray
    deviation_K: np.ndarray
    quantiles_KQ: np.ndarray  # at LEVELS


@dataclass(frozen=True, slots=True, eq=False)
class Thresholds:
    """Build it with `read_thresholds`."""

    unit_KD: np.ndarray  # float32
    of: Mapping[str, Statistics]  # by comparison

    def above(self, comparison: str, deviations: float = 0.0, quantile: float | None = None) -> np.ndarray:
        """float64 (K,): the mean less so many standard deviations, or the quantile, between two levels by a line."""
        found = self.of[comparison]
        if quantile is None:
            return found.mean_K - deviations * found.deviation_K
        return np.array([np.interp(quantile, LEVELS, values_Q) for values_Q in found.quantiles_KQ])


def write_thresholds(folder: Path, made: Thresholds, *, guide_sha256: str, class_keys: Sequence[str],
                     images: Sequence[int], alone: Sequence[str] = ()) -> None:
    """`alone`: classes of one image, which compares with no other."""
    from safetensors.numpy import save_file

    tensors = {"unit_KD": np.ascontiguousarray(made.unit_KD, np.float32)}
    for name, found in made.of.items():
        tensors |= {f"{name}/mean": found.mean_K, f"{name}/deviation": found.deviation_K,
                    f"{name}/quantiles": found.quantiles_KQ}
    assert all(np.isfinite(one).all() and len(one) == len(class_keys) for one in tensors.values())
    save_file(tensors, folder / FILE)
    about = {"kind": "thresholds", "guide_sha256": guide_sha256, "comparisons": list(made.of),
             "classes": list(class_keys), "images": [int(one) for one in images], "alone": list(alone)}
    (folder / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_thresholds(folder: Path, class_keys: Sequence[str]) -> Thresholds:
    """Those of these classes, in their order. Raises ModelError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    about = about_thresholds(folder)
    if about["classes"] != list(class_keys):
        raise ModelError(f"thresholds {folder} were made for other classes than the dataset has, or for the same in "
                         f"another order; {_AGAIN} on this dataset")
    try:
        tensors = load_file(folder / FILE)
        of = {name: Statistics(*(tensors[f"{name}/{part}"] for part in ("mean", "deviation", "quantiles")))
              for name in about["comparisons"]}
        found = Thresholds(tensors["unit_KD"], of)
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"thresholds {folder / FILE} cannot be read ({error}); {_AGAIN}") from error
    shapes = {"mean": (len(class_keys),), "deviation": (len(class_keys),), "quantiles": (len(class_keys), len(LEVELS)),
              "unit_KD": (len(class_keys), found.unit_KD.shape[-1])}
    if not all(np.isfinite(one).all() and one.shape == shapes.get(name.rpartition("/")[2]) for name, one
               in tensors.items()):
        raise ModelError(f"thresholds {folder / FILE} are not finite numbers of {len(class_keys)} classes; {_AGAIN}")
    return found


def about_thresholds(folder: Path) -> dict[str, Any]:
    """thresholds.json. Raises ModelError."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["kind"] == "thresholds" and isinstance(about["guide_sha256"], str) and all(
                isinstance(about[name], list) for name in ("classes", "comparisons")):
            return dict(about)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ModelError(f"{folder / ABOUT} does not describe thresholds; give a folder that `rayexpand fit` made with "
                     "kind thresholds")


def other_judge(folder: Path, made_with: str, run: RunInputs) -> list[str]:
    """The problem of features of another guide than the judge's, where both are known."""
    if run.judge_sha256 is None or run.judge_sha256 == made_with:
        return []
    return [f"{folder} holds features of guide {made_with[:12]}, but accept.guide.weights {run.judge_weights} is guide "
            f"{run.judge_sha256[:12]}; features of two guides cannot be compared: name the guide they were made with, "
            "or make them again with `rayexpand fit` and this same file"]


class ThresholdsKind(ArtifactKind):
    name = "thresholds"
    wants = "scores of the real images of each class and none are"
    by_run = True

    def unused(self, method: Method) -> tuple[str, str]:
        return "compares samples with no class", "set accept.above: class, or accept.to: class"

    def problems(self, folder: Path, run: RunInputs) -> list[str]:
        if absent := [name for name in self.files(folder) if not (folder / name).is_file()]:
            return [f"{folder} has no {', '.join(absent)}{looked_at(folder)}; make them with `rayexpand fit` and this "
                    "same file, or give a folder that it made"]
        try:
            about = about_thresholds(folder)
        except ModelError as error:
            return [str(error)]
        if run.comparison is not None and run.comparison not in about["comparisons"]:
            return [f"{folder} says nothing of {run.comparison}, only of {', '.join(about['comparisons'])}; {_AGAIN}"]
        return other_judge(folder, about["guide_sha256"], run)

    def load(self, folder: Path, run: RunInputs, class_keys: Sequence[str]) -> Thresholds:
        return read_thresholds(folder, class_keys)

    def classes(self, folder: Path) -> Sequence[str]:
        return about_thresholds(folder).get("classes", ())

    def files(self, folder: Path) -> list[str]:
        return [FILE, ABOUT]

    def sha256(self, folder: Path) -> str:
        if problems := [name for name in self.files(folder) if not (folder / name).is_file()]:
            raise ModelError(f"artifacts.thresholds: {folder} has no {problems[0]}; give a folder that `rayexpand fit` "
                             "made")
        return super().sha256(folder)
