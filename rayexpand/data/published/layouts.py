"""Own readers: sets that torchvision has not, or reads in one arrangement only."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from rayexpand.contract.errors import SeedDataError, few
from rayexpand.data.published.found import ClassWords, FoundSet, Images
from rayexpand.data.seeds import EXTENSIONS, DataConfig, build_index

MEDMNIST = {
    "pathmnist": ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
                  "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
    "breastmnist": ("malignant", "normal, benign"),
    "organsmnist": ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver",
                    "lung-left", "lung-right", "pancreas", "spleen")}
DEVKIT = "ILSVRC2012_devkit_t12"


def _lines(file: Path, parts: int) -> Iterable[list[str]]:
    """The lines of a text list, each in `parts` words; the last takes what is left."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            words = line.split(maxsplit=parts - 1)
            if len(words) < parts:
                raise ValueError(f"line {number} of {file.name} has {len(words)} words, not {parts}: {line!r}")
            yield [word.rstrip() for word in words]


def _pictures(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.lower().endswith(EXTENSIONS) and not name.startswith("."))


def _folders(folder: Path) -> list[str]:
    """Names of the folders in it, but hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _tree(base: Path, part: str, keys: Sequence[str], below: str = "") -> Images:
    """`<part>/<key>/<below>/<image>` of every class, by key and then by name."""
    found = [("/".join(filter(None, (part, key, below, name))), label) for label, key in enumerate(keys)
             if (base / part / key).is_dir() for name in _pictures(base / part / key / below)]
    return Images([path for path, _ in found], [label for _, label in found])


def birds(base: Path, label: str) -> FoundSet:
    """CUB-200-2011: numbered lists of classes, images, labels and a split; keys are the folder names."""
    classes = dict(_lines(base / "classes.txt", 2))
    label_of = {number: position for position, number in enumerate(sorted(classes, key=int))}
    labels = {image: label_of[number] for image, number in _lines(base / "image_class_labels.txt", 2)}
    is_train = {image: flag == "1" for image, flag in _lines(base / "train_test_split.txt", 2)}
    rows = [(f"images/{path}", labels[image], is_train[image]) for image, path in _lines(base / "images.txt", 2)]
    return FoundSet([_numbered(classes[number]) for number in label_of], {
        part: Images([path for path, _, one in rows if one == wanted], [key for _, key, one in rows if one == wanted])
        for part, wanted in (("train", True), ("test", False))})


def _numbered(folder: str) -> ClassWords:
    """`001.Black_footed_Albatross`"""
    return ClassWords(folder, folder.partition(".")[2].replace("_", " ") or folder)


def dogs(base: Path, label: str) -> FoundSet:
    """Stanford Dogs: lists in MATLAB files; keys are the folder names, `n02085620-Chihuahua`."""
    parts, keys = {}, dict[int, str]()
    for part in ("train", "test"):
        read = loadmat(base / f"{part}_list.mat", squeeze_me=True)
        paths = [str(path) for path in np.atleast_1d(read["file_list"])]
        labels = [int(number) - 1 for number in np.atleast_1d(read["labels"])]
        keys |= {number: path.split("/")[0] for path, number in zip(paths, labels, strict=True)}
        parts[part] = Images([f"Images/{path}" for path in paths], labels)
    names = [keys[number].partition("-")[2].replace("_", " ") for number in range(len(keys))]
    return FoundSet([ClassWords(keys[number], name) for number, name in enumerate(names)], parts)


def tiny_imagenet(base: Path, label: str) -> FoundSet:
    """Classes in the order of their ids, which is that of folder readers. The labels of its test images are not
    published."""
    keys = sorted(word for (word,) in _lines(base / "wnids.txt", 1))
    label_of = {key: position for position, key in enumerate(keys)}
    words = dict(line.split("\t", 1) for line in (base / "words.txt").read_text(encoding="utf-8").splitlines() if line)
    lines = [line.split("\t") for line in (base / "val/val_annotations.txt").read_text(encoding="utf-8").splitlines()]
    val = Images([f"val/images/{line[0]}" for line in lines], [label_of[line[1]] for line in lines])
    return FoundSet([_synset(key, words[key]) for key in keys],
                 {"train": _tree(base, "train", keys, "images"), "val": val})


def _synset(key: str, words: str) -> ClassWords:
    return ClassWords(key, words.split(",")[0].strip())


def waterbirds(base: Path, label: str) -> FoundSet:
    """`label` is `bird` (land or water) or `species`, which are those of CUB by its folder names."""
    with (base / "metadata.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    species = sorted({line["img_filename"].partition("/")[0] for line in lines})
    classes = [_numbered(key) for key in species] if label == "species" else [
        ClassWords("landbird", "landbird"), ClassWords("waterbird", "waterbird")]
    number = {key: position for position, key in enumerate(species)}
    parts = {}
    for code, part in enumerate(("train", "val", "test")):
        some = [line for line in lines if line["split"] == str(code)]
        paths = [line["img_filename"] for line in some]
        parts[part] = Images(paths, [number[path.partition("/")[0]] for path in paths] if label == "species" else [
            int(line["y"]) for line in some])
    kinds = ("land", "water")
    return FoundSet(classes, parts, groups={
        line["img_filename"]: f"{kinds[int(line['y'])]} bird on {kinds[int(line['place'])]}" for line in lines})


def caltech(base: Path, label: str) -> FoundSet:
    """Caltech-101 has no split. `background` is its folder of all sorts of things, the 102nd class of some papers."""
    top = "101_ObjectCategories"
    keys = _folders(base / top)
    every = _tree(base, top, keys)
    rest = keys.index("BACKGROUND_Google") if "BACKGROUND_Google" in keys else -1
    return FoundSet([ClassWords(key, "background" if number == rest else key.replace("_", " "))
                  for number, key in enumerate(keys)], {"all": every})


def flower_folders(base: Path, label: str) -> FoundSet:
    """Flowers-102 as `<part>/<number>/<image>`, a split of its own that many courses and GIF use."""
    from torchvision.datasets import Flowers102

    parts = [part for part in ("train", "valid", "test") if (base / part).is_dir()]
    keys = sorted({key for part in parts for key in _folders(base / part)}, key=int)
    return FoundSet([ClassWords(key, Flowers102.classes[int(key) - 1]) for key in keys],
                 {part: _tree(base, part, keys) for part in parts})


def imagenet(base: Path, label: str) -> FoundSet:
    """`train/<wnid>`, and `val/<wnid>` or `val` as it is unpacked, with its labels from the development kit or from
    Kaggle's table. Classes in the order of their ids, as torchvision has them."""
    keys = _folders(base / "train")
    words, notes = _words_of(base, keys)
    val = _tree(base, "val", keys) if _folders(base / "val") else _flat_val(base, keys)
    return FoundSet([ClassWords(key, words[key]) for key in keys], {"train": _tree(base, "train", keys), "val": val},
                 notes=notes)


