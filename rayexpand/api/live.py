"""A small server on 127.0.0.1 that shows how far a folder is, anew for each look."""

from __future__ import annotations

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from rayexpand.api.statuses import status
from rayexpand.contract.errors import RayexpandError, UsageError
from rayexpand.contract.secrets import masked

FRESH_S = 3.0  # looks within this time share one reading of the folder
_OWN_NAMES = {"127.0.0.1", "localhost", "::1"}
_SAFE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
         "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
                                    "frame-ancestors 'none'"}


class StatusServer(ThreadingHTTPServer):
    """`/` is the page, `/status.json` what it is made of. Answers only who asks for this machine by name."""

    daemon_threads = True

    def __init__(self, folder: str, port: int) -> None:
        from rayexpand.reports.live import LiveView

        status(folder)  # what is no folder of ours is said at once
        self._folder, self._view, self._lock = folder, LiveView(), threading.Lock()
        self._made: tuple[float, str, str] | None = None
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise UsageError(f"--serve {port}: cannot be served on 127.0.0.1 ({error}); choose another port, or 0 for "
                             "any") from error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def made(self) -> tuple[str, str]:
        """(page, JSON) of the folder as it is now, or as it was FRESH_S ago at most."""
        with self._lock:
            if self._made is None or time.monotonic() - self._made[0] > FRESH_S:
                self._made = time.monotonic(), *self._look()
            return self._made[1:]

    def _look(self) -> tuple[str, str]:
        try:
            found = status(self._folder)
            return self._view.page(found), json.dumps(found.to_json())
        except (RayexpandError, OSError) as error:  # a folder that is moved away may come back
            from rayexpand.reports.live import failed_page

            return failed_page(self._folder, str(error)), json.dumps({"error": masked(str(error))})


class _Handler(BaseHTTPRequestHandler):
    server: StatusServer

    def do_GET(self) -> None:
        asked = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if asked not in _OWN_NAMES:  # another site may lead a browser here by a name of its own
            self._answer(403, "text/plain", "ask for 127.0.0.1")
        elif self.path == "/":
            self._answer(200, "text/html", self.server.made()[0])
        elif self.path == "/status.json":
            self._answer(200, "application/json", self.server.made()[1])
        else:
            self._answer(404, "text/plain", "only / and /status.json are here")

    def _answer(self, code: int, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(code)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content)),
                            **_SAFE}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def serve_status(folder: str | os.PathLike[str], port: int = 0) -> StatusServer:
    """A server on 127.0.0.1 whose page shows the status of a folder; its `serve_forever()` shows it, `url` says where.
    Raises UsageError for a folder of nothing, and a port that is taken."""
    return StatusServer(os.fspath(folder), port)
