"""What every grid of a GGUF type promises: exact zeros, weights that count, and errors below llama.cpp's."""

import pytest
import torch
from gguf import GGMLQuantizationType
from quantized_layers import error as output_error
from quantized_layers import layer

from billhook.methods.quantize import QUANTIZERS, code_books, groups
from billhook.methods.quantize.ggml import GGML
from billhook.methods.statistics import LayerStats
from billhook.plan import storage


def rounded(W, weight, name):
    made = QUANTIZERS.get("round")(W, LayerStats(1, 1, input_norm=weight.sqrt()), GGML[name], weighted=True)
    return made.decode(torch.float32)


def error(W, V, weight):
    return float(((W - V).square() @ weight).sum() / (W.square() @ weight).sum())


def weights(kind, rows=64, columns=512):
    """W [rows, columns] and how much each column counts."""
    g = torch.Generator().manual_seed(3)
    W = torch.randn(rows, columns, generator=g)
    if kind == "heavy":
        W *= torch.randn(rows, columns, generator=g).exp()
    return W * 0.02, torch.randn(columns, generator=g).exp()


@pytest.mark.parametrize("name", GGML)
def test_grids_agree_with_the_table_of_sizes(name):
    grid = GGML[name]
    assert grid.name == name
    assert grid.block == storage.block(name)
    assert grid.block % grid.group == grid.group % grid.step == 0


@pytest.mark.parametrize("name", GGML)
def test_rows_of_zeros_are_exactly_zero_and_zero_groups_too_where_scales_can_be_zero(name):
    W, weight = weights("plain", 4)
    W[1] = 0
    W[2, :32] = 0
    V = rounded(W, weight, name)
    assert not V[1].any()
    if not name.startswith(("iq2", "iq3")):
        assert not V[2, :32].any()
    assert V[[0, 3]].any(1).all()


@pytest.mark.parametrize("name", GGML)
def test_scales_follow_the_weight_of_columns(name):
    W, weight = weights("plain")
    alike = rounded(W, torch.ones_like(weight), name)
    least = 1 if name == "mxfp4" else 0.97  # powers of two leave little to choose
    assert error(W, rounded(W, weight, name), weight) < least * error(W, alike, weight)


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl"])
def test_one_scale_is_nearly_the_best_of_a_thousand(name):
    W, weight = weights("heavy", 200, 32)
    grid = GGML[name]
    least = torch.full((200,), torch.inf)
    for scale in torch.linspace(0.6, 1.4, 500).tolist():
        for sign in (1, -1):
            d = (W.abs().amax(1, keepdim=True) / grid.points[0] * scale * sign).half().float()
            least = torch.minimum(least, (W - grid.nearest(W / d) * d).square() @ weight)
    found = (W - rounded(W, weight, name)).square() @ weight
    assert found.sum() < 1.02 * least.sum()


@pytest.mark.gate
@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q3_k", "q2_k", "iq4_xs", "iq3_s", "iq2_xs"])
def test_gptq_has_less_output_error_than_rounding_on_every_kind_of_grid(name):
    W, stats, X = layer(4, columns=512, tokens=2048)
    nearest, plain = (QUANTIZERS.get(quantizer)(W, stats, GGML[name]) for quantizer in ("round", "gptq"))
    errors = [output_error(W, made.decode(torch.float32), X) for made in (nearest, plain)]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("name", ["q3_k", "q4_k"])
def test_pruned_weights_stay_zero_where_the_type_has_a_zero_and_are_rounded_like_others_where_it_has_none(name):
    W, stats, X = layer(5, columns=256)
    zero = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    made = QUANTIZERS.get("gptq")(W.masked_fill(zero, 0), stats, GGML[name], dense_target=0.0).decode(torch.float32)
    assert output_error(W.masked_fill(zero, 0), made, X) < 0.1
    assert bool(made[zero].any()) == (name == "q4_k")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["plain", "heavy"])
@pytest.mark.parametrize("name", GGML)
def test_the_error_is_below_that_of_llama_cpps_quantizer_with_the_same_importance(name, kind):
    libgguf = pytest.importorskip("libgguf", reason="needs the extra dev-slow")
    if name == "q2_0":
        pytest.skip("libgguf does not know it")
    W, weight = weights(kind, 256)
    for importance in (weight, torch.ones_like(weight)):
        data = libgguf.quantize_rows(W.numpy().copy(), GGMLQuantizationType[name.upper()], imatrix=importance.numpy())
        theirs = torch.tensor(libgguf.dequantize_rows(data, GGMLQuantizationType[name.upper()], n_per_row=W.shape[1]))
        assert error(W, rounded(W, importance, name), importance) < error(W, theirs, importance)


@pytest.mark.parametrize("name", ["q4_0", "q2_k", "iq2_xxs"])
def test_rows_in_parts_have_the_error_that_they_have_together(name, monkeypatch):
    W, weight = weights("plain", 40)
    together = error(W, rounded(W, weight, name), weight)
    for module in (groups, code_books):
        monkeypatch.setattr(module, "ROWS", 7)
    assert error(W, rounded(W, weight, name), weight) == pytest.approx(together, rel=3e-3)
