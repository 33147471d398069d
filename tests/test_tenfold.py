"""The tables of ten times ImageNet in docs/cluster.md are what their command prints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rayexpand.runs.config import load
from rayexpand.runs.plan import MAX_SHARDS, shards_of
from tests.benchmarks import tenfold

PAGE = Path(__file__).parents[1] / "docs" / "cluster.md"
ROWS = {line.split("`")[1]: line for line in PAGE.read_text().splitlines()
        if line.startswith(("| `expand-", "| `fit-"))}
QUICK = ("expand-gif-mae", "fit-realfake")


def test_every_file_has_a_row() -> None:
    assert {*ROWS} == {file.stem for file in [*tenfold.expand_files(), *tenfold.fit_files()]}


@pytest.mark.parametrize("file", tenfold.expand_files(), ids=lambda file: file.stem)
def test_a_run_of_this_size_is_not_refused(file: Path) -> None:
    images = load(file, [*tenfold.TOLD, "method.ratio=10"]).sampler.shard_images
    assert int(shards_of(np.full(1_281_167, 10, np.uint16), images)[-1]) < MAX_SHARDS


@pytest.mark.parametrize("file", [
    pytest.param(file, id=file.stem, marks=[] if file.stem in QUICK else [pytest.mark.slow])
    for file in [*tenfold.expand_files(), *tenfold.fit_files()]])
def test_a_row_is_what_plan_says(file: Path) -> None:
    row = tenfold.expand_row if file.stem.startswith("expand") else tenfold.fit_row
    assert ROWS[file.stem] == row(file)
