from __future__ import annotations

import json

import pytest

from rayexpand.api import Event
from rayexpand.cli.progress import Progress


def test_without_a_terminal_each_task_ends_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        for done in (0, 250, 400):
            progress(Event("expanding birds", done, 400, {"kept": done}, rate=0.0123))
        progress(Event("training birds", 0, 2))
        progress(Event("training birds", 1, 2))

    assert capsys.readouterr().err.splitlines() == [
        "expanding birds: 0/400, 0.0123 images/s, 32,520 s left, 0 kept",
        "expanding birds: 400/400, 0.0123 images/s, 400 kept",
        "training birds: 0/2", "training birds: 1/2"]


def test_a_rate_that_is_said_is_not_counted_again(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(as_json=True) as progress:
        for rate in (0.0, 1499.25):
            progress(Event("expanding birds", 400, 400, rate=rate))

    before, after = map(json.loads, capsys.readouterr().err.splitlines())
    assert (before["per_second"], before["eta_seconds"]) == (None, None)
    assert (after["per_second"], after["eta_seconds"]) == (1499.25, 0)


@pytest.mark.parametrize(("again", "total"), [(20, 160), (20, 200), (150, 150)], ids=["fewer", "more", "as many"])
def test_a_task_of_a_name_that_ended_has_a_rate_of_its_own(again: int, total: int, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr("rayexpand.cli.progress.time.monotonic", lambda: now)
    with Progress() as progress:
        for seconds, done, of in ((0.0, 10, 150), (100.0, 150, 150), (200.0, again, total), (210.0, total, total)):
            now = seconds
            progress(Event("latents", done, of))
            progress(Event("fine-tuning", 0, 9))

    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latents")]
    rate = (total - again) / 10
    assert said == ["latents: 10/150", "latents: 150/150, 1.4/s", f"latents: {again}/{total}",
                    f"latents: {total}/{total}" + (f", {rate:g}/s" if rate else "")]
