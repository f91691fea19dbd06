"""From the tokens of an answer to its text, as they come: what is certain so far, and where a stop text ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

from s2t_models import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: The text of one token alone.
Word = Callable[[int], str]
#: What a decoder writes for bytes that are no whole character.
BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer. `stopped` says that one of the texts of `stops` was in it; the text ends before that."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ""
        self._sent = 0
        self.stopped = False

    def add(self, ids: Sequence[int]) -> tuple[str, list[str]]:
        """The text that has become certain, and what each token added, "" where a character is not whole yet."""
        self._ids += ids
        pieces = [self._stream.step(self._tokenizer.backend_tokenizer, token) or "" for token in ids]
        self._text += "".join(pieces)
        return self._certain(self._held()), pieces

    def end(self) -> str:
        """The rest of the text: all of it is then that of the whole answer, decoded at once."""
        self._text = chat.decode(self._tokenizer, self._ids)
        return self._certain(0)

    def _certain(self, held: int) -> str:
        end = len(self._text) - held
        found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            self.stopped, end = True, min(found)
        piece = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _held(self) -> int:
        """How many characters at the end may yet turn out to be the beginning of a stop text."""
        return max(
            (
                length
                for stop in self._stops
                for length in range(1, min(len(stop), len(self._text) + 1))
                if self._text.endswith(stop[:length])
            ),
            default=0,
        )


def written_alone(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    """A token's own text; where its bytes are no whole character, its name in the vocabulary."""
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    return str(tokenizer.convert_ids_to_tokens(token)) if BROKEN in text else text


def with_texts(decision: Mapping[str, Any], word: Word) -> dict[str, Any]:
    """A decision, as its fields, with the texts of its tokens."""
    return {
        **decision,
        "texts_K": [word(token) for token in decision["candidates_K"]],
        "chosen_text": word(decision["chosen"]),
        "argmax_text": None if decision["argmax"] is None else word(decision["argmax"]),
    }
