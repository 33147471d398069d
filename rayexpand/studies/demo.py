"""The demo: expand two real digits per class, train a classifier with and without, and say what the gain means.

Five repetitions, each with its own two digits per class, five copies of each on the embedded default, and the
same number of optimiser steps in every arm; tested on 500 digits that neither the prior nor any arm has seen. Controls
beside the table: the originals repeated to as many rows, an expansion with an empty prompt, and the guide's own
zero-shot accuracy; for a method other than image-to-image also image-to-image, and for a guided one its random twin.
GIF-MAE and GIF-DALLE have generators of their own, and what these make without a perturbation beside them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rayexpand import methods
from rayexpand.artifacts.store import read_facts
from rayexpand.contract.device import torch_threads
from rayexpand.contract.errors import RayexpandError, UsageError
from rayexpand.data.seeds import digits_split
from rayexpand.models.folders import DIGITS_MAE, DIGITS_UNCLIP
from rayexpand.models.guides import load_guide
from rayexpand.models.tiny import digits
from rayexpand.runs import run as runs
from rayexpand.runs.driving import Here, Listener, rate_of
from rayexpand.studies.config import StudyConfig, parse_study
from rayexpand.studies.expansions import pending_runs
from rayexpand.studies.parts import Study, read_result
from rayexpand.studies.study import prepare_study
from rayexpand.studies.trial import run_trials
from rayexpand.studies.trials import make_trials, pending_trials

PER_CLASS, RATIO = 2, 5
SUBSETS = 5  # with three, the interval of a gain of 13 points holds 0
ARMS = ("original", "original + RandAugment", "expanded", "expanded + RandAugment")
CONTROL = "empty-prompt expansion"
PLAIN = "img2img expansion"
RANDOM = "random perturbation"
UNGUIDED = "without perturbation"
REPEATED = "original repeated"
NOTE = ("The gain shows that knowledge of captioned digits in the generator reaches a classifier through the samples; "
        "it does not show data made from nothing: the generator saw 1,000 other captioned digits, its guide alone "
        "reads the test digits as well or better, and the gain fades at about 10 real digits per class.")
GUIDED_NOTE = (" What guidance adds is the difference to its random perturbation, not to the original; five subsets "
               "are too few to call a point or two a difference.")
NO_PRIOR_NOTE = ("No generator took part, so the gain shows what varying the real digits alone does; it does not show "
                 "new digits.")
OWN_NOTES = {
    "vae": "No UNet took part: the samples are the real digits as the autoencoder draws them again. What they lose is "
           "lost for every sample of this generator, and what they gain is not knowledge of digits.",
    "gif-mae": "The generator saw 1,000 other digits without their labels and draws the real ones again in other "
               "brightness and texture; the gain shows what that does, and no new shapes are made.",
    "gif-dalle": "The generator saw 1,000 other digits without their labels, told by the embeddings of a guide that "
                 "learned from captions; most of the gain is what its own noise makes of an embedding, as the control "
                 "without perturbation shows."}

# Settings for the embedded default. COMMON where a method has the field, a new method too; then its own.
COMMON: dict[str, Any] = {"ratio": RATIO, "prompt": "a photo of a {name}", "strength": 0.9, "steps": 10,
                          "guidance_scale": 2.0, "measure": True}
OWN: dict[str, dict[str, Any]] = {
    "classical": {"policy": "randaugment"},
    "diffcoremix": {"prompt": "{context} {name}", "negatives": [],  # the tiny texts know no weather
                    "contexts": ["a photo of a", "the digit", "a photo of the digit", "a drawing of a"]},
    "diffmix": {"variant": "real_mix", "strengths": [0.9]},  # the digits have their names already: nothing to fit
    "distdiff": {"guide_step": 7, "rho": 0.5, "eps": 3},
    "gif": {"domains": ["a photo of a"], "adjectives": [""], "rotation": 0, "flip": False},
    "gif-mae": {"generator": "mae", "strength": None, "steps": None, "guidance_scale": None},
    "gif-dalle": {"generator": "unclip", "strength": None, "eps": 0.5},
    "lecf": {"strength": None, "prompts": {"*": [
        "a photo of a {name}", "the digit {name}", "a photo of the digit {name}", "a drawing of a {name}",
        "a handwritten {name} shape"]}},
    "practice": {"omega": 16.0, "convention": "score", "every": 1},
    "realfake": {"finetuned": False},
    "realguidance": {"strength": 0.1, "steps": 25},
    "vae": {"sample": True},  # for five copies
}
# Demos of one method with another generator: its name, and the weights.
VARIANTS: dict[str, tuple[str, str]] = {"gif-mae": ("gif", DIGITS_MAE), "gif-dalle": ("gif", DIGITS_UNCLIP)}
FITTED = {"prior", "guide", "prototypes"}  # what the demo has, or makes for a method
# How what a method needs is fitted, where that is not the prototypes of the guide as it is.
FITS: dict[str, dict[str, Any]] = {"practice": {"guide": {"kind": "classifier", "recipe": {"preset": "digits"}}}}
SAMPLER = {"batch": 50, "shard_images": 50}
EMPTY_STRENGTH = 0.5  # an empty prompt keeps the label only at moderate strength: at 0.9 nothing of the digit is left

@dataclass(frozen=True)
class DemoResult:
    accuracies: dict[str, list[float]]  # arm -> one per subset
    guide_zero_shot: float
    gain: float  # expanded - original, mean over subsets
    gain_se: float  # standard error of the paired difference
    images_per_second: float | None  # of the expanded arm, see runs.status.Rate
    seconds: float
    folder: str  # of the study
    runs: list[str]  # folders of the expanded arm
    measured: dict[str, float] = field(default_factory=dict)  # of the embedded default, when it was trained
    method: str = "img2img"
    note: str = NOTE
    fitted: dict[str, float] = field(default_factory=dict)  # CPU seconds of what the method had fitted, over subsets
    cpu_seconds: float = 0.0  # of this process, all of the demo

    @property
    def guided(self) -> bool:
        """Whether the method has a guide, so that its samples can be shown beside plain ones."""
        return RANDOM in self.accuracies

    def summary(self) -> dict[str, Any]:
        arms = {name: {"accuracies": values, "mean": float(np.mean(values)), "se": standard_error(values)}
                for name, values in self.accuracies.items()}
        controls = {name: arms.pop(name) for name in (REPEATED, CONTROL, UNGUIDED, PLAIN, RANDOM) if name in arms}
        return {"method": self.method, "arms": arms, "control_arms": controls, "fit_cpu_seconds": self.fitted,
                "controls": {"guide zero-shot": self.guide_zero_shot,
                             **{name: arm["mean"] for name, arm in controls.items()}},
                "gain": self.gain, "gain_se": self.gain_se, "note": self.note,
                "images_per_second": self.images_per_second, "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds, "prior": self.measured, "study": self.folder, "runs": self.runs}


def standard_error(values: list[float]) -> float:
    """Standard error of the mean (sample standard deviation over sqrt(n))."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def demo(out: Path | str, progress: Listener, method: str = "img2img") -> DemoResult:
    """Runs the demo of a method in the study folder `out`; what is there already is used again, not made again.

    Raises ConfigError for a method there is not, UsageError for one that needs a fine-tuned generator.
    """
    with torch_threads(1):  # accuracies depend on it, and on small models a second thread only spins
        return _demo(Path(out), progress, method)


