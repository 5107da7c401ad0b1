"""Routes a prompt to the cheapest model that will answer it, from the prefill activations of a small LLM.

The core: everything a notebook or an actor needs, without Ray. Start with `router.artifact` (Router);
platform/README.md lists the packages and follows a prompt through them.
"""

import os

# A waiting thread of OpenMP spins for milliseconds, on a core that another process could use. These are the turns that
# OpenMP takes by itself where it knows of more threads than cores. It reads them when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
