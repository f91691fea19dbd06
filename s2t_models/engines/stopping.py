"""Where a text ends by a stop text: decided token by token, in the engines and in policies of many calls alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Tokens looked at beyond the longest stop text's bytes: decoders change the first character of what they are given.
_MARGIN = 4


class StopTexts:
    """The texts at which an output ends; `decode` is the tokenizer's. With no texts nothing ever stops.

    Only the last tokens are decoded: a token has a byte at the least, so as many tokens as the longest text has bytes
    hold it."""

    def __init__(self, texts: Sequence[str], decode: Callable[[list[int]], str] | None) -> None:
        if texts and decode is None:
            raise ValueError("stop texts: this engine has no tokenizer to read its output with")
        self._texts = tuple(text for text in texts if text)
        self._decode = decode
        self._window = max((len(text.encode()) for text in self._texts), default=0) + _MARGIN

    def __bool__(self) -> bool:
        return bool(self._texts)

    def reached(self, ids: list[int]) -> bool:
        """Whether one of the texts stands in the last tokens of the output `ids`."""
        if not self or self._decode is None:
            return False
        tail = self._decode(ids[-self._window :])
        return any(text in tail for text in self._texts)

    def cut(self, ids: list[int], start: int) -> int | None:
        """How many of the output's tokens there are up to the one that completes a text, looking at those from `start`
        on; None where none does."""
        if not self:
            return None
        return next((end for end in range(start + 1, len(ids) + 1) if self.reached(ids[:end])), None)
