"""What is fetched of a repository on the hub, from a server of our own: the files of one variant of each model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayexpand.contract.errors import ModelError
from rayexpand.models.folders import WEIGHTS, folder_hash, loaded_files, weight_files
from rayexpand.models.prior import hub_weights, resolve
from tests.commands import ROOT
from tests.hubserver import COMMIT, Hub, serving
from tests.models.families import at_once
from tests.models.test_prior_files import sharded

UNET, VAE, TEXT = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
SHARDED_FP16 = ["unet/diffusion_pytorch_model.safetensors.index.fp16.json",
                "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
                "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors"]


@pytest.mark.parametrize(("listing", "chosen"), [
    ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors", f"{UNET}.bf16.safetensors", f"{UNET}.non_ema.safetensors",
      f"{UNET}.bin", "model.safetensors"], [f"{UNET}.safetensors"]),
    ([f"{UNET}.bf16.safetensors", f"{UNET}.fp16.safetensors"], [f"{UNET}.fp16.safetensors"]),
    ([f"{UNET}.bf16.safetensors", f"{UNET}.non_ema.safetensors"], [f"{UNET}.bf16.safetensors"]),
    ([f"{UNET}.fp16.safetensors", f"{VAE}.safetensors", f"{VAE}.fp16.safetensors", f"{TEXT}.bf16.safetensors",
      "text_encoder_2/model.fp16.safetensors", "text_encoder_2/flax_model.msgpack"],
     [f"{UNET}.fp16.safetensors", f"{VAE}.safetensors", f"{TEXT}.bf16.safetensors",
      "text_encoder_2/model.fp16.safetensors"]),
    ([f"{UNET}.safetensors.index.json", f"{UNET}-00001-of-00002.safetensors", f"{UNET}-00002-of-00002.safetensors",
      *SHARDED_FP16], [f"{UNET}.safetensors.index.json", f"{UNET}-00001-of-00002.safetensors",
                       f"{UNET}-00002-of-00002.safetensors"]),
    (SHARDED_FP16, SHARDED_FP16),
    (["unet/diffusion_pytorch_model.safetensors.index.fp16.json", f"{UNET}-00001-of-00001.fp16.safetensors",
      f"{UNET}-00001-of-00003.safetensors"],
     ["unet/diffusion_pytorch_model.safetensors.index.fp16.json", f"{UNET}-00001-of-00001.fp16.safetensors"]),
    (["sdxl_base_1.0.safetensors", "transformer/diffusion_pytorch_model.safetensors"], [])])
def test_one_variant_of_each_model(listing: list[str], chosen: list[str], tmp_path: Path) -> None:
    assert hub_weights(["model_index.json", *listing]) == chosen
    for name in listing:  # and it is that which is loaded of a folder with all of them
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shards = [one.rpartition("/")[2] for one in listing if "-of-" in one and ("fp16" in one) == ("fp16" in name)]
        (tmp_path / name).write_text(json.dumps({"weight_map": {str(i): one for i, one in enumerate(shards)}}))
    loaded = [name for part in WEIGHTS for name in weight_files(tmp_path, part)[1]]
    assert sorted(loaded) == sorted(chosen)


def test_a_hub_that_cannot_be_reached_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoConnection(Exception):
        """As the HTTP library raises it: no OSError."""

    def unreachable(*_: Any, **__: Any) -> Any:
        raise NoConnection

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot be downloaded"):
        resolve("somebody/model@main")


def test_a_repository_without_a_pipeline_is_one_model() -> None:
    assert hub_weights(["config.json", "model.fp16.safetensors", "model.safetensors", "pytorch_model.bin"]) == [
        "model.safetensors"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return at_once(tmp_path_factory.mktemp("families"))("sdxl")


@pytest.fixture
def hub(sdxl: Path, tmp_path: Path) -> Iterator[Hub]:
    """acme/tiny: SDXL with other variants, pickles and single-file copies beside what is loaded, its UNet in shards of
    full and of half precision, its autoencoder in half precision only."""
    folder = Path(shutil.copytree(sdxl, tmp_path / "hub/acme/tiny"))
    for part, name in (("text_encoder", "model"), ("text_encoder_2", "model"), ("vae", "diffusion_pytorch_model")):
        shutil.copy(folder / part / f"{name}.safetensors", folder / part / f"{name}.fp16.safetensors")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    sharded(folder)
    for file in (folder / "unet").glob("*-of-*.safetensors"):
        shutil.copy(file, file.with_name(file.name.replace("model-", "model.fp16-")))
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.with_name(index.name.replace("index", "index.fp16")).write_text(
        index.read_text().replace("model-", "model.fp16-"))
    for extra in ("tiny.safetensors", "tiny_fp16.safetensors", "unet/diffusion_pytorch_model.bin",
                  "text_encoder/model.onnx", "text_encoder/flax_model.msgpack", "safety_checker/model.safetensors",
                  "README.md", "tokenizer/picture.png"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"x" * 100)
    with serving(tmp_path / "hub") as made:
        yield made


def fetched(hub: Hub, cache: Path, **env: str) -> subprocess.CompletedProcess[str]:
    script = ("from rayexpand.models.prior import resolve\nfrom rayexpand.contract.errors import ModelError\n"
              "try:\n    print(resolve('acme/tiny'))\nexcept ModelError as error:\n    raise SystemExit(str(error))")
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False, env={
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **env})


def test_exactly_the_files_that_are_loaded_are_fetched(hub: Hub, tmp_path: Path) -> None:
    done = fetched(hub, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())

    assert folder.name == COMMIT
    there = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert there == sorted(loaded_files(folder))
    assert {*hub.fetched} <= {*there}  # of two files with one content, one
    assert [name for name in there if "fp16" in name] == ["vae/diffusion_pytorch_model.fp16.safetensors"]
    assert folder_hash(folder) == folder_hash(hub.root / "acme/tiny")
    hub.fetched.clear()
    again = fetched(hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert (again.stdout, hub.fetched) == (done.stdout, [])


def test_a_shard_that_the_index_names_and_the_repository_lacks(hub: Hub, tmp_path: Path) -> None:
    (hub.root / "acme/tiny/unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    done = fetched(hub, tmp_path / "cache")

    assert done.returncode == 1
    assert "unet/diffusion_pytorch_model-00002-of-00002.safetensors is missing" in done.stderr


@pytest.mark.slow
def test_a_fetch_that_was_cut_off_is_completed(hub: Hub, tmp_path: Path) -> None:
    first = Path(fetched(hub, tmp_path / "cache").stdout.strip())
    gone = first / "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    gone.resolve().unlink()
    gone.unlink()
    hub.fetched.clear()
    offline = fetched(hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    again = fetched(hub, tmp_path / "cache")

    assert "unet/diffusion_pytorch_model-00001-of-00002.safetensors is missing" in offline.stderr
    assert "hf download acme/tiny" in offline.stderr
    assert again.returncode == 0, again.stderr
    assert hub.fetched == ["unet/diffusion_pytorch_model-00001-of-00002.safetensors"]
