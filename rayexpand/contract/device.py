"""Which device a model runs on, and with how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rayexpand.contract.errors import ModelError


def choose_device(name: str) -> torch.device:
    """auto is CUDA where torch sees it. Raises ModelError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device '{name}' is unknown; choose auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device '{name}' is not there: torch sees {torch.cuda.device_count()} CUDA devices; "
                         "choose auto or cpu")
    return device


def absent_device(name: str) -> list[str]:
    """Why a device is not here, in one line; none where it is."""
    try:
        choose_device(name)
    except ModelError as error:
        return [str(error)]
    return []


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """`count` CPU threads inside: sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
