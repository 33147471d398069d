"""The configuration of a run: one YAML file, frozen, every unknown key an error, all mistakes reported at once.

Fields are semantic (they decide what the samples are, and enter the run digest) or operational (where, how fast, at
what price). OPERATIONAL lists the second kind; everything else is semantic.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from rayexpand.artifacts import KINDS
from rayexpand.artifacts.adapter import may_adapt
from rayexpand.contract.errors import ConfigError, EnvironmentFault, SeedDataError
from rayexpand.contract.protocols import Method
from rayexpand.contract.settings import Device, Later, Section, digest, mistakes, read
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig
from rayexpand.data.seeds.source import wanted_ids
from rayexpand.methods import load_method, method_class
from rayexpand.models.prior_config import PriorModel
from rayexpand.runs.allocation import Allocate

IMAGE_BYTES = 1 << 30  # runtime.image_bytes
PEAK_SHARE = (0.3, 0.5)  # estimate.peak_share
TRAINING_SHARE = (0.1, 0.4)


class ImageConfig(Section):
    size: int | None = Field(None, ge=8, description="side in pixels of the square the sampler sees; null: the prior's "
                             "own size, or for methods without a prior the size each image has")
    fit: Literal["crop", "center", "squash", "none"] = Field(
        "crop", description="crop: shorter side to size, then a random square (as DistDiff's released code); "
        "center: the middle square; squash: both sides, aspect lost; none: as it is")
    filter: Literal["bicubic", "bilinear"] = Field("bicubic", description="how squash resizes: bicubic, or bilinear as "
                                                   "Diff-Mix's released code; crop and center are bilinear")
    restore: bool = Field(False, description="bring samples that start from an image back to the size their seed has, "
                          "bilinear, as Diff-Mix's released code; with squash, which it undoes")

    @model_validator(mode="after")
    def _restores_whole_images(self) -> ImageConfig:
        if self.filter != "bicubic" and self.fit != "squash":
            raise ValueError(f"filter: has no effect on fit {self.fit}; take it out, or set fit: squash")
        if self.restore and self.fit in ("crop", "center"):
            raise ValueError(f"restore: fit {self.fit} cuts a part out, which would be stretched to the size of the "
                             "whole; set fit: squash, or take restore out")
        return self


class PriorConfig(PriorModel):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPU, bfloat16 on GPU")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    attention: Literal["auto", "sdpa", "eager"] = Field("auto", description="attention implementation of the UNet")
    channels_last: bool | Literal["auto"] = Field("auto", description="channels-last memory format of UNet and "
                                                  "autoencoder; auto: on GPU")
    compile: bool | Literal["auto"] = Field("auto", description="torch.compile the repeated blocks of the UNet; "
                                            "minutes of warm-up, so it is worth it on a GPU only; auto: there, where a "
                                            "C compiler is found")
    adapter: Literal["fused", "unfused"] = Field("fused", description="LoRA of an adapter: added to the weights once, "
                                                 "in float32, or kept beside them")


class GuideConfig(Section):
    weights: str = Field("digits", description="'digits' (embedded CLIP; the default for source digits only), a folder "
                         "(open_clip's layout, or made by `rayexpand fit`), org/name@revision, or an open_clip model "
                         "name")
    checkpoint: str | None = Field(None, description="safetensors file for a model name")


class Accept(Section):
    """A guide judges each sample as it is made, and a row that is refused is drawn again."""

    guide: GuideConfig = Field(GuideConfig(), description="which guide judges, apart from the guide of the method; a "
                               "classifier of other classes too, with `wanted`")
    score: Literal["cosine", "confidence"] = Field(
        "cosine", description="cosine: of the features of the sample and what `to` says (DiffCoRe-Mix); confidence: "
        "probability of the sample's class")
    to: Literal["seed", "class", "prompt"] = Field(
        default_factory=lambda data: "class" if data.get("score") == "confidence" else "seed",
        description="what the cosine is with: the features of its seed image (artifact image_features; DiffCoRe-Mix), "
        "the mean of its class (artifact thresholds), or the text of its prompt (CLIP); of a confidence: the class")
    wanted: str | None = Field(None, description="with confidence: key of the guide's class whose probability counts, "
                               "such as safe of a safety model; null: the class of the sample")
    above: float | Literal["class"] = Field(
        "class", description="what the score must exceed: a number, or what real images of the class reach on average "
        "(artifact thresholds; DiffCoRe-Mix, equation 5; its released code: 0.6)")
    deviations: float = Field(0.0, ge=0, description="with class: so many standard deviations less (ours)")
    quantile: float | None = Field(None, ge=0, le=1, description="with class: instead of the mean what all but this "
                                   "share of the real images reach (ours)")
    attempts: int = Field(5, ge=1, description="how often a row is drawn at most; prompt and noise are new each time "
                          "(DiffCoRe-Mix draws until it accepts, its released code once; 5 is ours)")
    exhausted: Literal["reject", "best"] = Field("reject", description="after the last attempt: the row is rejected, "
                                                 "or the try with the best score is kept")

    @model_validator(mode="after")
    def _can_be_exceeded(self) -> Accept:
        least = 0.0 if self.score == "confidence" else -1.0
        if self.above != "class" and not least <= self.above < 1:
            raise ValueError(f"above: {self.above} keeps all or nothing, for a {self.score} lies between {least:g} and "
                             f"1; give a number from {least:g} to below 1")
        return self

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Accept:
        unused = {"to": self.score == "confidence" and self.to != "class",
                  "wanted": self.score == "cosine" and self.wanted is not None,
                  "deviations": bool(self.deviations) and (self.above != "class" or self.quantile is not None),
                  "quantile": self.quantile is not None and self.above != "class"}
        because = {"to": "score confidence", "wanted": "score cosine", "quantile": f"above {self.above}",
                   "deviations": f"above {self.above}" if self.above != "class" else "a quantile"}
        for field, is_unused in unused.items():
            if is_unused:
                raise ValueError(f"{field}: has no effect with {because[field]}; take it out")
        if self.wanted is not None and self.above == "class":
            raise ValueError(f"above: class is what the images of each class reach, and all rows have the class "
                             f"{self.wanted!r} to reach; give a number")
        return self

    @property
    def comparison(self) -> str:
        """What thresholds know it by: seed, class, prompt or confidence."""
        return self.to if self.score == "cosine" else self.score

    @property
    def needs(self) -> frozenset[str]:
        """Fields of Tools, as of a method."""
        compared = {"seed": "image_features", "class": "thresholds"}.get(self.comparison)
        wanted = {"judge", compared, "thresholds" if self.above == "class" else None}
        return frozenset(one for one in wanted if one is not None)


DIGITS = "digits"
MODELS = frozenset({"prior", "guide", "judge"})  # of what a run needs, those that are loaded on its device


def unnamed(field: str, section: Any, data: DataConfig) -> list[str]:
    """The problem of a model that nobody named in `section`, which has `weights`: the embedded default knows the digits
    and nothing else."""
    if data.source == "digits" or section.weights != DIGITS or "weights" in section.model_fields_set:
        return []
    return [not_named(field, data)]


def guide_of_run(field: str, config: RunConfig) -> list[str]:
    """The problem of judging the samples of a run by its guide, where that is the embedded one and no guide made them:
    a run.json does not tell who named it."""
    if config.data.source == "digits" or config.guide.weights != DIGITS or "guide" in config.needs:
        return []
    return [not_named(field, config.data)]


def not_named(field: str, data: DataConfig) -> str:
    return (f"{field}: missing; the embedded default has seen digits only, and data.source is '{data.source}'. Name a "
            "model, or write digits if that is meant")


class SamplerConfig(Section):
    batch: int = Field(64, ge=1, description="rows per sampler call; part of the promise, since pixels depend on shape")
    shard_images: int = Field(1000, ge=1, description="rows per shard, about four minutes of work; whole seeds")


class CodecConfig(Section):
    format: Literal["auto", "png", "jpeg"] = Field("auto", description="auto: png up to 64 px, else jpeg 4:4:4")
    quality: int = Field(95, ge=1, le=100, description="jpeg quality")


class LimitsConfig(Section):
    max_failed: float = Field(0.01, ge=0, le=1, description="share of planned rows that may fail; above it the run "
                              "ends with exit code 3")
    deadline_s: float = Field(600, gt=0, description="seconds one sampler call may take before its process is ended")
    first_deadline_s: float = Field(1800, gt=0, description="the same for the first call of a process, which warms up")


class StoreConfig(Section):
    single_writer: bool = Field(False, description="publish by rename, for storage without hard links: the promise "
                                "that an old process cannot replace a file is dropped, run one driver at a time")


class RuntimeConfig(Section):
    torch_threads: int = Field(1, ge=1, description="CPU threads of one sampler process")
    io_threads: int = Field(2, ge=1, description="threads that decode ahead and encode behind the sampler")
    image_bytes: Annotated[int, Later(IMAGE_BYTES)] = Field(
        IMAGE_BYTES, ge=1, description="bytes of decoded images one sampler process holds: those that start a call, "
        "those it makes, those decoded ahead and those that wait to be encoded; one image always goes through")


Stage = Literal["fit", "expand", "judge", "train"]


class StageConfig(Section):
    """Fields of `cluster` that differ in one stage of a study; null: those of the cluster."""

    actors: int | None = Field(None, ge=1)
    cpus_per_actor: float | None = Field(None, ge=0)
    gpus_per_actor: float | None = Field(None, ge=0)
    resources: dict[str, float] | None = None
    label_selector: dict[str, str] | None = None


class ClusterConfig(Section):
    address: str | None = Field(None, description="Ray cluster to join (auto, or host:port); null: RAY_ADDRESS, the "
                                "cluster of the job this runs in, or a cluster of our own on this machine")
    actors: int | None = Field(None, ge=1, description="processes at once: samplers, training workers, trials of a "
                               "sweep; what an autoscaler is asked for. null: as many as the cluster holds now")
    cpus_per_actor: float = Field(1.0, ge=0, description="CPUs each of them reserves")
    gpus_per_actor: float | None = Field(None, ge=0, description="GPUs each reserves, fractions share one; null: 1 for "
                                         "methods with models where the cluster has GPUs, else 0")
    resources: dict[str, float] = Field({}, description="custom resources each reserves")
    label_selector: dict[str, str] = Field({}, description="labels a node must have, e.g. {ray.io/market-type: spot}")
    stages: dict[Stage, StageConfig] = Field({}, description="other values for a stage: fit (guides, generators, "
                                             "prototypes, captions, features), expand, judge (whatever asks a model "
                                             "about finished samples: select, evaluate, audit, corrupted test images), "
                                             "train (classifiers)")

    @model_validator(mode="after")
    def _has_no_second_word(self) -> ClusterConfig:
        for name in ("cpus_per_actor", "gpus_per_actor"):
            if "train" in self.stages and getattr(self.stages["train"], name) is not None:
                raise ValueError(f"stages.train.{name}: a study says this itself, with training.workers, "
                                 "cpus_per_worker and gpus_per_worker; take it out")
        return self

    def at(self, stage: Stage) -> ClusterConfig:
        """What counts in one stage."""
        said = self.stages[stage].model_dump(exclude_none=True) if stage in self.stages else {}
        return self.model_copy(update={**said, "stages": {}})


class EstimateConfig(Section):
    seeds: int | None = Field(None, ge=1, description="seed count to assume where the data is not on this machine")
    images_per_second: float | None = Field(None, gt=0, description="measured images/s of one GPU (or one CPU process)")
    bytes_per_image: int | None = Field(None, gt=0, description="measured encoded bytes of one image")
    gpus: int = Field(1, ge=1, description="GPUs (or CPU processes) to plan with")
    classes: Annotated[int | None, Later(None)] = Field(
        None, ge=1, description="the same for classes, by which the subsets of a study count")
    tests: Annotated[int | None, Later(None)] = Field(None, ge=1, description="the same for test images of a study")
    gpu_hour_usd: float | None = Field(None, ge=0, description="price of one GPU hour; of one CPU process too, where "
                                       "cpu_hour_usd is null")
    cpu_hour_usd: Annotated[float | None, Later(None)] = Field(
        None, ge=0, description="price of one hour of a CPU process")
    head_hour_usd: Annotated[float | None, Later(None)] = Field(
        None, ge=0, description="price of one hour of the head, paid over the wall time")
    storage_gb_month_usd: Annotated[float | None, Later(None)] = Field(
        None, ge=0, description="price of a gigabyte (10^9 bytes) of output for a month")
    gpus_per_node: Annotated[int, Later(1)] = Field(1, ge=1, description="GPUs that are lost together")
    preemptions_per_gpu_hour: float = Field(0.05, ge=0, description="spot losses to plan with: how often an hour of a "
                                            "GPU is ended by the loss of its node")
    node_start_s: Annotated[float | None, Later(None)] = Field(
        None, ge=0, description="seconds from asking for a node to a node that can run: the autoscaler's delay and the "
        "boot; null: 120 for GPUs, 0 for CPU processes")
    load_s: Annotated[float | None, Later(None)] = Field(
        None, ge=0, description="seconds from there to the first sampler call: copying and loading the models; null: "
        "60 for GPUs, 5 for CPU processes")
    idle_s: Annotated[float, Later(60.0)] = Field(60.0, ge=0, description="seconds after which a node without work is "
                                                  "given back")
    peak_tflops: Annotated[float | None, Later(None)] = Field(
        None, gt=0, description="dense peak of one GPU, TFLOP/s, for hours where no throughput was measured or given; "
        "null: that of an A100, 312 in half precision, 19.5 in float32")
    peak_share: Annotated[tuple[float, float], Later(PEAK_SHARE)] = Field(
        PEAK_SHARE, description="least and largest share of that peak which a run keeps; an assumption, which `bench` "
        "replaces by a measurement")

    training_share: Annotated[tuple[float, float], Later(TRAINING_SHARE)] = Field(
        TRAINING_SHARE, description="the same for trainings of classifiers and fine-tuning, which wait for images and "
        "normalise in between; an assumption, which `bench` of a study or finished trials replace")

    @field_validator("peak_share", "training_share")
    @classmethod
    def _is_a_range(cls, share: tuple[float, float]) -> tuple[float, float]:
        if not 0 < share[0] <= share[1] <= 1:
            raise ValueError(f"{share[0]:g} to {share[1]:g} is no range of shares; give two numbers above 0 and up to "
                             "1, the smaller one first")
        return share


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder is <out>/<name>")
    out: str = Field("runs", min_length=1, description="folder that holds runs")
    seed: int = Field(0, ge=0, description="run seed; keys every random stream")
    data: DataConfig
    image: ImageConfig = ImageConfig()
    prior: PriorConfig = PriorConfig()
    guide: GuideConfig = GuideConfig()
    artifacts: dict[str, str] = Field({}, description="folders that `rayexpand fit` made, by kind: prototypes, "
                                      "adapter, class_features, image_features, captions, thresholds")
    method: Any = Field(description="name of a method and its fields")
    sampler: SamplerConfig = SamplerConfig()
    codec: CodecConfig = CodecConfig()
    accept: Annotated[Accept | None, Later(None)] = Field(None, description="judge samples as they are made, and draw "
                                                          "again what is refused; null: keep all, unless the method "
                                                          "brings a judge")
    allocate: Annotated[Allocate | None, Later(None)] = Field(
        None, description="deal the copies by weights; null: each seed gets what the method plans")
    grow: Annotated[bool, Later(False)] = Field(False, description="where the folder holds a smaller run whose samples "
                                                "this one has too, make only the rest; off: refuse another run")
    limits: LimitsConfig = LimitsConfig()
    store: StoreConfig = StoreConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    cluster: ClusterConfig = ClusterConfig()
    estimate: EstimateConfig = EstimateConfig()

    @field_validator("artifacts", mode="before")
    @classmethod
    def _known_kinds(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if unknown := [str(name) for name in value if name not in KINDS]:
            near = get_close_matches(unknown[0], KINDS, n=1)
            raise ValueError(f"unknown kind '{unknown[0]}'" + (f", did you mean '{near[0]}'?" if near else "")
                             + f" Kinds are {', '.join(KINDS)}")
        return {name: folder for name, folder in value.items() if folder is not None}

    @field_serializer("method")
    def _method_fields(self, method: Method) -> dict[str, Any]:
        return {"name": method.name, **method.model_dump(mode="json", exclude={"name"})}  # type: ignore[attr-defined]

    @property
    def needs(self) -> frozenset[str]:
        """What samplers of this run load, and what its plan reads."""
        adapted = {"adapter"} if "adapter" in self.artifacts and may_adapt(self.method) else frozenset()
        return self.method.needs() | adapted | (frozenset() if self.accept is None else self.accept.needs)

    @property
    def folder(self) -> str:
        return f"{self.out.rstrip('/')}/{self.name}"


# The device and its attention kernels are in the stack fingerprint of every receipt instead; an artifact counts by its
# content hash, wherever it lies.
OPERATIONAL = ("name", "out", "artifacts", "grow", "limits", "store", "runtime", "cluster", "estimate", "prior.device",
               "prior.attention", "prior.channels_last", "prior.compile")


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Configuration of a YAML file with `a.b=value` overrides (values are YAML too). Raises ConfigError."""
    return parse(read(path, overrides), str(path))


