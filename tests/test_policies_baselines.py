"""The systems S2T is compared with: each test shows the mechanism at work, not only that it runs."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_engine import (
    END,
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
from tiny_families import FAMILIES, family_tokenizer, write_pair

from s2t_models import chat, loading
from s2t_models.answers.final_answer import boxed
from s2t_models.answers.voting import vote
from s2t_models.engines.contract import Draft, Penalties, Sampling, Scores, Usage
from s2t_models.engines.torch.engine import TorchEngine
from s2t_models.hosting import Hosted, Hosting
from s2t_models.policies.base import Engines, Request, gather
from s2t_models.policies.collaborate import Collaborate
from s2t_models.policies.majority import Majority
from s2t_models.policies.multiplex import MultiplexThinking
from s2t_models.policies.r2r import RouterTrigger
from s2t_models.policies.r2r_labels import ask, label, numbers_differ
from s2t_models.policies.scorers import TeacherScorer
from s2t_models.policies.segments import generate_segment
from s2t_models.policies.single import SingleModel
from s2t_models.policies.specreason import QUESTION, Digits, SpecReason, build
from s2t_models.recipe import Recipe
from s2t_models.router import (
    Router,
    RouterConfig,
    load_router,
    save_router,
)
from s2t_models.settings import MultiplexSettings, SamplerSettings, SpecReasonSettings
from s2t_models.training.router import recall_threshold, train_router
from s2t_models.training_settings import RouterSettings

PROMPT = encode("Ada has 12 ")
WARM = SamplerSettings(temperature=0.9, top_p=0.95, top_k=20)


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


# One model alone, and votes


def test_alone_calls_the_engine_it_names_and_greedy_is_its_argmax(engines, reference):
    for name in ("slm", "teacher"):
        decoded = run(SingleModel("x", name), engines, Request(PROMPT, 24))
        expected = [int(reference[name].logprobs(PROMPT + decoded.ids[:t]).argmax()) for t in range(len(decoded.ids))]
        assert decoded.ids == expected
        assert list(decoded.usage) == [name]
        assert decoded.usage[name].decode == len(decoded.ids)


def test_sample_is_the_seeds_and_the_requests_temperature_wins(engines, reference):
    sample = SingleModel("sample", sampler=WARM)
    texts = [run(sample, engines, Request(PROMPT, 24, seed)).ids for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[2] == run(sample, reference, Request(PROMPT, 24, 1)).ids
    greedy = run(SingleModel("greedy"), engines, Request(PROMPT, 24)).ids
    assert run(sample, engines, Request(PROMPT, 24, seed=1, temperature=0.0)).ids == greedy


def test_majority_votes_over_samples_of_distinct_seeds(engines):
    policy, winners = Majority("maj@5", WARM, 5), set()
    for seed in range(4):
        decoded = run(policy, engines, Request(PROMPT, 12, seed))
        seeds = range(5 * seed, 5 * seed + 5)
        alone = [run(SingleModel("sample", sampler=WARM), engines, Request(PROMPT, 12, one)) for one in seeds]
        assert decoded.samples == [sample.ids for sample in alone]
        assert len({tuple(sample) for sample in decoded.samples}) > 1
        winner = vote([decode(sample) for sample in decoded.samples])
        assert decoded.ids == decoded.samples[winner]
        assert decoded.usage["slm"].decode == sum(len(sample) for sample in decoded.samples)
        winners.add(winner)
    assert len(winners) > 1, "not simply the first sample"


@dataclass
class Chorus:
    """An engine that says the text of the seed."""

    texts: list[str]

    async def generate(self, prefix: list[int], sampling: Sampling) -> Draft:
        return Draft(encode(self.texts[sampling.seed]), "end", Usage())


def test_majority_serves_the_first_sample_with_the_majoritys_answer():
    def served(*texts: str, options: tuple[str, ...] = ()) -> str:
        voices = Engines({"slm": Chorus(list(texts))}, decode, encode)
        request = Request(encode("Q?"), 50, options=options)
        return decode(run(Majority("maj", WARM, len(texts)), voices, request).ids)

    assert served("7 eggs", "so 8", "8.0 in all", "no idea") == "so 8"
    assert served("no idea", "the answer is 1/2", "it is 3", "\\boxed{0.5}") == "the answer is 1/2"
    letters = ("answer: A. 10", "answer: B. 20", "it is 20", "10 or 20")
    assert served(*letters, options=("10", "20")) == "answer: B. 20"


def test_the_loop_goes_on_while_a_vote_is_counted():
    reading, has_gone_on = threading.Event(), threading.Event()

    def slowly(ids: list[int]) -> str:
        reading.set()
        assert has_gone_on.wait(30)
        return decode(ids)

    async def beside() -> list[int]:
        voices = Engines({"slm": Chorus(["7 eggs", "so 8"])}, slowly, encode)
        voted = asyncio.ensure_future(gather(Majority("maj", WARM, 2).decode(voices, Request(encode("Q?"), 50))))
        while not reading.is_set():
            await asyncio.sleep(0)
        has_gone_on.set()
        return (await voted).ids

    assert decode(asyncio.run(beside())) == "7 eggs"


# SpecReason


@dataclass
class Scripted:
    """An engine that recites: `says` maps what the prefix ends with to a text; `scores` are its digits in order."""

    says: dict[str, str]
    scores: list[int]

    def __post_init__(self) -> None:
        self.asked: list[str] = []

    async def card(self):
        return card("scripted")

    async def generate(self, prefix: list[int], sampling: Sampling) -> Draft:
        text = decode(prefix)
        said = max((known for known in self.says if known in text), key=lambda known: text.rindex(known) + len(known))
        whole = encode(self.says[said].replace("#", "")) + ([END] if self.says[said].endswith("#") else [])
        done = len(text) - text.rindex(said) - len(said)
        ids = whole[done : done + sampling.max_tokens]
        return Draft(ids, "end" if ids[-1:] == [END] else "length", Usage(decode=len(ids)))

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray) -> Scores:
        self.asked.append(decode(tokens))
        logprobs = np.full(ids_TN.shape, -5.0)
        logprobs[0, self.scores.pop(0)] = -0.1
        return Scores(logprobs, np.array([1]), Usage(prefill=1, forwards=1))


def specreason(slm: Scripted, teacher: Scripted, **settings):
    policy = SpecReason("specreason", "|", SpecReasonSettings(delimiter=".", **settings), chunk=4)
    return run(policy, Engines({"slm": slm, "teacher": teacher}, decode, encode), Request(encode("Q?"), 200))


def test_specreason_keeps_good_steps_and_takes_the_teachers_for_bad_ones():
    slm = Scripted({"Q?": "2+2=4. junk", "4.": " 4+1=6. junk", "5.": " \\boxed{5}. junk"}, [])
    teacher = Scripted({"4.": " 4+1=5. junk"}, [7, 6, 9])
    decoded = specreason(slm, teacher)
    assert decode(decoded.ids) == "2+2=4. 4+1=5. \\boxed{5}."
    assert [span.source for span in decoded.spans] == ["slm", "teacher", "slm"]
    assert [decision.value for decision in decoded.decisions] == [7, 6, 9]
    assert teacher.asked == ["Q?2+2=4.|", "Q?2+2=4. 4+1=6.|", "Q?2+2=4. 4+1=5. \\boxed{5}.|"]
    assert decoded.finish == "end"
    assert decoded.usage["teacher"].decode > 0


def test_specreason_stops_at_the_end_token_and_at_a_repeated_step():
    slm = Scripted({"Q?": "over and over.", "over.": "over and over."}, [])
    decoded = specreason(slm, Scripted({}, [9, 9, 9]))
    assert decode(decoded.ids) == "over and over.over and over."
    assert decoded.finish == "length"

    slm = Scripted({"Q?": "fin#"}, [])
    teacher = Scripted({}, [9])
    decoded = specreason(slm, teacher)
    assert decoded.ids == [*encode("fin"), END]
    assert decoded.finish == "end"
    assert teacher.asked == ["Q?fin|"]  # the end token is not shown to the judge


def test_the_digits_are_found_with_and_without_a_leading_space():
    """A tokenizer that writes " 7" as one token says a score with either."""
    words = {f"{space}{digit}": 10 * len(space) + digit for space in ("", " ") for digit in range(10)}
    engines = Engines(
        {}, lambda ids: next(word for word, token in words.items() if token == ids[-1]), lambda t: [words[t]]
    )
    digits = Digits.of(engines)
    logprobs_N = np.where(np.isin(digits.ids_N, [4, 14]), np.log(0.3), np.log(0.4 / 18))
    assert digits.probabilities(logprobs_N)[4] == pytest.approx(0.6)
    with pytest.raises(ValueError, match="no token for the digit 0 alone"):
        Digits.of(Engines({}, lambda ids: "<unk>", lambda text: [3]))


def test_specreason_expected_digit(reference):
    policy = SpecReason("specreason", "?", SpecReasonSettings(score="expected", delimiter=" ", step_tokens=8))
    decoded = run(policy, reference, Request(PROMPT, 20, seed=1))
    first = decoded.decisions[0]
    step = asyncio.run(
        generate_segment(reference["slm"], PROMPT, Sampling(8, 0.6, 0.95, seed=1), decode, (" ",), 16)
    ).ids
    p = reference["teacher"].logprobs(PROMPT + step + encode("?")).exp()[encode("0123456789")]
    assert first.value == pytest.approx(float((p / p.sum()) @ torch.arange(10.0)), abs=1e-4)
    assert len(decoded.ids) <= 20


def test_specreasons_penalties_see_the_steps_before(engines):
    """All of them accepted, the text is that of one draft."""
    settings, penalties = SpecReasonSettings(accept=0, delimiter=" ", step_tokens=8), Penalties(frequency=1.5)
    decoded = run(SpecReason("specreason", "?", settings, 3), engines, Request(PROMPT, 20, 1, penalties=penalties))
    drawn = Sampling(20, settings.sampler.temperature, settings.sampler.top_p, settings.sampler.top_k, seed=1)
    draft, plain = (
        asyncio.run(engines["slm"].generate(PROMPT, asked)) for asked in (replace(drawn, penalties=penalties), drawn)
    )
    assert len(decoded.decisions) > 1
    assert decoded.ids == draft.ids != plain.ids


def test_a_segment_is_the_same_text_whatever_the_chunk(engines):
    def segment(chunk: int):
        sampling = Sampling(40, 0.9, seed=4, first_step=3)
        return asyncio.run(generate_segment(engines["slm"], PROMPT, sampling, decode, ("1", "="), chunk))

    whole = segment(40)
    assert whole.finish is None
    assert decode(whole.ids).lstrip()[-1] in "1="
    assert all(segment(chunk).ids == whole.ids for chunk in (1, 3, 7))


# R2R


def router_rows(engines: Engines) -> tuple[np.ndarray, np.ndarray]:
    async def both():
        return await asyncio.gather(
            *(
                label(engines, encode(p), numbers_differ, 24, support=40, sentence_tokens=12)
                for p in ("8+5=", "x", "Tom ")
            )
        )

    rows = asyncio.run(both())
    return np.concatenate([row.inputs_TF for row in rows]), np.concatenate([row.labels_T for row in rows])


def test_r2r_replaces_exactly_the_routed_tokens_by_the_teachers(pair, engines, reference):
    torch.manual_seed(0)
    router = Router(RouterConfig(hidden=64, support=40, width=16, blocks=2)).eval()
    start = len(PROMPT)
    greedy = run(SingleModel("greedy"), engines, Request(PROMPT, 24)).ids
    p = router.probabilities(asyncio.run(reference["slm"].features(PROMPT + greedy, start, 40)))
    threshold = float(np.quantile(p, 0.8, method="midpoint"))
    policy = Collaborate("r2r", RouterTrigger(threshold), TeacherScorer("vocabulary"), support=32, chunk=8)
    assert policy.needs == {"slm": frozenset({"route"}), "teacher": frozenset()}
    routing = TorchEngine(copy.deepcopy(pair.slm), card("slm", "route"), 4, router=router)
    both = Engines({"slm": routing, "teacher": engines["teacher"]}, decode, encode)
    try:
        decoded = run(policy, both, Request(PROMPT, 24))
        stepwise = run(replace(policy, chunk=1), both, Request(PROMPT, 24))
    finally:
        routing.close()
    routed = {decision.step for decision in decoded.decisions}
    assert routed
    for t, token in enumerate(decoded.ids):
        state = PROMPT + decoded.ids[:t]
        own = int(reference["slm"].logprobs(state).argmax())
        value = router.probabilities(asyncio.run(reference["slm"].features([*state, own], len(state), 40)))[0]
        assert (value >= threshold) == (t in routed)
        assert token == (int(reference["teacher"].logprobs(state).argmax()) if t in routed else own)
    assert decoded.ids == stepwise.ids


def test_labels_are_the_slms_tokens_that_lead_the_teacher_elsewhere(engines, reference):
    prompt = encode("8+5=")
    seen: list[tuple[str, str, str]] = []

    async def judge(context: str, reference: str, alternative: str) -> bool:
        seen.append((context, reference, alternative))
        return len(seen) % 2 == 0

    rows = asyncio.run(label(engines, prompt, judge, 24, support=40, sentence_tokens=12))
    text = run(SingleModel("llm", "teacher"), engines, Request(prompt, 24)).ids
    slm = [int(reference["slm"].logprobs(prompt + text[:t]).argmax()) for t in range(len(text))]
    differs = np.array(slm) != np.array(text)
    assert 0 < differs.sum() < len(text)
    np.testing.assert_array_equal(rows.differs_T, differs)
    assert rows.labels_T.sum() == len(seen) // 2
    assert not rows.labels_T[~differs].any()
    # What the router is shown is the SLM's token, not the teacher's that stands in the text.
    embedding = reference["slm"].model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_allclose(rows.inputs_TF[:, 64:128], embedding[slm], atol=1e-6)
    for context, own, other in seen:
        assert (context + own).startswith(decode(prompt))
        assert own != other


def test_numbers_decide_for_generated_arithmetic():
    async def differ(first: str, second: str) -> bool:
        return await numbers_differ("", first, second)

    assert asyncio.run(differ("Then Ada has 3+4=7 eggs.", "Then Ada has 3+4=8 eggs."))
    assert not asyncio.run(differ("Then Ada has 3+4=7 eggs.", "After that, there are 3+4=7 eggs."))


def test_a_model_judges_by_its_digits(reference):
    """Over the question in the pair's own chat template."""
    tokenizer: Any = family_tokenizer(FAMILIES["gemma2"])
    asked: list[list[int]] = []

    class Teacher(Scripted):
        async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray) -> Scores:
            asked.append(tokens)
            assert ids_TN.tolist() == [tokenizer.convert_tokens_to_ids(["0", "1"])]
            return Scores(np.log([[1 - p, p]]), np.array([0]), Usage())

    for p in (0.2, 0.7):
        assert asyncio.run(ask(Teacher({}, []), tokenizer)("aba", "bab", "abb")) == (p > 0.5)
    text = tokenizer.decode(asked[0])
    assert text.startswith("<bos><start_of_turn>user\nTwo sentences go on")
    assert "Text: aba\n\nSentence 1: bab\n\nSentence 2: abb\n\nReply 1" in text
    assert text.endswith("wording only.<end_of_turn>\n<start_of_turn>model\n")


