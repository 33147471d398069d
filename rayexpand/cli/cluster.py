"""submit: the same file as a job on a Ray cluster."""

from __future__ import annotations

import sys
import time
from datetime import datetime, timedelta
from typing import Annotated

import typer

from rayexpand.cli.app import app
from rayexpand.cli.options import Json, Machine, Set, Trust
from rayexpand.cli.show import show, show_json, show_table
from rayexpand.contract.errors import UsageError


@app.command()
def submit(verb: Annotated[str, typer.Argument(metavar="VERB", help="expand, train, fit, evaluate, select, audit, "
                                               "sweep, plan, validate, bench or report with a FILE; retry, verify, "
                                               "report or card with a folder")] = "",
           target: Annotated[str, typer.Argument(metavar="FILE|FOLDER")] = "",
           set_: Set = None, machine: Machine = None, trust: Trust = None,
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
           rayjob: Annotated[bool, typer.Option("--rayjob", help="send nothing: print the job as a RayJob of KubeRay, "
                                                "for `kubectl apply -f -`")] = False,
           image: Annotated[str, typer.Option(help="with --rayjob: the image of head and workers")] = "",
           list_: Annotated[bool, typer.Option("--list", help="list the jobs of this package")] = False,
           as_json: Json = False) -> None:
    """Run a verb as a job on a Ray cluster, with the same FILE; or follow, stop and list jobs.

    Examples:

        rayexpand submit expand my.yaml --set out=s3://bucket/runs --address http://head:8265

        rayexpand submit train study.yaml --set out=s3://bucket/runs --machine gpus.yaml

        rayexpand submit expand my.yaml --set out=s3://bucket/runs --rayjob | kubectl apply -f -
    """
    from rayexpand import api

    def on_log(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    where = address or None
    if list_:
        found = api.cluster_jobs(where)
        show_json(found) if as_json else show_table(
            ("job", "run", "verb", "status", "exit code", "started", "duration"),
            [(one["submission_id"], one["run"], one["verb"], one["status"],
              "" if one["exit_code"] is None else one["exit_code"], *_times(one["started"], one["ended"]))
             for one in found])
        return
    if rayjob and verb and target:
        print(api.rayjob(target, verb=verb, set=set_ or [], machine=machine, image=image or None, retries=retries,
                         env=env or [], trust=trust or []), end="")
        return
    if logs:
        ended = api.follow(logs, where, on_log=on_log)
    elif stop:
        ended = api.stop(stop, where)
    elif verb and target:
        ended = api.submit(target, where, verb=verb, set=set_ or [], machine=machine, working_dir=working_dir,
                           wait=wait, retries=retries, env=env or [], num_cpus=num_cpus, python=python or None,
                           trust=trust or [], on_log=on_log, say=lambda line: print(line, file=sys.stderr, flush=True))
    else:
        raise UsageError("submit needs a verb and what it works on, for example "
                         "`rayexpand submit expand my.yaml --set out=s3://bucket/runs`, or one of --logs ID, "
                         "--stop ID, --list")
    show(ended, as_json)
    if not stop:
        raise typer.Exit(ended.exit_code)


def _times(started: float | None, ended: float | None) -> tuple[str, str]:
    """When a job started, here, and how long it took, or takes."""
    if not started:
        return "", ""
    seconds = round((ended or time.time()) - started)
    return datetime.fromtimestamp(started).strftime("%Y-%m-%d %H:%M"), str(timedelta(seconds=max(0, seconds)))
