"""What labelled rollouts say about local sufficiency: tables and figures from shards alone, without a model.

Hit@K over K and tau and its rank curves (Figures 1, 3, A3, A4; Tables A7, A11, A12), how the SLM's own order
agrees with the teacher's on the labelled steps, and the error split of Eq. 11 for the SLM's own choice. Axes:
_T step over all trajectories, _K candidate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from pipelines.analyse.sufficiency import alignment, entropy, hit_at, rank_cdf, top_steps
from pipelines.results import figures as draw
from s2t_models.calibration import BUDGETS

KS = (1, 2, 4, 8, 16, 32, 64)
Tables = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Steps:
    """Every step of the whole rows, trajectory after trajectory. `support` bounds the ranks that are
    known."""

    kl_T: np.ndarray
    entropy_T: np.ndarray
    rank_T: np.ndarray
    support: int


def read_steps(table: pa.Table, metadata: Mapping[str, str]) -> Steps:
    """The steps of the rows without an error."""
    whole = table.filter(pa.compute.is_null(table["error"]))

    def flat(name: str) -> np.ndarray:
        return pa.compute.list_flatten(whole[name]).to_numpy()

    support = int(json.loads(metadata["s2t.recipe"])["divergence"]["support"])
    return Steps(flat("kl_T"), flat("entropy_T"), flat("teacher_rank_T"), support)


def hits(steps: Steps, tau: float, ks: tuple[int, ...] = (1, 2, 4, 8)) -> dict[int, float]:
    """Hit@k at the top `tau` of the steps by KL."""
    return hit_at(steps.rank_T[top_steps(steps.kl_T, tau)], ks)


def tables(table: pa.Table, metadata: Mapping[str, str], seed: int = 0) -> Tables:
    """Tables by name, as rows: hit (Hit@K over K and tau), triggers (by what picks the steps), alignment,
    error_split."""
    steps = read_steps(table, metadata)
    ks = tuple(k for k in KS if k <= steps.support)
    masks = {tau: top_steps(steps.kl_T, tau) for tau in BUDGETS}
    rows: Tables = {"hit": [], "triggers": [], "alignment": [], "error_split": []}
    for tau, mask_T in masks.items():
        hit = hit_at(steps.rank_T[mask_T], ks)
        rows["hit"] += [{"tau": tau, "k": k, "hit": hit[k], "steps": int(mask_T.sum())} for k in ks]
        for k in ks:
            rows["error_split"].append(
                {"tau": tau, "k": k, "hit_error": 1 - hit[k], "selection_error": hit[k] - hit[1], "chooses": "SLM"}
            )
    random_T = np.random.default_rng(seed).random(len(steps.kl_T))
    for metric, value_T in {"kl": steps.kl_T, "entropy": steps.entropy_T, "random": random_T}.items():
        for tau in BUDGETS:
            hit = hit_at(steps.rank_T[top_steps(value_T, tau)], (1, 8))
            rows["triggers"].append({"trigger": metric, "tau": tau, "hit@1": hit[1], "hit@8": hit[8]})
    rows["alignment"] = _alignment(table)
    return rows


def _alignment(table: pa.Table) -> list[dict[str, Any]]:
    """The SLM's order of the labelled candidates against the teacher's, for the top steps by KL and for
    random ones."""
    kept = [step for row in table["kept"].to_pylist() for step in row or ()]
    rows = []
    for by_kl, name in ((True, "top steps by KL"), (False, "random steps")):
        chosen = [step for step in kept if step["by_kl"] is by_kl and step["candidates_K"]]
        if not chosen:
            continue
        slm = [np.exp(step["slm_logprobs_K"]) for step in chosen]
        teacher = [np.exp(step["teacher_logprobs_K"]) for step in chosen]
        best = [int(p_K.argmax()) for p_K in teacher]
        rows.append(
            {
                "steps_are": name,
                "scorer": "SLM",
                **asdict(alignment(slm, teacher)),
                "candidates": float(np.mean([len(p_K) for p_K in slm])),
                "slm_on_selected": float(np.mean([p_K[i] for p_K, i in zip(slm, best, strict=True)])),
                "teacher_on_selected": float(np.mean([p_K[i] for p_K, i in zip(teacher, best, strict=True)])),
                "slm_entropy": float(np.mean([entropy(p_K) for p_K in slm])),
                "teacher_entropy": float(np.mean([entropy(p_K) for p_K in teacher])),
            }
        )
    return rows


def figures(table: pa.Table, metadata: Mapping[str, str], rows: Tables) -> dict[str, Figure]:
    """Figures by file name."""
    steps = read_steps(table, metadata)
    task = f"{metadata['s2t.task']}, {len(steps.kl_T)} steps"
    by_tau = {
        f"tau = {100 * tau:g}%": {float(row["k"]): row["hit"] for row in rows["hit"] if row["tau"] == tau}
        for tau in BUDGETS
    }
    by_k = {f"K = {k}": {row["tau"]: row["hit"] for row in rows["hit"] if row["k"] == k} for k in (1, 2, 4, 8)}
    cdfs = {
        f"tau = {100 * tau:g}%": rank_cdf(steps.rank_T[top_steps(steps.kl_T, tau)], steps.support) for tau in BUDGETS
    }
    split = [
        (f"K = {row['k']}", row["hit_error"], row["selection_error"])
        for row in rows["error_split"]
        if row["tau"] == BUDGETS[0]
    ]
    top = f"{100 * BUDGETS[0]:g}% steps by KL"
    return {
        "hit-over-k.png": draw.curve(
            by_tau, "candidates K", "Hit@K, %", f"Hit@K at the top steps by KL: {task}", doubling_x=True
        ),
        "hit-over-tau.png": draw.curve(
            by_k, "budget tau, %", "Hit@K, %", f"Hit@K over the budget: {task}", percent_x=True
        ),
        "rank-cdf.png": draw.rank_cdf(cdfs, f"Rank of the teacher's token: {task}"),
        "radial.png": draw.radial(
            {metadata["s2t.task"]: steps.rank_T[top_steps(steps.kl_T, BUDGETS[0])]},
            f"Rank of the teacher's token, top {top}",
        ),
        "error-split.png": draw.error_split(split, f"Error of the SLM's own choice at the top {top} (Eq. 11): {task}"),
    }
