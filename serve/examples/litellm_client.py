"""LiteLLM: an answer and a stream. Needs `pip install litellm`; the prefix `openai/` selects the OpenAI protocol.

On import, LiteLLM downloads a price list unless LITELLM_LOCAL_MODEL_COST_MAP=True is set.
"""

import os

import litellm

router = {
    "model": "openai/auto",
    "api_base": os.environ.get("PREFILL_ROUTER_URL", "http://127.0.0.1:8000/v1"),
    "api_key": os.environ.get("PREFILL_ROUTER_KEY", "none"),
}

answer = litellm.completion(messages=[{"role": "user", "content": "What is 17 * 23?"}], **router)
print(answer.choices[0].message.content)
print("by", answer.model)

for chunk in litellm.completion(messages=[{"role": "user", "content": "Count to three."}], stream=True, **router):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
