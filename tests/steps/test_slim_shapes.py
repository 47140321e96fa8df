"""Shapes and allocators of `slim`: blocks of different width, stored as the configuration can say, or with zeros."""

import json
import statistics
from pathlib import Path

import families
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from billhook.architectures.units import find_units
from billhook.engine.batch import rows_of
from billhook.errors import BillhookError
from billhook.plan.plan import Budget, Plan
from billhook.plan.unit_counts import quantum
from billhook.steps.inputs import ModelRequest
from billhook.steps.request import open_request
from billhook.steps.slim import SlimRequest, prepare, slim
from billhook.steps.verify import verify
from billhook.trials.heldout import split_samples
from billhook.trials.unit_trials import UnitRunner

pytestmark = pytest.mark.gate
IDS = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    model = tiny.llama(num_hidden_layers=3, intermediate_size=64)
    return tiny.save(tmp_path_factory.mktemp("source") / "model", model, words=False)


def zeroed(path: Path, kept: dict[str, list[int]]):
    """The model with zeros in every slice of a removed part."""
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    for unit in find_units(model, list(dict.fromkeys(name.rpartition(":")[2] for name in kept))):
        for part in set(range(unit.count)) - set(kept[unit.name]):
            for s in unit.slices:
                tensor = model.get_parameter(s.tensor).detach()
                (tensor if s.expert is None else tensor[s.expert]).index_fill_(s.dim, s.index[part], 0)
    return model


