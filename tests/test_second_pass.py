"""Think-at-Hard in the engine, against transformers and peft alone: two plain forwards over the whole text, the second
with the LoRA, on mean embeddings made by hand, under a mask made by hand."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import LAYERS, SUPPORT, second_pass
from peft import PeftModel
from reference_engine import END, RESERVED, card, decode, draw, encode, run, tiny_pair
from test_families import RESERVED as FAMILY_RESERVED
from test_families import SERVED
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel

from s2t_models.artifact import ADAPTER
from s2t_models.engines.contract import Draft, Penalties, Sampling, Written
from s2t_models.engines.torch.engine import TorchEngine
from s2t_models.noise import uniforms
from s2t_models.policies.base import Engines, Request
from s2t_models.policies.single import SingleModel
from s2t_models.policies.tah import ThinkAtHard
from s2t_models.second_pass import CARD, SecondPass, SecondPassError
from s2t_models.settings import SamplerSettings, TahSettings

PROMPTS = [encode(text) for text in ("Ada has 12 ", "8+5=", "x", "Tom has 3 eggs and ", "12 + 7 = ?\n")]


@dataclass
class Reference:
    """Both passes over a whole text at once, with what transformers and peft have."""

    base: PreTrainedModel
    second: SecondPass
    reserved: tuple[int, ...] = RESERVED

    def __post_init__(self) -> None:
        self.decider = self.second.decider()
        adapter = str(self.second.folder / ADAPTER)
        self.adapted = PeftModel.from_pretrained(copy.deepcopy(self.base), adapter).eval()

    @torch.no_grad()
    def logits(self, tokens: list[int], first: int, threshold: float) -> tuple[torch.Tensor, np.ndarray]:
        """The logits [T, V] after each token from the `first` on, and the decider's probability there [T]."""
        cache = DynamicCache()
        out = self.base(torch.tensor([tokens]), past_key_values=cache, output_hidden_states=True)
        logits_TV = self.masked(out.logits[0])
        states = torch.cat([out.hidden_states[layer][0] for layer in LAYERS], dim=-1)
        top_TN = logits_TV.sort(descending=True).values[:, :SUPPORT]
        p_T = self.decider(torch.cat([states, top_TN], dim=-1)).sigmoid()
        hard = [t for t in range(first, len(tokens)) if p_T[t] > threshold]
        if hard:
            mean = [embedding(row, self.base.get_input_embeddings()) for row in logits_TV[hard]]
            again = self.adapted(
                inputs_embeds=torch.stack(mean)[None],
                position_ids=torch.tensor([hard]),
                attention_mask=self.masks(len(tokens), hard),
                past_key_values=cache,
            )
            logits_TV[hard] = logits_TV[hard] + self.masked(again.logits[0])
        return logits_TV[first:], p_T[first:].numpy()

    def masks(self, tokens: int, hard: list[int]) -> Any:
        """What the second passes of the `hard` tokens see of all tokens' first passes and of themselves."""

        def mask(window: int) -> torch.Tensor:
            sees = torch.zeros(1, 1, len(hard), tokens + len(hard), dtype=torch.bool)
            for row, t in enumerate(hard):
                for column, position in enumerate([*range(tokens), *hard]):
                    sees[0, 0, row, column] = t - window < position <= t
            return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)

        config = self.base.config
        window = getattr(config, "sliding_window", None) or tokens + 1
        if getattr(config, "layer_types", None):
            return {"sliding_attention": mask(window), "full_attention": mask(tokens + 1)}
        return mask(window)

    def masked(self, logits_TV: torch.Tensor) -> torch.Tensor:
        return logits_TV.clone().index_fill(-1, torch.tensor(self.reserved), -torch.inf)

    def generate(self, prompt: list[int], count: int, threshold: float, sampling: Sampling) -> tuple[list[int], list]:
        ids: list[int] = []
        hard: list[int] = []
        while len(ids) < count and ids[-1:] != [END]:
            logits_TV, p_T = self.logits(prompt + ids, len(prompt) - 1, threshold)
            hard += [len(ids)] if p_T[-1] > threshold else []
            noise = float(uniforms(sampling.seed, len(ids), 1)[0])
            ids.append(draw(logits_TV[-1].log_softmax(-1), sampling, noise))
        return ids, hard


def embedding(logits_V: torch.Tensor, embed: torch.nn.Module) -> torch.Tensor:
    order = logits_V.argsort(descending=True)[:SUPPORT]
    e = torch.exp(logits_V[order] - logits_V.max())
    return sum((share * embed(token) for share, token in zip(e / e.sum(), order, strict=True)), torch.zeros(()))


@pytest.fixture(scope="module")
def slm() -> PreTrainedModel:
    torch.set_num_threads(1)
    return tiny_pair().slm


