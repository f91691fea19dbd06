"""The paper's curves and tables from shards and results."""

#: How many rescued and how many flipped answers of each task and policy have a page of their own.
PAGES = 20
