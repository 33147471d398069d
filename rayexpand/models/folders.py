"""Model folders: which files count, their content hash, the hub, the cache of this machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.artifacts.store import MAKING_OF, content_files, files_hash
from rayexpand.contract.errors import ModelError
from rayexpand.models.file_hashes import remembered_sha256

DIGITS, DIGITS_MAE, DIGITS_UNCLIP = EMBEDDED = ("digits", "digits-mae", "digits-unclip")  # trained here, on first use
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
           "text_encoder_2": "model", "image_encoder": "model", "image_normalizer": "diffusion_pytorch_model"}
INDEX, NOISE = "model_index.json", "scheduler/scheduler_config.json"
UNCLIP = "StableUnCLIPImg2ImgPipeline"
UNCLIP_CLASSES = {"image_encoder": "CLIPVisionModelWithProjection", "image_normalizer": "StableUnCLIPImageNormalizer"}
EMBEDDING_NOISE, PIXELS = "image_noising_scheduler/scheduler_config.json", "preprocessor_config.json"
UNCLIP_PIXELS = f"feature_extractor/{PIXELS}"
# Of a masked autoencoder, which is one model right in its folder.
MAE, MAE_CONFIG, MAE_WEIGHTS = "ViTMAEForPreTraining", "config.json", "model"
VARIANTS = (None, "fp16", "bf16")  # the first that is there is loaded
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_FOLDERS = ("models", "model", "weights", "checkpoints", "artifacts", "data", "runs", "out")
_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}  # of safetensors, as numpy has them
HUB_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model or artifact. Nothing is looked up before it is asked for."""

    find: Callable[[], dict[str, Path]]  # relative name -> file on this machine, trained or downloaded where needed
    present: Callable[[], Path | None]  # the folder under a name of its own, if it is on this machine
    hash: Callable[[Path], str]  # content hash of such a folder

    def lies_in(self, folder: Path, sha256: str) -> bool:
        """Whether a folder is there and holds this very content."""
        try:
            return folder.is_dir() and self.hash(folder) == sha256
        except (ModelError, OSError):
            return False  # incomplete, or another thing under this name


def folder_model(folder: Path) -> ModelFiles:
    """A model that is one folder of this machine."""
    return ModelFiles(lambda: {name: folder / name for name in loaded_files(folder)},
                      lambda: folder if folder.is_dir() else None, folder_hash)


def folder_hash(folder: Path | str) -> str:
    """sha256 over the sorted (relative name, sha256) of the files of a model folder that are loaded.

    A pipeline folder counts its configurations, tokenizer and weights, not a safety checker or other formats beside
    them; any other folder (a guide) counts its own .json, .txt and .safetensors files.

    Large files that nobody touched since are not read again, but for those that `rayexpand fit` made, whose every read
    is checked.
    """
    folder = Path(folder)
    if any((one / MAKING_OF).is_file() for one in (folder, folder.parent)):
        return files_hash(folder, sorted(loaded_files(folder)))
    return files_hash(folder, sorted(loaded_files(folder)), model_sha256)


def model_sha256(file: Path) -> str:
    """sha256 of a model file, remembered in this machine's cache."""
    return remembered_sha256(file, cache_root() / "hashes")


def staged_folder(sha256: str) -> Path:
    """Where a copy of the model with this content hash lies in this machine's cache, if there is one."""
    return cache_root() / "staged" / sha256[:16]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars of diffusers and transformers inside; they would tear ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [lib for lib in (diffusers_logging, transformers_logging) if lib.is_progress_bar_enabled()]
    for lib in shown:
        lib.disable_progress_bar()
    try:
        yield
    finally:
        for lib in shown:
            lib.enable_progress_bar()


def parts_of(folder: Path) -> tuple[str, ...]:
    """The models of a pipeline folder, by its model_index.json: a second text encoder where it names one, the image
    encoder of unCLIP. Raises ModelError."""
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    without = () if index.get("_class_name") == UNCLIP else UNCLIP_CLASSES
    return tuple(part for part in WEIGHTS if part not in without
                 and (part != "text_encoder_2" or (index.get(part) or [None])[0]))


def is_mae(folder: Path) -> bool:
    """Whether a folder is a masked autoencoder in transformers' layout, by its config.json. Raises ModelError."""
    return (not (folder / INDEX).is_file() and (folder / MAE_CONFIG).is_file()
            and read_json(folder / MAE_CONFIG).get("model_type") == "vit_mae")


