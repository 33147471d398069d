"""Where guides lie and what their folders say, without loading one.

A guide is a folder, and what lies in it says of which kind:

    open_clip_config.json                          CLIP: classes are told apart by "a photo of a <class name>"
    the same and guide.json, head.safetensors      CLIP fine-tuned on a dataset, with a linear head of its own
    guide.json and model.safetensors               a classifier: a backbone of classifier/backbones.py and its recipe

The last two know their classes (`classes` in guide.json, keys in label order) and serve no other dataset. Besides a
folder, `digits`, `org/name@revision` and an open_clip architecture with a checkpoint name a CLIP guide.
"""

# K classes, D features

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayexpand.artifacts.store import MAKING_OF
from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import ModelError, looked_at
from rayexpand.contract.protocols import Progress
from rayexpand.models.folders import (
    DIGITS,
    HUB_NAME,
    PICKLES,
    cache_root,
    hub_snapshot,
    is_path,
    no_folder,
    read_json,
    tensor_shapes,
    unreadable,
)

if TYPE_CHECKING:
    import torch

CLASS_PROMPT = "a photo of a {name}"  # CLIP (Radford et al. 2021), section 3.1.4
CLIP_HEAD, CLASSIFIER = "clip_head", "classifier"  # kinds in guide.json
CLASSIFIER_WEIGHTS, HEAD_WEIGHTS = "model.safetensors", "head.safetensors"

_ABOUT, _CLIP = "guide.json", "open_clip_config.json"
_HUB_FILES = (_CLIP, "open_clip_*model.safetensors", "*.json", "*.txt")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt")


def guide_folder(weights: str, progress: Progress | None = None) -> Path | None:
    """Complete folder of a guide, or None for the name of an architecture. Raises ModelError."""
    if weights == DIGITS:
        from rayexpand.models.tiny import digits

        return digits.ensure(progress) / "guide"
    path = Path(weights).expanduser()
    if path.is_dir():
        if problems := _folder_problems(path):
            raise ModelError("\n  ".join([f"{path} is not a complete folder of a guide:", *problems]))
        return path
    if HUB_NAME.fullmatch(weights):
        return hub_snapshot(weights, _HUB_FILES, complete=_folder_problems)
    return None


def present_guide(weights: str) -> Path | None:
    """The folder of `weights` if it is on this machine under a name of its own; nothing is trained or downloaded."""
    if weights == DIGITS:
        from rayexpand.models.tiny import digits

        folder = cache_root() / digits.cache_name() / "guide"
    else:
        folder = Path(weights).expanduser()
    return folder if folder.is_dir() else None


def check_guide(weights: str, checkpoint: str | None) -> list[str]:
    """What is wrong with a guide as far as files on this machine say; nothing is loaded, trained or downloaded."""
    folder = present_guide(weights)
    if folder is not None or weights == DIGITS or HUB_NAME.fullmatch(weights):
        problems = [] if checkpoint is None else [f"{weights} brings its own weights, so guide.checkpoint has no "
                                                  "effect; take it out"]
        if folder is None:
            return problems + ([str(no_folder(weights, "a folder"))] if is_path(weights) else [])
        problems += [f"{folder}: {problem}" for problem in _folder_problems(folder)]
        return problems if problems or weights == DIGITS else _architecture_problems(folder)
    try:
        file = checkpoint_file(weights, checkpoint)
        check_architecture(weights, file)
    except ModelError as error:
        return [str(error)]
    return []


def _architecture_problems(folder: Path) -> list[str]:
    if kind_of(folder) == CLASSIFIER:
        return []  # loading compares it with its recipe
    try:
        check_architecture(folder, _clip_weights(folder)[0])
    except ModelError as error:
        return [str(error)]
    return []


