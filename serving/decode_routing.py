"""Which replica of an engine a decode's calls go to: always the same one, where its prefix is.

A decode of collaboration makes many small calls. Each carries its whole prefix, so any replica could answer it; but one
that has not seen the prefix reads it anew, and keeps a slot for it. A gateway so gives each decode one replica of every
engine that it calls: the one that has the fewest of its decodes. Serve's router for a handle runs in the process of the
handle, where it finds the `Decode` by its id. Serve takes a copy of this module there, so what is shared stands in
`decodes`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serving.decodes import Decode, running

if TYPE_CHECKING:
    from ray.serve._private.common import RequestMetadata


class DecodeRouter(FIFOMixin, RequestRouter):
    """Serve's router of an engine. A call whose `session_id` is a decode's goes to that decode's replica; another one
    goes to the less busy of two."""

    def initialize_state(self, **_: Any) -> None:
        self._held: defaultdict[ReplicaID, WeakSet[Decode]] = defaultdict(WeakSet)

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
            kept = self._fewest(there.keys() - decode.lost or there.keys())
            decode.replicas[deployment] = kept
            self._held[kept].add(decode)
            for gone in self._held.keys() - there.keys():
                del self._held[gone]
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

    def _fewest(self, replicas: Collection[ReplicaID]) -> ReplicaID:
        return min(replicas, key=lambda replica: (self._running(replica), random.random()))

    def _running(self, replica: ReplicaID) -> int:
        """How many decodes of this gateway the replica has."""
        return sum(decode.replicas.get(self._deployment_id.name) == replica for decode in self._held[replica])


# Serve types its arguments as dicts, whatever they are.
ROUTING = RequestRouterConfig(request_router_class=DecodeRouter)  # type: ignore[arg-type]
