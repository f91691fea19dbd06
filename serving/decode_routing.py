"""Which replica of an engine a decode's calls go to: always the same one, where its prefix is.

A decode of collaboration makes many small calls. Each carries its whole prefix, so any replica could answer it; but one
that has not seen the prefix reads it anew, and keeps a slot for it. A gateway so gives each decode one replica of every
engine that it calls: the one that has the fewest of its decodes. Serve's router for a handle runs in the process of the
handle, where it finds the `Decode` by its id. Serve takes a copy of this module there, so what is shared stands in
`decodes`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serving.decodes import held, running

if TYPE_CHECKING:
    from ray.serve._private.common import RequestMetadata


class DecodeRouter(FIFOMixin, RequestRouter):
    """Serve's router of an engine. A call whose `session_id` is a decode's goes to that decode's replica; another one
    goes to the less busy of two."""

    async def choose_replicas(
        self, candidate_replicas: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if not candidate_replicas:
            return []
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        decode = running(pending_request.metadata.session_id) if pending_request is not None else None
        if decode is None:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        there = {replica.replica_id: replica for replica in candidate_replicas}
        deployment = self._deployment_id.name
        kept = decode.replicas.get(deployment)
        if kept not in there:
            decodes = held(deployment)
            open_to_it = there.keys() - decode.lost or there.keys()
            kept = min(open_to_it, key=lambda replica: (decodes[replica], random.random()))
            decode.replicas[deployment] = kept
        return [[there[kept]]]

    def _get_pending_request_matching_metadata(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        """Which call takes the replica that was chosen for a call of that metadata: the first of the same decode that
        still waits. Serve tells calls apart by the id of their request, which all calls of a request share."""
        session = request_metadata.session_id if request_metadata is not None else None
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata.session_id == session and not pending.future.done():
                return pending
        return None


# Serve types its arguments as dicts, whatever they are.
ROUTING = RequestRouterConfig(request_router_class=DecodeRouter)  # type: ignore[arg-type]
