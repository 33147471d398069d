from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.contract.errors import ConfigError, SeedDataError
from rayexpand.contract.schema import DATA_SCHEMA, Reason, samples_to_arrow
from rayexpand.data.seeds import digits_split
from rayexpand.runs import config
from rayexpand.runs.amounts import Measured, human_bytes, measure
from rayexpand.runs.estimate import Estimate, estimate, estimate_config
from rayexpand.runs.fleet_hours import SHARD_S, SPREAD
from rayexpand.runs.plan import MAX_SHARDS
from rayexpand.runs.status import view_run
from rayexpand.storage.tables import parquet_bytes
from tests.runfolder import Builder, png


def job(**fields: Any) -> config.RunConfig:
    return config.parse({"name": "job", "data": {"source": "digits"}, "method": {"name": "img2img"}, **fields})


def test_no_throughput_is_unknown_and_says_what_to_do() -> None:
    guess = estimate(job(), seeds=20, planned=100)
    assert (guess.gpu_hours, guess.wall_hours, guess.cost_usd, guess.expected_lost_hours) == (None,) * 4
    lines = {label: (value, note) for label, value, note in guess.table()}
    assert lines["throughput"][0] == "unknown"
    assert "--set estimate.images_per_second=" in lines["throughput"][1]
    assert lines["images"][0] == "100"


def test_given_throughput_against_the_closed_form() -> None:
    settings = {"images_per_second": 2.0, "gpus": 8, "gpu_hour_usd": 3.0, "preemptions_per_gpu_hour": 0.1}
    guess = estimate(job(estimate=settings, sampler={"shard_images": 720}), seeds=72_000, planned=720_000)
    assert guess.shards == 1000
    assert guess.gpu_hours == pytest.approx(100)
    lost = 0.1 * 100 * 0.1 / 2  # losses an hour, of half a shard of 0.1 h each, to first order
    assert guess.expected_lost_hours == pytest.approx(lost, rel=0.5)
    assert guess.wall_hours == pytest.approx((100 + lost + 0.5) / 8, rel=0.03)  # 3 minutes for each of some ten starts
    assert guess.wall_hours < guess.wall_hours_95 < 1.1 * guess.wall_hours
    assert guess.cost_usd == pytest.approx(3 * (100 + guess.expected_lost_hours + guess.waiting_hours), rel=0.01)


def test_a_fleet_without_losses_against_the_closed_form() -> None:
    settings = {"images_per_second": 1.0, "gpus": 4, "gpu_hour_usd": 3.0, "preemptions_per_gpu_hour": 0,
                "node_start_s": 90, "load_s": 30}
    guess = estimate(job(estimate=settings, sampler={"shard_images": 100}), seeds=4000, planned=4000)
    least = 120 + 10 * (100 + SHARD_S)  # forty shards, ten for each GPU
    assert least <= 3600 * guess.wall_hours <= least + 2 * SPREAD * 100
    assert (guess.expected_lost_hours, guess.wall_hours_95) == (0, guess.wall_hours)


def test_a_shard_size_that_ends_sooner_is_named() -> None:
    """Four shards of an hour on 64 GPUs leave sixty without work."""
    settings = {"images_per_second": 1.0, "gpus": 64, "preemptions_per_gpu_hour": 0.05}
    large = estimate(job(estimate=settings, sampler={"shard_images": 3600}), seeds=14_400, planned=14_400)
    assert "with sampler.shard_images=225 it would end after" in large.notes["shards"]
    fine = estimate(job(estimate=settings, sampler={"shard_images": 225}), seeds=14_400, planned=14_400)
    assert "it would end" not in fine.notes["shards"]
    many = estimate(job(estimate=settings, sampler={"shard_images": 1000}), seeds=13_000_000, planned=13_000_000)
    assert many.best_shard_images is not None
    assert 13_000_000 / many.best_shard_images <= MAX_SHARDS, "a plan of more shards is refused"
    refused = estimate(job(sampler={"shard_images": 250}), seeds=1_300_000, planned=13_000_000)
    assert "refused, so set sampler.shard_images to at least 260" in refused.notes["shards"]


