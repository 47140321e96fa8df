"""Which types there are for a target and a layer, and how many bytes were asked for."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from billhook.errors import BillhookError
from billhook.methods.quantize.ggml import GGML
from billhook.plan.storage import BLOCKS
from billhook.steps.quantize import QuantizeRequest, prepare
from billhook.steps.sizes import Size, allowed_types
from billhook.steps.types import fitting


@pytest.mark.parametrize("columns", [32, 48, 96, 256, 512])
@pytest.mark.parametrize("type", sorted(GGML))
def test_a_type_that_does_not_fit_is_replaced_by_the_smallest_that_is_not_smaller(type, columns):
    per_weight = {name: BLOCKS[name][1] / BLOCKS[name][0] for name in GGML if columns % BLOCKS[name][0] == 0}
    enough = [bits for bits in per_weight.values() if bits >= BLOCKS[type][1] / BLOCKS[type][0]]
    if type in per_weight:
        assert fitting(type, columns) == type
    elif enough:
        assert per_weight[fitting(type, columns)] == min(enough)
    else:
        with pytest.raises(BillhookError, match=f"a layer with {columns} columns cannot be stored as {type}"):
            fitting(type, columns)


@pytest.mark.parametrize(
    ("columns", "expected"), [(128, "int4/64"), (96, "int4/32"), (48, "int4/16"), (40, "int4/8"), (44, None)]
)
def test_the_largest_group_that_divides_the_columns_takes_the_place_of_a_larger_one(columns, expected):
    if expected is None:
        with pytest.raises(BillhookError, match="a layer with 44 columns cannot be stored as int4/64"):
            fitting("int4/64", columns)
    else:
        assert fitting("int4/64", columns) == expected


def test_a_target_holds_the_types_that_its_programs_read():
    found = {target: {t.partition("/")[0] for t in allowed_types(target, ())} for target in ("transformers", "vllm")}
    assert found == {"transformers": {f"int{b}" for b in (2, 3, 4, 5, 6, 8)}, "vllm": {"int4", "int8"}}
    assert {t.partition("/")[2] for t in allowed_types("vllm", ())} == {"16", "32", "64"}
    assert allowed_types("gguf", ()) == list(GGML)


def test_bits_and_ratio_count_every_parameter():
    asked = [Size(bits=4.0), Size(ratio=0.25), Size(ratio=1.0), Size(size="1KB"), Size(size=77)]
    assert [size.budget({}, 1000)[0] for size in asked] == [500, 500, 2000, 1000, 77]


@pytest.mark.parametrize(
    ("dtypes", "scales"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float16),
        ((torch.float32, torch.float32), torch.float16),
    ],
    ids=str,
)
def test_scales_are_bfloat16_only_where_all_weights_are(tmp_path, dtypes, scales):
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=2), words=False)
    file = source / "model.safetensors"
    cast = {name: value.to(dtypes["layers.1." in name]) for name, value in load_file(file).items()}
    save_file(cast, file, {"format": "pt"})
    assert prepare(QuantizeRequest(source, "int4/16", tmp_path / "out", quantizer="round")).method.scale_dtype == scales


def test_types_may_be_written_in_capitals_as_llama_cpp_does():
    request = QuantizeRequest("model", "Q8_0", "out", embeddings="Q6_K")
    assert (request.type, request.embeddings) == ("q8_0", "q6_k")
    assert allowed_types("gguf", ["Q4_K", "IQ4_XS"]) == allowed_types("gguf", ["q4_k", "iq4_xs"])
