"""How many requests a gateway can hold, told to Serve's proxy, which refuses further ones at once.

A refusal by a gateway takes Serve's whole way there and back, and under many times its capacity an endpoint would do
little else. So each answer to a POST says up to how many there may be that have no answer yet, and the proxy counts
them (`serving.proxy`). It knows neither models nor requests.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from starlette.datastructures import Headers

#: On a gateway's answer: its `Room`. The proxy takes it off.
HEADER = b"x-s2t-room"
#: On a request to a gateway: how many the proxy has refused since it last said so.
REFUSED = b"x-s2t-refused"
#: How long a gateway is taken by its word, in seconds: then the next request goes to it and brings its answer.
FRESH_S = 1.0
_DIGITS = 9


def refused(headers: Headers) -> int:
    """How many the proxy says that it has refused. Where Serve's proxy is without its front, it may be anyone who says
    so."""
    text = headers.get(REFUSED.decode(), "")
    return int(text) if text.isdecimal() and len(text) <= _DIGITS else 0


@dataclass(frozen=True)
class Room:
    """What the gateway of that name, one of up to `gateways`, says: with `limit` requests that have no answer yet it
    may refuse the next one, which should come again after `retry_after` seconds."""

    gateway: str
    gateways: int
    limit: int
    retry_after: int

    def written(self) -> bytes:
        return f"{self.gateway} {self.gateways} {self.limit} {self.retry_after}".encode()

    @classmethod
    def read(cls, text: bytes) -> Room:
        gateway, *numbers = text.decode().split()
        return cls(gateway, *map(int, numbers))


@dataclass
class Rooms:
    """What the gateways of one application have said, and how many of its requests have no answer yet."""

    unanswered: int = 0
    refused: int = 0
    _said: dict[str, tuple[float, Room]] = field(default_factory=dict)  # in order of time

    def note(self, room: Room) -> None:
        """A gateway has said so with an answer."""
        self._said.pop(room.gateway, None)
        self._said[room.gateway] = time.monotonic(), room
        while len(self._said) > room.gateways:  # those that were replaced
            del self._said[next(iter(self._said))]

    def note_end(self, gateway: str) -> None:
        """A stream of that gateway has ended, which had its answer before: its place has gone to another request."""
        if gateway in self._said:
            when, room = self._said[gateway]
            self._said[gateway] = when, replace(room, limit=room.limit + 1)

    def full(self) -> Room | None:
        """What a gateway said, where one more request would be too many for all of them; None where there is room, or
        not every gateway has lately said that there is none."""
        now = time.monotonic()
        rooms = [room for when, room in self._said.values() if now - when <= FRESH_S]
        if not rooms or len(rooms) < rooms[-1].gateways or self.unanswered < sum(room.limit for room in rooms):
            return None
        return rooms[-1]
