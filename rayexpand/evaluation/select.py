"""The verb `select`: decide after a run which of its samples stay, without touching a data file.

    name: confident
    run: runs/digits-lecf
    rule: {kind: clip_confidence, threshold: 0.5}      # select_rules.py has the rules

The decision is <run>/selections/confident.parquet: sample_id, keep, reason, score, one line for every kept sample of
the run, in the order of the plan; what was decided, from what, and how it counts up is in its schema metadata under
`rayexpand`. `export`, `evaluate` and the arms of a study take it by its name. It is made once: the same command again
changes nothing, other settings under the same name are refused, and so is a run that has changed since.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, SerializeAsAny, ValidationError

from rayexpand import __version__
from rayexpand.contract.errors import ConfigError, DigestMismatch, UsageError
from rayexpand.contract.prompts import Template, format_prompt
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import Receipt
from rayexpand.contract.secrets import secret_problems
from rayexpand.contract.settings import Device, Section, differences, mistakes, read
from rayexpand.evaluation import select_scores as by_guide
from rayexpand.evaluation.audit_files import read_audit, similarities_of
from rayexpand.evaluation.select_rules import (
    ANCHOR,
    BY_GUIDE,
    CONTRAST,
    COPIES,
    FEATURES,
    REASONS,
    RULES,
    Decision,
    Random,
    Rule,
    SeedCopies,
)
from rayexpand.evaluation.select_samples import LINES, KeptSamples, in_plan_order, kept_samples
from rayexpand.evaluation.select_scores import OnRows, Score, ScoreJob
from rayexpand.models.guide_files import check_guide
from rayexpand.runs.config import ClusterConfig, GuideConfig, RuntimeConfig, guide_of_run
from rayexpand.runs.joined import open_samples
from rayexpand.runs.run import Run
from rayexpand.runs.store import FOOTER, Totals, totals
from rayexpand.storage.tables import parquet_facts, parquet_of


class SelectConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the decision is "
                      "<run>/selections/<name>.parquet")
    run: str = Field(min_length=1, description="run or loop folder to choose from; nothing of it may be pending")
    rule: SerializeAsAny[Rule] = Field(description="what stays: its kind and fields")
    guide: GuideConfig | None = Field(None, description="which guide judges; null: the one the run is configured with")
    prompt: Template = Field("a photo of a {name}", description="what a CLIP guide is asked of each class (CLIP, "
                             "section 3.1.4): template with {name}, {metaclass}, {noun}")
    captions: tuple[Template, Template] = Field(
        ("a photo with a {metaclass} on it", "a photo without a {metaclass} on it"),
        description="the two captions of clip_contrast (Diff-Mix)")
    batch: int = Field(64, ge=1, description="images of one guide call; scores may depend on it in the last digit")
    seed: int = Field(0, ge=0, description="keys random choices and the order of equal scores")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    runtime: RuntimeConfig = RuntimeConfig()
    cluster: ClusterConfig = ClusterConfig()


def load(path: str, overrides: Sequence[str] = ()) -> SelectConfig:
    """Configuration of a YAML file. Raises ConfigError with every mistake, those of the run included."""
    return parse(read(path, overrides), path)


def parse(raw: Mapping[str, Any], where: str = "configuration") -> SelectConfig:
    """Configuration of a mapping. Raises ConfigError with every mistake."""
    config, problems = checked(raw)
    problems += _run_problems(raw, config)
    if problems or config is None:
        raise ConfigError(where, problems)
    return config


def checked(raw: Mapping[str, Any]) -> tuple[SelectConfig | None, list[str]]:
    """Configuration of a mapping, None where it is none, and every mistake that does not need the run."""
    rule, problems = _rule(raw.get("rule"))
    problems += secret_problems(raw)
    config: SelectConfig | None = None
    try:
        config = SelectConfig(**{**{str(key): value for key, value in raw.items()}, "rule": rule or _NOTHING})
    except ValidationError as error:
        problems = mistakes(error, SelectConfig, "") + problems
    if config is not None and config.guide is not None:
        problems += [f"guide.weights: {one}" for one in check_guide(config.guide.weights, config.guide.checkpoint)]
    return config, problems


_NOTHING = Random(n=1)  # stands in for a rule that is wrong, so that the other fields are checked too


def _rule(raw: Any) -> tuple[Rule | None, list[str]]:
    kind = raw.get("kind") if isinstance(raw, Mapping) else None
    if not isinstance(raw, Mapping) or kind not in RULES:
        near = get_close_matches(str(kind), RULES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(RULES)}"
        return None, [f"rule.kind: {'is missing' if kind is None else f'{kind!r} is unknown'}; {hint}"]
    try:
        return RULES[str(kind)](**{str(key): value for key, value in raw.items()}), []
    except ValidationError as error:
        return None, mistakes(error, RULES[str(kind)], "rule.")


def _run_problems(raw: Mapping[str, Any], config: SelectConfig | None) -> list[str]:
    if not isinstance(folder := raw.get("run"), str) or not folder:
        return []
    try:
        run = open_samples(folder)
        pending = run.totals().pending
    except UsageError as error:
        return [f"run: {error}"]
    judged = config is not None and config.guide is None and config.rule.wants() & BY_GUIDE
    problems = guide_of_run("guide.weights", run.config) if judged else []
    if pending:
        problems.append(f"run: {pending} planned samples of {folder} are not decided yet, and a rule looks at all of "
                        "them; run `rayexpand expand` with its file first")
    return problems


# ------------------------------------------------------------------------------------------------------------- the verb


def select(config: SelectConfig, score: Score = by_guide.in_process,
           on_rows: OnRows = lambda task, done, total: None) -> dict[str, Any]:
    """The decision as its file states it, with `file` and `made` (False where it was there already).

    planned = kept + rejected + failed, where rejected counts what the run refused and what the rule dropped. Raises
    UsageError for scores the run does not have, and DigestMismatch where the name holds another decision.
    """
    started = time.perf_counter()
    run = open_samples(config.run)
    needs_guide = config.rule.wants() & BY_GUIDE
    job = _job(run, config, needs_guide, on_rows) if needs_guide else None
    rule, audited = _calibrated(run, config.rule)
    settings = _settings(config, job) | audited
    receipts = list(run.store.receipts())  # one look: what a retry commits from here on is for another decision
    content = _content(receipts)
    name = f"selections/{config.name}.parquet"
    if (there := _there(run, name, settings, content)) is not None:
        return there
    rows = kept_samples(run, receipts, frozenset() if audited else config.rule.wants() - BY_GUIDE)
    if isinstance(rule, SeedCopies):
        rows.table.scores[COPIES[rule.against]] = similarities_of(run.files, rule.audit, rule.against, rows.ids)
    if job is not None:
        chunks = by_guide.sample_chunks(receipts) + (by_guide.seed_chunks(run) if ANCHOR in needs_guide else [])
        rows.table.scores.update(in_plan_order(by_guide.guide_scores(run, job, chunks, score, on_rows), rows,
                                                needs_guide))
    decision = rule.decide(rows.table, PlanRng(config.seed, "select"))
    facts = {**_facts(run, totals(run.plan.planned, receipts), config, rows, decision), "settings": settings,
             "content_sha256": content, "scored_in": job.folder if job else None,
             "seconds": time.perf_counter() - started}
    for folder in ("selections", ".tmp"):
        run.files.make_folder(folder)
    if not run.files.publish(name, _file(rows, decision, facts), "selection"):
        there = _there(run, name, settings, content)  # somebody was faster
        assert there is not None
        return there
    return {**facts, "file": str(run.files.at(name)), "made": True}


def _calibrated(run: Run, rule: Rule) -> tuple[Rule, dict[str, Any]]:
    """A rule that looks at an audit with its threshold, and what decides besides. Raises UsageError."""
    if not isinstance(rule, SeedCopies):
        return rule, {}
    found = (read_audit(run.files, rule.audit) or {}).get("copies")
    if found is None:
        similarities_of(run.files, rule.audit, rule.against, ())
        raise UsageError(f"rule.audit: the audit {rule.audit!r} has not ended; run `rayexpand audit` with its file")
    return rule.calibrated(found), {"audit": {name: found[name] for name in ("identity", "tau_copy")}}


def _settings(config: SelectConfig, job: ScoreJob | None) -> dict[str, Any]:
    """What decides, apart from the samples."""
    found: dict[str, Any] = {"rule": config.rule.model_dump(mode="json"), "seed": config.seed}
    if job is not None:
        found |= {"guide_sha256": job.sha256, "prompts_sha256": _sha256(job.prompts), "batch": config.batch,
                  "prompt": config.prompt, "captions": list(config.captions) if job.captions else None}
    return found


def _content(receipts: Sequence[Receipt]) -> str:
    """Hash over what is committed; a retry changes it."""
    return _sha256(sorted((one.data_file, one.content_sha256) for one in receipts))


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _there(run: Run, name: str, settings: dict[str, Any], content: str) -> dict[str, Any] | None:
    """The decision of that name if it is this one, None without any. Raises DigestMismatch for another."""
    try:
        facts = parquet_facts(run.files, name, FOOTER)
    except FileNotFoundError:
        return None
    where = run.files.at(name)
    if facts is None:
        raise DigestMismatch(f"{where} was not made by `select`; give this decision another `name`, or move that file")
    if changed := differences(facts["settings"], settings):
        raise DigestMismatch("\n  ".join([f"{where} is another decision. What differs (there -> here):", *changed,
                                          "Give this one another `name`, or delete that file if nothing uses it."]))
    if facts["content_sha256"] != content:
        raise DigestMismatch(f"{where} was decided when the run had {facts['samples']} samples; it has "
                             f"{run.totals().kept} now, or others, because of a retry. Give this decision another "
                             "`name`, or delete that file if nothing uses it.")
    return {**facts, "file": str(where), "made": False}


# ------------------------------------------------------------------------------------------------------------ the guide


def _job(run: Run, config: SelectConfig, wanted: frozenset[str], on_rows: OnRows) -> ScoreJob:
    """Raises UsageError for a prompt that asks for a word a class does not have."""
    from rayexpand.models.guides import guide_hash

    guide, classes = config.guide or run.config.guide, run.plan.index.classes
    captions, caption_of = [], []
    if CONTRAST in wanted:
        pairs = [tuple(format_prompt(one, label, classes) for one in config.captions) for label in range(len(classes))]
        kinds = list(dict.fromkeys(pairs))
        captions, caption_of = [one for pair in kinds for one in pair], [kinds.index(pair) for pair in pairs]
    prompts = tuple(format_prompt(config.prompt, label, classes) for label in range(len(classes)))
    return ScoreJob(str(run.folder), guide, guide_hash(guide.weights, guide.checkpoint, on_rows), prompts,
                    tuple(captions),
                    tuple(caption_of), FEATURES in wanted, config.batch, config.device, config.runtime.torch_threads,
                    config.runtime.io_threads)


# --------------------------------------------------------------------------------------------------------------- result


def _facts(run: Run, totals: Totals, config: SelectConfig, rows: KeptSamples, decision: Decision) -> dict[str, Any]:
    """How the decision counts up."""
    code_N, label_N = decision.code_N, rows.table.label
    kept_N, samples = code_N == 0, len(decision.code_N)
    dropped = samples - int(kept_N.sum())
    assert samples == totals.kept
    seeds = len(run.plan.index)
    kept_K = np.bincount(label_N[kept_N], minlength=len(rows.table.seeds_K))
    had_K = np.bincount(label_N, minlength=len(rows.table.seeds_K))
    reasons = {REASONS[code]: int(count) for code, count in enumerate(np.bincount(code_N, minlength=len(REASONS)))
               if code and count}
    empty = [run.plan.index.classes.display[label] for label in np.flatnonzero((kept_K == 0) & (had_K > 0))]
    warnings = [f"{len(empty)} of {int((had_K > 0).sum())} classes keep no sample, such as {', '.join(empty[:5])}"
                ] if empty else []
    if totals.failed:
        warnings.append(f"{totals.failed} planned samples of the run failed; a `retry` that makes them needs a new "
                        "decision")
    return {"name": config.name, "run": str(run.folder), "run_digest": run.facts["run_digest"], "version": __version__,
            "created": time.time(), "samples": samples, "planned": totals.planned, "kept": int(kept_N.sum()),
            "rejected": totals.rejected + dropped, "failed": totals.failed, "dropped": dropped, "reasons": reasons,
            "ratio_before": samples / seeds, "ratio": float(kept_N.sum() / seeds), **decision.facts,
            "kept_of_class": {"least": int(kept_K.min()), "most": int(kept_K.max())},
            "dropped_by_strength": _by_strength(rows.strength, kept_N),
            "dropped_by_class": _worst_classes(run.plan.index.classes.key, had_K, kept_K), "warnings": warnings}


def _worst_classes(keys: Sequence[str], had_K: np.ndarray, kept_K: np.ndarray) -> dict[str, float]:
    """Share dropped of the five classes that lost the largest part."""
    share_K = 1 - kept_K / np.maximum(had_K, 1)
    worst = np.argsort(-share_K * (had_K > 0), kind="stable")[:5].tolist()
    return {keys[label]: float(share_K[label]) for label in worst if kept_K[label] < had_K[label]}


def _by_strength(strength_N: np.ndarray, kept_N: np.ndarray) -> dict[str, float]:
    """Share dropped of each strength (one threshold for all takes more where strength is high)."""
    values, which_N = np.unique(strength_N, return_inverse=True)
    if len(values) > 20:
        return {}
    dropped = np.bincount(which_N, ~kept_N) / np.bincount(which_N)
    return {f"{value:g}": float(share) for value, share in zip(values, dropped, strict=True)}


def _file(rows: KeptSamples, decision: Decision, facts: dict[str, Any]) -> bytes:
    def lines(start: int) -> pa.Table:
        code, score = decision.code_N[start:start + LINES], decision.score_N[start:start + LINES]
        reason = pa.DictionaryArray.from_arrays(pa.array(code, pa.int8()), list(REASONS)).cast(pa.string())
        return pa.table({"sample_id": rows.ids.part(start), "keep": code == 0, "reason": reason,
                         "score": pa.array(score, from_pandas=True)})

    return parquet_of(map(lines, range(0, len(rows.row), LINES)), lines(len(rows.row)).schema,
                      {FOOTER: json.dumps(facts).encode()}, LINES)
