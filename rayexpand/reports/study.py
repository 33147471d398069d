"""One self-contained page about a study: the answer first, then the table, figures, classes, and how it was made.

Every number on the page comes from `summary`, which is also written as summary.json, or from a result or prediction
file that the page names. The page has no script and loads nothing; whatever comes from files is escaped.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import RayexpandError
from rayexpand.evaluation.features import with_current_names
from rayexpand.reports.figure import write_figures, write_tables
from rayexpand.reports.robustness import corrupted_sections
from rayexpand.reports.run import SheetRow, contact_sheet, picture_pages
from rayexpand.reports.scatter import said_of
from rayexpand.reports.study_classes import classes_of
from rayexpand.reports.study_figures import study_figures
from rayexpand.reports.tables import further_table
from rayexpand.reports.templates import render, settings_of
from rayexpand.reports.value_figures import value_figures
from rayexpand.runs.joined import view_samples
from rayexpand.runs.status import duration, read_classes
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json
from rayexpand.studies.comparisons import MIN_SEEDS
from rayexpand.studies.results import Result, StudyView, number, read_study, run_folder, run_name, runs_of
from rayexpand.studies.round_table import cost_table, round_table
from rayexpand.studies.score_table import said_of_samples_alone, said_of_top1, score_table
from rayexpand.studies.spreads import plain, plus_minus, points
from rayexpand.studies.summary import (
    frequencies,
    summarised,
    summary,
    write,
    write_numbers,
)
from rayexpand.studies.value import two_digits

__all__ = ["summary", "write_study_report"]

SHOWN, SAMPLES = 8, 5  # expansions with pictures; samples beside a seed

# Page ----------------------------------------------------------------------------------------------------------------


def write_study_report(folder: str | Path, *, demo: Mapping[str, Any] | None = None) -> Path | str:
    """Writes report.html, summary.json, summary.csv and figures/ into a study folder; returns the page's path or URL.

    `demo` adds a section: `note` (a sentence), `guide_zero_shot` and `controls` {name: share} as accuracies, and other
    numbers and words as they are; its gain and its arms are what the page is about anyway. Raises UsageError if there
    is no study, EnvironmentFault if the folder cannot be written.
    """
    study = read_study(folder)
    found = summarised(study)
    write_numbers(study.files, found)
    arms = {arm["arm"]: arm for arm in found["arms"]}
    best = _best(found)
    drawn, further = study_figures(study, found, best), further_table(found)
    corrupted, of_value = corrupted_sections(found), value_figures(found.get("value"))
    write_figures(study.files, [*drawn.get("all", ()), *of_value,
                                *(figure for one in corrupted for figure in one["figures"])])
    write_tables(study.files, filter(None, [further]))
    page = render("study.html.j2", _FILTERS,
        found=found, sentences=[c for c in found["comparisons"] if c["kind"] != "control to baseline"],
        tally=_tally(found), best=best, arms=arms, against=_against(found), demo=_demo(demo), scores=_scores(study),
        figures=drawn, value_figures=of_value, classes=classes_of(study, found["baseline"], best),
        frequencies=_frequencies(study, found), also=_also(found), further=further, corrupted=corrupted,
        samples=_samples(study), compared=score_table(found), told=said_of_top1(found),
        alone=said_of_samples_alone(found), in_rounds=round_table(found), round_costs=cost_table(found),
        settings=settings_of(study.config), recipe=_recipe(study),
        stacks=_values(study, "stack"), facts=_facts(study), trials=_trial_lines(study),
        mixed_units=len({arm["cost"]["unit"] for arm in found["arms"]}) > 1,
        config=yaml.safe_dump(dict(study.config), sort_keys=False, allow_unicode=True),
        pictures=picture_pages(study.files), commands=_commands(study, str(folder)), min_seeds=MIN_SEEDS,
        written=datetime.now(UTC))
    return write(study.files, "report.html", page)


def _best(found: Mapping[str, Any]) -> str | None:
    """The arm in its own right with the highest mean; None where there is nothing to choose from."""
    own = [arm for arm in found["arms"] if arm["arm"] != found["baseline"] and not arm["control_of"]
           and "note" not in arm and not arm["value"]]
    return max(own, key=lambda arm: arm["last"]["top1"]["mean"])["arm"] if own else None


def _tally(found: Mapping[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """How often each verdict was reached, against the baseline and against the controls."""
    lines = []
    kinds = {"baseline": f"against the baseline {found['baseline']}", "control": "against the real images repeated",
             "rounds": "of rounds against their controls"}
    for kind, words in kinds.items():
        verdicts = [c["verdict"] for c in found["comparisons"] if c["kind"] == kind]
        if verdicts:
            lines.append((words, {v: verdicts.count(v) for v in ("gain", "open", "loss", "few", "none")}))
    return lines


def _against(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """arm -> {"baseline": comparison, "control": comparison}."""
    lines: dict[str, dict[str, Any]] = {arm["arm"]: {} for arm in found["arms"]}
    for comparison in found["comparisons"]:
        if comparison["kind"] != "rounds":
            lines[comparison["arm"]]["control" if comparison["kind"] == "control" else "baseline"] = comparison
    return lines


def _demo(demo: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if demo is None:
        return None
    arms = demo.get("control_arms") or {}  # they stand among the arms, with their errors
    shares = {"guide_zero_shot": demo.get("guide_zero_shot"),
              **{name: value for name, value in (demo.get("controls") or {}).items() if name not in arms}}
    lines = [(name.replace("_", " "), f"{100 * value:.1f} %" if isinstance(value, int | float) else value)
             for name, value in shares.items() if value is not None]
    rest = [(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else value)
            for name, value in demo.items() if isinstance(value, int | float | str) and name not in shares
            and name not in ("note", "gain", "gain_se")]
    return {"note": demo.get("note", ""), "lines": lines + rest}


def _scores(study: StudyView) -> dict[str, Any] | None:
    """Scores of scores/*.json of every run that a result names, one line per file, and the warnings of the files."""
    runs: dict[str, str] = {}
    for result in study.results:
        for run in runs_of(result):
            runs.setdefault(run, _group_of(study, result, run))
    lines, warnings = [], []
    for run, group in runs.items():
        try:
            files = open_files(run_folder(study, run))
            for name in sorted(name for name in files.list("scores") if name.endswith(".json")):
                found = with_current_names(read_json(files, f"scores/{name}") or {})
                lines.append({"run": run, "group": group, "file": name, "values": _score_values(found)})
                warnings += [f"{run}, {name}: {line}" for line in found.get("warnings") or ()]
        except (OSError, ValueError, AttributeError, KeyError, RayexpandError) as error:
            lines.append({"run": run, "group": group, "file": f"cannot be read ({error})", "values": {}})
    columns = list(dict.fromkeys(name for line in lines for name in line["values"]))
    return {"columns": columns, "lines": lines, "warnings": warnings} if lines else None


def _group_of(study: StudyView, result: Result, run: str) -> str:
    """The expansion that a run is of, one of those of its arm; of a control of rounds its own name."""
    rounds, runs, group = study.rounds_of(result), runs_of(result), str(result.get("group") or result["arm"])
    if "stands_for" in rounds:
        return str(result["arm"])
    if rounds:
        return next((name for name in group.split(" + ") if run_name(run).startswith(f"{name}-")), group)
    return group if len(runs) == 1 else group.split(" + ")[runs.index(run)]


def _samples(study: StudyView) -> dict[str, Any]:
    """Of every expansion: its runs, each with where its page is from here, and pictures of its first one, or of its
    last round; of controls of rounds the runs alone."""
    runs: dict[str, list[str]] = {}
    is_control = {result["arm"]: "stands_for" in study.rounds_of(result) for result in study.results}
    for result in sorted(study.results, key=lambda one: is_control[one["arm"]]):
        for run in runs_of(result):
            if run not in (own := runs.setdefault(_group_of(study, result, run), [])):
                own.append(run)
    lines = [{"group": group, "runs": [_linked(study, run) for run in own],
              "rows": _pictures(study, _shown(own)) if n < SHOWN and not is_control.get(group) else ""}
             for n, (group, own) in enumerate(runs.items())]
    return {"lines": lines, "shown": SHOWN}


def _shown(runs: Sequence[str]) -> str:
    """The first run, of a loop its last round."""
    loop = runs[0].rpartition("/rounds/")[0]
    return [one for one in runs if loop and one.startswith(f"{loop}/rounds/")][-1] if loop else runs[0]


def _linked(study: StudyView, run: str) -> dict[str, str]:
    """The folder of a run and the address of its page from this one; "" where it is elsewhere or not written."""
    name = run_name(run)
    written = "report.html" in study.files.entries(f"runs/{name}")
    return {"folder": run, "page": f"runs/{quote(name)}/report.html" if written else ""}


def _pictures(study: StudyView, run: str) -> list[SheetRow] | str:
    """Seeds beside their samples, or why there are none."""
    try:
        view = view_samples(run_folder(study, run))
        return contact_sheet(view, read_classes(view), SAMPLES)
    except (OSError, ValueError, KeyError, RayexpandError) as error:
        return f"No pictures, {run} cannot be read from here ({type(error).__name__}: {error})."


def _score_values(found: Mapping[str, Any]) -> dict[str, str]:
    """What a score file measured, with its extractor and the numbers of images."""
    extractor = found.get("extractor")
    values = {"extractor": extractor.get("name") if isinstance(extractor, Mapping) else extractor,
              "samples": found.get("n_samples"), "real images": found.get("n_reference")}
    for name, score in found["scores"].items():
        values[name] = score.get("value") if isinstance(score, Mapping) else score
    return {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()
            if isinstance(value, int | float | str)}


def _frequencies(study: StudyView, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Groups of classes by their real images with the limits between them; None where all classes are in one."""
    low, high = study.config.get("frequency") or (5, 20)
    return {"names": names, "low": low, "high": high} if (names := frequencies(found)) else None


def _also(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table for each further test set: the arms that were tested on it, and its groups."""
    names = dict.fromkeys(name for arm in found["arms"] for name in arm["also"])
    tables = []
    for name in names:
        lines = [(arm, arm["also"][name]) for arm in found["arms"] if name in arm["also"]]
        tables.append({"name": name, "lines": lines, "first": lines[0][1]})
    return tables


# How it was made -----------------------------------------------------------------------------------------------------


def _recipe(study: StudyView) -> list[dict[str, Any]]:
    """Fields that are not the default in some arm: their default, and each value with the arms that have it."""
    defaults = {**Recipe().model_dump(mode="json"), "filter": Recipe().filter}
    given = [(arm, trials[0].get("recipe")) for arm, trials in study.arms.items()]
    recipes = [(arm, recipe) for arm, recipe in given if isinstance(recipe, Mapping)]
    lines = []
    for name in dict.fromkeys(name for _, recipe in recipes for name in recipe):
        values: dict[str, list[str]] = {}
        for arm, recipe in recipes:
            values.setdefault(json.dumps(recipe.get(name, defaults.get(name))), []).append(arm)
        if list(values) != [json.dumps(defaults.get(name))] or name not in defaults:
            default = json.dumps(defaults.get(name))
            lines.append({"name": name, "default": default, "values": [
                (value, "" if len(arms) == len(recipes) else "all other arms" if value == default else ", ".join(arms))
                for value, arms in values.items()]})
    return lines


def _values(study: StudyView, name: str) -> list[tuple[str, int]]:
    """Different values of a field of the results, each with its number of trials."""
    texts = [_text(result[name]) for result in study.results if result.get(name) not in (None, "", {})]
    return [(text, texts.count(text)) for text in dict.fromkeys(texts)]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return str(value)


def _facts(study: StudyView) -> list[tuple[str, str]]:
    """What the trials have in common, or how many have which value."""
    lines = [("seeds", ", ".join(map(str, sorted({r["seed"] for r in study.results}))) or "none")]
    for name, words in (("workers", "workers of a trial (0: in process)"), ("device", "device")):
        if values := _values(study, name):
            lines.append((words, values[0][0] if len(values) == 1 else
                          ", ".join(f"{value} ({count} trials)" for value, count in values)))
    for seed in sorted({r["seed"] for r in study.results}):
        hashes = dict.fromkeys(str(r["ids_sha256"]) for r in study.results
                               if r["seed"] == seed and r.get("ids_sha256"))
        if hashes:
            lines.append((f"ids of the real images, seed {seed}, sha256", ", ".join(hashes)))
    return lines


def _trial_lines(study: StudyView) -> list[dict[str, Any]]:
    """Every finished trial with its own numbers and the first letters of its hashes."""
    return [{"trial": r["trial"], "arm": r["arm"], "seed": r["seed"], "last": number(r, "last.top1"),
             "best": number(r, "best.top1"), "epoch": number(r, "best.epoch"), "seconds": number(r, "seconds"),
             **{name: str(r.get(name) or "–")[:12] for name in ("list_sha256", "ids_sha256", "digest")}}
            for r in study.results]


def _commands(study: StudyView, folder: str) -> list[tuple[str, str]]:
    """(what for, command line) a reader can paste into a shell."""
    name, where = shlex.quote(f"{study.name}.yaml"), shlex.quote(folder)
    doing = "Train what is missing" if study.missing or study.failed else "Make the study again"
    return [(f"{doing} (with the file of this study, or the configuration below saved as one)",
             f"rayexpand train {name}"), ("Write this page again", f"rayexpand report {where}"),
            ("The same seeds by every expansion", f"rayexpand report --matrix {where}"),
            ("The first training batch of every arm", f"rayexpand report --batch {where}")]


def _count(found: Mapping[str, Any] | None) -> str:
    """A count that is the same in all trials, or its range."""
    if found is None:
        return "–"
    low, high = min(found["values"]), max(found["values"])
    return f"{low:,.0f}" if low == high else f"{low:,.0f}–{high:,.0f}"


_FILTERS: dict[str, Callable[..., Any]] = {
    "number": _count, "duration": duration, "points": points, "percent": lambda x: f"{100 * x:.1f}",
    "plain": plain, "plus_minus": plus_minus, "said_of": said_of, "two_digits": two_digits}