def parse(raw: Mapping[str, Any], where: str = "configuration") -> RunConfig:
    """Configuration of a mapping. Raises ConfigError with every mistake of every section."""
    problems: list[str] = []
    method = raw.get("method")
    loaded: Method | None = None
    if not isinstance(method, Mapping) or not isinstance(method.get("name"), str):
        wanted = method if isinstance(method, str) else "img2img"
        problems.append(f"method.name: is missing; write `method: {{name: {wanted}}}`")
    else:
        try:
            loaded = load_method(method["name"], {k: v for k, v in method.items() if k != "name"})
        except ValidationError as error:
            problems += mistakes(error, method_class(method["name"]), "method.")
        except ConfigError as error:
            problems += error.problems
    fields = {**{str(k): v for k, v in raw.items()}, "method": loaded}
    if (brought := getattr(loaded, "acceptance", lambda: None)()) is not None:
        if isinstance(said := fields.get("accept", {}), Mapping):
            fields["accept"] = {**brought, **said}
        elif said is None:
            problems.append(f"accept: null does not turn off the judge that {method['name']} brings; the method has a "  # type: ignore[index]
                            "field for that")
    try:
        config = RunConfig(**fields)
    except ValidationError as error:
        raise ConfigError(where, mistakes(error, RunConfig, "") + problems + _data_problems(raw)) from error
    if problems:
        raise ConfigError(where, problems + seeds.check(config.data))
    return config


