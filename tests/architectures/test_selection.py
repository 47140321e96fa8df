"""`--targets` reach layers outside of the blocks, such as projectors and patch embeddings, by name."""

import multimodal_families
import pytest
import tiny
import torch
import vision_families
from multimodal_families import batch
from resuming import whole_and_in_parts
from transformers import AutoModelForImageTextToText
from walked import check_walk

from billhook import BillhookError, prune, quantize, recover, verify
from billhook.architectures.layers import find_layers
from billhook.architectures.selection import reach, select_layers
from billhook.architectures.stacks import added_stacks, blocks_of

PROJECTOR, PATCHES = "model.multi_modal_projector", "model.vision_tower.embeddings.patch_embedding"
DECODER = "re:.*language_model.*"
IMAGES = [
    {"pixel_values": torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(rows))} for rows in (3, 2)
]
QUESTIONS = [batch("llava", 1, seed) for seed in range(8)]
OUTSIDE: dict[str, list[str]] = {
    "llava": [PROJECTOR, PATCHES],
    "llava_next": [PROJECTOR],
    "llava_onevision": [PROJECTOR],
    "qwen2_5_vl": ["model.visual.merger", "model.visual.patch_embed"],
    "qwen3_vl": ["model.visual.merger"],
    "idefics3": ["model.connector"],
    "smolvlm": ["model.connector"],
    "paligemma": [PROJECTOR],
    "internvl": [PROJECTOR],
    "mllama": [PROJECTOR, "model.vision_model.patch_embedding"],  # a projector that is defined after the decoder
    "blip-2": ["language_projection"],
    "mistral3": [PROJECTOR],
    "aya_vision": [PROJECTOR],
    "glm4v": ["model.visual.merger"],
    "vit": ["vit.embeddings"],
    "swin": ["Conv2d", "re:.*downsample"],
    "convnext": ["convnext.embeddings", "re:.*downsampling"],
    "pvt_v2": ["re:.*patch_embedding"],
    "clip": ["vision_model.embeddings"],
    "siglip": ["vision_model.embeddings", "vision_model.head"],
    "resnet": ["resnet.embedder"],
}
QUICK = ("llava", "mllama", "vit")
MATRIX = [pytest.param(name, marks=() if name in QUICK else pytest.mark.nightly) for name in OUTSIDE]


def built(family):
    module = multimodal_families if family in multimodal_families.CONFIGS else vision_families
    return module.build(family)


@pytest.mark.parametrize("family", MATRIX)
def test_the_walk_over_pruned_layers_outside_equals_the_models_own_forward_bit_for_bit(family):
    model, dense = built(family), built(family)
    count, options = len(blocks_of(model)), {}
    for each in (model, dense):
        reach(each, OUTSIDE[family])
    assert len(blocks_of(model)) == count + len(added_stacks(model)) > count
    batches = IMAGES
    if family in multimodal_families.CONFIGS:
        batches, options = [batch(family, 2), batch(family, 1, 1)], {"use_cache": False}
    check_walk(model, dense, batches, convolutions=True, **options)


def test_only_targets_that_match_nothing_in_the_blocks_mean_what_is_outside():
    model = built("llava")
    for targets in ([], ["Linear"], ["re:.*proj.*"], ["model.vision_tower"]):
        reach(model, targets)
        assert not added_stacks(model)
    reach(model, ["Conv2d", f"{PROJECTOR}.linear_2"])
    assert added_stacks(model) == (PATCHES, f"{PROJECTOR}.linear_2")
    first, *_, last = list(blocks_of(model))
    assert (first, last) == (PATCHES, "model.language_model.layers.2")
    prune(model, sparsity=0.5, criterion="magnitude")
    assert not added_stacks(model)


