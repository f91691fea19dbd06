"""Answers that selecting turned, as pages to look at (section F.9): greedy decoding beside S2T or S2T-Local on the same
problem, where one of them is right and the other is not.

Each page is a file of its own (`serving.playground.saved`). Texts come from the recorded ids by the recipe's tokenizer;
no model is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerFast

from pipelines.analyse.decisions import Results, rescued
from pipelines.data.text import file_stem
from pipelines.results.summary import PAIR, compare, known
from pipelines.tasks import load, task
from s2t_models.loading import load_tokenizer
from s2t_models.recipe import Recipe
from s2t_models.storage import Location, whole
from serving.playground.saved import SavedDecision, SavedTrajectory, index_page, trajectory_page
from serving.text import TextStream, with_texts, written_alone

BASELINE, KINDS = "greedy", ("s2t", "s2t-local")
#: What a page shows: the selecting policy is right where the baseline is wrong, or the other way round.
RESCUED, FLIPPED = "rescued", "flipped"
INDEX = "index.html"
HEADER = ("item", "policy", "turned", "greedy answers", "policy answers", "right answer", "decisions", "rescues")


@dataclass(frozen=True)
class TurnedAnswer:
    """A problem that greedy decoding and a selecting policy were asked with the same seed: the two rows (schema
    RESULT) and which way it went."""

    turned: str
    greedy: Mapping[str, Any]
    policy: Mapping[str, Any]


def write_pages(results: Results, folder: Location, most: int, data: Path | None = None) -> dict[str, int]:
    """Write a page for each of the first `most` rescued and the first `most` flipped answers of each task and policy,
    and an index, to `folder` in place of what was there. Returns how many pages there are of either; without any,
    nothing is written. Prompts are those of `data`, or of tasks that need no files.

    Raises RecipeError where a recipe's tokenizer cannot be had, TaskError where `data` lacks a task's files.
    """
    made: dict[str, str] = {}
    index: list[dict[str, str]] = []
    for frame, metadata in results:
        if not (turned := list(turned_answers(frame, most))):
            continue
        recipe = Recipe.model_validate_json(metadata["s2t.recipe"])
        tokenizer, prompts = load_tokenizer(recipe.slm), _prompts(frame, recipe, data)
        for one in turned:
            prompt = prompts.get(one.policy["item"], "(Not in the results. `--data FOLDER` shows it here.)")
            sides = [trajectory(row, prompt, tokenizer) for row in (one.greedy, one.policy)]
            file = f"{len(made) + 1:04}-{one.turned}-{file_stem(one.policy['policy'])}.html"
            made[file] = trajectory_page(sides)
            index.append({"file": file, **_entry(one)})
    if made:
        with whole(folder) as part:
            part.mkdir(parents=True)
            for file, page in made.items():
                (part / file).write_text(page, encoding="utf-8")
            (part / INDEX).write_text(index_page("Answers that selecting turned", HEADER, index), encoding="utf-8")
    return {turned: sum(entry["turned"] == turned for entry in index) for turned in (RESCUED, FLIPPED)}


def turned_answers(frame: pd.DataFrame, most: int) -> Iterator[TurnedAnswer]:
    """The first `most` rescued and the first `most` flipped answers of each task and selecting policy whose ids were
    recorded."""
    recorded = frame[frame["output_ids"].notna()]
    for name, rows in recorded.groupby("task", sort=False):
        kinds = rows["kind"].str.partition(":")[0]  # without the artifact
        policies = rows.loc[kinds.isin(KINDS), "policy"].unique()
        if BASELINE not in set(rows["policy"]):
            continue
        for policy in policies:
            _, flips = compare(rows, str(name), policy, BASELINE)
            by_pair = {side: rows[rows["policy"] == side].set_index(PAIR, drop=False) for side in (BASELINE, policy)}
            for turned, right in ((RESCUED, policy), (FLIPPED, BASELINE)):
                for pair in flips.loc[flips["right"] == right, PAIR].head(most).itertuples(index=False):
                    greedy, other = (by_pair[side].loc[tuple(pair)].to_dict() for side in (BASELINE, policy))
                    yield TurnedAnswer(turned, greedy, other)


def trajectory(row: Mapping[str, Any], prompt: str, tokenizer: PreTrainedTokenizerFast) -> SavedTrajectory:
    """A row (schema RESULT) of greedy decoding, S2T or S2T-Local as it is shown: at its decisions a token was selected,
    the others are the SLM's."""
    word = partial(written_alone, tokenizer)
    decisions = [SavedDecision.model_validate(with_texts(one, word)) for one in json.loads(row["decisions"])]
    steps = {decision.step for decision in decisions}
    _, texts = TextStream(tokenizer, ()).add([int(token) for token in row["output_ids"]])
    return SavedTrajectory(
        policy=row["policy"],
        prompt=prompt,
        tokens=[(text, "selected" if step in steps else "slm") for step, text in enumerate(texts)],
        decisions=decisions,
        finish="length" if row["finish"] == "length" else "stop",
        seed=known(row["request_seed"], int),
        max_tokens=known(row["limit"], int),
        seconds=known(row["seconds"], float),
        usage=json.loads(row["usage"]),
        models=json.loads(row["models"]),
        item=row["item"],
        verdict=row["verdict"],
        extracted=known(row["extracted"], str),
        gold=known(row["answer"], str),
    )


def _prompts(frame: pd.DataFrame, recipe: Recipe, data: Path | None) -> dict[str, str]:
    """What was asked, by item, for the tasks whose rows are here: nothing is downloaded to make a page."""
    prompts = {}
    for name in frame["task"].unique():
        if data is not None or not task(name).sources:
            for item in load(name, data, recipe.prompts)[1]:
                prompts[item.uid] = "\n\n".join(message["content"] for message in item.prompt)
    return prompts


def _entry(one: TurnedAnswer) -> dict[str, str]:
    decisions = [decision for decision in json.loads(one.policy["decisions"]) if decision["candidates_K"]]
    values = (
        one.policy["item"],
        one.policy["policy"],
        one.turned,
        known(one.greedy["extracted"], str) or "none",
        known(one.policy["extracted"], str) or "none",
        known(one.policy["answer"], str) or "",
        str(len(decisions)),
        str(sum(map(rescued, decisions))),
    )
    return dict(zip(HEADER, values, strict=True))
