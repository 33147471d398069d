"""The figures of one study: every arm, accuracy against ratio and against cost, and training curves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayexpand.reports import figures
from rayexpand.reports.drawing import COLOURS, DASHES, FigurePoint
from rayexpand.reports.figure import Figure
from rayexpand.reports.grids import grouped_bars
from rayexpand.reports.lines import Line, Panel, lines
from rayexpand.reports.scatter import scatter
from rayexpand.studies.measures import measure
from rayexpand.studies.pivot import pivot
from rayexpand.studies.records import bench_records
from rayexpand.studies.results import StudyView, number

MAX_PANELS = 12  # of training curves
DISTANCES = ("fid", "fd_", "cmmd", "kid", "kd_", "mmd", "coverage")  # scores by the beginning of their names


def study_figures(study: StudyView, found: Mapping[str, Any], best: str | None) -> dict[str, Any]:
    """What the page shows, by name, with `all` of the figures; empty without arms."""
    arms = found["arms"]
    if not arms:
        return {}
    names = list(dict.fromkeys(line_name(arm) for arm in arms if line_name(arm)))
    series = {name: i for i, name in enumerate(names)}
    points = [arm_point(arm, series, {best, found["baseline"]}) for arm in arms]
    drawn: dict[str, Any] = {"legend": names[:COLOURS] if len(names) <= COLOURS else [],
                             "bars": figures.bars(points, "Top-1 accuracy of every arm"),
                             "ratios": _ratio_figures(found, names, series), "cost": None}
    costed = [(arm_point(arm, series, {*_frontier(arms), found["baseline"]}, x=_cost_of(arm)), arm["cost"]["unit"])
              for arm in arms if _cost_of(arm) is not None]
    if len(costed) > 1 and len({unit for _, unit in costed}) == 1:
        cost, unlabelled = figures.costs([point for point, _ in costed], costed[0][1], "Accuracy against cost")
        drawn["cost"] = {"figure": cost, "unlabelled": unlabelled, "some": len(costed) > figures.LABELLED}
    drawn["curves"], drawn["curves_left_out"] = _curve_figures(study, found, series)
    drawn["distance"] = _distance(found, series)
    drawn["overhead"] = _overhead(study)
    others = (drawn["cost"] and drawn["cost"]["figure"], drawn["distance"], drawn["overhead"])
    drawn["all"] = [drawn["bars"], *drawn["ratios"], *filter(None, others), *(one["figure"] for one in drawn["curves"])]
    return drawn


def line_name(arm: Mapping[str, Any]) -> str:
    """What arms that differ in their ratio only have in common; empty for real images only."""
    if not (arm["synthetic_rows"] or {"mean": 0})["mean"]:
        return ""
    if match := re.fullmatch(r"(.+) (?:[\d.]+x|round \d+)", arm["arm"]):
        return match[1]
    augment = arm["augment"] if arm["augment"] not in ("", "none") else ""
    return " + ".join(word for word in (arm["group"] or arm["arm"], augment) if word)


def arm_point(arm: Mapping[str, Any], series: Mapping[str, int], emphasised: Iterable[str | None],
              x: float | None = None) -> FigurePoint:
    """Top-1 of an arm in percent."""
    top1 = arm["last"]["top1"]
    return FigurePoint(arm["arm"], 100 * top1["mean"], None if top1["se"] is None else 100 * top1["se"], x or 0.0,
                       series.get(line_name(arm)), tuple(100 * value for value in top1["values"]),
                       arm["arm"] in set(emphasised))


def _ratio_figures(found: Mapping[str, Any], names: Sequence[str], series: Mapping[str, int]) -> list[Figure]:
    """One figure for every few expansions; none where no expansion has two ratios."""
    arms = {arm["arm"]: arm for arm in found["arms"]}
    made, controls = [], []
    for name in names:
        own = sorted((arm for arm in found["arms"] if line_name(arm) == name and arm["ratio"]),
                     key=lambda arm: arm["ratio"])
        made.append(Line(name, tuple(arm_point(arm, series, (), arm["ratio"]) for arm in own), series[name]))
        repeated = [(arms[arm["control"]], arm["ratio"]) for arm in own if arm["control"]]
        controls.append(Line(f"{name}: its real images repeated", tuple(
            FigurePoint(c["arm"], (p := arm_point(c, series, ())).mean, p.se, ratio, values=p.values)
            for c, ratio in repeated), series[name], dashed=True))
    if all(len(line.points) < 2 for line in made):
        return []
    baseline = arm_point(arms[found["baseline"]], series, ()) if found["baseline"] else None
    drawn: list[Figure] = []
    for start in range(0, len(made), COLOURS):
        some = [line for line in made[start:start + COLOURS] if line.points]
        if some:
            shared = _shared([line for line in controls[start:start + COLOURS] if line.points])
            name = "ratio" if not drawn else f"ratio-{len(drawn) + 1}"
            drawn.append(lines(name, [Panel("", figures.TOP1, (*shared, *some), baseline)],
                               "synthetic images per real image", f"Accuracy against ratio {start}"))
    return drawn


def _shared(controls: Sequence[Line]) -> list[Line]:
    """Controls that serve several expansions once, in grey."""
    kinds: dict[tuple[tuple[float, float], ...], list[Line]] = {}
    for line in controls:
        kinds.setdefault(tuple((p.x, p.mean) for p in line.points), []).append(line)
    return [same[0] if len(same) == 1 else Line("real images repeated to the same number of rows", same[0].points,
                                                None, dashed=True) for same in kinds.values()]


def _cost_of(arm: Mapping[str, Any]) -> float | None:
    """Process-seconds of one trial: training, and expansion with what was fitted for it."""
    training, expansion = arm["cost"]["training"], arm["cost"]["expansion"]
    return None if training is None else training["mean"] + (expansion["mean"] if expansion else 0.0)


def _frontier(arms: Sequence[Mapping[str, Any]]) -> set[str]:
    """Arms that no other one beats at the same or a lower cost."""
    found, highest = set(), -1.0
    for arm in sorted((a for a in arms if _cost_of(a) is not None), key=lambda a: (_cost_of(a) or 0.0)):
        if arm["last"]["top1"]["mean"] > highest:
            highest = arm["last"]["top1"]["mean"]
            found.add(arm["arm"])
    return found


def _distance(found: Mapping[str, Any], series: Mapping[str, int]) -> Figure | None:
    """Accuracy against the first distance or coverage that the samples of three arms have."""
    arms = [arm for arm in found["arms"] if arm["samples"]["scores"] and not arm["control_of"]]
    names = [name for name in dict.fromkeys(name for arm in arms for name in arm["samples"]["scores"])
             if sum(arm["samples"]["scores"].get(name) is not None for arm in arms) >= 3]
    chosen = next((name for first in DISTANCES for name in names if name.startswith(first)), None)
    points = []
    for arm in arms if chosen else ():
        if (score := arm["samples"]["scores"].get(chosen)) is not None:
            x = FigurePoint(arm["arm"], score["mean"], score["se"], values=tuple(score["values"]))
            points.append((x, arm_point(arm, series, ())))
    return scatter("distance", points, (f"{chosen} of the samples", figures.TOP1),
                   "Accuracy against distance") if points else None


def _overhead(study: StudyView) -> Figure | None:
    """What `bench` stored: overhead of each arm by batch size (DiffCoRe-Mix, equation 9)."""
    lines = list(bench_records(study.name, study.files))
    if not lines:
        return None
    found = pivot(lines, [measure("overhead")], rows="arm", columns="batch")
    return grouped_bars("overhead", found, lambda one: f"batch {one:g}" if isinstance(one, int | float) else one,
                        list(range(len(found.rows))), "Overhead in training")


def _curve_figures(study: StudyView, found: Mapping[str, Any],
                   series: Mapping[str, int]) -> tuple[list[dict[str, Any]], int]:
    """Training curves, a panel for each expansion and one for real images only, in the colour that its bars have; and
    how many arms are not drawn."""
    panels: dict[str, list[str]] = {"real images only": [], **{name: [] for name in series}}
    for arm in found["arms"]:
        panels[line_name(arm) or "real images only"].append(arm["arm"])
    drawn, shown = [], 0
    for number_, (title, arms) in enumerate([panel for panel in panels.items() if panel[1]][:MAX_PANELS]):
        own = [line for arm, dashes in zip(arms, DASHES, strict=False)
               if (line := _curve(study, arm, series.get(title), dashes))]
        if own:
            drawn.append({"title": title, "figure": figures.curves(f"curves-{number_ + 1}", own, title)})
            shown += len(own)
    return drawn, len(found["arms"]) - shown


def _curve(study: StudyView, arm: str, series: int | None, dashes: str) -> figures.FigureCurve | None:
    """Mean curves of an arm at the steps all its seeds have; None without two points in either."""
    def mean(name: str, scale: float) -> tuple[tuple[float, float], ...]:
        seeds = [{step: value for point in result.get("history") or ()
                  if (step := number(point, "step")) is not None and (value := number(point, name)) is not None}
                 for result in study.arms[arm]]
        steps = sorted(set.intersection(*map(set, seeds)))
        return figures.thinned([(step, scale * sum(one[step] for one in seeds) / len(seeds)) for step in steps])

    curve = figures.FigureCurve(arm, series, dashes, mean("loss", 1.0), mean("top1", 100.0))
    return curve if max(len(curve.loss), len(curve.top1)) > 1 else None
