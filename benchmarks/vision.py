"""Methods on trained image classifiers, by top-1 accuracy.

    python benchmarks/vision.py [NAME ...] [--model cifar] [--picture docs/images/vision.svg]

`cifar` is a vision transformer for CIFAR-10 in memory (post-LN: 6 blocks, width 128, 811,146 parameters, beside the
repository in `../shared/vision`), scored on 2,000 test images with a standard error of 1.0; `digits` is the ConvNeXt of
`benchmarks/digits.py`, scored on 597, and needs scikit-learn. Calibration images are 256 of the training set (seed 0);
256 more of it are held out, on which the prefix of `ours` is chosen.

Each row is appended to `vision_MODEL.jsonl` in the working directory, so that an interrupted run continues. One thread.
"""

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import digits
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from billhook import prune
from billhook.engine.batch import Batch, select_rows, split_rows
from billhook.evaluation.quality import Reference
from billhook.evaluation.rows import evaluate_rows
from billhook.reports.charts import Series, chart
from billhook.reports.scales import Axis
from billhook.store.files import write_text
from billhook.tasks.opening import task_of

SHARED = Path(os.environ.get("BILLHOOK_SHARED", Path(__file__).parents[2] / "shared")) / "vision"
SAMPLES, HELD_OUT = 256, 256
RECIPES = {
    "magnitude, layer": {"criterion": "magnitude"},
    "wanda-vision": {"recipe": "wanda-vision"},
    "wanda, row, dense prefix": {"criterion": "wanda", "prefix": "dense"},
    "wanda, row, pruned prefix": {"criterion": "wanda"},
    "alphapruning-vision": {"recipe": "alphapruning-vision"},
    "atp-vision": {"recipe": "atp-vision"},
    "gblm-vision": {"recipe": "gblm-vision"},
    "sparsegpt": {"criterion": "sparsegpt"},
}
DRAWN = ("magnitude, layer", "wanda-vision", "sparsegpt")
OURS = {
    f"{recipe}, {prefix} prefix": {"recipe": recipe, "prefix": prefix}
    for recipe in ("good", "best")
    for prefix in ("pruned", "dense")
}


class CifarConfig(PretrainedConfig):
    """The configuration of the model: ten classes."""

    model_type = "cifar_vit"
    num_hidden_layers = 6
    image_size, patch_size, hidden_size = 32, 4, 128


class CifarViT(PreTrainedModel):
    """The model with the interface of transformers; blocks are found by their number."""

    config_class = CifarConfig
    base_model_prefix = "net"
    main_input_name = "pixel_values"

    def __init__(self, config: CifarConfig, net: nn.Module) -> None:
        super().__init__(config)
        self.net = net

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits, and the loss of `labels`."""
        logits = self.net(pixel_values)
        return ImageClassifierOutput(
            logits=logits, loss=None if labels is None else nn.functional.cross_entropy(logits, labels)
        )


def load_cifar() -> CifarViT:
    """The trained model."""
    spec = importlib.util.spec_from_file_location("cifar_vit", SHARED / "cifar_vit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.load(SHARED / "vit_cifar10.safetensors")
    net.forward = _named(net.forward)
    return CifarViT(CifarConfig(num_labels=10), net).eval()


def _named(forward):
    """The network's forward with the name of the argument that transformers uses."""

    def named(pixel_values):
        return forward(pixel_values)

    return named


def cifar() -> tuple[Batch, Batch]:
    """Pixel values and labels of the training and the test images."""
    return _images("cifar10_train_1k.npz"), _images("cifar10_test_2k.npz")


def _images(name: str) -> Batch:
    file = np.load(SHARED / name)
    x = torch.from_numpy(file["x"]).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor((0.4914, 0.4822, 0.4465)), torch.tensor((0.2023, 0.1994, 0.2010))
    return {
        "pixel_values": (x - mean.view(3, 1, 1)) / std.view(3, 1, 1),
        "labels": torch.from_numpy(file["y"]).long(),
    }


MODELS = {
    "cifar": (load_cifar, cifar, (0.5, 0.6, 0.7), "ViT for CIFAR-10"),
    "digits": (digits.load, digits.digits, (0.6, 0.7, 0.8, 0.9), "ConvNeXt for digits"),
}


def row(name: str, sparsity: float, options: dict, model: PreTrainedModel, train: Batch, test: Batch) -> dict:
    """Prune the model and score it."""
    begun, order = time.process_time(), torch.randperm(len(train["labels"]), generator=torch.Generator().manual_seed(0))
    calibration = select_rows(train, order[:SAMPLES])
    heldout = select_rows(train, order[SAMPLES : SAMPLES + HELD_OUT])
    reference = Reference.of(model, heldout, task_of(model), "held-out")
    prune(model, sparsity=sparsity, calibration=calibration, **options)
    took = time.process_time() - begun
    lost = reference.compare(model)
    scores = evaluate_rows(model, split_rows(test, 250), task_of(model))
    found = {"name": name, "sparsity": sparsity, "top1": 100 * scores.top1, "nll": scores.nll}
    return found | {"heldout_kl": lost.kl, "heldout_top1": 100 * lost.accuracy, "processor_s": round(took, 1)}


def picture(title: str, score: str, found: Mapping[str, Mapping[float, float]], dense: float) -> str:
    """Lines of scores by sparsity, and the dense model's score as a dashed line, as SVG."""
    series = [
        Series(name, [100 * sparsity for sparsity in sorted(by)], [by[sparsity] for sparsity in sorted(by)])
        for name, by in found.items()
    ]
    x = [100 * sparsity for sparsity in sorted({sparsity for by in found.values() for sparsity in by})]
    series.append(Series("dense", x, [dense] * len(x), marks=False, colour=-1, dash=1))
    return chart(title, series, Axis("sparsity (%)"), Axis(score), standalone=True)


def main() -> None:
    """All rows that are not there yet, then our choice among the rows of each sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="only these rows (default all)")
    parser.add_argument("--model", choices=list(MODELS), default="cifar")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    AutoModelForImageClassification.register(CifarConfig, CifarViT)
    torch.set_num_threads(1)
    load, data, sparsities, what = MODELS[args.model]
    (train, test), saved = data(), Path(f"vision_{args.model}.jsonl")
    rows = [json.loads(line) for line in saved.read_text().splitlines()] if saved.exists() else []
    done = {(found["name"], found["sparsity"]) for found in rows}
    dense = 100 * evaluate_rows(load(), split_rows(test, 250), task_of(load())).top1
    print("dense", dense, flush=True)
    for name, options in (RECIPES | OURS).items():
        for sparsity in sparsities:
            if (name, sparsity) not in done and (not args.name or name in args.name):
                rows.append(found := row(name, sparsity, options, load(), train, test))
                with saved.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(found, flush=True)
    drawn = {name: {found["sparsity"]: found["top1"] for found in rows if found["name"] == name} for name in DRAWN}
    for sparsity in sparsities:
        ours = [found for found in rows if found["name"] in OURS and found["sparsity"] == sparsity]
        if ours:
            best = min(ours, key=lambda found: found["heldout_kl"])
            print(f"ours at {sparsity}: {best['name']}, top-1 {best['top1']:.2f}", flush=True)
            drawn.setdefault("ours", {})[sparsity] = best["top1"]
    if args.picture is not None:
        title = f"Top-1 accuracy of a {what} by sparsity (higher is better)"
        write_text(args.picture, picture(title, "top-1 accuracy (%)", drawn, dense))


if __name__ == "__main__":
    main()
