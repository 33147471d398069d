"""What the scores of a membership attack say: rates with intervals, the permuted control, the planted image, in words.

    here        meaning
    line        an attack, or the same attack on classifiers that hide nothing (`private`)
    null        memberships drawn anew, which mean nothing: an AUC of 0.5
    planted     one image that its shadows list many times, and that must be found
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rayexpand.evaluation.membership import Variance, lira
from rayexpand.evaluation.roc import exact_interval, measured

FOUND_AT = 0.01  # FPR at which the planted image is looked for
LIMITS = ("This tests an attack and proves nothing: a stronger attack may see more.",
          "The images that the public generator itself was trained on are not audited.",
          "It is not differential privacy, and no bound follows from it.")


def judged(phi_SNQ: np.ndarray, member_SN: np.ndarray, null_SN: np.ndarray, planted: int, *, variance: Variance,
           reference: bool, seed: int) -> dict[str, Any]:
    """What LiRA finds in `phi_SNQ`, float (S, N, Q), of all images but number `planted`, which is looked for apart.

    `online` is the attack; `offline` uses shadows without the image alone, `threshold` one threshold of phi for all
    images, and `null` is `online` with the memberships `null_SN`.
    """
    shadows, images = member_SN.shape
    plain_N = np.arange(images) != planted
    example = np.tile(np.arange(images - 1), (shadows, 1))

    def rates(score_SN: np.ndarray, of_SN: np.ndarray) -> dict[str, Any]:
        return measured(score_SN[:, plain_N].ravel(), of_SN[:, plain_N].ravel(), example.ravel(), seed)

    settings: dict[str, Any] = {"variance": variance, "reference": reference}
    online_SN = lira(phi_SNQ, member_SN, **settings)
    return {
        **rates(online_SN, member_SN),
        "offline": rates(lira(phi_SNQ, member_SN, online=False, **settings), member_SN),
        "threshold": rates(phi_SNQ.mean(axis=2), member_SN),
        "null": rates(lira(phi_SNQ, null_SN, **settings), null_SN),
        "planted": _planted(online_SN, member_SN, planted)}


def _planted(score_SN: np.ndarray, member_SN: np.ndarray, planted: int) -> dict[str, Any]:
    """In how many of its shadows the planted image is found: at most FOUND_AT of the other images' non-member scores
    reach its own. `found`: in more than chance explains (exact interval)."""
    others_SN = np.delete(score_SN, planted, axis=1)[~np.delete(member_SN, planted, axis=1)]
    fpr_S = (others_SN[None] >= score_SN[:, planted, None]).mean(axis=1)
    is_in_S = member_SN[:, planted]
    hits, shadows = int((fpr_S[is_in_S] <= FOUND_AT).sum()), int(is_in_S.sum())
    return {"found": exact_interval(hits, shadows)[0] > FOUND_AT, "hits": hits, "shadows": shadows, "fpr": FOUND_AT,
            "alarms": int((fpr_S[~is_in_S] <= FOUND_AT).sum())}


def worse(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """The line that finds more, by the lower bound of TPR at FPR 0.1 %, then by AUC: a set is as private as it says."""
    return max(lines, key=lambda name: (lines[name]["tpr_at_fpr_001"]["low"], lines[name]["auc"]["value"]))


def said(lines: Mapping[str, Mapping[str, Any]], repeats: int) -> list[str]:
    """What each line found, in sentences."""
    found = []
    for name, one in lines.items():
        auc, planted, null = one["auc"], one["planted"], one["null"]["auc"]
        shown = f"AUC {auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]"
        what = ("does not tell members from others" if auc["low"] <= 0.5 <= auc["high"] else
                "tells members from others better than chance" if auc["low"] > 0.5 else "ranks members below others")
        found.append(f"{name}: {shown}, so it {what}.")
        at = (f"{planted['hits']} of the {planted['shadows']} shadows that list one image {repeats} times, at FPR "
              f"{100 * planted['fpr']:g} %")
        found.append(f"{name}: finds the planted image in {at}." if planted["found"] else
                     f"{name}: cannot see it: finds the planted image in {at}, so what it does not find may be there.")
        if not null["low"] <= 0.5 <= null["high"]:
            found.append(f"{name}: permuted memberships give AUC {null['value']:.3f} [{null['low']:.3f}, "
                         f"{null['high']:.3f}] and not 0.5, so its numbers cannot be believed.")
    return found
