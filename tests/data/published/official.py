"""Small copies of official layouts, in their real file formats, with what is in them."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.corpus import encoded, photo

Rows = list[tuple[str, str]]  # (path below the folder of the set, class key)


@dataclass
class Truth:
    names: dict[str, str]  # class key -> name, in the order of labels
    parts: dict[str, Rows]
    words: dict[str, tuple[str, str]] = field(default_factory=dict)  # class key -> (metaclass, noun)


class Pictures:
    """Writes images, each of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def __call__(self, path: str) -> str:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(photo(self.count), "JPEG"))
        self.count += 1
        return path


def lines(file: Path, rows: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{row}\n" for row in rows))


def cub(folder: Path) -> Truth:
    keys = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    rows = [(keys[number % 2], "test" if number > 3 else "train", f"Bird_{number:04d}.jpg") for number in range(7)]
    rows[2] = (*rows[2][:2], "Bird's, \"2\" = ü.jpg")
    draw = Pictures(folder)
    for key, _, name in rows:
        draw(f"images/{key}/{name}")
    lines(folder / "classes.txt", [f"{number} {key}" for number, key in enumerate(keys, 1)])
    lines(folder / "images.txt", [f"{number} {key}/{name}" for number, (key, _, name) in enumerate(rows, 1)])
    lines(folder / "image_class_labels.txt", [f"{number} {keys.index(key) + 1}"
                                              for number, (key, _, _) in enumerate(rows, 1)])
    lines(folder / "train_test_split.txt", [f"{number} {int(part == 'train')}"
                                            for number, (_, part, _) in enumerate(rows, 1)])
    return Truth(dict(zip(keys, ("Black footed Albatross", "Laysan Albatross"), strict=True)),
                 {part: [(f"images/{key}/{name}", key) for key, one, name in rows if one == part]
                  for part in ("train", "test")}, dict.fromkeys(keys, ("bird", "bird")))


def dogs(folder: Path) -> Truth:
    keys = ["n02085620-Chihuahua", "n02086240-Shih-Tzu", "n02087046-toy_terrier"]
    draw, parts = Pictures(folder), {}
    for part, count in (("train", 4), ("test", 3)):
        paths = [f"{key}/{key.split('-')[0]}_{part}{number}.jpg" for key in keys for number in range(count)]
        parts[part] = [(draw(f"Images/{path}"), path.split("/")[0]) for path in paths]
        cells = np.empty((len(paths), 1), object)
        cells[:, 0] = paths
        savemat(folder / f"{part}_list.mat", {
            "file_list": cells, "annotation_list": cells,
            "labels": np.array([[keys.index(path.split("/")[0]) + 1] for path in paths], np.uint8)})
    return Truth({keys[0]: "Chihuahua", keys[1]: "Shih-Tzu", keys[2]: "toy terrier"}, parts,
                 dict.fromkeys(keys, ("dog", "dog")))


def flowers(folder: Path) -> Truth:
    """Labels 1, 2 and 3 of torchvision's 102 names; splits are not in the order of the images."""
    labels = [1, 2, 3, 1, 2, 3, 1, 2, 3, 3, 2, 1]
    ids = {"trnid": [4, 2, 3], "valid": [1, 5, 6], "tstid": [12, 7, 8, 9, 10, 11]}
    draw = Pictures(folder)
    for number in range(1, 13):
        draw(f"jpg/image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(folder / "setid.mat", {name: np.array([some], np.uint16) for name, some in ids.items()})
    return Truth({"1": "pink primrose", "2": "hard-leaved pocket orchid", "3": "canterbury bells"},
                 {part: [(f"jpg/image_{number:05d}.jpg", str(labels[number - 1])) for number in ids[name]]
                  for part, name in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))},
                 dict.fromkeys(("1", "2", "3"), ("flower", "flower")))


def flowers_folders(folder: Path) -> Truth:
    draw = Pictures(folder)
    return Truth({"1": "pink primrose", "2": "hard-leaved pocket orchid", "10": "globe thistle"}, {
        part: [(draw(f"{part}/{key}/{number}.jpg"), key) for key in ("1", "2", "10") for number in range(count)]
        for part, count in (("train", 3), ("valid", 2), ("test", 1))})


