"""One self-contained page about a run: counts, reasons, time, pictures, and what is needed to make it again.

The page has no script and loads nothing: pictures are data URIs, charts are styled tables. Everything that comes from
data (class names, prompts, details) is escaped by the template engine. It is written at any moment of a run.
"""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from PIL import Image

from rayexpand.contract.errors import three_digits
from rayexpand.contract.schema import (
    SEED_INDEX,
    ClassTable,
    Reason,
    Receipt,
    Seed,
    SeedIndex,
    Status,
    data_place,
    side_place,
)
from rayexpand.data import seeds
from rayexpand.data.pixels import decode
from rayexpand.evaluation.release import release_sheet
from rayexpand.methods import label_words_of
from rayexpand.reports.acceptance import acceptance
from rayexpand.reports.card import GPU_CAVEAT, PROMISE, RELEASE
from rayexpand.reports.copies import copies_section
from rayexpand.reports.figure import write_figures
from rayexpand.reports.kept import kept_figures
from rayexpand.reports.templates import COLOURS, render, settings_of
from rayexpand.runs.cut_prompts import words_of
from rayexpand.runs.status import (
    RunView,
    class_counts,
    duration,
    read_classes,
    read_plan_table,
    read_status,
    shard_seconds,
    view_run,
    write_page,
)
from rayexpand.runs.store import FOOTER
from rayexpand.storage.files import Files
from rayexpand.storage.tables import find_rows, parquet_facts, read_table
from rayexpand.studies.spreads import plus_minus

SHEET_CLASSES, SHEET_SAMPLES = 50, 8
SHEET_PICTURES = 200  # about so many in all: with many classes each has fewer samples
REFUSED_ROWS, REFUSED_PER_REASON = 12, 4
FILES_SEARCHED = 32  # data or side files opened for pictures, spread evenly over the run
MOST_FILES = 512  # opened at most for a class that is in none of these
ALL_CLASSES = 50  # up to here every class has its line
LOWEST_CLASSES = 25
SMALL_SIDE, LARGE_SIDE = 64, 256  # pixels: smaller pictures keep their pixels, larger ones are shrunk for the page
SERIES = 6  # colours of arms in turn
PHASES = ("load", "read", "prepare", "sample", "encode", "commit")


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of the page; `uri` is "" for a grey box. `title` says all that is known of it."""

    uri: str = ""
    width: int = 96  # CSS pixels
    title: str = ""
    caption: str = ""
    pixelated: bool = False


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One seed beside its samples."""

    name: str
    seed: Picture
    samples: tuple[Picture, ...]


def write_report(folder: str | Path, *, demo: Mapping[str, Any] | None = None, look: Any = None) -> Path | str:
    """Writes report.html into a run folder and returns its path or URL.

    `demo` adds a section at the top: {"arms": {name: {"accuracies": [...], "mean": x, "se": x}}, "controls": {name: x},
    "gain": x, "gain_se": x, "note": sentence}, with accuracies (one per training) as fractions; "control_arms" as arms
    take the place of controls of the same name, and "study" is the folder above, to whose page this one leads. `look`
    adds what guided.look found. Raises UsageError if there is no run, EnvironmentFault if the page cannot be written.
    """
    view = view_run(folder)
    classes = read_classes(view)
    kept = kept_figures(view)
    write_figures(view.files, kept.values())
    page = render("run.html.j2", _FILTERS,
        run=view.run, title=view.title, status=read_status(folder), totals=view.totals, demo=_demo(demo),
        phases=_phases(view.receipts),
        reasons=_reasons(view), selections=_selections(view), kept=kept, classes=_class_lines(view, classes),
        n_classes=len(classes),
        lowest=LOWEST_CLASSES if len(classes) > ALL_CLASSES else 0, sheet=contact_sheet(view, classes),
        guidance=_guidance(view), look=look,
        acceptance=acceptance(view, classes, read := spread(list(view.receipts), FILES_SEARCHED)),
        shards_read=(len(read), len(view.receipts)),
        refused=_refused_rows(view, classes), copies=copies_section(view, classes, seed_pictures, encoded_picture),
        release=release_sheet(view),
        cut_words=words_of(view.run["cut_prompts"]) if view.run.get("cut_prompts") else "",
        label_words=label_words_of(view.run["config"]["method"], len(classes)), config=_yaml(view.run["config"]),
        settings=settings_of(view.run["config"]), dataset=seeds.survey_lines(view.run.get("dataset", {})),
        stacks=_stacks(view),
        mixed=len(view.stacks) > 1, promise=PROMISE, release_words=RELEASE,
        gpu_caveat=GPU_CAVEAT, attempts=_attempts(view),
        commands=_commands(view, str(folder)), busy_seconds=sum(map(shard_seconds, view.receipts)),
        pictures=picture_pages(view.files),
        written=datetime.now(UTC).timestamp())
    return write_page(view.files, "report.html", page)


