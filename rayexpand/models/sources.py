"""Where each part of a generator comes from: a pipeline folder, a single file over a folder of its json files, a UNet
or an autoencoder of another origin.

What is said here follows from json files and headers. Nothing here loads a weight or imports torch; whether every
tensor is there and fits is the question of header_check.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayexpand.artifacts.store import named_hash
from rayexpand.contract.errors import ModelError
from rayexpand.models.folders import (
    INDEX,
    MAE,
    MAE_WEIGHTS,
    NOISE,
    UNCLIP_CLASSES,
    WEIGHTS,
    folder_hash,
    is_mae,
    loaded_files,
    model_sha256,
    parts_of,
    read_json,
    variant_files,
)
from rayexpand.models.single_files import (
    FAMILIES,
    REPOSITORIES,
    SUFFIX,
    Marker,
    SingleFile,
    describe,
    fetch,
)

REPLACEABLE = ("unet",)  # parts that `prior.parts` may name; `prior.vae` names the autoencoder
_KINDS = ("unet", "vae", "text_encoder", "transformer")  # how names of parts with weights begin
ADDED = ("prior.loras.", "prior.embeddings.")  # how roles of LoRAs and embeddings begin; a place in the list follows
_WEIGHTS, _CONFIG, _VAE, _PART = "prior.weights", "prior.config", "prior.vae", "prior.parts."  # names of roles


@dataclass(frozen=True, slots=True)
class PartSource:
    """One part of a generator: its config.json lies in a folder, its weights lie in a folder or in a single file."""

    name: str
    config: Path
    weights: Path

    @property
    def stem(self) -> str:
        """How the weights are called in a folder, without variant and suffix."""
        return WEIGHTS.get(self.name, "diffusion_pytorch_model") if self.name else MAE_WEIGHTS

    def files(self) -> list[Path]:
        """The files of its weights, an index of shards among them. Raises ModelError."""
        if self.weights.is_file():
            return [self.weights]
        return [self.weights / name for name in variant_files(self.weights, self.stem)[1]]


@dataclass(frozen=True, slots=True)
class PriorSources:
    """What `prior` names, as paths of this machine: weights, config, parts and vae."""

    weights: Path  # pipeline folder, or single file
    config: Path | None = None  # with a single file: pipeline folder with json and tokenizer files, and what it lacks
    parts: Mapping[str, Path] = field(default_factory=dict)
    vae: Path | None = None
    added: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)  # role of a LoRA or embedding -> its files

    @property
    def folder(self) -> Path:
        """The folder of model_index.json, scheduler and tokenizers. Raises ModelError."""
        if self.weights.is_file():
            if self.config is None:
                raise ModelError("\n".join(source_problems(self)))
            return self.config
        return self.weights

    def part(self, name: str) -> PartSource:
        """Where a part comes from: what `parts` or `vae` name, else the single file where that holds it, else the
        folder. Raises ModelError."""
        own, named = self.folder / name, self._named(name)
        if named is None:
            single = self.weights.is_file() and name in describe(self.weights).parts
            return PartSource(name, own, self.weights if single else own)
        if named.is_file():
            return PartSource(name, own, named)
        return PartSource(name, here := _own_folder(named, name), here)

    def classes(self) -> dict[str, str]:
        """Class name of each part that has weights, by model_index.json; that of unCLIP's image encoder is none of
        them. A masked autoencoder is one part without a name. Raises ModelError."""
        if is_mae(self.folder):
            return {"": MAE}
        index = read_json(self.folder / INDEX)
        return {name: str(one[1]) for name, one in index.items()
                if name.startswith(_KINDS) and isinstance(one, list) and len(one) == 2 and one[1]}

    def image_classes(self) -> dict[str, str]:
        """The same of what unCLIP has for image embeddings. Raises ModelError."""
        return {name: UNCLIP_CLASSES[name] for name in ([] if is_mae(self.folder) else parts_of(self.folder))
                if name in UNCLIP_CLASSES}

    def json_file(self, name: str) -> Path:
        """The json file that counts for a name such as `vae/config.json`: that of the part that is in use."""
        part, _, file = name.partition("/")
        return self.part(part).config / file if file == "config.json" else self.folder / name

    def files(self) -> dict[str, Path]:
        """Every file that loading reads, under names that do not depend on how people call their files: those of a
        pipeline folder under their own, all others under the name of their role. Raises ModelError."""
        base = self._base_files()
        if not self.weights.is_file():
            return base | self.extra_files()
        return {f"{_CONFIG}/{name}": file for name, file in base.items()} | self.extra_files()

    def extra_files(self) -> dict[str, Path]:
        """Those of `files` that lie in no pipeline folder: role -> file."""
        found = {_WEIGHTS + SUFFIX: self.weights} if self.weights.is_file() else {}
        for role, name in (*((_PART + name, name) for name in self.parts), *([(_VAE, "vae")] if self.vae else [])):
            part = self.part(name)
            if part.weights.is_file():
                found[role + SUFFIX] = part.weights
            else:
                found |= {f"{role}/{file.name}": file for file in (part.config / "config.json", *part.files())}
        for role, files in self.added.items():
            found |= {role + SUFFIX: files[0]} if len(files) == 1 else {f"{role}/{one.name}": one for one in files}
        return found

    def _named(self, name: str) -> Path | None:
        return self.vae if name == "vae" and self.vae else self.parts.get(name)

    def _base_files(self) -> dict[str, Path]:
        """Files of the pipeline folder, without the weights of parts that come from elsewhere."""
        found = {name: self.folder / name for name in loaded_files(self.folder)}
        elsewhere = [part for part in self.classes() if self.part(part).weights != self.folder / part]
        own = [part for part in elsewhere if self.part(part).config != self.folder / part]
        return {name: file for name, file in found.items() if (part := name.partition("/")[0]) not in elsewhere
                or (part not in own and file.name == "config.json")}


def staged_sources(folder: Path) -> PriorSources:
    """The sources whose `files()` were copied into one folder under their names; any pipeline folder is its own."""
    def there(role: str) -> Path | None:
        return next((one for one in (folder / (role + SUFFIX), folder / role) if one.exists()), None)

    added = {name: tuple(sorted(one.iterdir())) if one.is_dir() else (one,)
             for one in sorted(folder.glob("prior.*")) if (name := one.name.removesuffix(SUFFIX)).startswith(ADDED)}
    weights, parts = there(_WEIGHTS), {name: there(_PART + name) for name in REPLACEABLE}
    return PriorSources(weights or folder, folder / _CONFIG if weights else None,
                        {name: file for name, file in parts.items() if file}, there(_VAE), added)


def sources_hash(sources: PriorSources) -> str:
    """Content hash of a generator: that of its folder where nothing else is named."""
    return named_hash(sources.files(), model_sha256) if sources.extra_files() else folder_hash(sources.weights)


def source_problems(sources: PriorSources, process: Mapping[str, Any] | None = None) -> list[str]:
    """What keeps the named files from being one generator, one line each, as far as json files and headers say.
    `process`: the fields of prior.process, which count more than the scheduler's configuration."""
    problems, files = [], {}
    for name, path in _named_paths(sources).items():
        if not path.exists():
            problems.append(f"{name}: there is no {path}; name a {SUFFIX} file or a folder")
        elif name == _CONFIG and path.is_file():
            problems.append(f"{name}: {path} is a file; name the folder that holds {INDEX}")
        elif path.is_file():
            try:
                files[name] = describe(path)
            except ModelError as error:
                problems.append(f"{name}: {error}")
    for name, single in files.items():
        problems += [f"{name}: {single.file} cannot be used: {single.refusal}"] if single.refusal else (
            _wrong_place(name, single))
    problems += [f"prior.parts.{name}: parts names {' and '.join(REPLACEABLE)} only; name an autoencoder in prior.vae"
                 for name in sources.parts if name not in REPLACEABLE]
    if sources.config is not None and not sources.weights.is_file():
        problems.append(f"prior.config: {sources.weights} is a folder and has its own configuration; leave "
                        "prior.config out, or name a single file in prior.weights")
    if problems:
        return problems
    if sources.weights.is_file() and (sources.config is None or not (sources.config / INDEX).is_file()):
        return [_no_config(sources, files[_WEIGHTS])]
    try:
        return _misfits(sources, files, process or {})
    except ModelError as error:
        return [str(error)]


