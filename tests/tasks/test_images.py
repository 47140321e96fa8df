"""Image classifiers through the whole tool, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import vision_families
from command import done, refused
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from billhook import BillhookError, load_model, prune, verify
from billhook.architectures.layers import find_layers
from billhook.evaluation.rows import evaluate_rows
from billhook.images.corpus import Picture, pictures
from billhook.images.labels import class_numbers
from billhook.tasks.base import Drawing, Home
from billhook.tasks.opening import task_of

NAMES = dict(enumerate(("cat", "dog", "emu", "fox", "gnu", "hen", "ibis", "jay", "koi", "lion")))


def save(folder, family="vit"):
    model = vision_families.build(family, id2label=NAMES)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    save(folder / "vit")
    random = np.random.default_rng(0)
    for number, name in enumerate(NAMES.values()):
        (folder / "images" / name).mkdir(parents=True)
        for image in range(3):
            pixels = random.integers(0, 255, (40 + number, 36 + image, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{image}.png")
    return folder


@pytest.mark.gate
def test_a_classifier_is_pruned_scored_and_opened_by_stock_transformers(place):
    out = place / "out"
    options = ["--samples", "20", "--criterion", "wanda", "--sparsity", "0.5"]
    done("prune", place / "vit", *options, "--calibration", place / "images", "-o", out)
    assert verify(out).ok
    assert json.loads((out / "billhook.json").read_text())["steps"][0]["made_by"]["lost"]["unit"] == "image"
    assert (out / "preprocessor_config.json").read_bytes() == (place / "vit/preprocessor_config.json").read_bytes()
    done("eval", out, "--data", place / "images", "--against", place / "vit", "--report")
    report = json.loads((out / "report.json").read_text())
    scores = report["evaluations"][0]
    model, dense = (AutoModelForImageClassification.from_pretrained(place / x).eval() for x in ("out", "vit"))
    processor, right, agreed, kl = AutoImageProcessor.from_pretrained(out), 0, 0, 0.0
    for number, name in NAMES.items():
        for file in sorted((place / "images" / name).iterdir()):
            x = processor(Image.open(file), return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                q, p = model(x).logits[0].log_softmax(-1), dense(x).logits[0].log_softmax(-1)
            right, agreed = right + int(q.argmax() == number), agreed + int(q.argmax() == p.argmax())
            kl += float((p.exp() * (p - q)).sum()) / 30
    assert (scores["inputs"], scores["top1"]) == (30, right / 30)
    assert scores["top1_error"] == pytest.approx((scores["top1"] * (1 - scores["top1"]) / 30) ** 0.5)
    assert (scores["against"]["top1_agreement"], scores["against"]["kl"]) == pytest.approx((agreed / 30, kl), rel=1e-4)
    assert f"Score it: billhook eval {place / 'packed'}" in done("pack", out, "-o", place / "packed").err
    packed = json.loads(done("eval", place / "packed", "--data", place / "images", "--json").out)
    assert packed["top1"] == right / 30
    card = (out / "README.md").read_text()
    for words in ("image-classification", "AutoModelForImageClassification", "top-1 accuracy", "nats an image"):
        assert words in card
    assert "token" not in card.partition("## Limitations")[0]
    assert "KL divergence, nats an image" in (out / "report.html").read_text()


@pytest.mark.nightly
@pytest.mark.parametrize("family", list(vision_families.CONFIGS))
@pytest.mark.parametrize("recipe", ["good", "best", "gblm", "alphapruning", "atp", "owl"])
def test_every_recipe_meets_the_budget_on_every_architecture(family, recipe, tmp_path, place):
    folder = save(tmp_path / family, family)
    images = str(place / "images")
    found = prune(folder, sparsity=0.5, recipe=recipe, calibration=images, samples=16, output=tmp_path / "out")
    assert abs(sum(x.zeros for x in found.layers) - 0.5 * sum(x.n for x in found.layers)) <= len(found.layers)
    assert verify(tmp_path / "out").ok
    assert found.lost is not None
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    zeros = sum(int((p == 0).sum()) for p in model.state_dict().values())
    assert zeros >= sum(x.zeros for x in found.layers)


def test_with_the_dense_prefix_masks_are_those_of_the_dense_models_activations():
    dense, images = vision_families.build("vit"), torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    squares, handles = {}, []
    for layer in find_layers(dense):

        def note(module, args, name=layer.name):
            squares[name] = squares.get(name, 0) + args[0].flatten(0, -2).square().sum(0)

        handles.append(layer.module.register_forward_pre_hook(note))
    with torch.no_grad():
        dense(pixel_values=images)
    expected = {}
    for layer in find_layers(dense):
        scores = (layer.weight.abs() * squares[layer.name].sqrt()).flatten()
        keep = torch.ones(scores.numel())
        keep[scores.argsort()[: scores.numel() // 2]] = 0
        expected[layer.name] = keep.view(layer.shape).bool()
    model = vision_families.build("vit")
    prune(model, sparsity=0.5, recipe="wanda-vision", calibration=images)
    for layer in find_layers(model):
        assert torch.equal(layer.weight != 0, expected[layer.name])
    pruned = vision_families.build("vit")
    prune(pruned, sparsity=0.5, recipe="wanda-vision", prefix="pruned", calibration=images)
    assert any(not torch.equal(layer.weight != 0, expected[layer.name]) for layer in find_layers(pruned))


@pytest.mark.gate
def test_methods_are_compared_by_accuracy(place, tmp_path):
    options = ["--data", place / "images", "--calibration", place / "images", "--samples", "12", "--criteria", "wanda"]
    done("compare", place / "vit", *options, "--sparsities", "0.3,0.6", "--limit", "20", "-o", tmp_path / "c")
    cells = json.loads((tmp_path / "c" / "compare.json").read_text())["cells"]
    for cell in cells:
        model = load_model(place / "vit")
        prune(model, sparsity=cell["sparsity"], criterion="wanda", calibration=str(place / "images"), samples=12)
        images = task_of(model).inputs(str(place / "images"), model, Home(place / "vit"))
        assert cell["top1"] == evaluate_rows(model, images.batches(20), task_of(model)).top1
        assert cell["kl"] > 0
    assert "top-1 accuracy" in (tmp_path / "c" / "compare.md").read_text()
    assert (tmp_path / "c" / "top1.svg").is_file()
    assert "top-1 accuracy" in done("compare", "--runs", tmp_path / "c", tmp_path / "c").out


def test_labels_are_matched_by_name_by_number_and_for_unnamed_classes_by_order():
    def of(*labels):
        return [Picture(f"{label}.png", lambda: None, label) for label in labels]

    assert class_numbers(of("dog", "cat", None, 3), NAMES, "x") == [1, 0, -1, 3]
    assert class_numbers(of("Tench_tinca", "7"), {0: "tench", 1: "Tench tinca", 7: "b"}, "x") == [1, 7]
    assert class_numbers(of("b", "a"), {0: "LABEL_0", 1: "LABEL_1"}, "x") == [1, 0]
    for labels in (("wolf",), (10,), ("b", "a", "c")):
        with pytest.raises(BillhookError, match="is none of the model's"):
            class_numbers(of(*labels), NAMES if len(labels) < 3 else {0: "LABEL_0", 1: "LABEL_1"}, "x")


def test_an_npz_file_gives_the_pixels_and_labels_it_holds(place, tmp_path):
    random = np.random.default_rng(1)
    x, y = random.integers(0, 255, (5, 32, 32, 3), dtype=np.uint8), np.array([3, 1, 0, 9, 2])
    np.savez(tmp_path / "data.npz", x=x, y=y)
    model = load_model(place / "vit")
    images = task_of(model).inputs(str(tmp_path / "data.npz"), model, Home(place / "vit"))
    (batch,) = images.batches(None)
    assert batch["labels"].tolist() == y.tolist()
    torch.testing.assert_close(batch["pixel_values"], torch.tensor(x).permute(0, 3, 1, 2) / 127.5 - 1)
    assert evaluate_rows(model, images.batches(2), task_of(model)).inputs == 2


def test_grey_transparent_and_differently_sized_images_are_read(place, tmp_path):
    for number, mode in enumerate(("L", "RGBA", "P", "LA", "1", "I;16")):
        Image.new(mode, (20 + number, 50)).save(tmp_path / f"{number}.png")
    model = load_model(place / "vit")
    drawn = task_of(model).samples(str(tmp_path), model, Home(place / "vit"), Drawing(samples=6))
    assert drawn.batch["pixel_values"].shape == (6, 3, 32, 32)
    assert drawn.batch["labels"].tolist() == [-1] * 6


def an_array(folder):
    with open(folder / "a.npz", "wb") as file:
        np.save(file, np.zeros(3))


def a_damaged_archive(folder):
    np.savez(folder / "a.npz", x=np.zeros((2, 8, 8), dtype=np.uint8))
    data = bytearray((folder / "a.npz").read_bytes())
    data[len(data) // 3] ^= 255
    (folder / "a.npz").write_bytes(data)


def damaged(folder):
    (folder / "a.png").write_bytes(b"\x89PNG not an image")


def huge(folder):
    Image.new("1", (10_000, 10_000)).save(folder / "a.png")


def a_text(folder):
    (folder / "a.txt").write_text("words")


@pytest.mark.parametrize(
    ("make", "source", "words"),
    [
        (damaged, "", "a.png cannot be read as an image"),
        (huge, "", "a.png has more than .* pixels"),
        (lambda folder: None, "", "holds no images"),
        (a_text, "a.txt", "it holds no images, and the model reads images"),
        (a_text, "nothing", "no such file or folder"),
        (lambda folder: np.savez(folder / "a.npz", x=np.zeros((2, 3))), "a.npz", "needs x, uint8"),
        (lambda folder: np.savez(folder / "a.npz", z=np.zeros(2)), "a.npz", "it has z"),
        (an_array, "a.npz", "is not a readable .npz file"),
        (a_damaged_archive, "a.npz", "is not a readable .npz file"),
        (lambda folder: (folder / "a.npz").write_bytes(b"PK"), "a.npz", "is not a readable .npz file"),
        (a_text, "hub:", "form is hub:NAME"),
    ],
)
def test_bad_images_are_refused_by_name(place, tmp_path, make, source, words):
    make(tmp_path)
    where = source if source.startswith("hub:") else str(tmp_path / source)
    with pytest.raises(BillhookError, match=words):
        prune(place / "vit", sparsity=0.5, criterion="wanda", calibration=where, samples=1, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_left_out_by_choice_and_counted(place, tmp_path, caplog):
    shutil.copytree(place / "images", tmp_path / "images")
    damaged(tmp_path / "images" / "cat")
    damaged(tmp_path / "images" / "dog")
    options = ["--calibration", tmp_path / "images", "--samples", "30", "--criterion", "wanda", "--sparsity", "0.5"]
    named = "(cat|dog)/a.png .*--skip-unreadable leaves out"
    refused(tmp_path, "prune", place / "vit", *options, "--samples", "32", "-o", tmp_path / "out", match=named)
    done("prune", place / "vit", *options, "--skip-unreadable", "-o", tmp_path / "out")
    for words in ("2 of 32 were left out", "cat/a.png cannot be read", "dog/a.png cannot be read"):
        assert words in caplog.text
    step = json.loads((tmp_path / "out" / "billhook.json").read_text())["steps"][0]
    assert (step["made_by"]["calibration"]["skipped"], step["made_by"]["calibration"]["samples"]) == (2, 30)
    scores = json.loads(
        done("eval", tmp_path / "out", "--data", tmp_path / "images", "--skip-unreadable", "--json").out
    )
    clean = json.loads(done("eval", tmp_path / "out", "--data", place / "images", "--json").out)
    assert scores.pop("skipped") == 2
    assert scores == clean
    damaged(tmp_path)
    with pytest.raises(BillhookError, match="none of 1 images can be read"):
        prune(place / "vit", sparsity=0.5, calibration=str(tmp_path / "a.png"), skip_unreadable=True)


def test_models_with_other_classes_are_not_compared():
    batch = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.tensor([1, 9])}
    model, few = vision_families.build("vit"), vision_families.build("vit", num_labels=3)
    with pytest.raises(BillhookError, match="10 and 3 outputs: only models with the same classes"):
        evaluate_rows(model, [batch], task_of(model), against=few)


def test_what_does_not_fit_the_model_is_refused(place, tmp_path):
    few = {"sparsity": 0.5, "criterion": "wanda", "samples": 4}
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(BillhookError, match="1 images, fewer than 4: use samples=1"):
        prune(place / "vit", calibration=str(tmp_path), **few)
    with pytest.raises(BillhookError, match="leave out length"):
        prune(place / "vit", calibration=str(place / "images"), length=64, **few)
    with pytest.raises(BillhookError, match="needs the label of every image"):
        prune(place / "vit", calibration=str(tmp_path), sparsity=0.5, recipe="gblm", samples=1)
    with pytest.raises(BillhookError, match="pixel values must be floats"):
        prune(vision_families.build("vit"), calibration=torch.zeros(3, 32, 32), **few)
    with pytest.raises(BillhookError, match="has no processor"):
        prune(vision_families.build("vit"), calibration=str(place / "images"), **few)
    given = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": [1, 12]}
    with pytest.raises(BillhookError, match="labels hold 12, and the model has 10 classes"):
        prune(vision_families.build("vit"), calibration=given, **few)
    assert all(picture.label is None for picture in pictures(str(tmp_path), "calibration"))
