"""Routes a prompt to the cheapest model that will answer it, from the prefill activations of a small LLM.

The core: everything a notebook or an actor needs, without Ray.
"""