@pytest.fixture(scope="module")
def second(slm: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> SecondPass:
    return SecondPass.load(second_pass(slm, tmp_path_factory.mktemp("second")))


@pytest.fixture(scope="module")
def reference(slm: PreTrainedModel, second: SecondPass) -> Reference:
    return Reference(slm, second)


@contextmanager
def running(model: PreTrainedModel, second: SecondPass, slots: int = 8) -> Iterator[TorchEngine]:
    held = card("slm", "second_pass")
    engine = TorchEngine(copy.deepcopy(model), held, slots, decode=decode, second_pass=second)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def engine(slm: PreTrainedModel, second: SecondPass) -> Iterator[TorchEngine]:
    with running(slm, second) as engine:
        yield engine


@pytest.fixture(scope="module")
def threshold(reference: Reference) -> float:
    """One that a third of the steps pass."""
    values = []
    for prompt in PROMPTS:
        ids, _ = reference.generate(prompt, 16, 1.0, Sampling(1))
        values.append(reference.logits(prompt + ids, len(prompt) - 1, 1.0)[1])
    return float(np.quantile(np.concatenate(values), 0.66, method="midpoint"))


def think(engine: TorchEngine, prompt: list[int], settings: TahSettings, **asked: object) -> Draft:
    return asyncio.run(engine.generate_thinking(prompt, Sampling(**{"max_tokens": 24, **asked}), settings))


def test_easy_tokens_take_one_pass_and_equal_the_base(engine, slm):
    """With the LoRA in the model all the while."""
    for prompt in PROMPTS:
        draft = think(engine, prompt, TahSettings(threshold=1.0))
        ids = torch.tensor([prompt])
        own = slm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
            suppress_tokens=list(RESERVED),
        )
        assert draft.ids == own[0, len(prompt) :].tolist()
        assert draft.usage.forwards == len(draft.ids)
        assert draft.decisions == []


def test_a_hard_token_takes_two_passes_whose_logits_add(engine, reference, threshold):
    seen = 0
    for prompt in PROMPTS:
        draft = think(engine, prompt, TahSettings(threshold=threshold), support=12)
        ids, hard = reference.generate(prompt, 24, threshold, Sampling(1))
        assert draft.ids == ids
        assert [decision.step for decision in draft.decisions] == hard
        assert draft.usage.forwards == len(ids) + len(hard)
        logits_TV, p_T = reference.logits(prompt + ids[:-1], len(prompt) - 1, threshold)
        logprobs_TV = logits_TV.log_softmax(-1).numpy()
        rows = np.arange(len(ids))[:, None]
        supported = draft.supported
        np.testing.assert_allclose(supported.logprobs_TN, logprobs_TV[rows, supported.ids_TN], atol=1e-3)
        first_TV, _ = reference.logits(prompt + ids[:-1], len(prompt) - 1, 1.0)
        for decision in draft.decisions:
            t, candidates = decision.step, decision.candidates_K
            assert decision.value == pytest.approx(p_T[t], abs=1e-5)
            assert candidates == first_TV[t].argsort(descending=True)[: len(candidates)].tolist()
            np.testing.assert_allclose(decision.logprobs_K, first_TV[t].log_softmax(-1)[candidates], atol=1e-3)
            np.testing.assert_allclose(decision.scores_K, np.exp(logprobs_TV[t, candidates]), atol=1e-3)
            assert decision.chosen == ids[t]
        seen += len(hard)
    assert seen > 10


def test_second_passes_matter_for_each_other_and_for_the_text(engine, reference, threshold):
    """What would be if one did not see another, or if all tokens were easy, is something else."""
    written = engine.counted.written
    texts = [think(engine, prompt, TahSettings(threshold=threshold)).ids for prompt in PROMPTS]
    assert engine.counted.written - written == sum(map(len, texts)), "a token counts once, however many passes it took"
    assert texts != [think(engine, prompt, TahSettings(threshold=1.0)).ids for prompt in PROMPTS]
    prompt, ids = PROMPTS[0], texts[0]
    both_TV, p_T = reference.logits(prompt + ids, len(prompt) - 1, threshold)
    last = int(np.flatnonzero(p_T > threshold)[-1])
    alone_TV, _ = reference.logits((prompt + ids)[: len(prompt) + last], len(prompt) - 1 + last, threshold)
    assert (both_TV[last] - alone_TV[-1])[: RESERVED[0]].abs().max() > 0.01


def test_several_at_once_equal_each_alone(slm, second, engine, threshold):
    """Beside plain decodes of the same prompts, whose text the LoRA does not touch, on fewer slots than calls."""
    sampler = Sampling(24, temperature=0.8, top_p=0.95, seed=3)
    settings = TahSettings(threshold=threshold)
    alone = [asyncio.run(engine.generate_thinking(prompt, sampler, settings)) for prompt in PROMPTS]
    plain = [asyncio.run(engine.generate(prompt, Sampling(24))).ids for prompt in PROMPTS]
    with running(slm, second, 4) as busy:

        async def together() -> list[Draft]:
            thinking = [busy.generate_thinking(prompt, sampler, settings) for prompt in PROMPTS]
            return await asyncio.gather(*thinking, *(busy.generate(prompt, Sampling(24)) for prompt in PROMPTS))

        for _ in range(2):  # the second time prompts are cached
            drafts = asyncio.run(together())
            assert [draft.ids for draft in drafts] == [draft.ids for draft in alone] + plain
            for draft, other in zip(drafts, alone, strict=False):
                assert [decision.step for decision in draft.decisions] == [one.step for one in other.decisions]


