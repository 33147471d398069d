"""Expander: a plain callable that does all the work of one shard and knows nothing of Ray.

    seeds -> decode ahead -> method.expand on full planned shapes, judge -> encode behind -> commit -> Receipt

It owns failures. A row that cannot be made is refused and its slot becomes a filler, so batch-mates keep their slots
and their bytes; an exception is traced to its row by bisection at full shape; out of memory halves the shape (first
the pieces a guided method works in, then the call); a fault of the process or of the environment commits nothing
(blame.py and errors.py say which is which).

With a section `accept`, a row that is rejected is drawn again while attempts are left. Rows that wait for that make a
call as soon as they fill one, so calls are full until fewer rows are left than one holds.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import math
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from rayexpand.classifier.augment import is_blank
from rayexpand.contract import log_lines
from rayexpand.contract.errors import EnvironmentFault, Interrupted, RayexpandError, RowFault
from rayexpand.contract.protocols import Batch, Expansion, Method, Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import Draw, Reason, Receipt, Sample, Seed, Start, Status, sample_sha256
from rayexpand.data.pixels import decode, encode, header_size, prepare, resized, to_uint8
from rayexpand.data.seeds import SeedReader
from rayexpand.models.prior import inspect_prior
from rayexpand.runs.accept import SCORE, TRY, judge
from rayexpand.runs.blame import DEAD_UNEXPLAINED, DECODE, ENCODE, SHARD, Blame, ProcessFault, Row, Verdicts
from rayexpand.runs.config import RunConfig
from rayexpand.runs.plan import Call, Plan, Unit, at, pack
from rayexpand.runs.shard_images import Decoded, PhaseClock, ShardImages
from rayexpand.runs.store import Store
from rayexpand.runs.tools import load_tools, stack_fingerprint
from rayexpand.storage.files import failpoint

Slots = Sequence[Draw | None]

_DETAIL_CHARS = 500
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}
_GREY = 128


class Expander:
    """Expands shards of one run. Models are loaded at the first row that needs them and stay.

    `on_rows(n)` is called after every sampler call with the rows it decided; `load` gives the models,
    where they are not to be loaded anew.
    """

    def __init__(self, config: RunConfig, plan: Plan, store: Store, blame: Blame, *,
                 load: Callable[[], Tools] | None = None,
                 on_rows: Callable[[int], None] = lambda n: None) -> None:
        self.config, self.plan, self.store, self.blame, self.on_rows = config, plan, store, blame, on_rows
        # Rows of a call, and the method with its own pieces: smaller after an out-of-memory, until this process ends.
        self.batch, self.method = plan.batch, config.method
        self.tools: Tools | None = None
        self._load = load or partial(load_tools, config, plan.index.classes)
        self._calls_made = 0
        self._pool = ThreadPoolExecutor(config.runtime.io_threads, thread_name_prefix="io")
        self._reader = SeedReader(plan.index, config.data)

    def __call__(self, shard_id: int, generation: int = 0) -> Receipt:
        """Commits one shard and returns its receipt; the receipt of a shard that is committed already costs one read.

        Generation 1, 2, ... makes only the rows that failed in the generation before. Raises EnvironmentFault or
        ProcessFault with nothing committed.
        """
        if found := self.store.find(shard_id, generation):
            return found
        key = _key(shard_id, generation)
        verdicts = self.blame.verdicts(key)
        if verdicts.unexplained >= DEAD_UNEXPLAINED:
            raise EnvironmentFault(f"{verdicts.unexplained} processes died on shard {shard_id}, and no row can be told "
                                   "to be the cause: they were ended from outside, or while they loaded models, read "
                                   "seeds or committed. Look at the system's log (out of memory?), then run the same "
                                   "command again.")
        with self.blame.mark(key, SHARD, None), self.blame.supervised():
            receipt = self._expand(shard_id, generation, verdicts)
        self.blame.clear(key)
        return receipt

    def _expand(self, shard_id: int, generation: int, verdicts: Verdicts) -> Receipt:
        started = time.perf_counter()
        with log_lines.about(shard=shard_id):
            work = self._start(shard_id, generation, verdicts)
            wanted = self._wanted(work)
            if verdicts.careful:
                self._decode_one_by_one(work)
            self._run(work, wanted)
            samples = self._collect(work, wanted)
            for one in samples:
                if one.status is Status.FAILED and one.reason is not None:
                    log_lines.say("failed", sample=one.draw.sample_id, reason=one.reason.value, message=one.detail)
        receipt = Receipt(
            shard_id, generation, "", "", len(samples), **_counts(samples), shape=self.shape, run_digest="",
            attempt=self.blame.attempt, content_sha256="", stack=self.stack, host=socket.gethostname(),
            seconds={**work.clock.seconds, "total": time.perf_counter() - started})
        return self.store.commit(receipt, samples, self.plan.index.classes)

    def regenerate(self, sample_id: str) -> Sample:
        """Makes one sample again, alone among fillers (with its group where the method has groups)."""
        shard_id, generation = self.plan.find(sample_id), 0
        if committed := self.store.find(shard_id, 0):
            while sample_id in self._failed(committed) and (later := self.store.find(shard_id, generation + 1)):
                committed, generation = later, generation + 1
            self._adopt(committed.shape)
        work = self._start(shard_id, generation, self.blame.verdicts(_key(shard_id, generation)))
        self._run(work, {sample_id})
        (sample,) = self._collect(work, {sample_id})
        return sample

    def batches(self, shard_id: int) -> Iterator[Batch]:
        """What the sampler would get for a shard, decoded and ready; rows whose seed cannot be read are fillers."""
        work = self._start(shard_id, 0, self.blame.verdicts(_key(shard_id, 0)))
        for call in self._parts(work, self.plan.calls(shard_id)):
            work.images.ahead(call)
            yield self._batch(work, replace(call, slots=self._sound(work, call)[0]))

    def close(self) -> None:
        self._pool.shutdown()
        self.blame.close()

    # Work of one shard -------------------------------------------------------------------------------------------

    def _start(self, shard_id: int, generation: int, verdicts: Verdicts) -> _Work:
        clock = PhaseClock()
        units = self.plan.units(shard_id)
        with clock.phase("read"):
            used = {draw.seed_id for unit in units for draw in unit if draw.start == Start.IMAGE}
            found, listed = self._read(shard_id, used)
        for seed_id, row in _first_rows(units).items():
            if reason := verdicts.seeds.get(row):  # in place of the seed, or it would be decoded ahead
                found[seed_id] = RowFault(reason, "processes that decoded this seed alone ended")
        images = ShardImages(found, listed, self._decode, self._pool, self.config.runtime.image_bytes,
                             self._decoded_bytes, math.prod(self._filler_shape([])))
        return _Work(shard_id, generation, _key(shard_id, generation), units, images, clock, verdicts)

    def _decode_one_by_one(self, work: _Work) -> None:
        """Decodes each seed alone under a marker, so that a decoder's crash blames its seed."""
        decoded = ([draw for draw in unit if draw.start == Start.IMAGE] for unit in work.units)
        rows = {seed_id: (row, 0) for seed_id, row in _first_rows(decoded).items()}
        waiting = [(seed_id, row) for seed_id, row in rows.items() if row[0] not in work.verdicts.seeds]
        waiting.sort(key=lambda one: work.verdicts.turn(DECODE, one[1]))
        for others, (seed_id, row) in enumerate(waiting):
            with self.blame.mark(work.key, DECODE, row, others):
                work.images.try_alone(seed_id)
            self._made_alone(work, DECODE, row)

    def _made_alone(self, work: _Work, call: int, row: Row) -> None:
        if (call, row) in work.verdicts.suspects:
            self.blame.clear_suspect(work.key, call, row)

    def _read(self, shard_id: int, used: set[str]) -> tuple[dict[str, Seed | RowFault | None], dict[str, RowFault]]:
        """Seeds of a shard by id, None for a seed whose image no draw uses; and the faults known from the listing."""
        rows = self.plan.seeds_of(shard_id)
        part = at(self.plan.index.table, rows)
        found: dict[str, Seed | RowFault | None] = {
            seed_id: RowFault(fault, "seen when the dataset was listed") if fault else None
            for seed_id, fault in zip(part["seed_id"].to_pylist(), part["fault"].to_pylist(), strict=True)}
        wanted = [row for row, seed_id in zip(rows.tolist(), found, strict=True) if seed_id in used]
        ids = [seed_id for seed_id in found if seed_id in used]
        listed = {seed_id: fault for seed_id, fault in found.items() if isinstance(fault, RowFault)}
        return found | dict(zip(ids, self._reader.read(wanted), strict=True)), listed

    def _run(self, work: _Work, wanted: set[str]) -> None:
        """Decides every row in `wanted`, all in one shape: where memory runs out on the way, from the start again."""
        while True:
            try:
                return self._run_calls(work, wanted)
            except _Smaller:
                self.on_rows(-work.told)
                work.results, work.tries, work.waiting, work.told = {}, {}, {}, 0

    def _run_calls(self, work: _Work, wanted: set[str]) -> None:
        """The planned calls, and those of rows that are drawn again; a call that is not full comes when no other is
        left."""
        planned = [call.only(wanted) for call in pack(work.units, self.config.method, self.plan.batch)]
        number = len(planned)
        if self.config.accept is not None:
            work.waiting = {unit[0].sample_id: unit for call in planned if not call.is_full for unit in call.units}
            planned = [call for call in planned if call.is_full]
        todo = deque(self._parts(work, planned))
        while True:
            formed = pack(work.waiting.values(), self.config.method, self.plan.batch)
            formed = [call for call in formed if call.is_full] or ([] if todo else formed)
            for call in formed:
                for unit in call.units:
                    del work.waiting[unit[0].sample_id]
            todo.extendleft(reversed(self._parts(work, [replace(call, number=number + i)
                                                        for i, call in enumerate(formed)])))
            number += len(formed)
            if not todo:
                return
            call, following = todo.popleft(), todo[0] if todo else None
            work.images.ahead(call, None if work.verdicts.careful else following)
            self._run_call(work, call)
            self.on_rows(len(work.results) - work.told)
            work.told = len(work.results)

    def _parts(self, work: _Work, calls: Sequence[Call]) -> list[Call]:
        """The calls that have a row. Those of a method without tensors come in parts where their images are large:
        elsewhere pixels may depend on the shape of a call."""
        calls = [call for call in calls if any(call.slots)]
        if self.config.needs - {"captions"}:
            return calls
        return [part for call in calls for part in work.images.parts(call)]

    def _wanted(self, work: _Work) -> set[str]:
        """Sample ids this commit decides."""
        if work.generation == 0:
            return {draw.sample_id for unit in work.units for draw in unit}
        before = self.store.find(work.shard_id, work.generation - 1)
        if before is None:
            raise Interrupted(f"shard {work.shard_id} has no generation {work.generation - 1}; run `expand` first")
        return self._failed(before)

    def _failed(self, committed: Receipt) -> set[str]:
        refused = self.store.refused(committed).select(["sample_id", "status"])
        return {row["sample_id"] for row in refused.to_pylist() if row["status"] == Status.FAILED}

    def _run_call(self, work: _Work, call: Call) -> None:
        """Decides every row of a call, or has it wait for another."""
        slots, faulty = self._sound(work, call)
        for unit, fault in faulty:
            self._refuse(work, unit, fault)
        if call.number in work.verdicts.calls:
            self._one_by_one(work, replace(call, slots=slots))
        else:
            self._attempt(work, replace(call, slots=slots))

    def _one_by_one(self, work: _Work, call: Call) -> None:
        """Runs the units of a call alone, those at which processes died in the order that tells most."""
        waiting = [(draw, start) for start in range(0, len(call.slots), call.unit)
                   if (draw := next(filter(None, call.slots[start:start + call.unit]), None))]
        waiting.sort(key=lambda one: work.verdicts.turn(call.number, _row(one[0])))
        for others, (draw, start) in enumerate(waiting):
            suspect = work.verdicts.suspects.get((call.number, _row(draw)))
            if not others and suspect and suspect.first:  # nothing else is in this call to be made before
                work.last_draw, others = draw, 1
                with contextlib.suppress(_OutOfMemory):
                    self._try_fillers(work, call)
            alone = replace(call, slots=_keep(call.slots, range(start, start + call.unit)))
            self._attempt(work, alone, others)
            self._made_alone(work, call.number, _row(draw))

    def _refuse(self, work: _Work, unit: Slots, fault: RowFault) -> None:
        for draw in unit:
            if draw is not None:
                self._decided(work, draw, None, Reason(fault.reason), fault.detail[:_DETAIL_CHARS], {})

    def _decided(self, work: _Work, draw: Draw, *made: Any) -> None:
        work.results[draw.sample_id] = self._submit(work, draw, *made)

    def _submit(self, work: _Work, draw: Draw, image: np.ndarray | None, reason: Reason | None, detail: str,
                scores: dict[str, float]) -> Future[Sample]:
        size = work.images.size(draw.seed_id) if self.config.image.restore and draw.start == Start.IMAGE else None
        finish = partial(self._finish, draw, image, reason, detail, scores, work.images.note(draw.seed_id), size)
        future = work.images.encode(finish, 0 if image is None else image.nbytes)
        if work.verdicts.careful:
            with self.blame.mark(work.key, ENCODE, _row(draw), 1):  # at least the call of this row was made before
                concurrent.futures.wait([future])
        return future

    def _sound(self, work: _Work, call: Call) -> tuple[tuple[Draw | None, ...], list[tuple[Slots, RowFault]]]:
        """The slots with fillers for units that cannot be sampled, and those units with their faults."""
        slots = list(call.slots)
        faulty: list[tuple[Slots, RowFault]] = []
        for start in range(0, len(slots), call.unit):
            unit = call.slots[start:start + call.unit]
            if fault := self._known_fault(work, unit):
                faulty.append((unit, fault))
                slots[start:start + call.unit] = [None] * call.unit
        return tuple(slots), faulty

    def _known_fault(self, work: _Work, unit: Slots) -> RowFault | None:
        for draw in unit:
            if draw is None:
                continue
            if reason := work.verdicts.rows.get((draw.row, draw.attempt)):
                return RowFault(reason, "processes that worked on this row alone ended")
            if fault := work.images.fault(draw, work.clock):
                return fault
            if self.plan.lacks_caption(draw):
                return RowFault(Reason.MISSING, "no caption could be made of its seed")
        return None

    def _attempt(self, work: _Work, call: Call, alone: int | None = None) -> None:
        """Runs a call in pieces of the shape in force; halves the shape when memory runs out. `alone`: of its rows only
        one unit is left, and so many were made alone before it."""
        start = 0
        while start < len(call.slots):
            size = max(call.unit, self.batch // call.unit * call.unit)
            piece = list(call.slots[start:start + size])
            piece += [None] * (min(size, len(call.slots)) - len(piece))
            if any(piece):
                try:
                    self._decide(work, replace(call, slots=tuple(piece)), alone)
                except _OutOfMemory as error:
                    if not self._shrink(size, call.unit):
                        raise EnvironmentFault(
                            f"out of memory with a single unit of {call.unit} row(s): {error}. Use a smaller "
                            "image.size, prior.dtype: bfloat16, or a larger device.") from error
                    if work.results or work.tries:
                        raise _Smaller from error
                    continue
            start += size

    @property
    def shape(self) -> list[int]:
        """Rows of a call in force, then those of each of the method's own pieces, 0 for the whole call."""
        return [self.batch, *(getattr(self.method, name) or 0 for name in _pieces(self.method))]

    def _shrink(self, rows: int, unit: int) -> bool:
        """Halves what a call of `rows` rows holds at once: the method's pieces one after the other, then the call.
        False where nothing is left to halve."""
        for name in _pieces(self.method):
            if (held := min(getattr(self.method, name) or rows, rows)) > 1:
                self.method = self.method.model_copy(update={name: held // 2})
                return True
        if rows == unit:
            return False
        self.batch = rows // 2
        return True

    def _adopt(self, shape: Sequence[int]) -> None:
        """Takes over the shape another process ended with, because pixels may depend on it."""
        if shape != self.shape:
            pieces = {name: rows or None for name, rows in zip(_pieces(self.method), shape[1:], strict=False)}
            self.batch, self.method = shape[0], self.method.model_copy(update=pieces)

    def _decide(self, work: _Work, call: Call, alone: int | None) -> None:
        try:
            expansion = self._sample(work, call, alone)
        except _SamplerError as error:
            self._bisect(work, call, error)
        else:
            self._take(work, call, expansion)

    def _bisect(self, work: _Work, call: Call, error: _SamplerError) -> None:
        """Finds the rows that raise, at full shape. At most 2 log2(rows) + 1 extra calls for one bad row."""
        self._try_fillers(work, call)
        suspects = [[i for i in range(start, start + call.unit) if call.slots[i]]
                    for start in range(0, len(call.slots), call.unit)]
        self._search(work, call, [s for s in suspects if s], error)

    def _try_fillers(self, work: _Work, call: Call) -> None:
        """A call without any row. Raises EnvironmentFault where the sampler fails even then."""
        try:
            self._sample(work, replace(call, slots=(None,) * len(call.slots)))
        except _SamplerError as empty:
            raise EnvironmentFault(f"the sampler fails even on a call of fillers: {empty}. Not the data is at fault "
                                   "but the model, the device or the method; repair it and run the same command "
                                   "again.") from empty.__cause__

    def _search(self, work: _Work, call: Call, suspects: list[list[int]], error: _SamplerError) -> None:
        if len(suspects) == 1:
            self._refuse(work, [call.slots[i] for i in suspects[0]], RowFault(Reason.SAMPLER_ERROR, str(error)))
            return
        middle = len(suspects) // 2
        for half in (suspects[:middle], suspects[middle:]):
            part = replace(call, slots=_keep(call.slots, [i for unit in half for i in unit]))
            try:
                self._take(work, part, self._sample(work, part))
            except _SamplerError as again:
                self._search(work, part, half, again)

    def _sample(self, work: _Work, call: Call, alone: int | None = None) -> Expansion:
        """One sampler call, marked, under a deadline. Sorts its exceptions by who is to blame."""
        batch = self._batch(work, call)
        row = None if alone is None else next((_row(draw) for draw in call.slots if draw), None)
        limits = self.config.limits
        with work.clock.phase("load"):
            tools = self.loaded()
        deadline = limits.deadline_s if self._calls_made else limits.first_deadline_s
        with self.blame.watch(work.key, call.number, row, deadline, alone or 0), work.clock.phase("sample"):
            failpoint("before_call", work.shard_id)
            try:
                expansion = self.method.expand(batch, tools)
                _check(expansion, batch)
                if self.config.accept is not None:
                    expansion = judge(self.config.accept, batch, expansion, tools)
            except Exception as error:
                fault = _sorted(error)
                for one in (error, error.__cause__, error.__context__):
                    traceback.clear_frames(one.__traceback__ if one else None)  # frees the tensors of the failed call
                raise fault from error
            self._calls_made += 1
        failpoint("after_call", work.shard_id)
        return expansion

    def _batch(self, work: _Work, call: Call) -> Batch:
        pattern = next((draw for draw in call.slots if draw), None) or work.last_draw
        assert pattern is not None
        work.last_draw = pattern
        pixels = [work.images.pixels(draw.seed_id) if draw and draw.start == Start.IMAGE else None
                  for draw in call.slots]
        grey = np.full(self._filler_shape(pixels), _GREY, np.uint8)
        blank = np.full(self._filler_shape([]), _GREY, np.uint8)  # never of a batch-mate's size
        # A filler must be sampled like its batch-mates (strength, steps), and must not carry anything of a refused row.
        fillers = [replace(pattern, sample_id=f"filler/{i}", seed_id="filler", copy=i, source_label=0, target_label=0,
                           prompt="", negative="", attempt=0, row=-1, group=i // call.unit)
                   for i in range(len(call.slots))]
        draws = tuple(draw or fillers[i] for i, draw in enumerate(call.slots))
        images = tuple(image if image is not None else blank if draw else grey
                       for image, draw in zip(pixels, call.slots, strict=True))
        rngs = tuple(self.plan.rng(draw) if real else RowRng(0, "filler", "filler", i)
                     for i, (draw, real) in enumerate(zip(draws, call.slots, strict=True)))
        return Batch(draws, images, rngs, tuple(draw is None for draw in call.slots))

    def _filler_shape(self, pixels: list[np.ndarray | None]) -> tuple[int, ...]:
        if self.image_size:
            return (self.image_size, self.image_size, 3)
        return min((image.shape for image in pixels if image is not None), key=math.prod, default=(64, 64, 3))

    def _take(self, work: _Work, call: Call, expansion: Expansion) -> None:
        reasons = expansion.reasons or [None] * len(call.slots)
        details = expansion.details or [""] * len(call.slots)
        for i, draw in enumerate(call.slots):
            if draw is not None:
                scores = {name: float(values[i]) for name, values in expansion.scores.items()}
                self._settle(work, draw, expansion.images[i], reasons[i], details[i], scores)

    def _settle(self, work: _Work, draw: Draw, image: np.ndarray | None, reason: Reason | None, detail: str,
                scores: dict[str, float]) -> None:
        """Decides a row, unless it is rejected while attempts are left: then it waits for another call."""
        accept = self.config.accept
        if accept is None or reason is None or reason.status is not Status.REJECTED:
            self._decided(work, draw, image, reason, detail, scores)
            return
        tries = work.tries.setdefault(draw.sample_id, _Tries())
        tries.scores[f"{TRY}{draw.attempt}"] = score = scores[SCORE]
        able = reason is Reason.BELOW_THRESHOLD and image is not None and not is_blank(image)
        if accept.exhausted == "best" and able and score > tries.best_score:
            tries.best_score, tries.best = score, self._submit(work, draw, image, None, "", scores)
        if draw.attempt + 1 < accept.attempts:
            work.waiting[draw.sample_id] = (self.plan.redraw(draw),)
        elif tries.best is not None:
            work.results[draw.sample_id] = tries.best
        elif accept.attempts == 1:
            self._decided(work, draw, image, reason, detail, scores)
        else:
            detail = f"{accept.attempts} attempts; the last: {detail or reason.value}"
            self._decided(work, draw, image, Reason.EXHAUSTED, detail, scores)

    def _finish(self, draw: Draw, image: np.ndarray | None, reason: Reason | None, detail: str,
                scores: dict[str, float], note: str, size: tuple[int, int] | None) -> Sample:
        """Checks, encodes and hashes one image, brought to `size` (height, width); runs in the pool."""
        method = self.config.method.name
        image = None if image is None else to_uint8(image)
        if image is None:
            reason = reason or Reason.NAN_LATENT
            return Sample(draw, method, reason.status, None, "", reason, detail, note, scores)
        if reason is None and is_blank(image):
            reason, detail = Reason.CONSTANT_IMAGE, f"every pixel of the sample is {image[0, 0].tolist()}"
        if size is not None:
            image = resized(image, *size)
        content, extension, decoded = encode(image, self.config.codec.format, self.config.codec.quality)
        status = reason.status if reason else Status.KEPT
        return Sample(draw, method, status, content, f"{draw.sample_id}.{extension}", reason, detail, note, scores,
                      sample_sha256(decoded, draw))

    def _collect(self, work: _Work, wanted: set[str]) -> list[Sample]:
        with work.clock.phase("encode"):
            samples = [self._with_tries(work, work.results[sample_id].result()) for sample_id in wanted]
        return sorted(samples, key=lambda sample: sample.draw.row)

    def _with_tries(self, work: _Work, sample: Sample) -> Sample:
        """With the scores of its other attempts, which were refused."""
        if (tries := work.tries.get(sample.draw.sample_id)) is None:
            return sample
        others = {name: score for name, score in tries.scores.items()
                  if name != f"{TRY}{sample.draw.attempt}" and math.isfinite(score)}
        return replace(sample, scores={**sample.scores, **others})

    # Models and images -------------------------------------------------------------------------------------------

    def loaded(self) -> Tools:
        """The models of the method, loaded at the first call. Raises EnvironmentFault when they cannot be."""
        if self.tools is None:
            try:
                self.tools = self._load()
            except RayexpandError:
                raise
            except Exception as error:
                raise EnvironmentFault(f"the models cannot be loaded: {type(error).__name__}: {error}. Free memory or "
                                       "repair the model folder, then run the same command again.") from error
        return self.tools

    @cached_property
    def image_size(self) -> int | None:
        """Side of the square the sampler sees; None where every image keeps its own size."""
        if "prior" not in self.config.needs:
            return self.config.image.size
        return self.config.image.size or inspect_prior(self.config.prior).image_size

    def _decode(self, seed: Seed) -> Decoded:
        data = self.config.data
        pixels, note = decode(seed.image, min_side=data.min_side, max_pixels=data.max_pixels)
        rng = RowRng(self.config.seed, self.config.method.name, seed.seed_id, 0)
        cut = prepare(pixels, self.image_size, self.config.image.fit, rng, self.config.image.filter)
        return Decoded(cut, note, pixels.shape[:2])

    def _decoded_bytes(self, seed: Seed) -> int:
        """Of the image a sampler gets; by its header, where it keeps its size."""
        if self.image_size and self.config.image.fit != "none":
            return self.image_size**2 * 3
        pixels = math.prod(header_size(seed.image))
        return pixels * 3 if pixels <= self.config.data.max_pixels else 0  # it will be refused

    @cached_property
    def stack(self) -> dict[str, str]:
        """What a sample's pixels may depend on besides plan and models."""
        return stack_fingerprint(self.config)


@dataclass(slots=True)
class _Work:
    """State of one shard while it runs."""

    shard_id: int
    generation: int
    key: str
    units: list[Unit]
    images: ShardImages
    clock: PhaseClock
    verdicts: Verdicts
    results: dict[str, Future[Sample]] = field(default_factory=dict)
    tries: dict[str, _Tries] = field(default_factory=dict)  # of rows that were rejected at least once
    waiting: dict[str, Unit] = field(default_factory=dict)  # units that wait for a call, by their first sample
    last_draw: Draw | None = None
    told: int = 0  # decided rows that on_rows has heard of


@dataclass(slots=True)
class _Tries:
    """The refused attempts of a row."""

    scores: dict[str, float] = field(default_factory=dict)
    best: Future[Sample] | None = None  # encoded, so that little is held
    best_score: float = -math.inf


class _OutOfMemory(RayexpandError):
    pass


class _Smaller(RayexpandError):
    """The shape has shrunk, and rows of this shard were decided in the larger one."""


class _SamplerError(RayexpandError):
    pass


def _first_rows(units: Iterable[Sequence[Draw]]) -> dict[str, int]:
    """The first row of each seed, which stands for the seed where a process died of it."""
    rows: dict[str, int] = {}
    for draw in (draw for unit in units for draw in unit):
        rows.setdefault(draw.seed_id, draw.row)
    return rows


def _row(draw: Draw) -> Row:
    return draw.row, draw.attempt


def _key(shard_id: int, generation: int) -> str:
    return f"s{shard_id:06d}g{generation}"


def _check(expansion: Expansion, batch: Batch) -> None:
    """The contract of a method, before its word is taken for a row."""
    assert len(expansion.images) == len(batch), "a method must return one image or None per slot"
    for image in expansion.images:
        assert image is None or (image.ndim == 3 and image.shape[2] == 3 and (
            image.dtype == np.uint8 or image.dtype.kind == "f")), "an image must be (H, W, 3), uint8 or float in [0, 1]"


def _sorted(error: Exception) -> Exception:
    """The exception of a sampler call as the class of who is to blame."""
    text = f"{type(error).__name__}: {error}"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return _OutOfMemory(text)
    if isinstance(error, Interrupted):
        return error
    if isinstance(error, MemoryError) or "CUDA error" in text:
        return ProcessFault(f"{text}. This process cannot go on; the same command continues in a new one.")
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        return EnvironmentFault(f"{text}. Repair it and run the same command again.")
    return _SamplerError(text)


def _pieces(method: Method) -> tuple[str, ...]:
    """Fields of a method that say how many rows it works on at once inside a call, in the order they are halved when
    memory runs out; None in one of them is the whole call."""
    return tuple(getattr(method, "PIECES", ()))


def _keep(slots: Sequence[Draw | None], kept: Sequence[int] | range) -> tuple[Draw | None, ...]:
    wanted = set(kept)
    return tuple(draw if i in wanted else None for i, draw in enumerate(slots))


def _counts(samples: Sequence[Sample]) -> dict[str, Any]:
    reasons: dict[str, int] = {}
    for sample in samples:
        if sample.reason:
            reasons[sample.reason.value] = reasons.get(sample.reason.value, 0) + 1
    by_status = {status: sum(s.status is status for s in samples) for status in Status}
    return {"kept": by_status[Status.KEPT], "rejected": by_status[Status.REJECTED],
            "failed": by_status[Status.FAILED], "reasons": reasons}


