"""Corrupted images on Ray: the bytes of one process with one actor, with two, and with a stage that corrupts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayexpand.on_ray import robustness as on_ray
from rayexpand.on_ray.pool import connected
from rayexpand.runs.config import ClusterConfig
from rayexpand.studies import robustness
from rayexpand.studies.parts import Study, Trial
from rayexpand.studies.robustness import in_process, show_corrupted
from rayexpand.studies.study import prepare_study
from tests.studies.test_robustness import left_by, raw_with, trained

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connected(ClusterConfig()):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[Trial], dict[str, str]]:
    """Trials, and what a pass in this process leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustness, "BLOCK", 7)
        study, trials = trained(raw_with(tmp_path_factory.mktemp("robustness")))
        assert show_corrupted(study, trials, in_process) == []
    return study, trials, left_by(study)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("actors", "corrupters"), [(1, 0), (2, 0), (1, 1)])
def test_the_bytes_do_not_depend_on_the_workers(finished: tuple[Study, list[Trial], dict[str, str]], actors: int,
                                                corrupters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    study, trials, expected = finished
    monkeypatch.setattr(robustness, "BLOCK", 7)
    monkeypatch.setattr(on_ray, "_corrupters", lambda *_: corrupters)
    shutil.rmtree(Path(str(study.files.root), "robustness"))
    config = study.config.model_copy(update={"cluster": ClusterConfig(actors=actors, cpus_per_actor=0.5)})
    assert show_corrupted(prepare_study(config), trials, on_ray.show) == []

    assert left_by(study) == expected


@pytest.mark.usefixtures("cluster")
def test_what_is_wrong_with_a_classifier_comes_back_with_its_class(
        finished: tuple[Study, list[Trial], dict[str, str]]) -> None:
    study, trials, _ = finished
    file = Path(str(study.files.root), f"weights/{trials[0].name}.safetensors")
    whole = file.read_bytes()
    shutil.rmtree(Path(str(study.files.root), "robustness"))
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (line,) = show_corrupted(study, trials, on_ray.show)
    file.write_bytes(whole)

    assert f"not what trial {trials[0].name} left; delete it and run `rayexpand train` again" in line
