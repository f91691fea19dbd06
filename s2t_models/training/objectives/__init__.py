"""What `s2t distil` can train, by name. To add an objective, write its file here and name its class below."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from s2t_models.errors import UserError

if TYPE_CHECKING:
    from s2t_models.training.objectives.base import Objective
    from s2t_models.training_settings import DistilSettings

#: Name -> module:class. Modules are imported when they are used, so that listing the names needs no torch.
OBJECTIVES = {
    "selector": "s2t_models.training.objectives.selector:SelectorObjective",
    "kd": "s2t_models.training.objectives.kd:KdObjective",
    "tah": "s2t_models.training.objectives.tah:TahObjective",
    "distil": "s2t_models.training.objectives.two_stage:TwoStageObjective",
    "tsd-kd": "s2t_models.training.objectives.tsd_kd:TsdKdObjective",
    "head-only": "s2t_models.training.objectives.head_only:HeadOnlyObjective",
    "pointwise": "s2t_models.training.objectives.pointwise:PointwiseObjective",
    "listmle": "s2t_models.training.objectives.listmle:ListMleObjective",
    "soft-labels": "s2t_models.training.objectives.soft_labels:SoftLabelsObjective",
}


def objective(name: str, settings: DistilSettings) -> Objective:
    """The objective of that name. Raises UserError where there is none."""
    if name not in OBJECTIVES:
        raise UserError(f"no objective {name!r}; there are: {', '.join(OBJECTIVES)}")
    module, _, kind = OBJECTIVES[name].partition(":")
    return getattr(import_module(module), kind)(settings)