def source_notes(sources: PriorSources, process: Mapping[str, Any] | None = None) -> list[str]:
    """What was assumed and what is not read, one line each, for sources without problems."""
    notes, settings = [], _noise(sources, process or {})
    for name, path in _named_paths(sources).items():
        if not path.is_file():
            continue
        single = describe(path)
        if single.family and single.prediction() is None and sources.part("unet").weights == path:
            notes.append(f"{name}: {path} does not say what its network predicts; {settings['prediction_type']} is "
                         f"assumed, as {_said_by('prediction_type', sources, process or {})} says")
        if name == _VAE:
            notes.append(f"{name}: {path} has no configuration; {sources.part('vae').config / 'config.json'} is taken "
                         "for it")
        if single.unread:
            notes.append(f"{name}: {len(single.unread)} of the tensors of {path} belong to no part and are not read, "
                         f"such as {single.unread[0]}")
    return notes


# ------------------------------------------------------------------------------------------------------------- details


def _named_paths(sources: PriorSources) -> dict[str, Path]:
    named = {_WEIGHTS: sources.weights, _CONFIG: sources.config, _VAE: sources.vae}
    return {name: path for name, path in named.items() if path} | {
        _PART + name: path for name, path in sources.parts.items()}


def _own_folder(named: Path, part: str) -> Path:
    """The folder of a part that `parts` or `vae` name: itself, or the one of this name in a pipeline folder."""
    return named / part if (named / INDEX).is_file() else named


