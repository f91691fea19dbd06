"""What the stages hand on: the schema of rows, and shards."""
