"""The contest of kinds: each is scored as if it were carried out for good, and leaves no trace."""

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from billhook.architectures.stacks import blocks_of
from billhook.engine.removal import Removal
from billhook.errors import BillhookError
from billhook.methods.structured import STRUCTURED
from billhook.plan.plan import Budget, Plan
from billhook.steps.inputs import ModelRequest
from billhook.steps.request import in_memory, open_request
from billhook.steps.slim import SlimRequest, prepare, slim
from billhook.steps.slim_allocation import UnitAllocation
from billhook.steps.slim_choice import choose_plan
from billhook.steps.slim_contest import _plans, best_plan

pytestmark = pytest.mark.gate
IDS = torch.randint(2, 96, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.nightly)])
def test_the_winner_has_the_least_divergence_and_the_model_is_as_before(tmp_path, family):
    model = families.build(family, seed=1)
    model.save_pretrained(tmp_path / "model")
    request = SlimRequest(tmp_path / "model", tmp_path / "out", 0.25, calibration=IDS)
    opened = open_request(ModelRequest(tmp_path / "model", calibration=IDS), True, "the test", streamed=False)
    opened = in_memory(opened, request.model_request())
    removal = Removal("obs", STRUCTURED.configure("obs", {}))
    uniform = UnitAllocation("uniform", {}, "uniform")

    def planned(kinds):
        return choose_plan(request, opened, kinds, removal, uniform, lambda unit: None), 0.24

    plan = best_plan(opened, removal, "reap", 0.25, planned)
    tried = plan.made_by["options"]["tried"]
    assert len(tried) >= 4
    assert plan.made_by["options"]["kinds"] == min(tried, key=tried.__getitem__)
    with torch.no_grad():
        assert torch.equal(opened.model(IDS).logits, model(IDS).logits)
    assert not any("forward" in block.__dict__ for block in blocks_of(opened.model).values())
    kinds = plan.made_by["options"]["kinds"]
    slim(tmp_path / "model", 0.25, tmp_path / "out", units=kinds, calibration=IDS[:6])
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        dense, left = (m(IDS[6:]).logits[:, :-1].log_softmax(-1) for m in (model, small))
    kl = float((dense.exp() * (dense - left)).sum(-1).mean())
    assert tried[kinds] == pytest.approx(kl * (0.25 / 0.24) ** 2, rel=1e-2)


@pytest.mark.nightly
def test_auto_is_carried_out_and_recorded(tmp_path):
    families.build("llama").save_pretrained(tmp_path / "model")
    job = prepare(SlimRequest(tmp_path / "model", tmp_path / "out", 0.25, calibration=IDS))
    report = slim(tmp_path / "model", 0.25, tmp_path / "out", calibration=IDS)
    options = job.plan.made_by["options"]  # which kinds win depends on the last bits, and so on the processor
    assert options["kinds"] == min(options["tried"], key=options["tried"].__getitem__)
    assert job.plan.units == {**dict.fromkeys(job.plan.units, 0), **{n: len(k) for n, k in report.kept.items()}}


def test_too_few_samples_are_refused(tmp_path):
    families.build("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(BillhookError, match="give at least 4 samples, not 3"):
        slim(tmp_path / "model", 0.25, tmp_path / "out", calibration=IDS[:3])


@pytest.mark.parametrize(
    ("removed", "scored"),
    [
        ({"channels": 0.255, "blocks": 0.2, "channels,blocks": 0.25}, {"channels", "channels,blocks"}),
        ({"channels": 0.245, "blocks": 0.4}, {"channels", "blocks"}),
        ({"channels": 0.2, "blocks": 0.4, "channels,heads": 0.16}, {"channels", "blocks"}),
        ({"blocks": 0.5}, {"blocks"}),
    ],
)
def test_no_kind_wins_by_removing_less_than_asked(removed, scored):
    def planned(kinds):
        if ",".join(kinds) not in removed:
            raise BillhookError("there are none")
        return Plan(Budget("parameters", 1), {}), removed[",".join(kinds)]

    assert set(_plans(planned, 0.25)) == scored
