"""Scores on corrupted images, read and put into tables: types beside arms, and severities beside arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayexpand.contract.errors import DamagedFile
from rayexpand.data.corruptions.tables import GROUPS
from rayexpand.storage.files import Files
from rayexpand.storage.tables import unsealed
from rayexpand.studies.spreads import plus_minus, spread

Result = Mapping[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # heads and lines

FACTS = ("name", "note", "images", "classes", "restricted", "left_out", "side")
_SHORT = {"elastic_transform": "elastic", "jpeg_compression": "JPEG"}


def read_corrupted(files: Files, config: Mapping[str, Any], results: Sequence[Result],
                   problems: list[str]) -> dict[str, dict[str, Result]]:
    """Scores by test and trial; those that cannot be used, or are of another classifier than the results or of other
    settings, leave a line in `problems`."""
    digests = {str(one["trial"]): one.get("digest") for one in results}
    found: dict[str, dict[str, Result]] = {}
    for test, asked in (config.get("extra_tests") or {}).items():
        there = {name.removesuffix(".json") for name in files.list(f"robustness/{test}") if name.endswith(".json")}
        for trial in [one for one in digests if one in there]:
            place = f"robustness/{test}/{trial}.json"
            try:
                one = unsealed(place, files.read(place) or b"", "")
            except DamagedFile as error:
                problems.append(f"{place}{error}, so it is left out; `rayexpand train` makes it again.")
                continue
            if one.get("trial_digest") != digests[trial]:
                problems.append(f"{place} is of another classifier than results/{trial}.json; it is left out until "
                                "`rayexpand train` makes it again.")
            elif one.get("settings") != asked:
                problems.append(f"{place} was made with other settings of extra_tests.{test}; it is left out until "
                                "`rayexpand train` makes it again.")
            else:
                found.setdefault(test, {})[trial] = one
    return found


def of_corrupted(scores: Mapping[str, Mapping[str, Result]], trials: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a summary says of an arm, by test: `facts` of the set; spreads of top-1 by `type`, `severity`, `group` and
    `cell` (<type>/<severity>), of `mean`, `mean_error` and, of all files of ImageNet-C, `mce`."""
    found = {}
    for test, by_trial in scores.items():
        if known := [by_trial[one] for one in trials if one in by_trial]:
            found[test] = _of_test(known)
    return found


def _of_test(known: Sequence[Result]) -> dict[str, Any]:
    first = known[0]

    def spreads(name: str, keys: Sequence[str]) -> dict[str, Any]:
        return {key: spread(one[name].get(key) for one in known) for key in keys}

    cells = {f"{kind}/{severity}": spread(one["top1"].get(kind, {}).get(severity) for one in known)
             for kind, line in first["top1"].items() for severity in line}
    return {"facts": {**{name: first.get(name) for name in FACTS}, "types": len(first["error"])},
            "type": {kind: spread(1 - one["error"][kind] for one in known if kind in one["error"])
                     for kind in first["error"]},
            "severity": spreads("by_severity", list(first["by_severity"])),
            "group": spreads("by_group", list(first["by_group"])), "cell": cells,
            **{name: spread(one.get(name) for one in known) for name in ("mean", "mean_error", "mce")}}


def tests_of(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Facts of each set of corrupted images of a summary."""
    return {test: one["facts"] for arm in reversed(found["arms"]) for test, one in arm.get("robustness", {}).items()}


def corrupted_table(found: Mapping[str, Any], test: str) -> Table:
    """A line for each arm: clean top-1, mean over types, mCE where it is one, then every type; mean ± standard error in
    percent."""
    arms = [(arm, arm["robustness"][test]) for arm in found["arms"] if test in arm.get("robustness", {})]
    types = list(arms[0][1]["type"])
    has_mce = any(one["mce"] is not None for _, one in arms)
    heads = ("arm", "n", "clean test %", f"{mean_head(arms[0][1]['facts'])} %", *(("mCE %",) if has_mce else ()),
             *(f"{short_type(kind)} %" for kind in types))
    return heads, [(arm["arm"], str(one["mean"]["n"]), *map(_cell, (
        arm["last"]["top1"], one["mean"], *((one["mce"],) if has_mce else ()),
        *(one["type"].get(kind) for kind in types)))) for arm, one in arms]


def mean_head(facts: Mapping[str, Any]) -> str:
    """What a mean over types is called: how many there are, and which are not."""
    return "mean of " + (facts["note"] or f"{facts['types']} types")


def short_type(kind: str) -> str:
    return _SHORT.get(kind, kind.replace("_", " "))


def grouped(types: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Types by noise, blur, weather and digital; others at the end."""
    known = [(group, [kind for kind in names if kind in types]) for group, names in GROUPS.items()]
    rest = [kind for kind in types if not any(kind in names for names in GROUPS.values())]
    return [line for line in [*known, ("other", rest)] if line[1]]


def _cell(value: Mapping[str, Any] | None) -> str:
    return "–" if value is None else plus_minus(value)
