"""Python code out of a response, made into a whole program (HumanEval, section C.1 of the paper).

Markdown and prose are taken off. Of what is left the asked function is kept, and what it needs: the syntax tree tells,
wherever in the text a helper stands; tests, examples and calls of `input()` are not run. Whether the program works is
for `sandbox`.
"""

from __future__ import annotations

import ast
import re
import symtable
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from s2t_models.answers.final_answer import END_OF_TURN

_FENCE = re.compile(r" *(`{3,}|~{3,}) *\{?\.?([\w+-]*)\}?( [^`]*)?")
#: A fence on the same line as the code it opens or closes.
_FENCE_BEFORE_CODE = re.compile(r"^( *```(?:python)? *)(?=(?:def|from|import|class|return|async) |@)", re.MULTILINE)
_FENCE_BEHIND_CODE = re.compile(r"^( *[^`\n ][^`\n]*)```$", re.MULTILINE)
_PYTHON = (
    "",
    "python",
    "py",
    "python3",
    "py3",
    "python2",
    "pycon",
    "ipython",
    "code",
    "text",
    "plaintext",
    "plain",
    "txt",
)
_CODE_START = re.compile(r"[ \t]*(?:from\s+\S+\s+import\s|import\s+\w|def\s+\w|async\s+def\s|class\s+\w|@\w)")
_MOST_FENCES = 40  # more are no answer but a loop
_MOST_CUTS = 60  # attempts at prose behind the code
_MOST_PARSED = 1_000_000  # characters, over all attempts
_MOST_ENDS = 8  # fences that may end one block
_LONGEST = 100_000  # characters
_FUNCTION_OR_CLASS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_UNPARSABLE = (
    SyntaxError,
    ValueError,
    RecursionError,
    MemoryError,
)  # ValueError: such as an integer of too many digits


def program(response: str, prompt: str, entry_point: str) -> str:
    """A program that defines `entry_point`: the response's function with all it needs behind the prompt's imports and
    helpers, or the prompt completed.

    Args:
        prompt: the problem's own text, ending inside the function to be written.
    """
    _, closed, after = response.rpartition("</think>")
    said = after if closed and after.strip() else response
    text = _with_plain_whitespace(END_OF_TURN.split(said, maxsplit=1)[0] or said)
    blocks = list(_blocks(text.split("\n")))
    for block in (*reversed(blocks), text):
        if code := _defining(block, entry_point):
            others = [_parsable_start(other) for other in blocks if other is not block]
            return _joined(_preamble(prompt, entry_point), code, others, entry_point)
    return _completed(prompt, [*blocks[:1], text], entry_point)


def _with_plain_whitespace(text: str) -> str:
    """Line ends as \\n, indentation without tabs or no-break spaces."""
    text = (
        text[:_LONGEST].replace("\r\n", "\n").replace("\r", "\n").translate(dict.fromkeys(map(ord, "\ufeff\u200b\0")))
    )
    text = text.encode(errors="replace").decode()  # half a character, which no parser takes
    text = _FENCE_BEHIND_CODE.sub(r"\1\n```", _FENCE_BEFORE_CODE.sub(r"\1\n", text))
    return re.sub(r"^[ \t\u00a0]+", lambda run: run[0].replace("\u00a0", " ").expandtabs(4), text, flags=re.MULTILINE)


def _blocks(lines: list[str]) -> Iterator[str]:
    """The fenced blocks of Python. A block ends at the first fence with which it is whole: one in a docstring does not
    end it."""
    fences = [(number, found) for number, line in enumerate(lines) if (found := _FENCE.fullmatch(line))][:_MOST_FENCES]
    following = 0
    for number, opening in fences:
        if number < following:
            continue
        closings = [
            other
            for other, fence in fences
            if other > number and fence[1][:3] == opening[1][:3] and len(fence[1]) >= len(opening[1]) and not fence[2]
        ][:_MOST_ENDS]
        bodies = {end: textwrap.dedent("\n".join(lines[number + 1 : end])) for end in closings}
        end = next((end for end, body in bodies.items() if _parsed(body) is not None), (closings or [len(lines)])[0])
        following = end + 1
        if opening[2].lower() in _PYTHON:
            yield bodies.get(end) or textwrap.dedent("\n".join(lines[number + 1 : end]))


