from __future__ import annotations

import errno
import shutil
import weakref
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from rayexpand import __version__
from rayexpand.artifacts.columns import write_captions
from rayexpand.classifier.backbones import build_backbone
from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.errors import ConfigError, DigestMismatch, EnvironmentFault, OverBudget
from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.contract.schema import Draw, Start
from rayexpand.data.seeds import build_index
from rayexpand.fitting.fit import fit_for
from rayexpand.methods import method_class, names
from rayexpand.models.guide_files import save_classifier
from rayexpand.runs import run as runs
from rayexpand.runs.tools import stack_fingerprint
from rayexpand.runs.verify import verify
from tests.conftest import MakeConfig, attempts, complete, hashes, refused
from tests.methods import fakes
from tests.tiny import tiny_adapter, tiny_clip, tiny_pipeline

ROW = "bee/2.png/1"  # a sample of the image_folder fixture
BADS = ("ant/0.png/0", "ant/0.png/1", "bee/2.png/1", "cat/0.png/0", "dog/0.png/4", "dog/4.png/1")


def without_seed(image_folder: Path, tmp_path: Path) -> dict[str, str]:
    """The dataset with a seed that cannot be decoded."""
    broken = tmp_path / "broken"
    shutil.copytree(image_folder, broken)
    (broken / "bee/2.png").write_bytes(b"")
    return {"source": "imagefolder", "path": str(broken)}


def test_nothing_is_lost(make_config: MakeConfig) -> None:
    run, totals = complete(make_config("Fake", ratio=3))

    assert (totals.planned, totals.kept, totals.pending) == (60, 60, 0)
    assert len(hashes(run)) == 60
    for receipt in run.store.receipts():
        assert receipt.planned == receipt.kept + receipt.rejected + receipt.failed
        assert receipt.planned == run.plan.shard_rows(receipt.shard_id)


def test_the_same_samples_whatever_the_order_of_shards_and_processes(make_config: MakeConfig) -> None:
    reference = hashes(complete(make_config("Fake", ratio=3))[0])
    run = runs.prepare(make_config("Fake", ratio=3, name="other"))
    for shard in reversed(range(run.plan.n_shards)):
        expander = runs.start(run)  # each shard in a fresh one
        expander(shard)
        expander.close()

    assert hashes(run) == reference


def test_a_failed_seed_moves_no_other_byte(make_config: MakeConfig, image_folder: Path, tmp_path: Path) -> None:
    reference = hashes(complete(make_config("Fake", ratio=3))[0])
    broken = tmp_path / "broken"
    shutil.copytree(image_folder, broken)
    (broken / "bee/2.png").write_bytes(b"")
    data = {"source": "imagefolder", "path": str(broken)}
    run, totals = complete(make_config("Fake", ratio=3, name="broken", data=data))

    assert refused(run) == {f"bee/2.png/{copy}": "decode_error" for copy in range(3)}
    assert totals.failed == 3
    assert hashes(run) == {k: v for k, v in reference.items() if not k.startswith("bee/2.png")}


@pytest.mark.parametrize(("field", "reason"), [("bad", "sampler_error"), ("nan", "nan_latent"),
                                               ("constant", "constant_image")])
def test_one_bad_row_costs_itself_alone(make_config: MakeConfig, field: str, reason: str) -> None:
    reference = hashes(complete(make_config("Failing", ratio=2))[0])
    run, _ = complete(make_config("Failing", ratio=2, name="bad", **{field: ROW}))

    assert refused(run) == {ROW: reason}
    assert hashes(run) == {k: v for k, v in reference.items() if k != ROW}


def test_bisection_needs_few_calls(make_config: MakeConfig) -> None:
    config = make_config("Failing", ratio=2, bad=ROW, batch=32, shard_images=100)
    run = runs.prepare(config)
    expander = runs.start(run)
    sizes: list[int] = []
    sample = expander._sample

    def counted(work, call, alone=None):  # type: ignore[no-untyped-def]
        sizes.append(len(call.slots))
        return sample(work, call, alone)

    expander._sample = counted  # type: ignore[method-assign]
    receipt = expander(0)

    assert receipt.failed == 1
    assert set(sizes) == {32}, "every call has the planned shape"
    assert len(sizes) <= 2 + (2 * 5 + 1), "2 log2(32) + 1 extra calls"


