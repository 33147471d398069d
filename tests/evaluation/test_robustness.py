"""Scores on corrupted images, with the numbers of the specification and of GIF's table 2."""

from __future__ import annotations

import numpy as np
import pytest

from rayexpand.data.corruptions.tables import COMMON, SEVERITIES
from rayexpand.evaluation.robustness import ALEXNET, CIFAR_C, IMAGENET_C, corruption_scores, mean_corruption_error


@pytest.mark.parametrize(("error", "percent"), [(dict(ALEXNET), 100), (dict.fromkeys(COMMON, 0.5), 64.672573),
                                                (dict.fromkeys(COMMON, 0.0), 0)])
def test_mean_corruption_error(error: dict[str, float], percent: float) -> None:
    assert 100 * mean_corruption_error(error) == pytest.approx(percent, abs=1e-6)


def test_the_mean_error_of_alexnet() -> None:
    assert np.mean(list(ALEXNET.values())) == pytest.approx(0.788993, abs=1e-6)
    assert list(ALEXNET) == list(COMMON)


def flat(top1: float = 0.5) -> dict[tuple[str, int], float]:
    return {(kind, severity): top1 for kind in COMMON for severity in SEVERITIES}


def test_errors_are_means_over_severities_and_types() -> None:
    top1 = flat() | {("fog", severity): value for severity, value in zip(SEVERITIES, (.9, .8, .6, .4, .3), strict=True)}
    found = corruption_scores(top1, IMAGENET_C)

    assert found["error"]["fog"] == pytest.approx(0.4)
    assert found["error"]["snow"] == 0.5
    assert found["mean_error"] == pytest.approx((14 * 0.5 + 0.4) / 15)
    assert found["mean"] == pytest.approx(1 - found["mean_error"])
    assert found["by_severity"]["1"] == pytest.approx((14 * 0.5 + 0.9) / 15)
    assert found["by_group"] == pytest.approx({"noise": .5, "blur": .5, "weather": (3 * .5 + .6) / 4, "digital": .5})
    assert found["top1"]["fog"] == {"1": .9, "2": .8, "3": .6, "4": .4, "5": .3}
    assert list(found["error"]) == list(COMMON), "in the order of the benchmark"


def test_mce_is_of_all_published_files_of_imagenet_c_alone() -> None:
    some = {cell: value for cell, value in flat().items() if cell[0] != "frost"}
    three = {cell: value for cell, value in flat().items() if cell[1] == 3}

    assert 100 * corruption_scores(flat(), IMAGENET_C)["mce"] == pytest.approx(64.672573, abs=1e-6)
    for top1, name in ((flat(), "corrupted-v1"), (flat(), CIFAR_C), (some, IMAGENET_C), (three, IMAGENET_C)):
        assert "mce" not in corruption_scores(top1, name)
    for part in ((50_000, 100), (6, 1_000)):
        assert "mce" not in corruption_scores(flat(), IMAGENET_C, part), "AlexNet's errors are of all"


@pytest.mark.parametrize(("columns", "mean"), [
    ((12.8, 17.0, 12.5, 30.5, 31.7, 25.2, 28.6, 26.5, 19.0, 18.6, 28.3, 11.5, 29.5, 33.6, 28.8), 23.6),
    ((16.7, 21.9, 27.5, 42.2, 42.5, 35.8, 40.2, 36.9, 31.9, 30.0, 43.1, 20.4, 41.2, 44.7, 37.6), 34.2),
    ((29.7, 36.4, 32.7, 51.9, 32.4, 39.2, 46.0, 45.3, 38.1, 47.1, 55.7, 37.3, 48.6, 53.2, 49.4), 42.9),  # printed: 43.3
    ((31.8, 39.2, 34.7, 58.4, 33.4, 43.1, 51.9, 51.7, 47.4, 55.0, 63.3, 46.5, 54.9, 58.0, 53.6), 48.2)])
def test_averages_of_gif_follow_from_its_columns(columns: tuple[float, ...], mean: float) -> None:
    """GIF, table 2, severity 3. The third row's printed average does not follow from its columns; the text's gain of
    19.3 does."""
    top1 = {(kind, 3): value / 100 for kind, value in zip(COMMON, columns, strict=True)}

    assert round(100 * corruption_scores(top1, CIFAR_C)["mean"], 1) == mean
