"""Class and group prototypes: where the training images of each class lie in the feature space of a guide.

    paper        here                       meaning, feature units
    p_c          class_KD                   mean feature of class c
    p_g          group_KGD                  mean feature of each of its groups
    K            n_groups                   groups per class (3 in DistDiff)

As in DistDiff, groups are the clusters of agglomerative clustering with average linkage and Euclidean distance
on features of unit length; the means are of the features as they are, and, beside them, of unit length throughout as
in the released code (`proto_space` of the method chooses).
"""

# N images, K classes, G groups, D features

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.contract.errors import ModelError, UsageError

KIND = "rayexpand/prototypes/1"  # metadata key; changes when older files can no longer be read
_ARRAYS = ("class_KD", "group_KGD", "class_unit_KD", "group_unit_KGD", "count_KG")


@dataclass(frozen=True, slots=True, eq=False)
class Prototypes:
    """Prototypes of K classes in G groups. A class of fewer than G images repeats its mean, with count 0 there."""

    class_KD: np.ndarray  # float32: means of the features
    group_KGD: np.ndarray
    class_unit_KD: np.ndarray  # float32: means of the features of unit length, brought to unit length again
    group_unit_KGD: np.ndarray
    count_KG: np.ndarray  # int64: images in each group; 0 marks padding
    guide_hash: str  # content hash of the guide whose features these are
    classes_hash: str  # of the class keys in label order

    @property
    def valid_KG(self) -> np.ndarray:
        """bool: groups that exist."""
        return self.count_KG > 0

    @property
    def n_classes(self) -> int:
        return self.group_KGD.shape[0]

    @property
    def n_groups(self) -> int:
        return self.group_KGD.shape[1]

    @property
    def dim(self) -> int:
        return self.group_KGD.shape[2]


@dataclass(frozen=True, slots=True, eq=False)
class ClassPrototypes:
    """Prototypes of one class, to be joined by `join`; fields as in Prototypes without K."""

    class_D: np.ndarray
    group_GD: np.ndarray
    class_unit_D: np.ndarray
    group_unit_GD: np.ndarray
    count_G: np.ndarray


def fit_prototypes(features_ND: np.ndarray, labels_N: np.ndarray, n_classes: int, n_groups: int, *, guide_hash: str,
                   class_keys: Sequence[str]) -> Prototypes:
    """Prototypes of a dataset whose features fit into memory; the order of its rows permutes groups only.

    1,000 classes of 1,300 images and 2,048 features: the features take 10.7 GB, fitting a class 64 MB on top (measured
    peak, 0.45 s each), the result 66 MB with 3 groups. Where 10.7 GB is too much, call `fit_class` for one class at a
    time (11 MB of features each) and `join` the results; both ways give the same numbers.

    Raises UsageError where a class has no image or a feature is not finite.
    """
    assert len(class_keys) == n_classes
    order = np.argsort(labels_N, kind="stable")
    bounds = np.searchsorted(labels_N[order], np.arange(n_classes + 1))
    assert bounds[0] == 0, "labels must be in 0..n_classes-1"
    assert bounds[-1] == len(labels_N), "labels must be in 0..n_classes-1"
    rows = [order[start:end] for start, end in pairwise(bounds)]
    if empty := [key for key, of_class in zip(class_keys, rows, strict=True) if not len(of_class)]:
        raise UsageError(f"classes without images have no prototype: {', '.join(empty[:10])}. Give each class at "
                         "least one image, or leave it out of the dataset.")
    return join([fit_class(features_ND[of_class], n_groups) for of_class in rows], guide_hash, class_keys)


def fit_class(features_ND: np.ndarray, n_groups: int) -> ClassPrototypes:
    """Prototypes of the images of one class. Groups come by falling size, then by their first differing number.

    Raises UsageError where a feature is not finite.
    """
    if bad := int((~np.isfinite(features_ND).all(axis=1)).sum()):
        raise UsageError(f"the guide gives features that are not finite for {bad} of {len(features_ND)} images of a "
                         "class; try prior.device: cpu, or another guide")
    rows = features_ND.astype(np.float64)
    units = _unit(rows)
    groups = _cluster(units, n_groups)
    means = [rows[members].mean(axis=0) for members in groups]
    by_size = sorted(range(len(groups)), key=lambda g: (-len(groups[g]), means[g].tolist()))
    padding = n_groups - len(groups)
    unit_means = [units[groups[g]].mean(axis=0) for g in by_size] + [units.mean(axis=0)] * padding
    return ClassPrototypes(
        rows.mean(axis=0).astype(np.float32),
        np.stack([means[g] for g in by_size] + [rows.mean(axis=0)] * padding).astype(np.float32),
        _unit(units.mean(axis=0)).astype(np.float32), _unit(np.stack(unit_means)).astype(np.float32),
        np.array([len(groups[g]) for g in by_size] + [0] * padding, np.int64))


