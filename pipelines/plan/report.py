"""A plan in words: a table a stage, then the verdict."""

from __future__ import annotations

from pipelines.plan.card import GIB, Card
from pipelines.plan.stages import Plan, Stage
from s2t_models.costs import ModelCost


def report(plan: Plan) -> tuple[str, bool]:
    """The text, and whether every stage fits."""
    card, recipe, stages = plan.card, plan.recipe, plan.stages()
    models = (("slm", plan.slm), ("teacher", plan.teacher))
    lines = [
        f"{recipe.name} on {card}",
        *(_model(name, cost) for name, cost in models),
        f"  assumed  prompts of {plan.assumed.prompt} tokens, answers of {plan.assumed.share:.0%} of their limit; "
        f"{plan.answer:.0f} in collect (--prompt-tokens, --answer-share)",
    ]
    changes: dict[str, list[str]] = {}
    for stage in stages:
        lines += ["", *_table(stage, card)]
        if needed := stage.changes(card):
            changes[stage.name] = needed
            lines += [f"  DOES NOT FIT: {change}" for change in needed]
    hours, disk = sum(stage.seconds for stage in stages) / 3600, sum(stage.disk for stage in stages)
    disk += plan.slm.weights + plan.teacher.weights
    if changes:
        verdict = "does not fit: " + "; ".join(f"{name}: {', '.join(said)}" for name, said in changes.items())
    else:
        verdict = "every stage fits"
    lines += ["", f"{verdict}; about {hours:.2g} hours, {disk / GIB:.1f} GiB of disk with the models' weights"]
    return "\n".join(lines), not changes


def _model(name: str, cost: ModelCost) -> str:
    settings = cost.settings
    return (
        f"  {name:<8} {cost.parameters / 1e9:.3f}B parameters, {cost.weights / GIB:.2f} GiB in {settings.dtype}; cache "
        f"{cost.cache(settings.slots) / GIB:.2f} GiB ({settings.slots} slots of {cost.context})  {settings.path}"
    )


def _table(stage: Stage, card: Card) -> list[str]:
    lines = [f"== {stage.name}"]
    for process in stage.processes:
        room = card.memory * min(process.gpus or 1.0, 1.0) if card.is_gpu else card.memory
        parts = "  ".join(f"{name} {size / GIB:.2f}" for name, size in process.parts.items())
        times = f"{process.count} x " if process.count > 1 else ""
        lines.append(f"  {process.name:<16} {times}{process.total / GIB:6.2f} of {room / GIB:.1f} GiB   {parts}")
    lines += [f"  {name:<16} {said}" for name, said in stage.work.items()]
    return lines
