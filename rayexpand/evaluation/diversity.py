"""How different images are among themselves, and whether they show what their label says.

    paper   here      meaning, unit
    X       x_ND      features of N images, rows of unit length
    w       w         eigenvalues of X^T X / N; they sum to 1
    VS      vendi     exp(-sum w ln w): as many images that share nothing are as different (Friedman and Dieng 2023)
    c       c_N       features of the text of each image's class, unit length; cos = x.c
"""

from __future__ import annotations

import numpy as np

from rayexpand.evaluation.distance import unit

CLIP_SCORE, CLIP_S = 100.0, 2.5  # Hessel et al. 2021, section 3: w = 2.5; torchmetrics' scale: 100


def vendi(x_ND: np.ndarray) -> float:
    """Between 1 (all the same) and min(N, D), of rows of any length. Raises UsageError for a row that is 0."""
    x_ND = unit(np.asarray(x_ND, np.float64))
    gram = x_ND @ x_ND.T if len(x_ND) < x_ND.shape[1] else x_ND.T @ x_ND
    w = np.linalg.eigvalsh(gram / len(x_ND))
    w = w[w > 0]
    return float(np.exp(-(w * np.log(w)).sum()))


def alignment(x_ND: np.ndarray, labels_N: np.ndarray, texts_KD: np.ndarray) -> dict[str, float]:
    """`clip_score` and `clip_s`: means of 100 max(cos, 0) and 2.5 max(cos, 0) of images and the text of their class;
    `clip_top1`: share of images whose nearest text is that of their class."""
    cos_NK = unit(np.asarray(x_ND, np.float64)) @ unit(np.asarray(texts_KD, np.float64)).T
    near = float(np.maximum(cos_NK[np.arange(len(cos_NK)), labels_N], 0).mean())
    return {"clip_score": CLIP_SCORE * near, "clip_s": CLIP_S * near,
            "clip_top1": float((cos_NK.argmax(axis=1) == labels_N).mean())}
