"""The command line: one verb, one function. The only module, with report.py, that writes for people.

Results go to stdout (with --json one object and nothing else), everything else to stderr. Nothing heavy is imported
before a verb needs it, so help answers at once.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayexpand import __version__
from rayexpand.contract import settings
from rayexpand.contract.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_FAULT,
    Interrupted,
    OverBudget,
    RayexpandError,
    UsageError,
)
from rayexpand.progress import Progress, RunProgress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rayexpand.runs.config import ClusterConfig, RunConfig
    from rayexpand.runs.run import Run
    from rayexpand.runs.store import Totals
    from rayexpand.studies.parts import Study, Trial

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Turn a labelled image dataset into a bigger one with diffusion models. "
                       "Start with `rayexpand demo`.")

File = Annotated[str, typer.Argument(metavar="FILE", help="YAML file, for example jobs/digits/expand-img2img.yaml")]
Folder = Annotated[str, typer.Argument(metavar="RUN", help="run folder, <out>/<name>")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="override a field; repeatable")]
NoRay = Annotated[bool, typer.Option("--no-ray", help="run in this process instead of on Ray (one machine, debugger)")]
LogJson = Annotated[bool, typer.Option("--log-json", help="progress on stderr as JSON lines, one every 30 s")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, everything else on stderr")]


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stopped)
    try:
        app()
    except RayexpandError as error:
        _fail(type(error).__name__, str(error), error.exit_code)
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="rayexpand-", suffix=".txt", delete=False) as file:
            file.write(traceback.format_exc())
        _fail(type(error).__name__, f"{type(error).__name__}: {error}. This should have been a clear message and is a "
              f"fault of rayexpand; the traceback is in {file.name}", EXIT_FAULT)


def _stopped(number: int, frame: Any) -> None:
    raise Interrupted(f"{signal.Signals(number).name} received; the same command continues where this one was")


def _fail(kind: str, message: str, exit_code: int) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": {"type": kind, "message": message, "exit_code": exit_code}}))
    print(f"rayexpand: {message}", file=sys.stderr)
    sys.exit(exit_code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit(EXIT_DONE)


@app.command()
def demo(out: Annotated[str, typer.Option(help="folder for the runs and the report; else runs/demo, or "
                                          "runs/demo-METHOD")] = "",
         method: Annotated[str, typer.Option(help="what expands: img2img, or any other method (by its name)")] =
         "img2img", as_json: Json = False) -> None:
    """Expand real digits on this machine, train classifiers, and show the gain with its controls."""
    from rayexpand.reports.run import write_report
    from rayexpand.reports.study import write_study_report
    from rayexpand.studies.demo import demo as run_demo

    with Progress() as progress:
        result = run_demo(out or ("runs/demo" if method == "img2img" else f"runs/demo-{method}"), progress, method)
    summary, look = result.summary(), None
    if result.guided:
        from rayexpand.reports.guided import look as look_at

        look = look_at(result.runs[0], 10)
    sheet = write_report(result.runs[0], demo=summary, look=look)
    fitted = {f"CPU seconds of fitting {kind}": seconds for kind, seconds in result.fitted.items()}
    page = write_study_report(result.folder, demo={**summary, **fitted})
    if as_json:
        _print_json({**summary, "report": str(page), "samples": str(sheet)})
        return
    rows = [(name, f"{100 * arm['mean']:.1f} ± {100 * arm['se']:.1f}") for name, arm in summary["arms"].items()]
    rows += [(f"control: {name}", f"{100 * value:.1f}") for name, value in summary["controls"].items()]
    print(f"two real digits per class, expanded by {method}; test accuracy in %, mean ± standard error over three "
          "subsets\n")
    _print_table(("trained on", "accuracy"), rows)
    for kind, seconds in result.fitted.items():
        print(f"\nfitted for {method} on each subset: {kind}, {seconds:.1f} CPU seconds in all")
    print(f"\ngain of expanded over original: {100 * result.gain:+.1f} ± {100 * result.gain_se:.1f} points")
    print(f"{summary['note']}\nsamples beside their seeds: {sheet}\nreport: {page}")


@app.command()
def validate(file: File, set_: Set = None, as_json: Json = False) -> None:
    """Check a job file of any verb without loading a model, and print it with every default filled in."""
    from rayexpand.contract.errors import ConfigError
    from rayexpand.jobs import checked

    fields, problems = checked(file, set_ or [])
    if problems:
        raise ConfigError(file, problems)
    if as_json:
        _print_json(fields)
    else:
        import yaml

        print(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), end="")


@app.command()
def plan(file: File, set_: Set = None, as_json: Json = False) -> None:
    """Count what a run would make and estimate images, bytes, hours and cost, without loading a model."""
    from rayexpand.runs.estimate import estimate_config
    from rayexpand.runs.run import measured, preflight

    config = _load(file, set_)
    estimate, problems = estimate_config(config, measured(config)), preflight(config)
    if as_json:
        _print_json({**estimate.to_json(), "problems": problems})
        return
    _print_table(("what", "estimate", "how it is known"), estimate.table())
    for problem in problems:
        print(f"not yet ready to expand: {problem}", file=sys.stderr)


@app.command()
def expand(file: File, set_: Set = None, no_ray: NoRay = False, log_json: LogJson = False,
           as_json: Json = False) -> None:
    """Make every planned sample, once. Killed or stopped anywhere, the same command continues."""
    from rayexpand.runs import run as runs

    config = _load(file, set_)
    with Progress(log_json) as progress:
        run = runs.prepare(config, progress, device_here=no_ray, where=file)
        _drive(run, lambda: runs.pending_jobs(run), progress, as_json, no_ray=no_ray, to_the_end=False)


@app.command()
def fit(file: File, set_: Set = None,
        out: Annotated[str, typer.Option(help="folder that holds artifacts; else `out` of the FILE, for a run's FILE "
                                         "./artifacts")] = "",
        no_ray: NoRay = False, log_json: LogJson = False, as_json: Json = False) -> None:
    """Make what methods need of the data: a guide, prototypes, captions, features, adapters. Or what a run needs."""
    from rayexpand.artifacts.store import read_facts
    from rayexpand.fitting import fit as fits
    from rayexpand.fitting.config import refuse_untold_adapter
    from rayexpand.runs import config as configs

    raw = settings.read(file, set_ or [])
    if "method" in raw:
        run = configs.parse(raw, file)
        refuse_untold_adapter(run, file)
        config = fits.fit_config(run, out=out or fits.ARTIFACTS)
    else:
        config = fits.parse_fit({**raw, "out": out} if out else raw, file)
    if config is None:
        raise UsageError(f"{file}: method {raw['method']['name']} needs neither guide nor prototypes fitted; expand it")
    with Progress(log_json) as progress:
        if no_ray:
            made = fits.fit(config, progress)
        else:
            from rayexpand.on_ray.fit import fit as fit_on_ray

            with contextlib.redirect_stdout(sys.stderr):
                made = fit_on_ray(config, progress)
    facts = {role: read_facts(folder) for role, folder in made.items()}
    if as_json:
        _print_json({role: {"folder": str(folder), **facts[role]} for role, folder in made.items()})
        return
    _print_table(("made of " + config.name, "folder", "seconds"),
                 [(role, str(folder), f"{facts[role]['seconds']:,.1f}") for role, folder in made.items()])
    for line in (line for one in facts.values() for line in one.get("summary", [])):
        print(line)
    fields = {"guide": {"guide.weights": ""}, "prompts": {"method.prompts": ""}, "generator": {"prior.weights": ""},
              "prior": {"prior.weights": "/pipeline", **({} if "guide" in made else {"guide.weights": "/guide"})}}
    print("in a run: " + " ".join(f"--set {field}={config.out}/{config.name}-{role}{part}" for role in made
                                  for field, part in fields.get(role, {f"artifacts.{role}": ""}).items()))


@app.command()
def train(file: File, set_: Set = None, no_ray: NoRay = False, log_json: LogJson = False,
          as_json: Json = False) -> None:
    """Train the same classifier on every arm of a study and compare them; expands first what the arms need."""
    from rayexpand.reports.study import write_study_report
    from rayexpand.studies import config as study_configs
    from rayexpand.studies import study as studies
    from rayexpand.studies.expansions import pending_runs
    from rayexpand.studies.summary import further_scores, summary
    from rayexpand.studies.trials import make_trials

    config = study_configs.load_study(file, set_ or [])
    with Progress(log_json) as progress, _cluster(config.cluster, no_ray=no_ray):
        study = studies.prepare_study(config)
        for run in pending_runs(study, progress):
            _make(run, progress, no_ray=no_ray)
        trials = make_trials(study)
        failed = _train(study, trials, progress, no_ray=no_ray)
    page = write_study_report(config.folder)
    found = summary(config.folder)
    if as_json:
        _print_json({**found, "study": config.folder, "failed": failed, "report": str(page)})
    else:
        print("test accuracy after the last epoch, mean ± standard deviation; differences to "
              f"{found['baseline']} and to the originals repeated, with 95 % intervals\n")
        _print_table(*_arms_table(found))
        if further := further_scores(found):
            print()
            _print_table(*further)
        print(f"\nreport: {page}")
    for line in failed:
        print(f"rayexpand: a trial failed, the same command tries it again: {line}", file=sys.stderr)
    if failed:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def sweep(file: File, set_: Set = None, no_ray: NoRay = False, log_json: LogJson = False,
          as_json: Json = False) -> None:
    """Find the values of a study's fields that give the best classifier; killed anywhere, the same command goes on."""
    from rayexpand.reports.sweep import write_sweep_report
    from rayexpand.studies.sweep import sweep as sweeps
    from rayexpand.studies.sweep.config import load_sweep
    from rayexpand.studies.sweep.search import Search, describe, run_here

    config = load_sweep(file, set_ or [])
    if no_ray and config.scheduler is not None:
        raise UsageError("--no-ray tries one configuration after the other, so there is none to compare with while it "
                         "trains; drop --no-ray, or add --set scheduler=none")
    with Progress(log_json) as progress, contextlib.redirect_stdout(sys.stderr):
        search = Search(sweeps.open_sweep(config, progress))

        def show() -> None:
            states = [one["state"] for one in search.results.values()]
            progress(f"sweeping {config.name}", search.decided, search.total,
                     {state: states.count(state) for state in ("finished", "stopped")})

        show()
        run = run_here
        if not no_ray:
            from rayexpand.on_ray.sweep import run_sweep as run
        run(search, show)
    found = write_sweep_report(search.sweep, search.failed)
    if as_json:
        _print_json(found)
    else:
        _print_table(("configuration", config.metric, "epochs", ""),
                     [(describe(one["values"]), f"{100 * one['score']:.1f}", f"{one['epochs']}/{one['of_epochs']}",
                       "best" if one["key"] == found["best"] else one["state"]) for one in found["trials"]])
        for line in found["words"]:
            print(line)
    for line in search.failed:
        print(f"rayexpand: a trial failed, the same command tries it again: {line}", file=sys.stderr)
    if search.failed:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def evaluate(file: File, set_: Set = None, no_ray: NoRay = False, log_json: LogJson = False,
             as_json: Json = False) -> None:
    """Say how far the samples of a run are from real images: FID, KID, MMD, precision, recall, density, coverage."""
    from rayexpand.evaluation import evaluate as evaluation

    config = evaluation.load(file, set_ or [])
    extract = evaluation.in_process
    if not no_ray:
        from rayexpand.on_ray.evaluate import extract
    with Progress(log_json) as progress, contextlib.redirect_stdout(sys.stderr):
        found = evaluation.evaluate(config, extract, progress)
    if as_json:
        _print_json(found)
    else:
        _print_table((f"{found['n_samples']:,} samples, {found['n_reference']:,} real", found["extractor"]["name"]),
                     [(name, f"{one['value']:.6g}") for name, one in found["scores"].items()])
        print(f"written: {found['file']}")
    for line in found["warnings"]:
        print(f"rayexpand: {line}", file=sys.stderr)


