"""OpenAI client: an answer, a stream and a tool call. Needs `pip install openai`."""

import json
import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("PREFILL_ROUTER_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("PREFILL_ROUTER_KEY", "none"),
)

# An answer. A header and the answer name the chosen model.
raw = client.chat.completions.with_raw_response.create(
    model="auto", messages=[{"role": "user", "content": "What is 17 * 23?"}]
)
answer = raw.parse()
print(answer.choices[0].message.content)
print("by", raw.headers.get("x-router-selected-model", answer.model))

# A stream.
for chunk in client.chat.completions.create(
    model="auto", messages=[{"role": "user", "content": "Count to three."}], stream=True
):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print("\nby", chunk.model)

# A tool call: the model requests it, this program runs it, the model answers with the result.
schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
tools = [{"type": "function", "function": {"name": "get_weather", "parameters": schema}}]
messages = [{"role": "user", "content": "How is it in Oslo? Use get_weather."}]
message = client.chat.completions.create(model="auto", messages=messages, tools=tools).choices[0].message
messages.append(message)
for call in message.tool_calls or []:
    print("calls", call.function.name, json.loads(call.function.arguments))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "4 degrees and rain"})
answer = client.chat.completions.create(model="auto", messages=messages, tools=tools)
print(answer.choices[0].message.content)
