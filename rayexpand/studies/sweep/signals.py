"""How the proxies of a sweep went with its scores: rank correlations over trials, and what a choice by them loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rayexpand.studies.rank_correlation import FEWEST, Interval, rank_correlation
from rayexpand.studies.sweep.proxies_config import EarlyConfig, prefers

HALF = 0.5  # share that a choice would keep, where the sweep does not say


def signals(results: Sequence[Mapping[str, Any]], early: EarlyConfig | None = None, seed: int = 0
            ) -> dict[str, Any] | None:
    """Of the finished trials, for each proxy of all of them: `lower`, whether its values are turned round because lower
    is better (None: not known, as they are), and the fields of RankCorrelation. Trials with the same expansions are one
    group. None where nothing was measured."""
    measured = [one for one in results if "proxies" in one]
    if not measured:
        return None
    own = [one for one in measured if one["state"] == "finished"]
    names = [name for name in (own[0]["proxies"] if own else ()) if all(name in one["proxies"] for one in own)]
    groups, keep = [" ".join(one["pilots"]) for one in own], HALF if early is None else early.keep
    found = []
    for name in names:
        read = early.prefer if early is not None and early.prefer and name.startswith(early.proxy) else prefers(name)
        sign = -1.0 if read == "lower" else 1.0
        found.append({"proxy": name, "lower": None if read is None else read == "lower", **asdict(rank_correlation(
            [sign * one["proxies"][name] for one in own], [one["score"] for one in own], groups, keep, seed))})
    return {"trials": len(own), "expansions": len(set(groups)), "keep": keep, "proxies": found,
            "left_out": len(measured) - len(own), "by": None if early is None else early.proxy,
            "dropped": sum(one["state"] == "dropped" for one in measured)}


def verdict(one: Mapping[str, Any]) -> str:
    """What a correlation shows, by its interval."""
    interval: Interval | None = one["spearman_interval"]
    if one["spearman"] is None:
        return "no correlation, all values of a side are equal"
    if interval is None:
        return f"no interval below {FEWEST} expansions, so nothing is shown"
    if interval[0] <= 0 <= interval[1]:
        return "no relation is shown, the interval holds 0"
    if one["lower"] is None:
        return "rises with the score" if interval[0] > 0 else "falls with the score"
    return f"better values go with {'higher' if interval[0] > 0 else 'lower'} scores"


def said_of_best(one: Mapping[str, Any]) -> str:
    """What a choice by this proxy alone would have made of the best trial."""
    found = f"{'loses' if one['loses_best'] else 'keeps'} the best"
    return found if one["loses_best_share"] is None else (
        f"{found}; loses it in {100 * one['loses_best_share']:.0f} % of resamples")


def notes(found: Mapping[str, Any]) -> list[str]:
    """How the correlations of a sweep are to be read."""
    many = len(found["proxies"])
    lines = [f"{found['trials']} finished trials of {found['expansions']} expansions; 95 % intervals by bootstrap over "
             f"expansions, of each proxy alone: of {many} such intervals about one in twenty leaves 0 out by chance"]
    lines += ["positive means that what the proxy finds better scores higher; where it is not known which way it is "
              "better, that higher values score higher"] if found["proxies"] else []
    lines += [f"left out, for they have no score after the last epoch: {found['left_out']} measured trials"] * (
        found["left_out"] > 0)
    if found["dropped"]:
        lines.append(f"{found['dropped']} dropped by {found['by']} and never trained, so whether the best was "
                     "among them is not known; what is left has less spread in it, which lowers its correlation")
    return lines


def said(found: Mapping[str, Any]) -> list[str]:
    """The correlations in lines for people."""
    share = f"{100 * found['keep']:.0f} %"
    return [f"{one['proxy']}{' (lower is better)' if one['lower'] else ''}: Spearman "
            f"{_with_interval(one['spearman'], one['spearman_interval'])}, Kendall "
            f"{_with_interval(one['kendall'], one['kendall_interval'])}: {verdict(one)}; training the best {share} by "
            f"it {said_of_best(one)}" for one in found["proxies"]] + notes(found)


def _with_interval(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "none"
    return f"{value:+.2f}" + ("" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]")
