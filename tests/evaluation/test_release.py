"""The release sheet: a line passes, fails or was not measured; an export that requires a line stops at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import beta

from rayexpand.api.folders import RunFolder
from rayexpand.contract.errors import UsageError
from rayexpand.evaluation import copy_statistics as statistics
from rayexpand.evaluation.audit_files import committed_sha256, latest, register
from rayexpand.evaluation.release import LINES, ReleaseLine, release_sheet, require
from rayexpand.runs.run import Run
from rayexpand.runs.status import view_run
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import replace_json
from tests.commands import rayexpand
from tests.conftest import MakeConfig, complete
from tests.s3server import Server


@pytest.fixture
def run(make_config: MakeConfig) -> Run:
    return complete(make_config("Fake", ratio=2))[0]


def scope(copies: int, observed: int, of: int = 40) -> dict[str, Any]:
    return {"of": of, "copies": copies, "candidates": observed - copies, "null": statistics.excess(observed, of)}


def write(run: Run, section: str, entry: dict[str, Any], name: str = "release") -> None:
    run.files.make_folder(f"audit/{name}")
    replace_json(run.files, f"audit/{name}/result.json", {"name": name, section: {"created": 1.0, **entry}})
    register(run.files, name)


def copies(run: Run, **changes: Any) -> dict[str, Any]:
    return {"committed_sha256": committed_sha256(run.store.receipts()), "words": "", "extractor": {"name": "guide x"},
            "scopes": {"own": {"of": 40, "copies": 7}, "class": scope(0, 0, 4000), "all": scope(0, 0, 4000)}, **changes}


def lines(run: Run, **given: Any) -> dict[str, ReleaseLine]:
    return {line.name: line for line in release_sheet(view_run(str(run.folder)), **given)}


def test_what_nobody_measured_is_said_loudly(run: Run) -> None:
    found = lines(run)

    assert tuple(found) == LINES
    assert {name for name, line in found.items() if line.status == "pass"} == {"classes"}
    assert {line.status for name, line in found.items() if name != "classes"} == {"not measured"}
    assert lines(run, exported=True)["mark"].status == "pass"
    card = Path(str(run.folder), "README.md")
    RunFolder(str(run.folder)).card()
    assert "| copies | **NOT MEASURED** | no audit has looked for copies" in card.read_text()


@pytest.mark.parametrize(("changes", "statuses", "words"), [
    ({}, ("pass", "pass"), "0 of another seed of all; 7 of their own seed"),
    ({"scopes": {"own": {"of": 40, "copies": 0}, "class": scope(1, 1, 4000)}}, ("fail", "pass"), "1 of another seed"),
    ({"scopes": {"own": {"of": 40, "copies": 0}, "class": scope(0, 20, 4000)}}, ("pass", "fail"), "20 above tau, 4"),
    ({"scopes": {"own": {"of": 40, "copies": 0}, "class": scope(0, 0, 40)}}, ("pass", "fail"), "1,843 are needed"),
    ({"words": "this extractor cannot see copies here"}, ("not measured",) * 2, "cannot see copies"),
    ({"committed_sha256": "old"}, ("not measured",) * 2, "other samples than when `release` audited it")])
def test_copies(run: Run, changes: dict[str, Any], statuses: tuple[str, str], words: str) -> None:
    write(run, "copies", copies(run, **changes))
    found = lines(run)

    assert (found["copies"].status, found["candidates"].status) == statuses
    assert words in found["copies"].text + found["candidates"].text


def test_seeds_that_were_not_looked_at_are_named(run: Run) -> None:
    write(run, "copies", copies(run, scopes={"own": {"of": 40, "copies": 7}, "class": scope(0, 0, 4000)}))
    assert "7 of their own seed; seeds of other classes were not looked at" in lines(run)["copies"].text
    write(run, "copies", copies(run))
    assert "not looked at" not in lines(run)["copies"].text


@pytest.mark.parametrize(("changes", "status"), [
    ({}, "pass"), ({"scores": {"clip_top1": {"value": 0.4, "reference": 0.9}}}, "fail"),
    ({"config": {"selection": "best", "copies": None}}, "not measured"),
    ({"config": {"selection": None, "copies": 1}}, "not measured"), ({"committed_sha256": "old"}, "not measured")])
def test_labels_are_of_these_samples(run: Run, changes: dict[str, Any], status: str) -> None:
    run.files.make_folder("scores")
    replace_json(run.files, "scores/a.json", {
        "name": "a", "created": 1.0, "committed_sha256": committed_sha256(run.store.receipts()),
        "config": {"selection": None, "copies": None}, "scores": {"clip_top1": {"value": 0.85, "reference": 0.9}},
        **changes})

    assert lines(run)["labels"].status == status


def test_so_many_samples_without_a_candidate_are_enough() -> None:
    count = statistics.least_samples(0.001)

    assert beta.ppf(0.975, 1, count) - 0.001 < 0.001 <= beta.ppf(0.975, 1, count - 1) - 0.001


@pytest.mark.parametrize(("low", "seen_by", "status"), [
    (0.004, ["samples"], "pass"), (0.02, ["samples"], "fail"), (0.02, [], "fail"), (0.004, [], "not measured")])
def test_membership(run: Run, low: float, seen_by: list[str], status: str) -> None:
    def rate(value: float, low: float, high: float) -> dict[str, Any]:
        return {"tpr_at_fpr_001": {"value": value, "low": low, "high": high}}

    write(run, "membership", {**rate(0.03, low, 0.05), "private": rate(0.4, 0.3, 0.5), "null": rate(0.001, 0, 0.006),
                              "worse": "samples", "planted": {"repeats": 50, "seen_by": seen_by}})
    found = lines(run)["membership"]
    assert found.status == status
    weak = {**rate(0.03, 0.004, 0.05), "private": rate(0.04, 0.005, 0.1), "null": rate(0.001, 0, 0.006)}
    write(run, "membership", {**weak, "worse": "samples", "planted": {"repeats": 50, "seen_by": ["samples"]}})
    small = lines(run)["membership"]
    assert small.status == "not measured"
    assert "audit release is too small: even of classifiers of the real images" in small.text
    if status == "not measured":
        assert "finds the image that it lists 50 times, so what they do not find may be there" in found.text
        return
    assert "attack by samples: 3 %" in found.text
    assert "of the real images 40 % [30, 50]" in found.text


def test_an_export_stops_at_the_line_it_requires(run: Run, tmp_path: Path) -> None:
    folder, out = RunFolder(str(run.folder)), tmp_path / "export"
    with pytest.raises(UsageError, match="copies: NOT MEASURED: no audit") as caught:
        folder.export(out, "imagefolder", require=["copies", "membership", "classes"])
    assert "candidates: NOT MEASURED" in str(caught.value)
    assert "membership: NOT MEASURED" in str(caught.value)
    assert "classes" not in str(caught.value)
    assert not out.exists()
    with pytest.raises(UsageError, match="'copy' is no line of the release sheet; those are copies"):
        folder.export(out, require=["copy"])
    write(run, "copies", copies(run))
    folder.card(license_of={"seeds": "cc-by-4.0"})
    answer = rayexpand("export", run.folder, out, "--layout", "imagefolder", "--require", "copies,mark,licenses")
    assert answer.returncode == 0, answer.stderr
    readme = (out / "README.md").read_text()
    assert "| copies | pass |" in readme
    assert "| membership | **NOT MEASURED** |" in readme
    assert yaml.safe_load(readme.split("---")[1])["source_licenses"] == {"seeds": "cc-by-4.0"}


def test_licenses_stay_and_are_checked(run: Run) -> None:
    folder = RunFolder(str(run.folder))
    folder.card(license_of={"seeds": "cc-by-4.0"})
    folder.card()
    assert lines(run)["licenses"] == ReleaseLine("licenses", "pass", "as given: seeds cc-by-4.0")
    with pytest.raises(UsageError, match="--license-of: data is none of generator, adapter, seeds"):
        folder.card(license_of={"data": "cc-by-4.0"})
    with pytest.raises(UsageError, match="no license identifier"):
        folder.card(license_of={"seeds": "my own"})


def test_the_newest_audit_is_found_in_an_object_store_too(object_stores: Server) -> None:
    files = open_files("s3://runs/birds")
    for created, name in ((2.0, "old"), (5.0, "new"), (3.0, "third")):
        replace_json(files, f"audit/{name}/result.json", {"name": name, "copies": {"created": created}})
        register(files, name)
    assert latest(files, "copies") == {"created": 5.0, "audit": "new"}
    assert latest(files, "membership") is None


def test_required_lines_go_together() -> None:
    sheet = [ReleaseLine("copies", "pass", ""), ReleaseLine("candidates", "fail", "20 above tau")]

    require(sheet, [])
    with pytest.raises(UsageError, match="candidates: FAIL: 20 above tau"):
        require(sheet, ["copies"])
