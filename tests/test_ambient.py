"""Results do not depend on the state of the process, and models that cannot be used are refused before any work."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from interpreter import in_new_interpreter
from torch import nn
from torch.nn.utils.prune import l1_unstructured

import billhook
from billhook import BillhookError, evaluate, find_layers, load_model, load_windows, measure, prune, prune_
from billhook.ambient import standard_state
from billhook.packed.generation import generate

pytestmark = pytest.mark.gate

IDS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
JOBS: dict[str, dict[str, Any]] = {
    "sparsegpt, alphapruning": {"criterion": "sparsegpt", "allocator": "alphapruning"},
    "gblm": {"criterion": "gblm"},
    "wanda, refined": {"criterion": "wanda", "refine": "blocks+norms"},
}

FIRST, *_ = JOBS
GRADIENTS = ("inference mode", "no gradients", "autocast")  # states on which gradients could depend


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def low_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


STATES: dict[str, Callable[[], Any]] = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "low precision": low_precision,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ambient")
    tiny.text_file(folder / "text.txt", 4)
    return tiny.save(folder / "model", tiny.llama(num_hidden_layers=2))


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected")
    for name, job in JOBS.items():
        prune(source, sparsity=0.5, calibration=IDS, output=folder / name, **job)
    return {name: digest(folder / name) for name in JOBS}


@pytest.mark.parametrize(
    ("state", "job"),
    [
        pytest.param(state, job, marks=() if job == FIRST or state in GRADIENTS else pytest.mark.nightly)
        for state in STATES
        for job in JOBS
    ],
)
def test_pruned_files_do_not_depend_on_the_state_of_the_process(source, expected, state, job, tmp_path):
    with STATES[state]():
        prune(source, sparsity=0.5, calibration=IDS, output=tmp_path / "out", **JOBS[job])
    assert digest(tmp_path / "out") == expected[job]


PRECISIONS = [
    "from transformers.utils import enable_tf32; enable_tf32(True)",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'ieee'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.set_float32_matmul_precision('medium')",  # last, because the two interfaces do not mix
]
PRUNED_IN_PRECISIONS = """
import hashlib, json, sys
from pathlib import Path
import torch, billhook
from torch import backends
source, output, settings = sys.argv[1:]
places = [backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn]
places += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
def state():
    return [place.fp32_precision for place in places]
ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
job = {"calibration": ids, "criterion": "sparsegpt", "allocator": "alphapruning"}
for number, setting in enumerate(json.loads(settings)):
    exec(setting)
    before, folder = state(), Path(output, str(number))
    billhook.prune(source, sparsity=0.5, output=folder, **job)
    assert state() == before, (setting, state(), before)
    print(hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
    for place in (backends, backends.cuda.matmul, backends.mkldnn.matmul):
        place.fp32_precision = "none"
    torch._C._set_fp32_precision_setter("cuda", "all", "none")
report(0)
"""
with_new_precisions = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="since torch 2.9")


@with_new_precisions
@pytest.mark.nightly
def test_precisions_of_backends_change_no_result_and_stay(source, expected, tmp_path):
    """In a new process, because torch tells apart which of its two interfaces was used before."""
    ran = in_new_interpreter(PRUNED_IN_PRECISIONS, str(source), str(tmp_path), json.dumps(PRECISIONS))
    assert ran["text"].split() == [expected["sparsegpt, alphapruning"]] * len(PRECISIONS)


@with_new_precisions
def test_a_backend_goes_on_following_the_setting_for_all_of_them():
    places = [torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn]
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # an earlier test may have set it by the older interface

    def follow(value: str) -> list[str]:
        torch.backends.fp32_precision = value
        return [place.fp32_precision for place in places]

    expected = {value: follow(value) for value in ("tf32", "ieee", "none")}
    try:
        for value in expected:
            follow(value)
            with standard_state():
                assert [place.fp32_precision for place in places] == expected["none"]
            assert {key: follow(key) for key in expected} == expected
    finally:
        follow("none")


def everything(source: Path) -> list[Any]:
    """What is loaded, read, measured, pruned in memory, scored and generated."""
    model = load_model(source)
    model.train()
    metrics = ["alpha_peak", "outlier_ratio:5", "block_loss:0.5"]
    found: list[Any] = [evaluate(model, IDS), measure(model, metrics, batches=IDS).rows]
    found.append(load_windows(str(source.parent / "text.txt"), tiny.tokenizer(), length=32, limit=2).digest)
    results = prune_(model, billhook.allocate(measure(model, [], layers=None), 0.5), criterion="wanda", batches=IDS)
    found += [[(x.layer, x.zeros, x.error) for x in results], generate(model, IDS[:1], 4).ids.tolist()]
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    assert model.training
    return found


def test_a_model_in_training_mode_gives_the_results_of_evaluation_mode(source):
    model = load_model(source)
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    assert evaluate(model, IDS).nll == evaluate(load_model(source), IDS).nll
    dense = load_model(source)
    plan = billhook.allocate(measure(dense, []), 0.5)
    prune_(model, plan, criterion="gblm", batches=IDS)
    prune_(dense, plan, criterion="gblm", batches=IDS)
    assert model.training
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(find_layers(model), find_layers(dense), strict=True))


@pytest.fixture(scope="module")
def plain(source: Path) -> list[Any]:
    return everything(source)


@pytest.mark.parametrize(
    "setting", [{"return_dict": False}, {"output_hidden_states": True}, {"use_cache": False}], ids=str
)
def test_settings_of_the_configuration_change_no_result_and_stay(source, setting, tmp_path):
    model = load_model(source)
    model.config.update(setting)
    assert evaluate(model, IDS).nll == evaluate(load_model(source), IDS).nll
    jobs = {"changed": model, "plain": load_model(source)}
    for name, one in jobs.items():
        prune(one, sparsity=0.5, criterion="gblm", calibration=IDS, output=tmp_path / name)
    assert digest(tmp_path / "changed") == digest(tmp_path / "plain")
    written = load_model(tmp_path / "changed").config.to_dict()
    assert {key: model.config.to_dict()[key] for key in setting} == {key: written[key] for key in setting} == setting


def test_a_configuration_that_asks_for_attentions_changes_no_result(source, tmp_path):
    changed = shutil.copytree(source, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"output_attentions": True}))
    assert evaluate(load_model(changed), IDS).nll == evaluate(load_model(source), IDS).nll
    for name, one in {"changed": changed, "plain": source}.items():
        prune(one, sparsity=0.5, criterion="wanda", calibration=IDS, output=tmp_path / f"out-{name}")
    assert digest(tmp_path / "out-changed") == digest(tmp_path / "out-plain")
    assert json.loads((tmp_path / "out-changed" / "config.json").read_text())["output_attentions"]


@pytest.mark.parametrize("state", STATES)
def test_what_is_loaded_measured_scored_and_generated_does_not_depend_on_the_state(source, plain, state):
    with STATES[state]():
        assert everything(source) == plain


def test_the_state_is_restored_after_an_error(source):
    with default_dtype(torch.float64):
        with pytest.raises(BillhookError):
            prune(source, sparsity=2.0)
        assert torch.get_default_dtype() == torch.float64


def test_samples_made_in_inference_mode_can_be_used(source):
    with torch.inference_mode():
        ids = IDS.clone()
        report = prune(load_model(source), sparsity=0.5, criterion="gblm", calibration=ids)
    assert report.sparsity == 0.5


def offloaded() -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(tiny.llama(), torch.device("cpu"))


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return tiny.llama()


def with_adapter() -> nn.Module:
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), tiny.llama())


def wrapped() -> nn.Module:
    return peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"]))


class LowRank(nn.Module):
    """A linear layer and a product of two small ones, as other libraries than peft write it."""

    def __init__(self, linear: nn.Module, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = nn.Linear(32, rank, bias=False), nn.Linear(rank, 32, bias=False)


def with_matrices(rank: int) -> nn.Module:
    model = tiny.llama()
    model.model.layers[0].self_attn.q_proj = LowRank(model.model.layers[0].self_attn.q_proj, rank)
    return model


def with_parameters() -> nn.Module:
    model = tiny.llama()
    model.model.layers[0].self_attn.q_proj.register_parameter("lora_A", nn.Parameter(torch.ones(4, 32)))
    return model


UNUSABLE = {
    "matrices": (lambda: with_matrices(8), r"q_proj\.lora_a\.weight belongs to an adapter: merge it first"),
    "small matrices": (lambda: with_matrices(2), r"q_proj\.lora_a\.weight belongs to an adapter: merge it first"),
    "parameters": (with_parameters, r"q_proj\.lora_A belongs to an adapter: merge it first"),
    "offloaded": (offloaded, r"model\.\S+ is on the meta device, without values: load the model without device_map"),
    "inference": (made_in_inference_mode, r"model\.\S+ was made in torch\.inference_mode: load the model outside"),
    "adapter": (with_adapter, r"model\.layers\.0\.self_attn\.q_proj has an adapter: merge it first"),
    "wrapped": (wrapped, "must be a transformers PreTrainedModel, got PeftModel: give what is inside it"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_models_that_cannot_be_used_are_refused_by_name_with_what_to_do(kind, tmp_path):
    build, message = UNUSABLE[kind]
    model = build()
    plan = billhook.allocate(measure(tiny.llama(), []), 0.5)
    calls: list[Callable[[], Any]] = [
        lambda: prune(model, sparsity=0.5, criterion="magnitude", output=tmp_path / "out"),
        lambda: prune_(model, plan, criterion="magnitude"),
        lambda: evaluate(model, IDS),
        lambda: measure(model, ["alpha_peak"]),
        lambda: billhook.save_pruned(model, None, tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(BillhookError, match=message):
            call()
    assert not (tmp_path / "out").exists()


def test_a_model_that_transformers_refuses_to_save_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("billhook.engine.loop._Applying.layer", lambda *_: pytest.fail("the work has begun"))
    model = tiny.llama()
    model.generation_config.temperature = 0.5  # which needs do_sample
    for job in (prune, billhook.search):
        with pytest.raises(BillhookError, match="cannot save LlamaForCausalLM: GenerationConfig is invalid"):
            job(model, sparsity=0.5, criterion="magnitude", calibration=IDS, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_layers_that_share_their_weight_are_refused_by_name():
    model = tiny.llama()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        BillhookError, match=r"0\.mlp\.up_proj and model\.layers\.2\.mlp\.up_proj lie in the same memory"
    ):
        prune(model, sparsity=0.5, criterion="magnitude")

    stored = torch.randn(96, 32)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(stored[:64])
    model.model.layers[2].mlp.up_proj.weight = nn.Parameter(stored[32:])
    with pytest.raises(
        BillhookError, match=r"0\.mlp\.up_proj and model\.layers\.2\.mlp\.up_proj lie in the same memory"
    ):
        prune(model, sparsity=0.5, criterion="magnitude")
    model.model.layers[2].mlp.up_proj.weight = nn.Parameter(torch.randn(1, 32).expand(64, 32))
    with pytest.raises(BillhookError, match=r"Values of model\.layers\.2\.mlp\.up_proj share memory"):
        prune(model, sparsity=0.5, criterion="magnitude")


def test_layers_beside_each_other_in_memory_are_pruned():
    model, stored = tiny.llama(num_hidden_layers=1), torch.randn(128, 32)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight, mlp.gate_proj.weight = nn.Parameter(stored[:64]), nn.Parameter(stored[64:])
    prune(model, sparsity=0.5, criterion="magnitude", allocator="uniform")
    assert [int((part == 0).sum()) for part in stored.split(64)] == [1024, 1024]


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "pruned": lambda module: l1_unstructured(module, "weight", 0.3),
    "weight norm": nn.utils.parametrizations.weight_norm,
    "weight norm, old": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "scale": lambda module: module.register_parameter("scale", nn.Parameter(torch.ones(32))),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_other_parameters_change_are_refused_by_name(kind):
    model = tiny.llama(num_hidden_layers=1)
    COMPUTED[kind](model.model.layers[0].self_attn.q_proj)
    message = r"self_attn\.q_proj\.weight is (computed from|changed by) other parameters \(.*remove the parametrization"
    with pytest.raises(BillhookError, match=message):
        prune(model, sparsity=0.5, criterion="magnitude")


def test_a_float64_model_in_memory_keeps_the_values_that_stay():
    model, before = tiny.llama().double(), tiny.llama().double()
    with torch.no_grad():
        for a, b in zip(model.parameters(), before.parameters(), strict=True):
            b.copy_(a.mul_(1 + 2**-40))
    prune(model, sparsity=0.5, criterion="wanda", calibration=IDS)
    for new, old in zip(find_layers(model), find_layers(before), strict=True):
        kept = new.weight != 0
        assert torch.equal(new.weight[kept], old.weight[kept])
        assert int((~kept).sum()) == kept.numel() // 2


def test_token_ids_beyond_the_embedding_are_refused_by_generate():
    with pytest.raises(BillhookError, match="token id 258 at row 0, position 1 is outside the vocabulary of 258"):
        generate(tiny.llama(), torch.tensor([[5, 258]]), 3)
