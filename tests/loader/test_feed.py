from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.classifier.mixing import draw_paste
from rayexpand.classifier.recipe import Recipe
from rayexpand.classifier.transforms import train_transform
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable, Draw, SeedIndex
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import DataConfig, SeedReader, build_index
from rayexpand.data.subsets import few_shot, fill_counts, ids_file, ids_hash
from rayexpand.loader import images as reading
from rayexpand.loader import loader as ingest
from rayexpand.loader.images import ImageReader
from rayexpand.loader.loader import Loader
from rayexpand.loader.training_set import RowSource, SetPart, TrainingSet
from rayexpand.methods import trust
from rayexpand.runs import run as runs
from rayexpand.storage.tables import parquet_bytes
from rayexpand.studies.samples import training_set
from tests.conftest import complete
from tests.live import Live
from tests.methods.fakes import Fake
from tests.runfolder import picture, png

SIDE, PER_CLASS, COPIES = 16, 6, 4
NAMES = ("ant", "bee", "cat")


trust("tests.loader.test_feed.Soft")


class Soft(Fake):
    """Every sample goes to the next class at a strength of its copy; the label says how sure that is."""

    name: str = "tests.loader.test_feed.Soft"

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        drawn = super().draw(seed_id, label, copy, row, classes, rng)
        return replace(drawn, target_label=(label + 1) % len(classes), strength=(0.5, 0.7, 0.9, 1.0)[copy])

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        y_BK = np.zeros((len(source), n_classes), np.float32)
        sure = strength ** recipe.get("gamma", 1.0)
        np.add.at(y_BK, (np.arange(len(source)), source), 1 - sure)
        np.add.at(y_BK, (np.arange(len(source)), target), sure)
        return y_BK


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """seeds/train-0.parquet of 18 images in row groups of 5, and the list ids.txt of 12 of them."""
    root = tmp_path_factory.mktemp("ingest")
    rows = [{"image": {"bytes": png(picture(SIDE, i, str(i))), "path": ""}, "label": i % 3}
            for i in range(PER_CLASS * 3)]
    features = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(
        {b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    (root / "seeds").mkdir()
    pq.write_table(table, root / "seeds" / "train-0.parquet", row_group_size=5)
    index = build_index(DataConfig(source="parquet", path=str(root / "seeds")))
    (root / "ids.txt").write_bytes(ids_file([index.seed_ids[row] for row in few_shot(index, 4, 0)]))
    return root


@pytest.fixture(scope="module")
def data(folder: Path) -> DataConfig:
    return DataConfig(source="parquet", path=str(folder / "seeds"), ids=str(folder / "ids.txt"))


@pytest.fixture(scope="module")
def real(data: DataConfig) -> RowSource:
    return RowSource(seeds=(build_index(data), data))


@pytest.fixture(scope="module")
def run(folder: Path, data: DataConfig) -> runs.Run:
    """4 samples of each of the 12 seeds, in 4 data files."""
    made, totals = complete(runs.parse({
        "name": "soft", "out": str(folder), "data": data.model_dump(), "sampler": {"batch": 4, "shard_images": 12},
        "method": {"name": "tests.loader.test_feed.Soft", "ratio": COPIES}}))
    assert (totals.kept, totals.shards) == (48, 4)
    return made


def samples(run: runs.Run, **fields: Any) -> RowSource:
    return RowSource(run=str(run.folder), **fields)


def recipe(**fields: Any) -> Recipe:
    return Recipe(**{"size": SIDE, "batch": 8, "updates": None, **fields})


def listed(chunks: Sequence[int], real: int = 0, n_classes: int = 3, labels: np.ndarray | None = None,
           **fields: Any) -> TrainingSet:
    """A list of numbers only: chunks of the given sizes, the first `real` rows real."""
    n = sum(chunks)
    labels = np.arange(n) % n_classes if labels is None else labels
    columns = {"chunk": np.repeat(np.arange(len(chunks)), chunks), "row": np.arange(n), "label": labels,
               "source": labels, "strength": np.ones(n)}
    table = pa.table({name: pa.array(values, pa.float32() if name == "strength" else pa.int32())
                      for name, values in columns.items()})
    parts = []
    if real:
        parts.append(SetPart(0, real, 0, fields.pop("weight", 1.0), "", "", data={"source": "digits"}))
    if n > real:
        parts.append(SetPart(real, n, 0, 1.0, "", "", run="nowhere", method={"name": "tests.loader.test_feed.Soft"}))
    return TrainingSet(table, (pa.table({}),) if real else (), tuple(parts), ClassTable.of(NAMES[:n_classes]), **fields)


def seen(feed: Loader, epoch: int, world: int) -> list[np.ndarray]:
    return [feed.slots(epoch, rank, world).items for rank in range(world)]


# --- what an epoch is made of


def test_replacement_has_its_rate_and_does_not_look_at_the_index_or_the_number_of_samples() -> None:
    n = 10_000
    real = listed([n], real=n)
    few, many = (listed([n, size], real=n, mode="replace", p=0.1) for size in (5 * n, 50 * n))

    drawn, more = few.epoch(3, 0), many.epoch(3, 0)

    assert len(drawn) == few.epoch_rows == n
    assert abs((drawn >= n).mean() - 0.1) < 0.009
    np.testing.assert_array_equal(drawn >= n, more >= n)
    np.testing.assert_array_equal(drawn[drawn < n], np.flatnonzero(drawn < n))
    np.testing.assert_array_equal(replace(few, p=0.0).epoch(3, 0), real.epoch(3, 0))
    assert (replace(few, p=1.0).epoch(3, 0) >= n).all()
    assert not np.array_equal(drawn, few.epoch(3, 1))
    assert not np.array_equal(drawn, few.epoch(4, 0))
    np.testing.assert_array_equal(drawn, few.epoch(3, 0))


def test_the_class_of_a_replacement_does_not_depend_on_the_image_it_replaces() -> None:
    n = 12_000
    synthetic = np.repeat([0, 1, 2], [700, 200, 100])
    rows = listed([n, 1000], real=n, labels=np.r_[np.arange(n) % 3, synthetic], mode="replace", p=0.5)
    labels = rows.column("label")
    table = np.zeros((3, 3))
    for epoch in range(5):
        drawn = rows.epoch(0, epoch)
        at = np.flatnonzero(drawn >= n)
        np.add.at(table, (labels[at], labels[drawn[at]]), 1)

    np.testing.assert_allclose(table / table.sum(1, keepdims=True), [[0.7, 0.2, 0.1]] * 3, atol=0.015)
    first, second = rows.epoch(0, 0), rows.epoch(0, 1)
    both = (first >= n) & (second >= n)
    assert abs(both.mean() - 0.25) < 0.015
    assert (first[both] == second[both]).mean() < 0.01  # one in a thousand by chance
    assert abs(np.corrcoef(np.flatnonzero(first >= n) % 1000, first[first >= n])[0, 1]) < 0.05


def test_inverse_frequency_draws_rare_classes_and_leaves_out_what_was_never_made() -> None:
    n, repeat = 40, 1000
    real, synthetic = np.repeat([0, 1, 2], [29, 10, 1]), np.repeat([0, 1, 2], [50, 30, 20])
    rows = listed([n, 100], real=n, labels=np.r_[real, synthetic], mode="replace", p=1.0, draw="inverse_freq")
    counts = sum(np.bincount(rows.column("label")[rows.epoch(0, epoch)], minlength=3) for epoch in range(repeat))
    np.testing.assert_allclose(counts / (n * repeat), [0.0534, 0.1456, 0.8010], atol=0.007)

    rows = listed([n, 80], real=n, labels=np.r_[real, synthetic[:80]], mode="replace", p=1.0, draw="inverse_freq")
    counts = sum(np.bincount(rows.column("label")[rows.epoch(0, epoch)], minlength=3) for epoch in range(repeat))
    np.testing.assert_allclose(counts / (n * repeat), [0.2684, 0.7316, 0], atol=0.012)


@pytest.mark.parametrize("weight", [1.0, 3.0, 2.5, 0.25, 0.1 + 0.2 + 0.7])
def test_a_weight_repeats_rows_and_its_fraction_some_of_them(weight: float) -> None:
    rows = listed([40], real=40, weight=weight)
    first, second = (np.bincount(rows.epoch(0, epoch), minlength=40) for epoch in (0, 1))

    assert first.sum() == second.sum() == rows.epoch_rows == round(40 * weight)
    assert set(first) <= {int(weight), int(weight) + 1}
    assert np.array_equal(first, second) == (weight in (1.0, 3.0))


def test_repeats_of_an_image_are_numbered() -> None:
    slots = Loader(listed([40], real=40, weight=3.0), recipe(), 0).slots(0)

    found = sorted(zip(slots.items.ravel().tolist(), slots.occurrence.ravel().tolist(), strict=True))
    assert found == [(item, repeat) for item in range(40) for repeat in range(3)]


# --- order


@pytest.mark.parametrize(("chunks", "shuffle_rows"), [([200], 1000), ([25] * 32, 100), ([7, 60, 1, 90, 33] * 5, 100),
                                                      ([1] * 803, 64)])
def test_workers_share_one_order(chunks: list[int], shuffle_rows: int) -> None:
    rows = listed(chunks)
    feed = Loader(rows, recipe(batch=32), 5, shuffle_rows=shuffle_rows)
    whole = feed.order(1)

    assert feed.is_windowed == (len(rows) > shuffle_rows)
    assert whole.shape == (len(rows) // 32, 32)
    assert len(np.unique(whole)) == whole.size
    assert not np.array_equal(whole, feed.order(0))
    for world in (1, 2, 4, 8):
        half = 32 // (2 * world)
        for rank, part in enumerate(seen(feed, 1, world)):
            pairs = whole[:, ::-1][:, rank * half:(rank + 1) * half]
            np.testing.assert_array_equal(part[:, :half], whole[:, rank * half:(rank + 1) * half])
            np.testing.assert_array_equal(part[:, ::-1][:, :half], pairs)


def test_every_row_comes_once_per_epoch_and_another_rest_is_left_out() -> None:
    for shuffle_rows in (10_000, 64):
        feed = Loader(listed([10] * 33), recipe(batch=32), 0, shuffle_rows=shuffle_rows)
        left = [set(range(330)) - set(feed.order(epoch).ravel().tolist()) for epoch in range(2)]
        assert [len(one) for one in left] == [10, 10]
        assert left[0] != left[1]
        assert (feed.epoch_steps, feed.total_steps) == (10, 10)


def test_a_windowed_shuffle_reads_each_chunk_by_one_worker_and_in_one_stretch() -> None:
    chunk, window = 20, 100
    rows = listed([chunk] * 64)
    feed = Loader(rows, recipe(batch=32), 0, shuffle_rows=8 * window)
    for epoch in range(2):
        readers: dict[int, set[int]] = {}
        for rank, part in enumerate(seen(feed, epoch, 8)):
            steps: dict[int, list[int]] = {}
            for step, items in enumerate(part):
                for item in items.tolist():
                    steps.setdefault(item // chunk, []).append(step)
                    readers.setdefault(item // chunk, set()).add(rank)
            assert all(max(found) - min(found) <= 2 * window // part.shape[1] for found in steps.values())
        assert len(readers) == 64
        assert all(len(ranks) == 1 for ranks in readers.values())
    spread = [len(set((items // chunk).tolist())) for items in feed.order(0)]
    assert np.mean(spread) > 20  # a batch of 32 sees as many chunks as the windows hold


def test_chunks_that_straddle_lanes_are_read_by_two_workers_at_most_once_per_cut() -> None:
    feed = Loader(listed([170, 30, 210, 90, 200, 180, 20, 124]), recipe(batch=16), 0, shuffle_rows=100)
    chunks = feed.rows.column("chunk")
    used = [set(chunks[part.ravel()].tolist()) for part in seen(feed, 0, 4)]
    assert sum(map(len, used)) <= 8 + 3


def test_windows_are_permuted() -> None:
    order = Loader(listed([100] * 16), recipe(batch=16), 0, shuffle_rows=800).order(0)
    stream = order[:, [0, 15]].ravel()
    assert np.abs(np.diff(stream)).mean() > 20
    assert len(set((stream[:100] // 100).tolist())) == 1


@pytest.mark.parametrize(("batch", "streams"), [(32, 8), (24, 6), (20, 5), (2, 1), (7, 1)])
def test_lanes_divide_the_batch(batch: int, streams: int) -> None:
    feed = Loader(listed([10] * 50), recipe(batch=batch), 0, shuffle_rows=100)
    assert feed.streams == streams
    assert len(np.unique(feed.order(0))) == feed.epoch_steps * batch


@pytest.mark.parametrize(("world", "shuffle_rows", "message"), [
    (3, 1000, r"recipe.batch: 32 images cannot be cut into 3 equal slices .* multiple of 6"),
    (16, 100, r"training.streams: 8 streams cannot be dealt to 16 workers equally; set it to a multiple of 16")])
def test_a_batch_that_cannot_be_dealt_is_refused(world: int, shuffle_rows: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Loader(listed([10] * 50), recipe(batch=32), 0, shuffle_rows=shuffle_rows).slots(0, 0, world)


def test_a_small_list_lowers_the_batch_and_updates_set_the_length() -> None:
    feed = Loader(listed([20]), recipe(batch=32, updates=7), 0)
    assert (feed.batch, feed.epoch_steps, feed.total_steps) == (20, 1, 7)
    assert Loader(listed([70]), recipe(epochs=3), 0).total_steps == 3 * 8


# --- lists


def test_a_list_numbers_seeds_first_and_counts_classes(real: RowSource, run: runs.Run) -> None:
    rows = training_set([samples(run), real])

    assert (len(rows), rows.n_real, rows.epoch_rows, rows.n_classes) == (60, 12, 60, 3)
    assert rows.counts().tolist() == [20, 20, 20]
    assert [part.is_real for part in rows.parts] == [True, False]
    np.testing.assert_array_equal(rows.column("label")[:12], real.seeds[0].labels)  # type: ignore[index]
    assert (np.diff(rows.column("chunk")) >= 0).all()
    assert rows.column("chunk")[11] + 1 == rows.column("chunk")[12]


def test_copies_and_selections_filter_samples(real: RowSource, run: runs.Run) -> None:
    ids = [f"{seed_id}/{copy}" for seed_id in run.plan.index.seed_ids for copy in range(COPIES)]
    table = pa.table({"sample_id": ids, "keep": [one.endswith(("1", "3")) for one in ids]})
    run.files.make_folder("selections")
    run.files.replace("selections/odd.parquet", parquet_bytes(table, {}))
    whole, two, odd, both = (training_set([real, samples(run, **fields)]) for fields in (
        {}, {"copies": 2}, {"selection": "odd"}, {"copies": 2, "selection": "odd"}))

    assert [len(one) - 12 for one in (whole, two, odd, both)] == [48, 24, 24, 12]
    assert sorted(set(two.column("strength")[12:].round(2).tolist())) == pytest.approx([0.5, 0.7])
    assert set(both.column("strength")[12:].round(2).tolist()) == {np.float32(0.7)}
    assert len({one.digest for one in (whole, two, odd, both)}) == 4
    assert training_set([real, samples(run, copies=COPIES)]).digest == whole.digest
    images = ImageReader(both).encoded(np.arange(12, 24))
    expected = [row["image"]["bytes"] for receipt in run.store.receipts()
                for row in run.store.data(receipt).to_pylist() if row["copy"] == 1]
    assert images == expected
    with pytest.raises(UsageError, match="has no selection 'even'"):
        training_set([samples(run, selection="even")])


def test_the_digest_tells_what_decides_the_training(real: RowSource, run: runs.Run) -> None:
    base = [real, samples(run)]
    made = [training_set(base), training_set([replace(real, weight=2.0), samples(run)]),
            training_set(base, soft_label={"gamma": 0.5}), training_set([real]),
            training_set(base, mode="replace", p=0.1), training_set(base, mode="replace", p=0.2)]

    assert len({one.digest for one in made}) == len(made)
    assert training_set(base[::-1]).digest == made[0].digest


def test_seeds_run_and_list_are_proved_to_share_their_ids(folder: Path, real: RowSource, run: runs.Run) -> None:
    rows = training_set([real, samples(run)])
    written = ids_hash((folder / "ids.txt").read_text().split())

    assert {part.ids_sha256 for part in rows.parts} == {written}
    whole = DataConfig(source="parquet", path=str(folder / "seeds"))
    assert TrainingSet.of_seeds(build_index(whole), whole).parts[0].ids_sha256 != written


@pytest.mark.parametrize("name", ["list.arrow", "copy of a list"])
def test_a_saved_list_is_mapped_and_the_same(name: str, tmp_path: Path, real: RowSource, run: runs.Run) -> None:
    rows = training_set([real, samples(run)], mode="replace", p=0.5, soft_label={"gamma": 0.5})
    (tmp_path / name).write_bytes(rows.to_bytes())
    found = TrainingSet.load(tmp_path / name)

    assert (found.digest, found.parts, found.classes) == (rows.digest, rows.parts, rows.classes)
    assert found.table.equals(rows.table)
    for one, other in zip(Loader(rows, recipe(), 0).batches(0, 3), Loader(found, recipe(), 0).batches(0, 3),
                          strict=True):
        np.testing.assert_array_equal(one.x_BHWC, other.x_BHWC)
        np.testing.assert_array_equal(one.y_BK, other.y_BK)


@pytest.mark.parametrize("content", [b"", b"not arrow", None])
def test_a_file_that_is_no_list_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "list.arrow"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"list.arrow: is no training set"):
        TrainingSet.load(path)


def test_lists_that_do_not_fit_together_are_refused_with_all_that_is_wrong(real: RowSource, run: runs.Run) -> None:
    digits = DataConfig(source="digits")
    other = RowSource(seeds=(build_index(digits), digits))
    for parts, fields, messages in (
        ([other, samples(run)], {}, [r"run .*soft: its 3 classes \('ant', 'bee', 'cat'\) are not the 10 of the seeds"]),
        ([], {}, ["no rows at all"]),
        ([RowSource()], {}, ["give either seeds or a run"]),
        ([replace(real, weight=0), samples(run, weight=-1)], {}, ["seeds: weight is 0", "soft: weight is -1"]),
        ([replace(real, copies=2)], {}, ["copies, selection and limit are about runs"]),
        ([samples(run)], {"mode": "replace", "p": 0.1}, ["mode replace needs seeds"]),
        ([real], {"mode": "replace", "p": 0.1}, ["p > 0 needs a run"]),
        ([real, samples(run)], {"mode": "replace", "p": 1.5}, ["p is 1.5; a probability"]),
        ([real, samples(run, weight=2)], {"mode": "replace", "p": 0.1}, ["weights have no effect"]),
        ([real, samples(run)], {"p": 0.1}, ["p = 0.1 has no effect in mode union"]),
    ):
        with pytest.raises(ConfigError) as refused:
            training_set(parts, **fields)  # type: ignore[arg-type]
        for message, problem in zip(messages, refused.value.problems, strict=True):
            assert re.search(message, problem), problem
    with pytest.raises(UsageError, match=r"run .*soft gives no row"):
        training_set([samples(run, copies=0)])


def test_a_run_that_is_not_complete_is_refused(folder: Path, data: DataConfig, real: RowSource) -> None:
    run = runs.prepare(runs.parse({
        "name": "half", "out": str(folder), "data": data.model_dump(), "sampler": {"batch": 4, "shard_images": 12},
        "method": {"name": "tests.loader.test_feed.Soft", "ratio": COPIES}}))
    expander = runs.start(run)
    expander(0)
    expander.close()

    with pytest.raises(ConfigError, match=r"half: 36 of 48 samples are pending; finish it first with `rayexpand exp"):
        training_set([real, samples(run)])


# --- batches


def test_replacement_with_probability_0_trains_on_the_very_bytes_of_the_real_rows(real: RowSource,
                                                                                  run: runs.Run) -> None:
    alone, beside = Loader(training_set([real]), recipe(hflip=0.5), 2), Loader(
        training_set([real, samples(run)], mode="replace", p=0.0), recipe(hflip=0.5), 2)

    for one, other in zip(alone.batches(0, 4), beside.batches(0, 4), strict=True):
        assert (one.x_BHWC.tobytes(), one.y_BK.tobytes(), one.step) == (
            other.x_BHWC.tobytes(), other.y_BK.tobytes(), other.step)


@pytest.mark.parametrize("fields", [{}, {"cmo": 1.0, "cmo_span": (0.0, 1.0), "epochs": 2, "crop_pad": 4}],
                         ids=["plain", "cmo"])
@pytest.mark.parametrize("shuffle_rows", [1000, 16])
def test_batches_are_the_same_for_any_workers_and_any_start(shuffle_rows: int, fields: dict[str, Any], real: RowSource,
                                                            run: runs.Run) -> None:
    rows = training_set([replace(real, weight=2.0), samples(run)])
    whole = list(Loader(rows, recipe(**fields), 1, shuffle_rows=shuffle_rows, streams=4).batches(0, 12))

    for world in (2, 4):
        half = 8 // (2 * world)
        for rank in range(world):
            feed = Loader(rows, recipe(**fields), 1, shuffle_rows=shuffle_rows, streams=4,
                          cache_bytes=1 if shuffle_rows == 1000 else 1 << 20)
            for step, part in enumerate(feed.batches(5, 12, rank, world), 5):
                for name in ("x_BHWC", "y_BK"):
                    one, all_of = getattr(part, name), getattr(whole[step], name)
                    np.testing.assert_array_equal(one[:half], all_of[rank * half:(rank + 1) * half])
                    np.testing.assert_array_equal(one[half:], all_of[8 - (rank + 1) * half:8 - rank * half])
                assert part.step == step


def test_an_augmentation_belongs_to_the_image_the_epoch_and_the_repeat(real: RowSource, run: runs.Run) -> None:
    chosen = recipe(crop="pad", crop_pad=8, augment="randaugment")
    alone = Loader(training_set([replace(real, weight=2.0)]), chosen, 0)
    beside = Loader(training_set([replace(real, weight=2.0), samples(run)]), chosen, 0)
    made: list[dict[tuple[int, int, int], bytes]] = []
    for feed in (alone, beside):
        found = {}
        for batch in feed.batches(0, 2 * feed.epoch_steps):
            epoch, within = divmod(batch.step, feed.epoch_steps)
            slots = feed.slots(epoch)
            for i, (item, repeat) in enumerate(zip(slots.items[within], slots.occurrence[within], strict=True)):
                found[int(item), int(repeat), epoch] = batch.x_BHWC[i].tobytes()
        made.append(found)

    common = made[0].keys() & made[1].keys()
    assert len(common) > 30
    assert all(made[0][key] == made[1][key] for key in common)
    for item in range(12):
        versions = [made[0][key] for repeat in (0, 1) for epoch in (0, 1) if (key := (item, repeat, epoch)) in made[0]]
        assert len(set(versions)) == len(versions)
    image = decode(ImageReader(alone.rows).encoded(np.array([3]))[0])[0]
    stream = np.random.Generator(np.random.Philox(
        key=np.frombuffer(ingest.row_key(0, "feed", "", 1, 0, "augment"), "<u8"), counter=[0, 3, 1, 0]))
    assert train_transform(image, stream, chosen).tobytes() == made[0][3, 1, 1]


def test_samples_get_the_soft_label_of_their_method_and_seeds_a_hard_one(real: RowSource, run: runs.Run) -> None:
    rows = training_set([real, samples(run)], soft_label={"gamma": 0.5})
    y_BK = Loader(rows, recipe(), 0).targets(np.arange(60))

    np.testing.assert_array_equal(y_BK[:12], np.eye(3, dtype=np.float32)[rows.column("label")[:12]])
    at = 12 + int(np.flatnonzero(np.isclose(rows.column("strength")[12:], 0.7))[0])
    source, target = int(rows.column("source")[at]), int(rows.column("label")[at])
    assert target == (source + 1) % 3
    assert (y_BK[at, source], y_BK[at, target]) == pytest.approx((0.16334, 0.83666), abs=1e-5)
    np.testing.assert_allclose(y_BK.sum(1), 1, atol=1e-6)


CMO = {"cmo": 0.5, "cmo_span": (2, 12), "hflip": 0.5, "crop": "none", "epochs": 14}
LONG_TAIL = np.repeat([0, 1, 2], [29, 10, 1])


def test_a_box_of_a_tail_weighted_batch_lies_on_the_ordinary_one(real: RowSource, run: runs.Run) -> None:
    """Outside the box every pixel is that of training without CMO; inside, that of a real image of the second batch;
    the label has the share of pixels. Steps outside the span, and half of those inside, stay as they are."""
    rows = training_set([replace(real, weight=2.0), samples(run)])
    plain, feed = Loader(rows, recipe(**{**CMO, "cmo": 0}), 1), Loader(rows, recipe(**CMO), 1)
    images, pasted = ImageReader(rows), []
    for one, other in zip(plain.batches(0, feed.total_steps), feed.batches(0, feed.total_steps), strict=True):
        mix = draw_paste(feed.recipe, 1, one.step, feed.total_steps, SIDE)
        if mix is None or mix.box is None:
            assert (one.x_BHWC.tobytes(), one.y_BK.tobytes()) == (other.x_BHWC.tobytes(), other.y_BK.tobytes())
            continue
        pasted.append(one.step)
        inside = np.zeros((SIDE, SIDE), bool)
        inside[mix.box[0]:mix.box[1], mix.box[2]:mix.box[3]] = True
        items = feed.tail_items(one.step)
        assert items.max() < rows.n_real
        np.testing.assert_array_equal(one.x_BHWC[:, ~inside], other.x_BHWC[:, ~inside])
        for made, image in zip(other.x_BHWC, images.decoded(items), strict=True):
            either = (made[inside] == image[inside]).all(), (made[inside] == image[:, ::-1][inside]).all()
            assert any(either), one.step
        assert mix.lam == 1 - inside.mean()
        np.testing.assert_allclose(other.y_BK, mix.lam * one.y_BK + (1 - mix.lam) * np.eye(3)[rows.column("label")[
            items]], atol=1e-6)
    inside_span = (12 - 2) * feed.epoch_steps
    assert min(pasted) >= 2 * feed.epoch_steps
    assert max(pasted) < 12 * feed.epoch_steps
    assert len(pasted) / inside_span == pytest.approx(0.5, abs=3 * 0.5 / inside_span ** 0.5)


@pytest.mark.parametrize(("power", "shares"), [(1.0, [1 / 3, 1 / 3, 1 / 3]), (0.0, [0.725, 0.25, 0.025]),
                                               (2.0, [1 / 29, 1 / 10, 1.0] / np.sum([1 / 29, 1 / 10, 1.0]))])
def test_the_second_batch_weighs_classes_by_their_real_images(power: float, shares: list[float]) -> None:
    """Rows with weight 1 / n ** power: classes alike at 1, as they come at 0. Synthetic rows have no say."""
    rows = listed([40, 60], real=40, labels=np.r_[LONG_TAIL, np.full(60, 2)])
    feed = Loader(rows, recipe(cmo=0.5, cmo_power=power, batch=50), 0)
    drawn = np.concatenate([feed.tail_items(step) for step in range(400)])

    np.testing.assert_allclose(np.bincount(LONG_TAIL[drawn]) / len(drawn), shares, atol=0.012)
    of_head = np.bincount(drawn, minlength=40)[:29]
    assert of_head.std() < 1.6 * of_head.mean() ** 0.5  # its images alike, but for chance


def test_a_drawn_row_shows_what_replaced_it_in_that_epoch() -> None:
    rows = listed([40, 60], real=40, labels=np.r_[LONG_TAIL, np.full(60, 2)], mode="replace", p=0.5)
    feed, plain = (Loader(replace(rows, p=p), recipe(cmo=0.5, batch=20), 0) for p in (0.5, 0.0))
    for step in range(6):
        shown = rows.epoch(0, step // feed.epoch_steps)
        np.testing.assert_array_equal(feed.tail_items(step), shown[plain.tail_items(step)])
    assert (np.concatenate([feed.tail_items(step) for step in range(6)]) >= 40).mean() == pytest.approx(0.5, abs=0.15)


def test_a_list_without_real_rows_has_nothing_to_cut_boxes_from(run: runs.Run) -> None:
    with pytest.raises(UsageError, match="boxes are cut from real images, and this list has none"):
        Loader(training_set([samples(run)]), recipe(cmo=0.5), 0)


def test_only_so_many_samples_of_each_class_are_taken(real: RowSource, run: runs.Run) -> None:
    """Every class has 16 samples; of 29, 10 and 1 real images, 0, 19 and 28 fill the smaller ones up."""
    assert fill_counts(np.array([29, 10, 1])).tolist() == [0, 19, 28]

    def taken(*limit: int) -> tuple[set[tuple[int, int]], TrainingSet]:
        rows = training_set([real, samples(run, limit=np.array(limit))])
        chunk, row = (rows.column(name)[12:].tolist() for name in ("chunk", "row"))
        files = [run_part.chunks[one - run_part.chunk] for run_part in rows.parts[1:] for one in chunk]
        return {(str(file), one) for file, one in zip(files, row, strict=True)}, rows  # type: ignore[misc]

    fewer, some = taken(0, 5, 9)
    more, _ = taken(3, 8, 9)
    assert np.bincount(some.column("label")[12:], minlength=3).tolist() == [0, 5, 9]
    assert fewer < more
    assert taken(0, 5, 9)[1].digest == some.digest
    assert len({some.digest, taken(0, 5, 8)[1].digest, training_set([real, samples(run)]).digest}) == 3
    assert some.epoch_rows == 12 + 14
    images = ImageReader(some)
    assert len({images.encoded(np.array([item]))[0] for item in range(12, 26)}) == 14
    with pytest.raises(UsageError, match=r"fill: 1 classes have fewer samples .*\(cat has 16 of 17\); make more"):
        taken(16, 16, 17)


def test_each_chunk_is_read_once_while_it_fits(real: RowSource, run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    for kind in (reading._SeedSource, reading._RunSource):
        inner = kind.read
        monkeypatch.setattr(kind, "read", lambda self, chunks, rows, inner=inner: read.extend(chunks) or inner(
            self, chunks, rows))
    rows = training_set([real, samples(run)])
    n_chunks = int(rows.column("chunk")[-1]) + 1
    assert n_chunks == 8  # 4 row groups of seeds, 4 files of samples

    feed = Loader(rows, recipe(), 0)
    first = [batch.x_BHWC.tobytes() for batch in feed.batches(0, 2 * feed.epoch_steps)]
    assert sorted(read) == list(range(n_chunks))
    read.clear()
    small = Loader(rows, recipe(), 0, cache_bytes=1)
    assert [batch.x_BHWC.tobytes() for batch in small.batches(0, 2 * feed.epoch_steps)] == first
    assert len(read) > 2 * n_chunks

    read.clear()
    list(Loader(rows, recipe(), 0, shuffle_rows=16, streams=4).batches(0, feed.epoch_steps))
    assert n_chunks <= len(read) <= n_chunks + 3  # three cuts between streams


class Counting:
    """Storage of made-up images of `size` bytes, which counts what is read of it."""

    min_side, max_pixels = 1, 10**6

    def __init__(self, size: int) -> None:
        self.size, self.chunks, self.rows = size, list[int](), list[int]()

    def read(self, chunks: Sequence[int], rows: Sequence[np.ndarray]) -> list[list[bytes]]:
        self.chunks += chunks
        self.rows += np.concatenate(rows).tolist()
        return [[b"%0*d" % (self.size, row) for row in some] for some in rows]


def windowed(chunks: Sequence[int], size: int = 100, *, batch: int = 16, **fields: Any) -> tuple[Loader, Counting]:
    """A feed of numbers as images, its rows real."""
    n = sum(chunks)
    feed = Loader(listed(chunks, real=n), recipe(batch=batch), 3, **fields)
    storage = Counting(size)
    feed._images._sources = [storage]  # type: ignore[list-item]
    return feed, storage


def fed(feed: Loader, rank: int, world: int, steps: range | None = None) -> tuple[list[list[int]], int]:
    """Numbers of the images of each step, and the most bytes held."""
    found, held = [], 0
    for step in steps or range(feed.epoch_steps):
        found.append([int(image) for image in feed._windowed_images(*divmod(step, feed.epoch_steps), rank, world)])
        window = feed._window[1]  # type: ignore[index]
        assert window._bytes == sum(map(len, window._held.values()))
        held = max(held, window._bytes)
    return found, held


@pytest.mark.parametrize("chunks", [[20] * 64, [160] * 8, [1] * 1280])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_windowed_epoch_reads_each_chunk_once_with_a_cache_just_big_enough(chunks: list[int], world: int) -> None:
    read: list[int] = []
    for rank in range(world):
        roomy, _ = windowed(chunks, shuffle_rows=400, cache_bytes=10**9)
        _, peak = fed(roomy, rank, world)
        feed, storage = windowed(chunks, shuffle_rows=400, cache_bytes=peak)
        found, held = fed(feed, rank, world)

        assert found == feed.slots(0, rank, world).items.tolist()
        assert held == peak == feed._window[1].peak_rows * 100  # type: ignore[index]
        assert peak <= (400 + 8 * max(chunks)) * 100 // world
        assert len(storage.rows) == len(set(storage.rows)) == 1280 // world
        read += storage.chunks
    assert sorted(read) == list(range(len(chunks)))


def test_each_lane_reads_its_share_of_a_chunk_and_drops_it_after_the_last_use() -> None:
    chunks = [170, 30, 210, 90, 200, 180, 20, 124]
    feed, storage = windowed(chunks, shuffle_rows=100)
    found, _ = fed(feed, 0, 1, range(2 * feed.epoch_steps))

    assert found == [*feed.order(0).tolist(), *feed.order(1).tolist()]
    assert len(storage.rows) <= 2 * 1024
    assert len(storage.chunks) <= 2 * (len(chunks) + 7)  # a chunk in which a stream begins is read by both
    window = feed._window[1]  # type: ignore[index]
    assert set(window._due) == {feed.epoch_steps - 1}  # what the last step used is all that is left


def test_an_image_shown_twice_is_held_until_its_second_use() -> None:
    rows = listed([20] * 20, real=400, weight=2.0)
    feed = Loader(rows, recipe(batch=16), 0, shuffle_rows=200)
    storage = feed._images._sources[0] = Counting(10)  # type: ignore[assignment,call-overload]
    found, _ = fed(feed, 0, 1)

    assert found == feed.order(0).tolist()
    assert len(storage.rows) <= 400 + 7  # an image between two streams is read by both


def test_steps_left_out_by_a_resumed_or_shared_epoch_cost_no_memory_for_long() -> None:
    feed, storage = windowed([20] * 64, shuffle_rows=400)
    whole, peak = fed(feed, 0, 1)
    storage.chunks.clear()
    some, held = fed(feed, 0, 1, range(10, 80, 3))

    assert some == whole[10:80:3]
    assert held <= peak
    assert len(storage.chunks) == len(set(storage.chunks)) <= 64
    assert not [step for step in feed._window[1]._due if step < 79]  # type: ignore[index]
    assert fed(feed, 0, 1, range(3, 5))[0] == whole[3:5]  # a step back begins anew


@pytest.mark.parametrize("world", [1, 4])
def test_a_window_larger_than_the_cache_is_refused_with_the_value_that_fits(world: int) -> None:
    feed, storage = windowed([4] * 1000, 1000, shuffle_rows=2400, cache_bytes=800 * 1000 // world)
    with pytest.raises(UsageError, match=r"training.shuffle_rows: a worker's share of 2400 rows is up to \d+ images of "
                                         r"1,000 bytes at once, [\d,]+ bytes, and [\d,]+ may be held; ") as refused:
        fed(feed, 0, world)
    fitting = int(re.search(r"set training.shuffle_rows to (\d+) or less", str(refused.value))[1])  # type: ignore[index]

    assert 1000 < fitting < 2000
    assert len(storage.rows) <= 2400 // world + 1024  # no more than a window was read
    feed, _ = windowed([4] * 1000, 1000, shuffle_rows=fitting, cache_bytes=800 * 1000 // world)
    assert len(fed(feed, 0, world)[0]) == feed.epoch_steps


def test_a_window_that_will_not_fit_is_refused_at_the_first_step() -> None:
    _, peak = fed(windowed([4] * 1000, shuffle_rows=2400)[0], 0, 1)
    for short, fits in ((0, True), (1, False)):
        feed, _ = windowed([4] * 1000, shuffle_rows=2400, cache_bytes=peak - short)
        if fits:
            fed(feed, 0, 1, range(1))
        else:
            with pytest.raises(UsageError, match=f"{peak:,} bytes, and {peak - 1:,} may be held"):
                fed(feed, 0, 1, range(1))


def test_row_groups_too_large_for_any_window_are_refused_with_other_advice() -> None:
    feed, _ = windowed([500] * 8, 1000, shuffle_rows=800, cache_bytes=100_000)
    with pytest.raises(UsageError, match=r"no smaller value fits.*store fewer rows in each"):
        fed(feed, 0, 1)


def test_a_later_window_may_be_a_quarter_larger_than_the_cache_and_no_more() -> None:
    for factor, fits in ((1.2, True), (1.6, False)):
        feed, storage = windowed([20] * 64, shuffle_rows=400)
        _, peak = fed(feed, 0, 1)
        feed, storage = windowed([20] * 64, shuffle_rows=400, cache_bytes=peak)
        fed(feed, 0, 1, range(1))
        storage.size = int(100 * factor)
        if fits:
            fed(feed, 0, 1, range(1, feed.epoch_steps))
        else:
            with pytest.raises(UsageError, match=r"training.shuffle_rows"):
                fed(feed, 0, 1, range(1, feed.epoch_steps))


def test_images_of_a_batch_are_decoded_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": {"bytes": png(picture(64, i, str(i))), "path": ""}, "label": i % 2} for i in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    data = DataConfig(source="parquet", path=str(tmp_path))
    live, index = Live(), build_index(data)
    monkeypatch.setattr(ingest.pixels, "decode", live.decode)
    feed = Loader(TrainingSet.of_seeds(index, data), recipe(batch=12), 0)
    list(feed.batches(0, 1))
    list(ingest.TestSet(index, data, recipe(), 0, 1, 12).batches())

    assert 0 < live.peak <= 3 * 64 * 64 * 3, "an image, and those before it until their names are taken"


def test_an_image_that_cannot_be_trained_on_is_named(tmp_path: Path, folder: Path) -> None:
    rows = [{"image": {"bytes": one, "path": ""}, "label": i % 2} for i, one in enumerate(
        [png(picture(SIDE, 0, "a")), b"broken", png(picture(SIDE, 2, "c"))])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    data = DataConfig(source="parquet", path=str(tmp_path))
    feed = Loader(TrainingSet.of_seeds(build_index(data), data), recipe(), 0)

    with pytest.raises(UsageError, match=r"seed 'train-0/1' of .* cannot be trained on \(decode_error.*data.ids"):
        list(feed.batches(0, 1))
    with pytest.raises(UsageError, match=r"test image 'train-0/1' of .* cannot be used"):
        list(ingest.TestSet(build_index(data), data, recipe(), 0, 1, 2).batches())


def test_seeds_that_the_index_refuses_are_left_out(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": png(picture(SIDE, i, str(i))), "path": ""}, "label": label}
            for i, label in enumerate([0, 1, -1, 1])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    data = DataConfig(source="parquet", path=str(tmp_path))
    index = build_index(data)

    made = TrainingSet.of_seeds(index, data)

    assert made.column("row").tolist() == [0, 1, 3]
    batches = ingest.TestSet(index, data, recipe(), 0, 1, 9).batches()
    assert [item for batch in batches for item in batch.items] == [0, 1, 3]


def test_a_data_file_that_is_gone_is_named(tmp_path: Path, data: DataConfig) -> None:
    run, _ = complete(runs.parse({
        "name": "lost", "out": str(tmp_path), "data": data.model_dump(), "sampler": {"batch": 4, "shard_images": 12},
        "method": {"name": "tests.loader.test_feed.Soft", "ratio": 1}}))
    feed = Loader(training_set([samples(run)]), recipe(), 0)
    (tmp_path / "lost" / "data" / "train-000000.parquet").unlink()

    with pytest.raises(UsageError, match=r"train-000000.parquet is gone, but the training set was made with it"):
        list(feed.batches(0, 1))


@pytest.mark.parametrize("world", [1, 3, 8])
def test_over_all_workers_each_test_image_comes_once(world: int) -> None:
    data = DataConfig(source="digits", split="test")
    index = build_index(data)
    chosen = recipe(test_size=20)
    parts = [list(ingest.TestSet(index, data, chosen, rank, world, 64).batches()) for rank in range(world)]

    items = np.concatenate([batch.items for part in parts for batch in part])
    np.testing.assert_array_equal(np.sort(items), np.arange(500))
    labels = np.concatenate([batch.labels for part in parts for batch in part])
    np.testing.assert_array_equal(labels, index.labels[items])
    assert all(batch.x_BHWC.shape == (len(batch.items), 20, 20, 3) for part in parts for batch in part)
    assert all(len(batch.items) <= 64 for part in parts for batch in part)


@pytest.mark.parametrize(("cache_bytes", "again"), [(1 << 30, []), (2 * 5 * SIDE * SIDE * 3, [10, 11]), (0, range(12))])
def test_test_images_that_fit_are_decoded_once(cache_bytes: int, again: Sequence[int], data: DataConfig,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    index, read = build_index(data), list[int]()
    tests = ingest.TestSet(index, data, recipe(), 0, 1, 5, cache_bytes=cache_bytes)
    first = [(x.tobytes(), *rest) for x, *rest in tests.batches()]
    inner = SeedReader.read
    monkeypatch.setattr(SeedReader, "read", lambda self, rows: read.extend(rows) or inner(self, rows))
    second = [(x.tobytes(), *rest) for x, *rest in tests.batches()]

    assert read == list(again)
    for one, other in zip(first, second, strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1:], other[1:])


def test_a_worker_without_test_images_yields_nothing(data: DataConfig) -> None:
    shares = [ingest.TestSet(build_index(data), data, recipe(), rank, 16, 5) for rank in range(16)]
    assert sorted(map(len, shares)) == [0] * 4 + [1] * 12
    assert all(len(list(one.batches())) == len(one) for one in shares)


def test_test_images_are_those_of_their_rows(data: DataConfig) -> None:
    index: SeedIndex = build_index(data)
    expected = [decode(seed.image)[0] for seed in SeedReader(index, data).read(range(12))]  # type: ignore[union-attr]
    found = [batch.x_BHWC for batch in ingest.TestSet(index, data, recipe(), 0, 1, 5).batches()]
    np.testing.assert_array_equal(np.concatenate(found), expected)
    assert [len(one) for one in found] == [5, 5, 2]


def test_a_list_of_many_rows_is_cheap(tmp_path: Path) -> None:
    """1.3 million rows in 2,600 chunks, saved, mapped and ordered, none of them a Python object."""
    rows = listed([500] * 2600)
    (tmp_path / "list.arrow").write_bytes(rows.to_bytes())
    feed = Loader(TrainingSet.load(tmp_path / "list.arrow"), recipe(batch=256), 0)

    assert (tmp_path / "list.arrow").stat().st_size < 21 * len(rows)
    assert feed.slots(0, 7, 8).items.shape == (len(rows) // 256, 32)
    assert len(np.unique(feed.order(0))) == len(rows) // 256 * 256


GOLDEN: dict[str, tuple[dict[str, Any], str]] = {  # of version 6a2c908, before rows were mixed with real images
    "plain": ({}, "bfd240720bbae4ac"),
    "crops": ({"crop": "resized", "rotation": 10, "hflip": 0.5, "colour_jitter": 0.3, "erasing": 0.5},
              "f2e724485bd2ac1a"),
    "policy": ({"crop": "pad", "crop_pad": 4, "augment": "randaugment"}, "f7e891a63c0d3d08"),
    "cmo": ({"cmo": 1.0, "cmo_span": (0.0, 1.0), "epochs": 2}, "fdf781cc7a6a7d70")}


@pytest.mark.parametrize("name", GOLDEN)
def test_training_without_mixing_has_the_bytes_it_always_had(name: str, real: RowSource, run: runs.Run) -> None:
    """Images and labels of 14 steps, and the digest that results of finished trials are found by."""
    fields, wanted = GOLDEN[name]
    rows, found = training_set([replace(real, weight=2.0), samples(run)]), hashlib.sha256()
    for batch in Loader(rows, recipe(**fields), 3).batches(0, 14):
        found.update(batch.x_BHWC.tobytes() + batch.y_BK.tobytes())
    assert (found.hexdigest()[:16], rows.digest[:16]) == (wanted, "e059669e5d3ded32")
