"""The decodes of a gateway, each with the replicas that its calls go to."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from ray.serve.request_router import ReplicaID

#: Those of this process that have not ended, by id.
_decodes: WeakValueDictionary[str, Decode] = WeakValueDictionary()


@dataclass(eq=False)
class Decode:
    """One decode in a gateway, from its place to its end. `replicas` are those that it has been given, by deployment;
    `lost` are those that ended under it."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    replicas: dict[str, ReplicaID] = field(default_factory=dict)
    lost: set[ReplicaID] = field(default_factory=set)

    def __post_init__(self) -> None:
        _decodes[self.id] = self

    def lose(self, deployment: str) -> None:
        """Its replica of the deployment has ended: the next call goes to another one, where there is one."""
        if replica := self.replicas.pop(deployment, None):
            self.lost.add(replica)

    def end(self) -> None:
        """It calls no more: its replicas are free for others."""
        self.replicas.clear()


def running(identity: str) -> Decode | None:
    """The decode of that id, while it runs."""
    return _decodes.get(identity)