@pytest.mark.parametrize(
    ("family", "target", "words"),
    [
        ("llava", "lm_head", "lm_head is never pruned"),
        ("vit", "classifier", "classifier is never pruned"),
        ("clip", "classifier", "classifier is never pruned"),
        ("gemma3", PROJECTOR, "mm_input_projection_weight is a parameter outside of a linear layer"),
        ("qwen3_vl", "model.visual.deepstack_merger_list", "it runs model.visual.blocks.1 after .* Leave one of them"),
        ("siglip", "vision_model.head.attention.out_proj", "out_proj is never pruned"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(family, target, words):
    model, several = built(family), [batch(family, 1)] * 2 if family in multimodal_families.CONFIGS else IMAGES
    with pytest.raises(BillhookError, match=words):
        prune(model, sparsity=0.5, criterion="wanda", targets=target, calibration=several)


def test_a_weight_that_another_module_has_too_is_not_reached():
    model = tiny.llama()
    model.model.add_module("project_in", torch.nn.Linear(32, 258, bias=False))
    model.model.project_in.weight = model.model.embed_tokens.weight
    reach(model, ["model.project_in"])
    with pytest.raises(BillhookError, match="project_in is never pruned"):
        select_layers(model, find_layers(model), ["model.project_in"])


def test_text_alone_does_not_reach_a_projector():
    text = {"input_ids": torch.randint(3, 80, (4, 12))}
    with pytest.raises(BillhookError, match=r"projector\.linear_1 is not run with these samples.*give images"):
        prune(built("llava"), sparsity=0.5, criterion="wanda", targets=PROJECTOR, calibration=text)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "dense"
    built("llava").save_pretrained(folder)
    return folder


def asked(*targets, **changes):
    return {"sparsity": 0.5, "criterion": "sparsegpt", "targets": targets, "calibration": QUESTIONS} | changes


def test_a_pruned_projector_and_patch_embedding_are_written_and_opened_by_stock_transformers(llava, tmp_path):
    targets, out = (PROJECTOR, PATCHES, DECODER), tmp_path / "out"
    report = prune(llava, output=out, **asked(*targets))
    assert all(2 * x.zeros == x.n for x in report.layers)
    names = [x.layer for x in report.layers]
    assert names[:3] == [PATCHES, f"{PROJECTOR}.linear_1", f"{PROJECTOR}.linear_2"]
    assert len(names) == 3 + 21
    found, memory = verify(out), built("llava")
    assert found.ok
    assert found.layers == len(names)
    prune(memory, **asked(*targets))
    reloaded = AutoModelForImageTextToText.from_pretrained(out).eval()
    question = {name: value for name, value in QUESTIONS[0].items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(reloaded(**question).logits, memory(**question).logits)


@pytest.mark.parametrize("stop", [1, pytest.param(3, marks=pytest.mark.nightly)])
def test_a_stopped_run_goes_on_to_the_same_bytes(llava, tmp_path, stop):
    one, other = whole_and_in_parts(llava, tmp_path, stop, **asked(PROJECTOR, DECODER))
    assert one == other
    assert verify(tmp_path / "parts").ok


def test_later_steps_keep_the_zeros_outside_of_the_blocks_in_the_record(llava, tmp_path):
    prune(llava, output=tmp_path / "one", **asked(PROJECTOR, criterion="magnitude"))
    prune(tmp_path / "one", output=tmp_path / "two", **asked(criterion="magnitude"))
    quantize(tmp_path / "two", "int8", tmp_path / "three", targets=DECODER, quantizer="round")
    assert [verify(tmp_path / name).layers for name in ("one", "two", "three")] == [2, 23, 23]
    assert all(verify(tmp_path / name).ok for name in ("one", "two", "three"))


@pytest.mark.nightly
@pytest.mark.parametrize("by", ["model", "block"])
def test_recovery_keeps_the_zeros_outside_of_the_blocks(llava, tmp_path, by):
    prune(llava, output=tmp_path / "one", **asked(PROJECTOR, DECODER))
    several, given = [batch("llava", 1, seed) for seed in range(80)], {"tokens": 200, "rate": 0.01}
    given = {"teacher": llava, "calibration": several, "by": by} | (given if by == "model" else {})
    recover(tmp_path / "one", output=tmp_path / "two", **given)
    found = verify(tmp_path / "two")
    assert found.ok
    assert found.zeros == verify(tmp_path / "one").zeros


CRITERIA = ("magnitude", "wanda", "admm", "ria", "dsnot", "gblm", "wandapp")
ALLOCATORS = ("alphapruning", "atp", "curves", "rco", "auto")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("criterion", "allocator"), [*((one, "owl") for one in CRITERIA), *(("wanda", one) for one in ALLOCATORS)]
)
def test_every_criterion_and_allocator_meets_the_budget(criterion, allocator):
    for budget in ("each", "joint"):
        about = {"criterion": criterion, "allocator": allocator, "budget": budget}
        report = prune(built("llava"), **asked(PROJECTOR, PATCHES, DECODER, **about))
        assert abs(sum(x.zeros for x in report.layers) - 0.5 * sum(x.n for x in report.layers)) <= len(report.layers)
