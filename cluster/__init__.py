"""Recipes: a model pair with all its settings, one YAML file each. A data package; nothing is imported from it."""
