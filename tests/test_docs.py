"""The pages: links and anchors resolve, and what they name is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.main import get_command

from rayexpand import methods
from rayexpand.classifier.recipe import Recipe
from rayexpand.cli import main
from rayexpand.reports.card import PROMISE
from rayexpand.runs.config import RunConfig, parse
from tests.commands import ROOT

LEFT_OUT = {"build", "dist", "runs", "artifacts", "data", "node_modules"}
PAGES = sorted(path for path in ROOT.rglob("*.md")
               if not any(part in LEFT_OUT or part.startswith(".") for part in path.relative_to(ROOT).parts))
MAX_README_LINES = 150


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A page without its code, where brackets mean something else."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "``", text)


@cache
def anchors(path: Path) -> set[str]:
    """Names of the headings of a page, as GitHub makes them."""
    found: list[str] = []
    for title in re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.M):
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def links(path: Path) -> Iterator[tuple[str, str]]:
    """(file, anchor) of each relative link of a page."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not re.match(r"[a-z][a-z0-9+.-]*:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_links_lead_to_something(path: Path) -> None:
    broken = []
    for file, anchor in links(path):
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{file}#{anchor}" if anchor else file)
    assert broken == []


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_job_files_that_a_page_names_are_there(path: Path) -> None:
    named = re.findall(r"(?<![\w/.])jobs/[\w./-]+\.(?:yaml|csv|txt|md)", path.read_text())
    assert [one for one in named if not (ROOT / one).is_file()] == []


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_tests_and_modules_that_a_page_names_are_there(path: Path) -> None:
    named = re.findall(r"(?<![\w/.<])(?:tests|rayexpand|docs)/[\w/]+\.(?:py|md)", path.read_text())
    assert [one for one in named if not (ROOT / one).is_file()] == []


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_no_page_names_a_path_of_one_machine(path: Path) -> None:
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|mnt|Users)/", path.read_text())


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_the_readmes_first_job_file_works_as_it_stands(image_folder: Path) -> None:
    text = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[0]
    config = parse(yaml.safe_load(text.replace("data/birds}", f"{image_folder}}}")))
    assert (config.name, config.method.name) == ("birds", "classical")


def braces(text: str) -> list[str]:
    """`a{b,c}d` as a shell writes it out."""
    if (found := re.search(r"\{([^{}]*)\}", text)) is None:
        return [text]
    return [one for part in found[1].split(",") for one in braces(text[:found.start()] + part + text[found.end():])]


def papers() -> dict[str, list[list[str]]]:
    """Rows of docs/papers.md by paper: (what, job files, command)."""
    text = (ROOT / "docs/papers.md").read_text().partition("\n## ")[2]
    return {section.partition("\n")[0]: [[cell.strip() for cell in line.strip("|").split("|")]
                                         for line in section.splitlines() if line.startswith("| ")][1:]
            for section in text.split("\n## ")}


def test_the_page_of_the_papers_names_every_job_file_and_no_other() -> None:
    cells = [cell for rows in papers().values() for _, files, command in rows for cell in (files, command)]
    named = {one for cell in cells for word in re.findall(r"[\w/{},-]+\.yaml", cell) for one in braces(word)}
    below = ROOT / "jobs/papers"
    there = {str(path.relative_to(below)) for path in below.rglob("*.yaml")}

    assert there - named == set()
    assert [one for one in named - there if not (ROOT / "jobs" / one).is_file()] == []


@pytest.mark.parametrize(("paper", "tables", "figures"), [
    ("DistDiff", 12, 9), ("GIF", 9, 17), ("Diff-Mix", 6, 7), ("Real-Fake", 10, 4), ("DiffCoRe-Mix", 8, 15)])
