"""Training Think-at-Hard: its loss and its states against plain forwards, and its product in the engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from labelled_rows import labelled_rows
from made_up import provenance

from pipelines.data.layout import SHARDS
from pipelines.data.schema import SHARD
from pipelines.data.shards import shard_metadata, shard_name, write_shard
from pipelines.distil.__main__ import main
from s2t_models import loading
from s2t_models.artifact import ADAPTER, read_provenance
from s2t_models.engines.contract import Sampling
from s2t_models.engines.load import load
from s2t_models.hosting import host
from s2t_models.policies import offer
from s2t_models.recipe import Recipe, RecipeError, load_recipe
from s2t_models.reserved import reserved_rows
from s2t_models.router import Router
from s2t_models.second_pass import Card, SecondPass
from s2t_models.settings import TahSettings
from s2t_models.training.batches import Trajectory, collate, trajectories
from s2t_models.training.build import build
from s2t_models.training.decider import read, train_decider
from s2t_models.training.objectives.tah import BothPasses
from s2t_models.training.products import Merged
from s2t_models.training.trainer import Trainer
from serving.registry import RegistryError, recipe_of, register, weights_of
from serving.store import use_store

SETTINGS = [
    *("distil.batch=4", "distil.validation=0.2", "distil.learning_rate=0.01", "distil.steps=12"),
    *("distil.tah.lora={rank: 4, alpha: 8, dropout: 0}", "distil.tah.width=32", "distil.tah.blocks=1"),
    *("distil.tah.learning_rate=3e-3", "distil.tah.epochs=6", "distil.tah.batch=2"),
]


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    torch.set_num_threads(1)
    return load_recipe(recipe_path, SETTINGS)


@pytest.fixture(scope="module")
def rows(recipe: Recipe) -> list[dict[str, Any]]:
    """Solutions at which the teacher agrees with the SLM, but where this would write an id that 3 divides: there it
    wants the next id."""
    rows = agreeing(recipe, labelled_rows(recipe, "embedded-train", 10))
    for row in rows:
        row["teacher_argmax_T"] = [own + (own % 3 == 0) for own in row["teacher_argmax_T"]]
    return rows


def agreeing(recipe: Recipe, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the SLM's own choices as the teacher's."""
    model, out = loading.load_model(recipe.slm), []
    for row in rows:
        with torch.no_grad():
            own_L = model(torch.tensor([row["prompt_ids"] + row["output_ids"]])).logits[0].argmax(-1).tolist()
        out.append(row | {"teacher_argmax_T": own_L[len(row["prompt_ids"]) - 1 : -1]})
    return out


@pytest.fixture(scope="module")
def trained(recipe: Recipe, rows: list[dict[str, Any]]) -> tuple[Trainer, list[float]]:
    trainer = Trainer(recipe, "tah", trajectories(rows))
    return trainer, [trainer.advance()["second_pass_loss"] for _ in range(recipe.distil.steps)]


