"""SLM rollouts and teacher labels into Arrow shards."""
