from __future__ import annotations

from pathlib import Path

import pytest

from rayexpand.artifacts import store
from rayexpand.artifacts.store import publish
from rayexpand.contract.errors import StorageError


def test_more_steps_of_a_finished_training_begin_anew_and_say_so_first(tmp_path: Path,
                                                                       caplog: pytest.LogCaptureFixture) -> None:
    begun: list[str] = []

    def train(steps: int, data: str = "a", name: str = "steps") -> Path:
        def make(folder: Path) -> dict[str, object]:
            begun.append(caplog.text)
            return {}

        caplog.clear()
        return publish(str(tmp_path), "adapter", {"data": data, "recipe": {name: steps, "lr": 1}}, make)

    first = train(100)
    longer, other, first_guide, guide = (train(200), train(100, data="b"), train(5, name="epochs"),
                                         train(10, name="epochs"))

    assert begun[0] == begun[2] == ""
    for folder, before, said, changed in ((longer, first, begun[1], "recipe.steps: 100 -> 200"),
                                          (guide, first_guide, begun[4], "recipe.epochs: 5 -> 10")):
        assert f"{folder.name} is trained from its beginning" in said
        assert f"{before.name} ({changed})" in said
    assert other.name not in caplog.text
    train(200)
    assert (caplog.text, len(begun)) == ("", 5)


@pytest.mark.parametrize("content", [b"", b"{}{}", None])
def test_a_neighbour_that_cannot_be_read_ends_no_fit(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "guide-00000000").mkdir()
    file = tmp_path / "guide-00000000/artifact.json"
    file.mkdir() if content is None else file.write_bytes(content)  # a folder: as a file that this user may not read
    made = store.publish(str(tmp_path), "guide", {"steps": 1}, lambda folder: {})
    assert store.read_facts(made)["kind"] == "guide"
    with pytest.raises(StorageError, match=r"artifact\.json"):
        store.read_facts(tmp_path / "guide-00000000")
