"""The runs a study still has to make, with models shared between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from rayexpand.contract.protocols import Tools
from rayexpand.contract.settings import digest
from rayexpand.fitting.config import ARTIFACTS
from rayexpand.fitting.fit import fit_for, with_artifacts
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig
from rayexpand.runs.inputs import features_of, prototypes_of
from rayexpand.storage.places import is_url
from rayexpand.studies.parts import Study


def pending_runs(study: Study, on_model: Callable[[str, int, int], None] | None = None) -> Iterator[runs.Run]:
    """The expansions that have shards to make, each once, ready to be driven, with what they need fitted."""
    each = {one.folder: (name, one) for (name, _), one in study.expansions.items() if isinstance(one, RunConfig)}
    for name, made in each.values():
        wanted = study.config.expansions[name].fit if name in study.config.expansions else None
        if wanted is not None:
            found = fit_for(made, on_model or (lambda *_: None), wanted.guide, wanted.adapter, groups=wanted.groups,
                            out=ARTIFACTS if is_url(made.out) else f"{made.out.rpartition('/')[0]}/{ARTIFACTS}")
            made = with_artifacts(made, found)
        run = runs.prepare(made, on_model, where=f"expansions.{made.name}")
        if runs.pending_jobs(run):
            yield run


def models_key(run: runs.Run) -> str:
    """Runs with one key load the same models; their prototypes and features may differ. An adapter is in the prior."""
    method, models = run.config.method, run.facts["models"]
    return digest({"models": {name: models[name] for name in ("prior", "adapter", "guide") if name in models},
                   "lora_scale": getattr(method, "lora_scale", 1.0) if "adapter" in models else None,
                   "classes": run.plan.index.classes.name, "prior": run.config.prior.model_dump(mode="json")})


def shared_tools(run: runs.Run, loaded: Mapping[str, Tools]) -> Tools | None:
    """What an earlier run loaded (`loaded` by `models_key`), with prototypes and features of this one; None: load
    anew."""
    tools = loaded.get(models_key(run))
    if tools is None:
        return None
    keys = run.plan.index.classes.key
    own = prototypes_of(run.config, keys, run.facts["models"].get("guide")) if "prototypes" in (
        run.config.method.needs()) else None
    return replace(tools, **{"prototypes": own, "class_features": None, "image_features": None,
                             **features_of(run.config, keys)})
