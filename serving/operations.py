"""What a gateway answers to those who run it: health, life, metrics; and how it ends.

`Operated` is a base of the gateway, and `router` its routes. It knows nothing of requests' contents.
"""

import contextlib
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, Metric
from pydantic_core import to_jsonable_python
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from s2t_models.hosting import Hosting
from serving import metrics
from serving.admission import Admission
from serving.engine_deployment import RemoteEngine
from serving.errors import ApiError
from serving.front import Rules
from serving.keys import Keys
from serving.limits import AFTER_DRAINING_S
from serving.readiness import Readiness

#: How long the other replicas of the gateway may take to say what they have counted.
OTHERS_WITHIN_S = 3.0
# Routes here, as in the gateway, are pickled by Serve: their annotations have to be objects.
router = APIRouter()


class Operated:
    """A gateway that can be operated; its constructor calls `operate`."""

    def operate(self, hosting: Hosting, engines: dict[str, RemoteEngine], keys: Keys, admission: Admission) -> None:
        """Go by the recipe's `serving` section, and answer for these engines and what waits for them."""
        self.rules = Rules(hosting.recipe.serving, keys, admission)
        self._readiness = Readiness({name: engine.answering for name, engine in engines.items()})
        self._about = {"recipe": hosting.recipe.name, "digest": hosting.digest}

    @router.get("/health")
    async def health(self) -> Response:
        """Readiness: which recipe is served, and each engine's card. 503 where an engine does not answer, or the
        server is ending."""
        if self.rules.traffic.draining:
            return self._unwell("draining", "this server is ending", {})
        cards = await self._readiness.cards()
        silent = [name for name, card in cards.items() if card is None]
        # In one order: a benchmark keeps its answers by what is said here.
        engines = {
            name: to_jsonable_python(card) | {"capabilities": sorted(card.capabilities)}
            for name, card in cards.items()
            if card is not None
        }
        if silent:
            return self._unwell("unavailable", f"no answer from {', '.join(silent)}", engines)
        return JSONResponse({"status": "ok", **self._about, "engines": engines})

    @router.get("/livez")
    async def livez(self) -> Response:
        """Liveness: this gateway's own process answers, whatever its engines do."""
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def metrics_page(self) -> Response:
        """The metrics of all replicas of the gateway, for Prometheus."""
        own = serve.get_replica_context()
        counted = {own.replica_tag: metrics.counted()}
        gateway = serve.get_deployment_handle(own.deployment, own.app_name)
        with contextlib.suppress(RayError, RayServeException, TimeoutError):  # then this one's have to do
            answers = await gateway.broadcast("counted").results_async(
                timeout_s=OTHERS_WITHIN_S, return_exceptions=True
            )
            counted |= dict(answer for answer in answers if not isinstance(answer, BaseException))
        return Response(metrics.page(counted), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def counted(self) -> tuple[str, list[Metric]]:
        """This replica's name and what it has counted."""
        return serve.get_replica_context().replica_tag, metrics.counted()

    async def drain(self) -> None:
        """Let no more requests in."""
        self.rules.traffic.draining = True

    async def in_flight(self) -> int:
        """How many requests are being answered."""
        return self.rules.traffic.in_flight

    async def check_health(self) -> None:
        """Serve replaces a gateway whose event loop does not come round to this."""

    def _unwell(self, status: str, message: str, engines: dict[str, Any]) -> Response:
        error = ApiError(503, message, kind="server_error", code=status, retry_after=AFTER_DRAINING_S)
        return JSONResponse(
            {"status": status, **self._about, "engines": engines, **error.body()}, 503, headers=error.headers
        )
