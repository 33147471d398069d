"""Methods by name: built in, of entry points, and dotted names that must be trusted before anything is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from rayexpand import methods
from rayexpand.contract.errors import ConfigError
from rayexpand.methods import TRUSTED, load_method, method_class, trust
from rayexpand.methods.img2img import Img2Img
from tests.commands import ROOT, rayexpand, rewrite_json
from tests.conftest import MakeConfig, complete
from tests.methods import fakes


@pytest.fixture(autouse=True)
def nothing_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUSTED, "")


def test_a_dotted_name_is_not_imported_unless_it_is_trusted() -> None:
    with pytest.raises(ConfigError, match=r"would import code.*--trust this\.Method"):
        method_class("this.Method")

    assert "this" not in sys.modules, "importing it would print the Zen of Python"


def test_trust_is_for_exactly_the_names_that_were_said() -> None:
    trust("tests.methods.fakes.Fake")

    assert method_class("tests.methods.fakes.Fake").__name__ == "Fake"
    with pytest.raises(ConfigError, match="would import code"):
        method_class("tests.methods.fakes.Echo")


@pytest.mark.parametrize(("name", "words"), [
    ("torch.hub.load", "is no method"), ("pathlib.Path", "is no method"),
    ("rayexpand.runs.config.CodecConfig", "has no needs, copies, draw, expand"),
    ("no.such.Thing", "cannot be imported"),
])
def test_what_is_trusted_but_no_method_is_never_called(name: str, words: str) -> None:
    trust(name)
    with pytest.raises(ConfigError, match=words):
        load_method(name, {"repo_or_dir": "x"})


def test_entry_points_offer_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = EntryPoint("mine", "rayexpand.methods.img2img:Img2Img", methods.GROUP)
    bad = EntryPoint("bad", "json:dumps", methods.GROUP)
    monkeypatch.setattr(methods, "entry_points", lambda group: [mine, bad] if group == methods.GROUP else [])

    assert method_class("mine") is Img2Img
    with pytest.raises(ConfigError, match="bad is no method"):
        method_class("bad")
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        method_class("mime")


@pytest.mark.parametrize("verb", ["status", "verify", "report", "card", "export", "retry", "regen"])
def test_a_run_folder_from_somebody_runs_none_of_its_code(verb: str, make_config: MakeConfig, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    trust("tests.methods.fakes.Fake")
    run, _ = complete(make_config(ratio=1))
    rewrite_json(Path(run.folder, "run.json"), lambda facts: facts["config"].update(
        method={"name": "evil.Method", "ratio": 1}))
    for place in (Path(run.folder), tmp_path):
        (place / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.chdir(run.folder)
    monkeypatch.syspath_prepend(str(run.folder))
    more = {"export": [tmp_path / "exported"], "regen": ["ant/0.png/0"]}.get(verb, [])
    done = rayexpand(verb, run.folder, *more)

    assert not (tmp_path / "executed").exists()
    assert done.returncode in (0, 1, 2)
    assert done.returncode == 0 or "would import code" in done.stderr


def test_a_file_with_a_method_of_ones_own_needs_the_flag(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from rayexpand.methods.classical import Classical\n\n\n"
                                      "class Mine(Classical):\n    name: str = 'mine.Mine'\n")
    (tmp_path / "my.yaml").write_text("name: my\nout: out\ndata: {source: digits, per_class: 1}\n"
                                      "method: {name: mine.Mine, ratio: 1}\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "rayexpand", *arguments], capture_output=True, text=True,
                              cwd=tmp_path, env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": ""})

    refused, made = run("validate", "my.yaml"), run("validate", "my.yaml", "--trust", "mine.Mine")

    assert (refused.returncode, made.returncode) == (2, 0), made.stderr
    assert "--trust mine.Mine" in refused.stderr


def test_what_labels_are_is_asked_of_a_method_with_the_classes_of_its_run() -> None:
    class Table(fakes.Fake):
        def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                       **recipe: float) -> np.ndarray:
            return np.full((3, 3), 1 / 3, np.float32)[target]

    class Broken(fakes.Fake):
        def soft_label(self, *columns: object, **recipe: float) -> np.ndarray:
            raise AssertionError("mine")

    assert methods.label_words(fakes.Fake(), 3) == ""
    assert "soft_label" in methods.label_words(Table(), 3)
    with pytest.raises(ConfigError, match="AssertionError: mine"):
        methods.label_words(Broken(), 3)
    assert methods.label_words_of({"name": "tests.methods.fakes.Fake"}, 3) is None, "it is not trusted here"


def test_a_card_never_says_less_because_a_method_is_not_trusted(make_config: MakeConfig) -> None:
    trust("tests.methods.fakes.Fake")
    run, _ = complete(make_config("Fake", ratio=1))
    hidden = {name: value for name, value in os.environ.items() if name != TRUSTED}
    done = subprocess.run([sys.executable, "-m", "rayexpand", "card", str(run.folder)], cwd=ROOT, env=hidden,
                          capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "not known here" in Path(run.folder, "README.md").read_text()
