"""The command line as a user meets it: exit codes, stdout and stderr. One command of each kind of end is a process of
its own (`process`, or `forked` where a signal ends it); the others run `main` in this one (`rayexpand`), which saves
their imports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from rayexpand.contract.errors import three_digits
from tests.commands import ROOT, forked, process, rayexpand

VERBS = ["demo", "validate", "plan", "expand", "evaluate", "audit", "select", "sweep", "fit", "status", "verify",
         "retry", "regen", "bench", "report", "card", "export", "submit"]


@pytest.fixture
def job(tmp_path: Path, image_folder: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({
        "name": "run", "out": str(tmp_path / "out"), "data": {"source": "imagefolder", "path": str(image_folder)},
        "method": {"name": "classical", "ratio": 2}, "sampler": {"batch": 8, "shard_images": 10}}))
    return file


def test_help_lists_every_verb_and_loads_nothing_heavy() -> None:
    code = ("import sys; sys.argv = ['rayexpand', '--help']\n"
            "from rayexpand.cli.main import main\n"
            "try: main()\nexcept SystemExit: pass\n"
            "print(sorted({'torch', 'ray', 'pyarrow', 'numpy', 'pydantic'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)

    assert all(f"  {verb} " in done.stdout for verb in VERBS)
    assert done.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_json(verb: str) -> None:
    assert "--json" in rayexpand(verb, "--help").stdout


def test_the_life_of_a_run(job: Path, tmp_path: Path) -> None:
    made = process("expand", job, "--json", "--log-json")
    summary = json.loads(made.stdout)
    folder = summary["run"]

    assert made.returncode == 0
    assert summary.keys() >= {"planned", "kept", "rejected", "failed", "shards", "seconds", "images_per_second", "run"}
    assert (summary["planned"], summary["kept"], summary["failed"], summary["shards"]) == (40, 40, 0, 4)
    again = json.loads(rayexpand("expand", job, "--json").stdout)
    assert again["kept"] == 40
    assert again["images_per_second"] == summary["images_per_second"]
    assert "nothing to do" in rayexpand("expand", job).stderr

    status = json.loads(rayexpand("status", folder, "--json").stdout)
    assert (status["kept"], status["pending"], status["complete"]) == (40, 0, True)
    assert summary["images_per_second"] == status["images_per_second"] > 0
    assert json.loads(made.stderr.splitlines()[-1])["per_second"] == status["images_per_second"]
    verified = json.loads(rayexpand("verify", folder, "--pixels", "--json").stdout)
    assert verified["problems"] == []
    one = json.loads(rayexpand("regen", folder, "cat/3.png/1", "--to", tmp_path / "one.png", "--json").stdout)
    assert one["equal"] is True
    with Image.open(tmp_path / "one.png") as image:
        assert (image.size, image.format) == ((16, 16), "PNG")
    assert len(list(Path(folder, "attempts").iterdir())) == 1, "neither doing nothing nor regen is a start"
    assert rayexpand("regen", folder, "cat/3.png/1", "--to", tmp_path / "nowhere/one.png").returncode == 2
    page = Path(json.loads(rayexpand("report", folder, "--json").stdout)["report"]).read_text()
    assert "<html" in page
    assert f"{status['images_per_second']:.3g}" in page
    for said in (rayexpand("status", folder).stdout, rayexpand("expand", job).stdout):
        assert three_digits(status["images_per_second"]) in said
    assert "configs:" in Path(json.loads(rayexpand("card", folder, "--json").stdout)["card"]).read_text()
    for verb in ("status", "verify"):
        assert "40" in rayexpand(verb, folder).stdout


def test_photos_that_came_after_a_plan_are_said(job: Path, image_folder: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(image_folder, tmp_path / "photos")
    data = ("--set", f"data.path={photos}")
    assert "planned" not in rayexpand("expand", job, *data).stderr
    for name in ("ant/new.png", "cat/new.png"):
        shutil.copy(photos / "ant/0.png", photos / name)
    (photos / "ant/0.png").unlink()
    said = "the dataset has 2 seeds more and 1 fewer than when this run was planned"

    again = rayexpand("expand", job, *data)
    assert (again.returncode, "nothing to do" in again.stderr, said in again.stderr) == (0, True, True)
    assert said in rayexpand("validate", job, *data).stderr
    assert said in json.loads(rayexpand("plan", job, *data, "--json").stdout)["notes"]["images"]


def test_the_same_folder_refuses_another_run_with_the_difference(job: Path) -> None:
    assert rayexpand("expand", job).returncode == 0
    other = process("expand", job, "--set", "method.ratio=3", "--set", "seed=1")

    assert other.returncode == 4
    assert "method.ratio: 2.0 -> 3.0" in other.stderr
    assert "seed: 0 -> 1" in other.stderr


def test_retry_from_the_command_line(job: Path, tmp_path: Path, image_folder: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(image_folder, broken)
    (broken / "bee/2.png").write_bytes(b"")
    over = rayexpand("expand", job, "--set", f"data.path={broken}", "--json")
    assert over.returncode == 3
    assert "decode_error" in json.loads(over.stdout)["error"]["message"]
    assert "decode_error" in (tmp_path / "out/run/report.html").read_text(), "the report of an over-budget run"
    assert rayexpand("expand", job, "--set", f"data.path={broken}", "--set", "limits.max_failed=1").returncode == 0
    shutil.copy(image_folder / "bee/2.png", broken / "bee/2.png")
    retried = json.loads(rayexpand("retry", tmp_path / "out/run", "--json").stdout)

    assert (retried["kept"], retried["failed"], retried["pending"], retried["made"]) == (40, 0, 0, 2)
    again = rayexpand("retry", tmp_path / "out/run")
    assert (again.returncode, "nothing to do" in again.stderr) == (0, True)


@pytest.mark.parametrize(("change", "words"), [
    ({"method.ratoi": 3}, "method.ratoi: unknown field, did you mean 'ratio'?"),
    ({"data.path": "/nowhere/at/all"}, "data.path: '/nowhere/at/all' does not exist"),
    ({"out": "README.md/runs"}, "out: README.md/runs/run cannot be created, because README.md is not a folder"),
    ({"method.name": "img2img", "prior.weights": "/nowhere/model"}, "prior.weights: there is no folder /nowhere/model"),
    ({"method.name": "img2img", "method.strength": 0.001, "method.steps": 10}, "strength"),
    ({"method.name": "img2img", "image.size": 20}, "20"),
])
def test_bad_input_is_refused_before_anything_is_made(job: Path, tmp_path: Path, change: dict[str, Any],
                                                      words: str) -> None:
    sets = [part for field, value in change.items() for part in ("--set", f"{field}={value}")]
    done = (process if "method.ratoi" in change else rayexpand)("expand", job, *sets, "--json")

    assert done.returncode == 2
    assert words in done.stderr
    assert json.loads(done.stdout)["error"]["exit_code"] == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "place"), [
    (["validate", "{job}", "--set", "data.path=brids"], "brids"),
    (["validate", "{job}", "--set", "data={{source: parquet, path: brids}}"], "brids"),
    (["validate", "{job}", "--set", "data={{source: manifest, path: brids.csv}}"], "brids.csv"),
    (["validate", "{job}", "--set", "data={{source: npz, path: brids.npz}}"], "brids.npz"),
    (["validate", "{job}", "--set", "data.ids=lists/ids.txt"], "lists/ids.txt"),
    (["validate", "{job}", "--set", "data.classes=lists/c.csv"], "lists/c.csv"),
    (["validate", "{job}", "--set", "method={{name: lecf, prompts: p.json}}"], "p.json"),
    (["validate", "my.yaml"], "my.yaml"), (["status", "runs/brids"], "runs/brids"), (["init", "brids"], "brids")])
def test_a_relative_path_that_leads_nowhere_shows_where_it_led(arguments: list[str], place: str, job: Path) -> None:
    done = rayexpand(*(one.format(job=job) for one in arguments))

    assert done.returncode == 2
    assert f"(looked at {ROOT / place})" in done.stderr


def test_validate_prints_every_field(job: Path) -> None:
    shown = yaml.safe_load(rayexpand("validate", job).stdout)

    assert shown["method"]["policy"] == "randaugment"
    assert shown["limits"]["max_failed"] == 0.01
    assert rayexpand("validate", job, "--set", "data.path=/nowhere").returncode == 2


def test_the_imagenet_estimate_needs_neither_data_nor_model() -> None:
    done = rayexpand("plan", "jobs/imagenet/expand-img2img.yaml", "--json", "--set", "estimate.images_per_second=4",
                     "--set", "estimate.gpu_hour_usd=2")
    estimate = json.loads(done.stdout)

    assert estimate["images"] == 12_811_670
    assert 850 < estimate["gpu_hours"] < 950
    assert any("data.path" in problem for problem in estimate["problems"])


@pytest.mark.parametrize("verb", ["report", "status", "verify", "card", "retry", "export"])
def test_a_file_in_place_of_a_folder_says_so(job: Path, tmp_path: Path, verb: str) -> None:
    done = rayexpand(verb, job, *([tmp_path / "new"] if verb == "export" else []))

    assert done.returncode == 2
    assert "job.yaml" in done.stderr
    assert "Errno" not in done.stderr


@pytest.mark.parametrize("verb", ["status", "report", "verify"])
def test_an_endpoint_without_a_scheme_is_named(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    done = rayexpand(verb, "s3://bucket/run")

    assert done.returncode == 2
    assert "Invalid endpoint: localhost:9000" in done.stderr
    assert "AWS_ENDPOINT_URL" in done.stderr


def test_a_place_that_is_no_run_says_so(tmp_path: Path) -> None:
    for verb in ("status", "verify", "report", "card", "retry"):
        done = rayexpand(verb, tmp_path)
        assert done.returncode == 2
        assert "run" in done.stderr
        assert "Traceback" not in done.stderr
    assert "is not in this plan" in rayexpand("regen", _made(tmp_path), "nobody/0").stderr


def _made(tmp_path: Path) -> Path:
    seeds = tmp_path / "seeds/a"
    seeds.mkdir(parents=True)
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(seeds / "1.png")
    job = tmp_path / "one.yaml"
    job.write_text(yaml.safe_dump({"name": "one", "out": str(tmp_path), "method": {"name": "classical", "ratio": 1},
                                   "data": {"source": "imagefolder", "path": str(seeds.parent)}}))
    assert rayexpand("expand", job).returncode == 0
    return tmp_path / "one"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_resumably(job: Path, tmp_path: Path, number: signal.Signals) -> None:
    config = yaml.safe_load(job.read_text())
    config["method"] = {"name": "tests.methods.fakes.Gated", "gate": str(tmp_path / "gate"), "ratio": 2}
    job.write_text(yaml.safe_dump(config))
    child = forked("expand", job, said=tmp_path / "said.txt")
    while not list((tmp_path / "out").glob("run/data/*.parquet")):
        assert child.is_alive(), (tmp_path / "said.txt").read_text()
        time.sleep(0.02)
    os.kill(child.pid, number)  # type: ignore[arg-type]
    (tmp_path / "gate").touch()
    child.join()
    said = (tmp_path / "said.txt").read_text()

    assert child.exitcode == 75
    assert f"{number.name} received; the same command continues" in said
    assert "Traceback" not in said
    assert rayexpand("expand", job).returncode == 0
    assert json.loads(rayexpand("verify", tmp_path / "out/run", "--json").stdout)["pending"] == 0


def test_every_line_of_log_json_is_json(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load(job.read_text())
    config["method"] = {"name": "tests.methods.fakes.Loud", "ratio": 2}
    job.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("RAYEXPAND_FAILPOINT", "before_data@shard=1:kill")
    monkeypatch.setenv("RAYEXPAND_FAILPOINT_ONCE", str(tmp_path / "once"))
    codes, said = [], list[list[dict[str, Any]]]()
    for words in ((), (), ("--set", "method.ratio=3")):
        child = forked("expand", job, "--json", "--log-json", *words, said=tmp_path / "said.txt")
        child.join()
        codes.append(child.exitcode)
        while child.exitcode == -signal.SIGKILL and "written by C" not in (tmp_path / "said.txt").read_text():
            time.sleep(0.02)  # the last words of a command that was killed come a little later
        lines = [json.loads(line) for line in (tmp_path / "said.txt").read_text().splitlines()]
        said.append([line for line in lines if "time" in line])  # the others are on stdout

    assert codes == [-signal.SIGKILL, 0, 4]
    assert {"a library warns", "RuntimeError: a library shows this and goes on", "written by C"} <= {
        line.get("message") for line in said[0]}
    assert (said[1][-1]["done"], said[1][-1]["total"]) == (40, 40)
    assert said[2][-1]["error"]["exit_code"] == 4


def test_bench_measures_and_plan_uses_it(job: Path, tmp_path: Path) -> None:
    found = json.loads(rayexpand("bench", job, "--json").stdout)

    assert found["rows"] == 10
    assert 0 < found["efficiency"] < 1.5
    assert found["seconds"]["sample"] > 0
    planned = json.loads(rayexpand("plan", job, "--json").stdout)
    assert planned["images_per_second"] == pytest.approx(found["images_per_second"])
    assert not (tmp_path / "out/run").exists()


def test_a_fault_of_ours_is_one_line_and_a_file(job: Path, tmp_path: Path) -> None:
    assert rayexpand("expand", job).returncode == 0
    (tmp_path / "out/run/plan").rename(tmp_path / "elsewhere")
    (tmp_path / "out/run/plan").write_text("")
    done = rayexpand("expand", job)

    assert done.returncode in (2, 70)
    assert "Traceback" not in done.stderr