def _data_problems(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with the place of the data, where that section itself is sound."""
    try:
        return seeds.check(DataConfig(**raw["data"]))
    except (KeyError, TypeError, ValidationError):
        return []


def resolved(config: RunConfig) -> dict[str, Any]:
    """Every field with its value, as plain JSON data."""
    return config.model_dump(mode="json")


def ids_sha256(data: DataConfig) -> str | None:
    """Hash of what the file data.ids says, whatever its order; None where there is no such file (any more)."""
    try:
        wanted = wanted_ids(data)
    except (SeedDataError, EnvironmentFault):
        return None
    return None if wanted is None else digest(sorted(wanted))


def semantic(config: RunConfig) -> dict[str, Any]:
    """The resolved fields that decide what the samples are. A list of ids counts by what it says, wherever it lies; by
    its path only where it cannot be read."""
    fields = resolved(config)
    fields["data"]["ids"] = ids_sha256(config.data) or config.data.ids
    for dotted in OPERATIONAL:
        section, _, leaf = dotted.partition(".")
        if leaf:
            fields[section] = {k: v for k, v in fields[section].items() if k != leaf}
        else:
            fields.pop(section, None)
    if config.allocate is not None:
        fields["allocate"].pop("scores")  # what follows from them is in the plan
    if not config.needs & {"adapter"}:
        fields["prior"].pop("adapter")
    if not config.needs & {"prior"}:
        fields.pop("prior")
    if not config.needs & {"guide"}:
        fields.pop("guide")
    elif (own := guide_of_loop(config.out, config.guide.weights)) is not None:
        fields["guide"]["weights"] = own
    return fields


def guide_of_loop(out: str, weights: str) -> str | None:
    """Where a guide lies below the loop whose rounds lie in `out`, so that it may move; None where it is none of its
    own."""
    loop, place = os.path.normpath(out), os.path.normpath(weights)
    loop = loop.removesuffix("/rounds")
    return place.removeprefix(f"{loop}/") if loop != os.path.normpath(out) and place.startswith(
        f"{loop}/artifacts/") else None