@pytest.mark.parametrize(("fields", "unit"), [
    ({"method": {"name": "classical"}}, "CPU process"),
    ({"data": {"source": "digits"}}, "CPU process"),
    ({"prior": {"weights": "models/sd15", "device": "cpu"}}, "CPU process"),
    ({"prior": {"weights": "models/sd15"}, "cluster": {"gpus_per_actor": 0}}, "CPU process"),
    ({"prior": {"weights": "models/sd15"}}, "GPU")])
def test_work_without_a_gpu_is_planned_in_processes(fields: dict[str, Any], unit: str) -> None:
    made = estimate(job(**fields, estimate={"images_per_second": 2, "gpus": 4, "gpu_hour_usd": 1.5}),
                    seeds=10, planned=14_400)
    lines = "\n".join(" ".join(line) for line in made.table())

    assert (made.unit, made.to_json()["unit"]) == (unit, unit)
    assert f"2 per s and {unit}" in lines
    assert f"with 4 {unit}{'es' if unit != 'GPU' else 's'} (estimate.gpus)" in lines
    assert ("GPU " in lines) == (unit == "GPU")


def test_shards_too_long_for_the_preemption_rate_never_end() -> None:
    settings = {"images_per_second": 0.01, "preemptions_per_gpu_hour": 2.0, "gpu_hour_usd": 1.0}
    guess = estimate(job(estimate=settings), seeds=100, planned=1000)
    assert math.isinf(guess.expected_lost_hours or 0)
    assert ("wall time", "never ends") in [(label, value) for label, value, _ in guess.table()]


def test_the_configuration_wins_over_an_earlier_run() -> None:
    earlier = Measured(images_per_second=5.0, bytes_per_image=1000.0)
    assert estimate(job(), seeds=1, planned=10, measured=earlier).images_per_second == 5.0
    given = job(estimate={"images_per_second": 7.0, "bytes_per_image": 2000})
    guess = estimate(given, seeds=1, planned=10, measured=earlier)
    assert guess.images_per_second == 7.0
    assert guess.bytes == 10 * 2040


@pytest.mark.parametrize(("fields", "codec", "side"), [
    ({}, "png", 16),
    ({"image": {"size": 64}}, "png", 64),
    ({"image": {"size": 65}}, "jpeg", 65),
    ({"prior": {"weights": "some/model@main"}}, "jpeg", 512),
    ({"image": {"size": 256}, "codec": {"format": "png"}}, "png", 256),
])
def test_bytes_follow_codec_and_size(fields: dict[str, Any], codec: str, side: int) -> None:
    guess = estimate(job(**fields), seeds=10, planned=1000)
    assert guess.bytes == pytest.approx(1000 * (40 + {"png": 2.3, "jpeg": 0.65}[codec] * side**2), abs=1)
    assert codec in guess.notes["bytes"]


def test_unknown_size_is_unknown_bytes() -> None:
    keeps = job(method={"name": "classical"}, data={"source": "imagefolder", "path": "seeds"})
    assert estimate(keeps, seeds=10, planned=20).bytes is None
    assert estimate(keeps, seeds=10, planned=20, side=32).bytes is not None


def plan_of(tmp_path: Path, weights: str = "some/model@main", **fields: Any) -> Estimate:
    """A plan of 100 seeds that are not here, by img2img."""
    return estimate_config(job(**{
        "data": {"source": "imagefolder", "path": str(tmp_path / "gone")}, "prior": {"weights": weights},
        "image": {"size": 512}, **fields, "estimate": {"seeds": 100, **fields.get("estimate", {})},
        "method": {"name": "img2img", "steps": 50, "strength": 0.5, "ratio": 10, **fields.get("method", {})}}))


def lines_of(made: Estimate) -> dict[str, tuple[str, str]]:
    return {label: (value, note) for label, value, note in made.table()}


