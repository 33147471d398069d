"""The audit `membership` from shadows to result: what is read, what is kept, and what the attacks find."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rayexpand.api.driving import Relay, train_by
from rayexpand.contract.rng import generator, row_key
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.evaluate import EvaluateConfig
from rayexpand.evaluation.extraction import Found
from rayexpand.evaluation.membership import memberships
from rayexpand.evaluation.membership_result import LIMITS, judged, said, worse
from rayexpand.evaluation.select_scores import in_process as score_here
from rayexpand.evaluation.sides import Side
from rayexpand.fitting.fit import fit
from rayexpand.runs.config import ClusterConfig, RuntimeConfig
from rayexpand.runs.driving import Here
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json
from rayexpand.studies.attacks import Machines, ask_here, audit_membership, nearest, read_flipped
from rayexpand.studies.membership import MembershipConfig
from tests.commands import ROOT, process
from tests.studies.test_membership import section
from tests.studies.test_sample_scores import features_of
from tests.studies.test_study import SMALL

DIGIT = re.compile(r"digits/\d{4}")


def machines(**changes: Any) -> Machines:
    return Machines(**{"drive": Here(), "fit": fit, "score": score_here, "extract": pixels, "ask": ask_here,
                       "train": train_by(False, Relay(None)), **changes})


def pixels(config: EvaluateConfig, sha256: str, sides: Sequence[Side], on_rows: Any) -> list[Found]:
    return [Found(features_of(side), 0, 16) for side in sides]


def audited(config: MembershipConfig, folder: Path, **changes: Any) -> dict[str, Any]:
    return audit_membership(config, str(folder), machines(**changes), Relay(None), runtime=RuntimeConfig(),
                            cluster=ClusterConfig())


@pytest.fixture(scope="module")
def small() -> MembershipConfig:
    return section(recipe=SMALL, queries=["identity", "flip"], training={"device": "cpu"})


@pytest.fixture(scope="module")
def folder(small: MembershipConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("audit") / "membership"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "extractor_hash", lambda *_: "0" * 64)
        (place.parent / "result.json").write_text(json.dumps(audited(small, place)))
    return place


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "extractor_hash", lambda *_: "0" * 64)


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder.parent / "result.json").read_text())


# what is read --------------------------------------------------------------------------------------------------------


def shadow_of(file: Path, folder: Path) -> set[int]:
    """Shadows that a file of the study is of: by its name, or by those that name it."""
    name = str(file.relative_to(folder))
    for pattern in (r"subsets/(\d+)\.txt", r"runs/shadow-(\d+)/", r"-s(\d+)\.\w+$"):
        if found := re.search(pattern, name):
            return {int(found[1])}
    if name.startswith("lists/"):
        return {json.loads(one.read_text())["seed"] for one in (folder / "trials").iterdir()
                if json.loads(one.read_text())["rows"] == name}
    part = folder / "/".join(name.split("/")[:2])  # artifacts/<kind>-<digest>
    said = (part / "artifact.json").read_text() if (part / "artifact.json").is_file() else ""
    return {int(number) for number in re.findall(r"subsets/(\d+)\.txt", said)} | {
        int(link.name.split("-")[1]) for link in (folder / "artifacts").glob("shadow-*")
        if part.resolve() in (link.resolve(), *link.resolve().parents)}


def ids_in(file: Path) -> set[str]:
    """Every seed id that a file names, columns of tables included."""
    if file.suffix == ".parquet":
        table = pq.read_table(file)
    elif file.suffix == ".arrow":
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    else:
        return set(DIGIT.findall(file.read_bytes().decode(errors="ignore")))
    texts = [str(table.schema.metadata), *(str(column.to_pylist()) for column in table.columns)]
    return set(DIGIT.findall("".join(texts)))


def named_by_shadow(study: Path) -> dict[int, set[str]]:
    """The seed ids that the files of each shadow name; every file but the study's own description is of one."""
    named: dict[int, set[str]] = {}
    for file in study.rglob("*"):
        if file.is_symlink() or not file.is_file() or file.name in ("study.json", "report.html") or (
                file.suffix == ".lock"):
            continue
        shadows = shadow_of(file, study)
        assert shadows, f"{file} is of no shadow"
        for shadow in shadows:
            named.setdefault(shadow, set()).update(ids_in(file))
    return named


def members_of(folder: Path) -> dict[int, set[str]]:
    table = pq.read_table(folder / "members.parquet").to_pylist()
    return {shadow: {row["seed_id"] for row in table if row["member"][shadow]} for shadow in range(4)}


