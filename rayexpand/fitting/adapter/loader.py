"""What fine-tuning is fed: which image stands where, and the noise, timestep and text it is shown with.

Images come as one endless stream of passes over the seeds, each in an order of its own (Diff-Mix, Real-Fake: shuffled;
on long tails with replacement and weight 1 / images of the class). Image number p of the stream is row p mod B of step
p // B, so a batch is always full, and every step can be made alone. All that is random about a visit is keyed by (seed,
seed id, p), and worker r of W takes rows r B / W .. (r + 1) B / W - 1: the batches are the same for any number of
workers and after any restart.
"""

# B images of a step, C h w latent, D visual feature

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayexpand.artifacts.columns import captions_for, open_image_features, read_class_features
from rayexpand.contract.errors import UsageError, few
from rayexpand.contract.prompts import format_prompt
from rayexpand.contract.rng import generator, row_key
from rayexpand.contract.schema import CAPTION_SLOT, ClassTable
from rayexpand.fitting.adapter.latents import Latents
from rayexpand.fitting.adapter.recipe import FinetuneConfig
from rayexpand.fitting.adapter.training_draw import draw_told, draw_visit


class LatentRows(NamedTuple):
    """One worker's rows of one step."""

    z0_BCHW: np.ndarray  # float32, scaled latents: a sample of the posterior
    noise_BCHW: np.ndarray  # float32
    t_B: np.ndarray  # int64 timesteps
    dropped_B: np.ndarray  # bool: empty text, no visual token
    texts: list[str]
    visual_BD: np.ndarray | None  # float32: visual token, or what a decoder of embeddings is told (`draw_told`)
    step: int


@dataclass(frozen=True, slots=True)
class Sources:
    """Folders a feed reads."""

    latents: str
    captions: str | None = None
    features: str | None = None  # of classes or of images, by recipe.visual_token


