from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from rayexpand.classifier.recipe import drw_weights
from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import SEED_INDEX, ClassTable, SeedIndex
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import DataConfig, SeedReader, build_index, check
from rayexpand.data.subsets import (
    SubsetConfig,
    choose,
    few_shot,
    fill_counts,
    ids_file,
    ids_hash,
    inverse_frequency,
    long_tail,
    long_tail_counts,
    overlap,
    per_class,
    shared_images,
)
from tests.runfolder import picture, png

CUB = (5994, 200)  # images, classes


def index_of(sizes: list[int], faults: int = 0) -> SeedIndex:
    """Classes of `sizes` with ids c<class>/<number>; the first `faults` rows cannot be read."""
    labels = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    n = len(labels)
    fault = ["missing"] * faults + [""] * (n - faults)
    table = pa.table({"seed_id": [f"c{c}/{i}" for c, size in enumerate(sizes) for i in range(size)], "label": labels,
                      "file": [0] * n, "member": [""] * n, "group": [-1] * n, "offset": range(n), "fault": fault},
                     schema=SEED_INDEX)
    return SeedIndex(table, ClassTable.of([f"c{c}" for c in range(len(sizes))], counts=sizes))


# --- counts


def test_long_tail_counts_follow_the_mean_and_k_minus_2() -> None:
    assert long_tail_counts(1000, 10, 100).tolist() == [100, 56, 31, 17, 10, 5, 3, 1, 1, 1]
    assert long_tail_counts(3000, 3, 100).tolist() == [1000, 10, 1]
    assert long_tail_counts(512, 8, 64).tolist() == [64, 32, 16, 8, 4, 2, 1, 1]  # 64 * 64 ** (-5 / 6) is 1.999... here


@pytest.mark.parametrize(("factor", "total", "singles"), [(100, 1242, 83), (50, 1427, 62), (10, 2238, 0)])
def test_long_tail_counts_of_cub(factor: float, total: int, singles: int) -> None:
    counts = long_tail_counts(*CUB, factor)

    assert (counts[0], counts.sum(), (counts == 1).sum()) == (29, total, singles)
    if factor == 100:
        assert [(counts > 20).sum(), ((counts >= 5) & (counts <= 20)).sum(), (counts < 5).sum()] == [16, 61, 123]
        assert fill_counts(counts).sum() == 4558
        q, head, tail = inverse_frequency(counts), counts[0] / counts.sum(), counts[-1] / counts.sum()
        ratios = [((1 - p) * head + p * q[0]) / ((1 - p) * tail + p * q[-1]) for p in (0, 0.1, 0.5)]
        assert np.round(ratios, 1).tolist() == [29.0, 13.4, 2.6]
    if factor == 10:
        assert counts[-1] == 2


def test_weights_of_long_tail_protocols() -> None:
    counts = np.array([29, 10, 1])

    np.testing.assert_allclose(inverse_frequency(counts), [0.0534, 0.1456, 0.8010], atol=5e-5)
    np.testing.assert_allclose(drw_weights(counts, 0.9999), [0.0913, 0.2645, 2.6442], atol=5e-5)
    assert drw_weights(counts, 0).tolist() == [1, 1, 1]
    assert fill_counts(counts).tolist() == [0, 19, 28]


def test_an_image_listed_again_is_the_same_image() -> None:
    data = DataConfig(source="digits")
    plain = build_index(data)
    again = data.model_copy(update={"repeats": {plain.seed_ids[0]: 2}})

    assert shared_images((plain, data), (build_index(again), again)) == [
        plain.seed_ids[0], f"{plain.seed_ids[0]}~2", *plain.seed_ids[1:]]


# --- rows


