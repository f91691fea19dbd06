"""The method on torch and transformers: engines, policies, training. It knows nothing of Ray, HTTP or MLflow."""
