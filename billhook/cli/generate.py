"""`billhook generate`: continue a text, answer a question about an image or classify one, with a dense or a packed
model, and report the speed of text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from billhook.cli.common import emit, say
from billhook.cli.options import AnyModel, Json, Loading

if TYPE_CHECKING:
    from torch import Tensor

NAME = "generate"
EXAMPLES = """\b
Examples:
  billhook generate ./packed "Once upon a time" --max-new-tokens 100
  billhook generate ./packed "Once upon a time" --stream
  billhook generate ./packed "What is this?" --image cat.png
  billhook generate ./packed-vit --image cat.png
"""
PROMPT_HELP = "The text to continue, or the question about an image; none for an image classifier."
IMAGE_HELP = "An image that the prompt is a question about, for image-text models, or to classify. Repeatable."


def command(
    model: AnyModel,
    *,
    prompt: Annotated[str | None, typer.Argument(help=PROMPT_HELP)] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Stop after this many tokens, or at the model's end token.", min=1)
    ] = 64,
    image: Annotated[list[Path] | None, typer.Option(help=IMAGE_HELP)] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print each word as soon as it is complete.")] = False,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Print the greedy continuation of a prompt, and tokens per second; or the likeliest classes of an image."""
    from transformers import TextStreamer

    from billhook.architectures.sources import resolve
    from billhook.packed.generation import generate
    from billhook.packed.loading import load
    from billhook.tasks.base import Home
    from billhook.tasks.question_inputs import prompt_inputs
    from billhook.text.rows import cleaned

    path, options = resolve(model), loading.fields(model, streams=False)
    trust = loading.trust_remote_code
    if _classifies(path, prompt, image):
        return _classify(path, image or [], options, as_json)
    tokenizer, prompt = _tokenizer(path, trust), cleaned(prompt or "")
    inputs = {} if image else _words(tokenizer, prompt)
    loaded = load(path, **options, note=lambda text: say(f"note: {text}"))
    inputs = prompt_inputs(loaded, Home(path, trust), image, prompt) if image else inputs
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


def _classifies(path: Path, prompt: str | None, images: list[Path] | None) -> bool:
    """Whether a model is an image classifier, not one that generates text; raises BillhookError for any other, and
    where what it reads was not given."""
    from billhook.errors import BillhookError
    from billhook.store.checkpoint import read_config
    from billhook.tasks.opening import continues_text, task_of_config

    task = task_of_config(path, config := read_config(path, quantized=True))
    if task.name == "image-classification":
        if prompt is not None or not images:
            raise BillhookError(f"{path} is an image classifier: give it images with --image FILE, and no PROMPT.")
        return True
    if not continues_text(task):
        kind = f"{config.get('model_type')}, a model for {task.name}"
        raise BillhookError(f"{path} is {kind}, which continues no text: score it with billhook eval.")
    if prompt is None:
        raise BillhookError(f"The PROMPT is missing: give {path} a text to continue or a question about an image.")
    if images and task.name != "image-text-to-text":
        raise BillhookError(f"{path} reads no images with its text: leave out --image.")
    return False


def _classify(path: Path, files: list[Path], options: dict[str, Any], as_json: bool) -> None:
    """Print the likeliest classes of images."""
    from billhook.images.corpus import pictures
    from billhook.images.pixels import Reader
    from billhook.packed.classification import likeliest
    from billhook.packed.loading import load
    from billhook.tasks.image_inputs import Images

    found = [picture for file in files for picture in pictures(file, "evaluation")]
    source = str(files[0])
    images = Images(source, found, None, Reader.of(path, options["trust_remote_code"], source))
    classes = likeliest(load(path, **options, note=lambda text: say(f"note: {text}")), images)
    named = [[{"label": label, "probability": value} for label, value in one] for one in classes]
    if as_json and len(found) > 1:
        emit({"images": [{"image": p.name, "classes": one} for p, one in zip(found, named, strict=True)]})
    elif as_json:
        emit({"classes": named[0]})
    else:
        for picture, one in zip(found, classes, strict=True):
            lines = [f"{value:6.1%}  {label}" for label, value in one]
            print("\n".join([picture.name, *lines] if len(found) > 1 else lines), flush=True)


def _tokenizer(path: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a model; raises BillhookError where it has none."""
    from billhook.errors import BillhookError
    from billhook.store.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise BillhookError(f"{path} has no tokenizer, so it cannot read a prompt: copy the tokenizer files into it.")
    return tokenizer


def _words(tokenizer: Any, prompt: str) -> dict[str, "Tensor"]:
    """The tokens of a prompt."""
    import torch

    from billhook.errors import BillhookError

    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64)
    if not ids.numel():
        raise BillhookError("The prompt is empty: give at least a word.")
    return {"input_ids": ids}