@torch.no_grad()
def test_blocks_of_different_width_are_filled_up_with_zeros_and_compute_the_same(tmp_path, source):
    counts = {f"model.layers.{i}.mlp:channels": n for i, n in enumerate((24, 48, 32))}
    counts |= {f"model.layers.{i}.self_attn:heads": n for i, n in enumerate((1, 2, 1))}
    plan = Plan(Budget("parameters", 1), {}, counts)
    report = slim(source, None, tmp_path / "out", plan=plan, method="magnitude")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [block.mlp.down_proj.weight.shape[1] for block in small.model.layers] == [48] * 3
    assert small.config.num_key_value_heads == 2
    for i, stays in enumerate((24, 48, 32)):
        mlp = small.model.layers[i].mlp
        assert int((mlp.down_proj.weight == 0).all(0).sum()) == 48 - stays
        assert int((mlp.gate_proj.weight == 0).all(1).sum()) == 48 - stays
    expected = zeroed(source, report.kept)(IDS).logits
    torch.testing.assert_close(small(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert verify(tmp_path / "out").ok
    whole = AutoModelForCausalLM.from_pretrained(source)
    sizes = [sum(p.numel() for p in model.model.layers.parameters()) for model in (whole, small)]
    assert report.removed == pytest.approx(1 - sizes[1] / sizes[0])
    one = 3 * 32  # parameters of a channel
    heads = sum(u.parameters for u in find_units(whole, ["heads"])[:2])  # of two groups
    assert report.padding == pytest.approx(((24 + 16) * one + heads) / sizes[0])
    assert any("stored as zeros" in note for note in report.warnings)


@torch.no_grad()
def test_a_configuration_with_a_list_of_widths_says_so(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": [48] * 2, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "laurel_rank": 4, "num_kv_shared_layers": 0}
    sizes |= {"vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0] * 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model("gemma3n_text", **sizes, **kinds, **tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    given = {"units": "channels", "method": "magnitude", "allocator": "atp", "beta": 0.1}
    report = slim(tmp_path / "model", 0.2, tmp_path / "out", **given)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    widths = [len(kept) for kept in report.kept.values()]
    assert small.config.intermediate_size == widths
    assert widths[0] > widths[1]
    assert report.padding == 0
    torch.testing.assert_close(small(IDS).logits, zeroed(tmp_path / "model", report.kept)(IDS).logits)
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("allocator", ["uniform", "alphapruning", "atp", "owl", "curves", "er"])
def test_every_allocator_meets_the_budget_to_within_a_step(tmp_path, source, allocator):
    given = {"units": "channels,heads", "calibration": IDS, "allocator": allocator, "shape": "per-layer"}
    job = prepare(SlimRequest(source, tmp_path / "out", 0.3, **given))
    gone = sum((u.count - job.plan.units[u.name]) * u.parameters for u in job.units)
    step = min(u.parameters * (quantum(u.count) if u.kind == "channels" else 1) for u in job.units)
    assert abs(gone - 0.3 * sum(job.parameters)) <= step / 2
    assert job.plan.made_by["allocator"] == allocator
    if allocator == "atp":
        widths = [job.plan.units[f"model.layers.{i}.mlp:channels"] for i in range(3)]
        assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("shape", ["per-layer", pytest.param("uniform", marks=pytest.mark.nightly)])
def test_auto_is_not_worse_than_uniform_on_held_out_windows(tmp_path, shape):
    source = tmp_path / "model"
    families.build("llama", seed=2).save_pretrained(source)
    few: dict = {"units": "channels,heads", "calibration": IDS, "options": {"rounds": 4, "swaps": 0}}
    request = SlimRequest(source, tmp_path / "out", 0.25, allocator="auto", shape=shape, **few)
    job = prepare(request)
    plan = job.plan
    if shape == "uniform":
        assert len({(n.rpartition(":")[2], count) for n, count in plan.units.items()}) == 2
    racing = plan.made_by["racing"]
    assert racing["tried"][racing["best"]] == min(racing["tried"].values()) <= racing["tried"]["uniform"]
    opened = open_request(ModelRequest(source, calibration=IDS, dtype="float32"), True, "the test", streamed=False)
    split = split_samples(opened.model, opened.samples, rows_of(opened.batches[0]), 0)
    assert racing["heldout"] == split.facts["heldout"]
    units, removal = find_units(opened.model, ["channels", "heads"]), job.removal
    with UnitRunner(opened.model, units, split.batches, split.heldout, removal) as runner:
        runner.prune(plan)
        found = statistics.fmean(runner.losses(0, rows_of(split.heldout)).kl)
    assert found == pytest.approx(racing["tried"][racing["best"]], rel=1e-5)


def test_what_auto_decided_is_carried_out_and_recorded(tmp_path, source):
    given = {"units": "channels", "calibration": IDS, "allocator": "auto"}
    report = slim(source, 0.25, tmp_path / "out", **given)
    step = json.loads((tmp_path / "out" / "billhook.json").read_text())["steps"][-1]
    assert step["plan"]["made_by"]["allocator"] == "auto"
    assert step["plan"]["units"] == {name: len(kept) for name, kept in report.kept.items()}
    assert step["made_by"]["padding"] == report.padding


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"allocator": "alfapruning"}, "Unknown allocator 'alfapruning'. Did you mean 'alphapruning'"),
        ({"shape": "tall"}, "shape='tall' must be one of uniform, per-layer"),
        ({"allocator": "owl", "calibration": None, "method": "magnitude"}, "needs activations"),
        ({"allocator": "atp", "epsilon": 0.1}, "Neither allocator 'atp' nor structured method 'obs' has an option"),
        ({"remove": 0.9, "allocator": "atp", "units": "heads"}, "would leave nothing of them: at most"),
        ({"allocator": "auto", "calibration": IDS[:2]}, "too few to split"),
        (
            {"remove": None, "allocator": "owl", "plan": Plan(Budget("parameters", 1), {}, {"a": 1})},
            "A plan already says how many parts of each unit stay: leave out the allocator",
        ),
    ],
)
def test_an_impossible_request_is_refused_before_anything_is_written(tmp_path, source, change, match):
    with pytest.raises(BillhookError, match=match):
        slim(source, output=tmp_path / "out", **({"remove": 0.3, "units": "channels", "calibration": IDS} | change))
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_different_widths_is_refused_where_a_uniform_shape_was_asked_for(tmp_path, source):
    plan = Plan(Budget("parameters", 1), {}, {"model.layers.0.mlp:channels": 32})
    with pytest.raises(BillhookError, match="different numbers of channels by block: leave out shape uniform"):
        slim(source, None, tmp_path / "out", plan=plan, shape="uniform", method="magnitude")


def test_experts_cannot_differ_by_block_because_zeros_do_not_stand_for_them(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.mixtral(), words=False)
    with pytest.raises(BillhookError, match=r"No program opens mixtral models .* Use shape uniform; transformers, "):
        slim(source, 0.2, tmp_path / "out", units="experts", allocator="atp", calibration=IDS)
    plan = Plan(Budget("parameters", 1), {}, {"model.layers.0.mlp:experts": 3, "model.layers.1.mlp:experts": 4})
    with pytest.raises(BillhookError, match="one num_experts for all blocks: 3 experts cannot stay"):
        slim(source, None, tmp_path / "out", plan=plan, calibration=IDS)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A mixture whose first block is dense, with other widths than the experts."""
    sizes = families.CONFIGS["qwen3_moe"] | {"num_hidden_layers": 2, "mlp_only_layers": [0], "intermediate_size": 128}
    return tiny.save(tmp_path_factory.mktemp("mixed") / "model", built("qwen3_moe", **sizes), words=False)


def built(kind: str, **sizes):
    """A random model of 96 tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=96, **sizes))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    return model


