"""The exact search: equal to sorting all similarities, whatever the blocks and batches, with ties by index."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayexpand.contract.rng import generator, row_key
from rayexpand.evaluation.search import References, similarities, unit_rows


def rows(name: str, count: int, width: int) -> np.ndarray:
    return unit_rows(generator(row_key(0, "test", name, 0, 0, "rows")).standard_normal((count, width)))


def fully_sorted(q_ND: np.ndarray, r_MD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    s_NM = (q_ND.astype(np.float64) @ r_MD.astype(np.float64).T).astype(np.float32)
    order = np.lexsort((np.broadcast_to(np.arange(len(r_MD)), s_NM.shape), -s_NM))[:, :k]
    return np.take_along_axis(s_NM, order, 1), order


@pytest.mark.parametrize(("block", "batch"), [(16_384, 1024), (7, 33), (50, 1), (1, 200)])
def test_equal_to_a_full_sort_for_every_cut(block: int, batch: int) -> None:
    r_MD, q_ND = rows("references", 400, 16), rows("queries", 100, 16)
    r_MD[40:80] = r_MD[7]  # more equal references than there are candidates
    r_MD[200] = r_MD[100]
    q_ND[:2] = r_MD[[7, 100]]
    wanted_s, wanted_i = fully_sorted(q_ND, r_MD, 5)
    found_s, found_i = References(r_MD, block=block).nearest(q_ND, 5, batch)

    assert wanted_i[:2].tolist() == [[7, 40, 41, 42, 43], [100, 200, *wanted_i[1, 2:].tolist()]]
    np.testing.assert_array_equal(found_i, wanted_i)
    np.testing.assert_allclose(found_s, wanted_s, rtol=0, atol=6e-8)
    assert found_s[0, 0] == pytest.approx(1, abs=2e-7)


def test_coarse_products_in_half_precision_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that differ by less than float16 can tell."""
    r_MD, q_ND = rows("references", 300, 32), rows("queries", 40, 32)
    r_MD[:] = unit_rows(r_MD[:1] + 1e-4 * r_MD)
    references = References(r_MD)
    references._dtype, references.slack = torch.float16, 4 * 2.0**-11
    references._coarse_MD = references._on_device(references.r_MD)
    wanted = fully_sorted(q_ND, r_MD, 5)[1]
    coarse = (references._on_device(q_ND) @ references._coarse_MD.T).topk(5).indices.numpy()

    assert (coarse != wanted).any(axis=1).mean() > 0.5, "half precision alone would be wrong"
    np.testing.assert_array_equal(references.nearest(q_ND, 5)[1], wanted)


def test_fewer_references_than_wanted() -> None:
    s, i = References(rows("references", 2, 4)).nearest(rows("queries", 3, 4), 5)

    assert (i[:, 2:] == -1).all()
    assert np.isneginf(s[:, 2:]).all()
    assert sorted(i[0, :2].tolist()) == [0, 1]


def test_a_similarity_is_of_its_two_rows_alone() -> None:
    r_MD, q_ND = rows("references", 50, 37), rows("queries", 600, 37)
    at = np.tile(np.arange(50), (600, 1))
    whole = similarities(q_ND, r_MD, at)

    assert (similarities(q_ND[417:418], r_MD, at[417:418, 30:31]) == whole[417, 30]).all()


def test_rows_of_zeros_stay() -> None:
    found = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]]), None)

    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]])
    np.testing.assert_allclose(unit_rows(np.array([[4.0, 4.0]]), np.array([1.0, 0.0])), [[0.6, 0.8]])
