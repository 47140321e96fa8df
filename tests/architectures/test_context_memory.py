"""The memory of a context: the sizes that llama.cpp prints for real configurations."""

import pytest
from transformers import AutoConfig

from billhook.architectures.context_memory import context_memory

MIB = 1 << 20
SMOLLM2 = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
GEMMA = {"hidden_size": 640, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1}
KINDS = [kind for _ in range(3) for kind in [*["sliding_attention"] * 5, "full_attention"]]


@pytest.mark.parametrize(("tokens", "cache", "printed"), [(2048, 45, 102.51), (8192, 180, 98.25), (8000, 180, 98.25)])
def test_grouped_heads_are_counted_and_cells_rounded_as_llama_cpp_does(tokens, cache, printed):
    config = AutoConfig.for_model("llama", **SMOLLM2, intermediate_size=1536, vocab_size=49152)
    found = context_memory(config, tokens)
    assert found.cache == cache * MIB
    assert printed * MIB < found.compute < 1.35 * printed * MIB


@pytest.mark.parametrize(("window", "cache"), [(512, 24 + 15), (16384, 24 + 120)])
def test_layers_with_a_window_keep_the_window_and_a_batch(window, cache):
    """llama.cpp with all layers at 8192 cells: 24 MiB of the three full layers, and 120 of the fifteen others."""
    sizes = {"head_dim": 256, "intermediate_size": 2048, "vocab_size": 262144, "sliding_window": window}
    found = context_memory(AutoConfig.for_model("gemma3_text", **GEMMA, **sizes, layer_types=KINDS), 8192)
    assert found.cache == cache * MIB
    assert 514.5 * MIB < found.compute < 1.1 * 514.5 * MIB


def test_a_window_that_llama_cpp_does_not_know_is_counted_in_full():
    config = AutoConfig.for_model("mistral", **SMOLLM2, sliding_window=1024, max_position_embeddings=32768)
    assert context_memory(config, 8192).cache == 180 * MIB


def test_latent_attention_keeps_the_latent_vector_and_the_rotary_part():
    """DeepSeek V3: 61 layers of 512 + 64 numbers."""
    found = context_memory(AutoConfig.for_model("deepseek_v3"), 4096)
    assert found.cache == 2 * 61 * 4096 * 576
    assert found.total == found.cache + found.compute + found.program