@app.command()
def select(file: File, set_: Set = None, no_ray: NoRay = False, log_json: LogJson = False,
           as_json: Json = False) -> None:
    """Decide which samples of a run stay: by a guide's confidence, a score, chance, for each seed or class."""
    from functools import partial

    from rayexpand.evaluation import select as selection
    from rayexpand.evaluation import select_scores

    config = selection.load(file, set_ or [])
    score = select_scores.in_process
    if not no_ray:
        from rayexpand.on_ray.select import score as score_on_ray

        score = partial(score_on_ray, cluster=config.cluster)
    with Progress(log_json) as progress, contextlib.redirect_stdout(sys.stderr):
        found = selection.select(config, score, progress)
    if as_json:
        _print_json(found)
    else:
        counts = [(name, f"{found[name]:,}") for name in ("planned", "kept", "rejected", "failed")]
        counts += [(f"dropped: {reason}", f"{count:,}") for reason, count in found["reasons"].items()]
        _print_table((f"selection {config.name}", found["run"]), [
            *counts, ("expansion ratio", f"{found['ratio_before']:.3g} -> {found['ratio']:.3g}"),
            *([("threshold", f"{found['threshold']:.6g}")] if found.get("threshold") is not None else [])])
        print(f"{'written' if found['made'] else 'there already'}: {found['file']}")
    for line in found["warnings"]:
        print(f"rayexpand: {line}", file=sys.stderr)


