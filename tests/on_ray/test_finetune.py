"""Fine-tuning on Ray: two workers train what one process trains, and killed workers and drivers change no byte."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file

from rayexpand.artifacts.columns import write_captions, write_class_features
from rayexpand.artifacts.store import read_facts
from rayexpand.contract.errors import RayexpandError, UsageError
from rayexpand.fitting import fit as fits
from rayexpand.fitting.config import parse_fit
from rayexpand.on_ray import stage
from rayexpand.on_ray.finetune import latents_model
from rayexpand.on_ray.fit import fit as fit_on_ray
from rayexpand.on_ray.pool import connected
from rayexpand.storage.position import read_position
from tests.commands import ROOT
from tests.fitting.adapter.test_train import KEYS, PLAIN, SHORT, content, quiet
from tests.models.gif_priors import tiny_unclip
from tests.tiny import tiny_clip, tiny_pipeline

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]
STEPS, EVERY = 80, 10
RECIPES = {
    "diffmix": {**SHORT, "rank": 2, "steps": STEPS, "lr": 1e-3, "token_lr": 1e-3},
    "realfake": {**PLAIN, "steps": STEPS, "lr": 1e-3, "prompt": "photo of {name}, {caption}", "mmd_gamma": 0.05,
                 "snr_gamma": 5.0, "visual_token": "class_mean", "caption_drop": 0.1},
    "decoder": {"strategy": "full", "steps": STEPS, "batch": 4, "lr": 1e-4, "caption_drop": 0.1}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny generator, captions and features of the images of `image_folder`."""
    root = tmp_path_factory.mktemp("finetune")
    tiny_pipeline(root / "pipeline")
    tiny_unclip(root / "decoder", tiny_clip(root / "guide"))
    rng = np.random.Generator(np.random.Philox(key=2))
    write_captions(root, [f"{key}/{i}.png" for key in KEYS for i in range(5)], [f"number {i}" for i in range(20)])
    write_class_features(root, rng.standard_normal((4, 16), dtype=np.float32), class_keys=KEYS, encoder_sha256="e",
                         images_per_class=None)
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from rayexpand.runs.config import ClusterConfig

    with connected(ClusterConfig()):
        yield


def raw(preset: str, place: Path, images: Path, out: Path, **fields: Any) -> dict[str, Any]:
    sources = {"captions": str(place), "features": str(place)} if preset == "realfake" else {}
    adapter = {"recipe": RECIPES[preset], "workers": 2, "checkpoint_every": EVERY, "log_every": 3, "tensorboard": False,
               "sheet": {"classes": 1, "images": 1, "steps": 1}, **sources, **fields}
    return {"name": preset, "out": str(out), "device": "cpu",
            "prior": {"weights": str(place / ("decoder" if preset == "decoder" else "pipeline"))},
            "data": {"source": "imagefolder", "path": str(images)}, "fit": {"adapter": adapter}}


def spread(config: dict[str, Any]) -> Path:
    (folder,) = fit_on_ray(parse_fit(config), quiet).values()
    return folder


@pytest.fixture(scope="module", params=RECIPES)
def undisturbed(request: pytest.FixtureRequest, place: Path, image_folder: Path,
                cluster: None) -> tuple[dict[str, Any], Path]:
    config = raw(request.param, place, image_folder, place / "artifacts" / request.param)
    return config, spread(config)


def test_two_workers_train_what_one_process_trains(undisturbed: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Latents of an actor pool to the bit; the curve to 1e-4 and the weights as far as AdamW's signs let them."""
    config, folder = undisturbed
    (alone,) = fits.fit(parse_fit({**config, "out": str(tmp_path)}), quiet).values()
    (parts, same), (found, expected) = ([next(Path(out).glob("latents-*")) for out in (config["out"], tmp_path)],
                                        [read_facts(one) for one in (folder, alone)])

    assert content(parts) == content(same)
    assert (found["workers"], found["starts"]) == (2, [0])
    assert found["cpu_seconds"] > 0
    assert found["digest"] != expected["digest"], "numbers depend on the workers"
    for name in ("loss", "l_simple"):
        np.testing.assert_allclose([point[name] for point in found["curve"]],
                                   [point[name] for point in expected["curve"]], rtol=1e-4)
    for file in folder.rglob("*.safetensors"):
        ours, theirs = load_file(file), load_file(alone / file.relative_to(folder))
        assert all(np.abs(ours[name] - theirs[name]).max() < 1e-3 for name in theirs)


def driver(config: dict[str, Any], out: Path) -> subprocess.Popen[bytes]:
    path = out / "fit.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "rayexpand", "fit", str(path)], cwd=ROOT, env=environment,
                            stdout=subprocess.DEVNULL)


