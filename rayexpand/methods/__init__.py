"""Methods by name.

A method is one public class in one module of this folder, named like the module; a dotted path names a class in a
user's own package. Adding a method is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from rayexpand.contract.errors import ConfigError
from rayexpand.contract.protocols import Method


def names() -> list[str]:
    """Names of the built-in methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def method_class(name: str) -> type:
    """Class of a built-in method, or of a dotted `package.module.Class`.

    Raises ConfigError when there is no such method.
    """
    if "." in name:
        module_name, _, class_name = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise ConfigError("method.name", [f"{name}: cannot be imported ({error})"]) from error
        return found
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        hint = f", did you mean '{near[0]}'?" if near else f"; built in: {', '.join(names())}"
        raise ConfigError("method.name", [f"method.name: unknown method '{name}'{hint}"])
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = [value for key, value in vars(module).items()
                if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "expand")
                and not key.startswith("_")]
    return found


def load_method(name: str, fields: Mapping[str, Any]) -> Method:
    """Method `name` with `fields`. Raises pydantic.ValidationError for wrong fields, ConfigError for a wrong name."""
    return method_class(name)(**{**fields, "name": name})