def test_counted_work_follows_steps_guidance_and_size(tmp_path: Path) -> None:
    encoded = 1.117 * (1 / 10 + 9 / 10 / 64)  # once for the copies of a seed in a call
    assert plan_of(tmp_path).petaflop == pytest.approx(42.68 + encoded, rel=1e-3)  # 1,000 images, 25 guided steps
    assert plan_of(tmp_path, method={"steps": 100}).petaflop == pytest.approx(2 * 50 * 0.8033 + 2.514 + encoded,
                                                                              rel=1e-3)
    assert plan_of(tmp_path, method={"guidance_scale": 1}).petaflop == pytest.approx(25 * 0.8033 + 2.514 + encoded,
                                                                                     rel=1e-3)
    large = plan_of(tmp_path, "a/sdxl", image={"size": None}).petaflop
    assert large == pytest.approx(50 * 6.761 + 10.47 + 4.88 * encoded / 1.117, rel=1e-3)
    assert plan_of(tmp_path, "digits").petaflop is None
    assert "arithmetic" not in lines_of(plan_of(tmp_path, "digits"))


def test_every_hour_names_its_source(tmp_path: Path) -> None:
    """Given, measured, or an interval of shares of a peak that is named; never a number without a reason."""
    made = plan_of(tmp_path, "a/sdxl", estimate={"gpus": 4, "gpu_hour_usd": 2})
    lines = lines_of(made)
    assert made.interval is not None
    slow, fast = made.interval
    assert (made.images_per_second, made.gpu_hours, made.wall_hours, made.cost_usd) == (None,) * 4
    assert slow.images_per_second == pytest.approx(0.3 * 312e12 / (made.petaflop * 1e15 / 1000))
    assert (slow.gpu_hours, fast.gpu_hours) == pytest.approx([1000 / 3600 / one.images_per_second
                                                              for one in made.interval])
    assert slow.gpu_hours / fast.gpu_hours == pytest.approx(5 / 3)
    assert slow.wall_hours > slow.gpu_hours / 4
    paid = slow.gpu_hours + slow.expected_lost_hours + slow.waiting_hours
    assert slow.cost_usd == pytest.approx(2 * paid, rel=0.01)
    value, note = lines["GPU time"]
    assert value == f"{fast.gpu_hours:.3g} to {slow.gpu_hours:.3g} h"
    assert "30 to 50 % (estimate.peak_share, an assumption) of 312 TFLOP/s" in note
    assert "A100" in note
    assert "rayexpand bench" in lines["throughput"][1]
    assert " to " in lines["wall time"][0]
    assert " to " in lines["cost"][0]
    assert "Stable Diffusion XL (by its name) at 512 px" in lines["arithmetic"][1]


    cases: list[tuple[dict[str, Any], str]] = [
        ({"estimate": {"images_per_second": 3}}, "given by estimate.images_per_second"),
        ({"estimate": {"peak_share": [0.4, 0.4], "peak_tflops": 989}}, "at 40 % (estimate.peak_share"),
        ({"prior": {"weights": "a/sdxl", "dtype": "float32"}}, "of 19.5 TFLOP/s")]
    for said, expected in cases:
        assert expected in lines_of(plan_of(tmp_path, **said))["GPU time"][1]
    same = plan_of(tmp_path, estimate={"peak_share": [0.4, 0.4]})
    assert " to " not in lines_of(same)["GPU time"][0]
    measured = estimate(job(), seeds=1, planned=10, measured=Measured(2.0, None, "`rayexpand bench` (x.bench.json)"))
    assert lines_of(measured)["CPU process time"][1] == "measured by `rayexpand bench` (x.bench.json)"


def test_no_peak_is_assumed_where_no_gpu_works(tmp_path: Path) -> None:
    made = plan_of(tmp_path, prior={"weights": "a/sdxl", "device": "cpu"})
    assert (made.interval, lines_of(made)["CPU process time"]) == (None, ("unknown", "needs a throughput"))
    assert made.petaflop is not None


