"""Calibration text that a model writes itself: sampled from its own distribution, deterministic, and what is
refused."""

import json

import pytest
import tiny
import torch
from command import done, refused, workplace
from families import FAMILIES, build
from resuming import whole_and_in_parts

from billhook import BillhookError, JobError, allocate, load_calibration, load_model, measure, prune, prune_
from billhook.store.checkpoint import load_tokenizer
from billhook.tasks.base import Drawing, Home, Samples
from billhook.tasks.self_text import save_windows, saved_windows, write_windows
from billhook.tasks.text_generation import TASK


@torch.no_grad()
def one_document(model: torch.nn.Module, start: int, length: int, seed: int = 0) -> list[int]:
    """The slow way: all tokens again for every new one."""
    random, ids = torch.Generator().manual_seed(seed), torch.tensor([[start]])
    while ids.shape[1] < length:
        likely = model(ids, use_cache=False).logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(likely, 1, generator=random)], 1)
    return ids[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_drawn_from_the_whole_distribution(family: str) -> None:
    model = build(family).eval()
    model.config.bos_token_id, model.config.eos_token_id, model.generation_config = 5, None, None
    assert write_windows(model, 1, 20).tolist() == [one_document(model, 5, 20)]


def test_documents_are_cut_into_windows_and_begin_with_the_start_token() -> None:
    model = tiny.llama().eval()
    ids = write_windows(model, 70, 12)
    assert ids.shape == (70, 12)
    assert ids.dtype == torch.int64
    model.config.eos_token_id = list(range(100))  # so that documents end
    model.generation_config = None
    whole = write_windows(model, 6, 12, seed=3).flatten().tolist()
    documents = [[256, *rest] for rest in _parts(whole, 256)]
    assert len(documents) > 6
    assert max(map(len, documents)) <= 12
    assert all(token >= 100 for document in documents for token in document[1:])
    assert documents[0] == one_document_until_end(model, documents[0])


def one_document_until_end(model: torch.nn.Module, document: list[int]) -> list[int]:
    """The same document from the first row of a batch of six, drawn the slow way."""
    random, ids = torch.Generator().manual_seed(3), torch.full((6, 1), 256)
    for _ in range(len(document) - 1):
        with torch.no_grad():
            likely = model(ids, use_cache=False).logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(likely, 1, generator=random)], 1)
    return ids[0].tolist()


def _parts(ids: list[int], mark: int) -> list[list[int]]:
    found: list[list[int]] = []
    for token in ids:
        if token == mark:
            found.append([])
        else:
            found[-1].append(token)
    return found


def test_the_seed_decides_the_result() -> None:
    model = tiny.llama().train()
    one, same, other = (write_windows(model, 3, 16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert model.training


def test_documents_begin_with_the_end_token_where_there_is_no_start_token() -> None:
    model = tiny.llama()
    model.generation_config = None
    model.config.bos_token_id, model.config.eos_token_id = None, [257, 9]
    assert write_windows(model, 1, 4)[0, 0] == 257
    model.config.eos_token_id = None
    with pytest.raises(BillhookError, match="neither bos_token_id nor eos_token_id"):
        write_windows(model, 1, 4)


@pytest.mark.gate
def test_documents_that_end_early_cost_no_more_passes() -> None:
    model, passes = tiny.llama(), []
    model.config.eos_token_id, model.generation_config = list(range(200)), None
    model.register_forward_hook(lambda *_: passes.append(1))
    write_windows(model, 4, 100)
    assert len(passes) < 600  # and not 99 for every four documents
    model.config.eos_token_id = list(range(258))
    with pytest.raises(JobError, match="ends every document at once"):
        write_windows(model, 4, 100)


def test_written_windows_can_be_used_for_gradients() -> None:
    model = tiny.llama()
    prune_(model, allocate(measure(model, []), 0.5), criterion="gblm", batches=write_windows(model, 4, 16))


def test_impossible_requests_are_refused() -> None:
    model = tiny.llama()
    with pytest.raises(BillhookError, match="context of 128"):
        write_windows(model, 1, 129)
    with pytest.raises(BillhookError, match="windows=0"):
        write_windows(model, 0, 8)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(JobError, match="not finite"):
        write_windows(model, 1, 8)


def samples(model, source: str, **drawing) -> Samples:
    return TASK.samples(source, model, Home(), Drawing(**({"samples": 8, "length": 16} | drawing)))


def test_windows_of_the_text_come_first_and_the_model_writes_the_rest(tmp_path) -> None:
    model = load_model(tiny.save(tmp_path / "model"))
    file = tiny.text_file(tmp_path / "text.txt", 1)  # five windows of 16 tokens
    found = samples(model, f"self:{file}", samples=6)
    given = load_calibration(str(file), load_tokenizer(tmp_path / "model"), samples=5, length=16)
    ids = torch.cat([given.ids, write_windows(model, 1, 16)])
    assert torch.equal(found.batch["input_ids"], ids)
    assert (found.source, found.sampling) == (f"self:{file}", "packed, 1 written by the model")
    assert torch.equal(samples(model, "self:").batch["input_ids"], write_windows(model, 8, 16))
    assert torch.equal(
        samples(model, f"self:{file}", samples=3).batch["input_ids"],
        samples(model, str(file), samples=3).batch["input_ids"],
    )


def test_saved_windows_are_read_again(tmp_path) -> None:
    found = samples(tiny.llama(), "self:")
    save_windows(tmp_path / "written.safetensors", found)
    kept = saved_windows(tmp_path / "written.safetensors")
    assert torch.equal(kept.ids, found.batch["input_ids"])
    assert (kept.source, kept.digest, kept.sampling) == (found.source, found.digest, found.sampling)
    tiny.save(tmp_path / "model")
    with pytest.raises(BillhookError, match="does not hold calibration windows"):
        saved_windows(tmp_path / "model" / "model.safetensors")


def test_a_resumed_run_does_not_write_its_text_again(tmp_path, monkeypatch) -> None:
    source, calls = tiny.save(tmp_path / "model"), []
    fields = {"sparsity": 0.5, "criterion": "wanda", "calibration": "self:", "samples": 8, "length": 16}
    done_at_once = prune(source, output=tmp_path / "pruned", **fields)
    assert not list(done_at_once.output.glob("*written*"))
    with monkeypatch.context() as patch:
        patch.setattr(
            "billhook.tasks.self_text.write_windows", lambda *a, **k: calls.append(a) or write_windows(*a, **k)
        )
        one, other = whole_and_in_parts(source, tmp_path, 2, **fields)
    assert one == other
    assert len(calls) == 4  # samples and held-out windows, of the whole run and the first part of the other


def test_the_source_is_offered_and_used_by_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(workplace(tmp_path))
    refused(tmp_path, "prune", "model", "--sparsity", 0.5, "-o", "out", match="--calibration self:")
    ran = done(
        "prune", "model", "--sparsity", 0.5, "--calibration", "self:", "--samples", 4, "--length", 16, "-o", "out"
    )
    assert ran.code == 0
    record = json.loads((tmp_path / "out" / "billhook.json").read_text())
    assert '"self:"' in json.dumps(record)
