"""Rows mixed with real images in training: which with which, what they are labelled as, and that nothing else moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayexpand.classifier.seed_mixing import SeedMix
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.rng import row_key
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.data.subsets import ids_file
from rayexpand.loader.images import ImageReader
from rayexpand.loader.loader import Loader
from rayexpand.loader.row_mixing import RowMixer
from rayexpand.loader.training_set import RowSource, TrainingSet
from rayexpand.methods.diffcoremix import DiffCoReMix
from rayexpand.runs import run as runs
from rayexpand.runs.plan import Plan
from rayexpand.studies.samples import training_set
from tests.conftest import complete
from tests.loader.test_feed import SIDE, data, folder, listed, real, recipe, run, samples  # noqa: F401  (fixtures)

PLAIN = {"crop": "none"}


@pytest.fixture(scope="module")
def copies(folder: Path, data: DataConfig) -> runs.Run:  # noqa: F811
    """2 or 3 samples of each of the 12 seeds, of the classes of these; 2.5 is 2 of 4 of each class."""
    made, totals = complete(runs.parse({
        "name": "copies", "out": str(folder), "data": data.model_dump(), "sampler": {"batch": 4, "shard_images": 12},
        "method": {"name": "tests.methods.fakes.Fake", "ratio": 2.5}}))
    assert totals.kept == 30
    return made


def own_seeds(rows: TrainingSet) -> np.ndarray:
    return rows.column("seed")


def shown(feed: Loader, steps: range) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray]]:
    """(epoch, item, occurrence, image, label) of every slot of some steps."""
    for batch in feed.batches(steps.start, steps.stop):
        epoch, within = divmod(batch.step, feed.epoch_steps)
        slots = feed.slots(epoch)
        for i, (item, repeat) in enumerate(zip(slots.items[within], slots.occurrence[within], strict=True)):
            yield epoch, int(item), int(repeat), batch.x_BHWC[i], batch.y_BK[i]


def stream(seed: int, epoch: int, item: int, repeat: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.frombuffer(row_key(seed, "feed", "", epoch, 0, "mix"), "<u8"),
                                                counter=[0, item, repeat, 0]))


def test_a_sample_is_mixed_with_its_own_seed_and_real_rows_stay(real: RowSource, copies: runs.Run) -> None:  # noqa: F811
    """Against a literal loop over rows, for two epochs."""
    mix = SeedMix(probability=0.8)
    parts = [replace(real, weight=2.0), samples(copies, weight=2.0)]
    rows, plain = training_set(parts, mix=mix), training_set(parts)
    images, unmixed = ImageReader(plain), 0
    for epoch, item, repeat, x_HWC, y_K in shown(Loader(rows, recipe(**PLAIN), 5), range(2 * (84 // 8))):
        (wanted,) = images.decoded(np.array([item]))
        mixture = mix.draw(stream(5, epoch, item, repeat), SIDE)[0] if item >= 12 else None
        if mixture is not None:
            wanted = mixture.of(wanted, images.decoded(own_seeds(rows)[item:item + 1])[0])
        unmixed += item >= 12 and mixture is None
        np.testing.assert_array_equal(x_HWC, wanted)
        np.testing.assert_array_equal(y_K, np.eye(3)[plain.column("label")[item]])
    assert 5 < unmixed < 50


def test_the_seed_of_a_sample_is_the_image_it_was_made_from(real: RowSource, copies: runs.Run) -> None:  # noqa: F811
    rows, index = training_set([real, samples(copies)], mix=SeedMix()), build_index(
        DataConfig(**training_set([real]).parts[0].data))
    found = [index.seed_ids[rows.column("row")[item]] for item in own_seeds(rows)[12:]]

    wanted = [seed_id for receipt in copies.store.receipts()
              for seed_id in copies.store.data(receipt, ["seed_id"])["seed_id"].to_pylist()]
    assert found == wanted
    assert own_seeds(rows)[:12].tolist() == list(range(12))
    assert "seed" not in training_set([real, samples(copies)]).table.column_names


@pytest.mark.parametrize("partner", ["seed", "class"])
def test_real_rows_have_the_bytes_they_have_without_mixing(partner: Any, real: RowSource,  # noqa: F811
                                                           run: runs.Run) -> None:  # noqa: F811
    chosen = recipe(hflip=0.5, colour_jitter=0.3)
    parts = [real, samples(run)]
    one, other = (list(shown(Loader(training_set(parts, mix=mix), chosen, 2), range(7)))
                  for mix in (None, SeedMix(partner=partner)))

    for before, after in zip(one, other, strict=True):
        assert before[:3] == after[:3]
        assert (before[3].tobytes() == after[3].tobytes()) == (before[1] < 12)


@pytest.mark.parametrize("fields", [{"partner": "seed"}, {"partner": "class", "probability": 0.5}])
@pytest.mark.parametrize("shuffle_rows", [1000, 16])
def test_mixes_are_the_same_for_any_workers_and_any_start(shuffle_rows: int, fields: dict[str, Any],
                                                          real: RowSource, run: runs.Run) -> None:  # noqa: F811
    rows = training_set([replace(real, weight=2.0), samples(run)], mix=SeedMix(**fields))
    chosen = recipe(hflip=0.5, crop_pad=4, cutmix=1.0, mix_per="image")
    whole = list(Loader(rows, chosen, 1, shuffle_rows=shuffle_rows, streams=4).batches(0, 12))

    for world in (2, 4):
        half = 8 // (2 * world)
        for rank in range(world):
            feed = Loader(rows, chosen, 1, shuffle_rows=shuffle_rows, streams=4,
                          cache_bytes=1 if shuffle_rows == 1000 else 1 << 20)
            for part in feed.batches(5, 12, rank, world):
                for name in ("x_BHWC", "y_BK", "mix_B5"):
                    one, all_of = getattr(part, name), getattr(whole[part.step], name)
                    np.testing.assert_array_equal(one[:half], all_of[rank * half:(rank + 1) * half])
                    np.testing.assert_array_equal(one[half:], all_of[8 - (rank + 1) * half:8 - rank * half])


def test_another_epoch_mixes_anew(real: RowSource, run: runs.Run) -> None:  # noqa: F811
    rows = training_set([real, samples(run)], mix=SeedMix(pixel=1.0))
    mixer, items = RowMixer(rows, SIDE), np.arange(60)
    lams = [[one.lam for one in mixer.draw(items, np.zeros(60, np.uint32),
                                           lambda item, repeat, epoch=epoch: stream(0, epoch, item, repeat)).mixtures]
            for epoch in (0, 0, 1)]
    assert lams[0] == lams[1]
    assert not set(lams[0]) & set(lams[2])


def test_the_label_of_a_mix_is_that_of_the_row(real: RowSource, run: runs.Run) -> None:  # noqa: F811
    """Samples that were painted as the next class: the share of the real image goes to the class of the real image."""
    mix, label = SeedMix(pixel=1.0), {"gamma": 2.0}
    rows, plain = (training_set([real, samples(run)], soft_label=label, mix=one) for one in (mix, None))
    targets = ImageReader(plain).targets(np.arange(60))
    seen = 0
    for epoch, item, repeat, _, y_K in shown(Loader(rows, recipe(**PLAIN), 0), range(14)):
        wanted = targets[item]
        if item >= 12:
            mixture = mix.draw(stream(0, epoch, item, repeat), SIDE)[0]
            assert mixture is not None
            source = plain.column("source")[item]
            wanted = (1 - mixture.lam) * wanted + mixture.lam * np.eye(3)[source]
            seen += 1
        np.testing.assert_allclose(y_K, wanted, atol=1e-6)
        assert y_K.sum() == pytest.approx(1)
    assert seen > 50
    alike = training_set([replace(real, weight=0.0), samples(run)], soft_label=label, mix=SeedMix(partner="class"))
    for _, item, _, _, y_K in shown(Loader(alike, recipe(**PLAIN), 0), range(6)):  # the row's class, not the seed's
        np.testing.assert_array_equal(y_K, targets[item])


def test_real_rows_alone_are_mixed_with_another_image_of_their_class(real: RowSource) -> None:  # noqa: F811
    rows = training_set([real], mix=SeedMix(partner="class"))
    mixer, items = RowMixer(rows, SIDE), np.repeat(np.arange(12), 300)
    found = mixer.draw(items, np.tile(np.arange(300), 12).astype(np.uint32),
                       lambda item, repeat: stream(0, 0, item, repeat))
    partners, labels = found.partners.reshape(12, 300), rows.column("label")

    assert (labels[partners] == labels[:12, None]).all()
    for item in range(12):
        counts = np.bincount(partners[item], minlength=12)
        assert counts[item] == 0
        assert counts[(labels == labels[item]) & (np.arange(12) != item)] == pytest.approx(100, abs=25)  # 3 sigma


def test_an_image_alone_in_its_class_is_mixed_with_itself() -> None:
    rows = listed([5], real=5, labels=np.array([0, 0, 0, 0, 1]))
    rows = replace(rows, table=rows.table.append_column("seed", [list(range(5))]), mix=SeedMix(partner="class"))
    found = RowMixer(rows, SIDE).draw(np.arange(5), np.zeros(5, np.uint32),
                                      lambda item, repeat: stream(0, 0, item, repeat))
    assert found.partners[4] == 4
    assert all(partner != item for item, partner in enumerate(found.partners[:4]))
    mixing = Loader(rows, recipe(batch=5), 0).mixing()
    assert mixing is not None
    assert mixing["alone"] == pytest.approx(0.2)


def test_samples_alone_are_mixed_with_seeds_that_are_not_trained(real: RowSource, copies: runs.Run,  # noqa: F811
                                                                 tmp_path: Path) -> None:
    rows = training_set([replace(real, weight=0.0), samples(copies)], mix=SeedMix())

    assert (rows.n_real, rows.n_seeds, rows.n_synthetic, rows.epoch_rows) == (0, 12, 30, 30)
    assert rows.epoch(0, 0).min() == 12
    (tmp_path / "list.arrow").write_bytes(rows.to_bytes())
    again = TrainingSet.load(tmp_path / "list.arrow")
    assert (again.digest, again.mix) == (rows.digest, SeedMix())
    for one, other in zip(Loader(rows, recipe(), 0).batches(0, 3), Loader(again, recipe(), 0).batches(0, 3),
                          strict=True):
        assert one.x_BHWC.tobytes() == other.x_BHWC.tobytes()


def test_what_is_mixed_decides_the_digest(real: RowSource, run: runs.Run) -> None:  # noqa: F811
    parts = [real, samples(run)]
    assert len({training_set(parts, mix=mix).digest
                for mix in (None, SeedMix(), SeedMix(pixel=1.0), SeedMix(partner="class"))}) == 4


def test_images_of_any_size_meet_on_one_canvas(tmp_path: Path) -> None:
    """Real images of 37 x 50 pixels and samples of 16 x 16, under every crop."""
    for label in ("a", "b"):
        (tmp_path / "seeds" / label).mkdir(parents=True)
        for number in range(2):
            level = 50 + 100 * number
            Image.new("RGB", (50, 37), (level, level, level)).save(tmp_path / "seeds" / label / f"{number}.png")
    found = DataConfig(source="imagefolder", path=str(tmp_path / "seeds"))
    made, _ = complete(runs.parse({"name": "sizes", "out": str(tmp_path), "data": found.model_dump(),
                                   "sampler": {"batch": 4}, "method": {"name": "tests.methods.fakes.Fake"}}))
    rows = training_set([RowSource(seeds=(build_index(found), found)), samples(made)], mix=SeedMix(pixel=0.0))
    for crop in ({"crop": "none"}, {"crop": "resized", "rotation": 20}, {"crop": "pad", "crop_pad": 4},
                 {"crop": "square_pad", "resize": 36}, {"crop": "shift"}):
        feed = Loader(rows, recipe(size=32, batch=4, **crop), 0)
        assert all(batch.x_BHWC.shape == (4, 32, 32, 3) for batch in feed.batches(0, 3))


def test_both_images_have_one_crop(real: RowSource, run: runs.Run) -> None:  # noqa: F811
    """Samples that are their seeds stay so under every crop: the draws of the crop are shared."""
    rows = training_set([real, samples(run)], mix=SeedMix())
    for crop in ({"crop": "resized", "rotation": 20}, {"crop": "pad", "crop_pad": 8}, {"crop": "shift"}):
        one, other = Loader(rows, recipe(**crop), 0), Loader(replace(rows, mix=None), recipe(**crop), 0)
        one._images.decode = other._images.decode = lambda items, encoded: iter(  # type: ignore[method-assign]
            ImageReader(rows).decoded(own_seeds(rows)[items]))
        for mixed, plain in zip(one.batches(0, 3), other.batches(0, 3), strict=True):
            np.testing.assert_array_equal(mixed.x_BHWC, plain.x_BHWC)


@pytest.mark.parametrize(("room", "spans"), [(1 << 20, [(0, 4), (4, 6)]), (5000, [(0, 1), (1, 2), (2, 3), (3, 4),
                                                                                  (4, 5), (5, 6)])])
def test_partners_of_a_window_are_read_together_as_far_as_they_fit(
        room: int, spans: list[tuple[int, int]], real: RowSource, run: runs.Run,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch) -> None:
    """48 samples are 6 steps in windows of 4; the real images of a window, or of a step, are read at once and once."""
    rows = training_set([replace(real, weight=0.0), samples(run)], mix=SeedMix())
    feed, read, found = Loader(rows, recipe(), 0, shuffle_rows=32, streams=1), list[int](), []
    whole = feed._images.fetch

    def fetch(items: np.ndarray) -> list[bytes]:
        read.extend(items[items < 12].tolist())
        return whole(items)

    monkeypatch.setattr(feed._images, "fetch", fetch)
    for batch in feed.batches(0, 6):
        feed.cache_bytes = room  # after the first window, which is checked against it
        if batch.step == 0:
            feed._partners = ((-1, 0, 1), range(0), {})
            feed._windowed_partners(0, 0, 0, 1)
            read.clear()
        held = feed._partners[1]
        found.append((held.start, held.stop))
        assert len(feed._partners[2]) <= min(12, 8 * len(held))
    assert sorted(set(found)) == spans
    assert len(read) <= 12 * (len(spans) - 1)
    assert not feed._images._cache


@pytest.mark.parametrize(("mode", "p", "mix", "words"), [
    ("union", 0.0, SeedMix(), "mixing needs the real images"), ("replace", 0.5, SeedMix(), "mode replace needs seeds")])
def test_mixing_needs_real_images(mode: Any, p: float, mix: SeedMix, words: str, run: runs.Run) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=words):
        training_set([samples(run)], mode, p, mix=mix)


@pytest.mark.parametrize("fields", [{"mix": SeedMix()}, {"mode": "replace", "p": 0.5, "draw": "own"}])
def test_samples_of_other_images_are_refused(fields: dict[str, Any], folder: Path, data: DataConfig,  # noqa: F811
                                             run: runs.Run) -> None:  # noqa: F811
    ids = build_index(data).seed_ids
    (folder / "fewer.txt").write_bytes(ids_file(ids[:-2]))
    fewer = data.model_copy(update={"ids": str(folder / "fewer.txt")})
    with pytest.raises(UsageError, match=r"samples of 2 images that are none of the real rows"):
        training_set([RowSource(seeds=(build_index(fewer), fewer)), samples(run)], **fields)


# --- draw: own


def test_a_row_is_replaced_by_a_sample_of_its_own() -> None:
    """Three of four real rows have 1, 2 and 5 samples; each of them is drawn alike, and the last row stays."""
    seeds = np.array([2, 0, 1, 2, 2, 1, 2, 2])
    rows = listed([4, 8], real=4, labels=np.zeros(12, int), mode="replace", p=0.5, draw="own")
    rows = replace(rows, table=rows.table.append_column("seed", [np.r_[np.arange(4), seeds].astype(np.int32)]))
    epochs = np.stack([rows.epoch(0, epoch) for epoch in range(4000)])

    assert (epochs[:, 3] == 3).all()
    for item, of_it in enumerate(([5], [6, 9], [4, 7, 8, 10, 11])):
        shown, counts = np.unique(epochs[:, item], return_counts=True)
        assert set(shown) == {item, *of_it}
        assert counts[0] / 4000 == pytest.approx(0.5, abs=0.024)  # 3 sigma
        assert counts[1:] == pytest.approx(2000 / len(of_it), rel=0.17)
    uniform = replace(rows, draw="uniform")
    np.testing.assert_array_equal((epochs[:50, :3] >= 4),
                                  np.stack([uniform.epoch(0, epoch)[:3] for epoch in range(50)]) >= 4)


def test_own_samples_are_mixed_and_labelled_as_in_a_union(real: RowSource, copies: runs.Run) -> None:  # noqa: F811
    rows = training_set([real, samples(copies)], "replace", 1.0, draw="own", mix=SeedMix())
    assert own_seeds(rows)[rows.epoch(0, 3)].tolist() == list(range(12))
    with pytest.raises(ConfigError, match="draw own says what replaces a real row"):
        training_set([real, samples(copies)], draw="own")


# --- fractions of copies


@pytest.mark.parametrize(("ratio", "counts"), [(0.5, [2, 2, 2]), (1, [4, 4, 4]), (1.5, [6, 6, 6]), (2.25, [9, 9, 9]),
                                               (2.3, [9, 9, 9]), (2.5, [10, 10, 10]), (None, [10, 10, 10])])
def test_a_fraction_takes_a_share_of_each_class_rounded_down(ratio: float | None, counts: list[int],
                                                             copies: runs.Run) -> None:
    rows = training_set([samples(copies, copies=ratio)])
    assert rows.counts().tolist() == counts


def test_fractions_are_nested(real: RowSource, run: runs.Run) -> None:  # noqa: F811
    taken = []
    for ratio in (1, 1.25, 1.5, 1.75, 2):
        rows = training_set([real, samples(run, copies=ratio)])
        taken.append({(chunk, row) for chunk, row in zip(*(
            [rows.parts[1].chunks[c - rows.parts[1].chunk] for c in rows.column("chunk")[12:]],
            rows.column("row")[12:].tolist()), strict=True)})
    assert [len(one) for one in taken] == [12, 15, 18, 21, 24]
    assert all(less < more for less, more in pairwise(taken))


@dataclass(frozen=True)
class Sizes:
    """As much of a seed index as counting asks for."""

    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.sizes)

    labels = property(lambda self: np.repeat(np.arange(len(self.sizes)), self.sizes))
    classes = property(lambda self: self.sizes)
    seed_ids = property(lambda self: [str(n) for n in range(len(self))])


@pytest.mark.parametrize(("sizes", "share", "counts"), [
    ((10, 16, 41, 68), 0.1, [1, 1, 4, 6]), ((10, 16, 41, 68), 0.5, [5, 8, 20, 34]),
    ((10, 16, 41, 68), 1.0, [10, 16, 41, 68]), ((100,), 0.29, [29]), ((10,) * 3, 0.7, [7, 7, 7])])
def test_counts_of_the_variants_of_diffcoremix(sizes: tuple[int, ...], share: float, counts: list[int]) -> None:
    """29 of 100 although 0.29 * 100 is less in floating point."""
    index: Any = Sizes(sizes)
    plan = Plan(index, DiffCoReMix(), 0, 8, np.ones(len(index), np.uint16), np.zeros(len(index), np.int32))
    assert np.bincount(index.labels, plan.first_copies(share)).astype(int).tolist() == counts
