"""Features on Ray: equal to those of one process, for any number of actors and wherever images are decoded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import yaml

from rayexpand.contract.errors import EnvironmentFault
from rayexpand.evaluation import evaluate as evaluation
from rayexpand.evaluation import sides
from rayexpand.evaluation.evaluate import EvaluateConfig, in_process, parse
from rayexpand.evaluation.extraction import Found
from rayexpand.evaluation.features import extractor_hash
from rayexpand.evaluation.sides import reference_of, samples_of
from rayexpand.on_ray import evaluate as on_ray
from rayexpand.on_ray import stage
from rayexpand.on_ray.pool import choose_pool
from rayexpand.on_ray.stage import ModelServer
from rayexpand.runs.config import ClusterConfig
from rayexpand.runs.run import Run, open_run
from tests.conftest import complete
from tests.on_ray.conftest import ROOT, Head
from tests.tiny import tiny_clip

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def job(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sixty samples in eight data files against nineteen images and one that cannot be read; calls of seven."""
    from rayexpand.runs.config import parse as parse_run

    folder = tmp_path_factory.mktemp("job")
    run, _ = complete(parse_run({
        "name": "run", "out": str(folder), "data": {"source": "imagefolder", "path": str(image_folder)},
        "method": {"name": "classical", "ratio": 3}, "sampler": {"batch": 8, "shard_images": 8}}))
    real = Path(shutil.copytree(image_folder, folder / "real"))
    (real / "cat/2.png").write_bytes(b"broken")
    return {"run": str(run.folder), "reference": {"source": "imagefolder", "path": str(real)}, "batch": 7,
            "extractor": {"guide": str(tiny_clip(folder / "clip")), "device": "cpu"}, "rows": 30}


@pytest.fixture(scope="module")
def expected(job: dict[str, Any]) -> dict[str, Any]:
    return evaluation.evaluate(parse(job), in_process)


def sides_of(config: EvaluateConfig) -> list[sides.Side]:
    run: Run = open_run(config.run)
    return [samples_of(run, config.choice), reference_of(config.reference, config.choice)]


def extracted(config: EvaluateConfig, sha256: str) -> list[Found]:
    return on_ray.extract(config, sha256, sides_of(config), lambda task, done, total: None)


def same(found: list[Found], other: list[Found]) -> bool:
    """Bit for bit: rows, classes, halves and sums."""
    def flat(one: Found) -> list[np.ndarray]:
        return [*map(np.asarray, one[:5]), *(np.asarray(part) for moments in one.sums or () for part in moments)]

    return all(np.array_equal(a, b) for one, two in zip(found, other, strict=True)
               for a, b in zip(flat(one), flat(two), strict=True))


@pytest.mark.parametrize("actors", [1, 2])
def test_the_same_scores_with_any_number_of_actors(head: Head, job: dict[str, Any], expected: dict[str, Any],
                                                   tmp_path: Path, actors: int) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text(yaml.safe_dump({**job, "name": f"ray{actors}", "cluster": {"address": head.address,
                                                                             "actors": actors}}))
    done = subprocess.run([sys.executable, "-m", "rayexpand", "evaluate", str(file), "--json"], cwd=ROOT, env=head.env,
                          capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for key in ("scores", "refused", "n_samples", "n_reference", "extractor", "warnings"):
        assert found[key] == expected[key], key
    assert found["refused"] == {"samples": 0, "reference": 1}
    assert json.loads(Path(found["file"]).read_text())["scores"] == expected["scores"]


@pytest.fixture(scope="module")
def gpu_cluster() -> Iterator[None]:
    """A cluster of our own that believes it has a GPU and two CPUs beside it."""
    folder = tempfile.mkdtemp(prefix="rxt-")
    ray.init(address="local", num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
             object_store_memory=200_000_000)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.usefixtures("gpu_cluster")
def test_decoding_beside_gpus_changes_nothing(job: dict[str, Any]) -> None:
    config = parse(job)
    sha256 = extractor_hash(config.extractor)
    pool = choose_pool(config.cluster, "auto")

    assert (pool.gpus, pool.actors, on_ray._readers(pool)) == (1.0, 1, 2)
    assert same(extracted(config, sha256), in_process(config, sha256, sides_of(config), lambda *said: None))


@pytest.mark.usefixtures("gpu_cluster")
def test_rows_come_in_their_order(job: dict[str, Any]) -> None:
    config = parse({**job, "cluster": {"actors": 2, "gpus_per_actor": 0}})
    sha256 = extractor_hash(config.extractor)

    assert same(extracted(config, sha256), in_process(config, sha256, sides_of(config), lambda *said: None))


@pytest.mark.usefixtures("gpu_cluster")
def test_a_node_without_the_extractor_gets_it(job: dict[str, Any], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = parse(job).extractor
    sha256 = extractor_hash(extractor)
    monkeypatch.setattr(stage, "staged_folder", lambda content: tmp_path / content[:16])
    folder = Path(str(extractor.guide))
    server = ModelServer.remote({sha256: {file.name: file for file in folder.iterdir()}})
    elsewhere = extractor.model_copy(update={"guide": str(tmp_path / "not-here")})

    assert on_ray.here_or_staged(extractor, sha256, server) == extractor, "no copy where it is"
    assert not list(tmp_path.iterdir())
    staged = on_ray.here_or_staged(elsewhere, sha256, server)
    assert extractor_hash(staged) == sha256
    assert Path(str(staged.guide)).parent == tmp_path
    assert on_ray.here_or_staged(elsewhere, sha256, server) == staged
    (tmp_path / sha256[:16] / "open_clip_config.json").write_text("{}")
    assert extractor_hash(on_ray.here_or_staged(elsewhere, sha256, server)) == sha256, "a damaged copy is made again"
    other = ModelServer.remote({"0" * 64: {file.name: file for file in folder.iterdir()}})
    with pytest.raises(EnvironmentFault, match="does not have the hash"):
        on_ray.here_or_staged(elsewhere, "0" * 64, other)
    assert sorted(file.name.split(".")[0] for file in tmp_path.iterdir()) == ["0" * 16, sha256[:16], sha256[:16]]
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(EnvironmentFault, match=r"0{12} \(.* kB\) cannot be copied to .*where 100 bytes are free.*a "
                                               "path that all nodes see"):
        on_ray.here_or_staged(elsewhere, "0" * 64, other)
    assert not list(tmp_path.glob("*.partial-*"))


@pytest.mark.usefixtures("gpu_cluster")
def test_an_actor_that_cannot_go_on_says_why(job: dict[str, Any], tmp_path: Path) -> None:
    config = parse({**job, "cluster": ClusterConfig(actors=1).model_dump()})
    samples, reference = sides_of(config)
    gone = replace(samples, read=partial(sides.read_samples, str(tmp_path)))

    with pytest.raises(EnvironmentFault, match="o such file"):
        on_ray.extract(config, extractor_hash(config.extractor), [gone, reference], lambda *said: None)
