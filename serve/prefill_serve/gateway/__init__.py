"""The gateway: answers OpenAI calls (chat completions, responses) through the upstreams of the pool's targets.

Start with `proxy`, which takes a call to one target after another and back. `openai_calls` and `events` read calls and
streams, `upstream` and `breaker` handle one target, `state` stores what outlives a call.
"""