def _wrong_place(name: str, single: SingleFile) -> list[str]:
    """Whether a file holds what the field that names it is for."""
    wanted = {_VAE: "vae"}.get(name, name.removeprefix(_PART))
    if name == _WEIGHTS:
        return [] if "unet" in single.parts else [
            f"{name}: {single.file} is {single.kind} without a UNet; name it in prior.vae, and a generator here"]
    if wanted not in single.parts:
        return [f"{name}: {single.file} is {single.kind} and holds no {wanted}"]
    if others := [part for part in single.parts if part != wanted]:
        return [f"{name}: {single.file} is {single.kind} and holds {', '.join(others)} too, which would not be read; "
                f"name it in {_WEIGHTS}, or a file that holds the {wanted} alone"]
    return []


def _no_config(sources: PriorSources, single: SingleFile) -> str:
    edm = {marker.field: marker.name for marker in single.markers}.get("edm")
    repository = REPOSITORIES["playground" if edm == "edm_mean" else single.family]
    lacks = "is missing" if sources.config is None else f"{sources.config} holds no {INDEX}"
    also = ("" if edm in (None, "edm_mean") else f". {_edm_remedy(single, 'that folder')}")
    rest = "" if len(single.parts) > 1 else (
        f". The file holds the {single.parts[0]} alone: fetch the other parts too (without --include), or name their "
        f"folder in {_WEIGHTS} and this file in {_PART}{single.parts[0]}")
    return (f"{_CONFIG}: {lacks}; {single.file} is {single.kind}, and a single file has neither configuration nor "
            f"tokenizer. Fetch those of the model that it was made from, for example `{fetch(repository)}`, and name "
            f"that folder in {_CONFIG}{rest}{also}")


def _misfits(sources: PriorSources, files: Mapping[str, SingleFile], process: Mapping[str, Any]) -> list[str]:
    """Where the parts do not make one generator."""
    networks = {name: single for name, single in files.items()
                if single.family and sources.part("unet").weights == single.file}
    if wrong := [line for name, single in networks.items() for line in _wrong_family(name, single, sources)]:
        return wrong  # all else follows from it
    return [*(line for part, kind in sources.classes().items() for line in _wrong_part(sources, part, kind)),
            *(line for name, single in networks.items() for line in (
                *_wrong_markers(name, single, sources, process), *_wrong_latents(name, single, sources)))]


def _wrong_part(sources: PriorSources, name: str, kind: str) -> list[str]:
    part = sources.part(name)
    config = part.config / "config.json"
    if not config.is_file():
        return [f"{config} is missing; fetch it with the json files of the model"]
    if part.weights != sources.folder / name and (said := read_json(config).get("_class_name", kind)) != kind:
        return [f"{config}: {said} is not the {kind} that {sources.folder / INDEX} asks for as {name}"]
    return [] if part.files() else [_absent(sources, part)]


