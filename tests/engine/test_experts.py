"""Removing experts: what their absence changes, and how those that stay make up for it, against plain loops."""

import families
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from billhook.architectures.units import find_units
from billhook.engine.experts import choose_experts, expert_stats
from billhook.engine.removal import Removal
from billhook.engine.routing import mixture_of, routed
from billhook.engine.walk import walk
from billhook.errors import BillhookError
from billhook.methods.structured.experts import DAMPING, EXPERTS, ExpertStats, fitted
from billhook.plan.table import Table
from billhook.racing.units import UnitProblem, choose_counts
from billhook.steps.slim import slim
from billhook.steps.slim_allocation import sizes_of
from billhook.steps.verify import verify
from billhook.trials.unit_trials import UnitRunner

pytestmark = pytest.mark.gate
IDS = torch.randint(2, 96, (6, 24), generator=torch.Generator().manual_seed(0))


def first(family: str):
    """A model, the unit of its first mixture, and its first block."""
    model = families.build(family)
    unit = next(iter(find_units(model, ["experts"])))
    return model, unit, next(iter(walk(model, [{"input_ids": IDS}])))


@torch.no_grad()
def output(model, unit, x: Tensor, kept: Tensor) -> Tensor:
    """What a Mixtral mixture of 6 experts returns with those `kept` alone, token by token."""
    router, experts = mixture_of(model, unit)
    probabilities = (x @ router.weight.T).softmax(-1).masked_fill(~kept, 0)
    weights, chosen = probabilities.topk(2)
    result = torch.zeros_like(x)
    for t in range(len(x)):
        for g, e in zip(weights[t] / weights[t].sum(), chosen[t].tolist(), strict=True):
            gate, up = (experts.gate_up_proj[e] @ x[t]).chunk(2)
            result[t] += g * (experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
    return result


@torch.no_grad()
def test_losses_are_the_squared_changes_of_the_mixtures_outputs():
    model, unit, block = first("mixtral")
    calls = routed(block, mixture_of(model, unit)[1])
    x = torch.cat([call[0] for call in calls])
    keep = torch.tensor([True, True, False, True, True, True])
    found = expert_stats(model, unit, calls).losses(keep)
    dense = output(model, unit, x, torch.ones(6, dtype=torch.bool))
    assert found[2] == float("inf")
    for e in (0, 1, 3, 4, 5):
        left = keep.clone()
        left[e] = False
        assert float(found[e]) == pytest.approx(float((dense - output(model, unit, x, left)).square().sum()), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", pytest.param("qwen3_moe", marks=pytest.mark.nightly)])
def test_least_squares_leaves_less_error_than_the_mean_and_that_less_than_nothing(family, monkeypatch):
    model, unit, block = first(family)
    same = torch.tensor([True, False, True, True, False, True])
    errors = {}
    for name in ("obs", "merge"):
        monkeypatch.setattr("billhook.methods.structured.experts." + name, lambda stats, count: same)
        choice = choose_experts(model, unit, 4, name, block)
        errors[name] = choice.error
        assert len(choice.weights) == 4
    monkeypatch.setattr("billhook.methods.structured.experts.reap", lambda stats, count: same)
    nothing = choose_experts(model, unit, 4, "reap", block).error
    assert errors["obs"] < 0.9 * errors["merge"] < 0.9 * nothing


def test_the_fit_solves_the_damped_least_squares_problem():
    torch.manual_seed(0)
    X, g, missing = torch.randn(50, 7), torch.rand(50), torch.randn(50, 3)
    A = X * g[:, None]
    alpha = DAMPING * float((A.T @ A).diagonal().mean())
    rows = torch.cat([A, alpha**0.5 * torch.eye(7)])
    expected = torch.linalg.lstsq(rows.double(), torch.cat([missing, torch.zeros(7, 3)]).double()).solution.T
    torch.testing.assert_close(fitted("least squares", X, g, missing), expected.float(), rtol=1e-4, atol=1e-5)
    one = fitted("mean", X, g, missing)
    assert torch.linalg.matrix_rank(one) == 1
    left = [(missing - A @ (one * s).T).square().sum() for s in (0.9, 1.0, 1.1)]
    assert left[1] == min(left)


@torch.no_grad()
def test_experts_are_allocated_by_what_each_mixture_costs_alone():
    model = families.build("mixtral")
    units = find_units(model, ["experts"])
    sizes = sizes_of(units, model.config)
    remove = 8 * units[0].parameters  # of 24
    problem = UnitProblem(Table(()), 8 / 24, sizes=sizes, remove=remove, shape="per-layer")
    more = torch.randint(2, 96, (6, 24), generator=torch.Generator().manual_seed(1))
    with UnitRunner(model, units, [{"input_ids": IDS}], {"input_ids": more}, Removal("magnitude", {})) as runner:
        plan = choose_counts(runner, problem, {})
        runner.prune(plan)
        found = sum(runner.losses(0, 6).kl) / 6
    assert sum(plan.units.values()) == 16
    assert min(plan.units.values()) >= 2
    tried = plan.made_by["racing"]["tried"]
    assert found == pytest.approx(min(tried.values()), rel=1e-4)
    assert found < tried["uniform"]
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("method", EXPERTS.names())
def test_experts_without_a_token_go_first(method):
    tokens = torch.tensor([3.0, 0.0, 5.0, 0.0, 4.0, 2.0])
    loss = torch.tensor([3.0, 0.0, 5.0, 0.0, 4.0, 2.0], dtype=torch.float64)
    stats = ExpertStats(tokens, tokens * 2, tokens, lambda keep: loss.masked_fill(~keep, float("inf")))
    assert EXPERTS.get(method)(stats, 4).tolist() == [True, False, True, False, True, True]


@torch.no_grad()
def test_shared_experts_stay_and_the_result_is_verified(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 6}
    sizes |= {"num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("qwen2_moe", **sizes, vocab_size=96, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in (p for p in model.parameters() if p.ndim > 1):
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path / "model")
    lost = {}
    for method in ("obs", "reap"):
        out = tmp_path / method
        lost[method] = slim(tmp_path / "model", 0.3, out, units="experts", experts=method, calibration=IDS).loss.kl
        assert verify(out).ok
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "obs")
    assert small.config.num_experts == 3
    assert small.model.layers[0].mlp.shared_expert.down_proj.weight.shape == (32, 24)
    assert lost["obs"] < lost["reap"]


MIXTURE = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
MIXTURE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "bos_token_id": 0}
MIXTURE |= {"eos_token_id": 1, "pad_token_id": 0, "num_experts_per_tok": 2}
ROUTERS = {  # what their names say: biases in a module of the router, biases of the mixture, and a layer in the router
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "lfm2_moe": {"num_experts": 6, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "minimax_m2": {"num_local_experts": 6},
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("family", ROUTERS)
def test_biases_of_experts_go_with_them_wherever_the_router_has_them(tmp_path, family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(MIXTURE | ROUTERS[family]))
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "bias" in name:  # so far apart that they alone choose
            value.copy_(2.0 * torch.randperm(value.numel()).view_as(value))
        elif value.ndim > 1:
            torch.nn.init.normal_(value, std=0.15)
    model.save_pretrained(tmp_path / "model")
    report = slim(tmp_path / "model", 0.1, tmp_path / "out", units="experts", calibration=IDS, experts="reap")
    assert verify(tmp_path / "out").ok
    assert report.kept
    for unit, kept in report.kept.items():
        gone = [i for i in range(6) if i not in kept]
        mixture = model.get_submodule(unit.removesuffix(":experts"))
        held = [x for name, x in [*mixture.named_parameters(), *mixture.named_buffers()] if "bias" in name]
        for bias in held:  # no router chooses these any more
            bias[..., gone] = -1e9
        if not held:
            mixture.gate.wg.register_forward_hook(lambda m, x, y, gone=gone: y.index_fill(1, torch.tensor(gone), -1e9))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_experts_behind_a_router_that_is_called_in_another_way_are_refused_by_name(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("afmoe", **MIXTURE, num_experts=6, num_dense_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(BillhookError, match="behind a router AfmoeTokenChoiceRouter cannot be removed"):
        slim(tmp_path / "model", 0.1, tmp_path / "out", units="experts", calibration=IDS)