def test_networks_that_nobody_counted_are_unknown(tmp_path: Path) -> None:
    for part in ("unet", "vae"):
        (tmp_path / "model" / part).mkdir(parents=True)
        (tmp_path / "model" / part / "config.json").write_text('{"block_out_channels": [8, 16]}')
    made = plan_of(tmp_path, str(tmp_path / "model"))
    assert (made.petaflop, made.interval) == (None, None)
    assert "bench" in lines_of(made)["arithmetic"][1]
    assert lines_of(made)["GPU time"] == ("unknown", "needs a throughput")


@pytest.mark.parametrize("share", [[0.5, 0.3], [0, 0.5], [0.3, 1.2], [0.3]])
def test_a_share_is_a_range(share: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"estimate\.peak_share"):
        job(estimate={"peak_share": share})


def test_shares_and_peaks_of_before_leave_a_configuration_as_it_was() -> None:
    assert not {"peak_share", "peak_tflops"} & config.resolved(job())["estimate"].keys()
    assert config.parse(config.resolved(job(estimate={"peak_share": [0.1, 0.2]}))).estimate.peak_share == (0.1, 0.2)


def test_an_interval_may_never_end_on_its_slow_side(tmp_path: Path) -> None:
    made = plan_of(tmp_path, estimate={"preemptions_per_gpu_hour": 40, "peak_share": [0.02, 1]})
    assert lines_of(made)["wall time"][0].endswith(" h or never ends")
    assert json.loads(json.dumps(made.to_json(), allow_nan=False))["interval"][0]["wall_hours"] is None


def test_measured_from_receipts(tmp_path: Path) -> None:
    run = Builder(tmp_path / "run", shards=2, seeds_per_shard=4, copies=5).start()
    for shard in range(2):
        run.commit(shard, run.samples(shard, {0: (Reason.NAN_LATENT, "")}), seconds={"total": 10.0})
    seen = measure(view_run(run.folder).receipts, 3800)
    assert seen == Measured(images_per_second=2.0, bytes_per_image=100.0)
    run.commit(0, run.samples(0)[:1], generation=1, seconds={"total": 50.0})
    again = measure(view_run(run.folder).receipts, 0)
    assert again.images_per_second == seen.images_per_second, "a retry is no measure"
    assert measure([], 0) == Measured(None, None)


def test_byte_constants_fit_a_real_file() -> None:
    samples = Builder(Path("run"), shards=1, seeds_per_shard=100, copies=10).samples(0)
    samples = [replace(s, image=png(x)) for s, x in zip(samples, digits_split()["pool"][0], strict=True)]
    size = len(parquet_bytes(samples_to_arrow(samples, DATA_SCHEMA), {}))
    assert estimate(job(), seeds=100, planned=1000).bytes == pytest.approx(size, rel=0.1)


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (None, 999, 12_300_000, 1_500_000_000_000)] == [
        "unknown", "999 bytes", "12.3 MB", "1.5 TB"]


def test_a_configuration_with_its_seeds_here() -> None:
    guess = estimate_config(job(data={"source": "digits", "per_class": 2}, method={"name": "img2img", "ratio": 2.5}))
    assert (guess.seeds, guess.images) == (20, 50)
    keeps = job(data={"source": "digits", "per_class": 2}, method={"name": "classical", "ratio": 2})
    assert "16 px" in estimate_config(keeps).notes["bytes"]


def test_the_size_is_measured_where_images_keep_theirs(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(np.zeros((20, 45, 3), np.uint8)))
    (tmp_path / "a" / "2.png").write_bytes(b"broken")
    keeps = job(data={"source": "imagefolder", "path": str(tmp_path)}, method={"name": "classical"})
    assert "png, 30 px (mean of a few seeds)" in estimate_config(keeps).notes["bytes"]


