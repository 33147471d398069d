"""Features in a file: the same rows as an array, in any order, in any process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayexpand.contract.rng import PlanRng
from rayexpand.evaluation import copy_search, search
from rayexpand.evaluation.chunk_columns import ChunkColumns
from rayexpand.evaluation.copy_search import ComparedSeeds
from rayexpand.evaluation.feature_file import FeatureFile
from rayexpand.evaluation.select_rules import FEATURES, NearCopies, ScoredSamples


def features(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 6), np.float32)


def test_rows_come_back_whatever_their_order() -> None:
    h_ND, order = features(20), np.random.default_rng(1).permutation(20)
    with FeatureFile(20) as file:
        for start in (10, 0, 15, 5):
            file.write(start, h_ND[start:start + 5])
        other = pickle.loads(pickle.dumps(file))

        assert np.array_equal(file.read(3, 17), h_ND[3:17])
        assert np.array_equal(file[order], h_ND[order])
        assert np.array_equal(file[order[:0]], h_ND[:0])
        assert np.array_equal(other.ordered(order)[np.array([4, 5, 0])], h_ND[order][[4, 5, 0]])
        assert len(other.ordered(order[:7])) == 7
        path = file.path
    assert not path.exists()


def test_the_file_of_a_killed_process_goes_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = "import os; from rayexpand.evaluation.feature_file import FeatureFile as F; F(1); one = F(1); os.kill(" \
        "os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", killed], env={**os.environ, "TMPDIR": str(tmp_path)}).returncode == -9
    (stale,) = tmp_path.iterdir()

    with FeatureFile(1) as mine, FeatureFile(1) as other:
        assert {*tmp_path.iterdir()} == {mine.path, other.path}
        assert stale not in (mine.path, other.path)


def test_seeds_in_a_file_are_those_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their identity, which audits before this have in their parts, stays."""
    h_MD = features(9)
    whole = ComparedSeeds(h_MD, np.ones(9, bool), np.arange(9, dtype=np.uint64), np.zeros(9, np.int32))
    monkeypatch.setattr(copy_search, "_ROWS", 4)
    tables = [(start, pa.table({"features": pa.FixedSizeListArray.from_arrays(h_MD[start:start + 3].ravel(), 6),
                                "sound": [True] * 3, "pixels": pa.array(range(start, start + 3), pa.uint64())}))
              for start in (6, 0, 3)]
    with FeatureFile(9) as file:
        found = ComparedSeeds.of(tables, whole.label_M, file)

        assert isinstance(found.h_MD, FeatureFile)
        assert (found.sha256, found.width) == (whole.sha256, 6)
        loaded = found.loaded()
    for name in ("h_MD", "sound_M", "pixels_M", "label_M"):
        assert np.array_equal(getattr(loaded, name), getattr(whole, name))


def test_rows_of_length_one_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    h_ND, centre_D = features(50), features(1, 1)[0].astype(np.float64)
    wanted = [search.unit_rows(h_ND), search.unit_rows(h_ND, centre_D)]
    monkeypatch.setattr(search, "BLOCK", 7)

    assert all(np.array_equal(one, other) for one, other in zip(
        wanted, [search.unit_rows(h_ND), search.unit_rows(h_ND, centre_D)], strict=True))


def test_near_copies_are_the_same_from_a_file() -> None:
    h_ND = search.unit_rows(np.repeat(features(12), 2, axis=0) + 0.01 * features(24, 1))
    order = np.random.default_rng(2).permutation(24)

    def rows(of: object) -> ScoredSamples:
        return ScoredSamples([str(i) for i in range(24)], np.arange(24) // 8, np.arange(24) // 2, np.ones(3, int),
                             {FEATURES: of})

    with FeatureFile(24) as file:
        file.write(0, h_ND[order])
        rule = NearCopies(threshold=0.99)
        decided = [rule.decide(rows(one), PlanRng(0, "select")) for one in (h_ND, file.ordered(np.argsort(order)))]
    assert (decided[0].code_N > 0).any()
    assert np.array_equal(decided[0].code_N, decided[1].code_N)
    assert np.array_equal(decided[0].score_N, decided[1].score_N, equal_nan=True)


def test_columns_of_chunks_hold_no_table() -> None:
    tables = {f"{i}": pa.table({"row": np.arange(3) + 3 * i, "score": np.full(3, i / 2),
                                FEATURES: pa.FixedSizeListArray.from_arrays(features(3, i).ravel(), 6)})
              for i in range(4)}
    whole, held = pa.concat_tables(tables.values()), [weakref.ref(one) for one in tables.values()]
    found = ChunkColumns(dict.fromkeys(tables, 3))
    assert found.missing == {"0", "1", "2", "3"}
    for key in ("2", "0", "3", "1"):
        found.add(key, tables.pop(key))
        assert key in found

    assert not found.missing
    assert [one() for one in held] == [None] * 4
    assert {name: one.tolist() for name, one in found.columns.items() if isinstance(one, np.ndarray)} == {
        name: whole[name].to_pylist() for name in ("row", "score")}
    file = found.columns[FEATURES]
    assert isinstance(file, FeatureFile)
    assert np.array_equal(file.read(0, 12), np.concatenate([features(3, i) for i in range(4)]))