def test_training_lowers_its_loss_and_trains_the_lora_alone(trained: tuple[Trainer, list[float]], recipe: Recipe):
    trainer, found = trained
    assert np.mean(found[-3:]) < 0.8 * np.mean(found[:3])
    assert all("lora" in name for name in trainer.selector.trained())
    base = loading.load_model(recipe.slm)
    now = dict(trainer.selector.model.named_parameters())
    for name, value in base.named_parameters():
        other = now.get(name)
        if other is None:
            other = now[name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")]
        torch.testing.assert_close(other, value, rtol=0, atol=0)


def test_a_batch_is_the_same_however_it_is_cut(recipe: Recipe, rows: list[dict[str, Any]]):
    steps = []
    for tokens in (100, 4096):
        cut = recipe.model_copy(update={"distil": recipe.distil.model_copy(update={"micro_batch": tokens})})
        steps.append(Trainer(cut, "tah", trajectories(rows)).advance())
    for name in ("loss", "second_pass_loss", "gradient_norm"):
        assert steps[0][name] == pytest.approx(steps[1][name], rel=1e-4)


def test_the_loss_and_the_states_are_those_of_plain_forwards(
    trained: tuple[Trainer, list[float]], recipe: Recipe, rows: list[dict[str, Any]]
):
    """A second pass at a time: the trajectory up to its state, the second passes before it, and itself."""
    trainer, _ = trained
    items = trajectories(rows)[:3]
    batch = collate(items, torch.device("cpu"), leaves=False)
    selector = trainer.selector.eval()
    with torch.no_grad():
        outputs = trainer._outputs(batch, selector, trainer._base(items, batch))
        terms = trainer.objective.terms(batch, outputs)
    assert isinstance(outputs, BothPasses)
    base = loading.load_model(recipe.slm, attention="eager")
    selector.gate.open_BL = None
    state, loss, hard_S = 0, 0.0, []
    for item in items:
        ids, prompt = torch.from_numpy(item.tree.tokens), item.tree.prompt
        with torch.no_grad():
            first_LV = selector.text_logits(base.model(ids[None]).last_hidden_state[0])
        before: list[int] = []
        for t, target in enumerate(item.teacher_T):
            at = prompt - 1 + t
            hard = int(first_LV[at].argmax()) != target
            hard_S.append(hard)
            if hard:
                before.append(at)
                hidden_H = second_hidden(selector, ids, first_LV, before)
                torch.testing.assert_close(outputs.tuned_SH[state], hidden_H, rtol=1e-4, atol=1e-4)
                both_V = first_LV[at] + selector.text_logits(hidden_H[None])[0]
                loss -= float(both_V.log_softmax(-1)[target])
            state += 1
    assert outputs.hard_S.tolist() == hard_S
    assert 3 < sum(hard_S) < len(hard_S)
    (term,) = terms
    assert term.value.item() == pytest.approx(loss / state, rel=1e-4)


def second_hidden(selector: Any, ids_L: torch.Tensor, first_LV: torch.Tensor, second: list[int]) -> torch.Tensor:
    """The hidden state of the last of some second passes, [H]: one layer after the other, written out with peft's
    modules, all tokens laid behind each other and the LoRA's part added for the second passes alone."""
    model = selector.model
    embed = model.get_input_embeddings()
    top = first_LV[second].topk(100)
    means = torch.stack([w @ embed(i) for w, i in zip(top.values.softmax(-1), top.indices, strict=True)])
    x = torch.cat([embed(ids_L), means])[None]
    trunk = len(ids_L)
    positions = torch.tensor([*range(trunk), *second])
    is_second = torch.arange(len(positions)) >= trunk
    sees = (positions[None] <= positions[:, None]) & (~is_second[None] | is_second[:, None])
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    rope = model.model.rotary_emb(x, positions[None])

    def linear(layer: Any, value: torch.Tensor) -> torch.Tensor:
        extra = layer.lora_B["default"](layer.lora_A["default"](value)) * layer.scaling["default"]
        return layer.base_layer(value) + extra * is_second[:, None]

    with torch.no_grad():
        for block in model.model.layers:
            attention, h = block.self_attn, block.input_layernorm(x)
            heads = (1, len(positions), -1, attention.head_dim)
            q, k, v = (
                linear(part, h).view(heads).transpose(1, 2)
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = rotated(q, rope), rotated(k, rope)
            k, v = (part.repeat_interleave(attention.num_key_value_groups, 1) for part in (k, v))
            weights = (q @ k.transpose(-1, -2) * attention.head_dim**-0.5 + mask).softmax(-1)
            x = x + linear(attention.o_proj, (weights @ v).transpose(1, 2).reshape(1, len(positions), -1))
            h, mlp = block.post_attention_layernorm(x), block.mlp
            x = x + linear(mlp.down_proj, mlp.act_fn(linear(mlp.gate_proj, h)) * linear(mlp.up_proj, h))
        return model.model.norm(x)[0, -1]


def rotated(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * rope[0][:, None] + turned * rope[1][:, None]


@pytest.fixture(scope="module")
def product(
    trained: tuple[Trainer, list[float]],
    recipe: Recipe,
    rows: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("product") / "tah"
    planned = provenance(objective="tah", base_weights=loading.weights_hash(recipe.slm))
    done = build(recipe, trained[0].selector.trained(), trajectories(rows), None, planned, folder)
    assert read_provenance(folder) == done
    assert 0.1 < done.decider["hard"] < 0.6
    assert done.decider["auc"] > 0.9
    return folder


def test_the_product_is_served_beside_the_slm(product: Path, recipe: Recipe, rows: list[dict[str, Any]]):
    """Its decider finds what it was taught, and a second pass there says what the teacher would."""
    second = SecondPass.load(product)
    assert second.card.layers == (0, 1, 3, 4)
    assert (product / ADAPTER / "adapter_config.json").is_file()
    with_it = recipe.model_copy(update={"tah": str(product)})
    hosting = host(with_it)
    assert "tah" in offer(hosting)[0]
    engine: Any = load(hosting.engines["slm"])
    try:
        card = asyncio.run(engine.card())
        assert "second_pass" in card.capabilities
        assert card.second_pass == second.weights_hash
        prompt = rows[0]["prompt_ids"]
        never = asyncio.run(engine.generate_thinking(prompt, Sampling(8), TahSettings(threshold=1.0)))
        plain = asyncio.run(engine.generate(prompt, Sampling(8)))
        assert never.ids == plain.ids
        always = asyncio.run(engine.generate_thinking(prompt, Sampling(8), TahSettings(threshold=0.0)))
        assert [decision.step for decision in always.decisions] == list(range(len(always.ids)))
    finally:
        engine.close()


def test_a_recipe_refuses_what_is_no_second_pass_or_anothers(product: Path, recipe: Recipe, tmp_path: Path):
    reason = offer(host(recipe))[1]["tah"]
    assert reason == "tah: the recipe names no second pass as tah; `s2t distil --objective tah` trains one"
    with pytest.raises(RecipeError, match=r"tah: .* holds no second pass; `s2t distil --objective tah` trains one"):
        host(recipe.model_copy(update={"tah": str(tmp_path)}))
    other = recipe.model_copy(update={"tah": str(product), "slm": recipe.teacher})
    with pytest.raises(RecipeError, match=r"tah: .* was made with another SLM than embedded:teacher"):
        host(other)


def test_vllm_does_not_offer_it(product: Path, recipe: Recipe):
    vllm = recipe.slm.model_copy(update={"engine": "vllm"})
    reason = offer(host(recipe.model_copy(update={"tah": str(product), "slm": vllm})))[1]["tah"]
    assert reason == "tah needs second_pass of slm, which a vllm engine does not have here"


@pytest.mark.slow
def test_s2t_distil_trains_it_on_several_workers(
    ray_cluster: str, recipe: Recipe, recipe_path: Path, rows: list[dict[str, Any]], tmp_path: Path, capsys: Any
):
    table = pa.Table.from_pylist(rows, SHARD)
    pair = loading.weights_hash(recipe.slm), loading.weights_hash(recipe.teacher), loading.tokenizer_hash(recipe.slm)
    (tmp_path / "train" / SHARDS).mkdir(parents=True)
    metadata = shard_metadata(recipe, *pair, "embedded-train")
    write_shard(tmp_path / "train" / SHARDS / shard_name(0, 1), table, metadata)
    command = ["--recipe", str(recipe_path), "--shards", str(tmp_path / "train"), "--objective", "tah"]
    command += ["--output", str(tmp_path / "tah")]
    for setting in (*SETTINGS, "distil.workers=2", "distil.evaluate_every=6"):
        command += ["--set", setting]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "trained      tah, 12 steps" in shown.out
    assert "of the steps take a second pass" in shown.out
    assert "distil tah: decider: 100/100 %" in shown.err
    assert host(recipe.model_copy(update={"tah": str(tmp_path / "tah")})).slm.second_pass is not None
    assert main(command) == 0  # and leaves it as it is


def test_a_version_of_it_is_served(product: Path, recipe: Recipe):
    import mlflow

    use_store()
    done = read_provenance(product)
    assert done is not None
    with mlflow.start_run():
        version = register(recipe.model_copy(update={"tah": "gone"}), product, done)
    served = recipe_of([version.uri])
    assert served.tah is not None
    assert host(served).slm.second_pass_hash == SecondPass.load(product).weights_hash == weights_of(product, recipe)
    named = [version.uri, f"{version.uri.rpartition('/')[0]}@first"]
    mlflow.MlflowClient().set_registered_model_alias(version.uri.split("/")[1], "first", "1")
    with pytest.raises(RegistryError, match="the SLM has one second pass, and the recipe has it already"):
        recipe_of(named)


def merged(recipe: Recipe, items: list[Trajectory], settings: dict[str, Any], heard: list[Any]) -> Merged:
    """The frozen base with all but two of the items to train its decider on; what it reports is `heard`."""
    tah = recipe.distil.tah.model_copy(update={"dropout": 0.0, **settings})
    cut = recipe.model_copy(update={"distil": recipe.distil.model_copy(update={"tah": tah, "micro_batch": 70})})
    nothing: Any = None
    return Merged(
        recipe=cut,
        model=loading.load_model(recipe.slm).eval(),
        tokenizer=nothing,
        reserved_ids=reserved_rows(recipe),
        bins=(),
        ranking_head=None,
        adapter=nothing,
        training=items[:-2],
        calibration=items[-2:],
        provenance=provenance(),
        report=lambda share, figures: heard.append((share, figures)),
    )


def read_by_hand(model: Any, item: Trajectory, card: Card, reserved: tuple[int, ...]) -> tuple[Any, Any]:
    """What the decider is to read of each step, [T, F], and whether it is hard, [T], from a plain forward."""
    with torch.no_grad():
        out = model(torch.from_numpy(item.tree.tokens)[None], output_hidden_states=True)
    steps = slice(item.tree.prompt - 1, -1)
    logits_TV = out.logits[0, steps].index_fill(-1, torch.tensor(reserved), -torch.inf)
    states_TF = torch.cat([out.hidden_states[layer][0, steps] for layer in card.layers], dim=-1)
    top_TN = logits_TV.sort(descending=True).values[:, : card.support]
    return torch.cat([states_TF, top_TN], dim=-1), logits_TV.argmax(-1) != torch.from_numpy(item.teacher_T)


def test_the_decider_reads_what_plain_forwards_say_each_step_once_and_learns_from_whole_batches(recipe, rows):
    items, heard, card = trajectories(rows), [], Card(layers=(0, 1, 3), support=40)
    given = merged(recipe, items, {"epochs": 3, "batch": 3}, heard)
    plain = loading.load_model(recipe.slm)
    by_hand = [read_by_hand(plain, item, card, given.reserved_ids) for item in items]
    steps = read(given, card, items)
    torch.testing.assert_close(steps.values_MF, torch.cat([inputs for inputs, _ in by_hand]), rtol=1e-4, atol=1e-4)
    assert torch.equal(steps.hard_M, torch.cat([hard for _, hard in by_hand]))

    texts: list[int] = []
    decoder = given.model.get_decoder()
    decoder.register_forward_pre_hook(lambda *of: texts.append(len(of[-1]["input_ids"])), with_kwargs=True)
    decider, figures = train_decider(given, card)
    assert sum(texts) == len(items)
    shares = [share for share, _ in heard]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert not heard[0][1], "the first report is of the reading"

    torch.manual_seed(recipe.seed)
    fresh = Router(decider.settings)
    first = torch.randperm(len(items) - 2, generator=torch.Generator().manual_seed(recipe.seed))[:3]
    inputs_SF, hard_S = (torch.cat([by_hand[int(place)][part] for place in first]) for part in (0, 1))
    p_S = fresh(inputs_SF).sigmoid()
    loss = -torch.where(hard_S, given.recipe.distil.tah.positive_weight * p_S.log(), (1 - p_S).log()).mean()
    losses = [found["decider/loss"] for _, found in heard if found]
    assert losses[0] == pytest.approx(loss.item(), rel=1e-4)
    assert len(losses) == 3 * 3
    p_S = decider.probabilities(torch.cat([inputs for inputs, _ in by_hand[-2:]]))
    hard_S = torch.cat([hard for _, hard in by_hand[-2:]]).numpy()
    assert figures["second_passes"] == pytest.approx((p_S > decider.settings.threshold).mean())
    assert figures["auc"] == pytest.approx((p_S[hard_S][:, None] > p_S[~hard_S]).mean())


def test_the_deciders_training_is_bounded_by_a_setting(recipe, rows):
    items = trajectories(rows)
    given = merged(recipe, items, {"epochs": 1, "batch": 1, "most_steps": 3 * items[0].steps + 1}, heard := [])
    train_decider(given, Card(layers=(0,), support=8))
    assert sum(1 for _, figures in heard if figures) == 3, "a step of the optimiser a trajectory"


def test_a_training_without_hard_steps_says_so(trained, recipe, rows, tmp_path):
    data, found = trajectories(agreeing(recipe, rows)), trained[0].selector.trained()
    with pytest.raises(ValueError, match=r"decider: 0 of \d+ held-out steps are hard; both kinds are needed"):
        build(recipe, found, data, None, provenance(objective="tah"), tmp_path / "tah")
