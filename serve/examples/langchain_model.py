"""LangChain: an answer, a stream and a tool call. Needs `pip install langchain-openai`."""

import os

from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model="auto",
    base_url=os.environ.get("PREFILL_ROUTER_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("PREFILL_ROUTER_KEY", "none"),
)

answer = model.invoke("What is 17 * 23?")
print(answer.content)
print("by", answer.response_metadata["model_name"])

for chunk in model.stream("Count to three."):
    print(chunk.content, end="", flush=True)
print()


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"4 degrees and rain in {city}"


for call in model.bind_tools([get_weather]).invoke("How is it in Oslo? Use get_weather.").tool_calls:
    print("calls", call["name"], call["args"])
