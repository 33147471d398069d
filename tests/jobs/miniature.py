"""Any job of a paper or of ImageNet made small enough for a laptop: by `--set` alone, on random images in the layout it
names, with tiny generators of the families it names; and all that must be made before it.

    w = Workshop(tmp_path)            # a folder with `jobs`, where the process must stand
    w.done(Job("papers/gif/study-cars"))     # what its head says comes first, then the job itself
"""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rayexpand import api
from rayexpand.classifier.recipe import PRESETS, make_recipe
from rayexpand.contract import settings
from rayexpand.data.corruptions.tables import COMMON
from rayexpand.fitting.adapter.recipe import make_finetune
from rayexpand.methods import method_class
from tests.commands import ROOT

JOBS = ROOT / "jobs"
CLASSES, TRAIN, TEST, SIDE = 3, 3, 2, 24  # of the data: classes, images of each, pixels
COPIES, STEPS = 3, 12  # of an image at most, and of the solver, where a generator makes them


@dataclass(frozen=True)
class Job:
    """A file below jobs by its name without .yaml, and what the head of another says to set."""

    name: str
    overrides: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return JOBS / f"{self.name}.yaml"

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def verb(self) -> str:
        return self.path.stem.partition("-")[0]

    @property
    def raw(self) -> dict[str, Any]:
        """As its file and the overrides have it; a sweep with its study written out."""
        found = settings.read(self.path, self.overrides)
        if isinstance(found.get("study"), str):
            found["study"] = {key: value for key, value in settings.read(ROOT / found["study"]).items()
                              if key not in ("name", "out")}
        return found


@cache
def jobs() -> tuple[Job, ...]:
    """Every file, and every variant of one for which its head, or that of a neighbour, says what to set."""
    found: dict[Job, None] = {}
    for path in sorted([*JOBS.glob("imagenet/*.yaml"), *JOBS.glob("papers/*/*.yaml")]):
        name = str(path.relative_to(JOBS).with_suffix(""))
        found[Job(name)] = None
        found |= dict.fromkeys(_variants(name))
    return tuple(found)


_SAID = (r'(?P<file>(?:fit|expand|select|study)-[\w-]+)\.yaml|--set (?:"(?P<quoted>[^"]+)"|(?P<plain>\S+))|'
         r'(?P<end>\. )')


def _variants(name: str) -> Iterator[Job]:
    """Groups of `--set` in a head that begin with a name or a run; they are of the file that was named last."""
    head = " ".join(line[1:].strip() for line in (JOBS / f"{name}.yaml").read_text().splitlines() if line[:1] == "#")
    owner, group = name, []
    groups: list[tuple[str, list[str]]] = []
    for one in re.finditer(_SAID, head):
        if one["file"] or one["end"]:
            owner, group = f"{name.rpartition('/')[0]}/{one['file']}" if one["file"] else name, []
            continue
        said = one["quoted"] or one["plain"].rstrip(".,;)")
        if "<" in said:
            continue
        if said.startswith(("name=", "run=")) and not (group and said.startswith("run=")):
            group = []
            groups.append((owner, group))
        if "=" in said:
            group.append(said)
        if (one["plain"] or "").endswith("."):
            owner, group = name, []
    yield from (Job(owner, tuple(group)) for owner, group in groups)


class Workshop:
    """A folder in which jobs are run, each once. It makes data, models and whatever else a job needs on the way."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._done: dict[Job, Any] = {}
        (root / "jobs").symlink_to(ROOT / "jobs")

    def done(self, job: Job) -> Any:
        """The result of the job's verb, after everything it needs. Raises what that raises."""
        if job not in self._done:
            raw = job.raw
            for wanted in _needs(job, raw):
                self.done(wanted)
            _provide(raw, self._root)
            self._done[job] = _VERBS[job.verb](job.path, set=[*job.overrides, *overrides(raw, job.raw)])
        return self._done[job]


