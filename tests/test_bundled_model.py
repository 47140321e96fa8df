"""Facts of the bundled model, kept from the version whose results agreed with the published code (test_golden.py).

They need nothing beside the repository. What processors round differently is compared within a tolerance: scores that
tie to rounding are ranked differently, and updated weights follow their masks.
"""

import hashlib

import numpy as np
import pytest
import torch
from paths import DATA, DEMO
from transformers import AutoTokenizer, PreTrainedModel

from billhook import Table, allocate, evaluate, find_layers, load_model, measure, prune_

pytestmark = pytest.mark.gate

METRICS = {  # mean of each block
    "alpha_peak": "1.69627 1.54346 1.53758 1.51581 1.67637 1.6684 1.74956 2.19191 1.72268 1.73299 1.6859 7.04762",
    "alpha_mid": "1.88643 1.68503 1.75059 1.77427 1.79314 1.80258 1.82793 1.84117 1.85483 1.87813 1.85479 1.89755",
    "outlier_ratio:5": "2.07086 1.15234 1.68566 1.84733 1.33084 0.819227 "
    "0.483398 0.594076 0.274523 0.480686 0.498047 0.759549",
    "wanda_mean": "0.596698 0.273796 0.229681 0.204094 0.235615 0.344197 "
    "0.396202 0.539617 0.589165 0.621662 0.653803 1.13566",
}
SPARSITIES = {  # of each block, for 50 %
    "alphapruning": "0.468166 0.457382 0.456968 0.455431 0.466762 0.466199 "
    "0.471927 0.503142 0.47003 0.470757 0.467434 0.845801",
    "atp": "0.375 0.397727 0.420455 0.443182 0.465909 0.488636 0.511364 0.534091 0.556818 0.579545 0.602273 0.625",
    "owl": "0.404593 0.486405 0.438903 0.424502 0.470506 0.516076 0.545988 0.53613 0.564593 0.54623 0.544683 0.521391",
    "dlp": "0.535966 0.431979 0.417772 0.409532 0.419683 0.454651 0.471398 0.517584 0.53354 0.544005 0.554356 0.709532",
}
DIGESTS = {  # of the bits of the masks of all layers, at 50 %
    "unstructured": "34b320171c2d15f9c9fb26d0e1a584d03afa75aa270779d6f12fe53bf63d1a4a",
    "2:4": "7354018bef8c919d967bb43917a64752fef7ef77c01afc2f25d1df4ab8d94f95",
}
PERPLEXITIES = {"dense": 40.1750, "magnitude": 49.8145, "wanda": 51.3373, "gblm": 50.947, "ria": 49.2626}
PERPLEXITIES |= {"dsnot": 50.597, "wandapp": 56.3772, "gradient": 53.0387, "pruner_zero": 49.367}
PERPLEXITIES |= {"sparsegpt": 47.7124, "admm": 43.5364}


def windows(name: str, count: int) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(DEMO)((DATA / name).read_text(encoding="utf-8"))["input_ids"]
    return torch.tensor(ids[: count * 128]).view(count, 128)


@pytest.fixture(scope="module")
def calibration() -> list[torch.Tensor]:
    return [windows("python_a.txt", 4)]


@pytest.fixture(scope="module")
def table(calibration: list[torch.Tensor]) -> Table:
    return measure(model(), list(METRICS), batches=calibration)


def model() -> PreTrainedModel:
    return load_model(DEMO, dtype="float32")


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def of_blocks(table: Table, column: str) -> list[float]:
    """The mean of a column over each block."""
    return [sum(row.metrics[column] for row in rows) / len(rows) for rows in table.blocks().values()]


def test_metrics_and_allocations_are_those_of_before(table: Table) -> None:
    for column, blocks in METRICS.items():
        assert of_blocks(table, column) == pytest.approx(numbers(blocks), rel=1e-3), column
    for name, blocks in SPARSITIES.items():
        sparsity = allocate(table, 0.5, allocator=name).sparsity
        found = [sparsity[rows[0].layer] for rows in table.blocks().values()]
        assert found == pytest.approx(numbers(blocks), abs=1e-4), name


@pytest.mark.parametrize("pattern", DIGESTS)
def test_magnitude_masks_are_those_of_before(pattern: str) -> None:
    """Bit by bit on every processor, with thousands of equal weights: nothing is rounded."""
    pruned = model()
    prune_(pruned, allocate(measure(pruned, []), 0.5, pattern=pattern), criterion="magnitude")
    bits = b"".join(np.packbits((layer.weight != 0).numpy()).tobytes() for layer in find_layers(pruned))
    assert hashlib.sha256(bits).hexdigest() == DIGESTS[pattern]


FAST = ("dense", "magnitude", "wanda", "sparsegpt")


@pytest.mark.parametrize(
    "criterion", [pytest.param(c, marks=() if c in FAST else pytest.mark.nightly) for c in PERPLEXITIES]
)
def test_perplexities_are_those_of_before(criterion: str, calibration: list[torch.Tensor]) -> None:
    pruned, text = model(), windows("python_b.txt", 8)
    if criterion != "dense":
        plan = allocate(measure(pruned, []), 0.5)
        prune_(pruned, plan, criterion=criterion, batches=calibration)
    tolerance = 0.05 if criterion in ("sparsegpt", "admm") else 1e-3
    assert evaluate(pruned, text).token_ppl == pytest.approx(PERPLEXITIES[criterion], rel=tolerance)
