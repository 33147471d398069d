"""A checkpoint with a damaged byte counts as none and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rayexpand.storage.checkpoints import Checkpoints

TENSORS = {"model.w": torch.arange(6.0).reshape(2, 3), "model.b": torch.ones(2, dtype=torch.bfloat16),
           "optimiser.0.step": torch.tensor(3.0)}


def test_every_flipped_bit_counts_as_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Checkpoints(tmp_path, 1)
    kept.save("guide", TENSORS, {"step": 3})
    found = kept.load("guide")
    assert found is not None
    assert found[1] == {"step": 3}
    assert all(torch.equal(found[0][name], one) for name, one in TENSORS.items())
    file = tmp_path / "guide.safetensors"
    whole, same = file.read_bytes(), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        if (found := kept.load("guide")) is not None:  # a byte that says nothing, such as a space of the header
            assert found[1] == {"step": 3}
            assert all(torch.equal(found[0][name], one) for name, one in TENSORS.items())
            same += 1
    assert same < 0.2 * len(whole)
    assert "guide.safetensors is damaged" in caplog.text


def test_a_checkpoint_of_an_older_version_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "guide.safetensors", {"state": '{"step": 3}'})
    assert Checkpoints(tmp_path, 1).load("guide") is not None
