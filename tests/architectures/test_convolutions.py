"""Convolutions are linear layers on the windows of their input, and are pruned where they are asked for."""

import itertools

import numpy as np
import pytest
import torch
import vision_families
from torch import nn
from transformers import AutoModelForImageClassification
from walked import check_walk

from billhook import BillhookError, load_model, pack, prune, recover, unpack, verify
from billhook.architectures.convolutions import POSITIONS, windows
from billhook.architectures.layers import Layer, find_layers
from billhook.architectures.selection import select_layers
from billhook.engine.observer import Observer
from billhook.packed.loading import load
from billhook.store.files import sha256


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_gram_matrix_of_every_group_is_the_sum_over_all_windows_in_plain_loops():
    module = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 3), groups=2, bias=False)
    x = random(2, 4, 9, 7)
    observer = Observer([Layer(f"c.{g}", 0, "c", module, "weight", None, False, g) for g in (0, 1)], ("gram",), True, 2)
    with observer, torch.no_grad():
        output = module(x)
    found = observer.stats()
    for group in (0, 1):
        gram, positions = np.zeros((12, 12)), 0
        for image, top, left in itertools.product(range(2), range(output.shape[2]), range(output.shape[3])):
            window = []
            for channel, down, right in itertools.product(range(2 * group, 2 * group + 2), range(3), range(2)):
                row, column = top * 2 - 2 + down * 2, left - 1 + right * 3
                inside = 0 <= row < 9 and 0 <= column < 7
                window.append(float(x[image, channel, row, column]) if inside else 0.0)
            gram += np.outer(window, window)
            positions += 1
        stats = found[f"c.{group}"]
        np.testing.assert_allclose(stats.gram.numpy(), gram, rtol=1e-5, atol=1e-5)
        assert (stats.tokens, stats.sequences) == (positions, 2)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(8, 6, 1, bias=False), (8, 5, 4)),
        (nn.Conv1d(8, 6, 3, padding="same", dilation=2, bias=False), (8, 11)),
        (nn.Conv2d(6, 6, 7, padding=3, groups=6, padding_mode="circular", bias=False), (6, 8, 8)),
        (nn.Conv3d(4, 8, 2, stride=2, groups=2, bias=False), (4, 6, 4, 4)),
    ],
)
def test_rows_times_the_view_are_the_output(module, shape):
    x = random(3, *shape)
    groups = [None] if module.groups == 1 else range(module.groups)
    layers = [Layer("c", 0, "c", module, "weight", None, False, group) for group in groups]
    output = torch.cat([layer.inputs(x) @ layer.weight.T for layer in layers], -1).transpose(1, 2)
    torch.testing.assert_close(output, module(x).detach().flatten(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layers[-1].inputs(x[0]), layers[-1].inputs(x)[:1])


def test_of_many_positions_a_sample_is_seen_the_same_in_all_images():
    module, x = nn.Conv2d(3, 2, 1), torch.arange(2 * 3 * 40 * 40).view(2, 3, 40, 40).float()
    rows = windows(module, None, x)
    assert rows.shape == (2, POSITIONS, 3)
    places = rows[0, :, 0].long()
    assert len(set(places.tolist())) == POSITIONS
    assert torch.equal(rows, x.flatten(2)[:, :, places].transpose(1, 2))
    assert len(set((places // 40).tolist())) == len(set((places % 40).tolist())) == 40  # spread over rows and columns


def test_layers_share_statistics_only_where_they_see_the_same_windows():
    names = ("one", "same", "strided")
    modules = [nn.Conv2d(4, 8, 3), nn.Conv2d(4, 16, 3), nn.Conv2d(4, 8, 3, stride=2)]
    layers = [Layer(name, 0, name, module, "weight", None, False) for name, module in zip(names, modules, strict=True)]
    observer, x = Observer(layers, ("gram",), True, 1), random(1, 4, 9, 9)
    with observer, torch.no_grad():
        for module in modules:
            module(x)
    stats = observer.stats()
    assert stats["one"].gram is stats["same"].gram
    assert [stats[name].tokens for name in names] == [49, 49, 16]


@pytest.mark.parametrize(
    "family", ["resnet", *(pytest.param(x, marks=pytest.mark.nightly) for x in ("regnet", "convnext"))]
)
def test_the_walk_over_pruned_convolutions_equals_the_models_own_forward_bit_for_bit(family):
    batches = [{"pixel_values": random(3, 3, 32, 32)}, {"pixel_values": random(2, 3, 32, 32, seed=1)}]
    check_walk(vision_families.build(family), vision_families.build(family), batches, convolutions=True)


def chosen(model, *targets, ignore=()):
    return {x.name for x in select_layers(model, find_layers(model, convolutions=True), targets, ignore)}


def test_convolutions_are_chosen_by_targets_that_match_no_linear_layer():
    model, place = vision_families.build("convnext"), "convnext.encoder.stages.0.layers.0"
    linear = {layer.name for layer in find_layers(model)}
    assert chosen(model) == chosen(model, "Linear") == linear
    assert chosen(model, "convnext.encoder.stages.0") == {f"{place}.pwconv1", f"{place}.pwconv2"}
    groups = {f"{place}.dwconv.weight.{group}" for group in range(16)}
    assert chosen(model, f"{place}.dwconv") == groups
    assert chosen(model, f"{place}.dwconv.weight.3", "Linear") == linear | {f"{place}.dwconv.weight.3"}
    assert chosen(model, "Linear", "Conv2d", ignore=[f"{place}.dwconv"]) == chosen(model, "Linear", "Conv2d") - groups
    resnet = vision_families.build("resnet")
    assert len(chosen(resnet, "re:.*")) == 14
    shortcuts = {name for name in chosen(resnet, "Conv2d") if "shortcut" in name}
    assert len(shortcuts) == 2
    assert chosen(resnet, "Conv2d", ignore=["re:.*shortcut"]) == chosen(resnet, "Conv2d") - shortcuts


class Scaled(nn.Conv2d):
    """A convolution that computes something else."""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.ConvTranspose2d(8, 8, 3), "is a transposed convolution"),
        (Scaled(8, 8, 3), "is a Scaled, which may change its weight"),
        (nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last), "is not contiguous in memory"),
    ],
)
def test_what_has_no_view_is_refused_by_name(module, words):
    model = vision_families.build("vit")
    model.vit.layers[0].add_module("extra", module)
    with pytest.raises(BillhookError, match=f"vit.layers.0.extra cannot be pruned, it {words}"):
        chosen(model, "vit.layers.0.extra")


