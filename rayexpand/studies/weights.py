"""The weights of finished classifiers, where a study keeps them (`training.keep: weights`).

    weights/<trial>.safetensors    every tensor of the network, as it answered for the test images last

The result of the trial has the sha256 of the file. kept.py makes a classifier of both again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rayexpand.contract.errors import DamagedFile, UsageError
from rayexpand.storage.files import Files
from rayexpand.studies.parts import Trial, read_result

if TYPE_CHECKING:
    from torch import Tensor

    from rayexpand.classifier.classifier import Classifier

WEIGHTS = "weights"


def keep_weights(files: Files, trial: Trial, classifier: Classifier) -> dict[str, Any]:
    """Writes the weights of a trained classifier; what its result says of them: `file`, `sha256`, `bytes`, `classes`
    (K)."""
    from safetensors.torch import save

    tensors = {name: one.detach().cpu().contiguous().clone() for name, one in classifier.module.state_dict().items()}
    content, name = save(tensors, {"digest": trial.digest}), f"{WEIGHTS}/{trial.name}.safetensors"
    files.make_folder(WEIGHTS)
    files.replace(name, content)
    return {"file": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
            "classes": classifier.n_classes}


def read_weights(files: Files, trial: Trial) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name on the CPU, and what the result of the trial says of them. Raises UsageError where none were
    kept, DamagedFile where the file is another one."""
    from safetensors.torch import load

    said = (read_result(files, trial.name) or {}).get("weights")
    content = None if said is None else files.read(said["file"])
    if said is None or content is None:
        raise UsageError(f"the weights of trial {trial.name} were not kept; set training.keep: weights and run "
                         "`rayexpand train` again")
    if hashlib.sha256(content).hexdigest() != said["sha256"]:
        raise DamagedFile(f"{files.at(said['file'])}: is damaged, or not what trial {trial.name} left; delete it and "
                          "run `rayexpand train` again")
    return load(content), said


def without_weights(files: Files, trials: Sequence[Trial]) -> Iterator[Trial]:
    """Trained trials whose weights are not there, or of another size than their result says. Content is checked when it
    is read."""
    there = files.entries(WEIGHTS)
    for trial in trials:
        said = (read_result(files, trial.name) or {}).get("weights") or {}
        found = there.get(f"{trial.name}.safetensors")
        if trial.is_trained and (found is None or found.size != said.get("bytes")):
            yield trial