class LatentLoader:
    """The cached latents of a dataset seen through a recipe. Raises ModelError and UsageError for folders that do not
    hold what the recipe asks for."""

    def __init__(self, sources: Sources, recipe: FinetuneConfig, classes: ClassTable, seed: int,
                 timesteps: int) -> None:
        self.latents = Latents(sources.latents)
        self.recipe, self.seed, self.timesteps = recipe, seed, timesteps
        self.names = classes.name
        self._prompts = ([""] * len(classes) if self.latents.embeds else  # such a decoder is told images and no texts
                         [format_prompt(recipe.template, label, classes) for label in range(len(classes))])
        self._captions = None if sources.captions is None else _captions(self.latents, sources.captions)
        self.rows = np.arange(len(self.latents)) if self._captions is None else np.flatnonzero(self._captions != "")
        self._refuse_idle_classes(classes, sources)
        self._visual = _visual(recipe, sources.features, classes, self.latents.seed_ids.take(pa.array(self.rows)))
        self._weights = _inverse(self.latents.labels[self.rows]) if recipe.balance == "inverse" else None
        self._order = lru_cache(2)(self._drawn)  # a batch may lie in two passes

    def _refuse_idle_classes(self, classes: ClassTable, sources: Sources) -> None:
        """Raises UsageError where a class has nothing to learn from: its token, or name, would stay as it is."""
        if not len(self.rows):
            raise UsageError(f"fit.adapter.captions: {sources.captions} has an empty caption of every image; caption "
                             "them, or take {caption} out of the prompt")
        labels = self.latents.labels
        used, read = (np.bincount(one, minlength=len(classes)) for one in (labels[self.rows], labels))
        if blank := [classes.key[k] for k in np.flatnonzero((used == 0) & (read > 0))]:
            raise UsageError(f"fit.adapter.captions: {sources.captions} has an empty caption of every image of "
                             f"{len(blank)} of {len(classes)} classes ({few(blank)}), which could not be learnt; "
                             "caption one of each, take {caption} out of the prompt, or leave these classes out")
        if unread := [classes.key[k] for k in np.flatnonzero(read == 0)]:
            raise UsageError(f"fit.adapter: {len(unread)} of {len(classes)} classes have no image that can be read "
                             f"({few(unread)}), so they could not be learnt; give each at least one, or leave these "
                             "classes out of the dataset")

    @staticmethod
    def latent_shape(sources: Sources) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        return Latents(sources.latents).shape

    def items(self, step: int) -> np.ndarray:
        """int64 (B,): the images of a step."""
        size, batch = len(self.rows), self.recipe.batch
        places = np.arange(step * batch, (step + 1) * batch)
        found = np.empty(batch, np.int64)
        for epoch in np.unique(places // size):
            here = places // size == epoch
            found[here] = self._order(int(epoch))[places[here] % size]
        return found

    def batches(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[LatentRows]:
        """A worker's rows of the steps start..stop-1."""
        for step in range(start, stop):
            yield self.visits(step, rank, world)

    def visits(self, step: int, rank: int = 0, world: int = 1) -> LatentRows:
        share = self.recipe.batch // world
        items = self.items(step)[rank * share:(rank + 1) * share].tolist()
        first = step * self.recipe.batch + rank * share
        rows = [self._visit(item, first + i) for i, item in enumerate(items)]
        z0, noise, t, dropped = (np.stack([row[i] for row in rows]) for i in range(4))
        visual = None if self._visual is None else self._visual(self.latents, items)
        if self.latents.embeds:
            visual = np.stack([self._told(item, first + i) for i, item in enumerate(items)])
        return LatentRows(z0, noise, t, dropped, [self._text(item) for item in items], visual, step)

    def _visit(self, item: int, place: int) -> tuple[np.ndarray, np.ndarray, np.int64, np.bool_]:
        """(z0, noise, t, dropped) of image `place` of the stream."""
        seed_id = self.latents.seed_id(item)
        mean, std = self.latents.posterior(item, self._view(seed_id, place))
        visit = draw_visit(self.recipe, self.seed, seed_id, place, mean.shape, self.timesteps)
        return mean + std * visit.posterior_CHW, visit.noise_CHW, np.int64(visit.t), np.bool_(visit.dropped)

    def _told(self, item: int, place: int) -> np.ndarray:
        """What a decoder of image embeddings is told of it, of the same view."""
        seed_id = self.latents.seed_id(item)
        return draw_told(self.seed, seed_id, place, self.latents.embedding(item, self._view(seed_id, place)))

    def _view(self, seed_id: str, place: int) -> int:
        if self.latents.views == 1:
            return 0
        return int(generator(row_key(self.seed, "finetune", seed_id, place, 0, "view")).integers(self.latents.views))

    def shown(self, classes: int) -> tuple[list[str], np.ndarray | None]:
        """(text, visual token) of the first image of each of the first `classes` classes that have one; (name, image
        embedding) for a decoder of these."""
        items = self.rows[np.unique(self.latents.labels[self.rows], return_index=True)[1][:classes]].tolist()
        if self.latents.embeds:
            return [self.names[self.latents.labels[item]] for item in items], np.stack([
                self.latents.embedding(item, 0) for item in items])
        return [self._text(item) for item in items], None if self._visual is None else self._visual(self.latents, items)

    def _text(self, item: int) -> str:
        text = self._prompts[int(self.latents.labels[item])]
        return text if self._captions is None else text.replace(CAPTION_SLOT, str(self._captions[item]))

    def _drawn(self, epoch: int) -> np.ndarray:
        """int64 (n,): the images of one pass, in their order. n are the images that can be used: with {caption} in the
        prompt, those for which a caption could be made."""
        rng = generator(row_key(self.seed, "finetune", "", epoch, 0, "order"))
        if self._weights is None:
            return rng.permutation(self.rows)
        return rng.choice(self.rows, len(self.rows), p=self._weights)


def _inverse(labels: np.ndarray) -> np.ndarray:
    """float64 (n,): probabilities that give every class the same share."""
    weights = 1 / np.bincount(labels)[labels]
    return weights / weights.sum()


def _captions(latents: Latents, folder: str) -> np.ndarray:
    """Captions of all items; "" where none could be made."""
    found = captions_for(folder, latents.seed_ids)
    if found.null_count:
        absent = latents.seed_ids.filter(found.is_null())
        raise UsageError(f"fit.adapter.captions: {folder} has no captions of {len(absent)} of {len(latents)} seeds, "
                         f"such as {absent[0].as_py()!r}; make captions of this very dataset, or leave these seeds out "
                         "with data.ids")
    return np.array(found.to_pylist(), object)


def _visual(recipe: FinetuneConfig, folder: str | None, classes: ClassTable, used: pa.StringArray) -> Any:
    """Function (latents, items) -> float32 (B, D); None without a visual token. Raises UsageError where an image of
    the seeds `used` has no feature of its own."""
    if folder is None:
        return None
    match recipe.visual_token:
        case "class_mean":
            features_KD = read_class_features(folder, classes.key)
            return lambda latents, items: features_KD[latents.labels[items]]
        case "instance":
            features = open_image_features(folder)
            if absent := features.missing(used):
                raise UsageError(f"fit.adapter.features: {folder} has no features of {len(absent)} of {len(used)} "
                                 f"seeds, such as {absent[0]!r}; make image_features of this very dataset, or leave "
                                 "these seeds out with data.ids")
            return lambda latents, items: features.rows([latents.seed_id(item) for item in items])
    return None
