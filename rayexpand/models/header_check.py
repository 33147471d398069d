"""Whether the weights of a part are all there and have the shapes that its config.json asks for, by headers alone.

Both libraries load a part that lacks weights: diffusers leaves them empty, transformers fills them with random numbers,
and neither raises. So a part is built without numbers and its names and shapes are held against those of its files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rayexpand.contract.errors import ModelError
from rayexpand.models.conversion import converted, module_names, skeleton
from rayexpand.models.folders import Header, read_header
from rayexpand.models.single_files import part_tensors, quantised_tensors
from rayexpand.models.sources import PartSource, PriorSources

_SHOWN = 3  # names of tensors in one line

Shape = tuple[int, ...]


def header_problems(folder: Path, part: str, class_name: str) -> list[str]:
    """What keeps one part of a pipeline folder from being what its config.json says, one line each."""
    return part_problems(PartSource(part, folder / part, folder / part), class_name)


def weight_problems(sources: PriorSources) -> list[str]:
    """The same of every part of a generator, for sources that `source_problems` has nothing to say about."""
    try:
        kinds = {**sources.classes(), **sources.image_classes()}
        return [line for name, kind in kinds.items() for line in part_problems(sources.part(name), kind)]
    except ModelError as error:
        return [str(error)]


def part_problems(part: PartSource, class_name: str) -> list[str]:
    """The same of one part, wherever its weights come from."""
    try:
        files = part.files()
        if not files:
            return [f"{part.weights} holds no {part.stem}.safetensors (or its variants fp16 and bf16); fetch or save "
                    f"the {part.name} again"]
        if absent := [file for file in files if not file.is_file()]:
            return [f"{file} is missing, a shard of the {part.name}; fetch it again" for file in absent]
        headers = {file: read_header(file) for file in files if file.suffix != ".json"}
        if part.weights.is_file():
            return _file_problems(part, headers[part.weights], skeleton(part.config, class_name))
        return _folder_problems(part, headers, skeleton(part.config, class_name))
    except ModelError as error:
        return [str(error)]


def _file_problems(part: PartSource, header: Header, module: torch.nn.Module) -> list[str]:
    places = part_tensors(header.shapes, part.name)
    if not places:
        return [f"{part.weights} holds no {part.name}"]
    empty = {name: torch.empty(header.shapes[name], device="meta") for name in places}
    try:
        named, unused = converted(empty, places, part.name, module)
    except (KeyError, AttributeError, IndexError, RuntimeError) as error:
        return [f"{part.weights} has no {part.name} as {part.config / 'config.json'} asks for: diffusers cannot convert"
                f" its tensors ({type(error).__name__}: {error}). Name the configuration of its own model, or fetch it "
                "again"]
    found = {name: tuple(tensor.shape) for name, tensor in named.items()}
    return _differences(part, module, found, dict.fromkeys(found, part.weights), part.weights, unused)


def _folder_problems(part: PartSource, headers: Mapping[Path, Header], module: torch.nn.Module) -> list[str]:
    there = {name: (shape, file) for file, header in headers.items() for name, shape in header.shapes.items()}
    named = module_names(there, module, sharded=len(headers) > 1)
    lines = [f"{file} holds quantised weights ({_few(quantised)}), which are not supported; name the bfloat16 or "
             "float16 files of the same model"
             for file, header in headers.items() if (quantised := quantised_tensors(header))]
    where = next(iter(headers)) if len(headers) == 1 else part.weights
    return lines or _differences(part, module, {name: one[0] for name, one in named.items()},
                                 {name: one[1] for name, one in named.items()}, where)


def _differences(part: PartSource, module: torch.nn.Module, found: Mapping[str, Shape], files: Mapping[str, Path],
                 where: Path, unused: Sequence[str] = ()) -> list[str]:
    """Lines about tensors that are absent from `where`, of no use (and `unused`), or of another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    asks, lines = part.config / "config.json", []
    if absent := [name for name in wanted if name not in found]:
        lines.append(f"{where} lacks {_count(absent)} of the {part.name} that {asks} asks for: {_few(absent)}; fetch "
                     "or save the weights again, or name the configuration of their own model")
    if extra := [*(name for name in found if name not in wanted), *unused]:
        lines.append(f"{files.get(extra[0], where)} has {_count(extra)} that the {part.name} of {asks} has no place "
                     f"for: {_few(extra)}; the weights are those of another model, so name its configuration")
    for file in dict.fromkeys(files.values()):
        other = [f"{name} is {list(found[name])} in place of {list(wanted[name])}" for name in wanted
                 if files.get(name) == file and found[name] != wanted[name]]
        lines += [f"{file} has {_count(other)} of another shape than {asks} asks for: {_few(other)}; the weights are "
                  "those of another model, so name its configuration"] if other else []
    return lines


def _count(names: Sequence[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
