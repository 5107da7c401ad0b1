"""Routes a prompt to the cheapest model that will answer it, from the prefill activations of a small LLM.

The core: everything a notebook or an actor needs, without Ray. Start with `router.artifact` (Router);
platform/README.md lists the packages and follows a prompt through them.
"""
