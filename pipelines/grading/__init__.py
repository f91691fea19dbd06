"""Grading: what a response answers, and whether that is right. It knows nothing of models, engines or Ray."""