@pytest.mark.parametrize("name", FAMILIES)
def test_specreason_asks_in_the_chat_template_of_the_pair(name: str, tmp_path: Path) -> None:
    write_pair(FAMILIES[name], tmp_path)
    model = {"path": str(tmp_path / "slm")}
    recipe = Recipe.model_validate({"name": name, "slm": model, "teacher": model})
    tokenizer = loading.load_tokenizer(recipe.slm)
    policy = build("specreason", Hosting(recipe, "digest", Hosted("slm", recipe.slm), {}))
    turns = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "It is 5."}]
    whole = chat.render(tokenizer, [*turns, {"role": "user", "content": QUESTION}])
    assert isinstance(policy, SpecReason)
    assert f"{whole}Score: ".endswith("It is 5." + policy.verify)
    assert policy.verify.startswith(FAMILIES[name].end)
    assert policy.verify.count(QUESTION) == 1
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(chat.ChatError, match="leaves earlier answers out"):
        chat.follow_up(tokenizer, QUESTION)


def test_router_learns_and_is_saved_with_its_threshold(tmp_path):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1200, 8 + 8 + 10)).astype(np.float32)
    labels = (inputs[:, 0] + inputs[:, 20] > 1.5).astype(np.int8)
    settings = RouterConfig(hidden=8, support=10, width=32, blocks=2)
    reports: list[dict[str, float]] = []
    router = train_router(
        inputs,
        labels,
        settings,
        RouterSettings(learning_rate=3e-3, batch=128, epochs=30, patience=30),
        report=reports.append,
    )
    p = router.probabilities(inputs)
    predicted = p >= router.settings.threshold
    assert predicted[labels == 1].mean() > 0.9
    assert predicted.mean() < 2 * labels.mean()
    losses = [report["validation_loss"] for report in reports]
    assert min(losses) < 0.8 * losses[0]
    save_router(router, tmp_path)
    again = load_router(tmp_path)
    assert again.settings == router.settings
    np.testing.assert_array_equal(again.probabilities(inputs), p)


