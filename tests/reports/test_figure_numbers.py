"""Every figure of every page: its numbers are computed again here, from the files of results alone, and do not agree
where one of them is altered."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.api import report
from rayexpand.contract.errors import DamagedFile
from rayexpand.reports.figure import read_figure
from rayexpand.reports.run import write_report
from rayexpand.reports.study import write_study_report
from rayexpand.reports.sweep import write_sweep_report
from rayexpand.storage.files import LocalFiles
from rayexpand.studies.sweep.config import base_study, dimensions_of, parse_sweep
from rayexpand.studies.sweep.sweep import Sweep
from tests.runfolder import Builder
from tests.studyfolder import StudyFolder, answers, grid

SEEDS = (0, 1, 2)
RATES, MIXED = (0.1, 0.2), (0.0, 0.5)
ASKED = {"metrics": ["fd"], "images": None}
PIVOT: dict[str, Any] = {
    "table": {"kind": "table", "rows": "line", "columns": "ratio", "against": "original", "ddof": 0},
    "bars": {"kind": "bars", "rows": "line", "columns": "ratio", "keep": {"line": ["a", "b"]}},
    "lines": {"kind": "lines", "rows": "line", "columns": "ratio", "keep": {"line": ["a", "b"]},
              "against": {"line": "original"}},
    "scatter": {"kind": "scatter", "value": ["samples.fd_x", "top1"]},
    "made": {"kind": "made", "rows": "line", "columns": "ratio", "keep": {"line": ["a"], "ratio": [1, 5]}},
    "cost": {"kind": "cost", "keep": {"arm": ["original", "a 5x"]}, "against": "original"},
    "heat": {"kind": "heat", "rows": "recipe.lr", "columns": "recipe.mixup", "keep": {"source": ["swept"]},
             "against": {"source": "study", "arm": "original"}}}
for one in PIVOT.values():
    one.setdefault("keep", {}).setdefault("source", ["study"])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study, a sweep, a run and a pivot with their pages."""
    out = tmp_path_factory.mktemp("figures")
    write_study_report(_study(out / "study"))
    write_sweep_report(_sweep(out))
    write_report(_run(out / "run"))
    report({"name": "pivot", "out": str(out), "sources": {"study": str(out / "study"), "swept": str(out / "swept")},
            "prices": {"cpu_hour": 2.0, "human_image": 0.25, "human_seconds": 60.0}, "figures": PIVOT})
    return out


def _study(folder: Path) -> Path:
    run = Builder(folder / "runs/a-0", shards=2).start()
    for shard in (0, 1):
        run.commit(shard)
    also = {name: {"top1": share, "top5": share + 0.1, "images": 60, "classes": 10}
            for name, share in (("v2", 0.5), ("r", 0.25))}
    study = grid(folder, expansions=("a", "b"), ratios=(1, 5), seeds=SEEDS, images=97, fitting_seconds=2.0, also=also)
    study.config |= {"samples": ASKED}
    for trial in study.trials:
        result = _json(folder / f"results/{trial}.json")
        if result["group"]:
            study.write(f"results/{trial}.json", {**result, "run": str(folder / "runs/a-0")})
            study.write(f"scores/{trial}.json", {
                "settings": ASKED, "list_sha256": result["list_sha256"], "extractor": {"name": "x"}, "features": 4,
                "size": 8, "n_reference": 9, "n_samples": 20, "scores": {"fd_x": {"value": 9.0 / (1 + result["ratio"])
                                                                                  + result["seed"] / 8}}})
    for batch in (16, 32):
        study.write(f"bench-{batch}.json", {"arms": [
            {"arm": arm, "batch": batch, "overhead": over * batch, "loader_seconds": 0.1, "step_seconds": 0.2}
            for arm, over in (("original", 0.0), ("a 1x", 1.5))]})
    return study.finish()