def aircraft(folder: Path) -> Truth:
    variants = ["707-320", "A300B4", "Boeing 717"]
    draw, parts, number = Pictures(folder), {}, 0
    lines(folder / "data/variants.txt", variants)
    lines(folder / "data/families.txt", ["A300", "Boeing 707"])
    for part in ("train", "val", "test"):
        rows = []
        for variant in variants:
            number += 1
            rows.append((draw(f"data/images/{number:07d}.jpg"), variant))
        parts[part] = rows
        lines(folder / f"data/images_variant_{part}.txt", [f"{path[12:-4]} {variant}" for path, variant in rows])
        lines(folder / f"data/images_family_{part}.txt", [
            f"{path[12:-4]} {'A300' if variant == 'A300B4' else 'Boeing 707'}" for path, variant in rows])
    return Truth({name: name for name in variants}, parts, dict.fromkeys(variants, ("aircraft", "aircraft")))


def cars(folder: Path) -> Truth:
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    draw, parts = Pictures(folder), {}
    kinds = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    for part, count in (("train", 4), ("test", 3)):
        rows = [(draw(f"cars_{part}/{number:05d}.jpg"), names[number % 2]) for number in range(1, count + 1)]
        cells = np.array([(1, names.index(name) + 1, path.split("/")[1]) for path, name in rows], kinds)
        file = folder / ("devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat")
        file.parent.mkdir(exist_ok=True)
        savemat(file, {"annotations": cells[None]})
        parts[part] = rows
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array([names], object)})
    return Truth({name: name for name in names}, parts, dict.fromkeys(names, ("car", "car")))


def pets(folder: Path) -> Truth:
    """Labels are in the order of the names without case, as in the release; one image is in no list."""
    breeds = [("Abyssinian", 1, 1), ("american_bulldog", 2, 2)]
    draw, parts, number = Pictures(folder), {}, 0
    for part in ("trainval", "test"):
        rows = []
        for name, label, species in breeds:
            for _ in range(3):
                number += 1
                rows.append((f"{name}_{number}", label, species))
                draw(f"images/{name}_{number}.jpg")
        lines(folder / f"annotations/{part}.txt", [f"{name} {label} {species} 1" for name, label, species in rows])
        parts["train" if part == "trainval" else part] = [
            (f"images/{name}.jpg", ("Abyssinian", "American Bulldog")[label - 1]) for name, label, _ in rows]
    draw("images/american_bulldog_99.jpg")
    (folder / "images/american_bulldog_98.mat").write_bytes(b"x")
    return Truth({"Abyssinian": "Abyssinian", "American Bulldog": "American Bulldog"}, parts,
                 {"Abyssinian": ("animal", "cat"), "American Bulldog": ("animal", "dog")})


def dtd(folder: Path) -> Truth:
    draw = Pictures(folder)
    rows = [(draw(f"images/{key}/{key}_{number:04d}.jpg"), key) for number in range(6) for key in ("banded", "dotted")]
    parts = {"train": rows[0:4], "val": rows[4:8], "test": rows[8:12]}
    for partition, order in ((1, ("train", "val", "test")), (2, ("test", "train", "val"))):
        for part, name in zip(order, ("train", "val", "test"), strict=True):
            lines(folder / f"labels/{name}{partition}.txt", [path.removeprefix("images/") for path, _ in parts[part]])
    return Truth({"banded": "banded", "dotted": "dotted"}, parts, dict.fromkeys(("banded", "dotted"), ("texture",) * 2))


def caltech101(folder: Path) -> Truth:
    draw = Pictures(folder)
    rows = [(draw(f"101_ObjectCategories/{key}/image_{number:04d}.jpg"), key)
            for key, count in (("BACKGROUND_Google", 32), ("Faces", 33), ("Faces_easy", 31), ("yin_yang", 35))
            for number in range(1, count + 1)]
    (folder / "101_ObjectCategories/BACKGROUND_Google/tmp").write_bytes(b"x")
    return Truth({"Faces": "Faces", "Faces_easy": "Faces easy", "yin_yang": "yin yang"},
                 {"all": [row for row in rows if row[1] != "BACKGROUND_Google"]})


def eurosat(folder: Path) -> Truth:
    draw = Pictures(folder)
    return Truth({"AnnualCrop": "annual crop land", "River": "river", "SeaLake": "sea or lake"}, {
        "all": [(draw(f"2750/{key}/{key}_{number}.jpg"), key) for key in ("AnnualCrop", "River", "SeaLake")
                for number in range(5)]})


