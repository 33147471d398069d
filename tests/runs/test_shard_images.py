"""How many bytes of decoded images one sampler process holds, counted while runs are made."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.data import pixels
from rayexpand.runs import bench, expander
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig
from tests.conftest import MakeConfig, complete, hashes, refused
from tests.live import Live
from tests.methods import fakes

SIDES = (64, 48, 80, 56, 72, 40)
LARGEST = 80 * 80 * 3


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Live:
    """Decoded seeds, and samples of the fake `Looking` until they are encoded, which takes a while."""
    found, encode = Live(), pixels.encode

    def encoded(image: np.ndarray, *codec: Any) -> tuple[bytes, str, np.ndarray]:
        time.sleep(0.002)
        return encode(image, *codec)

    class Looking(fakes.Echo):
        models: frozenset[str] = frozenset()

        def needs(self) -> frozenset[str]:
            return self.models

        def expand(self, batch: Batch, tools: Tools) -> Expansion:
            return Expansion([found.add(image.copy()) for image in batch.images])

    monkeypatch.setattr(expander, "decode", found.decode)
    monkeypatch.setattr(expander, "encode", encoded)
    monkeypatch.setattr(fakes, "Looking", Looking, raising=False)
    return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Twenty-four images of six sizes, in two classes."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.Generator(np.random.Philox(key=5))
    for name in "ab":
        (root / name).mkdir()
        for i in range(12):
            image = rng.integers(0, 256, (SIDES[i % 6], SIDES[i % 6], 3), dtype=np.uint8)
            Image.fromarray(image).save(root / name / f"{i:02d}.png")
    return {"source": "imagefolder", "path": str(root)}


def limited(make_config: MakeConfig, method: str, image_bytes: int, **fields: Any) -> RunConfig:
    sections = {"runtime": {"image_bytes": image_bytes}, **fields.pop("sections", {})}
    return make_config(method, name=f"{method}-{image_bytes}", sections=sections, batch=16, shard_images=100, **fields)


@pytest.mark.parametrize("ratio", [1, 3])
def test_a_process_holds_the_bytes_it_may_and_makes_the_same_samples(make_config: MakeConfig, live: Live,
                                                                     photos: dict[str, str], ratio: int) -> None:
    budget = 8 * LARGEST
    reference = hashes(complete(limited(make_config, "Looking", 1 << 30, data=photos, ratio=ratio))[0])
    before, live.peak = live.peak, 0
    run, _ = complete(limited(make_config, "Looking", budget, data=photos, ratio=ratio))

    assert before > budget >= live.peak
    assert hashes(run) == reference
    assert len(reference) == 24 * ratio


def test_one_image_always_goes_through(make_config: MakeConfig, live: Live, photos: dict[str, str]) -> None:
    run, totals = complete(limited(make_config, "Looking", 1, data=photos, ratio=2))

    assert totals.kept == 48
    assert live.peak <= 2 * LARGEST, "it and its sample"
    sample_id = min(hashes(run))
    assert runs.expander_of(run, attempt=0).regenerate(sample_id).sample_sha256 == hashes(run)[sample_id]


def test_bench_holds_the_bytes_it_may(make_config: MakeConfig, live: Live, photos: dict[str, str]) -> None:
    budget = 8 * LARGEST
    bench.bench(limited(make_config, "Looking", budget, data=photos, ratio=2))

    assert live.peak <= budget


def test_a_filler_is_not_larger_than_its_smallest_batch_mate(make_config: MakeConfig, live: Live,
                                                             photos: dict[str, str]) -> None:
    run = runs.prepare(limited(make_config, "Looking", 1 << 30, data=photos, ratio=1))
    last = list(runs.expander_of(run, attempt=0).batches(0))[-1]
    sides = {filler: {image.shape[0] for image, one in zip(last.images, last.filler, strict=True) if one is filler}
             for filler in (True, False)}

    assert sides[True] == {min(sides[False])}


@pytest.mark.parametrize(("method", "fields"), [
    ("classical", {}), ("Groups", {"ratio": 5}), ("Picky", {"ratio": 3}), ("MixedStarts", {"seeds": "a"}),
    ("ManyBadGroups", {"ratio": 5, "bads": ("a/03.png/0", "b/07.png/4")}), ("BadRedraws", {"bads": ("a/03.png/1",)})])
@pytest.mark.fast_cases(2)
def test_samples_do_not_depend_on_the_bytes(make_config: MakeConfig, photos: dict[str, str], method: str,
                                            fields: dict[str, Any]) -> None:
    most, few = (complete(limited(make_config, method, image_bytes, data=photos, **fields))[0]
                 for image_bytes in (1 << 30, 100_000))

    assert hashes(few) == hashes(most)
    assert refused(few) == refused(most)


def test_calls_of_models_keep_their_shape_and_few_samples_wait(make_config: MakeConfig, live: Live,
                                                               photos: dict[str, str]) -> None:
    image = {"image": {"size": 32, "fit": "squash"}}
    plain = runs.prepare(limited(make_config, "Looking", 1, data=photos, ratio=8, sections=image))
    config = limited(make_config, "Looking", 1, data=photos, ratio=8, sections=image, models={"prior"})
    worker = runs.expander_of(replace(plain, config=config), 0, lambda: Tools(plain.plan.index.classes))
    shapes = [len(batch) for batch in worker.batches(0)]
    receipt = worker(0)

    assert set(shapes) == {16}
    assert receipt.kept == 104
    call = 16 * 32 * 32 * 3
    assert live.peak <= call + 4 * LARGEST, "the samples of one call, and seeds of their own size for a moment"


def test_images_that_cannot_be_read_take_no_room(make_config: MakeConfig, photos: dict[str, str],
                                                 tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (300, 300), "red").save(tmp_path / name / "0.png")
        (tmp_path / name / "1.png").write_bytes(b"broken")
    data = {"source": "imagefolder", "path": str(tmp_path), "max_pixels": 300 * 299}
    run, totals = complete(limited(make_config, "Echo", 1, data=data, ratio=1))

    assert totals.failed == 4
    assert set(refused(run).values()) == {"decode_error", "too_large"}
