"""What an engine refuses before it begins: the same for every engine, in the same words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s2t_models.engines.contract import ContextOverflow, ModelCard, Sampling
from s2t_models.settings import MOST_CANDIDATES


@dataclass(frozen=True)
class Checks:
    """Checks of calls to the engine of `card`; `has_selector` says whether it holds an S2T-Local artifact. All raise
    ValueError, of which ContextOverflow is one."""

    card: ModelCard
    has_selector: bool

    def tokens(self, prefix: list[int], new: int) -> None:
        """A prefix and `new` tokens behind it."""
        if not prefix:
            raise ValueError("the prefix is empty: an engine needs at least one token to go on from")
        if len(prefix) + new > self.card.context:
            raise ContextOverflow(
                f"{len(prefix)} tokens and {new} to generate do not fit {self.card.name}'s context of "
                f"{self.card.context}"
            )
        self.ids(min(prefix), max(prefix))

    def ids(self, lowest: int, highest: int) -> None:
        """Here, because in the forward a wrong id would cost every call in it its answer, and a GPU its state."""
        if lowest < 0 or highest >= self.card.vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"{self.card.name}: token id {wrong} lies outside the vocabulary, 0 to {self.card.vocabulary - 1}"
            )

    def draft(self, prefix: list[int], sampling: Sampling) -> None:
        if sampling.max_tokens < 1:
            raise ValueError(f"max_tokens = {sampling.max_tokens}: a draft has at least one token")
        if sampling.trigger_threshold is not None:
            if not self.has_selector:
                raise ValueError(f"{self.card.name} has no trigger head: it is not an S2T-Local artifact")
            self.unpenalised(sampling)
        self.tokens(prefix, sampling.max_tokens)

    def unpenalised(self, sampling: Sampling) -> None:
        """A draft that is not decoded plainly: what it proposes and draws goes by the model's own probabilities."""
        if sampling.penalties:
            raise ValueError(f"{self.card.name}: penalties go with plain decoding alone")

    def scored(self, tokens: list[int], start: int, ids_TN: np.ndarray) -> None:
        """Rows of ids along `tokens`, the first of them at `start`."""
        self.tokens(tokens, 0)
        if not 1 <= start <= start + len(ids_TN) - 1 <= len(tokens):
            raise ValueError(f"score: {len(ids_TN)} rows from position {start} do not fit {len(tokens)} tokens")
        self.ids(int(ids_TN.min(initial=0)), int(ids_TN.max(initial=0)))

    def steps(self, tokens: list[int], start: int) -> None:
        """The steps that wrote tokens[start:]."""
        self.tokens(tokens, 0)
        if not 1 <= start < len(tokens):
            raise ValueError(f"no steps from position {start} in {len(tokens)} tokens")

    def selector(self, k: int) -> None:
        if not self.has_selector:
            raise ValueError(f"{self.card.name} has no selector: it is not an S2T-Local artifact")
        if k > MOST_CANDIDATES:
            raise ValueError(f"{k} candidates: the engine scores at most {MOST_CANDIDATES} at a step")

    def candidates(self, prefix: list[int], candidates_K: list[int]) -> None:
        self.tokens(prefix, 1)
        self.selector(len(candidates_K))
        self.ids(min(candidates_K), max(candidates_K))