def test_no_file_of_a_shadow_names_an_image_that_is_no_member(folder: Path) -> None:
    named, members = named_by_shadow(folder / "shadows"), members_of(folder)

    assert named == members  # all of them, and no other one


@pytest.mark.slow
def test_nothing_that_is_fitted_for_a_shadow_names_another_image(tmp_path: Path) -> None:
    texts = dict.fromkeys(build_index(DataConfig(source="digits")).seed_ids, "a text")
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    config = section(expansion={
        "method": {"name": "realfake", "prompt": "a photo of a {name}, {caption}", "negative": "", "steps": 2},
        "fit": {"captions": {"file": str(tmp_path / "texts.json")},
                "adapter": {"flips": False, "sheet": None, "recipe": {
                    "preset": "tiny", "strategy": "db", "steps": 2, "prompt": "a photo of a {name}",
                    "visual_token": "class_mean", "mmd_gamma": 0.05}}},
        "accept": {"to": "class", "attempts": 1}, "sampler": {"batch": 20, "shard_images": 40}}, recipe=SMALL)
    audited(config, tmp_path / "membership")
    named, members = named_by_shadow(tmp_path / "membership/shadows"), members_of(tmp_path / "membership")

    kinds = {one.name.rpartition("-")[0] for one in (tmp_path / "membership/shadows/artifacts").iterdir()
             if not one.is_symlink()}
    assert {"adapter", "captions", "class_features", "thresholds"} <= kinds
    assert all(named[shadow] == members[shadow] for shadow in range(4))


# what is kept --------------------------------------------------------------------------------------------------------


def test_phi_is_a_number_for_each_shadow_image_and_query(folder: Path, small: MembershipConfig) -> None:
    for line in ("classifier", "samples", "private"):
        table = pq.read_table(folder / f"phi/{line}/3.parquet")
        assert table.schema.field("phi").type == pa.list_(pa.float32(), 2)
        assert table.num_rows == 40


def test_a_second_call_asks_nothing_and_finds_the_same(folder: Path, small: MembershipConfig) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("asked again")

    again = audited(small, folder, extract=never, drive=never, train=lambda study, trials: [],
                    ask=lambda study, trials, question: [never()] if trials else [])
    assert json.loads(json.dumps(again)) == result_of(folder)


def test_a_lost_or_damaged_answer_is_asked_for_again(folder: Path, small: MembershipConfig) -> None:
    (folder / "phi/private/2.parquet").unlink()
    (folder / "phi/samples/1.parquet").write_bytes(b"PAR1")

    assert json.loads(json.dumps(audited(small, folder))) == result_of(folder)


def test_the_result_has_what_pages_and_cards_read(folder: Path) -> None:
    found = result_of(folder)

    assert found["worse"] in ("classifier", "samples")
    for part in (found, found["private"], found["null"]):
        assert set(part["tpr_at_fpr_001"]) >= {"value", "low", "high"}
        assert part["auc"]["low"] <= part["auc"]["value"] <= part["auc"]["high"]
    assert found["planted"]["repeats"] == 3
    assert found["limits"] == list(LIMITS)
    assert found["images"] == 40
    assert set(found["lines"]) == {"classifier", "samples", "private"}
    assert set(found["accuracy"]) == {"classifier", "private"}


def job(folder: Path, small: MembershipConfig) -> tuple[Path, Path]:
    """A file of the small audit, and where its result comes to lie."""
    file = folder / "audit.yaml"
    file.write_text(yaml.safe_dump({"name": "small", "out": str(folder / "runs"), "device": "cpu",
                                    "audit": {"membership": small.model_dump(mode="json")}}))
    return file, folder / "runs/small"


def found_in(folder: Path) -> dict[str, Any]:
    """The result, without what says when it was made."""
    found = (read_json(open_files(folder), "result.json") or {})["membership"]
    return {name: value for name, value in found.items() if name not in ("created", "seconds", "study", "config")}


