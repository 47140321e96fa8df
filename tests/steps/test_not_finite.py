"""Every stored value must be finite before a step starts: parameters, and buffers that are saved with them."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from billhook import BillhookError, JobError, compress, load_model, measure, prune
from billhook.architectures.layers import check_finite

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def mixture() -> DeepseekV3ForCausalLM:
    """Two blocks; the second has 4 experts and a router whose bias is a persistent buffer."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    ranks = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_attention_heads": 4}
    rest = {"vocab_size": 258, "num_hidden_layers": 2, "num_key_value_heads": 4, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**experts, **ranks, **sizes, **rest))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_buffer_that_is_not_finite_is_refused_in_files_and_in_memory(bad: float, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m", mixture(), words=False)
    weights = load_file(source / "model.safetensors")
    weights[BIAS][0] = bad
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    for model in (source, load_model(source)):
        with pytest.raises(BillhookError, match=rf"{BIAS} holds 1 NaN or infinite weights: repair the checkpoint"):
            prune(model, sparsity=0.5, criterion="magnitude", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_stored_may_be_infinite() -> None:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("mask", torch.tensor([0.0, -float("inf")]), persistent=False)
    check_finite(module)


def test_outputs_that_are_too_large_to_be_measured_are_named(tmp_path: Path) -> None:
    model, ids = tiny.llama(num_hidden_layers=2), torch.arange(256).view(8, 32)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight *= 1e30
    source, said = tiny.save(tmp_path / "m", model), r"outputs of model\.layers\.0\.self_attn\.q_proj are too large"
    with pytest.raises(JobError, match=said):
        compress(source, tmp_path / "out", bits=8, calibration=ids)
    with pytest.raises(JobError, match=said):
        measure(model, ["error_curve:wanda"], batches=ids)
