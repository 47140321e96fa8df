"""Dropping blocks and experts: against models from which they are taken out by hand."""

import json
from pathlib import Path

import families
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from billhook import prune
from billhook.errors import BillhookError, Interrupted
from billhook.plan.plan import Budget, Plan
from billhook.steps.evaluate import EvalConfig, evaluate_model
from billhook.steps.slim import SlimRequest, prepare, run, slim
from billhook.steps.slim_estimate import estimate_slim
from billhook.steps.verify import verify

pytestmark = pytest.mark.gate
IDS = torch.randint(2, 96, (6, 24), generator=torch.Generator().manual_seed(0))
BY_MAGNITUDE = {"method": "magnitude", "calibration": IDS}
MIXTURES = [pytest.param("mixtral"), *(pytest.param(f, marks=pytest.mark.nightly) for f in ("qwen3_moe", "gpt_oss"))]


def test_a_model_with_fewer_blocks_is_compared_with_the_dense_one(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=3), words=False)
    small = slim(source, 0.34, tmp_path / "out", units="blocks", **BY_MAGNITUDE).output
    save_file({"tokens": IDS}, tmp_path / "ids.safetensors")
    shared = {"length": 24, "against": str(source)}
    against = evaluate_model(small, EvalConfig(str(tmp_path / "ids.safetensors"), **shared))["against"]
    assert against["kl"] > 0
    assert "error_by_block" not in against
    same = evaluate_model(source, EvalConfig(str(tmp_path / "ids.safetensors"), **shared))["against"]
    assert same["error_by_block"] == [0, 0, 0]


def saved(model, path: Path) -> Path:
    model.save_pretrained(path)
    return path


