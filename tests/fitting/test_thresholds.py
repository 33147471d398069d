"""Thresholds: closed forms against brute force, sums of parts, and `fit` around them. Oracles of DiffCoRe-Mix."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.artifacts.thresholds import LEVELS, read_thresholds
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.fitting.config import parse_fit
from rayexpand.fitting.fit import fit, fit_for, with_artifacts
from rayexpand.fitting.guide import GuideFit
from rayexpand.fitting.thresholds import Pairs, drawn_pairs, pair_statistics, thresholds_of, to_the_others
from rayexpand.models.guides import guide_hash, load_guide
from rayexpand.models.scores import cosine, unit
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from tests.fitting.test_class_features import KEYS, encoded, quiet

THREE = np.array([[1, 0], [0.6, 0.8], [0, 1]])  # a, b, c


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def brute(units_ND: np.ndarray) -> np.ndarray:
    return np.array([float(a @ b) for a, b in itertools.combinations(units_ND, 2)])


def test_the_mean_over_pairs_of_three_vectors() -> None:
    """S_ab = 0.6, S_bc = 0.8, S_ac = 0."""
    assert cosine(THREE[[0, 1, 0]], THREE[[1, 2, 2]]).tolist() == pytest.approx([0.6, 0.8, 0.0])
    found = Pairs.of(THREE)
    m = THREE.mean(axis=0)
    assert m @ m == pytest.approx(0.644444, abs=1e-6)
    assert found.mean == pytest.approx(0.466667, abs=1e-6)
    assert found.mean == pytest.approx((3 * (m @ m) - 1) / 2)
    wrong = {"ordered pairs over unordered ones": 2 * brute(THREE).sum() / 3, "with itself": m @ m,
             "to the mean": float(cosine(THREE, np.tile(m, (3, 1))).mean())}
    assert wrong["ordered pairs over unordered ones"] == pytest.approx(0.933333, abs=1e-6)
    assert wrong["to the mean"] == pytest.approx(0.802773, abs=1e-6)
    assert all(abs(one - found.mean) > 0.1 for one in wrong.values())


@pytest.mark.parametrize("count", [2, 3, 7, 20, 50])
def test_closed_forms_are_brute_force(count: int) -> None:
    units_ND = unit(rng().standard_normal((count, 16)) + 0.5)
    pairs = brute(units_ND)
    mean, deviation, quantiles = pair_statistics(units_ND, rng())
    assert mean == pytest.approx(pairs.mean(), abs=1e-6)
    assert deviation == pytest.approx(pairs.std(), abs=1e-6)
    assert quantiles == pytest.approx(np.quantile(pairs, LEVELS), abs=1e-9)
    others = [float(cosine(units_ND[i:i + 1], np.delete(units_ND, i, axis=0).mean(axis=0)[None])[0])
              for i in range(count)]
    assert to_the_others(units_ND).tolist() == pytest.approx(others, abs=1e-9)


def test_lengths_do_not_count() -> None:
    assert Pairs.of(unit(THREE * [[2], [5], [1]])).mean == pytest.approx(0.466667, abs=1e-6)
    assert brute(THREE * [[2], [5], [1]]).mean() == pytest.approx(3.333, abs=1e-3), "products of vectors as they are"


def test_sums_of_parts_are_those_of_the_whole() -> None:
    units_ND = unit(rng().standard_normal((23, 8)))
    parts = Pairs.of(units_ND[:4]) + Pairs.of(units_ND[4:5]) + Pairs.of(units_ND[5:])
    whole = Pairs.of(units_ND)
    assert (parts.count, parts.mean, parts.deviation) == (23, pytest.approx(whole.mean), pytest.approx(whole.deviation))


def test_few_and_equal_images() -> None:
    pair = unit(rng().standard_normal((2, 8)))
    assert Pairs.of(pair).mean == pytest.approx(float(pair[0] @ pair[1]))
    mean, deviation, _ = pair_statistics(np.tile(pair[:1], (5, 1)), rng())
    assert (mean, deviation) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-6))
    assert np.isnan(pair_statistics(pair[:1], rng())[0])


def test_quantiles_of_a_large_class_are_those_of_drawn_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayexpand.fitting.thresholds.MOST", 200)
    units_ND = unit(rng().standard_normal((600, 4)))
    mean, deviation, quantiles = pair_statistics(units_ND, rng())
    assert (mean, deviation) == (pytest.approx(brute(units_ND).mean()), pytest.approx(brute(units_ND).std()))
    assert np.abs(quantiles - np.quantile(brute(units_ND), LEVELS))[5:-5].max() < 0.05


@pytest.mark.parametrize(("count", "z"), [(2, 1), (3, 2), (5, 10), (40, 7), (40, 780)])
def test_drawn_pairs_differ_and_have_no_image_twice(count: int, z: int) -> None:
    i, j = drawn_pairs(count, z, rng())
    assert (i < j).all()
    assert (i.min() >= 0, j.max() < count) == (True, True)
    assert len({*zip(i.tolist(), j.tolist(), strict=True)}) == z
    assert z < count * (count - 1) // 2 or sorted(zip(i, j, strict=True)) == [*itertools.combinations(range(count), 2)]


def test_the_mean_over_drawn_pairs_has_no_bias_and_that_of_all_pairs_is_exact() -> None:
    units_ND = unit(rng().standard_normal((12, 4)) + 0.5)
    pairs = brute(units_ND)
    for z in (66, 1000):
        assert pair_statistics(units_ND, rng(), z)[:2] == pytest.approx((pairs.mean(), pairs.std()))
    means = np.array([pair_statistics(units_ND, np.random.default_rng(seed), 8)[0] for seed in range(1000)])
    assert abs(means.mean() - pairs.mean()) < 3 * means.std() / 1000**0.5
    assert means.std() > 0.01


class Head:
    """A guide that is no CLIP."""

    device = "cpu"

    def head(self, h_BD: Any) -> Any:
        return h_BD[:, :2]


def test_a_class_of_one_image_has_the_numbers_of_the_others() -> None:
    classes = [THREE.astype(np.float32), np.array([[3, 4]], np.float32)]
    made, alone = thresholds_of(iter(classes), Head(), ("a", "b"))
    assert alone == [1]
    for name in ("seed", "class"):
        assert made.of[name].mean_K[1] == made.of[name].mean_K[0]
        assert made.of[name].quantiles_KQ[1].tolist() == made.of[name].quantiles_KQ[0].tolist()
    assert made.above("seed") == pytest.approx([0.466667] * 2, abs=1e-6)
    assert made.above("seed", deviations=1)[0] == pytest.approx(0.466667 - brute(THREE).std(), abs=1e-6)
    assert made.above("seed", quantile=0.5) == pytest.approx([0.6] * 2)
    assert made.unit_KD[1].tolist() == pytest.approx([0.6, 0.8])
    p = 1 / (1 + np.exp(-(4 - 3)))
    assert made.above("confidence")[1] == pytest.approx(p)
    with pytest.raises(UsageError, match="no class has two images"):
        thresholds_of(iter(classes[1:]), Head(), ("b",))


# ------------------------------------------------------------------------------------------------------------------ fit


@pytest.fixture
def raw(image_folder: Path, tmp_path: Path, judge_folder: Path) -> dict[str, Any]:
    return {"name": "ants", "out": str(tmp_path / "artifacts"), "guide": {"weights": str(judge_folder)},
            "device": "cpu", "data": {"source": "imagefolder", "path": str(image_folder)}}


def test_fit_makes_thresholds_of_the_guide(raw: dict[str, Any], judge_folder: Path, image_folder: Path) -> None:
    made = fit(parse_fit({**raw, "fit": {"kind": "thresholds", "batch": 7}}), quiet)["thresholds"]
    found = read_thresholds(made, KEYS)
    f_ND = encoded(judge_folder, image_folder).reshape(4, 5, 16)
    guide = load_guide(str(judge_folder), None, KEYS, device="cpu")

    for label in range(4):
        units = unit(f_ND[label])
        assert found.above("seed")[label] == pytest.approx(brute(units).mean(), abs=1e-5)
        assert found.unit_KD[label] == pytest.approx(units.mean(axis=0), abs=1e-5)
        text = np.asarray(guide.texts([f"a photo of a {KEYS[label]}"]))
        assert found.above("prompt")[label] == pytest.approx(float((units @ text[0]).mean()), abs=1e-5)
        logits = np.asarray(guide.scale * units @ np.asarray(guide.texts_KD).T)
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert found.above("confidence")[label] == pytest.approx(p[:, label].mean(), abs=1e-5)
    assert fit(parse_fit({**raw, "seed": 5, "fit": {"kind": "thresholds", "batch": 7}}), quiet)["thresholds"] == made
    drawn = fit(parse_fit({**raw, "fit": {"kind": "thresholds", "batch": 7, "pairs": 3}}), quiet)["thresholds"]
    assert (read_thresholds(drawn, KEYS).above("seed") != found.above("seed")).all()
    assert (read_thresholds(drawn, KEYS).above("class") == found.above("class")).all()
    assert {file.name for file in made.iterdir()} == {"thresholds.safetensors", "thresholds.json", "artifact.json"}


@pytest.mark.parametrize(("accept", "roles"), [
    ({}, ["image_features", "thresholds"]), ({"above": 0.6}, ["image_features"]), ({"to": "class"}, ["thresholds"])])
def test_what_the_judge_of_a_run_needs_is_made_by_its_guide(raw: dict[str, Any], judge_folder: Path, tmp_path: Path,
                                                           accept: dict[str, Any], roles: list[str]) -> None:
    config = parse({"name": "run", "out": str(tmp_path / "out"), "data": raw["data"], "prior": {"device": "cpu"},
                    "method": {"name": "classical", "ratio": 2}, "sampler": {"batch": 8},
                    "accept": {"guide": raw["guide"], **accept}})
    made = fit_for(config, quiet, GuideFit(), out=raw["out"])
    assert list(made) == roles
    run = runs.prepare(with_artifacts(config, made))
    assert run.facts["models"]["judge"] == guide_hash(str(judge_folder), None)
    receipt = runs.start(run)(0)
    assert receipt.kept + receipt.rejected == 40


def test_a_method_and_its_judge_may_have_two_guides(raw: dict[str, Any], tmp_path: Path) -> None:
    from tests.tiny import tiny_clip

    other = tiny_clip(tmp_path / "other", seed=1)
    config = parse({"name": "run", "data": raw["data"], "guide": raw["guide"], "method": {"name": "distdiff"},
                    "accept": {"guide": {"weights": str(other)}, "to": "class"}, "prior": {"device": "cpu"}})
    made = fit_for(config, quiet, out=raw["out"])
    from rayexpand.artifacts.store import read_facts

    hashes = {role: read_facts(folder)["made_from"]["guide_sha256"] for role, folder in made.items()}
    assert hashes == {"prototypes": guide_hash(raw["guide"]["weights"], None),
                      "thresholds": guide_hash(str(other), None)}


def test_a_classifier_gives_thresholds_and_features_to_compare_with(raw: dict[str, Any]) -> None:
    random = {"kind": "random", "recipe": {"backbone_args": {"width": 4}}}
    guide = fit(parse_fit({**raw, "fit": random}), quiet)["guide"]
    own = {"guide": {"weights": str(guide)}}
    made = fit(parse_fit({**raw, "fit": {"thresholds": own, "image_features": own}}), quiet)
    assert set(read_thresholds(made["thresholds"], KEYS).of) == {"seed", "class", "confidence"}
    with pytest.raises(ConfigError, match="image_features need the image tower"):
        fit(parse_fit({**raw, "guide": own["guide"], "fit": {"image_features": {}}}), quiet)
    with pytest.raises(ConfigError, match=r"fit\.thresholds\.guide\.weights: .*gone"):
        fit(parse_fit({**raw, "fit": {"thresholds": {"guide": {"weights": "./gone"}}}}), quiet)
