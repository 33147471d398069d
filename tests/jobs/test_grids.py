"""The ablations of the five papers, as grids: as many trials as the paper has values, each counted before it starts."""

from __future__ import annotations

import re

import pytest

from rayexpand.studies.config import load_study
from rayexpand.studies.sweep.config import load_sweep
from rayexpand.studies.sweep.count import count_of
from rayexpand.studies.sweep.plan import plan_sweep
from rayexpand.studies.trials import arms_of
from tests.commands import ROOT

PAPERS = ROOT / "jobs/papers"
DIFFMIX_SHOTS = ("1", "5", "10", "all")

# File -> (trials, expansions of one set of real images, where the paper has the grid). Expansions are fewer where
# trials differ in training alone, or use the first copies of one run.
GRIDS: dict[str, tuple[int, int, str]] = {
    "distdiff/sweep-energy": (3, 3, "table 4: p_g, p_c, both; neither is SD, an arm of the study"),
    "distdiff/sweep-guide-step": (4, 4, "table 5: M = 1, 10, 20, 25"),
    "distdiff/sweep-groups": (4, 4, "table 6: K = 2, 3, 4, 5"),
    "distdiff/sweep-lookahead": (4, 4, "table 7: 1, 2, 3, 4 steps"),
    "distdiff/sweep-direct": (12, 12, "section 4.4: rho 0.1, 1, 10, 20 by M 1, 10, 20"),
    "distdiff/sweep-guide": (3, 3, "table 10: two guides; the third is ours"),
    "distdiff/sweep-rho": (4, 4, "table 11: 0.1, 1, 10, 20"),
    "distdiff/sweep-lambda-g": (7, 7, "table 12: 0.1, 0.3, 0.5, 0.7, 0.9, 1, 2"),
    "distdiff/sweep-strength": (6, 6, "figure 7, Caltech-101; the values are ours"),
    "distdiff/sweep-strength-pathmnist": (8, 8, "figure 7, PathMNIST; the values are ours"),
    "distdiff/sweep-ratio": (4, 4, "figure 4, DistDiff: 5 and 20 copies; the others are ours"),
    "distdiff/sweep-ratio-sd": (4, 4, "figure 4, Stable Diffusion"),
    "distdiff/sweep-ratio-autoaugment": (4, 4, "figure 4, AutoAugment"),
    "gif/sweep-terms": (6, 6, "section 5.2: each of three terms off, all, and two without guidance"),
    "gif/sweep-terms-mae": (5, 5, "section 5.2, GIF-MAE"),
    "gif/sweep-terms-dalle": (5, 5, "figure 2b, GIF-DALLE"),
    "gif/sweep-level": (2, 2, "section 5.2: channel and pixel, GIF-SD"),
    "gif/sweep-level-mae": (2, 2, "figure 6: channel and pixel, GIF-MAE"),
    "gif/sweep-guide": (4, 4, "table 8: random, tuned, zero-shot; the fourth is ours"),
    "gif/sweep-ratio": (36, 9, "figure 4, Cars: nine methods at 5 to 20 copies"),
    "gif/sweep-ratio-dtd": (36, 9, "figure 4, DTD"),
    "gif/sweep-prompts": (4, 4, "figures 12, 13: with and without domains, with and without adjectives"),
    "gif/sweep-strength": (8, 8, "section B.4.1: 0.5 to 0.9, and 0.1, 0.3, 0.99 that it warns of"),
    "gif/sweep-scale": (6, 6, "section B.4.2: 5 to 50, and 1, 100 that it warns of"),
    **{f"gif/sweep-tuning{name}": (2, 2, "table 9: without and with tuning") for name in (
        "", "-dalle", "-breastmnist", "-breastmnist-dalle", "-organsmnist", "-organsmnist-dalle")},
    "gif/sweep-group-size": (2, 2, "ours"), "gif/sweep-eps": (5, 5, "ours"), "gif/sweep-weights": (9, 9, "ours"),
    **{f"diffmix/sweep-strength-{weights}-{shots}": (12, 12, "figure 6: Aug and Mix at six strengths")
       for weights in ("real", "diff") for shots in DIFFMIX_SHOTS},
    **{f"diffmix/sweep-gamma-{shots}": (18, 3, "table 6: six gammas by three strengths") for shots in ("5", "all")},
    **{f"diffmix/sweep-strategy-{shots}": (3, 3, "table 5: TI, DB, TI+DB") for shots in ("5", "all")},
    "diffmix/sweep-multiplier": (5, 1, "figure 7a: 2 to 10"),
    "diffmix/sweep-referable": (6, 6, "figure 7b; the values are ours"),
    **{f"diffmix/sweep-replace-{shots}": (5, 1, "ours") for shots in ("5", "all")},
    "realfake/sweep-in10-sampling": (24, 24, "ours"), "realfake/sweep-in10-mmd": (4, 4, "ours"),
    "realfake/sweep-in10-lora": (9, 9, "ours"), "realfake/sweep-in10-prompts": (9, 9, "ours"),
    "diffcoremix/sweep-mix": (23, 0, "ours: alpha does nothing without pixel mixes, the patch without patch mixes"),
    "diffcoremix/sweep-threshold": (5, 5, "ours")}

