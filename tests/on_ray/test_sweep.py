"""Sweeps under Ray Tune: killed and resumed, four trials at once, and a stopped trial that makes room."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.on_ray.conftest import ROOT, Head

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

STRENGTH, GUIDANCE = "expansions.img2img.method.strength", "expansions.img2img.method.guidance_scale"


def raw(out: Path, **sections: Any) -> dict[str, Any]:
    """Two real digits per class, ten held out to choose by."""
    return {"name": "sweep", "out": str(out), "arm": "original", "hold_out": 10, "samples": 4,
            "space": {"recipe.lr": {"uniform": [0.005, 0.02]}},
            "study": {"data": {"source": "digits"}, "test": {"source": "digits", "split": "test"}, "seeds": [0],
                      "subset": {"kind": "per_class", "n": 2}, "recipe": {"updates": 40, "epochs": 4},
                      "arms": [{"name": "original"}]}, **sections}


def img2img(out: Path, **sections: Any) -> dict[str, Any]:
    """The same, tuned on image-to-image with the embedded default."""
    found = raw(out, arm="img2img", **sections)
    found["study"]["arms"].append({"name": "img2img", "use": "img2img"})
    found["study"]["expansions"] = {"img2img": {"sampler": {"batch": 20, "shard_images": 20}, "method": {
        "name": "img2img", "ratio": 1, "prompt": "a photo of a {name}", "strength": 0.9, "steps": 8,
        "guidance_scale": 2.0}}}
    return found


def start(head: Head | None, sweep: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    file = Path(sweep["out"]) / "sweep.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(sweep))
    own = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token"}
    own.pop("RAY_ADDRESS", None)
    address = ["--set", f"cluster.address={head.address}"] if head else []
    return subprocess.Popen([sys.executable, "-m", "rayexpand", "sweep", str(file), "--json", *address], cwd=ROOT,
                            env={**(head.env if head else own), **environment}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(child: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, stderr = child.communicate()
    assert child.returncode == 0, stderr
    return json.loads(stdout)


@contextlib.contextmanager
def unchanged(files: list[Path]) -> Iterator[None]:
    before = [(file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes()) for file in files]
    yield
    assert [(file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes()) for file in files] == before


def test_a_killed_sweep_goes_on_and_its_best_can_be_trained_again(head: Head, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep = img2img(out, search="optuna", samples=5, scheduler={"asha": {"grace": 2, "reduction_factor": 2}}, space={
        STRENGTH: {"uniform": [0.3, 0.9], "step": 0.2}, GUIDANCE: {"uniform": [1.0, 3.0], "step": 1.0}})
    child = start(head, sweep, TMPDIR=str(tmp_path))
    trials = out / "sweep/trials"
    while child.poll() is None and len(list(trials.glob("*.json"))) < 1:
        time.sleep(0.1)
    child.kill()
    _, stderr = child.communicate()
    done = sorted(trials.glob("*.json"))
    tried = {file.name: file.read_bytes() for file in (out / "sweep/suggestions").iterdir()}
    assert 1 <= len(done) < len(tried), f"killed with trials in the middle: {stderr}"

    with unchanged(done):
        found = finish(start(head, sweep))

    assert found["failed"] == []
    assert all((out / "sweep/suggestions" / name).read_bytes() == text for name, text in tried.items())
    suggested = {json.loads(file.read_bytes())["key"] for file in (out / "sweep/suggestions").iterdir()}
    assert {one["key"] for one in found["trials"]} == suggested
    assert all(one["state"] == "finished" or one["epochs"] < one["of_epochs"] for one in found["trials"])
    again = subprocess.run([sys.executable, "-m", "rayexpand", "train", str(out / "sweep/best.yaml"), "--no-ray",
                            "--json", "--set", f"out={tmp_path / 'again'}"], cwd=ROOT, env=head.env, text=True,
                           capture_output=True, check=True)
    arm = json.loads(again.stdout)["arms"][0]
    assert arm["last"]["top1"]["values"] == found["scores"]
    with unchanged(sorted(trials.glob("*.json"))):
        assert finish(start(head, sweep))["test_score"] == found["test_score"]


def test_four_trials_at_once_on_two_cpus_share_a_pilot(tmp_path: Path) -> None:
    sweep = img2img(tmp_path / "out", cpus_per_trial=0.5)
    found = finish(start(None, sweep))
    spans = [(one["started"], one["ended"]) for one in found["trials"]]

    assert [one["state"] for one in found["trials"]] == ["finished"] * 4
    if os.cpu_count() == 2:
        assert max(begin for begin, _ in spans) < min(end for _, end in spans), "all four ran at once"
    assert sum(one["rows_made"] for one in found["trials"]) == 20, "each sample was made by one of them"
    assert len({tuple(one["pilots"]) for one in found["trials"]}) == 1


def test_a_trial_that_dies_with_a_shared_pilot_in_its_hands(head: Head, tmp_path: Path) -> None:
    once = tmp_path / "once"
    sweep = img2img(tmp_path / "out", samples=2)
    found = finish(start(head, sweep, RAYEXPAND_FAILPOINT="before_data@shard=0:kill",
                         RAYEXPAND_FAILPOINT_ONCE=str(once)))

    assert once.exists(), "the failpoint was never reached"
    assert [one["state"] for one in found["trials"]] == ["finished"] * 2
    assert sum(one["rows_made"] for one in found["trials"]) == 20


def test_a_proxy_drops_trials_before_they_train(head: Head, tmp_path: Path) -> None:
    """One at a time, as without Ray: the same trials are dropped."""
    sweep = img2img(tmp_path / "out", search="grid", samples=None, max_concurrent=1, fresh_seeds=0, space={
        STRENGTH: {"grid": [0.7, 0.3, 0.9]}}, proxies={}, early={"proxy": "fd", "keep": 0.3, "first": 2})
    found = finish(start(head, sweep))
    alone = subprocess.run([sys.executable, "-m", "rayexpand", "sweep", str(tmp_path / "out/sweep.yaml"), "--no-ray",
                            "--json", "--set", f"out={tmp_path / 'alone'}"], cwd=ROOT, env=head.env, text=True,
                           capture_output=True, check=True)
    states = [{one["values"][STRENGTH]: one["state"] for one in numbers["trials"]}
              for numbers in (found, json.loads(alone.stdout))]

    assert found["failed"] == []
    assert states == [{0.7: "finished", 0.3: "finished", 0.9: "dropped"}] * 2, "in this order, 0.9 is worst"
    assert found["counts"]["dropped"] == found["proxies"]["dropped"] == 1


def test_a_stopped_trial_makes_room_within_30_seconds(head: Head, tmp_path: Path) -> None:
    """A trial takes the whole cluster, so the next one starts only when the stopped one has let go of it."""
    sweep = raw(tmp_path / "out", cpus_per_trial=4, search="grid", scheduler={"asha": {"grace": 1}},
                space={"recipe.lr": {"choice": [0.01, 1e-7, 2e-7]}})
    del sweep["samples"]
    sweep["study"]["recipe"] |= {"schedule": "constant"}
    found = finish(start(head, sweep))
    first, second, third = sorted(found["trials"], key=lambda one: one["number"])
    waited = third["started"] - second["ended"]

    assert [one["state"] for one in (first, second, third)] == ["finished", "stopped", "stopped"]
    assert (second["epochs"], second["of_epochs"]) == (1, 4)
    print(f"stop to next start: {waited:.1f} s")
    assert 0 < waited < 30
