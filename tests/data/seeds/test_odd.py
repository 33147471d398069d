"""Datasets in odd shapes: what is read equals what was written and what other libraries read, or is spoken of."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from tests.data.seeds.judge import LIBRARIES, Verdict, judge
from tests.data.seeds.odd import FACTORS, Case, cases, write

SEED = 7
SOME = 40  # cases of the fast suite


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def judged(chosen: list[Case], folder: Path) -> dict[Case, Verdict]:
    return {case: judge(case, write(case, folder / str(case.number))) for case in chosen}


def silent(verdicts: dict[Case, Verdict]) -> list[str]:
    return [f"{case}: {text}" for case, verdict in verdicts.items() for text in verdict.silent]


def table(verdicts: dict[Case, Verdict]) -> str:
    """Counts of outcomes for each level of each factor, and what comparing with each library came to."""
    outcomes = ("all read", "files counted", "rows refused", "refused", "crash")
    lines = [f"{'':30}{''.join(f'{name:>15}' for name in (*outcomes, 'silent'))}"]
    for factor, levels in FACTORS.items():
        for level in levels:
            mine = [one for case, one in verdicts.items() if case.levels[factor] == level]
            counts = Counter(one.outcome for one in mine)
            silent_cases = sum(bool(one.silent) for one in mine)
            lines.append(f"{factor + ': ' + level:30}" + "".join(f"{counts[name]:15}" for name in outcomes) +
                         f"{silent_cases:15}")
    for library in LIBRARIES:
        compared = Counter(one.libraries.get(library, "not compared") for one in verdicts.values())
        lines.append(f"{library}: " + "; ".join(f"{what} {count}" for what, count in compared.most_common()))
    return "\n".join(lines)


def test_every_pair_of_levels_occurs_and_the_seed_decides() -> None:
    found = cases(SEED, 300)
    assert len(found) >= 300
    assert found == cases(SEED, 300) != cases(SEED + 1, 300)
    for a, b in combinations(FACTORS, 2):
        there = {(case.levels[a], case.levels[b]) for case in found}
        assert len(there) == len(FACTORS[a]) * len(FACTORS[b]), (a, b)


def test_nothing_differs_in_silence(tmp_path: Path) -> None:
    verdicts = judged(cases(SEED, 300)[:SOME], tmp_path)
    assert silent(verdicts) == []
    outcomes = Counter(one.outcome for one in verdicts.values())
    assert outcomes["refused"] < SOME / 2
    assert min(outcomes[name] for name in ("all read", "files counted", "rows refused", "refused")) >= 3
    compared = {name for one in verdicts.values() for name, what in one.libraries.items() if what == "equal"}
    assert compared == {*LIBRARIES}


def test_a_silent_difference_is_seen(tmp_path: Path) -> None:
    """The judge itself: a wrong label, an image that is lost, another split."""
    plain = {factor: levels[0] for factor, levels in FACTORS.items()}
    made = write(Case(0, plain), tmp_path)
    assert judge(Case(0, plain), made) == Verdict("all read", [], {"datasets": "equal", "torchvision": "equal"})
    first, *others = made.images
    for wrong, text in (([replace(first, label="emu"), *others], "label '7', meant {'emu'}"),
                        ([*made.images, replace(first, content=b"lost")], "nothing said of"),
                        (others, "not meant"),
                        ([replace(first, split="train"), *(replace(one, split="test") for one in others)],
                         "one dataset of the splits ['test', 'train']")):
        (found,) = judge(Case(0, plain), replace(made, images=wrong)).silent
        assert text in found


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [SEED, SEED + 1, SEED + 2])
def test_soak(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = judged(cases(seed, 300), tmp_path)
    with capsys.disabled():
        print(f"\nseed {seed}, {len(verdicts)} cases\n{table(verdicts)}")
    assert silent(verdicts) == []
