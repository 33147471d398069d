"""A run that grows: what it had stays as it was, the rest is what a run that began as large would have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import rayexpand
from rayexpand.artifacts.columns import write_captions
from rayexpand.contract.errors import ConfigError, DamagedFile, DigestMismatch, UsageError
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.seeds import build_index
from rayexpand.fitting.config import parse_fit
from rayexpand.fitting.fit import fit
from rayexpand.methods import names
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig
from rayexpand.runs.growth import growth_problems
from rayexpand.runs.plan import make_plan
from rayexpand.runs.status import read_status
from rayexpand.runs.verify import verify
from rayexpand.storage.tables import sealed
from tests.conftest import complete, hashes, refused, small_run
from tests.methods.test_families import method_for
from tests.tiny import tiny_adapter, tiny_clip, tiny_pipeline

CLASSES = ("ant", "bee", "cat", "dog")


def paint(folder: Path, *names: str, each: int = 5, first: int = 0) -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + each):
            rng = np.random.Generator(np.random.Philox(key=[sum(map(ord, name)), 100 * number + i]))
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


Make = Callable[..., RunConfig]


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    return paint(tmp_path / "seeds", *CLASSES)


@pytest.fixture
def make(seeds: Path, tmp_path: Path) -> Make:
    """`make("run", ratio=2)`: a run of the seeds that may grow."""
    def config(name: str, method: str = "Fake", **fields: Any) -> RunConfig:
        sections = {"grow": True, **fields.pop("sections", {})}
        return small_run(seeds, tmp_path / "out", method, name=name, sections=sections, **fields)

    return config


def contents(run: runs.Run) -> dict[str, dict[str, Any]]:
    """Every kept sample by id, with all that does not number it within its run."""
    return {row["sample_id"]: {name: value for name, value in row.items() if name not in ("row", "sample_sha256")}
            for receipt in run.store.receipts() for row in run.store.data(receipt).to_pylist()}


def stored(run: runs.Run, *folders: str) -> dict[str, bytes]:
    folders = folders or ("data", "rejected", "attempts", "plan", "grown")
    found = [path for folder in folders for path in Path(run.folder, folder).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in [*found, Path(run.folder, "run.json")]}


def assert_grown(config: RunConfig, whole: RunConfig) -> runs.Run:
    """The run in the folder of `config` becomes `whole`, sample by sample, and what was there keeps its bytes."""
    before = stored(runs.open_run(config.folder))
    run, totals = complete(config)
    reference, _ = complete(whole)
    assert {name: Path(name).read_bytes() for name in before} == before
    assert totals.pending == 0
    assert contents(run) == contents(reference)
    assert refused(run) == refused(reference)
    assert verify(run, pixels=True).problems == []
    return run


def test_more_copies(make: Make) -> None:
    had = hashes(complete(make("run", ratio=2))[0])
    run = assert_grown(make("run", ratio=5), make("whole", ratio=5))
    assert (run.plan.planned, run.plan.copies.tolist()) == (100, [5] * 20)
    assert had.items() < hashes(run).items()
    made = [one for one in run.store.receipts() if one.run_digest == run.facts["run_digest"]]
    assert sum(one.decided for one in made) == 60, "only the rest is made"
    before = runs.prepare(make("run", ratio=5))
    assert before.facts == run.facts, "the same command again changes nothing"


def test_growing_twice_and_by_fractions(make: Make) -> None:
    complete(make("run", ratio=1.5))
    assert_grown(make("run", ratio=2.7), make("whole", ratio=2.7))
    run = assert_grown(make("run", ratio=4), make("larger", ratio=4))
    assert [step["planned"] for step in run.facts["grown"]] == [28, 56]
    assert dict(read_status(run.folder).table())["grown"].startswith("from 28 to 56 to 80 samples")


def test_more_seeds_and_new_classes(make: Make, seeds: Path) -> None:
    complete(make("run", ratio=2))
    paint(seeds, "ant", "dog", each=2, first=7)
    paint(seeds, "eel", each=3)
    run = assert_grown(make("run", ratio=2), make("whole", ratio=2))
    assert len(run.plan.index.classes) == 5
    assert len(run.plan.index) == 27
    run = assert_grown(make("run", ratio=3), make("larger", ratio=3))
    assert run.plan.planned == 81


def test_a_run_that_is_not_finished_grows_and_so_does_one_with_failed_rows(make: Make) -> None:
    begun = runs.prepare(make("run", "Failing", ratio=2, nan="bee/2.png/1"))
    expander = runs.start(begun)
    for shard in (0, 2):
        expander(shard)
    expander.close()
    run = assert_grown(make("run", "Failing", ratio=4, nan="bee/2.png/1"),
                       make("whole", "Failing", ratio=4, nan="bee/2.png/1"))
    assert refused(run) == {"bee/2.png/1": "nan_latent"}
    assert [one.run_digest == begun.facts["run_digest"] for one in run.store.receipts()][:3] == [True, False, True]


def test_rows_that_failed_before_are_retried_after(make: Make, seeds: Path) -> None:
    sound = (seeds / "bee/2.png").read_bytes()
    (seeds / "bee/2.png").write_bytes(b"no picture")
    complete(make("run", ratio=2))
    run, _ = complete(make("run", ratio=4))
    before = stored(run, "data")
    assert set(refused(run)) == {f"bee/2.png/{copy}" for copy in range(4)}
    (seeds / "bee/2.png").write_bytes(sound)
    expander = runs.start(run)
    runs.drive(run, runs.in_process(expander), runs.retry_jobs(run), to_the_end=True)
    expander.close()
    assert {name: Path(name).read_bytes() for name in before} == before
    assert contents(run) == contents(complete(make("whole", ratio=4))[0])
    assert verify(run, pixels=True).problems == []


def test_groups_grow_by_whole_groups_alone(make: Make) -> None:
    complete(make("run", "Groups", ratio=4))
    with pytest.raises(DigestMismatch, match=r"2 \+ 2 of 4 samples, but 2 \+ 3 of 5"):
        runs.prepare(make("run", "Groups", ratio=5))
    run = assert_grown(make("run", "Groups", ratio=7), make("whole", "Groups", ratio=7))
    assert {len(unit) for unit in run.plan.units(run.plan.n_shards - 1)} == {3}


def test_dealt_runs_grow_where_no_seed_loses(make: Make, tmp_path: Path) -> None:
    seeds = [f"{name}/{i}.png" for name in CLASSES for i in range(5)]
    lines = [f"{seed},{1 + (i % 3)}" for i, seed in enumerate(seeds)]
    (tmp_path / "s.csv").write_text("\n".join(["seed_id,weight", *lines]))
    dealt = {"allocate": {"rule": "weight", "scores": str(tmp_path / "s.csv")}}
    complete(make("run", ratio=2, sections=dealt))
    run = assert_grown(make("run", ratio=6, sections=dealt), make("whole", ratio=6, sections=dealt))
    assert "dealt" in dict(read_status(run.folder).table())
    equal = make("run", ratio=6, sections={"allocate": {"rule": "equal"}})
    with pytest.raises(DigestMismatch, match="would have fewer samples than they have"):
        runs.prepare(equal)


def edit(seeds: Path, what: str) -> None:
    if what == "gone":
        (seeds / "cat/1.png").unlink()
    elif what == "moved":
        (seeds / "cat/1.png").rename(seeds / "dog/1x.png")
    elif what == "class first":
        paint(seeds, "aardvark")
    elif what == "class gone":
        shutil.rmtree(seeds / "dog")


@pytest.mark.parametrize(("fields", "what", "words"), [
    ({"ratio": 1}, "", "20 seeds would have fewer samples"),
    ({"ratio": 3, "batch": 4}, "", "sampler.batch: 8 -> 4 (a change of what samples are)"),
    ({"ratio": 3, "sections": {"seed": 9}}, "", "seed: 3 -> 9"),
    ({"ratio": 3, "sections": {"codec": {"format": "jpeg"}}}, "", "codec.format"),
    ({"ratio": 3, "method": "Mixes"}, "", "method.name"),
    ({"ratio": 3}, "gone", "1 of its seeds are not in the dataset any more ('cat/1.png')"),
    ({"ratio": 3}, "moved", "'cat/1.png'"),
    ({"ratio": 3}, "class first", "the key of label 0 would be 'aardvark' instead of 'ant'; new classes must come"),
    ({"ratio": 3}, "class gone", "label 3 (dog) would be gone"),
])
def test_what_is_no_larger_run_is_refused_with_the_reason(make: Make, seeds: Path, fields: dict[str, Any], what: str,
                                                          words: str) -> None:
    small, _ = complete(make("run", ratio=2))
    before = stored(small)
    edit(seeds, what)
    with pytest.raises(DigestMismatch) as raised:
        runs.prepare(make("run", **fields))
    assert words in str(raised.value)
    assert stored(small) == before, "nothing is written by a refusal"


@pytest.mark.parametrize("words", ["name", "metaclass", "noun"])
def test_a_class_of_other_words_is_refused(make: Make, words: str) -> None:
    config = make("run", ratio=2)
    plan = make_plan(build_index(config.data), config)
    classes = replace(plan.index.classes, **{words: ("ant", "wasp", "cat", "dog")})
    other = replace(plan, index=SeedIndex(plan.index.table, classes))
    fields: dict[str, Any] = {"method": {}, "data": {}, "sampler": {}}
    assert growth_problems(plan, plan, fields, fields, frozenset()) == []
    (told,) = growth_problems(plan, other, fields, fields, frozenset())
    assert f"the {words} of label" in told


def test_all_reasons_are_told_at_once(make: Make, seeds: Path) -> None:
    complete(make("run", ratio=2))
    edit(seeds, "gone")
    with pytest.raises(DigestMismatch) as raised:
        runs.prepare(make("run", ratio=1, sections={"seed": 9}))
    assert all(words in str(raised.value) for words in ("seed: 3 -> 9", "any more", "fewer samples"))


def test_without_the_word_a_larger_run_is_another_run(make: Make) -> None:
    complete(make("run", ratio=2))
    with pytest.raises(DigestMismatch, match="say grow: true"):
        runs.prepare(make("run", ratio=3, sections={"grow": False}))
    complete(make("dealt", ratio=2, sections={"allocate": {"rule": "equal"}}))
    with pytest.raises(DigestMismatch, match=r"allocate\.floor: .*\n.*say grow: true"):
        runs.prepare(make("dealt", ratio=2, sections={"grow": False, "allocate": {"rule": "equal", "floor": 0.5}}))
    with pytest.raises(DigestMismatch) as raised:
        runs.prepare(make("run", ratio=3, sections={"grow": False, "seed": 4}))
    assert "grow: true" not in str(raised.value)


def test_a_grown_run_is_opened_without_the_word_and_refuses_the_smaller_one(make: Make) -> None:
    complete(make("run", ratio=2))
    complete(make("run", ratio=4))
    assert runs.prepare(make("run", ratio=4, sections={"grow": False})).totals().pending == 0
    with pytest.raises(DigestMismatch, match=r"method\.ratio: 4\.0 -> 2\.0"):
        runs.prepare(make("run", ratio=2, sections={"grow": False}))


def test_captions_must_say_the_same(make: Make, tmp_path: Path) -> None:
    seeds = [f"{name}/{i}.png" for name in CLASSES for i in range(5)]
    for name, word in (("a", "sits"), ("b", "runs")):
        (tmp_path / name).mkdir()
        write_captions(tmp_path / name, seeds, [f"it {word if i == 3 else 'is'} {i}" for i in range(20)])
    sections = [{"artifacts": {"captions": str(tmp_path / name)}} for name in ("a", "b")]
    complete(make("run", "Captioned", ratio=1, sections=sections[0]))
    with pytest.raises(DigestMismatch, match=r"1 seeds have another caption \('ant/3\.png'\)"):
        runs.prepare(make("run", "Captioned", ratio=2, sections=sections[1]))
    assert_grown(make("run", "Captioned", ratio=2, sections=sections[0]),
                 make("whole", "Captioned", ratio=2, sections=sections[0]))


# Every verb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def grown(make: Make, seeds: Path) -> runs.Run:
    complete(make("run", ratio=2))
    paint(seeds, "eel", each=2)
    return complete(make("run", ratio=4))[0]


def test_every_verb_reads_a_grown_run(grown: runs.Run, tmp_path: Path) -> None:
    folder = rayexpand.open(str(grown.folder))
    status = folder.status()
    assert (status.planned, status.pending, status.kept) == (88, 0, 88)
    assert folder.verify(pixels=True).problems == []
    words = "from 40 to 88 samples; what was made before is as it was"
    assert words in Path(folder.report()).read_text()
    assert words in Path(folder.card()).read_text()
    assert len(list(folder.samples())) == 88
    exported = folder.export(tmp_path / "export", "imagefolder")
    assert len(list((tmp_path / "export").rglob("*.png"))) == 88, exported
    for sample in ("ant/0.png/1", "ant/0.png/3", "eel/1.png/0"):
        assert folder.regen(sample)["equal"], sample
    from rayexpand.runs.lookup import rows_of, seed_table
    from rayexpand.runs.status import view_run

    view = view_run(str(grown.folder))
    rows = rows_of(view, seed_table(view), ["ant/0.png", "eel/0.png"])
    assert sorted(rows.kept) == [(seed, copy) for seed in ("ant/0.png", "eel/0.png") for copy in range(4)]
    found = rayexpand.plan(grown.config)
    assert found.problems == []
    assert rayexpand.dataset(str(grown.folder), copies=3)


def test_a_grown_run_loads_as_a_dataset(grown: runs.Run) -> None:
    from datasets import load_dataset

    rayexpand.open(str(grown.folder)).card()
    rows = load_dataset(str(grown.folder), split="train")
    assert len(rows) == 88
    assert {rows.features["label"].int2str(label) for label in rows["label"]} == {*CLASSES, "eel"}


def test_a_selection_from_before_says_that_it_does_not_know_the_rest(make: Make, tmp_path: Path) -> None:
    complete(make("run", ratio=2))
    rayexpand.select({"name": "half", "run": str(tmp_path / "out/run"), "rule": {"kind": "random", "share": 0.5}})
    complete(make("run", ratio=3))
    with pytest.raises(UsageError, match="made before that sample"):
        rayexpand.open(str(tmp_path / "out/run")).export(tmp_path / "export", "imagefolder", selection="half")


def test_verify_names_what_a_grown_run_has_lost(grown: runs.Run, make: Make, tmp_path: Path) -> None:
    folder, facts = Path(grown.folder), grown.facts
    other, _ = complete(make("other", ratio=2, sections={"seed": 4}))

    def told() -> list[str]:
        return verify(runs.open_run(str(folder))).problems

    # a data file of another run of the same shape, with the digest of the smaller one
    step, name = facts["grown"][0], "train-000001.parquet"
    kept = (folder / "data" / name).read_bytes()
    forged = replace(other, facts={**other.facts, "run_digest": step["run_digest"]})
    forged.store.run_digest = step["run_digest"]
    (Path(other.folder) / "data" / name).unlink()
    expander = runs.expander_of(forged, 1)
    expander(1)
    expander.close()
    shutil.copy(Path(other.folder) / "data" / name, folder / "data" / name)
    shutil.rmtree(folder / "receipts")
    (folder / "receipts").mkdir()
    assert [one.partition(":")[0] for one in told()] == [f"data/{name}"]
    (folder / "data" / name).write_bytes(kept)
    assert told() == []

    parts = folder / facts["plan"] / "parts.parquet"
    whole = parts.read_bytes()
    parts.write_bytes(whole[:-9] + b"x" + whole[-8:])
    with pytest.raises(DamagedFile, match=r"parts\.parquet"):
        runs.open_run(str(folder))
    assert runs.prepare(grown.config).plan.planned == 88, "made again from the dataset and the smaller plan"
    assert told() == []

    (folder / "run.json").write_bytes(sealed("run.json", other.facts))
    assert [one.partition(":")[0] for one in told()] == ["run.json"]
    (folder / "run.json").write_text("{}")
    (folder / "data" / name).write_bytes(kept[:100])
    assert [one.partition(":")[0] for one in told()] == ["run.json", f"data/{name}"], "the rest is looked at"


def test_a_method_that_draws_by_row_is_refused(make: Make) -> None:
    """Balanced targets of diffmix are dealt over all rows; here by a method without tensors."""
    complete(make("run", "ByRow", ratio=2))
    with pytest.raises(DigestMismatch, match="by the number of the row"):
        runs.prepare(make("run", "ByRow", ratio=3))


def test_preflight_is_that_of_a_run_that_begins(make: Make, tmp_path: Path) -> None:
    complete(make("run", ratio=2))
    with pytest.raises(ConfigError, match=r"data\.path"):
        runs.prepare(make("run", ratio=3, data={"source": "imagefolder", "path": str(tmp_path / "nowhere")}))


# Every method -------------------------------------------------------------------------------------------------------

NOT = {"gif": "5 of 5 samples, but 10 of 10",  # all copies of a seed are one group
       "diffmix-balanced": "by the number of the row"}
OWN: dict[str, dict[str, Any]] = {
    "gif-2": {"group_size": 2, "ratio": 4}, "gif-shared": {"group_size": 2, "ratio": 4, "shared_diffusion": True},
    "diffmix-balanced": {"targets": "balanced"}, "realfake-uniform": {"balance": "uniform"},
    "diffmix-references": {"references": "class_uniform"}, "diffmix-images": {"references": "image_uniform"},
    "dafusion": {"prompt": "a photo of a {token}"}, "diffcoremix": {"filtration": False}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sections of a run with a tiny generator, guide, prototypes and adapter, over two seeds of four classes."""
    folder = tmp_path_factory.mktemp("models")
    tiny_clip(folder / "guide")
    prior, guide = tiny_pipeline(folder / "prior"), {"weights": str(folder / "guide")}
    data = {"source": "imagefolder", "path": str(paint(folder / "seeds", *CLASSES, each=2))}
    made = fit(parse_fit({"name": "fit", "out": str(folder / "artifacts"), "data": data, "guide": guide,
                          "fit": {"prototypes": {"groups": 1}}}), lambda *_: None)
    adapter = tiny_adapter(folder / "adapter", prior, CLASSES)
    return {"data": data, "sections": {
        "prior": {"weights": str(prior), "device": "cpu"}, "image": {"size": 16, "fit": "squash"}, "guide": guide,
        "artifacts": {"prototypes": str(made["prototypes"]), "adapter": str(adapter)}, "grow": True}}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*names(), *(name for name in OWN if "-" in name)])