def test_a_plan_says_what_one_process_may_hold(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.Philox(key=1))
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.png").write_bytes(png(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)))
    fields: dict[str, Any] = {"data": {"source": "imagefolder", "path": str(tmp_path)},
                              "method": {"name": "classical", "ratio": 5}, "sampler": {"shard_images": 10},
                              "estimate": {"bytes_per_image": 10_000}}
    encoded = 2 * 10 * (10_000 + 40) + 2 * (tmp_path / "a/0.png").stat().st_size  # 2 shards of 2 seeds

    few = estimate_config(job(**fields, runtime={"image_bytes": 500_000}))
    assert few.process_bytes == pytest.approx(500_000 + encoded, rel=0.01)
    assert ("one process", human_bytes(few.process_bytes)) in [line[:2] for line in few.table()]
    tiny = estimate_config(job(**fields, runtime={"image_bytes": 1}))
    assert tiny.process_bytes == pytest.approx(2 * 30_000 + encoded, rel=0.01)  # one image goes through
    most = estimate_config(job(**fields))  # no more than there is: three calls, and the samples of a shard
    assert most.process_bytes == pytest.approx((3 * 64 + 10) * 30_000 + encoded, rel=0.01)
    whole = estimate_config(job(**{**fields, "method": {"name": "img2img", "ratio": 5}}, runtime={"image_bytes": 1}))
    assert whole.process_bytes == pytest.approx(2 * 64 * 16 * 16 * 3 + encoded, rel=0.01)  # calls of models stay whole
    assert "decoded" in few.notes["process_bytes"]


def test_seeds_that_are_not_here(tmp_path: Path) -> None:
    data = {"source": "imagefolder", "path": str(tmp_path / "imagenet")}
    guess = estimate_config(job(data=data, estimate={"seeds": 1000}, method={"name": "img2img", "ratio": 10}))
    assert (guess.seeds, guess.images) == (1000, 10_000)
    with pytest.raises(SeedDataError):
        estimate_config(job(data=data))
    with pytest.raises(SeedDataError):  # how many classes there are, nobody knows
        estimate_config(job(data=data, estimate={"seeds": 1000}, method={"name": "img2img", "quota": 10}))


@pytest.mark.parametrize("fields", [{}, {"targets": "balanced"}, {"variant": "real_gen"}, {"prompt": "{noun}"}])
def test_a_plan_that_asks_for_words_and_counts_of_classes_that_are_not_here(tmp_path: Path,
                                                                            fields: dict[str, Any]) -> None:
    data = {"source": "imagefolder", "path": str(tmp_path / "imagenet")}
    guess = estimate_config(job(data=data, estimate={"seeds": 1000}, method={"name": "diffmix", **fields}))
    assert guess.images == 5000
    with pytest.raises(SeedDataError):  # what is missing of which class, nobody knows
        estimate_config(job(data=data, estimate={"seeds": 1000}, method={"name": "diffmix", "targets": "fill"}))


def test_a_plan_of_a_few_rows() -> None:
    method = {"name": "diffmix", "ratio": 0.3, "targets": "balanced", "prompt": "{token}"}
    assert estimate_config(job(data={"source": "digits", "per_class": 1}, method=method)).images == 3


def test_json_is_plain() -> None:
    endless = job(estimate={"images_per_second": 0.01, "preemptions_per_gpu_hour": 2.0})
    text = json.dumps(estimate(endless, seeds=100, planned=1000).to_json(), allow_nan=False)
    assert json.loads(text)["expected_lost_hours"] is None


def test_needs_no_torch() -> None:
    script = ("import sys\nfrom rayexpand.runs import config\nfrom rayexpand.runs.estimate import estimate_config\n"
              "c = config.parse({'name': 'a', 'data': {'source': 'imagefolder', 'path': 'gone'}, 'estimate': "
              "{'seeds': 5000}, 'method': {'name': 'img2img'}, 'prior': {'weights': 'some/model@main'}, "
              "'image': {'size': 512}})\nassert estimate_config(c).images == 25_000\n"
              "assert not {'torch', 'diffusers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)
