"""AlphaPruning agrees with plain loops and with published numbers."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import make_table, relaxed, tables, total

from billhook.errors import BillhookError
from billhook.measurement import canonical
from billhook.plan.allocators import allocate
from billhook.plan.metrics import FACTS, fact
from billhook.plan.table import Row, Table


def alphapruning_by_hand(
    table: Table, target: float, metric: str, epsilon: float, mapping: str, clip: bool = True
) -> list[float]:
    """AlphaPruning in plain loops; the factor is found by giving what clipped layers cannot take to the others."""
    q = []
    for row in table:
        mates = (
            [x.metrics[metric] for x in table if x.block == row.block] if mapping == "block" else [row.metrics[metric]]
        )
        q.append(fact(metric).sign * sum(mates) / len(mates))
    r = [(x - min(q)) / (max(q) - min(q)) * 2 * epsilon + (1 - epsilon) for x in q]
    n = [row.n for row in table]
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(r)) if i not in full]
        left = target * sum(n) - sum(n[i] for i in full)
        factor = left / sum(n[i] * r[i] for i in rest)
        more = {i for i in rest if clip and factor * r[i] > 1}
        if not more:
            return [1.0 if i in full else factor * r[i] for i in range(len(r))]
        full |= more


@relaxed
@given(
    table=tables(values=st.floats(1.2, 8.0), drawn="alpha_peak"),
    target=st.floats(0.01, 0.99),
    epsilon=st.floats(0, 0.99),
    mapping=st.sampled_from(["block", "layer"]),
)
def test_alphapruning_is_the_published_map_clipped_with_its_budget_restored(
    table: Table, target: float, epsilon: float, mapping: str
):
    plan = allocate(table, target, allocator="alphapruning", epsilon=epsilon, mapping=mapping)
    alphas = [row.metrics["alpha_peak"] for row in table]
    if len(set(alphas)) > 1 and (mapping == "layer" or len(table.blocks()) > 1):
        expected = alphapruning_by_hand(table, target, "alpha_peak", epsilon, mapping)
        assert list(plan.sparsity.values()) == pytest.approx(expected, abs=1e-8)


def test_alphapruning_reaches_its_limits():
    table = make_table([[(8, 8)]] * 5, lambda column, block, layer: 1.5 + block)
    assert list(allocate(table, 0.5, allocator="alphapruning", epsilon=0).sparsity.values()) == pytest.approx([0.5] * 5)
    gentle = list(allocate(table, 0.5, allocator="alphapruning", epsilon=0.3).sparsity.values())
    assert max(gentle) / min(gentle) == pytest.approx(1.3 / 0.7)
    extreme = list(allocate(table, 0.9, allocator="alphapruning", epsilon=1).sparsity.values())
    assert extreme == pytest.approx([0.5, 1, 1, 1, 1], abs=1e-9)
    for epsilon in (-0.1, 1.1):
        with pytest.raises(BillhookError, match=r"epsilon must be in \[0, 1\]"):
            allocate(table, 0.5, allocator="alphapruning", epsilon=epsilon)


def test_alphapruning_maps_layers_one_by_one_when_asked():
    table = make_table([[(8, 8), (8, 8)], [(8, 8), (8, 8)]], lambda column, block, layer: 2.0 + block + 2 * layer)
    by_block = list(allocate(table, 0.5, allocator="alphapruning").sparsity.values())
    by_layer = list(allocate(table, 0.5, allocator="alphapruning", mapping="layer").sparsity.values())
    assert by_block[0] == by_block[1] < by_block[2] == by_block[3]
    assert by_layer[0] < by_layer[2] < by_layer[1] < by_layer[3]


def test_a_larger_alpha_means_more_sparsity():
    table = make_table([[(8, 8)]] * 2, lambda column, block, layer: [4.0, 2.0][block])
    light, heavy = allocate(table, 0.5, allocator="alphapruning").sparsity.values()
    assert light > heavy


MORE = {"entropy", "stable_rank", "mp_softrank", "wanda_mean", "wanda_median"}  # larger: sparser
MORE |= {"alpha_hat", "log_alpha_norm", "alpha_farms", "alpha_farms_mid"}
MORE |= {f"alpha_{cut}{part}" for cut in ("mid", "peak", "ks") for part in ("", "_ks")}
LESS = {"spectral_norm", "log_spectral_norm", "frobenius_sq", "log_norm", "randomized_distance"}  # larger: denser
LESS |= {"outlier_ratio", "block_loss", "loss_share"}


def test_shapes_of_spectra_mean_more_sparsity_and_norms_and_losses_less():
    for metric in FACTS:
        column = canonical(metric)
        table = Table(tuple(Row(f"b{i}", i, "w", (8, 8), {column: 1.0 + i}) for i in range(2)))
        small, large = allocate(table, 0.5, allocator="alphapruning", metric=column).sparsity.values()
        assert small < large if metric in MORE else large < small, metric
    assert set(FACTS) == MORE | LESS


def test_an_unknown_metric_is_named():
    table = make_table([[(8, 8)]], lambda *_: 1.0)
    with pytest.raises(BillhookError, match=r"alpha_peek.*alpha_peak"):
        allocate(table, 0.5, allocator="alphapruning", metric="alpha_peek")


# Blocks of the published alpha_peak (METHODS A.1) and the layer sparsities that follow from them at 0.7 (A.3): block ->
# (epsilon .2, .3).
LLAMA_7B = {0: (0.5704, 0.5042), 9: (0.5680, 0.5006), 17: (0.7156, 0.7236), 25: (0.8521, 0.9297), 31: (0.7317, 0.7479)}
LLAMA_2_7B = {
    0: (0.5381, 0.4619),
    2: (0.6590, 0.6397),
    16: (0.6977, 0.6965),
    20: (0.8072, 0.8578),
    31: (0.7031, 0.7046),
}


def published(shared: Path, model: str) -> Table:
    """The published alphas of a model as a table. Sizes are those of LLaMA-7B; all blocks are of one size, so no other
    matters."""
    shapes = {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
    rows = []
    for name, alpha in json.loads((shared / "golden" / "llama_alpha_peak.json").read_text())["alpha_peak"][
        model
    ].items():
        _, _, block, *kind = name.split(".")
        rows.append(Row(name, int(block), ".".join(kind), shapes.get(kind[-1], (4096, 4096)), {"alpha_peak": alpha}))
    return Table(tuple(rows))


@pytest.mark.parametrize("model, expected", [("llama-7b-hf", LLAMA_7B), ("llama2-7b-hf", LLAMA_2_7B)])
def test_published_alphas_give_the_published_sparsities(
    shared: Path, model: str, expected: dict[int, tuple[float, float]]
):
    table = published(shared, model)
    for position, epsilon in enumerate((0.2, 0.3)):
        sparsity = allocate(table, 0.7, allocator="alphapruning", epsilon=epsilon).sparsity
        for block, values in expected.items():
            for row in table.blocks()[block]:
                assert sparsity[row.layer] == pytest.approx(values[position], abs=6e-5)


@pytest.mark.parametrize(
    "model, target, epsilon, above",
    [
        ("llama-7b-hf", 0.8, 0.3, 6),
        ("llama-7b-hf", 0.7, 0.5, 6),
        ("llama2-7b-hf", 0.8, 0.4, 4),
        ("llama2-70b-hf", 0.8, 0.5, 5),
    ],
)
def test_published_sparsities_above_one_are_clipped(
    shared: Path, model: str, target: float, epsilon: float, above: int
):
    table = published(shared, model)
    unclipped = alphapruning_by_hand(table, target, "alpha_peak", epsilon, "block", clip=False)
    assert len({row.block for row, s in zip(table, unclipped, strict=True) if s > 1}) == above
    sparsity = allocate(table, target, allocator="alphapruning", epsilon=epsilon).sparsity
    assert max(sparsity.values()) <= 1
    assert total(table, sparsity) == pytest.approx(target * table.total, rel=1e-12)
    assert list(sparsity.values()) == pytest.approx(
        alphapruning_by_hand(table, target, "alpha_peak", epsilon, "block"), abs=1e-9
    )
