"""`billhook bench` with models of every kind; the processes of the models are those of test_packed_format_page.py."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bert
import multimodal_families
import pytest
import tiny
import torch
import vision_families
from command import billhook as command
from command import done, listing
from documentation import check_fields
from sparse_models import prune_at_random
from transformers import BertConfig, PreTrainedModel, WhisperConfig, WhisperForConditionalGeneration

from billhook import BillhookError, pack
from billhook.architectures.config import image_shape, named_tokens
from billhook.cli.bench import draw
from billhook.packed import bench_worker, benchmark
from billhook.packed.bench_inputs import Run, random_inputs, runs_of
from billhook.packed.benchmark import Side, Speed, Spread

BUILD = {
    "vit": lambda: vision_families.build("vit"),
    "bert": bert.model,
    "llava": lambda: multimodal_families.build("llava"),
    "dinov2": vision_families.encoder,
    "blip": lambda: multimodal_families.build("blip-2"),
    "llama": lambda: tiny.llama().model,  # without a head
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense models, and the first three packed, too."""
    folder = tmp_path_factory.mktemp("models")
    for name, build in BUILD.items():
        prune_at_random(build()).save_pretrained(folder / name)
    for name in ("vit", "bert", "llava"):
        pack(folder / name, folder / f"packed-{name}")
    tiny.save(folder / "text", words=False)
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64, "num_mel_bins": 8}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    WhisperForConditionalGeneration(WhisperConfig(**small, **special)).save_pretrained(folder / "whisper")
    return folder


class Here:
    """A worker in this process."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        facts = bench_worker.loaded(path, options)
        self.model: PreTrainedModel = facts.pop("model")
        self.answers: list[dict[str, Any]] = [facts]

    def send(self, run: Run | None) -> None:
        self.answers.append({"peak_bytes": 1} if run is None else bench_worker.speeds(self.model, run))

    def recv(self) -> dict[str, Any]:
        return self.answers.pop(0)


@pytest.fixture
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the models, where `bench` runs in this process, with a single forward pass for each figure."""

    @contextmanager
    def workers(paths: Sequence[Path], options: dict[str, Any]) -> Iterator[list[Here]]:
        yield [Here(path, options) for path in paths]

    monkeypatch.setattr(benchmark, "_workers", workers)
    monkeypatch.setattr(bench_worker, "SECONDS", 1e-9)
    monkeypatch.chdir(models)
    return models


@pytest.mark.parametrize(
    ("name", "options", "runs", "new"),
    [
        ("vit", (), [(1, None), (2, None)], None),
        ("bert", (), [(1, 16), (2, 16)], None),  # 128 tokens do not fit its context
        ("llava", ("--prompt", "5,9", "--new", "3"), [(1, 5), (1, 9), (2, 5), (2, 9)], 3),
    ],
)
def test_a_packed_model_of_every_kind_is_measured_against_its_dense_one(
    here: Path, name: str, options: tuple[str, ...], runs: list[Any], new: int | None
) -> None:
    words = ("bench", f"packed-{name}", "--against", name, "--batch", "1,2", "--rounds", "2", *options)
    printed = done(*words, "--json").json
    check_fields("bench --json", printed)
    assert printed["new"] == new
    dense, packed = printed["models"]
    assert (dense["sparsity"], packed["sparsity"]) == (None, pytest.approx(0.6, abs=0.05))
    for cells in (dense["cells"], packed["cells"]):
        assert [(cell["batch"], cell["prompt"]) for cell in cells] == runs
    for cell in packed["cells"]:
        kinds = ("prefill", "decode") if new else ("prefill",)
        assert all(cell[kind]["median"] > 0 and cell[f"{kind}_speedup"]["median"] > 0 for kind in kinds)
        assert new or cell["decode"] is cell["decode_speedup"] is None


