"""The gateway: answers OpenAI calls (chat completions, responses) through the upstreams of the pool's targets.

Start with `proxy`, which asks one target after another until one answers. `planner` and `candidates` order the targets,
`charges` prices calls, `relay` streams. `openai_calls` and `events` read calls and streams, `upstream` and `breaker`
handle one target, `refusals` and `refused_fields` what it does not accept, `state` stores what outlives a call.
"""
