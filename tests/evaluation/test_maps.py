"""Features of several runs in one plane, and failure cases: every number made again from the runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from rayexpand.contract.errors import ConfigError, DamagedFile, UsageError
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import SeedReader
from rayexpand.diffusion.prototypes import fit_prototypes, save_prototypes
from rayexpand.evaluation.features import ExtractorConfig, extractor_hash, load_extractor
from rayexpand.evaluation.maps import REAL, feature_map, project
from rayexpand.models.guides import load_guide
from rayexpand.reports.failures import write_failures_page
from rayexpand.reports.figure import read_figure
from rayexpand.reports.maps import class_figure, whole_figure, write_map_page
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json
from tests.conftest import complete
from tests.reports.test_run import visible

IMAGES, CLASSES = 3, 4


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[runs.Run]:
    """Two runs without a model."""
    out, found = tmp_path_factory.mktemp("maps"), list[runs.Run]()
    for policy in ("randaugment", "cutout"):
        config = parse({"name": policy, "out": str(out), "data": {"source": "digits", "per_class": 2},
                        "method": {"name": "classical", "policy": policy, "ratio": 2}})
        found.append(complete(config)[0])
    return found


def features_of(several: list[runs.Run]) -> dict[str, np.ndarray]:
    """Features of every sample and seed by name, one image at a time."""
    extractor = load_extractor(ExtractorConfig(guide="digits"))
    encoded = {f"{run.facts['name']} {row['sample_id']}": row["image"]["bytes"] for run in several
               for receipt in run.store.receipts() for row in run.store.data(receipt).to_pylist()}
    index = several[0].plan.index
    found = SeedReader(index, several[0].config.data).read(range(len(index)))
    encoded |= {f"real {seed_id}": one.image for seed_id, one in zip(index.seed_ids, found, strict=True)}
    return {name: extractor(decode(image)[0][None])[0] for name, image in encoded.items()}


def folders(several: list[runs.Run]) -> list[str]:
    return [str(run.folder) for run in several]


@pytest.fixture(scope="module")
def drawn(several: list[runs.Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    out = tmp_path_factory.mktemp("drawn")
    page = write_map_page(folders(several), str(out), guide="digits", images=IMAGES, classes=CLASSES)
    return out, read_json(open_files(out), "figures/map.json") or {}, Path(page).read_text()


def test_every_point_is_made_again_from_the_runs(several: list[runs.Run], drawn: tuple[Path, dict, str]) -> None:
    out, found, _ = drawn
    names = ["real", *(run.facts["name"] for run in several)]
    known = features_of(several)
    f_ND = np.stack([known[f"{names[one['run'] - REAL]} {one['name']}"] for one in found["points"]])
    places = PCA(2, svd_solver="full").fit_transform(f_ND.astype(np.float64))

    assert np.allclose(places, [one["pca"] for one in found["points"]], atol=2e-3)
    assert len(found["classes"]) == CLASSES
    for number in (REAL, 0, 1):
        of_run = [one["label"] for one in found["points"] if one["run"] == number]
        assert sorted(map(of_run.count, set(of_run))) == [2 if number == REAL else IMAGES] * CLASSES
    stored = read_figure(open_files(out), "map-tsne")["points"]
    assert [[one["x"], one["y"]] for one in stored] == [one["tsne"] for one in found["points"]]


def test_the_page_shows_these_figures_and_an_altered_number_is_seen(drawn: tuple[Path, dict, str]) -> None:
    out, found, page = drawn

    for plane in ("pca", "tsne"):
        assert whole_figure(found, plane, "map").svg in page
        assert class_figure(found, plane, "map").svg in page
    assert "real images" in visible(page)
    file = out / "figures/map-pca.json"
    file.write_text(file.read_text().replace('"x": ', '"x": 1', 1))
    with pytest.raises(DamagedFile):
        read_figure(open_files(out), "map-pca")


def test_prototypes_are_projected_and_those_of_another_guide_are_said(several: list[runs.Run],
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    from rayexpand.evaluation import maps

    index, folder = several[0].plan.index, Path(several[0].folder).parent / "prototypes"
    known = features_of(several)
    f_ND, labels_N = np.stack([known[f"real {one}"] for one in index.seed_ids]), index.labels
    folder.mkdir(exist_ok=True)
    view_of = maps.view_run

    def with_artifacts(place: str) -> object:
        view = view_of(place)
        view.run["config"]["artifacts"] = {"prototypes": str(folder)}
        return view

    monkeypatch.setattr(maps, "view_run", with_artifacts)
    for guide_hash, shown in ((extractor_hash(ExtractorConfig(guide="digits")), True), ("another" * 9, False)):
        save_prototypes(fit_prototypes(f_ND, labels_N, 10, 1, guide_hash=guide_hash,
                                       class_keys=index.classes.key), folder / "prototypes.safetensors")
        found = feature_map(folders(several), guide="digits", images=IMAGES, classes=CLASSES)
        stars = {one["label"]: one["pca"] for one in found["points"] if one["kind"] == "class"}
        assert (len(stars) == CLASSES, not found["notes"]) == (shown, shown)
        for label, place in stars.items():
            real = [one["pca"] for one in found["points"] if one["kind"] == "real" and one["label"] == label]
            assert np.allclose(np.mean(real, axis=0), place, atol=1e-3), "a projection is linear"


def test_what_is_wrong_is_said_before_a_model_is_loaded(several: list[runs.Run], monkeypatch: pytest.MonkeyPatch
                                                        ) -> None:
    monkeypatch.setattr("rayexpand.evaluation.features.load_extractor", None)
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*images: 60,000 points.*guide: .*nowhere"):
        feature_map(folders(several)[:1] * 2, guide="/nowhere", images=2000)
    with pytest.raises(UsageError, match="too few for a plane"):
        project(np.zeros((3, 5)), np.zeros((0, 5)))


def test_failures_are_the_lowest_probabilities_of_the_guide(several: list[runs.Run]) -> None:
    run = several[0]
    page = Path(write_failures_page(str(run.folder), rows=3, guide="digits", images=400)).read_text()
    found = read_json(run.files, "figures/failures.json") or {}
    guide = load_guide("digits", None, run.plan.index.classes.asked)
    rows = [row for receipt in run.store.receipts() for row in run.store.data(receipt).to_pylist()]
    _, logits_NK = guide.seen([decode(row["image"]["bytes"])[0] for row in rows])
    p_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
    own = dict(zip([row["sample_id"] for row in rows],
                   (p_NK / p_NK.sum(1, keepdims=True))[np.arange(len(rows)), [row["label"] for row in rows]],
                   strict=True))

    assert len(found["judged"]) == len(rows) == 40
    assert [one["sample_id"] for one in found["judged"][:3]] == sorted(own, key=lambda name: own[name])[:3]
    assert [one["probability"] for one in found["judged"]] == pytest.approx(sorted(own.values()), abs=1e-4)
    assert sum(read_figure(run.files, "failures-probabilities")["samples"]) == 40
    assert all(one["sample_id"] in page for one in found["judged"][:3])
    assert found["judged"][3]["sample_id"] not in page
