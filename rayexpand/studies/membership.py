"""Shadow pipelines of the audit `membership`: who is in which, and the study that they are.

    audit:
      membership:
        data: {source: digits}
        test: {source: digits, split: test}
        shadows: 8
        expansion: {method: {name: img2img, ...}, fit: {...}}
        recipe: {preset: digits}

A shadow is one repetition of a study: half of the images are its members, and everything that reads an image (fitting,
expansion, selection, training) is made from these alone. Runs, artifacts and trials are those of any study, with
digests of their own, so an audit that was killed goes on where it was. attacks.py asks the shadows.

    <audit>/membership/members.parquet   seed_id, planted, and of each shadow whether the image is a member
    <audit>/membership/shadows/          the study: one repetition for each shadow
    <audit>/membership/phi/              what the attacks saw

One image, chosen by a key, is listed many times in each shadow that has it: an attack that does not find it sees
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from rayexpand.artifacts.store import read_facts
from rayexpand.contract.errors import ConfigError, RowFault, UsageError, few
from rayexpand.contract.protocols import Progress
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import Seed, SeedIndex
from rayexpand.contract.settings import Section, differences
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import DataConfig, SeedReader, build_index
from rayexpand.data.subsets import ids_file, shared_images, sound_rows
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.features import ExtractorConfig
from rayexpand.evaluation.membership import PER_EXAMPLE_FROM, Variance, memberships
from rayexpand.loader.config import TrainingConfig
from rayexpand.runs.config import ClusterConfig, RunConfig, guide_of_run
from rayexpand.runs.run import Run
from rayexpand.storage.files import Files
from rayexpand.studies.config import StudyConfig, parse_study, run_config, study_preflight

Attack = Literal["classifier", "samples"]
Query = Literal["identity", "flip"]

_READ = 1024  # images held encoded at once

EXPANSION, SELECTION, STUDY = "shadow", "released", "shadows"
PRIVATE = "private"  # classifiers of the members' real images: how much an attack sees where nothing is hidden
_SAID = {f"expansions.{EXPANSION}": "expansion", f"selections.{SELECTION}": "selection", "arms.classifier.ratio":
         "copies", "arms.classifier": "selection"}  # what a study calls it -> field here


class MembershipConfig(Section):
    """Does what is released, or a classifier trained on it, say which images the dataset had?"""

    data: DataConfig = Field(description="the images that are audited; half of them are members of each shadow")
    test: DataConfig = Field(description="other images, which say how good the classifiers are")
    shadows: int = Field(16, ge=4, description="whole pipelines; each is attacked once with all others as its shadows")
    stratified: bool = Field(False, description="halve every class, where classes have fewer than ten images")
    seed: int = Field(0, ge=0, description="keys who is a member, which image is planted, and intervals")
    queries: tuple[Query, ...] = Field(("identity", "flip"), min_length=1, description="what is asked of each image")
    variance: Variance = Field("pooled", description="of the scores of an image: one number for all images, or from 32 "
                               "shadows on one for each")
    reference: bool = Field(False, description="score as LiRA's released code does: medians, another fixed variance, "
                            "two-sided offline")
    expansion: dict[str, Any] = Field(description="the expansion of a study, with `fit` where it needs something "
                                      "fitted")
    copies: int | float | None = Field(None, gt=0, description="only the first so many copies of each image are "
                                       "released; null: all")
    selection: dict[str, Any] | None = Field(None, description="release what this rule keeps: the file of `rayexpand "
                                             "select` without name, run and cluster")
    recipe: dict[str, Any] = Field({}, description="how the classifiers are trained")
    training: TrainingConfig = TrainingConfig()
    attack: tuple[Attack, ...] = Field(("classifier", "samples"), min_length=1, description="classifier: how sure a "
                                       "classifier trained on the samples is of an image; samples: how alike the "
                                       "image and the sample nearest to it are")
    extractor: ExtractorConfig = Field(ExtractorConfig(), description="by whose features `samples` compares; without "
                                       "one the guide of the expansion")
    batch: int = Field(64, ge=1, description="images per call of the extractor")
    planted: int = Field(50, ge=2, description="how often one image is listed in the shadows that have it; it must be "
                         "found")

    @model_validator(mode="after")
    def _agree(self) -> MembershipConfig:
        problems = [f"shadows: {self.shadows} cannot be halved; give an even number"] if self.shadows % 2 else []
        if self.variance == "per_example" and self.shadows < PER_EXAMPLE_FROM:
            problems.append(f"variance: per_example needs {PER_EXAMPLE_FROM} shadows, and there are {self.shadows}; "
                            "with fewer, one pooled variance finds more")
        problems += [f"{name}: names one twice" for name in ("queries", "attack")
                     if len(set(getattr(self, name))) < len(getattr(self, name))]
        if self.data.repeats:
            problems.append("data.repeats: the audit lists one image again by itself; take it out")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def lines(self) -> tuple[str, ...]:
        """What is attacked: `private` always, for comparison."""
        return (*self.attack, PRIVATE)


def on_device(config: MembershipConfig, device: str) -> MembershipConfig:
    """With classifiers and extractor there, unless they say where themselves."""
    return config.model_copy(update={name: one if one.device != "auto" else one.model_copy(update={"device": device})
                                     for name, one in (("training", config.training), ("extractor", config.extractor))})


# ------------------------------------------------------------------------------------------------------------- mistakes


def check(config: MembershipConfig, cluster: ClusterConfig = ClusterConfig()) -> list[str]:  # noqa: B008
    """Everything wrong that can be known without loading a model or listing a dataset: `field: what, why, next`."""
    try:
        study = study_of(config, "audit", cluster)
    except ConfigError as error:
        return error.problems
    if study.expansions[EXPANSION].run is not None:
        return ["expansion.run: a run that exists was made of images that are not the members of one shadow; write its "
                "configuration here"]
    if study.expansions[EXPANSION].rounds is not None:
        return ["expansion.rounds: a shadow makes its samples in one run; take the section out"]
    return [*_renamed(study_preflight(study)), *_outside(_made(study)), *_extractor_problems(config, study)]


def made_otherwise(config: MembershipConfig, run: Run, cluster: ClusterConfig) -> list[str]:
    """The problem of an audit that lies in a run which was not made like its shadows, and says nothing of its
    samples."""
    study = study_of(config, "audit", cluster)
    fit, old, new = study.expansions[EXPANSION].fit, run.config, _made(study)
    changed = differences({"method": old.method.model_dump(mode="json"), "image": old.image.model_dump(mode="json")},
                          {"method": new.method.model_dump(mode="json"), "image": new.image.model_dump(mode="json")})
    if "prior" in new.needs and (fit is None or fit.pretrain is None) and old.prior.weights != new.prior.weights:
        changed.append(f"prior.weights: {old.prior.weights!r} -> {new.prior.weights!r}")
    was_tuned, is_tuned = bool(old.artifacts.get("adapter")), fit is not None and fit.adapter is not None
    if was_tuned != is_tuned:
        changed.append(f"fit.adapter: {'there' if was_tuned else 'none'} -> {'there' if is_tuned else 'none'}")
    return [f"expansion: {run.folder} was made otherwise ({'; '.join(changed[:3])}), so nothing would follow for its "
            "samples; say here how it was made, or take audit.run out"] if changed else []


def refuse_unrelated(config: MembershipConfig, run: Run) -> None:
    """Raises UsageError where no audited image is a seed of the run that the audit lies in."""
    ids = build_index(config.data).table["seed_id"]
    if not pc.any(pc.is_in(ids, run.plan.index.table["seed_id"].combine_chunks())).as_py():
        raise UsageError(f"audit.membership.data: none of the {len(ids):,} images is a seed of {run.folder}, so "
                         "nothing would follow for its samples; name the images that it was made from, or take "
                         "audit.run out")


def _extractor_problems(config: MembershipConfig, study: StudyConfig) -> list[str]:
    one, chosen = study.expansions[EXPANSION], config.extractor
    if chosen.guide is not None or chosen.timm is not None:
        return extractors.check(chosen)
    if one.fit is not None and one.fit.guide is not None:
        return ["extractor.guide: missing; every shadow trains a guide of its own, and images are compared by one model"
                ", so name another"]
    return guide_of_run("extractor.guide", _made(study)) or extractors.check(extractor_of(config, study))


def _outside(made: RunConfig) -> list[str]:
    """What the pipelines would read that was made of other images than the members of one shadow."""
    problems = [f"expansion.artifacts.{kind}: {folder} was made of other images than the members of one shadow; say "
                "under expansion.fit how it is made" for kind, folder in made.artifacts.items() if folder]
    fitted = {field: folder for field, folder in _models(made).items() if _is_fitted(folder)}
    return problems + [f"expansion.{field}: {folder} was fitted on images that may be no members of a shadow; say "
                       "under expansion.fit how it is made, or name a model of other images"
                       for field, folder in fitted.items() if _fitted_on(folder) is None]


def _models(made: RunConfig) -> dict[str, str]:
    found = {"prior.weights": made.prior.weights, "guide.weights": made.guide.weights}
    return found if made.accept is None else {**found, "accept.guide.weights": made.accept.guide.weights}


def _artifact(folder: str) -> str:
    """The artifact that a model's folder is, or is a part of."""
    place = os.path.realpath(Path(folder).expanduser())
    return os.path.dirname(place) if os.path.basename(place) in ("guide", "pipeline") else place