def test_five_copies_grow_to_ten_by_every_method(variant: str, models: dict[str, Any], tmp_path: Path) -> None:
    """Measured: all methods nest but those in NOT, which are refused with the reason."""
    name = variant.partition("-")[0]
    own = {"ratio": 5, **OWN.get(variant, {})}
    if name == "lecf":
        own["prompts"] = {"*": ["a {name}", "one {name}", "some {name}"]}
    known = method_for(name, "sd").model_dump(exclude={"name"}) if name not in ("dafusion", "classical") else {}  # type: ignore[attr-defined]
    known = {**known, **({"steps": 4} if name == "dafusion" else {})}
    needs_adapter = name == "dafusion"
    sections = {**models["sections"], "artifacts": {
        kind: path for kind, path in models["sections"]["artifacts"].items()
        if (kind == "prototypes" and name == "distdiff") or (kind == "adapter" and needs_adapter)}}

    def config(folder: str, ratio: float) -> RunConfig:
        return small_run(Path(), tmp_path / folder, name, batch=4, shard_images=20, data=models["data"],
                         sections=sections, **{**known, **own, "ratio": ratio})

    ratio = own["ratio"]
    complete(config("run", ratio))
    if variant in NOT or variant == "gif-shared":
        with pytest.raises(DigestMismatch) as raised:
            runs.prepare(config("run", 2 * ratio))
        assert NOT.get(variant, "latents may depend on how many there are") in str(raised.value)
        return
    assert_grown(config("run", 2 * ratio), config("whole", 2 * ratio))
