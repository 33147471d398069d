"""Methods by name.

A built-in method is one public class in one module of this folder, named like the module. A package of the user's own
offers methods as entry points of the group `rayexpand.methods`. Any other class is named by its dotted path, and is
imported only where the user said to trust this very name (`trust`, or --trust on the command line): a configuration is
data, and the one in a run folder may come from anybody.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np
from pydantic import BaseModel

from rayexpand.contract.errors import ConfigError, RayexpandError
from rayexpand.contract.protocols import Method
from rayexpand.methods._copies import quota_copies as quota_copies
from rayexpand.methods._copies import ratio_copies as ratio_copies

GROUP = "rayexpand.methods"
TRUSTED = "RAYEXPAND_TRUSTED_METHODS"  # environment variable: dotted names, which child processes and actors inherit
_MEMBERS = ("needs", "copies", "draw", "expand")


def names() -> list[str]:
    """Names of the built-in methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def trust(*dotted: str) -> None:
    """Lets this process and those it starts import methods by these dotted names (`package.module.Class`)."""
    os.environ[TRUSTED] = ",".join(dict.fromkeys([*_trusted(), *dotted]))


def method_class(name: str) -> type:
    """Class of a method: built in, of an entry point, or a trusted `package.module.Class`.

    Raises ConfigError when there is no such method, it is not trusted, or it is not a method.
    """
    if name in names():
        module = importlib.import_module(f"{__name__}.{name}")
        (found,) = [value for key, value in vars(module).items()
                    if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "expand")
                    and not key.startswith("_")]
        return found
    if (offered := _offered().get(name)) is not None:
        return _checked(name, offered.load)
    if "." not in name:
        known = sorted({*names(), *_offered()})
        near = get_close_matches(name, known, n=1)
        hint = f", did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
        raise ConfigError("method.name", [f"method.name: unknown method '{name}'{hint}"])
    if name not in _trusted():
        raise ConfigError("method.name", [f"method.name: {name} would import code that this configuration names. If "
                                          f"it is yours, say so: --trust {name}, or in Python rayexpand.trust("
                                          f"'{name}'), or offer it as an entry point of the group {GROUP}"])
    module_name, _, class_name = name.rpartition(".")
    return _checked(name, lambda: getattr(importlib.import_module(module_name), class_name))


def load_method(name: str, fields: Mapping[str, Any]) -> Method:
    """Method `name` with `fields`. Raises pydantic.ValidationError for wrong fields, ConfigError for a wrong name."""
    return method_class(name)(**{**fields, "name": name})


def label_words(method: Method, n_classes: int) -> str:
    """What the label of a sample is, in words, where it is a mixture of classes; "" where it is one class.

    Raises ConfigError where the method's own code fails.
    """
    try:
        if (own := getattr(method, "label_words", None)) is not None:
            return str(own())
        if not hasattr(method, "soft_label"):
            return ""
        source, target = np.array([0]), np.array([n_classes - 1])
        label = method.soft_label(source, target, np.array([0.5]), n_classes)
        alone = np.array_equal(label, np.eye(n_classes)[target])
    except Exception as error:
        raise ConfigError("method", [f"method: soft_label of {method.name} failed for class 0 painted as class "
                                     f"{n_classes - 1} ({type(error).__name__}: {error}); mend it"]) from error
    return "" if alone else "They follow from `source_label`, `label` and `strength` by the method's `soft_label`."


def label_words_of(config: Mapping[str, Any], n_classes: int) -> str | None:
    """`label_words` of the section `method` of a run.json; None where its method cannot be asked here."""
    try:
        return label_words(load_method(str(config["name"]), config), n_classes)
    except (RayexpandError, ValueError, TypeError):
        return None


def _trusted() -> list[str]:
    return [one for one in os.environ.get(TRUSTED, "").split(",") if one]


def _offered() -> dict[str, EntryPoint]:
    return {one.name: one for one in entry_points(group=GROUP)}


def _checked(name: str, load: Any) -> type:
    """The class that `load` imports, if it is one of a method; nothing of it has been called before that is known."""
    try:
        found = load()
    except Exception as error:
        what = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ConfigError("method.name", [f"method.name: {name} cannot be imported ({what})"]) from error
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ConfigError("method.name", [f"method.name: {name} is no method; a method is a class with settings "
                                          "(pydantic) and the functions of rayexpand.contract.protocols.Method"])
    if lacking := [member for member in _MEMBERS if not callable(getattr(found, member, None))]:
        raise ConfigError("method.name", [f"method.name: {name} has no {', '.join(lacking)}; see "
                                          "rayexpand.contract.protocols.Method"])
    return found
