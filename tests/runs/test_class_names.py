"""One function says a class to prompts and to guides; a run that began with other texts goes on with them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayexpand.contract.prompts import format_prompt
from rayexpand.contract.schema import ClassTable
from rayexpand.data.seeds import DataConfig, survey
from rayexpand.models import guides
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from rayexpand.runs.tools import load_tools
from tests.commands import rewrite_json
from tests.corpus import encoded, photo

CLASSES = ClassTable.of(("n1", "n2"), ("great_auk", "emu"), metaclasses=("sea_bird", ""))


def test_prompts_and_guides_say_the_same() -> None:
    assert CLASSES.asked == ("great auk", "emu")
    assert [format_prompt("{name}", label, CLASSES) for label in range(2)] == [*CLASSES.asked]
    assert format_prompt("{metaclass}", 0, CLASSES) == "sea bird"


def test_a_class_table_keeps_how_it_is_said() -> None:
    again = ClassTable.from_arrow(CLASSES.to_arrow())
    assert again == CLASSES
    assert again.asked == ("great auk", "emu")
    old = ClassTable.from_arrow(CLASSES.to_arrow().replace_schema_metadata({}))
    assert (old.name, old.asked) == (CLASSES.name, CLASSES.name)
    assert pickle.loads(pickle.dumps(old)).asked == CLASSES.name


def test_names_that_become_one_text_are_reported(tmp_path: Path) -> None:
    table = ClassTable.of(("a", "b", "c", "d"), ("great_auk", "Great auk", "crane", "emu"))
    assert table.same_names() == {"great auk": ["a", "b"]}
    assert ClassTable.of(("é", "e\u0301", " emu", "emu", "Great__auk", "great auk")).same_names() == {
        "é": ["é", "e\u0301"], "emu": [" emu", "emu"], "great auk": ["Great__auk", "great auk"]}
    for key in ("n1", "n2", "n3"):
        (tmp_path / "set" / key).mkdir(parents=True)
        (tmp_path / "set" / key / "0.png").write_bytes(encoded(photo()))
    (tmp_path / "map.txt").write_text("n1 crane\nn2 emu\nn3 crane\n")
    found = survey(DataConfig(source="imagefolder", path=str(tmp_path / "set"), classes=str(tmp_path / "map.txt")))
    assert found["same_names"] == {"crane": ["n1", "n3"]}


@pytest.mark.parametrize("began_before", [False, True])
def test_the_guide_of_a_run_is_asked_for_spoken_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      began_before: bool) -> None:
    for key in ("great_auk", "emu"):
        (tmp_path / "set" / key).mkdir(parents=True)
        (tmp_path / "set" / key / "0.png").write_bytes(encoded(photo()))
    config = parse({"name": "x", "out": str(tmp_path), "method": {"name": "img2img", "ratio": 1},
                    "prior": {"weights": "digits"},
                    "data": {"source": "imagefolder", "path": str(tmp_path / "set")}}, "x")
    monkeypatch.setattr(runs, "model_hashes", lambda *_: {"prior": "0" * 64})
    runs.prepare(config)
    if began_before:
        (file,) = (tmp_path / "x/plan").glob("*/classes.parquet")
        table = pq.read_table(file).replace_schema_metadata({})
        file.unlink()
        pq.write_table(table, file)
        name = f"plan/{file.parent.name}/plan.json"
        rewrite_json(tmp_path / "x" / name, lambda counts: counts.pop("files"), name, is_old=True)
    classes = runs.open_run(str(tmp_path / "x")).plan.index.classes
    asked: list[Any] = []
    monkeypatch.setattr(guides, "load_guide", lambda *given, **_: asked.append(given[2]))
    monkeypatch.setattr(type(config), "needs", property(lambda _: frozenset({"guide"})))
    load_tools(config, classes)
    assert asked == [("emu", "great_auk" if began_before else "great auk")]
