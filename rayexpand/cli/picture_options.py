"""Options of `report` about pages that show images, or load models for what they show."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def _option(*names: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar,
                        rich_help_panel="Pages with pictures, in figures/ of the first folder or of --out")


Matrix = Annotated[bool, _option("--matrix", text="the same seeds by several runs side by side")]
Sheet = Annotated[bool, _option("--sheet", text="samples by class, several runs side by side")]
Map = Annotated[bool, _option("--map", text="features of samples, real images and prototypes in one plane, by PCA and "
                              "t-SNE; loads the guide")]
Failures = Annotated[bool, _option("--failures", text="samples whose own class the guide sees least; loads the guide")]
Latents = Annotated[bool, _option("--latents", text="what changes in the latents along tokens and channels; makes some "
                                  "samples again")]
Batch = Annotated[bool, _option("--batch", text="of a study: the first training batch of every arm, as its recipe "
                                "makes it")]
Saliency = Annotated[bool, _option("--saliency", text="of a study with training.keep: weights: Grad-CAM of the same "
                                   "test images under every arm")]
Rows = Annotated[int | None, _option(text="seeds of --matrix, classes of --sheet, samples of --failures")]
Copies = Annotated[int | None, _option(text="copies of a seed in --matrix, seeds of a class in --sheet")]
Images = Annotated[int | None, _option(text="of each class and run in --map; looked at by --failures; of each run in "
                                       "--latents, of each arm in --batch and --saliency")]
Classes = Annotated[int | None, _option(text="shown by --map")]
Guide = Annotated[str | None, _option(text="of --map and --failures: folder, name or 'digits', in place of the run's")]
Checkpoint = Annotated[str | None, _option(text="safetensors file of a guide that is named by its architecture")]
Out = Annotated[str | None, _option(text="where to write, if not into the first folder", metavar="FOLDER")]
Name = Annotated[str | None, _option(text="of the page, so that several of one kind stand side by side")]
