"""A packed model behind a small web server: one model, one request at a time, plain json.

    pip install fastapi uvicorn
    python examples/server/app.py PACKED --port 8000
    curl -s localhost:8000/generate -H 'content-type: application/json' -d '{"prompt": "Once upon a time",
    "max_new_tokens": 20}'

The model is an ordinary transformers model, so any other server that takes one holds it the same way.
"""

import argparse
import threading
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field
from transformers import AutoTokenizer

import billhook


class Prompt(BaseModel):
    """What is asked."""

    prompt: str = Field(min_length=1, max_length=100_000)
    max_new_tokens: int = Field(64, ge=1, le=1024)


def create_app(directory: Path) -> FastAPI:
    """Load the model once; it is shared by all requests, which wait for each other."""
    model, tokenizer = billhook.load(directory), AutoTokenizer.from_pretrained(directory)
    app, turn = FastAPI(title=directory.name), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"model": directory.name, "status": "ready"}

    @app.post("/generate")
    def generate(asked: Prompt) -> dict[str, str | int]:  # not async: the server runs it in a thread
        ids = tokenizer(asked.prompt, return_tensors="pt").input_ids
        with turn, torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked.max_new_tokens, do_sample=False
            )
        new = out[0, ids.shape[1] :]
        return {"text": tokenizer.decode(new, skip_special_tokens=True), "tokens": len(new)}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a packed model.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    uvicorn.run(create_app(given.directory), host=given.host, port=given.port, log_level="warning")