@torch.no_grad()
def without_blocks(model, gone: list[int]) -> Tensor:
    """The logits of a model whose stack lacks some blocks."""
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    kept = nn.ModuleList([block for i, block in enumerate(model.get_submodule(name)) if i not in gone])
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [t for i, t in enumerate(model.config.layer_types) if i not in gone]
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in ("llama", "gemma2") else pytest.mark.nightly) for f in families.CONFIGS]
)
def test_a_model_without_blocks_is_the_model_with_these_taken_out(tmp_path, family):
    source = saved(families.build(family), tmp_path / "model")
    plan = Plan(Budget("parameters", 1), {}, {})
    prefix = next(iter(prepare(SlimRequest(source, tmp_path / "out", 0.25, units="blocks", **BY_MAGNITUDE)).plan.units))
    plan.units.update({f"{prefix.rsplit('.', 1)[0]}.{i}:blocks": 0 for i in (1, 2)})
    slim(source, None, tmp_path / "out", units="blocks", plan=plan, calibration=IDS)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert small.config.num_hidden_layers == 2
    expected = without_blocks(families.build(family), [1, 2])
    with torch.no_grad():
        torch.testing.assert_close(small(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert verify(tmp_path / "out").ok


def divergence_without(gone: list[int]) -> float:
    """The KL divergence of a model whose stack lacks some blocks from the whole one."""
    with torch.no_grad():
        p = families.build("llama", seed=3)(IDS).logits[:, :-1].log_softmax(-1)
        q = without_blocks(families.build("llama", seed=3), gone)[:, :-1].log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_after_another_the_block_goes_without_which_predictions_change_least(tmp_path, number):
    source = saved(families.build("llama", seed=3), tmp_path / "model")
    gone = list[int]()
    for _ in range(number):
        left = [index for index in range(4) if index not in gone]
        gone.append(min(left, key=lambda index: divergence_without([*gone, index])))
    request = SlimRequest(source, tmp_path / "out", number / 4, units="blocks", **BY_MAGNITUDE)
    assert prepare(request).plan.units == {f"model.layers.{index}:blocks": 0 for index in sorted(gone)}


def test_what_stays_makes_up_for_dropped_blocks(tmp_path):
    source = saved(families.build("llama", seed=3), tmp_path / "model")
    first = Plan(Budget("parameters", 1), {}, {"model.layers.0:blocks": 0})
    plain = slim(source, None, tmp_path / "plain", plan=first, calibration=IDS).loss
    names = [f"model.layers.{i}.{unit}" for i in (1, 2, 3) for unit in ("mlp:channels", "self_attn:heads")]
    counts = {name: 48 if name.endswith("channels") else 2 for name in names}
    job = prepare(SlimRequest(source, tmp_path / "fitted", 0.25, units="blocks", calibration=IDS))
    assert sum(not name.endswith(":blocks") for name in job.plan.units) == 6
    fitted = Plan(Budget("parameters", 1), {}, {**first.units, **counts})
    report = slim(source, None, tmp_path / "fitted", plan=fitted, calibration=IDS)
    assert report.loss.kl < 0.9 * plain.kl
    assert report.removed == pytest.approx(0.25)


def test_by_angle_the_blocks_go_that_turn_the_hidden_states_least(tmp_path):
    source = saved(families.build("llama", seed=3), tmp_path / "model")
    model, turned, seen = families.build("llama", seed=3), [], []
    for block in model.model.layers:
        block.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(IDS)
    for x, y in seen:
        pair = x.flatten(0, 1), (y[0] if isinstance(y, tuple) else y).flatten(0, 1)
        turned.append(sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(*pair, strict=True)))
    wanted = sorted(sorted(range(4), key=turned.__getitem__)[:2])
    job = prepare(SlimRequest(source, tmp_path / "out", 0.5, units="blocks", drop_by="angular", **BY_MAGNITUDE))
    assert list(job.plan.units) == [f"model.layers.{i}:blocks" for i in wanted]


@torch.no_grad()
def effects(model) -> list[Tensor]:
    """REAP's score of every expert of every block, token by token."""
    found = []

    def note(module, args):
        x, chosen, weights = args[:3]
        totals, counts = torch.zeros(6), torch.zeros(6)
        for token in range(len(x)):
            for place, expert in enumerate(chosen[token].tolist()):
                one = module(x[token : token + 1], torch.tensor([[expert]]), torch.ones(1, 1))
                totals[expert] += weights[token, place] * one.norm()
                counts[expert] += 1
        found.append(totals / counts.clamp_min(1))

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            calls = []
            handle = module.register_forward_pre_hook(lambda m, args, calls=calls: calls.append(args))
            model(IDS)
            handle.remove()
            note(module, calls[0])
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_with_the_least_effect_go_and_the_router_knows_only_the_others(tmp_path, family):
    model = families.build(family)
    source = saved(model, tmp_path / "model")
    report = slim(source, 0.3, tmp_path / "out", units="experts", experts="reap", calibration=IDS)
    kept = list(report.kept.values())
    first = effects(model)[0]  # later blocks have other inputs than in the whole model
    assert kept[0] == sorted(first.argsort(descending=True)[:4].tolist())
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    routers = [m for n, m in model.named_modules() if n.endswith((".gate", ".router"))]
    for router, stays in zip(routers, kept, strict=True):
        gone = [i for i in range(6) if i not in stays]

        def masked(x, router=router, gone=gone):
            logits = nn.functional.linear(x.reshape(-1, 32), router.weight, getattr(router, "bias", None))
            logits[:, gone] = -torch.inf
            if family == "gpt_oss":
                top, chosen = logits.topk(2)
                return logits, top.softmax(-1), chosen
            weights, chosen = logits.softmax(-1).topk(2)
            normed = weights / weights.sum(-1, keepdim=True)
            return logits, normed if family == "mixtral" or router.norm_topk_prob else weights, chosen

        router.forward = masked
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert verify(tmp_path / "out").ok


def test_a_record_numbers_the_experts_that_stay_anew(tmp_path):
    source = saved(families.build("mixtral"), tmp_path / "model")
    units = ("experts", "channels", "blocks")
    report = slim(source, 0.5, tmp_path / "out", units=units, method="magnitude", calibration=IDS)
    assert verify(report.output).ok
    record = json.loads((report.output / "billhook.json").read_text())
    consumers = record["steps"][-1]["made_by"]["consumers"]
    units = {name: facts["unit"] for name, facts in consumers.items() if ".experts." in name}
    stay = [(name, expert) for name, kept in report.kept.items() if name.endswith(":experts") for expert in kept]
    assert list(units.values()) == [f"{name.removesuffix(':experts')}.experts.{e}:channels" for name, e in stay]
    assert set(consumers) <= set(record["layers"])
    assert all(record["layers"][name]["error"] is not None for name in consumers)
    given = {"sparsity": 0.5, "criterion": "magnitude", "calibration": None}
    assert verify(prune(report.output, output=tmp_path / "pruned", **given).output).ok


@pytest.mark.nightly
def test_the_time_is_estimated_on_one_block_and_leaves_no_trace(tmp_path):
    source = saved(families.build("mixtral"), tmp_path / "model")
    given = {"units": ("experts", "channels"), "calibration": IDS, "options": {"rounds": 4, "swaps": 0}}
    job = prepare(SlimRequest(source, tmp_path / "estimated", 0.4, **given))
    assert 0 < estimate_slim(job) < 60
    run(job)
    slim(source, 0.4, tmp_path / "out", **given)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 5
    assert all((tmp_path / "out" / f).read_bytes() == (tmp_path / "estimated" / f).read_bytes() for f in files)


@pytest.mark.nightly
def test_a_stopped_run_that_drops_blocks_and_experts_goes_on_to_the_same_bytes(tmp_path):
    source = saved(families.build("mixtral"), tmp_path / "model")
    given = {"units": ("experts", "heads", "blocks"), "calibration": IDS, "batch_size": 3}
    whole = slim(source, 0.5, tmp_path / "whole", **given).output
    left = [3]

    def stopping() -> bool:
        left[0] -= 1
        return left[0] == 0

    with pytest.raises(Interrupted, match="3 of 4 blocks are finished"):
        run(prepare(SlimRequest(source, tmp_path / "out", 0.5, **given)), stopping=stopping)
    slim(source, 0.5, tmp_path / "out", resume=True, **given)
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all((whole / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)
    made_by = json.loads((whole / "billhook.json").read_text())["steps"][-1]["made_by"]
    assert len(made_by["dropped"]) == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"units": "experts"}, "llama models have no experts"),
        ({"drop_by": "k"}, "drop_by='k' must be one of kl, angular"),
        ({"experts": "rep"}, "Unknown expert method 'rep'. Did you mean 'reap'"),
        ({"calibration": None}, "needs activations"),
        ({"units": "blocks", "remove": 0.9}, "3 of 3 blocks cannot go"),
    ],
)
def test_an_impossible_request_is_refused(tmp_path, change, match):
    source = tiny.save(tmp_path / "model", tiny.llama(), words=False)
    with pytest.raises(BillhookError, match=match):
        slim(source, output=tmp_path / "out", **({"remove": 0.5, "units": "blocks", "calibration": IDS} | change))
    assert not (tmp_path / "out").exists()


def test_the_only_block_must_stay(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=1), words=False)
    with pytest.raises(BillhookError, match="The model has one block, which must stay"):
        slim(source, 0.5, tmp_path / "out", units="blocks", calibration=IDS)


def test_more_experts_than_every_token_goes_to_must_stay(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.mixtral(), words=False)
    with pytest.raises(BillhookError, match="too few: every token goes to 2 experts; at most"):
        slim(source, 0.65, tmp_path / "out", units="experts", calibration=IDS)
