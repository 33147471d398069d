"""Makes the folders of tests/compat/c960195 with the code of commit c960195. README.md beside this file says how.

    python tests/compat/make.py CODE

CODE is a checkout of that commit. Every command line below runs in a process of its own, in a scratch folder; some of
them are killed at a certain point. The same command lines without a kill give expected.json.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import drawn  # both lie beside this file
import found

HERE = Path(__file__).resolve().parent
FIXTURES = HERE / "c960195"
DAY = "2026-01-01 00:00:00Z"  # of every file in the archives
PICTURES = ("ant", "bee", "cat")
BROKEN = ("ant/2.png", "bee/0.png", "cat/4.png")  # in three shards; the first is repaired before the folders are packed

# archive: what is packed
PACKED = {
    "runs": ("pictures", "sound", "runs/pictures", "runs/digits", "runs/chosen"),
    "study": ("shapes", "runs/study", "runs/early"),
    "sweep": ("shapes", "runs/sweep", "runs/swept"),
    "models": ("models", "artifacts", "runs/img2img", "runs/distdiff", "runs/diffmix"),
}


def begin(project: Project) -> None:
    """The folders as they are packed: some things are finished, some are half made."""
    expand = ("expand", "--no-ray")
    project(*expand, "pictures.yaml", kill="write data/train-000003.parquet")
    project.repair(BROKEN[0])
    project("retry", "runs/pictures", "--no-ray")
    project(*expand, "digits.yaml", kill="write data/train-000002.parquet")
    project(*expand, "digits.yaml", "--set", "name=chosen", "--set", "data.per_class=1", "--set", "method.ratio=2")
    project("select", "select.yaml", "--no-ray")
    project("train", "study.yaml", "--no-ray", kill="write checkpoints/randaugment-s1.pt")
    project("train", "study.yaml", "--no-ray", "--set", "name=early", kill="write data/train-000000.parquet")
    project("sweep", "sweep.yaml", "--no-ray", kill="write checkpoints/*.pt 3")
    project("sweep", "sweep.yaml", "--no-ray", "--set", "name=swept")
    project("fit", "fit-small.yaml", "--no-ray", kill="task guide 4")
    project("fit", "fit-guided.yaml", "--no-ray")
    project("fit", "fit-regrouped.yaml", "--no-ray", kill="task grouping classes 4")
    project("fit", "fit-tuned.yaml", "--no-ray")
    project("fit", "fit-tuned-longer.yaml", "--no-ray", kill="task fine-tuning 5")
    project(*expand, "img2img.yaml", kill="write data/train-000001.parquet")
    project(*expand, "distdiff.yaml", kill="write data/train-000001.parquet")
    project(*expand, "diffmix.yaml", kill="write data/train-000000.parquet")


def finish(project: Project) -> None:
    """The same, whole: with nothing there but what `begin` had fitted to its end."""
    expand = ("expand", "--no-ray")
    project(*expand, "pictures.yaml")
    for name in BROKEN:
        project.repair(name)
        project("retry", "runs/pictures", "--no-ray")
    project(*expand, "digits.yaml")
    project("train", "study.yaml", "--no-ray")
    project("sweep", "sweep.yaml", "--no-ray")
    for name in ("small", "guided", "regrouped", "tuned", "tuned-longer"):
        project("fit", f"fit-{name}.yaml", "--no-ray")
    for name in ("img2img", "distdiff", "diffmix"):
        project(*expand, f"{name}.yaml")


class Project:
    """A folder with the YAML files, and the command line of the old code in it."""

    def __init__(self, folder: Path, code: Path) -> None:
        self.folder, self.code = folder, code
        for file in FIXTURES.glob("*.yaml"):
            shutil.copy(file, folder)
        draw_pictures(folder)
        draw_generator(folder / "models/drawn", code)

    def __call__(self, *arguments: str, kill: str = "") -> None:
        done = subprocess.run([sys.executable, __file__, "--child", f"--kill={kill}", *arguments], cwd=self.folder,
                              env={**os.environ, "PYTHONPATH": str(self.code), "OMP_NUM_THREADS": "1"})
        wanted = -signal.SIGKILL if kill else 0
        if done.returncode != wanted:
            raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}, not {wanted}")

    def repair(self, name: str) -> None:
        shutil.copy(self.folder / "sound" / name, self.folder / "pictures" / name)


def draw_pictures(folder: Path) -> None:
    """Three classes of pictures of 10 by 12 pixels: six each in `pictures`, of which `sound` holds those that are
    broken at first, and in `shapes` six to train on and four to test on."""
    import numpy as np
    from PIL import Image

    rng = np.random.Generator(np.random.Philox(key=11))
    for place, count in (("pictures", 6), ("shapes/train", 6), ("shapes/test", 4)):
        for name in PICTURES:
            (folder / place / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
                coarse.resize((10, 12), Image.Resampling.NEAREST).save(folder / place / name / f"{i}.png")
    for name in BROKEN:
        (folder / "sound" / name).parent.mkdir(parents=True)
        shutil.move(folder / "pictures" / name, folder / "sound" / name)
        (folder / "pictures" / name).write_bytes(b"no picture")


def draw_generator(folder: Path, code: Path) -> None:
    """The layout is that of the tests' tiny generator, the numbers are our own."""
    from safetensors import safe_open

    subprocess.run([sys.executable, "-c", "import sys; from pathlib import Path; from tests.tiny import tiny_pipeline; "
                    "tiny_pipeline(Path(sys.argv[1]), size=8)", str(folder)], cwd=code, check=True,
                   env={**os.environ, "PYTHONPATH": str(code)})
    shapes: dict[str, dict[str, list[int]]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "np") as file:
            shapes[str(path.relative_to(folder))] = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    (folder / drawn.TENSORS).write_text(json.dumps(shapes))
    drawn.draw_weights(folder)