def configs_of(folder: Path) -> tuple[str, ...]:
    """Configuration files of a pipeline folder, or of a masked autoencoder."""
    if is_mae(folder):
        return MAE_CONFIG, PIXELS
    parts = parts_of(folder)
    unclip = (EMBEDDING_NOISE, UNCLIP_PIXELS) if "image_encoder" in parts else ()
    return (INDEX, NOISE, *(f"{part}/config.json" for part in parts), *unclip)


def tokenizers_of(folder: Path) -> tuple[str, ...]:
    return ("tokenizer", *(["tokenizer_2"] if "text_encoder_2" in parts_of(folder) else []))


def weight_files(folder: Path, part: str) -> tuple[str | None, list[str]]:
    """(variant, relative names) of the safetensors of one component; no names where there are none. Raises ModelError.

    A full-precision file wins; a folder that holds half precision only is loaded as diffusers' variant `fp16` or
    `bf16`.
    """
    variant, names = variant_files(folder / part, WEIGHTS[part])
    return variant, [f"{part}/{name}" for name in names]


def variant_files(folder: Path, stem: str) -> tuple[str | None, list[str]]:
    """(variant, names) of the safetensors that lie right in a folder under this stem. Raises ModelError."""
    for variant in VARIANTS:
        end = f".{variant}" if variant else ""
        if (folder / f"{stem}{end}.safetensors").is_file():
            return variant, [f"{stem}{end}.safetensors"]
        if (index := folder / f"{stem}.safetensors.index{end}.json").is_file():
            return variant, [index.name, *sorted(set(shard_of(index).values()))]
    return None, []


def shard_of(index: Path) -> dict[str, str]:
    """File of each tensor, as the index of a sharded component says. Raises ModelError."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(one, str) and "/" not in one for one in found.values()):
        raise ModelError(f"{index} has no weight_map that names a file of its folder for each tensor; fetch or save "
                         "the model again")
    return found


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says before its numbers."""

    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]  # as safetensors names them: F32, BF16, F8_E4M3
    metadata: Mapping[str, str]


def read_header(file: Path) -> Header:
    """The header of a safetensors file; what it says is there must be there. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return Header({name: tuple(one.get_shape()) for name, one in slices.items()},
                          {name: one.get_dtype() for name, one in slices.items()}, opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        size = f", {file.stat().st_size:,} bytes" if file.is_file() else ""
        raise ModelError(f"{file} cannot be read: it is cut off, damaged or no safetensors file ({error}{size}); fetch "
                         "or save it again") from error


def tensor_shapes(file: Path) -> Mapping[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file, by its header. Raises ModelError."""
    return read_header(file).shapes


def metadata_of(file: Path) -> Mapping[str, str]:
    """What the header of a safetensors file says beside shapes. Raises ModelError."""
    return read_header(file).metadata


