"""Keyed streams: whole keys count, fields cannot run together, bits do not depend on the processor."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

from rayexpand.contract import rng
from rayexpand.contract.rng import PlanRng, RowRng


def test_keys_that_agree_in_the_low_32_bits_give_different_noise():
    low, high = bytes([1, 2, 3, 4]), bytes(range(12))
    first = rng.generator(low + high).standard_normal(1000, dtype=np.float32)
    for byte in range(4, 16):
        key = bytearray(low + high)
        key[byte] ^= 1
        other = rng.generator(bytes(key)).standard_normal(1000, dtype=np.float32)
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.15
        assert not np.array_equal(first, other)


# Made once with numpy 2 on x86-64; a change here changes every sample ever planned.
NOISE_KEY = "ca08663bd88839b68add8708c1a4ac90"
NOISE_BITS = [1068980341, 3214383189, 3184319676]
UNIFORM_BITS = [1045044064, 1057015443]


def test_bits_are_known_and_equal_on_every_machine():
    row = RowRng(7, "img2img", "a/1.png", 2)
    assert rng.row_key(7, "img2img", "a/1.png", 2, 0, "noise").hex() == NOISE_KEY
    assert row.normals("noise", (3,)).view("<u4").tolist() == NOISE_BITS
    assert row.uniforms("e", (2,)).view("<u4").tolist() == UNIFORM_BITS


HASH_NOISE = """
import hashlib
from rayexpand.contract.rng import PlanRng, RowRng
row = RowRng(7, "img2img", "a/1.png", 2)
plan = PlanRng(7, "img2img").per_seed("copies", ["a", "b"])
print(hashlib.sha256(row.normals("noise", (4, 64, 64)).tobytes() + row.uniforms("e", (999,)).tobytes()
                     + plan.tobytes()).hexdigest())
"""


def features_to_disable() -> str:
    """Vector extensions numpy found beyond its baseline on this processor, newest included."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return " ".join(feature for feature in __cpu_dispatch__ if __cpu_features__.get(feature))


def noise_hash(**environment: str) -> str:
    found = subprocess.run([sys.executable, "-W", "error", "-c", HASH_NOISE], env={**os.environ, **environment},
                           capture_output=True, text=True, check=True)
    return found.stdout


def test_noise_bits_are_equal_under_two_cpu_capabilities():
    plain = noise_hash(ATEN_CPU_CAPABILITY="default", NPY_DISABLE_CPU_FEATURES=features_to_disable())
    assert plain == noise_hash()
    assert len(plain.strip()) == 64


def test_fields_cannot_run_together():
    keys = [rng.row_key(*fields) for fields in [
        (1, "m", "ab", 0, 0, "noise"), (1, "ma", "b", 0, 0, "noise"), (1, "m", "a", 0, 0, "bnoise"),
        (11, "m", "ab", 0, 0, "noise"), (1, "m", "ab0", 0, 0, "noise"), (1, "m", "ab", 1, 0, "noise"),
        (1, "m", "ab", 0, 1, "noise"), (1, "m", "ab", 10, 0, "noise"), (1, "m", "ab", 1, 1, "noise"),
        (1, "m", "ab\x00", 0, 0, "noise"), (1, "", "mab", 0, 0, "noise"), (1, "m", "ab", 0, 0, "noise\x00")]]
    assert len(set(keys)) == len(keys)


def test_streams_of_a_seed_leave_out_copy_and_attempt():
    rows = [RowRng(1, "m", "s", copy, attempt) for copy, attempt in ((0, 0), (3, 0), (3, 2))]
    for stream in rng.SEED_STREAMS:
        first, *others = [row.normals(stream, (8,)) for row in rows]
        assert all(np.array_equal(first, other) for other in others)
        assert not np.array_equal(first, RowRng(1, "m", "t", 0).normals(stream, (8,)))
    for stream in ("noise", "e", "b", "prompt", "mix", "ops"):
        assert len({row.normals(stream, (8,)).tobytes() for row in rows}) == 3


def test_streams_and_run_seeds_are_unrelated():
    draws = [RowRng(seed, method, "s", 0).normals(stream, (2000,))
             for seed in (0, 1) for method in ("a", "b") for stream in ("noise", "e")]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.1


def test_normals_are_standard_and_float32():
    normals = RowRng(0, "m", "s", 0).normals("noise", (200_000,))
    assert normals.dtype == np.float32
    assert abs(float(normals.mean())) < 0.01
    assert abs(float(normals.std()) - 1) < 0.01
    uniforms = RowRng(0, "m", "s", 0).uniforms("e", (200_000,))
    assert uniforms.dtype == np.float32
    assert 0 <= uniforms.min() < 0.001 < 0.999 < uniforms.max() < 1


def test_numbers_of_seeds_do_not_move_when_a_seed_is_added():
    plan, ids = PlanRng(3, "m"), [f"s{i}" for i in range(5000)]
    numbers = plan.per_seed("copies", ids)
    np.testing.assert_array_equal(plan.per_seed("copies", ["new", *ids])[1:], numbers)
    np.testing.assert_array_equal(plan.per_seed("copies", ids[::-1]), numbers[::-1])
    assert not np.array_equal(plan.per_seed("other", ids), numbers)
    assert not np.array_equal(PlanRng(4, "m").per_seed("copies", ids), numbers)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02
    assert len(np.unique(numbers)) == len(ids)


def test_one_stream_for_a_whole_dataset():
    draws = [PlanRng(3, "m").dataset(stream).random(4).tolist() for stream in ("a", "a", "b")]
    assert draws[0] == draws[1] != draws[2]
