"""The command line: one verb, one function. The only module, with report.py, that writes for people.

Results go to stdout (with --json one object and nothing else), everything else to stderr. Nothing heavy is imported
before a verb needs it, so help answers at once.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayexpand import __version__
from rayexpand.errors import EXIT_DONE, EXIT_RESUMABLE, Interrupted, RayexpandError

if TYPE_CHECKING:
    from rayexpand.config import RunConfig
    from rayexpand.run import Run
    from rayexpand.store import Totals

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Turn a labelled image dataset into a bigger one with diffusion models. "
                       "Start with `rayexpand demo`.")

File = Annotated[str, typer.Argument(metavar="FILE", help="YAML file, for example jobs/digits/expand-img2img.yaml")]
Folder = Annotated[str, typer.Argument(metavar="RUN", help="run folder, <out>/<name>")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="override a field; repeatable")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, everything else on stderr")]


def main() -> None:
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except KeyboardInterrupt:
        _fail("Interrupted", "stopped; the same command continues where this one was", EXIT_RESUMABLE)
    except RayexpandError as error:
        _fail(type(error).__name__, str(error), error.exit_code)


def _terminated(number: int, frame: Any) -> None:
    raise Interrupted("SIGTERM received; the same command continues where this one was")


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
        result = run_demo(Path(out), progress)
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
def expand(file: File, set_: Set = None, as_json: Json = False) -> None:
    """Make every planned sample, once. Killed or stopped anywhere, the same command continues."""
    from rayexpand import run as runs

    config = _load(file, set_)
    with _Progress() as progress:
        run = runs.prepare(config, progress)
        _drive(run, lambda: runs.pending_jobs(run), progress, as_json, to_the_end=False)


@app.command()
def retry(folder: Folder, set_: Set = None, as_json: Json = False) -> None:
    """Make once more only the rows of a run that failed."""
    from rayexpand import run as runs

    run = runs.open_run(folder, set_ or [])
    with _Progress() as progress:
        _drive(run, runs.retry_jobs(run), progress, as_json, to_the_end=True)


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

    run = runs.open_run(folder)
    expander = runs.start(run)
    try:
        sample = expander.regenerate(sample_id)
    finally:
        expander.close()
    committed = runs.committed_hash(run, sample_id)
    if to and sample.image:
        Path(to).write_bytes(sample.image)
    outcome = {"sample_id": sample_id, "status": sample.status.value, "reason": sample.reason and sample.reason.value,
               "detail": sample.detail, "sample_sha256": sample.sample_sha256, "committed_sha256": committed,
               "equal": committed == sample.sample_sha256 if committed else None, "image": to or None}
    if as_json:
        _print_json(outcome)
    else:
        _print_table(("regen", sample_id), [(key, str(value)) for key, value in outcome.items()])
    if outcome["equal"] is False:
        raise typer.Exit(1)


@app.command()
def report(folder: Folder, as_json: Json = False) -> None:
    """Write the report of a run: one HTML file with counts, reasons, throughput and samples beside their seeds."""
    from rayexpand.report import write_report

    page = write_report(folder)
    _print_json({"report": str(page)}) if as_json else print(page)


@app.command()
def card(folder: Folder, as_json: Json = False) -> None:
    """Write the dataset card of a run (README.md in its folder)."""
    from rayexpand.card import write_card

    page = write_card(folder)
    _print_json({"card": str(page)}) if as_json else print(page)


def _load(file: str, overrides: list[str] | None) -> RunConfig:
    from rayexpand.config import load

    return load(file, overrides or [])


def _drive(run: Run, jobs: Any, progress: _Progress, as_json: bool, *, to_the_end: bool) -> None:
    from rayexpand import run as runs
    from rayexpand.card import write_card
    from rayexpand.report import write_report

    started, before = time.perf_counter(), run.totals()
    decided = before.kept + before.rejected + before.failed

    def on_rows(rows: int) -> None:
        nonlocal decided
        decided += rows
        progress(f"expanding {run.config.name}", decided, run.plan.planned)

    expander = runs.start(run, on_rows=on_rows)
    try:
        totals = runs.drive(run, runs.in_process(expander), jobs, to_the_end=to_the_end)
    finally:
        expander.close()
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
    """A bar on a terminal; elsewhere one line every 30 seconds and one for each new task. Always on stderr."""

    QUIET_S = 30

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                             console=console) if console.is_terminal else None
        self._tasks: dict[str, Any] = {}
        self._spoken = ("", 0.0)

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, task: str, done: int, total: int) -> None:
        if self._bar:
            if task not in self._tasks:
                self._tasks[task] = self._bar.add_task(task, total=total)
            self._bar.update(self._tasks[task], completed=done, total=total)
            return
        last_task, last_time = self._spoken
        now = time.monotonic()
        if task != last_task or now - last_time >= self.QUIET_S:
            self._spoken = (task, now)
            print(f"{task}: {done}/{total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