def test_bisection_frees_what_the_failed_call_held(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    class Holding(fakes.Failing):
        def expand(self, batch: Batch, tools: Tools) -> Expansion:
            tensor = np.zeros(1000, np.float32)
            alive.append(sum(other() is not None for other in made))
            made.append(weakref.ref(tensor))
            return super().expand(batch, tools)

    monkeypatch.setattr(fakes, "Holding", Holding, raising=False)
    complete(make_config("Holding", ratio=2, bad=ROW, batch=32, shard_images=100))

    assert len(alive) > 5
    assert max(alive) == 0


@pytest.mark.parametrize("rows", [1000, 4])
def test_several_bad_rows_cost_themselves_alone(make_config: MakeConfig, rows: int) -> None:
    def config(name: str, **fields: Any):  # type: ignore[no-untyped-def]
        return make_config("ManyBad", ratio=2, batch=16, shard_images=17, name=name, **fields)

    reference = hashes(complete(config("clean"))[0])
    run, _ = complete(config("bad", bads=BADS, rows=rows))

    assert set(refused(run)) == set(BADS) & reference.keys()
    assert hashes(run) == {k: v for k, v in reference.items() if k not in BADS}


@pytest.mark.parametrize("rows", [1000, 5])
def test_a_group_is_refused_whole_and_never_split(make_config: MakeConfig, rows: int) -> None:
    def config(name: str, **fields: Any):  # type: ignore[no-untyped-def]
        return make_config("ManyBadGroups", ratio=5, batch=16, shard_images=17, name=name, **fields)

    reference = hashes(complete(config("clean"))[0])
    run, _ = complete(config("bad", bads=BADS, rows=rows))
    lost = {f"{seed}/{copy}" for seed in ("ant/0.png", "bee/2.png", "cat/0.png", "dog/4.png") for copy in (0, 1)}
    lost |= {f"dog/0.png/{copy}" for copy in (2, 3, 4)}

    assert set(refused(run)) == lost
    assert hashes(run) == {k: v for k, v in reference.items() if k not in lost}
    assert verify(run, pixels=True).problems == []


@pytest.mark.parametrize("mode", ["gray", "int"])
def test_a_picture_of_another_kind_costs_its_row_alone(make_config: MakeConfig, mode: str) -> None:
    reference = hashes(complete(make_config("OddPicture"))[0])
    run, _ = complete(make_config("OddPicture", bad=ROW, mode=mode, name="odd"))

    assert refused(run) == {ROW: "sampler_error"}
    assert hashes(run) == {k: v for k, v in reference.items() if k != ROW}


def test_a_sampler_that_always_fails_commits_nothing(make_config: MakeConfig) -> None:
    run = runs.prepare(make_config("BrokenAfterFirst", ratio=2))
    expander = runs.start(run)

    with pytest.raises(EnvironmentFault, match=r"no shard was committed in 3 rounds.*fails even on a call of fillers"):
        runs.drive(run, runs.in_process(expander), lambda: [job for job in runs.pending_jobs(run) if job[0]])
    assert all(receipt.failed == 0 for receipt in run.store.receipts())


def test_out_of_memory_halves_the_shape_and_loses_no_row(make_config: MakeConfig) -> None:
    small = hashes(complete(make_config("Capacity", ratio=2, batch=4, rows=4))[0])
    run, totals = complete(make_config("Capacity", ratio=2, batch=16, rows=4, name="capacity"))

    assert totals.kept == 40
    assert hashes(run) == small
    assert {tuple(receipt.shape) for receipt in run.store.receipts()} == {(4,)}


def test_out_of_memory_halves_the_pieces_of_a_method_before_the_call(make_config: MakeConfig,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, int | None, int | None]] = []

    class Pieces(fakes.Fake):
        PIECES: ClassVar = ("gradient", "forward")
        name: str = "tests.methods.fakes.Pieces"
        gradient: int | None = None
        forward: int | None = 4
        room: int = 5  # rows: what the pieces hold together with the call

        def expand(self, batch: Batch, tools: Tools) -> Expansion:
            import torch

            tried.append((len(batch), self.gradient, self.forward))
            held = [min(piece or len(batch), len(batch)) for piece in (self.gradient, self.forward)]
            if len(batch) + sum(held) > self.room:
                raise torch.OutOfMemoryError("too much")
            return super().expand(batch, tools)

    monkeypatch.setattr(fakes, "Pieces", Pieces, raising=False)
    run, totals = complete(make_config("Pieces", ratio=1, batch=8))

    assert totals.kept == 20
    assert list(dict.fromkeys(tried)) == [(8, None, 4), (8, 4, 4), (8, 2, 4), (8, 1, 4), (8, 1, 2), (8, 1, 1),
                                          (4, 1, 1), (2, 1, 1)]
    assert [receipt.shape for receipt in run.store.receipts()] == [[2, 1, 1]] * run.plan.n_shards
    tried.clear()
    runs.start(run).regenerate("bee/2.png/0")
    assert tried == [(2, 1, 1)], "regen repeats the shape of the receipt"

    whole, _ = complete(make_config("Pieces", ratio=1, batch=8, name="whole", room=100))
    assert [receipt.shape for receipt in whole.store.receipts()] == [[8, 0, 4]] * whole.plan.n_shards


