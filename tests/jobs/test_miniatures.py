"""Every job of the papers and of ImageNet runs, from what its head says comes first to its end; small: random images of
three classes, tiny generators, one epoch (miniature.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from rayexpand.contract import settings
from rayexpand.contract.errors import ConfigError
from tests.jobs import miniature
from tests.jobs.miniature import Job, Workshop, jobs, overrides
from tests.jobs.test_jobs import VERBS


def _title(job: Job) -> str:
    return " ".join([job.name, *(one for one in job.overrides[:1])])


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    root = tmp_path_factory.mktemp("workshop")
    with chdir(root):
        yield Workshop(root)


@pytest.mark.soak
@pytest.mark.timeout(3600)  # with what comes first
@pytest.mark.parametrize("job", jobs(), ids=_title)
def test_every_job_runs(job: Job, workshop: Workshop) -> None:
    assert workshop.done(job) is not None


def test_a_selection_runs_after_the_samples_it_is_of(workshop: Workshop) -> None:
    workshop.done(Job("papers/gif/select-random"))

    assert Path("runs/gif-candidates/selections/random.parquet").is_file()


def test_what_is_made_small_is_set_and_nothing_else() -> None:
    job = Job("papers/gif/study-cars")
    said = overrides(job.raw, job.raw)
    made = settings.read(job.path, said)

    assert made == miniature.small(job.raw)
    assert {one.partition("=")[0].partition(".")[0] for one in said} <= {
        "seeds", "recipe", "baselines", "expansions", "arms", "estimate"}
    assert made["expansions"]["gif-sd"]["method"]["eps"] == job.raw["expansions"]["gif-sd"]["method"]["eps"]


@pytest.mark.parametrize("job", [job for job in jobs() if job.overrides and job.verb not in ("select", "evaluate")],
                         ids=_title)
def test_variants_in_heads_are_jobs(job: Job) -> None:
    """What a head says to set leads to a file that its verb takes."""
    with chdir(miniature.ROOT):
        try:
            VERBS[job.verb][0](job.path, job.overrides)
        except ConfigError as error:
            pytest.fail(str(error))
