"""The templates of pages and cards, rendered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jinja2

from rayexpand.contract.secrets import masked


def render(template: str, filters: Mapping[str, Callable[..., Any]], /, **values: Any) -> str:
    """A template of this folder with its values. Only pages (.html.j2) escape what they are given: in Markdown, data
    goes through a filter of its own. No page shows a password or token."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rayexpand.reports", "."), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=template.endswith(".html.j2"))
    environment.filters.update(filters)
    return masked(environment.get_template(template).render(**values))
