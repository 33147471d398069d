from __future__ import annotations

import base64
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from rayexpand.contract.schema import Reason
from rayexpand.data.seeds import DataConfig
from rayexpand.reports.card import PROMISE
from rayexpand.reports.run import FILES_SEARCHED, write_report
from rayexpand.runs.status import view_run
from tests.commands import rewrite_json
from tests.runfolder import CPU_STACK, NAMES, Builder, sample_run

DEMO = {"arms": {"original": {"accuracies": [0.5, 0.6, 0.7], "mean": 0.6, "se": 0.058},
                 "expanded": {"accuracies": [0.7, 0.7, 0.73], "mean": 0.71, "se": 0.01}},
        "controls": {"guide zero-shot": 0.93, "prior <b>": "none"}, "gain": 0.11, "gain_se": 0.059,
        "note": "What it shows & what not."}


class Page(HTMLParser):
    """Tags, attribute links and balance of a page."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def visible(text: str) -> str:
    """The words of a page, without tags, style and pictures."""
    body = re.sub(r"<style>.*?</style>", "", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Builder, str]:
    run = sample_run(tmp_path_factory.mktemp("report") / "half")
    return run, write_report(run.folder).read_text()


def test_page_is_whole_and_loads_nothing(half: tuple[Builder, str]) -> None:
    page = Page(half[1])
    assert page.open == []
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert "http" not in half[1]
    assert "url(" not in half[1]
    assert "prefers-color-scheme: dark" in half[1]
    assert 'name="viewport"' in half[1]


def test_counts_reasons_and_promise_are_there(half: tuple[Builder, str]) -> None:
    words = visible(half[1])
    for piece in ("180 planned", "117 kept", "2 rejected", "1 failed", "60 pending", "4 of 6 shards committed",
                  "66.7 % decided", "wrong_class rejected 1", "clip_similarity 0.41 < 0.60",
                  "image file is truncated <4 bytes>", "ab12" * 16, "0f1e2d3c" * 8, "c0ffee" * 10 + "beef",
                  "strength: 0.6", "sample 40.0 s, 84.2 %", PROMISE, "What to do next"):
        assert piece in words, piece
    assert "nan_latent" not in words  # made good by a retry
    assert 'id="demo"' not in half[1]


def test_commands_name_this_run(half: tuple[Builder, str]) -> None:
    run, page = half
    first = view_run(run.folder).store.data(view_run(run.folder).receipts[0])["sample_id"][0].as_py()
    words = visible(page)
    for command in ("expand half.yaml", f"retry {run.folder}", f"verify {run.folder}", f"regen {run.folder} {first}"):
        assert f"rayexpand {command}" in words


def test_mixed_stacks_warn_and_one_stack_does_not(half: tuple[Builder, str], tmp_path: Path) -> None:
    assert "Mixed stacks." in half[1]
    assert 'class="differs"' in half[1]
    run = Builder(tmp_path / "one", shards=1).start()
    run.commit(0)
    assert "Mixed stacks." not in write_report(run.folder).read_text()


def test_sheet_shows_seeds_beside_samples(half: tuple[Builder, str]) -> None:
    section = half[1].split('id="samples"')[1].split("</section>")[0]
    assert section.count('class="first"') == 10, "all classes"
    assert section.count("<img") == 10 + 10 * 6 - 1, "one sample of the only seed of a class was refused"
    assert "nopicture" not in section
    assert section.count('class="pixelated"') == section.count("<img")
    assert 'alt="seed digits/' in section
    assert section.count('<details class="zoom"><summary>') == 69, "a picture opens on a click, with its words"
    assert "strength 0.6, 15 steps, guide 0.9" in visible(section)
    assert "(some of" not in visible(section)


def test_a_class_in_any_file_is_on_the_sheet(tmp_path: Path) -> None:
    names = tuple(f"c{i:02d}" for i in range(FILES_SEARCHED + 4))
    run = Builder(tmp_path / "wide", names=names, shards=len(names), seeds_per_shard=1, copies=1, side=8).start()
    for shard in range(len(names)):
        run.commit(shard)
    section = write_report(run.folder).read_text().split('id="samples"')[1].split("</section>")[0]
    assert section.count('class="first"') == len(names)


def test_a_seed_is_refused_once_for_a_reason_with_the_number_of_its_others(tmp_path: Path) -> None:
    run = Builder(tmp_path / "refused", shards=2, seeds_per_shard=5, copies=6).start()
    broken = dict.fromkeys(range(6), (Reason.DECODE_ERROR, "truncated"))
    run.commit(0, run.samples(0, broken))
    run.commit(1, run.samples(1, {0: (Reason.DECODE_ERROR, "truncated"), 6: (Reason.WRONG_CLASS, "no"),
                                  7: (Reason.WRONG_CLASS, "no")}))
    section = write_report(run.folder).read_text().split('id="refused"')[1].split("</section>")[0]
    rows = [visible(row) for row in section.split("Some of them")[1].split("<tr>")[2:]]
    assert len(rows) == 3
    assert sum("and 5 others of this seed" in row for row in rows) == 1
    assert sum("and 1 other of this seed" in row for row in rows) == 1
    named = [row.split("/")[0] + row.split("/")[1] for row in rows]
    assert len(set(named)) == 3


def test_pending_rows_are_part_of_the_bar_in_the_colour_of_their_mark(half: tuple[Builder, str]) -> None:
    section = half[1].split('id="counts"')[1].split("</section>")[0]
    stack = section.split('class="stack thin"')[1]
    assert dict(re.findall(r'<div class="(\w+)" style="width:([\d.]+)%', stack)) == {
        "kept": "65.000", "rejected": "1.111", "failed": "0.556", "pending": "33.333"}


def test_seeds_that_are_gone_are_grey_boxes(tmp_path: Path) -> None:
    run = Builder(tmp_path / "gone", shards=1).start()
    run.commit(0)
    section = write_report(run.folder).read_text().split('id="samples"')[1].split("</section>")[0]
    assert section.count("nopicture") == 5
    assert section.count("<img") == 5 * 6


def test_a_method_or_data_section_unknown_here_still_reports(tmp_path: Path) -> None:
    run = Builder(tmp_path / "new", shards=1).start()
    rewrite_json(run.folder / "run.json", lambda facts: facts["config"].update(data={"source": "hologram"}))
    run.commit(0)
    assert write_report(run.folder).read_text().count("nopicture\"") == 5


@pytest.mark.parametrize("side", [16, 28, 200])
def test_small_pictures_keep_their_pixels_and_large_ones_shrink(tmp_path: Path, side: int) -> None:
    run = Builder(tmp_path / "side", shards=1, seeds_per_shard=1, copies=1, side=side).start()
    run.commit(0)
    page = write_report(run.folder).read_text()
    (kind, content) = re.findall(r"data:image/(\w+);base64,([^\"]*)", page)[0]
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert (kind, image.format, image.width) == (("png", "PNG", side) if side <= 64 else ("jpeg", "JPEG", 200))
    assert f'width="{ {16: 96, 28: 84, 200: 96}[side] }"' in page


def test_everything_from_data_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    names = (f"{evil}&'\"", "b", "c")
    run = Builder(tmp_path / "evil", names=names, shards=1, seeds_per_shard=3, prompt=f"{evil} {{}}").start(
        models={f"prior{evil}": evil})
    run.commit(0, run.samples(0, {0: (Reason.WRONG_CLASS, evil)}), stack={**CPU_STACK, "device": evil})
    page = write_report(run.folder, demo={**DEMO, "note": evil}).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert Page(page).open == []
    assert names[0] in visible(page)


def test_no_row_kept(tmp_path: Path) -> None:
    run = Builder(tmp_path / "none", shards=1).start()
    empty = visible(write_report(run.folder).read_text())
    assert "0.0 % decided" in empty
    assert "No sample is kept yet" in empty
    run.commit(0, run.samples(0, dict.fromkeys(range(30), (Reason.NAN_LATENT, ""))))
    words = visible(write_report(run.folder).read_text())
    assert "0 kept 0 rejected 30 failed 0 pending" in words
    assert "nan_latent failed 30 100.0 %" in words
    assert "complete" in words


def test_many_classes_show_the_lowest(tmp_path: Path) -> None:
    names = tuple(f"class {i:03d}" for i in range(60))
    run = Builder(tmp_path / "many", names=names, shards=1, seeds_per_shard=60, copies=2, side=8).start()
    run.commit(0, run.samples(0, {2 * i: (Reason.NEAR_COPY, "") for i in range(30, 60)}))
    section = visible(write_report(run.folder).read_text().split('id="classes"')[1].split("</section>")[0])
    assert re.findall(r"class (0\d\d)", section) == [f"{i:03d}" for i in [*range(30, 60), *range(30)]], "all of them"
    assert "class 054 1 1 The 25 classes with the fewest kept samples; the other 35 have 1 to 2 each." in section


def test_demo_table(half: tuple[Builder, str]) -> None:
    page = write_report(half[0].folder, demo=DEMO).read_text()
    section = page.split('id="demo"')[1].split("</section>")[0]
    words = visible(section)
    for piece in ("+11.0 ± 5.9 points", "60.0 ± 5.8 3 50.0 · 60.0 · 70.0", "guide zero-shot 93.0",
                  "prior <b> none", "What it shows & what not."):
        assert piece in words, piece
    assert section.count('class="seed"') == 6
    assert 'class="whisker" style="left:54.20%;width:11.60%"' in section
    assert page.index('id="demo"') < page.index('id="counts"')


def test_report_is_replaced_whole_and_leaves_nothing_behind(half: tuple[Builder, str]) -> None:
    before = {path.name for path in half[0].folder.iterdir()}
    write_report(half[0].folder)
    assert {path.name for path in half[0].folder.iterdir()} == before


def test_real_seeds_of_an_image_folder(tmp_path: Path) -> None:
    for name in NAMES[:2]:
        (tmp_path / "seeds" / name).mkdir(parents=True)
    run = Builder(tmp_path / "run", names=NAMES[:2], shards=1, seeds_per_shard=2)
    for seed_id, sample in zip(run.index.seed_ids, run.samples(0)[::6], strict=True):
        assert sample.image
        (tmp_path / "seeds" / seed_id).write_bytes(sample.image)
    data = DataConfig(source="imagefolder", path=str(tmp_path / "seeds"))
    run = Builder(tmp_path / "run", names=NAMES[:2], shards=1, seeds_per_shard=2, data=data).start()
    run.commit(0)
    (tmp_path / "seeds" / run.index.seed_ids[0]).write_bytes(b"no image")
    section = write_report(run.folder).read_text().split('id="samples"')[1].split("</section>")[0]
    assert section.count("nopicture") == 1
    assert section.count('alt="seed ') == 1
