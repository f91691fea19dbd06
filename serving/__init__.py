"""Ray Serve: engines as deployments, and a gateway with the OpenAI API. It knows nothing of training or benchmarks."""
