"""Names, sources and rows of the tensors in GGUF files, from shapes alone."""

import numpy as np
import pytest

from billhook.architectures.gguf_names import gguf_tensors, rotary_order
from billhook.errors import BillhookError

LLAMA = {"model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 12, "num_attention_heads": 4}
MOE = {**LLAMA, "model_type": "mixtral", "num_local_experts": 12, "num_key_value_heads": 2}
GEMMA = {"model_type": "gemma2", "num_hidden_layers": 2, "num_attention_heads": 4}
BLOCK = "model.layers.0."


def named(config, shapes):
    return {tensor.name: tensor for tensor in gguf_tensors(config, shapes)}


def test_rows_of_the_two_halves_of_a_head_take_turns():
    assert rotary_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    shapes = {f"{BLOCK}self_attn.{x}_proj.weight": (16 if x == "q" else 8, 16) for x in "qk"}
    found = named({**LLAMA, "num_key_value_heads": 2}, shapes)
    assert found["blk.0.attn_k.weight"].rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert found["blk.0.attn_q.weight"].rows.tolist() == rotary_order(16, 4).tolist()
    found = named(LLAMA, {f"{BLOCK}self_attn.k_proj.weight": (16, 16)})  # as many heads as for q
    assert found["blk.0.attn_k.weight"].rows.tolist() == rotary_order(16, 4).tolist()
    values = np.arange(24).reshape(8, 3)
    picked = named({**LLAMA, "num_key_value_heads": 2}, shapes)["blk.0.attn_k.weight"].pick(values)
    assert picked[:, 0].tolist() == [0, 6, 3, 9, 12, 18, 15, 21]


def test_experts_are_stacked_in_the_order_of_their_numbers_and_counted():
    name = f"{BLOCK}block_sparse_moe.experts.{{}}.w1.weight"
    found = named(MOE, {name.format(i): (6, 4) for i in reversed(range(12))})["blk.0.ffn_gate_exps.weight"]
    assert found.sources == tuple(name.format(i) for i in range(12))
    assert found.shape == (12, 6, 4)
    with pytest.raises(BillhookError, match=r"blk\.0\.ffn_gate_exps\.weight needs 12 experts, and there are 11"):
        named(MOE, {name.format(i): (6, 4) for i in range(11)})


def test_fused_experts_are_split_into_gate_and_up():
    config = {**MOE, "model_type": "qwen3_moe", "num_experts": 3}
    found = named(config, {f"{BLOCK}mlp.experts.gate_up_proj": (3, 10, 4)})
    assert (found["blk.0.ffn_gate_exps.weight"].rows.tolist(), found["blk.0.ffn_up_exps.weight"].rows.tolist()) == (
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
    )
    assert found["blk.0.ffn_up_exps.weight"].shape == (3, 5, 4)


def test_what_a_file_does_not_hold_is_left_out_and_what_has_no_name_is_refused():
    left_out = [f"{BLOCK}self_attn.rotary_emb.inv_freq", f"{BLOCK}attention.bias", f"{BLOCK}attention.masked_bias"]
    left_out += [f"{BLOCK}self_attn.masked_bias", f"{BLOCK}self_attn.rotary_emb.cos_cached", "mtp.fc.weight"]
    depth = LLAMA["num_hidden_layers"]
    left_out += [f"model.layers.{depth}.{name}.weight" for name in ("eh_proj", "self_attn.q_proj")]
    assert named(LLAMA, dict.fromkeys(left_out, (4,))) == {}
    assert list(named(LLAMA, {"lm_head.weight": (9, 4)})) == ["output.weight"]
    assert named(GEMMA, {"lm_head.weight": (9, 4)}) == {}  # its head is its embedding
    with pytest.raises(BillhookError, match=r"model\.layers\.0\.extra\.weight has no name"):
        named(LLAMA, {f"{BLOCK}extra.weight": (4, 4)})


def test_one_is_added_to_the_norms_of_gemma_only():
    shapes = {f"{BLOCK}input_layernorm.weight": (4,), f"{BLOCK}mlp.up_proj.weight": (4, 4)}
    assert [tensor.shift for tensor in named(GEMMA, shapes).values()] == [1.0, 0.0]
    assert [tensor.shift for tensor in named(LLAMA, shapes).values()] == [0.0, 0.0]
