"""Which weights are prunable layers."""

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from billhook.architectures.layers import find_layers, left_out
from billhook.architectures.selection import select_layers
from billhook.errors import BillhookError


def kinds(model) -> set[str]:
    return {layer.kind for layer in find_layers(model)}


def with_linear(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The model with a linear layer at a path inside its first block."""
    module = model.model.layers[0]
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    module.add_module(last, nn.Linear(32, 32))
    return model


@pytest.mark.parametrize(
    "path", ["router.proj", "altup.modality_router", "shared_expert_gate", "mlp.gate", "mlp.gate.wg"]
)
def test_routers_are_left_alone(path):
    model = tiny.mixtral(num_hidden_layers=1) if "gate" in path else tiny.llama(num_hidden_layers=1)
    before = kinds(model)
    assert kinds(with_linear(model, path)) == before


@pytest.mark.parametrize("path", ["gate", "mlp.gate", "mlp.gate.inner", "self_attn.wg", "ffn.classifier"])
def test_a_gate_without_experts_beside_it_is_a_layer(path):
    """As the gate of an MLP or of an attention, also of one beside a mixture."""
    for model in (tiny.llama(num_hidden_layers=1), tiny.mixtral(num_hidden_layers=1)):
        if path.startswith("mlp") and model.config.model_type == "mixtral":
            continue
        before = kinds(model)
        assert kinds(with_linear(model, path)) == before | {path}
        assert f"model.layers.0.{path}" not in left_out(model)


@pytest.mark.parametrize("listed", [False, True])
def test_an_unnamed_router_is_the_linear_layer_beside_experts_with_an_output_for_each(listed):
    model = tiny.mixtral(num_local_experts=24)
    for block in model.model.layers:
        block.mlp.choice, block.mlp.other = nn.Linear(32, 24), nn.Linear(32, 25)
        del block.mlp.gate
        if listed:
            block.mlp.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(24))
        block.mlp.experts.scale = nn.Parameter(torch.tensor(1.0))
    assert {"mlp.choice", "mlp.other"} & kinds(model) == {"mlp.other"}
    assert left_out(model) == {f"model.layers.{n}.mlp.choice": "routes tokens" for n in range(2)}


def test_no_layer_beside_a_named_router_is_taken_for_one():
    model = tiny.mixtral(num_local_experts=24)
    model.model.layers[0].mlp.latent = nn.Linear(32, 24)
    assert "mlp.latent" in kinds(model)


SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 24}
SIZES |= {"shared_expert_intermediate_size": 56, "num_experts_per_tok": 2}
SIZES |= {f"linear_{name}": size for name, size in {"num_key_heads": 2, "num_value_heads": 4}.items()}
SIZES |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
COUNT = {"mixtral": "num_local_experts", "gpt_oss": "num_local_experts", "deepseek_v3": "n_routed_experts"}
DEEPSEEK = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


def mixture(family: str, experts: int) -> PreTrainedModel:
    sizes = SIZES | ({**DEEPSEEK, "num_key_value_heads": 4, "n_group": 1} if family == "deepseek_v3" else {})
    config = AutoConfig.for_model(family, **sizes, **{COUNT.get(family, "num_experts"): experts})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.gate
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v3"])
def test_which_layers_are_pruned_does_not_depend_on_the_number_of_experts(family):
    """Also where it is the width of a projection, of an expert or of the hidden states."""
    widths = {layer.shape[0] for layer in find_layers(mixture(family, 6))}
    expected = kinds(mixture(family, 6))
    assert {16, 32, 48} & widths
    for width in sorted(widths):
        assert kinds(mixture(family, width)) == expected, width


@pytest.mark.parametrize("shape", [(2, 2), (32, 4), (4, 32)])
def test_small_matrices_are_not_pruned(shape):
    model = tiny.llama(num_hidden_layers=1)
    before = kinds(model)
    model.model.layers[0].add_module("coefficients", nn.Linear(*shape))
    assert kinds(model) == before
    assert left_out(model) == {"model.layers.0.coefficients": "fewer than 8 rows or columns"}


def test_a_target_that_is_never_pruned_is_refused_with_the_reason():
    model = tiny.mixtral()
    with pytest.raises(BillhookError, match=r"layers\.0\.mlp\.gate is never pruned \(routes tokens\)"):
        select_layers(model, find_layers(model), ["model.layers.0.mlp.gate"])
