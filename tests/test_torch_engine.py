"""The torch engine against transformers' own forward and generate, on the embedded pair in float32."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch

from s2t_models import loading
from s2t_models.divergence import divergence
from s2t_models.embedded.generator import problems
from s2t_models.engines.contract import ContextOverflow, Sampling, Selection
from s2t_models.engines.sampling import pick
from s2t_models.engines.selector import Selector
from s2t_models.engines.torch import engine as torch_engine
from s2t_models.engines.torch.engine import TorchEngine
from s2t_models.engines.torch.load import load
from s2t_models.hosting import Hosted
from s2t_models.noise import uniforms
from s2t_models.reserved import bins, free_rows, reserved_ids
from s2t_models.settings import CandidateSettings, ModelSettings, MultiplexSettings, ReservedSettings

SLM = ModelSettings(path="embedded:slm", dtype="float32", device="cpu", slots=8)


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return loading.load_model(SLM)


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer(SLM)


@pytest.fixture(scope="module")
def reserved(reference, tokenizer) -> tuple[int, ...]:
    return reserved_ids(free_rows(len(reference.get_input_embeddings().weight), tokenizer), ReservedSettings(count=16))


@pytest.fixture(scope="module")
def engine(reserved) -> Iterator[TorchEngine]:
    engine = load(Hosted("slm", SLM, reserved))
    yield engine
    engine.close()


class FirstHidden(torch.nn.Module):
    """A trigger head whose logit is the first number of the hidden state: anything that differs from step to step."""

    def forward(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        return hidden_BH[:, 0]


@pytest.fixture(scope="module")
def local(reserved) -> Iterator[TorchEngine]:
    """The SLM with a trigger head: its untrained reserved rows still rank, which is all that exactness needs."""
    from dataclasses import replace

    base = load(Hosted("local", SLM, reserved))
    engine = TorchEngine(
        base._model,
        replace(base._card, capabilities=base._card.capabilities | {"select", "fused_select"}),
        8,
        Selector(FirstHidden(), torch.tensor(reserved), bins(len(reserved))),
    )
    base.close()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    """Prompts of mixed length."""
    texts = [problem.question for problem in problems("calibration", 10, seed=3)]
    texts[0], texts[1] = "2 + 3 = ?", texts[1] + " " + texts[2]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]


def run(calls):
    async def together():
        return await asyncio.gather(*calls)

    return asyncio.run(together())


def full_logits(reference, ids: list[int], reserved) -> torch.Tensor:
    with torch.no_grad():
        logits_TV = reference(torch.tensor([ids])).logits[0]
    logits_TV[:, list(reserved)] = -torch.inf
    return logits_TV


def test_greedy_equals_transformers_generate_alone_and_in_a_batch(engine, reference, prompts):
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            ids = reference.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)
        expected.append(ids[0, len(prompt) :].tolist())
    alone = [run([engine.generate(prompt, Sampling(60))])[0].ids for prompt in prompts]
    together = [draft.ids for draft in run([engine.generate(prompt, Sampling(60)) for prompt in prompts])]
    assert alone == expected
    assert together == expected


def test_support_and_entropy_equal_a_full_forward(engine, reference, reserved, prompts):
    prompt = prompts[2]
    draft = run([engine.generate(prompt, Sampling(20, support=64))])[0]
    logprobs_TV = full_logits(reference, prompt + draft.ids, reserved)[len(prompt) - 1 : -1].log_softmax(-1)
    top_TN, ids_TN = logprobs_TV.topk(64, dim=-1)
    np.testing.assert_allclose(draft.supported.logprobs_TN, top_TN, atol=1e-4)
    assert (draft.supported.ids_TN[:, :8] == ids_TN[:, :8].numpy()).all()
    entropy_T = -(logprobs_TV.exp() * logprobs_TV.clamp_min(-1e4)).sum(-1)
    np.testing.assert_allclose(draft.supported.entropy_T, entropy_T, atol=1e-4)


def test_score_equals_a_full_forward_from_any_cached_prefix(engine, reference, reserved, prompts):
    tokens = prompts[3] + run([engine.generate(prompts[3], Sampling(24))])[0].ids
    ids_TN = np.random.default_rng(0).integers(0, 500, (20, 7))
    start = len(prompts[3])
    logprobs_TV = full_logits(reference, tokens, reserved).log_softmax(-1)
    expected_TN = logprobs_TV[start - 1 : start + 19].gather(-1, torch.tensor(ids_TN))
    for _ in range(2):  # the second call finds everything cached
        scores = run([engine.score(tokens, start, ids_TN)])[0]
        np.testing.assert_allclose(scores.logprobs_TN, expected_TN, atol=1e-4)
        assert scores.argmax_T.tolist() == logprobs_TV[start - 1 : start + 19].argmax(-1).tolist()


def test_sampling_depends_on_seed_and_step_only(engine, prompts):
    sampling = [Sampling(40, temperature=0.9, top_p=0.95, top_k=50, seed=seed) for seed in range(6)]
    together = run([engine.generate(prompts[4], s) for s in sampling] + [engine.generate(prompts[5], sampling[0])])
    alone = [run([engine.generate(prompts[4], s)])[0].ids for s in sampling]
    assert [draft.ids for draft in together[:6]] == alone
    assert len({tuple(ids) for ids in alone}) > 1
    head, whole = alone[0][:10], alone[0]
    rest = Sampling(30, temperature=0.9, top_p=0.95, top_k=50, seed=0, first_step=10)
    assert head + run([engine.generate(prompts[4] + head, rest)])[0].ids == whole


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (0.7, 0.8, 20, 0.0),
        (1.0, 1.0, 0, 0.0),
        (0.6, 0.95, 0, 0.0),
        (2.0, 0.5, 100, 0.0),
        (1.3, 1.0, 5, 0.0),
        (2.5, 1.0, 0, 0.1),
        (2.0, 0.9, 40, 0.3),
        (3.0, 0.999, 0, 0.0),
        (3.0, 1.0, 1500, 0.0),
    ],
)
@pytest.mark.parametrize("vocabulary", [300, 6000])
def test_a_pick_inverts_the_distribution_of_transformers_warpers(
    temperature: float, top_p: float, top_k: int, min_p: float, vocabulary: int
):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_BV = 4 * torch.randn(40, vocabulary, generator=torch.Generator().manual_seed(7))
    warped_BV = TemperatureLogitsWarper(temperature)(None, logits_BV.double())
    warped_BV = TopKLogitsWarper(top_k)(None, warped_BV) if top_k else warped_BV
    warped_BV = TopPLogitsWarper(top_p)(None, warped_BV) if top_p < 1 else warped_BV
    p_BV = (MinPLogitsWarper(min_p)(None, warped_BV) if min_p else warped_BV).softmax(-1)
    uniform_B = np.random.default_rng(3).random(40)
    sorted_BV, ids_BV = p_BV.sort(descending=True)
    expected = [
        int(ids[(sorted_V.cumsum(0) <= u).sum()]) for sorted_V, ids, u in zip(sorted_BV, ids_BV, uniform_B, strict=True)
    ]
    columns = ([temperature] * 40, [top_p] * 40, [top_k] * 40, [min_p] * 40)
    assert pick(logits_BV, *columns, uniform_B.tolist()) == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 50.0])
def test_of_equal_logits_the_lower_id_comes_first_however_many_are_sorted(temperature: float):
    """In half precision many are equal, also where the sorted head of a large vocabulary ends."""
    logits_BV = (4 * torch.randn(200, 6000, generator=torch.Generator().manual_seed(8))).bfloat16().float()
    logits_BV[:, 100:150] = -torch.inf
    p_BV = (logits_BV.double() / temperature).softmax(-1).numpy()
    uniform_B = np.random.default_rng(4).random(200)
    expected = []
    for logits_V, p_V, u in zip(logits_BV.numpy(), p_BV, uniform_B, strict=True):
        order_V = np.lexsort((np.arange(len(p_V)), -logits_V))
        expected.append(int(order_V[(p_V[order_V].cumsum() <= u).sum()]))
    columns = ([temperature] * 200, [1.0] * 200, [0] * 200, [0.0] * 200)
    assert pick(logits_BV, *columns, uniform_B.tolist()) == expected


def test_a_temperature_too_small_to_divide_by_is_greedy(engine, prompts):
    greedy, cold = run([engine.generate(prompts[0], Sampling(20, temperature=t)) for t in (0.0, 1e-320)])
    assert greedy.ids == cold.ids


def test_sampling_follows_the_distribution(engine, reference, reserved, prompts):
    prompt = prompts[6] + run([engine.generate(prompts[6], Sampling(3))])[0].ids
    drafts = run([engine.generate(prompt, Sampling(1, temperature=2.0, seed=seed)) for seed in range(600)])
    p_V = (full_logits(reference, prompt, reserved)[-1] / 2.0).softmax(-1)
    token = int(p_V.argmax())
    share = sum(draft.ids == [token] for draft in drafts) / 600
    assert abs(share - float(p_V[token])) < 4 * float((p_V[token] * (1 - p_V[token]) / 600).sqrt()) + 1e-3


def test_slot_reuse_changes_nothing(engine, prompts):
    first = run([engine.generate(prompt, Sampling(30)) for prompt in prompts])
    for seed in range(3):
        run([engine.generate(prompt, Sampling(15, temperature=1.0, seed=seed)) for prompt in prompts])
    again = run([engine.generate(prompt, Sampling(30)) for prompt in reversed(prompts)])
    assert [draft.ids for draft in first] == [draft.ids for draft in reversed(again)]
    # A call that goes on from a decode reads one token, not the prompt again.
    assert run([engine.generate(prompts[0] + first[0].ids[:-1], Sampling(1))])[0].usage.prefill <= len(prompts[0])


def test_a_forward_takes_some_of_the_calls_and_then_the_others(engine, prompts, monkeypatch):
    whole = run([engine.generate(prompt, Sampling(20)) for prompt in prompts])
    monkeypatch.setattr(torch_engine, "TOKENS_A_FORWARD", 3)
    assert [d.ids for d in run([engine.generate(prompt, Sampling(20)) for prompt in prompts])] == [d.ids for d in whole]


def test_a_failed_forward_leaves_nothing_wrong_in_the_cache(reserved, prompts):
    """The keys of the first layers are written over before the forward fails: nobody may read on from them."""
    engine = load(Hosted("slm", SLM.model_copy(update={"slots": 1}), reserved))
    try:
        (draft,) = run([engine.generate(prompts[0], Sampling(20))])
        known = prompts[0] + draft.ids
        at = len(prompts[0])
        last_layer = engine._model.base_model.layers[-1]
        with (
            patch.object(last_layer, "forward", side_effect=RuntimeError("out of memory")),
            pytest.raises(RuntimeError, match="out of memory"),
        ):
            run([engine.score(known[:at] + known[:10], at, np.zeros((10, 1)))])
        assert run([engine.generate(known[: at + 10], Sampling(10))])[0].ids == draft.ids[10:20]
    finally:
        engine.close()


def test_samples_of_one_prompt_read_it_once(reserved, prompts):
    """Those asked together wait for the first, a later one copies from a busy slot; the texts are those of calls
    alone."""
    engine = load(Hosted("slm", SLM, reserved))
    prompt = prompts[2]
    samplings = [Sampling(30, temperature=0.7, seed=seed) for seed in range(6)]
    try:
        alone = [run([engine.generate(prompt, sampling)])[0].ids for sampling in samplings]
        run([engine.generate(other, Sampling(1)) for other in prompts[3:] + prompts[:2]])  # which take all slots

        async def late():
            first = asyncio.create_task(engine.generate(prompt, samplings[0]))
            others = [asyncio.create_task(engine.generate(prompt, sampling)) for sampling in samplings[1:-1]]
            await asyncio.sleep(0.02)
            return await asyncio.gather(first, *others, engine.generate(prompt, samplings[-1]))

        drafts = asyncio.run(late())
        assert [draft.ids for draft in drafts] == alone
        assert sorted(draft.usage.prefill for draft in drafts)[:-1] == [1] * 5
    finally:
        engine.close()


def test_a_shared_template_costs_no_decode_its_slot(reserved, prompts):
    engine = load(Hosted("slm", SLM.model_copy(update={"slots": 2}), reserved))
    template = prompts[0][:20]
    under_way = template + prompts[1] + prompts[2]
    try:
        run([engine.generate(under_way, Sampling(1))])
        run([engine.generate(template[:10] + prompts[3], Sampling(1))])
        run([engine.generate(under_way, Sampling(1))])
        # Its longest match is the decode under way; it gets the other slot.
        run([engine.generate(template + prompts[4], Sampling(1))])
        assert run([engine.generate(under_way, Sampling(1))])[0].usage.prefill == 1
    finally:
        engine.close()


def test_select_equals_separate_forwards(local, reference, reserved, prompts):
    candidates_K = [17, 40, 99, 250, 300, 41, 18, 77]
    expected_K = []
    for candidate in candidates_K:
        with torch.no_grad():
            logits_V = reference(torch.tensor([prompts[7] + [candidate]])).logits[0, -1]
        expected_K.append(float(logits_V[list(reserved)].softmax(-1) @ bins(len(reserved))))
    for _ in range(2):
        selected = run([local.select(prompts[7], candidates_K)])[0]
        np.testing.assert_allclose(selected.scores_K, expected_K, atol=1e-5)
        assert selected.usage.leaves == len(candidates_K)


def by_separate_forwards(reference, reserved, prompt, steps, selection, seed, end_ids) -> tuple[list[int], list[tuple]]:
    """Algorithm 1 with the reserved-row scorer, a whole forward for every step and every candidate: the ids, and (step,
    trigger, candidates, log-probabilities, scores) of each decision."""
    from s2t_models.candidates import propose

    ids: list[int] = []
    triggered, settings = [], selection.candidates
    while len(ids) < steps and not (ids and ids[-1] in end_ids):
        logprobs_V = full_logits(reference, prompt + ids, reserved)[-1].log_softmax(-1)
        with torch.no_grad():
            hidden_H = reference.base_model(torch.tensor([prompt + ids])).last_hidden_state[0, -1]
        if float(hidden_H[0]) < selection.threshold or len(ids) < selection.warmup:
            ids.append(int(logprobs_V.argmax()))
            continue
        top_N, ids_N = logprobs_V.topk(64)
        chosen_K = propose(
            top_N.numpy(), settings.k, settings.method, 0.0, uniforms(seed, len(ids), settings.k, "candidates")
        )
        candidates_K = ids_N[chosen_K].tolist()
        with torch.no_grad():
            logits_KV = reference(torch.tensor([prompt + ids + [c] for c in candidates_K])).logits[:, -1]
        scores_K = logits_KV[:, list(reserved)].softmax(-1) @ bins(len(reserved))
        triggered.append((len(ids), float(hidden_H[0]), candidates_K, top_N[chosen_K].numpy(), scores_K.numpy()))
        best = (scores_K / selection.temperature + selection.prior_weight * top_N[chosen_K]).argmax()
        ids.append(candidates_K[int(best)])
    return ids, triggered


@pytest.mark.parametrize("method", ["top_k", "multinomial"])
@pytest.mark.parametrize("prior_weight", [0.0, 1.0])
def test_the_selecting_loop_equals_separate_forwards(local, reference, reserved, prompts, method, prior_weight):
    probe = run(
        [
            local.generate_selecting(p, Sampling(30), Selection(-1e9, CandidateSettings(k=1, method="top_k")))
            for p in prompts
        ]
    )
    threshold = float(np.quantile([d.value for draft in probe for d in draft.decisions], 0.7))
    # Untrained scores hardly differ: the low temperature gives them a say against the prior.
    selection = Selection(
        threshold, CandidateSettings(k=8, method=method), prior_weight=prior_weight, temperature=1e-3, warmup=2
    )
    drafts = run([local.generate_selecting(p, Sampling(30, seed=5), selection) for p in prompts])
    rescues = 0
    for prompt, draft in zip(prompts, drafts, strict=True):
        ids, triggered = by_separate_forwards(reference, reserved, prompt, 30, selection, 5, local._card.end_ids)
        assert draft.ids == ids
        assert [(d.step, d.candidates_K) for d in draft.decisions] == [
            (step, ids_K) for step, _, ids_K, _, _ in triggered
        ]
        for decision, (_, value, _, logprobs_K, scores_K) in zip(draft.decisions, triggered, strict=True):
            assert decision.value == pytest.approx(value, abs=1e-4)
            np.testing.assert_allclose(decision.logprobs_K, logprobs_K, atol=1e-3)
            np.testing.assert_allclose(decision.scores_K, scores_K, atol=1e-4)
        rescues += sum(d.chosen != d.candidates_K[0] for d in draft.decisions)
    assert rescues > 0
    # Asking for the support shows more and changes nothing.
    shown = run([local.generate_selecting(p, Sampling(30, seed=5, support=4), selection) for p in prompts])
    assert [draft.ids for draft in shown] == [draft.ids for draft in drafts]
    assert {draft.supported.ids_TN.shape for draft in shown} == {(len(draft.ids), 4) for draft in shown}


def test_reserved_ids_are_never_generated(engine, reserved, prompts):
    drafts = run([engine.generate(p, Sampling(60, temperature=5.0, seed=s)) for p in prompts for s in range(4)])
    assert not {token for draft in drafts for token in draft.ids} & set(reserved)


def test_multiplex_feeds_the_mean_embedding(engine, reference, reserved, prompts):
    multiplex = MultiplexSettings(width=3, weighted=True, patience=1000)
    draft = run([engine.generate_multiplex(prompts[2], Sampling(6, seed=9, support=64), multiplex)])[0]
    embedding = reference.get_input_embeddings().weight
    inputs_TH = embedding[prompts[2]]
    with torch.no_grad():
        for step in range(6):
            logits_V = reference(inputs_embeds=inputs_TH[None]).logits[0, -1]
            logits_V[list(reserved)] = -torch.inf
            np.testing.assert_allclose(
                draft.supported.logprobs_TN[step][:8], logits_V.log_softmax(-1).topk(8).values, atol=1e-3
            )
            p_V = logits_V.double().softmax(-1)
            noise_K = uniforms(9, step, 3, "multiplex")
            drawn_K = [int((p_V.cumsum(0) <= u * p_V.sum()).sum()) for u in noise_K]
            assert draft.ids[step] == drawn_K[0]
            weights_K = p_V[drawn_K] / p_V[drawn_K].sum()
            mean_H = sum(w * embedding[c] for w, c in zip(weights_K, drawn_K, strict=True))
            inputs_TH = torch.cat([inputs_TH, mean_H[None].float()])


def test_features_are_hidden_embedding_and_top_logits(engine, reference, reserved, prompts):
    tokens = prompts[1]
    with torch.no_grad():
        hidden_TH = reference.base_model(torch.tensor([tokens])).last_hidden_state[0]
    features_TF = run([engine.features(tokens, 5, 100)])[0]
    width = hidden_TH.shape[-1]
    np.testing.assert_allclose(features_TF[:, :width], hidden_TH[4:-1], atol=1e-4)
    np.testing.assert_allclose(
        features_TF[:, width : 2 * width], reference.get_input_embeddings().weight[tokens[5:]].detach(), atol=1e-6
    )
    top_TN = full_logits(reference, tokens, reserved)[4:-1].topk(100).values
    np.testing.assert_allclose(features_TF[:, 2 * width :], top_TN, atol=1e-3)


def test_what_does_not_fit_is_refused_and_harms_nobody(engine, prompts):
    async def both():
        good = engine.generate(prompts[0], Sampling(10))
        bad = engine.generate([7] * 2000, Sampling(10))
        return await asyncio.gather(good, bad, return_exceptions=True)

    good, bad = asyncio.run(both())
    assert len(good.ids) > 0
    assert isinstance(bad, ContextOverflow)
    assert "slm" in str(bad)
    for wrong in (
        engine.generate([5, engine._card.vocabulary], Sampling(5)),
        engine.generate([-1], Sampling(5)),
        engine.score([1, 2, 3], 1, np.full((3, 1), engine._card.vocabulary)),
    ):
        with pytest.raises(ValueError, match="outside the vocabulary, 0 to"):
            run([wrong])
    with pytest.raises(ValueError, match="at least one token"):
        run([engine.generate([5], Sampling(0))])
    with pytest.raises(ValueError, match="no selector"):
        run([engine.select(prompts[0], [1, 2])])


def test_a_cancelled_call_frees_its_slot(engine, prompts):
    async def cancel():
        calls = [asyncio.create_task(engine.generate(p, Sampling(200, temperature=3.0))) for p in prompts * 3]
        await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return await asyncio.wait_for(engine.generate(prompts[0], Sampling(5)), 20)

    assert len(asyncio.run(cancel()).ids) == 5


def test_divergence_from_engines_equals_the_full_vocabulary(engine, reference, reserved, prompts):
    teacher_settings = SLM.model_copy(update={"path": "embedded:teacher"})
    teacher = load(Hosted("teacher", teacher_settings))
    draft = run([engine.generate(prompts[5], Sampling(30, support=engine._card.vocabulary))])[0]
    scores = run([teacher.score(prompts[5] + draft.ids, len(prompts[5]), draft.supported.ids_TN)])[0]
    teacher.close()
    kl_T = divergence(torch.tensor(draft.supported.logprobs_TN), torch.tensor(scores.logprobs_TN))
    p_TV = full_logits(reference, prompts[5] + draft.ids, reserved)[len(prompts[5]) - 1 : -1].double().log_softmax(-1)
    q_TV = full_logits(loading.load_model(teacher_settings), prompts[5] + draft.ids, ())
    q_TV = q_TV[len(prompts[5]) - 1 : -1].double().log_softmax(-1)
    full_T = (p_TV.exp() * (p_TV.clamp_min(-1e4) - q_TV)).sum(-1)
    np.testing.assert_allclose(kl_T, full_T, atol=1e-3)
