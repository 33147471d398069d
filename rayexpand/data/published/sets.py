"""The table of published datasets: their files, their parts and counts, and the splits of papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from rayexpand.data.published import layouts
from rayexpand.data.published import torchvision_layouts as vision
from rayexpand.data.published.divisions import Division, RandomPart
from rayexpand.data.published.found import FoundSet


@dataclass(frozen=True)
class PublishedSet:
    title: str
    read: Callable[[Path, str], FoundSet]  # (folder of the set, label) -> what is there
    files: Mapping[str, str]  # what must be in the folder -> the published file that it comes from
    homes: tuple[str, ...]  # where that folder may be, below the one that is given
    divisions: Mapping[str, Division]  # the first is the official one
    labels: tuple[str, ...] = ("",)  # which labels it may have; the first is the default
    classes: Mapping[str, int] = field(default_factory=dict)  # how many, for labels other than the default
    metaclass: str = ""
    noun: str = ""


def _papers(official: Division, *names: str, **others: Division) -> dict[str, Division]:
    """`names` are papers that take the official split."""
    return {"official": official, **dict.fromkeys(names, official), **others}


def _year_first(name: str) -> str:
    """`Audi S4 Sedan 2012` -> `2012 Audi S4 Sedan`, as DistDiff's code asks for cars."""
    rest, _, year = name.rpartition(" ")
    return f"{year} {rest}" if year.isdigit() and rest else name


_CUB = Division({"train": 5994, "test": 5794}, 200)
_CARS = Division({"train": 8144, "test": 8041}, 196)
_PETS = Division({"train": 3680, "test": 3669}, 37)
_DTD = Division({"train": 1880, "val": 1880, "test": 1880}, 47)
_DTD_TRAINVAL = Division({"train": 3760, "test": 1880}, 47, {"train": ("train", "val")})
_FLOWERS = Division({"train": 1020, "val": 1020, "test": 6149}, 102)
_AIRCRAFT = Division({"train": 3334, "val": 3333, "test": 3333}, 100)
_FOLDERS = Division({"train": 6552, "valid": 818, "test": 819}, 102)
_CIFAR100 = Division({"train": 50000, "test": 10000}, 100)
_SMALL = replace(_CIFAR100, counts={"train": 10000, "test": 10000}, per_class={"train": 100},
                 about="which 100 images of a class is not stated: data.subset_seed chooses them")
_IMAGENET = Division({"train": 1281167, "val": 50000}, 1000)
_PATH = Division({"train": 89996, "val": 10004, "test": 7180}, 9)
_BREAST = Division({"train": 546, "val": 78, "test": 156}, 2)
_ORGANS = Division({"train": 13940, "val": 2452, "test": 8829}, 11, also={"train": 13932, "val": 2452, "test": 8827})

_CELEBA_LABELS = (
    "Smiling", "Attractive", "Heavy_Makeup", "5_o_Clock_Shadow", "Arched_Eyebrows", "Bags_Under_Eyes", "Bald", "Bangs",
    "Big_Lips", "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby",
    "Double_Chin", "Eyeglasses", "Goatee", "Gray_Hair", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache",
    "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns",
    "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace",
    "Wearing_Necktie", "Young")


def _medmnist(name: str, divisions: Mapping[str, Division]) -> PublishedSet:
    return PublishedSet(f"MedMNIST's {name}", partial(layouts.medmnist, name), {f"{name}.npz": f"{name}.npz"}, ("",),
                        divisions)


