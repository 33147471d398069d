"""What tells several runs apart: the settings that their samples depend on and that not all of them share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayexpand.runs.config import OPERATIONAL

_ASIDE = {"name", "out", "limits", "store", "runtime", "cluster", "estimate", "sampler", "codec", "method.ratio",
          "method.measure", *(one for one in OPERATIONAL if one != "artifacts")}
LETTERS = 60  # of a value
_PILOT = re.compile(r"[0-9a-f]{8}")  # how sweeps call their runs


def differences_of(configs: Sequence[Mapping[str, Any]]) -> list[list[tuple[str, str]]]:
    """Of each configuration the (field, value) of what samples depend on and not all share; "–" for what it does not
    have, such as an adapter. Fields of the method stand first, without its name, and only where it has them."""
    flat = [dict(_leaves(config)) for config in configs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    names.sort(key=lambda name: (not name.startswith("method."), name != "method.name"))
    apart = [name for name in names if len({str(one.get(name, "–")) for one in flat}) > 1]
    return [[("method" if name == "method.name" else name.removeprefix("method."), _text(one.get(name, "–")))
             for name in apart if name in one or not name.startswith("method.")] for one in flat]


def _leaves(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Fields that have a value, and it. Mappings in a section count as one value, but for those of `data`; an artifact
    by the name of its folder."""
    for name, value in config.items():
        where = f"{place}{name}"
        if where in _ASIDE or value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping) and (not place or place == "data."):
            yield from _leaves(value, f"{where}.")
        else:
            yield where, value.rstrip("/").rpartition("/")[2] if where.startswith("artifacts.") else value


def _text(value: Any) -> str:
    """In few letters, for the head of a column."""
    if isinstance(value, list):
        value = ", ".join(_text(one) or "no word" for one in value)
    text = f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= LETTERS else f"{text[:LETTERS - 1]}…"


def short_names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a figure calls each run: its name, or for a pilot of a sweep what tells it apart."""
    return [", ".join(f"{field} {value}" for field, value in lines) if lines and _PILOT.fullmatch(config["name"])
            else config["name"] for config, lines in zip(configs, differences_of(configs), strict=True)]