def _sweep(out: Path) -> Sweep:
    config = parse_sweep({
        "name": "swept", "out": str(out), "arm": "original", "score_on": "test", "search": "grid",
        "space": {"recipe.lr": {"choice": list(RATES)}, "recipe.mixup": {"choice": list(MIXED)}},
        "study": {"data": {"source": "digits"}, "test": {"source": "digits", "split": "test"}, "seeds": list(SEEDS),
                  "recipe": {"updates": 4}, "arms": [{"name": "original"}]}})
    folder = Path(config.folder)
    for number, (lr, mixup) in enumerate(product(RATES, MIXED)):
        key = f"{number:08x}"
        study = StudyFolder(folder / "studies" / key)
        for seed in SEEDS:
            study.add("original", seed, answers(key, seed, 0.5 + 0.1 * number, 60), recipe={"lr": lr, "mixup": mixup})
        study.finish()
        scores = [_json(study.folder / f"results/original-s{seed}.json")["last"]["top1"] for seed in SEEDS]
        study.write(f"../../trials/{key}.json", {
            "key": key, "number": number, "values": {"recipe.lr": lr, "recipe.mixup": mixup}, "state": "finished",
            "score": float(np.mean(scores)), "scores": scores, "epochs": 2, "of_epochs": 2, "curve": [],
            "seconds": 1.0})
    (folder / ".tmp").mkdir()
    (folder / "sweep.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    return Sweep(config, LocalFiles(folder), base_study(config), dimensions_of(config))


def _run(folder: Path) -> Path:
    run = Builder(folder, shards=2).start()
    for shard in (0, 1):
        run.commit(shard)
    ids = [row for file in sorted((folder / "data").glob("*.parquet")) for row in pq.read_table(
        file, columns=["sample_id"])["sample_id"].to_pylist()]
    (folder / "selections").mkdir(exist_ok=True)
    pq.write_table(pa.table({"sample_id": ids, "keep": [i % 3 == 0 for i in range(len(ids))]}),
                   folder / "selections/third.parquet")
    return folder


# Again ----------------------------------------------------------------------------------------------------------------


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def stats(values: list[float]) -> dict[str, Any]:
    n = len(values)
    return {"mean": sum(values) / n, "se": float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None, "n": n,
            "values": values}


def cell(values: list[float], ddof: int = 1) -> dict[str, Any]:
    return {**stats(values), "sd": float(np.std(values, ddof=ddof)) if len(values) > 1 else None}


class Raw:
    """Results of the study by arm, seeds rising, and what follows from them by hand."""

    def __init__(self, out: Path) -> None:
        self.out, self.arms = out, dict[str, list[dict[str, Any]]]()
        results = [_json(path) for path in (out / "study/results").glob("*.json")]
        for result in sorted(results, key=lambda one: one["seed"]):
            self.arms.setdefault(result["arm"], []).append(result)

    def top1(self, arm: str) -> list[float]:
        return [100 * one["last"]["top1"] for one in self.arms[arm]]

    def fd(self, arm: str) -> list[float]:
        return [_json(self.out / f"study/scores/{one['trial']}.json")["scores"]["fd_x"]["value"]
                for one in self.arms[arm]]

    def named(self, arm: str) -> dict[str, Any]:
        return {"name": arm, **stats(self.top1(arm))}

    def trial(self, lr: float, mixup: float) -> dict[str, Any]:
        (found,) = [one for path in (self.out / "swept/trials").glob("*.json") for one in [_json(path)]
                    if one["values"] == {"recipe.lr": lr, "recipe.mixup": mixup}]
        return {**found, "percent": [100 * score for score in found["scores"]]}

    def hours(self, arm: str) -> list[float]:
        return [(one["expansion_seconds"] + one["fitting_seconds"]) / 3600 for one in self.arms[arm]]

    def discarded(self, arm: str) -> list[float]:
        """Every image that was drawn for the run, kept or rejected, over those that were kept."""
        run = self.out / "study/runs/a-0"
        kept = [row for file in (run / "data").glob("*.parquet") for row in pq.read_table(
            file, columns=["attempt"])["attempt"].to_pylist()]
        refused = [row for file in (run / "rejected").glob("*.parquet") for row in pq.read_table(
            file, columns=["attempt", "status"]).to_pylist() if row["status"] == "rejected"]
        drawn = sum(1 + one for one in kept) + sum(1 + one["attempt"] for one in refused)
        return [one["synthetic_rows"] * (drawn / len(kept) - 1) for one in self.arms[arm]]


def _crossover(raw: Raw, line: str) -> float | None:
    level, low, high = (np.mean(raw.top1(arm)) for arm in ("original", f"{line} 1x", f"{line} 5x"))
    return float(5 ** ((level - low) / (high - low))) if low < level <= high else None


ALL_ARMS = ("original", "a 1x", "original repeated 2x", "a 5x", "original repeated 6x", "b 1x", "b 5x")
MADE = ("a 1x", "a 5x", "b 1x", "b 5x")


def _curve(raw: Raw, arms: tuple[str, ...]) -> dict[str, Any]:
    def mean(arm: str, name: str, scale: float) -> list[list[float]]:
        seeds = [{point["step"]: point[name] for point in one["history"]} for one in raw.arms[arm]]
        return [[step, scale * sum(one[step] for one in seeds) / len(seeds)] for step in sorted(seeds[0])]

    return {"arms": [{"name": arm, "loss": mean(arm, "loss", 1), "top1_percent": mean(arm, "top1", 100)}
                     for arm in arms]}


def _ratio(raw: Raw, panel: bool) -> dict[str, Any]:
    def line(name: str, arms: tuple[str, str], **fields: Any) -> dict[str, Any]:
        return {"name": name, "points": [{**raw.named(arm), **({"name": name} if not panel else {}), "x": x}
                                         for arm, x in zip(arms, (1.0, 5.0), strict=True)], **fields}

    repeated = ("original repeated 2x", "original repeated 6x")
    controls = [line("real images repeated to the same number of rows", repeated, dashed=True)] if panel else []
    return {"panels": [{"baseline": raw.named("original"), "lines": [
        *controls, *(line(name, (f"{name} 1x", f"{name} 5x"), dashed=False, crossover=_crossover(raw, name))
                     for name in ("a", "b"))]}]}


def _scores(raw: Raw, field: int) -> dict[str, Any]:
    return {"trials": [{"x": place[field], "name": one["key"], **stats(one["percent"])}
                       for place in product(RATES, MIXED) for one in [raw.trial(*place)]]}


def _gain(raw: Raw, arm: str) -> list[float]:
    return [a - b for a, b in zip(raw.top1(arm), raw.top1("original"), strict=True)]


def _scatter(raw: Raw) -> dict[str, Any]:
    x, y = ([float(np.mean(values(arm))) for arm in MADE] for values in (raw.fd, raw.top1))
    ranks = [np.argsort(np.argsort(side)) for side in (x, y)]  # fd of a and b are equal at one ratio
    assert len(set(x)) == 2
    mean = [{min(x): 1.5, max(x): 3.5}[one] for one in x]
    return {"n": 4, "rank_correlation": float(np.corrcoef(mean, ranks[1])[0, 1]), "interval_95": None, "points": [
        {"name": arm, "x": {"name": arm, **stats(raw.fd(arm))}, "y": raw.named(arm)} for arm in MADE]}


def _cost_line(raw: Raw, arm: str) -> dict[str, Any]:
    results, rows = raw.arms[arm], [one["synthetic_rows"] for one in raw.arms[arm]]
    line: dict[str, Any] = {
        "row": arm, "images": cell(rows), "hours": cell(raw.hours(arm)), "top1": cell(raw.top1(arm)),
        "price": cell([2 * one for one in raw.hours(arm)]), "gain_top1": cell(_gain(raw, arm)),
        "price_per_1000": 1000 * 2 * float(np.mean(raw.hours(arm))) / float(np.mean(rows)) if any(rows) else None}
    if any(rows):
        line["seconds_per_image"] = cell([one["expansion_seconds"] / one["synthetic_rows"] for one in results])
    return line


def _table(raw: Raw) -> dict[str, Any]:
    places = [("original", 0.0, "original"), *(("a", r, f"a {r:.0f}x") for r in (1.0, 5.0)),
              *(("original repeated", r, f"original repeated {r + 1:.0f}x") for r in (1.0, 5.0)),
              *(("b", r, f"b {r:.0f}x") for r in (1.0, 5.0))]
    lines = [{"row": row, "column": f"{ratio:g}", "ddof": 0, **cell(raw.top1(arm), 0),
              "difference": cell(_gain(raw, arm), 0)} for row, ratio, arm in places]
    return {"numbers": lines}


AGAIN: dict[str, Callable[[Raw], Any]] = {
    "study/arms": lambda raw: {"arms": [raw.named(arm) for arm in ALL_ARMS]},
    "study/ratio": lambda raw: _ratio(raw, panel=True),
    "study/cost": lambda raw: {"arms": [{**raw.named(arm), "x": float(np.mean(
        [one["seconds"] + one["expansion_seconds"] + (one["fitting_seconds"] if one["group"] else 0)
         for one in raw.arms[arm]]))} for arm in ALL_ARMS]},
    "study/curves-1": lambda raw: _curve(raw, ("original", "original repeated 2x", "original repeated 6x")),
    "study/curves-2": lambda raw: _curve(raw, ("a 1x", "a 5x")),
    "study/curves-3": lambda raw: _curve(raw, ("b 1x", "b 5x")),
    "study/distance": _scatter,
    "study/overhead": lambda raw: {"groups": [{"group": f"batch {batch}", "bars": [
        {"name": arm, **cell([factor * batch])} for arm, factor in (("original", 0.0), ("a 1x", 1.5))]}
        for batch in (16, 32)]},
    "study/further-tests": lambda raw: {"numbers": [
        {"row": arm, **stats([place(one)[score] for one in raw.arms[arm]])}
        for arm in ALL_ARMS for place in (lambda one: one["last"], lambda one: one["also"]["v2"],
                                          lambda one: one["also"]["r"]) for score in ("top1", "top5")]},
    "swept/score-1": lambda raw: _scores(raw, 0),
    "swept/score-2": lambda raw: _scores(raw, 1),
    "swept/scores-1": lambda raw: {"cells": [{"row": lr, "column": mixup, **cell(raw.trial(lr, mixup)["percent"])}
                                             for lr in RATES for mixup in MIXED]},
    "run/kept-1": lambda raw: _kept(raw.out / "run"),
    "pivot/table": _table,
    "pivot/bars": lambda raw: {"groups": [{"group": f"{ratio}", "bars": [
        {"name": line, **cell(raw.top1(f"{line} {ratio}x"))} for line in ("a", "b")]} for ratio in (1, 5)]},
    "pivot/lines": lambda raw: _ratio(raw, panel=False),
    "pivot/scatter": _scatter,
    "pivot/made": lambda raw: {"row": "a", "made": [
        {"x": x, "images": float(np.mean([one["synthetic_rows"] for one in raw.arms[arm]])),
         "discarded": float(np.mean(raw.discarded(arm))), "process_hours": float(np.mean(raw.hours(arm)))}
        for arm, x in (("a 1x", 1.0), ("a 5x", 5.0))]},
    "pivot/cost": lambda raw: {"numbers": [*(_cost_line(raw, arm) for arm in ("original", "a 5x")), {
        "row": "people", "price_per_1000": 250.0, "seconds_per_image": 60.0}]},
    "pivot/heat": lambda raw: {"cells": [{"row": lr, "column": mixup, **cell(
        [a - b for a, b in zip(raw.trial(lr, mixup)["percent"], raw.top1("original"), strict=True)])}
        for lr in RATES for mixup in MIXED]}}


def _kept(folder: Path) -> dict[str, Any]:
    table = pq.read_table(folder / "selections/third.parquet").to_pylist()
    seeds = {row["sample_id"].rpartition("/")[0]: 0 for row in table}
    for row in table:
        seeds[row["sample_id"].rpartition("/")[0]] += row["keep"]
    total = _json(folder / "run.json")["seeds"]
    counts = [*seeds.values(), *[0] * (total - len(seeds))]
    return {"n": total, "seeds_by_copies_kept": {str(n): counts.count(n) for n in range(max(counts) + 1)}}


# Held together --------------------------------------------------------------------------------------------------------


def numbers(place: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number of a file with its place in it; what is not there and what is None has none."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers(f"{place}.{name}", inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(f"{place}.{i}", inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, float(value)


def agree(stored: Any, again: Any) -> bool:
    mine, theirs = (dict(numbers("", one)) for one in (stored, again))
    return mine.keys() == theirs.keys() and all(math.isclose(mine[at], theirs[at], rel_tol=1e-9, abs_tol=1e-12)
                                                for at in mine)


def test_every_figure_is_one_of_those_below(written: Path) -> None:
    found = {f"{path.parent.parent.name}/{path.stem}" for path in written.glob("*/figures/*.json")}
    assert found == AGAIN.keys(), "a figure is here with its numbers computed again, or it is not written"
    for name in found:
        folder, _, figure = name.partition("/")
        assert (written / f"{folder}/figures/{figure}.svg").exists() != (
            written / f"{folder}/figures/{figure}.csv").exists()


@pytest.mark.parametrize("name", AGAIN)
def test_its_numbers_are_those_of_the_results(written: Path, name: str) -> None:
    folder, _, figure = name.partition("/")
    stored = _json(written / folder / f"figures/{figure}.json")
    again = AGAIN[name](Raw(written))
    assert dict(numbers("", stored)).keys() == dict(numbers("", again)).keys()
    assert agree(stored, again)


@pytest.mark.parametrize("name", AGAIN)
def test_a_number_that_is_altered_does_not_pass(written: Path, name: str) -> None:
    folder, _, figure = name.partition("/")
    path = written / folder / f"figures/{figure}.json"
    text, again = path.read_text(), AGAIN[name](Raw(written))
    found = list(re.finditer(r'(?<=[ \[])-?\d+\.?\d*(?:e-?\d+)?(?=,?\n)', text))
    assert len(found) == len(list(numbers("", json.loads(text))))
    for one in found:
        altered = f"{text[:one.start()]}{float(one[0]) + 0.01}{text[one.end():]}"
        assert not agree(json.loads(altered), again), one[0]
    if path.with_suffix(".svg").exists():
        assert read_figure(LocalFiles(written / folder), figure)
        path.write_text(altered)
        with pytest.raises(DamagedFile):
            read_figure(LocalFiles(written / folder), figure)
        path.write_text(text)
