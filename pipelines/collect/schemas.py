"""The rows of a collection on their way: asked for, rolled out, labelled. What is published is `pipelines.data.schema`.

Axes: _T step.
"""

from __future__ import annotations

import pyarrow as pa

from pipelines.data.schema import SHARD

#: How the error of a row begins whose call failed, for a reason that may not be the prompt's own.
FAILED = "failed"

#: What one actor is asked for. `messages` is JSON; both halves of a collection are seeded here, once for
#: good. `index` is the prompt's place among all.
PROMPT = pa.schema(
    [
        ("index", pa.int64()),
        ("uid", pa.string()),
        ("messages", pa.string()),
        SHARD.field("questions"),
        ("seed", pa.int64()),
        ("temperature", pa.float64()),
    ]
)

#: Rolled out, not yet labelled: a shard row's first columns, and the writer's support with the steps laid end to
#: end.
ROLLOUT = pa.schema(
    [
        PROMPT.field("index"),
        *(SHARD.field(name) for name in ("uid", "questions", "prompt", "prompt_ids", "output_ids")),
        *(SHARD.field(name) for name in ("seed", "temperature", "finish")),
        SHARD.field("entropy_T"),
        SHARD.field("error"),
        ("support_ids", pa.list_(pa.int32())),
        ("support_logprobs", pa.list_(pa.float32())),
    ]
)

#: Labelled, all steps with their candidates; the row's place in its shard is not settled yet.
LABELLED = pa.schema([PROMPT.field("index"), *SHARD])
