from __future__ import annotations

import http.client
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rayexpand import api
from rayexpand.api import live as serving
from rayexpand.api.live import StatusServer
from rayexpand.contract.errors import UsageError
from rayexpand.reports.live import LiveView, throughput
from rayexpand.storage.heartbeats import SILENT_S, Beat
from rayexpand.storage.tables import replace_json
from tests.runfolder import Builder, sample_run

NOW = 2e9


def beating(run: Builder, at: float, **fields: object) -> None:
    run.store.files.make_folder("heartbeats")
    beat = Beat("expand", run.folder.name, "far", 1, "far~1~2", 2, at - 500, at, f"expanding {run.folder.name}", 120,
                180, 3.5, {"actors": 4, "nodes": 2}, **fields)  # type: ignore[arg-type]
    replace_json(run.store.files, f"heartbeats/expand-{beat.name}~far~1~2.json", asdict(beat))


@pytest.fixture
def run(tmp_path: Path) -> Builder:
    found = sample_run(tmp_path / "birds <b>")
    beating(found, NOW)
    return found


def page(run: Builder, now: float) -> str:
    return LiveView().page(api.status(run.folder, clock=lambda: now), now)


def text_of(page: str) -> str:
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            found.append(data)

    Reader().feed(re.sub(r"<style>.*?</style>", "", page, flags=re.S))
    return " ".join(" ".join(found).split())


def test_the_page_shows_rate_time_failures_nodes_and_the_last_samples(run: Builder) -> None:
    made = page(run, NOW + 4)
    said = text_of(made)
    assert "Running, heartbeat 4 s ago" in said
    assert "4 actors alive" in said
    assert "2 nodes alive" in said
    assert "117 kept" in said
    assert "decode_error 1, 33.3 %" in said
    assert "images per second" in said
    assert "Samples of the last shards" in said
    assert made.count("data:image/png") == 8 + 8 + 1, "of the last three files, one of which is a retry of one row"
    assert '<meta http-equiv="refresh" content="5">' in made.partition("</head>")[0]


def test_the_page_needs_no_script_and_loads_nothing(run: Builder) -> None:
    made = page(run, NOW)
    assert "<script" not in made
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", made)
    assert "birds <b>" not in made, "names are escaped"


def test_a_dead_driver_is_said_within_half_a_minute(run: Builder) -> None:
    assert "Running" in text_of(page(run, NOW + SILENT_S - 1))
    said = text_of(page(run, NOW + SILENT_S + 1))
    assert "No heartbeat since 2033-05-18 03:33:20 UTC, 21.0 s ago" in said
    assert "4 actors alive" not in said, "what a dead driver said is over"


def test_pictures_are_made_once(run: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    view, seen = LiveView(), api.status(run.folder, clock=lambda: NOW)
    first = view.page(seen, NOW)
    monkeypatch.setattr("rayexpand.reports.live.encoded_picture", lambda *_: pytest.fail("made again"))
    assert view.page(seen, NOW) == first


def test_a_data_file_that_vanishes_leaves_a_gap(run: Builder) -> None:
    seen = api.status(run.folder, clock=lambda: NOW)
    (run.folder / "data/train-000003.parquet").write_bytes(b"no")
    assert "Samples of the last shards" in text_of(LiveView().page(seen, NOW))


def test_rows_are_spread_over_the_time_of_their_shard() -> None:
    found = throughput([(100.0, 100.0, 50), (100.0, 50.0, 50)], 100.0)
    assert found is not None
    assert (found.begin, found.end) == (0.0, 100.0)
    step = 100 / len(found.rates)
    assert sum(found.rates) * step == pytest.approx(100)
    assert found.rates[0] == pytest.approx(0.5)
    assert found.rates[-1] == pytest.approx(1.5)
    assert throughput([], 5.0) is None


@pytest.fixture
def server(run: Builder, monkeypatch: pytest.MonkeyPatch) -> Iterator[StatusServer]:
    monkeypatch.setattr(serving, "FRESH_S", 0.0)
    found = api.serve_status(run.folder)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def test_a_server_beside_the_browser_shows_the_folder_as_it_is(server: StatusServer, run: Builder) -> None:
    beating(run, time.time())
    with urllib.request.urlopen(server.url, timeout=10) as reply:
        assert "Running, heartbeat" in text_of(reply.read().decode())
        assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'")
    beating(run, time.time() - SILENT_S - 5)
    with urllib.request.urlopen(server.url, timeout=10) as reply:
        assert "No heartbeat since" in text_of(reply.read().decode())
    with urllib.request.urlopen(f"{server.url}status.json", timeout=10) as reply:
        assert json.load(reply)["drivers"][0]["state"] == "silent"


def test_the_server_answers_only_who_asks_for_this_machine(server: StatusServer) -> None:
    for host, code in (("evil.example", 403), ("127.0.0.1", 200), (f"localhost:{server.server_address[1]}", 200)):
        asked = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
        asked.request("GET", "/", headers={"Host": host})
        assert asked.getresponse().status == code
        asked.close()


def test_the_server_outlives_a_folder_that_is_moved(server: StatusServer, run: Builder) -> None:
    run.folder.rename(run.folder.with_name("moved"))
    with urllib.request.urlopen(server.url, timeout=10) as reply:
        assert "The folder cannot be read now." in text_of(reply.read().decode())


def test_a_port_that_is_taken_and_a_folder_of_nothing_are_said(server: StatusServer, run: Builder,
                                                               tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose another port"):
        api.serve_status(run.folder, int(server.server_address[1]))
    with pytest.raises(UsageError, match="no run, study"):
        api.serve_status(tmp_path)


def test_a_finished_run_shows_how_it_ended(run: Builder) -> None:
    beating(run, NOW, exit_code=0)
    assert "Ended at 2033-05-18 03:33:20 UTC" in text_of(page(run, NOW + 500))
