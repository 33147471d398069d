"""Numbers of several repetitions, and how pages and tables write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rayexpand.classifier.accuracy import summarise


def spread(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean, its standard error and the sample standard deviation (None for a single value), n and the values; None if
    there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    found = summarise(known)
    return {"mean": found.mean, "se": found.se, "std": found.std, "n": found.n, "values": known}


def plus_minus(found: Mapping[str, Any], digits: int = 1) -> str:
    """Mean ± standard error of shares in percent, as every page and table writes it; one value has no ±."""
    error = found.get("se")
    return f"{100 * found['mean']:.{digits}f}" + ("" if error is None else f" ± {100 * error:.{digits}f}")


def points(share: float) -> str:
    """A difference of shares in percentage points with its sign: one decimal, more where that would read as zero."""
    value = 100 * share
    return f"{value:+z.1f}" if abs(value) >= 0.05 or abs(value) < 1e-9 else f"{value:+.1g}"


def within(interval: Sequence[float], least: float, most: float) -> tuple[float, float]:
    """An interval of shares ends where shares do: of two repetitions t knows little, and reaches beyond."""
    return max(interval[0], least), min(interval[1], most)


def plain(value: float, digits: int = 3) -> str:
    """Digits that count, without an exponent: 0.00000101, 18.9, 1,499."""
    return f"{value:,.0f}" if abs(value) >= 1000 else np.format_float_positional(
        value, digits, fractional=False, trim="-")


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign; one that reads as zero has none."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]
