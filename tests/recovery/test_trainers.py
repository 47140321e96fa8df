"""Zeros in transformers' Trainer: kept with the callback, lost without it."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sharded_training
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sharded_training import by_loop, whole
from sparse_models import prune_at_random
from torch.distributed.fsdp import FullyShardedDataParallel
from training import train

import billhook
from billhook import BillhookError
from billhook.recovery.masks import count_returned, find_masks

QUICK = ("adamw_torch", "muon")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "muon")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16 with accumulation": {"bf16": True, "gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


def cases() -> list[Any]:
    """Every optimizer alone and, with AdamW and Muon, all options; the gate has one of them."""
    pairs = [(optimizer, "plain") for optimizer in OPTIMIZERS] + [(o, name) for name in OPTIONS for o in QUICK]
    quick = [("adamw_torch", "bf16 with accumulation")]
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.nightly) for pair in dict.fromkeys(pairs)]


@pytest.mark.parametrize("optimizer, options", cases())
def test_zeros_are_kept_with_the_callback_and_lost_without_it(optimizer: str, options: str, tmp_path: Path) -> None:
    for keep in (True, False):
        model = prune_at_random(tiny.llama())
        masks, before = find_masks(model), {name: p.clone() for name, p in model.named_parameters()}
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        train(model, tmp_path, optimizer, keep, **OPTIONS[options])
        returned = sum(count_returned(model, masks).values())
        if keep:
            assert returned == 0
            assert all(not torch.equal(before[name], model.get_parameter(name)) for name in masks)
        else:
            assert returned > 0.99 * zeros


def test_the_callback_names_what_it_does_not_find(tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match="No prunable weight of LlamaForCausalLM is zero"):
        train(tiny.llama(), tmp_path, "sgd", keep=True)


@pytest.mark.nightly
def test_a_callback_can_be_used_again(tmp_path: Path) -> None:
    model = prune_at_random(tiny.llama())
    masks = find_masks(model)
    trainer = train(model, tmp_path, "sgd", keep=True)
    trainer.train()
    assert not count_returned(model, masks)
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def check_sharded(kept: Mapping[str, torch.Tensor], lost: Mapping[str, torch.Tensor]) -> None:
    """Whole weights after training with masks, and without."""
    for name, mask in find_masks(prune_at_random(tiny.llama())).items():
        assert not kept[name][~mask].any()
        assert lost[name][~mask].count_nonzero() > 0.99 * int((~mask).sum())
        assert kept[name][mask].count_nonzero() == mask.sum()


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_zeros_of_a_sharded_model_are_kept(one_process: None) -> None:
    check_sharded(*(whole(by_loop(keep)) for keep in (True, False)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_flattened_model_is_refused(one_process: None) -> None:
    flat = FullyShardedDataParallel(prune_at_random(tiny.llama()), device_id=torch.device("cpu"))
    with pytest.raises(BillhookError, match=r"q_proj is not a parameter of its own.*use FSDP2 in place of FSDP 1"):
        find_masks(flat)


@pytest.mark.nightly
@pytest.mark.parametrize("how, processes", [("trainer", 1), ("trainer", 2), ("loop", 2)])
def test_zeros_are_kept_under_fsdp2(how: str, processes: int, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = os.pathsep.join([str(Path(billhook.__file__).parents[1]), str(Path(tiny.__file__).parent)])
    ran = subprocess.run(
        [*start, str(Path(sharded_training.__file__)), str(tmp_path), how],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr
    check_sharded(*(load_file(tmp_path / f"{name}.safetensors") for name in ("kept", "lost")))
