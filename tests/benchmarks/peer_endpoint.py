"""The usual way to serve: FastAPI, float32, one prompt at a time, every layer and the logits, then the router's head.

python tests/benchmarks/peer_endpoint.py ROUTER PORT
"""

from __future__ import annotations

import sys
import threading

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from prefill_router.encoder import checkpoint
from prefill_router.router.artifact import Router

router = Router.load(sys.argv[1])
loaded = checkpoint.load_causal_lm(router.encoders[""].spec.model, None, torch.float32)
turn = threading.Lock()
api = FastAPI()


class Request(BaseModel):
    prompt: str


@api.post("/v1/route")
def route(request: Request) -> dict[str, list[float]]:
    messages = [{"role": "user", "content": request.prompt}]
    text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with turn, torch.inference_mode():
        states = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states
        pooled = {"last": lambda s: s[:, -1], "mean": lambda s: s.mean(1)}
        read = {c.name: pooled[c.pooling](states[c.layer]).numpy().astype(np.float16) for c in router.columns}
        return {"confidences": router.predict_activations(read).p_correct[0].tolist()}


if __name__ == "__main__":
    uvicorn.run(api, port=int(sys.argv[2]), log_level="error")
