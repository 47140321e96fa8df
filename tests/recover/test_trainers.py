"""Zeros in transformers' Trainer: kept with the callback, lost without it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from sparse_models import prune_at_random
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import billhook
from billhook import BillhookError
from billhook.recover.masks import count_returned, find_masks

QUICK = ("adamw_torch", "muon")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "muon")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16 with accumulation": {"bf16": True, "gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


class Windows(Dataset):
    """Windows of 32 random tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def train(model: Any, folder: Path, optimizer: str, keep: bool, **options: Any) -> Trainer:
    """Four steps; Muon trains what has two dimensions, as it must."""
    muon = optimizer == "muon"
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        optim="adamw_torch" if muon else optimizer,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    own = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2) if muon else None
    callbacks = [billhook.MaskCallback()] if keep else []
    trainer = Trainer(model, arguments, train_dataset=Windows(), callbacks=callbacks, optimizers=(own, None))
    trainer.train()
    return trainer


def cases() -> list[Any]:
    """Every optimizer alone and, with AdamW and Muon, all options; the gate has two of them."""
    pairs = [(optimizer, "plain") for optimizer in OPTIMIZERS] + [(o, name) for name in OPTIONS for o in QUICK]
    quick = [("adamw_torch", "bf16 with accumulation"), ("muon", "plain")]
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


def test_a_callback_can_be_used_again(tmp_path: Path) -> None:
    model = prune_at_random(tiny.llama())
    masks = find_masks(model)
    trainer = train(model, tmp_path, "sgd", keep=True)
    trainer.train()
    assert not count_returned(model, masks)
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
