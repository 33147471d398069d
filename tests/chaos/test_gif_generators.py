"""A run of GIF-MAE and one of GIF-DALLE, killed and finished: it has the samples of one that nothing stopped."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.test_kill import exit_code, in_child, run_command
from tests.conftest import complete, hashes, small_run
from tests.models.gif_priors import tiny_mae, tiny_unclip
from tests.tiny import tiny_clip

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("failpoint", ["before_data@shard=1:kill", "after_data_link@shard=1:kill"])
@pytest.mark.parametrize("generator", ["mae", "unclip"])
def test_killed_and_run_again(generator: str, failpoint: str, image_folder: Path, tmp_path: Path) -> None:
    guide = tiny_clip(tmp_path / "guide")
    prior = tiny_mae(tmp_path / "prior") if generator == "mae" else tiny_unclip(tmp_path / "prior", guide)
    sections: dict[str, Any] = {"prior": {"weights": str(prior), "device": "cpu"}, "guide": {"weights": str(guide)}}
    fields = {"generator": generator, "ratio": 2, **({"steps": 3} if generator == "unclip" else {})}

    def config(out: str, batch: int = 4) -> Any:
        return small_run(image_folder, tmp_path / out, "gif", batch=batch, shard_images=4, sections=sections,
                         data={"source": "imagefolder", "path": str(image_folder), "per_class": 2}, **fields)

    whole, _ = complete(config("whole"))
    child = in_child(run_command, config("killed"), failpoint=failpoint)
    assert exit_code(child) == -signal.SIGKILL
    resumed, totals = complete(config("killed"))
    assert (totals.kept, totals.failed) == (whole.plan.planned, 0)
    assert hashes(resumed) == hashes(whole)