def celeba(folder: Path) -> Truth:
    attributes = ["5_o_Clock_Shadow", "Smiling", "Young"]
    draw, parts, files = Pictures(folder), {}, []
    answers = [1, -1, 1, -1, 1, 1, -1, -1, 1, 1]
    for number, answer in enumerate(answers):
        part = ("train", "valid", "test")[0 if number < 5 else 1 if number < 8 else 2]
        files.append((draw(f"img_align_celeba/{number + 1:06d}.jpg").split("/")[1], part, answer))
        key = "Smiling" if answer > 0 else "not Smiling"
        parts.setdefault(part, []).append((f"img_align_celeba/{files[-1][0]}", key))
    names = ("train", "valid", "test")
    lines(folder / "list_eval_partition.txt", [f"{name} {names.index(part)}" for name, part, _ in files])
    lines(folder / "identity_CelebA.txt", [f"{name} 7" for name, _, _ in files])
    lines(folder / "list_attr_celeba.txt", [str(len(files)), " ".join(attributes) + " ",
                                            *(f"{name} -1 {answer:2d} 1" for name, _, answer in files)])
    for file, columns in (("list_bbox_celeba.txt", 4), ("list_landmarks_align_celeba.txt", 10)):
        lines(folder / file, [str(len(files)), " ".join(f"c{i}" for i in range(columns)),
                              *(f"{name} {' 1' * columns}" for name, _, _ in files)])
    keys = ("not Smiling", "Smiling")
    return Truth(dict(zip(keys, ("unsmiling", "smiling"), strict=True)), parts, dict.fromkeys(keys, ("person",) * 2))


SYNSETS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus",
           "n02102040": "English springer"}


def imagenet_images(folder: Path, flat: bool) -> Truth:
    draw = Pictures(folder)
    parts = {"train": [(draw(f"train/{key}/{key}_{number}.JPEG"), key) for key in SYNSETS for number in range(3)]}
    order = [*reversed(SYNSETS), *SYNSETS]
    parts["val"] = [(draw(f"val/{'' if flat else f'{key}/'}ILSVRC2012_val_{number:08d}.JPEG"), key)
                    for number, key in enumerate(order, 1)]
    if not flat:
        parts["val"].sort(key=lambda row: (row[1], row[0]))
    return Truth({key: words.split(",")[0] for key, words in SYNSETS.items()}, parts)


def devkit(folder: Path) -> None:
    """meta.mat has inner nodes too; numbers of classes are not in the order of their ids."""
    numbers = {key: number for number, key in zip((2, 3, 1), SYNSETS, strict=True)}
    rows = [(number, key, SYNSETS[key], "gloss", 0) for key, number in numbers.items()]
    rows.append((4, "n00000001", "animal", "gloss", 3))
    kinds = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    below = folder / "ILSVRC2012_devkit_t12/data"
    below.mkdir(parents=True)
    savemat(below / "meta.mat", {"synsets": np.array(rows, kinds)[:, None]})
    order = [*reversed(SYNSETS), *SYNSETS]
    lines(below / "ILSVRC2012_validation_ground_truth.txt", [str(numbers[key]) for key in order])


def imagenet(folder: Path) -> Truth:
    truth = imagenet_images(folder, flat=False)
    lines(folder / "LOC_synset_mapping.txt", [f"{key} {words}" for key, words in SYNSETS.items()])
    return truth


def imagenette(folder: Path) -> Truth:
    draw = Pictures(folder)
    names = {"n01440764": "tench", "n02102040": "English springer"}
    return Truth(names, {part: [(draw(f"{part}/{key}/{part}_{number}.JPEG"), key) for key in names
                                for number in range(count)] for part, count in (("train", 3), ("val", 2))})


def tiny_imagenet(folder: Path) -> Truth:
    draw = Pictures(folder)
    keys = sorted(SYNSETS)
    lines(folder / "wnids.txt", [*reversed(keys)])
    lines(folder / "words.txt", [f"{key}\t{words}" for key, words in {"n00001740": "entity", **SYNSETS}.items()])
    train = [(draw(f"train/{key}/images/{key}_{number}.JPEG"), key) for key in keys for number in range(3)]
    val = [(draw(f"val/images/val_{number}.JPEG"), keys[number % 3]) for number in range(5)]
    lines(folder / "val/val_annotations.txt", [f"{path.split('/')[-1]}\t{key}\t0\t0\t9\t9" for path, key in val])
    draw("test/images/test_0.JPEG")
    return Truth({key: SYNSETS[key].split(",")[0] for key in keys}, {"train": train, "val": val})


