"""Passwords and tokens are in no message, log, page or JSON, and a file that holds one makes nothing."""

from __future__ import annotations

import io
import logging
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import jinja2
import pytest
import yaml

from rayexpand import api
from rayexpand.api.results import Checked
from rayexpand.contract.errors import ConfigError, ModelError, UsageError, packed
from rayexpand.contract.secrets import masked, masked_output, secret_problems
from rayexpand.reports.templates import render
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from tests.commands import rayexpand

SECRETS = {
    "https://me:hunter2@host/x.zip": "https://***@host/x.zip",
    "zip://*::https://me:hunter2@host/x.zip": "zip://*::https://***@host/x.zip",
    "https://me:hun@ter2@host/x": "https://***@host/x", "s3://KEY:hunter2@bucket/a": "s3://***@bucket/a",
    "https://hunter2token@host/x": "https://***@host/x", "ftp://me:hunter2@host": "ftp://***@host",
    "https://host/x?X-Amz-Signature=hunter2&part=1": "https://host/x?X-Amz-Signature=***&part=1",
    "https://a.blob/x.zip?sv=1&sig=hunter2%3D": "https://a.blob/x.zip?sv=1&sig=***",
    "https://host/x?access_token=hunter2": "https://host/x?access_token=***",
    "Authorization: Bearer hunter2hunter2": "Authorization: Bearer ***",
    "token hf_hunter2hunter2hunter2 was refused": "token *** was refused",
}
SOUND = ["https://host/x.zip", "sftp://me@host/x", "s3://bucket/a:b@c", "a photo of a {name}: me@host", "/data/a@b:c",
         "gs://bucket/x?generation=5", "org/name@main", "https://host/x?part=1&monkey=2", "zip://a@1.png::s3://b/c.zip",
         "a flag bearer standing-still, the Bearer understanding"]


@pytest.mark.parametrize(("text", "shown"), SECRETS.items())
def test_what_is_secret_is_masked_and_the_rest_stays(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(f"before '{text}' after {text}") == f"before '{shown}' after {shown}"
    assert masked(shown) == shown


@pytest.mark.parametrize("text", SOUND)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_errors_hold_none() -> None:
    url = "https://me:hunter2@host/x"
    for error in (ModelError(f"{url} is gone"), ConfigError(url, [f"data.path: {url}"])):
        for text in (str(error), repr(error), packed(error), str(pickle.loads(pickle.dumps(error)))):
            assert "hunter2" not in text
            assert "host/x" in text
    assert "hunter2" not in packed(KeyError(url)) + packed(OSError(url))


def test_pages_hold_none() -> None:
    class Environment(jinja2.Environment):
        def get_template(self, *_: Any, **__: Any) -> jinja2.Template:
            return self.from_string("from {{ url }}")

    with mock.patch.object(jinja2, "Environment", Environment):
        assert render("x.html.j2", {}, url="https://me:hunter2@host/x") == "from https://***@host/x"


def test_output_of_a_process_holds_none() -> None:
    out, err = io.StringIO(), io.StringIO()
    with masked_output(out, err):
        sys.stdout.writelines(["from https://me:hunter2@host/x", "\n"])
        handler = logging.StreamHandler()
        handler.emit(logging.LogRecord("x", logging.WARNING, "", 0, "from %s", ("https://me:hunter2@host/x",), None))
    assert out.getvalue() == err.getvalue() == "from https://***@host/x\n"


def run_raw(path: str, out: Path) -> dict[str, Any]:
    return {"name": "run", "out": str(out), "data": {"source": "imagefolder", "path": path},
            "method": {"name": "classical", "policy": "randaugment", "ratio": 1}}


def test_a_file_with_a_secret_is_refused_by_field_and_makes_nothing(tmp_path: Path) -> None:
    config = parse(run_raw("zip://*::https://me:hunter2@127.0.0.1:9/x.zip", tmp_path))
    with pytest.raises(ConfigError, match=r"data\.path: holds a password or token \(.*\*\*\*@127.*FSSPEC_") as error:
        runs.prepare(config)
    assert "hunter2" not in str(error.value)
    assert "hunter2" not in Checked("run", {}, [config.data.path])._repr_html_()
    assert list(tmp_path.iterdir()) == []
    began = parse(run_raw("memory://me:hunter2@x/data", tmp_path))
    assert "does not exist" in "".join(runs.preflight(began, planned=True))
    assert "holds a password" not in "".join(runs.preflight(began, planned=True))


def test_every_kind_of_file_says_so(tmp_path: Path) -> None:
    secret = {"source": "imagefolder", "path": "ftp://me:hunter2@127.0.0.1:9/x"}
    files: list[dict[str, Any]] = [
        run_raw(secret["path"], tmp_path),
        {"name": "f", "out": str(tmp_path), "data": secret, "fit": {"prototypes": {"groups": 2}}},
        {"name": "s", "out": str(tmp_path), "data": {"source": "digits"}, "test": secret,
         "arms": [{"name": "original"}]},
        {"run": str(tmp_path), "reference": secret}]
    for raw in files:
        try:
            text = str(api.validate(raw).problems)
        except ConfigError as error:
            text = str(error)
        assert "holds a password or token" in text, raw
        assert "hunter2" not in text


def test_fields_are_named_with_their_place() -> None:
    (problem,) = secret_problems({"a": {"b": ["x", {"c": "https://me:hunter2@host"}]}, "d": 1})
    assert problem.startswith("a.b.1.c: holds a password or token (https://***@host)")


def test_commands_show_none(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(run_raw("ftp://me:hunter2@127.0.0.1:9/x", tmp_path / "out")))
    for verb in (("validate",), ("plan",), ("plan", "--json"), ("expand",), ("expand", "--json"),
                 ("validate", "--set", "data.classes=https://me:hunter2@127.0.0.1:9/classes.txt")):
        done = rayexpand(verb[0], tmp_path / "x.yaml", *verb[1:])
        assert done.returncode in (0, 2), done.stderr
        assert "hunter2" not in done.stdout + done.stderr
        assert "***@127.0.0.1" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_a_fault_of_ours_leaves_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("rayexpand.api.validate", lambda *_, **__: {}["https://me:hunter2@host/x"])
    done = rayexpand("validate", "x.yaml")
    (file,) = tmp_path.glob("rayexpand-*.txt")
    assert done.returncode == 70
    for text in (done.stdout, done.stderr, file.read_text()):
        assert "hunter2" not in text
    assert "KeyError" in file.read_text()


def test_a_job_with_a_secret_is_not_sent(tmp_path: Path) -> None:
    from rayexpand.on_ray.job import JobOrder
    from rayexpand.on_ray.submit import submit

    (tmp_path / "x.yaml").write_text(yaml.safe_dump(run_raw("s3://bucket/x", Path("/shared"))))
    url = "s3://KEY:hunter2@bucket/x"
    with pytest.raises(UsageError, match=r"data\.path: holds a password or token \(s3://\*\*\*@bucket/x\)"):
        submit(JobOrder("expand", str(tmp_path / "x.yaml"), [f"data.path={url}"]), address="http://127.0.0.1:9")
    with pytest.raises(UsageError, match="holds a password or token"):
        submit(JobOrder("verify", url), address="http://127.0.0.1:9")
