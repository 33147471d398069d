"""Guided runs on digits: the update does what it is for, and the page shows it beside plain samples."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayexpand.contract.errors import UsageError
from rayexpand.fitting.fit import fit_for, with_artifacts
from rayexpand.methods import load_method
from rayexpand.reports.guided import Look, look, plain_twin
from rayexpand.reports.run import Picture, write_report
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from rayexpand.studies.demo import settings
from tests.conftest import complete
from tests.reports.test_run import Page, visible
from tests.runfolder import Builder

COPIES = {"distdiff": 1, "gif": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, runs.Run]:
    """DistDiff and GIF on two real digits per class, with the settings of the demo."""
    out, found = tmp_path_factory.mktemp("guided"), {}
    for name, ratio in COPIES.items():
        config = parse({"name": name, "out": str(out), "data": {"source": "digits", "per_class": 2},
                        "method": settings(name, ratio=ratio), "sampler": {"batch": 20 * ratio}})
        config = with_artifacts(config, fit_for(config, lambda *_: None, out=str(out / "artifacts")))
        found[name], _ = complete(config)
    return found


@pytest.fixture(scope="module")
def looks(made: dict[str, runs.Run]) -> dict[str, Look]:
    return {name: look(str(run.folder), 12) for name, run in made.items()}


def picture_of(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image)


def pixels(picture: Picture) -> np.ndarray:
    return picture_of(base64.b64decode(picture.uri.partition(",")[2])).astype(int)


def scores(run: runs.Run) -> dict[str, np.ndarray]:
    rows = [{one["name"]: one["value"] for one in row["scores"]} for receipt in run.store.receipts()
            for row in run.store.data(receipt, ["scores"]).to_pylist()]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.slow
def test_the_energy_of_digits_falls(made: dict[str, runs.Run]) -> None:
    found = scores(made["distdiff"])

    assert len(found["energy_after"]) == 20
    assert (found["energy_after"] < found["energy_random"]).mean() > 0.95


@pytest.mark.slow
def test_the_score_of_digits_rises_and_the_class_stays(made: dict[str, runs.Run]) -> None:
    found = scores(made["gif"])
    gain = found["score_after"] - found["score_random"]

    assert gain.sum() > 0
    assert (gain.reshape(-1, 2).sum(1) > 0).mean() > 0.8  # groups of two, which the method climbs together
    assert found["retained_after"].mean() > 0.8


@pytest.mark.parametrize("name", list(COPIES))
@pytest.mark.slow
def test_plain_samples_have_the_noise_of_the_guided_ones(made: dict[str, runs.Run], looks: dict[str, Look],
                                                         name: str) -> None:
    run = made[name]
    expander = runs.expander_of(run, attempt=0)
    (batch,), tools = expander.batches(0), expander.loaded()
    expander.close()
    method = load_method(name, {**settings(name, ratio=COPIES[name]), "eps": 0.0, "measure": False})
    without = method.expand(batch, replace(tools)).images
    plain = plain_twin(run.config.method).expand(batch, tools).images
    stored = {row["sample_id"]: picture_of(row["image"]["bytes"]) for receipt in run.store.receipts()
              for row in run.store.data(receipt, ["sample_id", "image"]).to_pylist()}
    guided = [stored[draw.sample_id] for draw in batch.draws]

    assert all(np.array_equal(a, b) for a, b in zip(plain, without, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(plain, guided, strict=True))
    first = {draw.seed_id: image for draw, image in zip(batch.draws, plain, strict=True) if draw.copy == 0}
    for strip in looks[name].strips:  # made in a smaller call: a level apart at most
        expected = first[strip.seed.title.removeprefix("seed ")]
        assert expected is not None
        assert np.abs(pixels(strip.plain) - expected).max() <= 1


@pytest.mark.parametrize("name", list(COPIES))
def test_the_page_shows_strips_and_names_the_pages_of_the_guide(made: dict[str, runs.Run], looks: dict[str, Look],
                                                     name: str) -> None:
    run, seen = made[name], looks[name]
    page = write_report(run.folder, look=seen).read_text()

    assert len(seen.strips) == 12
    assert len({strip.name for strip in seen.strips}) == 10
    assert all(picture.uri for strip in seen.strips for picture in (strip.seed, strip.plain, strip.guided))
    assert all(strip.plain.uri not in (strip.seed.uri, strip.guided.uri) for strip in seen.strips)
    assert Page(page).open == []
    assert all(link.startswith("data:image/") for link in Page(page).links)
    assert 'id="strips"' in page
    assert "flip fraction" in page
    for kind in ("failures", "map"):
        assert f"rayexpand report --{kind} {run.folder}" in visible(page)


def test_a_page_without_the_models_names_the_command(made: dict[str, runs.Run]) -> None:
    run = made["distdiff"]
    page = write_report(run.folder).read_text()

    assert 'id="strips"' not in page
    assert f"rayexpand report {run.folder} --strips 10" in visible(page)
    assert "of 20 samples: the energy is lower with the update than with the drawn perturbation" in visible(page)


def test_a_run_without_a_guide_has_no_strips(tmp_path: Path) -> None:
    config = parse({"name": "plain", "out": str(tmp_path), "data": {"source": "digits", "per_class": 1},
                    "method": {"name": "classical", "ratio": 1}})
    complete(config)

    with pytest.raises(UsageError, match="classical as it was run here has no guide"):
        look(str(tmp_path / "plain"), 3)


def test_what_the_scores_say(tmp_path: Path) -> None:
    run = Builder(tmp_path / "run", shards=1, seeds_per_shard=2, copies=2).start()
    numbers = [(1.0, 2.0), (3.0, 2.0), (1.0, 1.5), (1.0, 4.0)]  # with the update, without
    run.commit(0, [replace(sample, scores={"score_after": after, "score_random": drawn, "energy_after": after,
                                           "energy_random": drawn, "retained_after": float(after < 2)})
                   for sample, (after, drawn) in zip(run.samples(0), numbers, strict=True)])
    words = visible(write_report(run.folder).read_text().split('id="guidance"')[1].split("</section>")[0])

    assert "75.0 % of 4 samples: the energy is lower with the update" in words
    assert "(-0.875 on average)" in words
    assert "25.0 % of 4 samples: the score is higher with the update" in words
    assert "in 0.0 % of 2 groups" in words  # sums of the two copies of each seed: -1 + 1 and -0.5 - 3
    assert "75.0 % with the update, projected" in words