@pytest.mark.parametrize(
    ("name", "expected", "absent"),
    [
        ("vit", "images/s", ("prompt", "tokens/s", "decode", "prefill")),
        ("bert", "tokens/s", ("images", "decode", "prefill")),
        ("llava", "decode tokens/s", ("images",)),
        ("dinov2", "images/s", ("prompt",)),
        ("llama", "tokens/s", ("decode",)),
    ],
)
def test_the_table_has_the_columns_that_have_a_meaning(
    here: Path, name: str, expected: str, absent: tuple[str, ...]
) -> None:
    new = ("--new", "2") if name == "llava" else ()
    out = done("bench", name, "--batch", "1", "--rounds", "1", *new).out
    assert expected in out
    assert not [word for word in absent if word in out]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (
            ("whisper",),
            "whisper is whisper, which reads input_features: bench measures models that read text or images",
        ),
        (("blip",), "which reads pixel_values before it generates text"),
        (("vit", "text"), "vit reads images and text generates text: measure them in two runs"),
        (("bert", "--against", "vit"), "vit reads images and bert reads text"),
        (("vit", "--prompt", "4"), "vit reads images, and has no prompts: leave out --prompt"),
        (("vit", "--new", "4"), "vit reads images and generates nothing: leave out --new"),
        (("bert", "--new", "4"), "bert reads text and generates nothing: leave out --new"),
        (
            ("bert", "--prompt", "65"),
            "bert reads at most 64 tokens, and a prompt of 65 is longer: give smaller --prompt.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(
    models: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], match: str
) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setattr(benchmark, "_workers", None)
    before = listing(models)
    ran = command("bench", *words)
    assert (ran.code, match in ran.err) == (2, True), ran.err
    assert listing(models) == before


def test_models_of_one_name_in_two_folders_both_have_room_for_the_prompt(tmp_path: Path) -> None:
    for folder, context in (("a", 32), ("b", 128)):
        tiny.save(tmp_path / folder / "model", tiny.llama(max_position_embeddings=context), words=False)
    with pytest.raises(BillhookError, match="reads at most 32 tokens"):
        runs_of([tmp_path / "a" / "model", tmp_path / "b" / "model"], [1], [40], 2)


def test_forward_passes_are_repeated_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(99))
    monkeypatch.setattr(bench_worker, "time", SimpleNamespace(perf_counter=lambda: 0.15 * next(clock)))
    model, calls = vision_families.build("vit"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert bench_worker.speeds(model, Run(3)) == {"prefill": pytest.approx(3 * 2 / 0.3)}
    assert len(calls) == 2


def test_random_prompts_hold_no_token_that_the_configuration_names() -> None:
    named = {"video_token_id": 0, "other_token_index": 1, "ends_token_id": [2, 3], "vocab_size": 5}
    config = BertConfig(pad_token_id=None, token_id_of_no_use=4)
    config.to_dict = lambda: {"text_config": named, "eos_token_id": None}  # type: ignore[method-assign]
    assert named_tokens(config) == {0, 1, 2, 3}
    model = multimodal_families.build("llava")
    ids = random_inputs(model, Run(8, 500, 2))
    assert set(range(multimodal_families.VOCABULARY)) - set(ids.flatten().tolist()) == {
        *(0, 1, 2),
        multimodal_families.IMAGE,
    }
    assert torch.equal(ids, random_inputs(model, Run(8, 500, 2)))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"image_size": 32}, (3, 32, 32)),
        ({"image_size": [16, 24], "num_channels": 1}, (1, 16, 24)),
        ({"vision_config": SimpleNamespace(image_size=336)}, (3, 336, 336)),
        ({}, (3, 224, 224)),
    ],
)
def test_images_have_the_size_of_the_configuration(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    assert image_shape(SimpleNamespace(**config)) == shape


@pytest.mark.parametrize(
    ("cell", "title"),
    [
        (
            Speed(2, 9, Spread(1, 1, 1), Spread(1, 1, 1), Spread(5, 5, 5), Spread(7, 7, 7)),
            "Tokens generated per second",
        ),
        (Speed(2, 9, Spread(1, 1, 1), prefill_speedup=Spread(7, 7, 7)), "Tokens read per second"),
        (Speed(2, None, Spread(1, 1, 1), prefill_speedup=Spread(7, 7, 7)), "Images read per second"),
    ],
)
def test_the_picture_shows_what_is_measured(cell: Speed, title: str) -> None:
    sides = [Side(f"{x}", True, x, 1, 1, 1.0, [cell]) for x in (0.5, 0.6)]
    drawn = draw(sides)
    assert drawn is not None
    assert title in drawn
    assert "7.00x" in drawn
    assert "5.00x" not in drawn
    assert ("prompt 9" in drawn) == (cell.prompt is not None)
