"""Python code out of a response, made into a whole program (HumanEval, section C.1 of the paper).

Markdown and prose are taken off, and what follows the asked function at the top level is cut. Whether the program works is for `sandbox`.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings

_FENCE = re.compile(r"```[ \t]*([\w+-]*)[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_CODE_START = re.compile(r"^(?:from\s+\S+\s+import|import\s+\w|def\s+\w|async\s+def|class\s+\w|@\w)", re.MULTILINE)
_TOP_LEVEL = re.compile(r"^[^\s#)\]}]", re.MULTILINE)


def _defines(code: str, name: str) -> re.Match[str] | None:
    return re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\s*\(", code, re.MULTILINE)


def _block(response: str, entry_point: str) -> str:
    """The fenced block that defines the function, else the first one; without fences, the text from the first line of code on."""
    blocks = [
        body for language, body in _FENCE.findall(response) if language.lower() in ("", "python", "py", "python3")
    ]
    if blocks:
        return next((block for block in blocks if _defines(textwrap.dedent(block), entry_point)), blocks[0])
    definition = _defines(response, entry_point)
    if definition is None:
        return response
    first = _CODE_START.search(response)
    assert first is not None
    return response[min(first.start(), definition.start()) :]


def _through_function(code: str, definition: re.Match[str], name: str) -> str:
    """The code up to the end of the function; by its lines' indentation where the whole does not parse (prose behind the code)."""
    try:
        tree = _parsed(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        signature_end = _signature_end(code, definition.start())
        following = _TOP_LEVEL.search(code, code.find("\n", signature_end) + 1 or len(code))
        return code[: following.start()] if following else code
    functions = (
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    )
    return "".join(code.splitlines(keepends=True)[: next(functions).end_lineno])


def _parsed(code: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model's own code, such as an invalid escape
        return ast.parse(code)


def _signature_end(code: str, start: int) -> int:
    """Where the parameter list that opens after `start` closes."""
    depth = 0
    for index in range(code.index("(", start), len(code)):
        depth += (code[index] in "([{") - (code[index] in ")]}")
        if depth == 0:
            return index
    return len(code) - 1


def program(response: str, prompt: str, entry_point: str) -> str:
    """A program that defines `entry_point`: the response's function behind the prompt's imports and helpers, or the prompt completed.

    Args:
        prompt: the problem's own text, ending inside the function to be written.
    """
    code = _block(response.replace("\r\n", "\n").replace("\t", "    "), entry_point)
    if not _defines(code, entry_point) and _defines(textwrap.dedent(code), entry_point):
        code = textwrap.dedent(code)
    if definition := _defines(code, entry_point):
        start = _defines(prompt, entry_point)
        preamble = prompt[: start.start()] if start else ""
        return preamble + "\n" + _through_function(code, definition, entry_point) + "\n"
    return _completed(prompt, code.strip("\n"))


def _completed(prompt: str, body: str) -> str:
    """The prompt with the function's body. Models leave out the indentation of the first line or of all: of the readings that parse, the one
    that keeps most."""
    readings = [body] if body[:1].isspace() else [f"    {body}", textwrap.indent(body, "    ")]
    programs = []
    for reading in readings:
        stop = _TOP_LEVEL.search(reading)
        programs.append(prompt.rstrip("\n") + "\n" + (reading[: stop.start()] if stop else reading) + "\n")
    return max(programs, key=lambda program: (_parses(program), len(program)))


def _parses(program: str) -> bool:
    try:
        _parsed(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
