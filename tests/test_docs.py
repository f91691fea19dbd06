"""The documents: their generated parts are up to date, their links lead somewhere, and what they quote works."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

from pipelines.cli import COMMANDS, main
from pipelines.tasks import Task
from s2t_models.recipe import Recipe

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
WRITTEN = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("cluster/*.md"), *DOCS.glob("*.md")]
GENERATOR = runpy.run_path(str(DOCS / "generate.py"))
PACKAGES = ("pipelines", "serving", "s2t_models", "cluster", "benchmarks", "tests")


@pytest.mark.parametrize("path", GENERATOR["documents"](), ids=lambda path: path.name)
def test_the_generated_parts_are_up_to_date(path):
    assert GENERATOR["generate"](path) == path.read_text(), f"{path.name} is out of date: run `make docs`"


def test_the_tree_lists_every_module_and_folder_with_a_description():
    block = (DOCS / "architecture.md").read_text().split("<!-- generated: tree -->")[1].split("```")[1]
    listed, folders = set(), []
    for line in block.strip("\n").splitlines():
        if line.startswith(" " * GENERATOR["COLUMN"]):
            continue  # the rest of a description
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, description = line.strip().partition(" ")
        assert description.strip(), f"{name} has no docstring to describe it"
        folders[depth:] = [name] if name.endswith("/") else []
        if not name.endswith("/"):
            listed.add("".join(folders[:depth]) + name)
    modules = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    on_disk = {path.relative_to(REPOSITORY).as_posix() for path in modules if path.name != "__init__.py"}
    assert {name for name in listed if name.endswith(".py")} == on_disk | {"docs/generate.py"}


def test_every_setting_of_a_recipe_is_in_a_table_with_a_description():
    text = (DOCS / "recipes.md").read_text()
    tables = re.findall(r"<!-- generated: settings ?(\w*) -->", text)
    sections = [name for name in Recipe.model_fields if hasattr(Recipe.model_fields[name].annotation, "model_fields")]
    sections.remove("teacher")  # takes what `slm` takes
    assert sorted(tables) == sorted(["", *sections]), "each section of the recipe has a table"
    rows = list(GENERATOR["ROW"].finditer(text))
    assert [row["key"] for row in rows if not row["text"]] == [], "settings without a description"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_to_files_and_headings_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
        file, _, heading = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]
        assert not heading or heading in anchors, f"{path.name} links to {target}"


def test_recipes_that_are_quoted_are_valid():
    quoted = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert quoted
    for text in quoted:
        Recipe.model_validate(yaml.safe_load(text))


def test_commands_that_are_quoted_have_the_options_they_are_given(capsys):
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    text = "\n".join(path.read_text() for path in pages).replace("\\\n", " ")
    quoted = re.findall(r"^(?:`{0,3}|\|.*?`)s2t (\w+) ([^`\n]*)", text, re.MULTILINE)
    assert {name for name, _ in quoted} == COMMANDS.keys() - {"demo"}
    for name, rest in quoted:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"s2t {name} {rest}"


def test_the_task_that_contributing_shows_is_a_task(tmp_path):
    section = (REPOSITORY / "CONTRIBUTING.md").read_text().split("## Adding a task")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    scope: dict[str, object] = {}
    exec(example, scope)
    (tmp_path / "capitals").mkdir()
    row = {"id": 7, "question": "The capital of France?", "options": ["Lyon", "Paris"], "answer": "B"}
    (tmp_path / "capitals" / "test.jsonl").write_text(json.dumps(row))
    capitals = scope["TASK"]
    assert isinstance(capitals, Task)
    (item,) = capitals.load(tmp_path)
    assert [capitals.grade(f"The answer is ({letter}).", item).verdict for letter in "AB"] == ["wrong", "correct"]
