"""Pages that show images, or load models for what they show, beside the page that every folder has."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Literal

from rayexpand.contract.errors import ConfigError

PageKind = Literal["matrix", "sheet", "map", "failures", "latents", "batch", "saliency"]

# What each kind takes, with its default. Those of ONE take a single run, those of STUDY a single study.
TAKES: dict[str, dict[str, Any]] = {
    "matrix": {"rows": 10, "copies": 1}, "sheet": {"rows": 10, "copies": 3},
    "map": {"images": 20, "classes": 10, "guide": None, "checkpoint": None}, "latents": {"images": 64},
    "failures": {"rows": 12, "images": 2000, "guide": None, "checkpoint": None},
    "batch": {"images": 16}, "saliency": {"images": 10}}
ONE, STUDY = ("failures",), ("batch", "saliency")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def pictures(kind: PageKind, *folders: str | os.PathLike[str], out: str | None = None, name: str | None = None,
             **given: Any) -> str:
    """Writes a page with pictures and returns where; it lies in figures/ of `out`, by default the first folder, with
    what it shows as numbers beside it.

    matrix      the same seeds by several runs; rows, copies
    sheet       samples by class, several runs; rows (classes), copies (seeds of a class)
    map         features of samples, real images and prototypes in a plane; images (of a class and run), classes, guide,
                checkpoint
    failures    samples of one run whose own class the guide sees least; rows, images (looked at), guide, checkpoint
    latents     what changes in the latents of the seeds; images (of a run)
    batch       the first training batch of every arm of a study; images
    saliency    Grad-CAM of the same test images under every arm of a study that kept its weights; images

    A study among the folders stands for one run of each of its expansions, a sweep for its pilots. Raises ConfigError
    for what a kind does not take, and what the page cannot do without.
    """
    where = [os.fspath(folder) for folder in folders]
    if problems := _problems(kind, where, name, {**given, "out": out}):
        raise ConfigError(f"--{kind}", problems)
    asked = {**TAKES[kind], **{key: value for key, value in given.items() if value is not None}}
    return str(_write(kind, where, out or where[0], name or kind, asked))


def _problems(kind: str, folders: Sequence[str], name: str | None, given: dict[str, Any]) -> list[str]:
    found = [] if folders else ["no folder is named"]
    if name is not None and not NAME.fullmatch(name):
        found.append(f"name: {name!r} is no name of a file; use letters, digits, '.', '_' and '-'")
    if kind in (*ONE, *STUDY) and len(folders) > 1:
        found.append(f"it shows one {'study' if kind in STUDY else 'run'}, and {len(folders)} folders are named")
    taken = TAKES[kind].keys() | ({"out"} if kind not in (*ONE, *STUDY) else set())
    found += [f"{key}: has no effect here; leave it out" for key, value in given.items()
              if value is not None and key not in taken]
    found += [f"{key}: expected 1 or more, got {value}" for key, value in given.items()
              if key in taken and isinstance(value, int) and value < 1]
    return found


def _write(kind: str, folders: Sequence[str], out: str, name: str, asked: dict[str, Any]) -> Any:
    if kind == "batch":
        from rayexpand.reports.batch import write_batch_page

        return write_batch_page(folders[0], name=name, **asked)
    if kind == "saliency":
        from rayexpand.reports.saliency import write_saliency_page

        return write_saliency_page(folders[0], name=name, **asked)
    from rayexpand.studies.run_folders import run_folders

    runs = list(dict.fromkeys(run for folder in folders for run in run_folders(folder)))
    if kind in ("matrix", "sheet"):
        from rayexpand.reports.matrix import write_matrix

        return write_matrix(runs, out, name=name, by_class=kind == "sheet", **asked)
    if kind == "map":
        from rayexpand.reports.maps import write_map_page

        return write_map_page(runs, out, name=name, **asked)
    if kind == "latents":
        from rayexpand.reports.latents import write_latents_page

        return write_latents_page(runs, out, name=name, **asked)
    from rayexpand.reports.failures import write_failures_page

    if len(runs) > 1:
        raise ConfigError("--failures", [f"{folders[0]} stands for {len(runs)} runs, and it shows one; name that run"])
    return write_failures_page(runs[0], name=name, **asked)
