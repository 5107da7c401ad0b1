"""`probe` and `train`: activations and outcomes to a router."""
