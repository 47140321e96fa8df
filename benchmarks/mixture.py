"""A small mixture of experts, and what is left of it after experts are removed, by every method.

    python benchmarks/mixture.py train DIR [--minutes 20]     # processor time, one thread
    python benchmarks/mixture.py compare DIR [--way obs --way "RCO as published"]

`train` makes a Mixtral of the bundled demo model: attention, norms and embeddings are its own, and each MLP of 352
channels becomes 8 experts of 88 channels (every channel is in two of them) with a new router, of which 2 get a token.
All of it is then trained on the demo model's corpus, the sources of Python's standard library. `compare` removes 25 and
50 % of the experts, calibrated with 32 windows of the training text, and prints perplexity on 64 windows of held-out
text and processor time.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import billhook
from billhook.architectures.layers import Layer
from billhook.architectures.units import Unit, find_units
from billhook.engine.batch import join_rows, select_rows, split_rows
from billhook.engine.experts import down_projections, expert_stats
from billhook.engine.removal import Removal, changed_layers, remove_parts_
from billhook.engine.restore import restored
from billhook.engine.routing import mixture_of, restrict_, routed
from billhook.engine.walk import walk
from billhook.methods.structured.experts import EXPERTS, merge
from billhook.plan.table import Table
from billhook.racing.candidates import GradientLevels, product
from billhook.racing.rco import Descent
from billhook.racing.unit_levels import by_descent
from billhook.racing.units import UnitProblem, choose_counts
from billhook.steps.slim_allocation import sizes_of
from billhook.text.stdlib import documents
from billhook.trials.unit_trials import UnitRunner

DENSE = Path(billhook.__file__).parent / "demo_model"
EXPERTS_A_BLOCK, WIDTH, WINDOW, BATCH = 8, 88, 256, 8
RATE, WARMUP = 1e-3, 30
STEPS = 30  # of RCO


def windows(split: str, count: int, seed: int) -> Tensor:
    """Token windows int64 [count, WINDOW] of documents in random order."""
    tokenizer, texts = AutoTokenizer.from_pretrained(DENSE), [text for _, text in documents(split)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    for index in order:
        ids += [tokenizer.bos_token_id, *tokenizer(texts[index], verbose=False)["input_ids"]]
        if len(ids) >= count * WINDOW:
            break
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)[:count]


@torch.no_grad()
def mixture() -> PreTrainedModel:
    """The mixture before training."""
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.float32)
    own = dense.config.to_dict()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    kept = {name: own[name] for name in (*names, "max_position_embeddings", "rms_norm_eps", "rope_parameters")}
    kept |= {"bos_token_id": own["bos_token_id"], "eos_token_id": own["eos_token_id"], "tie_word_embeddings": True}
    config = MixtralConfig(
        **kept, intermediate_size=WIDTH, num_local_experts=EXPERTS_A_BLOCK, num_experts_per_tok=2,
        router_aux_loss_coef=0.02, sliding_window=None,
    )  # fmt: skip
    model = MixtralForCausalLM._from_config(config, experts_implementation="eager", dtype=torch.float32)
    model.load_state_dict(dense.state_dict(), strict=False)
    for block, old in zip(model.model.layers, dense.model.layers, strict=True):
        for expert in range(EXPERTS_A_BLOCK):
            part = (torch.arange(WIDTH) + expert * WIDTH // 2) % own["intermediate_size"]
            gate, up = old.mlp.gate_proj.weight[part], old.mlp.up_proj.weight[part]
            block.mlp.experts.gate_up_proj[expert] = torch.cat([gate, up])
            block.mlp.experts.down_proj[expert] = (
                2 * old.mlp.down_proj.weight[:, part]
            )  # two experts share a weight of 1
    return model


def train(folder: Path, minutes: float) -> None:
    """Train for so many minutes of processor time, and write the model."""
    model, tokens = mixture(), windows("train", round(minutes * 1000), seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    begun, step, left = time.process_time(), 0, 1.0
    while left > 0:
        rows = tokens[[(step * BATCH + i) % len(tokens) for i in range(BATCH)]]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP, 2 * left)
        loss = model(rows, labels=rows, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, left = step + 1, 1 - (time.process_time() - begun) / 60 / minutes
        if step % 50 == 0:
            print(f"{step} steps, {1 - left:.0%} of the time, loss {float(loss):.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DENSE).save_pretrained(folder)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tensor) -> float:
    """Of all tokens but the first of each window."""
    total = 0.0
    for rows in tokens.split(8):
        logits = model(rows).logits[:, :-1].flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / tokens[:, 1:].numel())


@contextmanager
def unchanged(model: PreTrainedModel, units: list[Unit]) -> Iterator[None]:
    """Restore weights, routers and experts at the end."""
    with ExitStack() as stack:
        stack.enter_context(restored(changed_layers(model, units)))
        for unit in units:
            for module in mixture_of(model, unit):
                stack.callback(module.__dict__.pop, "forward", None)
        yield


def novices_(model: PreTrainedModel, units: list[Unit], counts: Mapping[str, int], batches: list[Any]) -> None:
    """MoNE as published: a removed expert returns its mean output, and the router stays as it is."""
    for block in walk(model, batches):
        (unit,) = (u for u in units if u.block == block.index)
        _, experts = mixture_of(model, unit)
        stats = expert_stats(model, unit, calls := routed(block, experts))
        keep, means = merge(stats, counts[unit.name]), torch.zeros(unit.count, calls[0][0].shape[1])
        own = experts.forward
        for expert in (~keep).nonzero()[:, 0].tolist():
            x = torch.cat([x[(chosen == expert).any(1)] for x, chosen, _ in calls])
            one = torch.full((len(x), 1), expert)
            means[expert] = own(x, one, torch.ones(len(x), 1)).mean(0) if len(x) else 0.0

        def forward(x: Tensor, chosen: Tensor, weights: Tensor, own=own, keep=keep, means=means) -> Tensor:
            constant = (weights * ~keep[chosen]).unsqueeze(-1) * means[chosen]
            result: Tensor = own(x, chosen, weights * keep[chosen]) + constant.sum(1)
            return result

        experts.forward = forward


def random_(model: PreTrainedModel, units: list[Unit], counts: Mapping[str, int], batches: list[Any]) -> None:
    """Experts that stay are drawn."""
    generator = torch.Generator().manual_seed(0)
    for unit in units:
        keep = torch.zeros(unit.count, dtype=torch.bool)
        keep[torch.randperm(unit.count, generator=generator)[: counts[unit.name]]] = True
        restrict_(model, unit, keep)


def by(method: str) -> Callable[..., None]:
    """Removing experts with a method of the package."""

    def remove(model: PreTrainedModel, units: list[Unit], counts: Mapping[str, int], batches: list[Any]) -> None:
        remove_parts_(model, units, counts, Removal("magnitude", {}), batches, experts=method)

    return remove


def compare(folder: Path, chosen: list[str]) -> None:
    """Print a line for each method, or each of the `chosen` ones, and number of experts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    calibration, held_out = windows("train", 32, seed=2), windows("heldout", 64, seed=0)
    batches = [{"input_ids": rows} for rows in calibration.split(8)]
    units = find_units(model, ["experts"])
    print(f"dense: {perplexity(model, held_out):.3f}", flush=True)
    ways = {"random": random_, "MoNE as published": novices_} | {name: by(name) for name in EXPERTS.names()}
    ways |= {f"{name}, allocated": allocated(name) for name in ("obs", "reap")}
    ways |= {"obs, allocated by rco": allocated("obs", "rco"), "RCO as published": rco_(False)}
    ways |= {"RCO, as many in every block": rco_(True)}
    for count in (6, 4):
        for name in chosen or ways:
            remove = ways[name]
            with unchanged(model, units):
                begun = time.process_time()
                remove(model, units, {unit.name: count for unit in units}, batches)
                took = time.process_time() - begun
                print(f"{count} of 8, {name}: {perplexity(model, held_out):.3f}, {took:.1f} s", flush=True)