# The same of tables whose rows are the arms of a study; 0x is not counted, since it is the original.
ROWS: dict[str, tuple[int, str]] = {
    "distdiff/study-caltech101-augmentations": (14, "table 1: seven augmentations, original and expanded"),
    "distdiff/study-caltech101-backbones": (6, "table 3: three backbones, original and expanded"),
    "gif/study-cars-architectures": (9, "table 3: three architectures by three datasets"),
    "gif/study-organsmnist-guides": (4, "table 8: the original and three guides"),
    **{f"diffmix/study-cub-shots-{shots}": (7, "figure 6: the original and six generators") for shots in DIFFMIX_SHOTS},
    **{f"realfake/study-{data}-modules": (11, "table 2: ten rows, and the real images") for data in ("in10", "in100")},
    "diffcoremix/study-shares": (11, "figure 7: 10 to 100 %, and the original"),
    "diffcoremix/study-mixing": (11, "table 7: eight rows; three are ours")}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_sweep_of_a_paper_is_here() -> None:
    assert {str(path.relative_to(PAPERS).with_suffix("")) for path in PAPERS.rglob("sweep*.yaml")} == {*GRIDS}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.fast_cases(9)
def test_a_grid_has_as_many_trials_as_the_paper_has_values(name: str) -> None:
    trials, expansions, _ = GRIDS[name]
    config = load_sweep(PAPERS / f"{name}.yaml")
    found = count_of(config)

    assert (found.trials, found.classifiers, found.is_exact, found.refused) == (trials, trials * found.seeds, True, ())
    sets = found.expansions / expansions if expansions else 0
    assert sets in (1, found.seeds) if expansions else not found.expansions


@pytest.mark.parametrize("name", ["distdiff/sweep-rho", "gif/sweep-level-mae", "diffmix/sweep-replace-5",
                                  "realfake/sweep-in10-mmd", "diffcoremix/sweep-mix"])
@pytest.mark.fast_cases(2)
def test_a_grid_says_its_cost_without_the_dataset(name: str) -> None:
    found = plan_sweep(load_sweep(PAPERS / f"{name}.yaml"))

    assert found.sentence.startswith(f"{GRIDS[name][0]} trials")
    assert re.search(r"[\d,]+ epochs; [\d.,]+ to [\d.,]+ GPU hours", found.sentence)


@pytest.mark.parametrize("name", ROWS)
def test_a_table_of_arms_has_as_many_as_the_paper_has_rows(name: str) -> None:
    assert len(arms_of(load_study(PAPERS / f"{name}.yaml"))) == ROWS[name][0]


def test_the_page_of_papers_and_the_readme_of_its_folder_name_every_sweep() -> None:
    page = " ".join(_written_out(word) for word in (ROOT / "docs/papers.md").read_text().replace(";", " ").split())
    readmes = {folder: (PAPERS / folder / "README.md").read_text() for folder in {name.split("/")[0] for name in GRIDS}}
    for name in GRIDS:
        folder, _, file = name.partition("/")
        assert re.search(rf"\b{name}\.yaml", page), f"docs/papers.md: {name}"
        assert file in " ".join(_written_out(word) for word in readmes[folder].split()), f"README of {folder}: {file}"


def _written_out(word: str) -> str:
    """a-{b,c}: a-b a-c. A name of the table, `sweep-energy, -groups`, is written out in full there."""
    if (found := re.search(r"^(.*?)\{([^{}]*)\}(.*)$", word)) is None:
        return word
    before, names, after = found.groups()
    return " ".join(_written_out(f"{before}{one}{after}") for one in names.split(","))
