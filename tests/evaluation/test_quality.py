"""What was lost: the numbers are those of scoring the two models side by side, streamed or not; and verdicts."""

import copy
import math
from typing import Any

import pytest
import tiny
import torch

from billhook import evaluate, prune
from billhook.engine.resources import Resources
from billhook.engine.streaming import open_streamed
from billhook.evaluation.quality import SCALE, VERDICTS, Reference, verdict
from billhook.evaluation.scoring import NEXT_TOKEN
from billhook.steps.lost import loss_of
from billhook.steps.prune_job import PruneRequest
from billhook.steps.request import open_request

IDS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))


def test_the_loss_is_that_of_scoring_both_models_side_by_side() -> None:
    model = tiny.llama()
    dense = copy.deepcopy(model)
    reference = Reference.of(model, {"input_ids": IDS}, NEXT_TOKEN, "text")
    prune(model, sparsity=0.5, criterion="magnitude")
    found, expected = reference.compare(model), evaluate(model, IDS, against=dense)
    assert expected.against is not None
    assert found.kl == pytest.approx(expected.against.kl, rel=1e-3)  # 256 of 258 tokens, and the rest as one
    assert found.kl_error == pytest.approx(expected.against.kl_error, rel=1e-2)
    assert found.kl_99 == pytest.approx(expected.against.kl_99, rel=1e-2)
    assert found.kl_999 == pytest.approx(expected.against.kl_999, rel=1e-2)
    assert found.top1_agreement == pytest.approx(expected.against.top1_agreement, abs=1e-6)
    assert found.token_ppl == pytest.approx(expected.token_ppl, rel=1e-5)
    assert found.dense_token_ppl == pytest.approx(expected.against.token_ppl, rel=1e-5)
    assert (found.windows, found.length, found.source) == (6, 24, "text")


def test_a_run_is_judged_on_windows_that_it_did_not_use(tmp_path) -> None:
    source, text = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=2)), tiny.text_file(tmp_path / "text.txt")
    fields: dict[str, Any] = {"sparsity": 0.5, "criterion": "wanda", "calibration": text, "samples": 8, "length": 32}
    lost = prune(source, output=tmp_path / "out", **fields).lost
    assert lost is not None
    assert (lost.held_out, lost.windows) == (True, 4)
    lost = prune(tiny.llama(num_hidden_layers=2), sparsity=0.5, criterion="wanda", calibration=IDS).lost
    assert lost is not None
    assert not lost.held_out
    assert "calibration windows" in str(lost)


def test_nothing_is_lost_by_a_model_that_did_not_change(tmp_path) -> None:
    model = tiny.llama(num_hidden_layers=2)
    found = Reference.of(model, {"input_ids": IDS}, NEXT_TOKEN, "text").compare(model)
    assert (found.verdict, found.top1_agreement, found.token_ppl) == ("near lossless", 1.0, found.dense_token_ppl)
    assert abs(found.kl or 0) < 1e-6


def test_a_streamed_model_has_the_same_numbers_as_one_in_memory(tmp_path) -> None:
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=2))
    stream = open_streamed(source)
    streamed = Reference.of(stream.model, {"input_ids": IDS}, NEXT_TOKEN, "text", resources=Resources(stream=stream))
    model = tiny.llama(num_hidden_layers=2)
    whole = Reference.of(model, {"input_ids": IDS}, NEXT_TOKEN, "text")
    prune(model, sparsity=0.5, criterion="magnitude")
    assert streamed.compare(model) == whole.compare(model)


@pytest.mark.parametrize(
    ("kl", "word"),
    [
        (0.0199, "near lossless"), (0.02, "good"), (0.0999, "good"), (0.1, "usable"), (0.2999, "usable"),
        (0.3, "degraded"), (0.999, "degraded"), (1.0, "broken"), (None, "broken"),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_divergence(kl: float | None, word: str) -> None:
    assert verdict(kl) == word
    assert word in SCALE
    assert list(VERDICTS.values()) == sorted(VERDICTS.values())


def test_without_held_out_rows_the_first_of_the_calibration_rows_are_scored() -> None:
    model = tiny.llama(num_hidden_layers=1)
    opened = open_request(PruneRequest(model, sparsity=0.5, criterion="wanda", calibration=IDS), True, "A test")
    for windows in (2, 4):
        lost = loss_of(opened, windows)()
        expected = Reference.of(model, {"input_ids": IDS[:windows]}, NEXT_TOKEN, "tokens").compare(model)
        assert lost is not None
        assert (lost.windows, lost.held_out) == (windows, False)
        assert lost.token_ppl == expected.token_ppl


def test_a_model_that_predicts_nan_is_broken_and_its_numbers_are_null() -> None:
    model = tiny.llama(num_hidden_layers=1, tie_word_embeddings=False)
    reference = Reference.of(model, {"input_ids": IDS}, NEXT_TOKEN, "text")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    found = reference.compare(model)
    assert (found.verdict, found.kl, found.token_ppl) == ("broken", None, None)
    assert "not finite" in str(found)
