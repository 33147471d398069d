"""A text about each seed image, for prompts with {caption}: from the dataset, from a file, or written by a local model.

    fit:
      captions: {column: text}                    # a column of the parquet files or of the manifest
      captions: {file: captions.json}             # {seed id: caption}, or {class key: {file name: caption}}
      captions: {model: models/blip2-opt-2.7b}    # BLIP or BLIP-2 in transformers' layout

A model writes the likeliest text, greedily or by beam search: nothing is drawn. Every call has one shape, so a caption
depends on the image, the model and that shape alone. The artifact has a row for each seed (seed_columns.py); a seed
without a caption has an empty one there, is counted, and is named when a run asks for it.
"""

# N images, B rows of a call

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from rayexpand.artifacts.columns import write_captions
from rayexpand.artifacts.store import publish
from rayexpand.contract.errors import ModelError, SeedDataError, UsageError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import SeedIndex
from rayexpand.contract.settings import Section
from rayexpand.data import seeds
from rayexpand.fitting.costs import unit_on
from rayexpand.fitting.maker import FitBase, Maker, World, data_facts
from rayexpand.models.folders import flat_weight_problems, folder_hash, quiet_libraries
from rayexpand.runs.fleet_hours import PROCESS
from rayexpand.runs.stages import PlanStage, Sizes, unknown

if TYPE_CHECKING:
    import torch

VERSION = 1  # raised when the code below makes other captions of the same configuration
SHOWN = 20  # seeds named in artifact.json
KINDS = ("blip", "blip-2")
_SOURCES = ("column", "file", "model")
_OF_MODELS = ("prompt", "max_new_tokens", "beams", "batch", "dtype")


class CaptionsFit(Section):
    column: str | None = Field(None, min_length=1, description="column of data.path (parquet, manifest) with a text "
                               "for each image")
    file: str | None = Field(None, min_length=1, description="JSON: {seed id: caption}, or {class key: {file name: "
                             "caption}} as Real-Fake's code reads; or a folder of <class key>.json")
    model: str | None = Field(None, min_length=1, description="folder of a BLIP or BLIP-2 model, fetched beforehand "
                              "(Real-Fake: BLIP-2, variant not stated)")
    prompt: str = Field("", description="model: text that the caption goes on from; it is no part of the caption")
    max_new_tokens: int = Field(30, ge=1, description="model: tokens of a caption at most (ours)")
    beams: int = Field(1, ge=1, description="model: beams of the search; 1 is greedy (ours)")
    batch: int = Field(16, ge=1, description="model: images of one call")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="model: numbers; auto is float32 on CPU, bfloat16 on CUDA")

    @model_validator(mode="after")
    def _one_source(self) -> CaptionsFit:
        named = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"takes exactly one of column, file and model, got {', '.join(named) or 'none'}")
        if self.model is None and (idle := [name for name in _OF_MODELS if name in self.model_fields_set]):
            raise ValueError(f"{', '.join(idle)} have no effect without model; take them out")
        return self


@dataclass(frozen=True, slots=True)
class CaptionBlock:
    """Captions of neighbouring rows of a seed index."""

    rows: np.ndarray  # int64[N]: those that could be read
    captions: list[str]
    refused: dict[str, str]  # the others: reason by seed id


def check_captions(made: CaptionsFit, data: seeds.DataConfig) -> list[str]:
    """What is wrong as far as files say, one line each; nothing is loaded and no dataset is listed."""
    if made.column is not None:
        return [f"column: {problem}"] if (problem := seeds.text_problem(data, made.column)) else []
    if made.file is not None:
        missing = not Path(made.file).expanduser().exists()
        return [f"file: there is nothing at {made.file}; give a JSON file, or a folder of them"] if missing else []
    return [f"model: {problem}" for problem in check_captioner(str(made.model))]


