"""A ConvNeXt for scikit-learn's handwritten digits, trained here in a minute of one thread.

    python benchmarks/digits.py       writes digits_convnext/ into the working directory

Digits are 8 x 8 pixels. The first 1,200 are for training, the last 597, by other writers, for the test; nothing is
chosen on these. Three stages of two blocks, widths 16, 32 and 64.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification

from billhook.engine.batch import Batch

FOLDER, TRAINING, EPOCHS, ROWS = Path("digits_convnext"), 1200, 120, 50


def digits() -> tuple[Batch, Batch]:
    """Pixel values and labels of the training and the test images."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = (torch.tensor(found.images, dtype=torch.float32)[:, None] - 4.9) / 6.0
    y = torch.tensor(found.target)
    return tuple({"pixel_values": x[part], "labels": y[part]} for part in (slice(TRAINING), slice(TRAINING, None)))


def load() -> ConvNextForImageClassification:
    """The trained model, which is trained now if it is not there yet."""
    if not FOLDER.is_dir():
        train().save_pretrained(FOLDER)
    return ConvNextForImageClassification.from_pretrained(FOLDER).eval()


def train() -> ConvNextForImageClassification:
    """Train with AdamW, a cosine schedule, and images that are turned, scaled and shifted at random."""
    torch.manual_seed(0)
    config = ConvNextConfig(
        num_channels=1, image_size=8, patch_size=1, num_labels=10, layer_scale_init_value=1.0,
        hidden_sizes=[16, 32, 64], depths=[2, 2, 2], num_stages=3,
    )  # fmt: skip
    model, data = ConvNextForImageClassification(config).train(), digits()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = EPOCHS * TRAINING // ROWS
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        at = torch.randperm(TRAINING)[:ROWS]
        logits = model(pixel_values=moved(data["pixel_values"][at])).logits
        loss = nn.functional.cross_entropy(logits, data["labels"][at], label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def moved(x: Tensor) -> Tensor:
    """Images [n, 1, 8, 8] turned by up to 15 degrees, scaled by up to 15 % and shifted by up to a pixel."""
    angle, scale = (2 * torch.rand(2, len(x)) - 1) * torch.tensor([[math.pi / 12], [0.15]])
    shift = (2 * torch.rand(len(x), 2) - 1) / 4
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
    grid = torch.cat([turn * (1 + scale)[:, None, None], shift[:, :, None]], -1)
    return nn.functional.grid_sample(
        x, nn.functional.affine_grid(grid, x.shape, align_corners=False), padding_mode="border", align_corners=False
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    load()
