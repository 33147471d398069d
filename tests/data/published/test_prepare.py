"""Official layouts, built small: what is read back is the official reader's split, labels, order and names."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import torch
import torchvision.datasets as vision
import yaml

from rayexpand import api
from rayexpand.contract.errors import DigestMismatch, SeedDataError, UsageError
from rayexpand.contract.schema import Seed
from rayexpand.data import seeds
from rayexpand.data.published import SETS
from rayexpand.data.published.divisions import Division
from tests.commands import ROOT, rayexpand
from tests.data.published import official
from tests.data.published.official import LAYOUTS, Truth

Pairs = list[tuple[str, int]]  # (path, label)
Official = Iterator[tuple[Any, Pairs]]  # class names, images of each part


@pytest.fixture(autouse=True)
def _small_lists_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision compares the MD5 of some lists with that of the release, which no small copy has."""
    for module in ("flowers102", "celeba", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None:
                            os.path.isfile(path))


def build(name: str, folder: Path) -> Truth:
    folder.mkdir(parents=True, exist_ok=True)
    return LAYOUTS[name](folder)


def prepare(name: str, folder: Path, **options: Any) -> api.PreparedData:
    return api.prepare_data(name, folder, **{"allow_counts": True, **options})


def read(found: api.PreparedData, part: str) -> tuple[seeds.DataConfig, list[tuple[str, str]]]:
    """(configuration, (seed id, class key) of each seed)."""
    data = seeds.DataConfig(**found.sections[part])
    index, _ = seeds.surveyed(data)
    return data, [(seed_id, index.classes.key[label])
                  for seed_id, label in zip(index.seed_ids, index.labels.tolist(), strict=True)]


