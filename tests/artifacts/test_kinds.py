"""A kind of the tests' own: what a run says of it, checks, hashes and gives to samplers follows from its class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rayexpand import artifacts
from rayexpand.artifacts.kinds import ArtifactKind, RunInputs
from rayexpand.artifacts.store import files_hash
from rayexpand.contract.errors import ConfigError
from rayexpand.contract.protocols import Method
from rayexpand.methods import trust
from rayexpand.on_ray.stage import artifact_model
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig, parse
from rayexpand.runs.inputs import load_artifacts
from tests.conftest import MakeConfig
from tests.methods.fakes import Fake


class Marks(ArtifactKind):
    name = "marks"
    wants = "marks of the classes and none are"

    def unused(self, method: Method) -> tuple[str, str]:
        return "marks nothing", "set wants to marks"

    def problems(self, folder: Path, run: RunInputs) -> list[str]:
        return [] if (folder / "marks.txt").is_file() else [f"{folder} has no marks.txt"]

    def load(self, folder: Path, run: RunInputs, class_keys: Sequence[str]) -> Any:
        return dict(zip(class_keys, (folder / "marks.txt").read_text().split(), strict=True))

    def classes(self, folder: Path) -> Sequence[str]:
        file = folder / "classes.txt"
        return file.read_text().split() if file.is_file() else ()


trust("tests.artifacts.test_kinds.Marking")


class Marking(Fake):
    """Needs marks where it is told to."""

    name: str = "tests.artifacts.test_kinds.Marking"
    wants: bool = True

    def needs(self) -> frozenset[str]:
        return frozenset({"marks"} if self.wants else ())


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setitem(artifacts.KINDS, "marks", Marks())
    folder = tmp_path / "marks"
    folder.mkdir()
    (folder / "marks.txt").write_text("a b c d")
    found = make_config("Fake", ratio=1, sections={"artifacts": {"marks": str(folder)}})
    return found.model_copy(update={"method": Marking(ratio=1)})


def test_a_run_loads_what_its_kind_gives_and_depends_on_its_content(config: RunConfig, tmp_path: Path) -> None:
    assert runs.preflight(config) == []
    run = runs.prepare(config)
    assert run.facts["models"] == {"marks": files_hash(tmp_path / "marks", ["marks.txt"])}
    assert load_artifacts(config, run.plan.index.classes.key) == {"marks": dict(zip(
        ("ant", "bee", "cat", "dog"), "abcd", strict=True))}
    model = artifact_model(tmp_path / "marks", "marks")
    assert model.find() == {"marks.txt": tmp_path / "marks/marks.txt"}
    assert model.hash(tmp_path / "marks") == run.facts["models"]["marks"]


def test_what_is_wrong_is_said_before_anything_is_made(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "marks/classes.txt").write_text("ant bee cat wolf")
    assert runs.preflight(config) == [
        f"artifacts.marks: {tmp_path}/marks was made for other classes than the dataset has: class 3 is 'wolf' there "
        "and 'dog' here. Make them on this dataset with `rayexpand fit` and this same file"]
    (tmp_path / "marks/marks.txt").unlink()
    assert f"artifacts.marks: {tmp_path}/marks has no marks.txt" in runs.preflight(config)
    (none,) = runs.preflight(config.model_copy(update={"artifacts": {}}))
    assert none.startswith("artifacts.marks: tests.artifacts.test_kinds.Marking needs marks of the classes and none")
    (unused,) = runs.preflight(config.model_copy(update={"method": Marking(ratio=1, wants=False)}))
    assert "which marks nothing; take it out, or set wants to marks" in unused


def test_a_kind_there_is_not_is_an_error_with_a_suggestion() -> None:
    raw = {"name": "x", "data": {"source": "digits"}, "method": {"name": "classical", "ratio": 1}}
    with pytest.raises(ConfigError, match=r"artifacts.*unknown kind 'prototype', did you mean 'prototypes'"):
        parse({**raw, "artifacts": {"prototype": "x"}})
    assert parse({**raw, "artifacts": {"prototypes": None, "captions": None}}).artifacts == {}, "as 0.1.0 wrote them"
