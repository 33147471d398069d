"""A run by each family of generators, killed and finished: it has the samples of one that nothing stopped.

Each family and each method of a generator is in one pair at least, with the settings of tests/methods/test_families.py.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayexpand.fitting.config import parse_fit
from rayexpand.fitting.fit import fit
from tests.chaos.test_kill import exit_code, in_child, run_command
from tests.conftest import complete, hashes, small_run
from tests.methods.test_families import METHODS, SAMPLED, method_for
from tests.tiny import tiny_clip

PAIRS = [("sd", "realguidance"), ("sd2v", "lecf"), ("sdzsnr", "text2img"), ("sdturbo", "img2img"), ("lcm", "diffmix"),
         ("sdxl", "distdiff"), ("sdxlturbo", "gif"), ("lightning", "text2img"), ("hyper", "realfake"),
         ("cosxl", "img2img"), ("playground", "img2img")]

pytestmark = pytest.mark.chaos


def test_each_family_and_each_method_is_there() -> None:
    assert {family for family, _ in PAIRS} == set(SAMPLED)
    assert {method for _, method in PAIRS} == set(METHODS)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    tiny_clip(folder)
    return folder


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_killed_and_run_again(family: str, name: str, guide: Path, image_folder: Path, tmp_path: Path,
                              family_folder: Callable[[str], Path]) -> None:
    sections: dict[str, Any] = {"prior": {"weights": str(family_folder(family)), "device": "cpu"},
                                "image": {"size": 32, "fit": "squash"}, "guide": {"weights": str(guide)}}
    data = {"source": "imagefolder", "path": str(image_folder), "per_class": 1}
    if name == "distdiff":
        fit_prototypes = parse_fit({"name": "fit", "out": str(tmp_path / "artifacts"), "data": data,
                                    "guide": sections["guide"], "fit": {"prototypes": {"groups": 1}}})
        made = fit(fit_prototypes, lambda *_: None)
        sections["artifacts"] = {"prototypes": str(made["prototypes"])}
    fields = method_for(name, family).model_dump(exclude={"name"})  # type: ignore[attr-defined]

    def config(out: str) -> Any:
        return small_run(Path(), tmp_path / out, name, batch=2, shard_images=2, data=data, sections=sections,
                         **{**fields, "ratio": 2})

    whole, _ = complete(config("whole"))
    child = in_child(run_command, config("killed"), failpoint="after_data_link@shard=1:kill")
    assert exit_code(child) == -signal.SIGKILL
    resumed, totals = complete(config("killed"))
    assert (totals.kept, totals.failed) == (whole.plan.planned, 0)
    assert hashes(resumed) == hashes(whole)
    assert resumed.facts["sampler_revision"] == 2
