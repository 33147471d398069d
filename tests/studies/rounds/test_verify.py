"""verify of a loop names the file that was changed, and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayexpand import api
from rayexpand.loader.training_set import RowSource, TrainingSet
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.tables import NAMED, parquet_bytes, read_json, read_table, sealed
from rayexpand.studies import cross_fit as scoring
from rayexpand.studies.rounds.decisions import RoundDecision, read_decision
from rayexpand.studies.rounds.verify import verify_loop
from tests.commands import rayexpand
from tests.studies.rounds.conftest import finished
from tests.studies.rounds.test_learning import LONGER, LOSS, digits_loop

TABLE, SCORES = "decisions/0002-*.parquet", "scores/0002.parquet"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verified")
    finished(digits_loop(out, rounds={**LOSS, "count": 3, "scores": LONGER}))
    return out / "loop"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "loop")


def named(folder: Path) -> list[str]:
    return [one.partition(":")[0] for one in verify_loop(str(folder)).problems]


def test_a_sound_loop_has_no_problem_where_it_was_made_and_where_it_is_copied(made: Path, folder: Path) -> None:
    for place in (made, folder):
        found = verify_loop(str(place), pixels=True)
        assert (found.problems, found.unseen, found.totals.kept) == ([], 0, 120)
    assert api.open(folder).verify().to_json()["unseen"] == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["rounds.json", "decisions/0001.json", "decisions/0002.json", "decisions/0004.json",
                                  TABLE, SCORES, "scores/0003.parquet", "rounds/0001/data/train-000001.parquet",
                                  "rounds/0002/run.json"])
def test_one_changed_byte_is_found_in_its_file(folder: Path, name: str) -> None:
    (file,) = folder.glob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))

    assert set(named(folder)) == {str(file.relative_to(folder))}


def _table(folder: Path, change: Callable[[dict[str, np.ndarray]], None], name: str) -> str:
    """Changes a table and seals it anew."""
    (file,) = folder.glob(name)
    place = str(file.relative_to(folder))
    table = read_table(LocalFiles(folder), place)
    columns = {one: table[one].to_numpy().copy() for one in table.column_names if one != "seed_id"}
    change(columns)
    changed = pa.table({"seed_id": table["seed_id"], **columns})
    file.write_bytes(parquet_bytes(changed, {**(table.schema.metadata or {}), NAMED: place.encode()}))
    return place


def _decision(folder: Path, **changes: Any) -> str:
    """Changes decision 2 and seals it anew."""
    decision = read_decision(LocalFiles(folder), 2)
    assert decision is not None
    changed = replace(decision, **changes)
    content = {**asdict(changed), "sha256": changed.sha256}
    (folder / decision.name).write_bytes(sealed(decision.name, content))
    return decision.name


def _moved(columns: dict[str, np.ndarray]) -> None:
    copies = columns["copies"]
    copies[0] -= 1
    copies[1] += 1


def _weighted(columns: dict[str, np.ndarray]) -> None:
    columns["weight"][0] *= 1 + 1e-7  # deals the same


def _harder(columns: dict[str, np.ndarray]) -> None:
    columns["p_label"][0] *= 0.5


def _cap(folder: Path) -> str:
    facts = read_json(LocalFiles(folder), "rounds.json")
    assert facts is not None
    facts["config"]["rounds"]["cap"] = 9
    (folder / "rounds.json").write_bytes(sealed("rounds.json", facts))
    return "rounds.json"


@pytest.mark.parametrize("forge", [
    lambda folder: _table(folder, _harder, SCORES), lambda folder: _table(folder, _moved, TABLE),
    lambda folder: _decision(folder, planned=41), lambda folder: _decision(folder, reason="because"),
    lambda folder: _decision(folder, guide={"folder": "artifacts/x", "sha256": "0"}), _cap,
    lambda folder: _decision(folder, follows="0" * 64), lambda folder: _decision(folder, loop="0" * 64)])
def test_a_change_that_was_sealed_anew_is_found_too(folder: Path, forge: Callable[[Path], str]) -> None:
    place = forge(folder)
    assert named(folder) == [place]


@pytest.mark.parametrize(("change", "says"), [
    (_moved, "the copies of 2 seeds are not those that their weights give"),
    (_weighted, "its weights do not follow from the scores")])
def test_what_weights_or_scores_do_not_give_is_found_in_a_forged_decision(
        folder: Path, change: Callable[[dict[str, np.ndarray]], None], says: str) -> None:
    """Table, decision and run.json forged together: the dealing is repeated."""
    import hashlib

    from rayexpand.studies.rounds.decisions import array_sha256

    place = _table(folder, change, TABLE)
    decision = read_decision(LocalFiles(folder), 2)
    assert decision is not None
    copies = read_table(LocalFiles(folder), place)["copies"].to_numpy()
    content = (folder / place).read_bytes()
    _decision(folder, table={**decision.table, "copies": array_sha256(copies),
                             "sha256": hashlib.sha256(content).hexdigest()})
    again = read_decision(LocalFiles(folder), 2)
    facts = read_json(LocalFiles(folder / "rounds/0002"), "run.json")
    assert facts is not None
    assert again is not None
    facts["follows"]["decision"] = again.sha256
    (folder / "rounds/0002/run.json").write_bytes(sealed("run.json", facts))

    problems = verify_loop(str(folder)).problems
    assert problems[0].startswith(f"{place}: {says}")
    assert [one.partition(":")[0] for one in problems[1:]] in (["decisions/0003.json"], [place, "decisions/0003.json"])


def test_decisions_that_are_gone_or_of_another_loop_are_named(folder: Path, tmp_path: Path) -> None:
    other, _ = finished(digits_loop(tmp_path, "other", rounds={**LOSS, "count": 3}))
    kept = (folder / "decisions/0002.json").read_bytes()
    shutil.copy(str(other.files.at("decisions/0002.json")), folder / "decisions/0002.json")
    assert named(folder) == ["decisions/0002.json"]
    (folder / "decisions/0002.json").unlink()
    assert named(folder) == ["decisions/0002.json"]
    (folder / "decisions/0002.json").write_bytes(kept)
    assert named(folder) == []
    shutil.rmtree(folder / "lists")
    shutil.rmtree(folder / "trials")
    assert named(folder) == [], "nothing rests on them once a round is decided"


@pytest.mark.parametrize("of", [pytest.param("seeds", marks=pytest.mark.slow), "samples"])
def test_a_fold_that_saw_what_it_scores_is_found(tmp_path: Path, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = scoring.training_set

    def leaky(parts: list[RowSource], **fields: Any) -> TrainingSet:
        return honest([replace(one, only=None) if (one.run is None) == (of == "seeds") else one for one in parts],
                      **fields)

    monkeypatch.setattr(scoring, "training_set", leaky)
    finished(digits_loop(tmp_path))
    problems = verify_loop(str(tmp_path / "loop")).problems
    assert len(problems) == 2
    assert all(one.startswith("lists/") and "10 of these seeds, or samples" in one for one in problems)


def test_the_command_says_what_is_wrong(folder: Path) -> None:
    assert rayexpand("verify", folder).returncode == 0
    (folder / "decisions/0003.json").write_text("{}")
    found = rayexpand("verify", folder, "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["problems"][0].startswith("decisions/0003.json")


def test_a_loop_that_has_not_ended_is_verified_as_far_as_it_is(folder: Path) -> None:
    for name in ("decisions/0003.json", "decisions/0004.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "rounds/0003")
    assert named(folder) == []
    assert isinstance(read_decision(LocalFiles(folder), 2), RoundDecision)