def test_subsets_nest_and_share_the_order_of_data_per_class() -> None:
    data = DataConfig(source="digits", subset_seed=3)
    index = build_index(data)
    one, five, ten = (set(few_shot(index, n, 3)) for n in (1, 5, 10))
    listed = build_index(data.model_copy(update={"per_class": 5})).seed_ids

    assert one < five < ten
    assert [len(one), len(five), len(ten)] == [10, 50, 100]
    assert [index.seed_ids[row] for row in sorted(five)] == listed
    assert np.array_equal(per_class(index, 5, 3), sorted(five))
    assert set(few_shot(index, 5, 4)) != five


def test_few_shot_takes_all_of_a_small_class_and_per_class_refuses_it() -> None:
    index = index_of([2, 9])

    assert np.bincount(index.labels[few_shot(index, 5, 0)]).tolist() == [2, 5]
    with pytest.raises(UsageError, match=r"5 images of each class asked for, but 1 of 2 classes .* \(c0 has 2 of 5\)"):
        per_class(index, 5, 0)


def test_rows_with_a_fault_are_never_taken() -> None:
    index = index_of([6, 9], faults=4)

    assert np.bincount(index.labels[choose(index, SubsetConfig())]).tolist() == [2, 9]
    assert few_shot(index, 5, 0).min() == 4
    with pytest.raises(UsageError, match="c0 has 2 of 3"):
        per_class(index, 3, 0)


def test_long_tail_gives_the_head_to_the_largest_class() -> None:
    index = index_of([40, 45, 35, 60, 40, 40, 40, 40, 40, 40])  # mean 42

    sizes = np.bincount(index.labels[long_tail(index, 10, 0)])

    assert sizes[[3, 1, 0, 4]].tolist() == [42, 31, 23, 17]
    assert sizes[2] == sizes.min() == long_tail_counts(420, 10, 10)[-1]
    with pytest.raises(UsageError, match="a long tail of factor 10 asked for"):
        long_tail(index_of([90, 1, 90, 90]), 10, 0)
    with pytest.raises(UsageError, match="needs 3 classes"):
        long_tail(index_of([9, 9]), 10, 0)


def test_sizes_given_for_each_class() -> None:
    index = index_of([90, 20, 5], faults=2)
    rows = choose(index, SubsetConfig(kind="counts", counts=(50, 9, 1)), 3)

    assert np.bincount(index.labels[rows]).tolist() == [50, 9, 1]
    assert set(choose(index, SubsetConfig(kind="counts", counts=(10, 9, 1)), 3)) < set(rows)
    assert set(choose(index, SubsetConfig(kind="counts", counts=(50, 9, 1)), 4)) != set(rows)
    with pytest.raises(UsageError, match="counts: 2 sizes for 3 classes"):
        choose(index, SubsetConfig(kind="counts", counts=(1, 2)))
    with pytest.raises(UsageError, match="c0 has 88 of 90"):
        choose(index, SubsetConfig(kind="counts", counts=(90, 1, 1)))


def test_the_seed_of_a_subset_is_its_own_or_that_of_the_study() -> None:
    index = index_of([50] * 3)
    free, fixed = SubsetConfig(kind="few_shot", n=5), SubsetConfig(kind="few_shot", n=5, seed=7)

    assert not np.array_equal(choose(index, free, 0), choose(index, free, 1))
    assert np.array_equal(choose(index, fixed, 0), choose(index, free, 7))


@pytest.mark.parametrize(("fields", "message"), [
    ({"kind": "few_shot"}, "kind few_shot needs n"), ({"kind": "long_tail", "n": 3}, "n has no effect on kind"),
    ({"kind": "long_tail"}, "kind long_tail needs imbalance_factor"), ({"n": 3}, "n has no effect on kind full"),
    ({"kind": "per_class", "n": 1, "imbalance_factor": 10}, "imbalance_factor has no effect"),
    ({"kind": "counts"}, "kind counts needs counts"),
    ({"kind": "counts", "counts": [3, 0]}, "1 or more for each class"),
    ({"kind": "full", "counts": [3]}, "counts has no effect")])
def test_a_subset_that_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SubsetConfig(**fields)


# --- ids


