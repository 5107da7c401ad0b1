"""Translates between OpenAI's chat completions and Anthropic's Messages.

Pure functions on parsed JSON, for `collect` and the gateway. `messages_requests` and `chat_requests` translate
requests, `whole_answers` answers, `answer_streams` their events. A field without a counterpart raises Untranslatable
if the answer would mean something else without it; any other is dropped and named.
Sources: the API references of OpenAI (chat completions) and Anthropic (Messages, streaming).
"""
