"""Plan: what a recipe needs, from its settings and its models' configurations alone."""
