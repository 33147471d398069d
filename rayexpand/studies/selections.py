"""Decisions that the arms of a study ask for and the study makes itself, so that one expansion is trained on at several
thresholds from one file (LECF):

    selections:
      sure: {rule: {kind: clip_confidence, threshold: 0.5}}
    arms:
      - {name: "LECF, 50 %", use: lecf, selection: sure}

A section is the file of `rayexpand select` without name, run and cluster, which the study gives. The decision lies in
the run like one that `select` made, and is made once.
"""

from __future__ import annotations

from rayexpand.contract.errors import ConfigError
from rayexpand.contract.protocols import Progress
from rayexpand.evaluation import select as selecting
from rayexpand.evaluation import select_scores
from rayexpand.evaluation.select_scores import Score
from rayexpand.studies.parts import Study, folder_of


def make_selections(study: Study, score: Score = select_scores.in_process,
                    progress: Progress = lambda *_: None) -> None:
    """Makes what arms ask for and is not there. Raises ConfigError, and DigestMismatch where a run has another decision
    of that name."""
    wanted = {(folder_of(study.expansions[name, seed]), arm.selection): None for arm in study.config.arms
              for seed in study.config.seeds for name in arm.uses if arm.selection in study.config.selections}
    for folder, name in wanted:
        raw = {**study.config.selections[str(name)], "name": name, "run": folder,
               "cluster": study.config.cluster.model_dump(mode="json")}
        try:
            config = selecting.parse(raw)
        except ConfigError as error:
            raise ConfigError(study.config.name, [f"selections.{name}.{line}" for line in error.problems]) from error
        selecting.select(config, score, progress)
