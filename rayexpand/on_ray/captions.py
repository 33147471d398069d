"""Captions on Ray: a model writes about the images of spans of the seed index, in a pool of actors.

    driver    spans of rows -> map_batches(CaptionActor) -> captions.parquet

The model is staged under its content hash (stage.py); captions are those of `fit.HERE` for any number of actors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray

from rayexpand.contract.schema import SeedIndex
from rayexpand.data.batches import SeedBatches
from rayexpand.fitting.captions import CaptionBlock, Captioner
from rayexpand.fitting.config import FitConfig
from rayexpand.models.folders import ModelFiles, folder_model
from rayexpand.on_ray.spans import SpanActor, over_spans
from rayexpand.on_ray.stage import local


def caption_blocks(config: FitConfig, model_sha256: str, index: SeedIndex,
                   costs: dict[str, Any]) -> Iterator[CaptionBlock]:
    """Captions of all images. Raises ModelError or EnvironmentFault for a fault of the nodes."""
    made = config.fit.captions
    assert made is not None
    for row in over_spans(CaptionActor, {"config": config, "sha256": model_sha256}, config,
                          {model_sha256: captioner_model(Path(str(made.model)).expanduser())}, index, made.batch,
                          costs):
        yield CaptionBlock(np.frombuffer(row["rows"], np.int64), json.loads(row["captions"]),
                           json.loads(row["refused"]))


def captioner_model(folder: Path) -> ModelFiles:
    """The folder of a captioning model."""
    return folder_model(folder)


class CaptionActor(SpanActor):
    nothing: ClassVar[dict[str, Any]] = {"rows": b"", "captions": "[]", "refused": "{}"}

    def __init__(self, config: FitConfig, sha256: str, server: Any, cwd: str) -> None:
        super().__init__(server, cwd)
        self._config, self._sha256 = config, sha256
        self._loaded: tuple[Captioner, SeedBatches] | None = None

    def _made(self, rows: range) -> dict[str, Any]:
        captioner, images = self._get()
        sound, captions, refused = [], list[str](), dict[str, str]()
        for some, found, others in images(rows):
            sound.append(some)
            captions += captioner(found)
            refused |= others
        return {"rows": np.concatenate(sound).tobytes(), "captions": json.dumps(captions),
                "refused": json.dumps(refused)}

    def _get(self) -> tuple[Captioner, SeedBatches]:
        if self._loaded is None:
            import torch

            config, made = self._config, self._config.fit.captions
            assert made is not None
            torch.set_num_threads(config.runtime.torch_threads)
            index = ray.get(self._server.shared.remote())
            model = captioner_model(Path(str(made.model)).expanduser())
            here = made.model_copy(update={"model": str(local(model, self._sha256, self._server))})
            captioner = Captioner(here, config.device)
            self._device = captioner.device.type
            self._loaded = captioner, SeedBatches(index, config.data, made.batch, config.runtime.io_threads,
                                                  lambda pixels, _: captioner.prepared(pixels))
        return self._loaded
