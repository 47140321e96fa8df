"""The memory that llama.cpp needs beside a model's file, for a context of so many tokens:

    cache    2 bytes · sum over layers of cells · (keys + values of a token)
    compute  4 bytes · 512 tokens · (vocabulary + 4 · hidden size + 2 · intermediate size) + 4 bytes · 512 · cells
    program  128 MiB

A layer has n cells, rounded up to 256, or at most window + 512 (rounded up) where the family has sliding windows that
llama.cpp knows. Keys and values of a token are 2 · key-value heads · head size numbers; with multi-head latent
attention (DeepSeek) the latent vector and the rotary part. The cache is that of one sequence in float16, as
`llama-server` and `llama-cli` allocate it by default; a quantized cache is smaller, several sequences and programs that
ask for full windows need more. `compute` is an allowance for batches of 512 tokens with flash attention, most of it
logits. llama.cpp b7000 and later; weights are read from the file, which is mapped into memory.

Limit: layers without a growing cache (recurrent ones) are counted as attention, which is too much.
"""

from dataclasses import dataclass
from typing import Any

from billhook.architectures.config import text_config
from billhook.architectures.gguf_names import FAMILIES

_BATCH, _ROUNDED = 512, 256  # tokens that are computed at once; cells of a cache are a multiple
PROGRAM = 128 << 20


@dataclass(frozen=True)
class ContextMemory:
    """What a context of so many tokens takes, in bytes.

    * `tokens`: tokens of context.
    * `cache`: keys and values of all tokens.
    * `compute`: intermediate results and logits of a batch.
    * `program`: the program itself.
    """

    tokens: int
    cache: int
    compute: int
    program: int = PROGRAM

    @property
    def total(self) -> int:
        """All of it."""
        return self.cache + self.compute + self.program

    def __str__(self) -> str:
        parts = f"{self.cache:,} bytes of cache, {self.compute:,} to compute and {self.program:,} for the program"
        return f"a context of {self.tokens:,} tokens takes {parts}"


def context_memory(config: Any, tokens: int) -> ContextMemory:
    """What a model with this configuration (of `transformers`) needs for a context of so many tokens."""
    text = text_config(config)
    cells = _rounded(tokens)
    family = FAMILIES.get(text.model_type)
    window = getattr(text, "sliding_window", None) if family is not None and family.period is not None else None
    kinds = list(getattr(text, "layer_types", None) or [])
    kinds += ["full_attention"] * (text.num_hidden_layers - len(kinds))
    local = min(cells, _rounded(window + _BATCH)) if window else cells
    total = sum(local if kind == "sliding_attention" else cells for kind in kinds[: text.num_hidden_layers])
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    numbers = _BATCH * (text.vocab_size + 4 * text.hidden_size + 2 * wide) + _BATCH * cells
    return ContextMemory(tokens, 2 * total * _token_values(text), 4 * numbers)


def _token_values(text: Any) -> int:
    """The numbers that a layer keeps of a token."""
    if latent := getattr(text, "kv_lora_rank", None):
        return int(latent) + int(text.qk_rope_head_dim)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(heads) * int(width)


def _rounded(cells: int) -> int:
    return -(-cells // _ROUNDED) * _ROUNDED
