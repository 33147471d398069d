"""Loading one part of a generator: from the folder that diffusers or transformers saved, or out of a single file."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rayexpand.contract.errors import ModelError
from rayexpand.models.conversion import converted, module_class, skeleton
from rayexpand.models.folders import quiet_libraries, variant_files
from rayexpand.models.header_check import part_problems
from rayexpand.models.single_files import part_tensors
from rayexpand.models.sources import PartSource

_UNLOADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def load_part(part: PartSource, class_name: str, dtype: torch.dtype) -> Any:
    """The module of a part with its weights in `dtype`, on the CPU and in eval mode. Raises ModelError where a weight
    is absent, has another shape or is of no use."""
    if problems := part_problems(part, class_name):
        raise ModelError("\n".join(problems))
    try:
        with quiet_libraries():
            return (_of_file if part.weights.is_file() else _of_folder)(part, class_name, dtype)
    except _UNLOADABLE as error:
        raise ModelError(f"{part.weights}: the {part.name} cannot be loaded: {error}. Fetch or save it "
                         "again") from error


def _of_file(part: PartSource, class_name: str, dtype: torch.dtype) -> torch.nn.Module:
    """Only the tensors of this part are read, once."""
    module = skeleton(part.config, class_name)
    with safe_open(str(part.weights), "pt") as opened:
        places = part_tensors(opened.keys(), part.name)
        tensors = {name: _cast(opened.get_tensor(name), dtype) for name in places}
    named, _ = converted(tensors, places, part.name, module)
    module.load_state_dict({name: tensor.contiguous() for name, tensor in named.items()}, assign=True)
    return module.eval()


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _of_folder(part: PartSource, class_name: str, dtype: torch.dtype) -> torch.nn.Module:
    kind = module_class(class_name)
    named = "torch_dtype" if hasattr(kind, "load_config") else "dtype"  # diffusers' and transformers' word
    module, info = kind.from_pretrained(part.weights, local_files_only=True, use_safetensors=True,
                                        variant=variant_files(part.weights, part.stem)[0], output_loading_info=True,
                                        **{named: dtype})
    if absent := sorted(info["missing_keys"]):  # both libraries fill or leave them, and go on
        raise ValueError(f"it lacks {len(absent)} weights that its configuration asks for, such as {absent[0]}")
    return module.eval()
