"""`s2t plan`: parameters against published totals, memory against what is allocated, and advice that makes it fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from pipelines.cli import main
from pipelines.plan.card import CARDS, GIB, card
from pipelines.plan.stages import Plan
from s2t_models.costs import ModelCost, training_cost
from s2t_models.engines.torch.slots import Slots
from s2t_models.loading import load_model
from s2t_models.recipe import Recipe, load_recipe, shipped_recipes
from s2t_models.settings import ActorPool, ModelSettings, VllmSettings
from s2t_models.training.selector import Selector
from s2t_models.training.teacher import Teacher
from s2t_models.training.tree_attention import Sight
from s2t_models.training_settings import LoraSettings

#: model_type, vocabulary, hidden, intermediate, layers, heads, KV heads, then what else its config.json says.
PUBLISHED = {
    "qwen2.5-0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2, {"tie_word_embeddings": True}, 0.49403e9),
    "qwen2.5-1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2, {"tie_word_embeddings": True}, 1.54371e9),
    "qwen2.5-32b": ("qwen2", 152064, 5120, 27648, 64, 40, 8, {"tie_word_embeddings": False}, 32.764e9),
    "llama-3.2-1b": ("llama", 128256, 2048, 8192, 16, 32, 8, {"tie_word_embeddings": True, "head_dim": 64}, 1.23581e9),
    "llama-3.1-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, {"tie_word_embeddings": False}, 8.03026e9),
    "phi-3-mini": ("phi3", 32064, 3072, 8192, 32, 32, 32, {"tie_word_embeddings": False}, 3.82108e9),
    "phi-3-medium": ("phi3", 32064, 5120, 17920, 40, 40, 10, {"tie_word_embeddings": False}, 13.96024e9),
    "gemma-2-2b": ("gemma2", 256000, 2304, 9216, 26, 8, 4, {"head_dim": 256, "sliding_window": 4096}, 2.61434e9),
    "gemma-2-27b": ("gemma2", 256000, 4608, 36864, 46, 32, 16, {"head_dim": 128, "sliding_window": 4096}, 27.22713e9),
}
#: A shipped recipe, and its models.
PAIRS = {
    "paper/qwen2.5-0.5b-32b": ("qwen2.5-0.5b", "qwen2.5-32b"),
    "paper/qwen2.5-1.5b-32b": ("qwen2.5-1.5b", "qwen2.5-32b"),
    "paper/llama-3.2-1b-8b": ("llama-3.2-1b", "llama-3.1-8b"),
    "paper/phi-3-mini-medium": ("phi-3-mini", "phi-3-medium"),
    "paper/gemma-2-2b-27b": ("gemma-2-2b", "gemma-2-27b"),
}


def folder(tmp_path, name):
    """A model folder that holds nothing but config.json."""
    kind, vocabulary, hidden, inner, layers, heads, kv_heads, more, _ = PUBLISHED[name]
    path = tmp_path / name
    path.mkdir(exist_ok=True)
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    content = {"model_type": kind, **sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}
    (path / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 4096, "pad_token_id": 0}))
    return str(path)


def recipe(tmp_path, small, large, **sections):
    models = {"slm": {"path": folder(tmp_path, small)}, "teacher": {"path": folder(tmp_path, large)}}
    for name, model in models.items():
        model |= {"num_gpus": 1} | sections.pop(name, {})
    collect = {"rollout": {"num_gpus": 1}, "label": {"num_gpus": 1}} | sections.pop("collect", {})
    distil = {"num_gpus": 1} | sections.pop("distil", {})
    return Recipe.model_validate({"name": small, **models, "collect": collect, "distil": distil, **sections})


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_published(tmp_path, name):
    cost = ModelCost(ModelSettings(path=folder(tmp_path, name)))
    assert cost.parameters == pytest.approx(PUBLISHED[name][-1], rel=1e-3)
    assert 0 < cost.body < cost.parameters


def test_weights_and_cache_are_what_the_engine_allocates():
    settings = ModelSettings(path="embedded:slm", dtype="float32", device="cpu", context=100)
    cost, model = ModelCost(settings), load_model(settings)
    assert cost.weights == sum(value.nbytes for value in model.parameters())
    assert cost.cache(3) == Slots(model, 3, 100).cache.nbytes
    assert cost.cache(3, second=True) == Slots(model, 3, 100, second=True).cache.nbytes


def test_activations_are_what_autograd_keeps_in_a_real_forward():
    settings, lora, length = ModelSettings(path="embedded:slm", dtype="float32", device="cpu"), LoraSettings(rank=4), 64
    cost = training_cost(ModelCost(settings), lora, 16, length)
    rows = ModelCost(settings).vocabulary
    selector = Selector(load_model(settings), tuple(range(rows - 16, rows)), lora).train()
    assert cost.trained == sum(value.numel() for value in selector.parameters() if value.requires_grad)
    own = {value.untyped_storage()._cdata for value in [*selector.parameters(), *selector.buffers()]}
    kept = {}

    def keep(value):
        kept[value.untyped_storage()._cdata] = value
        return value

    ids = torch.randint(0, 50, (1, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        selector(input_ids=ids, sight=Sight.causal(ids))
    real = sum(value.untyped_storage().nbytes() for place, value in kept.items() if place not in own)
    assert cost.activations * length == pytest.approx(real, rel=0.05)


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    settings = ModelSettings(path="embedded:slm", dtype="float32", device="cpu")
    cost, model = ModelCost(settings), load_model(settings, "eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 64, dtype=torch.long), use_cache=False)
    assert cost.flops(64, 64) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("name", PAIRS)
def test_each_recipe_of_the_paper_fits_the_cards_it_names(tmp_path, name):
    assert PAIRS.keys() == {shipped for shipped in shipped_recipes() if shipped.startswith("paper/")}
    slm, teacher = (folder(tmp_path, model) for model in PAIRS[name])
    plan = Plan(load_recipe(name, [f"slm.path={slm}", f"teacher.path={teacher}"]), CARDS["h100"])
    stages = plan.stages()
    assert [stage.name for stage in stages] == ["collect", "distil selector", "distil kd", "serve", "benchmark"]
    assert all(stage.seconds > 0 for stage in stages if stage.name != "serve")
    assert not [change for stage in stages for change in stage.changes(CARDS["h100"])]


def test_too_many_slots_are_named_and_the_number_proposed_is_the_most_that_fit(tmp_path):
    wanted = recipe(tmp_path, "qwen2.5-0.5b", "qwen2.5-32b", teacher={"slots": 64, "context": 4096})
    (change,) = Plan(wanted, CARDS["h100"]).collect().changes(CARDS["h100"])
    assert change.startswith("teacher.slots 64 -> ")
    fitting = int(change.rsplit(" ", 1)[1])

    def changes(slots):
        teacher = wanted.teacher.model_copy(update={"slots": slots})
        return Plan(wanted.model_copy(update={"teacher": teacher}), CARDS["h100"]).collect().changes(CARDS["h100"])

    assert 1 <= fitting < 64
    assert not changes(fitting)
    assert changes(fitting + 1)


def test_a_vllm_teacher_that_does_not_fit_one_card_is_split_over_several(tmp_path):
    teacher = {"engine": "vllm", "slots": 64, "context": 4096, "num_gpus": 0}
    wanted = recipe(tmp_path, "qwen2.5-0.5b", "qwen2.5-32b", teacher=teacher, collect={"label": {}})
    wanted = wanted.model_copy(update={"collect": wanted.collect.model_copy(update={"rollout": ActorPool(num_gpus=1)})})
    on_one = Plan(wanted, CARDS["h100"]).collect()
    (change,) = on_one.changes(CARDS["h100"])
    assert change == "teacher.vllm.tensor_parallel 1 -> 2"
    split = wanted.teacher.model_copy(update={"vllm": VllmSettings(tensor_parallel=2)})
    stage = Plan(wanted.model_copy(update={"teacher": split}), CARDS["h100"]).collect()
    assert not stage.changes(CARDS["h100"])
    assert [process.gpus for process in stage.processes] == [1, 2]
    took = [float(re.search(r"([\d.]+) min$", of.work["labels"])[1]) for of in (on_one, stage)]
    assert took[1] == pytest.approx(took[0] / 2, rel=0.05)


@pytest.mark.parametrize("memory", [24, 10])
def test_training_that_does_not_fit_is_cut_or_checkpointed_until_it_does(tmp_path, memory):
    small = replace(CARDS["h100"], memory=memory * GIB)
    wanted = recipe(tmp_path, "qwen2.5-1.5b", "qwen2.5-32b", distil={"micro_batch": 16384})
    (change,) = Plan(wanted, small).distil("selector").changes(small)
    update = {}
    for part in change.split(", "):
        key, _, value = part.removeprefix("distil.").partition(" ")
        update[key] = json.loads(value.rsplit(" ", 1)[1])
    assert set(update) == ({"micro_batch"} if memory == 24 else {"gradient_checkpointing", "micro_batch"} & set(update))
    changed = wanted.model_copy(update={"distil": wanted.distil.model_copy(update=update)})
    assert not Plan(changed, small).distil("selector").changes(small)


def test_a_worker_whose_model_writes_the_texts_holds_the_teacher_and_an_engine_too():
    own = load_recipe("embedded")
    plan = Plan(own, CARDS["cpu"], trainings=("kd", "tsd-kd"))
    assert [stage.name for stage in plan.stages()][1:3] == ["distil kd", "distil tsd-kd"]
    plain, stage = plan.distil("kd"), plan.distil("tsd-kd")
    (process,), (other,) = stage.processes, plain.processes
    held = Teacher(own, plan.slm.vocabulary).model
    assert process.parts["teacher"] == sum(value.nbytes for value in held.parameters())
    assert "teacher" not in other.parts
    assert "base states" in other.parts, "of which this training reads none"
    assert "base states" not in process.parts
    engine = plan.slm.weights + plan.slm.cache(own.slm.slots)
    for_a_batch = process.parts["activations"] + process.parts["logits"]
    assert process.parts["rollouts"] >= max(engine - for_a_batch, 0)
    assert stage.seconds > plain.seconds
    assert stage.work["teacher"].startswith("reads ")


def test_a_worker_that_holds_no_teacher_beside_its_model_is_told_so_and_how_many_slots_fit(tmp_path):
    wanted = recipe(tmp_path, "qwen2.5-0.5b", "qwen2.5-1.5b", slm={"slots": 512})
    plan = Plan(wanted, CARDS["h100"], trainings=("kd", "tsd-kd"))

    def changes(memory, objective="tsd-kd"):
        return plan.distil(objective).changes(replace(CARDS["h100"], memory=memory * GIB))

    assert changes(7, "kd")[0].startswith("distil.micro_batch 4096 -> ")
    (change,) = changes(7)
    assert change.endswith("GiB with the teacher beside; take a card with more, or a smaller teacher")
    assert not changes(24, "kd")
    (change,) = changes(24)
    assert change.startswith("slm.slots 512 -> ")
    fitting = int(change.rsplit(" ", 1)[1])
    for slots in (fitting, fitting + 1):
        plan.recipe = wanted.model_copy(update={"slm": wanted.slm.model_copy(update={"slots": slots})})
        assert len(changes(24)) == slots - fitting
    on_the_cpu = wanted.model_copy(update={"teacher": wanted.teacher.model_copy(update={"device": "cpu"})})
    (process,) = Plan(on_the_cpu, CARDS["h100"], trainings=("tsd-kd",)).distil("tsd-kd").processes
    assert "teacher" not in process.parts


def test_a_process_without_a_gpu_is_not_held_to_fit_on_one(tmp_path):
    wanted = recipe(
        tmp_path, "qwen2.5-0.5b", "qwen2.5-1.5b", collect={"label": {"num_gpus": 0}, "rollout": {"num_gpus": 1}}
    )
    (change,) = Plan(wanted, CARDS["h100"]).collect().changes(CARDS["h100"])
    assert change.startswith("collect.label.num_gpus 0 -> 1")


def test_the_command_says_what_fits_and_its_status_says_so_too(tmp_path, capsys):
    assert main(["plan", "embedded", "--memory", "16"]) == 0
    shown = capsys.readouterr().out
    assert "== distil selector" in shown
    assert shown.splitlines()[-1].startswith("every stage fits; about ")
    assert main(["plan", "embedded", "--memory", "16", "--objective", "tsd-kd", "--objective", "tah"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^== distil (.*)$", shown, re.MULTILINE) == ["tsd-kd", "tah"]
    assert re.search(r"^  distil tsd-kd .* teacher 0\.\d+  teacher forward ", shown, re.MULTILINE)
    assert main(["plan", "embedded", "--objective", "magic"]) == 2
    assert "no objective 'magic'" in capsys.readouterr().err
    assert main(["plan", "embedded", "--memory", "1"]) == 1
    assert "does not fit: " in capsys.readouterr().out.splitlines()[-1]
    assert main(["plan", "embedded", "--card", "abacus"]) == 2
    assert "no card 'abacus'; there are: h200, h100" in capsys.readouterr().err


def test_what_is_served_beside_the_recipes_own_takes_the_slms_memory_once_more(tmp_path):
    wanted = recipe(tmp_path, "qwen2.5-0.5b", "qwen2.5-1.5b", artifacts={"new": "x"}, routers={"old": "y"})
    stage = Plan(wanted, CARDS["h100"]).serve()
    parts = {process.name: process.parts["weights"] for process in stage.processes}
    assert parts["s2t-local:new"] == parts["slm:old"] == parts["slm"] > 0
    assert stage.work["beside"].startswith("s2t-local:new, slm:old: ")


def test_second_passes_take_room_in_the_slms_cache(tmp_path):
    cache = {}
    for tah in (None, "x"):
        wanted = recipe(tmp_path, "qwen2.5-0.5b", "qwen2.5-1.5b", tah=tah)
        processes = {process.name: process for process in Plan(wanted, CARDS["h100"]).serve().processes}
        cache[tah] = {name: processes[name].parts["cache"] for name in ("slm", "teacher", "s2t-local")}
    assert cache["x"]["slm"] > 1.9 * cache[None]["slm"]
    assert cache["x"] | {"slm": 0} == cache[None] | {"slm": 0}


def test_figures_of_ones_own_replace_those_of_a_card():
    mine = card("a100", memory=40, tflops=200, bandwidth=1500)
    assert (mine.memory, mine.flops, mine.bandwidth) == (40 * GIB, 200e12, 1500e9)


def test_all_problems_of_a_task_take_time_too(tmp_path):
    wanted = recipe(tmp_path, "qwen2.5-0.5b", "qwen2.5-1.5b", benchmark={"items": 0, "task": ["gsm8k"]})
    assert Plan(wanted, CARDS["h100"]).benchmark().seconds > 0