def rows(found: api.PreparedData) -> dict[str, list[tuple[str, str]]]:
    return {part: read(found, part)[1] for part in found.sections}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets a set have the counts of its small copy published."""
    def publish(name: str, counts: dict[str, int], classes: int, split: str = "official", **fields: Any) -> None:
        chosen = SETS[name]
        division = replace(chosen.divisions[split], counts=counts, classes=classes, **fields)
        changed = replace(chosen, divisions={**chosen.divisions, split: division})
        monkeypatch.setitem(cast("dict[str, Any]", SETS), name, changed)

    return publish


@pytest.mark.parametrize("name", SETS)
def test_what_is_read_back_is_what_the_layout_says(tmp_path: Path, name: str) -> None:
    truth = build(name, tmp_path / "set")
    found = prepare(name, tmp_path / "set")

    assert {part: read(found, part)[1] for part in truth.parts} == truth.parts
    for part, expected in truth.parts.items():
        data, _ = read(found, part)
        index, survey = seeds.surveyed(data)
        classes = index.classes
        words = {key: words for key, *words in zip(classes.key, classes.name, classes.metaclass, classes.noun,
                                                   strict=True) if key in truth.names}
        assert words == {key: [name, *truth.words.get(key, words[key][1:])] for key, name in truth.names.items()}
        assert (survey["seeds"], survey.get("faults")) == (len(expected), None)
        assert all(isinstance(seed, Seed) for seed in seeds.SeedReader(index, data).read(range(len(index))))


def test_every_set_has_its_small_copy() -> None:
    assert set(LAYOUTS) == set(SETS)


def in_root(root: Path, name: str) -> None:
    """The same files where torchvision looks for them."""
    below = {"flowers": "flowers-102", "aircraft": "fgvc-aircraft-2013b", "cars": "stanford_cars", "dtd": "dtd/dtd",
             "pets": "oxford-iiit-pet", "caltech101": "caltech101", "cifar10": "cifar-10-batches-py",
             "eurosat": "eurosat", "cifar100": "cifar-100-python", "celeba": "celeba", "imagenette": "imagenette2",
             "imagenet": ""}[name]
    build(name, root / below)


def pairs(paths: Any, labels: Any, base: Path) -> Pairs:
    return [(os.path.relpath(path, base), int(label)) for path, label in zip(paths, labels, strict=True)]


def listed(base: str, cls: Any) -> Callable[[Path], Official]:
    def of(root: Path) -> Official:
        for split in ("train", "val", "test"):
            one = cls(str(root), split)
            yield one.classes, pairs(one._image_files, one._labels, root / base)

    return of


def cars_of(root: Path) -> Official:
    for split in ("train", "test"):
        one = vision.StanfordCars(str(root), split)
        yield one.classes, pairs(*zip(*one._samples, strict=True), root / "stanford_cars")


def pets_of(root: Path) -> Official:
    for split in ("trainval", "test"):
        one = vision.OxfordIIITPet(str(root), split)
        yield one.classes, pairs(one._images, one._labels, root / "oxford-iiit-pet")


def caltech_of(root: Path) -> Official:
    one = vision.Caltech101(str(root))
    yield one.categories, [(f"101_ObjectCategories/{one.categories[label]}/image_{number:04d}.jpg", label)
                           for number, label in zip(one.index, one.y, strict=True)]


def eurosat_of(root: Path) -> Official:
    one = vision.EuroSAT(str(root))
    yield one.classes, pairs(*zip(*one.samples, strict=True), root / "eurosat")


def celeba_of(root: Path) -> Official:
    for split in ("train", "valid", "test"):
        one = vision.CelebA(str(root), split)
        yield ["not Smiling", "Smiling"], [(f"img_align_celeba/{name}", int(label)) for name, label in zip(
            one.filename, one.attr[:, one.attr_names.index("Smiling")], strict=True)]


def imagenet_of(root: Path) -> Official:
    torch.save(({key: tuple(words.split(", ")) for key, words in official.SYNSETS.items()}, []), root / "meta.bin")
    for split in ("train", "val"):
        one = vision.ImageNet(str(root), split)
        yield one.wnids, pairs(*zip(*one.samples, strict=True), root)


def imagenette_of(root: Path) -> Official:
    for split in ("train", "val"):
        one = vision.Imagenette(str(root), split)
        yield one.wnids, pairs(*zip(*one._samples, strict=True), root / "imagenette2")


@pytest.mark.parametrize(("name", "of"), [
    ("aircraft", listed("fgvc-aircraft-2013b", vision.FGVCAircraft)), ("dtd", listed("dtd/dtd", vision.DTD)),
    ("cars", cars_of), ("pets", pets_of), ("caltech101", caltech_of), ("eurosat", eurosat_of), ("celeba", celeba_of),
    ("imagenet", imagenet_of), ("imagenette", imagenette_of)])
def test_labels_and_order_are_those_of_torchvision(tmp_path: Path, name: str, of: Callable[[Path], Any]) -> None:
    in_root(tmp_path, name)
    found = prepare(name, tmp_path)
    for section, (classes, expected) in zip(found.sections.values(), of(tmp_path), strict=True):
        index, _ = seeds.surveyed(seeds.DataConfig(**section))
        assert list(zip(index.seed_ids, index.labels.tolist(), strict=True)) == expected
        assert list(index.classes.key) == list(classes)


def test_flowers_are_those_of_torchvision(tmp_path: Path) -> None:
    in_root(tmp_path, "flowers")
    found = prepare("flowers", tmp_path)
    for split in ("train", "val", "test"):
        one = vision.Flowers102(str(tmp_path), split)
        index, _ = seeds.surveyed(seeds.DataConfig(**found.sections[split]))
        assert list(zip(index.seed_ids, index.labels.tolist(), strict=True)) == pairs(
            one._image_files, one._labels, tmp_path / "flowers-102")
        assert list(index.classes.name) == one.classes


@pytest.mark.parametrize(("name", "cls"), [("cifar10", vision.CIFAR10), ("cifar100", vision.CIFAR100)])
def test_cifar_is_that_of_torchvision_pixel_by_pixel(tmp_path: Path, name: str, cls: Any) -> None:
    in_root(tmp_path, name)
    found = prepare(name, tmp_path)
    for part, is_train in (("train", True), ("test", False)):
        one = cls(str(tmp_path), train=is_train)
        data = seeds.DataConfig(**found.sections[part])
        index, _ = seeds.surveyed(data)
        assert (index.labels.tolist(), list(index.classes.key)) == (one.targets, one.classes)
        for seed, (image, _) in zip(seeds.SeedReader(index, data).read(range(len(index))), one, strict=True):
            assert isinstance(seed, Seed)
            assert official.encoded(image) == seed.image


@pytest.mark.parametrize("flat", ["devkit", "kaggle"])
def test_imagenets_validation_images_as_they_are_unpacked(tmp_path: Path, flat: str) -> None:
    base = tmp_path / ("ILSVRC/Data/CLS-LOC" if flat == "kaggle" else "")
    truth = official.imagenet_images(base, flat=True)
    if flat == "devkit":
        official.devkit(tmp_path)
    else:
        official.lines(tmp_path / "LOC_synset_mapping.txt", [" ".join(one) for one in official.SYNSETS.items()])
        official.lines(tmp_path / "LOC_val_solution.csv", ["ImageId,PredictionString", *(
            f"{Path(path).stem},{key} 1 2 3 4 {key} 5 6 7 8" for path, key in truth.parts["val"])])
    assert rows(prepare("imagenet", tmp_path)) == truth.parts
    (tmp_path / ("LOC_val_solution.csv" if flat == "kaggle" else official.__name__)).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "ILSVRC2012_devkit_t12", ignore_errors=True)
    with pytest.raises(SeedDataError, match="ILSVRC2012_devkit_t12"):
        prepare("imagenet", tmp_path)


@pytest.mark.parametrize(("name", "home"), [(name, home) for name, one in SETS.items() for home in one.homes if home])
def test_a_set_is_found_where_its_archive_puts_it(tmp_path: Path, name: str, home: str) -> None:
    truth = build(name, tmp_path / home)
    found = prepare(name, tmp_path)
    assert all(section["path"].startswith(str(tmp_path / home)) for section in found.sections.values())
    assert {part: read(found, part)[1] for part in truth.parts} == truth.parts


def test_aircraft_of_families_and_of_diffmix(tmp_path: Path) -> None:
    truth = build("aircraft", tmp_path)
    assert rows(prepare("aircraft", tmp_path, split="diffmix")) == {
        "train": truth.parts["train"] + truth.parts["val"], "test": truth.parts["test"]}
    family = rows(prepare("aircraft", tmp_path, label="family"))
    assert [key for _, key in family["train"]] == ["Boeing 707", "A300", "Boeing 707"]
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == ["aircraft-diffmix.parquet",
                                                                      "aircraft-family.parquet"]


def test_a_partition_of_textures_and_the_split_of_gif(tmp_path: Path) -> None:
    truth = build("dtd", tmp_path)
    assert rows(prepare("dtd", tmp_path, label="2"))["train"] == truth.parts["test"]
    assert rows(prepare("dtd", tmp_path, split="gif")) == {
        "train": truth.parts["train"] + truth.parts["val"], "test": truth.parts["test"]}


@pytest.mark.parametrize(("name", "split", "train", "test"), [
    ("flowers", "diffmix", 6, 6), ("pets", "gif", 3 + 3, 3 + 4), ("caltech101", "gif", 120, 11),
    ("caltech101", "distdiff", 60, 8), ("eurosat", "realfake", 12, 3)])
def test_images_that_a_paper_drew_are_drawn_alike_everywhere(
        tmp_path: Path, name: str, split: str, train: int, test: int) -> None:
    """Every image is in one part, and where the folder lies changes nothing."""
    truth = build(name, tmp_path / "here")
    build(name, tmp_path / "there" / SETS[name].homes[1])
    found = rows(prepare(name, tmp_path / "here", split=split))

    assert {part: len(some) for part, some in found.items()} == {"train": train, "test": test}
    assert rows(prepare(name, tmp_path / "there", split=split)) == found
    assert {*found["train"]} & {*found["test"]} == set()
    listed = {row for some in truth.parts.values() for row in some}
    if split == "distdiff":
        listed = {row for row in listed if row[1] != "Faces_easy"}
    assert listed <= {*found["train"], *found["test"]}
    assert found["train"] != sorted(listed)[:train], "not the first ones"


def test_gif_takes_pets_that_no_list_names(tmp_path: Path) -> None:
    build("pets", tmp_path)
    found = rows(prepare("pets", tmp_path, split="gif"))
    assert ("images/american_bulldog_99.jpg", "American Bulldog") in found["train"] + found["test"]


def test_cars_of_distdiff_begin_with_the_year(tmp_path: Path) -> None:
    build("cars", tmp_path)
    index, _ = seeds.surveyed(seeds.DataConfig(**prepare("cars", tmp_path, split="distdiff").sections["train"]))
    assert index.classes.name == ("2000 AM General Hummer SUV", "2012 Acura RL Sedan")
    assert index.classes.key == ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")


def test_parts_of_arrays_are_named_where_they_are(tmp_path: Path) -> None:
    truth = build("pathmnist", tmp_path)
    found = prepare("pathmnist", tmp_path, split="gif")
    assert found.sections["train"] == {"source": "npz", "path": str(tmp_path / "pathmnist.npz"), "split": "val",
                                       "classes": str(tmp_path / "pathmnist-gif-classes.csv")}
    assert read(found, "train")[1] == truth.parts["val"]
    assert not list(tmp_path.glob("*.parquet"))


def test_a_small_cifar_takes_so_many_of_each_class(tmp_path: Path) -> None:
    build("cifar100", tmp_path)
    found = prepare("cifar100", tmp_path, split="distdiff")
    assert found.sections["train"]["per_class"] == 100
    assert "per_class" not in found.sections["test"]
    assert found.images["train"] == 5


def test_ten_classes_of_imagenet_are_numbered_anew(tmp_path: Path) -> None:
    wanted = Path("jobs/papers/realfake/imagenet10.txt").read_text().split()
    for key in ["n00000001", *wanted, "n99999999"]:
        for part in ("train", "val"):
            official.Pictures(tmp_path)(f"{part}/{key}/0.JPEG")
    official.lines(tmp_path / "LOC_synset_mapping.txt", [f"{key} name of {key}, other" for key in
                                                         ["n00000001", *wanted, "n99999999"]])
    found = prepare("imagenet", tmp_path, split="realfake-in10")
    index, _ = seeds.surveyed(seeds.DataConfig(**found.sections["val"]))
    assert (list(index.classes.key), index.labels.tolist()) == (sorted(wanted), list(range(10)))
    assert index.classes.name[0] == f"name of {wanted[0]}"
    shutil.rmtree(tmp_path / "train" / wanted[3])
    with pytest.raises(SeedDataError, match=rf"1 of 10 classes .* are not there \('{wanted[3]}'\)"):
        prepare("imagenet", tmp_path, split="realfake-in10")


def test_a_thousand_folders_have_torchvisions_names(tmp_path: Path) -> None:
    for number in range(1000):
        for part in ("train", "val"):
            folder = tmp_path / part / f"n{number:08d}"
            folder.mkdir(parents=True)
            (folder / "0.JPEG").write_bytes(b"")
    found = prepare("imagenet", tmp_path)
    index, _ = seeds.surveyed(seeds.DataConfig(**found.sections["val"]))
    assert (index.classes.name[0], index.classes.name[217], len(index)) == ("tench", "English springer", 1000)
    assert any("class names are torchvision's" in note for note in found.notes)
    shutil.rmtree(tmp_path / "train/n00000003")
    shutil.rmtree(tmp_path / "val/n00000003")
    with pytest.raises(SeedDataError, match=r"999 classes .* no file that names them"):
        prepare("imagenet", tmp_path)


def test_waterbirds_by_species_with_groups(tmp_path: Path) -> None:
    truth = build("waterbirds", tmp_path)
    found = prepare("waterbirds", tmp_path, label="species")
    test = read(found, "test")[1]
    assert [(path, path.split("/")[0]) for path, _ in truth.parts["test"]] == test
    index, _ = seeds.surveyed(seeds.DataConfig(**found.sections["test"]))
    assert index.classes.name == ("Land bird", "Water bird")
    assert found.groups == str(tmp_path / "waterbirds-species-groups.csv")
    from rayexpand.studies.extra_tests import ExtraTest, groups_of

    groups = groups_of(ExtraTest(data=seeds.DataConfig(**found.sections["test"]), groups=found.groups), index)
    assert groups is not None
    assert groups.tolist() == ["land bird on land", "water bird on land", "land bird on water", "water bird on water"]


def test_another_attribute_of_celeba(tmp_path: Path) -> None:
    build("celeba", tmp_path)
    index, _ = seeds.surveyed(seeds.DataConfig(**prepare("celeba", tmp_path, label="Young").sections["train"]))
    assert (index.classes.name, index.labels.tolist()) == (("not young", "young"), [1] * 5)


# ---- counts

@pytest.mark.parametrize(("name", "split", "total"), [
    ("flowers", "official", 8189), ("flowers", "diffmix", 8189), ("flowers-folders", "official", 8189),
    ("cub", "official", 11788), ("cars", "official", 16185), ("dogs", "official", 20580),
    ("aircraft", "official", 10000), ("aircraft", "diffmix", 10000), ("pets", "official", 7349), ("pets", "gif", 7390),
    ("dtd", "official", 5640),
    ("dtd", "gif", 5640), ("caltech101", "gif", 9144), ("caltech101", "distdiff", 8242), ("eurosat", "realfake", 27000),
    ("celeba", "official", 202599), ("waterbirds", "official", 11788), ("imagenette", "official", 13394),
    ("pathmnist", "official", 107180), ("breastmnist", "official", 780), ("organsmnist", "official", 25221)])
def test_published_parts_add_up(name: str, split: str, total: int) -> None:
    assert sum(SETS[name].divisions[split].counts.values()) == total


def test_the_published_counts_pass_and_others_are_said(tmp_path: Path, small: Callable[..., None]) -> None:
    build("cub", tmp_path)
    small("cub", {"train": 4, "test": 3}, 2)
    assert api.prepare_data("cub", tmp_path).notes == []
    small("cub", {"train": 5, "test": 3}, 3)
    for file in tmp_path.glob("cub*"):
        file.unlink()
    with pytest.raises(SeedDataError) as refused:
        api.prepare_data("cub", tmp_path)
    assert refused.value.exit_code == 2
    assert [line.strip() for line in str(refused.value).splitlines()[1:3]] == [
        "train: 4 images, published are 5", "2 classes, published are 3"]
    assert not list(tmp_path.glob("cub*")), "nothing is written"
    found = prepare("cub", tmp_path)
    assert (found.notes, found.images) == (["train: 4 images, published are 5", "2 classes, published are 3"],
                                           {"train": 4, "test": 3})
    assert json.loads(pq.read_schema(tmp_path / "cub.parquet").metadata[b"rayexpand"])["notes"] == found.notes


def test_images_that_are_not_there_are_named(tmp_path: Path, small: Callable[..., None]) -> None:
    truth = build("dogs", tmp_path)
    small("dogs", {"train": 12, "test": 9}, 3)
    gone = truth.parts["test"][4][0]
    (tmp_path / gone).unlink()
    with pytest.raises(SeedDataError, match="test: 1 images that the lists name are not there") as refused:
        api.prepare_data("dogs", tmp_path)
    assert gone in str(refused.value)
    assert "test: 8 images, published are 9" in str(refused.value)
    assert "images.tar, lists.tar" in str(refused.value)
    assert len(read(prepare("dogs", tmp_path), "test")[1]) == 8


def test_another_release_with_its_own_counts_passes(tmp_path: Path, small: Callable[..., None]) -> None:
    build("organsmnist", tmp_path)
    small("organsmnist", {"train": 7, "val": 4, "test": 2}, 2, also={"train": 6, "val": 4, "test": 2})
    assert api.prepare_data("organsmnist", tmp_path).notes == []
    (tmp_path / "organsmnist-classes.csv").unlink()
    small("organsmnist", {"train": 7, "val": 4, "test": 2}, 2, also={"train": 6, "val": 5, "test": 2})
    with pytest.raises(SeedDataError, match=r"train: 6 images, published are 7 \(or 6\)"):
        api.prepare_data("organsmnist", tmp_path)


# ---- once more

def test_the_second_time_nothing_is_written(tmp_path: Path) -> None:
    build("waterbirds", tmp_path)
    first = prepare("waterbirds", tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in map(Path, first.files)}
    second = prepare("waterbirds", tmp_path, split="diffmix")
    assert ([*first.files.values()], [*second.files.values()]) == ([True] * 3, [False] * 3)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    assert {**vars(first), "files": {}} == {**vars(second), "files": {}}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "metadata.csv", "waterbirds-classes.csv", "waterbirds-groups.csv", "waterbirds.parquet"]


def test_a_dataset_that_changed_is_refused(tmp_path: Path) -> None:
    truth = build("eurosat", tmp_path)
    prepare("eurosat", tmp_path)
    (tmp_path / truth.parts["all"][0][0]).unlink()
    with pytest.raises(DigestMismatch, match=r"eurosat\.parquet' is there and holds something else"):
        prepare("eurosat", tmp_path)
    (tmp_path / "eurosat.parquet").write_bytes(b"damaged")
    with pytest.raises(DigestMismatch):
        prepare("eurosat", tmp_path)


def test_words_of_ones_own_stay_if_they_name_every_class(tmp_path: Path) -> None:
    build("eurosat", tmp_path)
    prepare("eurosat", tmp_path)
    words = tmp_path / "eurosat-classes.csv"
    words.write_text("key,name\nAnnualCrop,field\nRiver,stream\nSeaLake,sea\n")
    found = prepare("eurosat", tmp_path)
    assert "words of your own" in found.notes[-1]
    assert seeds.surveyed(seeds.DataConfig(**found.sections["all"]))[0].classes.name == ("field", "stream", "sea")
    words.write_text("key,name\nAnnualCrop,field\n")
    with pytest.raises(SeedDataError, match="does not name 2 of 3 classes"):
        prepare("eurosat", tmp_path)


# ---- what cannot be read

@pytest.mark.parametrize(("name", "part", "archive"), [
    ("cub", "train_test_split.txt", "CUB_200_2011.tgz"), ("flowers", "setid.mat", "setid.mat"),
    ("cars", "cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat"),
    ("pets", "annotations/test.txt", "annotations.tar.gz"), ("cifar10", "data_batch_3", "cifar-10-python.tar.gz"),
    ("celeba", "list_bbox_celeba.txt", "list_bbox_celeba.txt"), ("breastmnist", "breastmnist.npz", "breastmnist.npz"),
    ("dogs", "test_list.mat", "lists.tar")])
def test_a_missing_part_is_named_with_its_official_file(tmp_path: Path, name: str, part: str, archive: str) -> None:
    build(name, tmp_path)
    (tmp_path / part).unlink()
    with pytest.raises(SeedDataError, match=rf"lacks '{part}' of {archive}\. .* official page"):
        prepare(name, tmp_path)


@pytest.mark.parametrize(("name", "file"), [
    ("cub", "images.txt"), ("dogs", "train_list.mat"), ("cars", "devkit/cars_meta.mat"),
    ("pets", "annotations/test.txt"), ("aircraft", "data/images_variant_val.txt"), ("celeba", "list_attr_celeba.txt"),
    ("cifar10", "data_batch_2"), ("pathmnist", "pathmnist.npz"), ("tiny-imagenet", "val/val_annotations.txt"),
    ("waterbirds", "metadata.csv")])
def test_damaged_lists_are_errors_for_people(tmp_path: Path, name: str, file: str) -> None:
    build(name, tmp_path)
    (tmp_path / file).write_bytes(b"\x00\x93damaged \xff no list")
    with pytest.raises(SeedDataError, match=f"^{name}: ") as refused:
        prepare(name, tmp_path)
    assert refused.value.exit_code == 2


def test_lists_that_are_not_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("flowers", tmp_path)
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5=None: False)
    with pytest.raises(SeedDataError, match="flowers: the lists beside the images are not those that were published"):
        prepare("flowers", tmp_path)


def test_what_is_asked_wrongly_has_a_hint(tmp_path: Path) -> None:
    build("cub", tmp_path)
    for name, options, said in (
            ("cubs", {}, "did you mean 'cub'"), ("cub", {"split": "difmix"}, "did you mean 'diffmix'"),
            ("cub", {"label": "x"}, "one kind of labels"), ("celeba", {"label": "Smile"}, "did you mean 'Smiling'")):
        with pytest.raises(UsageError, match=said):
            prepare(name, tmp_path, **options)
    with pytest.raises(SeedDataError, match="is no folder"):
        prepare("cub", tmp_path / "nowhere")


def test_links_out_of_the_set_are_refused(tmp_path: Path) -> None:
    build("caltech101", tmp_path / "set")
    elsewhere = tmp_path / "yin_yang"
    shutil.move(tmp_path / "set/101_ObjectCategories/yin_yang", elsewhere)
    (tmp_path / "set/101_ObjectCategories/yin_yang").symlink_to(elsewhere)
    with pytest.raises(SeedDataError, match=r"links lead out of .*yin_yang"):
        prepare("caltech101", tmp_path / "set")
    (tmp_path / "set/101_ObjectCategories/yin_yang").unlink()
    shutil.move(elsewhere, tmp_path / "set/real")
    (tmp_path / "set/101_ObjectCategories/yin_yang").symlink_to("../real")
    assert prepare("caltech101", tmp_path / "set").images["all"] == 99, "a link inside is fine"


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    build("caltech101", tmp_path)
    with open(os.fsencode(tmp_path) + b"/101_ObjectCategories/Faces/\xff.jpg", "wb"):
        pass
    with pytest.raises(SeedDataError, match=r"1 file names are not UTF-8 .*udcff"):
        prepare("caltech101", tmp_path)


def test_an_image_in_two_parts_is_refused(tmp_path: Path) -> None:
    build("dtd", tmp_path)
    shutil.copy(tmp_path / "labels/train1.txt", tmp_path / "labels/test1.txt")
    with pytest.raises(SeedDataError, match="4 images are listed twice"):
        prepare("dtd", tmp_path)


def test_a_folder_that_cannot_be_written_says_why_it_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("cub", tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SeedDataError, match=r"cannot be written \(No space left on device\); a manifest lies in"):
        prepare("cub", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".cub", "cub"))]


# ---- the command

def test_what_the_command_prints_is_a_section_of_a_job(tmp_path: Path, small: Callable[..., None]) -> None:
    build("aircraft", tmp_path / "planes")
    small("aircraft", {"train": 3, "val": 3, "test": 3}, 3)
    done = rayexpand("data", "prepare", "aircraft", tmp_path / "planes")
    assert done.returncode == 0
    assert "aircraft.parquet written" in done.stderr
    assert done.stdout.splitlines()[2].startswith("# val: {source: manifest")
    job = tmp_path / "job.yaml"
    job.write_text(done.stdout.splitlines()[0] + "\nname: planes\nmethod: {name: classical, ratio: 2}\n")
    assert rayexpand("validate", job).returncode == 0
    study = yaml.safe_load(done.stdout)
    assert [study[one]["split"] for one in ("data", "test")] == ["train", "test"]
    again = json.loads(rayexpand("data", "prepare", "aircraft", tmp_path / "planes", "--json").stdout)
    assert (again["images"], again["published"], set(again["files"].values())) == (
        {"train": 3, "val": 3, "test": 3}, {"train": 3, "val": 3, "test": 3}, {False})


def test_the_command_refuses_other_counts(tmp_path: Path) -> None:
    build("cub", tmp_path)
    refused = rayexpand("data", "prepare", "cub", tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "train: 4 images, published are 5,994" in refused.stderr
    allowed = rayexpand("data", "prepare", "cub", tmp_path, "--allow-counts")
    assert allowed.returncode == 0
    assert "published are 5,994" in allowed.stderr


def test_the_list_of_sets(tmp_path: Path) -> None:
    found = json.loads(rayexpand("data", "ls", "--json").stdout)
    assert [one["name"] for one in found] == [*SETS]
    assert next(one for one in found if one["name"] == "cub")["splits"]["official"] == {
        "images": {"train": 5994, "test": 5794}, "classes": 200, "about": ""}
    said = rayexpand("data", "ls", "pets").stdout
    assert "files: images.tar.gz, annotations.tar.gz" in said
    assert "3,680" in said


def test_the_page_has_every_set_split_and_count() -> None:
    page = (ROOT / "docs/data.md").read_text()
    table = {name: line for line in page.splitlines() if line.startswith("| `") for name in re.findall(r"`([\w-]+)`",
             line.split("|")[1])}
    for name, one in SETS.items():
        for split, by in one.divisions.items():
            said = [f"{count:,}" for part, count in by.counts.items() if part not in by.per_class]
            assert [word for word in (split, *said) if word not in table[name]] == [], name


def test_divisions_name_parts_that_are_there() -> None:
    for name, one in SETS.items():
        official_parts = {*one.divisions["official"].counts, "unlisted"}
        for split, by in one.divisions.items():
            used = by.draw.of if by.draw else [part for some in by.counts for part in by.of.get(some, (some,))]
            assert {*used} <= official_parts, (name, split)
            assert isinstance(by, Division)
            assert by.draw is None or {*by.counts} == {"train", "test"}
