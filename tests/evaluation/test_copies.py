"""The audit `copies`: planted copies are found, in every scope and cut; what cannot see copies is refused in words."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from scipy.ndimage import shift
from scipy.stats import beta
from sklearn.datasets import load_digits

from rayexpand.contract.errors import ConfigError, DamagedFile, UsageError
from rayexpand.contract.rng import generator, row_key
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import DataConfig, SeedReader, build_index
from rayexpand.evaluation import copies, copy_search
from rayexpand.evaluation import copy_statistics as statistics
from rayexpand.evaluation.audit_files import copy_rows, part_names
from rayexpand.evaluation.copies_config import CopiesConfig
from rayexpand.evaluation.feature_file import FeatureFile
from rayexpand.evaluation.search import References, unit_rows
from rayexpand.evaluation.select import parse as parse_select
from rayexpand.evaluation.select import select
from rayexpand.evaluation.select_rules import SeedCopies
from rayexpand.runs.run import Run
from rayexpand.runs.selections import read_selection
from rayexpand.studies.audit import audit, parse_audit
from tests.conftest import MakeConfig, complete
from tests.methods.fakes import Planted
from tests.tiny import tiny_clip, tiny_pipeline

DIGITS = {"source": "digits", "per_class": 4}


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_clip(tmp_path_factory.mktemp("tiny") / "clip"))


@pytest.fixture
def planted() -> Iterator[dict[str, np.ndarray]]:
    """Samples that the run of `run` will have."""
    yield Planted.images
    Planted.images.clear()


@pytest.fixture
def run(make_config: MakeConfig, planted: dict[str, np.ndarray]) -> Run:
    """Two samples of each of 40 digits. Copy 1 of seed 0 is seed 0, of seed 1 another seed of its class, of seed 2 a
    seed of another class."""
    index = build_index(DataConfig(**DIGITS))
    pixels = [decode(one.image)[0] for one in SeedReader(index, DataConfig(**DIGITS)).read(range(40))]
    ids, labels = index.seed_ids, index.labels
    same = next(i for i in range(3, 40) if labels[i] == labels[1])
    other = next(i for i in range(3, 40) if labels[i] != labels[2])
    planted.update({f"{ids[0]}/1": pixels[0], f"{ids[1]}/1": pixels[same], f"{ids[2]}/1": pixels[other]})
    run = complete(make_config("Planted", ratio=2, data=DIGITS))[0]
    run.facts["planted"] = {f"{ids[0]}/1": ids[0], f"{ids[1]}/1": ids[same], f"{ids[2]}/1": ids[other]}
    return run


def audited(run: Run, guide: str, name: str = "audit", **fields: Any) -> dict[str, Any]:
    config = parse_audit({"name": name, "audit": {"run": str(run.folder), "copies": {
        "extractor": {"guide": guide, "device": "cpu"}, "held_out": {"source": "digits", "split": "pool"}, "known": 20,
        **fields}}})
    no_machines: Any = None  # which only membership asks for
    return audit(config, copy_search.in_process, no_machines, lambda task, done, total, facts=None, rate=None: None)


def by_id(run: Run, name: str = "audit") -> dict[str, dict[str, Any]]:
    columns = ["sample_id", "own", "own_id", "class", "class_id", "all", "all_id", "top_id", "top"]
    return {row["sample_id"]: row for row in copy_rows(run.files, name, columns).to_pylist()}


def test_planted_copies_come_first_in_all_scopes(run: Run, guide: str) -> None:
    result = audited(run, guide)["copies"]
    rows, one = by_id(run), pytest.approx(1, abs=1e-6)
    own, of_class, of_other = run.facts["planted"]

    assert len(rows) == result["samples"] == 80
    assert rows[own]["own"] == one
    assert (rows[own]["own_id"], rows[own]["top_id"][0]) == (run.facts["planted"][own],) * 2
    assert rows[own]["class_id"] != run.facts["planted"][own], "the own seed is judged apart"
    assert rows[of_class]["class"] == rows[of_class]["all"] == one
    assert {rows[of_class][name] for name in ("class_id", "all_id")} == {run.facts["planted"][of_class]}
    assert rows[of_other]["all"] == one
    assert rows[of_other]["top_id"][0] == rows[of_other]["all_id"] == run.facts["planted"][of_other]
    assert rows[of_other]["class"] < 1
    for row in rows.values():
        assert row["top"] == sorted(row["top"], reverse=True)
        assert len(set(row["top_id"])) == 5
    only = audited(run, guide, "within", within="class")["copies"]
    assert by_id(run, "within")[of_class]["top_id"][0] == run.facts["planted"][of_class]
    assert only["tau"].keys() == {"class"}


@pytest.mark.slow
def test_cuts_change_no_id_and_a_stopped_audit_goes_on(run: Run, guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    audited(run, guide)
    wanted = by_id(run)
    monkeypatch.setattr(copies, "CHUNK", 7)
    monkeypatch.setattr(copies, "PART_ROWS", 1)
    found, begun = [], copy_search.CopyFinder._samples

    def stops(finder: copy_search.CopyFinder, chunk: copy_search.CompareChunk) -> pa.Table:
        found.append(chunk.file)
        if len(found) == 4:
            raise KeyboardInterrupt
        return begun(finder, chunk)

    monkeypatch.setattr(copy_search.CopyFinder, "_samples", stops)
    with pytest.raises(KeyboardInterrupt):
        audited(run, guide, "again", batch=16)
    audited(run, guide, "again", batch=16)
    rows = by_id(run, "again")

    assert sorted({*found}) == sorted(one.data_file for one in run.store.receipts())
    assert len(found) == len({*found}) + 1, "only the chunk that was stopped is done twice"
    assert {name: row["top_id"] for name, row in rows.items()} == {
        name: row["top_id"] for name, row in wanted.items()}


@pytest.mark.parametrize("at", [60, -6])
@pytest.mark.fast_cases(1)
def test_a_damaged_part_is_made_again(run: Run, guide: str, at: int) -> None:
    """A page of it, or its end."""
    audited(run, guide)
    wanted, file = by_id(run), Path(str(run.folder), "audit/audit/copies/part-00000.parquet")
    content = bytearray(file.read_bytes())
    content[at] ^= 255
    file.write_bytes(content)
    with pytest.raises(DamagedFile, match="Run `rayexpand audit` with its file again"):
        by_id(run)
    audited(run, guide)

    assert by_id(run) == wanted


def test_held_out_images_that_are_seeds_are_left_out(run: Run, guide: str) -> None:
    with pytest.raises(UsageError, match=r"of 1,?000 held-out images can be compared"):
        audited(run, guide, held_out={"source": "digits", "split": "pool", "digits_split": 1})
    with pytest.raises(UsageError, match="297 real images, and 1,000 are needed"):
        audited(run, guide, held_out={"source": "digits"})


def test_an_extractor_that_cannot_see_faint_copies_is_refused(make_config: MakeConfig, guide: str,
                                                              tmp_path: Path) -> None:
    """The generator of random weights changes so much at strength 0.1 that its copies are none."""
    run = complete(make_config("img2img", ratio=1, data=DIGITS, steps=10, guidance_scale=1.0, sections={
        "prior": {"weights": str(tiny_pipeline(tmp_path / "sd"))}}))[0]
    found = audited(run, guide)["copies"]

    assert not found["sees_copies"]
    assert "this extractor cannot see copies here: it finds" in found["words"]
    assert "of the known copies img2img_0.1" in found["words"]
    assert "scopes" not in found
    assert found["known_copies"].keys() == {"exact", "jpeg_75", "crop_80", "flip", "blur_1", "brightness_1.2",
                                            "img2img_0.1", "img2img_0.3"}
    assert found["known_copies"]["exact"]["median"] == pytest.approx(1, abs=1e-6)


def test_mistakes_are_said_at_once(run: Run) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_audit({"audit": {"run": "nowhere", "copies": {
            "extractor": {"guide": "nowhere"}, "held_out": {"source": "imagefolder", "path": "nowhere"}}}})
    assert [line.partition(": ")[0] for line in caught.value.problems] == ["audit.run", "audit.copies.held_out.path"]
    with pytest.raises(ConfigError, match="audit: has nothing to do"):
        parse_audit({"audit": {"run": str(run.folder)}})


# ----------------------------------------------------------------------------------------------------------- statistics


def test_pixels_of_digits_cannot_see_copies() -> None:
    """The demonstration of what must be refused: centred pixels find the image itself, and not when it moves."""
    images = load_digits().images
    order = generator(row_key(0, "test", "", 0, 0, "digits")).permutation(len(images))
    held_out, seeds = (images[rows].reshape(len(rows), -1) for rows in (order[:1000], order[1000:]))
    centre = seeds.mean(axis=0)
    r_MD = unit_rows(seeds, centre)
    tau = statistics.threshold(References(r_MD).nearest(unit_rows(held_out, centre), 1)[0][:, 0])
    moved = np.stack([shift(one, (0, 1)) for one in images[order[1000:]]]).reshape(len(seeds), -1)
    known = {"exact": (r_MD * r_MD).sum(axis=1), statistics.FAINT: (unit_rows(moved, centre) * r_MD).sum(axis=1)}
    found = statistics.found_shares(known, tau)

    assert 0.95 < tau < 0.98
    assert found == {"exact": 1.0, statistics.FAINT: 0.0}
    assert "it finds 0 % of the known copies img2img_0.1" in statistics.cannot_see(found)


def test_thresholds() -> None:
    null_N = np.arange(1000) / 1000
    known = {"jpeg_75": np.linspace(0.99, 1, 50), "crop_80": np.linspace(0.99, 1, 50)}
    tau = statistics.threshold(null_N)

    assert (null_N > tau).sum() == 1, "one image in a thousand"
    assert statistics.copy_threshold(known, 0.5) == pytest.approx(0.9905, abs=2e-4)
    assert statistics.copy_threshold(known, 0.999) == 0.999, "at least tau"
    assert statistics.cannot_see({"exact": 1, statistics.FAINT: 0.9}) == ""
    assert "jpeg_75" in statistics.cannot_see({"jpeg_75": 0.5, "crop_80": 0.95})


def test_the_excess_has_an_exact_interval() -> None:
    """1 of 1000: [2.53e-5, .00556]; 50 of 1000: [.0373, .0654]."""
    assert statistics.exact_interval(1, 1000) == pytest.approx((2.53e-5, 0.00556), rel=2e-3)
    assert statistics.exact_interval(50, 1000) == pytest.approx((0.0373, 0.0654), rel=2e-3)
    found = statistics.excess(3, 2000)
    assert (found["observed"], found["expected"]) == (3, pytest.approx(2.0))
    assert found["excess"]["value"] == pytest.approx(0.0005)
    assert found["excess"]["high"] == pytest.approx(beta.ppf(0.975, 4, 1997) - 0.001)


# --------------------------------------------------------------------------------------------------------------- select


def test_copies_are_dropped_by_a_selection(run: Run, guide: str) -> None:
    audited(run, guide, "release")
    job = {"run": str(run.folder), "rule": {"kind": "seed_copies", "audit": "release", "threshold": 0.999999}}
    own, of_class, of_other = run.facts["planted"]
    for against, dropped in (("own", {own}), ("class", {of_class}), ("all", {of_class, of_other})):
        found = select(parse_select({**job, "name": against, "rule": {**job["rule"], "against": against}}))
        kept = read_selection(run, against)
        ids = sorted(by_id(run, "release"))
        assert {one for one, keep in zip(ids, kept.keeps(ids).to_pylist(), strict=True) if not keep} == dropped
        assert found["reasons"] == {"near_copy": len(dropped)}
    with pytest.raises(UsageError, match="has no audit 'other' of copies; it has release"):
        select(parse_select({**job, "name": "x", "rule": {**job["rule"], "audit": "other"}}))


def test_a_calibrated_selection_takes_the_threshold_of_the_audit() -> None:
    found = {"sees_copies": True, "words": "", "within": "all", "tau_copy": {"class": 0.8, "all": 0.9}}

    assert [SeedCopies(against=one).calibrated(found).threshold for one in ("own", "class", "all")] == [0.8, 0.8, 0.9]
    assert SeedCopies(threshold=0.5).calibrated(found).threshold == 0.5
    with pytest.raises(UsageError, match="knows no threshold, for it is blind"):
        SeedCopies().calibrated({**found, "sees_copies": False, "words": "it is blind"})
    assert SeedCopies(against="own").calibrated({**found, "tau_copy": {"all": 0.9}}).threshold == 0.9
    with pytest.raises(UsageError, match="has no threshold of all; it has class"):
        SeedCopies().calibrated({**found, "tau_copy": {"class": 0.8}})
    for threshold in ("calibrated", 0.5):
        with pytest.raises(UsageError, match="compared samples with seeds of their class alone"):
            SeedCopies(threshold=threshold).calibrated({**found, "within": "class"})
    for nothing in (float("nan"), 1.5):
        with pytest.raises(ValidationError):
            SeedCopies(threshold=nothing)


def test_the_own_pixels_in_several_classes_are_no_other_seed() -> None:
    """Also where they take all places that are kept."""
    h_MD = np.array([[1, 0], [1, 0], [1, 0], [0.6, 0.8]], np.float32)
    seeds = copy_search.ComparedSeeds(h_MD, np.ones(4, bool), np.array([7, 7, 7, 8], np.uint64), np.arange(4))
    config = CopiesConfig(held_out=DataConfig(source="digits"), top=1)
    found = copy_search.Searcher(seeds, config, "cpu")(h_MD[:1], np.array([0]), np.array([0]))

    assert (found["all_at"].tolist(), found["all"].tolist()) == ([3], [pytest.approx(0.6)])


def test_a_scope_without_other_seeds_is_left_out(run: Run) -> None:
    """Of a run with one seed of each class."""
    rows = pa.table({"label": np.arange(3), "strength": np.ones(3), "own": [0.1, 0.2, 0.9],
                     "class": np.full(3, np.nan), "all": [0.3, 0.8, 0.1]})
    tau = {"class": 0.5, "all": 0.5}
    found = copies._counts(run, rows, tau, tau)["scopes"]

    assert {name: one["copies"] for name, one in found.items()} == {"own": 1, "all": 1}


def test_an_audit_holds_the_tables_of_one_part(run: Run, guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 13 million samples numbers alone are held, and of the seeds a file."""
    monkeypatch.setattr(copies, "PART_ROWS", 16)
    monkeypatch.setattr(copies, "CHUNK", 4)
    held: dict[str, list[weakref.ref[pa.Table]]] = {"seeds": [], "samples": []}
    most: dict[str, int] = {}

    def work(job: Any, chunks: Any, found: Any) -> Iterator[tuple[int, pa.Table]]:
        tables = copy_search.in_process(job, chunks, found)
        if (kind := chunks[0].kind) not in held:
            yield from tables
            return
        assert found is None or isinstance(found.h_MD, FeatureFile)
        for number, table in tables:
            held[kind].append(weakref.ref(table))
            yield number, table
            del table
            most[kind] = max(most.get(kind, 0), sum(one() is not None for one in held[kind]))

    config = CopiesConfig(extractor={"guide": guide, "device": "cpu"}, held_out={"source": "digits", "split": "pool"},
                          known=20)
    found = copies.audit_copies(run, config, run.config.runtime, "audit/one/copies", work)

    assert found["samples"] == 80
    assert {kind: len(tables) for kind, tables in held.items()} == {"seeds": 10, "samples": 10}
    assert most["seeds"] <= 2
    assert most["samples"] <= 3


def test_rows_of_an_audit_are_taken_from_their_parts(run: Run, guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "PART_ROWS", 16)
    audited(run, guide)
    columns, rows = ["sample_id", "top_id", "own"], np.array([70, 3, 4, 41])

    assert len(part_names(run.files, "audit/audit/copies")) > 3
    assert copy_rows(run.files, "audit", columns, rows).to_pylist() == copy_rows(
        run.files, "audit", columns).take(pa.array(rows)).to_pylist()
    assert copy_rows(run.files, "audit", columns, rows[:0]).num_rows == 0