def check_architecture(model: str | Path, file: Path) -> None:
    """Raises ModelError with names and shapes where a safetensors file is not of an open_clip architecture, or of that
    of a folder. No weight is read: the architecture is built without memory. Towers of timm and transformers, and CoCa,
    are compared when they are loaded."""
    import open_clip
    import torch
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    name = str(model) if isinstance(model, str) else _CLIP
    config = open_clip.get_model_config(model) if isinstance(model, str) else json.loads(
        (model / _CLIP).read_text(encoding="utf-8"))["model_cfg"]
    shapes = {one.removeprefix("module."): shape for one, shape in tensor_shapes(file).items()}
    other_towers = {"timm_model_name", "hf_model_name"} & {*config.get("vision_cfg", {}), *config.get("text_cfg", {})}
    if other_towers or "multimodal_cfg" in config:
        return
    fields = {key: one for key, one in config.items() if key != "custom_text"}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    try:
        with torch.device("meta"):
            built: Any = kind(**fields)
            there = convert_state_dict(built, {one: torch.empty(shape) for one, shape in shapes.items()})
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise ModelError(f"{name} cannot be built as open_clip's configuration ({type(error).__name__}: {error})"
                         ) from error
    if "positional_embedding" in there and not hasattr(built, "positional_embedding"):
        there = convert_to_custom_text_state_dict(there)
    differ = []
    for one, tensor in built.state_dict().items():
        if one.endswith(("positional_embedding", "logit_scale", "logit_bias")):
            continue  # open_clip fits these to the model
        if one not in there:
            differ.append(f"{one} is not there")
        elif there[one].shape != tensor.shape:
            differ.append(f"{one} is {list(there[one].shape)} there and {list(tensor.shape)} in {name}")
    if differ:
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise ModelError(f"{file} is of another architecture than {name}: {'; '.join(differ[:4])}{more}. Name the "
                         "architecture that it was saved from")


def features_of(weights: str, checkpoint: str | None) -> int | None:
    """How many features a CLIP guide gives of an image; None where its files are not on this machine yet, or unsound,
    and for a classifier."""
    folder = present_guide(weights)
    if check_guide(weights, checkpoint) or (folder is None and (weights == DIGITS or HUB_NAME.fullmatch(weights))):
        return None
    if folder is None:
        import open_clip

        found = (open_clip.get_model_config(weights) or {}).get("embed_dim")
    elif kind_of(folder) == CLASSIFIER:
        return None
    else:
        found = read_json(folder / _CLIP).get("model_cfg", {}).get("embed_dim")
    return found if isinstance(found, int) else None


def guide_classes(folder: Path) -> tuple[str, ...] | None:
    """Class keys a guide was made for, in label order; None for CLIP, which takes any."""
    return tuple(about_guide(folder)["classes"]) if (folder / _ABOUT).is_file() else None


def class_problem(folder: Path, class_keys: Sequence[str]) -> str | None:
    """Why this guide is not one for a dataset of these classes."""
    own = guide_classes(folder)
    if own is None or not (difference := class_difference(own, class_keys)):
        return None
    return (f"guide {folder} was made for other classes than the dataset has: {difference}. Make one on this dataset "
            "with `rayexpand fit`, or give a CLIP guide")


def class_difference(own: Sequence[str], class_keys: Sequence[str]) -> str:
    """The first class two tables disagree about, "" where there is none."""
    for label, (there, here) in enumerate(zip(own, class_keys, strict=False)):
        if there != here:
            return f"class {label} is {there!r} there and {here!r} here"
    return "" if len(own) == len(class_keys) else f"{len(own)} classes there and {len(class_keys)} here"


def save_classifier(folder: Path, model: Any, recipe: Recipe, class_keys: Sequence[str]) -> None:
    """Writes a classifier as a guide's folder."""
    from safetensors.torch import save_file

    fields = {**recipe.model_dump(mode="json"), "checkpoint": None, "pretrained": None}
    _write_about(folder, {"kind": CLASSIFIER, "classes": list(class_keys), "recipe": fields})
    save_file({name: one.detach().cpu().contiguous() for name, one in model.state_dict().items()},
              folder / CLASSIFIER_WEIGHTS)