def test_convolutions_that_are_not_asked_for_are_not_pruned():
    resnet = vision_families.build("resnet")
    with pytest.raises(BillhookError, match="has no linear layer inside its blocks"):
        prune(resnet, sparsity=0.5, criterion="magnitude")


@pytest.fixture(scope="module")
def images():
    return random(40, 3, 32, 32, seed=3)


def asked(family, **changes):
    """What is asked of a run: half of all weights of convolutions, and of linear layers where there are any."""
    targets = {"convnext": ["Linear", "re:.*stages.0.*dwconv"]}.get(family, ["Conv2d"])
    return {"sparsity": 0.5, "criterion": "wanda", "allocator": "uniform", "targets": targets, "samples": 40} | changes


@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_pruned_convolutions_are_written_and_opened_by_stock_transformers(family, tmp_path, images):
    memory = vision_families.build(family)
    memory.save_pretrained(tmp_path / "dense")
    report = prune(tmp_path / "dense", calibration=images, output=tmp_path / "out", **asked(family))
    assert sum(x.zeros for x in report.layers) == sum(x.n for x in report.layers) // 2
    found = verify(tmp_path / "out")
    assert found.ok
    assert found.zeros == sum(x.zeros for x in report.layers)
    prune(memory, calibration=images, **asked(family))
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(images).logits, memory(images).logits)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["resnet", "regnet", "convnext"])
@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt", "admm", "ria", "dsnot", "gblm", "wandapp"])
def test_every_kind_of_criterion_and_n_m_work_on_convolutions(family, criterion, tmp_path, images):
    given = {"pixel_values": images, "labels": [number % 10 for number in range(40)]}
    model = vision_families.build(family)
    report = prune(model, calibration=given, **asked(family, criterion=criterion))
    assert abs(sum(x.zeros for x in report.layers) - sum(x.n for x in report.layers) / 2) <= len(report.layers)
    wide = [x.layer for x in report.layers if x.shape[1] % 4 == 0]
    model.save_pretrained(tmp_path / "m")
    changes = {"criterion": criterion, "pattern": "2:4", "sparsity": None, "targets": wide}
    prune(tmp_path / "m", calibration=given, output=tmp_path / "out", **asked(family, **changes))
    assert verify(tmp_path / "out").ok


@pytest.mark.nightly
@pytest.mark.parametrize("by", ["model", "block"])
def test_recovery_keeps_the_zeros_of_convolutions_and_packing_makes_them_smaller(by, tmp_path):
    images = random(320, 3, 32, 32, seed=3)
    vision_families.build("resnet").save_pretrained(tmp_path / "dense")
    prune(tmp_path / "dense", calibration=images, output=tmp_path / "out", **asked("resnet", sparsity=0.8))
    given = {"tokens": 256, "rate": 0.01} if by == "model" else {}
    recover(tmp_path / "out", calibration=images, output=tmp_path / "better", by=by, **given)
    assert verify(tmp_path / "better").ok
    assert verify(tmp_path / "better").zeros == verify(tmp_path / "out").zeros
    pack(tmp_path / "better", tmp_path / "packed")
    assert verify(tmp_path / "packed").ok
    dense, packed = load_model(tmp_path / "better"), load(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(dense(images).logits, packed(images).logits)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert sha256(tmp_path / "again/model.safetensors") == sha256(tmp_path / "better/model.safetensors")