@pytest.mark.slow
def test_an_audit_that_is_killed_goes_on_and_finds_the_same(small: MembershipConfig, tmp_path: Path) -> None:
    """SIGKILL of the real process in expansion, in training and while classifiers are asked."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    (file, killed), (other, whole) = (job(tmp_path / name, small) for name in ("killed", "whole"))
    assert process("audit", other, "--no-ray").returncode == 0
    ended = []
    for point in ("runs/shadow-1/data/*.parquet", "results/classifier-s2.json", "../phi/private/0.parquet"):
        with subprocess.Popen([sys.executable, "-m", "rayexpand", "audit", str(file), "--no-ray"], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
            while running.poll() is None and not list((killed / "membership/shadows").glob(point)):
                time.sleep(0.01)
            running.kill()
            ended.append(running.wait())
    done = process("audit", file, "--no-ray")

    assert ended == [-signal.SIGKILL] * 3
    assert done.returncode == 0, done.stderr
    assert "cannot see it" in done.stdout
    assert found_in(killed) == found_in(whole)
    assert (killed / "membership.html").is_file()


@pytest.mark.study
@pytest.mark.timeout(3600)
def test_the_job_on_digits(tmp_path: Path) -> None:
    """`samples` finds the planted digit, real images are found more than samples of them, permuted memberships are
    not."""
    done = process("audit", "jobs/digits/audit-membership.yaml", "--no-ray", "--set", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = (read_json(open_files(tmp_path / "digits-audit-membership"), "result.json") or {})["membership"]["lines"]

    assert lines["samples"]["planted"]["found"]
    assert lines["private"]["auc"]["low"] > max(lines[name]["auc"]["high"] for name in ("classifier", "samples"))
    assert all(one["null"]["auc"]["low"] <= 0.5 <= one["null"]["auc"]["high"] for one in lines.values())


# what is compared ----------------------------------------------------------------------------------------------------


def test_the_nearest_sample_counts() -> None:
    rng = generator(row_key(0, "test", "nearest", 0, 0, "features"))
    images, samples = rng.normal(size=(7, 5)), rng.normal(size=(23, 5))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, samples)]
    expected = (unit[0] @ unit[1].T).max(axis=1)

    assert nearest(images, samples) == pytest.approx(expected)
    assert nearest(images, np.concatenate([samples, 3 * images[:1]]))[0] == pytest.approx(1)


def test_the_flip_shows_the_mirror_image() -> None:
    from rayexpand.evaluation.sides import EVERY_ROW, read_seeds, reference_of

    data = DataConfig(source="digits", per_class=1)
    chunk, = reference_of(data, EVERY_ROW).chunks
    plain, flipped = (decode(read(data, chunk).images[0])[0] for read in (read_seeds, read_flipped))  # type: ignore[arg-type]

    assert (plain[:, ::-1] == flipped).all()
    assert (plain != flipped).any()


# what is found -------------------------------------------------------------------------------------------------------


def simulated(shift: float, planted: float) -> dict[str, Any]:
    """A line of 8 shadows and 200 images: members higher by `shift`, the planted one by `planted`."""
    ids = [str(n) for n in range(200)]
    member = memberships(ids, 8, 0)
    rng = generator(row_key(0, "test", "judged", 0, 0, "phi"))
    phi = rng.normal(size=(8, 200, 2)) + shift * member[:, :, None]
    phi[:, 7] += planted * member[:, 7, None]
    return judged(phi, member, memberships(ids, 8, 0, stream="permuted"), 7, variance="pooled", reference=False, seed=0)


@pytest.fixture(scope="module")
def lines() -> dict[str, Any]:
    return {"blind": simulated(0, 0), "sees": simulated(1.5, 10)}


def test_an_attack_that_sees_finds_members_and_the_planted_image(lines: dict[str, Any]) -> None:
    assert lines["sees"]["auc"]["low"] > 0.6
    assert lines["sees"]["planted"] == {"found": True, "hits": 4, "shadows": 4, "fpr": 0.01, "alarms": 0}
    assert lines["blind"]["auc"]["low"] < 0.5 < lines["blind"]["auc"]["high"]
    assert not lines["blind"]["planted"]["found"]
    assert worse(lines) == "sees"


def test_permuted_memberships_give_half(lines: dict[str, Any]) -> None:
    for one in lines.values():
        assert one["null"]["auc"]["low"] <= 0.5 <= one["null"]["auc"]["high"]


def test_what_cannot_see_says_so(lines: dict[str, Any]) -> None:
    blind, sees = ([line for line in said(lines, 50) if line.startswith(name)] for name in ("blind", "sees"))

    assert "does not tell members from others" in blind[0]
    assert "cannot see it: finds the planted image in 0 of the 4 shadows that list one image 50 times" in blind[1]
    assert "so it tells members from others better than chance" in sees[0]
    assert "finds the planted image in 4 of the 4" in sees[1]
    broken = {"x": {**lines["sees"], "null": {"auc": {"value": .7, "low": .6, "high": .8}}}}
    assert "cannot be believed" in said(broken, 50)[-1]
