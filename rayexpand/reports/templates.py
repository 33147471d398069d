"""The templates of pages and cards, rendered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jinja2

from rayexpand.contract.secrets import masked
from rayexpand.reports.palette import DARK, LIGHT

COLOURS = (*(f"s{i}" for i in range(9)), "grey")  # of page.html.j2; whatever stands side by side takes them in turn


def render(template: str, filters: Mapping[str, Callable[..., Any]], /, **values: Any) -> str:
    """A template of this folder with its values. Only pages (.html.j2) escape what they are given: in Markdown, data
    goes through a filter of its own. No page shows a password or token."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rayexpand.reports", "."), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=template.endswith(".html.j2"))
    environment.filters.update(filters)
    environment.globals |= {"colours": COLOURS, "light": LIGHT, "dark": DARK}
    return masked(environment.get_template(template).render(**values))


def settings_of(config: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """(field, value) lines of a configuration by section, without fields that have no value. Fields of no section come
    first; each of the expansions of a study is a section of its own."""
    sections: dict[str, list[tuple[str, str]]] = {"general": []}
    for name, value in config.items():
        if name == "expansions" and isinstance(value, Mapping):
            sections |= {f"expansion {one}": _lines("", {**fields, **(fields.get("config") or {}), "config": None})
                         for one, fields in value.items()}
        elif isinstance(value, Mapping):
            sections[name] = _lines("", value)
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            sections[name] = [(str(one.get("name", i)), _text({**one, "name": None})) for i, one in enumerate(value)]
        else:
            sections["general"] += _lines("", {name: value})
    return {name: lines for name, lines in sections.items() if lines}


def _lines(place: str, fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            lines += _lines(f"{place}{name}.", value)
        elif not _is_empty(value):
            lines.append((f"{place}{name}", _text(value)))
    return lines


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items() if not _is_empty(one))
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})