@app.command()
def retry(folder: Folder, set_: Set = None, no_ray: NoRay = False, log_json: LogJson = False,
          as_json: Json = False) -> None:
    """Make once more only the rows of a run that failed."""
    from rayexpand.runs import run as runs

    run = runs.open_run(folder, set_ or [], check_models=True)
    with Progress(log_json) as progress:
        _drive(run, runs.retry_jobs(run), progress, as_json, no_ray=no_ray, to_the_end=True)


@app.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """Say how far a run is; works while it runs and after it died."""
    from rayexpand.runs.status import read_status

    found = read_status(folder)
    if as_json:
        _print_json(found.to_json())
    else:
        _print_table((f"run {found.name}", ""), found.table())


@app.command()
def verify(folder: Folder,
           pixels: Annotated[bool, typer.Option(help="also decode every image and check its hash")] = False,
           as_json: Json = False) -> None:
    """Check every file of a run against its plan, and rebuild missing receipts."""
    from rayexpand.runs.run import open_run
    from rayexpand.runs.verify import verify as check

    findings = check(open_run(folder), pixels=pixels)
    counts = _counts(findings.totals)
    if as_json:
        _print_json({**counts, "problems": findings.problems, "rebuilt_receipts": findings.rebuilt_receipts,
                     "unused_side_files": findings.garbage})
    else:
        counts |= {"receipts rebuilt": findings.rebuilt_receipts, "problems": len(findings.problems)}
        _print_table(("verify", folder), [(name, f"{count:,}") for name, count in counts.items()])
        for problem in findings.problems:
            print(problem)
    if findings.problems:
        raise typer.Exit(1)


