"""What a point is measured by: verdicts on each task, and how far its model has moved from the base.

Engines and policies run in this process, all questions of a task at once. What was measured is kept as a record a
(point, task, policy).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import get_args

import numpy as np
import torch

from benchmarks.label_efficiency.choosing import ChosenBy
from benchmarks.label_efficiency.plan import KD, REFERENCES, SYSTEMS, Experiment, Point
from benchmarks.label_efficiency.training import Outcome, train
from benchmarks.label_efficiency.work import Job
from pipelines.analyse.errors import Place, first_wrong
from pipelines.benchmark.questions import load_items
from pipelines.runtime.records import NewLines, RecordLog
from pipelines.tasks import Item, Task
from s2t_models import chat, loading
from s2t_models.divergence import divergence
from s2t_models.engines.contract import Engine
from s2t_models.engines.load import load
from s2t_models.errors import UserError, one_line
from s2t_models.hosting import Hosting, host
from s2t_models.policies import policy
from s2t_models.policies.base import Decoded, Engines, Request, all_of, gather
from s2t_models.recipe import Recipe
from s2t_models.threads import use_threads

BASE = Point("base")


@dataclass(frozen=True)
class Case:
    """One thing to measure; `items` is a hash of the items that are asked."""

    point: Point
    task: str
    items: str
    policy: str


@dataclass(frozen=True)
class Measured:
    """A case with what came of it: whether each answer is right, in the order of the items; how many were cut off at
    their limit, and the share of the tokens that were decided at triggered steps. `drift` is KL(base || trained) in
    nats a token on what the base writes to the same items, and `outcome` what the training took; they are None for what
    was not trained. `first_wrong` counts the wrong answers of a policy with a trigger by where they first go wrong;
    `length` is the mean of an answer, in tokens. `ids` are the texts, kept of the base alone."""

    case: Case
    correct: list[bool]
    truncated: int
    triggered: float
    drift: float | None = None
    outcome: Outcome | None = None
    first_wrong: dict[Place, int] | None = None
    length: float | None = None
    ids: list[list[int]] | None = None


def questions(experiment: Experiment) -> list[tuple[Task, list[Item]]]:
    """The tasks with the items that are asked; made once a process."""
    return _load_items(experiment.recipe.model_dump_json())


@cache
def _load_items(recipe: str) -> list[tuple[Task, list[Item]]]:
    return load_items(Recipe.model_validate_json(recipe), None)


def cases(experiment: Experiment, points: Sequence[Point]) -> list[Case]:
    """All there is to measure."""
    asked = [(task.name, _digest(items)) for task, items in questions(experiment)]
    return [
        Case(point, task, items, name)
        for point in points
        for task, items in asked
        for name in experiment.policies(point)
    ]


def known(experiment: Experiment) -> dict[Case, Measured]:
    """What has been measured."""
    found = {}
    for line in NewLines(experiment.folder / "points")():
        record = json.loads(line)
        case = Case(**record["case"] | {"point": Point(**record["case"]["point"])})
        outcome = record["outcome"] and Outcome(**record["outcome"])
        found[case] = Measured(**record | {"case": case, "outcome": outcome})
    return found


def measure(experiment: Experiment, missing: Sequence[Case]) -> list[Measured]:
    """Train the point of these cases where that is not done, and measure them; each is kept as soon as it is known.
    Raises UserError."""
    use_threads(1)
    point = missing[0].point
    try:
        outcome = train(experiment, point) if point.system in SYSTEMS else None
    except ValueError as error:
        raise UserError(f"{point.name} cannot be trained: {one_line(error)}") from error
    return asyncio.run(_measure(experiment, missing, outcome))


def line(job: Job, measured: Sequence[Measured]) -> str:
    """What a job of `measure` came to, in percent right."""
    said = (f"{one.case.policy} on {one.case.task} {100 * float(np.mean(one.correct)):.1f}" for one in measured)
    return f"{job.name}: {', '.join(said)}"


async def _measure(experiment: Experiment, missing: Sequence[Case], outcome: Outcome | None) -> list[Measured]:
    point, hosting = missing[0].point, _hosting(experiment, missing[0].point)
    asked = {task.name: (task, items) for task, items in questions(experiment)}
    policies = {case.policy: policy(case.policy, hosting) for case in missing}
    (trained,) = {engine for one in policies.values() for engine in one.needs}
    chooses, triggers = point.from_kd == "choice", outcome is not None and experiment.selects(point)
    beside = {"slm": outcome is not None, "teacher": triggers, KD: chooses}
    tokenizer, log = loading.load_tokenizer(hosting.tokenizer), RecordLog(experiment.folder / "points")
    before, drift = known(experiment), dict[str, float]()
    found: list[Measured] = []
    with _running(hosting, {trained} | {name for name, is_asked in beside.items() if is_asked}) as engines:
        if chooses:
            engines.by_name[trained] = ChosenBy(engines[trained], engines[KD])
        for case in missing:
            task, items = asked[case.task]
            prompts = [chat.prompt_ids(tokenizer, item.prompt) for item in items]
            if outcome and task.name not in drift:
                texts = before[replace(case, point=BASE, policy=REFERENCES[BASE.system])].ids or []
                drift[task.name] = await _drift(experiment, engines["slm"], engines[trained], prompts, texts)
            requests = [Request(prompt, task.max_new_tokens) for prompt in prompts]
            answers = await all_of(gather(policies[case.policy].decode(engines, one)) for one in requests)
            verdicts = [
                task.grade(engines.decode(answer.ids), item, answer.finish).verdict
                for answer, item in zip(answers, items, strict=True)
            ]
            wrong = [n for n, verdict in enumerate(verdicts) if verdict == "wrong"]
            one = Measured(
                case=case,
                correct=[verdict == "correct" for verdict in verdicts],
                truncated=verdicts.count("truncated"),
                triggered=sum(len(answer.decisions) for answer in answers) / sum(len(answer.ids) for answer in answers),
                drift=drift.get(task.name),
                outcome=outcome,
                first_wrong=await _first_wrong(engines["teacher"], [(prompts[n], answers[n]) for n in wrong])
                if triggers
                else None,
                length=float(np.mean([len(answer.ids) for answer in answers])),
                ids=[answer.ids for answer in answers] if point == BASE else None,
            )
            log.append(asdict(one))
            found.append(one)
    return found


def _hosting(experiment: Experiment, point: Point) -> Hosting:
    """The recipe with what was trained: the artifact, with `kd` beside it where that chooses, or a checkpoint by the
    name of its objective."""
    recipe = experiment.recipe_of(point)
    if point.system in SYSTEMS:
        product, objective = str(experiment.model(point)), SYSTEMS[point.system].objective
        chooser = {KD: str(experiment.model(point.kd))} if point.kd and point.from_kd == "choice" else {}
        selects = experiment.selects(point)
        named = {"artifact": product, "checkpoints": chooser} if selects else {"checkpoints": {objective: product}}
        recipe = recipe.model_copy(update=named)
    return host(recipe)


@contextmanager
def _running(hosting: Hosting, names: Collection[str]) -> Iterator[Engines]:
    tokenizer, running = loading.load_tokenizer(hosting.tokenizer), {}
    with ExitStack() as closing:
        for name in names:
            running[name] = load(hosting.engines[name])
            closing.callback(running[name].close)
        yield Engines(running, loading.decoder(hosting.tokenizer), tokenizer.encode)


async def _drift(
    experiment: Experiment, base: Engine, trained: Engine, prompts: Sequence[list[int]], texts: Sequence[list[int]]
) -> float:
    """KL(base || trained) in nats, mean over all steps of the base's texts."""
    settings = experiment.recipe.divergence

    async def one(prompt: list[int], ids: list[int]) -> torch.Tensor:
        tokens, start = prompt + ids[:-1], len(prompt)
        own = (await base.score(tokens, start, np.array(ids)[:, None], settings.support)).support
        assert own is not None
        other = await trained.score(tokens, start, own.ids_TN)
        return divergence(torch.from_numpy(own.logprobs_TN), torch.from_numpy(other.logprobs_TN), settings.tail)

    kl = await all_of(one(prompt, ids) for prompt, ids in zip(prompts, texts, strict=True))
    return float(torch.cat(kl).mean())


async def _first_wrong(teacher: Engine, wrong: Sequence[tuple[list[int], Decoded]]) -> dict[Place, int]:
    """Where these answers to their prompts first go wrong by the teacher, which reads each once."""

    async def one(prompt: list[int], answer: Decoded) -> Place:
        ids_T1 = np.array(answer.ids)[:, None]
        read = await teacher.score(prompt + answer.ids[:-1], len(prompt), ids_T1)
        return first_wrong(np.exp(read.logprobs_TN[:, 0]), [{"step": decision.step} for decision in answer.decisions])

    places = await all_of(one(prompt, answer) for prompt, answer in wrong)
    return {place: places.count(place) for place in get_args(Place)}


def _digest(items: Sequence[Item]) -> str:
    return hashlib.sha256("\n".join(item.uid for item in items).encode()).hexdigest()[:12]
