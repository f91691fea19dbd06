"""Which slot of the torch engine a new call gets, and how much of its prefix it finds there.

What a slot holds is left in it when its call ends. It knows prefixes and slots, and nothing of what calls do.
"""

from __future__ import annotations

from collections.abc import Iterable

from s2t_models.engines.torch.slots import Slots

#: Tokens of a prefix that another slot has to hold beyond the own one for a copy.
WORTH_COPYING = 16


class FreeSlots:
    """The slots that no call runs in, in order of last use. It is false where there is none."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._free = dict.fromkeys(range(len(slots.tokens)))

    def __bool__(self) -> bool:
        return bool(self._free)

    def take(self, tokens: list[int]) -> tuple[int, int]:
        """A slot for these tokens, and how many of them it holds: its own, or those copied from a busy one."""
        slot = self._choose(tokens)
        del self._free[slot]
        held = _common(self._slots.tokens[slot], tokens)
        # A template that all prompts share is not worth the look at every slot: half of the tokens are.
        worth = max(held + WORTH_COPYING, len(tokens) // 2)
        if worth < len(tokens):
            beginning = tokens[:worth]
            source = next((other for other, known in enumerate(self._slots.tokens) if known[:worth] == beginning), None)
            if source is not None:
                held = _common(self._slots.tokens[source], tokens)
                self._slots.copy(source, slot, held)
        return slot, held

    def give_back(self, slot: int) -> None:
        self._free[slot] = None

    def is_about_to_be_read(self, tokens: list[int], running: Iterable[list[int]]) -> bool:
        """Whether a running call has half of the tokens still to read, and no slot holds them yet."""
        half = max(len(tokens) // 2, WORTH_COPYING)
        beginning = tokens[:half]
        is_held = any(held[:half] == beginning for held in self._slots.tokens)
        return not is_held and any(other[:half] == beginning for other in running)

    def _choose(self, tokens: list[int]) -> int:
        """The free slot that holds the longest prefix of the tokens, where that is at least half of what it holds; else
        the one unused for longest. A template that all prompts share must not cost a decode between two calls its
        slot."""
        fits = {}
        for slot in self._free:
            known = self._slots.tokens[slot]
            half = (len(known) + 1) // 2
            if known[:half] == tokens[:half]:
                fits[slot] = _common(known, tokens)
        return max(fits, key=lambda slot: fits[slot], default=next(iter(self._free)))


def _common(known: list[int], tokens: list[int]) -> int:
    """Length of the longest common prefix, by bisection: comparing slices is quick, comparing items is not."""
    same, limit = 0, min(len(known), len(tokens))
    while same < limit:
        middle = (same + limit + 1) // 2
        if known[same:middle] == tokens[same:middle]:
            same = middle
        else:
            limit = middle - 1
    return same
