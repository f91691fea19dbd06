"""Train the embedded pair from nothing: `python -m s2t_models.embedded.build [--output DIR]`.

SLM and teacher train in two processes of one thread each, then both are graded on calibration problems. The
shipped weights are what this file made. Training rows are whole chats, right-padded in batches of similar
length: under a causal mask the padding behind a row changes nothing, so the forward is transformers' own.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

    from s2t_models.embedded.generator import Split

CONTEXT = 1024
TOKENIZER_TEXTS = 12_000
TOKENS_A_STEP = 2048
MATRIX_LR, OTHER_LR = 0.005, 3e-3
MATRIX_DECAY = 0.2  # with larger steps or no decay attention saturates: nothing is looked up in the question
WARMUP_STEPS = 40
PROMPT_WEIGHT = 0.2
EMBEDDING_STD = 0.15
EVALUATION_PROBLEMS = 300


@dataclass(frozen=True)
class Shape:
    """One model of the pair: its size, its corpus and the length of its training."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    slips: bool
    problems: int
    steps: int
    seed: int


SHAPES = {
    "slm": Shape(128, 4, 4, 2, 320, True, 24_000, 1500, 11),
    "teacher": Shape(192, 4, 6, 3, 512, False, 30_000, 1500, 23),
}


def build_tokenizer() -> "PreTrainedTokenizerBase":
    from s2t_models.embedded.corpus import SYSTEM_PROMPT, texts
    from s2t_models.embedded.tokenizer import train_tokenizer

    rows = texts(TOKENIZER_TEXTS, seed=1, slips=False)
    frame = [SYSTEM_PROMPT, "system user assistant"] * 500
    return train_tokenizer(frame + [f"{user}\n{reply}" for _, user, reply in rows])


def new_model(shape: Shape, tokenizer: "PreTrainedTokenizerBase") -> "Qwen2ForCausalLM":
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from s2t_models.embedded.tokenizer import ROWS

    torch.manual_seed(shape.seed)
    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)  # every block begins as the identity, so that what a token is survives
        elif parameter.ndim == 2:
            std = EMBEDDING_STD if "embed" in name else parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std)
    return model


Row = tuple[list[int], list[float]]  # token ids, their weights in the loss


def encode(tokenizer: "PreTrainedTokenizerBase", shape: Shape) -> list[Row]:
    from s2t_models.embedded.corpus import SHEET_ASK, texts
    from s2t_models.embedded.tokenizer import END, chat

    rows = texts(shape.problems, shape.seed, shape.slips)
    prompts = tokenizer([chat(system, user) for system, user, _ in rows])["input_ids"]
    replies = tokenizer([reply + END for _, _, reply in rows])["input_ids"]
    equals, newline = (tokenizer(text)["input_ids"][0] for text in ("=", "\n"))
    encoded = []
    for (_, user, _), prompt, reply in zip(rows, prompts, replies, strict=True):
        weights = [PROMPT_WEIGHT] * len(prompt)
        result = user != SHEET_ASK  # of a practice sheet only the results count: its operands are drawn at random
        for token in reply:
            weights.append(1.0 if result else PROMPT_WEIGHT)
            if user == SHEET_ASK and token in (equals, newline):
                result = token == equals
        encoded.append((prompt + reply, weights))
    return encoded


def batches(rows: list[Row], rng: random.Random) -> Iterator[list[Row]]:
    """Endless batches of at most `TOKENS_A_STEP` padded tokens; rows are sorted by length within windows."""
    while True:
        order = rng.sample(rows, len(rows))
        window = 64 * TOKENS_A_STEP // 128
        for start in range(0, len(order), window):
            found: list[list[Row]] = [[]]
            for row in sorted(order[start : start + window], key=lambda row: len(row[0])):
                if (len(found[-1]) + 1) * len(row[0]) > TOKENS_A_STEP:
                    found.append([])
                found[-1].append(row)
            rng.shuffle(found)
            yield from found


def loss_of(model: "Qwen2ForCausalLM", batch: list[Row]) -> "torch.Tensor":
    """Mean next-token cross-entropy over a batch, prompt tokens weighted `PROMPT_WEIGHT`."""
    import torch
    from torch.nn.functional import cross_entropy

    length = max(len(ids) for ids, _ in batch)
    ids_BT = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch])
    weight_BT = torch.zeros(ids_BT.shape)
    for row, (ids, weights) in enumerate(batch):
        weight_BT[row, : len(ids)] = torch.tensor(weights)
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    weights_N = weight_BT[:, 1:].flatten()
    return (losses * weights_N).sum() / weights_N.sum()


