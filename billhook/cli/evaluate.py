"""`billhook eval`: token perplexity on non-overlapping windows, the protocol of the pruning papers."""

from typing import Annotated

import typer

from billhook.cli.common import BatchSize, Device, Dtype, Json, Length, TrustRemoteCode, emit, guarded, progress, say

NAME = "eval"
EXAMPLES = """\b
Examples:
  billhook eval ./pruned --data text.txt
  billhook eval ./pruned --data hub:wikitext2 --length 2048
  billhook eval ./pruned --data windows.safetensors --json
"""


@guarded
def command(
    model: Annotated[str, typer.Argument(help="Model directory, or a name on the hub.")],
    data: Annotated[
        str | None,
        typer.Option(help="FILE.txt, FILE.jsonl, TOKENS.safetensors, hub:NAME[:config][:split], stdlib:heldout.", metavar="SOURCE"),
    ] = None,
    length: Length = None,
    limit: Annotated[int | None, typer.Option(help="Score at most this many windows.", min=1)] = None,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Token perplexity, tokens scored, and bits per byte where the text is known."""
    from billhook.checkpoint import load_model, load_tokenizer, resolve
    from billhook.data import load_windows
    from billhook.errors import BillhookError
    from billhook.perplexity import check_length, context_length, evaluate

    if data is None:
        raise BillhookError(
            "Say what to score: --data FILE.txt, FILE.jsonl, TOKENS.safetensors or hub:wikitext2 (the demo uses stdlib:heldout)."
        )
    path = resolve(model)
    loaded = load_model(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    window = length or min(2048, context_length(loaded.config) or 2048)
    check_length(loaded.config, window)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    windows = load_windows(data, tokenizer, length=window, limit=limit)
    with progress("scoring batches") as advance:
        result = evaluate(loaded, windows, batch_size=batch_size, progress=lambda done, total: advance(f"{done}/{total} windows"))
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
    say(f"token perplexity {result.token_ppl:.4f} ({result.tokens:,} tokens in {result.windows} windows of {result.length}{bits})")
    if as_json:
        emit(result.to_dict())