@app.command()
def regen(folder: Folder,
          sample_id: Annotated[str, typer.Argument(help="<seed id>/<copy>, as in the sample_id column")],
          to: Annotated[str, typer.Option(help="file to write the image to; its folder must exist")] = "",
          as_json: Json = False) -> None:
    """Make one sample again, alone, and compare it with the committed one."""
    from rayexpand.runs import run as runs

    if to and (Path(to).suffix.lower() not in _PICTURES or not Path(to).parent.is_dir()):
        raise UsageError(f"--to {to}: give a file ending in {', '.join(_PICTURES)} in a folder that exists")
    run = runs.open_run(folder, check_models=True)
    expander = runs.expander_of(run, attempt=0)
    try:
        sample = expander.regenerate(sample_id)
    finally:
        expander.close()
    committed = runs.committed_hash(run, sample_id)
    if to and sample.image:
        _save(sample.image, Path(to))
    outcome = {"sample_id": sample_id, "status": sample.status.value, "reason": sample.reason and sample.reason.value,
               "detail": sample.detail, "sample_sha256": sample.sample_sha256, "committed_sha256": committed,
               "equal": committed == sample.sample_sha256 if committed else None, "image": to or None}
    if as_json:
        _print_json(outcome)
    else:
        for key, value in outcome.items():
            print(f"{key.replace('_', ' ')}: {'none' if value is None else value}")
    if outcome["equal"] is False:
        raise typer.Exit(1)


