"""What a YAML file is for: the keys at its top tell which verb takes it, and that verb's own loader checks it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayexpand.contract.settings import read

KEYS = {"arms": "train", "space": "sweep", "fit": "fit", "rule": "select", "reference": "evaluate"}


def verb_of(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """The verb of a file: the one with a key of its own, else `expand`. Raises ConfigError where it is no mapping."""
    raw = read(path, overrides)
    return next((verb for key, verb in KEYS.items() if key in raw), "expand")


def checked(path: str, overrides: Sequence[str] = (), *, device_here: bool = True) -> tuple[dict[str, Any], list[str]]:
    """(every field with its value, what is wrong with the world around it) of any job file, without loading a model.
    Raises ConfigError for mistakes in the file itself."""
    verb = verb_of(path, overrides)
    if verb == "expand":
        from rayexpand.runs import config as configs
        from rayexpand.runs.run import preflight

        run = configs.load(path, overrides)
        return configs.resolved(run), preflight(run, device_here=device_here)
    config, problems = _load(verb, path, overrides)
    return config.model_dump(mode="json"), problems


def _load(verb: str, path: str, overrides: Sequence[str]) -> tuple[Any, list[str]]:
    if verb == "train":
        from rayexpand.studies.config import load_study, study_preflight

        study = load_study(path, overrides)
        return study, study_preflight(study)
    if verb == "sweep":
        from rayexpand.studies.config import parse_study, study_preflight
        from rayexpand.studies.sweep.config import load_sweep

        sweep = load_sweep(path, overrides)
        return sweep, study_preflight(parse_study({**sweep.study, "name": sweep.name, "out": sweep.out}))
    if verb == "fit":
        from rayexpand.fitting.config import load_fit
        from rayexpand.fitting.config import preflight as fit_preflight

        fit = load_fit(path, overrides)
        return fit, fit_preflight(fit)
    if verb == "select":
        from rayexpand.evaluation.select import load as load_select

        return load_select(path, overrides), []
    from rayexpand.evaluation.evaluate import load as load_evaluate

    return load_evaluate(path, overrides), []
