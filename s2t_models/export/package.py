"""`s2t export`: from an artifact to a folder that other tools load.

    model.safetensors, config.json, tokenizer...   the merged model, for AutoModelForCausalLM
    generation_config.json                         plain decoding is greedy, and writes no reserved row
    s2t.json, trigger_head.safetensors             what S2T-Local decoding needs beside the model
    ranking_head.safetensors                       the same, where the model has no reserved rows
    custom_generate/generate.py                    that decoding, on transformers alone
    adapter/                                       the LoRA before it was merged, for peft on the base model
    README.md                                      the model card

The names are those that these tools look for.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from s2t_models.artifact import (
    ADAPTER,
    ADAPTER_CONFIG,
    HEAD,
    MODEL,
    RANKING_HEAD,
    Artifact,
    ArtifactError,
    Card,
    replacing,
)
from s2t_models.node_cache import fetched
from s2t_models.settings import CandidateSettings
from s2t_models.storage import Location

SETTINGS, MODEL_CARD, FORMAT = "s2t.json", "README.md", "s2t-export/1"


@dataclass(frozen=True)
class Decoding:
    """How the exported model selects, where the artifact does not say: candidates, steps that never trigger, budget,
    and a threshold on the trigger head's logit that holds in its place."""

    candidates: CandidateSettings
    warmup: int
    budget: float
    threshold: float | None = None


def export(artifact: Artifact, output: Location, decoding: Decoding, measured: str | None = None) -> None:
    """Write the folder `output`, whole; an earlier export there is replaced. `measured` is a table for the model card,
    in Markdown. Raises ArtifactError where `output` holds something else, or there is no threshold for the budget."""
    thresholds = artifact.card.thresholds["head"]
    if decoding.threshold is None and decoding.budget not in thresholds:
        known = ", ".join(f"{budget:g}" for budget in sorted(thresholds))
        raise ArtifactError(
            f"{artifact.folder}: has no threshold for a budget of {decoding.budget:g}; it has {known}: give one with "
            "--budget"
        )
    trained = fetched(artifact.folder)
    with replacing(output, SETTINGS) as part:
        shutil.copytree(trained / MODEL, part, dirs_exist_ok=True)
        for name in (HEAD, RANKING_HEAD):
            if (trained / name).is_file():
                shutil.copy(trained / name, part)
        if (trained / ADAPTER).is_dir():
            shutil.copytree(trained / ADAPTER, part / ADAPTER)
        _decode_greedily(part / "generation_config.json", artifact.card.reserved_ids)
        (part / SETTINGS).write_text(json.dumps(_settings(artifact, decoding), indent=2) + "\n")
        (part / "custom_generate").mkdir()
        source = files("s2t_models.export") / "generate.py"
        (part / "custom_generate" / "generate.py").write_text(source.read_text())
        (part / MODEL_CARD).write_text(_model_card(artifact, decoding, output.resolve().name, measured))


def _settings(artifact: Artifact, decoding: Decoding) -> dict[str, Any]:
    card = artifact.card
    return {
        "format": FORMAT,
        "reserved_ids": card.reserved_ids,
        "bins": card.bins,
        "temperature": card.temperature,
        "prior_weight": card.prior_weight,
        "candidates": decoding.candidates.model_dump(),
        "warmup": decoding.warmup,
        "budget": decoding.budget,
        "threshold": decoding.threshold,
        "thresholds": card.thresholds["head"],
        # The hashes of thousands of training rows are the artifact's: here it is enough which splits they are of.
        "provenance": card.provenance.model_dump(mode="json", exclude={"rows"})
        | {"splits": sorted(card.provenance.rows)},
    }


