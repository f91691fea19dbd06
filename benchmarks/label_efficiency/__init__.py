"""Accuracy against labelled prompts, at equal teacher cost: where selecting beats distilling, and where it does not."""
