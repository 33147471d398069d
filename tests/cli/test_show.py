"""Tables of results where no terminal folds them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayexpand.api.results import Planned
from rayexpand.cli.show import show

LONG = "prior.weights: stable/diffusion@main is neither a folder here nor in the cache; " + "fetch it " * 30


class Guess:
    dataset = None

    def table(self) -> list[tuple[str, str, str]]:
        return [("images", "100", "20 seeds"), ("output", "2 MB", "")]

    def to_json(self) -> dict[str, Any]:
        return {"images": 100}


def test_problems_stand_below_a_table_and_make_it_no_wider(capsys: pytest.CaptureFixture[str]) -> None:
    planned = Planned(Guess(), [LONG])
    show(planned, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["what    estimate  how it is known", "images  100       20 seeds", "output  2 MB"]
    assert lines[3:] == ["", f"not yet ready to expand: {LONG}"]
    assert LONG in planned._repr_html_()
    show(planned, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"images": 100, "problems": [LONG]}
