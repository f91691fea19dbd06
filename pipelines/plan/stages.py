"""The stages of a recipe: the processes of each with what they hold, the work, and what to change where one does not
fit. Pure arithmetic over a recipe, a card and the costs of its models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipelines.plan.card import GIB, Card
from pipelines.tasks import task
from s2t_models.costs import ModelCost, TrainingCost, training_cost
from s2t_models.engines.torch.calls import STRETCH
from s2t_models.engines.torch.engine import TOKENS_A_FORWARD
from s2t_models.hosting import LOCAL, alongside
from s2t_models.recipe import Recipe
from s2t_models.settings import ModelSettings
from s2t_models.training import objectives
from s2t_models.training.objectives.base import Objective
from s2t_models.training.per_state import LOGITS

#: Float32 copies of a chunk's logits that a loss over the vocabulary holds at once.
LOGIT_COPIES = 6
#: Bytes that the caches of the allocators and of kernels take beside what is counted, as a share of it.
SLACK = 0.05
#: The smallest micro-batch that is proposed.
LEAST_MICRO_BATCH = 256
#: What is trained unless something else is asked for: the method, and its control.
TRAININGS = ("selector", "kd")
#: Problems a task is taken to have where the recipe asks all of them.
ITEMS = 500
#: Bytes a step in a shard beside its candidates, and a candidate: an id and two log-probabilities.
STEP_BYTES, CANDIDATE_BYTES = 20, 12
#: GPUs that tensor parallelism is planned for at most: those of one machine.
MOST_PARALLEL = 8


@dataclass(frozen=True)
class Assumed:
    """Mean tokens of a prompt, and of an answer as a share of its limit."""

    prompt: int = 150
    share: float = 0.6


@dataclass(frozen=True)
class Process:
    """`count` processes alike: bytes by what they are for, and the share of a card that each is given. `change` says
    what to set so that one fits into some bytes."""

    name: str
    parts: dict[str, float]
    device: str
    gpus: float
    gpus_key: str
    change: Callable[[float], str]
    count: int = 1

    @property
    def total(self) -> float:
        return sum(self.parts.values()) * (1 + SLACK)


@dataclass(frozen=True)
class Stage:
    """`work` holds what there is to do in words, `seconds` how long it takes, `disk` the bytes that stay."""

    name: str
    processes: list[Process]
    work: dict[str, str]
    seconds: float
    disk: float = 0.0

    def changes(self, card: Card) -> list[str]:
        """What to set so that the stage fits; none where it does. On a CPU machine all its processes share the memory;
        a process on a GPU has its share of one card."""
        if not card.is_gpu:
            spare = card.memory - sum(process.total * process.count for process in self.processes)
            if spare >= 0:
                return []
            largest = max(self.processes, key=lambda process: process.total)
            return [largest.change(largest.total + spare / largest.count)]
        found = []
        for process in self.processes:
            if process.device == "cpu":
                continue
            if process.gpus == 0:
                found.append(f"{process.gpus_key} 0 -> 1 (Ray hides the card from a process that asks for none)")
            room = card.memory * min(process.gpus or 1.0, 1.0)
            if process.total > room:
                whole = process.total <= card.memory
                found.append(f"{process.gpus_key} {process.gpus:g} -> 1" if whole else process.change(room))
        return found


class Plan:
    """The stages of a recipe on a card, among them one for each objective of `trainings`. Raises UserError where there
    is no such objective."""

    def __init__(
        self, recipe: Recipe, card: Card, assumed: Assumed = Assumed(), trainings: Sequence[str] = TRAININGS
    ) -> None:
        self.recipe, self.card, self.assumed = recipe, card, assumed
        self.trainings: dict[str, Objective] = {name: objectives.objective(name, recipe.distil) for name in trainings}
        self.slm, self.teacher = ModelCost(recipe.slm), ModelCost(recipe.teacher)
        self.answer = assumed.share * recipe.collect.max_new_tokens

    def stages(self) -> list[Stage]:
        return [
            self.collect(),
            *map(self.distil, self.trainings),
            self.serve(),
            self.benchmark(),
        ]

    # What processes hold.

    def engine(
        self, name: str, role: str, batch: int, reads: int, settings: ModelSettings, count: int, gpus: float, key: str
    ) -> Process:
        """An engine that writes for `batch` calls at once and reads log-probabilities of `reads` tokens at once. Its
        logits are in the model's precision; of a stretch of them float32 copies are made. Of a vLLM engine on several
        cards this is one card's part; quantised weights are counted whole."""
        cost = self.slm if role == "slm" else self.teacher
        cards = _cards(settings)
        gpus = settings.gpus if settings.engine == "vllm" else gpus
        width = cost.vocabulary
        tokens = max(TOKENS_A_FORWARD, cost.context) if reads else max(TOKENS_A_FORWARD, self.assumed.prompt)
        itemsize = cost.dtype.itemsize
        thinks = name == "slm" and self.recipe.tah is not None
        logits = max(batch * width * (itemsize + 12), reads * width * itemsize + min(reads, STRETCH) * width * 8)
        parts = {
            "overhead": self.card.overhead,
            "weights": cost.weights / cards,
            "cache": cost.cache(settings.slots, second=thinks) / cards,
            "forward": self.forward(cost, tokens),
            "logits": logits,
        }

        def change(room: float) -> str:
            rest = sum(parts.values()) - parts["cache"]
            slots = int((room / (1 + SLACK) - rest) * cards / cost.cache(1, second=thinks))
            if settings.engine == "vllm" and slots < settings.slots:
                divided = parts["weights"] + parts["cache"]
                spare = room / (1 + SLACK) - (sum(parts.values()) - divided)
                parallel = settings.vllm.tensor_parallel
                needed = parallel
                while spare > 0 and divided * parallel / needed > spare and needed < MOST_PARALLEL:
                    needed *= 2
                if needed > parallel:
                    return f"{role}.vllm.tensor_parallel {parallel} -> {needed}"
            if slots >= 1:
                return f"{role}.slots {settings.slots} -> {slots}"
            least = (rest + cost.cache(1, second=thinks)) * (1 + SLACK) / GIB
            return f"{role}: {least:.0f} GiB with one slot; take a card that holds them, or a smaller {role}"

        return Process(name, parts, settings.device, gpus, key, change, count)

    def forward(self, cost: ModelCost, tokens: float) -> float:
        """Bytes of the widest layer at work in a forward of which nothing is kept."""
        layer = cost.model.config
        wide = max(getattr(layer, "intermediate_size", None) or 4 * layer.hidden_size, cost.head // cost.vocabulary)
        return tokens * (3 * wide + 6 * layer.hidden_size) * cost.dtype.itemsize

    def trainer(self, objective: str) -> Process:
        recipe, settings = self.recipe, self.recipe.distil
        cost = self.training
        itemsize = self.slm.dtype.itemsize
        hidden = self.slm.model.config.hidden_size
        kind = self.trainings[objective]
        longest = self.packed(kind.needs_leaves, recipe.collect.max_new_tokens)
        tokens = max(settings.micro_batch, longest)
        parts = {
            "overhead": self.card.overhead,
            "weights": float(self.slm.weights),
            "trained": 16.0 * cost.trained,  # factors, gradients and AdamW's two moments, in float32
            "activations": tokens * (cost.checkpointed if settings.gradient_checkpointing else cost.activations),
            "logits": LOGIT_COPIES * 4.0 * max(LOGITS, self.slm.vocabulary),
            "states": 3.0 * settings.micro_batch * hidden * itemsize,
        }
        if kind.needs_base and not self.card.is_gpu:  # the base's states are kept in the machine's memory
            whole = recipe.collect.prompts * self.answer * hidden * itemsize
            parts["base states"] = min(settings.base_cache_gb * GIB, whole)
        if kind.on_policy:
            parts |= self.beside(tokens)
            parts["rollouts"] = max(self.writers(recipe.slm.slots) - parts["activations"] - parts["logits"], 0.0)

        def change(room: float) -> str:
            spare = room / (1 + SLACK) - (sum(parts.values()) - parts["activations"] - parts.get("rollouts", 0.0))
            if kind.on_policy and self.writers(recipe.slm.slots) > (free := spare + parts["logits"]):
                slots = int((free - self.writers(0)) / self.slm.cache(1))
                if slots >= 1:
                    return f"slm.slots {recipe.slm.slots} -> {slots}"
                least = (sum(parts.values()) - parts["rollouts"]) * (1 + SLACK) / GIB
                return f"distil: {least:.0f} GiB with the teacher beside; take a card with more, or a smaller teacher"
            for checkpointing in (False, True):
                if settings.gradient_checkpointing and not checkpointing:
                    continue
                fitting = int(spare / (cost.checkpointed if checkpointing else cost.activations))
                fitting -= fitting % LEAST_MICRO_BATCH if fitting > LEAST_MICRO_BATCH else 0
                if fitting >= max(longest, LEAST_MICRO_BATCH):
                    said = f"distil.micro_batch {settings.micro_batch} -> {min(fitting, settings.micro_batch)}"
                    turned = checkpointing and not settings.gradient_checkpointing
                    if not turned:
                        return said
                    kept = "" if fitting >= settings.micro_batch else f", {said}"
                    return f"distil.gradient_checkpointing false -> true{kept}"
            return (
                f"distil: the longest trajectory, {longest:.0f} packed tokens, does not fit; "
                "lower collect.max_new_tokens, collect.steps or collect.k"
            )

        name = f"distil {objective}"
        return Process(name, parts, recipe.slm.device, settings.num_gpus, "distil.num_gpus", change, settings.workers)

    def beside(self, tokens: float) -> dict[str, float]:
        """What the teacher takes that reads the tuned model's own texts, on a worker's device."""
        if self.card.is_gpu and self.recipe.teacher.device == "cpu":
            return {}
        states = self.recipe.distil.micro_batch * self.teacher.model.config.hidden_size * self.teacher.dtype.itemsize
        return {
            "teacher": float(self.teacher.weights),
            "teacher forward": self.forward(self.teacher, tokens) + states,
        }

    def writers(self, slots: int) -> float:
        """Bytes of the engine that writes these texts, of a copy of the model: it is gone when a batch's activations
        and logits are there."""
        return self.slm.weights + self.slm.cache(slots) + self.forward(self.slm, TOKENS_A_FORWARD)

    @cached_property
    def training(self) -> TrainingCost:
        length = round(self.packed(True, self.answer))
        return training_cost(self.slm, self.recipe.distil.lora, self.recipe.reserved.count, length)

    def packed(self, leaves: bool, answer: float) -> float:
        """Tokens of a trajectory in training: prompt, answer, and with `leaves` its candidates."""
        collect = self.recipe.collect
        candidates = answer * min(collect.steps + collect.random_steps, 1.0) * collect.k
        return self.assumed.prompt + answer + (candidates if leaves else 0)

    # The stages.

    def collect(self) -> Stage:
        collect, assumed = self.recipe.collect, self.assumed
        limit, prompts = collect.max_new_tokens, collect.prompts + self.recipe.calibration.prompts
        batch = min(self.recipe.slm.slots, collect.rollout.batch)
        processes = [
            self.engine(
                "rollout",
                "slm",
                batch,
                0,
                self.recipe.slm,
                collect.rollout.actors,
                collect.rollout.num_gpus,
                "collect.rollout.num_gpus",
            ),
            self.engine(
                "label",
                "teacher",
                0,
                limit,
                self.recipe.teacher,
                collect.label.actors,
                collect.label.num_gpus,
                "collect.label.num_gpus",
            ),
        ]
        written, read = prompts * self.answer, prompts * (assumed.prompt + self.answer)
        rolling = self.writing(self.slm, prompts, self.answer, batch) + written * self.slm.vocabulary * self.card.entry
        rolling /= collect.rollout.actors * _cards(self.recipe.slm)
        flops = self.teacher.flops(read, (assumed.prompt + self.answer) / 2, written)
        labelling = self.card.seconds(flops)
        if collect.writer == "s2t":  # a forward a draft, for as many texts at once as are written
            forwards = self.writing(self.teacher, collect.prompts, self.answer / collect.chunk, batch)
            labelling = max(labelling, forwards)
        labelling /= collect.label.actors * _cards(self.recipe.teacher)
        kept = min(collect.steps + collect.random_steps, 1.0) * collect.k * CANDIDATE_BYTES
        work = {
            "rollouts": f"{_count(prompts)} prompts, {_count(written)} tokens, {_hours(rolling)}",
            "labels": f"{_count(read)} tokens, {flops / 1e15:.3g} PFLOP, {_hours(labelling)}",
            "teacher": f"reads {_count(read)} tokens, writes none"
            + (", and reads on in drafts that are cut" if collect.writer == "s2t" else ""),
            "disk while it runs": f"{written * (STEP_BYTES + collect.k * CANDIDATE_BYTES) / GIB:.2f} GiB",
        }
        shared = not self.card.is_gpu or sum(process.gpus for process in processes) <= 1
        seconds = rolling + labelling if shared else max(rolling, labelling)
        return Stage("collect", processes, work, seconds, written * (STEP_BYTES + kept))

    def distil(self, objective: str) -> Stage:
        settings, cost, kind = self.recipe.distil, self.training, self.trainings[objective]
        trunk = self.assumed.prompt + self.answer
        packed, batches = self.packed(kind.needs_leaves, self.answer), settings.steps * settings.batch
        trajectories = self.recipe.collect.prompts
        held = (
            settings.base_cache_gb * GIB / (self.answer * self.slm.model.config.hidden_size * self.slm.dtype.itemsize)
        )
        # The base reads a trajectory once where its states are kept, and each time where they find no room.
        misses = 1 - min(held * settings.workers / trajectories, 1.0)
        base = misses * batches + (1 - misses) * min(trajectories, batches) if kind.needs_base else 0
        forward = self.slm.flops(packed, trunk / 2, 0)
        # Forward, gradients of the activations, and again the forward with checkpointing; the frozen weights get none.
        times = 3 if settings.gradient_checkpointing else 2
        flops = batches * (times * forward + 6 * packed * cost.trained)
        flops += base * self.slm.flops(trunk, trunk / 2, 0)
        # Both models' logits at each state, and the tuned one's gradient.
        flops += 3 * batches * self.answer * 2 * self.slm.head
        entries = batches * self.answer * self.slm.vocabulary
        work = {}
        seconds = entries * self.card.entry
        if kind.on_policy:
            flops += self.teacher.flops(batches * trunk, trunk / 2, batches * self.answer)
            at_once = min(self.recipe.slm.slots, settings.tsd_kd.refresh * settings.batch // settings.workers)
            writing = self.writing(self.slm, batches, self.answer, max(at_once, 1))
            seconds += writing
            work["rollouts"] = f"{_count(batches * self.answer)} tokens, {_hours(writing / settings.workers)}"
            work["teacher"] = f"reads {_count(batches * trunk)} tokens, writes none"
        seconds = (seconds + self.card.seconds(flops, stepwise=True)) / settings.workers
        tokens = batches * packed
        work |= {
            "training": f"{settings.steps} steps of {settings.batch} trajectories, {_count(tokens)} packed tokens, "
            f"{flops / 1e15:.3g} PFLOP, {_hours(seconds)}",
            "parameters": f"{_count(cost.trained)} trained of {_count(self.slm.parameters)}",
            "activations": f"{cost.activations / 1e6:.2f} MB a token, {cost.checkpointed / 1e6:.2f} with checkpointing",
        }
        disk = self.slm.weights + 2 * 12 * cost.trained  # what comes out, and two checkpoints while it runs
        return Stage(f"distil {objective}", [self.trainer(objective)], work, seconds, disk)

    def serve(self) -> Stage:
        recipe = self.recipe
        slots, policies = recipe.benchmark.concurrency, recipe.benchmark.policies
        limit = max(self.limit(name) for name in recipe.benchmark.task)
        roles = {"slm": "slm", "teacher": "teacher", LOCAL: "slm"}
        roles |= dict.fromkeys([*recipe.checkpoints, *(["kd"] if "kd" in policies else [])], "slm")
        named = ((LOCAL, recipe.artifacts), ("slm", recipe.routers))
        beside = [alongside(engine, name) for engine, names in named for name in names]
        roles |= dict.fromkeys(beside, "slm")
        processes = []
        for name, role in roles.items():
            settings = getattr(recipe, role)
            batch = min(slots, settings.slots)
            reads = limit if name == "teacher" else 0
            processes.append(
                self.engine(
                    name, role, batch, reads, settings, settings.num_replicas, settings.num_gpus, f"{role}.num_gpus"
                )
            )
        work = {"beside": f"{', '.join(beside)}: the SLM's weights and cache once more each"} if beside else {}
        return Stage("serve", processes, work, 0.0)

    def benchmark(self) -> Stage:
        bench, prompt = self.recipe.benchmark, self.assumed.prompt
        batch = {role: min(getattr(self.recipe, role).slots, bench.concurrency) for role in ("slm", "teacher")}
        seconds = read = written = 0.0
        for name in bench.task:
            answer = self.assumed.share * self.limit(name)
            answers = (bench.items or ITEMS) * len(bench.seeds)
            for policy in bench.policies:
                if policy.startswith("llm"):
                    seconds += self.writing(self.teacher, answers, answer, batch["teacher"])
                    read, written = read + answers * prompt, written + answers * answer
                    continue
                votes = int(policy.split("@")[1]) if policy.startswith("maj@") else 1
                seconds += self.writing(self.slm, answers * votes, answer, batch["slm"])
                if policy.startswith(("takeover", "s2t", "specreason", "r2r")) and not policy.startswith("s2t-local"):
                    read += answers * (prompt + answer)
                    flops = self.teacher.flops(answers * (prompt + answer), (prompt + answer) / 2)
                    seconds += self.card.seconds(flops)
        work = {
            "answers": f"{len(bench.task)} tasks x {len(bench.policies)} policies x {bench.items or ITEMS} items x "
            f"{len(bench.seeds)} seeds, {_hours(seconds)}",
            "teacher": f"reads {_count(read)} tokens, writes {_count(written)}",
        }
        return Stage("benchmark", [], work, seconds)

    def limit(self, name: str) -> int:
        """The most tokens of an answer to a task."""
        own = task(name).max_new_tokens
        return min(self.recipe.benchmark.max_new_tokens or own, own)

    def writing(self, cost: ModelCost, answers: float, answer: float, batch: int) -> float:
        """Seconds of writing answers, `batch` at a time: each step reads the weights and the cache so far once."""
        seen = self.assumed.prompt + answer / 2
        read = (cost.body + cost.head) * cost.dtype.itemsize + batch * seen * cost.cache(1) / cost.context
        step = self.card.seconds(cost.flops(batch, seen), read, cost.layers, stepwise=True)
        prompts = self.card.seconds(cost.flops(answers * self.assumed.prompt, self.assumed.prompt / 2, answers))
        return answers * answer / batch * step + prompts


def _cards(settings: ModelSettings) -> float:
    """Cards that share the work of one engine."""
    return max(settings.gpus, 1) if settings.engine == "vllm" else 1


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def _hours(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