def settings(method: str, **changes: Any) -> dict[str, Any]:
    """The fields of a method, or of a name in VARIANTS, on the embedded default."""
    name = VARIANTS[method][0] if method in VARIANTS else method
    known = methods.method_class(name).model_fields  # type: ignore[attr-defined]
    return {"name": name, **{field: value for field, value in COMMON.items() if field in known},
            **OWN.get(method, {}), **changes}


def study_of(out: Path, method: str = "img2img") -> StudyConfig:
    """The study the demo is."""
    fields = settings(method)
    loaded = _loaded(fields)
    if lacking := sorted(loaded.needs() - FITTED):
        raise UsageError(f"the demo has no {' and no '.join(lacking)} for {method}, for it fine-tunes no generator. "
                         f"Make it with `rayexpand fit` (fit: {{{lacking[0]}: ...}}), name the folder it prints under "
                         "artifacts, and use `rayexpand expand`; or choose another method")
    # With `random`, nothing is measured either: the twin needs no guide.
    unmeasured = {"measure": False} if "measure" in fields else {}
    own_prior = {"prior": {"weights": VARIANTS[method][1]}} if method in VARIANTS else {}
    wanted: dict[str, dict[str, Any]] = {"expanded": fields}
    controls: list[dict[str, Any]] = []

    def control(arm: str, name: str, own: dict[str, Any]) -> None:
        wanted[name] = own
        controls.append({"name": arm, "use": name, "control": False})

    if own_prior:
        control(UNGUIDED, "unguided", {**fields, **unmeasured, "guidance": "none"})
    elif "prior" in loaded.needs():
        control(CONTROL, "empty-prompt", settings("img2img", prompt="", strength=EMPTY_STRENGTH))
    if "prior" in loaded.needs() and method != "img2img":
        control(PLAIN, "img2img", settings("img2img"))
    for choice in ("guidance", "direction"):
        if "random" in _choices(loaded, choice):
            control(RANDOM, "random", {**fields, **unmeasured, choice: "random"})
    expansions = {name: {"method": own, "sampler": SAMPLER,
                         **({"fit": FITS.get(own["name"], {})} if _fits(own) else {}),
                         **(own_prior if own["name"] == fields["name"] else {})} for name, own in wanted.items()}
    randaugment = {"recipe": {"augment": "randaugment"}, "control": False}
    return parse_study({
        "name": out.absolute().name, "out": str(out.parent), "seeds": list(range(SUBSETS)),
        "data": {"source": "digits"}, "test": {"source": "digits", "split": "test"},
        "subset": {"kind": "per_class", "n": PER_CLASS}, "recipe": {"preset": "digits"}, "expansions": expansions,
        "arms": [{"name": ARMS[0]}, {"name": ARMS[1], **randaugment}, {"name": ARMS[2], "use": "expanded"},
                 {"name": ARMS[3], "use": "expanded", **randaugment}, *controls]})


