"""The demo with its acceptance numbers. It trains classifiers for about 40 CPU seconds, beside the model if it is not
cached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayexpand import run as runs
from rayexpand.demo import ARMS
from rayexpand.priors import digits
from tests.conftest import hashes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run([sys.executable, "-m", "rayexpand", "demo", "--out", str(out), "--json"], cwd=ROOT,
                          check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout), out


def test_the_embedded_default_meets_its_gates() -> None:
    measured = json.loads((digits.ensure() / "measured.json").read_text())

    assert measured["zero_shot"] >= 0.90
    assert measured["psnr_upright_db"] >= 29
    assert measured["psnr_rotated_db"] >= 27
    assert measured["samples_named_right"] >= 0.95


def test_the_gain_is_there_and_its_controls_are_shown(shown: tuple[dict[str, Any], Path]) -> None:
    result, _ = shown
    means = {name: arm["mean"] for name, arm in result["arms"].items()}

    assert set(means) == set(ARMS)
    assert all(len(arm["accuracies"]) == 3 for arm in result["arms"].values())
    assert result["gain"] >= 0.05
    assert result["gain"] == pytest.approx(means["expanded"] - means["original"])
    assert means["expanded"] >= 0.88
    assert result["controls"]["guide zero-shot"] >= 0.90
    assert result["controls"]["empty-prompt expansion"] < means["expanded"]
    assert "does not show" in result["note"]


def test_its_report_is_one_file_with_the_table(shown: tuple[dict[str, Any], Path]) -> None:
    page = Path(shown[0]["report"]).read_text()

    assert all(arm in page for arm in ARMS)
    assert "guide zero-shot" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_the_same_run_again_gives_the_same_hashes(shown: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    _, out = shown
    first = runs.open_run(str(out / "expanded-1"))
    code = ("import sys\nfrom pathlib import Path\nfrom rayexpand import demo\n"
            "print(demo._expand(demo._config(Path(sys.argv[1]), 1, empty=False), None, lambda *progress: None)[1])")
    again = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True,
                           text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert again.stdout.strip() == "100"
    assert hashes(runs.open_run(str(tmp_path / "expanded-1"))) == hashes(first)