def tensor_values(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some tensors of a safetensors file that `tensor_shapes` has read, in float32 and without torch: safetensors' own
    reader for numpy refuses bfloat16."""
    with open(file, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        start, values = stream.tell(), {}
        for name in names:
            (first, last), kind = header[name]["data_offsets"], header[name]["dtype"]
            stream.seek(start + first)
            data = stream.read(last - first)
            if kind == "BF16":  # the upper half of a float32
                values[name] = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
            elif kind in _NUMBERS:
                values[name] = np.frombuffer(data, _NUMBERS[kind]).astype(np.float32)
            else:
                raise ModelError(f"{file}: {name} holds numbers of kind {kind}, which are not read here; save it in "
                                 "float32, float16 or bfloat16")
            values[name] = values[name].reshape(header[name]["shape"])
    return values


def loaded_files(folder: Path) -> list[str]:
    """Relative names of all files of a model folder that loading reads."""
    if is_mae(folder):
        return [*configs_of(folder), *variant_files(folder, MAE_WEIGHTS)[1]]
    if not (folder / "model_index.json").is_file():
        return content_files(folder)
    words = [f"{name}/{file.name}" for name in tokenizers_of(folder) for file in (folder / name).iterdir()
             if file.suffix in (".json", ".txt")]
    return [*configs_of(folder), *words,
            *(name for part in parts_of(folder) for name in weight_files(folder, part)[1])]


def unreadable(file: Path) -> list[str]:
    """Why a safetensors file is none, or not whole, in one line; none where it is."""
    try:
        tensor_shapes(file)
    except ModelError as error:
        return [str(error)]
    return []


def flat_weight_problems(folder: Path) -> list[str]:
    """What is wrong with the weights of a transformers model, which lie right in its folder, one line each."""
    if files := sorted(folder.glob("*.safetensors")):
        return [line for file in files for line in unreadable(file)]
    pickles = sorted(one.name for one in folder.iterdir() if one.suffix in PICKLES)
    return [f"{folder}: " + (f"{pickles[0]} is a pickle, which can run code when opened; save it again with "
                             "safe_serialization=True" if pickles else "*.safetensors is missing")]


def incomplete_message(folder: Path, problems: Sequence[str]) -> str:
    head = f"{folder} cannot be used as a folder in diffusers' StableDiffusionPipeline layout:"
    return "\n  ".join([head, *problems])


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); fetch or save the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object; fetch or save the model again")
    return value


def is_path(weights: str) -> bool:
    """Whether what looks like org/name begins as a path does: no organisation of the hub is called `models`."""
    return weights.partition("/")[0] in _FOLDERS


def no_folder(weights: str, choices: str) -> ModelError:
    """The error of a model that is named by neither a folder that is there nor `org/name@revision`."""
    if found := re.match(r"(?P<scheme>\w+)://(?:(?:www\.)?huggingface\.co/|hf\.co/)?(?P<rest>.*)", weights):
        repo = re.match(r"([\w.-]+/[\w.-]+)(?:/(?:tree|resolve|blob)/([\w.-]+))?", found["rest"])
        on_hub = repo is not None and (found["scheme"] == "hf" or "huggingface.co/" in weights or "hf.co/" in weights)
        name = f"{repo[1]}@{repo[2]}" if on_hub and repo and repo[2] else repo[1] if repo else ""
        what = f"write {name}" if on_hub else "copy the model into a folder, or name it as org/name@revision"
        return ModelError(f"'{weights}' is a URL, and models are read from folders and from the Hugging Face hub; "
                          f"{what}")
    path = Path(weights).expanduser()
    here = path.parent if path.parent.is_dir() else None
    near = get_close_matches(path.name, [one.name for one in here.iterdir() if one.is_dir()], 1) if here else []
    hint = f"did you mean {path.parent / near[0]}? " if near else ""
    return ModelError(f"there is no folder {path} (seen from {Path.cwd()}); {hint}Give {choices}, or org/name@revision")


def hub_snapshot(weights: str, patterns: Sequence[str], complete: Callable[[Path], list[str]],
                 more: Callable[[Collection[str]], list[str]] | None = None) -> Path:
    """Snapshot folder of `org/name@revision`, named by its commit; from the cache where that is complete. Fetched are
    the files of these patterns, and those that `more` names of all files of the repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    match = HUB_NAME.fullmatch(weights)
    assert match
    repo, revision = match["repo"], match["revision"] or "main"
    fetch = {"repo_id": repo, "revision": revision, "allow_patterns": list(patterns)}
    try:
        cached = Path(snapshot_download(**fetch, local_files_only=True))
        if not complete(cached):
            return cached
    except OSError:
        pass  # not in the cache, or only partly: fetch it
    try:
        if more is not None:
            fetch["allow_patterns"] = [*patterns, *map(escape, more(_hub_listing(repo, revision)))]
        folder = Path(snapshot_download(**fetch))
    except GatedRepoError as error:
        raise ModelError(f"{weights} asks for a licence to be accepted: open its page on the hub, accept, then run "
                         "`hf auth login`") from error
    except (OSError, ValueError) as error:
        if is_path(repo) or Path(repo).parent.is_dir():
            raise no_folder(weights, "a folder") from error
        raise ModelError(f"{weights} is neither a folder here nor in the local Hugging Face cache, and it cannot be "
                         f"downloaded ({type(error).__name__}). {_fetch_elsewhere(repo, revision)}") from error
    if problems := complete(folder):  # offline, the hub client hands out what it has
        raise ModelError(f"{incomplete_message(folder, problems)}\n{_fetch_elsewhere(repo, revision)}")
    return folder


def _hub_listing(repo: str, revision: str) -> set[str]:
    """All files of a repository; none where it cannot be asked, which the fetch that follows meets too and says."""
    from huggingface_hub import HfApi

    try:
        return set(HfApi().list_repo_files(repo, revision=revision))
    except Exception:  # those of the HTTP library are no OSError
        return set()


def _fetch_elsewhere(repo: str, revision: str) -> str:
    return (f"Where the hub can be reached run `hf download {repo} --revision {revision}` and copy the cache or its "
            "snapshot folder here, or give a local folder")


def cache_root(cache: Path | None = None) -> Path:
    """`cache`, else $RAYEXPAND_CACHE, else the user's cache folder of this package."""
    from platformdirs import user_cache_path

    return cache or Path(os.environ.get("RAYEXPAND_CACHE") or user_cache_path("rayexpand"))
