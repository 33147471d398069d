"""Pages with pictures as a user asks for them: what each kind takes, and which runs a folder stands for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rayexpand import api
from rayexpand.cli import pages  # noqa: F401  (registers its commands)
from rayexpand.cli.app import app
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import replace_json
from rayexpand.studies.run_folders import run_folders
from rayexpand.studies.trials import make_trials
from tests.studies.test_study import expanded, raw_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = expanded(raw_study(tmp_path_factory.mktemp("pictures")))
    make_trials(made)
    return str(made.files.root)


def test_a_study_stands_for_the_runs_of_its_first_repetition_also_where_it_was_moved(study: str, tmp_path: Path
                                                                                     ) -> None:
    moved = tmp_path / "elsewhere"
    Path(study).rename(moved)
    try:
        assert run_folders(str(moved)) == [f"{moved}/runs/flips-0"]
        page = api.pictures("matrix", moved, name="flips", rows=2)
    finally:
        moved.rename(study)
    assert run_folders(study) == [f"{study}/runs/flips-0"]
    assert run_folders(f"{study}/runs/flips-1") == [f"{study}/runs/flips-1"]
    assert Path(study, page.removeprefix(f"{moved}/")).is_file()
    assert page.endswith("figures/flips.html")


def test_everything_that_a_kind_does_not_take_is_said_at_once(study: str) -> None:
    with pytest.raises(ConfigError) as caught:
        api.pictures("batch", study, study, name="../up", out="elsewhere", rows=3, images=0)
    text = str(caught.value)
    for piece in ("--batch: 5 problems", "shows one study, and 2 folders", "name: '../up'", "rows: has no effect",
                  "out: has no effect", "images: expected 1 or more"):
        assert piece in text
    assert not Path(study, "figures/batch.html").exists()


def test_a_folder_of_another_kind_is_refused(study: str) -> None:
    with pytest.raises(UsageError, match="no study is here"):
        api.pictures("batch", f"{study}/runs/flips-0")
    with pytest.raises(UsageError, match="is not a run folder"):
        api.pictures("matrix", Path(study, "runs"))


def test_the_page_of_a_folder_leads_to_its_pages_with_pictures(study: str) -> None:
    run = f"{study}/runs/flips-0"
    api.pictures("sheet", run, rows=1, name="two words".replace(" ", "-"))

    assert '<a href="figures/two-words.html">two-words</a>' in Path(api.RunFolder(run).report()).read_text()


def test_the_command_line_asks_for_one_page_and_says_what_has_no_effect(study: str) -> None:
    run = f"{study}/runs/flips-0"
    found = CliRunner().invoke(app, ["report", "--matrix", run, "--rows", "2", "--name", "cli"])

    assert found.stdout.strip() == f"{run}/figures/cli.html"
    for arguments, said in ((["--matrix", "--batch"], "is a page of its own; leave --batch out"),
                            (["--matrix", "--strips", "3"], "leave --strips out"),
                            (["--rows", "3"], "name one of them too"), ([run], "2 folders are named")):
        refused = CliRunner().invoke(app, ["report", run, *arguments])
        assert isinstance(refused.exception, UsageError)
        assert said in str(refused.exception)


def test_a_sweep_stands_for_one_pilot_of_each_of_its_trials(study: str, tmp_path: Path) -> None:
    """Two trials with two repetitions each, of which the second shares the pilots of the first."""
    files = open_files(tmp_path)
    for folder in ("trials", ".tmp"):
        files.make_folder(folder)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UsageError, match="no run of it is here yet"):
        run_folders(str(tmp_path))
    shutil.copytree(f"{study}/runs", tmp_path / "pilots")
    for number in (0, 1):
        replace_json(files, f"trials/{number}.json", {"key": str(number), "number": number,
                                                      "pilots": ["flips-1", "flips-0"]})

    assert run_folders(str(tmp_path)) == [f"{tmp_path}/pilots/flips-0"]
