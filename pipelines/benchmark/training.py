"""What was asked of the teacher to train the models that policies decode with, as what was trained records it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t_models.artifact import read_provenance
from s2t_models.hosting import alongside, trained_engines
from s2t_models.provenance import TeacherTokens
from s2t_models.recipe import Recipe


def teacher_tokens(recipe: Recipe, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, TeacherTokens]:
    """By policy, for those whose engines, router or second pass the recipe names and whose records say it; `settings`
    is what the endpoint says of each. Raises as `read_provenance` does."""
    engines = trained_engines(recipe)
    beside_slm = {"r2r": recipe.router.path, "tah": recipe.tah}
    beside_slm |= {alongside("r2r", name): folder for name, folder in recipe.routers.items()}
    found = {}
    for policy, said in settings.items():
        folders = [engines.get(engine) for engine in said.get("needs", ())] + [beside_slm.get(said.get("kind", policy))]
        records = [read_provenance(folder) for folder in folders if folder]
        costs = [record.teacher for record in records if record and record.teacher]
        if costs:
            found[policy] = sum(costs, TeacherTokens())
    return found
