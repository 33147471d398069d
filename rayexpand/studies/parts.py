"""The nouns of a study: arm, trial, the study itself, its results on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import DamagedFile
from rayexpand.contract.schema import SeedIndex
from rayexpand.contract.settings import digest
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.data.subsets import fingerprint
from rayexpand.loader.config import TrainingConfig
from rayexpand.runs.config import ClusterConfig, RunConfig
from rayexpand.runs.joined import open_samples
from rayexpand.runs.run import Run
from rayexpand.storage.files import Files
from rayexpand.storage.tables import healthy_json, read_table
from rayexpand.studies.baselines import UNTRAINED, Baseline
from rayexpand.studies.config import StudyConfig
from rayexpand.studies.rounds.config import LoopConfig
from rayexpand.studies.rounds.controls import Beside
from rayexpand.studies.rounds.loop import loop_in
from rayexpand.studies.sections import ArmConfig
from rayexpand.studies.value_config import HELD_OUT, ValueArm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """One line of the table: an ArmConfig with one of its ratios or rounds, or the control of another arm."""

    name: str
    config: ArmConfig
    recipe: Recipe
    copies: int | float | None = None  # of each seed that are used
    control_of: str = ""
    baseline: Baseline | None = None  # that it is the row of
    value: ValueArm | None = None  # that it is
    rounds: int | None = None  # of its loops that are used
    stands_for: str = ""  # of a control of a loop: which one it is (rounds/controls.py)

    @property
    def is_controlled(self) -> bool:
        """Whether the real rows repeated may be trained beside it; arms of as many rows share one."""
        return self.config.use is not None and self.config.control and self.config.replace is None and (
            not self.stands_for)

    @property
    def is_real_alone(self) -> bool:
        """Whether it trains real rows alone, as a control does."""
        return self.config.use is None and self.config.mix is None and self.baseline is None and self.value is None


@dataclass(frozen=True)
class Trial:
    """One classifier to train: an arm with a seed. Plain data, written to trials/<name>.json."""

    name: str
    arm: str
    seed: int
    group: str  # expansion, several joined by " + ", "" for real rows only
    ratio: float
    control_of: str
    augment: str
    recipe: dict[str, Any]
    rows: str  # file of its training set
    list_sha256: str
    ids_sha256: str  # of the real rows
    data_sha256: str  # fingerprint of the real rows
    test: dict[str, Any]
    test_sha256: str  # fingerprint of the test images
    also: dict[str, dict[str, Any]]  # further test sets: an ExtraTest and the sha256 of its images and groups, each
    frequency: list[int]  # few below the first, many above the second
    checkpoint_sha256: str  # of the weights it starts from, "" from scratch
    workers: int  # BatchNorm statistics, sums and pairs of mixed images depend on it
    order: list[int]  # [shuffle_rows, streams] where the list is read in windows, else []
    expansion_seconds: float  # of all processes, for the copies the arm uses
    run: str  # folder of the one expansion, else ""
    fitting_seconds: float = 0.0  # of all processes, for what the expansion had fitted
    baseline: dict[str, Any] = field(default_factory=dict)  # settings, guide, sha256 of it and of what C is chosen by
    classifier_seed: int | None = None  # both are `seed`, unless the study varies one alone
    data_seed: int | None = None  # of the real images and the samples
    runs: list[str] = field(default_factory=list)  # folders of the expansions, where there are several
    value: dict[str, Any] = field(default_factory=dict)  # of an arm of the section value: ValueArm.facts
    track: bool = False  # its predictions also say of each test image how many evaluations on the way were right
    rounds: dict[str, Any] = field(default_factory=dict)  # of an arm with a loop, or a control of one: round_facts

    @property
    def digest(self) -> str:
        """What the result depends on. A result or checkpoint with another digest is not used."""
        names = ("recipe", "list_sha256", "seed", "data_sha256", "test_sha256", "checkpoint_sha256", "workers", "order",
                 "frequency")
        also = {name: [one["restrict"], one["sha256"]] for name, one in self.also.items()}
        drw = {"drw": "divided by the weights"} if self.recipe.get("drw") else {}  # before, by the number of images
        known = {name: value for name, value in self.baseline.items() if name not in ("guide", "validation")}
        return digest({**{name: getattr(self, name) for name in names}, **({"also": also} if also else {}), **drw,
                       **({"baseline": known} if known else {}),
                       **({"classifier_seed": self.trained_by} if self.trained_by != self.seed else {}),
                       **({"track": True} if self.track else {})})

    @property
    def trained_by(self) -> int:
        """The random seed of the classifier: initial weights, order, augmentation."""
        return self.seed if self.classifier_seed is None else self.classifier_seed

    @property
    def is_trained(self) -> bool:
        """Whether a network is trained step by step."""
        return self.baseline.get("kind") not in UNTRAINED


@dataclass(frozen=True)
class TrialFolder:
    """Where trials lie (lists/ trials/ results/ predictions/ checkpoints/ of `files`) and how they are trained."""

    name: str  # in progress and messages
    files: Files
    training: TrainingConfig
    cluster: ClusterConfig
    n_classes: int


Train = Callable[[TrialFolder, Sequence[Trial]], list[str]]  # one line for each trial that failed, with its name


class Opened:
    """Runs and datasets of a study, each opened or listed once: both take seconds to minutes where they are large."""

    def __init__(self) -> None:
        self._runs, self._indexes = dict[str, Run](), dict[str, SeedIndex]()
        self._fingerprints, self._besides = dict[str, str](), dict[str, Beside]()

    def run(self, folder: str) -> Run:
        """The run in a folder, or the rounds of a loop as one. What is committed is read anew whenever it is asked
        for."""
        if folder not in self._runs:
            self._runs[folder] = open_samples(folder)
        return self._runs[folder]

    def beside(self, loop: LoopConfig, oversample: float) -> Beside:
        """A loop that has ended, and what stands beside it. Raises UsageError where it has not."""
        if loop.folder not in self._besides:
            self._besides[loop.folder] = Beside(loop_in(loop.folder), loop.run.out, oversample)
        return self._besides[loop.folder]

    def index(self, data: DataConfig) -> SeedIndex:
        """The seeds of a dataset. Raises SeedDataError."""
        key = data.model_dump_json()
        if key not in self._indexes:
            self._indexes[key] = build_index(data)
        return self._indexes[key]

    def fingerprint(self, index: SeedIndex, data: DataConfig) -> str:
        """Of a dataset, taken once."""
        key = data.model_dump_json()
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprint(index, data)
        return self._fingerprints[key]


@dataclass(frozen=True)
class Study:
    config: StudyConfig
    files: Files
    subsets: dict[int, tuple[DataConfig, SeedIndex]]  # real rows by seed
    expansions: dict[tuple[str, int], RunConfig | LoopConfig | str]  # what is to be made, or the folder of a run
    opened: Opened = field(default_factory=Opened, compare=False)
    sizes: dict[tuple[int, str], tuple[DataConfig, SeedIndex]] = field(default_factory=dict)  # of value; see real_key

    @property
    def trial_folder(self) -> TrialFolder:
        n_classes = len(self.subsets[self.config.seeds[0]][1].classes)
        return TrialFolder(self.config.name, self.files, self.config.training, self.config.cluster, n_classes)

    def real_rows(self, arm: Arm, seed: int) -> tuple[DataConfig, SeedIndex]:
        """The real images of an arm."""
        return self.subsets[seed] if arm.value is None or not (key := real_key(arm.value)) else self.sizes[seed, key]


def real_key(arm: ValueArm) -> str:
    """Which real images an arm of value has: its size, or HELD_OUT; "" for those of the subset."""
    if arm.role == "held out":
        return HELD_OUT
    return f"{arm.size:g}" if arm.role == "real" and arm.size != 1 else ""


def read_result(files: Files, name: str) -> dict[str, Any] | None:
    """The result of a trial; None where there is none, or a damaged one, so that it is trained again."""
    return healthy_json(files, f"results/{name}.json")


def lacks_predictions(files: Files, trial: Trial) -> bool:
    """Whether predictions of a trial with a result are gone or damaged, which it says."""
    for suffix in ("", *(f".{name}" for name in trial.also)):
        try:
            read_table(files, f"predictions/{trial.name}{suffix}.parquet")
        except (FileNotFoundError, DamagedFile) as error:
            log.warning("%s. The trial is trained again", error)
            return True
    return False


def folder_of(expansion: RunConfig | LoopConfig | str) -> str:
    return expansion if isinstance(expansion, str) else expansion.folder