def save_clip_head(folder: Path, model: Any, head_KD: torch.Tensor, source: str, class_keys: Sequence[str]) -> None:
    """Writes an open_clip model with a head; tokenizer and configuration are those of `source`, where it came from."""
    import open_clip
    from safetensors.torch import save_file

    base = guide_folder(source)
    if base is None:
        settings = {"model_cfg": open_clip.get_model_config(source),
                    "preprocess_cfg": open_clip.get_model_preprocess_cfg(model)}
        (folder / _CLIP).write_text(json.dumps(settings, indent=1) + "\n")
    else:
        for file in base.iterdir():
            if file.suffix in (".json", ".txt") and file.name not in (_ABOUT, MAKING_OF):
                shutil.copyfile(file, folder / file.name)
    _write_about(folder, {"kind": CLIP_HEAD, "classes": list(class_keys)})
    save_file({name: one.detach().cpu().contiguous() for name, one in model.state_dict().items()},
              folder / "open_clip_model.safetensors")
    save_file({"weight": head_KD.detach().cpu().contiguous()}, folder / HEAD_WEIGHTS)


def checkpoint_file(model: str, checkpoint: str | None) -> Path:
    """The safetensors file of an open_clip architecture. Raises ModelError."""
    import open_clip

    if "://" in model:
        raise no_folder(model, "a folder")
    if model not in open_clip.list_models():
        raise ModelError(f"guide '{model}' is neither a folder here nor an open_clip architecture; give 'digits', a "
                         "folder that `rayexpand fit` made or with open_clip_config.json, org/name@revision, or a name "
                         "from open_clip.list_models()")
    if checkpoint is None:
        raise ModelError(f"guide '{model}' is an architecture without weights; set guide.checkpoint to a "
                         "safetensors file")
    path = Path(checkpoint).expanduser()
    if path.suffix != ".safetensors":
        raise ModelError(f"guide.checkpoint {path} is not a safetensors file; pickles can run code when opened and are "
                         "not read: convert it with safetensors.torch.save_file")
    if not path.is_file():
        raise ModelError(f"guide.checkpoint {path} does not exist{looked_at(path)}; give the path of a safetensors "
                         "file")
    return path


def clip_files(weights: str, checkpoint: str | None) -> tuple[dict[str, Any], Path] | None:
    """open_clip's model configuration and the weights of a guide; None for one that is no CLIP. Raises ModelError."""
    import open_clip

    folder = guide_folder(weights)
    if folder is None:
        file = checkpoint_file(weights, checkpoint)
        return dict(open_clip.get_model_config(weights)), file
    if kind_of(folder) == CLASSIFIER:
        return None
    return dict(read_json(folder / _CLIP)["model_cfg"]), _clip_weights(folder)[0]


def kind_of(folder: Path) -> str:
    return str(about_guide(folder)["kind"]) if (folder / _ABOUT).is_file() else "clip"


