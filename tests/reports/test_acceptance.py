"""What the page of a run says of its judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayexpand.contract.schema import ClassTable
from rayexpand.reports.acceptance import _template, acceptance
from rayexpand.reports.run import write_report
from rayexpand.runs.accept import SCORE, TRY
from rayexpand.runs.status import read_classes, view_run
from tests.conftest import Accepting, MakeConfig, complete


@pytest.mark.parametrize("exhausted", ["reject", "best"])
def test_every_attempt_counts_by_class_and_prompt(make_config: MakeConfig, accept: Accepting, exhausted: str) -> None:
    run, totals = complete(make_config("Fake", ratio=6, shard_images=60, sections={
        "accept": accept(attempts=2, exhausted=exhausted)}))
    view = view_run(str(run.folder))
    found = acceptance(view, read_classes(view), list(view.receipts))
    assert found is not None
    scores = [{one["name"]: one["value"] for one in row["scores"]} for receipt in run.store.receipts()
              for table in (run.store.data(receipt), run.store.refused(receipt)) for row in table.to_pylist()]

    assert found["attempts"] == sum(len(one) - 1 for one in scores), "all but the threshold"
    assert found["accepted"] == sum(one[SCORE] > 0.5 for one in scores) < totals.planned
    assert sum(any(name.startswith(TRY) for name in one) for one in scores) > 20
    assert {line.name for line in found["by_class"]} == {"ant", "bee", "cat", "dog"}
    assert sum(line.attempts for line in found["by_class"]) == found["attempts"]
    assert sum(line.accepted for line in found["by_class"]) == found["accepted"]
    assert found["by_template"] == [], "one template says nothing"
    page = Path(write_report(str(run.folder))).read_text()
    assert "What the judge accepted" in page
    assert "cosine to the prompt above 0.5, in up to 2 attempts" in page
    never = totals.rejected if exhausted == "reject" else sum(one[SCORE] <= 0.5 for one in scores)
    assert (found["rows"], found["never"]) == (totals.planned, never)
    assert f"{never} of 120 rows were never accepted: " + (
        "they are rejected" if exhausted == "reject" else "the best attempt of each is kept") in page
    assert "What the scores say" not in page, "the scores of the judge have a section of their own"


def test_a_number_before_a_class_name_is_no_template_of_its_own() -> None:
    classes = ClassTable.of(["011.Rusty_Blackbird", "012.Yellow_Blackbird"])
    assert {_template(prompt, label, classes) for label, prompt in enumerate((
        "a Rusty Blackbird, at night", "a Yellow Blackbird, at night"))} == {"a {name}, at night"}


def test_prompts_of_refused_attempts_follow_from_the_plan(make_config: MakeConfig, accept: Accepting) -> None:
    run, _ = complete(make_config("Worded", ratio=2, sections={"accept": accept()}))
    view = view_run(str(run.folder))
    found = acceptance(view, read_classes(view), list(view.receipts))
    assert found is not None
    expected = set()
    for receipt in run.store.receipts():
        for table in (run.store.data(receipt), run.store.refused(receipt)):
            for row in table.to_pylist():
                draw = run.plan.attempt(row["row"], row["attempt"])
                assert (draw.prompt, draw.sample_id) == (row["prompt"], row["sample_id"])
                expected |= {run.plan.attempt(row["row"], number).prompt for number in range(row["attempt"] + 1)}
    assert found["templates"] == len(expected) > 40
    assert len(found["by_template"]) == 25
    assert {line.name for line in found["by_template"]} <= expected


def test_a_run_without_a_judge_has_no_such_section(make_config: MakeConfig) -> None:
    run, _ = complete(make_config("Fake", ratio=1))
    view = view_run(str(run.folder))
    assert acceptance(view, read_classes(view), list(view.receipts)) is None
    assert "What the judge accepted" not in Path(write_report(str(run.folder))).read_text()


@pytest.mark.parametrize(("prompt", "template"), [
    ("a great auk, in fog", "a {name}, in fog"), ("a great_auk", "a {name}"), ("greater auks", "greater auks"),
    ("no bird", "no bird")])
def test_the_class_is_taken_out_of_a_prompt(prompt: str, template: str) -> None:
    assert _template(prompt, 0, ClassTable.of(["k"], ["great_auk"])) == template


def test_where_the_method_cannot_be_asked_prompts_are_unknown(make_config: MakeConfig, accept: Accepting,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = complete(make_config("Worded", ratio=2, sections={"accept": accept()}))
    view = view_run(str(run.folder))
    monkeypatch.setenv("RAYEXPAND_TRUSTED_METHODS", "")
    found = acceptance(view, read_classes(view), list(view.receipts))
    assert found is not None
    assert "" in {line.name for line in found["by_template"]}
