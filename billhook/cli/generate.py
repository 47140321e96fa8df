"""`billhook generate`: continue a text, or answer a question about an image, with a dense or a packed model, and report
the speed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from billhook.cli.common import emit, say
from billhook.cli.options import AnyModel, Json, Loading

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from billhook.tasks.base import Home

NAME = "generate"
EXAMPLES = """\b
Examples:
  billhook generate ./packed "Once upon a time" --max-new-tokens 100
  billhook generate ./packed "Once upon a time" --stream
  billhook generate ./packed "What is this?" --image cat.png
"""
IMAGE_HELP = "An image that the prompt is a question about, for image-text models. Repeatable."


def command(
    model: AnyModel,
    *,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or the question about an image.")],
    max_new_tokens: Annotated[
        int, typer.Option(help="Stop after this many tokens, or at the model's end token.", min=1)
    ] = 64,
    image: Annotated[list[Path] | None, typer.Option(help=IMAGE_HELP)] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print each word as soon as it is complete.")] = False,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Print the greedy continuation of a prompt, and tokens per second."""
    from transformers import TextStreamer

    from billhook.architectures.sources import resolve
    from billhook.errors import BillhookError
    from billhook.packed.generation import generate
    from billhook.packed.loading import load
    from billhook.store import not_a_model
    from billhook.store.checkpoint import load_tokenizer
    from billhook.tasks.base import Home
    from billhook.text.rows import cleaned

    prompt = cleaned(prompt)
    path, options = resolve(model), loading.fields(model, streams=False)
    tokenizer = load_tokenizer(path, trust_remote_code=loading.trust_remote_code)
    if not (path / "config.json").is_file():
        raise BillhookError(not_a_model.directory(path))
    if tokenizer is None:
        raise BillhookError(f"{path} has no tokenizer, so it cannot read a prompt: copy the tokenizer files into it.")
    home = Home(path, loading.trust_remote_code)
    inputs = {} if image else _words(tokenizer, prompt)
    loaded = load(path, **options, note=lambda text: say(f"note: {text}"))
    inputs = _question(loaded, home, image, prompt) if image else inputs
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream and not as_json else None
    ids, token = inputs.pop("input_ids"), streamer.put if streamer else None
    result = generate(loaded, ids, max_new_tokens, token=token, inputs=inputs)
    text = tokenizer.decode(result.ids[0, result.prompt :], skip_special_tokens=True)
    if streamer is not None:
        streamer.end()
    elif not as_json:
        print(text, flush=True)
    speed = "" if result.tokens_per_s is None else f", then {result.tokens_per_s:.1f} tokens/s"
    say(f"{result.new} tokens: the first after {result.prefill_s:.2f} s ({result.prompt} tokens of prompt){speed}.")
    if as_json:
        counts = {"prompt_tokens": result.prompt, "new_tokens": result.new}
        times = {key: getattr(result, key) for key in ("prefill_s", "decode_s", "tokens_per_s")}
        emit({"text": text, **counts, **times})


def _words(tokenizer: Any, prompt: str) -> dict[str, "Tensor"]:
    """The tokens of a prompt."""
    import torch

    from billhook.errors import BillhookError

    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64)
    if not ids.numel():
        raise BillhookError("The prompt is empty: give at least a word.")
    return {"input_ids": ids}


def _question(model: "PreTrainedModel", home: "Home", images: list[Path], prompt: str) -> dict[str, "Tensor"]:
    """The inputs of a question about images."""
    from billhook.errors import BillhookError
    from billhook.tasks.opening import task_of
    from billhook.tasks.question_inputs import prompt_inputs

    if task_of(model).name != "image-text-to-text":
        raise BillhookError(f"{home.directory} reads no images with its text: leave out --image.")
    return prompt_inputs(model, home, images, prompt)
