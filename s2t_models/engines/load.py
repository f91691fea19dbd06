"""The one place where engines are made: collection, R2R's labels, the audit, serving and benchmarks all load through
it.

Which engine runs a model is the key `engine` of that model in the recipe. A further engine is a module with a function
`load(hosted) -> Engine`, a line in `ENGINES`, and where it can tell early what it does not serve, `check(hosted)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from s2t_models import loading
from s2t_models.engines.contract import Capability, Engine, ModelCard
from s2t_models.hosting import Hosted, beside
from s2t_models.recipe import RecipeError
from s2t_models.settings import ModelSettings


@dataclass(frozen=True)
class EngineKind:
    """`module` holds `load`. `plain` are the capabilities with any model; those of `artifact`, `router` and
    `second_pass` come with these."""

    module: str
    plain: frozenset[Capability] = frozenset()
    artifact: frozenset[Capability] = frozenset({"select"})
    router: frozenset[Capability] = frozenset()
    second_pass: frozenset[Capability] = frozenset()


ENGINES: dict[str, EngineKind] = {
    "torch": EngineKind(
        "s2t_models.engines.torch.load",
        plain=frozenset({"entropy", "seeded_noise", "multiplex", "features"}),
        artifact=frozenset({"select", "fused_select"}),
        router=frozenset({"route"}),
        second_pass=frozenset({"second_pass"}),
    ),
    "vllm": EngineKind("s2t_models.engines.vllm.load", plain=frozenset({"entropy", "seeded_noise"})),
}


def kind(hosted: Hosted) -> EngineKind:
    """The kind of engine that the recipe asks for. Raises RecipeError where there is none of that name."""
    name = hosted.settings.engine
    if name not in ENGINES:
        raise RecipeError(f"{hosted.name}: there is no engine {name!r}; the engines are {', '.join(ENGINES)}")
    return ENGINES[name]


def capabilities(hosted: Hosted) -> frozenset[Capability]:
    """What the engine will be able to do beyond the core, known before it is loaded."""
    of = kind(hosted)
    beside = ((of.artifact, hosted.artifact), (of.router, hosted.router), (of.second_pass, hosted.second_pass))
    return of.plain.union(*(with_it for with_it, folder in beside if folder))


def card_of(
    hosted: Hosted, settings: ModelSettings, reserved: Sequence[int], vocabulary: int, context: int
) -> ModelCard:
    """The card of an engine that runs the model of `settings`: the hosted one, or the merged one of its artifact, whose
    `reserved` rows are masked too. A model need not have all rows that are masked in its pair."""
    return ModelCard(
        name=hosted.name,
        weights=loading.weights_hash(settings),
        tokenizer=loading.tokenizer_hash(settings),
        vocabulary=vocabulary,
        context=context,
        end_ids=loading.end_ids(settings),
        masked_ids=tuple(sorted(row for row in {*hosted.masked_ids, *reserved} if row < vocabulary)),
        dtype=settings.dtype,
        engine=hosted.settings.engine,
        router=hosted.router_hash,
        second_pass=hosted.second_pass_hash,
        capabilities=capabilities(hosted),
    )


def weights_behind(card: ModelCard, needed: Collection[Capability]) -> dict[str, str]:
    """sha256 of all weights behind what an engine answered with these capabilities, by name: its model's, and those of
    the router or the second pass beside it (`hosting.beside`)."""
    parts: dict[Capability, tuple[str, str | None]] = {
        "route": ("router", card.router),
        "second_pass": ("second_pass", card.second_pass),
    }
    used = [part for capability, part in parts.items() if capability in needed]
    return {card.name: card.weights} | {beside(card.name, part): digest for part, digest in used if digest}


def check(hosted: Hosted) -> None:
    """Refuse before any process is started what the engine will not serve, as far as it can tell without the weights.
    Raises RecipeError, or the engine's own UserError."""
    module = importlib.import_module(kind(hosted).module)
    if hasattr(module, "check"):
        module.check(hosted)


def load(hosted: Hosted) -> Engine:
    """The engine with its weights. Raises RecipeError where the model cannot be had or the engine does not serve it."""
    engine: Engine = importlib.import_module(kind(hosted).module).load(hosted)
    return engine
