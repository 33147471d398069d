"""Known copies: what is done to a seed, and what is loaded for those that a generator makes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rayexpand import methods
from rayexpand.evaluation.known_copies import EDITS, STRENGTHS, drawing, edited, has_img2img
from tests.commands import ROOT
from tests.conftest import MakeConfig

IMAGE = np.random.Generator(np.random.Philox(key=3)).integers(0, 200, (20, 30, 3), dtype=np.uint8)
WITH_DEFAULTS = ("dafusion", "diffcoremix", "diffmix", "distdiff", "gif", "img2img", "lecf", "practice", "realfake",
                 "text2img", "vae")


def test_edits() -> None:
    found = {kind: edited(kind, IMAGE) for kind in EDITS}

    assert found["crop_80"].shape == (16, 24, 3)
    np.testing.assert_array_equal(found["crop_80"], IMAGE[2:18, 3:27])
    np.testing.assert_array_equal(found["exact"], IMAGE)
    np.testing.assert_array_equal(found["flip"], IMAGE[:, ::-1])
    np.testing.assert_allclose(found["brightness_1.2"], 1.2 * IMAGE, atol=1)
    assert 0 < np.abs(found["jpeg_75"].astype(int) - IMAGE).mean() < 40
    assert found["blur_1"].std() < 0.6 * IMAGE.std()


@pytest.mark.parametrize("name", WITH_DEFAULTS)
def test_copies_by_the_generator_of_any_run_load_nothing_else(name: str, make_config: MakeConfig) -> None:
    """Guides, prototypes and judges of the run stay where they are."""
    method = methods.load_method(name, {})
    config = make_config("img2img").model_copy(update={"method": method, "artifacts": {
        "prototypes": "there", "adapter": "somewhere"}})
    run: Any = SimpleNamespace(config=config, sampling=config, facts={"models": {"prior": "0"}})
    drawn = drawing(run)

    assert drawn.needs == {"prior"}
    assert (drawn.method.strength, drawn.prior) == (STRENGTHS["img2img_0.1"], config.prior)
    run.facts["models"]["adapter"] = "1"
    assert drawing(run).needs == {"prior", "adapter"}


def test_only_generators_that_start_from_an_image_make_them(make_config: MakeConfig) -> None:
    assert has_img2img(make_config("img2img"))
    assert not has_img2img(make_config("classical"))


def test_every_method_with_a_generator_is_tried() -> None:
    files = {Path(one).stem for one in (ROOT / "rayexpand/methods").glob("[a-z]*.py")}

    assert files - {"classical", "realguidance"} == set(WITH_DEFAULTS)
