from __future__ import annotations

import gc
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from tests.places import in_memory

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run side by side
if memory := in_memory():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", memory)

from rayexpand import methods
from rayexpand.data.seeds import digits
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig, parse
from rayexpand.runs.store import Totals
from tests.commands import ROOT

if TYPE_CHECKING:
    from tests.s3server import Server

FAKES = "tests.methods.fakes."
# Methods of the tests' own, as a user would trust his; the last ones are made by tests, or not at all.
methods.trust(*(FAKES + name for name in (
    *re.findall(r"^class (\w+)", (ROOT / "tests/methods/fakes.py").read_text(), re.M),
    "Holding", "Late", "Looking", "NoSuchMethod", "Pieces")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n` alone a file stays on one worker, so that what its tests share is made once and not on each of them.
    Files come in their order: slow ones (api, cli, compat) are begun early, not last, though they have few tests."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.fast_cases(n, "chaos")`: n cases of the test, evenly spread, are fast, the others chaos; or slow,
    where nothing is said."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("fast_cases"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        marker = found[0].get_closest_marker("fast_cases")
        n, other = (*marker.args, "slow")[:2] if marker else (len(found), "slow")
        fast = {len(found) * one // n for one in range(n)}
        for number, item in enumerate(found):
            if number not in fast:
                item.add_marker(other)


def pytest_collection_finish() -> None:
    """What is imported and collected stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _looked_up_once() -> Iterator[None]:
    """Each list and each reader of the digits resizes all 1,797, and each method by a dotted name asks every installed
    distribution for entry points; here, one process does it once."""
    with (mock.patch.object(digits, "digits_split", cache(digits.digits_split)),
          mock.patch.object(methods, "entry_points", cache(methods.entry_points))):
        yield


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of five 16-pixel images."""
    root = tmp_path_factory.mktemp("seeds")
    rng = np.random.Generator(np.random.Philox(key=7))
    for name in ("ant", "bee", "cat", "dog"):
        (root / name).mkdir()
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family of generators by its name in tests/models/families.py, written when it is first asked."""
    from tests.models import families

    return families.at_once(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def object_store_server() -> Iterator[Server]:
    from tests.s3server import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture
def object_stores(object_store_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """S3 and GCS with a bucket `runs`, where every client of this test and its children goes."""
    settings = {"AWS_ENDPOINT_URL": object_store_server.url, "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1",
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "STORAGE_EMULATOR_HOST": object_store_server.url}
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    object_store_server.reset()
    return object_store_server


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import tiny_clip

    return tiny_clip(tmp_path_factory.mktemp("judge") / "clip")


class ScriptedJudge:
    """A guide whose cosine with any text is a number in [0, 1) that follows from the bytes of the image."""

    size, classes = (16, 16), ()

    def seen(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        score_B = np.array([int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=4).digest()) / 2**32
                            for image in images])
        return np.stack([score_B, np.sqrt(1 - score_B**2)], axis=1), np.zeros((len(images), 1))

    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        return np.array([[1.0, 0.0]] * len(prompts))


Accepting = Callable[..., dict[str, Any]]


@pytest.fixture
def accept(judge_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Accepting:
    """A section `accept` by the scripted judge, who accepts half of all attempts: `accept(attempts=2)`."""
    monkeypatch.setattr("rayexpand.runs.tools._guide", lambda *given: ScriptedJudge())
    return lambda **fields: {"guide": {"weights": str(judge_folder)}, "to": "prompt", "above": 0.5, "attempts": 3,
                             **fields}


MakeConfig = Callable[..., RunConfig]


def small_run(seeds: Path, out: Path, /, method: str = "Fake", *, name: str = "run", batch: int = 8,
              shard_images: int = 8, data: Any = None, sections: dict[str, Any] | None = None,
              **fields: Any) -> RunConfig:
    """Configuration of a small run by a fake, or by a built-in method by its lower-case name."""
    dotted = method if method.islower() else FAKES + method
    return parse({
        "name": name, "out": str(out), "seed": 3, "method": {"name": dotted, **fields},
        "data": data or {"source": "imagefolder", "path": str(seeds)},
        "sampler": {"batch": batch, "shard_images": shard_images}, "limits": {"max_failed": 1.0},
        "prior": {"weights": "digits"}, "guide": {"weights": "digits"}, **(sections or {})})


@pytest.fixture
def make_config(image_folder: Path, tmp_path: Path) -> MakeConfig:
    """`small_run` of the image folder: `make_config("Fake", ratio=3)`."""
    return partial(small_run, image_folder, tmp_path / "out")


def complete(config: RunConfig, **start: Any) -> tuple[runs.Run, Totals]:
    """Prepares and drives a run in this process until nothing is pending."""
    run = runs.prepare(config)
    expander = runs.start(run, **start)
    try:
        return run, runs.drive(run, runs.in_process(expander), lambda: runs.pending_jobs(run))
    finally:
        expander.close()


def hashes(run: runs.Run) -> dict[str, str]:
    """sample_sha256 by sample id over all committed files; fails where a sample is there twice."""
    found: dict[str, str] = {}
    for receipt in run.store.receipts():
        for row in run.store.data(receipt, ["sample_id", "sample_sha256"]).to_pylist():
            assert row["sample_id"] not in found
            found[row["sample_id"]] = row["sample_sha256"]
    return found


def attempts(run: runs.Run) -> dict[str, int]:
    """Attempt of each committed row, kept or refused, by sample id."""
    return {row["sample_id"]: row["attempt"] for receipt in run.store.receipts()
            for table in (run.store.data(receipt, ["sample_id", "attempt"]), run.store.refused(receipt))
            for row in table.to_pylist()}


def refused(run: runs.Run) -> dict[str, str]:
    """Reason by sample id over all committed files."""
    return {row["sample_id"]: row["reason"] for receipt in run.store.receipts()
            for row in run.store.refused(receipt).to_pylist()}