def _decode_greedily(path: Path, reserved_ids: tuple[int, ...]) -> None:
    """Make plain `generate` write what the engine's greedy decoding does: reserved rows are kept out of it, and the
    base's own settings (sampling, a repetition penalty), which nothing here was trained or measured with, are gone."""
    base = json.loads(path.read_text()) if path.is_file() else {}
    config = {name: base[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in base}
    if reserved_ids:
        config["suppress_tokens"] = sorted(reserved_ids)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _base(artifact: Artifact) -> str | None:
    """What the adapter calls the model it belongs to: a name on the hub, or a folder."""
    path = artifact.folder / ADAPTER / ADAPTER_CONFIG
    return json.loads(path.read_text())["base_model_name_or_path"] if path.is_file() else None


def _on_hub(base: str | None) -> str | None:
    """The name, where it is one on the hub."""
    return base if base and base.count("/") == 1 and not base.startswith((".", "/", "~")) else None


def _license(base: str | None) -> str | None:
    """What the base's own model card says, where it lies on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if not base:
        return None
    here = Path(base) / MODEL_CARD
    found = str(here) if here.is_file() else try_to_load_from_cache(base, MODEL_CARD) if _on_hub(base) else None
    return ModelCard.load(found).data.get("license") if isinstance(found, str) else None


def _model_card(artifact: Artifact, decoding: Decoding, name: str, measured: str | None) -> str:
    card, made = artifact.card, artifact.card.provenance
    base, licence = _on_hub(_base(artifact)), _license(_base(artifact))
    front = ["---", "library_name: transformers", *([f"base_model: {base}"] if base else [])]
    front += [f"license: {licence}"] if licence else []
    front += ["pipeline_tag: text-generation", "tags: [select-to-think, s2t-local]", "---"]
    scores = "reserved rows of its vocabulary" if card.reserved_ids else "a ranking head beside its vocabulary"
    figures = "\n".join(f"| {key} | {value:.4g} |" for key, value in sorted(made.validation.items()))
    k = decoding.candidates.k
    default = f"{decoding.budget:g}" if decoding.threshold is None else "the recipe's fixed threshold"
    origin = f"[{base}](https://huggingface.co/{base})" if base else "A small language model"
    about = textwrap.fill(
        f"{origin} that selects among its own next tokens, distilled from a teacher's choices: *S2T-Local* of "
        "[Select to Think](https://arxiv.org/abs/2604.26940). A trigger head reads the hidden state. Where it fires, "
        f"the model's {k} candidates are scored with {scores}, and the best one is written. No teacher is needed.",
        120,
    )
    budgets = ", ".join(f"{share:g}" for share in sorted(card.thresholds["head"]))
    held_out = "On held-out prompts of the training collection:\n\n| figure | value |\n|---|---:|\n" + figures
    shards = "\n".join(f"| {role} shards | `{digest}` |" for role, digest in made.shards.items())
    adapter = _adapter_use(card) if (artifact.folder / ADAPTER).is_dir() else ""
    return (
        "\n".join(front)
        + f"""

# {name}

{about}

## Use

As S2T-Local (runs the code in `custom_generate/generate.py`, which is short; read it first):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
chat = tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], add_generation_prompt=True,
                                     return_tensors="pt", return_dict=True)
ids = model.generate(**chat, custom_generate=FOLDER, trust_remote_code=True, max_new_tokens=512)
```

`budget=` takes another share of steps that may trigger: {budgets}; {default} unless said.
As the plain merged model, greedily:

```python
ids = model.generate(**chat, max_new_tokens=512)
```
{adapter}
## Measured

{measured or held_out}

## Made from

| what | sha256, or value |
|---|---|
| base weights | `{made.base_weights}` |
| teacher's weights | `{made.teacher_weights}` |
| recipe | `{made.recipe}` |
{shards}
| splits | {", ".join(sorted(made.rows)) or "not recorded"} |
| training steps | {made.settings.get("distil.steps", "not recorded")} |
"""
    )


def _adapter_use(card: Card) -> str:
    missing, place = (
        ("reserved rows", "the merged model") if card.reserved_ids else ("ranking head", f"`{RANKING_HEAD}`")
    )
    return f"""
The LoRA alone, on the base model:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER + "/adapter")
```

It holds no {missing}, so it cannot select by itself: see {place}.
"""