def save(model: "Qwen2ForCausalLM", tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Write a model directory in transformers format, weights in bfloat16."""
    import copy

    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = copy.deepcopy(model).bfloat16()
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=256,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older versions of transformers know too
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "model.safetensors").chmod(0o644)


def train(name: str, output: Path, checkpoint_minutes: float = 5.0) -> None:
    """Train one model of the pair into `output`/name, with checkpoints and progress lines on the way."""
    import torch
    from transformers import AutoTokenizer

    from s2t_models.embedded.muon import Muon

    torch.set_num_threads(1)
    shape = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(output / name)
    model = new_model(shape, tokenizer)
    rows = encode(tokenizer, shape)
    matrices = [p for key, p in model.named_parameters() if p.ndim == 2 and "embed" not in key]
    others = [p for key, p in model.named_parameters() if p.ndim != 2 or "embed" in key]
    optimizers = [
        Muon(matrices, lr=MATRIX_LR, weight_decay=MATRIX_DECAY),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_lrs = [MATRIX_LR, OTHER_LR]
    size = sum(p.numel() for p in model.parameters())
    print(f"{name}: {size / 1e6:.2f}M parameters, {len(rows)} rows, {shape.steps} steps", flush=True)
    model.train()
    begun = saved = time.monotonic()
    mean_loss = 0.0
    stream = batches(rows, random.Random(f"batches-{shape.seed}"))
    for step, batch in zip(range(shape.steps), stream, strict=False):
        factor = min(1.0, (step + 1) / WARMUP_STEPS, 2 * (1 - step / shape.steps))
        loss = loss_of(model, batch)
        loss.backward()
        for optimizer, lr in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        mean_loss = loss.item() if step == 0 else 0.98 * mean_loss + 0.02 * loss.item()
        now = time.monotonic()
        if (step + 1) % 50 == 0:
            left = (now - begun) / (step + 1) * (shape.steps - step - 1)
            done = f"step {step + 1}/{shape.steps}"
            print(f"{name}: {done}  loss {mean_loss:.4f}  {left / 60:.1f} min left", flush=True)
        if now - saved > 60 * checkpoint_minutes:
            save(model, tokenizer, output / name)
            saved = now
    if not math.isfinite(mean_loss):
        raise RuntimeError(f"{name}: the loss is {mean_loss}; nothing usable was trained")
    save(model, tokenizer, output / name)


def greedy_accuracy(directory: Path, split: "Split", count: int) -> float:
    """Share of a split's problems that a model directory solves greedily, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from s2t_models.embedded.generator import problems
    from s2t_models.embedded.tokenizer import chat

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    drawn = problems(split, count)
    right = 0
    for start in range(0, count, 100):
        part = drawn[start : start + 100]
        prompts = tokenizer([chat(None, item.question) for item in part], padding=True, return_tensors="pt")
        output = model.generate(**prompts)  # type: ignore[misc]  # the mixin is typed for its own base
        replies = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        answered = zip(part, replies, strict=True)
        right += sum(f"\\boxed{{{problem.answer}}}" in reply for problem, reply in answered)
    return right / count


def build(output: Path) -> None:
    """Train both models side by side into `output`/slm and `output`/teacher, and print what they solve."""
    tokenizer = build_tokenizer()
    print(f"tokenizer: {len(tokenizer)} tokens", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    running = {}
    for name in SHAPES:
        tokenizer.save_pretrained(output / name)
        command = [sys.executable, "-m", "s2t_models.embedded.build", "--output", str(output), "--only", name]
        running[name] = subprocess.Popen(command, env=environment)
    failed = [name for name, process in running.items() if process.wait() != 0]
    if failed:
        raise SystemExit(f"training failed: {', '.join(failed)}; its own message stands above")
    for name in SHAPES:
        accuracy = greedy_accuracy(output / name, "calibration", EVALUATION_PROBLEMS)
        print(f"{name}: greedy {100 * accuracy:.1f}% of {EVALUATION_PROBLEMS} calibration problems")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model pair from nothing on two cores.")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/embedded"), help="directory to write slm/ and teacher/ into"
    )
    parser.add_argument("--only", choices=SHAPES, help="train one model, into an output that has its tokenizer")
    arguments = parser.parse_args()
    if arguments.only:
        train(arguments.only, arguments.output)
    else:
        build(arguments.output)


if __name__ == "__main__":
    main()
