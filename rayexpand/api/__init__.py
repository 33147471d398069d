"""Every use case as a plain function: what the command line calls, and what a notebook calls.

A job is the path of a YAML file, a mapping with the same content, or a configuration object. `set` overrides dotted
fields; `machine` names a YAML file, or is a mapping, of the sections that say where and how fast. `ray` is False (this
machine), True (the cluster of `cluster.address` or RAY_ADDRESS, else one of its own), or an address.

`on(event)` hears how far the work is. Ctrl-C, or any exception it raises, cancels after the current call; what is
committed stays, and the same call continues. Nothing here prints, exits, redirects stdout, installs signal handlers or
changes the folder. Errors are RayexpandError with `.exit_code`.
"""

from rayexpand.api.cluster import cluster_jobs, follow, rayjob, stop, submit
from rayexpand.api.endpoint import serve_metrics
from rayexpand.api.files import first_file, job_files, job_text, jobs_named_by, schema, write_new
from rayexpand.api.folders import AuditFolder, StudyFolder, SweepFolder, open
from rayexpand.api.live import serve_status
from rayexpand.api.pages import pictures
from rayexpand.api.results import (
    Artifact,
    Audited,
    Checked,
    ClusterJob,
    Event,
    Planned,
    PlannedFit,
    PlannedLoop,
    PlannedStudy,
    PlannedSweep,
    PreparedData,
    Scores,
    Selected,
)
from rayexpand.api.runs import LoopFolder, RunFolder
from rayexpand.api.statuses import status
from rayexpand.api.verbs import (
    audit,
    bench,
    check_marks,
    convert,
    dataset,
    demo,
    evaluate,
    expand,
    fit,
    plan,
    prepare_data,
    published_sets,
    report,
    select,
    sweep,
    train,
    validate,
)
from rayexpand.contract.errors import RayexpandError
from rayexpand.methods import trust

__all__ = ["Artifact", "AuditFolder", "Audited", "Checked", "ClusterJob", "Event", "LoopFolder", "Planned",
           "PlannedFit", "PlannedLoop", "PlannedStudy", "PlannedSweep", "PreparedData", "RayexpandError", "RunFolder",
           "Scores", "Selected", "StudyFolder", "SweepFolder", "audit", "bench", "check_marks", "cluster_jobs",
           "convert", "dataset", "demo", "evaluate", "expand", "first_file", "fit", "follow", "job_files", "job_text",
           "jobs_named_by", "open", "pictures", "plan", "prepare_data", "published_sets", "rayjob", "report", "schema",
           "select", "serve_metrics", "serve_status", "status", "stop", "submit", "sweep", "train", "trust", "validate",
           "write_new"]
