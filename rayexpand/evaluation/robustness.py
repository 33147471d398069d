"""Scores of a classifier on corrupted images.

    paper    here        meaning, unit
    E_s,c    1 - top1    error at severity s of corruption c, share
    E_c      error       mean over severities
    A_c      ALEXNET     the same of AlexNet on ImageNet-C
    mCE      mce         mean_c E_c / A_c, printed in percent; of all published files alone

Hendrycks and Dietterich, ICLR 2019. Their CE_c divides sums over severities, which is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rayexpand.data.corruptions.tables import COMMON, GROUPS, SEVERITIES

IMAGENET_C, CIFAR_C = "ImageNet-C", "CIFAR-C"  # of published files only
WHOLE = (50_000, 1_000)  # images and classes of each type and severity, of which AlexNet's errors are

ALEXNET: Mapping[str, float] = dict(zip(COMMON, (
    .886428, .894468, .92264, .81988, .826268, .785948, .79836, .866816, .826572, .819324, .564592, .853204, .646056,
    .71784, .6065), strict=True))


def corruption_scores(top1: Mapping[tuple[str, int], float], name: str, of: tuple[int, int] = WHOLE
                      ) -> dict[str, Any]:
    """Of the share of right answers by type and severity: `top1` {type: {severity: share}}, `error` {type: E_c},
    `by_severity` {severity: mean top-1 over types}, `by_group` {noise | blur | weather | digital: mean top-1}, `mean`
    (top-1, mean over types), `mean_error`, and `mce` where `name` is ImageNet-C and all is there: every type and
    severity, `of` all images and classes. Severities are text, as JSON has them."""
    types = [kind for kind in COMMON if any(one == kind for one, _ in top1)]
    types += sorted({kind for kind, _ in top1} - set(types))
    severities = sorted({severity for _, severity in top1})
    table = np.array([[top1[kind, severity] for severity in severities] for kind in types])
    error = dict(zip(types, (1 - table).mean(axis=1).tolist(), strict=True))
    groups = {group: float(np.mean([1 - error[kind] for kind in names if kind in error]))
              for group, names in GROUPS.items() if any(kind in error for kind in names)}
    found: dict[str, Any] = {
        "top1": {kind: dict(zip(map(str, severities), line, strict=True)) for kind, line in zip(types, table.tolist(),
                                                                                                strict=True)},
        "error": error, "by_severity": dict(zip(map(str, severities), table.mean(axis=0).tolist(), strict=True)),
        "by_group": groups, "mean": float(table.mean()), "mean_error": float(np.mean(list(error.values())))}
    if name == IMAGENET_C and of == WHOLE and set(types) == set(COMMON) and tuple(severities) == SEVERITIES:
        found["mce"] = mean_corruption_error(error)
    return found


def mean_corruption_error(error: Mapping[str, float]) -> float:
    """mCE of E_c of all fifteen types; 1 is AlexNet's."""
    return float(np.mean([error[kind] / ALEXNET[kind] for kind in COMMON]))
