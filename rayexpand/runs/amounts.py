"""What a run makes, before it starts: shards, bytes, arithmetic and throughput. No model is loaded.

Nothing is invented: a throughput is given, or measured by `bench` or by an earlier run. Without one it is an interval:
the counted arithmetic of the run (runs.work) over a range of shares of a GPU's peak, both named. It is unknown where
the arithmetic is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rayexpand.contract.schema import Draw, Receipt
from rayexpand.models.cost import Cost
from rayexpand.models.folders import EMBEDDED
from rayexpand.runs.config import MODELS
from rayexpand.runs.fleet_hours import GPU, PROCESS
from rayexpand.runs.plan import MAX_SHARDS
from rayexpand.runs.status import shard_seconds
from rayexpand.runs.work import cost_of_run, image_work, peak_tflops

if TYPE_CHECKING:
    from rayexpand.runs.config import RunConfig

# Bytes of one row in its Parquet file = ROW_BYTES + bytes per pixel * pixels. Measured on whole files of 1,000 rows:
# png 2.3 (593 bytes for digits of 16 px, 726 with noise of 2 grey levels, 2,324 for CIFAR-10 of 32 px); jpeg q95
# 4:4:4 0.65 (713 for CIFAR-10, whose equal jpeg headers Parquet folds away; 41,091 for 256 px crops of the two
# photographs that come with scikit-learn). For 512 px that is an assumption: those two gave 0.42 and 0.60 enlarged.
BYTES_PER_PIXEL = {"png": 2.3, "jpeg": 0.65}
ROW_BYTES = 40  # provenance columns after compression, mostly the sample's hash
JPEG_QUALITY = 95
DIGITS_SIDE = 16  # pixels, the embedded prior
ASSUMED_SIDE = 512  # pixels, a prior whose own size is unknown before it is loaded


@dataclass(frozen=True, slots=True)
class Measured:
    """What an earlier run shows. `images_per_second` is that of one GPU (or one CPU process)."""

    images_per_second: float | None
    bytes_per_image: float | None
    source: str = "an earlier run"


class RunWork(NamedTuple):
    """What a run makes and the arithmetic of it, before any fleet; see Estimate. `rates`: images per second of one GPU
    or process, a slow and a fast one where they follow from the arithmetic, none where unknown."""

    shards: int
    bytes: int | None
    petaflop: float | None
    rates: list[float]
    image: ImageSide
    notes: dict[str, str]


def work_of(config: RunConfig, *, seeds: int, planned: int, measured: Measured | None = None, side: int | None = None,
            draws: Sequence[Draw] = ()) -> RunWork:
    """See `estimate`."""
    notes, cost = {"images": f"{seeds:,} seeds"}, cost_of_run(config)
    if config.accept is not None and config.accept.attempts > 1:
        notes["images"] += (f"; hours count one attempt for each, and up to {config.accept.attempts} are made "
                            "(accept.attempts)")
    shards = min(seeds, -(-planned // config.sampler.shard_images))
    notes["shards"] = f"of about {-(-planned // max(shards, 1)):,} images each, a seed's copies kept together"
    if shards > MAX_SHARDS:
        notes["shards"] += (f"; a run of more than {MAX_SHARDS:,} shards is refused, so set sampler.shard_images to at "
                            f"least {-(-planned // MAX_SHARDS):,}")
    image = ImageSide(*image_side(config, side, cost))
    size = _bytes(config, planned, measured, image, notes)
    work = _petaflop(config, planned, seeds, image, cost, draws, notes)
    return RunWork(shards, size, work, _rates(config, planned, measured, work, notes), image, notes)


def measure(receipts: Sequence[Receipt], data_bytes: int) -> Measured:
    """Throughput of one process (rows over shard seconds, model loading and refused rows included, retries not: they
    hold few rows, in calls that are as large) and bytes per kept image of an earlier run, `data_bytes` being the size
    of its data files."""
    first = [r for r in receipts if not r.generation]
    seconds = sum(map(shard_seconds, first))
    rows, kept = sum(r.decided for r in first), sum(r.kept for r in receipts)
    return Measured(rows / seconds if rows and seconds else None, data_bytes / kept if kept else None)


def human_bytes(count: int | None) -> str:
    """12_300_000 -> '12.3 MB' (powers of ten)."""
    if count is None:
        return "unknown"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} bytes"


class ImageSide(NamedTuple):
    """Side in pixels, or None, and where it comes from."""

    side: int | None
    source: str


def unit_of(config: RunConfig) -> str:
    """What the work runs on, as far as it is known before it starts: the embedded prior is made for CPUs."""
    prior = config.prior
    no_gpu = (not config.needs & MODELS or prior.device == "cpu" or config.cluster.gpus_per_actor == 0
              or (prior.weights in EMBEDDED and prior.device == "auto"))
    return PROCESS if no_gpu else GPU


def image_side(config: RunConfig, side: int | None = None, cost: Cost | None = None) -> tuple[int | None, str]:
    """(side in pixels or None, where it comes from); `cost`: that of the generator, where it is known."""
    if side is not None:
        return side, "mean of a few seeds"
    if config.image.size is not None:
        return config.image.size, "image.size"
    if "prior" not in config.needs:
        return (DIGITS_SIDE, "the built-in digits") if config.data.source == "digits" else (None, "")
    if config.prior.weights in EMBEDDED:
        return DIGITS_SIDE, "the embedded prior"
    if cost is not None and cost.side is not None:
        return cost.side, f"that of the generator, {cost.known}"
    return ASSUMED_SIDE, "assumed, set image.size"


def _bytes(config: RunConfig, planned: int, measured: Measured | None, image: ImageSide,
           notes: dict[str, str]) -> int | None:
    if config.estimate.bytes_per_image is not None:
        notes["bytes"] = "given by estimate.bytes_per_image"
        return round(planned * (config.estimate.bytes_per_image + ROW_BYTES))
    if measured is not None and measured.bytes_per_image is not None:
        notes["bytes"] = f"bytes per image measured by {measured.source}"
        return round(planned * measured.bytes_per_image)
    pixels, source = image
    if pixels is None:
        notes["bytes"] = "the images keep the size they have; set image.size or estimate.bytes_per_image"
        return None
    codec = config.codec.format
    codec = ("png" if pixels <= 64 else "jpeg") if codec == "auto" else codec
    notes["bytes"] = f"{codec}, {pixels} px ({source}), {BYTES_PER_PIXEL[codec]} bytes per pixel, if all are kept"
    if codec == "jpeg" and config.codec.quality != JPEG_QUALITY:
        notes["bytes"] += f"; that constant is of quality {JPEG_QUALITY}"
    return round(planned * (BYTES_PER_PIXEL[codec] * pixels**2 + ROW_BYTES))


def _petaflop(config: RunConfig, planned: int, seeds: int, image: ImageSide, cost: Cost | None, draws: Sequence[Draw],
              notes: dict[str, str]) -> float | None:
    if not draws or "prior" not in config.needs or config.prior.weights in EMBEDDED:
        return None
    if cost is None or image.side is None:
        notes["petaflop"] = "its networks are none of those known; `rayexpand bench` counts them on this machine"
        return None
    found = image_work(config, cost, image.side, planned / max(seeds, 1), draws)
    notes["petaflop"] = found.words
    return planned * found.tflop / 1000


def _rates(config: RunConfig, planned: int, measured: Measured | None, petaflop: float | None,
           notes: dict[str, str]) -> list[float]:
    """Images per second of one GPU or process: one where it is given or measured, a slow and a fast one where it
    follows from the arithmetic, none where it is unknown."""
    if config.estimate.images_per_second is not None:
        notes["images_per_second"] = notes["gpu_hours"] = "given by estimate.images_per_second"
        return [config.estimate.images_per_second]
    if measured is not None and measured.images_per_second is not None:
        notes["images_per_second"] = notes["gpu_hours"] = f"measured by {measured.source}"
        return [measured.images_per_second]
    remedy = "measure it by `rayexpand bench` with this file, or run with --set estimate.images_per_second=..."
    if petaflop is None or unit_of(config) != GPU:
        notes["images_per_second"] = remedy
        notes["gpu_hours"] = notes["wall_hours"] = "needs a throughput"
        return []
    peak, of = peak_tflops(config)
    shares = config.estimate.peak_share
    notes["images_per_second"] = f"not measured, see below; {remedy}"
    notes["gpu_hours"] = (f"the arithmetic below at {' to '.join(f'{100 * one:g}' for one in sorted({*shares}))} % "
                          f"(estimate.peak_share, an assumption) of {peak:g} TFLOP/s (estimate.peak_tflops: {of})")
    return [share * peak / (1000 * petaflop / planned) for share in shares]
