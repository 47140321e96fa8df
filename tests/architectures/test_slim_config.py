"""Which entries of a configuration change where blocks are removed."""

import families
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from billhook.architectures.slim_config import slimmed

pytestmark = pytest.mark.gate
PAIRS = {"image_size": [8, 12], "patch_size": [2, 4], "mrope_section": [4, 4], "vision_feature_layer": [-2, -1]}
PAIRS |= {"feature_indices": [0, 1], "eos_token_id": [1, 2], "time_limit": [0.0, 1.0]}
MAMBA2 = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16}
MAMBA2 |= {"expand": 2, "n_groups": 1, "time_step_limit": [0.0, 1.0]}
LONGFORMER = families.CONFIGS["llama"] | {"num_hidden_layers": 2, "attention_window": [4, 8], "pad_token_id": 1}
LLAMA4 = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
LLAMA4 |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size_mlp": 48}


def second_block(family: str, sizes: dict, kind=AutoModelForCausalLM) -> dict:
    """The configuration of a model of two blocks of which the second stays."""
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(family, **sizes))
    config, _, _ = slimmed(model, [], {}, [1], 2)
    assert config.num_hidden_layers == 1
    return config.to_dict()


def test_lists_that_happen_to_have_as_many_entries_as_there_are_blocks_are_kept():
    found = second_block("llama", families.CONFIGS["llama"] | {"num_hidden_layers": 2, **PAIRS})
    assert {key: found[key] for key in PAIRS} == PAIRS
    assert list(second_block("mamba2", MAMBA2)["time_step_limit"]) == [0.0, 1.0]


def test_lists_with_an_entry_for_each_block_are_cut():
    per_layer = {"window_of_each": [4, 8], "layer_kinds": ["a", "b"], "heads_per_layer": [2, 4]}
    found = second_block("llama", families.CONFIGS["llama"] | {"num_hidden_layers": 2, **per_layer})
    assert {key: found[key] for key in per_layer} == {key: value[1:] for key, value in per_layer.items()}
    assert second_block("longformer", LONGFORMER, AutoModel)["attention_window"] == [8]
    found = second_block("llama4_text", LLAMA4 | {"no_rope_layers": [1, 0], "moe_layers": [0, 1]})
    assert (found["no_rope_layers"], found["moe_layers"]) == ([0], [0])
