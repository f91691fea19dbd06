"""Penalties on repeated tokens: closed forms, and the arithmetic of transformers and vLLM."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest
import torch
from reference_engine import PROMPT, RESERVED, penalise, reference_engines, tiny_pair
from transformers import RepetitionPenaltyLogitsProcessor

from s2t_models.engines.contract import Penalties, Sampling
from s2t_models.engines.penalising import Repeats, penalised
from s2t_models.engines.sampling import pick

ROWS, VOCABULARY = 12, 50
PENALTIES = [
    Penalties(presence=0.7),
    Penalties(frequency=-0.4),
    Penalties(repetition=1.3),
    Penalties(repetition=0.8),
    Penalties(1.1, 0.3, 1.2),
]


@pytest.fixture(scope="module")
def logits_BV() -> torch.Tensor:
    return 4 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(3))


def texts() -> list[tuple[list[int], list[int]]]:
    """A prompt and an output for each row; some outputs are empty."""
    noise = np.random.default_rng(5)
    return [
        (noise.integers(VOCABULARY, size=9).tolist(), noise.integers(VOCABULARY, size=2 * i).tolist())
        for i in range(ROWS)
    ]


def repeats(penalties: Penalties, prompt: list[int], output: list[int]) -> Repeats:
    """Half of the output was in the prefix, the rest was written since."""
    before = len(output) // 2
    counted = Repeats(penalties, prompt + output[:before], before)
    for token in output[before:]:
        counted.add(token)
    return counted


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_the_repetition_penalty_is_transformers(logits_BV, penalty):
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    asked = Penalties(repetition=penalty)
    for logits_V, (prompt, output) in zip(logits_BV, texts(), strict=True):
        expected_V = processor(torch.tensor([prompt + output]), logits_V[None].clone())[0]
        torch.testing.assert_close(penalise(logits_V, prompt, output, asked), expected_V)
        ours_BV = penalised(logits_V[None], {0: repeats(asked, prompt, output)})
        torch.testing.assert_close(ours_BV[0], expected_V)


def test_presence_and_frequency_take_off_what_openai_says(logits_BV):
    """mu[j] - c[j] * frequency - float(c[j] > 0) * presence, of the output alone."""
    for logits_V, (prompt, output) in zip(logits_BV, texts(), strict=True):
        count_V = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=VOCABULARY)
        expected_V = logits_V - 0.25 * count_V - 0.75 * (count_V > 0)
        asked = Penalties(presence=0.75, frequency=0.25)
        torch.testing.assert_close(penalise(logits_V, prompt, output, asked), expected_V)
        torch.testing.assert_close(penalised(logits_V[None], {0: repeats(asked, prompt, output)})[0], expected_V)


def test_rows_of_a_batch_have_their_own_penalties(logits_BV):
    """Every third row has none, and is as it was; so is what was given."""
    given_BV, asked = logits_BV.clone(), dict(enumerate(itertools.islice(itertools.cycle(PENALTIES), ROWS)))
    rows = {i: repeats(asked[i], *text) for i, text in enumerate(texts()) if i % 3}
    ours_BV = penalised(given_BV, rows)
    for i, (prompt, output) in enumerate(texts()):
        expected_V = penalise(logits_BV[i], prompt, output, asked[i]) if i % 3 else logits_BV[i]
        torch.testing.assert_close(ours_BV[i], expected_V)
    assert torch.equal(given_BV, logits_BV)
    assert penalised(given_BV, {}) is given_BV


@pytest.mark.parametrize("penalties", PENALTIES)
def test_the_penalties_are_vllms(logits_BV, penalties):
    layers = pytest.importorskip("vllm.model_executor.layers.utils", reason="vLLM is not installed")
    known = texts()
    prompts = torch.tensor([prompt for prompt, _ in known])
    longest = max(len(output) for _, output in known)
    outputs = torch.tensor([output + [VOCABULARY] * (longest - len(output)) for _, output in known])
    columns = (torch.full((ROWS,), value) for value in (penalties.presence, penalties.frequency, penalties.repetition))
    expected_BV = layers.apply_penalties(logits_BV.clone(), prompts, outputs, *columns)
    ours_BV = penalised(logits_BV, {i: repeats(penalties, *text) for i, text in enumerate(known)})
    torch.testing.assert_close(ours_BV, expected_BV)


@pytest.mark.parametrize("repetition", [1e-300, 1e300])
def test_a_penalty_out_of_all_proportion_leaves_numbers_to_pick_from(logits_BV, repetition):
    """One row's must not cost the others of its batch their tokens. What is masked stays masked."""
    logits_BV = logits_BV.clone()
    logits_BV[:, 7] = -torch.inf
    logits_BV[:, 8] = 0.0
    everything = Repeats(Penalties(2.0, 2.0, repetition), [*range(VOCABULARY)], 20)
    ours_BV = penalised(logits_BV, {0: everything})
    assert ours_BV[0, 7] == -torch.inf
    assert ours_BV[0, [i for i in range(VOCABULARY) if i != 7]].isfinite().all()
    nothing = [0.0] * ROWS
    picked = pick(ours_BV, [1.0] * ROWS, [1.0] * ROWS, [0] * ROWS, nothing, nothing)
    assert picked == ours_BV.argmax(-1).tolist()


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan")])
def test_a_repetition_penalty_is_above_0(penalty):
    with pytest.raises(ValueError, match="above 0"):
        Penalties(repetition=penalty)


def test_the_reference_writes_what_transformers_writes():
    pair = tiny_pair()
    engine, length = reference_engines(pair)["slm"], 24
    written = pair.slm.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=length,
        do_sample=False,
        repetition_penalty=1.6,
        suppress_tokens=list(RESERVED),
        pad_token_id=0,
        eos_token_id=0,
    )[0, len(PROMPT) :].tolist()
    draft, plain = (
        asyncio.run(engine.generate(PROMPT, Sampling(length, penalties=asked)))
        for asked in (Penalties(repetition=1.6), Penalties())
    )
    assert draft.ids == written
    assert draft.ids != plain.ids
