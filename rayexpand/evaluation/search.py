"""Exact search for the nearest references, in blocks, with the same answer for every cut into blocks and batches.

    here       meaning, unit
    q_BD       queries, float32 rows of length 1
    r_MD       references, float32 rows of length 1
    s          similarity: the inner product in float64, rounded to float32; of rows of length 1 the cosine
    k          how many references are wanted of each query
    slack      bound of |coarse product - s|

A coarse product (float32 on a CPU, float16 on an accelerator) finds CANDIDATES of each query, whose similarities are
then computed anew, each from its two rows alone. Equal similarities are ordered by the index. Where the last candidate
is so near to the k-th that rounding could have hidden a better reference, that query is searched again among all
references within `slack`. So the result is that of sorting all similarities, and no cut, device or count of processes
changes an index.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

CANDIDATES = 20  # of a query, whose similarities are computed anew
BLOCK = 16_384  # references of one coarse product
BATCH = 1024  # queries of one coarse product
_ANEW = 256  # queries whose candidates are held in float64 at once


class References:
    """References ready to be searched. `device`: where the coarse product runs; float16 is used on accelerators."""

    def __init__(self, r_MD: np.ndarray, device: torch.device | str = "cpu", block: int = BLOCK) -> None:
        self.r_MD, self.device, self.block = np.ascontiguousarray(r_MD, np.float32), torch.device(device), block
        self._dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        self._coarse_MD = self._on_device(self.r_MD)
        width = self.r_MD.shape[1]
        # float32: sums of `width` products. float16: both rows rounded to 11 bits, and the product once more.
        self.slack = width * 2.0**-23 if self._dtype == torch.float32 else 4 * 2.0**-11

    def __len__(self) -> int:
        return len(self.r_MD)

    def nearest(self, q_ND: np.ndarray, k: int, batch: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
        """(similarities float32 (N, k), indices int64 (N, k)) of the `k` nearest references, best first, equal ones by
        index. -inf and -1 fill up where there are fewer references than k."""
        parts = [self._batch(np.ascontiguousarray(q_ND[start:start + batch], np.float32), k)
                 for start in range(0, len(q_ND), batch)]
        if not parts:
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        s_NK, i_NK = (np.concatenate(column) for column in zip(*parts, strict=True))
        return s_NK, i_NK

    def _batch(self, q_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        want = min(k, len(self))
        s_Bk, i_Bk = np.full((len(q_BD), k), -np.inf, np.float32), np.full((len(q_BD), k), -1, np.int64)
        if not want or not len(q_BD):
            return s_Bk, i_Bk
        coarse_BC, i_BC = self._candidates(q_BD, min(max(CANDIDATES, 2 * k), len(self)))
        s_BC = similarities(q_BD, self.r_MD, i_BC)
        order = np.lexsort((i_BC, -s_BC))[:, :want]
        s_Bk[:, :want], i_Bk[:, :want] = (np.take_along_axis(one, order, 1) for one in (s_BC, i_BC))
        if i_BC.shape[1] < len(self):
            unsure_B = coarse_BC.min(axis=1) + self.slack >= s_Bk[:, want - 1]
            for row in np.flatnonzero(unsure_B).tolist():
                s_Bk[row, :want], i_Bk[row, :want] = self._again(q_BD[row], float(s_Bk[row, want - 1]), want)
        return s_Bk, i_Bk

    def _candidates(self, q_BD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(coarse products, indices), (B, count) both, in no order."""
        q, best, at = self._on_device(q_BD), None, None
        for start in range(0, len(self), self.block):
            s_BM = q @ self._coarse_MD[start:start + self.block].T
            value, index = s_BM.topk(min(count, s_BM.shape[1]), dim=1, sorted=False)
            index += start
            if best is not None:
                value, index = torch.cat([best, value], 1), torch.cat([at, index], 1)  # type: ignore[list-item]
                value, kept = value.topk(min(count, value.shape[1]), dim=1, sorted=False)
                index = index.gather(1, kept)
            best, at = value, index
        assert best is not None and at is not None  # noqa: PT018
        return best.float().cpu().numpy(), at.cpu().numpy()

    def _again(self, q_D: np.ndarray, least: float, want: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest of all references whose coarse product does not rule them out."""
        q = self._on_device(q_D)
        coarse_M = torch.cat([self._coarse_MD[start:start + self.block] @ q
                              for start in range(0, len(self), self.block)]).float().cpu().numpy()
        i_C = np.flatnonzero(coarse_M >= least - self.slack)
        s_C = np.concatenate([similarities(q_D[None], self.r_MD, i_C[None, start:start + self.block])[0]
                              for start in range(0, len(i_C), self.block)])
        order = np.lexsort((i_C, -s_C))[:want]
        return s_C[order], i_C[order]

    def _on_device(self, rows: np.ndarray) -> Any:
        return torch.from_numpy(rows).to(self.device, self._dtype)


def similarities(q_BD: np.ndarray, r_MD: np.ndarray, i_BC: np.ndarray) -> np.ndarray:
    """float32 (B, C): the similarity of each query with its references `i_BC`. Each is computed from its two rows
    alone, so it does not depend on what else is computed."""
    found = np.empty(i_BC.shape, np.float32)
    for start in range(0, len(q_BD), _ANEW):
        rows = slice(start, start + _ANEW)
        product_BCD = q_BD[rows, None].astype(np.float64) * r_MD[i_BC[rows]]
        found[rows] = product_BCD.sum(axis=2)
    return found


def unit_rows(h_ND: np.ndarray, centre_D: np.ndarray | None = None) -> np.ndarray:
    """float32 rows of length 1, after `centre_D` was taken away; a row of zeros stays one."""
    unit_ND = np.empty(h_ND.shape, np.float32)
    for start in range(0, len(h_ND), BLOCK):
        block = np.asarray(h_ND[start:start + BLOCK], np.float64) - (0 if centre_D is None else centre_D)
        length_B1 = np.linalg.norm(block, axis=1, keepdims=True)
        unit_ND[start:start + BLOCK] = block / np.where(length_B1 > 0, length_B1, 1)
    return unit_ND
