"""The rows that stages hand on: what a shard and a results file hold, one row a trajectory or an answer.

Shards are Arrow IPC files, one row a trajectory, steps nested, so one row in is one row out. Axes as
everywhere: _T step, _K candidate.
"""

from __future__ import annotations

import pyarrow as pa

VERSION = "1"

#: A step kept for training: its candidates, best first in the order of the model that wrote, with both models'
#: log-probabilities over their whole vocabularies. `by_kl` says why it was kept: True for the collection's
#: top steps by KL, False for a random one.
KEPT_STEP = pa.struct(
    [
        ("step", pa.int32()),
        ("by_kl", pa.bool_()),
        ("candidates_K", pa.list_(pa.int32())),
        ("slm_logprobs_K", pa.list_(pa.float32())),
        ("teacher_logprobs_K", pa.list_(pa.float32())),
    ]
)

#: One trajectory. The SLM wrote it, the teacher, or S2T (`collect.writer` of the recipe in the metadata); `entropy_T`
#: is that of the model that rolled out, `kl_T` goes from it to the other one. `questions` are the hashes its prompt is
#: known by (`splits.question_hashes`), by which test rows are kept out of training. `teacher_read` is how many tokens
#: the teacher read for it, `teacher_rank_T` the 0-based rank of the teacher's argmax in the SLM's order (support or
#: more: the value `support`). `error` is null where the row is whole; then the step columns are filled, and null where
#: it is not. An error is "kind: detail"; the kinds are "empty prompt", "too long" and "failed".
SHARD = pa.schema(
    [
        ("uid", pa.string()),
        ("questions", pa.list_(pa.string())),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("output_ids", pa.list_(pa.int32())),
        ("seed", pa.int64()),
        ("temperature", pa.float64()),
        ("finish", pa.string()),
        ("teacher_read", pa.int64()),
        ("kl_T", pa.list_(pa.float32())),
        ("entropy_T", pa.list_(pa.float32())),
        ("teacher_argmax_T", pa.list_(pa.int32())),
        ("teacher_rank_T", pa.list_(pa.int32())),
        ("kept", pa.list_(KEPT_STEP)),
        ("error", pa.string()),
    ]
)

#: Keys of a shard's schema metadata (all values are UTF-8 strings).
METADATA = (
    "s2t.version",
    "s2t.recipe",  # JSON of the whole recipe
    "s2t.slm",  # sha256 of the SLM's weights
    "s2t.teacher",
    "s2t.tokenizer",
    "s2t.divergence",
    "s2t.k",
    "s2t.tau",  # share of the collection's steps kept by KL
    "s2t.task",
)

#: One answer. `kind` is the policy's name without K and budget, which are null where they mean nothing to it. `verdict`
#: is correct, wrong, truncated or errored; the four sum to the total. `turns` holds every turn's text where a task has
#: several, `output` the last; `output_ids` are the token ids of an answer of one turn, where the endpoint gives them.
#: `usage` (engine -> Usage), `decisions` and `models` (engine -> sha256 of its weights) are JSON. `seconds` is the
#: server's time for the answer, `client_seconds` what passed here. `limit` is how many tokens an answer was allowed;
#: `shortened` says that prompt and limit did not fit the context, and it had less.
RESULT = pa.schema(
    [
        ("key", pa.string()),
        ("task", pa.string()),
        ("item", pa.string()),
        ("category", pa.string()),
        ("policy", pa.string()),
        ("kind", pa.string()),
        ("k", pa.int32()),
        ("budget", pa.float64()),
        ("seed", pa.int64()),
        ("repeat", pa.int32()),
        ("request_seed", pa.int64()),
        ("output", pa.string()),
        ("output_ids", pa.list_(pa.int32())),
        ("turns", pa.list_(pa.string())),
        ("samples", pa.list_(pa.string())),
        ("extracted", pa.string()),
        ("answer", pa.string()),
        ("verdict", pa.string()),
        ("score", pa.float64()),
        ("error", pa.string()),
        ("finish", pa.string()),
        ("limit", pa.int32()),
        ("shortened", pa.bool_()),
        ("tokens", pa.int64()),
        ("usage", pa.string()),
        ("decisions", pa.string()),
        ("models", pa.string()),
        ("seconds", pa.float64()),
        ("client_seconds", pa.float64()),
    ]
)
