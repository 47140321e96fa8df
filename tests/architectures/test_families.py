"""Every supported family: blocks replay bit for bit, plans are met exactly, and what must not be pruned is not."""

import re
from collections.abc import Callable

import bert
import multimodal_families
import pytest
import torch
import vision_families
from families import CONFIGS, FAMILIES, VOCABULARY, build

from billhook import Plan, allocate, find_layers, measure, prune_
from billhook.architectures import families as known
from billhook.architectures.stacks import blocks_of
from billhook.engine.replay import run_block
from billhook.engine.walk import walk
from billhook.plan.spec import Pattern
from billhook.recovery.blockwise import Refine
from billhook.tasks import TASKS


def batches(count: int = 3, size: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (size, 24), generator=generator) for _ in range(count)]


def test_the_matrix_covers_every_family() -> None:
    tested = {
        "text-generation": CONFIGS,
        "image-text-to-text": multimodal_families.CONFIGS,
        "image-classification": vision_families.CONFIGS | vision_families.CONVOLUTIONAL,
    }
    assert {task: sorted(found) for task, found in tested.items()} == {
        task: sorted(known.FAMILIES[task]) for task in tested
    }
    assert set(known.FAMILIES) == set(TASKS.names())


USUAL = "lm_head model.embed_tokens"
KEPT = dict.fromkeys(CONFIGS, USUAL) | {  # parameters of two or more dimensions that are never pruned
    "bloom": "transformer.word_embeddings",
    "cohere": "model.embed_tokens",
    "falcon": "transformer.word_embeddings",
    "gemma": "model.embed_tokens",
    "gemma2": "model.embed_tokens",
    "gemma3_text": "model.embed_tokens",
    "gpt2": "transformer.wpe transformer.wte",
    "gpt_neox": "gpt_neox.embed_in lm_head",
    "gpt_oss": f"{USUAL} model.layers.*.mlp.router model.layers.*.mlp.experts.down_proj_bias "
    "model.layers.*.mlp.experts.gate_up_proj_bias",
    "gptj": "lm_head transformer.wte",
    "llama4_text": f"{USUAL} model.layers.*.feed_forward.router",
    "mixtral": f"{USUAL} model.layers.*.mlp.gate",
    "mpt": "transformer.wte",
    "opt": "model.decoder.embed_positions model.decoder.embed_tokens",
    "qwen3_moe": f"{USUAL} model.layers.*.mlp.gate",
    "starcoder2": "model.embed_tokens",
    "bert": "bert.embeddings.position_embeddings bert.embeddings.token_type_embeddings "
    "bert.embeddings.word_embeddings cls.predictions.transform.dense",
}


