"""What every peer is given: the same seeds, weights, steps and number of copies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image


class Seed(NamedTuple):
    number: int
    label: str
    path: str


@dataclass(frozen=True)
class Task:
    weights: str  # folder of a Stable Diffusion pipeline
    seeds: str  # folder with a folder of images for each class
    copies: int = 3
    steps: int = 50  # what diffusers takes where a peer offers no setting, and what DistDiff uses
    strength: float = 0.5
    guidance: float = 7.5
    batch: int = 6
    processes: int = 2  # of a peer that runs several
    data_juicer: str = ""  # the Python of an environment with py-data-juicer

    def listed(self) -> list[Seed]:
        paths = sorted(path for path in Path(self.seeds).glob("*/*.png"))
        return [Seed(number, path.parent.name, str(path)) for number, path in enumerate(paths)]

    def rows(self) -> list[tuple[Seed, int]]:
        return [(seed, copy) for seed in self.listed() for copy in range(self.copies)]

    def slots(self) -> Counter[str]:
        return Counter(f"{seed.label}/{Path(seed.path).stem}/{copy}" for seed, copy in self.rows())

    def classes(self) -> Counter[str]:
        return Counter(seed.label for seed in self.listed())

    def call(self) -> dict[str, Any]:
        """Settings of a call of diffusers' pipeline."""
        return {"strength": self.strength, "num_inference_steps": self.steps, "guidance_scale": self.guidance}


def write_seeds(folder: Path, per_class: int) -> None:
    """Real digits, `per_class` of each; file names are unique, as some peers drop the folder."""
    from rayexpand.data.seeds.digits import _NAMES, digits_split

    images, labels = digits_split()["seeds"]
    for label, name in enumerate(_NAMES):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(images[labels == label][:per_class]):
            Image.fromarray(image).save(folder / name / f"{name}-{number}.png")


def load_pipeline(task: Task) -> Any:
    import torch
    from diffusers import StableDiffusionImg2ImgPipeline
    from diffusers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(task.weights, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def opened(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