@app.command()
def bench(file: File, set_: Set = None,
          rows: Annotated[int, typer.Option(help="measure at least so many rows; 0: one shard")] = 0,
          as_json: Json = False) -> None:
    """Measure a configuration on this machine: images/s, share of the bare sampler's speed, seconds by phase."""
    from rayexpand.runs.bench import bench as measure

    found = measure(_load(file, set_), rows)
    if as_json:
        _print_json(found.to_json())
        return
    gflop = "none counted" if found.gflop_per_image is None else f"{found.gflop_per_image:,.3g} GFLOP"
    _print_table(("bench", f"{found.rows:,} rows"), [
        ("engine", f"{found.images_per_second:,.1f} images/s"),
        ("bare sampler loop", f"{found.bare_images_per_second:,.1f} images/s"),
        ("efficiency", f"{100 * found.efficiency:.1f} %"), ("arithmetic per image", gflop),
        ("bytes per image", f"{found.bytes_per_image:,.0f}"),
        *((f"seconds: {phase}", f"{seconds:,.3f}") for phase, seconds in found.seconds.items())])


@app.command()
def report(folder: Folder,
           strips: Annotated[int, typer.Option(min=0, help="of a guided run: load its models and also show so many "
                                               "samples beside plain ones of the same noise, those the guide is least "
                                               "sure of, and where samples lie among the prototypes")] = 0,
           as_json: Json = False) -> None:
    """Write the page of a run (counts, reasons, samples beside their seeds) of a study, or of a sweep."""
    from rayexpand.storage.places import open_files

    files = open_files(folder)
    if files.read("study.json") is not None:
        from rayexpand.reports.study import write_study_report

        page = write_study_report(folder)
    elif files.read("sweep.json") is not None:
        from rayexpand.reports.sweep import write_sweep_report
        from rayexpand.studies.sweep.sweep import sweep_in

        page = write_sweep_report(sweep_in(folder))["report"]
    else:
        from rayexpand.reports.run import write_report

        look = None
        if strips:
            from rayexpand.reports.guided import look as look_at

            look = look_at(folder, strips)
        page = write_report(folder, look=look)
    _print_json({"report": str(page)}) if as_json else print(page)


@app.command()
def card(folder: Folder, license_id: Annotated[str | None, typer.Option("--license", help="e.g. cc-by-4.0")] = None,
         as_json: Json = False) -> None:
    """Write the dataset card of a run (README.md in its folder)."""
    from rayexpand.reports.card import write_card

    page = write_card(folder, license_id=license_id)
    _print_json({"card": str(page)}) if as_json else print(page)


@app.command()
def export(folder: Folder,
           out: Annotated[str, typer.Argument(metavar="OUT", help="new folder for the export")],
           layout: Annotated[str, typer.Option(
               help="webdataset, huggingface, or imagefolder (up to about 100,000 images)")] = "webdataset",
           shard_images: Annotated[int, typer.Option(help="samples of one tar or parquet file")] = 1000,
           selection: Annotated[str, typer.Option(help="a decision in selections/; only the rows it keeps")] = "",
           as_json: Json = False) -> None:
    """Copy the kept samples of a run into the layout of another tool."""
    from rayexpand.runs.export import export as write_export

    with Progress() as progress:
        made = write_export(folder, out, layout, shard_images=shard_images,  # type: ignore[arg-type]
                            selection=selection or None, on_rows=progress)
    if made.pending:
        print(f"{made.pending:,} planned samples are not decided yet and are not in this export", file=sys.stderr)
    summary = {"folder": str(made.folder), "layout": made.layout, "count": made.count, "files": made.files,
               "pending": made.pending}
    _print_json(summary) if as_json else _print_table(("export", folder), summary.items())


