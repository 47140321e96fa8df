"""Removing units: stock transformers opens a smaller model that computes what the whole one computes without them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import families
import pytest
import tiny
import torch
from command import contents
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from billhook import prune
from billhook.architectures.units import find_units
from billhook.errors import BillhookError, Interrupted
from billhook.plan.plan import Budget, Plan, load_plan
from billhook.steps.quantize import quantize
from billhook.steps.slim import SlimRequest, prepare, run, slim
from billhook.steps.slim_estimate import estimate_slim
from billhook.steps.state import finished_items
from billhook.steps.verify import verify
from billhook.store.shards import read_shard

pytestmark = pytest.mark.gate
IDS = torch.randint(2, 96, (4, 16), generator=torch.Generator().manual_seed(0))
BOTH = {"units": "channels,heads", "calibration": IDS, "batch_size": 2}
NO_HEADS = ("falcon", "gpt_neox", "gptj", "gpt2", "bloom", "mpt", "opt", "stablelm", "olmo2")
NO_CHANNELS = ("bloom", "mpt", "llama4_text")  # of the last, shared experts are as wide as the others
GATE = (("llama", "heads"), ("gpt2", "channels"), ("mixtral", "channels"), ("falcon", "heads"))
CASES = [
    pytest.param(family, kind, marks=() if (family, kind) in GATE else pytest.mark.nightly)
    for family in families.CONFIGS
    for kind in ("channels", "heads")
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    model = tiny.llama(num_hidden_layers=3, intermediate_size=64)
    return tiny.save(tmp_path_factory.mktemp("source") / "model", model, dtype=torch.bfloat16, words=False)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    return slim(source, 0.3, tmp_path_factory.mktemp("whole") / "out", **BOTH).output


def half(model, kind: str) -> Plan:
    """A plan that keeps about half of the parts of every unit of a kind."""
    return Plan(Budget("parameters", 1), {}, {u.name: (u.count + 1) // 2 for u in find_units(model, [kind])})


def zeroed(model, kind: str, kept: dict[str, list[int]]):
    """The model with zeros in every slice of a removed part, in place."""
    for unit in find_units(model, [kind]):
        for part in set(range(unit.count)) - set(kept[unit.name]):
            for s in unit.slices:
                tensor = model.get_parameter(s.tensor).detach()
                tensor = tensor if s.expert is None else tensor[s.expert]
                tensor.index_fill_(s.dim, s.index[part], 0)
    return model


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_without_compensation_the_result_is_the_model_with_zeros_in_place_of_what_went(tmp_path, family, kind):
    model = families.build(family)
    model.save_pretrained(tmp_path / "model")
    if family in (NO_HEADS if kind == "heads" else NO_CHANNELS):
        with pytest.raises(BillhookError, match=f"{family} models (have no|cannot have fewer) {kind}"):
            slim(tmp_path / "model", 0.15, tmp_path / "out", units=kind, method="magnitude")
        assert not (tmp_path / "out").exists()
        return
    report = slim(tmp_path / "model", None, tmp_path / "out", units=kind, method="magnitude", plan=half(model, kind))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    in_units = [(u.count - (u.count + 1) // 2) * u.parameters for u in find_units(model, [kind])]
    assert removed == sum(in_units) > 0
    with torch.no_grad():
        before = model(IDS).logits
        expected, found = zeroed(model, kind, report.kept)(IDS).logits, small(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (found - before).abs().max() > 0.01 * before.abs().max()
    assert verify(tmp_path / "out").ok


def test_the_budget_is_met_to_within_one_quantum_and_both_kinds_give(source, whole):
    shapes = {e.name: e.shape for n in range(1, 5) for e in entries(whole, n)}
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (32, 16)
    record = json.loads((whole / "billhook.json").read_text())["steps"][-1]
    model = AutoModelForCausalLM.from_pretrained(source)
    total = sum(p.numel() for p in model.model.layers.parameters())
    small = AutoModelForCausalLM.from_pretrained(whole)
    left = sum(p.numel() for p in small.model.layers.parameters())
    assert record["made_by"]["removed"] == pytest.approx(1 - left / total)
    quantum = 8 * 3 * 32 * 3  # channels, matrices, width, blocks
    assert abs(record["plan"]["budget"]["parameters"] - left) <= quantum / 2
    config = json.loads((whole / "config.json").read_text())
    assert config["num_key_value_heads"] == 1
    assert config["num_attention_heads"] == 2
    assert config["head_dim"] == 8


def entries(folder: Path, number: int):
    return read_shard(folder / f"model-0000{number}-of-00004.safetensors").entries.values()


@pytest.mark.parametrize("decoder", [False, True])
def test_a_llama_with_heads_that_do_not_divide_its_width_is_written_as_mistral(tmp_path, decoder):
    model = tiny.llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    source = tiny.save(tmp_path / "model", model.model if decoder else model, words=False)
    prefix = "layers" if decoder else "model.layers"
    plan = Plan(Budget("parameters", 1), {}, dict.fromkeys([f"{prefix}.{i}.self_attn:heads" for i in (0, 1)], 3))
    report = slim(source, None, tmp_path / "out", plan=plan, calibration=IDS)
    small = (AutoModel if decoder else AutoModelForCausalLM).from_pretrained(tmp_path / "out")
    assert type(small).__name__ == ("MistralModel" if decoder else "MistralForCausalLM")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(small).__name__]
    assert "Written as a Mistral model" in report.warnings[0]
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("blocks", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, source, whole, blocks):
    left = [blocks]

    def stopping() -> bool:
        left[0] -= 1
        return left[0] == 0

    job = prepare(SlimRequest(source, tmp_path / "out", 0.3, **BOTH))
    with pytest.raises(Interrupted, match=f"{blocks} of 3 blocks are finished"):
        run(job, stopping=stopping)
    assert finished_items(tmp_path / "out", True) == sum(unit.block < blocks for unit in job.units) > 0
    with pytest.raises(BillhookError, match="cannot be continued"):
        slim(source, 0.3, tmp_path / "out", resume=True, **BOTH, damping=0.02)
    seen: list[str] = []
    slim(source, 0.3, tmp_path / "out", resume=True, progress=seen.append, **BOTH)
    assert seen == [unit.name for unit in job.units]
    assert contents(tmp_path / "out") == contents(whole)


def test_a_run_that_reads_gradients_reports_their_progress_and_keeps_them_for_its_resumption(tmp_path, source):
    given = {**BOTH, "method": "taylor"}
    job = prepare(SlimRequest(source, tmp_path / "out", 0.3, **given))
    assert 0 < estimate_slim(job) < 60
    units, consumers = [unit.name for unit in job.units], {unit.consumer.name for unit in job.units}
    seen: list[str] = []
    with pytest.raises(Interrupted):
        run(job, seen.append, stopping=lambda: True)
    assert consumers == set(seen[: len(consumers)])
    assert set(seen[len(consumers) :]) < set(units)
    seen.clear()
    whole = slim(source, 0.3, tmp_path / "whole", progress=seen.append, **given).output
    assert len(seen) == job.steps == len(units) + len(consumers)
    seen.clear()
    slim(source, 0.3, tmp_path / "out", resume=True, progress=seen.append, **given)
    assert seen == units
    assert contents(tmp_path / "out") == contents(whole)


def test_a_stopped_run_does_not_go_on_with_another_plan(tmp_path, source):
    names = [f"model.layers.{i}.mlp:channels" for i in range(3)]
    first, other = (Plan(Budget("parameters", 1), {}, dict.fromkeys(names, count)) for count in (40, 32))
    with pytest.raises(Interrupted):
        run(prepare(SlimRequest(source, tmp_path / "out", plan=first, calibration=IDS)), stopping=lambda: True)
    with pytest.raises(BillhookError, match="cannot be continued"):
        slim(source, None, tmp_path / "out", plan=other, calibration=IDS, resume=True)
    slim(source, None, tmp_path / "out", plan=first, calibration=IDS, resume=True)


@pytest.mark.nightly
def test_it_follows_pruning_and_quantizing_follows_it_and_every_step_is_verified(tmp_path, source):
    pruned = prune(source, output=tmp_path / "pruned", sparsity=0.5, criterion="magnitude", calibration=None).output
    small = slim(pruned, 0.2, tmp_path / "small", units="channels", calibration=IDS).output
    output = quantize(small, "int4/16", tmp_path / "out", quantizer="round", ignore="re:.*down").output
    record = json.loads((output / "billhook.json").read_text())
    assert [step["step"] for step in record["steps"]] == ["prune", "slim", "quantize"]
    assert verify(small).ok
    assert verify(output).ok


def test_verify_finds_a_record_of_other_parts(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    path = tmp_path / "out" / "billhook.json"
    record = json.loads(path.read_text())
    record["steps"][-1]["made_by"]["kept"]["model.layers.0.mlp:channels"].pop()
    record["steps"][-1]["plan"]["units"]["model.layers.1.mlp:channels"] -= 8
    record["steps"][-1]["made_by"]["consumers"]["model.layers.1.mlp.down_proj"]["stored"] -= 8
    path.write_text(json.dumps(record))
    problems = verify(tmp_path / "out").problems
    assert any(p.startswith("model.layers.0.mlp:channels") for p in problems)
    assert any(p.startswith("model.layers.1.mlp.down_proj") for p in problems)


def test_the_written_plan_gives_the_same_model_again(tmp_path, source, whole):
    plan = Plan.from_json(json.loads((whole / "billhook.json").read_text())["steps"][-1]["plan"], "plan")
    plan.save(tmp_path / "plan.json")
    again = slim(source, None, tmp_path / "out", plan=tmp_path / "plan.json", **BOTH).output
    assert [tensors(again, n) == tensors(whole, n) for n in range(1, 5)] == [True] * 4


def test_a_plan_to_which_a_block_that_goes_was_added_is_carried_out(tmp_path, source, whole):
    plan = load_plan(whole / "shape.json")
    edited = replace(plan, units={**plan.units, "model.layers.1:blocks": 0, "model.layers.2:blocks": 1})
    report = slim(source, None, tmp_path / "out", plan=edited, calibration=IDS)
    assert report.dropped == [1]
    assert not any(name.startswith("model.layers.1.") for name in report.kept)
    assert verify(tmp_path / "out").ok


def tensors(folder: Path, number: int) -> bytes:
    return (folder / f"model-0000{number}-of-00004.safetensors").read_bytes()


@pytest.mark.nightly
def test_what_stays_of_an_expert_differs_between_experts(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.mixtral(), words=False)
    report = slim(source, 0.3, tmp_path / "out", units="channels", calibration=IDS)
    kept = [tuple(parts) for name, parts in report.kept.items() if ".experts." in name]
    assert len(kept) == 8
    assert len(set(kept)) > 1
    assert len({len(parts) for parts in kept}) == 1


FIRST = "model.layers.0.mlp:channels"


def kept(units: dict[str, int]) -> Plan:
    return Plan(Budget("parameters", 1), {}, units)


@pytest.mark.parametrize(("remove", "said"), [(0.1, True), (0.33, False)])
def test_a_share_that_whole_units_do_not_meet_is_said(tmp_path, source, remove, said):
    blocks = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    job = prepare(SlimRequest(source, tmp_path / "out", remove, "blocks", calibration=IDS))
    assert any(f"{1 / blocks:.1%} of the parameters in blocks go instead" in note for note in job.notes) == said


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"remove": None}, "Give either the fraction"),
        ({"remove": 1.5}, "between 0 and 1"),
        ({"remove": 0.9, "units": "heads"}, "would leave nothing of them: at most"),
        ({"remove": 0.001}, "takes nothing away"),
        ({"units": "channel"}, "Unknown kind of units 'channel'. Did you mean 'channels'"),
        ({"units": "heads,heads"}, "each of them once"),
        ({"units": "heads,auto"}, "'auto' stands alone"),
        ({"units": "heads", "experts": "reap"}, "No experts go here, so nothing reads experts='reap'"),
        ({"units": "heads", "drop_by": "angular"}, "No blocks go here, so nothing reads drop_by='angular'"),
        ({"units": "heads", "allocator": "owl", "shape": "uniform"}, "only between kinds of units, and only heads go"),
        ({"method": "osb"}, "Unknown structured method 'osb'. Did you mean 'obs'"),
        ({"damping": -1}, "obs: damping=-1.0 must be positive"),
        ({"units": "experts", "damping": 0.5}, "channels and heads, and only experts go here: leave out damping"),
        ({"allocator": "curves", "criterion": "wanda"}, "curves of slim are those of its method: leave out criterion"),
        ({"calibration": None}, "Removing units with obs needs activations"),
        ({"remove": None, "plan": kept({FIRST: 8, FIRST.replace("0", "9"): 8})}, "no unit"),
        ({"remove": None, "plan": kept({FIRST: 0})}, "cannot stay"),
        ({"remove": None, "plan": kept({FIRST: 8}), "units": "heads"}, "removes parts of .*, and units names heads"),
    ],
)  # fmt: skip
def test_an_impossible_request_is_refused_before_anything_is_written(tmp_path, source, change, match):
    fields = {"remove": 0.3, **BOTH} | change
    with pytest.raises(BillhookError, match=match):
        slim(source, output=tmp_path / "out", **fields)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
def test_obs_loses_less_than_wanda_sp_and_taylor(tmp_path, source):
    ids: Tensor = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(1))
    losses = {}
    for method in ("obs", "wanda_sp", "taylor"):
        report = slim(source, 0.3, tmp_path / method, method=method, units="channels,heads", calibration=ids)
        losses[method] = report.loss.kl
    assert losses["obs"] < 0.9 * min(losses["wanda_sp"], losses["taylor"])
