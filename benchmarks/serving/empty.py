"""An endpoint that does nothing, deployed as `serving.app` deploys a real one: what Serve itself costs a request.

    python -m benchmarks.serving.empty --recipe cluster/recipes/embedded.yaml --set serving.port=8080

Its gateway reads a request, calls one engine over a handle and writes what came; its engine waits as long as an answer
takes. There is no model, no tokenizer and no policy.
"""

import argparse
import asyncio
import signal
import sys
from types import FrameType
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from s2t_models.engines.contract import Draft, Sampling, Usage
from s2t_models.recipe import load_recipe
from serving import cluster, port
from serving.app import LOGGING, MAX_ONGOING_REQUESTS, NAME
from serving.lifecycle import GATEWAY

#: The tokens of a prompt and of an answer, and how long one takes with sixteen at once on two cores.
PROMPT, ANSWER, ANSWER_S = 100, 90, 1.0

# As in `serving.gateway`: Serve pickles the app, and annotations of routes have to be objects.
app = FastAPI()


class Engine:
    async def call(self, method: str, arguments: tuple[Any, ...]) -> Draft:
        await asyncio.sleep(ANSWER_S)
        return Draft(list(range(ANSWER)), "length", Usage(decode=ANSWER))


@serve.ingress(app)
class Gateway:
    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine.options(_by_reference=False)

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        await request.body()
        draft = await self._engine.call.remote("generate", (list(range(PROMPT)), Sampling(ANSWER)))
        message = {"role": "assistant", "content": "word " * len(draft.ids)}
        usage = {"prompt_tokens": PROMPT, "completion_tokens": len(draft.ids)}
        return JSONResponse({"choices": [{"index": 0, "message": message}], "usage": usage, "s2t": {"usage": {}}})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.empty")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit()

    signal.signal(signal.SIGTERM, end)
    cluster.start()
    port.start_serve(load_recipe(options.recipe, options.set).serving, LOGGING)
    ours: dict[str, Any] = {
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "ray_actor_options": {"num_cpus": 0},
        "logging_config": LoggingConfig(**LOGGING),
    }
    engine = serve.deployment(Engine, name="slm", **ours).bind()
    serve.run(serve.deployment(Gateway, name=GATEWAY, **ours).bind(engine), name=NAME)
    signal.pause()


if __name__ == "__main__":
    main()
