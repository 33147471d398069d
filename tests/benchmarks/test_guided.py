"""What shares of a ceiling are measured against."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.guided import matmul_ceiling, operands


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ceiling_is_measured_with_random_numbers(dtype: str) -> None:
    a, b = operands(256, "cpu", dtype)
    for one in (a, b):
        assert one.float().mean().abs() < 0.02
        assert one.float().std() == pytest.approx(1, abs=0.02)
    assert not torch.equal(a, b)
    assert all(torch.equal(one, again) for one, again in zip((a, b), operands(256, "cpu", dtype), strict=True))


def test_a_ceiling_is_a_rate() -> None:
    assert 0 < matmul_ceiling("cpu", "float32", seconds=0.01) < 100