def test_a_shard_that_runs_out_of_memory_on_the_way_has_one_shape(make_config: MakeConfig,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Late(fakes.Fake):
        """Pixels that depend on the shape of the call; the third call of the process is too large."""

        name: str = "tests.methods.fakes.Late"

        def expand(self, batch: Batch, tools: Tools) -> Expansion:
            import torch

            calls.append(len(batch))
            if len(calls) == 3:
                raise torch.OutOfMemoryError("something else took the memory")
            return Expansion([fakes.picture(batch, i) ^ np.uint8(len(batch)) for i in range(len(batch))])

    monkeypatch.setattr(fakes, "Late", Late, raising=False)
    heard: list[int] = []
    run = runs.prepare(make_config("Late", ratio=2, batch=8, shard_images=40))
    expander = runs.start(run, on_rows=heard.append)
    receipt = expander(0)

    assert calls == [8, 8, 8] + [4] * 10, "what was decided in the larger shape is decided again"
    assert receipt.shape == [4]
    assert sum(heard) == 40
    assert runs.start(run).regenerate("ant/0.png/0").sample_sha256 == hashes(run)["ant/0.png/0"]


def test_a_retried_sample_is_regenerated_in_the_shape_of_its_retry(make_config: MakeConfig, image_folder: Path,
                                                                   tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(fakes.Fake):
        """Pixels that depend on the shape of the call."""

        name: str = "tests.methods.fakes.Late"

        def expand(self, batch: Batch, tools: Tools) -> Expansion:
            if len(batch) > room[0]:
                import torch

                raise torch.OutOfMemoryError("too much")
            return Expansion([fakes.picture(batch, i) ^ np.uint8(len(batch)) for i in range(len(batch))])

    monkeypatch.setattr(fakes, "Late", Late, raising=False)
    seeds, room = shutil.copytree(image_folder, tmp_path / "seeds"), [8]
    for name in ("bee/1.png", "bee/2.png"):
        (seeds / name).write_bytes(b"")
    run, totals = complete(make_config("Late", ratio=2, batch=8, shard_images=40,
                                       data={"source": "imagefolder", "path": str(seeds)}))
    assert totals.failed == 4
    for name, room[0] in (("bee/1.png", 4), ("bee/2.png", 2)):
        shutil.copy(image_folder / name, seeds / name)
        runs.drive(run, runs.in_process(runs.start(run)), runs.retry_jobs(run), to_the_end=True)
    room[0] = 8
    assert [receipt.shape for receipt in run.store.receipts()] == [[8], [4], [2]]

    for sample_id in ("ant/0.png/0", "bee/1.png/0", "bee/2.png/1"):
        assert runs.start(run).regenerate(sample_id).sample_sha256 == hashes(run)[sample_id]


def test_out_of_memory_at_one_row_is_the_environment(make_config: MakeConfig) -> None:
    run = runs.prepare(make_config("Capacity", ratio=1, rows=0))
    expander = runs.start(run)

    with pytest.raises(EnvironmentFault, match="out of memory with a single unit"):
        expander(0)
    assert run.store.pending(run.plan.n_shards)[0] == 0


def test_a_model_that_cannot_load_is_the_environment(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def out_of_memory(*args: Any) -> Tools:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("rayexpand.runs.expander.load_tools", out_of_memory)
    run = runs.prepare(make_config("Fake"))

    with pytest.raises(EnvironmentFault, match="models cannot be loaded"):
        runs.start(run)(0)
    assert run.store.committed() == {}


def test_a_marker_that_cannot_be_written_is_the_environment(make_config: MakeConfig,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    expander = runs.start(runs.prepare(make_config("Fake")))
    monkeypatch.setattr(Path, "touch", full)

    with pytest.raises(EnvironmentFault, match="No space left"):
        expander(0)


def test_an_unmounted_dataset_fails_no_row(make_config: MakeConfig, image_folder: Path, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    shutil.copytree(image_folder, mount)
    run = runs.prepare(make_config("Fake", data={"source": "imagefolder", "path": str(mount)}))
    shutil.rmtree(mount)
    mount.mkdir()

    with pytest.raises(EnvironmentFault, match="mounted"):
        runs.start(run)(0)
    assert run.store.committed() == {}


def test_a_noise_start_needs_no_seed_image(make_config: MakeConfig, image_folder: Path, tmp_path: Path) -> None:
    data = without_seed(image_folder, tmp_path)
    run, _ = complete(make_config("SecondCopyFromNoise", ratio=2, data=data))

    assert refused(run) == {"bee/2.png/0": "decode_error"}


def test_the_size_of_a_noise_row_is_not_that_of_its_batch_mates(make_config: MakeConfig) -> None:
    run, _ = complete(make_config("MixedStarts", ratio=1, seeds="ant"))

    assert runs.start(run).regenerate("bee/0.png/0").sample_sha256 == hashes(run)["bee/0.png/0"]


@pytest.mark.parametrize("method", ["Fake", "Groups", "FractionalRatio", "ClassQuota", "NoiseStart",
                                    "ClassUniformReferences"])
def test_regenerating_one_sample_gives_its_hash(make_config: MakeConfig, method: str) -> None:
    run, _ = complete(make_config(method))
    expander = runs.start(run)
    committed = hashes(run)

    for sample_id in list(committed)[::7]:
        assert expander.regenerate(sample_id).sample_sha256 == committed[sample_id]


def test_a_group_shares_its_fate(make_config: MakeConfig) -> None:
    run, _ = complete(make_config("Groups", ratio=5))

    assert len(hashes(run)) == 100


def test_retry_makes_only_what_failed_and_touches_no_old_file(make_config: MakeConfig, image_folder: Path,
                                                              tmp_path: Path) -> None:
    reference = hashes(complete(make_config("Fake", ratio=3))[0])
    broken = tmp_path / "broken"
    shutil.copytree(image_folder, broken)
    for name in ("bee/2.png", "dog/0.png"):
        (broken / name).write_bytes(b"")
    run, _ = complete(make_config("Fake", ratio=3, name="retried", data={"source": "imagefolder", "path": str(broken)}))
    before = {path: path.read_bytes() for path in (run.folder / "data").iterdir()}
    shutil.copy(image_folder / "bee/2.png", broken / "bee/2.png")
    again = runs.open_run(str(run.folder))
    totals = runs.drive(again, runs.in_process(runs.start(again)), runs.retry_jobs(again))

    assert (totals.kept, totals.failed, totals.pending) == (57, 3, 0)
    assert all(path.read_bytes() == content for path, content in before.items())
    added = {path.name for path in (run.folder / "data").iterdir()} - {path.name for path in before}
    assert all(name.endswith(".r1.parquet") for name in added)
    assert len(added) == 2
    assert hashes(again) == {k: v for k, v in reference.items() if not k.startswith("dog/0.png")}


def test_the_budget_ends_the_run_and_keeps_what_is_made(make_config: MakeConfig) -> None:
    config = make_config("Failing", ratio=2, bad=ROW, sections={"limits": {"max_failed": 0.0}})
    run = runs.prepare(config)

    with pytest.raises(OverBudget, match=r"1 of 40 rows failed.*sampler_error 1"):
        runs.drive(run, runs.in_process(runs.start(run)), lambda: runs.pending_jobs(run))
    assert 0 < run.totals().kept < 40

    _, totals = complete(make_config("Failing", ratio=2, bad=ROW))
    assert (totals.kept, totals.failed) == (39, 1)


def test_a_committed_shard_costs_no_model(make_config: MakeConfig) -> None:
    run, _ = complete(make_config("Fake", ratio=1))
    expander = runs.start(run)
    first = expander(0)

    assert first.attempt == 1
    assert expander.tools is None


def test_odd_seeds_are_noted(make_config: MakeConfig, image_folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(image_folder, odd)
    (odd / "ant/0.png").unlink()
    Image.new("CMYK", (16, 16), (10, 200, 30, 0)).save(odd / "ant/0.jpg")
    run, _ = complete(make_config("Fake", ratio=1, data={"source": "imagefolder", "path": str(odd)}))
    notes = {row["seed_id"]: row["note"] for receipt in run.store.receipts()
             for row in run.store.data(receipt, ["seed_id", "note"]).to_pylist()}

    assert notes["ant/0.jpg"] == "cmyk"
    assert notes["ant/1.png"] == ""


def test_data_opens_in_datasets_and_pyarrow_with_right_labels(make_config: MakeConfig, tmp_path: Path) -> None:
    import datasets

    run, _ = complete(make_config("Fake", ratio=2))
    loaded = datasets.load_dataset("parquet", data_files=str(run.folder / "data/*.parquet"), split="train",
                                   cache_dir=str(tmp_path / "cache"))

    assert loaded.num_rows == 40
    assert loaded.features["label"].names == ["ant", "bee", "cat", "dog"]
    row = loaded[7]
    assert row["image"].size == (16, 16)
    assert row["seed_id"].startswith(loaded.features["label"].int2str(row["label"]))


def test_a_filler_carries_nothing_of_the_row_it_replaces(make_config: MakeConfig) -> None:
    seen: list[Draw] = []
    config = make_config("Fake", ratio=1)
    run = runs.prepare(config)
    expander = runs.start(run)
    plain = fakes.Fake.expand

    class Watching(fakes.Fake):
        def expand(self, batch, tools):  # type: ignore[no-untyped-def]
            seen.extend(draw for draw, filler in zip(batch.draws, batch.filler, strict=True) if filler)
            return plain(self, batch, tools)

    expander.method = Watching(ratio=1)
    expander.regenerate("bee/2.png/0")

    assert len(seen) == 7
    assert {(draw.seed_id, draw.prompt, draw.target_label) for draw in seen} == {("filler", "", 0)}
    assert replace(seen[0], sample_id="", copy=0) is not None


def test_a_filler_shows_no_pixel_of_a_batch_mate(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    class Looking(fakes.Fake):
        def expand(self, batch: Batch, tools: Tools) -> Expansion:
            seen.extend(image for image, absent in zip(batch.images, batch.filler, strict=True) if absent)
            return super().expand(batch, tools)

    monkeypatch.setattr(fakes, "Looking", Looking, raising=False)
    run = runs.prepare(make_config("Looking", ratio=1))
    runs.start(run).regenerate("bee/2.png/0")

    assert len(seen) == 7
    assert all((image == 128).all() for image in seen)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_clip(folder / "clip")
    return tiny_pipeline(folder / "pipeline")


def test_the_stack_names_what_is_left_out_of_the_digest(make_config: MakeConfig, tiny: Path) -> None:
    plain, channels_last = (stack_fingerprint(make_config("img2img", steps=4, sections={
        "prior": {"weights": str(tiny), "channels_last": value}})) for value in (False, True))

    assert plain != channels_last
    assert plain["rayexpand"] == __version__


ABOVE = 0.25  # of a classifier that was not trained: about half of what it sees of four classes

# Beside few steps: what leaves at least one of them, and prompts for classes without a metaclass.
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "dafusion": {"prompt": "a {token}"}, "diffmix": {"prompt": "a {token}"},
    "realfake": {"prompt": "a {token}", "visual_token": "none"},
    "realguidance": {"prompt": "a {name}", "strength": 0.5}, "vae": {"sample": True}}


FAST = {False: {"diffcoremix", "img2img"}, True: {"classical"}}  # judged or not
MATRIX = [pytest.param(method, judged, marks=() if method in FAST[judged] else pytest.mark.slow)
          for judged in (False, True) for method in names()]


@pytest.mark.parametrize(("method", "judged"), MATRIX)
def test_real_methods_keep_every_hash_alone_resumed_and_beside_a_failure(
        make_config: MakeConfig, tiny: Path, image_folder: Path, tmp_path: Path, method: str, judged: bool) -> None:
    """The promise, for every method there is: regenerated alone, in another order, and with a failed batch-mate; by
    itself, and with a judge that asks a classifier for the class of each sample and has rows drawn again."""
    few = shutil.copytree(image_folder, tmp_path / "few", ignore=shutil.ignore_patterns("3.png", "4.png"))  # 3 shards
    seeds = {"source": "imagefolder", "path": str(few)}
    sections: dict[str, Any] = {"prior": {"weights": str(tiny)}, "image": {"size": 16},
                                "guide": {"weights": str(tiny.parent / "clip")}}
    if hasattr(method_class(method), "acceptance"):
        sections["accept"] = {"guide": sections["guide"]}
    if judged:
        (tmp_path / "judge").mkdir()
        recipe = make_recipe({"size": 16, "backbone_args": {"width": 4}})
        save_classifier(tmp_path / "judge", build_backbone(recipe, 4, seed=0), recipe, ["ant", "bee", "cat", "dog"])
        sections["accept"] = {"guide": {"weights": str(tmp_path / "judge")}, "score": "confidence", "above": ABOVE,
                              "exhausted": "best", "attempts": 1 if method == "gif" else 3}
    fields = {name: value for name, value in {"steps": 4, "guide_step": 2}.items()
              if name in method_class(method).model_fields} | OWN_FIELDS.get(method, {})
    config = make_config(method, data=seeds, sections=sections, **fields)
    sections["artifacts"] = {role: str(folder) for role, folder in fit_for(
        config, lambda *now: None, out=str(tmp_path / "artifacts")).items()}
    if "adapter" in config.method.needs():
        classes = sorted(folder.name for folder in image_folder.iterdir())
        sections["artifacts"]["adapter"] = str(tiny_adapter(tmp_path / "adapter", tiny, classes))
    run, totals = complete(make_config(method, ratio=2, data=seeds, sections=sections, **fields))
    committed = hashes(run)
    assert totals.kept == 24
    if judged:
        assert set(attempts(run).values()) == ({0} if method == "gif" else {0, 1, 2})

    expander = runs.start(run)
    for sample_id in list(committed)[::9]:
        assert expander.regenerate(sample_id).sample_sha256 == committed[sample_id]

    broken = tmp_path / "broken"
    shutil.copytree(few, broken)
    (broken / "bee/2.png").write_bytes(b"not an image")
    data = {"source": "imagefolder", "path": str(broken)}
    other = runs.prepare(make_config(method, ratio=2, name="other", data=data, sections=sections, **fields))
    for shard in reversed(range(other.plan.n_shards)):
        runs.start(other, expander.loaded)(shard)
    from_seeds = other.plan.units(0)[0][0].start == Start.IMAGE
    lost = {f"bee/2.png/{copy}" for copy in range(2)} if from_seeds else set()
    assert hashes(other) == {k: v for k, v in committed.items() if k not in lost}
    assert set(refused(other)) == lost


# ------------------------------------------------------------------------------------------- the size of a seed image


def test_samples_from_an_image_get_back_the_size_of_their_seed(make_config: MakeConfig, tmp_path: Path) -> None:
    """Diff-Mix, oracle 23: 400 x 300 goes through a square that is not letter-boxed, and out as 400 x 300."""
    picture = np.zeros((300, 400, 3), np.uint8)
    picture[:, :, 0] = np.linspace(0, 255, 400).astype(np.uint8)
    picture[:, :, 1] = np.linspace(0, 255, 300).astype(np.uint8)[:, None]
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / "set" / name / "0.png")
    data = {"source": "imagefolder", "path": str(tmp_path / "set")}
    image = {"size": 512, "fit": "squash", "restore": True}

    def made(name: str, method: str, **image: Any) -> tuple[runs.Run, dict[str, np.ndarray]]:
        run, _ = complete(make_config(method, name=name, ratio=2, data=data,
                                      sections={"image": image, "codec": {"format": "png"}}))
        rows = [row for receipt in run.store.receipts()
                for row in run.store.data(receipt, ["sample_id", "image"]).to_pylist()]
        return run, {row["sample_id"]: np.asarray(Image.open(BytesIO(row["image"]["bytes"]))) for row in rows}

    run, restored = made("restored", "Echo", **image)
    _, square = made("square", "Echo", **(image | {"restore": False}))
    _, mixed = made("mixed", "EchoThenNoise", **image)

    assert {one.shape for one in restored.values()} == {(300, 400, 3)}
    assert {one.shape for one in square.values()} == {(512, 512, 3)}
    assert {key: one.shape for key, one in mixed.items()} == {
        f"{seed}/0.png/{copy}": (512, 512, 3) if copy else (300, 400, 3) for seed in "ab" for copy in range(2)}
    there = restored["a/0.png/0"].astype(int)
    assert np.abs(there - picture).max() <= 3, "the whole image, in its place"
    by_pillow = Image.fromarray(square["a/0.png/0"]).resize((400, 300), Image.Resampling.BILINEAR)
    assert np.array_equal(there, np.asarray(by_pillow))
    expander = runs.start(run)
    assert expander.regenerate("a/0.png/1").sample_sha256 == hashes(run)["a/0.png/1"]
    expander.close()


def test_squash_resizes_as_it_is_told(make_config: MakeConfig, tmp_path: Path) -> None:
    noise = np.random.Generator(np.random.Philox(key=1)).integers(256, size=(30, 40, 3)).astype(np.uint8)
    (tmp_path / "set/a").mkdir(parents=True)
    Image.fromarray(noise).save(tmp_path / "set/a/0.png")
    for name, given in {"bicubic": {}, "bilinear": {"filter": "bilinear"}}.items():
        run, _ = complete(make_config("Echo", name=name, ratio=1, sections={"codec": {"format": "png"}, "image": {
            "size": 16, "fit": "squash", **given}}, data={"source": "imagefolder", "path": str(tmp_path / "set")}))
        (row,) = run.store.data(next(iter(run.store.receipts())), ["image"]).to_pylist()
        want = Image.fromarray(noise).resize((16, 16), Image.Resampling[name.upper()])
        found = np.asarray(Image.open(BytesIO(row["image"]["bytes"]))).astype(int)
        assert np.abs(found - np.asarray(want)).max() <= 1, name


@pytest.mark.parametrize("fit", ["crop", "center"])
def test_a_part_of_an_image_is_not_stretched_to_the_whole(make_config: MakeConfig, fit: str) -> None:
    with pytest.raises(ConfigError, match=rf"image: restore: fit {fit} cuts a part out.*fit: squash"):
        make_config("Fake", sections={"image": {"fit": fit, "restore": True}})


def test_the_restored_size_is_part_of_what_a_run_is(make_config: MakeConfig) -> None:
    image = {"size": 32, "fit": "squash"}
    runs.prepare(make_config("Fake", sections={"image": image}))
    with pytest.raises(DigestMismatch, match=r"image\.restore: False -> True"):
        runs.prepare(make_config("Fake", sections={"image": image | {"restore": True}}))


def test_a_row_without_its_caption_costs_itself_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    index = build_index(make_config("Captioned").data)

    def made(name: str, blank: str) -> runs.Run:
        folder = tmp_path / name
        folder.mkdir()
        write_captions(folder, index.seed_ids, ["" if one == blank else f"text {one}" for one in index.seed_ids])
        return complete(make_config("Captioned", name=name, sections={"artifacts": {"captions": str(folder)}}))[0]

    whole, run = made("whole", ""), made("blank", "bee/2.png")
    assert refused(run) == {f"bee/2.png/{copy}": "missing" for copy in range(2)}
    assert hashes(run) == {key: value for key, value in hashes(whole).items() if not key.startswith("bee/2.png")}
