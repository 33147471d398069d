"""docs/composition.md: which parts of the papers go together. Its tables are what validation says of a study with each
pair, so the page says nothing that a user would not be told. `python -m tests.studies.test_composition` prints them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rayexpand.contract.errors import ConfigError
from rayexpand.studies.config import parse_study, study_preflight
from tests.commands import ROOT

PAGE = ROOT / "docs/composition.md"
RUN, BESIDE, REFUSED = "run", "beside", "no"
TUNED = {"preset": "tiny", "strategy": "db", "prompt": "a {name}"}
WORDS = {"preset": "tiny", "strategy": "ti", "prompt": "a {token}"}


@dataclass(frozen=True)
class Part:
    """What a part sets in an expansion, and in an arm that uses it. `host`: the method where no part gives one."""

    name: str
    method: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    prior: str | None = None
    adapter: dict[str, Any] = field(default_factory=dict)
    accept: dict[str, Any] = field(default_factory=dict)
    arm: dict[str, Any] = field(default_factory=dict)


GIF, DIFFMIX = {"name": "gif"}, {"name": "diffmix", "prompt": "a {name}"}
PARTS = (
    Part("MAE", host=GIF, prior="digits-mae"),
    Part("unCLIP", host=GIF, prior="digits-unclip"),
    Part("LoRA", adapter=TUNED),
    Part("class words", adapter=WORDS),
    Part("class feature", {"name": "realfake", "prompt": "a {name}"}, adapter={"visual_token": "class_mean"}),
    Part("DistDiff", {"name": "distdiff"}),
    Part("GIF", GIF),
    Part("scenes", {"name": "diffcoremix", "filtration": False}),
    Part("other class", DIFFMIX),
    Part("drawn again", accept={"to": "class"}),
    Part("like its seed", accept={"to": "seed", "attempts": 1}),
    Part("like its prompt", accept={"to": "prompt", "attempts": 1}),
    Part("mix", arm={"mix": {}}),
    Part("soft label", host=DIFFMIX, arm={"soft_label": {"gamma": 0.5}}),
    Part("replace", arm={"replace": 0.1}))


def merged(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """None where two set one field to two values."""
    made: dict[str, Any] = {}
    for one in found:
        if any(made.get(name, value) != value for name, value in one.items()):
            return None
        made |= one
    return made


def expansion(parts: Sequence[Part]) -> dict[str, Any] | None:
    """An expansion with these parts; None where it would take two."""
    method, adapter, accept = (merged([getattr(part, name) for part in parts])
                               for name in ("method", "adapter", "accept"))
    priors = {part.prior for part in parts if part.prior}
    if method is None or adapter is None or accept is None or len(priors) > 1:
        return None
    method = method or next((part.host for part in parts if part.host), {"name": "img2img", "prompt": "a {name}"})
    if method["name"] in ("diffmix", "realfake"):  # which are nothing without one
        adapter = {**TUNED, **adapter}
    if method["name"] == "gif" and priors:
        method = {**method, "generator": next(iter(priors)).removeprefix("digits-")}
    if method["name"] != "gif" and adapter.get("strategy") == "ti":
        method = {**method, "prompt": "a {token}, {context}" if method["name"] == "diffcoremix" else "a {token}"}
    fits = bool(adapter) or method["name"] == "distdiff" or accept.get("to") is not None
    return {"method": method, **({"prior": {"weights": priors.pop()}} if priors else {}),
            **({"fit": {"adapter": {"recipe": adapter, "flips": False}} if adapter else {}} if fits else {}),
            **({"accept": accept} if accept else {})}


def checked(*parts: Part) -> tuple[str, list[str]]:
    """What becomes of a study with these parts, and what is wrong with it."""
    made = expansion(parts)
    each = {"it": made} if made else {f"it-{i}": expansion([part]) for i, part in enumerate(parts)}
    arm = {"name": "a", "use": "it" if made else [*each], **{name: value for part in parts
                                                           for name, value in part.arm.items()}}
    raw = {"name": "x", "data": {"source": "digits"}, "test": {"source": "digits", "split": "test"}, "seeds": [0],
           "recipe": {"preset": "digits"}, "expansions": each, "arms": [arm]}
    try:
        found = study_preflight(parse_study(raw))
    except ConfigError as error:
        found = error.problems
    return REFUSED if found else RUN if made else BESIDE, found


def tables() -> str:
    """Both tables of the page."""
    verdicts = {(a.name, b.name): checked(a, b) for a, b in itertools.combinations(PARTS, 2)}
    names = [part.name for part in PARTS]
    lines = ["| | " + " | ".join(names[1:]) + " |", "|---" * len(names) + "|"]
    for i, name in enumerate(names[:-1]):
        cells = ["" if j <= i else verdicts[name, names[j]][0] for j in range(1, len(names))]
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |")
    why: dict[str, list[str]] = {}
    for (a, b), (verdict, found) in verdicts.items():
        if verdict == REFUSED:
            why.setdefault(_short(found[0]), []).append(f"{a} and {b}")
    reasons = [f"| {'; '.join(pairs)} | `{words}` |" for words, pairs in why.items()]
    return "\n".join([*lines, "", "| refused | message |", "|---|---|", *reasons])


def _short(problem: str) -> str:
    """The message of a file with such an expansion, as far as its remedy."""
    return re.sub(r"^(expansions\.it|arms\.a)\.", "", problem).partition("; ")[0].partition(". ")[0]


def test_the_page_says_what_validation_says() -> None:
    page = PAGE.read_text()
    wanted = tables()
    assert wanted in page, f"docs/composition.md needs these tables:\n{wanted}"


def test_nothing_a_part_sets_is_refused_alone() -> None:
    assert {part.name: checked(part) for part in PARTS} == {part.name: (RUN, []) for part in PARTS}


if __name__ == "__main__":
    print(tables())
