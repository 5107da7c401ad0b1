"""How good a router is on prompts that it was not trained on, beside whatever else could route them."""
