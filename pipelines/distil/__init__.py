"""Shards into an S2T-Local artifact or an ablation of it, a trained baseline's checkpoint, or R2R's router."""
