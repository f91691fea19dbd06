"""Command lines as they stand in files and documents: parsed by what would run them, without running it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from pipelines.cli import COMMANDS, main
from s2t_models.recipe import Recipe, load_recipe


def known_command(command: list[str]) -> Recipe | None:
    """Parse a command as it would be run, up to its work; returns its recipe, where it has one."""
    program, *arguments = command
    assert program == "s2t"
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_command", lambda *_, **__: 0)
        assert main(arguments) == 0
    options = [(key, arguments[at + 1]) for at, key in enumerate(arguments[:-1])]
    recipes = [value for key, value in options if key == "--recipe"]
    return load_recipe(recipes[0], [value for key, value in options if key == "--set"]) if recipes else None


def ray_start() -> Any:
    from ray.scripts.scripts import start

    return start
