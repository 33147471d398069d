"""The API as a notebook uses it: typed results, progress, cancelling, and a sampler that hangs in a child."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rayexpand
from rayexpand import api
from rayexpand.contract.errors import OverBudget, UsageError
from rayexpand.methods import TRUSTED
from rayexpand.runs import run as runs
from rayexpand.runs.driving import Child
from tests.commands import ROOT
from tests.conftest import MakeConfig, complete, hashes


@pytest.fixture
def job(image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {"name": "run", "out": str(tmp_path / "out"), "data": {"source": "imagefolder", "path": str(image_folder)},
            "method": {"name": "classical", "ratio": 2}, "sampler": {"batch": 8, "shard_images": 10}}


@pytest.fixture(scope="module")
def made(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[api.RunFolder, list[api.Event]]:
    """A run that a child made, and what it told."""
    heard: list[api.Event] = []
    job = {"name": "run", "out": str(tmp_path_factory.mktemp("made")), "method": {"name": "classical", "ratio": 2},
           "data": {"source": "imagefolder", "path": str(image_folder)}, "sampler": {"batch": 8, "shard_images": 10}}
    return rayexpand.expand(job, on=heard.append), heard


def test_importing_loads_neither_torch_nor_ray_nor_the_api() -> None:
    code = ("import sys, rayexpand\n"
            "assert not {'torch', 'ray', 'pydantic', 'numpy'} & set(sys.modules)\n"
            "assert {'expand', 'dataset', 'open'} <= set(dir(rayexpand))\n"
            "rayexpand.validate\n"
            "assert not {'torch', 'ray'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="has no attribute 'expnd'"):
        _ = rayexpand.expnd


def test_five_lines_of_python(made: tuple[api.RunFolder, list[api.Event]], tmp_path: Path) -> None:
    run, heard = made

    assert isinstance(run, api.RunFolder)
    assert (run.to_dict()["kept"], run.to_dict()["failed"]) == (40, 0)
    assert {"seconds", "images_per_second", "run"} <= run.to_dict().keys()
    assert heard[-1].done == heard[-1].total == 40
    assert heard[-1].facts["kept"] == 40
    assert "<td>40</td>" in run._repr_html_()
    samples = list(run.samples())
    assert len(samples) == 40
    assert (samples[0]["image"].size, samples[0]["class_name"]) == ((16, 16), "ant")
    assert run.verify(pixels=True).problems == []
    assert run.status().to_json()["kept"] == 40
    assert run.export(tmp_path / "exported", "imagefolder").count == 40
    assert Path(run.report()).is_file()
    assert Path(run.card("cc-by-4.0")).is_file()
    assert run.regen("ant/0.png/1")["equal"] is True
    assert api.open(run.folder) == api.RunFolder(run.folder)


def test_a_child_and_this_process_make_the_same_samples(job: dict[str, Any],
                                                        made: tuple[api.RunFolder, list[api.Event]]) -> None:
    here = rayexpand.expand(job, same_process=True)

    assert hashes(runs.open_run(made[0].folder)) == hashes(runs.open_run(here.folder))


@pytest.mark.slow
def test_nothing_is_printed_and_the_folder_stays(job: dict[str, Any], tmp_path: Path) -> None:
    code = ("import json, os, signal, sys, rayexpand\n"
            "before = os.getcwd(), [signal.getsignal(n) for n in (2, 15)]\n"
            "rayexpand.expand(json.loads(sys.argv[1]))\n"
            "assert before == (os.getcwd(), [signal.getsignal(n) for n in (2, 15)])")
    done = subprocess.run([sys.executable, "-c", code, json.dumps(job)], capture_output=True, text=True, cwd=ROOT)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("same_process", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_on_raises_cancels_and_the_same_call_continues(job: dict[str, Any], same_process: bool) -> None:
    job["method"]["name"] = "tests.methods.fakes.Fake"  # starts without torch

    class Enough(Exception):
        pass

    def on(event: api.Event) -> None:
        if event.facts.get("kept", 0) >= 10:
            raise Enough

    with pytest.raises(Enough):
        rayexpand.expand(job, on=on, same_process=same_process)
    committed = runs.open_run(f"{job['out']}/run").totals()
    assert 10 <= committed.kept < 40
    assert not list(Path(job["out"], "run/blame").iterdir()), "a cancelled call blames nothing"
    heard: list[api.Event] = []
    assert rayexpand.expand(job, on=heard.append, same_process=same_process).to_dict()["kept"] == 40
    assert min(event.done for event in heard) >= committed.kept


@pytest.mark.chaos
def test_a_sampler_that_hangs_ends_its_child_and_not_the_notebook(make_config: MakeConfig) -> None:
    config = make_config("Hang", ratio=1, bad="bee/2.png/0", sections={
        "limits": {"deadline_s": 1, "first_deadline_s": 1, "max_failed": 1}})
    run = rayexpand.expand(config)

    assert run.to_dict()["failed"] == 1
    reasons = [row["reason"] for receipt in runs.open_run(run.folder).store.receipts()
               for row in runs.open_run(run.folder).store.refused(receipt).to_pylist()]
    assert reasons == ["timeout"]


def test_a_child_that_says_much_ends_when_it_is_told_to(job: dict[str, Any]) -> None:
    """What it says after the reader has gone away must not keep it in a full pipe."""
    child = Child()
    child._process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); print('x' * 10_000_000)"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True)
    process = child._process
    child.close()

    assert process.returncode == 0


@pytest.mark.slow
def test_the_child_finds_what_this_process_can_import(image_folder: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_a_notebook.py").write_text(
        "from rayexpand.methods.classical import Classical\n\n\nclass Mine(Classical):\n    name: str = 'x'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(TRUSTED, "mine_of_a_notebook.Mine")
    run = rayexpand.expand({
        "name": "own", "out": str(tmp_path), "data": {"source": "imagefolder", "path": str(image_folder)},
        "method": {"name": "mine_of_a_notebook.Mine", "ratio": 1}})

    assert run.status().kept == 20


@pytest.mark.parametrize("on_ray", [pytest.param(False, marks=pytest.mark.slow),
                                    pytest.param(True, marks=pytest.mark.cluster)])
def test_nothing_is_imported_from_the_folder_one_stands_in(job: dict[str, Any], tmp_path: Path, on_ray: bool) -> None:
    """A run folder from somebody else may hold a PIL.py."""
    here = tmp_path / "theirs"
    here.mkdir()
    for name in ("PIL", "torch", "rayexpand", "sitecustomize", "secrets"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})\n")
    code = f"from rayexpand import api; print(api.expand({job!r}, ray={on_ray}).status().kept)"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=here, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})

    assert not (tmp_path / "executed").exists()
    assert done.stdout.split() == ["40"], done.stderr


@pytest.mark.chaos
def test_the_child_ends_with_a_killed_parent(make_config: MakeConfig) -> None:
    config = make_config("Sleeping", ratio=5, seconds=0.2)
    code = ("import json, sys\nfrom rayexpand import api\n"
            "api.expand(json.loads(sys.argv[1]), on=lambda event: print(event.done, flush=True))\n")
    parent = subprocess.Popen([sys.executable, "-c", code, json.dumps(config.model_dump(mode="json"))], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    parent.stdout.readline()
    children = [int(one) for one in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()

    assert children
    while any(_alive(child) for child in children):  # it ends after its current call
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_over_budget_carries_the_run_and_holds_every_time(make_config: MakeConfig) -> None:
    config = make_config("Failing", ratio=1, nan="bee/2.png/0", sections={"limits": {"max_failed": 0.0}})
    for same_process in (False, True):  # the second finds nothing to make
        with pytest.raises(OverBudget) as caught:
            rayexpand.expand(config, same_process=same_process)
        assert caught.value.exit_code == 3
        assert caught.value.result.to_dict()["failed"] == 1
        assert Path(caught.value.result.folder, "report.html").is_file()
    with pytest.raises(OverBudget):
        api.RunFolder(caught.value.result.folder).retry(same_process=True)


def test_a_dataset_for_a_trainer_of_ones_own(made: tuple[api.RunFolder, list[api.Event]]) -> None:
    run, _ = made
    samples, both = rayexpand.dataset(run), rayexpand.dataset(run.folder, real=True, copies=1)

    assert (len(samples), len(both)) == (40, 40)
    image, label, facts = both[0]
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 16, 16))
    assert (label.tolist(), facts["synthetic"]) == ([1, 0, 0, 0], False)
    assert both[39][2]["synthetic"] is True
    loader = torch.utils.data.DataLoader(both, batch_size=8, shuffle=True, num_workers=1)
    images, labels, facts = next(iter(loader))
    assert (images.shape, labels.shape, len(facts["label"])) == ((8, 3, 16, 16), (8, 4), 8)
    with pytest.raises(IndexError):
        both[40]


def test_fit_select_train_and_open_return_results(tmp_path: Path) -> None:
    study = {"name": "small", "out": str(tmp_path), "data": {"source": "digits", "per_class": 2}, "seeds": [0],
             "test": {"source": "digits", "split": "test", "per_class": 2},
             "recipe": {"preset": "digits", "updates": 2}, "arms": [{"name": "a"}, {"name": "b", "use": "more"}],
             "expansions": {"more": {"method": {"name": "classical", "ratio": 1}}}}
    found = rayexpand.train(study)

    assert found.failed == ()
    assert [row[0] for row in found.table()[1]][:2] == ["a", "b"]
    assert found.page == found.report()
    assert Path(found.page).is_file()
    assert isinstance(api.open(found.folder), api.StudyFolder)
    made = next(iter((tmp_path / "small/runs").iterdir()))
    chosen = rayexpand.select({"name": "half", "run": str(made),
                               "rule": {"kind": "random", "share": 0.5, "per": "class"}})
    assert chosen.to_dict()["kept"] == 10
    assert len(rayexpand.dataset(made, selection="half")) == 10
    with pytest.raises(UsageError):
        api.open(tmp_path / "nothing")


def test_the_plan_of_a_run_and_a_file_as_a_path(tmp_path: Path) -> None:
    found = rayexpand.plan(ROOT / "jobs/digits/expand-classical.yaml")

    assert found.problems == []
    assert [len(row) for row in found.table()[1]] == [3] * len(found.table()[1])
    assert "<td>" in found._repr_html_()


@pytest.mark.chaos
@pytest.mark.skipif(not hasattr(os, "setsid"), reason="process groups")
def test_ctrl_c_in_a_script_ends_after_the_current_call(make_config: MakeConfig) -> None:
    run, _ = complete(make_config("Fake", ratio=1))
    config = make_config("Sleeping", name="slow", ratio=15, seconds=0.5)
    code = ("import json, signal, sys\nfrom rayexpand import api\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
            "try:\n    api.expand(json.loads(sys.argv[1]), on=lambda event: print(event.done, flush=True))\n"
            "except KeyboardInterrupt:\n    print('stopped', flush=True)\n")
    script = subprocess.Popen([sys.executable, "-c", code, json.dumps(config.model_dump(mode="json"))], cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert script.stdout is not None
    script.stdout.readline()
    os.killpg(script.pid, signal.SIGINT)
    out, err = script.communicate()

    assert out.splitlines()[-1] == "stopped", err
    assert "Traceback" not in err
    assert not list(Path(str(run.folder)).parent.joinpath("slow/blame").iterdir())
