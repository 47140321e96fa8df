"""Image-text models through the whole tool with questions from a file, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from command import done
from multimodal_families import build
from PIL import Image
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor, LlavaProcessor

from billhook import BillhookError, load_model, prune, verify
from billhook.engine.batch import LABELS, Ragged, rows_of, select_rows, split_rows
from billhook.recovery.masked_adam import MaskedAdam
from billhook.recovery.training import steps_
from billhook.steps.recover import RecoverRequest, prepare, run
from billhook.tasks.base import Drawing, Home
from billhook.tasks.opening import task_of

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def processor():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True)]})
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(**sizes),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    made = processor()
    image = made.tokenizer.convert_tokens_to_ids("<image>")
    model = build("llava", vocabulary=len(made.tokenizer), image_token_id=image, image_token_index=image)
    model.save_pretrained(folder / "model")
    made.save_pretrained(folder / "model")
    random, rows = np.random.default_rng(0), []
    for number in range(14):
        mode = ("RGB", "L", "RGBA")[number % 3]
        shape = (40 + number, 36, *((len(mode),) if len(mode) > 1 else ()))
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8), mode).save(folder / f"{number}.png")
        row = {"image": f"{number}.png", "question": "What" + "?" * (number % 3), "answer": "ab"[number % 2] * 2}
        if number % 2:
            user = {"role": "user", "content": row.pop("question")}
            row["messages"] = [user, {"role": "assistant", "content": row.pop("answer")}]
        rows.append(json.dumps(row))
    (folder / "questions.jsonl").write_text("\n".join(rows))
    return folder


def prompt_of(made, text):
    """A question about an image by the processor's own template."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return made.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@pytest.mark.gate
