"""A study in an object store: what it fits is found by a driver on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayexpand.artifacts.store import artifact_digest, publish, read_facts
from rayexpand.contract.errors import DamagedFile
from rayexpand.fitting.fit import fit
from rayexpand.storage.places import open_files
from rayexpand.studies.artifact_copies import bring, keep
from rayexpand.studies.config import parse_study
from rayexpand.studies.expansions import pending_runs
from rayexpand.studies.study import prepare_study
from tests.s3server import Server

STUDY = {
    "name": "one", "data": {"source": "digits"}, "subset": {"kind": "per_class", "n": 1}, "seeds": [0],
    "test": {"source": "digits", "split": "test", "per_class": 1}, "arms": [{"name": "guided", "use": "guided"}],
    "expansions": {"guided": {"config": {"method": {"name": "distdiff", "ratio": 1, "steps": 4, "guide_step": 2},
                                         "prior": {"device": "cpu"}},
                              "fit": {"groups": 1, "guide": {"kind": "random"}}}}}


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.fast_cases(1)
def test_another_machine_fits_nothing_again(scheme: str, object_stores: Server, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Path]] = []

    def fitted(*arguments: Any) -> dict[str, Path]:
        found.append(fit(*arguments))
        return found[-1]

    for machine in ("first", "second"):
        (tmp_path / machine).mkdir()
        monkeypatch.chdir(tmp_path / machine)
        (run,) = pending_runs(prepare_study(parse_study({**STUDY, "out": f"{scheme}://runs"})), fit=fitted)
        monkeypatch.setattr("rayexpand.fitting.guide.save_classifier", None)  # which would fill a new one

    first, second = found
    assert first == second
    for role, folder in first.items():
        assert read_facts(tmp_path / "first" / folder) == read_facts(tmp_path / "second" / folder), role
    kept = open_files(f"{scheme}://runs/one").list("artifacts")
    assert kept == sorted(f"{folder.name}.tar" for folder in first.values())
    assert str(run.config.guide.weights) == str(first["guide"])


def test_a_damaged_copy_is_said_and_a_whole_one_is_not_sent_again(object_stores: Server, tmp_path: Path) -> None:
    files, made_from = open_files("s3://runs/one"), {"x": 1}
    folder = publish(str(tmp_path / "here"), "kind", made_from, lambda at: {"n": (at / "a.txt").write_text("a")})
    keep(files, [folder])
    name = f"artifacts/kind-{artifact_digest('kind', made_from)[:8]}.tar"
    content = files.read(name)
    assert content is not None
    files.replace(name, content[:700])
    keep(files, [folder])
    assert files.read(name) == content[:700]

    (tmp_path / "there").mkdir()
    with pytest.raises(DamagedFile, match=r"kind-\w+\.tar: is damaged .*Delete it"):
        bring(files, str(tmp_path / "there"))
    assert list((tmp_path / "there").iterdir()) == []
