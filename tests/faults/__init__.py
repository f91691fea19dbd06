"""Stages under faults: faults at seeded random points of a run, and the output of an undisturbed one at the end.

python -m tests.faults --stage collect --points 50 --seed 0
"""
