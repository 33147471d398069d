"""Prompts longer than the tokenizer takes are counted in plan, page and card, with one warning for a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayexpand import api
from rayexpand.reports.card import write_card
from rayexpand.reports.run import write_report
from rayexpand.runs import cut_prompts as module
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from rayexpand.runs.cut_prompts import cut_prompts
from tests.tiny import tiny_adapter, tiny_pipeline

LONG = "bird with a long tail and a red beak that sits on a green branch by the sea"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, one with a long name; a generator that reads 16 tokens."""
    root = tmp_path_factory.mktemp("world")
    for name, count in (("ant", 3), (LONG, 2)):
        (root / "data" / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((16, 16, 3), 10 * i, np.uint8)
            pixels[0] = 200
            Image.fromarray(pixels).save(root / "data" / name / f"{i}.png")
    tiny_pipeline(root / "model")
    return root


def raw(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    method = {"name": "text2img", "ratio": 2, "prompt": "a {name}", "steps": 3, **changes.pop("method", {})}
    return {"name": "run", "out": str(out), "data": {"source": "imagefolder", "path": str(world / "data")},
            "prior": {"weights": str(world / "model")}, "method": method, **changes}


def test_plan_page_and_card_count_them_and_the_run_warns_once(world: Path, tmp_path: Path,
                                                              caplog: pytest.LogCaptureFixture) -> None:
    from transformers import CLIPTokenizer

    planned = api.plan(raw(world, tmp_path))
    tokens = CLIPTokenizer.from_pretrained(world / "model", subfolder="tokenizer")(f"a {LONG}").input_ids
    found = planned.estimate.cut_prompts
    assert (found.rows, found.cut, found.tokens, found.longest, found.example) == (10, 4, 16, len(tokens), f"a {LONG}")
    assert ("prompts cut", "4 of 10") in [line[:2] for line in planned.table()[1]]

    with caplog.at_level(logging.WARNING):
        run = runs.prepare(parse(raw(world, tmp_path)))
        expander = runs.start(run)
        runs.drive(run, runs.in_process(expander), lambda: runs.pending_jobs(run))
        expander.close()
    assert [one.getMessage() for one in caplog.records if "tokens" in one.getMessage()] == [found.words]
    assert "4 of 10 prompts have more than the 16 tokens" in found.words
    for page in (write_report(run.folder), write_card(run.folder)):
        text = Path(str(page)).read_text()
        assert "4 of 10 prompts have more than the 16 tokens" in text


def test_short_prompts_are_said_nowhere(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = parse(raw(world, tmp_path, method={"prompt": "a"}))
    with caplog.at_level(logging.WARNING):
        run = runs.prepare(config)
    assert "cut_prompts" not in run.facts
    assert caplog.text == ""
    assert "Prompts are cut" not in Path(str(write_card(run.folder))).read_text()
    assert "prompts cut" not in str(api.plan(raw(world, tmp_path, method={"prompt": "a"})).table())


def test_negatives_count_and_class_tokens_are_one_token(world: Path, tmp_path: Path) -> None:
    def count(**changes: Any) -> int:
        config = parse(raw(world, tmp_path, **changes))
        from rayexpand.data import seeds
        from rayexpand.runs.plan import make_plan

        found = cut_prompts(make_plan(seeds.build_index(config.data), config), config, world / "model")
        assert found is not None
        return found.cut

    assert count(method={"prompt": "a", "negative": LONG}) == 10
    adapter = tiny_adapter(tmp_path / "adapter", world / "model", ("ant", LONG), strategy="ti")
    words = {"prompt": "a photo of a photo of a {token}"}
    assert count(method=words, artifacts={"adapter": str(adapter)}) == 0


def test_a_large_plan_is_looked_at_in_parts(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 4)
    found = api.plan(raw(world, tmp_path)).estimate.cut_prompts
    assert (found.rows, found.cut) == (4, 2)


