"""Reserved rows: vocabulary rows that no text uses, whose logits carry the selector's scores (section 3.2, D.1).

They are masked from generation. Axes: _R bin.
"""

from __future__ import annotations

import torch

from s2t_models import loading
from s2t_models.recipe import Recipe, RecipeError
from s2t_models.settings import ReservedSettings


def reserved_ids(rows: int, tokenizer_length: int, settings: ReservedSettings) -> tuple[int, ...]:
    """The R contiguous ids of the block; by default the highest rows of the vocabulary.

    `rows` counts the model's vocabulary rows, `tokenizer_length` the ids that text uses. Raises RecipeError where the
    block would reach into the tokenizer's ids or past the last row.
    """
    first = rows - settings.count if settings.first is None else settings.first
    if first < tokenizer_length or first + settings.count > rows:
        raise RecipeError(
            f"reserved: rows {first}..{first + settings.count - 1} are not free: the tokenizer uses the ids below "
            f"{tokenizer_length} and the model has {rows} rows; set reserved.first or a smaller reserved.count"
        )
    return tuple(range(first, first + settings.count))


def reserved_rows(recipe: Recipe) -> tuple[int, ...]:
    """The ids that no engine of the recipe puts probability on: the SLM's reserved block, masked in the teacher as
    well.

    Raises RecipeError where the block is not free."""
    rows = loading.load_config(recipe.slm).vocab_size
    tokenizer = loading.load_tokenizer(recipe.slm)
    used = len(tokenizer)
    # Tokens that a tokenizer itself holds in reserve (Llama 3's <|reserved_special_token_0|>, D.1) are no text either.
    added = tokenizer.added_tokens_decoder
    while (token := added.get(used - 1)) and token.special and "reserved" in token.content:
        used -= 1
    return reserved_ids(rows, used, recipe.reserved)


def bins(count: int) -> torch.Tensor:
    """The fixed bin values v, uniform over [0, 1], [R] (Eq. 5)."""
    return torch.linspace(0.0, 1.0, count)
