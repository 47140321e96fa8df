"""What is an image of a SOURCE, its pixels and its label."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from billhook import BillhookError
from billhook.images.corpus import Picture, pictures
from billhook.images.labels import class_numbers

pytestmark = pytest.mark.gate


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "png"), ("I;16", "tiff"), ("I", "tiff")])
def test_images_of_sixteen_bits_are_those_of_eight(tmp_path, mode, kind):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    deep = eight.astype(np.uint16 if mode == "I;16" else np.int32) * 257
    Image.fromarray(deep).save(tmp_path / f"deep.{kind}")
    with Image.open(tmp_path / f"deep.{kind}") as image:
        assert image.mode == mode
    (found,) = pictures(str(tmp_path), "calibration")
    assert (np.asarray(found.load()) == eight[..., None]).all()


def test_images_of_floats_are_refused_by_name(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a.tiff")
    with pytest.raises(BillhookError, match=r"a\.tiff cannot be read as an image \(its pixels are F from 0 to 1"):
        pictures(str(tmp_path), "calibration")[0].load()


def test_hidden_files_are_no_images_and_splits_are_no_labels(tmp_path):
    for name in ("cat/a.png", "cat/.thumbs/a.png", "cat/._a.png", "dog/deep/b.PNG", "__MACOSX/cat/._a.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9)).save(tmp_path / "images" / name)
    found = pictures(str(tmp_path / "images"), "calibration")
    assert [(Path(picture.name).name, picture.label) for picture in found] == [("a.png", "cat"), ("b.PNG", "dog")]
    for split in ("train", "test"):
        shutil.copytree(tmp_path / "images", tmp_path / "both" / split)
    with pytest.raises(BillhookError, match="both holds the folders of a split dataset, such as test: give one"):
        pictures(str(tmp_path / "both"), "calibration")


def test_a_label_that_several_classes_have_is_refused_by_its_numbers():
    names = {0: "crane", 1: "+", 2: "crane"}
    for label, match in (("crane", "the name of several of the model's classes, 0, 2"), ("-", "none of the model's")):
        with pytest.raises(BillhookError, match=match):
            class_numbers([Picture("a", Image.new, label)], names, "source")
    assert class_numbers([Picture("a", Image.new, label) for label in ("2", "+")], names, "source") == [2, 1]


def test_labels_of_rows_are_numbers_or_names():
    image = Image.new("L", (9, 9))
    found = pictures([{"image": image, "label": label} for label in (np.int64(1), 2, "cat", None)], "calibration")
    assert [picture.label for picture in found] == [1, 2, "cat", None]
    for label in (True, 1.0, [1]):
        with pytest.raises(BillhookError, match="row 1: a label is a whole number or the name of a class, found"):
            pictures([{"image": image, "label": label}], "calibration")
