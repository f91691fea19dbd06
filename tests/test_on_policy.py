"""Training on the texts that the tuned model writes: with its current weights, the same for the same seed, and going on
where it stopped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_rows import labelled_rows

from s2t_models.loading import end_ids, load_model
from s2t_models.recipe import Recipe, RecipeError, load_recipe
from s2t_models.training.batches import Trajectory, collate, trajectories
from s2t_models.training.selector import Selector
from s2t_models.training.teacher import Teacher, check_teacher
from s2t_models.training.trainer import Trainer

SETTINGS = (
    "distil.batch=5",
    "distil.steps=6",
    "distil.validation=0.2",
    "distil.lora.rank=4",
    "distil.tsd_kd.learning_rate=2e-3",
    "distil.tsd_kd.entropy=1",
    "distil.tsd_kd.ranking=0.1",
    "distil.tsd_kd.refresh=2",
    "collect.max_new_tokens=12",
    "slm.slots=10",
    "slm.context=256",
)


@pytest.fixture(scope="module")
def recipe(recipe_path) -> Recipe:
    return load_recipe(recipe_path, SETTINGS)


@pytest.fixture(scope="module")
def data(recipe: Recipe) -> list[Trajectory]:
    return trajectories(labelled_rows(recipe, "embedded-train", 6))


def cold(recipe: Recipe) -> Recipe:
    """With rollouts so cold that they are greedy."""
    tsd_kd = recipe.distil.tsd_kd.model_copy(update={"temperature": 1e-6})
    return recipe.model_copy(update={"distil": recipe.distil.model_copy(update={"tsd_kd": tsd_kd})})


def outputs(texts: Sequence[Trajectory]) -> list[list[int]]:
    return sorted(text.tree.tokens[text.tree.prompt :].tolist() for text in texts)


def greedy(recipe: Recipe, selector: Selector, texts: Sequence[Trajectory]) -> list[list[int]]:
    """What plain transformers writes to the same prompts with the selector's weights."""
    model, found = copy.deepcopy(selector).merge().eval(), []
    ends, limit = end_ids(recipe.slm), recipe.collect.max_new_tokens
    never = torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor(selector.reserved_ids), -torch.inf)
    for text in texts:
        ids = text.tree.tokens[: text.tree.prompt].tolist()
        while len(ids) < text.tree.prompt + limit and not (len(ids) > text.tree.prompt and ids[-1] in ends):
            with torch.no_grad():
                ids.append(int((model(torch.tensor([ids])).logits[0, -1] + never).argmax()))
        found.append(ids[text.tree.prompt :])
    return sorted(found)


