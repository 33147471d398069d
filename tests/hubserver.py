"""A model hub of one folder on this machine: as much of the API of huggingface.co as fetching files needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`root` holds repositories as org/name/<files>; `fetched` are the files whose content was asked for, in order."""

    root: Path
    url: str = ""
    fetched: list[str] = field(default_factory=list)

    def files(self, repo: str) -> list[Path]:
        return sorted(file for file in (self.root / repo).rglob("*") if file.is_file())


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"] and len(parts) >= 5:
                self.listing("/".join(parts[2:4]), parts[4])
            elif len(parts) > 4 and parts[2] == "resolve":
                self.file("/".join(parts[:2]), "/".join(parts[4:]), body)
            else:
                self.send_error(404)

        def listing(self, repo: str, kind: str) -> None:
            files = [(str(file.relative_to(hub.root / repo)), file) for file in hub.files(repo)]
            if not files:
                return self.send_error(404)
            if kind == "tree":
                said = [{"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file)}
                        for name, file in files]
            else:
                said = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name, _ in files]}
            return self.send(json.dumps(said).encode(), True, {"Content-Type": "application/json"})

        def file(self, repo: str, name: str, body: bool) -> None:
            if not (hub.root / repo / name).is_file():
                return self.send_error(404)
            if body:
                hub.fetched.append(name)
            return self.send((hub.root / repo / name).read_bytes(), body, {
                "X-Repo-Commit": COMMIT, "ETag": f'"{_oid(hub.root / repo / name)}"'})

        def send(self, content: bytes, body: bool, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()  # a name, as git has it