@app.command()
def submit(verb: Annotated[str, typer.Argument(metavar="VERB", help="expand, plan, validate, bench with a FILE; "
                                               "retry, verify, report, card with a RUN")] = "",
           target: Annotated[str, typer.Argument(metavar="FILE|RUN")] = "",
           set_: Set = None,
           address: Annotated[str, typer.Option(help="dashboard of the cluster; else RAY_API_SERVER_ADDRESS, else "
                                                "http://127.0.0.1:8265")] = "",
           working_dir: Annotated[str, typer.Option(help="folder that is sent and where the job starts")] = ".",
           env: Annotated[list[str] | None, typer.Option(
               metavar="NAME[=VALUE]", help="NAME must be set on the cluster; NAME=VALUE is sent in the open")] = None,
           retries: Annotated[int, typer.Option(help="new attempts after exit code 75 or a lost node")] = 3,
           wait: Annotated[bool, typer.Option(help="follow the log until the job ends")] = True,
           num_cpus: Annotated[float, typer.Option(help="CPUs the job's driver reserves")] = 0.0,
           python: Annotated[str, typer.Option(help="interpreter on the cluster; else its `python`")] = "",
           logs: Annotated[str, typer.Option(metavar="ID", help="follow the log of a job")] = "",
           stop: Annotated[str, typer.Option(metavar="ID", help="end a job; the same command continues it")] = "",
           list_: Annotated[bool, typer.Option("--list", help="list the jobs of this package")] = False,
           as_json: Json = False) -> None:
    """Run a verb as a job on a Ray cluster, with the same FILE; or follow, stop and list jobs."""
    from rayexpand.contract.errors import UsageError
    from rayexpand.on_ray import submit as on_cluster

    def on_log(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    where = address or None
    if list_:
        found = on_cluster.jobs(address=where)
        _print_json(found) if as_json else _print_table(
            ("job", "run", "verb", "status", "exit code"),
            [(one["submission_id"], one["run"], one["verb"], one["status"],
              "" if one["exit_code"] is None else one["exit_code"]) for one in found])
        return
    if logs:
        ended = on_cluster.logs(logs, address=where, on_log=on_log)
    elif stop:
        ended = on_cluster.stop(stop, address=where)
    elif verb and target:
        ended = on_cluster.submit(verb, target, set_ or [], address=where, working_dir=working_dir, wait=wait,
                                  retries=retries, env=env or [], num_cpus=num_cpus, python=python or None,
                                  on_log=on_log, say=lambda line: print(line, file=sys.stderr, flush=True))
    else:
        raise UsageError("submit needs a verb and what it works on, for example `rayexpand submit expand my.yaml`, or "
                         "one of --logs ID, --stop ID, --list")
    summary = {"submission_id": ended.submission_id, "status": ended.status, "exit_code": ended.exit_code,
               "attempts": ended.attempts, "message": ended.message}
    _print_json(summary) if as_json else _print_table(("job", ""), [(name.replace("_", " "), value)
                                                                    for name, value in summary.items() if value != ""])
    if not stop:
        raise typer.Exit(ended.exit_code)


def _load(file: str, overrides: list[str] | None) -> RunConfig:
    from rayexpand.runs.config import load

    return load(file, overrides or [])


def _drive(run: Run, jobs: Any, progress: Progress, as_json: bool, *, no_ray: bool, to_the_end: bool) -> None:
    from rayexpand.reports.card import write_card
    from rayexpand.reports.run import write_report

    started, before = time.perf_counter(), run.totals()
    totals = before
    if jobs():
        expand_jobs = _in_process if no_ray else _on_ray
        decided = before.kept + before.rejected + (0 if to_the_end else before.failed)
        try:
            totals = expand_jobs(run, jobs, decided, progress, to_the_end=to_the_end)
        except OverBudget:
            write_card(str(run.folder))
            write_report(str(run.folder))
            raise
    else:
        print("nothing to do: every planned row is decided", file=sys.stderr)
    seconds = time.perf_counter() - started
    made = totals.kept + totals.rejected + totals.failed - before.kept - before.rejected - before.failed
    progress.close()
    write_card(str(run.folder))
    page = write_report(str(run.folder))
    summary = {**_counts(totals), "seconds": round(seconds, 3), "images_per_second": round(made / seconds, 3),
               "run": str(run.folder)}
    if as_json:
        _print_json(summary)
    else:
        _print_table((f"run {run.config.name}", ""), [(k.replace("_", " "), f"{v:,}" if isinstance(v, int) else str(v))
                                                      for k, v in summary.items()] + [("report", str(page))])


def _cluster(cluster: ClusterConfig, *, no_ray: bool) -> Any:
    """One cluster for all that a verb does on Ray, or nothing."""
    if no_ray:
        return contextlib.nullcontext()
    from rayexpand.on_ray.pool import connected

    return connected(cluster)


def _make(run: Run, progress: Progress, *, no_ray: bool) -> None:
    """Expands what is pending of a run."""
    from rayexpand.runs import run as runs

    before = run.totals()
    (_in_process if no_ray else _on_ray)(run, lambda: runs.pending_jobs(run), before.planned - before.pending, progress,
                                         to_the_end=False)


def _train(study: Study, trials: Sequence[Trial], progress: Progress, *, no_ray: bool) -> list[str]:
    """Trains the trials without a result; one line for each that failed."""
    from rayexpand.studies.trials import pending_trials

    todo = pending_trials(study, trials)
    done = len(trials) - len(todo)

    def show(trial: Trial) -> None:
        progress(f"training {study.config.name}", done, len(trials))

    if not todo:
        return []
    from rayexpand.studies.trial import check_recipes, run_trials

    check_recipes(todo, len(study.subsets[study.config.seeds[0]][1].classes))
    if no_ray:

        failed = []
        for trial, problem in run_trials(study.files, todo, study.config.training, show):
            done += 1
            failed += [f"{trial.name}: {problem}"] if problem else []
            show(trial)
        return failed
    from rayexpand.on_ray.train import train_study

    def heard(trial: Trial) -> None:
        nonlocal done
        done += 1
        show(trial)

    with contextlib.redirect_stdout(sys.stderr):
        return train_study(study, todo, on_done=heard)


def _arms_table(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Arms with their accuracy, and what each is compared with the baseline and with its control."""
    against = {(one["arm"], one["kind"]): "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                   *(100 * one[name] for name in ("mean", "low", "high")))
               for one in found["comparisons"] if one.get("mean") is not None}
    rows: list[tuple[str, ...]] = []
    for arm in found["arms"]:
        top1 = arm["last"]["top1"]
        spread = "" if top1["std"] is None else f" ± {100 * top1['std']:.1f}"
        rows.append((arm["arm"], f"{100 * top1['mean']:.1f}{spread}", str(top1["n"]),
                     against.get((arm["arm"], "baseline"), ""), against.get((arm["arm"], "control"), "")))
    return ("arm", "top-1 %", "seeds", "against baseline", "against its control"), rows


def _in_process(run: Run, jobs: Any, decided: int, progress: Progress, *, to_the_end: bool) -> Totals:
    from rayexpand.runs import run as runs

    shown = RunProgress(run, progress, decided)
    expander = runs.start(run, on_rows=shown.rows)
    try:
        return runs.drive(run, runs.in_process(expander), jobs, to_the_end=to_the_end, on_counts=shown.counts)
    finally:
        expander.close()


def _on_ray(run: Run, jobs: Any, decided: int, progress: Progress, *, to_the_end: bool) -> Totals:
    from rayexpand.on_ray.expand import expand

    shown = RunProgress(run, progress, decided)
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints to stdout what its actors do
        return expand(run, jobs, to_the_end=to_the_end, on_counts=shown.counts, on_snapshot=shown.snapshot,
                      say=lambda line: print(line, file=sys.stderr, flush=True))


_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def _save(encoded: bytes, path: Path) -> None:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        if path.suffix.lower() in (".jpg", ".jpeg") and image.format == "JPEG":
            path.write_bytes(encoded)
        else:
            image.save(path)


def _counts(totals: Totals) -> dict[str, int]:
    return {"planned": totals.planned, "kept": totals.kept, "rejected": totals.rejected, "failed": totals.failed,
            "pending": totals.pending, "shards": totals.shards}


def _print_json(value: Any) -> None:
    print(json.dumps(value))


def _print_table(head: tuple[str, ...], rows: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in head:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(soft_wrap=False, markup=False, highlight=False).print(table)
