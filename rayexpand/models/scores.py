"""What a guide's numbers say of images: how sure it is of a class, how alike two features are. numpy, in float64, for
the judge of a run and for selections alike.
"""

# B rows, K classes, D features

from __future__ import annotations

import numpy as np


def log_probabilities(logits_BK: np.ndarray) -> np.ndarray:
    """(B, K): log of the softmax."""
    shifted_BK = logits_BK - logits_BK.max(axis=1, keepdims=True)
    return shifted_BK - np.log(np.exp(shifted_BK).sum(axis=1, keepdims=True))


def confidence(logits_BK: np.ndarray, label_B: np.ndarray) -> np.ndarray:
    """(B,): softmax at the class of each row."""
    return np.exp(log_probabilities(logits_BK)[np.arange(len(label_B)), label_B])


def unit(features_BD: np.ndarray) -> np.ndarray:
    """float64 (B, D): of length 1; a row of zeros stays one."""
    features_BD = np.asarray(features_BD, np.float64)
    return features_BD / np.maximum(np.linalg.norm(features_BD, axis=1, keepdims=True), 1e-12)


def cosine(a_BD: np.ndarray, b_BD: np.ndarray) -> np.ndarray:
    """(B,): of neighbouring rows; 0 where one of them is all zeros."""
    return (unit(a_BD) * unit(b_BD)).sum(axis=1)