@torch.no_grad()
@pytest.mark.parametrize("allocator", ["uniform", "er"])
def test_dense_blocks_and_experts_lose_the_same_fraction_or_their_own(tmp_path, mixed, allocator):
    given = {"units": "channels", "method": "magnitude", "allocator": allocator}
    report = slim(mixed, 0.3, tmp_path / "out", **given)
    dense, *experts = [len(parts) for parts in report.kept.values()]
    if allocator == "uniform":
        assert len(set(experts)) == 1
        assert dense / 128 == pytest.approx(experts[0] / 24, abs=8 / 128)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    torch.testing.assert_close(small(IDS).logits, zeroed(mixed, report.kept)(IDS).logits, rtol=1e-4, atol=1e-4)
    assert verify(tmp_path / "out").ok


def test_experts_of_one_block_may_keep_different_numbers_of_channels(tmp_path, mixed):
    counts = {f"model.layers.1.mlp.experts.{i}:channels": n for i, n in enumerate((24, 17, 9, 24, 1, 8))}
    report = slim(mixed, None, tmp_path / "out", plan=Plan(Budget("parameters", 1), {}, counts), method="magnitude")
    with torch.no_grad():
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
        torch.testing.assert_close(small(IDS).logits, zeroed(mixed, report.kept)(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("allocator", ["owl", "alphapruning"])
def test_units_that_share_layers_are_allocated_together(tmp_path, mixed, allocator):
    given = {"units": "experts,channels", "calibration": IDS, "allocator": allocator, "shape": "uniform"}
    job = prepare(SlimRequest(mixed, tmp_path / "out", 0.3, **given))
    assert {unit.kind for unit in job.units} == {"experts", "channels"}


@pytest.mark.parametrize("groups", [1, 2])
def test_a_router_that_chooses_groups_of_experts_first_is_refused_unless_it_has_one(tmp_path, groups):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 24, "n_routed_experts": 6}
    sizes |= {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, "topk_group": 1}
    source = tiny.save(tmp_path / "model", built("glm4_moe", n_group=groups, **sizes), words=False)
    if groups == 2:
        with pytest.raises(BillhookError, match="gate first chooses among 2 groups of experts"):
            slim(source, 0.1, tmp_path / "out", units="experts", calibration=IDS)
        return
    with pytest.raises(BillhookError, match=r"shared_experts\.\w+\.weight, of which nothing goes, .*; name other"):
        slim(source, 0.1, tmp_path / "out", units="channels", method="magnitude")
    report = slim(source, 0.1, tmp_path / "out", units="experts", calibration=IDS)
    assert report.removed > 0.05
    assert verify(tmp_path / "out").ok


def test_the_entry_that_is_as_wide_as_the_channels_is_the_one_that_changes(tmp_path):
    mixture = families.CONFIGS["qwen3_moe"] | {"moe_intermediate_size": 16, "intermediate_size": 48}
    model = built("mixtral", **mixture, num_local_experts=4)  # which does not read the first of the two
    source = tiny.save(tmp_path / "model", model, words=False)
    report = slim(source, 0.3, tmp_path / "out", units="channels", method="magnitude")
    config = json.loads((report.output / "config.json").read_text())
    assert config["intermediate_size"] == len(next(iter(report.kept.values()))) < 48
    assert config["moe_intermediate_size"] == 16
    assert verify(report.output).ok


def test_a_width_that_8_does_not_divide_is_said(tmp_path, source):
    plan = Plan(Budget("parameters", 1), {}, {f"model.layers.{i}.mlp:channels": 31 for i in range(3)})
    notes = prepare(SlimRequest(source, tmp_path / "out", plan=plan, method="magnitude")).notes
    assert any("31 of 64 channels are stored, which 8 does not divide" in note for note in notes)


def test_a_width_that_stays_is_not_remarked_on(tmp_path):
    odd = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=2, intermediate_size=61), words=False)
    plan = Plan(Budget("parameters", 1), {}, {f"model.layers.{i}.self_attn:heads": 1 for i in range(2)})
    plan.units["model.layers.0.mlp:channels"] = 61
    assert prepare(SlimRequest(odd, tmp_path / "out", plan=plan, method="magnitude")).notes == []


@pytest.mark.parametrize(("family", "unit", "said"), [("qwen2", "heads", True), ("qwen3", "heads", False)])
def test_a_shape_that_llama_cpp_does_not_open_is_said(tmp_path, family, unit, said):
    model = tiny.save(tmp_path / "model", families.build(family), words=False)
    plan = Plan(Budget("parameters", 1), {}, {f"model.layers.{i}.self_attn:{unit}": 1 for i in range(4)})
    job = prepare(SlimRequest(model, tmp_path / "out", plan=plan, method="magnitude"))
    assert [("llama.cpp does not" in note, "heads together" in note) for note in job.notes] == [(True, True)] * said