def join(classes: Sequence[ClassPrototypes], guide_hash: str, class_keys: Sequence[str]) -> Prototypes:
    """Prototypes of all classes, in label order."""
    assert len(classes) == len(class_keys)
    return Prototypes(np.stack([c.class_D for c in classes]), np.stack([c.group_GD for c in classes]),
                      np.stack([c.class_unit_D for c in classes]), np.stack([c.group_unit_GD for c in classes]),
                      np.stack([c.count_G for c in classes]), guide_hash, classes_hash(class_keys))


def classes_hash(class_keys: Sequence[str]) -> str:
    """sha256 of the class keys in label order."""
    return hashlib.sha256(json.dumps(list(class_keys)).encode()).hexdigest()


def to_bytes(prototypes: Prototypes) -> bytes:
    """A safetensors file, the same bytes for the same numbers; its metadata holds both hashes and library versions."""
    from safetensors.numpy import save

    versions = {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn", "scipy")}
    facts = {"guide_hash": prototypes.guide_hash, "classes_hash": prototypes.classes_hash, "versions": versions}
    return save({name: np.ascontiguousarray(getattr(prototypes, name)) for name in _ARRAYS},
                {KIND: json.dumps(facts, sort_keys=True)})  # one entry: safetensors writes several in any order


def save_prototypes(prototypes: Prototypes, path: str | Path) -> None:
    """Writes a safetensors file."""
    Path(path).write_bytes(to_bytes(prototypes))


def load_prototypes(path: str | Path, *, guide_hash: str, class_keys: Sequence[str]) -> Prototypes:
    """Prototypes of a file, for this guide and these classes. Raises ModelError, naming everything that differs."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np") as file:
            metadata = file.metadata() or {}
            if KIND not in metadata:
                raise ModelError(f"{path} holds no prototypes of this version (no metadata '{KIND}'); fit them again "
                                 "with `rayexpand fit`")
            facts = json.loads(metadata[KIND])
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in _ARRAYS}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"prototypes {path} cannot be read: {error}. Fit them with `rayexpand fit`, or correct "
                         "artifacts.prototypes") from error
    found = Prototypes(**arrays, guide_hash=facts["guide_hash"], classes_hash=facts["classes_hash"])
    if problems := _problems(found, guide_hash, class_keys):
        raise ModelError("\n  ".join([f"prototypes {path} do not belong to this run:", *problems,
                                      "Fit them again with this guide on this dataset (`rayexpand fit`)."]))
    return found


def _problems(found: Prototypes, guide_hash: str, class_keys: Sequence[str]) -> list[str]:
    problems = []
    if found.guide_hash != guide_hash:
        problems.append(f"they are features of guide {found.guide_hash[:12]}, but this run loads guide "
                        f"{guide_hash[:12]}; features of two guides cannot be compared")
    if found.n_classes != len(class_keys):
        problems.append(f"they have {found.n_classes} classes, the dataset has {len(class_keys)}")
    elif found.classes_hash != classes_hash(class_keys):
        problems.append("they have other classes, or the same in another order, than the dataset")
    return problems


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length; a row of zeros stays as it is."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _cluster(units_ND: np.ndarray, n_groups: int) -> list[np.ndarray]:
    """Row numbers of each group, min(N, n_groups) of them."""
    if len(units_ND) <= n_groups:
        return [np.array([i]) for i in range(len(units_ND))]
    if n_groups == 1:
        return [np.arange(len(units_ND))]
    from sklearn.cluster import AgglomerativeClustering

    label_N = AgglomerativeClustering(n_clusters=n_groups, linkage="average", metric="euclidean").fit_predict(units_ND)
    return [np.flatnonzero(label_N == g) for g in range(n_groups)]
