"""What every metric states beside its value: floors, counts, names, and classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayexpand.contract.errors import UsageError
from rayexpand.evaluation.distance import fd, kd, median_distance
from rayexpand.evaluation.extraction import Found, Sums
from rayexpand.evaluation.measure import METRICS, measure
from rayexpand.evaluation.moments import Moments
from rayexpand.evaluation.neighbours import COVERAGE_K
from tests.evaluation.test_distance import normals

TWO_SIDED = [name for name in METRICS if name not in ("cover", "alignment", "class_energy", "kid")]


def of(x_ND: np.ndarray, classes: Any = None, half_M: np.ndarray | None = None, sums: Sums | None = None,
       rows: int | None = None) -> Found:
    return Found(x_ND, 0, 16, None if classes is None else np.asarray(classes, object), half_M, sums, rows)


def by_model(statistic: str) -> str:
    return f"{statistic}_net"


def test_every_result_states_what_it_depends_on() -> None:
    found = measure(TWO_SIDED, of(normals(60, 5)), of(normals(60, 5, 1)), key=by_model)["scores"]

    assert set(found) == {
        "fd_net", "fd_net_infinity", "kd_net", "mmd2_linear_biased_net", "mmd2_rbf_median_unbiased_net",
        "mmd2_rbf10_net", "precision_k3", "recall_k3", "density_k5", "coverage_k5", "authenticity", "vendi"}
    assert all(np.isfinite(one["value"]) for one in found.values())
    assert found["mmd2_rbf_median_unbiased_net"]["sigma"] == median_distance(normals(60, 5, 1))
    assert found["kd_net"]["subset_rows"] == 60
    assert all((one["n_samples"], one["n_reference"]) == (60, 60) for one in found.values())
    distances = [one for name, one in found.items() if name.endswith("_net")]
    assert all(one["floor_images"] == 30 and np.isfinite(one["floor"]) for one in distances)


def test_the_floor_is_the_statistic_between_halves_of_the_reference() -> None:
    """Of as many images as there are samples, where the reference has twice as many."""
    x, y = normals(20, 4), normals(50, 4, 1)
    known: dict[Any, Any] = {}
    found = measure(["fd", "kd"], of(x), of(y), known=known)["scores"]

    assert found["fd"]["floor_images"] == 20
    assert found["fd"]["value"] == pytest.approx(fd(x, y))
    assert 0 < found["fd"]["floor"] < 2
    assert measure(["fd"], of(normals(20, 4, 9)), of(y), known={("fd", 20): {"floor": 7.0, "floor_images": 20}})[
        "scores"]["fd"]["floor"] == 7.0
    first, second = y[1::2], y[::2]
    half_M = np.where(np.arange(50) % 2, 1, 2).astype(np.int8)
    by_half = measure(["fd", "kd"], of(normals(60, 4)), of(y, half_M=half_M))["scores"]
    assert by_half["fd"]["floor"] == pytest.approx(fd(first, second))
    assert by_half["kd"]["floor"] == pytest.approx(kd(first, second)[0])
    assert measure(["kd"], of(x), of(normals(3, 4)))["scores"]["kd"]["floor"] is None


def test_a_frechet_distance_of_sums_needs_no_rows() -> None:
    """1000 images of which 10 rows came: value and floor are of all."""
    x, y = normals(1000, 4), 0.1 + normals(900, 4, 1)
    empty = Moments.of(x[:0])
    sums = Sums(empty, Moments.of(y[:450]), Moments.of(y[450:]))
    half_M = np.array([1] * 5 + [2] * 5, np.int8)
    found = measure(["fd"], of(x[:10], sums=Sums(Moments.of(x), empty, empty), rows=1000),
                    of(np.concatenate([y[:5], y[450:455]]), half_M=half_M, sums=sums, rows=900))

    assert (found["n_samples"], found["n_reference"]) == (1000, 900)
    assert found["scores"]["fd"]["value"] == pytest.approx(fd(x, y))
    assert found["scores"]["fd"]["floor"] == pytest.approx(fd(y[:450], y[450:]))
    assert found["scores"]["fd"]["floor_images"] == 450


def test_what_is_not_to_be_trusted_is_said() -> None:
    few = measure(["fd"], of(normals(8, 8)), of(normals(8, 8, 1)))["warnings"]
    assert "most of a Frechet distance is then its bias" in few[-1]
    assert measure(["fd"], of(normals(9, 8)), of(normals(18, 8, 1)))["warnings"] == [
        "9 samples against 18 reference images: these values, Frechet distances above all, compare only with values at "
        "the same two numbers; set `images` to take as many of both"]
    assert measure(["precision_recall"], of(normals(8, 8)), of(normals(8, 8, 1)))["warnings"] == []
    with pytest.raises(UsageError, match="nearest neighbour number 3"):
        measure(["precision_recall"], of(normals(3, 3)), of(normals(3, 3)))


def test_a_known_name_wants_the_published_subsets() -> None:
    with pytest.raises(UsageError, match="60 images are fewer than the 1000"):
        measure(["kid"], of(normals(60, 3)), of(normals(60, 3, 1)))
    found = measure(["kd"], of(normals(60, 3)), of(normals(60, 3, 1)), key=lambda statistic: "kid")
    assert set(found["scores"]) == {"kd_inception2015"}


def test_vendi_at_the_same_number_and_of_classes() -> None:
    """Each class of the samples is one image repeated, so the mean over classes is 1."""
    real = normals(40, 30, 1)
    samples, classes = np.repeat(normals(2, 30), 10, axis=0), ["a"] * 10 + ["b"] * 10
    found = measure(["vendi"], of(samples, classes), of(real, ["a", "b"] * 20))["scores"]

    assert found["vendi"]["value"] == pytest.approx(2, abs=0.1)
    assert 10 < found["vendi"]["reference"] <= found["vendi"]["at_most"] == 20
    assert found["vendi_class_mean"]["value"] == pytest.approx(1)
    assert found["vendi_class_mean"]["reference"] > 5


def test_the_worst_classes_come_first() -> None:
    """Samples of `near` are drawn as the real ones, those of `far` elsewhere; `rare` has too few real images."""
    classes = ["near"] * 30 + ["far"] * 30 + ["rare"] * 4
    real, samples = normals(64, 3), normals(64, 3, 1)
    samples[30:60] += 50
    table = measure(["classes"], of(samples, classes), of(real, classes))["classes"]

    assert [line["class"] for line in table["worst"]] == ["far", "near"]
    assert (table["compared"], table["left_out"], table["k"]) == (2, 1, COVERAGE_K)
    far, near = table["worst"]
    assert (far["coverage"], far["images"], far["centres"]) == (0, 15, 15)
    assert near["coverage"] > 0.5 < near["real"]
    assert near["generated_minus_real"] == pytest.approx(near["coverage"] - near["real"])
    other = measure(["classes"], of(samples, classes), of(real, ["other"] * 64))
    assert "classes" not in other
    assert "no class of the same key" in other["warnings"][-1]


def test_class_energy_is_the_distance_to_the_mean_of_the_class() -> None:
    x_ND, y_MD = np.array([[0.0, 0], [3, 4], [1, 1]]), np.array([[0.0, 0], [0, 0], [2, 2], [0, 0], [9, 9]])
    found = measure(["class_energy"], of(x_ND, ["a", "a", "b"]), of(y_MD, ["a", "a", "b", "b", "c"]), key=by_model)
    one = found["scores"]["class_energy_net"]

    assert one["value"] == pytest.approx((0 + 5 + 0) / 3)
    assert one["reference"] == pytest.approx((0 + 0 + 2 * 8 ** 0.5) / 4), "each left out of the mean of its class"
    assert (one["classes"], one["n_samples"]) == (2, 3)
    with pytest.raises(UsageError, match="no class of the same key"):
        measure(["class_energy"], of(x_ND), of(y_MD), key=by_model)


def test_cover_says_what_the_samples_add() -> None:
    """Held out {0, 1, 2, 10}; training {0, 2}; a sample at 9."""
    held, training, samples = (np.array(one, float)[:, None] for one in ([0, 1, 2, 10], [0, 2], [9, 9]))
    found = measure(["cover"], of(samples), of(held), training=of(training))["scores"]

    assert (found["cover_delta"]["training_alone"], found["cover_delta"]["value"]) == (8, 1)
    assert (found["cover_mean"]["training_alone"], found["cover_mean"]["value"]) == (2.25, 0.5)
    assert found["cover_div"]["n_training"] == 2


def test_alignment_stands_beside_that_of_real_images() -> None:
    texts = {"cat": np.array([1.0, 0]), "dog": np.array([0, 1.0])}
    samples, real = of(np.array([[2.0, 0], [0, 3]]), ["cat", "cat"]), of(np.eye(2), ["cat", "dog"])
    found = measure(["alignment"], samples, real, texts=texts)["scores"]

    assert (found["clip_top1"]["value"], found["clip_top1"]["reference"]) == (0.5, 1.0)
    assert (found["clip_score"]["value"], found["clip_s"]["value"]) == (50.0, 1.25)
    assert found["clip_score"]["text"] == "a photo of a {name}"
    with pytest.raises(UsageError, match="no class that the guide was asked about"):
        measure(["alignment"], of(np.eye(2), ["x", "y"]), real, texts=texts)


def test_training_images_among_the_reference_of_cover_are_said() -> None:
    real, training = normals(12, 4, 1), normals(5, 4, 2)
    held_out = measure(["cover"], of(normals(6, 4, 3)), of(real), training=of(training))
    shared = measure(["cover"], of(normals(6, 4, 3)), of(np.concatenate([real, training[:2]])),
                     training=of(training))

    assert not any(line.startswith("cover: ") for line in held_out["warnings"])
    assert "cover: 2 of 14 reference images have the very features of a training image" in "\n".join(shared["warnings"])
    assert "cover_same" not in shared["scores"]
