"""Keyed random streams: the only source of randomness in the package.

A stream is a Philox generator whose 128-bit key is a hash of (run seed, method, seed id, copy, attempt, stream name).
It never depends on rank, time, process or batch position, so a row can be drawn again anywhere. Numbers are made on
the CPU by numpy and moved afterwards: torch's CPU generator keeps the low 32 bits of a seed only, and its normals
differ between CPU instruction sets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# Streams of a seed rather than of a copy: its crop and its posterior sample are shared by all copies and attempts,
# so that one encoded latent serves them all (DistDiff caches it once per seed).
SEED_STREAMS = frozenset({"crop", "posterior"})


def row_key(run_seed: int, method: str, seed_id: str, copy: int, attempt: int, stream: str) -> bytes:
    """16-byte key of one stream. Fields are length-prefixed, so no two field tuples share an encoding."""
    if stream in SEED_STREAMS:
        copy = attempt = 0
    hasher = hashlib.blake2b(digest_size=16)
    for field in (str(run_seed), method, seed_id, str(copy), str(attempt), stream):
        raw = field.encode()
        hasher.update(len(raw).to_bytes(8, "little") + raw)
    return hasher.digest()


def generator(key: bytes) -> np.random.Generator:
    """Philox generator of a 16-byte key."""
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype="<u8")))


@dataclass(frozen=True, slots=True)
class RowRng:
    """The streams of one row (one copy of one seed, one attempt)."""

    run_seed: int
    method: str
    seed_id: str
    copy: int
    attempt: int = 0

    def __call__(self, stream: str) -> np.random.Generator:
        return generator(row_key(self.run_seed, self.method, self.seed_id, self.copy, self.attempt, stream))

    def normals(self, stream: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32 standard normals of `shape`."""
        return self(stream).standard_normal(shape, dtype=np.float32)

    def uniforms(self, stream: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32 uniforms on [0, 1) of `shape`."""
        return self(stream).random(shape, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class PlanRng:
    """Randomness of plan-wide decisions: one number per seed, or one stream for a whole dataset."""

    run_seed: int
    method: str

    def per_seed(self, stream: str, seed_ids: Iterable[str]) -> np.ndarray:
        """float64[n] on [0, 1): each a function of its seed id alone, so adding a seed moves no other seed."""
        prefix = hashlib.blake2b(row_key(self.run_seed, self.method, "", 0, 0, stream), digest_size=8)
        numbers = bytearray()
        for seed_id in seed_ids:
            hasher = prefix.copy()
            hasher.update(seed_id.encode())
            numbers += hasher.digest()
        return (np.frombuffer(bytes(numbers), dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def dataset(self, stream: str) -> np.random.Generator:
        """One generator for a decision over the whole dataset (for example class-uniform references)."""
        return generator(row_key(self.run_seed, self.method, "", 0, 0, "dataset/" + stream))