def test_an_id_list_read_back_has_the_hash_it_was_written_with(tmp_path: Path) -> None:
    index = build_index(DataConfig(source="digits"))
    ids = [index.seed_ids[row] for row in few_shot(index, 2, 0)]

    (tmp_path / "ids.txt").write_bytes(ids_file(ids))
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    for name in ("ids.txt", "ids.json"):
        read = build_index(DataConfig(source="digits", ids=str(tmp_path / name))).seed_ids
        assert ids_hash(reversed(ids)) == ids_hash(read)
    assert ids_hash(ids[1:]) != ids_hash(ids)
    assert ids_hash(["a", "b"]) != ids_hash(["ab"])
    with pytest.raises(UsageError, match="holds a line break"):
        ids_file(["a\nb"])


# --- parts that must not meet


def test_the_parts_of_the_digits_share_no_image() -> None:
    parts = {name: DataConfig(source="digits", split=name) for name in ("seeds", "test", "pool")}
    made = {name: (build_index(data), data) for name, data in parts.items()}

    assert {name: len(index) for name, (index, _) in made.items()} == {"seeds": 297, "test": 500, "pool": 1000}
    assert build_index(DataConfig(source="digits")).table.equals(made["seeds"][0].table)
    for content in (False, True):
        for a, b in (("seeds", "test"), ("seeds", "pool"), ("test", "pool")):
            assert overlap(made[a], made[b], content=content) == []
        assert overlap(made["test"], made["test"], content=content) == made["test"][0].seed_ids
    assert check(DataConfig(source="digits", split="train")) == [
        "data.split: the digits have no part 'train'; choose one of seeds, test, pool"]


def test_backgrounds_go_with_the_class_in_training_and_are_all_tested() -> None:
    def read(**fields: str) -> tuple[SeedIndex, np.ndarray]:
        data = DataConfig(source="digits", **fields)
        index = build_index(data)
        return index, np.stack([decode(seed.image)[0] for seed in SeedReader(index, data).read(range(len(index)))])

    (plain, images), (index, made), (tested, both) = (read(), read(digits_background="correlated"), read(
        split="test", digits_background="all"))
    kinds = [one.rpartition("/")[2] for one in index.seed_ids]
    assert [one.rpartition("/")[0] for one in index.seed_ids] == plain.seed_ids
    assert [kind.split("-")[0] for kind in kinds] == ["low" if label < 5 else "high" for label in plain.labels]
    expected = np.array([kind in ("low-dark", "high-grey") for kind in kinds])
    assert 0.91 < expected.mean() < 0.99
    for image, other, kind in zip(images, made, kinds, strict=True):
        behind = 0.5 if kind.endswith("grey") else 0.0
        np.testing.assert_allclose(other, 255 * behind + (1 - behind) * image, atol=0.51)
    assert len(tested) == 1000 == len(set(tested.seed_ids))
    assert [one.rpartition("-")[2] for one in tested.seed_ids] == ["dark", "grey"] * 500
    assert np.array_equal(both[::2], read(split="test")[1])
    assert both[1::2].min() == 128
    again = build_index(DataConfig(source="digits", digits_background="correlated", per_class=3))
    assert set(again.seed_ids) < set(index.seed_ids)


def test_an_image_under_another_name_is_found_by_its_bytes(tmp_path: Path) -> None:
    made = {}
    for part, numbers in (("train", range(6)), ("test", (9, 4, 8))):
        rows = [{"image": {"bytes": png(picture(16, i, str(i))), "path": ""}, "label": i % 2} for i in numbers]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{part}-0.parquet")
        data = DataConfig(source="parquet", path=str(tmp_path), split=part)
        made[part] = (build_index(data), data)

    assert overlap(made["train"], made["test"]) == []
    assert overlap(made["train"], made["test"], content=True) == ["test-0/1"]


def test_configuration_survives_json() -> None:
    config = SubsetConfig(kind="long_tail", imbalance_factor=50, seed=1)
    assert SubsetConfig(**json.loads(config.model_dump_json())) == config
