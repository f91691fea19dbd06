"""vLLM as an engine. `load` starts one, `engine` is the contract over its `AsyncLLM`, `requests` is what travels with a
call, and `sampler` and `worker` are the part of S2T that runs inside vLLM's own worker processes."""
