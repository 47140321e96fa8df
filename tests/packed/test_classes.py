"""`billhook generate` with image classifiers, and with models that generate nothing."""

import json
from pathlib import Path

import bert
import numpy as np
import pytest
import tiny
import torch
import vision_families
from command import billhook as command
from command import done
from documentation import check_fields
from PIL import Image
from sparse_models import prune_at_random
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from billhook import pack
from billhook.images.corpus import pictures
from billhook.images.pixels import Reader
from billhook.packed.classification import likeliest
from billhook.tasks.image_inputs import Images

NAMES = dict(enumerate(("cat", "dog", "emu", "fox", "gnu", "hen", "ibis", "jay", "koi", "lion")))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, dense and packed, two images, and models that classify nothing."""
    folder = tmp_path_factory.mktemp("classes")
    prune_at_random(vision_families.build("vit", id2label=NAMES)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    pack(folder / "vit", folder / "packed")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(random.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    bert.save(folder / "bert")
    vision_families.encoder().save_pretrained(folder / "dinov2")
    (folder / "whisper").mkdir()
    (folder / "whisper" / "config.json").write_text('{"model_type": "whisper", "is_encoder_decoder": true}')
    tiny.save(folder / "llama")
    return folder


def expected(place: Path, name: str) -> list[tuple[str, float]]:
    """What stock transformers says of an image."""
    model = AutoModelForImageClassification.from_pretrained(place / "vit").eval()
    inputs = AutoImageProcessor.from_pretrained(place / "vit")(Image.open(place / name), return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits[0].softmax(-1).topk(5)
    return [(NAMES[int(n)], float(p)) for n, p in zip(best.indices, best.values, strict=True)]


def test_a_packed_and_a_dense_classifier_print_the_classes_that_transformers_finds(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    known = expected(place, "a.png")
    for model in ("vit", "packed"):
        printed = done("generate", model, "--image", "a.png", "--json").json
        check_fields("generate --json of an image", printed)
        assert [found["label"] for found in printed["classes"]] == [label for label, _ in known]
        assert [found["probability"] for found in printed["classes"]] == pytest.approx([p for _, p in known], rel=1e-4)
        lines = done("generate", model, "--image", "a.png").out.splitlines()
        assert lines == [f"{p:6.1%}  {label}" for label, p in known]


def test_several_images_are_printed_with_their_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    images = ("--image", "b.png", "--image", "a.png")
    lines = done("generate", "packed", *images).out.splitlines()
    assert (lines[0], lines[6], len(lines)) == ("b.png", "a.png", 12)
    printed = done("generate", "packed", *images, "--json").json
    check_fields("generate --json of several images", printed)
    for one in printed["images"]:
        assert [found["label"] for found in one["classes"]] == [label for label, _ in expected(place, one["image"])]


def test_classes_that_do_not_exclude_each_other_have_probabilities_of_their_own(place: Path) -> None:
    model = vision_families.build("vit", problem_type="multi_label_classification", num_labels=2)
    images = Images("a", pictures(place / "a.png", "evaluation"), None, Reader.of(place / "vit", False, "a"))
    with torch.no_grad():
        logits = model(images.batch([0])["pixel_values"]).logits[0]
    found = likeliest(model, images)[0]
    assert dict(found) == pytest.approx({f"LABEL_{n}": float(value.sigmoid()) for n, value in enumerate(logits)})


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("vit",), "vit is an image classifier: give it images with --image FILE, and no PROMPT"),
        (("packed", "What?", "--image", "a.png"), "packed is an image classifier"),
        (("vit", "--image", "nothing.png"), "nothing.png: there is no such file"),
        (("bert", "x"), "bert is bert, a model for fill-mask, which continues no text: score it with billhook eval"),
        (("dinov2", "--image", "a.png"), "dinov2 is dinov2, a model for feature-extraction, which continues no text"),
        (("whisper", "x"), "a model for automatic-speech-recognition, which continues no text"),
        (("llama",), "The PROMPT is missing: give llama a text to continue"),
        (("llama", "x", "--image", "a.png"), "llama reads no images with its text: leave out --image"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_generated_is_said_before_the_model_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], match: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("billhook.packed.loading.load", None)
    ran = command("generate", *words, "--json")
    assert (ran.code, match in ran.err) == (2, True), ran.err
    assert json.loads(ran.out)["exit_code"] == 2