SETS: Mapping[str, PublishedSet] = {
    "cub": PublishedSet(
        "CUB-200-2011", layouts.birds,
        dict.fromkeys(("images", "images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt"),
                      "CUB_200_2011.tgz"),
        ("", "CUB_200_2011"), _papers(_CUB, "diffmix", "realfake", "diffcoremix"), metaclass="bird", noun="bird"),
    "aircraft": PublishedSet(
        "FGVC-Aircraft", vision.aircraft, {"data/images": "fgvc-aircraft-2013b.tar.gz",
                                           "data/variants.txt": "fgvc-aircraft-2013b.tar.gz"},
        ("", "fgvc-aircraft-2013b"),
        _papers(_AIRCRAFT, diffmix=Division({"train": 6667, "test": 3333}, 100, {"train": ("train", "val")})),
        ("variant", "family", "manufacturer"), {"family": 70, "manufacturer": 30}, metaclass="aircraft",
        noun="aircraft"),
    "cars": PublishedSet(
        "Stanford Cars", vision.cars,
        {"cars_train": "cars_train.tgz", "cars_test": "cars_test.tgz", "devkit/cars_meta.mat": "car_devkit.tgz",
         "devkit/cars_train_annos.mat": "car_devkit.tgz",
         "cars_test_annos_withlabels.mat": "cars_test_annos_withlabels.mat"},
        ("", "stanford_cars"),
        _papers(_CARS, "diffmix", "gif", "realfake", "diffcoremix",
                distdiff=replace(_CARS, rename=_year_first, about="the year stands first in class names")),
        metaclass="car", noun="car"),
    "dogs": PublishedSet(
        "Stanford Dogs", layouts.dogs,
        {"Images": "images.tar", "train_list.mat": "lists.tar", "test_list.mat": "lists.tar"}, ("", "stanford_dogs"),
        _papers(Division({"train": 12000, "test": 8580}, 120), "diffmix"), metaclass="dog", noun="dog"),
    "flowers": PublishedSet(
        "Oxford Flowers-102", vision.flowers,
        {"jpg": "102flowers.tgz", "imagelabels.mat": "imagelabels.mat", "setid.mat": "setid.mat"}, ("", "flowers-102"),
        _papers(_FLOWERS, "diffcoremix", diffmix=Division(
            {"train": 4094, "test": 4095}, 102,
            draw=RandomPart(("train", "val", "test"), lambda n: n // 2, by_class=False),
            about="a random half of all images; which ones is not published")), metaclass="flower", noun="flower"),
    "flowers-folders": PublishedSet(
        "Oxford Flowers-102 as folders train, valid, test", layouts.flower_folders,
        {"train": "flower_data.tar.gz", "valid": "flower_data.tar.gz"}, ("", "flower_data"),
        _papers(_FOLDERS, gif=Division({"train": 6552, "test": 818}, 102, {"test": ("valid",)})),
        metaclass="flower", noun="flower"),
    "pets": PublishedSet(
        "Oxford-IIIT Pets", vision.pets,
        {"images": "images.tar.gz", "annotations/trainval.txt": "annotations.tar.gz",
         "annotations/test.txt": "annotations.tar.gz"}, ("", "oxford-iiit-pet"),
        _papers(_PETS, "realfake", gif=Division(
            {"train": 3842, "test": 3548}, 37, draw=RandomPart(("train", "test", "unlisted"), lambda n: n * 52 // 100),
            about="52 % of each class of all 7,390 images of the folder; which ones is not published, and the 3,507 "
                  "that are stated for testing are those of the lists less 3,842")), metaclass="animal"),
    "dtd": PublishedSet(
        "Describable Textures", vision.textures,
        {"images": "dtd-r1.0.1.tar.gz", "labels": "dtd-r1.0.1.tar.gz"}, ("", "dtd", "dtd/dtd"),
        _papers(_DTD, gif=_DTD_TRAINVAL, distdiff=_DTD_TRAINVAL), tuple(map(str, range(1, 11))),
        metaclass="texture", noun="texture"),
    "caltech101": PublishedSet(
        "Caltech-101", layouts.caltech, {"101_ObjectCategories": "caltech-101.zip, its 101_ObjectCategories.tar.gz"},
        ("", "caltech101", "caltech-101"),
        _papers(Division({"all": 8677}, 101, without=("BACKGROUND_Google",)),
                gif=Division({"train": 3060, "test": 6084}, 102, draw=RandomPart(("all",), lambda n: 30),
                             about="30 of each class and of the background; which ones is not published, and the 6,085 "
                                   "that are stated for testing are one more than the archive has"),
                distdiff=Division({"train": 3000, "test": 5242}, 100, draw=RandomPart(("all",), lambda n: 30),
                                  without=("BACKGROUND_Google", "Faces_easy"),
                                  about="30 of each class; which ones is not published, and the 6,085 that are stated "
                                        "for testing do not fit 100 classes"))),
    "cifar10": PublishedSet(
        "CIFAR-10", layouts.cifar, dict.fromkeys(
            ("batches.meta", *(f"data_batch_{n}" for n in range(1, 6)), "test_batch"), "cifar-10-python.tar.gz"),
        ("", "cifar-10-batches-py"), _papers(Division({"train": 50000, "test": 10000}, 10))),
    "cifar100": PublishedSet(
        "CIFAR-100", layouts.cifar, dict.fromkeys(("meta", "train", "test"), "cifar-100-python.tar.gz"),
        ("", "cifar-100-python"), _papers(_CIFAR100, "diffcoremix", gif=_SMALL, distdiff=_SMALL)),
    "eurosat": PublishedSet(
        "EuroSAT, RGB", vision.eurosat, {"2750": "EuroSAT.zip"}, ("", "eurosat"),
        _papers(Division({"all": 27000}, 10), realfake=Division(
            {"train": 21600, "test": 5400}, 10, draw=RandomPart(("all",), lambda n: n * 4 // 5),
            about="four fifths of each class; which ones is not published"))),
    "celeba": PublishedSet(
        "CelebA", vision.celeba,
        {"img_align_celeba": "img_align_celeba.zip", **{name: name for name in (
            "list_attr_celeba.txt", "list_eval_partition.txt", "identity_CelebA.txt", "list_bbox_celeba.txt",
            "list_landmarks_align_celeba.txt")}}, ("", "celeba"),
        _papers(Division({"train": 162770, "valid": 19867, "test": 19962}, 2)), _CELEBA_LABELS,
        metaclass="person", noun="person"),
    "imagenet": PublishedSet(
        "ImageNet-1k (ILSVRC 2012)", layouts.imagenet,
        {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}, ("", "ILSVRC/Data/CLS-LOC"),
        _papers(_IMAGENET, "realfake", "diffcoremix", **{
            "realfake-in10": Division({"train": 12894, "val": 500}, 10, only="papers/realfake/imagenet10.txt"),
            "realfake-in100": Division({"train": 126689, "val": 5000}, 100, only="papers/realfake/imagenet100.txt")})),
    "imagenette": PublishedSet(
        "ImageNette", vision.imagenette, {"train": "imagenette2.tgz", "val": "imagenette2.tgz"},
        ("", "imagenette2", "imagenette2-320", "imagenette2-160"),
        _papers(Division({"train": 9469, "val": 3925}, 10), "distdiff")),
    "tiny-imagenet": PublishedSet(
        "Tiny-ImageNet-200", layouts.tiny_imagenet, dict.fromkeys(
            ("train", "val/images", "val/val_annotations.txt", "wnids.txt", "words.txt"), "tiny-imagenet-200.zip"),
        ("", "tiny-imagenet-200"), _papers(Division({"train": 100000, "val": 10000}, 200), "diffcoremix")),
    "waterbirds": PublishedSet(
        "Waterbirds", layouts.waterbirds, {"metadata.csv": "waterbird_complete95_forest2water2.tar.gz"},
        ("", "waterbird_complete95_forest2water2", "waterbirds_v1.0"),
        _papers(Division({"train": 4795, "val": 1199, "test": 5794}, 2), "diffmix"), ("bird", "species"),
        {"species": 200}, metaclass="bird", noun="bird"),
    "pathmnist": _medmnist("pathmnist", _papers(
        _PATH, gif=Division({"train": 10004, "test": 7180}, 9, {"train": ("val",)}, about="trains on the part val"),
        distdiff=Division({"train": 900, "test": 7180}, 9, per_class={"train": 100}, about=_SMALL.about))),
    "breastmnist": _medmnist("breastmnist", _papers(
        _BREAST, gif=Division({"train": 78, "test": 156}, 2, {"train": ("val",)}, about="trains on the part val"))),
    "organsmnist": _medmnist("organsmnist", _papers(
        _ORGANS, gif=Division({"train": 13940, "test": 8829}, 11, also={"train": 13932, "test": 8827}))),
}
