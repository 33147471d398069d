"""What `verify` says of a study: all its runs, results and predictions, and nothing of what is not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayexpand import api
from rayexpand.contract.errors import UsageError
from tests.commands import rayexpand
from tests.studies.test_study import raw_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = raw_study(tmp_path_factory.mktemp("study"))
    return Path(api.train({**raw, "seeds": [0], "recipe": {**raw["recipe"], "epochs": 1}}, same_process=True).folder)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damage_is_found_wherever_it_is_and_what_is_to_come_is_none(folder: Path) -> None:
    sound = api.StudyFolder(str(folder)).verify(pixels=True)
    (run,) = (folder / "runs").iterdir()
    assert sound.problems == []
    assert sound.totals == api.RunFolder(str(run)).verify().totals
    assert sound.totals.kept > 0

    results, predictions = ([*sorted((folder / kind).iterdir())] for kind in ("results", "predictions"))
    data = sorted((run / "data").iterdir())[0]
    for file in (results[0], predictions[1], data):
        flip(file)
    results[1].unlink()
    (folder / "runs" / "begun").mkdir()
    done = rayexpand("verify", folder)

    said = [line for line in done.stdout.splitlines() if line.startswith(("runs/", "results/", "predictions/"))]
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in said] == [
        str(file.relative_to(folder)) for file in (data, results[0], predictions[1])]
    assert all(" again" in line for line in said)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    done = rayexpand("verify", tmp_path)
    assert (done.returncode, "no run.json" in done.stderr) == (2, True)
    with pytest.raises(UsageError, match="there is no study"):
        api.StudyFolder(str(tmp_path)).verify()
