"""What a run will cost, before it starts: images, shards, bytes, hours, money. No model is loaded.

Hours follow from the throughput that runs.amounts knows: an interval or unknown where that is. When a fleet that loses
nodes finishes, and what it is paid for, is simulated (runs.fleet_hours) with what `estimate` says of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import SeedDataError, UsageError, three_digits
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import SEED_INDEX, ClassTable, Draw, Seed, SeedIndex
from rayexpand.data import seeds as seed_io
from rayexpand.data.pixels import header_size
from rayexpand.models.prior import present
from rayexpand.runs.allocation import dealt_facts, dealt_words
from rayexpand.runs.amounts import ImageSide, Measured, human_bytes, image_side, unit_of, work_of
from rayexpand.runs.cut_prompts import CutPrompts, cut_prompts
from rayexpand.runs.fleet_hours import GPU, Hours, fleet_of, hours_of, price_of, spread
from rayexpand.runs.plan import MAX_SHARDS, make_plan, planned_copies

if TYPE_CHECKING:
    from rayexpand.runs.config import EstimateConfig, RunConfig

SIZES = (1 / 16, 1 / 4, 1, 4)  # shares of sampler.shard_images that are tried, to say which finishes soonest


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected totals; None where something needed is unknown. `notes` says per field what was assumed."""

    seeds: int
    images: int
    shards: int
    bytes: int | None
    images_per_second: float | None  # of one GPU, or of one CPU process: see `unit`
    gpu_hours: float | None  # that end in committed images
    expected_lost_hours: float | None  # GPU hours of work that is done again after a loss
    waiting_hours: float | None  # GPU hours that are paid without work: boot, loading, the end
    wall_hours: float | None
    wall_hours_95: float | None  # 95 % of simulated runs end before
    cost_usd: float | None
    petaflop: float | None  # counted arithmetic; None where the networks of the generator are not known
    process_bytes: int | None  # of images in the memory of one sampler process, decoded and encoded
    notes: dict[str, str]
    cut_prompts: CutPrompts | None = None  # None where no prompt is read, or the generator is not here
    dataset: dict[str, Any] | None = None  # see data.seeds.survey; None where it cannot be listed
    unit: str = GPU  # what all hours are of: a GPU, or a CPU process where no GPU works
    best_shard_images: int | None = None  # of the sizes that are tried, where a throughput is known
    interval: tuple[Hours, Hours] | None = None  # slow and fast, where nothing was measured: see `notes`

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; hours that never end are null, as unknown ones are."""
        return _without_infinity(asdict(self))

    def table(self) -> list[tuple[str, str, str]]:
        """(label, value, note) lines for people."""
        def shown(field: str, words: Callable[[float], str], unit: str) -> str:
            values = [getattr(one, field) for one in self.interval or (self,)]
            if None in values:
                return "unknown"
            ends = list(dict.fromkeys(words(one) for one in sorted(values) if one < math.inf))
            return " or ".join([*([f"{' to '.join(ends)} {unit}"] if ends else []),
                                *(["never ends"] if math.inf in values else [])])

        def hours(field: str) -> str:
            return shown(field, three_digits if self.interval else "{:,.2f}".format, "h")

        lines = [("images", f"{self.images:,}", "images"), ("shards", f"{self.shards:,}", "shards"),
                 ("output", human_bytes(self.bytes), "bytes"),
                 ("one process", human_bytes(self.process_bytes), "process_bytes"),
                 ("throughput", shown("images_per_second", three_digits, f"per s and {self.unit}"),
                  "images_per_second"),
                 (f"{self.unit} time", hours("gpu_hours"), "gpu_hours"),
                 ("lost to preemption", hours("expected_lost_hours"), "expected_lost_hours"),
                 ("boot, loading, end", hours("waiting_hours"), "waiting_hours"),
                 ("wall time", hours("wall_hours"), "wall_hours"),
                 ("95 % end within", hours("wall_hours_95"), "wall_hours_95"),
                 ("cost", shown("cost_usd", three_digits if self.interval else "{:,.2f}".format, "USD"), "cost_usd")]
        if "petaflop" in self.notes:
            lines.append(("arithmetic", "unknown" if self.petaflop is None else f"{self.petaflop:,.0f} PFLOP",
                          "petaflop"))
        if self.cut_prompts is not None and self.cut_prompts.cut:
            lines.append(("prompts cut", f"{self.cut_prompts.cut:,} of {self.cut_prompts.rows:,}", "cut_prompts"))
        return [(label, value, self.notes.get(field, "")) for label, value, field in lines]


def estimate_config(config: RunConfig, measured: Measured | None = None) -> Estimate:
    """Expected totals of a configuration. Lists the seeds and opens at most 16 of them.

    Where the seeds cannot be listed, estimate.seeds stands in for them, with estimate.classes of about equal size;
    without it, or where the number of samples depends on classes that are not told, the SeedDataError of the listing is
    raised.
    """
    rng, few_seeds, plan, found, dataset = PlanRng(config.seed, config.method.name), _Few(None, 0), None, None, None
    try:
        index, dataset = seed_io.surveyed(config.data)
        with contextlib.suppress(UsageError):  # preflight says what is wrong
            plan = make_plan(index, config)
            found = cut_prompts(plan, config, present(config.prior.weights))
        few_seeds = _few(config, index)
    except SeedDataError as unlisted:
        try:
            few = [int(config.method.copies(stand_in(100, classes), rng).sum()) for classes in (1, 2)]
        except UsageError:  # a plan that only the real classes make possible
            raise unlisted from None
        by_class = config.estimate.classes is None and abs(few[0] - few[1]) > 2
        if config.estimate.seeds is None or by_class:
            raise
        index = stand_in(config.estimate.seeds, config.estimate.classes or 1)
    copies = planned_copies(index, config)[0] if plan is None else plan.copies
    planned = int(copies.sum(dtype=np.int64))
    made = estimate(config, seeds=len(index), planned=planned, measured=measured,
                    side=few_seeds.side if image_side(config)[0] is None else None, seed_bytes=few_seeds.bytes,
                    draws=first_draws(config, index, planned))
    notes = {**made.notes, **({"cut_prompts": found.words} if found is not None else {})}
    if config.allocate is not None:
        notes["images"] += f"; dealt {dealt_words(dealt_facts(config.allocate, index, copies))}"
    return replace(made, cut_prompts=found, dataset=dataset, notes=notes)


def first_draws(config: RunConfig, index: SeedIndex, planned: int) -> list[Draw]:
    """What the first rows of a run of `planned` samples are drawn as."""
    first = index.table.slice(0, 1).to_pylist()[0]
    return [config.method.draw(first["seed_id"], first["label"], copy, copy, index.classes,
                               RowRng(config.seed, config.method.name, first["seed_id"], copy))
            for copy in range(min(8, max(planned, 1)))]


def estimate(config: RunConfig, *, seeds: int, planned: int, measured: Measured | None = None,
             side: int | None = None, draws: Sequence[Draw] = (), seed_bytes: float = 0) -> Estimate:
    """Expected totals of a run of `planned` samples.

    `measured` is an earlier run of the same job (see `measure`); fields of config.estimate win over it. `side` is the
    image side in pixels where the caller knows it better than the configuration, `draws` are those of a few rows,
    without which no arithmetic is counted, `seed_bytes` the mean size of an encoded seed, which only sharpens the
    answer.
    """
    made = work_of(config, seeds=seeds, planned=planned, measured=measured, side=side, draws=draws)
    notes, unit, shards = made.notes, unit_of(config), made.shards
    ends = [_hours(config, planned, max(shards, 1), rate) for rate in made.rates]
    _say_hours(config, ends, max(shards, 1), notes)
    best = _say_best_size(config, planned, ends, notes)
    held = _process_bytes(config, planned, made.bytes, made.image, seed_bytes * seeds / max(shards, 1), notes)
    known = asdict(ends[0]) if len(ends) == 1 else asdict(Hours())
    return Estimate(seeds=seeds, images=planned, shards=shards, bytes=made.bytes, petaflop=made.petaflop,
                    process_bytes=held, notes=notes, unit=unit, best_shard_images=best,
                    interval=(ends[0], ends[1]) if len(ends) == 2 else None, **known)


def stand_in(n_seeds: int, n_classes: int) -> SeedIndex:
    """An index of seeds that are not on this machine."""
    labels = np.arange(n_seeds, dtype=np.int32) % n_classes
    columns = {name: [""] * n_seeds if name in ("member", "fault") else labels for name in SEED_INDEX.names}
    columns["seed_id"] = [str(i) for i in range(n_seeds)]
    words, counts = [str(i) for i in range(n_classes)], np.bincount(labels, minlength=n_classes).tolist()
    return SeedIndex(pa.table(columns, schema=SEED_INDEX), ClassTable.of(words, words, counts, words, words))


class _Few(NamedTuple):
    """What a few seeds, spread over the dataset, say of all: side of a square with their mean area, pixels, and the
    mean bytes of their files."""

    side: int | None
    bytes: float


def _few(config: RunConfig, index: SeedIndex) -> _Few:
    rows = np.unique(np.linspace(0, len(index) - 1, 16).astype(int)).tolist()
    read = [seed.image for seed in seed_io.SeedReader(index, config.data).read(rows) if isinstance(seed, Seed)]
    areas = [area for image in read if 0 < (area := math.prod(header_size(image))) <= config.data.max_pixels]
    return _Few(round(math.sqrt(sum(areas) / len(areas))) if areas else None, sum(map(len, read)) / max(len(read), 1))


def _process_bytes(config: RunConfig, planned: int, size: int | None, image: ImageSide, seed_bytes: float,
                   notes: dict[str, str]) -> int | None:
    """`size`: bytes of all samples; `seed_bytes`: of the encoded seeds of a shard. See runs.shard_images."""
    pixels = image.side
    if pixels is None or size is None:
        notes["process_bytes"] = "needs the size of the images"
        return None
    row, rows = 3 * pixels**2, min(planned, config.sampler.shard_images)
    call = row * (config.sampler.batch if config.needs - {"captions"} else 1)  # the least that is held at once
    decoded = min(max(config.runtime.image_bytes, 2 * call), row * (3 * config.sampler.batch + rows))
    encoded = round(2 * size * rows / max(planned, 1) + seed_bytes)  # the samples, and the file made of them
    notes["process_bytes"] = (f"beside its models: at most {human_bytes(decoded)} of decoded images "
                              f"(runtime.image_bytes) and {human_bytes(encoded)} of encoded ones, those of a shard "
                              "(sampler.shard_images)")
    return decoded + encoded


def _hours(config: RunConfig, planned: int, shards: int, rate: float) -> Hours:
    """Of a run at a throughput."""
    return replace(hours_of(config.estimate, unit_of(config), spread(planned / rate, shards)), images_per_second=rate)


def _best_size(config: RunConfig, planned: int, rate: float, now: float) -> tuple[int, float]:
    """(images in a shard, wall hours) of the shard size that ends soonest on average, of those that are tried; `now`:
    wall hours with that of the configuration."""
    sizes = {max(config.sampler.batch, round(config.sampler.shard_images * share)) for share in SIZES}
    ends = {size: now if size == config.sampler.shard_images else (
        _hours(config, planned, shards, rate).wall_hours or 0.0)
        for size in sizes if (shards := -(-planned // size)) <= MAX_SHARDS}
    return min(ends.items(), key=lambda one: (one[1], -one[0])) if ends else (config.sampler.shard_images, math.inf)


def _say_hours(config: RunConfig, ends: Sequence[Hours], shards: int, notes: dict[str, str]) -> None:
    """What the hours were made with."""
    settings, unit = config.estimate, unit_of(config)
    notes["cost_usd"] = price_note(settings, unit)
    if not ends:
        return
    units = unit if settings.gpus == 1 else f"{unit}s" if unit == GPU else f"{unit}es"
    fleet, per_node = fleet_of(settings, unit), f", {settings.gpus_per_node} on a node" * (settings.gpus_per_node > 1)
    notes["wall_hours"] = f"simulated, mean of runs with {settings.gpus:,} {units} (estimate.gpus){per_node}"
    notes["wall_hours_95"] = "of simulated runs" if fleet.loss_rate else "nothing is lost, so all are alike"
    minutes = [f"{(one.gpu_hours or 0) / shards * 60:,.1f}" for one in reversed(ends)]
    notes["expected_lost_hours"] = (f"{fleet.loss_rate:g} losses per {unit} hour (estimate.preemptions_per_gpu_hour), "
                                    f"each of what is done of a shard of {' to '.join(minutes)} min")
    notes["waiting_hours"] = (f"{fleet.node_start_s:g} s from asking for a node to its start, {fleet.load_s:g} s to "
                              "load the models (estimate.node_start_s, load_s: assumed unless given), and the wait "
                              "for the last shards")
    if any(math.isinf(one.wall_hours or 0) for one in ends):
        notes["expected_lost_hours"] += "; lost faster than made, choose a smaller sampler.shard_images"


def price_note(asked: EstimateConfig, unit: str) -> str:
    """What a cost is made of, or what it needs."""
    if (price := price_of(asked, unit)) is None:
        return "set estimate.gpu_hour_usd" if unit == GPU else "set estimate.cpu_hour_usd"
    head = f", and {asked.head_hour_usd:g} an hour for the head" if asked.head_hour_usd else ""
    return f"{price:g} USD per {unit} hour that is paid: work, lost and waiting{head}; no storage, no network"


def _say_best_size(config: RunConfig, planned: int, ends: Sequence[Hours], notes: dict[str, str]) -> int | None:
    """The shard size that ends soonest of those that are tried; sampler.shard_images unless that is sooner by more than
    a tenth, which is said."""
    if not ends:
        return None
    rate, now = ends[0].images_per_second or 1, ends[0].wall_hours or 0
    size, wall = _best_size(config, planned, rate, now)
    if wall < 0.9 * now:
        notes["shards"] += (f"; with sampler.shard_images={size:,} it would end after {three_digits(wall)} h instead "
                            f"of {three_digits(now)} h")
        return size
    return config.sampler.shard_images


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_infinity(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinity(one) for one in value]
    return None if value == math.inf else value