def waterbirds(folder: Path) -> Truth:
    """Species 001 lives on land, 002 on water."""
    folders = ["001.Land_bird", "002.Water_bird"]
    draw, rows = Pictures(folder), []
    for number in range(12):
        part, kind, place = number // 4, number % 2, number // 2 % 2
        path = draw(f"{folders[kind]}/Bird_{number}.jpg")
        rows.append([number + 1, path, kind, part, place, "/f/forest.jpg"])
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["img_id", "img_filename", "y", "split", "place", "place_filename"], *rows])
    keys = ("landbird", "waterbird")
    return Truth({key: key for key in keys}, {part: [(row[1], keys[row[2]]) for row in rows if row[3] == code]
                                              for code, part in enumerate(("train", "val", "test"))},
                 dict.fromkeys(keys, ("bird", "bird")))


CIFAR10_NAMES, CIFAR100_NAMES = ["airplane", "bird", "truck"], ["apple", "aquarium_fish"]


def batch(labels: Sequence[int], key: str, salt: int) -> dict[str, object]:
    pixels = np.random.Generator(np.random.Philox(key=salt)).integers(0, 256, (len(labels), 3072), np.uint8)
    return {"data": pixels, key: [int(label) for label in labels], "batch_label": "a batch",
            "filenames": [f"{number}.png" for number in range(len(labels))]}


def dump(file: Path, content: Mapping[str, object]) -> None:
    file.write_bytes(pickle.dumps(content, protocol=2))


def cifar10(folder: Path) -> Truth:
    batches = {**{f"data_batch_{n}": [n % 3, (n + 1) % 3, 0] for n in range(1, 6)}, "test_batch": [2, 1, 0, 1]}
    for salt, (name, labels) in enumerate(batches.items()):
        dump(folder / name, batch(labels, "labels", salt))
    dump(folder / "batches.meta", {"label_names": CIFAR10_NAMES, "num_vis": 3072, "num_cases_per_batch": 3})
    return Truth({name: name for name in CIFAR10_NAMES}, {
        part: [(f"{name}/{row}", CIFAR10_NAMES[label]) for name, labels in batches.items()
               if (name == "test_batch") == (part == "test") for row, label in enumerate(labels)]
        for part in ("train", "test")})


def cifar100(folder: Path) -> Truth:
    batches = {"train": [1, 0, 1, 0, 1], "test": [0, 1]}
    for salt, (name, labels) in enumerate(batches.items()):
        dump(folder / name, {**batch(labels, "fine_labels", salt), "coarse_labels": [0] * len(labels)})
    dump(folder / "meta", {"fine_label_names": CIFAR100_NAMES, "coarse_label_names": ["things"]})
    return Truth({"apple": "apple", "aquarium_fish": "aquarium fish"}, {
        part: [(f"{part}/{row}", CIFAR100_NAMES[label]) for row, label in enumerate(labels)]
        for part, labels in batches.items()})


MEDMNIST = {"pathmnist": {"0": "adipose", "8": "colorectal adenocarcinoma epithelium"},
            "breastmnist": {"0": "malignant", "1": "normal, benign"}, "organsmnist": {"0": "bladder", "10": "spleen"}}


def medmnist(name: str) -> Callable[[Path], Truth]:
    def build(folder: Path) -> Truth:
        keys, parts, content = [*MEDMNIST[name]], {}, {}
        for salt, (part, count) in enumerate((("train", 6), ("val", 4), ("test", 2))):
            labels = [keys[row % 2] for row in range(count)]
            content[f"{part}_images"] = np.random.Generator(np.random.Philox(key=salt)).integers(
                0, 256, (count, 28, 28, 3)[:4 if name == "pathmnist" else 3], np.uint8)
            content[f"{part}_labels"] = np.array([[int(label)] for label in labels])
            parts[part] = [(f"{name}/{part}/{row}", label) for row, label in enumerate(labels)]
        np.savez_compressed(folder / f"{name}.npz", **content)
        return Truth(MEDMNIST[name], parts)

    return build


LAYOUTS: Mapping[str, Callable[[Path], Truth]] = {
    "cub": cub, "aircraft": aircraft, "cars": cars, "dogs": dogs, "flowers": flowers,
    "flowers-folders": flowers_folders, "pets": pets, "dtd": dtd, "caltech101": caltech101, "cifar10": cifar10,
    "cifar100": cifar100, "eurosat": eurosat, "celeba": celeba, "imagenet": imagenet, "imagenette": imagenette,
    "tiny-imagenet": tiny_imagenet, "waterbirds": waterbirds, **{name: medmnist(name) for name in MEDMNIST}}
