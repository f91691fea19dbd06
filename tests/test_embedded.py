"""The embedded pair: its problems, splits, careless corpus, tokenizer and shipped weights."""

import operator
import random
import re
import subprocess
import sys
import warnings
from itertools import islice

import pytest

from s2t_models.embedded import slm_path, teacher_path
from s2t_models.embedded.corpus import DOUBTED, MISTAKEN, SHEET_ASK, careless, habit_of, memory_of, texts
from s2t_models.embedded.families import FAMILIES, HELD_OUT
from s2t_models.embedded.generator import SPLITS, plans, problems, split_hash, split_of
from s2t_models.embedded.plan import Step, write_solution

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
EQUATION = re.compile(r"(\d+)([+*/-])(\d+)=(\d+)")


def equations_of(solution: str) -> list[tuple[int, str, int]]:
    return [(int(left), operation, int(right)) for left, operation, right, _ in EQUATION.findall(solution)]


@pytest.fixture(scope="module")
def drawn():
    return {split: problems(split, 300) for split in SPLITS}


def test_problems_are_deterministic_and_a_longer_list_begins_with_the_shorter(drawn):
    assert problems("test", 50) == drawn["test"][:50]
    assert problems("test", 50, seed=1) != drawn["test"][:50]
    assert split_hash(problems("test", 300)) == split_hash(drawn["test"])
    assert split_hash(drawn["test"][:299]) != split_hash(drawn["test"])


def printed_by_a_fresh_interpreter(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_same_problems_come_from_a_fresh_interpreter():
    code = "from s2t_models.embedded.generator import *; print(split_hash(problems('test', 20)))"
    assert printed_by_a_fresh_interpreter(code) == split_hash(problems("test", 20))


def test_splits_are_disjoint_by_structure_and_by_text(drawn):
    structures = {split: {tuple(equations_of(p.solution)) for p in drawn[split]} for split in SPLITS}
    questions = {split: {p.question for p in drawn[split]} for split in SPLITS}
    for one in SPLITS:
        for other in SPLITS:
            if one < other:
                assert not structures[one] & structures[other]
                assert not questions[one] & questions[other]
    structures["test"] |= structures.pop("held-out")
    assert all(split_of(structure) == split for split in structures for structure in structures[split])


def test_training_texts_hold_no_structure_of_the_other_splits(drawn):
    others = ("calibration", "test", "hard", "held-out")
    held_out = {tuple(equations_of(p.solution)) for split in others for p in drawn[split]}
    assert not held_out & {tuple(equations_of(reply)) for _, _, reply in texts(1500, seed=5, slips=False)}


def test_uids_and_questions_are_unique_and_every_family_and_length_occurs(drawn):
    for split, items in drawn.items():
        assert len({p.uid for p in items}) == len({p.question for p in items}) == 300
        assert {p.family for p in items} == set(HELD_OUT if split == "held-out" else FAMILIES)
        assert {p.steps for p in items} == ({5, 6} if split == "hard" else {2, 3, 4, 5})


def test_held_out_families_divide_and_no_other_does(drawn):
    for split, items in drawn.items():
        assert all((split == "held-out") == ("/" in p.solution) for p in items)


def test_solutions_hold_when_recomputed(drawn):
    for items in drawn.values():
        for problem in items:
            found = EQUATION.findall(problem.solution)
            assert len(found) == problem.steps
            for left, operation, right, result in found:
                assert OPERATIONS[operation](int(left), int(right)) == int(result) > 0
            assert problem.solution.endswith(f"\\boxed{{{found[-1][3]}}}.")
            assert problem.answer == found[-1][3]


def test_unknown_split_and_negative_count_are_refused():
    with pytest.raises(ValueError, match="train, calibration, test, hard, held-out"):
        problems("dev", 1)
    with pytest.raises(ValueError, match="-1"):
        problems("test", -1)


def test_habits_are_the_ones_described():
    add, subtract, times = (Step(0, operation, 0, "") for operation in "+-*")
    assert habit_of(add, 27, 38)[:2] == ("+", 55)
    assert habit_of(add, 22, 31)[2] == 0
    assert habit_of(subtract, 52, 38)[:2] == ("-", 24)
    assert habit_of(times, 7, 8)[:2] == ("*", 48)
    assert habit_of(Step(0, "+", 0, "", inverted=True), 30, 8)[:2] == ("-", 22)


def test_memories_are_wrong_or_doubted_as_often_as_said_and_always_know_the_right_result():
    recalled = [(left + right, memory_of(left, "+", right)) for left in range(10, 90) for right in range(2, 10)]
    for right_result, results in recalled:
        assert sum(share for _, share in results) == pytest.approx(1)
        assert dict(results)[right_result] > 0.1
        assert results == sorted(results, key=lambda pair: -pair[1])
    wrong = sum(results[0][0] != right_result for right_result, results in recalled) / len(recalled)
    sure = sum(len(results) == 1 for _, results in recalled) / len(recalled)
    assert wrong == pytest.approx(MISTAKEN, abs=0.05)
    assert 1 - wrong - sure == pytest.approx(DOUBTED, abs=0.05)


def test_a_careless_slip_runs_on_to_the_answer():
    slipped = 0
    for plan in islice(plans("train", 3), 200):
        text, _, answer = write_solution(plan, careless(random.Random(plan.question)))
        slipped += text != write_solution(plan)[0]
        assert text.endswith(f"\\boxed{{{answer}}}.")
    assert 40 < slipped < 180


def test_practice_sheets_are_right_for_the_teacher_and_from_memory_for_the_slm():
    for slips in (False, True):
        sheets = [reply for _, user, reply in texts(60, seed=9, slips=slips) if user == SHEET_ASK]
        assert len(sheets) == 40
        wrong = 0
        for left, operation, right, result in EQUATION.findall(" ".join(sheets)):
            wrong += OPERATIONS[operation](int(left), int(right)) != int(result)
            assert int(result) in dict(memory_of(int(left), operation, int(right)))
        assert (wrong > 0) == slips


@pytest.mark.parametrize("shape", [(96, 192), (512, 192), (64, 64)])
def test_muon_is_that_of_torch_but_for_rounding(shape):
    import torch

    from s2t_models.embedded.muon import Muon

    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, *shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.01, "weight_decay": 0.2}
    pairs = [(ours, Muon([ours], **settings)), (theirs, torch.optim.Muon([theirs], **settings))]
    for gradient in gradients:
        for parameter, optimizer in pairs:
            parameter.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).norm() < 0.01 * (theirs - start).norm()


