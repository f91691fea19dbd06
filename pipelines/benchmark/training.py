"""What was asked of the teacher to train the models that policies decode with, as what was trained records it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t_models.artifact import read_provenance
from s2t_models.hosting import beside, trained_folders
from s2t_models.provenance import TeacherTokens
from s2t_models.recipe import Recipe

#: What runs beside the SLM for a kind of policy.
_BESIDE = {"r2r": "router", "tah": "second_pass"}


def teacher_tokens(recipe: Recipe, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, TeacherTokens]:
    """By policy, for those whose engines, router or second pass the recipe names and whose records say it; `settings`
    is what the endpoint says of each. Raises as `read_provenance` does."""
    trained, found = trained_folders(recipe), {}
    for policy, said in settings.items():
        engines, part = said.get("needs", ()), _BESIDE.get(str(said.get("kind") or policy).partition(":")[0])
        names = [*engines, *(beside(engine, part) for engine in engines if part)]
        folders = [trained.get(name) for name in names]
        records = [read_provenance(folder) for folder in folders if folder]
        costs = [record.teacher for record in records if record and record.teacher]
        if costs:
            found[policy] = sum(costs, TeacherTokens())
    return found
