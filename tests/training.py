"""Transformers' Trainer on a tiny model and random tokens."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import billhook


class Windows(Dataset):
    """Windows of 32 random tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def train(
    model: Any, folder: Path, optimizer: str, keep: bool, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
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
    trainer = kind(model, arguments, train_dataset=Windows(), callbacks=callbacks, optimizers=(own, None))
    trainer.train()
    return trainer
