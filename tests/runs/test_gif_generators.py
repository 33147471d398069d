"""What a run of GIF with a generator that follows no prompt is told before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from rayexpand.contract.errors import ConfigError
from rayexpand.fitting.config import parse_fit
from rayexpand.fitting.config import preflight as preflight_fit
from rayexpand.models.guide_files import save_clip_head
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse, resolved, semantic
from rayexpand.runs.estimate import estimate_config
from rayexpand.runs.inputs import check_space
from tests.conftest import complete, small_run
from tests.models.gif_priors import tiny_mae, tiny_unclip
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_mae(folder / "mae")
    tiny_unclip(folder / "unclip", tiny_clip(folder / "guide"))
    tiny_clip(folder / "other", seed=1)
    return folder


@pytest.fixture
def config(root: Path, image_folder: Path, tmp_path: Path) -> Any:
    def made(prior: str, guide: str = "guide", name: str = "gif", **fields: Any) -> Any:
        return small_run(image_folder, tmp_path / "out", name, sections={
            "prior": {"weights": str(root / prior), "device": "cpu"},
            "guide": {"weights": str(root / guide)}}, **fields)

    return made


def test_a_sound_run_of_each(config: Any) -> None:
    for generator, more in (("mae", {}), ("unclip", {"steps": 3})):  # 2 would not begin as noise
        job = config(generator, generator=generator, ratio=2, **more)
        assert runs.preflight(job) == []
        assert parse(resolved(job)) == job
        assert "domains" not in semantic(job)["method"]
        run, totals = complete(job.model_copy(update={"name": generator}))
        assert totals.kept == run.plan.planned == 40
        assert "cut_prompts" not in run.facts
        assert estimate_config(job).cut_prompts is None


def test_the_guide_of_a_decoder_is_its_own_image_encoder(config: Any, root: Path) -> None:
    (problem,) = runs.preflight(config("unclip", "other", generator="unclip"))
    assert "guide.weights" in problem
    assert "sees images otherwise than the image encoder" in problem
    with pytest.raises(ConfigError, match="sees images otherwise"):
        runs.prepare(config("unclip", "other", generator="unclip"))
    assert check_space(config("unclip", "other", generator="unclip", guidance="none")) == []  # no guide is asked
    assert check_space(config("mae", "other", generator="mae")) == []
    embedded = parse({**resolved(config("unclip", generator="unclip")), "prior": {"weights": "digits-unclip"},
                      "guide": {"weights": "digits"}})
    assert check_space(embedded) == []


@pytest.mark.parametrize(("prior", "method", "words"), [
    ("mae", {"name": "img2img"}, "which follows no prompt, and img2img samples by prompts"),
    ("unclip", {"name": "text2img"}, "which follows no prompt, and text2img samples by prompts"),
    ("mae", {}, "method.generator: sd is for a latent diffusion model"),
    ("unclip", {"generator": "mae"}, "method.generator: mae is for a masked autoencoder")], ids=str)
def test_a_method_that_cannot_sample_it_is_refused_by_name(config: Any, prior: str, method: dict[str, Any],
                                                           words: str) -> None:
    problems = runs.preflight(config(prior, **method))
    assert any(words in one for one in problems), problems


def test_images_of_another_size_do_not_fit(root: Path, image_folder: Path, tmp_path: Path) -> None:
    job = small_run(image_folder, tmp_path, "gif", generator="mae", sections={
        "prior": {"weights": str(root / "mae")}, "guide": {"weights": str(root / "guide")}, "image": {"size": 32}})
    (problem,) = runs.preflight(job)
    assert "image.size: an image of 32 px does not fit" in problem


def test_neither_takes_an_adapter(config: Any, root: Path, tmp_path: Path) -> None:
    for prior, words in (("mae", "has no prompts to fine-tune"), ("unclip", "takes no adapter; set strategy: full")):
        raw = {"name": "a", "data": {"source": "digits"}, "prior": {"weights": str(root / prior)},
               "fit": {"adapter": {}}}
        assert words in "".join(preflight_fit(parse_fit(raw)))
        job = config(prior, generator=prior)
        named = parse({**resolved(job), "artifacts": {"adapter": str(tmp_path)}})
        assert any("artifacts.adapter: has no effect on gif" in one for one in runs.preflight(named))


def test_a_guide_with_a_head_is_asked_nothing(config: Any, root: Path) -> None:
    folder = root / "headed"
    folder.mkdir()
    model = open_clip.create_model(f"local-dir:{root / 'guide'}", require_pretrained=True)
    save_clip_head(folder, model, torch.zeros(4, 16), str(root / "guide"), ["ant", "bee", "cat", "dog"])
    asked = config("mae", "headed", generator="mae", guide_text="This is a photo of a {name}")
    assert any("method.guide_text: guide" in one and "is asked nothing" in one for one in runs.preflight(asked))
    assert runs.preflight(config("mae", "headed", generator="mae")) == []