def _is_fitted(folder: str) -> bool:
    return bool(os.path.isdir(_artifact(folder)) and read_facts(_artifact(folder)))


def _fitted_on(folder: str) -> DataConfig | None:
    """The images that `rayexpand fit` made a model of; None where it does not say."""
    data = (read_facts(_artifact(folder)) if _is_fitted(folder) else {}).get("made_from", {}).get("data", {})
    return DataConfig(**data["config"]) if "config" in data else None


def refuse_shared(config: MembershipConfig, study: StudyConfig, whole: SeedIndex) -> None:
    """Raises UsageError where a generator or guide was trained on images that are audited."""
    one, made = study.expansions[EXPANSION], _made(study)
    known = {field: data for field, folder in _models(made).items() if (data := _fitted_on(folder)) is not None}
    if one.fit is not None and one.fit.pretrain is not None:
        known["fit.pretrain.data"] = one.fit.pretrain.data
    for field, data in known.items():
        if shared := shared_images((whole, config.data), (build_index(data), data)):
            raise UsageError(f"audit.membership.expansion.{field}: {len(shared):,} of the audited images trained it "
                             f"({few(shared)}), so it knows images that are no members; use other images")


def refuse_unreadable(config: MembershipConfig, whole: SeedIndex, progress: Progress) -> None:
    """Raises UsageError for audited images that cannot be decoded, before anything is made of the others: every attack
    asks of every image."""
    rows, reader, data, wrong = sound_rows(whole), SeedReader(whole, config.data), config.data, list[str]()
    for start in range(0, len(rows), _READ):
        for seed in reader.read(rows[start:start + _READ].tolist()):
            try:
                if isinstance(seed, RowFault):
                    raise seed
                decode(seed.image, min_side=data.min_side, max_pixels=data.max_pixels)
            except RowFault as fault:
                wrong.append(seed.seed_id if isinstance(seed, Seed) else str(fault))
        progress("looking at images", min(start + _READ, len(rows)), len(rows))
    if wrong:
        raise UsageError(f"audit.membership.data: {len(wrong):,} of {len(rows):,} images cannot be used ({few(wrong)})"
                         ", and every image is asked about; repair them, or list the others in a file and give it as "
                         "data.ids")


