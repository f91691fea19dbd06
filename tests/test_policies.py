"""The collaborative loop is exact, and every policy does what its name says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference_engine import (
    END,
    RESERVED,
    ReferenceEngine,
    TinyPair,
    card,
    decode,
    encode,
    reference_engines,
    run,
    tiny_pair,
    torch_engines,
)

from s2t_models.candidates import propose
from s2t_models.engines.contract import ContextOverflow, Selection
from s2t_models.noise import uniforms
from s2t_models.policies.base import Decoded, Engines, Policy, Request, Span, gather
from s2t_models.policies.collaborate import Collaborate
from s2t_models.policies.local import Local
from s2t_models.policies.scorers import TeacherScorer
from s2t_models.policies.single import SingleModel
from s2t_models.policies.triggers import DivergenceTrigger, EntropyTrigger, RandomTrigger, Trigger
from s2t_models.settings import CandidateSettings

PROMPTS = ["Ada has 12 ", "8+5=", "Tom and Ida, ", "x", "then 4 more ", "Q: 7 of 90?\n", "zebra ", "(a)(b)"]
LENGTH = 32


@pytest.fixture(scope="module")
def pair() -> TinyPair:
    torch.set_num_threads(1)
    return tiny_pair()


@pytest.fixture(scope="module")
def reference(pair: TinyPair) -> Engines:
    return reference_engines(pair)


@pytest.fixture(scope="module")
def engines(pair: TinyPair) -> Iterator[Engines]:
    with torch_engines(pair) as running:
        yield running


def run_all(policy: Policy, engines: Engines, max_tokens: int = LENGTH, seed: int = 3) -> list[Decoded]:
    """Every prompt, all at once."""

    async def together() -> list[Decoded]:
        requests = [Request(encode(prompt), max_tokens, seed) for prompt in PROMPTS]
        return list(await asyncio.gather(*(gather(policy.decode(engines, request)) for request in requests)))

    return asyncio.run(together())


def kl(p_logprobs: np.ndarray, q_logprobs: np.ndarray, tail: str) -> float:
    p, q = np.exp(p_logprobs.astype(float)), np.exp(q_logprobs.astype(float))
    if tail == "renormalised":
        p, q = p / p.sum(), q / q.sum()
    elif 1 - p.sum() > 1e-6:
        p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
    return float((p * np.log(p / q)).sum())


def algorithm_1(
    pair: TinyPair,
    prompt: list[int],
    *,
    metric: str,
    threshold: float,
    selects: str,
    candidates: CandidateSettings,
    support: int,
    tail: str = "bucket",
    warmup: int = 0,
    seed: int = 3,
    seen: list[float] | None = None,
) -> list[int]:
    """Algorithm 1 transcribed: one forward of each model over the whole sequence at every step."""
    tokens: list[int] = []
    while len(tokens) < LENGTH and tokens[-1:] != [END]:
        step = len(tokens)
        logprobs = []
        for model in (pair.slm, pair.teacher):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
            logits = logits.clone()
            logits[list(RESERVED)] = -torch.inf
            logprobs.append(logits.log_softmax(-1).numpy())
        slm, teacher = logprobs
        top = np.argsort(-slm, kind="stable")[:support]
        if metric == "kl":
            value = kl(slm[top], teacher[top], tail)
        elif metric == "entropy":
            p = np.exp(slm[np.isfinite(slm)].astype(float))
            value = float(-(p * np.log(p)).sum())
        else:
            value = -float(uniforms(seed, step, 1, "trigger")[0])
        if seen is not None:
            seen.append(value)
        token = int(slm.argmax())
        if step >= warmup and (value >= threshold if metric != "random" else -value < threshold):
            if selects == "vocabulary":
                token = int(teacher.argmax())
            else:
                noise = uniforms(seed, step, candidates.k, "candidates")
                chosen = propose(slm[top], candidates.k, candidates.method, candidates.ratio, noise)
                token = int(max((top[i] for i in chosen), key=lambda c: teacher[c]))
        tokens.append(token)
    return tokens


@pytest.fixture(scope="module")
def quantiles(pair: TinyPair) -> dict[str, list[float]]:
    """Thresholds for budgets of 2, 10 and 30% from the SLM's greedy texts, between two values rather than on one."""
    found = {}
    for metric in ("kl", "entropy"):
        seen: list[float] = []
        for prompt in PROMPTS:
            algorithm_1(
                pair,
                encode(prompt),
                metric=metric,
                threshold=np.inf,
                selects="vocabulary",
                candidates=CandidateSettings(),
                support=32,
                seen=seen,
            )
        found[metric] = [float(np.quantile(seen, 1 - budget, method="midpoint")) for budget in (0.02, 0.10, 0.30)]
    return found | {"random": [0.02, 0.10, 0.30]}


