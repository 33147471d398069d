"""Data-Juicer's image_diffusion_mapper by its own executor. Runs in an environment with py-data-juicer, without
rayexpand: `python juicer.py TASK.json OUT`.

The operator resizes every image to 512 x 512 and back. The tiny weights are made for 16 pixels, so this resize does
nothing here; nothing else is changed. It has no setting for steps (diffusers' default is 50) and none for a seed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image


def keep_size() -> None:
    resize = Image.Image.resize

    def kept(self: Any, size: Any, *rest: Any, **named: Any) -> Any:
        return self.copy() if tuple(size) == (512, 512) else resize(self, size, *rest, **named)

    Image.Image.resize = kept  # type: ignore[method-assign]


def main() -> None:
    task, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    listing = out.parent / "seeds.jsonl"
    listing.write_text("".join(json.dumps({"text": f"a photo of a {path.parent.name}", "images": [str(path)]}) + "\n"
                               for path in sorted(Path(task["seeds"]).glob("*/*.png"))))
    os.environ["TRANSFORMERS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import yaml
    from data_juicer.config import init_configs
    from data_juicer.core import DefaultExecutor

    keep_size()
    torch.set_num_threads(1)
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({
        "project_name": "peers", "dataset_path": str(listing), "export_path": str(out / "samples.jsonl"), "np": 1,
        "work_dir": str(out.parent / "work"), "temp_dir": None, "ds_cache_dir": str(out.parent / "cache"),
        "process": [{"image_diffusion_mapper": {
            "hf_diffusion": task["weights"], "strength": task["strength"], "guidance_scale": task["guidance"],
            "aug_num": task["copies"], "keep_original_sample": False, "caption_key": "text",
            "save_dir": str(out / "images")}}]}))
    DefaultExecutor(init_configs(["--config", str(recipe)])).run()


if __name__ == "__main__":
    main()