# ------------------------------------------------------------------------------------------------------------ the study


def study_of(config: MembershipConfig, folder: str, cluster: ClusterConfig) -> StudyConfig:
    """The study that the shadows are, in <folder>/shadows. Raises ConfigError in the words of this section."""
    selection = {} if config.selection is None else {"selection": SELECTION}
    raw: dict[str, Any] = {
        "name": STUDY, "out": folder, "data": config.data.model_dump(mode="json"),
        "test": config.test.model_dump(mode="json"), "seeds": list(range(config.shadows)), "recipe": config.recipe,
        "expansions": {EXPANSION: config.expansion},
        "selections": {} if config.selection is None else {SELECTION: config.selection},
        "arms": [{"name": "classifier", "use": EXPANSION, "real": 0, "control": False, "ratio": config.copies,
                  **selection}, {"name": PRIVATE, "control": False}],
        "training": {**config.training.model_dump(mode="json"), "keep": "weights"},
        "cluster": cluster.model_dump(mode="json")}
    try:
        return parse_study(raw)
    except ConfigError as error:
        raise ConfigError(folder, _renamed(error.problems)) from error


def _renamed(problems: list[str]) -> list[str]:
    """Problems of the study in the words of this section."""
    for name, own in _SAID.items():
        problems = [f"{own}{line.removeprefix(name)}" if line.startswith(name) else line for line in problems]
    return problems


