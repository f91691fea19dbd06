"""S2T-Local's latency against greedy decoding, on the same engine, at budgets 1, 2, 5, 10 and 20%.

    python -m benchmarks.local_latency [--artifact runs/demo/artifact] [--items 12] [--rounds 5]

Both sides decode the same number of tokens from the same prompts, in turn, so that the machine's moods fall on both.
The table gives milliseconds a token and the median of the rounds' ratios, one request at a time (the paper's Table A14)
and with the engine full. Without an artifact the SLM carries an untrained head: its cost is the same, what it picks is
not.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from s2t_models import chat, loading
from s2t_models.embedded.generator import problems
from s2t_models.engines.contract import Decision, Draft, Sampling, Selection
from s2t_models.engines.selector import Selector
from s2t_models.engines.torch.engine import TorchEngine
from s2t_models.engines.torch.load import load
from s2t_models.hosting import Hosted
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.reserved import bins, reserved_rows
from s2t_models.settings import CandidateSettings, ModelSettings
from s2t_models.trigger import TriggerHead

BUDGETS = (0.01, 0.02, 0.05, 0.10, 0.20)
TOKENS = 60  # fewer than most answers take: past their end the trigger is not itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cluster/recipes/embedded.yaml")
    parser.add_argument("--artifact", type=Path, default=Path("runs/demo/artifact"))
    parser.add_argument("--items", type=int, default=12, help="prompts a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a served engine with one CPU
    recipe = load_recipe(args.recipe)
    engine = _engine(recipe, args.artifact)
    tokenizer = loading.load_tokenizer(recipe.slm)
    prompts = [
        chat.prompt_ids(tokenizer, [{"role": "user", "content": problem.question}])
        for problem in problems("calibration", args.items)
    ]
    asyncio.run(_compare(engine, prompts, args.rounds))
    engine.close()


def _engine(recipe: Recipe, artifact: Path) -> TorchEngine:
    settings: ModelSettings = recipe.slm
    if artifact.is_dir():
        engine = load(Hosted("s2t-local", settings, artifact=artifact))
        print(f"engine: {artifact}")
    else:
        model = loading.load_model(settings)
        reserved = reserved_rows(recipe)
        base = load(Hosted("slm", settings, reserved))
        card = asyncio.run(base.card())
        base.close()
        torch.manual_seed(0)
        head = TriggerHead(model.config.hidden_size, recipe.trigger_head.hidden)
        ranking_head = None if reserved else torch.randn(recipe.reserved.count, model.config.hidden_size)
        values = bins(len(reserved) or recipe.reserved.count)
        selector = Selector(head, torch.tensor(reserved), values, ranking_head)
        engine = TorchEngine(model, card, settings.slots, selector)
        print(f"engine: the SLM with an untrained head ({artifact} is not there)")
    # Texts that end early would be compared by their luck: nothing ends a text here.
    engine._card = replace(engine._card, end_ids=())
    return engine


async def _threshold(engine: TorchEngine, prompts: list[list[int]], budget: float) -> float:
    """The threshold at which `budget` of S2T-Local's own steps trigger: its texts are not those of greedy decoding."""

    async def decisions(threshold: float) -> list[Decision]:
        selection = Selection(threshold, CandidateSettings(k=8, method="top_k"))
        drafts = await asyncio.gather(*(engine.generate_selecting(p, Sampling(TOKENS), selection) for p in prompts))
        return [decision for draft in drafts for decision in draft.decisions]

    values = [decision.value for decision in await decisions(-1e9)]
    low, high = min(values), max(values)
    for _ in range(12):
        middle = (low + high) / 2
        above = len(await decisions(middle)) > budget * TOKENS * len(prompts)
        low, high = (middle, high) if above else (low, middle)
    return high


async def _compare(engine: TorchEngine, prompts: list[list[int]], rounds: int) -> None:
    thresholds = [await _threshold(engine, prompts, budget) for budget in BUDGETS]

    async def greedy(prompt: list[int]) -> Draft:
        return await engine.generate(prompt, Sampling(TOKENS))

    def selecting(threshold: float):  # type: ignore[no-untyped-def]
        selection = Selection(threshold, CandidateSettings(k=8, method="top_k"))
        return lambda prompt: engine.generate_selecting(prompt, Sampling(TOKENS), selection)

    sides = {"greedy": greedy} | {f"S2T-Local {b:.0%}": selecting(t) for b, t in zip(BUDGETS, thresholds, strict=True)}
    for name, width in (("one at a time", 1), (f"{len(prompts)} at a time", len(prompts))):
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        triggered: dict[str, float] = {}
        for _ in range(rounds + 1):
            for side, decode in sides.items():
                began, decisions = time.perf_counter(), 0
                for first in range(0, len(prompts), width):
                    drafts = await asyncio.gather(*(decode(p) for p in prompts[first : first + width]))
                    decisions += sum(len(draft.decisions) for draft in drafts)
                seconds[side].append(time.perf_counter() - began)
                triggered[side] = decisions / (TOKENS * len(prompts))
        print(f"\n{name:<16}{'steps triggered':>16}{'ms a token':>12}{'ratio to greedy':>17}")
        for side, times in seconds.items():
            ratios = [a / b for a, b in zip(times[1:], seconds["greedy"][1:], strict=True)]  # the first round warms up
            ms = 1000 * statistics.median(times[1:]) / (TOKENS * len(prompts))
            print(f"{side:<16}{triggered[side]:>16.1%}{ms:>12.2f}{statistics.median(ratios):>17.3f}")


if __name__ == "__main__":
    main()
