"""HTTP to upstreams, shared by `collect` and the gateway.

`transport` has the client, requests, bounded answers and the meaning of error statuses; `request_bodies` adapts a body
to a target; `translation` converts between OpenAI's and Anthropic's protocols. Start with `transport`.
"""
