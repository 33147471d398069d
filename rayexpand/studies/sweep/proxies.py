"""Early signals of a trial: what its samples are worth by measures that need no classifier, taken before it trains.

They are compared with the images that the sweep scores on, in one extractor; and, of guided methods, the mean of each
score that the method writes. Trials with the same samples share the files.

    proxies/<digest8>.json   of the samples of one repetition
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.contract.errors import UsageError
from rayexpand.contract.settings import digest
from rayexpand.data.subsets import fingerprint
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.evaluate import in_process
from rayexpand.runs.run import Run
from rayexpand.storage.files import Files
from rayexpand.storage.tables import healthy_json, read_json, replace_json
from rayexpand.studies.parts import Study, Trial
from rayexpand.studies.sample_scores import SCORES, score_samples
from rayexpand.studies.sections import SamplesConfig
from rayexpand.studies.sweep.proxies_config import OF_METHOD, EarlyConfig, ProxiesConfig, prefers
from rayexpand.studies.trials import arms_of

FOLDER = "proxies"


def measure_proxies(files: Files, proxies: ProxiesConfig, study: Study, trials: Sequence[Trial]) -> dict[str, float]:
    """Each proxy of a trial, the mean over its repetitions. Raises UsageError where the samples cannot be compared."""
    own = replace(study, config=study.config.model_copy(update={
        "samples": SamplesConfig(**proxies.model_dump())}))
    shared = [proxies.model_dump(mode="json"), extractors.extractor_hash(proxies.extractor, lambda *_: None),
              fingerprint(study.opened.index(reference := proxies.reference or study.config.test), reference)]
    arm, found = arms_of(study.config)[0], list[Mapping[str, Any]]()
    for trial in trials:
        run = study.opened.run(trial.run)
        name = f"{FOLDER}/{digest([*shared, run.config.name, arm.copies, arm.config.selection])[:8]}.json"
        if (one := healthy_json(files, name)) is None:
            if failed := score_samples(own, [trial], in_process):
                raise UsageError(f"proxies: {failed[0]}")
            measured = read_json(study.files, f"{SCORES}/{trial.name}.json")
            assert measured is not None
            one = {"scores": {**{key: score["value"] for key, score in measured["scores"].items()}, **_of_method(run)},
                   "n_samples": measured["n_samples"], "n_reference": measured["n_reference"],
                   "warnings": measured["warnings"]}
            replace_json(files, name, one)
        found.append(one["scores"])
    return {key: float(np.mean([one[key] for one in found])) for key in found[0] if all(key in one for one in found)}


def _of_method(run: Run) -> dict[str, float]:
    """The mean of each score over the kept samples of a run."""
    totals: dict[str, tuple[float, int]] = {}
    for receipt in run.store.receipts():
        if receipt.kept:
            pairs = pc.list_flatten(run.store.data(receipt, ["scores"])["scores"].combine_chunks())
            found = pa.table({"name": pairs.field("name"), "value": pairs.field("value")}).group_by("name").aggregate(
                [("value", "sum"), ("value", "count")])
            for one in found.to_pylist():
                total, rows = totals.get(one["name"], (0.0, 0))
                totals[one["name"]] = total + one["value_sum"], rows + one["value_count"]
    return {f"{OF_METHOD}{name}": total / rows for name, (total, rows) in totals.items() if rows}


def value_of(proxy: str, proxies: Mapping[str, float]) -> float:
    """The value of a proxy by its name or the beginning of it. Raises UsageError where there is none."""
    names = [name for name in proxies if name.startswith(proxy)]
    if not names:
        raise UsageError(f"early.proxy: '{proxy}' was not measured; there are {', '.join(proxies)}")
    return proxies[min(names, key=lambda name: (name != proxy, len(name)))]


def is_poor(early: EarlyConfig | None, proxies: Mapping[str, float], before: Sequence[Mapping[str, float]]) -> bool:
    """Whether a trial is not among the best by its proxy: below the quantile of those that were measured before it."""
    if early is None or len(before) < early.first:
        return False
    sign = -1.0 if (early.prefer or prefers(early.proxy)) == "lower" else 1.0
    known = [sign * value_of(early.proxy, one) for one in before]
    return sign * value_of(early.proxy, proxies) < float(np.quantile(known, 1 - early.keep))
