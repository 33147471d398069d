"""Frozen sections of YAML files: every unknown key is an error, and all mistakes are reported at once."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from rayexpand.contract.errors import ConfigError, looked_at

log = logging.getLogger(__name__)


MOST_VALUES = 1_000_000  # of one file
MOST_LEVELS = 100  # of one file; a job file has a handful
DEVICES = r"auto|cpu|cuda(:[0-9]+)?"
_MERGE = "tag:yaml.org,2002:merge"  # the key <<
_BOOL, _TEXT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class Later:
    """In the annotation of a field that came later: while it is `before`, which is what was done without it, it is not
    written, so that no digest of an older configuration changes."""

    before: Any


def _known_device(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(DEVICES, value):
        raise ValueError(f"device {value!r} is unknown; choose auto, cpu, cuda or cuda:N")
    return value


Device = Annotated[str, BeforeValidator(_known_device), Field(json_schema_extra={"pattern": f"^({DEVICES})$"})]


class Section(BaseModel):
    """A section of a file, and a method. A new field is `Annotated[float, Later(0.5)] = 0.5`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    OLD_NAMES: ClassVar[Mapping[str, str]] = {}  # old name of a field -> its name, read for as long as old files are

    @model_validator(mode="before")
    @classmethod
    def _by_their_names(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not (old := [name for name in cls.OLD_NAMES if name in value]):
            return value
        for name in old:
            if cls.OLD_NAMES[name] in value:
                raise ValueError(f"{name} is the old name of {cls.OLD_NAMES[name]}; give one of them")
            log.warning("%s is now called %s; the old name is still read, please change the file", name,
                        cls.OLD_NAMES[name])
        return {cls.OLD_NAMES.get(name, name): one for name, one in value.items()}


    @model_serializer(mode="wrap")
    def _without_later(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written = handler(self)
        for name, field in type(self).model_fields.items():
            if any(isinstance(one, Later) and getattr(self, name) == one.before for one in field.metadata):
                written.pop(name, None)
        return written


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error instead of a silent choice, deep nesting is one at once, and the key
    `on` is a text."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MOST_LEVELS:
            raise RecursionError("it is nested too deeply")
        found = super().compose_node(parent, index)
        self._depth -= 1
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if key.tag == _BOOL:
                key.tag = _TEXT
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        if twice := [str(key) for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice (line {node.start_mark.line + 1} and below)")
        return super().construct_mapping(node, deep)


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file with `a.b=value` overrides, not yet checked. Raises ConfigError."""
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a SafeLoader)
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read ({error.strerror}){looked_at(path)}; give the path of a YAML "
                                      "file such as jobs/digits/expand-img2img.yaml"]) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        tabs = "; indent with spaces, not tabs" if "\\t" in str(error) else ""
        raise ConfigError(str(path), [f"is not YAML: {error}{tabs}"]) from error
    except RecursionError as error:
        raise ConfigError(str(path), ["is nested too deeply; a job file has a handful of levels"]) from error
    if not isinstance(raw, dict):
        raise ConfigError(str(path), ["holds no mapping at its top; expected sections such as name, data, method"])
    _refuse_bomb(raw, str(path))
    return override(_written_out(raw), overrides)


def _refuse_bomb(value: Any, where: str) -> None:
    if _size(value, {}) > MOST_VALUES:
        raise ConfigError(where, [f"expands to more than {MOST_VALUES:,} values through its aliases (&, *); write out "
                                  "what you need"])


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values there are if every alias is written out; each is looked at once."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES  # of one that holds itself
        known[id(value)] = 1 + sum(_size(one, known) for one in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def _written_out(value: Any) -> Any:
    """The same with every alias a copy of its own, so that setting a field of one section leaves the others alone."""
    if isinstance(value, dict):
        return {key: _written_out(one) for key, one in value.items()}
    return [_written_out(one) for one in value] if isinstance(value, list) else value


def override(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with each `a.b=value` applied. Raises ConfigError."""
    for one in overrides:
        _apply(raw, one)
    return raw


def digest(value: Any) -> str:
    """sha256 of JSON data in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line per field that differs: `a.b: old -> new`."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines


def put(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets a dotted field of a mapping in place. Raises ConfigError where something else than a section is on the
    way."""
    *sections, leaf = dotted.split(".")
    target = raw
    for section in sections:
        child = target.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError("--set", [f"{dotted}: '{section}' is not a section"])
        target = child
    target[leaf] = value


def _apply(raw: dict[str, Any], one: str) -> None:
    dotted, sign, value = one.partition("=")
    if not sign or not dotted:
        raise ConfigError("--set", [f"{one!r}: expected a.b=value, for example --set method.strength=0.7"])
    try:
        found = yaml.load(value, _Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise ConfigError("--set", [f"{dotted}: the value is not YAML ({error})"]) from error
    _refuse_bomb(found, "--set")
    put(raw, dotted, found)


def mistakes(error: ValidationError, model: Any, prefix: str) -> list[str]:
    """One line for each mistake pydantic found in a `model`: the dotted field, what is wrong, what was meant."""
    lines = []
    for problem in error.errors():
        if problem["type"] == "default_factory_not_called":
            continue  # the default follows from a field that is itself wrong, and named
        loc = [str(part) for part in problem["loc"]]
        dotted = prefix + ".".join(loc)
        if problem["type"] == "extra_forbidden":
            known = _known_fields(model, loc[:-1])
            near = get_close_matches(loc[-1], known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
            lines.append(f"{dotted}: unknown field, {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{dotted}: is required and missing")
        elif problem["type"] in ("model_type", "dict_type", "model_attributes_type"):
            lines.append(f"{dotted}: must be a section with fields, such as {{{_known_fields(model, loc)[0]}: ...}}, "
                         f"got {problem['input']!r}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "string_pattern_mismatch":
                message = "may hold letters, digits, '.', '_' and '-', and must start with a letter or digit"
            shown = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
            lines.append(f"{dotted.rstrip('.')}: {message}{shown}")
    return lines


def _known_fields(model: Any, loc: Sequence[str]) -> list[str]:
    """Fields of the section at `loc`, through optional sections and lists or mappings of sections."""
    for part in loc:
        if part in model.model_fields:  # else the key of a mapping or the place in a list of sections
            model = _section(model.model_fields[part].annotation)
    return list(model.model_fields) if model is not None else ["name"]  # a mapping whose keys are free


def _section(annotation: Any) -> Any:
    """The model in an annotation such as Model, Model | None or dict[str, Model]."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((found for one in get_args(annotation) if (found := _section(one))), None)