def made_from(made: CaptionsFit, listed: list[str] | None) -> dict[str, Any]:
    """What captions depend on beside the dataset. `listed`: those of a column or file."""
    if made.model is not None:
        return {"version": VERSION, "model_sha256": folder_hash(Path(made.model).expanduser()),
                **made.model_dump(include=set(_OF_MODELS))}
    source = "column" if made.column is not None else "file"
    return {"version": VERSION, "source": source,
            "captions_sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest()}


def make_captions(folder: Path, blocks: Iterable[CaptionBlock], index: SeedIndex, progress: Progress) -> dict[str, Any]:
    """Writes the caption of every seed of `index`; returns facts. Raises UsageError where all are empty."""
    captions, refused = [""] * len(index), dict[str, str]()
    done = 0
    for block in blocks:
        for row, caption in zip(block.rows.tolist(), block.captions, strict=True):
            captions[row] = " ".join(caption.split())
        refused |= block.refused
        done += len(block.captions) + len(block.refused)
        progress("captions", done, len(index))
    blank = [seed_id for seed_id, caption in zip(index.seed_ids, captions, strict=True) if not caption]
    if len(blank) == len(index):
        raise UsageError(f"fit.captions: all {len(index)} captions are empty, such as that of seed {blank[0]!r}; look "
                         "at a few images, and use another source or model")
    write_captions(folder, index.seed_ids, captions)
    said = [f"{len(blank):,} of {len(index):,} seeds have no caption, such as {', '.join(blank[:3])}; a prompt with "
            "{caption} refuses them"] if blank else []
    return {"captions": len(index) - len(blank), "blank": len(blank), "blank_examples": blank[:SHOWN],
            "refused": len(refused), "refused_examples": dict(list(refused.items())[:SHOWN]), "summary": said}


# -------------------------------------------------------------------------------------------------- a column or a file


def listed_captions(made: CaptionsFit, data: seeds.DataConfig, index: SeedIndex) -> list[str] | None:
    """Captions of a column or file in the order of the index, "" where there is none; None for a model.

    Raises UsageError where nothing fits the dataset, SeedDataError for a file or column that cannot be read."""
    if made.column is not None:
        return [" ".join((text or "").split()) for text in seeds.texts(data, index, made.column)]
    if made.file is None:
        return None
    found = _read_captions(Path(made.file).expanduser())
    members = index.table["member"].to_pylist()
    keys = [index.classes.key[label] for label in index.labels]
    ids = [seeds.image_id(data, seed_id) for seed_id in index.seed_ids]
    wanted = [_lookup(found, *row) for row in zip(ids, keys, members, strict=True)]
    if not any(wanted):
        raise UsageError(f"fit.captions.file: {made.file} has no caption for any of the {len(index)} seeds. Its keys "
                         f"look like {next(iter(found), '')!r}, the dataset's seed ids like {index.seed_ids[0]!r} and "
                         f"its class keys like {index.classes.key[0]!r}")
    return [" ".join(text.split()) for text in wanted]


def _lookup(found: Mapping[str, Any], seed_id: str, class_key: str, member: str) -> str:
    """By seed id, or by class key and then the name of the image file with or without folders."""
    if isinstance(whole := found.get(seed_id), str):
        return whole
    of_class = found.get(class_key)
    if not isinstance(of_class, Mapping):
        return ""
    names = (seed_id, seed_id.rpartition("/")[2], member, member.rpartition("/")[2])
    return next((str(of_class[name]) for name in names if name in of_class), "")


def _read_captions(path: Path) -> dict[str, Any]:
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise SeedDataError(f"fit.captions.file: the folder {path} holds no <class key>.json")
        return {file.stem: _read_json(file) for file in files}
    return _read_json(path)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SeedDataError(f"fit.captions.file: {file} cannot be read as JSON ({error})") from error
    texts = [text for one in found.values() for text in (one.values() if isinstance(one, Mapping) else [one])
             ] if isinstance(found, Mapping) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise SeedDataError(f"fit.captions.file: {file} is no JSON object of texts; give {{seed id: caption}}, or "
                            "{class key: {file name: caption}}")
    return dict(found)


# --------------------------------------------------------------------------------------------------------------- models


def check_captioner(folder: str) -> list[str]:
    """What is wrong with a captioning model's folder as far as its files say; nothing is loaded."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return [f"there is no folder {path}; give one with config.json, a tokenizer and *.safetensors, fetched "
                "beforehand: nothing is downloaded"]
    problems = [f"{path}: {name} is missing" for name in ("config.json", "tokenizer.json")
                if not (path / name).is_file()]
    if not any((path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        problems.append(f"{path}: preprocessor_config.json is missing, which says how images are prepared")
    if not problems and (kind := _kind(path)) not in KINDS:
        problems.append(f"{path}: config.json describes a model of kind {kind!r}; captions are written by "
                        f"{' or '.join(KINDS)}")
    return problems + flat_weight_problems(path)


def _kind(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return "unknown"


class Captioner:
    """Writes captions of images, `batch` in a call. Raises ModelError for a folder it cannot use."""

    def __init__(self, made: CaptionsFit, device: str) -> None:
        import torch
        from safetensors import SafetensorError

        from rayexpand.contract.device import choose_device
        from rayexpand.models.latent import DTYPES

        assert made.model is not None
        folder = Path(made.model).expanduser()
        if problems := check_captioner(made.model):
            raise ModelError("\n  ".join(["fit.captions.model cannot be used:", *problems]))
        self.device = choose_device(device)
        self._made = made
        self._dtype = DTYPES.get(made.dtype, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        try:
            with quiet_libraries():
                self._processor, model = _load(folder, self._dtype)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"fit.captions.model {folder} cannot be loaded: {error}. Fetch or save it again"
                             ) from error
        self._model = model.to(self.device).eval().requires_grad_(False)
        self._asks = bool(made.prompt) or _kind(folder) == "blip-2"  # whose T5 has no text of its own to start from

    def prepared(self, image: np.ndarray) -> torch.Tensor:
        """float32 (C, h, w), as the model takes it, of a uint8 (H, W, 3) image of any size."""
        return self._processor.image_processor(images=[np.array(image)], return_tensors="pt")["pixel_values"][0]

    def __call__(self, images: list[torch.Tensor]) -> list[str]:
        """One caption for each prepared image, at most `batch` of them."""
        import torch

        made, count = self._made, len(images)
        if not count:
            return []
        blanks = [np.zeros((8, 8, 3), np.uint8)] * made.batch  # a short call has the shape of a full one
        texts = {"text": [made.prompt] * made.batch} if self._asks else {}
        with quiet_libraries(), torch.inference_mode():
            given = self._processor(images=blanks, return_tensors="pt", **texts)
            given["pixel_values"][:count] = torch.stack(images)
            given = given.to(self.device, self._dtype)
            written = self._model.generate(**given, do_sample=False, num_beams=made.beams,
                                           max_new_tokens=made.max_new_tokens)
            found = self._processor.batch_decode(written, skip_special_tokens=True)
        return [self._without_prompt(text) for text in found[:count]]

    def _without_prompt(self, text: str) -> str:
        """Some models repeat what they were asked."""
        text, asked = " ".join(text.split()), " ".join(self._made.prompt.split())
        return text[len(asked):].lstrip() if text.casefold().startswith(asked.casefold()) else text


def _load(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """Processor and model."""
    import transformers

    processors = {"blip": transformers.BlipProcessor, "blip-2": transformers.Blip2Processor}
    models = {"blip": transformers.BlipForConditionalGeneration, "blip-2": transformers.Blip2ForConditionalGeneration}
    kind = _kind(folder)
    model, info = models[kind].from_pretrained(str(folder), local_files_only=True, use_safetensors=True, dtype=dtype,
                                               output_loading_info=True)
    if absent := sorted(info["missing_keys"]):  # transformers fills them with random numbers and goes on
        raise ValueError(f"it lacks {len(absent)} weights its configuration asks for, such as {absent[0]}")
    return processors[kind].from_pretrained(str(folder), local_files_only=True), model


class CaptionsMaker(Maker):
    kind = "captions"
    text = "a text about each image"
    section = CaptionsFit

    def stages(self, section: CaptionsFit, config: FitBase, sizes: Sizes) -> list[PlanStage]:
        what = f"{sizes.images:,} captions"
        if section.model is None:
            return [PlanStage("fit captions", what, PROCESS, (0.0, 0.0), "they are read, no model writes them")]
        return [unknown("fit captions", what, "what a captioning model costs is not counted; fit a part first "
                        "(data.ids) and multiply", unit_on(config.device))]

    def make(self, section: CaptionsFit, config: FitBase, world: World) -> Path:
        index, listed = world.index, listed_captions(section, config.data, world.index)
        of = made_from(section, listed)

        def make(folder: Path) -> dict[str, Any]:
            costs: dict[str, Any] = {}
            found = (world.engine.captions(config, of["model_sha256"], index, costs) if listed is None
                     else iter([CaptionBlock(np.arange(len(index)), listed, {})]))
            facts = make_captions(folder, found, index, world.progress)
            return {**costs, **facts, **section.model_dump(include={"column", "file", "model"}, exclude_none=True)}

        return publish(config.out, "captions", {"data": data_facts(config, index), **of}, make)

    def problems(self, section: CaptionsFit, config: FitBase, *, on_ray: bool) -> list[str]:
        return [f"fit.captions.{one}" for one in check_captions(section, config.data)]