def moved(trainer: Trainer) -> None:
    """Weights that write otherwise."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in trainer.parameters:
            value.add_(0.1 * torch.randn(value.shape, generator=generator))


def test_rollouts_are_of_the_weights_at_the_first_step_of_their_window(recipe: Recipe, data: list[Trajectory]):
    trainer = Trainer(cold(recipe), "tsd-kd", data)
    first = trainer.rollouts.of(0)
    assert len(first) == 5
    assert all(np.isnan(text.kl_T).all() and len(text.kl_T) == text.steps > 0 for text in first)
    assert not any(len(text.by_kl_G) for text in first)
    base = greedy(recipe, trainer.selector, first)
    assert outputs(first) == base
    moved(trainer)
    beginning = trainer.rollouts.of(0)
    assert outputs(beginning) == greedy(recipe, trainer.selector, beginning) != base
    moved(trainer)
    within = trainer.rollouts.of(1)
    assert outputs(within) != greedy(recipe, trainer.selector, within), "a window keeps the weights it began with"
    following = trainer.rollouts.of(2)
    assert outputs(following) == greedy(recipe, trainer.selector, following)


def test_the_teacher_reads_every_step_as_its_own_forward_does(recipe: Recipe, data: list[Trajectory]):
    batch = collate(data[:3], torch.device("cpu"), leaves=False)
    reserved = [recipe.reserved.count]
    teacher = Teacher(recipe, 10_000)
    reading, model, start = teacher.read(batch.packed), load_model(recipe.teacher), 0
    for item in data[:3]:
        with torch.no_grad():
            own_TV = model(torch.from_numpy(item.tree.tokens)[None]).logits[0, item.tree.prompt - 1 : -1]
        ours_TV = reading.text_logits(reading.states_SH[start : start + item.steps])
        is_text_V = ours_TV[0] > -1e30
        assert int((~is_text_V).sum()) == reserved[0]
        torch.testing.assert_close(ours_TV[:, is_text_V], own_TV[:, is_text_V], atol=1e-4, rtol=1e-4)
        start += item.steps
    assert Teacher(recipe, 100).text_logits(reading.states_SH).shape == (start, 100)
    quantised = recipe.teacher.vllm.model_copy(update={"quantisation": "awq"})
    changed = recipe.teacher.model_copy(update={"vllm": quantised})
    with pytest.raises(RecipeError, match=r"teacher\.vllm\.quantisation = awq: .* leave it out"):
        check_teacher(recipe.model_copy(update={"teacher": changed}))


def test_tsd_kd_learns_and_goes_on_in_the_midst_of_a_window(recipe: Recipe, data: list[Trajectory]):
    whole = Trainer(recipe, "tsd-kd", data)
    held_out = sum(len(item.tree.tokens) for item in whole.validation)
    assert whole.teacher_read == held_out  # their labels are evaluated on
    parts = [whole.advance() for _ in range(3)]  # one step into the second window
    state = copy.deepcopy(whole.state())
    rest = [whole.advance() for _ in range(3, 6)]
    before, after = ([part["loss"] for part in half] for half in (parts, rest))  # each over the same prompts
    assert np.mean(after) < 0.9 * np.mean(before)
    assert whole.evaluate()["kl_to_base"] > 0

    again = Trainer(recipe, "tsd-kd", data)
    again.load(state)
    repeated = [again.advance() for _ in range(3, 6)]
    for left, right in zip(repeated, rest, strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    assert again.teacher_read == whole.teacher_read > held_out
    for key, value in whole.selector.trained().items():
        torch.testing.assert_close(again.selector.trained()[key], value, atol=1e-5, rtol=1e-4)


def test_the_distillation_term_brings_the_tuned_model_to_the_teacher_on_its_own_texts(
    recipe_path: Path, data: list[Trajectory]
):
    """By itself: with the published weights entropy and ranking outweigh it on this pair, and it does not fall."""
    alone = ("distil.tsd_kd.entropy=0", "distil.tsd_kd.ranking=0", "collect.max_new_tokens=64", "distil.steps=8")
    trainer = Trainer(cold(load_recipe(recipe_path, [*SETTINGS, *alone])), "tsd-kd", data)
    losses = [trainer.advance()["jsd_loss"] for _ in range(8)]
    assert np.mean(losses[-2:]) < 0.5 * np.mean(losses[:2])
    assert losses[0] > 0


def test_the_gradient_does_not_depend_on_the_cut_and_the_teacher_is_metered(recipe: Recipe, data: list[Trajectory]):
    def gradient(**changes: Any) -> tuple[torch.Tensor, Trainer]:
        cut = recipe.model_copy(update={"distil": recipe.distil.model_copy(update=changes)})
        trainer = Trainer(cut, "tsd-kd", data)
        norm = trainer.advance()["gradient_norm"]
        return torch.cat([value.grad.flatten() for value in trainer.parameters]) * max(norm, 1.0), trainer

    (whole, one), (alone, other) = gradient(), gradient(micro_batch=1)
    torch.testing.assert_close(alone, whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-3)
    written = one.rollouts._texts[0]
    held_out = sum(len(item.tree.tokens) for item in one.validation)
    assert one.teacher_read == other.teacher_read == held_out + sum(len(text.tree.tokens) for text in written)


def test_gradients_are_put_together_once_a_step(recipe: Recipe, data: list[Trajectory]):
    """Workers whose trajectories take unlike numbers of forwards would wait for each other otherwise."""
    seen: list[str] = []

    class Parallel(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: Any) -> torch.Tensor:
            seen.append("forward")
            hidden_BLH = self.inner(**inputs)
            hidden_BLH.register_hook(lambda grad: seen.append("backward"))
            return hidden_BLH

        @contextmanager
        def no_sync(self) -> Iterator[None]:
            seen.append("apart")
            yield
            seen.append("together")

    cut = recipe.model_copy(update={"distil": recipe.distil.model_copy(update={"batch": 3, "micro_batch": 1})})
    Trainer(cut, "kd", data, wrap=Parallel).advance()
    assert seen == ["apart", "forward", "backward", "together"] * 2 + ["forward", "backward"]