def _beside(base: Path, name: str) -> Path | None:
    """A file of ImageNet: in its folder or, in Kaggle's arrangement, above it."""
    above = base.parents[:3] if base.name == "CLS-LOC" else ()
    return next((one / name for one in (base, *above) if (one / name).is_file()), None)


def _words_of(base: Path, keys: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """First name of each synset; without a file that says it, torchvision's, if all 1,000 are there. And a note."""
    if file := _beside(base, "LOC_synset_mapping.txt"):
        return {key: _synset(key, words).name for key, words in _lines(file, 2)}, ()
    if file := _beside(base, f"{DEVKIT}/data/meta.mat"):
        return {key: _synset(key, words).name for _, key, words in _synsets(file)}, ()
    if len(keys) != 1000:
        raise SeedDataError(f"imagenet: {len(keys)} classes in '{base / 'train'}', and no file that names them; put "
                            f"LOC_synset_mapping.txt there, or {DEVKIT}, which {DEVKIT}.tar.gz unpacks to")
    from torchvision.models import ResNet50_Weights

    note = "class names are torchvision's; LOC_synset_mapping.txt beside the images would give the first of each synset"
    return dict(zip(keys, ResNet50_Weights.IMAGENET1K_V1.meta["categories"], strict=True)), (note,)


def _synsets(file: Path) -> list[tuple[int, str, str]]:
    """(number, wnid, words) of the classes of the development kit."""
    rows = loadmat(file, squeeze_me=True)["synsets"]
    return [(int(row[0]), str(row[1]), str(row[2])) for row in rows if int(row[4]) == 0]


def _flat_val(base: Path, keys: Sequence[str]) -> Images:
    names = _pictures(base / "val")
    if file := _beside(base, "LOC_val_solution.csv"):
        with file.open(newline="", encoding="utf-8") as lines:
            wnid = {line["ImageId"]: line["PredictionString"].split()[0] for line in csv.DictReader(lines)}
        found = [wnid[os.path.splitext(name)[0]] for name in names]
    elif (file := _beside(base, f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt")) and (
            meta := _beside(base, f"{DEVKIT}/data/meta.mat")):
        by_number = {number: key for number, key, _ in _synsets(meta)}
        answers = [by_number[int(number)] for (number,) in _lines(file, 1)]
        found = [answers[int(os.path.splitext(name)[0].rpartition("_")[2]) - 1] for name in names]
    else:
        raise SeedDataError(f"imagenet: the images of '{base / 'val'}' are in no class folders, and no file says their "
                            f"classes; put {DEVKIT} there, which {DEVKIT}.tar.gz unpacks to, or LOC_val_solution.csv")
    if unknown := sorted({*found} - {*keys}):
        raise SeedDataError(f"imagenet: images of '{base / 'val'}' are of {few(unknown)}, which '{base / 'train'}' has "
                            "not; unpack ILSVRC2012_img_train.tar again")
    number = {key: position for position, key in enumerate(keys)}
    return Images([f"val/{name}" for name in names], [number[key] for key in found])


def arrays(source: str, path: str, parts: Sequence[str], base: Path, names: Sequence[str] | None = None) -> FoundSet:
    """Sets whose images are rows of arrays: counted where they are."""
    found, keys = {}, list[str]()
    for part in parts:
        index = build_index(DataConfig(source=source, path=str(base / path), split=part))
        sound = [row for row, fault in enumerate(index.table["fault"].to_pylist()) if not fault]
        found[part] = Images([], index.labels[sound].tolist())
        keys = [*index.classes.key]
    return FoundSet([ClassWords(key, names[int(key)] if names else key.replace("_", " ")) for key in keys], found, path)


def cifar(base: Path, label: str) -> FoundSet:
    return arrays("cifar", ".", ("train", "test"), base)


def medmnist(name: str, base: Path, label: str) -> FoundSet:
    return arrays("npz", f"{name}.npz", ("train", "val", "test"), base, MEDMNIST[name])
