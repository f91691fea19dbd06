"""The decodes that run in a gateway, each with the replicas that its calls go to."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass, field

from ray.serve.request_router import ReplicaID

#: Those of this process, by id.
_running: dict[str, Decode] = {}


@dataclass(eq=False)
class Decode:
    """One decode, which runs inside its `with` block. `replicas` are those that it has been given, by deployment;
    `lost` are those that ended under it."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    replicas: dict[str, ReplicaID] = field(default_factory=dict)
    lost: set[ReplicaID] = field(default_factory=set)

    def __enter__(self) -> Decode:
        _running[self.id] = self
        return self

    def __exit__(self, *_: object) -> None:
        del _running[self.id]

    def lose(self, deployment: str) -> None:
        """Its replica of the deployment has ended: the next call goes to another one, where there is one."""
        if replica := self.replicas.pop(deployment, None):
            self.lost.add(replica)


def running(identity: str) -> Decode | None:
    """The decode of that id, while it runs."""
    return _running.get(identity)


def held(deployment: str) -> Counter[ReplicaID | None]:
    """How many decodes each replica of the deployment has."""
    # A list at once: Serve's router may have a thread of its own.
    return Counter(decode.replicas.get(deployment) for decode in list(_running.values()))
