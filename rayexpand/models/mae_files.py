"""What the files of a masked autoencoder say (transformers' ViTMAEForPreTraining), and what keeps it from being used.

Nothing here loads the model or imports torch; the two tables of positions are read, because zeros there pass every
other look: an image is drawn again as well, but every token stands at the same place.
"""

# D channels of a token, T tokens, p pixels of a patch

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rayexpand.contract.errors import ModelError
from rayexpand.diffusion.process import Process
from rayexpand.models.folders import (
    MAE_CONFIG,
    MAE_WEIGHTS,
    PICKLES,
    PIXELS,
    configs_of,
    read_json,
    tensor_shapes,
    tensor_values,
    unreadable,
    variant_files,
)
from rayexpand.models.prior_config import PriorModel, ProcessConfig
from rayexpand.models.prior_files import COLOURS, PriorFacts, Settings, pixel_numbers

NOTHING = Process("sample", "none", {})  # the noise process of what denoises nothing
POSITIONS = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")


def missing_configs(folder: Path) -> list[str]:
    """Configuration files that are not there, one line each."""
    return [f"{name} is missing" + ("; it says how pixels are normalised" if name == PIXELS else "")
            for name in configs_of(folder) if not (folder / name).is_file()]


def missing_files(folder: Path) -> list[str]:
    """What keeps a folder from being loaded, one line per file."""
    problems = missing_configs(folder)
    try:
        names = variant_files(folder, MAE_WEIGHTS)[1]
    except ModelError as error:
        return [*problems, str(error)]
    problems += [f"{name} is missing" for name in names if not (folder / name).is_file()]
    problems += [line for name in names if name.endswith(".safetensors") and (folder / name).is_file()
                 for line in unreadable(folder / name)]
    if names:
        return problems
    pickles = sorted(one.name for one in folder.iterdir() if one.suffix in PICKLES)
    return [*problems, f"{pickles[0]} is a pickle, which can run code when opened; load it once in transformers where "
                       "you trust it and call save_pretrained(folder)" if pickles else
            f"{MAE_WEIGHTS}.safetensors is missing"]


def inspect_mae(folder: Path, prior: PriorModel, missing: Sequence[str] = ()) -> PriorFacts:
    """Facts of a folder. Raises ModelError with all that keeps it from being used."""
    problems = [*missing, *named_in_vain(prior)]
    if any(not (folder / name).is_file() for name in configs_of(folder)):
        raise unusable_mae(folder, problems or missing_configs(folder))
    config = Settings(MAE_CONFIG, read_json(folder / MAE_CONFIG), problems)
    pixel_numbers(Settings(PIXELS, read_json(folder / PIXELS), problems))
    facts = _facts(config, f"{prior.weights.split('@')[0]}@{folder.name}" if folder.parent.name == "snapshots"
                   else prior.weights)
    if not problems:
        problems += _weight_problems(folder, config)
    if problems:
        raise unusable_mae(folder, problems)
    return facts


def _facts(config: Settings, weights: str) -> PriorFacts:
    side, patch = config.whole("image_size", 224), config.whole("patch_size", 16)
    if side % patch:
        config.refuse(f"patch_size {patch} does not divide image_size {side}, so that a strip of the image would be "
                      "left out; use a model whose patches cover it")
    if config.values.get("norm_pix_loss"):
        config.refuse("norm_pix_loss says that the decoder paints patches without their mean and contrast. Those of "
                      "the seed would have to be put back on every copy, which takes half of the variety away; use "
                      "weights that were trained on plain pixels (facebook/vit-mae-large is)")
    if (colours := config.whole("num_channels", COLOURS)) != COLOURS:
        config.refuse(f"num_channels {colours}: images here have {COLOURS}")
    for width, heads, each in (("hidden_size", "num_attention_heads", 768),
                               ("decoder_hidden_size", "decoder_num_attention_heads", 512)):
        found, parts = config.whole(width, each), config.whole(heads, 12 if each == 768 else 16)
        if found % parts or found % 4:
            config.refuse(f"{width} {found} is no multiple of 4 and of {heads} {parts}, which positions and heads need")
    return PriorFacts(weights=weights, image_size=side, vae_factor=patch, unet_factor=1,
                      latent_channels=config.whole("hidden_size", 768), process=NOTHING, train_timesteps=0,
                      family="mae", text_width=0, guidance="none")


def named_in_vain(prior: PriorModel) -> list[str]:
    """Fields of `prior` that say how something is denoised, or of which parts it is made."""
    said = [f"process.{name}" for name, value in prior.process if value != getattr(ProcessConfig(), name)]
    said += ["guidance"] if prior.guidance not in ("auto", "none") else []
    said += [name for name in ("config", "parts", "vae", "loras", "embeddings") if getattr(prior, name)]
    return [f"prior.{name}: has no meaning for a masked autoencoder, which denoises nothing and is one model; take it "
            "out" for name in said]


def _weight_problems(folder: Path, config: Settings) -> list[str]:
    """Where tensors have other shapes than the configuration says, or positions are zeros."""
    files = [folder / name for name in variant_files(folder, MAE_WEIGHTS)[1] if name.endswith(".safetensors")]
    there = {name: (file, shape) for file in files if file.is_file() for name, shape in tensor_shapes(file).items()}
    if not there:
        return []  # not downloaded yet
    problems = []
    for name, wanted in _shapes(config.values).items():
        if name not in there:
            problems.append(f"{name} is not in the weights, and without it nothing can be drawn; an encoder alone "
                            "(ViTMAEModel) is no generator, save the whole ViTMAEForPreTraining")
        elif (found := there[name][1]) != wanted:
            problems.append(f"{name} is {list(found)}, and {MAE_CONFIG} asks for {list(wanted)} there; its weights are "
                            "those of another model")
    problems += [f"{name} holds zeros: the model does not know where its tokens stand. transformers makes such tables "
                 "for a model that it builds without weights; fill them before training, and train again"
                 for name in POSITIONS if name in there and not tensor_values(there[name][0], [name])[name].std() > 0]
    return problems


def _shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Of tensors that tell whether weights and configuration belong together, and whether there is a decoder."""
    side, p, D, other = (int(config.get(name, default)) for name, default in (  # type: ignore[call-overload]
        ("image_size", 224), ("patch_size", 16), ("hidden_size", 768), ("decoder_hidden_size", 512)))
    T = (side // p) ** 2 + 1
    return {POSITIONS[0]: (1, T, D), POSITIONS[1]: (1, T, other),
            "vit.embeddings.patch_embeddings.projection.weight": (D, COLOURS, p, p),
            "decoder.decoder_embed.weight": (other, D), "decoder.decoder_pred.weight": (p * p * COLOURS, other)}


def unusable_mae(folder: Path, problems: Sequence[str]) -> ModelError:
    """The error of a folder with these lines."""
    head = f"{folder} cannot be used as a masked autoencoder in transformers' layout:"
    return ModelError("\n  ".join([head, *dict.fromkeys(problems)]))
