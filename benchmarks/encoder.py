"""A linear probe on the embeddings of a DINOv2, before and after pruning.

    python benchmarks/encoder.py FOLDER [--sparsity 0.5] [NAME ...]

FOLDER is a directory of `Dinov2Model`. Images are the CIFAR-10 files of `benchmarks/vision.py`, enlarged to 84 pixels:
the probe, a logistic regression on the dense model's embeddings, is trained on 1,000 of the training set and stays as
it is; --samples of these, without labels, calibrate; 2,000 test images are scored (standard error 1.1). One thread.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from vision import cifar

from billhook import load_model, measure, prune

METHODS = {
    "magnitude": {"criterion": "magnitude", "allocator": "uniform"},
    "wanda-vision": {"recipe": "wanda-vision"},
    "sparsegpt": {"criterion": "sparsegpt", "allocator": "uniform"},
    "admm": {"criterion": "admm", "allocator": "uniform"},
    "good": {"recipe": "good"},
    "best": {"recipe": "best"},
}
PIXELS = 84


@torch.no_grad()
def embeddings(model: nn.Module, x: Tensor) -> Tensor:
    """The pooled outputs [images, width]."""
    return torch.cat([model(pixel_values=part).pooler_output for part in x.split(50)])


def trained_probe(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """A logistic regression on standardized embeddings with weight decay, by L-BFGS."""
    mean, std = x.mean(0), x.std(0)
    layer = nn.Linear(x.shape[1], 10)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer((x - mean) / std), y) + 0.01 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda z: layer((z - mean) / std)


def main() -> None:
    """The dense probe, the alphas of the blocks, then the methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", nargs="*", help="only these methods (default all)")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=1000, help="calibration images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (train, test), model = cifar(), load_model(args.folder)
    x, shown = (
        nn.functional.interpolate(images["pixel_values"], size=PIXELS, mode="bicubic", antialias=True)
        for images in (train, test)
    )
    probe, dense = trained_probe(embeddings(model, x), train["labels"]), embeddings(model, shown)

    def accuracy(found: Tensor) -> float:
        return 100 * float((probe(found).argmax(-1) == test["labels"]).float().mean())

    print("dense", accuracy(dense), flush=True)
    by_block: dict[int, list[float]] = {}
    for row in measure(model, ["alpha_mid"]):
        by_block.setdefault(row.block, []).append(row.metrics["alpha_mid"])
    print("alpha_mid by block", [round(sum(found) / len(found), 2) for found in by_block.values()], flush=True)
    for name in args.name or METHODS:
        model, begun = load_model(args.folder), time.process_time()
        prune(model, sparsity=args.sparsity, calibration=x[: args.samples], **METHODS[name])
        took, found = time.process_time() - begun, embeddings(model, shown)
        cosine = float(nn.functional.cosine_similarity(found, dense).mean())
        print(f"{name}: top-1 {accuracy(found):.2f}, cosine {cosine:.4f}, {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
