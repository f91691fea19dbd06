"""Policies on tasks over a served endpoint, graded."""