def _loaded(fields: dict[str, Any]) -> Any:
    return methods.load_method(fields["name"], {name: value for name, value in fields.items() if name != "name"})


def _fits(fields: dict[str, Any]) -> bool:
    """Whether the method, or the judge that it brings, needs something of the real rows."""
    loaded = _loaded(fields)
    return (fields["name"] in FITS or "prototypes" in loaded.needs()
            or getattr(loaded, "acceptance", lambda: None)() is not None)


def _choices(method: Any, name: str) -> Sequence[Any]:
    """What a field with a fixed choice may be; nothing where there is no such field."""
    found = type(method).model_fields.get(name)
    return () if found is None else get_args(found.annotation)


def _demo(out: Path, progress: Listener, method: str) -> DemoResult:
    started, cpu = time.perf_counter(), time.process_time()
    cached = digits.ensure(progress)
    study = prepare_study(study_of(out, method))
    _expand(study, progress)
    accuracies = _train(study, progress)
    test_images, test_labels = digits_split()["test"]
    guide = load_guide("digits", None, digits.CLASS_NAMES, device="cpu")
    zero_shot = float((np.asarray(guide.zero_shot(test_images)) == test_labels).mean())
    differences = [a - b for a, b in zip(accuracies[ARMS[2]], accuracies[ARMS[0]], strict=True)]
    measured = json.loads((cached / "measured.json").read_text())
    folders = [f"{study.config.folder}/runs/expanded-{seed}" for seed in study.config.seeds]
    note = OWN_NOTES.get(method) or (NO_PRIOR_NOTE if CONTROL not in accuracies else NOTE)
    note += GUIDED_NOTE * (RANDOM in accuracies)
    return DemoResult(accuracies, zero_shot, float(np.mean(differences)), standard_error(differences),
                      rate_of([runs.open_run(one) for one in folders]).images_per_second,
                      time.perf_counter() - started, study.config.folder, folders, measured, method,
                      note, _fitted(folders), time.process_time() - cpu)


def _fitted(folders: Sequence[str]) -> dict[str, float]:
    """CPU seconds by kind of what the runs had fitted, whenever that was."""
    spent: dict[str, float] = {}
    for folder in folders:
        config = runs.open_run(folder).config
        for place in (*config.artifacts.values(), config.guide.weights):
            if facts := read_facts(place):
                spent[facts["kind"]] = spent.get(facts["kind"], 0.0) + facts["cpu_seconds"]
    return spent


def _expand(study: Study, progress: Listener) -> None:
    """Makes what is pending, with the models loaded once."""
    drive = Here()
    for run in pending_runs(study, progress):
        drive(run, progress)


def _train(study: Study, progress: Listener) -> dict[str, list[float]]:
    """Accuracy of every arm after its last step, one per subset."""
    trials = make_trials(study)
    todo = pending_trials(study.trial_folder, trials)
    done = len(trials) - len(todo)
    for trial, problem in run_trials(study.files, todo, study.config.training):
        if problem:
            raise RayexpandError(f"{trial.name}: {problem}")
        done += 1
        progress(f"training on subset {trial.seed + 1} of {SUBSETS}: {trial.arm}", done, len(trials))
    accuracies: dict[str, list[float]] = {}
    for trial in trials:
        found = read_result(study.files, trial.name)
        assert found is not None
        accuracies.setdefault(REPEATED if trial.control_of else trial.arm, []).append(found["last"]["top1"])
    return accuracies
