"""The names of the files that the stages leave in their output folders.

A collection's thresholds (`s2t_models.calibration.THRESHOLDS`) are read by serving as well, so their name is there.
"""

from __future__ import annotations

# A collection.
SHARDS = "shards"
#: Written when a collection begins: whose it is. It stays, so that a folder never holds two collections.
RECORD = "record.json"
COLLECTED = "collect.json"

# A benchmark.
ANSWERS = "answers"
JUDGEMENTS = "judgements"
RESULTS = "results.parquet"
TABLES = "tables.md"
FIGURES = "figures"

# The loop.
SERVABLE_RECIPE = "recipe.yaml"
SUMMARY = "summary.json"
#: The seconds that each stage has taken, over all runs.
STAGES = "stages.json"
