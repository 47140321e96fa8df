"""Which entries of a configuration change where blocks are removed."""

import families
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from billhook.architectures.slim_blocks import check_blocks
from billhook.architectures.slim_config import slimmed
from billhook.architectures.units import find_units
from billhook.errors import BillhookError
from billhook.steps.slim_allocation import sizes_of

pytestmark = pytest.mark.gate
PAIRS = {"image_size": [8, 12], "patch_size": [2, 4], "mrope_section": [4, 4], "vision_feature_layer": [-2, -1]}
PAIRS |= {"feature_indices": [0, 1], "eos_token_id": [1, 2], "time_limit": [0.0, 1.0]}
MAMBA2 = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16}
MAMBA2 |= {"expand": 2, "n_groups": 1, "time_step_limit": [0.0, 1.0]}
LONGFORMER = families.CONFIGS["llama"] | {"num_hidden_layers": 2, "attention_window": [4, 8], "pad_token_id": 1}
LLAMA4 = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
LLAMA4 |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size_mlp": 48}
EXPERTS = families.CONFIGS["llama"] | {"num_hidden_layers": 2, "moe_intermediate_size": 16}
ERNIE = EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 0, "pad_token_id": 0}
LFM2 = EXPERTS | {"num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
GEMMA3N = families.CONFIGS["llama"] | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA3N |= {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 8}
GEMMA3N |= {"vocab_size": 96, "vocab_size_per_layer_input": 96, "laurel_rank": 4}
EVERY_OTHER = EXPERTS | {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "decoder_sparse_step": 2}


def built(family: str, sizes: dict, kind=AutoModelForCausalLM):
    with torch.device("meta"):
        return kind.from_config(AutoConfig.for_model(family, **sizes))


def second_block(family: str, sizes: dict, kind=AutoModelForCausalLM) -> dict:
    """The configuration of a model of two blocks of which the second stays."""
    config, _, _ = slimmed(built(family, sizes, kind), [], {}, [1], 2)
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


@pytest.mark.parametrize(
    ("family", "sizes", "key"),
    [("ernie4_5_moe", ERNIE, "moe_layer_start_index"), ("lfm2_moe", LFM2, "num_dense_layers")],
)
def test_the_number_of_first_blocks_of_another_kind_is_that_of_those_that_stay(family, sizes, key):
    assert second_block(family, sizes | {key: 1})[key] == 0
    check_blocks(built(family, sizes | {key: 1}))


def test_a_weight_that_has_a_part_for_each_block_keeps_all_of_them():
    with pytest.raises(BillhookError, match=r"embed_tokens_per_layer\.weight, which is outside of them, would change"):
        check_blocks(built("gemma3n_text", GEMMA3N))


def test_a_first_block_of_another_kind_does_not_keep_the_others_from_going():
    sizes = families.CONFIGS["llama"] | {"vocab_size": 96, "pad_token_id": 0}
    check_blocks(built("modernbert", sizes, AutoModel))


def test_blocks_whose_kind_follows_from_their_number_are_refused():
    with pytest.raises(BillhookError, match="qwen3_moe models cannot have fewer blocks: their blocks are not alike"):
        check_blocks(built("qwen3_moe", EVERY_OTHER | {"num_hidden_layers": 4}))


def test_as_many_experts_stay_as_the_block_with_the_most_takes_for_a_token():
    model = built("hunyuan_v1_moe", EXPERTS | {"num_experts": 4, "moe_topk": [1, 3], "head_dim": 8})
    assert {size.least for size in sizes_of(find_units(model, ["experts"]), model.config)} == {3}
