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
from rayexpand.errors import EXIT_DONE, EXIT_FAULT, Interrupted, OverBudget, RayexpandError, UsageError

if TYPE_CHECKING:
    from rayexpand.config import RunConfig
    from rayexpand.on_ray.expand import Snapshot
    from rayexpand.run import Run
    from rayexpand.store import Totals

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
def demo(out: Annotated[str, typer.Option(help="folder for the runs and the report")] = "runs/demo",
         as_json: Json = False) -> None:
    """Expand real digits on this machine, train classifiers, and show the gain with its controls."""
    from rayexpand.demo import demo as run_demo
    from rayexpand.report import write_report

    with _Progress() as progress:
        result = run_demo(out, progress)
    summary = result.summary()
    page = write_report(result.folders[0], demo=summary)
    if as_json:
        _print_json({**summary, "report": str(page)})
        return
    rows = [(name, f"{100 * arm['mean']:.1f} ± {100 * arm['se']:.1f}") for name, arm in summary["arms"].items()]
    rows += [(f"control: {name}", f"{100 * value:.1f}") for name, value in summary["controls"].items()]
    print("two real digits per class; test accuracy in %, mean ± standard error over three subsets\n")
    _print_table(("trained on", "accuracy"), rows)
    print(f"\ngain of expanded over original: {100 * result.gain:+.1f} ± {100 * result.gain_se:.1f} points")
    print(f"{summary['note']}\nreport: {page}")


@app.command()
def validate(file: File, set_: Set = None, as_json: Json = False) -> None:
    """Check a configuration without loading a model, and print it with every default filled in."""
    from rayexpand.config import resolved
    from rayexpand.errors import ConfigError
    from rayexpand.run import preflight

    config = _load(file, set_)
    if problems := preflight(config):
        raise ConfigError(file, problems)
    if as_json:
        _print_json(resolved(config))
    else:
        import yaml

        print(yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True), end="")


@app.command()
def plan(file: File, set_: Set = None, as_json: Json = False) -> None:
    """Count what a run would make and estimate images, bytes, hours and cost, without loading a model."""
    from rayexpand.estimate import estimate_config
    from rayexpand.run import measured, preflight

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
    from rayexpand import run as runs

    config = _load(file, set_)
    with _Progress(log_json) as progress:
        run = runs.prepare(config, progress, device_here=no_ray, where=file)
        _drive(run, lambda: runs.pending_jobs(run), progress, as_json, no_ray=no_ray, to_the_end=False)


@app.command()
def retry(folder: Folder, set_: Set = None, no_ray: NoRay = False, log_json: LogJson = False,
          as_json: Json = False) -> None:
    """Make once more only the rows of a run that failed."""
    from rayexpand import run as runs

    run = runs.open_run(folder, set_ or [], check_models=True)
    with _Progress(log_json) as progress:
        _drive(run, runs.retry_jobs(run), progress, as_json, no_ray=no_ray, to_the_end=True)


@app.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """Say how far a run is; works while it runs and after it died."""
    from rayexpand.status import read_status

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
    from rayexpand.run import open_run
    from rayexpand.verify import verify as check

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
    from rayexpand import run as runs

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
    from rayexpand.bench import bench as measure

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
def report(folder: Folder, as_json: Json = False) -> None:
    """Write the report of a run: one HTML file with counts, reasons, throughput and samples beside their seeds."""
    from rayexpand.report import write_report

    page = write_report(folder)
    _print_json({"report": str(page)}) if as_json else print(page)


@app.command()
def card(folder: Folder, license_id: Annotated[str | None, typer.Option("--license", help="e.g. cc-by-4.0")] = None,
         as_json: Json = False) -> None:
    """Write the dataset card of a run (README.md in its folder)."""
    from rayexpand.card import write_card

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
    from rayexpand.export import export as write_export

    with _Progress() as progress:
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
    from rayexpand.errors import UsageError
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
    from rayexpand.config import load

    return load(file, overrides or [])


def _drive(run: Run, jobs: Any, progress: _Progress, as_json: bool, *, no_ray: bool, to_the_end: bool) -> None:
    from rayexpand.card import write_card
    from rayexpand.report import write_report

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


class _RunProgress:
    """Puts together what is known of a run: rows decided between commits, counts at commits, actors alive."""

    def __init__(self, run: Run, progress: _Progress, decided: int) -> None:
        self._task, self._planned = f"expanding {run.config.name}", run.plan.planned
        self._progress, self._decided, self._facts = progress, decided, dict[str, int]()

    def rows(self, made: int) -> None:
        self._decided += made
        self._show(self._decided)

    def counts(self, totals: Totals) -> None:
        self._facts |= {"kept": totals.kept, "rejected": totals.rejected, "failed": totals.failed}

    def snapshot(self, now: Snapshot) -> None:
        self._facts |= {"actors": now.alive, "nodes": now.hosts}
        self._show(self._decided + now.rows)

    def _show(self, done: int) -> None:
        self._progress(self._task, min(done, self._planned), self._planned, self._facts)


def _in_process(run: Run, jobs: Any, decided: int, progress: _Progress, *, to_the_end: bool) -> Totals:
    from rayexpand import run as runs

    shown = _RunProgress(run, progress, decided)
    expander = runs.start(run, on_rows=shown.rows)
    try:
        return runs.drive(run, runs.in_process(expander), jobs, to_the_end=to_the_end, on_counts=shown.counts)
    finally:
        expander.close()


def _on_ray(run: Run, jobs: Any, decided: int, progress: _Progress, *, to_the_end: bool) -> Totals:
    from rayexpand.on_ray.expand import expand

    shown = _RunProgress(run, progress, decided)
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


class _Progress:
    """A bar on a terminal; elsewhere a line every 30 seconds and one for each new task, as JSON if asked. On stderr."""

    QUIET_S = 30

    def __init__(self, as_json: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                             console=console) if console.is_terminal and not as_json else None
        self._as_json = as_json
        self._tasks: dict[str, Any] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._spoken = ("", 0.0)

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, task: str, done: int, total: int, facts: dict[str, int] | None = None) -> None:
        """`facts` are counts to show beside the bar: rows kept, rejected and failed, actors, nodes."""
        now = time.monotonic()
        at, first = self._begun.setdefault(task, (now, done))
        rate = (done - first) / (now - at) if now - at > 1 and done > first else 0.0
        if self._bar:
            known = [f"{n:,} {what}" for what, n in (facts or {}).items()]
            words = [task, *([f"{rate:,.1f}/s"] if rate else []), *known]
            if task not in self._tasks:
                self._tasks[task] = self._bar.add_task(task, total=total)
            self._bar.update(self._tasks[task], completed=done, total=total, description=", ".join(words))
            return
        last_task, last_time = self._spoken
        if task != last_task or now - last_time >= self.QUIET_S:
            self._spoken = (task, now)
            print(self._line(task, done, total, rate, facts or {}), file=sys.stderr, flush=True)

    def _line(self, task: str, done: int, total: int, rate: float, facts: dict[str, int]) -> str:
        left = round((total - done) / rate) if rate else None
        if self._as_json:
            return json.dumps({"time": round(time.time(), 1), "task": task, "done": done, "total": total,
                               "per_second": round(rate, 2), "eta_seconds": left, **facts})
        words = [f"{task}: {done:,}/{total:,}", *([f"{rate:,.1f}/s", f"{left:,} s left"] if rate else []),
                 *(f"{n:,} {what}" for what, n in facts.items())]
        return ", ".join(words)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