def _parsed(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model's own code, such as an invalid escape
            return ast.parse(code)
    except _UNPARSABLE:
        return None


def _parsable_start(code: str) -> str:
    """The code without what follows it and does not parse: prose, or a last line that was cut off."""
    for _ in range(min(_MOST_CUTS, _MOST_PARSED // (len(code) + 1) + 2)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(code)
            return code
        except SyntaxError as error:
            lines = code.split("\n")
            code = "\n".join(lines[: min((error.lineno or 1) - 1, len(lines) - 1)])
        except _UNPARSABLE:
            break
    return ""


def _defining(text: str, name: str) -> str | None:
    """The part of the text that is Python and defines the name at its top level, or None."""
    whole = textwrap.dedent(text)
    if _defines(whole, name):
        return whole
    lines = text.split("\n")
    defined = re.compile(rf"[ \t]*(?:async\s+)?def\s+{re.escape(name)}\s*\(|{re.escape(name)}\s*=")
    first = next((number for number, line in enumerate(lines) if _CODE_START.match(line)), None)
    places = [number for number, line in enumerate(lines) if defined.match(line)][-3:]
    for start in dict.fromkeys([*([] if first is None else [first]), *reversed(places)]):
        code = _parsable_start(textwrap.dedent("\n".join(_no_less_indented(lines[start:]))))
        if _defines(code, name):
            return code
    return None


def _no_less_indented(lines: list[str]) -> list[str]:
    """The lines up to the first one that is indented less than the first."""
    indent = len(lines[0]) - len(lines[0].lstrip())
    end = next(
        (number for number, line in enumerate(lines) if line.strip() and len(line) - len(line.lstrip()) < indent),
        len(lines),
    )
    return lines[:end]


def _defines(code: str, name: str) -> bool:
    tree = _parsed(code)
    return tree is not None and any(name in _bound(node) for node in tree.body)


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement of the top level binds."""
    if isinstance(node, _FUNCTION_OR_CLASS):
        return {node.name}
    names: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
        elif isinstance(part, ast.alias):
            names.add((part.asname or part.name).split(".")[0])
        elif isinstance(part, _FUNCTION_OR_CLASS):
            names.add(part.name)
    return names


def _globals(table: symtable.SymbolTable) -> set[str]:
    """The global names that a function or class uses, its own functions included."""
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return own.union(*map(_globals, table.get_children()))


@dataclass(frozen=True)
class _Statement:
    """One statement of the top level. `fills` says that it is neither a definition nor an assignment, but may fill a
    table."""

    text: str
    binds: set[str]
    uses: set[str]
    defines: bool
    fills: bool

    @classmethod
    def of(cls, node: ast.stmt, lines: list[str]) -> _Statement:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        text = "\n".join(lines[first - 1 : node.end_lineno])
        try:
            table = symtable.symtable(text, "<response>", "exec")
            uses = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
            uses = uses.union(*map(_globals, table.get_children()))
        except SyntaxError:  # such as a return outside a function
            uses = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        defines = isinstance(node, _FUNCTION_OR_CLASS | ast.Import | ast.ImportFrom)
        return cls(text, _bound(node), uses, defines, not (defines or isinstance(node, ast.Assign)))


def _needed(statements: list[_Statement], name: str) -> list[str]:
    """The statements that define the name and, in turn, what these use, and those that fill a table they use, in their
    order."""
    wanted, tables, kept = {name, "*"}, set[str](), set[int]()
    while True:
        found = [
            index
            for index, statement in enumerate(statements)
            if index not in kept
            and "__name__" not in statement.uses
            and (
                statement.binds & wanted or (statement.fills and statement.uses & tables and name not in statement.uses)
            )
        ]
        if not found:
            return list(dict.fromkeys(statements[index].text for index in sorted(kept)))
        kept.update(found)
        for index in found:
            wanted |= statements[index].uses
        tables |= {name for index in kept if not statements[index].defines for name in statements[index].binds & wanted}


def _joined(preamble: str, code: str, others: list[str], name: str) -> str:
    """The prompt's preamble and the needed part of what all blocks define; imports from __future__ come first."""
    source = "\n".join([*others, code])
    tree = _parsed(source)
    assert tree is not None, "each part parses"
    lines = source.split("\n")
    statements = [_Statement.of(node, lines) for node in tree.body]
    future = [
        statement.text
        for node, statement in zip(tree.body, statements, strict=True)
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    ]
    return "\n".join([*future, preamble, *_needed(statements, name)]) + "\n"


def _preamble(prompt: str, name: str) -> str:
    """The prompt's imports and helpers."""
    start = re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\s*\(", prompt, re.MULTILINE)
    return prompt[: start.start()] if start else ""


def _completed(prompt: str, bodies: list[str], name: str) -> str:
    """The prompt with the function's body. Models leave out the indentation of the first line or of all, or have a line
    of prose before
    it: of the readings that parse, the one that keeps most."""
    readings = []
    for body in (body.strip("\n") for body in bodies):
        readings += [body if body[:1].isspace() else f"    {body}", textwrap.indent(textwrap.dedent(body), "    ")]
        indented = re.search(r"^ ", body, re.MULTILINE)
        if indented and not re.search(r"^(?:def|class)\b", body[: indented.start()], re.MULTILINE):
            readings.append(body[indented.start() :])
    programs = [_parsable_start(f"{prompt.rstrip()}\n{reading}\n") for reading in readings]
    code = max(programs, key=len)
    if not _defines(code, name):
        return f"{prompt.rstrip()}\n{readings[0]}\n"
    return _joined("", code, [], name)