def trigger_of(metric: str, threshold: float, tail: str = "bucket") -> Trigger:
    if metric == "kl":
        return DivergenceTrigger(threshold, tail)  # type: ignore[arg-type]
    return EntropyTrigger(threshold) if metric == "entropy" else RandomTrigger(threshold)


@pytest.mark.parametrize("selects", ["candidate", "vocabulary"])
@pytest.mark.parametrize("metric", ["kl", "entropy", "random"])
def test_chunks_equal_steps_and_algorithm_1(metric, selects, pair, engines, quantiles):
    interventions = 0
    for threshold in quantiles[metric]:
        candidates = CandidateSettings(k=4, method="multinomial")
        policy = Collaborate(
            "p", trigger_of(metric, threshold), TeacherScorer(selects), candidates, support=32, chunk=16
        )
        chunked = run_all(policy, engines)
        stepwise = run_all(replace(policy, chunk=1), engines)
        for prompt, chunks, steps in zip(PROMPTS, chunked, stepwise, strict=True):
            expected = algorithm_1(
                pair,
                encode(prompt),
                metric=metric,
                threshold=threshold,
                selects=selects,
                candidates=candidates,
                support=32,
            )
            assert chunks.ids == steps.ids == expected
            assert [d.step for d in chunks.decisions] == [d.step for d in steps.decisions]
            assert [d.chosen for d in chunks.decisions] == [chunks.ids[d.step] for d in chunks.decisions]
            assert [d.candidates_K for d in chunks.decisions] == [d.candidates_K for d in steps.decisions]
            assert chunks.finish == ("end" if expected[-1] == END else "length")
            interventions += sum(d.chosen != d.candidates_K[0] for d in chunks.decisions)
    assert interventions > 10  # else this compared greedy with greedy


def test_published_variant_equals_algorithm_1(pair, engines, quantiles):
    candidates = CandidateSettings(k=8, method="top_k")
    threshold = quantiles["kl"][1]
    policy = Collaborate(
        "s2t",
        DivergenceTrigger(threshold, "renormalised"),
        TeacherScorer("candidate"),
        candidates,
        32,
        chunk=16,
        warmup=3,
    )
    steps = set()
    for prompt, decoded in zip(PROMPTS, run_all(policy, engines), strict=True):
        expected = algorithm_1(
            pair,
            encode(prompt),
            metric="kl",
            threshold=threshold,
            selects="candidates",
            candidates=candidates,
            support=32,
            tail="renormalised",
            warmup=3,
        )
        assert decoded.ids == expected
        steps |= {decision.step for decision in decoded.decisions}
    assert steps
    assert min(steps) >= 3


def test_warmup_inside_a_chunk_asks_the_teacher_about_later_steps_only(engines):
    policy = Collaborate(
        "s2t", DivergenceTrigger(-1.0), TeacherScorer("candidate"), CandidateSettings(), 32, chunk=8, warmup=5
    )
    decoded = run(policy, engines, Request(encode("8+5="), 12))
    assert [decision.step for decision in decoded.decisions] == list(range(5, len(decoded.ids)))


def test_a_trigger_that_always_fires_gives_the_teachers_text_and_one_that_never_fires_the_slms(engines):
    always = Collaborate("takeover", DivergenceTrigger(-1.0), TeacherScorer("vocabulary"), support=32)
    never = replace(always, trigger=DivergenceTrigger(np.inf))
    for policy, name in ((always, "teacher"), (never, "slm")):
        for prompt, decoded in zip(PROMPTS, run_all(policy, engines), strict=True):
            assert decoded.ids == run(SingleModel("alone", name), engines, Request(encode(prompt), LENGTH)).ids


