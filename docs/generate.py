"""Write what docs/ says of the code from the code: the tree in architecture.md and the settings in recipes.md.

    make docs

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`. In the tables of settings the last column
is written by hand and kept from one run to the next. tests/test_docs.py checks that nothing is out of date or left
without a description.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from s2t_models.recipe import Recipe

REPOSITORY = Path(__file__).resolve().parent.parent
PART = re.compile(r"(<!-- generated: (?P<name>[^\n]*) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
ROW = re.compile(r"^\| `(?P<key>[^`]+)` \|.*\| (?P<text>[^|]*?) *\|$", re.MULTILINE)
#: Folders without Python packages in them.
FOLDERS = {
    "docs": "What the README leaves out.",
    "notebooks": "Read what the pipelines wrote; they compute nothing heavy.",
    "clients": "Evaluation harnesses, unmodified, against the endpoint: `make test-clients`.",
    "tests": "On the embedded pair, a real Ray cluster, real HTTP and a real MLflow store.",
}
#: What commands leave behind in a checkout.
LEFT_BEHIND = {"runs", "build", "__pycache__"}
COLUMN, WIDTH = 30, 118


def generate(path: Path) -> str:
    """The document with its generated parts as they should be."""
    text = path.read_text()

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        body = tree() if name == "tree" else settings(name.removeprefix("settings").strip(), match["body"])
        return f"{match[1]}{body}\n{match[4]}"

    return PART.sub(part, text)


def tree() -> str:
    """Every folder and module, with the first sentence of its docstring (a package's: the first paragraph)."""
    lines: list[str] = []
    for folder in sorted(path for path in REPOSITORY.iterdir() if path.is_dir() and _counts(path)):
        lines += _branch(folder, 0)
    return "\n".join(["```", *lines, "```"])


def _counts(path: Path) -> bool:
    return not path.name.startswith(".") and not path.name.endswith(".egg-info") and path.name not in LEFT_BEHIND


def _branch(folder: Path, depth: int) -> Iterator[str]:
    yield from _entry(f"{folder.name}/", _folder_says(folder), depth)
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.suffix in (".py", ".yaml") and path.name != "__init__.py":
            yield from _entry(path.name, first_sentence(path), depth + 1)
        elif path.is_dir() and _counts(path) and any(path.glob("*.py")):
            yield from _branch(path, depth + 1)
        elif path.is_dir() and any(path.glob("*.yaml")):
            for recipe in sorted(path.rglob("*.yaml")):
                yield from _entry(str(recipe.relative_to(folder)), first_sentence(recipe), depth + 1)


def _folder_says(folder: Path) -> str:
    return FOLDERS[folder.name] if folder.name in FOLDERS else first_paragraph(folder / "__init__.py")


def _entry(name: str, says: str, depth: int) -> list[str]:
    wrapped = textwrap.wrap(says, WIDTH - COLUMN) or [""]
    first = f"{'  ' * depth + name:<{COLUMN - 1}} {wrapped[0]}".rstrip()
    return [first, *(" " * COLUMN + line for line in wrapped[1:])]


def first_sentence(path: Path) -> str:
    """Of a module's docstring, or of the comment that a recipe begins with; "" where there is none."""
    if path.suffix == ".yaml":
        first = path.read_text().split("\n", 1)[0]
        return first.removeprefix("#").split(":  ")[0].strip() if first.startswith("#") else ""
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", first_paragraph(path))[0]


def first_paragraph(module: Path) -> str:
    """Of a module's docstring; "" where there is none."""
    docstring = ast.get_docstring(ast.parse(module.read_text())) if module.is_file() else None
    return " ".join((docstring or "").split("\n\n")[0].split())


def settings(section: str, old: str) -> str:
    """The table of one section of the recipe, or of the settings outside sections for ""; descriptions are taken from
    `old`."""
    kept = {row["key"]: row["text"] for row in ROW.finditer(old)}
    path = {"path": ""}
    whole = Recipe.model_validate({"name": "", "slm": path, "teacher": path})
    model = getattr(whole, section) if section else whole
    rows = list(_rows(model, section and f"{section}.", nested=bool(section)))
    lines = [f"| `{key}` | {default} | {allowed} | {kept.get(key, '')} |" for key, default, allowed in rows]
    return "\n".join(["| setting | default | takes | what it is |", "|---|---|---|---|", *lines])


def _rows(model: BaseModel, prefix: str, nested: bool) -> Iterator[tuple[str, str, str]]:
    schema = type(model).model_json_schema()["properties"]
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            if nested:
                yield from _rows(value, f"{prefix}{name}.", nested)
            continue
        default = "required" if field.is_required() else f"`{json.dumps(_plain(value))}`"
        yield f"{prefix}{name}", default, _takes(schema[name])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _takes(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in a few words."""
    if "anyOf" in schema:
        return " or ".join(_takes(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_takes(schema['items'])}"
    word = {"string": "text", "boolean": "true, false", "object": "name: value"}.get(schema["type"], schema["type"])
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return f"{word} {', '.join(f'{sign} {schema[key]:g}' for key, sign in bounds.items() if key in schema)}".rstrip()


def documents() -> list[Path]:
    return [path for path in sorted((REPOSITORY / "docs").glob("*.md")) if PART.search(path.read_text())]


if __name__ == "__main__":
    for document in documents():
        document.write_text(generate(document))
