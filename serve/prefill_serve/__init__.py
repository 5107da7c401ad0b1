"""The routing endpoint on Ray Serve: `POST /v1/route`, and a gateway that answers OpenAI calls.

Start with `app`, the Serve application. `api` holds the HTTP paths, `endpoint` the way from a request to a decision,
`engine` and `scheduler` the batched encoder, `gateway` the calls to upstreams, `launcher` the `serve` command.
"""

import prefill_router  # noqa: F401  before torch, for which it sets a variable