def test_max_tokens_and_the_end_token(engines, reference, quantiles):
    policy = Collaborate("s2t", DivergenceTrigger(quantiles["kl"][2]), TeacherScorer("candidate"), support=32, chunk=16)
    whole = run_all(policy, engines)
    assert {decoded.finish for decoded in whole} == {"end", "length"}  # the prompts show both
    for max_tokens in (1, 7, 16, 17):
        for decoded, long in zip(run_all(policy, engines, max_tokens), whole, strict=True):
            assert decoded.ids == long.ids[:max_tokens]
            assert END not in decoded.ids[:-1]
    ends = [decoded.ids[-1] for decoded in whole if decoded.finish == "end"]
    assert ends == [END] * len(ends)


def test_dynamic_candidates_are_at_least_the_ratio_as_likely_as_the_first(engines):
    policy = Collaborate(
        "s2t", RandomTrigger(0.5), TeacherScorer("candidate"), CandidateSettings(k=32, method="top_k", ratio=0.05), 32
    )
    decisions = [decision for decoded in run_all(policy, engines) for decision in decoded.decisions]
    sizes = {len(decision.candidates_K) for decision in decisions}
    assert len(sizes) > 2
    for decision in decisions:
        assert min(decision.logprobs_K) >= decision.logprobs_K[0] + np.log(0.05) - 1e-6


def test_decisions_hold_both_models_numbers(reference):
    policy = Collaborate(
        "s2t", RandomTrigger(0.4), TeacherScorer("candidate"), CandidateSettings(k=5, method="top_k"), 32
    )
    prompt = encode("Ada has 12 ")
    decoded = run(policy, reference, Request(prompt, LENGTH))
    assert decoded.decisions
    for decision in decoded.decisions:
        state = prompt + decoded.ids[: decision.step]
        slm, teacher = reference["slm"].logprobs(state), reference["teacher"].logprobs(state)
        np.testing.assert_allclose(decision.logprobs_K, slm[decision.candidates_K], atol=1e-5)
        np.testing.assert_allclose(decision.scores_K, teacher[decision.candidates_K].exp(), atol=1e-5)
        assert decision.preferences_K == decision.teacher_K == decision.scores_K
        assert decision.argmax == int(teacher.argmax())
        assert decision.chosen == decision.candidates_K[int(np.argmax(decision.scores_K))]


def test_usage_counts_one_teacher_forward_a_chunk(pair, quantiles):
    slm, teacher = ReferenceEngine(pair.slm, card("slm")), ReferenceEngine(pair.teacher, card("teacher"))
    engines = Engines({"slm": slm, "teacher": teacher}, decode, encode)
    policy = Collaborate("s2t", DivergenceTrigger(quantiles["kl"][1]), TeacherScorer("candidate"), support=32, chunk=8)
    decoded = run(policy, engines, Request(encode("Ada has 12 "), LENGTH))
    assert decoded.decisions
    # Algorithm: as many teacher forwards as drafts, whatever was triggered.
    assert decoded.usage["teacher"].forwards == teacher.calls["score"] == slm.calls["generate"]
    assert decoded.usage["teacher"].decode == 0
    assert decoded.usage["slm"].decode >= len(decoded.ids) - len(decoded.decisions)

    teacher.calls.clear()
    policy = replace(policy, trigger=EntropyTrigger(quantiles["entropy"][1]))
    decoded = run(policy, engines, Request(encode("Ada has 12 "), LENGTH))
    assert decoded.usage["teacher"].forwards == teacher.calls["score"] == len(decoded.decisions) > 0


def test_a_draft_goes_on_behind_a_critical_step_that_stands_as_drafted(pair):
    """With one candidate every choice is the drafted token: as many calls as where nothing triggers."""
    calls = []
    for threshold in (-1.0, np.inf):
        slm, teacher = ReferenceEngine(pair.slm, card("slm")), ReferenceEngine(pair.teacher, card("teacher"))
        engines = Engines({"slm": slm, "teacher": teacher}, decode, encode)
        alone = CandidateSettings(k=1, method="top_k")
        policy = Collaborate("s2t", DivergenceTrigger(threshold), TeacherScorer("candidate"), alone, 32, chunk=8)
        decoded = run(policy, engines, Request(encode("Ada has 12 "), LENGTH))
        assert len(decoded.decisions) == (len(decoded.ids) if threshold < 0 else 0)
        assert [token for span in decoded.spans for token in span.ids] == decoded.ids
        calls.append((decoded.ids, slm.calls["generate"], teacher.calls["score"]))
    assert calls[0] == calls[1]
    assert calls[0][1] < len(calls[0][0])


