"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rayexpand.contract.errors import UsageError

if TYPE_CHECKING:
    from rayexpand.api import LoopFolder, RunFolder


def _trusted(names: list[str] | None) -> list[str] | None:
    if names:
        from rayexpand import api

        api.trust(*names)
    return names


def samples_in(folder: str) -> RunFolder | LoopFolder:
    """The run or loop in a folder. Raises UsageError where there is neither."""
    from rayexpand import api

    opened = api.open(folder)
    if not isinstance(opened, (api.RunFolder, api.LoopFolder)):
        raise UsageError(f"{folder} holds neither a run nor a loop; give the folder of one, such as a run of a study")
    return opened


def _served(port: int | None) -> int | None:
    if port is not None:
        from rayexpand import api

        api.serve_metrics(port)
    return port


File = Annotated[str, typer.Argument(metavar="FILE", help="YAML file, for example jobs/digits/expand-img2img.yaml")]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="folder of a run or loop, <out>/<name>")]
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
