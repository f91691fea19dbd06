"""Collaborative S2T drafting in chunks against step by step, on the same engines: the same texts, fewer teacher
forwards.

    python -m benchmarks.collaboration [--items 12] [--chunk 16] [--budgets 0.01 0.05 0.10 0.20]

Every prompt is decoded by both sides in turn, so that the machine's moods fall on both, one request at a time. Besides
the wall clock the table gives the process's CPU seconds, which other programs do not disturb. Thresholds are the
percentiles of the SLM's greedy texts on calibration problems.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import defaultdict
from dataclasses import replace

import torch

from s2t_models import chat, loading
from s2t_models.calibration import calibrate
from s2t_models.embedded.generator import problems
from s2t_models.engines.contract import Sampling, Usage
from s2t_models.engines.load import load
from s2t_models.hosting import host, pair
from s2t_models.policies import policy
from s2t_models.policies.base import Decoded, Engines, Policy, Request, gather
from s2t_models.policies.collaborate import Collaborate
from s2t_models.policies.triggers import DivergenceTrigger, Drafted
from s2t_models.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cluster/recipes/embedded.yaml")
    parser.add_argument("--items", type=int, default=12)
    parser.add_argument("--calibration", type=int, default=60, help="calibration problems")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01, 0.05, 0.10, 0.20])
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(args.recipe, [f"policies.chunk={args.chunk}"])
    tokenizer = loading.load_tokenizer(recipe.slm)
    running = {name: load(hosted) for name, hosted in pair(recipe).items()}
    engines = Engines(dict(running), tokenizer.decode, tokenizer.encode)

    def requests(split: str, count: int) -> list[Request]:
        chats = [[{"role": "user", "content": problem.question}] for problem in problems(split, count)]  # type: ignore[arg-type]
        prompts = [chat.prompt_ids(tokenizer, messages) for messages in chats]
        return [Request(prompt, args.max_tokens) for prompt in prompts]

    values = asyncio.run(_divergences(engines, requests("calibration", args.calibration)))
    hosting = replace(host(recipe), thresholds={"kl": calibrate(values, args.budgets)})
    print(
        f"{'budget':<8}{'side':<10}{'seconds':>9}{'CPU':>8}{'teacher forwards':>18}{'SLM forwards':>14}"
        f"{'triggered':>11}"
    )
    for budget in args.budgets:
        chunked = policy(f"s2t@{budget:g}", hosting)
        assert isinstance(chunked, Collaborate)
        _compare(engines, {"chunks": chunked, "steps": replace(chunked, chunk=1)}, requests("test", args.items), budget)
    for engine in running.values():
        engine.close()


async def _divergences(engines: Engines, requests: list[Request]) -> list[float]:
    async def one(request: Request) -> list[float]:
        draft = await engines["slm"].generate(request.prompt, Sampling(request.max_tokens, support=64))
        judgement = await DivergenceTrigger(0.0).judge(
            engines, Drafted(request.prompt, draft.ids, draft.supported, 0, 0, 0)
        )
        return judgement.values_T.tolist()

    return [value for values in await asyncio.gather(*map(one, requests)) for value in values]


def _compare(engines: Engines, sides: dict[str, Policy], requests: list[Request], budget: float) -> None:
    texts: dict[str, list[Decoded]] = defaultdict(list)
    wall: dict[str, float] = defaultdict(float)
    cpu: dict[str, float] = defaultdict(float)
    for request in requests:
        for side, decoder in sides.items():
            began, worked = time.perf_counter(), time.process_time()
            texts[side].append(asyncio.run(gather(decoder.decode(engines, request))))
            wall[side] += time.perf_counter() - began
            cpu[side] += time.process_time() - worked
    forwards: dict[str, int] = {}
    for side, decoded in texts.items():
        teacher, slm = (sum((d.usage[name] for d in decoded), Usage()) for name in ("teacher", "slm"))
        forwards[side] = teacher.forwards
        triggered = sum(len(d.decisions) for d in decoded) / sum(len(d.ids) for d in decoded)
        print(
            f"{budget:<8.0%}{side:<10}{wall[side]:>9.2f}{cpu[side]:>8.2f}{teacher.forwards:>18}{slm.forwards:>14}"
            f"{triggered:>11.1%}"
        )
    equal = sum(a.ids == b.ids for a, b in zip(*texts.values(), strict=True))
    quicker, cheaper, fewer = (part["steps"] / part["chunks"] for part in (wall, cpu, forwards))
    print(
        f"{'':<8}{'ratio':<10}{quicker:>8.2f}x{cheaper:>7.2f}x{fewer:>17.2f}x   "
        f"texts equal: {equal} of {len(requests)}\n"
    )


if __name__ == "__main__":
    main()
