"""Recipes, a model pair with all its settings each, and the files that run them on a cluster. A data package; nothing
is imported from it."""
