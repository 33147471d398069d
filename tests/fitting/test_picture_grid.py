from __future__ import annotations

import numpy as np
import pytest

from rayexpand.fitting.picture_grid import CELL, GAP, LINE, MISSING, NAME, PAPER, picture_grid


def plain(level: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), level, np.uint8)


@pytest.mark.parametrize("side", [8, 16, 28, 96, 130])
def test_pictures_are_enlarged_by_whole_factors_and_named(side: int) -> None:
    shown = side * max(1, -(-CELL // side))
    page = np.asarray(picture_grid([[plain(200, side), None], [plain(90, side), plain(40, side)]],
                                   ["a photo of a zero", "one"], ["noise 1", "noise 2"], "step 5"))
    assert shown >= CELL
    top, step = 2 * LINE + GAP, shown + GAP
    assert page.shape == (top + 2 * step, NAME + 2 * step, 3)
    for (y, x), level in {(0, 0): 200, (0, 1): MISSING[0], (1, 0): 90, (1, 1): 40}.items():
        cell = page[top + y * step:top + y * step + shown, NAME + x * step:NAME + x * step + shown]
        assert (cell == level).all()
    for part in (page[:LINE], page[LINE:top, NAME:NAME + step], page[LINE:top, NAME + step:],
                 page[top:top + step, :NAME], page[top + step:, :NAME]):
        assert part.min() < 64, "a title, a head and a name of each"
    assert (page[LINE:top, :NAME] == PAPER).all()


def test_long_names_stay_in_their_place() -> None:
    page = np.asarray(picture_grid([[plain(200, 96)]], ["word " * 200], ["head " * 50], "t"))
    assert (page[-GAP:] == PAPER).all()
    assert (page[2 * LINE + GAP + 2 * LINE:-GAP, NAME:NAME + 96] == 200).all()