# Numbers -------------------------------------------------------------------------------------------------------------


def _demo(demo: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """With the colours that the arms have on the page of the study: grey for originals, the others in turn."""
    if demo is None:
        return None
    controls = {**demo["controls"], **demo.get("control_arms", {})}
    made = [name for name in (*demo["arms"], *demo.get("control_arms", {})) if not name.startswith("original")]

    def coloured(arms: Mapping[str, Any]) -> dict[str, Any]:
        return {name: {**arm, "colour": COLOURS[made.index(name) % SERIES] if name in made else "grey"}
                if isinstance(arm, Mapping) else arm for name, arm in arms.items()}

    return {"study": None, **demo, "arms": coloured(demo["arms"]), "controls": coloured(controls)}


def _phases(receipts: Sequence[Receipt]) -> list[tuple[str, float, float]]:
    """(phase, seconds over all processes, share of all phases); known phases first, in the order of the work."""
    seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for receipt in receipts:
        for phase, value in receipt.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + value
    seconds.pop("total", None)
    whole = sum(seconds.values())
    return [(phase, value, value / whole) for phase, value in seconds.items() if value > 0]


def _reasons(view: RunView) -> list[tuple[str, str, int, float]]:
    """(reason, status, rows, share of the decided rows)."""
    decided = view.totals.planned - view.totals.pending
    return [(reason, Reason(reason).status.value, rows, rows / decided) for reason, rows in view.reasons.items()]


def _guidance(view: RunView) -> dict[str, Any] | None:
    """What the scores of the kept samples say, of at most FILES_SEARCHED files; None where no sample has a score."""
    found: list[tuple[tuple[str, int], dict[str, float]]] = []  # seed and group, scores
    for receipt in spread([r for r in view.receipts if r.kept], FILES_SEARCHED):
        for row in view.store.data(receipt, ["seed_id", "group", "scores"]).to_pylist():
            scores = {one["name"]: one["value"] for one in row["scores"] or () if not one["name"].startswith("accept_")}
            if scores:
                found.append(((row["seed_id"], row["group"]), scores))
    if not found:
        return None
    columns = {name: [scores[name] for _, scores in found if name in scores]
               for name in sorted({name for _, scores in found for name in scores})}
    lines = [(name, *(f"{value:.3g}" for value in (np.mean(values), *np.quantile(values, (0.05, 0.5, 0.95)))))
             for name, values in columns.items()]
    retained = {when: float(np.mean(columns[f"retained_{when}"])) for when in ("before", "random", "after")
                if f"retained_{when}" in columns}
    return {"samples": len(found), "better": [one for name in ("energy", "score") if (one := _better(found, name))],
            "lines": lines, "retained": retained}


def _better(found: Sequence[tuple[tuple[str, int], dict[str, float]]], name: str) -> dict[str, Any] | None:
    """How often the update moved the energy of DistDiff down, or the score of GIF up, against the same number with the
    drawn perturbation alone; None where the method was not told to measure both. GIF climbs the sum over a group."""
    sign = -1 if name == "energy" else 1
    gains = [(group, sign * (scores[f"{name}_after"] - scores[f"{name}_random"])) for group, scores in found
             if {f"{name}_after", f"{name}_random"} <= scores.keys()]
    if not gains:
        return None
    sums: dict[tuple[str, int], float] = {}
    for group, gain in gains:
        sums[group] = sums.get(group, 0.0) + gain
    return {"name": name, "words": "is lower" if sign < 0 else "is higher", "samples": len(gains),
            "share": sum(gain > 0 for _, gain in gains) / len(gains), "groups": len(sums) if name == "score" else 0,
            "group_share": sum(gain > 0 for gain in sums.values()) / len(sums),
            "mean": sign * sum(gain for _, gain in gains) / len(gains)}


def _selections(view: RunView) -> list[dict[str, Any]]:
    """What `select` has decided, as the files state it."""
    lines = []
    for name in sorted(view.files.list("selections")):
        if (stated := parquet_facts(view.files, f"selections/{name}", FOOTER)) is not None:
            lines.append(stated)
    return lines


def _class_lines(view: RunView, classes: ClassTable) -> list[dict[str, Any]]:
    """One line per class by label, or the classes with the fewest kept samples where there are many."""
    kept = class_counts(view)
    top = max(int(kept.max(initial=0)), 1)
    lines = [{"label": label, "key": classes.key[label], "name": classes.name[label], "seeds": classes.count[label],
              "kept": int(kept[label]), "share": kept[label] / top} for label in range(len(classes))]
    return lines if len(classes) <= ALL_CLASSES else sorted(lines, key=lambda line: line["kept"])


def _stacks(view: RunView) -> dict[str, Any]:
    """Fingerprints side by side: shard counts, and one (field, values, differs) line per field."""
    found = view.stacks
    names = sorted({name for stack, _ in found for name in stack})
    lines = [(name, [stack.get(name, "(absent)") for stack, _ in found]) for name in names]
    return {"shards": [shards for _, shards in found],
            "lines": [(name, values, len(set(values)) > 1) for name, values in lines]}


def _attempts(view: RunView) -> list[dict[str, Any]]:
    """What each start committed, with its share of all rows decided so far."""
    decided = max(view.totals.planned - view.totals.pending, 1)
    lines = []
    for attempt in view.attempts():
        mine = [r for r in view.receipts if r.attempt == attempt["attempt"]]
        rows = sum(r.kept + r.rejected + r.failed for r in mine)
        lines.append({**attempt, "shards": len(mine), "rows": rows, "share": min(rows / decided, 1.0),
                      "hosts": len({r.host for r in mine}), "seconds": sum(map(shard_seconds, mine))})
    return lines


def picture_pages(files: Files) -> list[str]:
    """Names of the pages in figures/ of a folder."""
    return sorted(name.removesuffix(".html") for name in files.list("figures") if name.endswith(".html"))


def _commands(view: RunView, folder: str) -> list[tuple[str, str]]:
    """(what for, command line) a reader can paste into a shell, those that apply now."""
    where, name = shlex.quote(folder), shlex.quote(f"{view.run['name']}.yaml")
    lines = [("Check every file against the plan", f"rayexpand verify {where}")]
    if view.totals.failed:
        lines.insert(0, ("Try the failed rows again", f"rayexpand retry {where}"))
    if any(r.kept for r in view.receipts) and view.run["models"].get("guide"):
        lines.append(("Add guided beside plain samples to this page (loads the models)",
                      f"rayexpand report {where} --strips 10"))
        lines.append(("Samples whose own class the guide sees least (loads the guide)",
                      f"rayexpand report --failures {where}"))
        lines.append(("Where samples lie for the guide, among real images and prototypes (loads the guide)",
                      f"rayexpand report --map {where}"))
    if view.totals.pending:
        lines.insert(0, ("Continue (with the job file of this run, or with the configuration above saved as one)",
                         f"rayexpand expand {name}"))
    for receipt in view.receipts:
        if receipt.kept:
            sample = view.store.data(receipt, ["sample_id"])["sample_id"][0].as_py()
            return [*lines, ("Make one sample again", f"rayexpand regen {where} {shlex.quote(sample)}")]
    return lines


# Pictures ------------------------------------------------------------------------------------------------------------


def contact_sheet(view: RunView, classes: ClassTable, most: int = SHEET_SAMPLES) -> list[SheetRow]:
    """One seed of every class with samples, or of SHEET_CLASSES of them, each beside its samples."""
    best = _best_seeds(view)
    chosen = [best[label] for label in spread(sorted(best), SHEET_CLASSES)]
    count = max(2, min(most, SHEET_PICTURES // max(1, len(chosen)) - 1))
    rows = []
    for (_, seed_id, receipt), seed in zip(chosen, seed_pictures(view, [one[1] for one in chosen]), strict=True):
        table = find_rows(view.files, data_place(receipt.data_file), "seed_id", seed_id)
        found = table.sort_by("copy").to_pylist()
        samples = tuple(encoded_picture((sample["image"] or {}).get("bytes"), about(sample),
                                        painted_as(sample, classes))
                        for sample in found[:count])
        rows.append(SheetRow(_name(classes, found[0]["source_label"]), seed, samples))
    return rows


def _best_seeds(view: RunView) -> dict[int, tuple[int, str, Receipt]]:
    """Label of the source -> samples, seed, file, of FILES_SEARCHED files; the others are opened, MOST_FILES at most,
    until every class of a seed has one, or as many in a row bring no further class."""
    kept = [receipt for receipt in view.receipts if receipt.kept]
    first = spread(kept, FILES_SEARCHED)
    labels = set(read_plan_table(view, "seeds.parquet")["label"].to_pylist()) - {-1}
    best: dict[int, tuple[int, str, Receipt]] = {}
    names = {receipt.data_file for receipt in first}
    fruitless = 0
    for n, receipt in enumerate([*first, *(one for one in kept if one.data_file not in names)][:MOST_FILES]):
        if n >= len(first) and (labels <= best.keys() or fruitless == FILES_SEARCHED):
            break
        known = len(best)
        table = view.store.data(receipt, ["seed_id", "source_label"])
        for group in table.group_by(["seed_id", "source_label"]).aggregate([([], "count_all")]).to_pylist():
            label, count = group["source_label"], group["count_all"]
            if label not in best or count > best[label][0]:
                best[label] = (count, group["seed_id"], receipt)
        fruitless = 0 if len(best) > known or n < len(first) else fruitless + 1
    return best


def _refused_rows(view: RunView, classes: ClassTable) -> list[dict[str, Any]]:
    """Up to REFUSED_ROWS refused rows with their pictures, taken from the reasons in turn; of a seed that was refused
    more often for one reason, one row and the number of the others."""
    latest = {receipt.shard_id: receipt.generation for receipt in view.receipts}
    found: dict[str, dict[str, list[tuple[str, Receipt]]]] = {}  # reason -> seed -> rows
    for receipt in spread([r for r in view.receipts if r.side_file], FILES_SEARCHED):
        for row in view.store.refused(receipt).select(["sample_id", "seed_id", "status", "reason"]).to_pylist():
            if row["status"] != Status.FAILED or receipt.generation == latest[receipt.shard_id]:
                seeds_of = found.setdefault(row["reason"], {})
                seeds_of.setdefault(row["seed_id"], []).append((row["sample_id"], receipt))
    by_reason = [list(seeds_of.values())[:REFUSED_PER_REASON] for seeds_of in found.values()]
    turns = [rows[i] for i in range(REFUSED_PER_REASON) for rows in by_reason if i < len(rows)]
    lines = []
    for rows in turns[:REFUSED_ROWS]:
        sample_id, receipt = rows[0]
        (row,) = find_rows(view.files, side_place(receipt.side_file), "sample_id", sample_id).to_pylist()
        picture = encoded_picture((row["image"] or {}).get("bytes"), about(row))
        lines.append({**row, "picture": picture, "class": _name(classes, row["label"]), "others": len(rows) - 1})
    return sorted(lines, key=lambda line: (line["status"], line["reason"]))


def seed_pictures(view: RunView, seed_ids: list[str]) -> list[Picture]:
    """Pictures of seeds; grey boxes where the seed dataset cannot be read from here."""
    try:
        data = seeds.DataConfig.model_validate(view.run["config"]["data"])
        table = read_table(view.files, f"{view.run['plan']}/seeds.parquet").select(SEED_INDEX.names)
        reader = seeds.SeedReader(SeedIndex(table, read_classes(view)), data)
        rows = [pc.index(table["seed_id"], pa.scalar(seed_id)).as_py() for seed_id in seed_ids]
        found = reader.read(rows)
    except Exception as error:  # whatever is wrong with the dataset, the page about the run is still worth having
        return [Picture(title=f"the seeds cannot be read here: {error}")] * len(seed_ids)
    return [_seed_picture(seed, data) for seed in found]


def _seed_picture(seed: Any, data: seeds.DataConfig) -> Picture:
    if not isinstance(seed, Seed):
        return Picture(title=str(seed))
    try:
        pixels, note = decode(seed.image, min_side=data.min_side, max_pixels=data.max_pixels)
    except Exception as error:
        return Picture(title=f"{seed.seed_id}: {error}")
    return picture_of(Image.fromarray(pixels), f"seed {seed.seed_id}" + (f" ({note})" if note else ""))


def encoded_picture(encoded: bytes | None, title: str, caption: str = "") -> Picture:
    """Picture of a PNG or JPEG file; a grey box for None or a broken one."""
    if not encoded:
        return Picture(title=title, caption=caption)
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
            return picture_of(image.convert("RGB"), title, caption)
    except Exception as error:
        return Picture(title=f"{title}: {error}", caption=caption)


def picture_of(image: Image.Image, title: str, caption: str = "") -> Picture:
    """Picture of an image; a large one is shrunk for the page."""
    small = max(image.size) <= SMALL_SIDE
    if not small:
        image.thumbnail((LARGE_SIDE, LARGE_SIDE))
    sink = io.BytesIO()
    image.save(sink, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    width = image.width * max(1, 96 // max(image.size)) if small else max(1, image.width * 96 // max(image.size))
    uri = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(sink.getvalue()).decode()}"
    return Picture(uri, width, title, caption, small)


def score_texts(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(name, number) of the scores of a row of a data file."""
    return tuple((score["name"], f"{score['value']:.3g}") for score in row["scores"] or ())


def about(row: Mapping[str, Any]) -> str:
    scores = "".join(f", {name} {value}" for name, value in score_texts(row))
    prompt = f", “{row['prompt']}”" if row["prompt"] else ""
    return f"{row['sample_id']}{prompt}, strength {row['strength']:g}, {row['steps_run']} steps{scores}"


def painted_as(row: Mapping[str, Any], classes: ClassTable) -> str:
    """The class of a sample that is another than that of its seed."""
    return f"→ {_name(classes, row['label'])}" if row["label"] != row["source_label"] else ""


def _name(classes: ClassTable, label: int) -> str:
    return classes.display[label] if 0 <= label < len(classes) else f"label {label}"


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly over the sequence, the first among them."""
    step = max(1.0, len(items) / count)
    return [items[int(i * step)] for i in range(min(count, len(items)))]


# Text ----------------------------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _moment(unix: float | None) -> str:
    return "unknown" if unix is None else datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


_FILTERS: dict[str, Callable[..., Any]] = {"number": lambda n: f"{n:,}", "percent": _percent, "duration": duration,
                                            "moment": _moment, "plus_minus": plus_minus, "three_digits": three_digits}
