"""What travels with a job: one zip of the working directory, this package and the job's YAML."""

from __future__ import annotations

import contextlib
import os
import subprocess
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from rayexpand.contract.errors import UsageError

LARGE_BYTES = 5 * 2**20  # data and weights do not travel with the code
PACKAGE_BYTES = 100 * 2**20
SKIP_ANYWHERE = {"__pycache__", "node_modules", "venv", "wandb", "mlruns"}
SKIP_AT_TOP = {"runs", "data", "build", "dist"}
SKIP_SUFFIXES = (".egg-info", ".pem", ".key", ".pyc")


def write_package(path: Path, working_dir: Path, files: Sequence[str] = ()) -> tuple[dict[str, str], list[str]]:
    """Zips what a job needs into `path`; returns the names of `files` inside, by name, and what was left out for its
    size. The files are sent whatever they are, those of elsewhere in folders of their own.

    Left out: hidden files, runs/, data/, caches, virtual environments, keys, links, what git ignores, large files.
    Equal content makes an equal zip, which Ray then does not upload again.
    """
    if not working_dir.is_dir():
        raise UsageError(f"--working-dir {working_dir}: is not a folder; give the one a job should start in")
    root, inside, contents, left_out = working_dir.resolve(), dict[str, str](), {}, []
    for name in _code(root, _listed(root)):
        if (root / name).stat().st_size > LARGE_BYTES:
            left_out.append(name)
        else:
            contents[name] = root / name
    contents = {name: file for name, file in contents.items() if not name.startswith("rayexpand/")}
    package = _package(root)
    contents |= {f"rayexpand/{name}": package / name for name in _code(package, _walked(package, "rayexpand/"))}
    for number, file in enumerate(files):
        at = Path(file).resolve()
        inside[file] = str(at.relative_to(root)) if at.is_relative_to(root) else f"job/{number}/{at.name}"
        contents[inside[file]] = at
    if (size := sum(one.stat().st_size for one in contents.values())) > PACKAGE_BYTES:
        raise UsageError(f"--working-dir {working_dir}: {size >> 20} MB in {len(contents)} files would be sent; give a "
                         "folder with the code only, and put data and models where every node sees them")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            header = zipfile.ZipInfo(name)  # of 1980
            header.external_attr, header.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(header, contents[name].read_bytes())
    return inside, left_out


def _package(root: Path) -> Path:
    """The package in the folder that is sent, else the one that runs here. What git ignores for its user (`data/`,
    `runs/`) are rooms of the package, so git is not asked about it."""
    if (root / "rayexpand/__init__.py").is_file():
        return root / "rayexpand"
    spec = find_spec("rayexpand")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _code(root: Path, names: Iterable[str]) -> list[str]:
    """Those that are files below `root`."""
    return sorted(name for name in names if (root / name).is_file() and not (root / name).is_symlink())


def _listed(root: Path) -> Iterator[str]:
    """Files below a user's folder that belong to his code."""
    with contextlib.suppress(FileNotFoundError):  # no git here
        git = subprocess.run(["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                             capture_output=True, text=True, check=False)
        if git.returncode == 0 and git.stdout:
            yield from filter(_wanted, filter(None, git.stdout.split("\0")))
            return
    yield from _walked(root)


def _walked(root: Path, inside: str = "") -> Iterator[str]:
    """Wanted files below `root`; `inside` comes before their names where they are sent."""
    for folder, folders, files in os.walk(root):
        at = Path(folder).relative_to(root)
        folders[:] = [one for one in folders
                      if _wanted(inside + str(at / one)) and not (root / at / one / "pyvenv.cfg").exists()]
        yield from (str(at / one) for one in files if _wanted(inside + str(at / one)))


def _wanted(name: str) -> bool:
    parts = Path(name).parts
    return (parts[0] not in SKIP_AT_TOP and not name.endswith(SKIP_SUFFIXES)
            and not any(part.startswith(".") or part in SKIP_ANYWHERE or part.endswith(".egg-info") for part in parts))
