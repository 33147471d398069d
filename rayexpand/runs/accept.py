"""The judge of a run (section `accept`): a guide looks at the samples of a call and says which are not good enough.

    score         of a sample                                                                needs
    cosine        of its features and those of its seed image (DiffCoRe-Mix, section 3)      image_features
                  ... and the mean of unit features of its class                             thresholds
                  ... and the text of its prompt                                             CLIP
    confidence    softmax over the guide's classes, at the class of the sample, or `wanted`

A sample is accepted where its score is above its threshold: a number, or what real images of its class reach
(artifacts/thresholds.py). The judge adds scores and reasons, nothing else; `runs/expander.py` has what is refused drawn
again. It works on all slots of a call, fillers too, so that its numbers do not depend on which rows are there, and on
images as they are before they are encoded. They are brought to the guide's size as for features of seeds
(`fitting/features.py`, crop), for both are compared.
"""

# B rows, D features, K classes

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.contract.schema import Reason
from rayexpand.data.batches import resized
from rayexpand.data.pixels import to_uint8
from rayexpand.models.scores import confidence, cosine
from rayexpand.runs.config import Accept

SCORE, ABOVE = "accept_score", "accept_above"  # scores of a row: that of its last attempt, and its threshold
TRY = "accept_try_"  # and the number of a refused attempt: its score


def judge(accept: Accept, batch: Batch, made: Expansion, tools: Tools) -> Expansion:
    """`made` with the scores of all rows, and a reason for those that are not accepted."""
    pixels = [None if image is None else to_uint8(image) for image in made.images]
    score_B, above_B = _scores(accept, batch, pixels, tools), _thresholds(accept, batch, tools)
    reasons, details = list(made.reasons or [None] * len(batch)), list(made.details or [""] * len(batch))
    for i, (image, score, above) in enumerate(zip(pixels, score_B.tolist(), above_B.tolist(), strict=True)):
        if image is not None and reasons[i] is None and not score > above:
            reasons[i], details[i] = Reason.BELOW_THRESHOLD, f"{_words(accept)} {score:.4f} is not above {above:.4f}"
    return replace(made, reasons=reasons, details=details, scores={**made.scores, SCORE: score_B.tolist(),
                                                                   ABOVE: above_B.tolist()})


def _words(accept: Accept) -> str:
    if accept.score == "confidence":
        return f"confidence in {accept.wanted or 'its class'}"
    return f"cosine to {'the mean of its class' if accept.to == 'class' else f'its {accept.to}'}"


def _scores(accept: Accept, batch: Batch, pixels: list[np.ndarray | None], tools: Tools) -> np.ndarray:
    """float64 (B,), not a number for a row without an image."""
    guide, target_B = tools.judge, [draw.target_label for draw in batch.draws]
    blank = np.zeros((*guide.size, 3), np.uint8)
    h_BD, logits_BK = guide.seen([blank if image is None else resized(image, guide.size, "crop") for image in pixels])
    if accept.score == "confidence":
        label_B = np.array(target_B) if accept.wanted is None else np.full(
            len(batch), guide.classes.index(accept.wanted))
        score_B = confidence(logits_BK, label_B)
    else:
        score_B = cosine(h_BD, _compared(accept, batch, target_B, guide, tools))
    absent_B = np.array([image is None for image in pixels])
    assert np.isfinite(score_B[~absent_B]).all(), "the judge gives numbers that are not finite for a finite image"
    return np.where(absent_B, np.nan, score_B)


def _compared(accept: Accept, batch: Batch, target_B: list[int], guide: Any, tools: Tools) -> np.ndarray:
    """float (B, D): what the features of each row are compared with."""
    if accept.to == "seed":
        return np.asarray(tools.image_features.rows([draw.seed_id for draw in batch.draws]))
    if accept.to == "class":
        return np.asarray(tools.thresholds.unit_KD[target_B])
    return np.asarray(guide.texts([draw.prompt for draw in batch.draws]))


def _thresholds(accept: Accept, batch: Batch, tools: Tools) -> np.ndarray:
    """float64 (B,)."""
    if accept.above != "class":
        return np.full(len(batch), float(accept.above))
    above_K = tools.thresholds.above(accept.comparison, accept.deviations, accept.quantile)
    return np.asarray(above_K[[draw.target_label for draw in batch.draws]], np.float64)
