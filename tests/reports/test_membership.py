"""The page of the audit `membership`: what it says, and a figure whose numbers are those of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand import api
from rayexpand.contract.errors import DamagedFile, UsageError
from rayexpand.contract.rng import generator, row_key
from rayexpand.evaluation.membership import memberships
from rayexpand.evaluation.membership_result import LIMITS, judged, said
from rayexpand.reports.figure import read_figure
from rayexpand.reports.membership import roc, write_membership_page
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import replace_json


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """A result of 4 shadows and 60 images: `private` sees members, `classifier` nothing, `samples` the planted one."""
    ids = [str(n) for n in range(60)]
    member, null = memberships(ids, 4, 0), memberships(ids, 4, 0, stream="permuted")
    lines = {}
    for name, shift, planted in (("classifier", 0, 0), ("samples", 0.3, 20), ("private", 2.0, 20)):
        phi = generator(row_key(0, "test", name, 0, 0, "phi")).normal(size=(4, 60, 1)) + shift * member[:, :, None]
        phi[:, 7] += planted * member[:, 7, None]
        lines[name] = judged(phi, member, null, 7, variance="pooled", reference=False, seed=0)
    return {"lines": lines, "worse": "samples", "says": said(lines, 50), "limits": list(LIMITS), "images": 60,
            "shadows": 4, "members": [28, 33], "planted": {"image": "<7>", "repeats": 50}, "study": "runs/x/shadows",
            "accuracy": {"classifier": 0.9, "private": 0.95}, "config": {"shadows": 4, "recipe": {"preset": "digits"}}}


@pytest.fixture
def folder(found: dict[str, Any], tmp_path: Path) -> Path:
    files = open_files(tmp_path)
    files.make_folder(".tmp")
    replace_json(files, "result.json", {"name": "x", "run": None, "membership": json.loads(json.dumps(found))})
    return tmp_path


def test_the_page_says_what_the_attacks_found_and_what_they_do_not_show(folder: Path, found: dict[str, Any]) -> None:
    page = Path(write_membership_page(str(folder))).read_text()

    assert "cannot see it: finds the planted image in 0 of the 2 shadows" in page
    assert "proves nothing" in page
    assert "It is not differential privacy" in page
    assert "the public generator itself was trained on are not audited" in page
    assert "&lt;7&gt;" in page
    for one in found["lines"].values():
        assert f"{one['auc']['value']:.3f} [{one['auc']['low']:.3f}, {one['auc']['high']:.3f}]" in page


def test_the_numbers_of_the_figure_are_those_of_the_result(folder: Path, found: dict[str, Any]) -> None:
    write_membership_page(str(folder))
    files = open_files(folder)
    numbers = read_figure(files, "membership-roc")

    assert [one["name"] for one in numbers["lines"]] == ["classifier", "samples", "private", "permuted"]
    for line in numbers["lines"][:3]:
        assert line["points"] == [list(point) for point in found["lines"][line["name"]]["roc"]]
    assert numbers == json.loads(json.dumps(roc(found).numbers))
    altered = numbers | {"least": 1.0}
    replace_json(files, "figures/membership-roc.json", altered)
    with pytest.raises(DamagedFile, match="is not the picture"):
        read_figure(files, "membership-roc")


def test_every_line_of_the_figure_has_a_dash_of_its_own_and_the_axes_end_at_one_non_member(found: dict[str, Any]
                                                                                           ) -> None:
    figure = roc(found)

    assert figure.numbers["least"] == pytest.approx(1 / found["lines"]["samples"]["non_members"])
    assert figure.svg.count("stroke-dasharray") >= 3
    assert "private: classifier of the real images" in figure.svg


def test_report_of_an_audit_folder_draws_the_page_again(folder: Path) -> None:
    opened = api.open(folder)

    assert isinstance(opened, api.AuditFolder)
    assert Path(opened.report()).name == "membership.html"
    assert "permuted" in str(opened.table())
    assert np.isfinite(opened.to_dict()["membership"]["lines"]["samples"]["auc"]["value"])


def test_a_folder_without_such_an_audit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no result of an audit `membership`"):
        write_membership_page(str(tmp_path))
