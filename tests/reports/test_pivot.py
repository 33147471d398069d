"""The page over several studies: figures without data beside those that have some, prices of studies, signs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.api import report
from rayexpand.contract.errors import UsageError
from rayexpand.studies.records import read_records
from rayexpand.studies.spreads import plain, points, signed
from tests.studyfolder import StudyFolder

RIGHT = np.arange(20) < 13
PLAIN: dict[str, Any] = {"kind": "table"}
EMPTY: dict[str, Any] = {"kind": "table", "value": "score.fid"}


def study(folder: Path, price: dict[str, float] | None = None, name: str = "s") -> str:
    found = StudyFolder(folder / name, {"arms": [{"name": "original"}, {"name": "made", "use": "x", "ratio": [1, 2]}],
                                        **({"price": price} if price else {})})
    found.add("original", 0, RIGHT)
    for ratio in (1, 2):
        found.add(f"made {ratio}x", 0, RIGHT, group="x", ratio=float(ratio), synthetic_rows=20 * ratio,
                  expansion_seconds=1800.0 * ratio)
        found.add(f"original repeated {1 + ratio}x", 0, RIGHT, control_of=f"made {ratio}x")
    return str(found.finish())


def page(folder: Path, sources: dict[str, str], figures: dict[str, Any], **more: Any) -> str:
    return Path(report({"name": "p", "out": str(folder), "sources": sources, "figures": figures, **more})).read_text()


def test_a_figure_without_data_keeps_no_other_from_being_written(tmp_path: Path,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    sources = {"s": study(tmp_path)}
    with caplog.at_level(logging.WARNING):
        text = page(tmp_path, sources, {"first": EMPTY, "there": PLAIN, "last": {**PLAIN, "keep": {"arm": ["none"]}}})
    assert (tmp_path / "p/figures/there.json").is_file()
    assert "2 of 3 figures of the file are missing" in text
    for words in ("figures.first: nothing has score.fid", "figures.last: keep.arm: no trial has"):
        assert words in text
        assert any(words in line for line in caplog.messages)
    with pytest.raises(UsageError, match=r"(?s)no figure of the file has data:.*figures\.first: .*figures\.last: "):
        page(tmp_path, sources, {"first": EMPTY, "last": EMPTY})


def test_a_cost_table_has_the_prices_of_the_studies_where_the_file_gives_none(tmp_path: Path) -> None:
    priced = study(tmp_path, {"cpu_hour": 4.0, "real_image": 0.25})
    cost = {"cost": {"kind": "cost", "keep": {"arm": ["original", "made 2x"]}}}

    def numbers(sources: dict[str, str], **more: Any) -> dict[str, Any]:
        page(tmp_path, sources, cost, **more)
        lines = json.loads((tmp_path / "p/figures/cost.json").read_text())["numbers"]
        return {line["row"]: line for line in lines}

    own = numbers({"s": priced})
    assert own["made 2x"]["price"]["mean"] == pytest.approx(4.0), "one hour"
    assert own["made 2x"]["price_per_1000"] == pytest.approx(100.0)
    assert own["people"]["price_per_1000"] == pytest.approx(250.0)
    given = numbers({"s": priced}, prices={"cpu_hour": 1.0, "human_image": 1.0})
    assert given["made 2x"]["price"]["mean"] == pytest.approx(1.0), "the file of the page comes first"
    assert given["people"]["price_per_1000"] == pytest.approx(1000.0)
    mixed = numbers({"s": priced, "plain": study(tmp_path, name="plain")})
    assert "price" not in mixed["made 2x"], "a price of some of the hours would be wrong"


def test_a_control_stands_at_the_ratio_of_its_arm(tmp_path: Path) -> None:
    trials = read_records({"s": [study(tmp_path)]}).trials
    assert {one.arm: one.field("ratio") for one in trials} == {
        "original": 0, "made 1x": 1, "made 2x": 2, "original repeated 2x": 1, "original repeated 3x": 2}


@pytest.mark.parametrize(("value", "text"), [(-0.04, "0.0"), (0.04, "0.0"), (-0.0, "0.0"), (-0.06, "-0.1"),
                                             (1.25, "+1.2")])
def test_what_reads_as_zero_has_no_sign(value: float, text: str) -> None:
    assert signed(value) == text
    assert points(-1e-17) == "+0.0"


@pytest.mark.parametrize(("value", "text"), [(1.009e-6, "0.00000101"), (18.94, "18.9"), (1499.2, "1,499"), (0, "0")])
def test_prices_have_no_exponent(value: float, text: str) -> None:
    assert plain(value) == text