def test_the_decoder_is_pruned_and_the_tower_keeps_its_bytes(place, tmp_path):
    data, out = place / "questions.jsonl", tmp_path / "out"
    options = ["--samples", "8", "--criterion", "wanda", "--sparsity", "0.5", "--calibration", data]
    done("prune", place / "model", *options, "-o", out)
    assert verify(out).ok
    before, after = (load_file(folder / "model.safetensors") for folder in (place / "model", out))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("language_model.model.layers") for name in changed)
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (place / "model" / name).read_bytes()
    record = json.loads((out / "billhook.json").read_text())["steps"][0]["made_by"]
    assert (record["stacks"], record["lost"]["unit"]) == (["language"], "answer")
    done("eval", out, "--data", data, "--against", place / "model", "--report")
    scores = json.loads((out / "report.json").read_text())["evaluations"][0]
    made = AutoProcessor.from_pretrained(out)
    model, dense = (AutoModelForImageTextToText.from_pretrained(x).eval() for x in (out, place / "model"))
    nll, agreed, right = [], [], 0
    for number in range(14):
        prompt = prompt_of(made, "What" + "?" * (number % 3))
        text, image = prompt + " " + "ab"[number % 2] * 2, Image.open(place / f"{number}.png").convert("RGB")
        inputs = made(images=image, text=text, return_tensors="pt")
        with torch.no_grad():
            q, p = (m(**inputs).logits[0, -4:-1].log_softmax(-1) for m in (model, dense))
        answer = inputs["input_ids"][0, -3:]  # with the space that the template puts before it
        nll.append(-float(q.gather(1, answer[:, None]).mean()))
        right += bool((q.argmax(-1) == answer).all())
        agreed.append(float((q.argmax(-1) == p.argmax(-1)).float().mean()))
    assert (scores["inputs"], scores["unit"], scores["exact_match"]) == (14, "answer", right / 14)
    assert scores["nll"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert scores["against"]["top1_agreement"] == pytest.approx(np.mean(agreed))
    assert '"What is this?" --image IMAGE' in done("pack", out, "-o", tmp_path / "packed").err
    asked = ["What?", "--image", place / "0.png", "--max-new-tokens", "3", "--json"]
    texts = [json.loads(done("generate", folder, *asked).out)["text"] for folder in (tmp_path / "packed", out)]
    inputs = made(images=Image.open(place / "0.png").convert("RGB"), text=prompt_of(made, "What?"), return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert texts == [made.tokenizer.decode(expected, skip_special_tokens=True)] * 2
    card = (out / "README.md").read_text()
    for words in ("image-text-to-text", "AutoModelForImageTextToText", "exact match", "nats a token of the answers"):
        assert words in card


def test_rows_of_different_lengths_are_not_padded(place):
    model = AutoModelForImageTextToText.from_pretrained(place / "model")
    samples = task_of(model).samples(str(place / "questions.jsonl"), model, Home(), Drawing(10))
    assert isinstance(samples.batch, Ragged)
    assert (len(samples), rows_of(samples.heldout)) == (10, 4)
    batches = split_rows(samples.batch, 4)
    assert sum(map(rows_of, batches)) == 10
    for batch in batches:
        assert bool(batch["attention_mask"].all())
        assert ((batch[LABELS] != -100).sum(1) == 3).all()
    rows = [int(select_rows(samples.batch, slice(n, n + 1))["input_ids"].sum()) for n in range(10)]
    assert rows == [int(row.sum()) for batch in batches for row in batch["input_ids"]]


def test_recovery_learns_from_rows_of_different_lengths_without_padding(place, tmp_path):
    prune(place / "model", output=tmp_path / "pruned", sparsity=0.5, criterion="magnitude", allocator="uniform")
    fields = {"calibration": str(place / "questions.jsonl"), "teacher": place / "model", "batch_size": 3}
    job = prepare(RecoverRequest(model=tmp_path / "pruned", output=tmp_path / "out", rate=0.01, tokens=300, **fields))
    seen = []

    def objective(student, teacher, batch):
        seen.append(batch)
        return job.setup.objective(student, teacher, batch)

    adam = MaskedAdam(job.setup.trained)
    assert len(list(steps_(replace(job.setup, objective=objective, steps=2), adam, 1e-6))) == 2
    adam.close()
    assert sum(map(rows_of, seen)) == 6
    assert len({batch["input_ids"].shape[1] for batch in seen}) > 1
    assert all(bool(batch["attention_mask"].all()) and int((batch[LABELS] == -100).sum()) for batch in seen)
    assert run(job).loss.unit == "answer"
    assert verify(tmp_path / "out").ok
    trained = {kept.name.partition(".layers.")[0] for kept in job.setup.trained}
    assert not any("vision" in name or "projector" in name for name in trained), trained
    assert any("norm" in kept.name for kept in job.setup.trained)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"question": "a", "answer": "b"}, "line 1 has no image"),
        ({"image": "none.png", "question": "a", "answer": "b"}, "there is no file"),
        ({"image": "0.png", "question": "a"}, "line 1 needs a text in 'answer'"),
        ({"image": "0.png", "messages": [{"role": "user", "content": "a"}]}, "a question and its answer"),
        ([1], "not an object with fields"),
        (None, "no .jsonl file, and the model reads rows"),
        ({"image": "bad.png", "question": "a", "answer": "b"}, "cannot be read as an image"),
    ],
)
def test_questions_that_cannot_be_read_are_refused_by_name(place, tmp_path, line, words):
    Image.open(place / "0.png").save(tmp_path / "0.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    path = tmp_path / ("q.txt" if line is None else "q.jsonl")
    path.write_text(json.dumps(line))
    with pytest.raises(BillhookError, match=words):
        prune(place / "model", sparsity=0.5, criterion="wanda", calibration=path, samples=1, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_questions_with_unreadable_images_are_left_out_by_choice(place, tmp_path):
    Image.open(place / "0.png").save(tmp_path / "0.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    rows = [{"image": name, "question": "a", "answer": "b"} for name in ("bad.png", "0.png", "0.png")]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = load_model(place / "model")
    found = task_of(model).inputs(tmp_path / "q.jsonl", model, Home(place / "model", skip_unreadable=True))
    assert (len(list(found.batches(None))), found.skipped) == (2, 1)


def test_a_processor_that_lacks_a_package_is_refused_by_its_name(place, tmp_path, monkeypatch):
    def lacking(*args, **kwargs):
        raise ImportError("SomeProcessor requires the torchvision library but it was not found")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lacking)
    with pytest.raises(BillhookError, match=r"package that is missing.*torchvision"):
        prune(place / "model", sparsity=0.5, calibration=place / "questions.jsonl", output=tmp_path / "out")
