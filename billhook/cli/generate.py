"""`billhook generate`: continue a text with a dense or a packed model, and report the speed."""

from typing import Annotated

import typer

from billhook.cli.common import emit, say
from billhook.cli.options import AnyModel, Json, Loading

NAME = "generate"
EXAMPLES = """\b
Examples:
  billhook generate ./packed "Once upon a time" --max-new-tokens 100
  billhook generate ./packed "Once upon a time" --stream
"""


def command(
    model: AnyModel,
    *,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[
        int, typer.Option(help="Stop after this many tokens, or at the model's end token.", min=1)
    ] = 64,
    stream: Annotated[bool, typer.Option("--stream", help="Print each word as soon as it is complete.")] = False,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Print the greedy continuation of a prompt, and tokens per second."""
    import torch
    from transformers import TextStreamer

    from billhook.architectures.sources import resolve
    from billhook.errors import BillhookError
    from billhook.packed.generation import generate
    from billhook.packed.loading import load
    from billhook.store.checkpoint import load_tokenizer

    path, options = resolve(model), loading.fields(model, streams=False)
    tokenizer = load_tokenizer(path, trust_remote_code=loading.trust_remote_code)
    if tokenizer is None:
        raise BillhookError(f"{path} has no tokenizer, so it cannot read a prompt: copy the tokenizer files into it.")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64)
    if not ids.numel():
        raise BillhookError("The prompt is empty: give at least a word.")
    loaded = load(path, **options, note=lambda text: say(f"note: {text}"))
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream and not as_json else None
    result = generate(loaded, ids, max_new_tokens, token=streamer.put if streamer else None)
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