def about_guide(folder: Path) -> dict[str, Any]:
    """guide.json of a folder. Raises ModelError."""
    try:
        about = json.loads((folder / _ABOUT).read_text())
        known = about["kind"] in (CLASSIFIER, CLIP_HEAD) and all(isinstance(key, str) for key in about["classes"])
        if known and (about["kind"] == CLIP_HEAD or isinstance(about["recipe"], dict)):
            return dict(about)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ModelError(f"{folder / _ABOUT} does not describe a guide: expected kind ({CLASSIFIER} or {CLIP_HEAD}), "
                     "classes, and for a classifier its recipe. Make the guide again with `rayexpand fit`")


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    (folder / _ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {error}. Make the guide again with `rayexpand fit`") from error


def _folder_problems(folder: Path) -> list[str]:
    """What keeps a folder from being a guide, one line each."""
    try:
        if other := _other_kind(folder):
            return [other]
    except ModelError as error:
        return [str(error)]
    if (folder / _ABOUT).is_file():
        try:
            kind = kind_of(folder)
        except ModelError as error:
            return [str(error)]
        wanted = [CLASSIFIER_WEIGHTS] if kind == CLASSIFIER else [HEAD_WEIGHTS]
        missing = [f"{name} is missing" for name in wanted if not (folder / name).is_file()]
        missing += [line for name in wanted if (folder / name).is_file() for line in unreadable(folder / name)]
        return missing + ([] if kind == CLASSIFIER else _clip_problems(folder))
    return _clip_problems(folder)


_OPEN_CLIP_TAKES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")


def _clip_weights(folder: Path) -> list[Path]:
    """In the order in which open_clip looks for them: it loads the first."""
    found = sorted(file for file in folder.glob("*.safetensors") if file.name != HEAD_WEIGHTS)
    return sorted(found, key=lambda file: (*(file.name != name for name in _OPEN_CLIP_TAKES), file.name))


def _other_kind(folder: Path) -> str:
    """What a folder is that is no guide at all, "" for one that may be."""
    if (folder / _CLIP).is_file() or (folder / _ABOUT).is_file():
        return ""
    if (folder / "model_index.json").is_file():
        return "is a generator, not a guide; name it in prior.weights"
    if (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("model_type", "of no type")
        if kind == "clip":
            return ("is CLIP in transformers' layout; guides are read in open_clip's layout: name such a model of the "
                    f"hub (those of laion have {_CLIP}), or an open_clip architecture with a checkpoint")
        return f"is a transformers model ({kind}), not a guide; give a folder in open_clip's layout"
    return "" if any(folder.iterdir()) else ("is empty; give a folder in open_clip's layout, or that `rayexpand fit` "
                                             "made")


def _clip_problems(folder: Path) -> list[str]:
    problems = [] if (folder / _CLIP).is_file() else [f"{_CLIP} is missing"]
    files = _clip_weights(folder)
    if not files:
        pickles = sorted(f.name for f in folder.glob("*") if f.suffix in PICKLES)
        problems.append(f"{pickles[0]} is a pickle, which can run code when opened; convert it to "
                        "open_clip_model.safetensors" if pickles else "open_clip_model.safetensors is missing")
    return problems or _text_problems(folder, files[0])


def _text_problems(folder: Path, weights: Path) -> list[str]:
    """Whether there is a text tower, and whether tokenizer, configuration and weights of it belong together."""
    try:
        text = json.loads((folder / _CLIP).read_text(encoding="utf-8"))["model_cfg"].get("text_cfg")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return [f"{_CLIP} cannot be read as open_clip's configuration ({type(error).__name__}: {error})"]
    if not isinstance(text, dict):
        return [f"{_CLIP} has no model_cfg.text_cfg: without a text tower it cannot tell classes apart"]
    problems = []
    if text.get("hf_tokenizer_name") and not any((folder / name).is_file() for name in _TOKENIZERS):
        problems.append("tokenizer.json is missing, and model_cfg.text_cfg.hf_tokenizer_name says the text tower has a "
                        "tokenizer of its own")
    try:
        shapes = tensor_shapes(weights)
    except ModelError as error:
        return [*problems, str(error)]
    rows = next((shape[0] for name, shape in shapes.items() if name.endswith("token_embedding.weight")), None)
    is_known = bool(text.get("hf_model_name")) or any(name.startswith("text.") for name in shapes)
    if rows is None and not is_known:
        return [*problems, f"{weights.name} holds no text tower (no token_embedding.weight)"]
    if rows is not None and (words := _vocabulary(folder, text)) > rows:
        problems.append(f"the text tower of {weights.name} knows {rows:,} tokens and its tokenizer makes {words:,}: "
                        "they do not belong together")
    return problems


def _vocabulary(folder: Path, text: dict[str, Any]) -> int:
    """Tokens the text tower will be given, as far as JSON files say."""
    declared = int(text.get("vocab_size", 0))
    try:
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        return max(declared, len(model)) if text.get("hf_tokenizer_name") else declared
    except (OSError, ValueError, KeyError, TypeError):
        return declared
