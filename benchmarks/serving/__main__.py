"""What the endpoint does under load, on the embedded generator's problems.

    python -m benchmarks.serving [--recipe runs/demo/recipe.yaml] [--parts closed,open,exact]

It serves the recipe itself, in processes of their own, and asks from this one:

    closed    every policy with 1 to 64 requests at once: rates, first token, time a token, CPU by process
    open      Poisson arrivals at 0.5 to 10 times what the endpoint can do: what is accepted, what is refused, and when
    overhead  CPU of all server processes over that of the engine called directly, in turn
    floor     the same of an endpoint that does nothing: what Serve's own way costs beside the engine
    fairness  a tiny request beside one of 128 choices
    places    what the teacher reads for an answer of S2T, with more decodes at once than the engines have places
    exact     --answers requests, streamed and 64 at once, against the same ones whole and alone
    soak      --minutes of mixed requests while engine replicas are killed at random: no answer may differ from the one
              given alone, and every request has to end, with an answer or a refusal

The exit status is 1 where an answer was not the one given alone, or a request hung or ended otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from s2t_models.commands import run_command

if TYPE_CHECKING:
    from benchmarks.serving.endpoint import ServedEndpoint

T = TypeVar("T")
PARTS = ("closed", "open", "overhead", "floor", "fairness", "places", "exact", "soak")
WIDTHS_OF_OVERHEAD = (16, 64)
WIDTH_OF_EXACT = 64
#: For `places`: so few slots, and decodes at once that fit and that do not.
SLOTS, WIDTHS_OF_PLACES = 8, (4, 24)


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    # As sys.exit would: the endpoint ends with this process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    def work() -> int:
        from benchmarks.serving.endpoint import NOTHING, ServedEndpoint

        few_slots = [f"{model}.slots={SLOTS}" for model in ("slm", "teacher")]
        is_well = True
        for settings, parts in (
            (options.set, [part for part in options.parts if part not in ("places", "floor")]),
            ([*options.set, *few_slots], [part for part in options.parts if part == "places"]),
        ):
            if parts:
                with ServedEndpoint(options.recipe, settings) as endpoint:
                    is_well &= asyncio.run(_measure(endpoint, parts, options))
        if "floor" in options.parts:
            with ServedEndpoint(options.recipe, options.set, NOTHING) as endpoint:
                asyncio.run(_measure_floor(endpoint, options))
        return 0 if is_well else 1

    return run_command("serving", work, resumes=False)


async def _measure(endpoint: ServedEndpoint, chosen: Sequence[str], options: argparse.Namespace) -> bool:
    """Measure those parts; returns whether every answer was the right one."""
    from benchmarks.serving import overhead, parts, soak
    from benchmarks.serving.client import client
    from benchmarks.serving.direct import direct_engine
    from benchmarks.serving.exact import exact
    from s2t_models.recipe import load_recipe

    policies = [policy for policy in options.policies if endpoint.offers(policy)]
    if missing := [policy for policy in options.policies if policy not in policies]:
        print(f"left out, as the recipe does not serve them: {', '.join(missing)}")
    async with client(endpoint.url, options.limit) as asking:
        load = parts.Load(asking, endpoint.processes, options.max_tokens, parts.questions(options.seed))
        if "closed" in chosen:
            await parts.closed(load, policies, options.widths, options.requests)
        if "open" in chosen:
            await parts.opened(load, "greedy", options.rates, options.seconds, options.seed)
        if "overhead" in chosen:
            with direct_engine(load_recipe(options.recipe, options.set)) as direct:
                await overhead.overhead(load, direct, WIDTHS_OF_OVERHEAD, options.requests, options.rounds)
        if "fairness" in chosen:
            await parts.fairness(load, options.requests)
        if "places" in chosen:
            await parts.places(load, "s2t", WIDTHS_OF_PLACES, options.requests)
        is_well = "exact" not in chosen or await exact(load, policies, options.answers, WIDTH_OF_EXACT)
        if "soak" not in chosen:
            return is_well
        kill = soak.kills_engines(endpoint.processes, endpoint.engines())
        soaked = await soak.soak(load, policies, options.minutes, options.width, kill, options.kill_every, options.seed)
        soak.report(soaked, options.minutes, options.width)
        return is_well and soaked.is_well


async def _measure_floor(endpoint: ServedEndpoint, options: argparse.Namespace) -> None:
    from benchmarks.serving import overhead, parts
    from benchmarks.serving.client import client
    from benchmarks.serving.direct import direct_engine
    from s2t_models.recipe import load_recipe

    async with client(endpoint.url, options.limit) as asking:
        load = parts.Load(asking, endpoint.processes, options.max_tokens, parts.questions(options.seed))
        with direct_engine(load_recipe(options.recipe, options.set)) as direct:
            await overhead.floor(load, direct, WIDTHS_OF_OVERHEAD[0], options.requests, options.rounds)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="runs/demo/recipe.yaml", help="a recipe, with an artifact for S2T-Local")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting")
    parser.add_argument("--parts", type=_several(_part), default=list(PARTS))
    parser.add_argument("--policies", type=_several(str), default=["greedy", "sample", "maj@8", "s2t", "s2t-local"])
    parser.add_argument("--widths", type=_several(int), default=[1, 4, 16, 64], help="requests at once, of closed")
    parser.add_argument("--requests", type=int, default=48, help="in each row of a table, at least")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--rates", type=_several(float), default=[0.5, 1, 2, 10], help="of open, times the capacity")
    parser.add_argument("--seconds", type=float, default=30, help="of each rate of open")
    parser.add_argument("--rounds", type=int, default=5, help="of overhead")
    parser.add_argument("--answers", type=int, default=1000, help="of exact")
    parser.add_argument("--minutes", type=float, default=10, help="of the soak")
    parser.add_argument("--width", type=int, default=16, help="requests at once, of the soak")
    parser.add_argument("--kill-every", type=float, default=30, metavar="SECONDS", help="on average, of the soak")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a request hangs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _several(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [kind(part) for part in text.split(",")]


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(PARTS)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