def test_router_trains_on_the_labels_of_a_pair(engines):
    inputs, labels = router_rows(engines)
    if labels.all() or not labels.any():
        pytest.fail("the tiny pair gives labels of one kind only: choose another seed")
    inputs, labels = np.concatenate([inputs] * 4), np.concatenate([labels] * 4)
    settings = RouterConfig(hidden=64, support=40, width=32, blocks=1)
    router = train_router(inputs, labels, settings, RouterSettings(learning_rate=3e-3, epochs=30, batch=64))
    assert (router.probabilities(inputs)[labels == 1] >= router.settings.threshold).mean() >= 0.9


def test_the_published_router_has_the_published_shape():
    router = Router(RouterConfig(hidden=64))
    assert len(router.blocks) == 6
    assert router.enter.weight.shape == (1024, 3 * 64)
    assert router.blocks[0].up.weight.shape == (4096, 1024)
    assert router.blocks[0].dropout.p == 0.1
    assert router(torch.zeros(5, 64 + 64 + 100)).shape == (5,)


def test_recall_threshold_is_the_highest_that_reaches_the_recall():
    p = np.array([0.9, 0.8, 0.7, 0.6, 0.95, 0.1], dtype=np.float32)
    labels = np.array([1, 1, 1, 1, 0, 0])
    assert recall_threshold(p, labels, 0.75) == pytest.approx(0.7)
    assert recall_threshold(p, labels, 0.95) == pytest.approx(0.6)


