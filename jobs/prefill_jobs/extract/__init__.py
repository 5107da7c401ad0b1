"""`extract`: corpus to activations."""