def overrides(raw: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What `--set` must say to make a job small: one for each field that changes, lists and studies as a whole."""
    return [f"{field}={json.dumps(value)}" for field, value in _changes(before, small(raw), "")]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, after in new.items():
        before = old.get(key, ...)
        is_section = isinstance(before, dict) and isinstance(after, dict) and set(before) <= set(after)
        if is_section and prefix + key != "study" and "." not in "".join(after):
            yield from _changes(before, after, f"{prefix}{key}.")
        elif before != after:
            yield prefix + key, after


# --- making it small --------------------------------------------------------------------------------------------------

def small(raw: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """A section of a job with small numbers and tiny models, whatever the job. `path`: the keys above it."""
    made = {key: _smaller(key, value, (*path, key)) for key, value in raw.items()}
    if "arms" in made and "data" in made and "recipe" not in made:  # the defaults are those of digits
        made["recipe"] = _recipe({})
    if "shadows" in made:
        made |= {"shadows": 4, "stratified": True, "planted": 2}
    if path[-1:] == ("method",):
        made = _method(made)
    return made


def _smaller(key: str, value: Any, path: tuple[str, ...]) -> Any:
    if key == "recipe" and isinstance(value, dict):
        return _finetune(value) if "adapter" in path else value if "baselines" in path else _recipe(value)
    if key == "arms":
        return [_arm(one, path) for one in value]
    if key == "weights":
        return _weights(path[-2], value)
    if key == "space":
        return {field: _choices(field.rpartition(".")[2], one) for field, one in value.items()}
    if key == "seeds" and isinstance(value, list):
        return [0]
    if key in _SMALL:
        return _SMALL[key](value)
    if isinstance(value, list):
        return [small(one, path) if isinstance(one, dict) else one for one in value]
    return small(value, path) if isinstance(value, dict) else value


_SMALL: dict[str, Callable[[Any], Any]] = {
    "n": lambda n: min(n, 2), "per_class": lambda n: min(n, 2), "hold_out": lambda n: 1,
    "images": lambda n: min(n or 4, 4), "dtype": lambda one: "float32",
    "training": lambda one: {"keep": one["keep"]} if "keep" in one else {},
    "resolution": lambda one: 16, "crops": lambda one: 1, "workers": lambda one: 0,
    "size": lambda one: 16, "extractor": lambda one: {"guide": "models/tiny-clip"}, "metrics": lambda ones: ["kd"],
    "estimate": lambda one: {}}


def _arm(arm: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    made = dict(arm)
    if "recipe" in made:
        preset = PRESETS.get(str(made["recipe"].get("preset")), {})  # of its own
        made["recipe"] |= {key: value for key, value in _RECIPE.items() if key in {**preset, **made["recipe"]}}
    if isinstance(ratio := made.get("ratio"), list):  # at least one sample of three images, and no more than there are
        ends = ratio if len(ratio) < 5 else [ratio[0], ratio[-1]]
        made["ratio"] = sorted({max(0.5, min(one, COPIES)) for one in ends})
    elif ratio is not None:
        made["ratio"] = min(ratio, COPIES)
    return made


_RECIPE: dict[str, Any] = {"backbone": "small_resnet", "backbone_args": {"width": 8, "norm": "group"}, "stem": "own",
                           "size": 16, "test_size": None, "epochs": 1, "updates": None, "batch": 8, "drop_path": 0.0,
                           "warmup_epochs": 0, "gridmask_until": 0.8}


def _recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """One epoch of a small network, everything else as the recipe says."""
    fields = {**PRESETS.get(str(given.get("preset")), {}), **given}
    made = {**given, **_RECIPE}
    if fields.get("resize"):
        made["resize"] = 18
    make_recipe(made)
    return made


def _finetune(given: Mapping[str, Any]) -> dict[str, Any]:
    fields = make_finetune(dict(given))
    return {**given, "steps": 1, "batch": 2, "precision": "fp32", "init_token": None,
            **({"mmd_images": 2} if fields.mmd_images else {})}


def _method(given: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(given)
    name = made.get("name")
    if name == "classical":
        return made
    planned = made.get("ratio", method_class(str(name)).model_fields["ratio"].default)
    made["ratio"] = min(planned, COPIES) if isinstance(planned, (int, float)) else COPIES
    if name != "distdiff" and made.get("generator") != "mae":  # which counts them, which has none
        made["steps"] = STEPS
    if made.get("group_size"):
        made["group_size"] = min(made["group_size"], COPIES)
    if made.get("referable_classes"):
        made["referable_classes"] = min(made["referable_classes"], CLASSES - 1)
    return made


def _choices(field: str, one: Any) -> Any:
    """The first and the last of a dimension."""
    if not isinstance(one, dict) or not isinstance(values := one.get("choice"), list):
        return one
    if field in ("ratio", "referable_classes"):
        return {"choice": [1, COPIES - 1]}
    ends = [values[0], values[-1]]
    return {"choice": [_weights("prior", one) for one in ends] if field == "weights" else ends}


def _weights(section: str, name: str) -> str:
    if name.startswith("artifacts/"):
        return name
    if section in ("guide", "guide_2"):
        return {"guide": "models/tiny-clip", "guide_2": "models/tiny-clip2"}[section]
    if section == "prior":
        known = {"cosxl": "cosxl", "unclip": "unclip", "mae": "mae", "xl": "sdxl"}
        return f"models/tiny-{next((family for word, family in known.items() if word in name.lower()), 'sd')}"
    return name


# --- what comes first -------------------------------------------------------------------------------------------------

def _values(raw: Any) -> Iterator[str]:
    if isinstance(raw, str):
        yield raw
    for one in raw.values() if isinstance(raw, Mapping) else raw if isinstance(raw, list) else ():
        yield from _values(one)


def _needs(job: Job, raw: Mapping[str, Any]) -> Iterator[Job]:
    """The jobs whose runs, artifacts and selections it names, in the order in which it names them."""
    study = raw.get("study", raw)
    for value in _values({key: one for key, one in raw.items() if key != "name"}):
        if found := re.match(r"artifacts/(.+)-([a-z_]+)$", value):
            yield _maker("fit", job, found[1])
        elif found := re.match(r"runs/([^/]+)(/runs/.*)?$", value):
            yield _maker("study" if found[2] else "expand", job, found[1])
    for arm in study.get("arms", []) if isinstance(study, Mapping) else []:
        if arm.get("selection") and arm["selection"] not in study.get("selections", {}):
            yield _selection(job, arm["selection"], study["expansions"][arm["use"]]["run"])


def _maker(verb: str, job: Job, name: str) -> Job:
    """The job of the same folder, else of any, that makes what has this name."""
    found = [one for one in jobs() if one.verb == verb and one.raw["name"] == name]
    found.sort(key=lambda one: one.folder != job.folder)
    assert found, f"{job.name} needs {name}, which no {verb}-*.yaml makes"
    return found[0]


def _selection(job: Job, name: str, run: str) -> Job:
    found = [one for one in jobs() if one.verb == "select" and (raw := one.raw)["name"] == name and raw["run"] == run]
    assert found, f"{job.name} needs the selection {name} of {run}, which no select-*.yaml makes"
    return found[0]


# --- data and models --------------------------------------------------------------------------------------------------

def _provide(raw: Mapping[str, Any], root: Path) -> None:
    """Whatever files the job names: its data sets, models, checkpoints, groups."""
    numbered = [section["data"] for section in _sections(raw) if section.get("class_map") == "numbers"]
    for section in _sections(raw):
        if "source" in section and "path" in section:
            _data(section, root, is_numbered=section in numbered)
        if str(section.get("checkpoint", "")).endswith(".safetensors"):
            _checkpoint(root / section["checkpoint"])
        if "captions" in section and isinstance(section["captions"], dict):
            _model(root, section["captions"]["model"], "captioner")
    for section in _sections(raw):
        if "groups" in section and "data" in section:
            _groups(root / section["groups"], section["data"], root)
    for name in {one for one in _values(small(raw)) if one.startswith("models/tiny-")}:
        _model(root, name, name.removeprefix("models/tiny-"))


def _sections(raw: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(raw, Mapping):
        yield raw
    for one in raw.values() if isinstance(raw, Mapping) else raw if isinstance(raw, list) else ():
        yield from _sections(one)


def _pixels(part: object, label: int, n: int) -> np.ndarray:
    """Noise around a grey of the class, wider than high; `part`: of which dataset and split."""
    rng = np.random.Generator(np.random.Philox(key=[zlib.crc32(str(part).encode()), 1000 * label + n]))
    return rng.integers(64 * (label % 3), 64 * (label % 3) + 96, (SIDE, SIDE + 4, 3), dtype=np.uint8)


_WORDS = {"n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player"}  # of three ImageNets


def _data(section: Mapping[str, Any], root: Path, is_numbered: bool) -> None:
    path, split = root / section["path"], section.get("split")
    is_npz = section["source"] == "npz"  # whose labels are numbers of the classes, so that all must be there
    keys = [*map(str, range(CLASSES))] if is_numbered else _keys(section.get("classes"), root,
                                                                 None if is_npz else CLASSES)
    count = TEST if split in ("test", "val") and not is_npz else TRAIN
    {"imagefolder": _folder, "parquet": _parquet, "npz": _npz, "cifar_c": _cifar_c}[section["source"]](
        path, split, keys, count, section)


def _keys(classes: str | None, root: Path, count: int | None = CLASSES) -> list[str]:
    """The first classes of the file that has their words, which is written where the repository has none."""
    if classes is None:
        return list(_WORDS)
    file = root / classes
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".csv":
            file.write_text("key,name,metaclass\n" + "".join(f"{key},{name},animal\n" for key, name in _WORDS.items()))
        else:
            file.write_text("".join(f"{key} {name}, a synonym\n" for key, name in _WORDS.items()))
    lines = file.read_text().splitlines()
    if file.suffix == ".csv":
        return [row["key"] for row in csv.DictReader(lines)][:count]
    return [line.split()[0] for line in lines][:count]


def _cifar_c(path: Path, split: str | None, keys: list[str], count: int, section: Mapping[str, Any]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    labels = np.tile(np.arange(len(keys) * count) % len(keys), 5).astype(np.uint8)
    for kind in COMMON:
        images = [_pixels(f"{path}{kind}", label, n)[:20, :20] for n, label in enumerate(labels.tolist())]
        np.save(path / f"{kind}.npy", np.stack(images))
    np.save(path / "labels.npy", labels)


def _folder(path: Path, split: str | None, keys: list[str], count: int, section: Mapping[str, Any]) -> None:
    for label, key in enumerate(keys):
        (path / (split or "") / key).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            Image.fromarray(_pixels((path.name, split), label, n)).save(path / (split or "") / key / f"{n}.png")
    if ids := section.get("ids"):
        file = path / Path(ids).name
        file.write_text("".join(f"{key}/{n}.png\n" for key in keys for n in range(count)))


def _groups(file: Path, data: Mapping[str, Any], root: Path) -> None:
    ids = [f"{one.parent.name}/{one.name}" for one in sorted((root / data["path"]).rglob("*.png"))]
    file.write_text("seed_id,group\n" + "".join(f"{one},{('land', 'water')[n % 2]}\n" for n, one in enumerate(ids)))


def _parquet(path: Path, split: str | None, keys: list[str], count: int, section: Mapping[str, Any]) -> None:
    image, label = section.get("image_column", "image"), section.get("label_column", "label")
    rows = [(k, n) for k in range(len(keys)) for n in range(count)]

    def png(k: int, n: int) -> dict[str, Any]:
        Image.fromarray(_pixels((path.name, split), k, n)).save(file := io.BytesIO(), "PNG")
        return {"bytes": file.getvalue(), "path": None}

    path.mkdir(parents=True, exist_ok=True)
    features = {label: {"names": keys, "_type": "ClassLabel"}, image: {"_type": "Image"}}
    table = pa.table({image: [png(*row) for row in rows], label: [k for k, _ in rows] if split else [
        keys[k] for k, _ in rows]})
    if split:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path / f"{split or 'fog'}-00000-of-00001.parquet")


def _npz(path: Path, split: str | None, keys: list[str], count: int, section: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = np.stack([_pixels(part, k, n)[:, :SIDE] for k in range(len(keys))
                                             for n in range(count)])
        arrays[f"{part}_labels"] = np.repeat(np.arange(len(keys)), count)[:, None]
    np.savez(path, **arrays)


def _checkpoint(file: Path) -> None:
    """Weights of the small network that stands for every backbone."""
    if file.is_file():
        return
    from safetensors.torch import save_file

    from rayexpand.classifier.backbones import build_backbone

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(build_backbone(make_recipe(_RECIPE), 7, 0).state_dict(), file)


def _model(root: Path, name: str, kind: str) -> None:
    from tests.captioners import tiny_captioner
    from tests.models import families
    from tests.models.gif_priors import tiny_mae, tiny_unclip
    from tests.tiny import tiny_clip, tiny_pipeline

    folder = root / name
    if folder.is_dir():
        return
    if kind == "unclip":
        _model(root, "models/tiny-clip", "clip")
        tiny_unclip(folder, root / "models/tiny-clip")
    elif kind in ("sdxl", "cosxl"):
        families.build(kind, folder)
    else:
        {"sd": tiny_pipeline, "mae": tiny_mae, "clip": tiny_clip, "clip2": lambda at: tiny_clip(at, 1, 32),
         "captioner": lambda at: tiny_captioner(at, "blip-2-opt")}[kind](folder)


def _expand(path: Path, set: list[str]) -> Any:
    return api.expand(path, set=set, same_process=True)


def _audit(path: Path, set: list[str]) -> Any:
    return api.audit(path, set=set, same_process=True)


def _train(path: Path, set: list[str]) -> Any:
    found = api.train(path, set=set, same_process=True)
    assert not found.failed, "\n".join(found.failed)
    return found


def _sweep(path: Path, set: list[str]) -> Any:
    found = api.sweep(path, set=set)
    assert not found.failed, "\n".join(found.failed)
    return found


_VERBS: dict[str, Callable[..., Any]] = {"fit": api.fit, "expand": _expand, "select": api.select, "study": _train,
                                         "sweep": _sweep, "evaluate": api.evaluate, "audit": _audit}