class Gates(GradientLevels):
    """RCO's levels of experts: each goes, or stays as it is."""

    def __init__(self, runner: UnitRunner) -> None:
        layers = [layer for unit in runner.units for layer in down_projections(runner.model, unit)]
        super().__init__(runner, layers, join_rows(runner.batches))
        self.dense = {layer.name: layer.weight.clone() for layer in layers}
        self.place = {layer.name: i for i, layer in enumerate(layers)}

    @property
    def counts(self) -> list[int]:
        """Two levels for each expert."""
        return [2] * len(self.layers)

    @torch.no_grad()
    def put_(self, chosen: Sequence[int]) -> None:
        """Put zeros into experts that go."""
        for layer, level in zip(self.layers, chosen, strict=True):
            layer.weight.copy_(self.dense[layer.name] * level)

    def slopes(self, layer: Layer, gradient: Tensor, chosen: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
        """What an expert gives."""
        yield self.place[layer.name], [0.0, product(gradient, self.dense[layer.name])]


def rco_(by_block: bool) -> Callable[..., None]:
    """RCO as published for experts: a probability of staying for each, weights and router as they are.

    With `by_block` the number that stays is the same in every block.
    """

    def remove(model: PreTrainedModel, units: list[Unit], counts: Mapping[str, int], batches: list[Any]) -> None:
        rows = join_rows(batches)
        with UnitRunner(model, units, batches, select_rows(rows, slice(0, 1)), Removal("magnitude", {})) as runner:
            gates, each = Gates(runner), EXPERTS_A_BLOCK
            sizes = [each] * len(units) if by_block else [each * len(units)]
            kept = [counts[u.name] for u in units] if by_block else [sum(counts[u.name] for u in units)]
            descents = [
                Descent([[1, 2]] * n, n + k, 0.1, 1.0, i) for i, (n, k) in enumerate(zip(sizes, kept, strict=True))
            ]
            draw = gates.windows(4, 0)
            for _ in range(STEPS):
                found = gates.gradients([level for d in descents for level in d.draw()], next(draw))
                for d in descents:
                    d.update_(found[: len(d.costs)])
                    del found[: len(d.costs)]
        stays = torch.tensor([level for d in descents for level in d.best()], dtype=torch.bool).view(len(units), each)
        print(stays.sum(1).tolist(), flush=True)
        for unit, keep in zip(units, stays, strict=True):
            restrict_(model, unit, keep)

    return remove


def allocated(method: str, allocator: str = "auto") -> Callable[..., None]:
    """The same with numbers of experts that differ by block, chosen by `auto` or `rco`."""

    def remove(model: PreTrainedModel, units: list[Unit], counts: Mapping[str, int], batches: list[Any]) -> None:
        sizes = sizes_of(units, model.config)
        gone = sum((s.count - counts[s.name]) * s.parameters for s in sizes)
        problem = UnitProblem(Table(()), gone / sum(s.n for s in sizes), sizes=sizes, remove=gone, shape="per-layer")
        rows = join_rows(batches)
        half = [select_rows(rows, slice(start, start + 16)) for start in (0, 16)]
        with UnitRunner(
            model, units, split_rows(half[0], 8), half[1], Removal("magnitude", {}), experts=method
        ) as runner:
            how = {"steps": STEPS}
            plan = by_descent(runner, problem, how) if allocator == "rco" else choose_counts(runner, problem, {})
        print([plan.units[unit.name] for unit in units], flush=True)
        by(method)(model, units, plan.units, batches)

    return remove


def main() -> None:
    """Train, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--way", action="append")
    options = parser.parse_args()
    if options.what == "train":
        train(options.folder, options.minutes)
    else:
        compare(options.folder, options.way or [])


if __name__ == "__main__":
    main()
