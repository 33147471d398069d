"""Object stores for tests, over real sockets: S3 by moto, and as much of Google Cloud Storage as a run folder needs.

Run as `python -m tests.s3server`, it prints its URL and serves until its stdin closes. Faults happen on the wire:
POST /_control takes {"rules": [...], "buckets": [...]} and forgets older rules, objects and the log; GET /_control
returns the requests seen. A rule is {"method", "match" (in path?query), "times" (-1: always), "do"} with "do" one of

    lose        the request is carried out, its reply is not sent
    late        the request is carried out, and answered as if it had come again: HTTP 404 with the code in "code"
    drop        the connection closes before anything is done
    ignore      the request is carried out without its condition
    <number>    that HTTP status with an S3 error of the code in "code"

moto looks up a name and writes it in two steps; a lock around each request makes them one, as a real store does.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import unquote

import google_crc32c
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from tests.commands import ROOT

ACCOUNT = "123456789012"


class Stores:
    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self.s3 = DomainDispatcherApplication(create_backend_app)
        self.gcs: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()
        self.rules: list[dict[str, Any]] = []
        self.log: list[str] = []
        self.uploads: list[tuple[dict[str, Any], bool, dict[str, Any]]] = []  # resumable ones of GCS

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_control":
            return self.control(Request(environ))(environ, start)
        query = environ.get("QUERY_STRING", "")
        line = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}" + (f"?{query}" if query else "")
        with self.lock:
            self.log.append(line)
            do = self.fault(line)
            if do == "drop":
                return _hang_up(environ)
            if isinstance(do, dict) and do["do"] != "late":
                return _error(do["code"], do["do"])(environ, start)
            if do == "ignore":
                environ.pop("HTTP_IF_NONE_MATCH", None)
                environ["QUERY_STRING"] = re.sub("ifGenerationMatch=0&?", "", query)
            answer = self.answer(environ)
        if do == "lose":
            return _hang_up(environ)
        if isinstance(do, dict):
            return _error(do["code"], 404)(environ, start)
        return answer(environ, start)

    def fault(self, line: str) -> Any:
        for rule in self.rules:
            if rule["times"] and line.startswith(rule["method"]) and re.search(rule["match"], line):
                rule["times"] -= 1
                return rule if rule["code"] else rule["do"]
        return None

    def answer(self, environ: dict[str, Any]) -> Response:
        if re.match("/(upload/|download/)?storage/v1/b/", environ["PATH_INFO"]):
            return self.google(Request(environ))
        return Response.from_app(self.s3, environ, buffered=True)

    def control(self, request: Request) -> Response:
        from moto.backends import get_backend

        with self.lock:
            if request.method == "POST":
                wanted = request.get_json()
                self.rules, self.log = wanted["rules"], []
                backend = get_backend("s3")[ACCOUNT]["aws"]
                for name in wanted.get("buckets", ()):
                    if name not in backend.buckets:
                        backend.create_bucket(name, "us-east-1")
                    self.gcs.setdefault(name, {})
                for key, content in wanted.get("objects", ()):
                    backend.put_object(wanted["buckets"][0], key, content.encode())
            return Response(json.dumps(self.log), content_type="application/json")

    # Google Cloud Storage, JSON API --------------------------------------------------------------------------------

    def google(self, request: Request) -> Response:
        path = re.sub("^/(upload/|download/)?storage/v1/b/", "", request.environ["PATH_INFO"])
        name, _, key = path.partition("/o")
        key = unquote(key.removeprefix("/"))
        bucket = self.gcs.get(name)
        if request.method == "PUT":
            facts, conditional, bucket = self.uploads[int(request.args["upload_id"])]
            return self.google_create(facts, request.get_data(), conditional, bucket)
        if bucket is None:
            return _json({"error": {"code": 404, "message": "The specified bucket does not exist."}}, 404)
        if request.method == "POST":
            return self.google_upload(request, bucket)
        if not key:
            return self.google_list(request, bucket)
        if key not in bucket:
            return _json({"error": {"code": 404, "message": f"No such object: {key}"}}, 404)
        if request.method == "DELETE":
            del bucket[key]
            return Response(status=204)
        if request.args.get("alt") == "media":
            response = Response(bucket[key]["content"], content_type="application/octet-stream")
            return response.make_conditional(request, accept_ranges=True, complete_length=len(bucket[key]["content"]))
        return _json(_resource(name, key, bucket[key]))

    def google_upload(self, request: Request, bucket: dict[str, Any]) -> Response:
        if request.args["uploadType"] == "resumable":
            facts = request.get_json()
            self.uploads.append((facts, request.args.get("ifGenerationMatch") == "0", bucket))
            path = f"/upload/storage/v1/b/x/o?upload_id={len(self.uploads) - 1}"
            return Response(status=200, headers={"Location": request.host_url.rstrip("/") + path})
        boundary = request.headers["Content-Type"].split("boundary=")[1].strip("\"'").encode()
        _, described, content = [part.split(b"\r\n\r\n", 1)[-1]
                                 for part in request.get_data().split(b"--" + boundary)][:3]
        return self.google_create(json.loads(described), content[:-2], request.args.get("ifGenerationMatch") == "0",
                                  bucket)

    def google_create(self, facts: dict[str, Any], content: bytes, conditional: bool, bucket: dict[str, Any]
                      ) -> Response:
        if conditional and facts["name"] in bucket:
            return _json({"error": {"code": 412, "message": "At least one of the pre-conditions did not hold."}}, 412)
        bucket[facts["name"]] = {"content": content, "metadata": facts.get("metadata", {})}
        return _json(_resource("b", facts["name"], bucket[facts["name"]]))

    def google_list(self, request: Request, bucket: dict[str, Any]) -> Response:
        prefix = request.args.get("prefix", "")
        keys = sorted(key for key in bucket if key.startswith(prefix) and "/" not in key[len(prefix):])
        first = int(request.args.get("pageToken", 0))
        page = {"items": [_resource("b", key, bucket[key]) for key in keys[first:first + 1000]]}
        return _json(page | ({"nextPageToken": str(first + 1000)} if len(keys) > first + 1000 else {}))


def _resource(bucket: str, key: str, found: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "storage#object", "bucket": bucket, "name": key, "size": str(len(found["content"])),
            "metadata": found["metadata"], "updated": "2026-01-01T00:00:00Z", "generation": "1",
            "crc32c": base64.b64encode(google_crc32c.Checksum(found["content"]).digest()).decode()}


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, content_type="application/json")


class Server:
    """The server in a process of its own, and what to tell it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "tests.s3server"], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                         env={**os.environ, "S3_UPLOAD_PART_MIN_SIZE": "1000"})
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate()

    def reset(self, *rules: tuple[str, str, int, str | int], bucket: str = "runs", code: str = "",
              objects: Sequence[tuple[str, str]] = ()) -> None:
        """Forgets rules and the log; new rules are (method, match, times, do)."""
        keys = ("method", "match", "times", "do")
        self._ask({"rules": [{**dict(zip(keys, rule, strict=True)), "code": code} for rule in rules],
                   "buckets": [bucket], "objects": list(objects)})

    def requests(self) -> list[str]:
        """Requests since the last reset, as `GET /bucket/key?query`."""
        return self._ask(None)

    def _ask(self, content: Any) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.url}/_control", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())


def _error(code: str, status: int) -> Response:
    return Response(f"<Error><Code>{code}</Code><Message>as told</Message></Error>", status,
                    content_type="application/xml")


def _hang_up(environ: dict[str, Any]) -> Iterable[bytes]:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError


class _Quiet(WSGIRequestHandler):
    def log(self, *args: Any) -> None:
        pass


def main() -> None:
    server = make_server("127.0.0.1", 0, Stores(), threaded=True, request_handler=_Quiet)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
