"""Reserved rows: vocabulary rows that no text uses, whose logits carry the selector's scores (section 3.2, D.1).

They are masked from generation. A model without enough of them gets an auxiliary ranking head in their place: as many
rows of its own, parallel to the output embedding (D.1). Axes: _R bin.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from s2t_models import loading
from s2t_models.recipe import Recipe, RecipeError
from s2t_models.settings import ReservedSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Tokens that tokenizers themselves hold in reserve: Llama 3's <|reserved_special_token_0|>, Gemma's <unused0>, Phi-3's
#: <|placeholder1|>, Mistral's [control_8].
_HELD = re.compile(r"<\|?(reserved_special_token_|unused|placeholder)\d+\|?>|\[control_\d+\]")


def free_rows(rows: int, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids that no text uses, in order: of the model's `rows` those that the tokenizer has not got or holds in
    reserve."""
    used = {id for token, id in tokenizer.get_vocab().items() if not _HELD.fullmatch(token)}
    return tuple(row for row in range(rows) if row not in used)


def reserved_ids(free: tuple[int, ...], settings: ReservedSettings) -> tuple[int, ...]:
    """The ids of the R reserved rows among the `free` ones: the block from `first` on, or the highest R. None at all
    where an auxiliary head takes their place.

    Raises RecipeError where the block is not free, `rows` are asked for and there are too few, or a head is asked for
    and a block."""
    count, first = settings.count, settings.first
    if settings.kind == "head":
        if first is not None:
            raise RecipeError(
                f"reserved.first = {first}: a ranking head (reserved.kind = head) takes no rows; set one or the other"
            )
        return ()
    if first is None:
        if len(free) >= count:
            return free[-count:]
        if settings.kind == "auto":
            return ()
        raise RecipeError(
            f"reserved.count = {count}: the vocabulary has {len(free)} free rows; set a smaller one, or "
            "reserved.kind=head for a ranking head beside the vocabulary"
        )
    block = tuple(range(first, first + count))
    if taken := sorted(set(block) - set(free)):
        has = f"; free are {len(free)} rows from {free[0]} to {free[-1]}" if free else ""
        raise RecipeError(
            f"reserved.first = {first}: row {taken[0]} is not free{has}; set another, a smaller reserved.count, or "
            "leave reserved.first out"
        )
    return block


def describe(reserved: tuple[int, ...]) -> str:
    """Where scores are read from, in words; of no reserved rows, an auxiliary head."""
    if not reserved:
        return "a ranking head beside the vocabulary"
    return f"{len(reserved)} reserved rows ({reserved[0]} to {reserved[-1]})"


def reserved_rows(recipe: Recipe) -> tuple[int, ...]:
    """The SLM's reserved rows; none where it has an auxiliary head. Raises RecipeError as `reserved_ids` does."""
    rows = loading.load_config(recipe.slm).vocab_size
    return reserved_ids(free_rows(rows, loading.load_tokenizer(recipe.slm)), recipe.reserved)


def masked_rows(recipe: Recipe) -> tuple[int, ...]:
    """The ids that no engine of the recipe puts probability on: the reserved rows, and rows that only one model of the
    pair has (Qwen2.5 comes with 151,936 and 152,064), which the other could not read. Raises RecipeError as
    `reserved_rows` does."""
    sizes = [loading.load_config(model).vocab_size for model in (recipe.slm, recipe.teacher)]
    return tuple(sorted({*reserved_rows(recipe), *range(min(sizes), max(sizes))}))


def bins(count: int) -> torch.Tensor:
    """The fixed bin values v, uniform over [0, 1], [R] (Eq. 5)."""
    return torch.linspace(0.0, 1.0, count)
