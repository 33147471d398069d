"""The page of a run shows its audit: counts, known copies, and samples beside the seeds nearest to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayexpand.evaluation import copy_statistics as statistics
from rayexpand.evaluation.audit_files import committed_sha256, register
from rayexpand.reports.run import write_report
from rayexpand.runs.run import Run
from rayexpand.storage.tables import parquet_bytes, replace_json
from tests.conftest import MakeConfig, complete


@pytest.fixture
def run(make_config: MakeConfig) -> Run:
    """40 samples, audited by hand: the later a sample, the nearer it is to the first seed."""
    run = complete(make_config("Fake", ratio=2))[0]
    rows = [{"sample_id": row["sample_id"], "file": one.data_file, "label": row["label"], "own": 0.5,
             "own_id": row["seed_id"]} for one in run.store.receipts()
            for row in run.store.data(one, ["sample_id", "label", "seed_id"]).to_pylist()]
    first, near = run.plan.index.seed_ids[0], [0.6 + 0.01 * i for i in range(len(rows))]
    table = pa.table({**{name: [row[name] for row in rows] for name in rows[0]}, "all": pa.array(near, pa.float32()),
                      "top_id": [[first, row["own_id"]] for row in rows], "top": [[s, 0.5] for s in near]})
    run.files.make_folder("audit/release/copies")
    run.files.replace("audit/release/copies/part-00000.parquet", parquet_bytes(table, {}))
    return run


def page(run: Run, **entry: Any) -> str:
    shares = {"images": 20, "median": 0.9, "found": {"all": 0.95}}
    replace_json(run.files, "audit/release/result.json", {"name": "release", "copies": {
        "created": 1.0, "within": "all", "tau": {"all": 0.9}, "tau_copy": {"all": 0.95}, "words": "",
        "sees_copies": True, "known_copies": {"jpeg_75": shares}, "extractor": {"name": "guide x"},
        "committed_sha256": committed_sha256(run.store.receipts()), **entry}})
    register(run.files, "release")
    text = Path(str(write_report(str(run.folder)))).read_text()
    return text[text.index('<section id="copies">'):text.index("</section>", text.index('<section id="release">'))]


def test_samples_beside_their_nearest_seeds(run: Run) -> None:
    counts = {"of": 40, "copies": 3, "candidates": 4}
    found = page(run, scopes={"own": counts, "all": {**counts, "null": statistics.excess(7, 40)}})
    ids = re.findall(r"sample ([\w./]+)<", found)

    assert "JPEG of quality 75" in found
    assert "95.0 %" in found
    assert "<b>FAIL</b>" in found
    assert "3 of another seed of all" in found
    assert len(ids) == 40, "20 nearest and 20 by chance"
    wanted = [one for receipt in run.store.receipts()
              for one in run.store.data(receipt, ["sample_id"])["sample_id"].to_pylist()]
    assert ids[:20] == wanted[:-21:-1]
    assert set(ids[20:]) != set(ids[:20])
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", found)
    assert captions[:3] == ["own 0.5000", "0.9900", "own 0.5000"]


def test_an_extractor_that_sees_no_copies_is_said_instead_of_a_share(run: Run) -> None:
    found = page(run, words="this extractor cannot see copies here", sees_copies=False)

    assert "<b>this extractor cannot see copies here.</b>" in found
    assert "samples are copies" not in found
    assert "<b>NOT MEASURED</b>" in found
    assert "<code>rayexpand export</code>" in found, "commands stand as commands"
    assert "`" not in found


def test_a_run_without_an_audit_has_no_such_section(make_config: MakeConfig) -> None:
    run = complete(make_config("Fake", ratio=1))[0]
    text = Path(str(write_report(str(run.folder)))).read_text()

    assert '<section id="copies">' not in text
    assert "no audit has looked for copies" in text