def wait_for(found: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    while not (value := found()):
        assert process.poll() is None, "the driver ended before what was waited for"
        time.sleep(0.01)
    return value


def train_workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            found += [one] if "RayTrainWorker" in " ".join(one.cmdline()) else []
    return found


def kept(work: Path) -> tuple[int, int]:
    """(step, number of starts) of the checkpoint; (0, 0) where there is none yet."""
    try:
        with safe_open(work / "finetune.safetensors", "np") as file:
            return int(file.get_tensor("step")), len(json.loads(file.metadata()["state"])["starts"])
    except OSError:
        return 0, 0


def position(work: Path) -> int:
    return int((read_position(work) or {"step": 0})["step"])


def test_a_killed_worker_and_a_killed_driver_cost_at_most_one_interval(undisturbed: tuple[dict[str, Any], Path],
                                                                       tmp_path: Path) -> None:
    """One fine-tuning that loses a worker after a checkpoint, and then everything after a later one."""
    config, whole = undisturbed
    (latents,) = Path(config["out"]).glob("latents-*")
    shutil.copytree(latents, tmp_path / latents.name)
    config = {**config, "out": str(tmp_path)}
    work = tmp_path / f".{whole.name}.work"
    process = driver(config, tmp_path)
    wait_for(lambda: kept(work)[0] >= EVERY, process)
    victim = train_workers(process)[-1]
    at_worker = position(work)
    os.kill(victim.pid, signal.SIGKILL)
    wait_for(lambda: kept(work)[1] == 2, process)
    started = psutil.Process(process.pid).children(recursive=True)
    at_driver = position(work)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for left in started:  # the machine is gone, and Ray's daemons with it
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(started, timeout=30)
    reached = kept(work)[0]
    folder = spread(config)
    starts = read_facts(folder)["starts"]

    assert folder.name == whole.name
    assert content(folder) == content(whole)
    assert [point["step"] for point in read_facts(folder)["curve"]] == [
        point["step"] for point in read_facts(whole)["curve"]]
    assert read_facts(folder)["curve"] == read_facts(whole)["curve"]
    assert starts[0] == 0
    assert starts[2:] == [reached]
    assert at_worker - EVERY < starts[1] < starts[2] < STEPS
    assert at_driver - EVERY < starts[2]
    assert not work.exists()


def test_what_no_attempt_can_mend_is_said_once(place: Path, image_folder: Path, cluster: None) -> None:
    out = place / "artifacts"
    before = set(out.glob("[!.]*"))
    wild = raw("diffmix", place, image_folder, out, workers=1)
    wild["fit"]["adapter"]["recipe"] = {**RECIPES["diffmix"], "lr": 1e30, "token_lr": 1e30}
    with pytest.raises(RayexpandError, match="diverged: the loss is nan"):
        spread(wild)
    crowded = raw("diffmix", place, image_folder, out, cpus_per_worker=4096)
    crowded["fit"]["adapter"]["recipe"] = {**RECIPES["diffmix"], "steps": 1}
    with pytest.raises(UsageError, match=r"fit\.adapter\.workers: 2 workers want"):
        spread(crowded)
    assert set(out.glob("[!.]*")) - before <= set(out.glob("latents-*"))


def test_latents_go_by_their_digest_to_nodes_without(undisturbed: tuple[dict[str, Any], Path], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = Path(undisturbed[0]["out"]).glob("latents-*")
    model, digest = latents_model(folder), read_facts(folder)["digest"]
    away = replace(model, present=lambda: None)
    monkeypatch.setenv("RAYEXPAND_CACHE", str(tmp_path))
    server = stage.open_model_server({digest: model})

    assert stage.local(model, digest, server) == folder
    copy = stage.local(away, digest, server)
    assert copy == tmp_path / "staged" / digest[:16]
    assert content(copy) == content(folder)
    ray.kill(server)
