"""Files of YAML as they are read: merge keys, bounded sizes, and old names of fields."""

from __future__ import annotations

import logging
import pickle
import time
from pathlib import Path
from typing import Annotated, ClassVar

import pytest

from rayexpand.contract.errors import (
    ConfigError,
    EnvironmentFault,
    ModelError,
    OverBudget,
    ProgramFault,
    RayexpandError,
    RowFault,
    packed,
    unpacked,
)
from rayexpand.contract.settings import Later, Section, digest, override, put, read
from rayexpand.runs.blame import ProcessFault


def written(folder: Path, text: str) -> Path:
    (folder / "x.yaml").write_text(text)
    return folder / "x.yaml"


def test_keys_that_look_like_booleans_are_texts(tmp_path: Path) -> None:
    found = read(written(tmp_path, "stop: {on: folds, patience: 1}\nlater: yes\n"))
    assert found == {"stop": {"on": "folds", "patience": 1}, "later": True}


def test_merge_keys_are_read(tmp_path: Path) -> None:
    file = written(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")

    assert read(file)["b"] == {"x": 1, "y": 3}


def test_a_field_is_set_in_one_section_and_not_in_those_written_as_its_alias(tmp_path: Path) -> None:
    file = written(tmp_path, "a: &a {prior: {weights: x}}\nb: *a\nc: {<<: *a}\nd: [*a]\n")
    plain = {"prior": {"weights": "x"}}
    assert read(file, ["a.prior.weights=y"]) == {"a": {"prior": {"weights": "y"}}, "b": plain, "c": plain, "d": [plain]}


@pytest.mark.parametrize(("text", "words"), [
    ("a: 1\na: 2\n", "a is given twice"), ("x: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ("x: " + "9" * 6000, "is not YAML: .*digits"), ("- 1\n", "holds no mapping"),
    ("a: &a [*a]\n", "is not YAML|expands to more"), ("a: {<<: 3}\n", "is not YAML")])
def test_what_cannot_be_a_job_is_one_clear_error(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read(written(tmp_path, text))


def test_an_override_that_is_nested_too_deeply_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"a\.b: the value is not YAML"):
        override({}, ["a.b=" + "[" * 5000 + "]" * 5000])


def test_an_override_that_grows_through_aliases_is_refused() -> None:
    text = "[&a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"
    text += "".join(f", &{'abcdefgh'[i]} [{', '.join(['*' + 'abcdefgh'[i - 1]] * 10)}]" for i in range(1, 8)) + "]"
    with pytest.raises(ConfigError, match="expands to more than 1,000,000 values"):
        override({}, [f"a.b={text}"])


def test_a_file_that_grows_through_aliases_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    begun = time.process_time()
    with pytest.raises(ConfigError, match=r"expands to more than 1,000,000 values through its aliases"):
        read(written(tmp_path, "\n".join(lines)))

    assert time.process_time() - begun < 5


class Earlier(Section):
    x: int = 1


class Now(Section):
    x: int = 1
    y: Annotated[float, Later(0.5)] = 0.5
    z: Annotated[str, Later("old")] = "new"


def test_a_field_that_came_later_changes_no_digest_of_what_was_there() -> None:
    before = digest(Earlier().model_dump(mode="json"))

    assert digest(Now(z="old").model_dump(mode="json")) == before
    assert len({digest(one.model_dump(mode="json")) for one in (Now(z="old"), Now(), Now(z="old", y=0.6))}) == 3
    assert Now(**Earlier().model_dump(), z="old").model_dump() == {"x": 1}
    assert Now.model_validate_json(Now(y=0.7).model_dump_json()) == Now(y=0.7)


class Renamed(Section):
    OLD_NAMES: ClassVar = {"before": "now"}

    now: int = 1


def test_an_old_name_is_read_with_a_message_and_beside_the_new_one_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Renamed(before=3).now == 3  # type: ignore[call-arg]
    assert "before is now called now" in caplog.text
    assert Renamed(before=3).model_dump() == {"now": 3}  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="before is the old name of now; give one of them"):
        Renamed(before=3, now=4)  # type: ignore[call-arg]


def test_put_makes_the_sections_on_the_way() -> None:
    raw = {"a": {"b": 1}, "c": 3}
    put(raw, "a.d.e", 2)
    assert raw == {"a": {"b": 1, "d": {"e": 2}}, "c": 3}
    with pytest.raises(ConfigError, match=r"c\.d: .c. is not a section"):
        put(raw, "c.d", 1)


@pytest.mark.parametrize("error", [ModelError("no"), EnvironmentFault("disk"), OverBudget("3 rows"),
                                   RayexpandError("plain"), ProcessFault("cuda")])
def test_an_error_keeps_its_class_on_the_way_to_another_process(error: RayexpandError) -> None:
    found = unpacked(packed(error, "on a node"))

    assert (type(found), str(found), found.exit_code) == (type(error), f"{error} (on a node)", error.exit_code)


def test_mistakes_of_a_configuration_stay_apart_and_what_is_not_ours_is_a_fault_of_the_place() -> None:
    found = unpacked(packed(ConfigError("x.yaml", ["a: wrong", "b: wrong"])))
    assert isinstance(found, ConfigError)
    assert found.problems == ["a: wrong", "b: wrong"]
    for error in (OSError("x"), RuntimeError("CUDA error"), MemoryError("x"), ValueError("x")):
        assert type(unpacked(packed(error))) is EnvironmentFault
    assert str(unpacked(packed(RuntimeError("CUDA error"), "on a node"))) == "RuntimeError: CUDA error (on a node)"


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AssertionError("x"), NotImplementedError("x"),
                                   RecursionError("x"), ZeroDivisionError("x"), AttributeError("x"), NameError("x")])
def test_a_fault_of_this_package_in_another_process_is_none_of_the_place(error: Exception) -> None:
    try:
        raise error
    except Exception as raised:
        found = unpacked(packed(raised, "on a node"))
    assert (type(found), found.exit_code) == (ProgramFault, 70)
    for words in (f"{type(error).__name__}: {error} (on a node)", "fault of rayexpand", "test_settings.py"):
        assert words in str(found)
    again = unpacked(packed(found))
    assert (type(again), str(again)) == (ProgramFault, str(found))


@pytest.mark.parametrize("error", [ConfigError("x.yaml", ["a: wrong", "b: wrong"]), RowFault("missing", "gone"),
                                   ModelError("m"), OverBudget("b"), ProgramFault("p")])
def test_errors_travel_pickled_as_ray_sends_them(error: RayexpandError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))
