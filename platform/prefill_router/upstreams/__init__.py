"""HTTP to upstreams, shared by `collect` and the gateway.

`transport` has the client, requests and the meaning of error statuses; `request_bodies` adapts a body to a target;
`redaction` removes credentials from error texts; `translation` converts between OpenAI's and Anthropic's protocols.
Start with `transport`.
"""
