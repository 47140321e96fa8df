"""The metadata of GGUF files by value: what llama.cpp reads, computed here in plain steps."""

import math
from typing import Any

import pytest
import torch

from billhook.architectures.gguf_config import (
    gguf_sizes,
    layer_types,
    llama3_factors,
    new_shape_note,
    rotary_factors,
    window_note,
    yarn_note,
)
from billhook.architectures.gguf_names import FAMILIES, gguf_family, head_size
from billhook.errors import BillhookError

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def sizes(family: str, **changes):
    """The metadata without the name of the architecture."""
    found = gguf_sizes(FAMILIES[family], {**SIZES, **changes})
    return {key.partition(".")[2]: value for key, value in found.items()}


def test_sizes_are_those_of_the_configuration():
    assert sizes("llama", head_dim=24, rope_parameters={"rope_type": "default", "rope_theta": 5e5}) == {
        "block_count": 4,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 24,
        "attention.value_length": 24,
        "rope.freq_base": 5e5,
        "rope.dimension_count": 24,
        "vocab_size": 100,
    }
    assert head_size(SIZES) == 16
    assert head_size({**SIZES, "head_dim": 24}) == 24
    assert sizes("olmo")["attention.layer_norm_epsilon"] == 1e-5


def test_the_scaling_of_rotary_embeddings_is_written_whole():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4, "original_max_position_embeddings": 128}
    yarn |= {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.25}
    found = {key: value for key, value in sizes("qwen2", rope_parameters=yarn).items() if key.startswith("rope.")}
    assert found == {
        "rope.freq_base": 1e4,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 128,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 2.0,
        "rope.scaling.yarn_attn_factor": 1.25,
        "rope.scaling.attn_factor": pytest.approx(1.25 / (0.1 * math.log(4) + 1)),
    }
    linear = sizes("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3})
    assert (linear["rope.scaling.type"], linear["rope.scaling.factor"]) == ("linear", 3.0)
    own = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    gemma = sizes("gemma3_text", rope_parameters=own, layer_types=layer_types(6, 4))
    assert (gemma["rope.freq_base"], gemma["rope.freq_base_swa"]) == (1e6, 1e4)
    for kind in ("dynamic", "longrope", "proportional"):
        with pytest.raises(BillhookError, match=f"rotary embedding '{kind}' of llama models has no form"):
            sizes("llama", model_type="llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4})


def test_the_factor_of_attention_is_written_where_llama_cpp_reads_it_and_slopes_are_noted():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    usual = 0.1 * math.log(4) + 1  # llama.cpp's own
    for given, expected in (
        ({}, None),
        ({"attention_factor": usual, "beta_fast": 32, "beta_slow": 1.0, "truncate": True}, None),
        ({"attention_factor": 2.0}, 2.0 / usual),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, 1 / (0.05 * math.log(4) + 1)),
        ({"mscale": 1.0}, None),
    ):
        found = sizes("qwen2", rope_parameters=yarn | given).get("rope.scaling.attn_factor")
        assert found == (None if expected is None else pytest.approx(expected)), given
        assert yarn_note({"rope_parameters": yarn | given}) == []
    assert (
        "--yarn-beta-fast 8 --yarn-beta-slow 2"
        in yarn_note({"rope_parameters": yarn | {"beta_fast": 8.0, "beta_slow": 2}})[0]
    )


def test_the_factors_of_phi_3_follow_from_how_much_longer_its_context_became():
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "long_factor": [2.0] * 4, "short_factor": [1.5] * 4}
    fields = {"rope_parameters": rope, "original_max_position_embeddings": 128, "sliding_window": 64}
    found = sizes("phi3", **fields)
    assert found["rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(512 / 128) / math.log(128)))
    assert (found["rope.dimension_count"], found["attention.sliding_window"]) == (8, 64)
    assert sizes("phi3", **fields | {"max_position_embeddings": 128})["rope.scaling.attn_factor"] == 1.0
    own = fields | {"rope_parameters": {**rope, "factor": 8.0}}
    assert sizes("phi3", **own)["rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(8) / math.log(128)))
    own = fields | {"rope_parameters": {**rope, "attention_factor": 1.5}}
    assert sizes("phi3", **own)["rope.scaling.attn_factor"] == 1.5
    factors = rotary_factors(FAMILIES["phi3"], {**SIZES, **fields})
    assert {name: values.tolist() for name, values in factors.items()} == {
        "rope_factors_long.weight": [2.0] * 4,
        "rope_factors_short.weight": [1.5] * 4,
    }
    with pytest.raises(BillhookError, match=r"config\.json needs 4 factors"):
        rotary_factors(FAMILIES["phi3"], {**SIZES, **fields, "rope_parameters": {**rope, "long_factor": [2.0] * 5}})


def test_the_factors_of_llama_3_are_those_of_its_three_ranges_of_wavelengths():
    rope = {"rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    expected = []
    for i in range(0, 64, 2):
        wavelength = 2 * math.pi * 5e5 ** (i / 64)
        if wavelength < 8192 / 4:
            expected.append(1.0)
        elif wavelength > 8192 / 1:
            expected.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert len(set(expected)) > 3
    torch.testing.assert_close(llama3_factors(rope, 64), torch.tensor(expected), rtol=1e-4, atol=0)


def test_every_nth_layer_attends_to_everything():
    full, local = "full_attention", "sliding_attention"
    assert layer_types(3, 7) == [local, local, full, local, local, full, local]
    assert layer_types(0, 2) == [local, local]
    assert layer_types(1, 2) == [full, full]
    kinds = {"gemma2": [local, full, local, full], "gemma3_text": layer_types(6, 4)}
    for family, own in kinds.items():
        assert "attention.sliding_window_pattern" not in sizes(family, layer_types=own)
        assert sizes(family, layer_types=[local, local, full, local])["attention.sliding_window_pattern"] == 3
        for others in ([full, local, full, full], [full] * 4):
            with pytest.raises(BillhookError, match="windows in all layers but every n-th"):
                sizes(family, layer_types=others)


@pytest.mark.parametrize(("window", "said"), [(None, False), (511, True), (512, False), (4096, False)])
def test_a_window_that_llama_cpp_does_not_know_is_noted_where_it_is_shorter_than_the_context(window, said):
    assert bool(window_note(FAMILIES["mistral"], {**SIZES, "sliding_window": window})) == said
    assert window_note(FAMILIES["gemma2"], {**SIZES, "sliding_window": window}) == []


def full(**rope):
    return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
ROTARY: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", LLAMA3),
    ("gemma2", LLAMA3),
    ("gemma3_text", full(**LLAMA3)),
    ("gemma3_text", {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
    ("gemma3_text", full(**YARN, attention_factor=2.0)),  # it would change layers with windows too
    ("llama", YARN | {"truncate": False}),
]


@pytest.mark.parametrize(("family", "rope"), ROTARY)
def test_rotary_embeddings_that_llama_cpp_computes_otherwise_are_refused(family, rope):
    with pytest.raises(BillhookError, match=r"has no form in GGUF files|only with the usual"):
        sizes(family, model_type=family, rope_parameters=rope, layer_types=layer_types(FAMILIES[family].period or 1, 4))


def test_the_rotary_embedding_of_gemma_2_is_written_where_it_is_not_the_usual_one():
    usual = {"rope_type": "default", "rope_theta": 1e4}
    kinds = {"layer_types": layer_types(2, 4)}
    assert not any(key.startswith("rope.") for key in sizes("gemma2", rope_parameters=usual, **kinds))
    found = sizes("gemma2", rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}, **kinds)
    assert {key: value for key, value in found.items() if key.startswith("rope.")} == {
        "rope.freq_base": 5e3,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 2.0,
    }


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar=16"),
        ("gemma2", {"num_hidden_layers": 46, "num_attention_heads": 2, "head_dim": 16}, "query_pre_attn_scalar=32"),
        ("gemma3_text", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar=16"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping=50"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping=30"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=False"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, r"no_rope_layers=\[1, 1, 1, 0\]"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias=False"),
        *((family, {"attention_bias": True}, "attention_bias=False") for family in
          ("smollm3", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "olmo", "olmo2")),
        *((family, {"head_dim": 32}, "heads together are 64 wide") for family in
          ("qwen2", "qwen2_moe", "phi3", "olmo", "olmo2")),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_read_from_the_file_is_refused_where_it_differs(family, changes, what):
    usual = {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    config = {**SIZES, **usual, "model_type": family}
    gguf_family(config)
    with pytest.raises(BillhookError, match=what):
        gguf_family({**config, **changes})


def test_a_shape_is_noted_only_where_it_lost_its_form():
    wide = {**SIZES, "model_type": "qwen2", "num_attention_heads": 4, "head_dim": 16}
    narrow = {**wide, "num_attention_heads": 2}
    assert "heads together are 64 wide" in new_shape_note(wide, narrow)[0]
    assert new_shape_note(wide, wide) == new_shape_note(narrow, narrow) == []
    assert new_shape_note({**wide, "model_type": "falcon"}, {**narrow, "model_type": "falcon"}) == []
