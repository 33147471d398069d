"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer


def _trusted(names: list[str] | None) -> list[str] | None:
    if names:
        from rayexpand import api

        api.trust(*names)
    return names


def _served(port: int | None) -> int | None:
    if port is not None:
        from rayexpand import api

        api.serve_metrics(port)
    return port


File = Annotated[str, typer.Argument(metavar="FILE", help="YAML file, for example jobs/digits/expand-img2img.yaml")]
Folder = Annotated[str, typer.Argument(metavar="RUN", help="run folder, <out>/<name>")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="override a field; repeatable")]
Machine = Annotated[str | None, typer.Option(metavar="FILE", help="YAML file of the sections that say where and how "
                                             "fast: cluster, runtime, store, estimate, device")]
Trust = Annotated[list[str] | None, typer.Option(metavar="PACKAGE.MODULE.CLASS", callback=_trusted, help="import this "
                                                 "method of your own, which a file names; repeatable")]
NoRay = Annotated[bool, typer.Option("--no-ray", help="run in this process instead of on Ray (one machine, debugger)")]
Metrics = Annotated[int | None, typer.Option("--metrics", metavar="PORT", callback=_served, min=0, max=65535,
                                             help="serve what this process counts to Prometheus, at "
                                             "http://127.0.0.1:PORT/metrics")]
LogJson = Annotated[bool, typer.Option("--log-json", help="every line on stderr as a JSON object; progress every 30 s")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, everything else on stderr")]