@pytest.mark.parametrize("family", KEPT)
def test_embeddings_heads_routers_and_vectors_are_never_pruned_and_every_other_matrix_is(family: str) -> None:
    """By name, and from what becomes of the weights."""
    model = bert.model() if family == "bert" else build(family)
    before = {name: value.clone() for name, value in model.named_parameters()}
    prune_(model, allocate(measure(model, []), 0.5), criterion="magnitude")
    kept = set()
    for name, value in model.named_parameters():
        if torch.equal(value, before[name]):
            kept |= {re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))} if value.ndim > 1 else set()
        else:
            assert int((value == 0).sum()) == value.numel() // 2, name
            assert value.ndim > 1, name
    assert kept == set(KEPT[family].split())


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_blocks_is_bit_exact(family: str) -> None:
    model, ids = build(family), batches()
    blocks = list(blocks_of(model).values())
    inputs: list[list[torch.Tensor]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda _, args, kwargs, n=number: inputs[n].append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        )
    with torch.no_grad():
        for batch in ids:
            model(batch)
    expected = [list(seen) for seen in inputs]
    visited = 0
    for block in walk(model, ids, ("input_norm",), read_only=True):
        assert all(torch.equal(a, b) for a, b in zip(block.inputs, expected[block.index], strict=True)), (
            f"block {block.index} differs"
        )
        visited += 1
    assert visited == len(blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_inputs(family: str) -> None:
    """Hooks on plain linear modules, one at a time, see the same inputs as the observer that shares collectors."""
    model, ids = build(family), batches()
    layers = [layer for layer in find_layers(model) if layer.expert is None]
    squares = {layer.name: torch.zeros(layer.shape[1], dtype=torch.float64) for layer in layers}

    def watch(name: str) -> Callable[..., None]:
        def add(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            squares[name].add_(args[0].double().flatten(0, -2).square().sum(0))

        return add

    hooks = [layer.module.register_forward_pre_hook(watch(layer.name)) for layer in layers]
    with torch.no_grad():
        for batch in ids:
            model(batch)
    for hook in hooks:
        hook.remove()
    seen = {
        name: stats
        for block in walk(model, ids, ("input_norm",), read_only=True)
        for name, stats in block.stats.items()
    }
    for name, expected in squares.items():
        torch.testing.assert_close(
            seen[name].input_norm.double(), (expected / seen[name].sequences).sqrt(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_plans_are_met_exactly_and_nothing_else_changes(family: str, criterion: str) -> None:
    model = build(family)
    layers = find_layers(model)
    shapes = {layer.name: layer.shape for layer in layers}
    generator = torch.Generator().manual_seed(2)
    plan = Plan.of_sparsities(0.5, Pattern(), {name: float(torch.rand((), generator=generator)) for name in shapes})
    prunable = {(id(layer.module), layer.parameter) for layer in layers}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune_(model, plan, criterion=criterion, batches=batches())
    for layer in layers:
        assert int((layer.weight == 0).sum()) == plan.zeros(shapes)[layer.name], layer.name
    for name, value in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        if (id(model.get_submodule(module)), parameter) not in prunable:
            assert torch.equal(value, before[name]), f"{name} was changed"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_are_calibrated_on_the_tokens_they_receive(family: str) -> None:
    """Every token goes to two experts, so an experts layer sees twice the tokens in all, and gate_up and down see the
    same."""
    model, ids = build(family), batches()
    tokens = sum(batch.numel() for batch in ids)
    for block in walk(model, ids, ("input_norm",), read_only=True):
        seen = {name: stats.tokens for name, stats in block.stats.items() if ".experts." in name}
        up = {name.rpartition(".")[2]: n for name, n in seen.items() if "gate_up" in name}
        down = {name.rpartition(".")[2]: n for name, n in seen.items() if "down" in name}
        assert up == down
        assert sum(up.values()) == 2 * tokens


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_reported() -> None:
    model = build("mixtral")
    ids = [torch.randint(VOCABULARY, (1, 2), generator=torch.Generator().manual_seed(3))]
    starved = {
        name
        for block in walk(model, ids, ("input_norm",), read_only=True)
        for name, stats in block.stats.items()
        if not stats.tokens
    }
    assert starved
    layers = find_layers(model)
    plan = Plan.of_sparsities(0.5, Pattern(), {layer.name: 0.5 for layer in layers})
    reported = {
        result.layer
        for result in prune_(model, plan, criterion="wanda", batches=ids)
        if "no calibration token" in " ".join(result.notes)
    }
    assert reported <= {layer.name for layer in layers}
    assert reported
    for layer in layers:
        if layer.name in reported:
            kept, gone = layer.weight[layer.weight != 0].abs().min(), int((layer.weight == 0).sum())
            assert gone == layer.weight.numel() // 2
            assert kept > 0


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_observed_whatever_implementation_the_model_runs(family: str) -> None:
    model, ids = build(family), batches()
    model.set_experts_implementation("batched_mm")
    for block in walk(model, ids, ("input_norm",), read_only=True):
        assert any(stats.tokens for name, stats in block.stats.items() if ".experts." in name)
    assert model.config._experts_implementation == "batched_mm"


def test_tied_weights_stay_tied() -> None:
    model = build("gemma")
    plan = Plan.of_sparsities(0.5, Pattern(), {layer.name: 0.5 for layer in find_layers(model)})
    prune_(model, plan, criterion="magnitude")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_norm_and_head_alone_predict_what_the_model_does(family: str) -> None:
    model, ids = build(family).eval(), batches(1)[0]
    with torch.no_grad():
        for block in walk(model, [ids], read_only=True):
            outputs = run_block(block.module, block.inputs[0], block.calls[0])
            if block.following.module is not None:
                outputs = run_block(block.following.module, outputs, block.following.calls[0])
            if block.index + 2 >= len(blocks_of(model)):
                assert torch.equal(block.following.predict(outputs), model(ids).logits)


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_every_family_are_refined(family: str) -> None:
    model, refine = build(family), Refine(epochs=2, rate=0.01, tune_norms_and_biases=True)
    plan = Plan.of_sparsities(0.5, Pattern(), {layer.name: 0.5 for layer in find_layers(model)})
    results = prune_(model, plan, criterion="magnitude", batches=batches(12, 4), refine=refine)
    said = [note for result in results for note in result.notes if "refined" in note]
    assert len(said) == len(blocks_of(model))
    losses = [note.split("loss ")[1].split(" on ")[0].split(" -> ") for note in said]
    assert all(float(after) <= float(before) for before, after in losses)
    assert any(float(after) < float(before) for before, after in losses)
