"""The wheel: what is in it, and that the commands run from it where there is no checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its `build` folder beside what it builds, and would take old files from
    one."""
    folder = tmp_path_factory.mktemp("wheel")
    leave_out = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    source = shutil.copytree(REPOSITORY, folder / "source", ignore=leave_out)
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that holds the wheel, and sees the packages of this one but not its editable
    install."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path from a .pth file is only searched: the .pth files that lie there, the editable install's among them, are
    # not read.
    (packages / "these.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(wheel):
    files = set(ZipFile(wheel).namelist())
    wings = {"cluster", "pipelines", "serving", "s2t_models"}
    metadata = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {name.split("/")[0] for name in files} == {*wings, metadata}
    assert f"{metadata}/licenses/LICENSE" in files
    sources = [path for wing in wings for path in (REPOSITORY / wing).rglob("*.py")]
    data = [
        *REPOSITORY.glob("cluster/recipes/**/*.yaml"),
        *REPOSITORY.glob("s2t_models/embedded/weights/*/*"),
        *REPOSITORY.glob("serving/playground/assets/*"),
        REPOSITORY / "pipelines/paper/matrix.yaml",
        REPOSITORY / "pipelines/paper/paper_tables.csv",
    ]
    assert data
    assert {path.relative_to(REPOSITORY).as_posix() for path in sources + data} <= files
    assert not [name for name in files if re.search(r"(^|/)(test|conftest|benchmarks)", name)]


def test_the_commands_and_the_embedded_pair_work_outside_a_checkout(installed, tmp_path):
    assert run(installed / "s2t", "--help", cwd=tmp_path).startswith("usage: s2t")
    assert run(installed / "s2t", "demo", "--help", cwd=tmp_path).startswith("usage: s2t demo")
    script = (
        "from s2t_models import loading\n"
        "from s2t_models.recipe import load_recipe\n"
        "recipe = load_recipe('embedded')\n"
        "model, tokenizer = loading.load_model(recipe.slm), loading.load_tokenizer(recipe.slm)\n"
        "print(loading.__file__, recipe.name, model.num_parameters() > 500_000, len(tokenizer) > 100)"
    )
    where, *found = run(installed / "python", "-c", script, cwd=tmp_path).split()
    assert Path(where).is_relative_to(installed.parent)
    assert found == ["embedded", "True", "True"]


def test_a_constraint_for_each_dependency_is_in_its_range_and_names_no_build():
    """A local version such as +cpu would pin one build of torch; without it the CPU's and CUDA's both do."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    tried = dict(line.split("==") for line in lines)
    assert not [line for line in lines if "+" in line]
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        assert requirement.specifier.contains(tried[canonicalize_name(requirement.name)]), requirement