def _made(study: StudyConfig) -> RunConfig:
    return run_config(study, EXPANSION, study.expansions[EXPANSION], 0, study.data)


def extractor_of(config: MembershipConfig, study: StudyConfig) -> ExtractorConfig:
    """By what samples are compared with images: the guide of the expansion where none is named."""
    chosen = config.extractor
    if chosen.guide is not None or chosen.timm is not None:
        return chosen
    guide = _made(study).guide
    checkpoint = None if extractors.is_folder(guide.weights) else guide.checkpoint
    return chosen.model_copy(update={"guide": guide.weights, "checkpoint": chosen.checkpoint or checkpoint})


class Members:
    """Which images are members of which shadow, by `member_SN`, bool (S, N) in the order of `ids`; `planted` is the
    number of the image that is listed many times. Raises UsageError where a shadow would lack a class."""

    def __init__(self, config: MembershipConfig, whole: SeedIndex) -> None:
        rows = sound_rows(whole)
        self.ids: list[str] = whole.table["seed_id"].take(pa.array(rows)).to_pylist()
        self.labels = whole.labels[rows]
        self.member_SN = memberships(self.ids, config.shadows, config.seed, self.labels if config.stratified else None)
        self.null_SN = memberships(self.ids, config.shadows, config.seed, stream="permuted")
        self.planted = int(PlanRng(config.seed, "membership").per_seed("planted", self.ids).argmin())
        self._repeats, self._hint = config.planted, "audit more images" if config.stratified else (
            "set stratified: true")
        self._refuse_empty(whole)

    def _refuse_empty(self, whole: SeedIndex) -> None:
        there = np.unique(self.labels)
        for shadow, member_N in enumerate(self.member_SN):
            if len(empty := np.setdiff1d(there, self.labels[member_N])):
                raise UsageError(f"audit.membership.shadows: shadow {shadow} has no image of {len(empty)} classes "
                                 f"({few([whole.classes.display[c] for c in empty])}); {self._hint}")

    def table(self) -> pa.Table:
        return pa.table({"seed_id": self.ids, "planted": np.arange(len(self.ids)) == self.planted,
                         "member": pa.array(self.member_SN.T.tolist(), pa.list_(pa.bool_(), len(self.member_SN)))})

    def subset(self, config: StudyConfig, files: Files, whole: SeedIndex, shadow: int) -> tuple[DataConfig, SeedIndex]:
        """The members of a shadow as the data of a repetition; the planted one, if it is there, many times."""
        chosen = np.flatnonzero(self.member_SN[shadow])
        files.replace(name := f"subsets/{shadow}.txt", ids_file([self.ids[n] for n in chosen]))
        repeats: Mapping[str, int] = {self.ids[self.planted]: self._repeats} if self.planted in chosen else {}
        data = config.data.model_copy(update={"ids": str(files.at(name)), "per_class": None, "repeats": dict(repeats)})
        return data, build_index(data)