def test_router_errors_are_one_line(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no router"):
        load_router(tmp_path)
    with pytest.raises(ValueError, match="both kinds are needed"):
        train_router(np.zeros((20, 26), np.float32), np.zeros(20), RouterConfig(8, 10, 8, 1), RouterSettings())
    order = torch.randperm(20, generator=torch.Generator().manual_seed(RouterSettings().seed))
    labels = np.zeros(20)
    labels[order[-1]] = 1  # the first of the order are the validation steps
    with pytest.raises(ValueError, match="none of 2 validation steps is divergent; label more prompts"):
        train_router(np.zeros((20, 26), np.float32), labels, RouterConfig(8, 10, 8, 1), RouterSettings())


# Multiplex Thinking


@pytest.mark.parametrize("weighted", [True, False])
def test_multiplex_equals_plain_forwards_over_mean_embeddings(engines, reference, weighted):
    policy = MultiplexThinking("multiplex", MultiplexSettings(width=3, weighted=weighted), WARM)
    for seed in range(3):
        decoded = run(policy, engines, Request(PROMPT, 16, seed))
        assert decoded.ids == run(policy, reference, Request(PROMPT, 16, seed)).ids


def test_multiplex_mean_embedding_changes_what_follows(engines):
    wide = MultiplexThinking("multiplex", MultiplexSettings(width=3), WARM)
    narrow = MultiplexThinking("multiplex", MultiplexSettings(width=1), WARM)
    pairs = [[run(policy, engines, Request(PROMPT, 16, seed)).ids for policy in (wide, narrow)] for seed in range(4)]
    assert all(a[0] == b[0] for a, b in pairs)  # the first draw is the text
    assert any(a != b for a, b in pairs)


def test_multiplex_goes_on_with_ordinary_sampling_once_certain(engines, reference):
    policy = MultiplexThinking("multiplex", MultiplexSettings(width=3, entropy=100.0, patience=4), WARM)
    decoded = run(policy, engines, Request(PROMPT, 16, 1))
    assert decoded.ids == run(policy, reference, Request(PROMPT, 16, 1)).ids
    from_the_start = replace(policy, settings=policy.settings.model_copy(update={"patience": 1}))
    sampled = run(SingleModel("sample", sampler=WARM), engines, Request(PROMPT, 16, 1)).ids
    assert run(from_the_start, engines, Request(PROMPT, 16, 1)).ids == sampled


def test_boxed_wants_closed_braces():
    assert boxed("\\boxed{1} \\boxed{2") is None
    assert boxed("\\boxed{a{b}c}") == "a{b}c"
    assert boxed("boxed in") is None


def test_reference_engine_is_the_contract(pair):
    from s2t_models.engines.contract import Engine

    assert isinstance(ReferenceEngine(pair.slm, card("slm")), Engine)


def test_policies_are_asynchronous_generators(engines):
    events = SingleModel("greedy").decode(engines, Request(PROMPT, 2))
    assert isinstance(events, AsyncIterator)
    asyncio.run(events.aclose())