@pytest.mark.parametrize("path", [slm_path(), teacher_path()], ids=["slm", "teacher"])
def test_tokenizer_and_weights_load_plainly(path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.config.vocab_size - len(tokenizer) >= 32
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_both_models_share_one_tokenizer_that_round_trips():
    from transformers import AutoTokenizer

    slm, teacher = (AutoTokenizer.from_pretrained(path) for path in (slm_path(), teacher_path()))
    assert slm.get_vocab() == teacher.get_vocab()
    for text in [*(f"{p.question}\n{p.solution}" for p in problems("test", 50)), "naïve Übermaß \t日本語  x"]:
        assert slm.decode(slm(text)["input_ids"]) == text
    assert len(slm("1234")["input_ids"]) == 4


def test_chat_template_is_chatml_with_an_optional_system_prompt():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(slm_path())
    user = {"role": "user", "content": "Hi"}
    plain = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    system = {"role": "system", "content": "S"}
    told = tokenizer.apply_chat_template([system, user], add_generation_prompt=True, tokenize=False)
    assert plain == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert told == "<|im_start|>system\nS<|im_end|>\n" + plain


def test_the_pair_is_small():
    assert sum((path / "model.safetensors").stat().st_size for path in (slm_path(), teacher_path())) < 8e6


def test_the_teacher_solves_most_problems_and_the_slm_about_two_in_five():
    from s2t_models.embedded.build import greedy_accuracy

    slm, teacher = (greedy_accuracy(path, "test", 60) for path in (slm_path(), teacher_path()))
    assert 0.2 <= slm <= 0.65
    assert teacher >= 0.75


def test_importing_the_package_is_light():
    code = "import sys, s2t_models.embedded; print({'torch', 'transformers'} & set(sys.modules))"
    assert printed_by_a_fresh_interpreter(code) == "set()"