def test_chunks_cost_fewer_teacher_forwards_than_steps(engines, quantiles):
    policy = Collaborate("s2t", DivergenceTrigger(quantiles["kl"][0]), TeacherScorer("candidate"), support=32, chunk=16)

    def forwards(policy: Policy) -> int:
        return sum(decoded.usage["teacher"].forwards for decoded in run_all(policy, engines))

    assert forwards(policy) * 4 < forwards(replace(policy, chunk=1))


def test_a_prompt_over_the_context_is_refused_before_anything_is_decoded(engines):
    policy = Collaborate("s2t", DivergenceTrigger(1.0), TeacherScorer("candidate"), support=32)
    with pytest.raises(ContextOverflow, match="12 tokens and 501 more do not fit"):
        run(policy, engines, Request([5] * 12, 501))


def test_a_missing_engine_is_named(engines):
    policy = Collaborate("s2t", DivergenceTrigger(1.0), TeacherScorer("candidate"), support=32)
    alone = Engines({"slm": engines["slm"]}, decode, encode)
    with pytest.raises(KeyError, match="no engine named 'teacher' is running; there are: slm"):
        run(policy, alone, Request(encode("x"), 4))


def test_local_equals_the_reference_and_marks_what_it_selected(engines, reference):
    selection = Selection(
        0.3, CandidateSettings(k=4, method="multinomial"), prior_weight=0.5, temperature=0.1, warmup=2
    )
    policy = Local("s2t-local", selection)
    rescued = 0
    for prompt, decoded in zip(PROMPTS, run_all(policy, engines), strict=True):
        expected = run(policy, reference, Request(encode(prompt), LENGTH, seed=3))
        assert decoded.ids == expected.ids
        assert [d.candidates_K for d in decoded.decisions] == [d.candidates_K for d in expected.decisions]
        assert [token for span in decoded.spans for token in span.ids] == decoded.ids
        at = 0
        selected = []
        for span in decoded.spans:
            selected += range(at, at + len(span.ids)) if span.source == "selected" else []
            at += len(span.ids)
        assert selected == [decision.step for decision in decoded.decisions]
        assert all(step >= 2 for step in selected)
        rescued += sum(d.chosen != d.candidates_K[0] for d in decoded.decisions)
    assert rescued > 5


def test_spans_of_one_source_follow_the_text(engines, quantiles):
    policy = Collaborate("takeover", DivergenceTrigger(quantiles["kl"][1]), TeacherScorer("vocabulary"), support=32)
    decoded = run_all(policy, engines)[0]
    teacher_spans: list[Span] = [span for span in decoded.spans if span.source == "teacher"]
    assert [span.ids for span in teacher_spans] == [[decision.argmax] for decision in decoded.decisions]


def test_every_decode_ends_with_the_token_that_completes_a_stop_text(engines, reference, pair, quantiles):
    """Also where the scorer chose that token, and where the text stands across two drafts."""
    policies: list[tuple[Policy, Engines]] = [
        (SingleModel("greedy"), engines),
        (Collaborate("s2t", trigger_of("kl", quantiles["kl"][0]), TeacherScorer("candidate"), chunk=3), engines),
        (Collaborate("takeover", trigger_of("kl", -1.0), TeacherScorer("vocabulary")), engines),
        (Local("s2t-local", Selection(0.3, CandidateSettings(k=4), prior_weight=0.5)), engines),
        (
            Local("s2t-local", Selection(0.3, CandidateSettings(k=4), prior_weight=0.5)),
            reference_engines(pair, "select"),
        ),
        (Local("s2t-local", Selection(-1e9, CandidateSettings(k=4))), reference_engines(pair, "select")),
    ]
    for policy, running in policies:
        whole = run(policy, running, Request(encode(PROMPTS[0]), LENGTH, 3))
        text = decode(whole.ids)
        for at in (1, 6, 9):
            stop = text[at : at + 2]
            end = text.index(stop) + 2
            stopped = run(policy, running, Request(encode(PROMPTS[0]), LENGTH, 3, stop=("~", stop)))
            assert (stopped.ids, stopped.finish) == (whole.ids[:end], "stop"), policy.name
