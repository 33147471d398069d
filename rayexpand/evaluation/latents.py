"""What a method changes in the latents of its seeds, along tokens and along channels (GIF, figures 10 and 11; the paper
gives no formula, this one is ours).

    here            meaning, latent units
    d_CT            new latent minus that of the seed, C channels at T tokens (positions)
    token_T         token profile: mean of d over channels
    channel_C       channel profile: mean of d over tokens
    spread          standard deviation of a profile over its entries

A shift of whole channels leaves the token profile flat, and one of whole tokens the channel profile, so the spreads
tell noise of channels from noise of tokens. The new latent is the one whose decoded image the method returns: calls are
sampled again, as `regen` does, and the decoder is listened to. The seed's is the mean of its posterior.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Batch, Tools
from rayexpand.contract.schema import Receipt
from rayexpand.data.pixels import decode, to_uint8
from rayexpand.diffusion import sampling
from rayexpand.runs import run as runs
from rayexpand.runs.expander import Expander

if TYPE_CHECKING:
    import torch

BINS = 41
SHARDS = 4  # sampled again at most, evenly over the run


@dataclass(frozen=True, slots=True)
class LatentChange:
    """Profiles of one sample; the spread of the one entry of a latent without tokens is 0."""

    token_T: np.ndarray
    channel_C: np.ndarray

    @property
    def spreads(self) -> tuple[float, float]:
        """Of the token and of the channel profile."""
        return float(self.token_T.std()), float(self.channel_C.std())


def profiles(change_CT: np.ndarray) -> LatentChange:
    """Of a change (C, T); a latent image (C, h, w) has its positions as tokens, an embedding (C,) has one."""
    d_CT = np.asarray(change_CT, np.float64).reshape(len(change_CT), -1)
    return LatentChange(d_CT.mean(axis=0), d_CT.mean(axis=1))


def latent_changes(folder: str, images: int = 64) -> dict[str, Any]:
    """Profiles of about `images` samples of a run, as JSON takes them: `name`, `run`, `run_digest`, `method`, `space`,
    `channels`, `tokens`, `samples` (sample_id, token_spread, channel_spread), `equal` (samples whose pixels came out as
    they are in the run), and both histograms as `edges` and `counts`. Loads its models. Raises UsageError for a run
    without a generator or without a kept sample, DigestMismatch where its models have changed."""
    run = runs.open_run(folder, check_models=True)
    if "prior" not in run.config.needs:
        raise UsageError(f"--latents: {folder} was made by {run.config.method.name}, which has no generator and so no "
                         "latents; leave it out")
    expander = runs.expander_of(run, attempt=0)
    try:
        found = list(_changes(run, expander, images))
        space, plain = expander.loaded().prior.space if found else "", sum(equal for _, _, equal in found)
    finally:
        expander.close()
    if not found:
        raise UsageError(f"--latents: {folder} has no kept sample made at its first attempt; run `rayexpand expand`")
    changes = [change for _, change, _ in found]
    token, channel = (_histogram([getattr(one, name) for one in changes]) for name in ("token_T", "channel_C"))
    return {"name": run.facts["name"], "run": str(run.folder), "run_digest": run.facts["run_digest"],
            "method": run.config.method.name, "space": space, "channels": len(changes[0].channel_C),
            "tokens": len(changes[0].token_T), "equal": int(plain), "token": token, "channel": channel,
            "samples": [{"sample_id": name, "token_spread": one.spreads[0], "channel_spread": one.spreads[1]}
                        for name, one, _ in found]}


def _histogram(values: Sequence[np.ndarray]) -> dict[str, list[float]]:
    counts, edges = np.histogram(np.concatenate(values), BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _changes(run: runs.Run, expander: Expander, images: int) -> Iterator[tuple[str, LatentChange, bool]]:
    """(sample id, change, whether its pixels are those of the run) of the first calls of some shards."""
    kept: list[Receipt] = [one for one in run.store.receipts() if one.kept and not one.generation]
    step = max(1, len(kept) // SHARDS)
    left = images
    for number, receipt in enumerate(kept[::step][:SHARDS]):
        share = -(-left // (min(SHARDS, len(kept[::step])) - number))  # of what is left, so that all shards have some
        for one in _of_shard(run, expander, receipt, share):
            left -= 1
            yield one


def _of_shard(run: runs.Run, expander: Expander, receipt: Receipt, images: int
              ) -> Iterator[tuple[str, LatentChange, bool]]:
    pixels = {row["sample_id"]: row for row in run.store.data(receipt, ["sample_id", "attempt", "image"]).to_pylist()}
    for batch in expander.batches(receipt.shard_id):
        tools = expander.loaded()
        wanted = [i for i, draw in enumerate(batch.draws) if not batch.filler[i] and draw.sample_id in pixels
                  and pixels[draw.sample_id]["attempt"] == draw.attempt][:images]
        if wanted:
            for i, change, image in _of_batch(run, batch, tools, wanted):
                name = batch.draws[i].sample_id
                committed, _ = decode(pixels[name]["image"]["bytes"])
                images -= 1
                yield name, change, np.array_equal(committed, image)
        if images <= 0:
            return


def _of_batch(run: runs.Run, batch: Batch, tools: Tools, wanted: Sequence[int]
              ) -> Iterator[tuple[int, LatentChange, np.ndarray]]:
    import torch

    listener = DecoderListener(tools.prior)
    made = run.config.method.expand(batch, replace(tools, prior=listener)).images
    with torch.no_grad():
        x_BCHW = sampling.to_tensor([batch.images[i] for i in wanted])
        seed_BC = tools.prior.encode(x_BCHW, None).float().cpu().numpy()
    for i, z_C in zip(wanted, seed_BC, strict=True):
        image = None if (one := made[i]) is None else to_uint8(one)
        if image is not None and (new_C := listener.latent_of(image)) is not None:
            yield i, profiles(new_C - z_C), image


class DecoderListener:
    """A generator that remembers which latent each of its decoded images came from."""

    def __init__(self, prior: Any) -> None:
        self._prior = prior
        self._latents: dict[bytes, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prior, name)

    def decode(self, z: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        x_BCHW = self._prior.decode(z, *args, **options)
        images, _ = sampling.to_images(x_BCHW)
        latents = z.detach().float().cpu().numpy()
        self._latents |= {image.tobytes(): z_C for image, z_C in zip(images, latents, strict=True) if image is not None}
        return x_BCHW

    def latent_of(self, image: np.ndarray) -> np.ndarray | None:
        """The latent whose decoded uint8 image this is."""
        return self._latents.get(image.tobytes())
