"""The endpoint under load: rates, latencies, overload, its cost over the engine's, fairness, and a soak in which
replicas are killed."""
