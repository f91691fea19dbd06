"""What the commands' options share: a recipe, its overrides, and where tracking goes."""

from __future__ import annotations

import argparse
from pathlib import Path

from s2t_models.node_cache import fetched
from s2t_models.storage import Location, StorageError, location


def place(text: str) -> Location:
    """The type of options that name a file or folder, by path or URI."""
    try:
        return location(text)
    except StorageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def here(folder: Location | None) -> Path | None:
    """A folder of inputs on this machine: itself, or fetched once where it is in an object store."""
    return folder if folder is None else fetched(folder)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """`--recipe` and `--set`, for `load_recipe`."""
    parser.add_argument(
        "--recipe",
        required=True,
        help="the model pair with all settings: a YAML file, by path or URI, or a shipped name",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting of the recipe"
    )


def add_tracking(parser: argparse.ArgumentParser) -> None:
    """`--tracking`."""
    parser.add_argument(
        "--tracking", metavar="URI", help="MLflow store (default: $MLFLOW_TRACKING_URI, then runs/mlflow.db)"
    )
