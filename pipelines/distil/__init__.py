"""Shards into an S2T-Local artifact, the kd control or R2R's router."""
