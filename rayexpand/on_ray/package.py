"""What travels with a job: one zip of the working directory, this package and the job's YAML."""

from __future__ import annotations

import contextlib
import os
import subprocess
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rayexpand.contract.errors import UsageError

LARGE_BYTES = 5 * 2**20  # data and weights do not travel with the code
PACKAGE_BYTES = 100 * 2**20
SKIP_ANYWHERE = {"__pycache__", "node_modules", "venv", "wandb", "mlruns"}
SKIP_AT_TOP = {"runs", "data", "build", "dist"}
SKIP_SUFFIXES = (".egg-info", ".pem", ".key", ".pyc")


def write_package(path: Path, working_dir: Path, file: Path | None) -> tuple[str, list[str]]:
    """Zips what a job needs into `path`; returns the name of `file` inside and what was left out for its size.

    Left out: hidden files, runs/, data/, caches, virtual environments, keys, links, what git ignores, large files.
    Equal content makes an equal zip, which Ray then does not upload again.
    """
    if not working_dir.is_dir():
        raise UsageError(f"--working-dir {working_dir}: is not a folder; give the one a job should start in")
    root, inside, contents, left_out = working_dir.resolve(), "", {}, []
    for name in _names(root):
        if (root / name).stat().st_size > LARGE_BYTES:
            left_out.append(name)
        else:
            contents[name] = root / name
    if "rayexpand/__init__.py" not in contents:
        spec = find_spec("rayexpand")
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        contents |= {f"rayexpand/{name}": package / name for name in _names(package, "rayexpand/")}
    if file is not None:
        at = file.resolve()
        inside = str(at.relative_to(root)) if at.is_relative_to(root) else f"job/{at.name}"
        contents[inside] = at
    if (size := sum(one.stat().st_size for one in contents.values())) > PACKAGE_BYTES:
        raise UsageError(f"--working-dir {working_dir}: {size >> 20} MB in {len(contents)} files would be sent; give a "
                         "folder with the code only, and put data and models where every node sees them")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            header = zipfile.ZipInfo(name)  # of 1980
            header.external_attr, header.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(header, contents[name].read_bytes())
    return inside, left_out


def _names(root: Path, inside: str = "") -> list[str]:
    """Files below `root` that belong to its code; `inside` comes before their names where they are sent."""
    return sorted(name for name in _listed(root, inside) if _wanted(inside + name) and (root / name).is_file()
                  and not (root / name).is_symlink())


def _listed(root: Path, inside: str) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError):  # no git here
        git = subprocess.run(["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                             capture_output=True, text=True, check=False)
        if git.returncode == 0 and git.stdout:
            yield from filter(None, git.stdout.split("\0"))
            return
    for folder, folders, files in os.walk(root):
        at = Path(folder).relative_to(root)
        folders[:] = [one for one in folders
                      if _wanted(inside + str(at / one)) and not (root / at / one / "pyvenv.cfg").exists()]
        yield from (str(at / one) for one in files)


def _wanted(name: str) -> bool:
    parts = Path(name).parts
    return (parts[0] not in SKIP_AT_TOP and not name.endswith(SKIP_SUFFIXES)
            and not any(part.startswith(".") or part in SKIP_ANYWHERE or part.endswith(".egg-info") for part in parts))