def child(kill: str, arguments: list[str]) -> None:
    """One command line of the old code. `kill`: `write NAME [N]` ends this process behind the N-th write of a name,
    `task TASK DONE` as soon as so much of a task is done."""
    socket.gethostname = lambda: "machine"  # the host stands in many files
    from rayexpand import cli, files, progress

    verb, _, rest = kill.partition(" ")
    if verb == "write":
        pattern, _, count = rest.partition(" ")
        left = int(count or 1)

        def watched(write: Any) -> Any:
            def instead(self: Any, name: str, *others: Any, **named: Any) -> Any:
                nonlocal left
                found = write(self, name, *others, **named)
                if fnmatch.fnmatch(name, pattern):
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)
                return found
            return instead

        files.LocalFiles.publish = watched(files.LocalFiles.publish)
        files.LocalFiles.replace = watched(files.LocalFiles.replace)
    if verb == "task":
        task, _, wanted = rest.rpartition(" ")

        def told(self: Any, name: str, done: int, total: int, facts: Any = None) -> None:
            if name == task and done >= int(wanted):
                os.kill(os.getpid(), signal.SIGKILL)

        progress.Progress.__call__ = told
    sys.argv = ["rayexpand", *arguments]
    cli.main()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("code", type=Path)
    code = parser.parse_args().code.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        begun, whole = Path(scratch, "begun"), Path(scratch, "whole")
        begun.mkdir()
        whole.mkdir()
        begin(Project(begun, code))
        project = Project(whole, code)
        # a model is what it is on the machine that trained it, so what follows from one takes the one that is packed
        for name in ("guided", "tuned"):
            copy_fitted(begun / "artifacts", whole / "artifacts", name)
        finish(project)
        expected = {"stack": found.stack(), **found.everything(whole)}
        (FIXTURES / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
        for name, parts in PACKED.items():
            pack(begun, name, parts)


def copy_fitted(source: Path, target: Path, name: str) -> None:
    """The artifacts that the links of a name lead to, with these links."""
    target.mkdir(exist_ok=True)
    for link in source.glob(f"{name}-*"):
        if link.is_symlink() and not (target / link.name).exists():
            folder = os.readlink(link)
            shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
            (target / link.name).symlink_to(folder)


def pack(folder: Path, name: str, parts: tuple[str, ...]) -> None:
    archive = FIXTURES / f"{name}.tar"
    subprocess.run(["tar", "--sort=name", f"--mtime={DAY}", "--owner=0", "--group=0", "--numeric-owner",
                    "--exclude=models/*.safetensors", "-cf", str(archive), *parts], cwd=folder, check=True)
    subprocess.run(["xz", "-9ef", str(archive)], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2].removeprefix("--kill="), sys.argv[3:])
    else:
        main()
