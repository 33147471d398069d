"""demo, init, schema: the first minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayexpand.cli.app import app
from rayexpand.cli.options import Json
from rayexpand.cli.show import show_json, show_table


@app.command()
def demo(out: Annotated[str, typer.Option(help="folder for the runs and the report; else runs/demo, or "
                                          "runs/demo-METHOD")] = "",
         method: Annotated[str, typer.Option(help="what expands: img2img, or another one that fine-tunes nothing; "
                                             "gif-mae and gif-dalle are GIF with its other generators")] =
         "img2img", as_json: Json = False) -> None:
    """Expand real digits on this machine, train classifiers, and show the gain with its controls.

    No GPU, no download. Examples:

        rayexpand demo

        rayexpand demo --method distdiff
    """
    from rayexpand import api
    from rayexpand.cli.progress import Progress

    with Progress() as progress:
        found = api.demo(out, method, on=progress)
    if as_json:
        show_json(found)
        return
    arms = {**found["arms"], **{f"control: {name}": arm for name, arm in found["control_arms"].items()}}
    rows = [(name, f"{100 * arm['mean']:.1f} ± {100 * arm['se']:.1f}", str(len(arm["accuracies"])))
            for name, arm in arms.items()]
    rows += [(f"control: {name}", f"{100 * value:.1f}", "") for name, value in found["controls"].items()
             if name not in found["control_arms"]]
    print(f"two real digits per class, expanded by {method}; test accuracy in %, mean ± standard error over five "
          "subsets\n")
    show_table(("trained on", "accuracy", "n"), rows)
    if fitted := [f"{kind.replace('_', ' ')}, {seconds:.1f}" for kind, seconds in found["fit_cpu_seconds"].items()]:
        print(f"\nfitted for {method} on each subset: {'; '.join(fitted)} CPU seconds in all")
    print(f"\ngain of expanded over original: {100 * found['gain']:+z.1f} ± {100 * found['gain_se']:.1f} points")
    print(f"{found['note']}\nsamples beside their seeds: {found['samples']}\nreport: {found['report']}")


@app.command()
def init(images: Annotated[str, typer.Argument(metavar="FOLDER", help="folder with one folder of images per class")],
         to: Annotated[str, typer.Option(metavar="FILE", help="file to write; else FOLDER.yaml here")] = "",
         model: Annotated[str, typer.Option(metavar="FOLDER", help="Stable Diffusion 1 or 2 in diffusers' layout, or "
                                            "org/name@revision; without one the images are only augmented")] = "",
         ratio: Annotated[float, typer.Option(help="samples per image")] = 5) -> None:
    """Write a first YAML file for a folder of images. Nothing is asked and nothing is made.

    Examples:

        rayexpand init data/birds

        rayexpand init data/birds --model models/sd15 --ratio 10
    """
    from rayexpand import api

    file = Path(to or f"{Path(images).absolute().name}.yaml")
    text = api.first_file(images, model=model, ratio=ratio)
    api.write_new(file, text)
    print(f"{file} written; next: rayexpand validate {file}, then rayexpand expand {file}")


@app.command()
def schema(kind: Annotated[str, typer.Argument(metavar="[KIND]", help="run, loop, fit, study, sweep, select or "
                                               "evaluate")] = "run") -> None:
    """Print the JSON schema of a kind of file, for editors.

    Put its path into the first line of a file, and editors complete and check fields:

        rayexpand schema run > run.schema.json

        # yaml-language-server: $schema=run.schema.json
    """
    from rayexpand import api

    show_json(api.schema(kind))
