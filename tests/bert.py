"""A tiny random BERT with a byte-level tokenizer, as a user would have it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]


def model(seed: int = 0) -> BertForMaskedLM:
    """Three blocks, 32 wide, a vocabulary of 256 bytes and four special tokens, context 64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = BertForMaskedLM(
            BertConfig(
                vocab_size=260,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=64,
            )
        )
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
    return made.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte between [CLS] and [SEP]."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.add_special_tokens(SPECIAL)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    frame = [("[CLS]", 257), ("[SEP]", 258)]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)


def save(directory: Path) -> Path:
    """Write the model directory."""
    model().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory
