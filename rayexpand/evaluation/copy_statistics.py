"""When a similarity counts as a copy, and what the counts of a run say: numpy and exact binomial intervals.

    here        meaning, unit
    s           similarity of an image to the seed nearest to it, in [-1, 1]
    null        s of held-out real images, which are no copies of the seeds
    tau         the 99.9 % quantile of the null: one image in a thousand lies above it and is no copy
    tau_copy    the 5 % quantile of s of JPEG and cropped copies of seeds, at least tau
    candidate   s above tau; copy: s above tau_copy
    excess      share of candidates less the 0.1 % that real images have

Thresholds follow from the data and are part of the result. An extractor that does not find image-to-image copies of
strength 0.1 above tau cannot see copies, and then no share of copies is known.
"""

# N images

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

NULL_QUANTILE = 0.999
LEAST_NULL = 1000  # held-out images, so that one of them lies above the quantile
COPY_QUANTILE = 0.05
LEAST_FOUND = 0.9  # share of the faintest known copies that an extractor must find
CONFIDENCE = 0.95
STRONG = ("jpeg_75", "crop_80")  # known copies that decide what is called a copy
FAINT = "img2img_0.1"  # known copies that an extractor must see


def threshold(null_N: np.ndarray) -> float:
    """tau."""
    return float(np.quantile(null_N, NULL_QUANTILE))


def copy_threshold(known: Mapping[str, np.ndarray], tau: float) -> float:
    """tau_copy."""
    return max(tau, float(np.quantile(np.concatenate([known[kind] for kind in STRONG]), COPY_QUANTILE)))


def found_shares(known: Mapping[str, np.ndarray], tau: float) -> dict[str, float]:
    """Share of the known copies of each kind above tau."""
    return {kind: float((s_N > tau).mean()) for kind, s_N in known.items()}


def cannot_see(found: Mapping[str, float]) -> str:
    """Why nothing is said of copies, in words; "" where the extractor sees them. `found`: share by kind of copy. Where
    a run has no generator that starts from images, JPEG and crops must be found."""
    must = [FAINT] if FAINT in found else [*STRONG]
    missed = [kind for kind in must if found[kind] < LEAST_FOUND]
    if not missed:
        return ""
    shares = ", ".join(f"{100 * found[kind]:.0f} % of the known copies {kind}" for kind in missed)
    return (f"this extractor cannot see copies here: it finds {shares}, and at least {100 * LEAST_FOUND:.0f} % are "
            "needed. No share of copies is given; take another extractor, or `centre: true`")


def exact_interval(count: int, total: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a share at 95 %."""
    from scipy.stats import binomtest

    found = binomtest(count, total).proportion_ci(CONFIDENCE, method="exact")
    return float(found.low), float(found.high)


def excess(above: int, total: int) -> dict[str, Any]:
    """Candidates observed and expected, and the excess of their share over the null with its exact interval."""
    rate = 1 - NULL_QUANTILE
    low, high = exact_interval(above, total)
    return {"observed": above, "expected": total * rate, "of": total,
            "excess": {"value": above / total - rate, "low": low - rate, "high": high - rate}}


def judged_by(scope: str, tau: Mapping[str, float]) -> str:
    """The scope whose thresholds hold: own seeds have those of their class, where these are known."""
    return scope if scope != "own" else "class" if "class" in tau else "all"


def least_samples(allowed: float) -> int:
    """Samples of which none may lie above tau, so that the excess is known to be below `allowed`."""
    return math.ceil(math.log((1 - CONFIDENCE) / 2) / math.log(1 - (1 - NULL_QUANTILE) - allowed))


def scope_counts(s_N: np.ndarray, scope: str, tau: Mapping[str, float], tau_copy: Mapping[str, float]
                 ) -> dict[str, Any]:
    """Copies and candidates of one scope, and where it is no own seed the excess."""
    by, known_N = judged_by(scope, tau), s_N[~np.isnan(s_N)]
    above, copies = int((known_N > tau[by]).sum()), int((known_N > tau_copy[by]).sum())
    found = {"of": len(s_N), "copies": copies, "share": copies / max(len(s_N), 1), "candidates": above - copies}
    return found if scope == "own" else {**found, "null": excess(above, max(len(known_N), 1))}
