"""The paper's curves and tables from shards and results."""
