"""Tiny random models and a byte-level tokenizer, built from configuration in a fraction of a second; nothing is
downloaded.

Weights are random, so nothing here says whether a method is good; it says whether the plumbing is right.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import PreTrainedModel

VOCABULARY = 258  # 256 bytes, <s>, </s>
TEXT = "The quick brown fox jumps over the lazy dog; naïve façades cost 12 € each.\n"


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A 3-block llama: grouped-query attention (4 heads, 2 key/value heads), tied embeddings, 32 wide, context 128."""
    options = {"num_hidden_layers": 3, "intermediate_size": 64, "tie_word_embeddings": True}
    return _build(LlamaForCausalLM, LlamaConfig(**(_COMMON | options | changes)), seed)


def mixtral(seed: int = 0, **changes: Any) -> MixtralForCausalLM:
    """A 2-block mixtral with 4 experts, 2 used for each token; embeddings not tied."""
    options = {"num_hidden_layers": 2, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
    return _build(MixtralForCausalLM, MixtralConfig(**(_COMMON | options | changes)), seed)


def _build(kind: type[Any], config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(config)
        # The default start is so small that every logit is nearly zero; a wider one makes differences show.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
    return model.eval()


def tokenizer(context: int = 128) -> PreTrainedTokenizerFast:
    """One token a byte, `<s>` before every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.add_special_tokens(["<s>", "</s>"])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", model_max_length=context)


def save(
    directory: Path,
    model: PreTrainedModel | None = None,
    dtype: torch.dtype = torch.float32,
    shard: str = "50GB",
    words: bool = True,
) -> Path:
    """Write a model directory as a user would have it: weights, config, generation config and (with `words`) the
    tokenizer."""
    (llama() if model is None else model).to(dtype).save_pretrained(directory, max_shard_size=shard)
    if words:
        tokenizer().save_pretrained(directory)
    return directory


def text_file(path: Path, copies: int = 200) -> Path:
    """Write a text of about 78 bytes a copy, no two copies alike."""
    path.write_text("".join(f"{i}. {TEXT}" for i in range(copies)), encoding="utf-8")
    return path
