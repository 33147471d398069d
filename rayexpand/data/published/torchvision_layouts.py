"""Layouts that torchvision's dataset classes read: their labels, their class names, their order."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayexpand.contract.errors import SeedDataError
from rayexpand.data.published.found import ClassWords, FoundSet, Images

_SPLITS = {part: (part,) for part in ("train", "val", "test")}
# "A {name} person" (Real-Fake), without and with the attribute
CELEBA_NAMES = {"Smiling": ("unsmiling", "smiling"), "Attractive": ("unattractive", "attractive"),
                "Heavy_Makeup": ("lightly made-up", "heavily made-up")}
EUROSAT_NAMES = {
    "AnnualCrop": "annual crop land", "Forest": "forest", "HerbaceousVegetation": "herbaceous vegetation land",
    "Highway": "highway", "Industrial": "industrial buildings", "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land", "Residential": "residential buildings", "River": "river",
    "SeaLake": "sea or lake"}


@contextmanager
def _root(base: Path, name: str) -> Iterator[str]:
    """A folder in which torchvision finds `base` under the name that it expects."""
    with tempfile.TemporaryDirectory() as root:
        link = Path(root, name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(base.resolve(), target_is_directory=True)
        yield root


def _dataset(name: str, root: str, *arguments: Any) -> Any:
    """One of torchvision's datasets, imported when it is used: torch takes seconds."""
    import torchvision.datasets

    try:
        return getattr(torchvision.datasets, name)(root, *arguments)
    except RuntimeError as error:  # the parts are there, so it is what they hold
        raise SeedDataError("the lists beside the images are not those that were published: torchvision compares their "
                            f"MD5, and says '{error}'; get them from the official page again") from error


def _read(base: Path, name: str, dataset: str, splits: Mapping[str, Sequence[Any]],
          rows: Callable[[Any], Iterable[tuple[str | Path, int]]]) -> tuple[Any, dict[str, Images]]:
    """torchvision's object of the first part, and the images of every part. `splits`: its arguments by part; `rows`:
    where it keeps (path, label)."""
    with _root(base, name) as root:
        read = {part: _dataset(dataset, root, *arguments) for part, arguments in splits.items()}
        parts = {}
        for part, one in read.items():
            found = [(os.path.relpath(path, f"{root}/{name}"), int(label)) for path, label in rows(one)]
            parts[part] = Images([path for path, _ in found], [label for _, label in found])
    return next(iter(read.values())), parts


def _listed(dataset: Any) -> Iterable[tuple[Path, int]]:
    return zip(dataset._image_files, dataset._labels, strict=True)


def _by_name(names: Iterable[Any]) -> list[ClassWords]:
    return [ClassWords(str(name), str(name)) for name in names]


def flowers(base: Path, label: str) -> FoundSet:
    """Keys are the official numbers from 1."""
    read, parts = _read(base, "flowers-102", "Flowers102", _SPLITS, _listed)
    return FoundSet([ClassWords(str(number), name) for number, name in enumerate(read.classes, 1)], parts)


def aircraft(base: Path, label: str) -> FoundSet:
    splits = {part: (part, label) for part in _SPLITS}
    read, parts = _read(base, "fgvc-aircraft-2013b", "FGVCAircraft", splits, _listed)
    return FoundSet(_by_name(read.classes), parts)


def cars(base: Path, label: str) -> FoundSet:
    splits = {part: (part,) for part in ("train", "test")}
    read, parts = _read(base, "stanford_cars", "StanfordCars", splits, lambda one: one._samples)
    return FoundSet(_by_name(read.classes), parts)


def textures(base: Path, label: str) -> FoundSet:
    """DTD; `label` is the number of the partition."""
    read, parts = _read(base, "dtd/dtd", "DTD", {part: (part, int(label)) for part in _SPLITS}, _listed)
    return FoundSet(_by_name(read.classes), parts)


def eurosat(base: Path, label: str) -> FoundSet:
    read, parts = _read(base, "eurosat", "EuroSAT", {"all": ()}, lambda one: one.samples)
    return FoundSet([ClassWords(name, EUROSAT_NAMES.get(name, name)) for name in read.classes], parts)


def imagenette(base: Path, label: str) -> FoundSet:
    splits = {part: (part,) for part in ("train", "val")}
    read, parts = _read(base, "imagenette2", "Imagenette", splits, lambda one: one._samples)
    return FoundSet([ClassWords(wnid, names[0]) for wnid, names in zip(read.wnids, read.classes, strict=True)], parts)


def pets(base: Path, label: str) -> FoundSet:
    """`unlisted` are images of the folder that are in neither list; GIF takes all of the folder."""
    splits = {"train": ("trainval",), "test": ("test",)}
    read, parts = _read(base, "oxford-iiit-pet", "OxfordIIITPet", splits,
                        lambda one: zip(one._images, one._labels, strict=True))
    species = dict(zip(read._labels, read._bin_labels, strict=True))
    breeds = {_breed(path): label for one in parts.values() for path, label in zip(one.paths, one.labels, strict=True)}
    listed = {path for one in parts.values() for path in one.paths}
    others = [path for path in (f"images/{name}" for name in sorted(os.listdir(base / "images")))
              if path.endswith(".jpg") and path not in listed and _breed(path) in breeds]
    parts["unlisted"] = Images(others, [breeds[_breed(path)] for path in others])
    nouns = [read.bin_classes[species[breed]].lower() if breed in species else "" for breed in range(len(read.classes))]
    return FoundSet([ClassWords(name, name, noun=noun) for name, noun in zip(read.classes, nouns, strict=True)], parts)


def _breed(path: str) -> str:
    """`great_pyrenees` of `images/great_pyrenees_12.jpg`"""
    return os.path.basename(path).rpartition("_")[0]


def celeba(base: Path, label: str) -> FoundSet:
    """Two classes, without and with the attribute `label`."""
    splits = {part: (part,) for part in ("train", "valid", "test")}
    _, parts = _read(base, "celeba", "CelebA", splits, lambda one: zip(
        (f"{one.root}/celeba/img_align_celeba/{name}" for name in one.filename),
        one.attr[:, one.attr_names.index(label)].tolist(), strict=True))
    words = label.replace("_", " ").lower()
    without, with_it = CELEBA_NAMES.get(label, (f"not {words}", words))
    return FoundSet([ClassWords(f"not {label}", without), ClassWords(label, with_it)], parts)
