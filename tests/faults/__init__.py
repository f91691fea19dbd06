"""Stages under faults: one fault at a seeded random point of a run, and the output of an undisturbed one at the end.

python -m tests.faults --stage collect --points 50 --seed 0
"""