def test_the_page_of_the_papers_has_every_table_and_figure(paper: str, tables: int, figures: int) -> None:
    found: dict[str, set[int]] = {"table": set(), "figure": set()}
    for what, files, command in papers()[paper]:
        assert files or re.match("no:|no, ", command), f"{what}: neither a job nor why not"
        assert command, what
        if head := re.match(r"(table|figure)s? ((?:\d+[a-z]?(?: to \d+)?(?:, )?)+)", what):
            for first, last in re.findall(r"(\d+)[a-z]?(?: to (\d+))?", head[2]):
                found[head[1]] |= set(range(int(first), int(last or first) + 1))
    assert found == {"table": set(range(1, tables + 1)), "figure": set(range(1, figures + 1))}


@pytest.mark.parametrize("name", methods.names())
def test_every_method_says_which_tables_it_is_in(name: str) -> None:
    assert "(../papers.md" in (ROOT / f"docs/methods/{name}.md").read_text()


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_its_page_and_its_rows(name: str) -> None:
    assert f"(docs/methods/{name}.md)" in (ROOT / "README.md").read_text()
    assert f"({name}.md)" in (ROOT / "docs/methods/README.md").read_text()
    titles = re.findall(r"^## (.*)$", (ROOT / f"docs/methods/{name}.md").read_text(), re.M)
    assert [one for one in ("Equations", "Settings", "Cost", "Job files", "Not built") if one not in titles] == []


def settings(name: str) -> dict[str, str]:
    """Default of each field, by the table of settings of a method's page."""
    text = (ROOT / f"docs/methods/{name}.md").read_text().partition("\n## Settings\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \| ", text, re.M))


@pytest.mark.parametrize("name", methods.names())
def test_the_settings_of_a_method_are_those_of_its_page(name: str) -> None:
    fields: dict[str, Any] = dict(methods.method_class(name).model_fields)  # type: ignore[attr-defined]
    del fields["name"]
    listed = settings(name)

    assert list(listed) == list(fields)
    for field, one in fields.items():
        if one.default_factory is None:
            assert yaml.safe_load(listed[field].strip("`")) == _plain(one.default), field
        else:
            assert listed[field].startswith("by `"), field


def _plain(value: Any) -> Any:
    """A default as YAML has it: lists for tuples."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_fields_of_a_run_that_a_page_names_exist(path: Path) -> None:
    sections = {name: _section(field.annotation) for name, field in RunConfig.model_fields.items()}
    named = re.findall(r"`([a-z]+)\.([a-z_]+)`", path.read_text())
    wrong = [f"{section}.{field}" for section, field in named
             if (model := sections.get(section)) is not None and field not in model.model_fields]
    assert wrong == []


def _section(annotation: Any) -> Any:
    """The model of a section, None for a plain field."""
    return next((one for one in (annotation, *get_args(annotation)) if hasattr(one, "model_fields")), None)


def test_every_verb_is_explained() -> None:
    verbs = get_command(main.app).commands  # type: ignore[attr-defined]
    explained = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/cli.md").read_text(), re.M)
    named = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| `\w+`.*$", (ROOT / "README.md").read_text(), re.M)))
    hidden = {name for name, one in verbs.items() if one.hidden}

    assert set(verbs) - hidden - set(explained) == set()
    assert set(verbs) - hidden - set(named) == set()


def test_the_promise_stands_once_and_whole() -> None:
    """The words of the promise are fixed: what is promised is neither widened nor narrowed by a page."""
    quoted = " ".join(line.removeprefix(">").strip() for line in (ROOT / "docs/promise.md").read_text().splitlines()
                      if line.startswith(">"))
    assert quoted == PROMISE


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "docs/notebook.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"})

    assert done.returncode == 0, done.stderr
    assert all(cell["cell_type"] != "code" or cell["outputs"] == [] for cell in cells), "outputs are not stored"


def test_every_field_of_a_recipe_is_in_the_page_of_studies() -> None:
    text = (ROOT / "docs/studies.md").read_text()
    assert [name for name in Recipe.model_fields if f"`{name}`" not in text] == []