def test_sampled_text_is_the_seeds(engine, reference, threshold):
    sampling = Sampling(24, temperature=0.9, top_p=0.9, top_k=10, seed=5)
    draft = asyncio.run(engine.generate_thinking(PROMPTS[0], sampling, TahSettings(threshold=threshold)))
    assert draft.ids == reference.generate(PROMPTS[0], 24, threshold, sampling)[0]


@pytest.mark.filterwarnings("error:fan_in_fan_out")
@pytest.mark.parametrize("family", SERVED)
def test_every_family_that_is_served_runs_second_passes(family: str, tmp_path: Path):
    """Also those with sliding layers, from which second passes that lie too far behind are left out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(SERVED[family]), attn_implementation="eager").float().eval()
    second = SecondPass.load(second_pass(model, tmp_path))
    reference = Reference(model, second, FAMILY_RESERVED)
    prompt = [5, 40, 7, 33, 12, 61, 8, 9, 77, 20, 4]
    held = replace(card("slm", "second_pass", context=64), vocabulary=97, masked_ids=FAMILY_RESERVED)
    engine = TorchEngine(copy.deepcopy(model), held, 4, second_pass=second)
    try:
        draft = think(engine, prompt, TahSettings(threshold=0.0), max_tokens=14, support=8)
    finally:
        engine.close()
    logits_TV, _ = reference.logits(prompt + draft.ids[:-1], len(prompt) - 1, 0.0)
    expected_TV, rows = logits_TV.log_softmax(-1).numpy(), np.arange(len(draft.ids))[:, None]
    np.testing.assert_allclose(draft.supported.logprobs_TN, expected_TV[rows, draft.supported.ids_TN], atol=1e-3)
    assert len(draft.decisions) == len(draft.ids) > 8


def test_the_policy_streams_and_decides_through_the_contract(engine, threshold):
    engines = Engines({"slm": engine}, decode, encode)
    policy = ThinkAtHard("tah", TahSettings(threshold=threshold, sampler=SamplerSettings()))
    assert policy.needs == {"slm": frozenset({"second_pass"})}
    whole = run(policy, engines, Request(PROMPTS[0], 24))
    live = run(policy, engines, Request(PROMPTS[0], 24, live=True))
    draft = think(engine, PROMPTS[0], policy.settings)
    assert whole.ids == live.ids == draft.ids
    assert draft.decisions
    for decoded in (whole, live):
        told = [(decision.step, decision.candidates_K, decision.chosen) for decision in decoded.decisions]
        assert told == [(decision.step, decision.candidates_K, decision.chosen) for decision in draft.decisions]
    assert len(live.spans) > len(whole.spans)
    assert whole.usage["slm"].forwards == len(draft.ids) + len(draft.decisions)
    assert whole.finish == draft.finish
    easy = replace(policy, settings=TahSettings(threshold=1.0))
    assert run(easy, engines, Request(PROMPTS[0], 24, temperature=0)).ids != whole.ids
    greedy = run(SingleModel("greedy"), engines, Request(PROMPTS[0], 24)).ids
    assert run(easy, engines, Request(PROMPTS[0], 24, temperature=0)).ids == greedy
    parts: list[Written] = []
    asyncio.run(engine.generate_thinking(PROMPTS[0], Sampling(24), policy.settings, parts.append))
    assert [token for part in parts for token in part.ids] == draft.ids


def test_what_an_engine_refuses(slm, engine, second, tmp_path):
    with pytest.raises(ValueError, match="penalties go with plain decoding alone"):
        think(engine, PROMPTS[0], TahSettings(), penalties=Penalties(presence=1.0))
    plain = TorchEngine(copy.deepcopy(slm), card("slm"), 2)
    try:
        with pytest.raises(ValueError, match="slm has no second pass; set tah"):
            think(plain, PROMPTS[0], TahSettings())
    finally:
        plain.close()
    with pytest.raises(SecondPassError, match="holds no second pass; `s2t distil --objective tah` trains one"):
        SecondPass.load(tmp_path)
    (tmp_path / CARD).write_text(json.dumps({"layers": [0], "support": "many"}))
    with pytest.raises(SecondPassError, match=r"second_pass.json: support"):
        SecondPass.load(tmp_path)
    torch.manual_seed(0)
    other = MistralForCausalLM(MistralConfig(vocab_size=112, hidden_size=32, num_hidden_layers=1, intermediate_size=64))
    with pytest.raises(SecondPassError, match="its LoRA is another model's"):
        second.attach(other)
