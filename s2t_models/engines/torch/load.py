"""From what a recipe hosts to a running torch engine."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from s2t_models import loading
from s2t_models.artifact import Artifact
from s2t_models.engines.load import card_of
from s2t_models.engines.selector import Selector
from s2t_models.engines.torch import families
from s2t_models.engines.torch.engine import TorchEngine, context_setting
from s2t_models.hosting import Hosted
from s2t_models.router import load_router
from s2t_models.second_pass import SecondPass


def load(hosted: Hosted) -> TorchEngine:
    """An engine over a model, or over the merged model of an artifact with its trigger head. Raises RecipeError where
    there is no such model, UnsupportedModel where it cannot be served exactly."""
    artifact = Artifact.load(hosted.artifact) if hosted.artifact else None
    settings = artifact.model(hosted.settings) if artifact else hosted.settings
    model = loading.load_model(settings)
    reserved = artifact.card.reserved_ids if artifact else ()
    selector = Selector.of(artifact, model.device) if artifact else None
    context = settings.context or families.default_context(model)
    card = card_of(hosted, settings, reserved, int(model.config.vocab_size), context)
    router = load_router(hosted.router) if hosted.router else None
    second = SecondPass.load(hosted.second_pass) if hosted.second_pass else None
    decode = loading.decoder(hosted.settings)
    return TorchEngine(model, card, settings.slots, selector, router, decode, second)


def check(hosted: Hosted) -> None:
    """Refuse what its configuration alone shows cannot be served: no weights are read. Raises as `load` does."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loading.load_config(hosted.settings))
    context = hosted.settings.context or families.default_context(model)
    families.check_configuration(model, context, context_setting(hosted.name))