def _absent(sources: PriorSources, part: PartSource) -> str:
    if part.weights != sources.folder / part.name:
        return f"{part.weights} holds no {part.stem}{SUFFIX} (or its variants fp16 and bf16); save the part there"
    if not sources.weights.is_file():
        return f"{part.name}/{part.stem}{SUFFIX} is missing in {sources.folder}"
    return (f"{_WEIGHTS}: {sources.weights} holds no {part.name}, and neither does {sources.folder}; put "
            f"{part.name}/{part.stem}{SUFFIX} of the model into that folder (`hf download REPOSITORY --include "
            f'"{part.name}/*" --local-dir {sources.folder}`)')


def _wrong_family(name: str, single: SingleFile, sources: PriorSources) -> list[str]:
    file = sources.json_file("unet/config.json")
    xl = file.is_file() and read_json(file).get("addition_embed_type") == "text_time"
    if not file.is_file() or xl == (single.family == "sdxl"):
        return []
    return [f"{name}: {single.file} is {FAMILIES[single.family]}, but {file} is that of "
            f"{'Stable Diffusion XL' if xl else 'Stable Diffusion 1.x or 2.x'}; name a folder of its own family, for "
            f"example that of `{fetch(REPOSITORIES[single.family])}`"]


def _noise(sources: PriorSources, process: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's configuration as prior.process changes it."""
    return {"prediction_type": "epsilon", **read_json(sources.folder / NOISE),
            **{name: value for name, value in process.items() if value is not None}}


def _said_by(field: str, sources: PriorSources, process: Mapping[str, Any]) -> str:
    return f"prior.process.{field}" if process.get(field) is not None else str(sources.folder / NOISE)


def _wrong_markers(name: str, single: SingleFile, sources: PriorSources, process: Mapping[str, Any]) -> list[str]:
    """Where a file says another noise process than the configuration."""
    noise, problems = _noise(sources, process), []
    edm = str(noise.get("_class_name")).startswith("EDM")
    for marker in single.markers:
        if marker.field == "edm":
            said, remedy = edm, _edm_remedy(single, str(sources.folder))
            shown = f"_class_name {noise.get('_class_name')}, which is no EDM scheduler"
        else:
            said = noise.get(marker.field, False)
            remedy = f"Set prior.process.{marker.field}: {json.dumps(marker.value).strip(chr(34))}"
            shown = f"{marker.field} {said}"
        if not _same(said, marker.value) and (edm or not marker.field.startswith("sigma_")):
            problems.append(f"{name}: {single.file} has {marker.name}, which says {_says(marker)}, but "
                            f"{_said_by(marker.field, sources, process)} says {shown}. {remedy}, or name the "
                            "configuration of the model that the file was made from")
    return problems


def _wrong_latents(name: str, single: SingleFile, sources: PriorSources) -> list[str]:
    file = sources.json_file("vae/config.json")
    if not any(marker.name == "edm_mean" for marker in single.markers) or read_json(file).get("latents_mean"):
        return []
    return [f"{name}: {single.file} has edm_mean, which says that latents are normalised by their mean and deviation, "
            f"but {file} has no latents_mean; name the configuration of `{fetch(REPOSITORIES['playground'])}`"]


def _says(marker: Marker) -> str:
    return "that it is an EDM model" if marker.field == "edm" else f"{marker.field} {marker.value}"


def _same(said: Any, value: Any) -> bool:
    if isinstance(value, float) and isinstance(said, (int, float)):
        return abs(said - value) <= 4e-3 * abs(value)  # the file may hold it in bfloat16
    return bool(said == value)


def _edm_remedy(single: SingleFile, folder: str) -> str:
    said = {marker.field: marker.value for marker in single.markers}
    settings = {"_class_name": "EDMEulerScheduler", "prediction_type": said["prediction_type"],
                "sigma_min": said.get("sigma_min", 0.002), "sigma_max": said.get("sigma_max", 120.0),
                "sigma_data": 1.0 if said["prediction_type"] == "v_prediction" else 0.5}
    return f"Write {json.dumps(settings)} as {NOISE} into {folder}"
